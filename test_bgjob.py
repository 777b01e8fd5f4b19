"""The tests of bgjob, in the order of its rooms; a test's docstring is the rule it guards."""

import ast
import asyncio
import calendar
import contextlib
import copy
import functools
import gc
import importlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import logging
import operator
import os
import pickle
import random
import re
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import types
import typing
import weakref
import zoneinfo
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import (
    AbstractContextManager,
    AsyncExitStack,
    ExitStack,
    asynccontextmanager,
    closing,
    contextmanager,
    suppress,
)
from contextvars import ContextVar
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo
from itertools import islice, takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, NamedTuple, TypeAlias
from urllib.parse import quote, urlencode, urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bgjob
from bgjob import (
    BgjobError,
    Depends,
    Job,
    Options,
    PostgresStore,
    RedisStore,
    Registry,
    Run,
    RunCancelled,
    RunFailed,
    ScheduleError,
    SQLiteStore,
    State,
    Store,
    StoreError,
    _Book,
    _Claim,
    _count,
    _Cron,
    _dumps,
    _duration,
    _Every,
    _iso,
    _meaning,
    _newest,
    _no_password,
    _packed,
    _retry_delay,
    _retryable,
    _schedule_of,
    _span,
    _spread,
    _summary,
    _to_ms,
    _verdict,
    _zone,
    current_run,
)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as of `pytest &` in a script; the processes of tests inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
START = datetime(2026, 1, 1, tzinfo=UTC)
MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000
# so many random schedules, and minutes of faults for seconds
THOROUGH = int(os.environ.get("BGJOB_TEST_THOROUGH", "0"))
INSTALLED = Path(bgjob.__file__).name == "__init__.py"


def python(*arguments: str | Path, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python with this bgjob, in a folder; every test that needs a process of its own ends within 20 s."""
    environment = os.environ if INSTALLED else {**os.environ, "PYTHONPATH": os.path.dirname(bgjob.__file__)}
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=20,
                          check=False, cwd=folder, env=environment)  # fmt: skip


def each_test(run: Callable[..., Callable[..., None]]) -> Callable[[type], type]:
    """Run the async tests of a class by a decorator; those that have one of their own are left."""

    def decorate(cls: type) -> type:
        for name, test in [*vars(cls).items()]:
            if name.startswith("test_") and inspect.iscoroutinefunction(test):
                setattr(cls, name, run(test))
        return cls

    return decorate


# 2 Time and 3 Schedules -----------------------------------------------------------------------------------------------


def at(*parts: int, zone: str = "UTC", fold: int = 0) -> int:
    """The instant of a reading, in milliseconds."""
    return (datetime(*parts, tzinfo=zoneinfo.ZoneInfo(zone), fold=fold) - EPOCH) // timedelta(milliseconds=1)


def upto(last: int, found: Iterator[int]) -> list[int]:
    return [*takewhile(lambda tick: tick <= last, found)]


def moment(tick: int) -> datetime:
    return EPOCH + timedelta(milliseconds=tick)


def refused(function: object, *arguments: object) -> str:
    with pytest.raises(ScheduleError) as caught:
        function(*arguments)  # type: ignore[operator]
    return str(caught.value)


class TestTime:
    @pytest.mark.parametrize(
        ("text", "ms"),
        [(90, 90_000), (0.25, 250), ("250ms", 250), ("30s", 30_000), ("1h30m", 5_400_000), ("2d", 172_800_000),
         ("1.5h", 5_400_000), (timedelta(minutes=5), 300_000), (" 5m 30 s ", 330_000), (0, 0), (1e-9, 0)],
    )  # fmt: skip
    def test_durations(self, text: object, ms: int) -> None:
        """Seconds, timedelta and text mean the same everywhere."""
        assert _duration("every", text) == ms

    @pytest.mark.parametrize(
        "value", ["", "5", "5x", "m5", "-5s", "1m1m", "5s1m", "5min", "1 day", "\u0665s", float("nan"), True, None]
    )
    def test_no_durations(self, value: object) -> None:
        """What isn't a duration is refused with the value seen, the forms and the units."""
        assert refused(_duration, "every", value) == (
            f"every={value!r}: not a duration; write seconds (90), a timedelta, or text such as '30s' or '1h30m'"
            "; the units are d, h, m, s and ms"
        )

    @pytest.mark.parametrize(
        ("value", "least", "wrong"),
        [(-1, 0, "negative"), (timedelta(-1), 0, "negative"), (float("-inf"), 0, "negative"), (0, 1, "too short"),
         ("0.4ms", 1, "too short"), ("0.9s", 1000, "too short"), (float("inf"), 0, "more than 100 years"),
         ("36526d", 0, "more than 100 years"), (10**400, 0, "more than 100 years")],
    )  # fmt: skip
    def test_wrong_durations(self, value: object, least: int, wrong: str) -> None:
        """Negative, too short and endless durations are refused, each with a reason."""
        expected = f"every={value!r:.80}: {wrong}; write a duration of at least {least} ms, for instance '30s'"
        assert refused(_duration, "every", value, least) == expected

    @given(st.lists(st.integers(0, 999), min_size=5, max_size=5))
    def test_compositions(self, numbers: list[int]) -> None:
        """A text of several units is their sum."""
        text = " ".join(f"{number}{unit}" for number, unit in zip(numbers, bgjob._UNITS, strict=True))
        assert _duration("x", text) == sum(map(operator.mul, numbers, bgjob._UNITS.values()))

    def test_instants(self) -> None:
        """An instant is whole milliseconds in UTC; a naive datetime is refused."""
        when = datetime(2025, 1, 1, 1, 0, 0, 1500, tzinfo=timezone(timedelta(hours=1)))
        assert _to_ms("at", when) == at(2025, 1, 1) + 1
        assert (_iso(at(2025, 1, 1)), _iso(at(2025, 1, 1) + 1)) == ("2025-01-01T00:00:00Z", "2025-01-01T00:00:00.001Z")
        assert [_span(ms) for ms in (0, 1, 10_000, 1_234_560)] == ["0 s", "0.001 s", "10 s", "1,234.56 s"]
        message = refused(_to_ms, "at", when.replace(tzinfo=None))
        assert message.endswith("1500): needs an aware datetime, for instance datetime.now(UTC)")

    @given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(1, 10**9))
    def test_spread(self, text: str, limit: int) -> None:
        """Jitter depends on the text alone and stays below its limit."""
        assert 0 <= _spread(text, limit) == _spread(text, limit) < limit

    def test_virtual_time(self) -> None:
        """The virtual clock jumps only where nothing is ready: what can be read already comes first, at its time."""

        async def main() -> list[float]:
            loop, read = asyncio.get_running_loop(), list[float]()
            here, there = socket.socketpair()
            with here, there:
                there.send(b"x")
                loop.add_reader(here, lambda: (read.append(loop.time()), loop.remove_reader(here)))
                await asyncio.sleep(1000)
                await asyncio.sleep(2**25)  # from there on asyncio's own resolution would be lost
            return [*read, round(loop.time() - 2**25)]

        with asyncio.Runner(loop_factory=bgjob._VirtualLoop) as runner:
            assert runner.run(main()) == [0, 1000]

    def test_one_room_reads_clocks(self) -> None:
        """Only the Time room reads a clock."""
        source = Path(bgjob.__file__).read_text()
        begin, end = (source[: source.index(banner)].count("\n") for banner in ("# 2 Time -", "# 3 Schedules -"))
        calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
        names = [(ast.unparse(call.func), call.lineno) for call in calls]
        readers = [line for name, line in names if re.search(r"^time\.|datetime\.(now|utcnow|today)$", name)]
        assert readers
        assert all(begin < line <= end for line in readers)


class TestZones:
    def test_nothing_is_imported_before_it_is_needed(self) -> None:
        """Neither croniter nor zoneinfo is imported with the module, nor for "UTC"."""
        code = (
            "import bgjob, sys; bgjob._zone('UTC'); bgjob._Every(5);"
            "sys.exit(bool({'croniter', 'dateutil', 'zoneinfo'} & set(sys.modules)))"
        )
        assert subprocess.run([sys.executable, "-c", code], cwd=os.path.dirname(bgjob.__file__)).returncode == 0

    def test_names_and_zones(self) -> None:
        """ "UTC" is datetime's own, other names are zoneinfo's, a tzinfo is taken as it is, pytz's by its name."""
        pytz = type("Pytz", (tzinfo,), {"localize": None, "__str__": lambda self: "Europe/Rome"})()  # knows no fold
        assert _zone("UTC") is UTC
        assert _zone("Europe/Rome") is _zone(pytz) is zoneinfo.ZoneInfo("Europe/Rome")
        offset = timezone(timedelta(hours=2))
        assert _zone(offset) is offset
        with pytest.raises(NotImplementedError):
            _zone(tzinfo())  # can't tell the time

    @pytest.mark.parametrize(
        ("tz", "remedy"),
        [
            ("Europe/Roma", "did you mean 'Europe/Rome'?"),
            ("europe/rome", "did you mean 'Europe/Rome'?"),
            ("utc", "did you mean 'UTC'?"),
            *dict.fromkeys(
                ["GMT+2", "+02", "Etc/GMT+15", "", "/etc/x", "../x\0", "Europe", "\ud800", 5, None, "x" * 5000],
                "write 'Europe/Rome', or 'Etc/GMT-2' for UTC+2; if no name is known, pip install tzdata",
            ).items(),
        ],
    )
    def test_messages(self, tz: object, remedy: str) -> None:
        """An unknown zone is refused with the value seen and a remedy; an offset is never answered with another."""
        assert refused(_zone, tz) == f"tz={tz!r:.60}: unknown time zone; {remedy}"

    @pytest.mark.skipif(not hasattr(time, "tzset"), reason="this system can't change its zone within a process")
    @pytest.mark.parametrize(
        "here", ["Europe/Rome", "Australia/Lord_Howe", "America/Santiago", "Europe/Dublin", "GMT+2"]
    )
    def test_local_reads_as_the_machine(self, here: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """ "local" maps like the machine's zone in both directions, in gaps and overlaps too."""
        name = here.replace("GMT+2", "Etc/GMT+2")
        monkeypatch.setenv("TZ", here)
        time.tzset()
        try:
            local, named = _zone("local"), zoneinfo.ZoneInfo(name)
            for tick in range(at(2025, 1, 1), at(2025, 12, 31), HOUR // 2):
                assert moment(tick).astimezone(local).replace(tzinfo=None) == moment(tick).astimezone(named).replace(
                    tzinfo=None
                )
            for text, month in [("30 2 * * *", 1), ("15 0,1 * * *", 1), ("*/30 * * * *", 4), ("*/30 * * * *", 10)]:
                one, other = (_Cron(text, zone).ticks(at(2025, month, 1)) for zone in (local, named))
                assert [*islice(one, 600)] == [*islice(other, 600)]
        finally:
            monkeypatch.undo()
            time.tzset()


# fmt: off
LAYOUT = (
    "must be 5 fields (minute, hour, day of month, month, day of week), 6 with seconds first but no year,"
    " or @yearly @annually @monthly @weekly @daily @midnight @hourly"
)
PLAIN = "must be plain ASCII text of at most 1000 characters, such as '*/5 * * * *'"
NEVER = "never matches: none of its months has such a day; L is the last one"
RANDOM = "random fields differ in each process: use jitter="
MESSAGES = {
    "61 * * * *": "minute must be 0-59, got 61",
    "60 * * * * *": "second must be 0-59, got 60",
    "* * 0 * *": "day of month must be 1-31, got 0",
    "* * 32W * *": "day of month must be 1-31, got 32",
    "* * * foo *": "month must be 1-12 or JAN-DEC, got FOO",
    "* * * * 9L": "day of week must be 0-7 or SUN-SAT, got 9",
    "* * * * MONDAY": "day of week must be 0-7 or SUN-SAT, got MONDAY",
    "-1 * * * *": "minute must be 0-59, got -1",
    "5-61 * * * *": "minute must be 0-59, got 61",
    "*-5 * * * *": "minute must be 0-59, got *-5",
    "1_0 * * * *": "minute must be 0-59, got 1_0",
    "*/2/3 * * * *": "minute must be 0-59, got */2/3",
    "1,,2 * * * *": "minute must be 0-59, got nothing",
    "*/61 * * * *": "step of minute must be 1-60, got 61",
    "*/0 * * * *": "step of minute must be 1-60, got 0",
    "* * * * */8": "step of day of week must be 1-7, got 8",
    "R(0-9)/2 * * * *": f"minute must be 0-59, got R(0-9)/2; {RANDOM}",
    "* 1,h * * *": f"hour must be 0-23, got H; {RANDOM}",
    "* * * * MON#6": "day of week must be 0-7 or SUN-SAT, got MON#6",
    "* 5L * * *": "hour must be 0-23, got 5L",
    "0 0 12 ? * 2-6": "day of week 2-6 beside '?': in Quartz 1 is Sunday, here Monday; write names",
    "0 0 30 2 *": NEVER,
    "0 0 */30 * MON#2": NEVER,
    "0 0 5,29W * *": "29W: not every month has that day; write LW for the last working day",
    "": f"{LAYOUT}; got 0",
    "0 0 12 1 1 ? 2026": f"{LAYOUT}; got 7",
    "@daily 5": f"{LAYOUT}; got 2",
    "\u0665 * * * *": PLAIN,
    5: PLAIN,
}
SPELLINGS = [
    ("@yearly", "0 0 1 1 *"), ("@monthly", "0 0 1 * *"),
    ("@Midnight", "0 0 * * *"), (" @HOURLY\n", "0 * * * *"), ("  0\t0  * * *\n", "0 0 * * *"),
    ("0 0 0 * * *", "0 0 * * *"), ("05 007 * * *", "5 7 * * *"), ("0 0 * jan-Mar *", "0 0 * 1,2,3 *"),
    ("0 0 * * Mon,wed,FRI", "0 0 * * 1,3,5"), ("0 0 ? * MON", "0 0 * * 1"), ("0 0 1 * ?", "0 0 1 * *"),
    ("0 0 12 ? * MON-FRI", "0 12 * * 1-5"), ("0 0 12 ? * 0,6", "0 12 * * SAT,SUN"), ("0 0 ? * 5", "0 0 * * FRI"),
    ("0 0 12 ? * */2", "0 12 * * */2"), ("0 0 12 ? * MON#2", "0 12 * * 1#2"),
    ("0 0 * * 7", "0 0 * * 0"), ("0 0 * * 5-7", "0 0 * * 5,6,0"), ("0 0 * * 0-7", "0 0 * * *"),
    ("0 0 * * 1-7/2", "0 0 * * 1,3,5,0"), ("0 0 * * SAT-SUN", "0 0 * * 6,0"), ("0 0 * * FRI-SUN", "0 0 * * 5,6,0"),
    ("0 0 * * FRI-MON", "0 0 * * 5,6,0,1"), ("0 0 * * 7-2", "0 0 * * 0,1,2"), ("0 0 * * 7-0", "0 0 * * 0"),
    ("0 0 * * */7", "0 0 * * 0"), ("0 7-7 * * *", "0 7 * * *"), ("0 0 * * MON-MON", "0 0 * * 1"),
    ("30-30/5 * * * *", "30 * * * *"), ("0 0 * 3-3 *", "0 0 * 3 *"), ("0 22-2 * * *", "0 22,23,0,1,2 * * *"),
    ("0 17-9/2 * * *", "0 17,19,21,23,1,3,5,7,9 * * *"), ("0 0 25-5/3 * *", "0 0 25,28,31,3 * *"),
    ("0 0 1 NOV-FEB *", "0 0 1 11,12,1,2 *"), ("5/15 * * * *", "5,20,35,50 * * * *"), ("59/15 * * * *", "59 * * * *"),
    ("0 0 * * 7/2", "0 0 * * 0,2,4,6"), ("0 0 * * MON/2", "0 0 * * 1,3,5"), ("*/60 * * * *", "0 * * * *"),
    ("0-58/1,59 0 * * *", "0-59 0 * * *"), ("0 0 1-31 * MON", "0 0 * * *"), ("0 0 1 * 0-6", "0 0 * * *"),
    ("0 0 30,31 2 MON", "0 0 * 2 1"), ("0 0 * * 5l", "0 0 * * FRIL"), ("0 0 * * 7#1,SUN#1", "0 0 * * 0#1"),
]
DAYS = [
    ("0 0 13 * FRI", "01-03 01-10 01-13 01-17"), ("0 0 31 * MON", "01-06 01-13 01-20 01-27 01-31 02-03"),
    ("0 0 30 4 MON", "04-07 04-14 04-21 04-28 04-30"), ("0 0 */2 * MON", "01-13 01-27 02-03 02-17"),
    ("0 0 1-7 * */7", "01-05 02-02 03-02 04-06"), ("0 0 L * *", "01-31 02-28 03-31 04-30"),
    ("0 0 15,L 2-3 *", "02-15 02-28 03-15 03-31"),
    ("0 0 L * FRI", "01-03 01-10 01-17 01-24 01-31 02-07 02-14 02-21 02-28 03-07 03-14 03-21 03-28 03-31"),
    ("0 0 2-31,L 2-3 *", "02-02 02-03"), ("0 0 LW * *", "01-31 02-28 03-31 04-30 05-30"),
    ("0 0 1W * *", "01-01 02-03 03-03 04-01"), ("0 0 15W * *", "01-15 02-14 03-14 04-15 05-15 06-16"),
    ("0 0 28W * *", "01-28 02-28 03-28 04-28 05-28 06-27"),
    ("0 0 1W,15W,LW 2,3 *", "02-03 02-14 02-28 03-03 03-14 03-31"), ("0 0 3,LW 5 *", "05-03 05-30"),
    ("0 0 * * FRIL", "01-31 02-28 03-28"), ("0 0 * * MON#1,WED#3", "01-06 01-15 02-03 02-19"),
    ("0 0 * * 7#5", "03-30 06-29 08-31"), ("0 0 * * 1L,7#1", "01-05 01-27 02-02 02-24"),
    ("0 0 */2 * MON#2", "01-13 06-09"), ("0 0 * * 1,5#2", "01-06 01-10 01-13 01-20"),
    ("0 0 1 * MON#1", "01-01 01-06 02-01 02-03"), ("0 0 15W * MON#1", "01-06 01-15 02-03 02-14"),
    ("0 0 L * 5L", "01-31 02-28 03-28 03-31"), ("0 0 LW,3 * FRI#1,SUNL", "01-03 01-26 01-31 02-03 02-07 02-23 02-28"),
]
# fmt: on


class TestCronParsing:
    @pytest.mark.parametrize("text", MESSAGES)
    def test_messages(self, text: object) -> None:
        """What can't be read, or would be read wrongly, is refused with the value seen and a remedy."""
        assert refused(_Cron, text, UTC) == f"cron={text!r}: {MESSAGES[text]}"

    @pytest.mark.parametrize(
        "text", ["1," * 5_000_000, "9" * 900 + " * * * *", "*/" + "9" * 900 + " * * * *", "* * * * 1#" + "9" * 900]
    )
    def test_huge_text(self, text: str) -> None:
        """A text, or a number in it, of any length is refused in words and not repeated in full."""
        assert len(refused(_Cron, text, UTC)) < 300

    def test_without_croniter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A copied file without croniter says what to install."""
        monkeypatch.setitem(sys.modules, "croniter", None)
        with pytest.raises(ScheduleError, match=r"^cron='@daily': needs croniter; pip install croniter$") as caught:
            _Cron("@daily", UTC)
        assert isinstance(caught.value.__cause__, ImportError)

    @pytest.mark.parametrize(("text", "meaning"), SPELLINGS)
    def test_spellings(self, text: str, meaning: str) -> None:
        """Each spelling means its plain list of numbers."""
        start = at(2023, 12, 31, 23)
        assert [*islice(_Cron(text, UTC).ticks(start), 40)] == [*islice(_Cron(meaning, UTC).ticks(start), 40)]

    @pytest.mark.parametrize(("text", "dates"), DAYS)
    def test_days(self, text: str, dates: str) -> None:
        """Both days restricted: either is enough; if one starts with a star, both must match; L, W and # beside all."""
        found = islice(_Cron(text, UTC).ticks(at(2025, 1, 1) - 1), len(dates.split()))
        assert " ".join(f"{moment(tick):%m-%d}" for tick in found) == dates

    def test_wild(self) -> None:
        """A schedule is wild when its minute or hour starts with a star; seconds don't count."""
        wild = ["* * * * *", "*/15,7 2 * * *", "0 */2 * * *", "@hourly", "0 * 2 * * *"]
        fixed = ["7,*/15 2 * * *", "0-59 0-23 * * *", "0 2 * * *", "@daily", "*/10 0 2 * * *"]
        assert [text for text in wild + fixed if _Cron(text, _zone("Europe/Rome")).wild] == wild


class TestCronIteration:
    def test_iterators(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Ticks are later than `after`; iterators don't disturb each other, and a new one doesn't parse the text again."""
        import croniter

        cron, start = _Cron("*/20 * * * *", _zone("Europe/Rome")), at(2025, 1, 1)
        monkeypatch.setattr(croniter.croniter, "__init__", None)
        one, two, three = cron.ticks(0), cron.ticks(start), cron.ticks(start - 1)
        mixed = [[next(one), next(two), next(three)] for _ in range(50)]
        assert [*zip(*mixed, strict=True)] == [
            tuple(20 * MINUTE * n for n in range(1, 51)),
            tuple(start + 20 * MINUTE * n for n in range(1, 51)),
            tuple(start + 20 * MINUTE * n for n in range(50)),
        ]

    @pytest.mark.parametrize("text", ["* * * * *", "30 2 * * *", "0 0 29 2 *", "0 0 1 * MON", "*/7 * * * * *"])
    @pytest.mark.parametrize("zone", ["UTC", "local", "Europe/Rome", "Pacific/Apia", "Africa/Monrovia"])
    @pytest.mark.parametrize("after", [at(1, 6, 1), at(1844, 12, 30), -1, at(9999, 12, 31, 23, 58), 10**40, -(10**30)])
    def test_far_away(self, text: str, zone: str, after: int) -> None:
        """Ticks go on from any instant, through the odd offsets of local mean time, up to the calendar's end."""
        found = [after, *islice(_Cron(text, _zone(zone)).ticks(after), 200)]
        assert found == sorted({*found})
        assert len(found) == 201 or not -(10**20) < after < at(9000, 1, 1) or sys.platform == "win32"

    def test_rare(self) -> None:
        """Forty years without a tick are no end: 29 February on a Sunday, across the year 2100."""
        found = islice(_Cron("0 0 29 2 */7", UTC).ticks(at(2080, 1, 1)), 3)
        assert [moment(tick).year for tick in found] == [2088, 2128, 2156]


# fmt: off
CHANGES = [  # zone, instant after which, and until which, in UTC, text, ticks
    ("Europe/Rome", (2025, 3, 30, 0), (2025, 3, 31, 0, 45), "30 2 * * *", "30 03:00 +0200, 31 02:30 +0200"),
    ("Europe/Rome", (2025, 3, 30, 0, 31), (2025, 3, 30, 1, 20), "*/15 * * * *", "30 01:45 +0100, 30 03:00 +0200, 30 03:15 +0200"),
    ("Europe/Rome", (2025, 3, 30, 0), (2025, 3, 30, 2), "30 * * * *", "30 01:30 +0100, 30 03:30 +0200"),
    ("Europe/Rome", (2025, 3, 30, 0), (2025, 3, 30, 3), "30 2-4 * * *", "30 03:00 +0200, 30 03:30 +0200, 30 04:30 +0200"),
    ("Europe/Rome", (2025, 10, 25, 22), (2025, 10, 26, 4), "30 2 * * *", "26 02:30 +0200"),
    ("Europe/Rome", (2025, 10, 26, 0, 10), (2025, 10, 26, 2, 0), "*/15 * * * *", "26 02:15 +0200, 26 02:30 +0200, 26 02:45 +0200, 26 02:00 +0100, 26 02:15 +0100, 26 02:30 +0100, 26 02:45 +0100, 26 03:00 +0100"),
    ("Europe/Rome", (2025, 10, 26, 0), (2025, 10, 26, 2), "30 * * * *", "26 02:30 +0200, 26 02:30 +0100"),
    ("Europe/Rome", (2025, 10, 26, 0), (2025, 10, 26, 4), "30 2-4 * * *", "26 02:30 +0200, 26 03:30 +0100, 26 04:30 +0100"),
    ("Europe/Rome", (2025, 3, 30, 0), (2025, 3, 30, 1, 15), "0-59/10 2,3 * * *", "30 03:00 +0200, 30 03:10 +0200"),
    ("Europe/Rome", (2025, 10, 26, 1, 10), (2025, 10, 27, 2), "50 2 * * *", "27 02:50 +0100"),
    ("Europe/Rome", (2025, 3, 30, 0), (2025, 3, 30, 4), "*/20 30 2 * * *", "30 03:00 +0200"),
    ("Europe/Rome", (2025, 3, 30, 0), (2025, 3, 31, 1), "*/30 2 * * *", "31 02:00 +0200, 31 02:30 +0200"),
    ("Australia/Lord_Howe", (2025, 10, 4, 15), (2025, 10, 5, 0), "15 2 * * *", "05 02:30 +1100"),
    ("Australia/Lord_Howe", (2025, 10, 4, 15), (2025, 10, 4, 16), "*/15 * * * *", "05 01:45 +1030, 05 02:30 +1100, 05 02:45 +1100, 05 03:00 +1100"),
    ("Australia/Lord_Howe", (2025, 4, 5, 13), (2025, 4, 5, 17), "45 * * * *", "06 00:45 +1100, 06 01:45 +1100, 06 01:45 +1030, 06 02:45 +1030"),
    ("America/Santiago", (2025, 9, 6, 5), (2025, 9, 8, 4), "0 0 * * *", "07 01:00 -0300, 08 00:00 -0300"),
    ("Europe/Dublin", (2025, 3, 30, 0), (2025, 3, 30, 4), "30 1 * * *", "30 02:00 +0100"),
    ("Africa/Casablanca", (2025, 4, 6, 0), (2025, 4, 6, 4), "30 2 * * *", "06 03:00 +0100"),
    ("Antarctica/Troll", (2025, 3, 30, 0), (2025, 3, 30, 4), "30 1-4 * * *", "30 03:00 +0200, 30 03:30 +0200, 30 04:30 +0200"),
    ("Pacific/Apia", (2011, 12, 29, 11), (2011, 12, 31, 11), "0 12 * * *", "29 12:00 -1000, 31 12:00 +1400"),
    ("Pacific/Apia", (2011, 12, 30, 8), (2011, 12, 30, 11), "@hourly", "29 23:00 -1000, 31 00:00 +1400, 31 01:00 +1400"),
    ("Antarctica/Casey", (2009, 10, 17, 16), (2009, 10, 17, 20), "30 0 * * *", "18 00:30 +0800"),
    ("Antarctica/Casey", (2009, 10, 17, 17), (2009, 10, 18, 1), "30 3 * * *", "18 05:00 +1100"),
    ("America/Caracas", (2016, 5, 1, 0), (2016, 5, 1, 12), "45 2 * * *", "01 03:00 -0400"),
    ("Africa/Monrovia", (1972, 1, 6, 12), (1972, 1, 7, 12), "20 0 * * *", "07 00:44:30 +0000"),
]
# fmt: on


class TestDaylightSaving:
    @pytest.mark.parametrize(("zone", "after", "until", "text", "wanted"), CHANGES)
    def test_table(self, zone: str, after: tuple[int], until: tuple[int], text: str, wanted: str) -> None:
        """Fixed: once, at the first of two or right after a jump of at most three hours; wild: whatever reads so."""
        cron = _Cron(text, _zone(zone))
        found = [moment(tick).astimezone(cron.zone) for tick in upto(at(*until), cron.ticks(at(*after)))]
        assert ", ".join(f"{tick:%d %H:%M:%S %z}".replace(":00 ", " ") for tick in found) == wanted


# An oracle: it steps through real instants, reads them in zoneinfo, and knows no cron library -------------------------

NAMES = {name.upper(): n for n, name in enumerate(calendar.month_abbr)}
NAMES.update(SUN=0, MON=1, TUE=2, WED=3, THU=4, FRI=5, SAT=6)
CYCLES = [range(60), range(60), range(24), range(1, 32), range(1, 13), range(7)]


def number(text: str) -> int:
    return NAMES[text.upper()] if text.upper() in NAMES else int(text)


def expand(cycle: range, text: str) -> set[int]:
    """Values of a field, found by walking round from the start to the end and taking every step-th."""
    found, week = set[int](), len(cycle) == 7
    for item in text.split(","):
        span, _, step = item.partition("/")
        begin, end = (span.split("-") * 2)[:2] if span != "*" else (str(cycle[0]), str(cycle[-1]))
        position, last = (number(part) % 7 if week else number(part) for part in (begin, end))
        whole = week and number(begin) < 7 <= number(end) and position == last  # 0-7 is the whole week
        if step and span.isalnum():
            last = cycle[-1]
        for taken in itertools.count():
            if taken % int(step or 1) == 0:
                found.add(position)
            if position == last and (taken or not whole):
                break
            position = cycle[0] if position == cycle[-1] else position + 1
    return found


def is_day(item: str, day: date) -> bool:
    month = [date(day.year, day.month, n + 1) for n in range(calendar.monthrange(day.year, day.month)[1])]
    working = [other for other in month if other.weekday() < 5]
    if item in ("L", "LW"):
        return day == (month if item == "L" else working)[-1]
    if item.endswith("W"):
        return day == min(working, key=lambda d: abs(d.day - int(item[:-1])))
    return day.day in expand(CYCLES[3], item)


def is_weekday(item: str, day: date) -> bool:
    name, _, nth = item.partition("#")
    if nth:
        return number(name) % 7 == day.isoweekday() % 7 and (day.day + 6) // 7 == int(nth)
    if item.endswith("L"):
        return number(item[:-1]) % 7 == day.isoweekday() % 7 and (day + timedelta(7)).month != day.month
    return day.isoweekday() % 7 in expand(CYCLES[5], item)


class Oracle:
    def __init__(self, text: str) -> None:
        *first, days, months, weekdays = text.upper().replace("?", "*").split()
        self.second, self.minute, self.hour = map(expand, CYCLES, ["0", *first][-3:])
        self.days, self.months, self.weekdays = days, expand(CYCLES[4], months), weekdays
        self.wild = any(field.startswith("*") for field in first[-2:])

    @functools.cache  # noqa: B019
    def on(self, day: date) -> bool:
        one = any(is_day(item, day) for item in self.days.split(","))
        other = any(is_weekday(item, day) for item in self.weekdays.split(","))
        star = "*" in (self.days[0], self.weekdays[0])
        return day.month in self.months and (one and other if star else one or other)

    def matches(self, wall: datetime) -> bool:
        time = wall.minute in self.minute and wall.hour in self.hour and wall.second in self.second
        return time and self.on(wall.date())

    def fires(self, window: list[tuple[int, datetime]], step: timedelta) -> list[int]:
        found, seen, last = list[int](), set[datetime](), window[0][1] - step
        for instant, wall in window:
            jump = wall - last - step
            late = timedelta(0) < jump <= timedelta(hours=3) and not self.wild
            skipped = [last + step * n for n in range(1, jump // step + 1)] if late else []
            if any(map(self.matches, skipped)) or (self.matches(wall) and (self.wild or wall not in seen)):
                found.append(instant)
            seen.add(wall)
            last = wall
        return found


CLOCK_CHANGES = """
    Europe/Rome 2025-03-30 2025-10-26, Europe/London 2024-03-31, Europe/Dublin 2025-03-30 2025-10-26,
    Europe/Lisbon 1996-10-27, Europe/Moscow 2011-03-27 2014-10-26, Europe/Istanbul 2015-11-08,
    Europe/Chisinau 2021-03-28, America/New_York 2025-03-09 2025-11-02, America/St_Johns 2010-03-14 2010-11-07,
    America/Santiago 2025-04-06 2025-09-07, America/Havana 2025-03-09 2025-11-02, America/Sao_Paulo 2018-11-04,
    America/Asuncion 2024-03-24, America/Caracas 2007-12-09 2016-05-01, America/Nuuk 2024-03-31 2024-10-27,
    Africa/Cairo 2025-04-25 2025-10-30, Africa/Casablanca 2025-02-23 2025-04-06, Africa/Monrovia 1972-01-07,
    Asia/Beirut 2025-03-30 2025-10-25, Asia/Pyongyang 2015-08-14 2018-05-04, Asia/Kathmandu 1985-12-31,
    Asia/Tehran 2021-03-21 2021-09-21, Asia/Gaza 2023-04-29 2023-10-28, Asia/Vladivostok 2014-10-25,
    Asia/Kolkata 1942-08-31, Australia/Lord_Howe 2025-04-06 2025-10-05, Pacific/Chatham 2025-04-06 2025-09-28,
    Antarctica/Troll 2025-03-30 2025-10-26, Antarctica/Casey 2009-10-17 2010-03-04, Pacific/Apia 2011-12-30,
    Pacific/Fakaofo 2011-12-30, Pacific/Kwajalein 1969-09-30 1993-08-21, Pacific/Kiritimati 1994-12-31
"""


def readings(name: str, begin: int, end: int, step: int) -> list[tuple[int, datetime]]:
    zone = zoneinfo.ZoneInfo(name)
    return [(n, moment(n).astimezone(zone).replace(tzinfo=None, fold=0)) for n in range(begin, end, step)]


def changes() -> Iterator[tuple[str, int, int]]:
    """Zone, instant of the change, and by how many milliseconds the clock jumps there."""
    for line in CLOCK_CHANGES.split(","):
        name, *days = line.split()
        for day in days:
            noon = at(*map(int, day.split("-")))
            steps = readings(name, noon - DAY, noon + 2 * DAY, MINUTE // 2)
            jumps = [(instant, wall - before) for (_, before), (instant, wall) in itertools.pairwise(steps)]
            change, jump = next(found for found in jumps if found[1] != timedelta(minutes=0.5))
            yield name, change, jump // timedelta(milliseconds=1) - MINUTE // 2


class Texts:
    """Random cron texts that tend to fire near a given wall."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice

    def word(self, index: int, near: int) -> str:
        cycle, dice = CYCLES[index], self.dice
        around = cycle[(near + dice.randint(-1, 1) - cycle[0]) % len(cycle)]
        value = around if dice.random() < 0.6 else dice.choice(cycle)
        if dice.random() < 0.3 and index in (4, 5):
            names = calendar.month_abbr if index == 4 else ["sun", "mon", "tue", "wed", "thu", "fri", "sat"]
            return dice.choice([str.upper, str.lower, str.title])(names[value])
        return "7" if index == 5 and value == 0 and dice.random() < 0.4 else str(value)

    def item(self, index: int, near: int) -> str:
        size, begin, end = len(CYCLES[index]), self.word(index, near), self.word(index, near)
        step = f"/{self.dice.choice([1, 2, 3, 5, 7, 15, 20, 30, size]) % size or size}"
        ranges = [f"{begin}-{end}", f"{begin}-{end}{step}", f"{begin}-{begin}{step}"]
        return self.dice.choice([begin, begin, *ranges, begin + step, "*" + step])

    def field(self, index: int, near: int, star: float) -> str:
        items = (self.item(index, near) for _ in range(self.dice.choice([1, 1, 1, 2, 3])))
        return "*" if self.dice.random() < star else ",".join(items)

    def special(self, index: int, day: date) -> str:
        dice = self.dice
        if index == 3:
            near = f"{min(day.day, 28)}W"
            forms = ["L", f"{day.day},L", "LW", near, f"{dice.randint(1, 28)}W,L,5", f"{near},lw", "1-30,L"]
            return dice.choice(forms)
        marks = [f"#{(day.day + 6) // 7}", f"#{dice.randint(1, 5)}", "L", "l", ""]
        words = (self.word(5, day.isoweekday() % 7) for _ in range(dice.choice([1, 1, 2])))
        return ",".join(word + dice.choice(marks) for word in words)

    def days(self, day: date) -> tuple[str, str]:
        star, weekday = self.dice.choice(["*", "*", "?", "*/2", "*/3"]), day.isoweekday() % 7
        kinds = [("*", "*"), ("*", "*"), ("*", "*"), (self.field(3, day.day, 0), self.field(5, weekday, 0))]
        kinds += [(self.field(3, day.day, 0.5), self.field(5, weekday, 0.5))]
        special = self.special(3, day), self.special(5, day)
        return self.dice.choice([*kinds, special, (special[0], star), (star, special[1])])

    def text(self, wall: datetime, seconds: bool) -> str:
        days, weekdays = self.days(wall.date())
        days = days.replace("?", "*") if seconds else days  # with seconds that is Quartz's, and its numbers are refused
        fields = [self.field(1, wall.minute, 0.2), self.field(2, wall.hour, 0.25), days, self.field(4, wall.month, 0.8)]
        return " ".join([*([self.field(0, wall.second, 0.2)] if seconds else []), *fields, weekdays])


def compare(seconds: bool, number: int) -> None:
    """Compare `number` random schedules around every clock change with the oracle."""
    dice = random.Random(f"bgjob {seconds} {number} {os.environ.get('BGJOB_TEST_SEED', '')}")
    texts, fired = Texts(dice), 0
    places = [place for place in changes() if not seconds or abs(place[2]) <= HOUR]
    for index, (name, change, jump) in enumerate(places):
        step = 1_000 if seconds or jump % MINUTE else MINUTE
        around = min(abs(jump) + (20 * MINUTE if seconds else 8 * HOUR), 2 * HOUR if step == 1_000 else DAY * 2)
        stretch = readings(name, change - around, change + around, step)
        for _ in range(number * (index + 1) // len(places) - number * index // len(places)):
            wall = stretch[len(stretch) // 2 - dice.randint(0, 2)][1]
            wall += dice.choice([0, 0, 1, -1]) * timedelta(milliseconds=abs(jump))
            text = texts.text(wall, seconds)
            oracle, first, last = Oracle(text), stretch[0][0], stretch[-1][0]
            try:
                cron = _Cron(text, _zone(name))
            except ScheduleError as error:
                assert "never matches" in str(error), error
                assert not any(oracle.on(date(2000, 1, 1) + timedelta(days=n)) for n in range(366 * 60)), text
                continue
            anywhere = dice.randint(first, change + max(0, -jump) if cron.wild else last)
            after = dice.choice([first, change - 1, change, change + 1, anywhere, anywhere, anywhere])
            wanted = [tick for tick in oracle.fires(stretch, timedelta(milliseconds=step)) if tick > after]
            assert upto(last, cron.ticks(after)) == wanted, (text, name, after)
            assert _newest(cron, after, last) == (wanted or [None])[-1], (text, name, after)
            fired += bool(wanted)
    assert fired > number / 4


PIECES = ["*", "*/5", "5", "0", "31", "30", "28W", "L", "LW", "5L", "5#5", "1-7", "7-1/3", "2", "12", "?", "59,1"]


class TestOracle:
    def test_minutes(self) -> None:
        """Random schedules equal the oracle's, by the rule of Debian's cron, around clock changes in 33 zones."""
        compare(seconds=False, number=THOROUGH or 200)

    def test_seconds(self) -> None:
        """The same to the second, with a field for seconds."""
        compare(seconds=True, number=THOROUGH // 4 or 30)

    def test_a_year(self) -> None:
        """Day rules hold day by day over years, both-day rule, L, # and W included."""
        dice = random.Random("a year")
        texts, days = Texts(dice), [date(2023, 12, 25) + timedelta(days=n) for n in range(800)]
        for _ in range(THOROUGH or 50):
            day, weekday = texts.days(dice.choice(days))
            text = f"0 0 {day} {texts.field(4, 6, 0.7)} {weekday}"
            wanted = [at(d.year, d.month, d.day) for d in days if Oracle(text).on(d)]
            try:
                found = upto(at(2026, 3, 3, 12), _Cron(text, UTC).ticks(at(2023, 12, 24, 23)))
            except ScheduleError as error:
                found = []
                assert "never matches" in str(error)
            assert found == wanted, text

    @settings(max_examples=THOROUGH or 100, deadline=None)
    @given(
        st.text()
        | st.text(alphabet="0123456789*/,-LW#?@RHMONSUFRI ", max_size=30)
        | st.lists(st.text("0123456789*/,-LW#?", min_size=1, max_size=4), min_size=5, max_size=6).map(" ".join)
        | st.lists(st.sampled_from(PIECES), min_size=5, max_size=6).map(" ".join),
        st.sampled_from(["UTC", "Europe/Rome", "Australia/Lord_Howe", "Pacific/Apia"]),
        st.integers(at(1, 1, 1), at(9999, 12, 31)),
    )  # fmt: skip
    def test_any_text(self, text: str, zone: str, after: int) -> None:
        """Any text raises ScheduleError or yields strictly increasing ticks."""
        with suppress(ScheduleError):
            found = [after, *islice(_Cron(text, _zone(zone)).ticks(after), 5)]
            assert found == sorted({*found})


class TestNewest:
    def test_every(self) -> None:
        """An interval's ticks are start + n * every with n >= 1."""
        assert [[*islice(_Every(10, 3).ticks(after), 2)] for after in (-99, 12, 13)] == [[13, 23], [13, 23], [23, 33]]

    @pytest.mark.parametrize(
        ("schedule", "after", "upto", "newest"),
        [*((_Every(10, 3), *row) for row in ((0, 12, None), (0, 13, 13), (13, 13, None), (13, 22, None), (13, 23, 23),
                                             (0, 10**18 + 3, 10**18 + 3), (20, 5, None), (-99, 3, None))),
         (_Cron("@yearly", UTC), at(9999, 1, 1), at(9999, 12, 31), None),
         (_Cron("@yearly", UTC), 0, at(2500, 7, 1), at(2500, 1, 1)),
         (_Cron("*/7 * * * * *", _zone("Europe/Rome")), at(2025, 1, 1), at(2025, 1, 1, 0, 0, 6), None),
         (_Cron("*/20 * * * *", _zone("Europe/Rome")), 0, at(2025, 10, 26, 1, 5), at(2025, 10, 26, 1))],
    )  # fmt: skip
    def test_newest(self, schedule: _Every | _Cron, after: int, upto: int, newest: int | None) -> None:
        """The newest tick lies later than `after` and not later than `upto`, however far apart the two are.

        In the second pass of an overlap it is the newest instant, not the last reading.
        """
        assert _newest(schedule, after, upto) == newest

    def test_count(self) -> None:
        """Ticks are counted with both ends: an interval's by arithmetic, a cron's one by one, up to the limit."""
        for first, last, number in ((13, 13, 1), (0, 12, 0), (14, 22, 0), (13, 33, 3), (0, 10**6, 99_999), (50, 20, 0)):
            assert _count(_Every(10, 3), first, last) == number
        cron, start = _Cron("0 * * * *", UTC), at(2025, 1, 1)
        for first, last, number in ((0, 5 * HOUR, 6), (1, 5 * HOUR - 1, 4), (0, 365 * DAY, 100), (0, -1, 0)):
            assert _count(cron, start + first, start + last) == number
        assert _count(cron, start, start + 365 * DAY, limit=7) == 7


class School(tzinfo):
    """A user's own zone, whose repr has an address in it: an hour ahead, two in the summer."""

    def utcoffset(self, when: datetime | None) -> timedelta:
        return timedelta(hours=1) + self.dst(when)

    def dst(self, when: datetime | None) -> timedelta:
        return timedelta(hours=when is not None and 4 <= when.month <= 9)


class TestMeaning:
    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (_Every(HOUR, 5), _Every(HOUR)),
            (_Cron("*/5 * * * *", UTC), _Cron("0-55/5 * * * *", _zone("UTC"))),
            (_Cron("*/5 * * * *", timezone(timedelta(hours=1))), _Cron("0-55/5 * * * *", timezone(timedelta(hours=1), "B"))),
            (_Cron("0 0 * * MON,5L", UTC), _Cron("0 0 0 ? * FRIL,MON", UTC)),
            (_Cron("@daily", zoneinfo.ZoneInfo("Europe/Rome")), _Cron("0 0 * * *", _zone("Europe/Rome"))),
            (_Cron("@daily", School()), _Cron("@daily", School())),
        ],
    )  # fmt: skip
    def test_same(self, one: _Every | _Cron, other: _Every | _Cron) -> None:
        """Another spelling, or another object for the same zone, is the same schedule."""
        assert _meaning(one) == _meaning(other)

    def test_different(self) -> None:
        """Another interval, expression, zone, or at changes of the clock another rule, is another schedule."""
        zones = [UTC, timezone(timedelta(hours=1)), School(), zoneinfo.ZoneInfo("Europe/Paris")]
        texts = ["@daily", "*/5 0 * * *", "0-55/5 0 * * *", "0 0 1,L * *", "0 0 1 * *", "0 0 LW * *"]
        crons = [_Cron("@daily", zone) for zone in zones] + [_Cron(text, _zone("Europe/Rome")) for text in texts]
        assert len({_meaning(schedule) for schedule in (_Every(5), _Every(50), *crons)}) == 12

    @pytest.mark.parametrize(
        "schedule",
        [_Every(5000), _Cron("*/5 * * * *", _zone("Europe/Rome")), _Cron("30 2 28W,LW * MON#2", _zone("Europe/Rome")),
         _Cron("5 0 12 * * 7", UTC), _Cron("@daily", timezone(timedelta(hours=5.5)))],
    )  # fmt: skip
    def test_told_again(self, schedule: _Every | _Cron) -> None:
        """What a store keeps of a schedule is enough to tell its ticks without the job."""
        told = _schedule_of(_meaning(schedule))
        assert told is not None
        assert [*islice(told.ticks(at(2025, 3, 1)), 50)] == [*islice(schedule.ticks(at(2025, 3, 1)), 50)]
        assert _meaning(told) == _meaning(schedule)

    def test_not_told_again(self) -> None:
        """There is no schedule in a job without one, in one of another version, nor in a zone of the job's own."""
        zone = _meaning(_Cron("@daily", School()))
        for text in ("", "{}", "[]", "5", '{"after": 5}', '{"cron": ["x"], "wild": true, "tz": "UTC"}', zone):
            assert _schedule_of(text) is None


# 4 Runs ---------------------------------------------------------------------------------------------------------------


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError


class TestRuns:
    @pytest.mark.parametrize(
        ("error", "line"),
        [
            (ValueError("no such user"), "ValueError: no such user"),
            (ValueError(), "ValueError"),
            (ValueError("\n one\x85two\n"), "ValueError: one"),
            (ValueError("a\0b \udcff é"), r"ValueError: a\0b \udcff é"),
            (ValueError("x" * 5_000_000), f"ValueError: {'x' * 987}…"),
            (Unprintable(), "Unprintable: <its str() raises>"),
            (ExceptionGroup("two", [OSError("down"), KeyError()]), "ExceptionGroup: OSError: down"),
            (ExceptionGroup("", [ExceptionGroup("", [KeyError("a")])]), "ExceptionGroup: KeyError: 'a'"),
        ],
        ids=range(8),
    )
    def test_summary(self, error: BaseException, line: str) -> None:
        """An error is told as one line of at most 1,000 characters that every store takes; a group by its first leaf."""
        assert _summary(error) == line

    @pytest.mark.parametrize(
        ("value", "error", "text"),
        [
            ({"a": [1, 2.5, None, True, "é"]}, None, r'{"a":[1,2.5,null,true,"\u00e9"]}'),
            ((1, (2,)), None, "[1,[2]]"),
            ([{"a": {1: "x", "1": "y"}}], TypeError, "the key 1 isn't text"),
            (({None: 1},), TypeError, "the key None isn't text"),
            ({(1, 2): 3}, TypeError, "keys must be str"),
            (float("nan"), ValueError, "not JSON compliant"),
            ([float("inf")], ValueError, "not JSON compliant"),
            ({1, 2}, TypeError, "set is not JSON serializable"),
        ],
        ids=range(8),
    )
    def test_json(self, value: object, error: type[Exception] | None, text: str) -> None:
        """Arguments and results are JSON as it stands, or refused: no NaN, and no key that JSON would make a text of."""
        if error is None:
            assert (_dumps(value), _packed(value)) == (text, (text, None))
        else:
            with pytest.raises(error, match=text):
                _dumps(value)
            packed, why = _packed(value)
            assert packed is None
            assert "isn't JSON" in (why or "")

    def test_what_is_not_kept(self) -> None:
        """A result that is too large, too deep or holds itself isn't kept, and the reason is the true one."""
        deep: list[object] = []
        for _ in range(200_000):
            deep = [deep]
        circle: list[object] = []
        circle.append(circle)
        assert _packed("x" * (1 << 20)) == (None, "it is 1,048,578 bytes of JSON, and the limit is 1 MiB")
        assert [_packed(value)[0] for value in (deep, circle)] == [None, None]
        assert "Circular" in str(_packed(circle)[1])

    def test_no_run(self) -> None:
        """current_run() outside a run says where it belongs."""
        with pytest.raises(BgjobError, match="no run is executing here; call it inside a job's function"):
            current_run()

    def test_another_loop(self) -> None:
        """A run that goes on in one event loop is refused in another, where it would wait for ever; an ended one isn't."""
        registry = Registry()

        @registry.job
        async def work(seconds: float) -> float:
            await asyncio.sleep(seconds)
            return seconds

        async def main() -> None:
            async with registry.running(drain=0):
                ended, going = await work.submit(0), await work.submit(1000)
                await ended.result()
                assert await asyncio.to_thread(asyncio.run, ended.result()) == 0
                assert await asyncio.to_thread(asyncio.run, ended.cancel()) is False
                calls: list[Callable[..., object]] = [going.result, going.cancel, lambda: work.submit(1), work.cancel]
                for call in (*calls, lambda: registry.find(going.id)):
                    with pytest.raises(BgjobError, match=r"another event loop.*use asyncio\.run_coroutine_threadsafe"):
                        await asyncio.to_thread(asyncio.run, call())

        asyncio.run(main())


# 5 Dependencies, and 6 Jobs -------------------------------------------------------------------------------------------


async def nothing(*_: object) -> None: ...


def one() -> int:
    return 1


def needy(b: int, a: int) -> int:
    return a + b


def two(n: "Annotated[int, Depends(one)]", m: int = Depends(one)) -> int:
    return n + m


def circle(x: "Annotated[int, Depends(circle)]") -> None: ...


def traced(function: object) -> object:
    """Behind a decorator that knows nothing of generators."""
    return functools.wraps(function)(lambda *args, **kwargs: function(*args, **kwargs))


def once(function: object, plain: bool, **keywords: object) -> Run:
    """The run, in virtual time, of a job that runs once: the function, or an async one that calls it."""

    @functools.wraps(function)
    async def calls(*args: object, **kwargs: object) -> None:
        function(*args, **kwargs)

    registry = Registry()
    registry.job(after=0, **keywords)(function if plain else calls)
    (run,) = registry.simulate("1m", start=START)
    return run


def opening(name: object, events: list[object], close: object = None) -> object:
    """A factory that notes when it is entered, and what `close` says when it is left."""

    def generator() -> Iterator[object]:
        events.append(name)
        try:
            yield name
        finally:
            events.append(close() if callable(close) else f"-{name}")

    return generator


def asynced(factory: object) -> object:
    """The same as an async generator."""

    async def generator() -> AsyncIterator[object]:
        with contextlib.contextmanager(factory)() as made:
            yield made

    return generator


class TestDependencies:
    def test_refusals(self) -> None:
        """What a dependency can't be made from is refused before the job is registered, with a remedy."""

        def local() -> None: ...
        def unknown(x: "Annotated[int, Depends(local)]") -> None: ...

        theirs, job = type("Depends", (), {"__module__": "fastapi.params"})(), Registry().job
        unread = "can't be read in its module; write x=Depends(…)"
        for call, told in (
            (lambda: Depends(1), "Depends(1): pass a function, without calling it"),
            (lambda: Depends(type("Unhashable", (list,), {"__call__": None})()), "Depends([]): pass a function, without calling it"),
            (lambda: Depends(one, "job"), "Depends(one): scope='job': write 'run' or 'app'"),
            (lambda: Depends(needy), "Depends(needy): nothing fills its b, a; give it a default or Depends"),
            (lambda: Depends(two, "app"), "Depends(two): an 'app' dependency can't need a 'run' one; give both one scope"),
            (lambda: job(unknown), f"job 'unknown': x: 'Annotated[int, Depends(local)]': {unread}"),
            (lambda: job(circle), f"job 'circle': x: 'Annotated[int, Depends(circle)]': {unread}"),
            (lambda: job(name="f")(lambda db=theirs: 0), "job 'f': db: that Depends is FastAPI's; import it from bgjob"),
        ):  # fmt: skip
            with pytest.raises(ScheduleError) as caught:
                call()
            assert str(caught.value) == told

    @pytest.mark.parametrize("outcome", ["succeeded", "failed", "timeout"])
    def test_order(self, outcome: str) -> None:
        """Each is made once per attempt, and cleaned up in reverse order, whatever the outcome."""
        registry, events = Registry(), []
        a, c = opening("a", events), opening("c", events)

        async def b(a: str = Depends(contextlib.contextmanager(a))) -> AsyncIterator[str]:
            with contextlib.contextmanager(opening("b", events))() as made:
                yield a + made

        @registry.job(after=0, timeout="1s")
        async def work(x: str = Depends(b), y: str = Depends(b), z: str = Depends(c)) -> None:
            events.append((x, y, z))
            if outcome == "failed":
                raise ValueError
            await asyncio.sleep(5 if outcome == "timeout" else 0)

        (run,) = registry.simulate("1m")
        assert events == ["a", "b", "c", ("ab", "ab", "c"), "-c", "-b", "-a"]
        assert run.state == ("succeeded" if outcome == "succeeded" else "failed")

    def test_given(self) -> None:
        """An argument that is passed wins over its dependency, which isn't made; a direct call needs them all."""
        registry, made = Registry(), []

        @registry.job
        async def work(x: int = Depends(lambda: made.append(1) or 1), y: int = Depends(lambda: 2)) -> list[int]:
            return [x, y]

        async def main() -> None:
            assert await (await work.submit(y=5, x=6)).result() == [6, 5]
            assert await (await work.submit(7)).result() == [7, 2]
            assert made == []

        assert len(registry.simulate("1m", main=main)) == 2
        for arguments, missing in (({}, "x=…, y=…"), ({"x": 1}, "y=…")):
            with pytest.raises(TypeError, match=f"^job 'work': a direct call resolves no Depends; pass {missing}$"):
                work(**arguments)
        assert asyncio.run(work(5, y=6)) == [5, 6]

    def test_annotated(self) -> None:
        """`Annotated` says the same as a default, as text too, wherever it stands, whatever else is unknown."""

        def work(db: Annotated[int, Depends(two)], to: str, one: "Annotated[int, Depends(one)]" = 0) -> None:
            assert (db, to, one) == (2, "a@b.c", 1)

        def unknown(price: "Decimal | None" = None, one: int = Depends(one)) -> None:  # noqa: F821
            assert one == 1

        assert once(work, False, args={"to": "a@b.c"}).error is once(unknown, False).error is None

    @pytest.mark.parametrize("plain", [False, True])
    def test_factories(self, plain: bool) -> None:
        """What a factory made decides: an awaitable is awaited, a generator or contextlib's manager of one is entered."""
        events: list[object] = []
        generator, async_generator = opening("x", events), asynced(opening("x", events))

        async def later() -> str:
            return "x"

        opens = type("Opens", (), {"__call__": staticmethod(generator)})()
        file, lock = sqlite3.connect(":memory:"), threading.Lock()
        manager, async_manager = contextlib.contextmanager(generator), contextlib.asynccontextmanager(async_generator)
        for factory, made, entered in (
            (later, "x", False), (traced(later), "x", False), (one, 1, False), (dict, {}, False), (opens, "x", True),
            (generator, "x", True), (traced(generator), "x", True), (manager, "x", True), (traced(manager), "x", True),
            (async_generator, "x", True), (traced(async_generator), "x", True), (async_manager, "x", True),
            (functools.partial(needy, 1, 2), 3, False), (lambda: file, file, False), (lambda: lock, lock, False),
        ):  # fmt: skip

            def work(value: object = Depends(factory), made: object = made) -> None:
                assert value == made
                events.append("work")

            assert once(work, plain).error is None
            assert events == (["x", "work", "-x"] if entered else ["work"])
            events.clear()
        file.close()
        assert lock.acquire(blocking=False)

    def test_overrides(self) -> None:
        """An override takes the factory's place wherever it is needed, with dependencies of its own."""
        registry, seen = Registry(), []
        registry.job(after=0, name="work")(lambda n=Depends(two): seen.append(n))
        for overrides in ({}, {one: lambda x=Depends(lambda: 10): x}, {two: one}):
            registry.overrides = overrides
            registry.simulate("1s")
        assert seen == [2, 20, 1]

    @pytest.mark.parametrize("plain", [False, True])
    def test_whose_error(self, plain: bool, caplog: pytest.LogCaptureFixture) -> None:
        """What the job raises is raised at the yield; swallowed or replaced, it stays the job's error all the same.

        Beside a success the error of a clean-up is the attempt's.
        """
        no, close = OSError("no"), LookupError("close")

        def factory(before: Exception | None, swallowed: type[Exception], after: Exception | None) -> object:
            def generator() -> Iterator[None]:
                if before:
                    raise before
                with contextlib.suppress(swallowed):
                    try:
                        yield
                        committed.append(True)
                    finally:
                        if after:
                            raise after

            return generator

        for before, swallowed, after, raised, error, attempts, told in (
            (None, (), None, None, None, 1, 0), (None, (), None, no, "OSError: no", 2, 0), (None, OSError, None, no, "OSError: no", 2, 0),
            (no, (), None, None, "OSError: no", 2, 0), (None, (), close, no, "OSError: no", 2, 2), (None, (), close, None, "LookupError: close", 1, 0),
        ):  # fmt: skip
            for made in (factory(before, swallowed, after), asynced(factory(before, swallowed, after))):

                def work(x: None = Depends(made), raised: OSError | None = raised) -> None:
                    if raised:
                        raise raised

                committed: list[bool] = []
                caplog.clear()
                run = once(work, plain, name="work", retries=1, retry_delay=0, retry_on=OSError)
                assert (run.error, run.attempt, len(committed)) == (error, attempts, before is raised is None)
                logged = [r.getMessage() for r in caplog.records if "clean-up" in r.getMessage()]
                assert logged == ["work@2026-01-01T00:00:00Z: its clean-up failed, too: LookupError: close"] * told

    def test_threads(self) -> None:
        """A plain job's plain factories run in the job's thread, their clean-up too; its async ones in the loop."""
        registry, seen, here = Registry(), [], threading.current_thread

        def database() -> Iterator[sqlite3.Connection]:
            with contextlib.closing(sqlite3.connect(":memory:")) as db:  # which refuses every other thread
                yield db
            seen.append(here())

        client = asynced(opening("", [], lambda: seen.append(here())))

        @registry.job
        def report(db: sqlite3.Connection = Depends(database), client: None = Depends(client)) -> int:
            seen.append(here())
            return db.execute("SELECT 1").fetchone()[0]

        async def main() -> None:
            async with registry.running():
                assert await (await report.submit()).result("10s") == 1

        asyncio.run(main())
        assert here() is not seen[0]
        assert seen == [seen[0], here(), seen[0]]

    def test_app(self) -> None:
        """They are made once, before the first run, also where only a "run" one needs them, and outlive the last.

        The failure of one is the failure of run(), which leaves the registry free for another.
        """
        registry, events = Registry(), []

        async def pool() -> AsyncIterator[str]:
            await asyncio.sleep(5)
            with contextlib.contextmanager(opening("open", events))():
                yield "pool"

        async def work(x: str = Depends(lambda pool=Depends(pool, "app"): pool)) -> None:
            events.append(x)
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(1000)
            events.append("ended")

        async def later() -> None:
            for job in [registry.job(name=name)(work) for name in ("a", "b")]:
                await job.submit()
            await asyncio.sleep(6)

        registry.simulate("1m", main=later)
        registry.simulate("6s", main=registry.jobs["a"].submit)
        assert events == ["open", "pool", "pool", "ended", "ended", "-open", "open", "pool", "ended", "-open"]
        registry.overrides[pool] = lambda: 1 / 0
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                registry.simulate("1s")


class TestJobs:
    VALUES = "write a dict of values that can be copied, for (a: int = 0) -> None"
    WRONG = (
        ("not a duration", {"every": "5x"}, {"retry_delay": "5x"}, {"expires": "soon"}, {"every": 1, "jitter": ""}, {"after": None, "timeout": True}),
        ("too short", {"every": 0}, {"timeout": 0}, {"expires": 0}),
        ("minute must be 0-59, got 61", {"cron": "61 * * * *"}),
        ("a job has one schedule; stack a second @job with its own name", {"every": "1s", "cron": "* * * * *"}, {"every": 1, "after": 2}, {"cron": "@daily", "after": 0}),
        ("only cron has a zone; leave it out, or write cron=", {"every": "1s", "tz": "Europe/Rome"}, {"tz": None}),
        (f"got an unexpected keyword argument 'b'; {VALUES}", {"args": {"b": 1}}, {"every": 1, "args": {"b": 1}}),
        (f"keywords must be strings; {VALUES}", {"args": {1: 2}}),
        (f"'int' object is not iterable; {VALUES}", {"args": 5}),
        (f"cannot pickle 'module' object; {VALUES}", {"args": {"a": sys}}),
        ("is for ticks; add every= or cron=", {"immediate": True}, {"jitter": "1s"}, {"overlap": "all"}, {"after": 1, "immediate": True}),
        ("write True or False", {"every": 1, "immediate": "yes"}, {"every": 1, "immediate": 1}),
        ("write 'skip' or 'queue' or 'all'", {"every": 1, "overlap": "none"}, {"overlap": 5}),
        ("write 'rerun' or 'drop'", {"on_crash": "retry"}),
        ("write a whole number, from 1 to 1,000", {"parallelism": 0}, {"parallelism": 1001}, {"parallelism": True}),
        ("write a whole number, 0 or more", {"retries": -1}, {"retries": 1.5}),
        ("begins longer than it ends; write '1s..5m'", {"retry_delay": "5m..1s"}),
        ("write a plain function of (retry), or of (retry, error)", {"retry_delay": nothing}, {"retry_delay": one}),
        ("write an exception class, a tuple of them, or a plain predicate", {"retry_on": 5}, {"retry_on": int}, {"retry_on": (OSError, int)}, {"retry_on": nothing}),
        ("write a function of (run, exception)", {"on_error": 5}, {"on_error": one}),
        ("not a keyword of @job; write every", {"evry": 5}, {"seconds": 5}, {"minutes": 5}, {"interval": 5}),
        ("not a keyword of @job; write retries", {"every": 1, "max_retries": 5}, {"retrys": 5}),
        (f"not a keyword of @job; write {', '.join(Options.__annotations__)}", {"xyz": 1}),
    )  # fmt: skip

    @pytest.mark.parametrize(("remedy", "keywords"), [(remedy, one) for remedy, *all in WRONG for one in all])
    def test_keywords(self, remedy: str, keywords: dict[str, object]) -> None:
        """A wrong keyword fails when the decorator runs, with the job, the value and the remedy; a duration's by its rule."""

        def f(a: int = 0) -> None: ...

        with pytest.raises(ScheduleError) as caught:
            Registry().job(**keywords)(f)
        shown = [f"{what}={value!r}" for what, value in keywords.items()]
        told = f"job 'f': {' and '.join(shown[0 if 'one schedule' in remedy else -1 :])}: {remedy}"
        end = "; write a duration" if remedy == "too short" else "; write seconds"
        assert str(caught.value).partition(end)[0] == told

    def test_defaults(self) -> None:
        """Every keyword's default may be written out, whatever the schedule; each is an option."""
        defaults = {
            "every": None, "cron": None, "after": None, "tz": "UTC", "name": "f", "args": {}, "immediate": False,
            "jitter": 0, "parallelism": 10, "overlap": "skip", "expires": None, "timeout": None, "retries": 0,
            "retry_delay": "1s..5m", "retry_on": Exception, "on_error": None, "on_crash": "rerun",
        }  # fmt: skip
        assert [*defaults] == [*Options.__annotations__]
        for schedule in ({}, {"every": 1}, {"cron": "@daily"}, {"after": 1}):
            Registry().job(**defaults | schedule)(nothing)
        Registry().job(on_error=print, retry_delay=abs, retry_on=callable, parallelism=1000)(nothing)

    def test_functions(self) -> None:
        """What can't be a job is refused: generators, behind a decorator too, classes, methods, names that can't be ids."""

        class Mailer:
            async def send(self, to: str = "") -> str:
                return to

            def each(self) -> Iterator[None]:
                yield

            async def all(self) -> AsyncIterator[None]:
                yield

        registry, mailer, job = Registry(), Mailer(), Registry().job
        loops = "is a generator: nothing would iterate over it"
        copied = "write a dict of values that can be copied, for"
        method = "a method needs its instance; decorate the bound method, as in job(every='5m')(mailer.send)"
        text = "write printable text of at most 200 characters"
        for function, keywords, told in (
            *((f, {"name": "f"}, f"job 'f': {f!r} {loops}; decorate a function") for f in (mailer.each, mailer.all, traced(Mailer.each))),
            *((f, {"name": "f"}, f"job 'f': {f!r} is no function; decorate an async function or a plain one") for f in (int, 5)),
            *((f, {}, f"{f!r} has no name of its own; write @job(name='…')") for f in (lambda: 1, functools.partial(one))),
            (needy, {"every": 1}, f"job 'needy': args=None: nothing fills the parameter b, a; {copied} (b: int, a: int) -> int"),
            (Mailer.send, {"every": 1}, f"job 'send': args=None: {method}; {copied} (self, to: str = '') -> str"),
            *((one, {"name": x}, f"name={x!r}: write it without '@' and '#'") for x in ("a@b", "a#b")),
            *((one, {"name": x}, f"name={x!r:.60}: {text}") for x in (5, " ", "a\nb", "", "x" * 201)),
        ):  # fmt: skip
            with pytest.raises(ScheduleError) as caught:
                job(**keywords)(function)
            assert str(caught.value) == told

        async def main() -> None:
            with pytest.raises(TypeError, match=f"^job 'bare': {re.escape(method)}$"):
                await registry.job(name="bare")(Mailer.send).submit("a@b.c")
            assert await (await registry.job(mailer.send).submit("a@b.c")).result() == "a@b.c"

        registry.job(name="x" * 200)(functools.partial(one))
        registry.simulate("1s", main=main)

    def test_calls(self) -> None:
        """What is wrong about a call of a job is told with the job's name, too."""
        job, key = Registry().job(nothing), "write printable text of at most 500 characters"
        for call, told in (
            (lambda: job.after("soon"), "after='soon': not a duration; "),
            *((lambda x=x: job.after(0, key=x), f"key={x!r:.60}: {key}") for x in ("", "a\0", "x" * 501, 5)),
            (lambda: job.at(datetime(2026, 1, 1)), "at=datetime.datetime(2026, 1, 1, 0, 0): needs an aware datetime"),
            (lambda: job.next_ticks(start=5), "start=5: needs an aware datetime"),
            (lambda: job.next_ticks(-1), "n=-1: write a whole number, 0 or more"),
        ):  # fmt: skip
            with pytest.raises(ScheduleError) as caught:
                call()
            assert str(caught.value).startswith(f"job 'nothing': {told}")
        job.after(0, key="x" * 500)
        for call in (job.submit, job.after(1).submit, job.cancel):
            with pytest.raises(BgjobError, match=r"^job 'nothing': (submit|cancel)\(\) needs jobs that run"):
                asyncio.run(call())

    def test_arguments(self) -> None:
        """Arguments that don't fit the function, aren't JSON, or are too many are refused when they are submitted."""
        registry = Registry()
        work = registry.job(name="work")(lambda a, b=0: a)
        deep, plain = functools.reduce(lambda inner, _: [inner], range(100_000), []), "pass plain values"

        async def main() -> None:
            for args, kwargs, told in (
                ((), {}, "nothing fills the parameter a"),
                ((1, 2, 3), {}, "too many positional arguments"),
                ((1,), {"c": 3}, "got an unexpected keyword argument 'c'"),
                ((1,), {"a": 1}, "multiple values for argument 'a'"),
                ((deep,), {}, f"argument a isn't JSON (maximum recursion depth exceeded while encoding a JSON object); {plain}"),
                ((1,), {"b": {2}}, f"argument b isn't JSON (Object of type set is not JSON serializable); {plain}"),
                *(((1,), {"b": b}, "argument b isn't JSON (") for b in (float("nan"), [{1: 2}], {None: 1, "null": 2})),
            ):  # fmt: skip
                with pytest.raises(TypeError) as caught:
                    await work.submit(*args, **kwargs)
                assert str(caught.value).startswith(f"job 'work': {told}")
            assert await (await work.submit({"1": (1, "ü")})).result() == {"1": [1, "ü"]}
            largest = "x" * (2**20 - len('[[""],{}]'))
            await work.submit(largest)
            with pytest.raises(ValueError, match="^job 'work': 1,048,577 bytes of arguments, over 1 MiB as JSON; "):
                await work.submit(largest + "x")

        assert len(registry.simulate("1s", main=main)) == 2

    def test_args(self) -> None:
        """`args=` are copied for each attempt, and the defaults of `submit()`; one function may be several jobs."""
        registry, given, seen = Registry(), {"to": ["a"]}, []

        @registry.job(every="1m", args=given, retries=1, retry_delay=0)
        async def work(to: list[str], n: int = 0) -> None:
            seen.append((to.copy(), n))
            to.append("changed")
            raise ValueError

        @registry.job(name="other", args={"to": 5})
        @registry.job(args={"to": 1, "self": 2})
        async def echo(*places: int, **names: int) -> list[object]:
            return [places, names]

        given["to"].append("b")

        async def main() -> None:
            await work.submit(n=1)
            await work.submit(["c"])
            assert await (await registry.jobs["echo"].submit(7, self=3)).result() == [[7], {"to": 1, "self": 3}]
            assert await (await echo.submit(job=4)).result() == [[], {"to": 5, "job": 4}]

        registry.simulate("1m", main=main)
        assert sorted(seen) == [(["a"], 0)] * 2 + [(["a"], 1)] * 2 + [(["c"], 0)] * 2
        assert echo.function is registry.jobs["echo"].function

    def test_next_ticks(self) -> None:
        """next_ticks answers in the job's zone, on the epoch's grid for an interval, and [] without a schedule."""
        job, start = Registry().job, datetime(2025, 3, 29, 12, tzinfo=UTC)
        nightly = job(cron="30 2 * * *", tz="Europe/Rome", name="a")(nothing)
        ticks = [t.isoformat() for t in nightly.next_ticks(2, start)]
        assert ticks == ["2025-03-30T03:00:00+02:00", "2025-03-31T02:30:00+02:00"]
        assert job(every="1h", name="b")(nothing).next_ticks(1, start) == [start + timedelta(hours=1)]
        assert job(after="1h", name="c")(nothing).next_ticks() == []
        assert len(nightly.next_ticks()) == 5 > len(nightly.next_ticks(5, datetime(9999, 12, 26, tzinfo=UTC)))

    def test_repr(self) -> None:
        """A job shows its name and its schedule."""
        for schedule, shown in (
            ({"cron": "@daily", "tz": "Europe/Rome"}, "cron='@daily' tz=Europe/Rome"), ({"every": "1h30m"}, "every=5,400 s"),
            ({"after": 0.25}, "after=0.25 s"), ({}, "on submit"),
        ):  # fmt: skip
            assert repr(Registry().job(**schedule)(nothing)) == f"<Job nothing {shown}>"

    def test_decent(self) -> None:
        """A job looks like its function, is a coroutine function where that is one, and is pickled by reference."""
        module = sys.modules["shop"] = types.ModuleType("shop")
        code = "from bgjob import Registry\njob = Registry().job\n@job\ndef heavy(n: int) -> int:\n    'Squares.'\n    return n * n\n"
        exec(code + "@job(name='lighter')\nasync def light(n: 'int') -> None: ...\n", module.__dict__)
        heavy, light = module.heavy, module.light
        names = heavy.__name__, heavy.__qualname__, heavy.__doc__, heavy.__module__
        assert names == ("heavy", "heavy", "Squares.", "shop")
        assert typing.get_type_hints(light) == {"n": int, "return": type(None)}
        assert inspect.signature(heavy) == inspect.signature(heavy.__wrapped__) == inspect.signature(heavy.function)
        assert [asyncio.iscoroutinefunction(job) for job in (heavy, light)] == [False, True]
        assert [inspect.iscoroutinefunction(job) for job in (heavy, light)] == [False, sys.version_info >= (3, 12)]
        for job in (heavy, light):
            assert job is copy.copy(job) is copy.deepcopy(job) is pickle.loads(pickle.dumps(job))
            assert weakref.ref(job)() is job
        assert functools.wraps(heavy)(lambda n: n).__doc__ == "Squares."
        assert (heavy(3), heavy.function(3)) == (9, 9)
        del sys.modules["shop"]


class TestDelays:
    @given(st.integers(1, 200), st.text())
    def test_doubling(self, retry: int, text: str) -> None:
        """The delay doubles up to its limit; what failed together fills the upper half, its two ends too."""
        top = min(1000 * 2 ** (retry - 1), 300_000)
        assert top // 2 <= _retry_delay("1s..5m")(retry, OSError(), text) <= top
        assert {_retry_delay("10ms..1s")(1, OSError(), str(run)) for run in range(100)} == {*range(5, 11)}

    def test_forms(self) -> None:
        """A duration is fixed; a function gets the retry's number, and its error if its second parameter is free."""
        for form, ms in (
            ("5s", 5000), (0, 0), (timedelta(seconds=1), 1000), (lambda n: n * 10, 20_000), (lambda n, base=3: n * base, 6000),
            (lambda n, error: error.args[0], 7000), (lambda n, error=None: error.args[0] * n, 14_000), (abs, 2000),
            (lambda *both: both[1].args[0], 7000),
        ):  # fmt: skip
            assert _retry_delay(form)(2, OSError(7), "") == ms

    def test_retry_on(self) -> None:
        """An error is tried again if it is of a class, or the predicate says so; a group if all of its leaves are."""
        group = ExceptionGroup("g", [OSError(5), ExceptionGroup("h", [OSError(5)])])
        mixed = ExceptionGroup("g", [OSError(5), KeyError()])
        for retry_on, error, again in (
            (OSError, TimeoutError(), True), (LookupError, OSError(), False), ((LookupError, OSError), OSError(), True), ((), OSError(), False),
            (Exception, SystemExit(), False), (BaseException, SystemExit(), True), (Exception, mixed, True), (OSError, group, True),
            (OSError, mixed, False), ((OSError, KeyError), mixed, True), (ExceptionGroup, mixed, True),
            (Exception, BaseExceptionGroup("g", [OSError(), SystemExit()]), False), (lambda error: error.args == (5,), group, True),
            (lambda error: error.args == (5,), mixed, False), (lambda error: error.args == (6,), OSError(5), False),
        ):  # fmt: skip
            assert _retryable(retry_on)(error) is again, (retry_on, error)


def rules(**given: Any) -> Any:
    """What of a job's options the book looks at."""
    return SimpleNamespace(
        **{"parallelism": 1, "overlap": "skip", "expires": None, "retries": 0, "on_crash": "rerun"} | given
    )


def a_book(last: int = 100, token: int = 7, **claims: str) -> _Book:
    """A book with claims written as `due owner token tries lost marks`: `t50="50 me 3"`; a key with t is a tick's."""
    book = _Book(last)
    book.token = token
    for name, text in claims.items():
        due, owner, *facts = text.split()
        key = int(name[1:]) if name.startswith("t") else name
        claim = book.claims[key] = _Claim(key if isinstance(key, int) else 0, int(due))
        claim.owner = None if owner == "-" else owner
        claim.token, claim.tries, claim.lost = (*map(int, facts[:3]), 0, 0, 0)[:3]
        claim.cancel = "cancel" in facts
        claim.since = 1 if claim.tries else None
    return book


def shown(book: _Book) -> str:
    """The claims of a book in the words of `a_book`."""
    texts = []
    for key, c in book.claims.items():
        marks = " cancel" * c.cancel
        texts.append(f"{'t' * isinstance(key, int)}{key}={c.due} {c.owner or '-'} {c.token} {c.tries} {c.lost}{marks}")
    return ", ".join(texts)


class TestBook:
    """The rules that instances share: (book, now, who lives, request) -> (answer, book)."""

    @pytest.mark.parametrize(
        ("tries", "lost", "retries", "on_crash", "verdict"),
        [
            (1, 0, 0, "rerun", "fail"), (1, 0, 1, "rerun", "run"), (2, 0, 1, "rerun", "fail"),
            (1, 1, 0, "rerun", "run"), (2, 1, 0, "rerun", "fail"), (3, 3, 0, "rerun", "run"),
            (4, 4, 9, "rerun", "fail"), (1, 1, 9, "drop", "fail"), (1, 0, 1, "drop", "run"),
        ],
    )  # fmt: skip
    def test_verdict(self, tries: int, lost: int, retries: int, on_crash: str, verdict: str) -> None:
        """A lost attempt uses up no retry; the fourth loss is one too many, with "drop" the first."""
        assert _verdict(tries, lost, retries, on_crash) == verdict

    @pytest.mark.parametrize(
        ("schedule", "timeout", "immediate", "new", "changed", "last", "claims"),
        [
            ("1h", None, False, True, True, 500, ""),
            ("1h", None, True, True, True, 500, "t500=500 - 0 0 0"),
            ("", None, False, False, False, 100, ""),
            ("2h", None, True, False, True, 500, ""),  # a changed one begins now, and is not new
            ("", 9, False, False, True, 100, ""),
        ],
    )
    def test_enlist(
        self, schedule: str, timeout: int | None, immediate: bool, new: bool, changed: bool, last: int, claims: str
    ) -> None:
        """A new or changed schedule begins now; with `immediate` only a new one has a run at once."""
        book = a_book()
        assert book.enlist(schedule, timeout, immediate, new, 500) is changed
        assert (book.last, shown(book), book.schedule, book.timeout) == (last, claims, schedule, timeout)
        later = a_book(last=900)
        later.enlist("9h", None, False, False, 500)
        assert later.last == 900  # a cursor never goes back

    @pytest.mark.parametrize(
        ("at", "overlap", "claims", "word", "last"),
        [
            (100, "skip", {}, "lost", 100),
            (501, "skip", {}, "early", 100),
            (200, "skip", {}, "won", 200),
            (200, "skip", {"call": "1 me 1"}, "won", 200),  # submitted runs never make a tick skip
            (200, "skip", {"t50": "50 me 3"}, "skipped", 200),
            (200, "skip", {"t50": "900 - 3"}, "skipped", 200),  # waits for a retry
            (200, "queue", {"t50": "50 me 3"}, "won", 200),
            (200, "queue", {"t50": "50 me 3", "t60": "60 -"}, "skipped", 200),
            (200, "all", {"t50": "50 me 3"}, "full", 100),
        ],
    )
    def test_tick(self, at: int, overlap: str, claims: dict[str, str], word: str, last: int) -> None:
        """A tick is won by moving `last` on, once; beside `parallelism` unfinished ticks it overlaps."""
        book = a_book(**claims)
        assert book.tick(at, at + 7, 500, rules(overlap=overlap)) == word
        assert (book.last, at in book.claims) == (last, word == "won")
        assert word != "won" or book.claims[at].due == at + 7
        assert book.tick(at, at, 500, rules(overlap=overlap)) == ("lost" if last == at else word)

    @pytest.mark.parametrize(
        ("claims", "rows", "room", "options", "taken", "ended", "later"),
        [
            ({"t50": "50 -"}, "", 1, {}, "50:8", "", None),
            ({"t50": "50 - 3 1 1"}, "", 1, {}, "50:8", "", None),  # the dead's, with a new token
            ({"t50": "50 you 3 1"}, "a5", 9, {}, "", "", None),  # every slot is taken elsewhere
            ({"t50": "50 you 3 1"}, "a5", 9, {"parallelism": 2}, "a:8", "", None),
            ({"t50": "50 -"}, "a5 b60", 9, {"parallelism": 2}, "a:8 50:9", "", None),  # the oldest first
            ({"t50": "50 -"}, "a5", 0, {"parallelism": 9}, "", "", None),  # no slot here
            ({"t600": "600 -"}, "a5 b700", 9, {"parallelism": 9}, "a:8", "", 600),
            ({"t50": "50 - 0 0 0 cancel"}, "a5", 9, {}, "a:8", "50:cancelled", None),
            ({"t450": "450 -"}, "a5", 1, {"expires": 100}, "450:8", "a:skipped", None),
            ({"t50": "50 - 3 1"}, "", 1, {"expires": 100}, "50:8", "", None),  # only its first start may be too late
            ({}, "", 9, {}, "", "", None),
        ],
    )
    def test_claim(
        self,
        claims: dict[str, str],
        rows: str,
        room: int,
        options: dict[str, Any],
        taken: str,
        ended: str,
        later: int | None,
    ) -> None:
        """The oldest that are due, as many as there are slots here and everywhere; each with a token of its own."""
        book, waiting = a_book(**claims), []
        for text in rows.split():
            waiting.append((text[0], _Claim(int(text[1:]), int(text[1:]))))
        tries = {key: claim.tries for key, claim in (*book.claims.items(), *waiting)}
        found = book.claim(waiting, room, 500, rules(**options), "me")
        assert " ".join(f"{key}:{claim.token}" for key, claim in found.taken) == taken
        assert " ".join(f"{key}:{state}" for key, _, state, _ in found.ended) == ended
        assert found.later == later
        for key, claim in found.taken:
            assert (book.claims[key], claim.owner, claim.since, claim.tries) == (claim, "me", 500, tries[key] + 1)
        assert not {key for key, *_ in found.ended} & book.claims.keys()

    @pytest.mark.parametrize(
        ("claim", "key", "state", "again", "due", "answer", "after"),
        [
            ("50 me 3 1", "t50", "succeeded", "retry", None, "succeeded", ""),
            ("50 me 3 1", "t50", "failed", "retry", None, "failed", ""),
            ("50 me 3 1", "t50", "scheduled", "retry", 900, "scheduled", "t50=900 - 3 1 0"),
            ("50 me 3 1", "t50", "scheduled", "back", None, "scheduled", "t50=50 - 3 0 0"),
            ("50 me 3 1", "t50", "scheduled", "lost", None, "scheduled", "t50=50 - 3 1 1"),
            ("50 me 3 1 0 cancel", "t50", "scheduled", "retry", 900, "cancelled", ""),
            ("50 me 3 1 0 cancel", "t50", "succeeded", "retry", None, "succeeded", ""),
            ("50 me 3 1", "call", "scheduled", "retry", 900, "scheduled", ""),  # a call that waits is a row
            ("50 you 3 1", "t50", "succeeded", "retry", None, None, "t50=50 you 3 1 0"),
            ("50 me 4 2", "t50", "succeeded", "retry", None, None, "t50=50 me 4 2 0"),  # claimed anew since
            ("50 - 3 1", "t50", "succeeded", "retry", None, None, "t50=50 - 3 1 0"),
        ],
    )
    def test_settle(
        self, claim: str, key: str, state: str, again: Any, due: int | None, answer: str | None, after: str
    ) -> None:
        """Only the owner settles, with its token. A hand-back returns the try; a retry finds out that it is cancelled."""
        book = a_book(**{key: claim})
        name = int(key[1:]) if key.startswith("t") else key
        assert book.settle(name, "me", 3, State(state), again, due, "why") == answer
        assert shown(book) == after
        assert after == "" or answer is None or book.claims[name].error == "why"

    def test_cancel(self) -> None:
        """Nobody's run is removed, a running one is marked for its owner, an unknown one is none."""
        book = a_book(t50="50 -", call="1 you 2 1")
        assert [getattr(book.cancel(key), "owner", "none") for key in (50, "call", 60)] == [None, "you", "none"]
        assert shown(book) == "call=1 you 2 1 0 cancel"

    def test_crash(self) -> None:
        """The claims of the dead are nobody's, and have lost one more; those of the living stay theirs."""
        book = a_book(t50="50 dead 3 1", t60="60 me 4 1", t70="70 - 5 1", call="1 dead 2 1 2")
        book.crash({"me", "you"})
        assert shown(book) == "t50=50 - 3 1 1, t60=60 me 4 1 0, t70=70 - 5 1 0, call=1 - 2 1 3"

    def test_saved(self) -> None:
        """A book is what it was once it has been saved and read."""
        book = a_book(t50="50 me 3 1 1 cancel", call="1 you 2 1")
        book.schedule, book.timeout = "1h", 5
        again = bgjob._book_of(bgjob.Page(1, bgjob._book_text(book), (), None), {"me", "you"})
        assert shown(again) == shown(book)
        assert [vars(again)[name] for name in ("last", "schedule", "timeout", "token")] == [100, "1h", 5, 7]


class World:
    """A store in memory, and what really happens: who executes what, with which token, and what came of it."""

    def __init__(self, spec: Any) -> None:
        self.spec = spec
        self.now, self.version, self.text = 1000, 0, ""
        self.rows: dict[str, tuple[int, str]] = {}
        self.alive: set[str] = set()
        self.starts: dict[Any, list[int]] = {}
        self.deaths, self.failures, self.backs = Counter[Any](), Counter[Any](), Counter[Any]()
        self.ends: dict[Any, str] = {}
        self.won, self.pushed = set[int](), set[str]()
        self.names = itertools.count()

    def push(self) -> None:
        name = f"call{next(self.names)}"
        self.rows[name] = self.now, "{}"
        self.pushed.add(name)


class Instance:
    """An engine without a loop: loads, decides by the book, commits, learns. Its answers may be lost, its beats late."""

    def __init__(self, world: World) -> None:
        self.world, self.name = world, f"i{next(world.names)}"
        self.running: dict[Any, Any] = {}  # key -> claim
        self.ended: list[tuple[Any, Any, State, Any]] = []
        self.page: Any = None
        self.lived: set[str] = set()
        self.doubted = False
        self.at = 1100
        world.alive.add(self.name)

    def load(self) -> None:
        w = self.world
        self.page = bgjob.Page(w.version, w.text, [(id, due, body) for id, (due, body) in sorted(w.rows.items())], None)
        self.lived = set(w.alive) | {self.name}

    def commit(self, lost: bool = False) -> None:
        if self.page is None or self.name not in self.world.alive:
            return
        w, page = self.world, self.page
        self.page = None
        book = bgjob._book_of(page, self.lived, w.now)
        settled = []
        for key, claim, state, again in self.ended:
            kept = book.claims.get(key)
            answer = book.settle(key, self.name, claim.token, state, again, w.now, "why")
            settled.append((key, kept, answer))
        word = book.tick(self.at, self.at, w.now, w.spec)
        rows = [(id, bgjob._claim_of(due, body)) for id, due, body in page.rows if due <= w.now]
        found = book.claim(rows, w.spec.parallelism - len(self.running), w.now, w.spec, self.name)
        if w.version != page.version:
            return
        assert book.ticks <= w.spec.parallelism + (w.spec.overlap == "queue")
        if word == "won":
            assert self.at not in w.won, f"{self.at} is won twice"
            w.won.add(self.at)
        w.version += 1
        w.text = bgjob._book_text(book)
        for key, claim, answer in settled:
            if answer is State.SCHEDULED and isinstance(key, str):
                w.rows[key] = (claim.due, bgjob._body(tries=claim.tries, lost=claim.lost, since=1))
            elif answer is not None and answer is not State.SCHEDULED:
                assert key not in w.ends, f"{key} ended twice"
                w.ends[key] = answer
        for key, _ in found.taken:
            w.rows.pop(key, None)
        for key, _, state, _ in found.ended:
            w.rows.pop(key, None)
            w.ends[key] = state
        if lost:
            return  # what was kept will be seen at the next look
        self.ended, self.doubted = [], False
        if word != "full" and word != "early":
            self.at = max(self.at, book.last) + 100
        mine = {key: claim for key, claim in book.claims.items() if claim.owner == self.name}
        for key, claim in list(self.running.items()):
            if key not in mine or mine[key].token != claim.token:
                assert w.deaths[key], f"{key} was taken from the living"
                del self.running[key]  # fenced: its result would be refused
        for key, claim in mine.items():
            if key not in self.running:
                self.start(key, claim)

    def start(self, key: Any, claim: Any) -> None:
        w = self.world
        if claim.lost and _verdict(claim.tries - 1, claim.lost, w.spec.retries, w.spec.on_crash) == "fail":
            self.ended.append((key, claim, State.FAILED, "retry"))
            return
        w.starts.setdefault(key, []).append(claim.token)
        self.running[key] = claim

    def end(self, fails: bool) -> None:
        for key, claim in list(self.running.items())[:1]:
            del self.running[key]
            w = self.world
            w.failures[key] += fails
            again = fails and _verdict(claim.tries, claim.lost, w.spec.retries, w.spec.on_crash) == "run"
            state = State.SCHEDULED if again else State.FAILED if fails else State.SUCCEEDED
            self.ended.append((key, claim, state, "retry"))

    def hand_back(self) -> None:
        self.world.backs.update([*self.running])
        self.ended += [(key, claim, State.SCHEDULED, "back") for key, claim in self.running.items()]
        self.running.clear()

    def die(self) -> None:
        self.freeze()
        self.running, self.ended = {}, []

    def freeze(self) -> None:
        """For longer than its lease: what it executes may be taken over."""
        self.world.alive.discard(self.name)
        self.doubted, self.page = True, None
        book = bgjob._book_of(bgjob.Page(self.world.version, self.world.text, (), None), {self.name})
        self.world.deaths.update(key for key, claim in book.claims.items() if claim.owner == self.name)


STEPS = (
    ["both"] * 8
    + ["end"] * 6
    + ["load", "commit"] * 3
    + ["fail", "push", "tick"] * 3
    + ["lose", "back", "die", "freeze", "thaw", "thaw"]
)


class TestInterleaved:
    @pytest.mark.parametrize("overlap", ["skip", "queue", "all"])
    @pytest.mark.parametrize("parallelism", [1, 3])
    @pytest.mark.parametrize("retries", [0, 2])
    def test_instances(self, overlap: str, parallelism: int, retries: int) -> None:
        """Three instances over the pure rules, with deaths, lost answers and late beats: no tick twice, nothing lost,
        never above `parallelism` while owners live, nothing again without a death or a failure, retries as many."""
        for seed in range(400 if THOROUGH else 25):
            chance = random.Random(f"{overlap} {parallelism} {retries} {seed}")
            world = World(rules(overlap=overlap, parallelism=parallelism, retries=retries))
            crew = [Instance(world) for _ in range(3)]
            for _ in range(300):
                self.step(world, crew, chance.choice(STEPS), chance.randrange(3))
                live = [i for i in crew if i.name in world.alive and not i.doubted]
                assert sum(len(i.running) for i in live) <= parallelism
            self.finish(world, crew)
            for key, tokens in world.starts.items():
                failures, deaths, backs = world.failures[key], world.deaths[key], world.backs[key]
                assert tokens == sorted(set(tokens)), "tokens grow"
                assert len(tokens) <= 1 + failures + deaths + backs
                assert failures <= retries + 1 + deaths
                assert world.ends[key] == "succeeded" or failures > retries or deaths > 3

    def step(self, world: World, crew: list[Instance], step: str, who: int) -> None:
        one = crew[who]
        awake = one.name in world.alive
        if step == "push":
            world.push()
        elif step == "tick":
            world.now += 60
        elif step == "die":
            one.die()
            crew[who] = Instance(world)
        elif step == "freeze" and awake:
            one.freeze()
        elif step == "thaw":
            one.world.alive.add(one.name)
        elif awake and step in ("load", "both"):
            one.load()
        if awake and step in ("commit", "lose", "both"):
            one.commit(lost=step == "lose")
        elif awake and step in ("end", "fail"):
            one.end(fails=step == "fail")
        elif awake and step == "back":
            one.hand_back()

    def finish(self, world: World, crew: list[Instance]) -> None:
        """Everybody lives and works until nothing is left."""
        for i in crew:
            world.alive.add(i.name)
            i.at = 10**9  # no more ticks
        for _ in range(150):
            for i in crew:
                i.load()
                i.commit()
                i.end(fails=False)
            world.now += 50
        book = bgjob._book_of(bgjob.Page(1, world.text, (), None), world.alive)
        assert not book.claims
        assert not world.rows
        assert not any(i.running or i.ended for i in crew)
        assert {*world.starts, *world.won, *world.pushed} == {*world.ends}


# 8 Engine, seen from outside and in memory ----------------------------------------------------------------------------
Caplog = pytest.LogCaptureFixture


class SteppedLoop(bgjob._VirtualLoop):
    """A virtual loop with a wall's clock beside it: `step` sets the wall, `blocked` lets time pass for both, in s."""

    step = blocked = early = 0.0

    def time(self) -> float:
        return super().time() + self.blocked

    def wall(self) -> float:
        return START.timestamp() + self.time() + self.step

    def call_at(self, when: float, *rest: object, **keywords: object) -> asyncio.TimerHandle:
        return super().call_at(max(when - self.early, min(when, self.time() + 1e-5)), *rest, **keywords)


def virtually(main: Callable[[], Coroutine[object, object, object]]) -> object:
    """What `main` returns, in virtual time: for `run()` and `running()`, with clocks that can be set."""
    with pytest.MonkeyPatch.context() as patch, asyncio.Runner(loop_factory=SteppedLoop) as runner:
        patch.setattr(time, "time", runner.get_loop().wall)
        return runner.run(main())


def seconds() -> float:
    """Since the start."""
    return round(asyncio.get_running_loop().time(), 2)


RAISED = {"exits": SystemExit(3), "raises a group": BaseExceptionGroup("g", [SystemExit()]),
          "raises CancelledError": asyncio.CancelledError()}  # fmt: skip


async def misbehave(how: str) -> None:
    """Some of the ways in which a function may end."""
    if how in RAISED:
        raise RAISED[how]
    if how == "cancels itself":
        asyncio.current_task().cancel()
    if how == "asks to be cancelled":
        await current_run().cancel()
    if how == "is cancelled by somebody":
        asyncio.get_running_loop().call_later(1, asyncio.current_task().cancel)
    for _ in range({"well": 0, "swallows": 5}.get(how, 1)):
        try:
            async with asyncio.timeout(1 if how == "times out" else None):
                await asyncio.sleep(20)
        except asyncio.CancelledError:
            if how == "raises instead":
                raise KeyError("instead") from None
            if how != "swallows":
                raise


class Noting(Registry):
    """A registry that notes what its jobs do: what began when, in s since the start, and how many ran at once."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[tuple[object, float]] = []
        self.now = self.most = 0
        self.events: list[tuple[Run, str]] = []

    def add(self, name: str = "work", wait: float = 0, fails: int = 0, **options: object) -> Job:
        """A job that sleeps, fails at its first attempts, else returns what it was given."""

        async def work(what: object = None, wait: float = wait, fails: int = fails, how: str = "well") -> object:
            self.ran.append((current_run().job if what is None else what, seconds()))
            self.now += 1
            self.most = max(self.most, self.now)
            try:
                await asyncio.sleep(wait)
                await misbehave(how)
            finally:
                self.now -= 1
            if current_run().attempt <= fails:
                raise ValueError("no")
            return what

        return self.job(name=name, **options)(work)

    def note(self, run: Run) -> None:
        self.events.append((run, str(run.state)))

    def starts(self, name: str) -> list[float]:
        return [when for what, when in self.ran if what == name]

    def ticks(self, name: str, state: str = "succeeded") -> list[float]:
        """The ticks of a job whose runs came to that state, in the order in which they did."""
        found = [run for run, event in self.events if run.job == name and event == state and "@" in run.id]
        return [(run.tick - START).total_seconds() for run in found]


@pytest.fixture
def jobs() -> Noting:
    return Noting()


def in_virtual_time(test: Callable[..., Coroutine[object, object, None]]) -> Callable[..., None]:
    """Run an async test in virtual time; no task may be left of what it began."""

    @functools.wraps(test)
    def wrapper(*args: object, **given: object) -> None:
        async def main() -> None:
            await test(*args, **given)
            assert asyncio.all_tasks() == {asyncio.current_task()}

        virtually(main)

    return wrapper


def beside_jobs(test: Callable[..., Coroutine[object, object, None]]) -> Callable[..., None]:
    """Run an async test in virtual time, beside its jobs."""

    @functools.wraps(test)
    async def both(self: object, jobs: Noting, **given: object) -> None:
        async with asyncio.timeout(30 * 86_400), jobs.running(drain=0, on_event=jobs.note):
            await test(self, jobs, **given)

    return in_virtual_time(both)


def lines(caplog: Caplog, word: str = "") -> list[str]:
    messages = [record.getMessage() for record in caplog.records if record.name == "bgjob"]
    return [message for message in messages if re.search(word, message)]


def giving(value: object) -> Callable[[], Coroutine[object, object, object]]:
    async def work() -> object:
        if isinstance(value, BaseException):
            raise value
        return value

    return work


@each_test(beside_jobs)
class TestTicks:
    SCHEDULES = (
        ("interval", {"every": "10s"}, [10, 20, 30, 40, 50]), ("cron", {"cron": "*/20 * * * * *"}, [20, 40]),
        ("immediate", {"every": "20s", "immediate": True}, [0, 20, 40]), ("call", {}, []),
        ("immediate cron", {"cron": "* * * * *", "immediate": True}, [0]),
        ("after", {"after": "5s"}, [5]), ("at once", {"after": 0}, [0]),
    )  # fmt: skip

    def test_schedules(self, jobs: Noting) -> None:
        """Intervals lie at start + n * every, however long runs take; `immediate` adds the start, `after` is once."""
        for name, schedule, _ in self.SCHEDULES:
            jobs.add(name, 7.3, **schedule)
        runs = jobs.simulate("59s", start=START)
        for name, _, ticks in self.SCHEDULES:
            assert [(run.tick - START).seconds for run in runs if run.job == name] == jobs.starts(name) == ticks

    @pytest.mark.parametrize(("overlap", "parallelism", "starts", "skipped"), [
        ("skip", 1, [10, 40, 70, 100], [20, 30, 50, 60, 80, 90, 110]),
        ("skip", 2, [10, 20, 40, 50, 70, 80, 100, 110], [30, 60, 90]),
        ("queue", 1, [10, 34, 58, 82, 106], [30, 50, 70, 80, 100]),
        ("all", 1, [10, 34, 58, 82, 106], []),
    ])  # fmt: skip
    async def test_overlap(self, jobs: Noting, overlap: str, parallelism: int, starts: object, skipped: object) -> None:
        """A tick overlaps when `parallelism` are unfinished: it is skipped, or one waits, or all wait, in order."""
        jobs.add(wait=24, every="10s", overlap=overlap, parallelism=parallelism)
        await asyncio.sleep(115)
        assert (jobs.starts("work"), jobs.ticks("work", "skipped")) == (starts, skipped)
        assert jobs.ticks("work", "running") == sorted(jobs.ticks("work", "running"))
        assert {run.reason for run, state in jobs.events if state == "skipped"} <= {"overlap"}

    async def test_what_makes_a_tick_overlap(self, jobs: Noting) -> None:
        """A run that waits to be retried does; a submitted one doesn't, though it takes the slot; nor is it skipped."""
        jobs.add("retried", fails=1, every="10s", retries=1, retry_delay="15s")
        called = jobs.add("called", every="10s")
        await asyncio.sleep(5)
        for _ in range(2):
            await called.submit("call", 6)
        await asyncio.sleep(24)
        assert (jobs.ticks("retried"), jobs.ticks("retried", "skipped")) == ([10], [20])
        assert (jobs.starts("call"), jobs.starts("called")) == ([5, 11], [17, 20])

    @pytest.mark.parametrize(
        ("overlap", "ticks"), [("skip", [1, 11, 12]), ("queue", [1, 11, 12]), ("all", range(1, 13))]
    )
    @pytest.mark.parametrize("schedule", [{"every": "1m"}, {"cron": "* * * * *"}])
    async def test_gap(self, jobs: Noting, schedule: object, overlap: str, ticks: list[int], caplog: Caplog) -> None:
        """After a gap the newest missed tick runs once, with "all" every one; it is one line, and costs no more."""
        jobs.add(overlap=overlap, **schedule)
        await asyncio.sleep(90.5)
        asyncio.get_running_loop().blocked += 600
        await asyncio.sleep(50)
        assert jobs.ticks("work") == [60 * tick for tick in ticks]
        jobs.add("often", every="1s")
        await asyncio.sleep(10.5)
        jobs.ran.clear()
        asyncio.get_running_loop().blocked += 7 * 86_400
        await asyncio.sleep(5)
        assert len(jobs.starts("often")) == 6
        (line,) = lines(caplog, "often")
        assert re.fullmatch(
            r".*: 60480\d ticks came due together, 2026-01-01.* to 2026-01-08.*: only the newest runs", line
        )

    async def test_early_timers(self, jobs: Noting) -> None:
        """What is due within 2 ms is due, once: uvloop's timers may fire that much before their time."""
        asyncio.get_running_loop().early = 0.0015
        jobs.add(every="10s")
        await asyncio.sleep(35)
        assert jobs.starts("work") == jobs.ticks("work") == [10, 20, 30]
        assert all(run.started_at < run.tick for run, _ in jobs.events)

    def test_jitter(self) -> None:
        """Jitter spreads the starts, never past the next tick, and is the same in every replay."""
        first, second = Noting(), Noting()
        for jobs in (first, second):
            jobs.add(every="10s", jitter="1h")
            assert all(0 <= run.late < 10 for run in jobs.simulate("10m", start=START))
        assert first.ran == second.ran
        assert len({round(when % 10) for _, when in first.ran}) > 5

    @pytest.mark.parametrize(("expires", "wait"), [(5, 4), (0.5, 0.4)])
    async def test_expires(self, jobs: Noting, expires: float, wait: float) -> None:
        """What would start later than that is skipped, a call or a tick; judged at the first start only."""
        work = jobs.add("tick", wait, 1, every="1h", overlap="all", expires=expires, retries=1, retry_delay="1m")
        await asyncio.sleep(3600 - 2 * wait)
        runs = [await work.submit(n) for n in range(3)]
        await asyncio.sleep(120)
        assert [run.state for run in runs] == ["succeeded", "succeeded", "skipped"]
        assert runs[2].reason == f"expired: {2 * wait} s late, expires={expires} s"
        assert [what for what, _ in jobs.ran] == [0, 1, "tick", 0, 1, "tick"]

    async def test_ids(self, jobs: Noting) -> None:
        """A tick's id is its instant; those of calls sort by submission, whatever the clock."""
        made, call = [], jobs.add("call")
        jobs.add("tick", every="250ms")
        await asyncio.sleep(1.1)
        assert [run.id for run, state in jobs.events if state == "succeeded"][2:] == [
            "tick@2026-01-01T00:00:00.750Z",
            "tick@2026-01-01T00:00:01Z",
        ]
        for asyncio.get_running_loop().step in (0, 0.001, 3600, -3600, 0):
            made.extend([(await call.submit()).id for _ in range(300)])
            await asyncio.sleep(60)
        assert made == sorted(set(made))


@each_test(beside_jobs)
class TestClockSteps:
    """Each job starts at 00:00, the wall's clock is set at 00:33:20, and what counts is seconds since the start."""

    @pytest.mark.parametrize(("step", "every", "wild", "fixed", "delay", "instant", "later"), [
        # an hour on: one catch-up within 30 s, and on by the new time
        (3600, [2010, 4500], [2010, 2400], [2010, 5400], 2010, 2010, 2010),
        # an hour back: intervals and delays as if nothing had been; cron waits until its last tick has passed again
        (-3600, [2700, 5400], [6000, 6600], [9000, 12600], 3650, 7200, 9000),
        # more than three hours back: cron begins anew by the new time
        (-4 * 3600, [2700, 5400], [2400, 3000], [16200, 19800], 3650, 18000, 19800),
    ])  # fmt: skip
    async def test_steps(self, jobs: Noting, step: int, every: list[int], wild: list[int], fixed: list[int], delay: int,
                         instant: int, later: int, caplog: Caplog) -> None:  # fmt: skip
        """A step is told and seen within 30 s; nothing bursts, freezes or comes twice, whichever way it goes."""
        jobs.add("every", every="45m")
        jobs.add("wild", cron="*/10 * * * *")
        jobs.add("fixed", cron="30 0-5 * * *")
        jobs.add("parked", 1000, every="10m", overlap="all")
        call = jobs.add("call")
        await asyncio.sleep(50)
        await call.after("1h").submit("delay")
        await call.at(START + timedelta(hours=1)).submit("instant")
        await asyncio.sleep(1950)
        asyncio.get_running_loop().step = step
        await call.at(START + timedelta(minutes=90)).submit("later")
        await asyncio.sleep(6 * 3600)
        ids = [run.id for run, state in jobs.events if state == "running"]
        assert len(ids) == len(set(ids)) or step < -3 * 3600
        wanted = {"every": every, "wild": wild, "fixed": fixed, "parked": [2600, 3600, 4600], "delay": [delay],
                  "instant": [instant], "later": [later]}  # fmt: skip
        for name, times in wanted.items():
            found = [2010 if when <= 2030 else when for when in jobs.starts(name) if when >= 2000]
            assert (name, found[: max(2, len(times))]) == (name, times)
        assert len(lines(caplog, f"the clock went {'forward' if step > 0 else 'back'} by {abs(step):,} s")) == 1

    async def test_lateness(self, jobs: Noting, caplog: Caplog) -> None:
        """After a step back a cron's tick is late by the wall's clock, and one that waits by what it waited."""
        jobs.add("queued", 25, every="10s", overlap="queue")
        jobs.add("cron", cron="* * * * *", expires="30s")
        await asyncio.sleep(22)
        asyncio.get_running_loop().step = -3600
        await asyncio.sleep(15)
        assert [round(run.late) for run, state in jobs.events if state == "running"] == [0, 15]
        jobs.remove("queued")
        await asyncio.sleep(2 * 3600)
        late = {(state, round(run.late)) for run, state in jobs.events if run.job == "cron"}
        assert late == {("running", 0), ("succeeded", 0)}
        assert not lines(caplog, "cron")


@each_test(beside_jobs)
class TestSlots:
    async def test_parallelism(self, jobs: Noting) -> None:
        """Never more than `parallelism`, at most 1,000; calls go first in, first out; a retry that waits holds none."""
        work = jobs.add(wait=1, parallelism=3, retries=1, retry_delay="1h")
        runs = [await work.submit(n, fails=n == 0) for n in range(50)]
        assert [await run.result() for run in runs[1:]] == [*range(1, 50)]
        assert seconds() == 17
        assert await runs[0].result() == 0
        assert (jobs.most, [what for what, _ in jobs.ran]) == (3, [*range(50), 0])
        many = jobs.add("many", wait=10, parallelism=1000)
        runs = [await many.submit() for _ in range(1100)]
        await asyncio.sleep(30)
        assert {run.state for run in runs} == {State.SUCCEEDED}
        assert jobs.most == 1000
        with pytest.raises(ScheduleError, match=r"job 'more': parallelism=1001: .*1,?000"):
            jobs.add("more", parallelism=1001)

    @pytest.mark.parametrize("removed", [True, False])
    @pytest.mark.parametrize("schedule", [{"every": "10s"}, {}])
    async def test_registered_again(self, jobs: Noting, schedule: dict[str, str], removed: bool) -> None:
        """What runs of a job still counts, and is found by its cancel, when the job is registered again or reloaded."""
        for n in range(10):
            if removed and n:
                jobs.remove("work")
            job = jobs.add(wait=25, parallelism=1, **schedule)
            if not schedule:
                await job.submit()
            await asyncio.sleep(11)
        assert (jobs.most, jobs.now, len(jobs.ran) >= 3) == (1, 1, True)
        assert await job.cancel() >= 1
        await asyncio.sleep(1)
        assert jobs.now == 0

    @pytest.mark.skipif(not hasattr(asyncio, "eager_task_factory"), reason="needs Python 3.12")
    async def test_eager_tasks(self, jobs: Noting) -> None:
        """With an eager task factory slots, order and a run that cancels itself in its first step are right."""
        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
        work = jobs.add(parallelism=2, timeout="1h")
        runs = [await work.submit(n, wait=n % 3 == 0) for n in range(500)]
        assert [await run.result() for run in runs] == [*range(500)]
        assert (jobs.most, [what for what, _ in jobs.ran]) == (2, [*range(500)])
        with pytest.raises(RunCancelled, match="on request"):
            await (await work.submit(how="asks to be cancelled")).result()

    @pytest.mark.parametrize(("fault", "told"), [
        ("raises", "OSError: no task"), ("is cancelled", "was cancelled"),
        ("is cancelled after a request", "cancelled on request"), ("meets a request", "cancelled on request"),
    ])  # fmt: skip
    async def test_a_task_that_never_began(self, jobs: Noting, fault: str, told: str) -> None:
        """It ends its run, for whoever waits; a reason that was written before decides; the slot comes back at once."""
        work = jobs.add(parallelism=1)

        def factory(loop: asyncio.AbstractEventLoop, coro: object, **keywords: object) -> asyncio.Task[object]:
            loop.set_task_factory(None)
            if fault == "raises":
                raise OSError("no task")
            if "request" in fault:
                asyncio.Task(runs[0].cancel(), loop=loop)
            task = asyncio.Task(coro, loop=loop, **keywords)
            if "is cancelled" in fault:
                task.cancel()
            return task

        runs = [await work.submit(n) for n in range(2)]
        waiter = asyncio.create_task(runs[0].result("5s"))
        asyncio.get_running_loop().set_task_factory(factory)
        with pytest.raises((RunFailed, RunCancelled), match=told):
            await waiter
        await runs[1].result("5s")
        assert jobs.ran == [(1, 0)]


@each_test(beside_jobs)
class TestAttempts:
    @pytest.mark.parametrize(("how", "error", "attempts"), [
        ("well", "ValueError: no", 2), ("exits", "SystemExit: 3", 1), ("times out", "TimeoutError", 2),
        ("raises a group", "(BaseExceptionGroup|SystemExit).*", 1), ("raises CancelledError", "CancelledError", 1),
        ("swallows", "TimeoutError: no end within 10 s", 2), ("raises instead", "TimeoutError: no end within 10 s", 2),
        ("cancels itself", None, 1), ("asks to be cancelled", None, 1), ("is cancelled by somebody", None, 1),
    ])  # fmt: skip
    async def test_ends(self, jobs: Noting, how: str, error: str | None, attempts: int) -> None:
        """What user code raises is a failure, told before the end; a cancellation is none; slots come back."""

        async def hook(run: Run, error: BaseException) -> None:
            told.append((run.state, run.id))

        told, options = [], {"retries": 1, "retry_delay": 0, "timeout": "10s", "parallelism": 2}
        work = jobs.add(on_error=hook, **options)
        runs = [await work.submit(how=how, fails=9) for _ in range(3)]
        for run in runs:
            with pytest.raises(RunFailed if error else RunCancelled):
                await run.result()
        assert [(run.state, run.attempt) for run in runs] == [("failed" if error else "cancelled", attempts)] * 3
        assert error is None or re.fullmatch(error, runs[0].error)
        assert sorted(told) == ([("running", run.id) for run in runs] if error else [])
        jobs.most = 0
        assert [await run.result() for run in [await work.submit(n, 1) for n in range(4)]] == [*range(4)]
        assert jobs.most == 2

    @pytest.mark.parametrize("retry_delay", [lambda n: n * 10, lambda n, error: n * 10 if str(error) == "no" else 0])
    async def test_retries(self, jobs: Noting, retry_delay: Callable[..., int]) -> None:
        """A failing job is tried `retries` times more, `retry_delay` after each end of an attempt."""
        run = await jobs.add(wait=1, fails=9, retries=2, retry_delay=retry_delay).submit()
        await asyncio.sleep(60)
        assert jobs.starts("work") == [0, 11, 32]
        assert (run.state, run.attempt, run.error) == ("failed", 3, "ValueError: no")

    @pytest.mark.parametrize(("retry_on", "error", "attempts"), [
        (OSError, OSError(5), 2), (LookupError, OSError(5), 1), ((LookupError, OSError), OSError(5), 2),
        ((), OSError(5), 1), (lambda error: error.args == (5,), OSError(5), 2), (lambda error: False, OSError(5), 1),
        (Exception, OSError(5), 2), (Exception, SystemExit(), 1), (BaseException, SystemExit(), 2),
        (Exception, GeneratorExit(), 1),
        (OSError, ExceptionGroup("g", [OSError(5), ExceptionGroup("h", [TimeoutError()])]), 2),
        (OSError, ExceptionGroup("g", [OSError(5), KeyError()]), 1),
    ])  # fmt: skip
    def test_retry_on(self, jobs: Noting, retry_on: object, error: BaseException, attempts: int) -> None:
        """A failure is tried again if it, or each leaf of a group, is of the class, or if the predicate says so."""
        jobs.job(after=0, retries=1, retry_on=retry_on, name="bad")(giving(error))
        (run,) = jobs.simulate("1h", start=START)
        assert (run.state, run.attempt) == ("failed", attempts)

    async def test_attempts_are_apart(self, jobs: Noting) -> None:
        """Each gets the arguments as they were given, and its own timeout; ticks don't share `args`, either."""
        seen, given = [], {"to": ["tick"]}

        @jobs.job(every="1m", args=given, retries=1, retry_delay=5, timeout=10)
        async def send(to: list[str], waits: dict[str, list[int]] = {}) -> str:  # noqa: B006
            seen.append((seconds(), *to))
            to.clear()
            await asyncio.sleep(waits["of"].pop() if waits and current_run().attempt == 1 else 9)
            if current_run().attempt == 1:
                raise ValueError
            return "done"

        for wait in (1, 20):
            assert await (await send.submit(["x", "y"], waits={"of": [wait]})).result() == "done"
        await asyncio.sleep(150 - seconds())
        assert seen == [(0, "x", "y"), (6, "x", "y"), (15, "x", "y"), (30, "x", "y"),
                        (60, "tick"), (74, "tick"), (120, "tick"), (134, "tick")]  # fmt: skip
        assert given == {"to": ["tick"]}

    async def test_cancel(self, jobs: Noting, caplog: Caplog) -> None:
        """A cancelled run never starts, due or to be retried; what its clean-up raises is told, and changes nothing."""
        work = jobs.add(parallelism=1, retries=1, retry_delay="10s")
        fails = await work.submit("fails", fails=1)
        await asyncio.sleep(1)
        first = await work.submit("first", 5)
        runs = [fails, await work.after("1m").submit("delayed"), await work.submit("waiting")]
        await asyncio.sleep(1)
        assert [await run.cancel() for run in runs] == [True] * 3
        assert {run.state for run in runs} == {State.CANCELLED}
        await first.result()
        assert not await first.cancel()
        # all of a job
        runs = [await work.submit("all", 1000), await work.submit("all"), await work.after(5).submit("all")]
        await asyncio.sleep(1)
        assert await work.cancel() == 3
        await asyncio.sleep(100)
        assert {run.state for run in runs} == {State.CANCELLED}
        assert await work.cancel() == 0
        assert [what for what, _ in jobs.ran] == ["fails", "first", "all"]
        run = await work.submit(how="raises instead")
        await asyncio.sleep(1)
        assert await run.cancel()
        with pytest.raises(RunCancelled, match=f"run '{run.id}' was cancelled: cancelled on request"):
            await run.result()
        assert run.error == "KeyError: 'instead'"
        assert [r.exc_info is not None for r in caplog.records if "while it was cancelled" in r.getMessage()] == [True]

    @pytest.mark.parametrize(("asked", "state"), [(True, "cancelled"), (False, "succeeded")])
    @in_virtual_time
    async def test_a_cancellation_that_is_caught(self, jobs: Noting, asked: bool, state: str) -> None:
        """Who returns all the same is cancelled if that was asked for, and done where only the end of run() came."""
        async with jobs.running(drain=0):
            run = await jobs.add().submit(how="swallows")
            await asyncio.sleep(81)
            if asked:
                await run.cancel()
        assert run.state == state

    @in_virtual_time
    async def test_context(self, jobs: Noting) -> None:
        """Every run starts in a copy of the context in which run() was called, whoever submits it."""
        where = ContextVar("where", default="nowhere")

        @jobs.job
        async def work() -> str:
            found = where.get()
            where.set("in a run")
            return found

        where.set("at the start")
        async with jobs.running():
            where.set("later")
            assert [await (await work.submit()).result() for _ in range(2)] == ["at the start"] * 2


@each_test(beside_jobs)
class TestCalls:
    @pytest.mark.parametrize(("value", "result", "reason"), [
        (None, None, None), ((1, (2, "é")), [1, [2, "é"]], None), ({"a": (0.5, True)}, {"a": [0.5, True]}, None),
        ("x" * 2**19, "x" * 2**19, None), ({1, 2}, None, "JSON"), (object(), None, "JSON"),
        (float("nan"), None, "JSON"), ({1: "a"}, None, "text|key"), ("x" * 2**20, None, "1 MiB"),
    ], ids=["none", "tuple", "dict", "text", "set", "object", "nan", "keys", "large"])  # fmt: skip
    async def test_results(self, jobs: Noting, value: object, result: object, reason: str, caplog: Caplog) -> None:
        """A result makes the round trip through JSON; one that can't is no failure, and says why."""
        caplog.set_level(logging.INFO)
        run = await jobs.job(name="work", retries=1, retry_delay=0)(giving(value)).submit()
        for handle in (run, await jobs.find(run.id)):
            if reason is None:
                assert await handle.result() == result
                continue
            with pytest.raises(BgjobError, match=reason) as told:
                await handle.result()
            assert not isinstance(told.value, RunFailed)
            assert ("1 MiB" in str(told.value)) == (reason == "1 MiB")
        assert (run.state, run.attempt) == ("succeeded", 1)
        assert re.search(reason or "", *lines(caplog, "succeeded"))

    async def test_find(self, jobs: Noting) -> None:
        """The unfinished and the last thousand that ended are found by id, ticks and calls, keyed or not."""
        jobs.add("tick", every="1s")
        call = jobs.add("call")
        ids = [(await call.after("1d").submit()).id, (await call.submit(1, 5000)).id, (await call.submit(2)).id,
               (await call.after(0, key="k").submit(3, 0, 1)).id]  # fmt: skip
        for until, states in (1.5, ["succeeded", "failed"]), (996, ["succeeded", "failed"]), (1002, [None, None]):
            await asyncio.sleep(until - seconds())
            jobs.events.clear()
            found = [run and str(run.state) for run in [await jobs.find(id) for id in ids]]
            assert found == ["scheduled", "running", *states]
        ticks = [await jobs.find(f"tick@2026-01-01T00:{end}Z") for end in ("00:01", "00:30", "16:30")]
        assert [run and str(run.state) for run in ticks] == [None, "succeeded", "succeeded"]
        assert await jobs.find("unknown") is None

    async def test_keys(self, jobs: Noting) -> None:
        """The same key of a job is the same run; it is free when that was cancelled, or is beyond the last thousand."""
        one, other = jobs.add("one"), jobs.add("other")
        jobs.add("tick", every="1s")
        first = await one.after("5m", key="k").submit("a")
        assert await one.after("1m", key="k").submit("b") is first
        assert str(first) == first.id == "one#k"
        assert await (await other.after(0, key="k").submit("other")).result() == "other"
        assert await first.cancel()
        assert await (await one.after("1m", key="k").submit("b")).result() == "b"
        with pytest.raises(RunFailed):
            await (await one.after(0, key="f").submit("f", fails=1)).result()
        for wait, result in (900, "b"), (110, "c"):
            await asyncio.sleep(wait)
            jobs.events.clear()
            gc.collect()
            assert await (await one.after(0, key="k").submit("c")).result() == result
        assert (await one.after(0, key="f").submit("f")).state == "scheduled"
        calls = [(what, when) for what, when in jobs.ran if what != "tick"]
        assert calls == [("other", 0), ("b", 60), ("f", 60), ("c", 1070)]

    async def test_times(self, jobs: Noting) -> None:
        """A run tells start, end, duration and lateness of its last attempt; result() gives up after its timeout."""
        seen = []

        def note(run: Run) -> None:
            times = [when and (when - START).total_seconds() for when in (run.started_at, run.finished_at)]
            seen.append((*times, run.duration, run.late, run.attempt))

        run = await jobs.add(wait=1.5, fails=2, retries=1, retry_delay=60).after(5).submit()
        for until in (0, 6, 67):
            await asyncio.sleep(until - seconds())
            note(run)
        with pytest.raises(TimeoutError, match="it is running"):
            await run.result(timedelta(seconds=0.5))
        with pytest.raises(RunFailed, match=f"run '{run.id}' failed: ValueError: no") as failed:
            await run.result()
        assert type(failed.value.__cause__) is ValueError
        note(run)
        assert seen == [
            (None, None, None, 0, 0), (5, None, None, 0, 1), (66.5, None, None, 61.5, 2), (66.5, 68, 1.5, 61.5, 2),
        ]  # fmt: skip


class TestThreads:
    def test_threads(self, jobs: Noting) -> None:
        """A plain function runs in a daemon thread with the run's context; none is left when run() has ended."""
        seen = []

        def note(*_: object) -> None:
            seen.append((threading.current_thread().daemon, current_run().job, threading.get_ident() == here))

        @jobs.job(on_error=note)
        def plain(n: int) -> int:
            note()
            if n == 2:
                raise KeyboardInterrupt
            return 1 // n

        async def main() -> None:
            async with jobs.running():
                assert await (await plain.submit(1)).result(5) == 1
                for n, error in (0, "ZeroDivisionError"), (2, "KeyboardInterrupt"):
                    with pytest.raises(RunFailed, match=error):
                        await (await plain.submit(n)).result(5)

        here, before = threading.get_ident(), threading.active_count()
        for _ in range(20):
            with contextlib.suppress(KeyboardInterrupt):
                asyncio.run(main())
            assert threading.active_count() == before
        assert seen == [(True, "plain", False)] * 100

    @pytest.mark.parametrize("asked", ["timeout", "cancel"])
    @in_virtual_time
    async def test_it_can_not_be_cancelled(self, jobs: Noting, asked: str, caplog: Caplog) -> None:
        """A thread keeps its slot until it ends, and only then its run ends; but a timeout is told when it passes."""
        release, begun, told = threading.Event(), [], []

        async def hook(run: Run, error: BaseException) -> None:
            told.append(repr(error))

        @jobs.job(parallelism=1, timeout="5s" if asked == "timeout" else None, on_error=hook)
        def blocked(n: int) -> None:
            begun.append(n)
            release.wait(10)

        async with jobs.running():
            runs = [await blocked.submit(n) for n in range(2)]
            await asyncio.sleep(1)
            if asked == "cancel":
                assert await runs[0].cancel()
            await asyncio.sleep(60)  # virtual: the thread stands still
            waited = [*told], [record.levelname for record in caplog.records]
            assert (runs[0].state, runs[1].state, begun) == ("running", "scheduled", [0])
            release.set()
            with pytest.raises((RunFailed, RunCancelled), match="no end within 5 s|on request"):
                await runs[0].result()
        assert waited == ((["TimeoutError('no end within 5 s')"], ["ERROR"]) if asked == "timeout" else ([], []))
        assert begun == [0, 1]

    def test_from_another_thread(self, jobs: Noting) -> None:
        """A thread adds jobs at once, though the loop sleeps; submitting there says which way leads to the loop."""

        async def main() -> None:
            begun = asyncio.Event()
            async with jobs.running(on_event=lambda run: begun.set()):
                await asyncio.sleep(0)
                threading.Timer(0.02, jobs.add, kwargs={"every": "10ms"}).start()
                await asyncio.wait_for(begun.wait(), 10)
                with pytest.raises(BgjobError, match="another event loop runs the jobs; use asyncio.run_coroutine_thr"):
                    await asyncio.to_thread(asyncio.run, jobs.jobs["work"].submit())

        asyncio.run(main())


@each_test(beside_jobs)
class TestHooks:
    async def test_events(self, jobs: Noting) -> None:
        """on_event sees every change of a run's state, in order."""
        work = jobs.add(wait=2, parallelism=1, expires="1s", retries=1, retry_delay="5s")
        for key, fails in {"good": 0, "again": 1, "bad": 2, "first": 0, "late": 0}.items():
            await work.after(0, key=key).submit(fails=fails)
            await asyncio.sleep(0 if key == "first" else 20)
        run = await work.after(0, key="running").submit()
        await asyncio.sleep(1)
        await run.cancel()
        await (await work.after(60, key="waiting").submit()).cancel()
        await asyncio.sleep(1)
        seen: dict[str, list[str]] = {}
        for run, state in jobs.events:
            seen.setdefault(run.key, []).append(state)
        assert seen == {
            "good": ["running", "succeeded"], "again": ["running", "scheduled", "running", "succeeded"],
            "bad": ["running", "scheduled", "running", "failed"], "first": ["running", "succeeded"],
            "late": ["skipped"], "running": ["running", "cancelled"], "waiting": ["cancelled"],
        }  # fmt: skip

    @pytest.mark.parametrize("error", [ValueError(), SystemExit(2), BaseExceptionGroup("g", [SystemExit()])])
    @pytest.mark.parametrize("hook", ["retry_on", "retry_delay", "on_error", "on_event"])
    @in_virtual_time
    async def test_that_raise(self, jobs: Noting, hook: str, error: BaseException, caplog: Caplog) -> None:
        """Whatever a hook raises is logged; the run ends as it would, its slot comes back, nothing stops."""

        def broken(*_: object) -> bool:
            raise error

        options = {} if hook == "on_event" else {hook: broken}
        jobs.add(wait=90, fails=9, every="1m", overlap="all", **{"retries": 1, "retry_delay": "1s"} | options)
        async with jobs.running(drain=0, on_event=broken if hook == "on_event" else None):
            await asyncio.sleep(1000)
        assert len(jobs.ran) == 11
        assert lines(caplog, f"{'retry_on or retry_delay' if 'retry' in hook else hook} failed: {type(error).__name__}")

    async def test_on_error(self, jobs: Noting, caplog: Caplog) -> None:
        """It runs once, in the run, free of the timeout's cancellation, for at most the job's timeout, else 30 s."""
        told = []

        async def hook(run: Run, error: BaseException) -> None:
            told.append((run.state, repr(error), asyncio.current_task().cancelling(), current_run() is run))
            await asyncio.sleep(10_000)

        fails = jobs.job(on_error=hook, name="fails")(giving(ValueError()))
        hangs = jobs.add("hangs", 10_000, on_error=hook, timeout="5s")
        for job, end in ((fails, 30), (hangs, 40)):
            with pytest.raises(RunFailed):
                await (await job.submit()).result()
            assert seconds() == end
        errors = ("ValueError()", "TimeoutError('no end within 5 s')")
        assert told == [("running", error, 0, True) for error in errors]
        assert len(lines(caplog, "on_error failed: TimeoutError")) == 2

    @pytest.mark.parametrize("hook", ["retry_on", "on_error"])
    def test_interrupted(self, jobs: Noting, hook: str, caplog: Caplog) -> None:
        """A Ctrl-C that comes in a hook ends the program and the run too, so that no drain waits for it."""

        def interrupted(*_: object) -> bool:
            raise KeyboardInterrupt

        jobs.add(fails=9, after=0, **{"retries": int(hook == "retry_on"), hook: interrupted})
        with pytest.raises(KeyboardInterrupt):
            jobs.simulate("1m", start=START)
        assert [line.partition(" ")[2] for line in lines(caplog)] == ["cancelled: run() stopped"]


class TestLog:
    def test_ticks(self, jobs: Noting, caplog: Caplog) -> None:
        """Ticks skipped by overlap are one line at the first and one with the number; a late start is a warning."""
        jobs.add("queued", 12, every="10s", overlap="queue")

        @jobs.job(every="10s")
        async def slow() -> None:
            await asyncio.sleep(55 if current_run().tick.second == 10 else 1)

        jobs.simulate("85s", start=START)
        assert lines(caplog, "slow")[:2] == [
            "slow@2026-01-01T00:00:20Z skipped: 1 earlier ticks of the job are unfinished",
            "job 'slow' runs again: 5 ticks were skipped",
        ]
        assert "queued@2026-01-01T00:00:20Z starts 2 s late" in lines(caplog)
        assert {record.levelname for record in caplog.records} == {"WARNING"}

    ENDS = (
        ("INFO", 0, "cancelled", "fourth#c cancelled: cancelled on request"),
        ("INFO", 1, "succeeded", "first@2026-01-01T00:00:00Z succeeded in 1.5 s"),
        ("WARNING", 1, "scheduled", "second@2026-01-01T00:00:03Z failed at attempt 1 of 2: ValueError: no; retry in 1 s"),
        ("INFO", 2, "succeeded", "second@2026-01-01T00:00:03Z succeeded in 0 s, attempt 2"),
        ("ERROR", 1, "failed", "third@2026-01-01T00:00:05Z failed at attempt 1: Odd: <its str() raises>"),
        ("INFO", 1, "cancelled", "fourth#a cancelled: cancelled on request"),
        ("WARNING", 0, "skipped", "fourth#b skipped: expired: 10 s late, expires=5 s"),
    )  # fmt: skip

    def test_ends(self, jobs: Noting, caplog: Caplog) -> None:
        """Success and what was asked for are INFO, the rest more; records carry the facts as attributes."""
        caplog.set_level(logging.INFO)
        odd = type("Odd", (Exception,), {"__str__": lambda self: 1 / 0})
        jobs.add("first", 1.5, after=0)
        jobs.add("second", fails=1, after=3, retries=1, retry_delay=1)
        jobs.job(after=5, name="third")(giving(odd()))
        fourth = jobs.add("fourth", 30, parallelism=1, expires=5)

        async def main() -> None:
            runs = [await fourth.after(10, key=key).submit() for key in "abc"]
            await runs[2].cancel()
            await asyncio.sleep(20)
            await runs[0].cancel()

        jobs.simulate("1m", start=START, main=main)
        ends = [r for r in caplog.records if re.search("succeeded|failed|cancelled|skipped", r.getMessage())]
        assert [(r.levelname, r.getMessage()) for r in ends] == [(level, text) for level, _, _, text in self.ENDS]
        facts = [(r.attempt, r.state, f"{r.run} ") for r in ends]
        assert facts == [(attempt, state, text[: text.index(" ") + 1]) for _, attempt, state, text in self.ENDS]
        assert [r.job for r in ends] == ["fourth", "first", "second", "second", "third", "fourth", "fourth"]
        assert ends[1].duration == 1.5

    def test_traceback_without_configuration(self) -> None:
        """The last failure's traceback is on stderr though nobody configured logging."""
        code = "import bgjob\n@bgjob.job(after=0, retries=1)\nasync def f(): raise ValueError('boom')\nbgjob.simulate('1h')"
        done = python("-c", code)
        assert "failed at attempt 1 of 2: ValueError: boom; retry in" in done.stderr
        assert done.stderr.count("Traceback") == 1


@each_test(in_virtual_time)
class TestDrain:
    async def test_drain(self, jobs: Noting, caplog: Caplog) -> None:
        """It waits for what runs, starts nothing, no tick, no waiting run, no call; afterwards no timer fires."""
        caplog.set_level(logging.INFO)
        jobs.add("tick", every="1s")
        work = jobs.add(wait=10, parallelism=1)

        async def late() -> None:
            await asyncio.sleep(2.5)
            asyncio.get_running_loop().step = -3600
            with pytest.raises(BgjobError, match="is stopping"):
                await work.submit("late")

        async with jobs.running(drain="1m"):
            runs = [await work.submit(n) for n in range(2)]
            task = asyncio.create_task(late())
            await asyncio.sleep(1.5)
        assert (seconds(), await task) == (10, None)
        await asyncio.sleep(100)
        assert [run.state for run in runs] == ["succeeded", "cancelled"]
        assert jobs.ran == [(0, 0), ("tick", 1)]
        assert lines(caplog, "draining 1 runs?.* at most 60 s; Ctrl-C again cancels")

    @pytest.mark.parametrize(("again", "end"), [(False, 61), (True, 2)])
    async def test_cancelled(self, jobs: Noting, again: bool, end: float, caplog: Caplog) -> None:
        """A cancel of run() drains, cancels what is left, is raised; a second one ends the wait; nothing stays."""
        cleaned, before = [], (threading.active_count(), signal.getsignal(signal.SIGTERM))

        @jobs.job(after=0)
        async def long() -> None:
            try:
                await asyncio.sleep(10_000)
            finally:
                await asyncio.sleep(1)
                cleaned.append(seconds())

        task = asyncio.create_task(jobs.run(drain="1m"))
        for _ in range(1 + again):
            await asyncio.sleep(1)
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert (threading.active_count(), signal.getsignal(signal.SIGTERM)) == before
        assert cleaned == [end + 1]
        assert "would not stop" not in caplog.text

    async def test_what_would_not_stop(self, jobs: Noting, caplog: Caplog) -> None:
        """A task that ignores its cancellation and a thread are named in the log after 5 s, and hold up nothing."""
        release = threading.Event()
        jobs.add("stubborn", after=0, args={"how": "swallows"})

        @jobs.job(after=0)
        def blocked() -> None:
            release.wait(10)

        async with jobs.running(drain="10s"):
            await asyncio.sleep(1)
        assert seconds() == 16
        await asyncio.sleep(0.1)
        assert {task.get_name() for task in asyncio.all_tasks() - {asyncio.current_task()}} == {"stubborn"}
        release.set()
        await asyncio.sleep(100)
        assert sorted(line.split("@")[0] for line in lines(caplog, "would not stop")) == ["blocked", "stubborn"]
        gc.collect()
        assert not [record for record in caplog.records if record.name == "asyncio"]

    async def test_refusals_at_the_start(self, jobs: Noting) -> None:
        """A second run() of the same jobs and an unknown name in `jobs` are errors that say what there is."""
        work = jobs.add()
        async with jobs.running():
            with pytest.raises(BgjobError, match="these jobs run already"):
                await jobs.run()
        for keywords, message in (({"jobs": ["mail"]}, r"jobs=\['mail'\]: no such job; the registered ones are: work"),
                                  ({"jobs": "work"}, r"write a list of names, \['work'\]"),
                                  ({"drain": -1}, "drain=-1: negative; write a duration")):  # fmt: skip
            with pytest.raises((BgjobError, ScheduleError), match=message):
                await jobs.run(**keywords)
        for call in (work.submit, work.cancel, lambda: jobs.find("x")):
            with pytest.raises(BgjobError, match="call it inside run"):
                await call()


@each_test(beside_jobs)
class TestChanges:
    @in_virtual_time
    async def test_some_jobs(self, jobs: Noting) -> None:
        """With `jobs` only those are executed, also of what is registered later; submitting another says so."""
        for name in "ab":
            jobs.add(name, every="10s")
        async with jobs.running(jobs=["a"]):
            jobs.add("c", every="10s")
            await asyncio.sleep(35)
            with pytest.raises(BgjobError, match="it isn't executed here"):
                await jobs.jobs["b"].submit()
        assert jobs.ran == [("a", 10), ("a", 20), ("a", 30)]

    async def test_removed(self, jobs: Noting) -> None:
        """A removed job has no more ticks, its scheduled runs are cancelled, what runs ends."""
        work = jobs.add(wait=5, every="10s")
        runs = [await work.submit("going"), await work.submit("waiting"), await work.after(60).submit("delayed")]
        await asyncio.sleep(1)
        jobs.remove("work")
        assert await runs[0].result() == "going"
        assert [(run.state, repr(run.reason)) for run in runs[1:]] == [("cancelled", "'job removed'")] * 2
        with pytest.raises(BgjobError, match="job 'work': not registered; the registered ones are: none"):
            jobs.remove("work")
        await asyncio.sleep(100)
        assert jobs.ran == [("going", 0)]

    @in_virtual_time
    async def test_memory_is_flat(self, jobs: Noting, caplog: Caplog) -> None:
        """What has ended is let go: the number of objects doesn't grow with the number of runs."""
        caplog.set_level(logging.CRITICAL + 1)
        counts = []
        jobs.job(every="1s", retries=1, retry_delay=0, name="fails")(giving(ValueError()))
        mail = jobs.job(every="1s", name="mail")(giving([1]))
        async with jobs.running(on_event=lambda run: None):
            for _ in range(3):
                for n in range(600):
                    await (await mail.submit()).result()
                    await (await mail.after("1h").submit()).cancel()
                    await (await mail.after("1h", key=f"{n}").submit()).cancel()
                    await asyncio.sleep(1)
                gc.collect()
                counts.append(len(gc.get_objects()))
        assert abs(counts[2] - counts[1]) < 300, counts

    @beside_jobs
    async def test_let_go(self, jobs: Noting, caplog: Caplog) -> None:
        """A failed run has its error, but not what the function's variables held; nor is a replaced function kept."""
        caplog.set_level(logging.CRITICAL + 1)  # for its records have the traceback
        held, functions = [], []

        async def work() -> None:
            big = {1}
            held.append(weakref.ref(big))
            raise ValueError("no")

        run = await jobs.job(work).submit()
        with pytest.raises(RunFailed, match="ValueError: no"):
            await run.result()
        for _ in range(20):
            functions.append(weakref.ref(jobs.add("again", every="1h").function))
            await asyncio.sleep(1)
        jobs.remove("again")
        gc.collect()
        assert (held[0](), run.error) == (None, "ValueError: no")
        assert sum(ref() is not None for ref in functions) <= 1


# 10 Registry ----------------------------------------------------------------------------------------------------------


def loaded(text: str, folder: Path, module: str = "jobs", file: str = "jobs.py", **known: object) -> dict[str, Any]:
    """The names of a module that is compiled and executed, as at an import or a reload."""
    names = {"__name__": module, **known}
    exec(compile(text, str(folder / file), "exec"), names)
    return names


class TestNames:
    def test_loaded_again(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """A module that is loaded again replaces its jobs in silence; a loop loses one, and is told so."""
        registry = Registry()
        for _ in range(2):
            replaced = registry.job(loaded("async def work(): ...", tmp_path)["work"])
        assert registry.jobs == {"work": replaced}
        assert not caplog.records
        loaded("for _ in '12':\n  @job\n  def loop(): ...", tmp_path, job=registry.job)
        assert "another function of that name, which replaces the first; in a loop give each a name=" in caplog.text

    @pytest.mark.parametrize(
        ("text", "place", "remedy"),
        [
            ("def work(): ...", "other.py:1 in other", "give one of them a name= of its own"),
            ("class A:\n  def work(): ...\nwork = A.work", "jobs.py:2 in jobs", "give one of them a name= of its own"),
            ("def work(): ...", "jobs.py:1 in __main__", "the file is loaded twice: import it by one name"),
        ],
    )
    def test_taken(self, text: str, place: str, remedy: str, tmp_path: Path) -> None:
        """Anything else under a taken name is an error that names both places."""
        registry = Registry()
        first = registry.job(loaded("async def work(): ...", tmp_path)["work"])
        again = loaded(text, tmp_path, place.rpartition(" ")[2], place.partition(":")[0])["work"]
        with pytest.raises(ScheduleError) as told:
            registry.job(again)
        taken = (
            f"job 'work': the name is taken by {tmp_path / 'jobs.py'}:1 in jobs, this is {tmp_path / place}; {remedy}"
        )
        assert str(told.value) == taken
        with pytest.raises(ScheduleError, match="give one of them a name= of its own"):
            registry.job(first)
        assert registry.jobs == {"work": first}

    def test_help(self) -> None:
        """help(job) tells each keyword with its default; the module's functions are those of the default registry."""
        text = inspect.getdoc(bgjob.job) or ""
        for name in bgjob.Options.__annotations__:
            (told,) = re.findall(rf"^    {name}: (.*?)(?=^    \w+:|^\w|\Z)", text, flags=re.MULTILINE | re.DOTALL)
            assert "Default: " in re.sub(r"\s+", " ", told), name
        for name in ("job", "run", "running", "find", "simulate"):
            assert getattr(bgjob, name) == getattr(bgjob.default, name)


# Programs, each under its rule; below it the exit status (-n: death by the signal), what it prints, what its log says.
PROGRAMS = r"""
# A signal drains, and run() returns to its caller, who is not cancelled.
@bgjob.job(after=0)
async def f(): os.kill(os.getpid(), n); await asyncio.sleep(.2)
async def main(): await bgjob.run(); print('returned', asyncio.current_task().cancelling())
asyncio.run(main())
# 0 | returned 0 | draining 1 runs, at most 20 s

# A second signal ends the wait for what runs; what was installed before the first is put back.
class Second(logging.Handler):
    def emit(self, record): 'draining' in record.msg and os.kill(os.getpid(), 2)
logging.getLogger('bgjob').addHandler(Second())
@bgjob.job(after=0)
async def f(): os.kill(os.getpid(), n); await asyncio.sleep(1000)
asyncio.run(bgjob.run(drain='10m'))
print(signal.getsignal(2) is signal.default_int_handler, signal.getsignal(15) is signal.SIG_DFL)
# 0 | True True | draining 1 runs, at most 600 s; Ctrl-C again cancels them.*cancelled: run\(\) stopped

# An "app" dependency that hangs doesn't keep a signal from ending run().
async def hangs():
    os.kill(os.getpid(), n)
    try: await asyncio.sleep(1000)
    finally: print('cleaned')
@bgjob.job(every='1h')
async def f(x=bgjob.Depends(hangs, scope='app')): ...
asyncio.run(bgjob.run())
# 0 | cleaned |

# Where run() isn't the program's main task the signal ends the others, too, once it has drained.
@bgjob.job(after=0)
async def f(): os.kill(os.getpid(), n); await asyncio.sleep(.1); print('drained', flush=True)
async def main(): await asyncio.gather(asyncio.sleep(1000), bgjob.run())
asyncio.run(main())
# -n | drained | draining

# A forked child has the signal handling from before run(): it can be terminated, and a pool can be closed.
context = multiprocessing.get_context('fork'); up = context.Event()
@bgjob.job(after=0)
async def f():
    with context.Pool(2) as pool: print(pool.map(abs, [-1, 2]))
    child = context.Process(target=lambda: (up.set(), signal.pause())); child.start(); up.wait()
    child.terminate(); child.join(10)
    print(child.exitcode, flush=True); child.kill(); os.kill(os.getpid(), n)
asyncio.run(bgjob.run())
# 0 | [1, 2] -15 |

# In a forked child the jobs don't run: running(), submit() and find() say so, and registering works.
def child():
    bgjob.job(every='1h', name='g')(print)
    for call in (f.submit, bgjob.run, lambda: bgjob.find('x'), bgjob.running().__aenter__):
        try: asyncio.run(call())
        except bgjob.BgjobError as error: print(str(error).partition(': process')[0], 'forked' in str(error), flush=True)
@bgjob.job(after=0)
def f():
    process = multiprocessing.get_context('fork').Process(target=child)
    process.start(); process.join(10); process.kill(); os.kill(os.getpid(), n)
asyncio.run(bgjob.run())
# 0 | job 'f': submit() True running() True find() True running() True |

# In an ASGI server's lifespan its own signal handling is untouched, and the drain is part of its shutdown.
import uvicorn
def handlers(): return [getattr(signal.getsignal(n), '__name__', '?') for n in (2, 15)]
@bgjob.job(after='10ms')
async def f():
    while not server.started: await asyncio.sleep(.01)
    print(handlers()); os.kill(os.getpid(), n); await asyncio.sleep(.2); print('drained', flush=True)
async def app(scope, receive, send):
    assert (await receive())['type'] == 'lifespan.startup'
    async with bgjob.running():
        await send({'type': 'lifespan.startup.complete'}); await receive()
    await send({'type': 'lifespan.shutdown.complete'})
(server := uvicorn.Server(uvicorn.Config(app, port=0, log_level='warning'))).run()
# -n | ['handle_exit', 'handle_exit'] drained | draining

# Somebody else's handler stays in place, and a run() outside the main thread touches none.
def foreign(number, frame): ...
signal.signal(n, foreign)
async def main():
    task = asyncio.create_task(bgjob.run()); await asyncio.sleep(.01); task.cancel()
    print(signal.getsignal(n) is foreign, signal.getsignal(17 - n) in (signal.default_int_handler, signal.SIG_DFL))
thread = threading.Thread(target=lambda: asyncio.run(main())); thread.start(); thread.join()
asyncio.run(main())
# 0 | True True True False |
""".strip().split("\n\n")


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    @pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.split("\n")[0])
    def test_end(self, program: str, number: int) -> None:
        """SIGINT and SIGTERM end a program as the rule above it says."""
        if "uvicorn" in program:
            pytest.importorskip("uvicorn", reason="uvicorn isn't installed: pip install uvicorn")
        status, printed, log = program.rpartition("\n# ")[2].split("|")
        head = f"import asyncio, bgjob, logging, multiprocessing, os, signal, threading; n = {int(number)}\n"
        done = python("-c", f"{head}logging.basicConfig(level=20)\n{program}")
        told = done.returncode, done.stdout.split()
        assert told == (-number if "n" in status else 0, printed.split()), done.stderr
        assert re.search(log.strip(), done.stderr, flags=re.DOTALL), done.stderr


class TestSimulate:
    def test_replay(self) -> None:
        """A year of weekday mornings with retries, keys and submitted runs gives the same runs twice, ids included."""

        def year() -> list[tuple[str, int, str]]:
            registry = Registry()

            @registry.job(cron="0 6 * * mon-fri", retries=2)
            async def morning() -> None:
                await report.submit(current_run().tick.day)
                if current_run().tick.day % 3 == current_run().attempt:
                    raise ValueError

            @registry.job
            async def report(day: int) -> None:
                await asyncio.sleep(day * 3600)

            return [(run.id, run.attempt, str(run.state)) for run in registry.simulate("365d", start=START)]

        first = year()
        assert sum("@" in id for id, _, _ in first) == 261
        assert first == year()

    def test_limits(self) -> None:
        """A tick at the very end is part of it; what still runs then is cancelled, and not returned."""
        registry, ended = Registry(), []

        @registry.job(every="20s")
        async def work() -> None:
            try:
                await asyncio.sleep(5)
            finally:
                ended.append(current_run().tick)

        runs = registry.simulate("1m", start=START)
        assert ended == [START + timedelta(seconds=n) for n in (20, 40, 60)]
        assert [run.tick for run in runs] == ended[:2]

    def test_main(self, caplog: pytest.LogCaptureFixture) -> None:
        """What main raises is raised, a TimeoutError of its own too; one that waits at the end is cancelled, and told."""
        registry = Registry()
        registry.job(name="work")(print)
        with pytest.raises(TimeoutError):
            registry.simulate("2s", main=lambda: asyncio.wait_for(asyncio.Event().wait(), 1))
        assert registry.simulate("2s", main=lambda: asyncio.sleep(1)) == []
        assert not caplog.records
        registry.simulate("2s", main=lambda: asyncio.sleep(3))
        assert [r.getMessage() for r in caplog.records] == ["simulate(): main was still waiting at the end; cancelled"]

    def test_in_a_loop(self) -> None:
        """Called in async code, as in a notebook, it says what to write there; and that works."""
        registry = Registry()
        registry.job(every="1h", name="work")(lambda: None)

        async def main() -> list[Run]:
            with pytest.raises(BgjobError, match=r"in a notebook await asyncio\.to_thread\(simulate, …\)"):
                registry.simulate("1s")
            return await asyncio.to_thread(registry.simulate, "3h")

        assert len(asyncio.run(main())) == 3


# The house ------------------------------------------------------------------------------------------------------------

USER = '''
"""What a user writes, under strict checkers: each type that comes back is the one meant, each mistake is seen."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator
from datetime import UTC, datetime
from typing import Annotated, assert_type

from bgjob import BgjobError, Depends, Job, Options, Registry, Run, State, current_run, find, job, run, running, simulate

class Database:
    async def fetch(self, query: str) -> list[str]:
        return [query]

async def database() -> AsyncIterator[Database]:
    yield Database()

async def token() -> str:
    return "secret"

def limit() -> int:
    return 5

def folder(depth: int = Depends(limit)) -> Iterator[str]:
    yield "/tmp" * depth

def alert(run: Run, error: BaseException) -> None:
    print(run.id, run.late, error)

@job(every="5m", retries=3, retry_delay=lambda retry: retry * 2, retry_on=(OSError, BgjobError), on_error=alert)
async def sync(db: Database = Depends(database), secret: str = Depends(token)) -> int:
    assert_type(current_run(), Run)
    return len(await db.fetch(secret))

@job(cron="0 6 * * mon-fri", tz="Europe/Rome", args={"name": "daily"})
@job(every=3600, name="hourly", args={"name": "hourly"}, overlap="queue", jitter=0.5)
def report(name: str, path: Annotated[str, Depends(folder)] = "", depth: int = Depends(limit, scope="app")) -> bytes:
    return (name + path * depth).encode()

common: Options = {"retries": 3, "timeout": "5m", "on_error": alert}

@job(**common)
async def send_mail(to: str, *, copies: int = 1) -> str:
    return to * copies

@job
async def plain() -> None: ...

async def main() -> None:
    async with running(drain=5, on_event=lambda run: print(run.state)) as registry:
        assert_type(registry, Registry)
        one = await send_mail.submit("a@b.c", copies=2)
        assert_type(one, Run[str])
        assert_type(await one.result(timeout="5s"), str)
        assert_type((one.state, one.tick, one.duration), tuple[State, datetime, float | None])
        assert_type(await send_mail.after("5m", key="welcome").submit("a@b.c"), Run[str])
        assert_type(await (await send_mail.at(datetime.now(UTC)).submit("a@b.c")).result(), str)
        assert_type(await sync.submit(), Run[int])
        assert_type(await report.submit("x"), Run[bytes])
        assert_type(await asyncio.create_task(send_mail("a@b.c")), str)
        assert_type(report("x", path="y", depth=3), bytes)
        assert_type(send_mail.next_ticks(3), list[datetime])
        assert_type(await find(one.id), Run | None)
        assert_type((await one.cancel(), await sync.cancel()), tuple[bool, int])
        await send_mail.submit(5)  # type: ignore[arg-type]
        await send_mail.submit()  # type: ignore[call-arg]
        await send_mail.after("5m").submit("a", copy=2)  # type: ignore[call-arg]
        job(evry="5m")  # type: ignore[call-overload]
        job(every=[5])  # type: ignore[call-overload]
        common["retry"] = 3  # type: ignore[typeddict-unknown-key]

registry = Registry()
registry.overrides[database] = Database
assert_type(plain, Job[[], Coroutine[object, object, None], None])
assert_type(registry.simulate("2h", start=datetime(2026, 1, 1, tzinfo=UTC)), list[Run])
assert_type(simulate("1d", main=main), list[Run])

if __name__ == "__main__":
    asyncio.run(run())
'''


class TestTypes:
    @pytest.mark.parametrize(
        "command", ["mypy --strict --cache-dir /dev/null", f"pyright --pythonpath {sys.executable}"]
    )
    def test_user(self, command: str, tmp_path: Path) -> None:
        """Strict checkers understand a user's code, with the package installed and with the file copied."""
        pytest.importorskip(command.split()[0], reason=f"not installed: pip install {command.split()[0]}")
        (tmp_path / "user.py").write_text(USER)
        (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
        if not INSTALLED:
            shutil.copy(bgjob.__file__, tmp_path)
        done = python("-m", *command.replace("/dev/null", os.devnull).split(), "user.py", folder=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr

    @pytest.mark.skipif(not INSTALLED, reason="bgjob is not installed, but the file beside the tests")
    def test_wheel(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The wheel is the one file as a package with known types, which `python -m` runs, and needs croniter alone."""
        files = [str(file) for file in importlib.metadata.files("bgjob") or ()]
        ours = {"bgjob/__init__.py", "bgjob/__main__.py", "bgjob/py.typed"}
        assert {file for file in files if not re.search(r"dist-info|__pycache__|^\.\.", file)} == ours
        needs = importlib.metadata.requires("bgjob") or []
        assert [re.split(r"\W", need)[0] for need in needs if "extra ==" not in need] == ["croniter"]
        pytest.importorskip("pyright", reason="pyright isn't installed: pip install pyright")
        path = os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"]))
        monkeypatch.setenv("PATH", path)  # there pyright looks for Python
        done = python("-m", "pyright", "--verifytypes", "bgjob", "--ignoreexternal", folder=tmp_path)
        assert done.returncode == 0, done.stdout


class TestUrls:
    def test_no_password(self) -> None:
        """No password of a URL is shown, whatever signs it contains."""
        shown = {
            "redis://:secret@h:6379/0": "redis://…@h:6379/0",
            "postgresql://u:se/cr@et@h/db": "postgresql://…@h/db",
            "postgres://h/db?user=u&password=secret&prefix=p": "postgres://h/db?user=u&password=…&prefix=p",
            "sqlite:////var/a@b.db": "sqlite:////var/a@b.db",
        }
        assert {url: _no_password(url) for url in shown} == shown

    def test_no_store(self) -> None:
        """What is neither a URL nor a store is refused with what to write; a path is neither."""
        for wrong in (Path("jobs.db"), 5):
            with pytest.raises(StoreError, match=r"store=.*: neither a URL nor a Store; write 'sqlite:///jobs.db'"):
                asyncio.run(Registry().run(store=wrong))


class TestHouse:
    source = Path(bgjob.__file__).read_text(encoding="utf-8")
    tree = ast.parse(source)

    def test_import(self) -> None:
        """Importing starts nothing, changes no handler, and loads neither croniter nor a driver nor slow modules."""
        late = "croniter dateutil zoneinfo sqlite3 json uuid redis asyncpg argparse typing_extensions"
        handlers = "[signal.getsignal(n) for n in (2, 15)]"
        code = f"import signal, sys, threading; before = {handlers}; import bgjob; assert before == {handlers}\n"
        done = python("-c", f"{code}print(threading.active_count(), {{*'{late}'.split()}} & {{*sys.modules}})")
        assert done.stdout == "1 set()\n", done.stderr

    def test_door(self) -> None:
        """The first lines name version and source, and keep a copying project's ruff out; the map names the rooms."""
        head = f"# bgjob {bgjob.__version__}: background jobs for asyncio, in one file. MIT licence. From https://"
        assert self.source.startswith(head)
        assert {"# ruff: noqa", "# fmt: off"} < {*self.source.splitlines()[:5]}
        banners = re.findall(r"^# (\d+ [\w ]+) -+\n# [A-Z`]", self.source, flags=re.MULTILINE)
        assert banners == re.findall(r"^ +(\d+ [A-Z]\w+(?: \w+)?)  ", bgjob.__doc__ or "", flags=re.MULTILINE)
        assert [int(banner.split()[0]) for banner in banners] == [*range(12)]

    def test_one_room_reads_clocks(self) -> None:
        """Only the Time room reads a clock."""
        begin, end = (self.source[: self.source.index(room)].count("\n") for room in ("# 2 Time -", "# 3 Schedules -"))
        calls = [node for node in ast.walk(self.tree) if isinstance(node, ast.Call)]
        names = [(ast.unparse(call.func), call.lineno) for call in calls]
        readers = [line for name, line in names if re.search(r"^time\.|datetime\.(now|utcnow|today)$", name)]
        assert {begin < line <= end for line in readers} == {True}

    def test_budget(self) -> None:
        """Who copies the file can read it: its size, its longest line, its longest functions, its private names."""
        functions = [n for n in ast.walk(self.tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
        classes = [n for n in ast.walk(self.tree) if isinstance(n, ast.ClassDef)]
        documented = [n for n in (self.tree, *functions, *classes) if ast.get_docstring(n)]
        doc = {line for n in documented for line in range(n.body[0].lineno, (n.body[0].end_lineno or 0) + 1)}
        lines = self.source.splitlines()
        code = [n for n, text in enumerate(lines, 1) if text.strip() and text.strip()[0] != "#" and n not in doc]
        spans = {f.name: {*range(f.lineno, (f.end_lineno or 0) + 1)} - doc for f in functions}
        long = [name for name, span in spans.items() if len(span) > 50]
        private = {n.name for n in (*functions, *classes) if re.match("_[^_]", n.name)}
        size = {"lines": len(lines), "code": len(code), "bytes": len(self.source.encode())}
        size |= {"longest line": max(map(len, lines)), "long functions": len(long), "private names": len(private)}
        budget = dict(zip(size, (4_650, 3_450, 230_000, 120, 2, 229), strict=True))
        assert {what: n for what, n in size.items() if n > budget[what]} == {}, long

    def test_docstrings(self) -> None:
        """Every public name, and each of its public methods, has a docstring; those of all stores are the protocol's."""
        for name in bgjob.__all__:
            thing = getattr(bgjob, name)
            assert thing.__doc__, name
            for attribute, value in vars(thing).items() if isinstance(thing, type) else ():
                if name.endswith("Store") and hasattr(bgjob.Store, attribute) and thing is not bgjob.Store:
                    continue
                if not attribute.startswith("_") and callable(getattr(value, "fget", value)) and name != "State":
                    assert (getattr(value, "__doc__", "") or "").strip(), f"{name}.{attribute}"

    def test_readme(self, tmp_path: Path) -> None:
        """Every Python block of the README runs; it has at most 200 lines."""
        if not Path("README.md").exists():
            pytest.skip("no README beside the tests")
        readme = Path("README.md").read_text(encoding="utf-8")
        blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
        assert len(blocks) == 4
        assert readme.count("\n") <= 200
        for block in blocks:
            code = f"import bgjob\n{block}\nbgjob.simulate('1d') if bgjob.default.jobs else None\n"
            done = python("-c", code.replace("__main__", "__block__"), folder=tmp_path)
            if "No module named 'fastapi'" not in done.stderr:
                assert done.returncode == 0, block + done.stderr


# 9 Stores: what tests need -------------------------------------------------------------------------------------------
SERVERS = {"postgres": "postgresql://postgres@127.0.0.1:5432/postgres", "redis": "redis://127.0.0.1:6379"}
KINDS = ("sqlite", *SERVERS)


class Place:
    """A fresh place for a store of one kind: a file, or a prefix of its own on a server."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self.file = folder / "jobs.db"
        self.server = os.environ.get(f"BGJOB_TEST_{kind.upper()}", SERVERS.get(kind, f"sqlite:///{self.file}"))
        self.prefix = f"t{os.urandom(5).hex()}"

    def url(self, prefix: str = "bgjob", **options: object) -> str:
        mark = "&" if "?" in self.server else "?"
        return f"{self.server}{mark}{urlencode({'prefix': f'{self.prefix}_{prefix}', **options})}"

    def store(self, prefix: str = "bgjob", **options: Any) -> Store:
        """A new object each time, for the same place."""
        make = {"sqlite": SQLiteStore, "postgres": PostgresStore, "redis": RedisStore}[self.kind]
        where = self.file if self.kind == "sqlite" else self.server
        return make(where, prefix=f"{self.prefix}_{prefix}", **options)

    async def drop(self) -> None:
        """Leave nothing on the server."""
        if self.kind == "redis":
            async with importlib.import_module("redis.asyncio").from_url(self.server) as client:
                async for key in client.scan_iter(f"*{self.prefix}_*"):
                    await client.delete(key)
        if self.kind == "postgres":
            connection = await importlib.import_module("asyncpg").connect(self.server)
            query = "SELECT tablename FROM pg_tables WHERE starts_with(tablename, $1)"
            for (table,) in await connection.fetch(query, self.prefix):
                await connection.execute(f"DROP TABLE {table}")
            await connection.close()


def refuse_server(why: str) -> None:
    """A test without its server is skipped and says so; where everything must be tested, it fails."""
    (pytest.fail if "CI" in os.environ else pytest.skip)(why)


def need_driver(kind: str) -> None:
    driver = "redis" if kind == "redis" else "asyncpg"
    if importlib.util.find_spec(driver) is None:
        refuse_server(f"no {driver}: pip install 'bgjob[{kind}]'")


@contextmanager
def found_place(kind: str, folder: Path) -> Iterator[Place]:
    """A place, where its server answers, and nothing of it afterwards."""
    place = Place(kind, folder)
    if kind != "sqlite":
        need_driver(kind)
        server = urlsplit(place.server)
        try:
            socket.create_connection((server.hostname, server.port or urlsplit(SERVERS[kind]).port), 2).close()
        except OSError as error:
            refuse_server(f"no {kind} at {server.hostname}: {error}; set BGJOB_TEST_{kind.upper()}")
    yield place
    asyncio.run(place.drop())


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Each kind of store in turn."""
    with found_place(request.param, tmp_path) as found:
        yield found


def in_a_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an async test; neither a task nor a thread may be left of what it began."""

    @functools.wraps(test)
    def wrapper(*args: object, **kwargs: object) -> None:
        async def main() -> None:
            async with asyncio.timeout(300 if THOROUGH else 60):
                await test(*args, **kwargs)
            assert asyncio.all_tasks() == {asyncio.current_task()}

        threads = set(threading.enumerate())
        asyncio.run(main())
        assert set(threading.enumerate()) <= threads

    return wrapper


async def until(condition: Callable[[], object]) -> None:
    """Wait until something holds: no test relies on how long anything takes, and a busy disk may take its time."""
    async with asyncio.timeout(120):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


MakeStore: TypeAlias = Callable[..., Any]


@asynccontextmanager
async def going(store: Store | str | MakeStore | None, *registries: Registry, **options: Any) -> AsyncIterator[None]:
    """Run registries beside each other, each with a store object of its own: they are instances."""
    async with AsyncExitStack() as stack:
        for registry in registries:
            own = store() if callable(store) else store
            await stack.enter_async_context(registry.running(store=own, **options))
        yield


@asynccontextmanager
async def opened(store: Any, owner: str = "me") -> AsyncIterator[Any]:
    """A store without an engine."""
    await store.open(owner, lambda: None)
    try:
        yield store
    finally:
        await store.close(owner)


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """The file as another program has it that writes for long."""
    with closing(sqlite3.connect(file, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        yield


def several(number: int, *declare: Callable[[Registry], object]) -> list[Registry]:
    """Registries of the same jobs."""
    registries = [Registry() for _ in range(number)]
    for registry in registries:
        for one in declare:
            one(registry)
    return registries


class Work:
    """A job that notes what it does, fails as often as it is told, and can be held until it is released."""

    def __init__(self, held: bool = False, failures: int = 0, tidy: float = 0, **options: Any) -> None:
        self.options = {"name": "work", **options}
        self.failures = failures
        self.tidy = tidy  # s that it goes on when it is cancelled
        self.begun: list[Run] = []  # of each attempt, as the following
        self.args, self.ticks, self.attempts, self.tokens = list[object](), list[int](), list[int](), list[int]()
        self.ended, self.cut = list[object](), list[object]()
        self.now = self.most = 0
        self.release = asyncio.Event()
        if not held:
            self.release.set()

    def __call__(self, registry: Registry) -> Job:
        @registry.job(**self.options)
        async def work(n: object = None) -> object:
            run = current_run()
            self.begun.append(run)
            self.args.append(n)
            self.ticks.append(int(run.tick.timestamp() * 1000 + 0.5))
            self.attempts.append(run.attempt)
            self.tokens.append(run.token)
            self.now += 1
            self.most = max(self.most, self.now)
            try:
                await self.release.wait()
                if len(self.begun) <= self.failures:
                    raise ValueError(f"failure {len(self.begun)}")
                self.ended.append(n)
                return n
            except asyncio.CancelledError:
                self.cut.append(n)
                await asyncio.sleep(self.tidy)
                raise
            finally:
                self.now -= 1

        return work


def instances(number: int, work: Work) -> tuple[list[Registry], list[Job]]:
    registries = several(number, work)
    return registries, [registry.jobs[work.options["name"]] for registry in registries]


class Faulty:
    """A store that a test stands before: it delays, refuses, loses replies, drops hints, and moves the clock.

    `before(verb, *arguments)` and `after(verb, answer)` are async; what they raise is raised in place of the verb, or
    of its answer. `offset` (ms) is added to the store's clock; `deaf` is who hears no hint.
    """

    def __init__(self, store: Any, offset: int = 0) -> None:
        self.store = store
        self.lease: int = store.lease
        self.keep: int = store.keep
        self.offset = offset
        self.deaf = False

    async def before(self, verb: str, *arguments: Any) -> None: ...
    async def after(self, verb: str, answer: Any) -> None: ...

    async def ask(self, verb: str, *arguments: Any) -> Any:
        await self.before(verb, *arguments)
        answer = await getattr(self.store, verb)(*arguments)
        await self.after(verb, answer)
        return answer

    def __getattr__(self, verb: str) -> Any:
        """Of the other verbs there is nothing to move."""
        return functools.partial(self.ask, verb)

    async def open(self, owner: str, hint: Callable[[], None]) -> None:
        await self.ask("open", owner, lambda: None if self.deaf else hint())

    async def close(self, owner: str | None) -> None:
        await self.store.close(owner)

    async def load(self, jobs: Any, ahead: int = 0) -> Any:
        now, alive, pages = await self.ask("load", jobs, ahead + self.offset)
        return now + self.offset, {owner: end + self.offset for owner, end in alive.items()}, pages

    async def push(self, calls: Any) -> Any:
        return await self.ask("push", [call._replace(delay=call.delay + self.offset) for call in calls])


class Down:
    """The fault of a store that doesn't answer, while `on`: `store.before = Down()`; counts the questions."""

    on, asked = True, 0

    async def __call__(self, verb: str, *_: object) -> None:
        if self.on:
            self.asked += 1
            raise bgjob.Unreachable("down")


class DictStore:
    """The smallest store of one's own: what processes would share is a dict. What a store must do, in seventy lines."""

    def __init__(self, disk: Any, prefix: str = "bgjob", lease: float = 30, keep: float = 86_400) -> None:
        self.lease = round(lease * 1000)
        self.keep = round(keep * 1000)
        self.disk = disk.setdefault(prefix, {"books": {}, "rows": {}, "until": {}, "bells": {}})
        self.owner: str | None = None
        self.begun = False

    def now(self) -> int:
        return int(time.time() * 1000)

    async def open(self, owner: str, hint: Callable[[], None]) -> None:
        if self.owner is not None:
            raise BgjobError("in use: one run() or running() per store object; make another")
        self.owner, self.begun = owner, False
        self.disk["bells"][owner] = hint

    async def close(self, owner: str | None) -> None:
        self.disk["bells"].pop(self.owner, None)
        self.disk["until"].pop(owner, None)
        self.owner = None

    def alive(self) -> dict[str, int]:
        return {owner: end for owner, end in self.disk["until"].items() if end > self.now()}

    def waiting(self, job: str | None = None) -> list[tuple[int, str, bgjob.Saved]]:
        rows = self.disk["rows"].values()
        return sorted((row.due, row.id, row) for row in rows if row.due is not None and job in (None, row.job))

    async def load(self, jobs: Any, ahead: int = 0) -> Any:
        pages, upto = {}, self.now() + ahead
        for job, wanted in jobs.items():
            waiting = self.waiting(job)
            due = [(id, at, row.body) for at, id, row in waiting if at <= upto]
            later = min((at for at, _, _ in waiting if at > upto), default=None)
            pages[job] = bgjob.Page(*self.disk["books"].get(job, (0, "")), due[:wanted], later)
        return self.now(), self.alive(), pages

    async def commit(self, changes: Any) -> Any:
        took = []
        for job, version, book, rows in changes:
            if self.disk["books"].get(job, (0, ""))[0] == version:
                self.disk["books"][job] = version + 1, book
                self.disk["rows"].update((row.id, row) for row in rows)
                took.append(job)
        return took

    def kept(self, id: str) -> bool:
        row = self.disk["rows"].get(id)
        return row is not None and (row.expires is None or row.expires > self.now())

    async def push(self, rows: Any) -> Any:
        answers: list[int | None] = []
        for id, job, due, delay, body in rows:
            free = not self.kept(id) or self.disk["rows"][id].state in (State.CANCELLED, State.SKIPPED)
            answers.append((self.now() + delay if due is None else due) if free else None)
            if free:
                self.disk["rows"][id] = bgjob.Saved(id, job, State.SCHEDULED, answers[-1], None, body)
        return answers

    async def find(self, ids: Any) -> Any:
        return [self.disk["rows"][id] for id in ids if self.kept(id)]

    async def beat(self) -> Any:
        late, self.begun = self.begun and self.owner not in self.alive(), True
        self.disk["until"][self.owner] = self.now() + self.lease
        return asyncio.get_running_loop().time(), late

    async def ring(self, owners: Any) -> None:
        for owner, hint in self.disk["bells"].items():
            if owner in owners or (not owners and owner != self.owner):
                asyncio.get_running_loop().call_soon(hint)

    async def overview(self, n: int) -> Any:
        failed = [row for row in self.disk["rows"].values() if row.state is State.FAILED and self.kept(row.id)]
        failed.sort(key=lambda row: -row.expires)
        books = {job: book for job, (_, book) in self.disk["books"].items()}
        return self.now(), self.alive(), books, [*[row for _, _, row in self.waiting()[:n]], *failed[:n]]


def grows(tokens: list[int]) -> bool:
    return tokens == sorted({*tokens})


async def ending(run: Run) -> object:
    """What became of a run: its result, or its error."""
    try:
        return await run.result(20)
    except BgjobError as error:
        return error


async def listed(store: Store | str, **schedule: Any) -> None:
    """An instance that makes the job known, and ends."""
    (registry,), (job,) = instances(1, Work(**schedule))
    async with going(store, registry):
        await (await job.submit()).result(20)


# 9 Stores: what every store must do ----------------------------------------------------------------------------------
@each_test(in_a_loop)
class OneInstance:
    """What an instance alone promises, in memory and with a store: the first part of `Conformance`."""

    async def test_key(self, make_store: MakeStore) -> None:
        """The same key is the same run, going or ended; the first call wins; it is free once cancelled or skipped."""
        work = Work(held=True, tidy=0.1, expires="1m")
        (registry,), (job,) = instances(1, work)
        async with going(make_store, registry):
            waiting = await job.after("1h", key="k").submit(1)
            assert await waiting.cancel()
            late = await job.at(datetime.now(UTC) - timedelta(hours=1), key="k").submit(2)
            with pytest.raises(RunCancelled, match=r"run 'work#k' was skipped: expired: .* late, expires=60 s"):
                await late.result(20)
            cleaning = await job.after(0, key="k").submit(3)
            await until(lambda: work.now)
            assert await cleaning.cancel()  # it is free now, though the function isn't at its end
            run = await job.after("50ms", key="k").submit(4)
            assert (run.id, run.key, (await job.after("1h", key="k").submit(5)).id) == ("work#k", "k", "work#k")
            await until(lambda: len(work.begun) == 2)
            again = await job.after("1h", key="k").submit(6)
            work.release.set()
            assert [await one.result(20) for one in (run, again, await job.after(0, key="k").submit(7))] == [4, 4, 4]
            assert (waiting.state, late.state, run.started_at >= run.tick) == ("cancelled", "skipped", True)
            assert isinstance(await ending(cleaning), (RunCancelled, int))  # by its id it may be the newer one
        assert (work.args, work.cut, grows(work.tokens)) == ([3, 4], [3], True)

    async def test_odd_texts(self, make_store: MakeStore) -> None:
        """Names, keys (500 characters), values and errors are data to a store, whatever it uses a character for."""
        name, odd = "jöb; DROP 'x' {a}:* 😀", "k'\"\\;--{}*?[]@#%_ 😀"
        key = odd + "".join(chr(0x4E00 + n * 7919 % 20_000) for n in range(500 - len(odd)))  # it can't be compressed
        (registry,), (job,) = instances(1, Work(name=name))
        bad = registry.job(name="bad")(giving(ValueError("\udcff \0 ü")))
        async with going(make_store, registry):
            failing = await bad.submit()
            assert await (await job.after(0, key=key).submit("\0\ud800 '")).result(20) == "\0\ud800 '"
            found = await registry.find(f"{name}#{key}")
            assert (found.job, found.key, found.args, await found.cancel()) == (name, key, ("\0\ud800 '",), False)
            with pytest.raises(RunFailed, match=r"ValueError: \\udcff \\0 ü$"):
                await failing.result(20)

    @pytest.mark.parametrize("drain", [0, "1h"])
    def test_end_of_a_program(self, make_store: MakeStore, drain: object, caplog: Caplog) -> None:
        """What `asyncio.run` cancels at its end is handed back, in memory cancelled; it is nobody's failure."""
        told, work = list[object](), Work(held=True, retries=3, on_error=lambda run, error: told.append(error))
        (first, second), (job, _) = instances(2, work)

        async def program() -> None:
            async with going(make_store, first, drain=drain):
                told.append(await job.submit(1))
                await asyncio.sleep(1000)

        async def leave() -> asyncio.Task[None]:
            background = asyncio.create_task(program())
            await until(lambda: work.now)
            return background

        async def go_on() -> object:
            work.release.set()
            async with going(make_store, second):
                found = await second.find(told[0].id)
                return found and await found.result(20)

        assert asyncio.run(leave()).cancelled()
        end = asyncio.run(go_on())
        assert (end, work.args, len(told)) == ((1, [1, 1], 1) if end else (None, [1], 1))
        assert (told[0].state, "failed" in caplog.text) == ("scheduled" if end else "cancelled", False)

    @pytest.mark.parametrize("ends", [False, True])
    async def test_submit_while_it_opens(self, make_store: MakeStore, ends: bool) -> None:
        """It waits or is refused in words; a `run()` that is cancelled while it opens leaves nothing half-open."""
        (registry,), (job,) = instances(1, Work())
        gate, store = asyncio.Event(), make_store()
        registry.job(name="slow to open")(lambda it=Depends(gate.wait, scope="app"): it)
        opening = asyncio.create_task(registry.run(store=store, drain=0))
        await asyncio.sleep(0)
        early = asyncio.create_task(job.submit(1))
        await asyncio.sleep(0.02)
        if ends:
            opening.cancel()
            await asyncio.wait({opening})
        gate.set()
        with suppress(BgjobError):
            assert (await (await asyncio.wait_for(early, 20)).result(20), ends) == (1, False)
        opening.cancel()
        await asyncio.wait({opening})
        async with going(store, registry):
            assert await (await job.submit(2)).result(20) == 2


@each_test(in_a_loop)
class Instances:
    """What several instances promise together: the second part of `Conformance`."""

    @pytest.mark.parametrize("jitter", [0, 0.015])
    async def test_ticks(self, make_store: MakeStore, jitter: float) -> None:
        """Each tick of the epoch's grid starts on exactly one instance, and not before its time and its jitter."""
        work = Work(every="20ms", overlap="all", parallelism=5, jitter=jitter)
        async with going(make_store, *several(3, work)):
            await until(lambda: len(work.begun) >= 25)
        ticks = sorted(work.ticks)
        assert (ticks, ticks[0] % 20) == ([*range(ticks[0], ticks[-1] + 20, 20)], 0)
        assert all(run.started_at >= run.tick for run in work.begun)
        assert all(run.late * 1000 >= bgjob._spread(run.id, 15) for run in work.begun if jitter)

    async def test_calls(self, make_store: MakeStore) -> None:
        """They outlive who submitted them, start first in, first out, `parallelism` at once; their ids sort so."""
        work = Work(held=True, parallelism=3)
        (client, reader, *workers), (job, *_) = instances(5, work)
        async with going(make_store, client, jobs=[]):
            runs = [await job.submit(n) for n in range(30)]
            runs.append(await job.after("50ms").submit(30))
        with pytest.raises(BgjobError, match=r"run\(\) has stopped|call it inside"):
            await runs[0].result(1)
        async with going(make_store, *workers):
            await until(lambda: work.now == 3)
            work.release.set()
            await until(lambda: len(work.ended) == 31)
        async with going(make_store, reader, jobs=[]):
            assert [await (await reader.find(run.id)).result(20) for run in runs] == [*range(31)]
        assert (sorted(work.args[:6]), sorted(work.args), work.most) == ([*range(6)], [*range(31)], 3)
        assert [run.id for run in runs] == sorted(run.id for run in runs)

    async def test_results_elsewhere(self, make_store: MakeStore) -> None:
        """A result is read where it wasn't made: a value, a failure by its text, or why there is none."""

        def declare(registry: Registry) -> None:
            @registry.job(expires="10s")
            async def end(how: str) -> object:
                if how == "fail":
                    raise ValueError("no such user\nand more")
                return [1, None] if how == "value" else {1}

        here, there = several(2, declare)
        end = there.jobs["end"]
        async with going(make_store, here), going(make_store, there, jobs=[]):
            assert await (await end.submit("value")).result(20) == [1, None]
            for run, error, text in (
                (await end.after(0, key="k").submit("fail"), RunFailed, "'end#k' failed: ValueError: no such user$"),
                (await here.jobs["end"].after(0, key="k").submit("value"), RunFailed, "'end#k' failed: ValueError: no"),
                (await end.submit("set"), BgjobError, "succeeded, but its result isn't"),
                (await end.at(START).submit("value"), RunCancelled, r"was skipped: expired: .* late, expires=10 s"),
            ):
                with pytest.raises(error, match=text):
                    await run.result(20)

    async def test_find_elsewhere(self, make_store: MakeStore) -> None:
        """Any instance finds a run by its id, an unfinished tick's too; of a tick's success only that word is left."""
        work = Work(held=True, every="30ms")
        (here, there), (job, _) = instances(2, work)
        async with going(make_store, here), going(make_store, there, jobs=[]):
            run = await job.after("1h", key="a@b.c").submit(n=1)  # its '@' is no tick's
            found = await there.find(run.id)
            assert (found.key, found.kwargs, found.state, found.tick) == ("a@b.c", {"n": 1}, run.state, run.tick)
            assert (found.attempt, found.started_at, await there.find("work#other")) == (0, None, None)
            await until(lambda: work.now)
            (begun,) = work.begun
            found = await there.find(begun.id)
            assert (found.state, found.attempt, found.token) == (State.RUNNING, 1, begun.token)
            assert (found.tick, abs(found.started_at - begun.started_at) < timedelta(seconds=20)) == (begun.tick, True)
            result = asyncio.create_task(ending(found))
            await asyncio.sleep(0.1)
            work.release.set()
            assert "succeeded, but its result isn't" in str(await result)
            assert found.state is State.SUCCEEDED

    async def test_cancel(self, make_store: MakeStore) -> None:
        """Any instance cancels a run in any state, or all of a job: what waits never starts, what runs is cut."""
        work, bystander = Work(held=True, parallelism=1), Work(held=True, name="bystander")
        here, there = several(2, work, bystander)
        job, other = here.jobs["work"], there.jobs["work"]
        async with going(make_store, here, drain=0), going(make_store, there, jobs=[]):
            await here.jobs["bystander"].submit()
            for each in (True, False):
                runs = [await job.submit("running")]
                await until(lambda: work.now and bystander.now)
                runs += [await job.submit("due"), await other.after("1h").submit("waiting")]
                found = [await there.find(run.id) for run in runs]
                answers = [await run.cancel() for run in found[::-1]] if each else [await other.cancel()]
                assert answers == ([True] * 3 if each else [3])
                for run in (*runs, *found):
                    with pytest.raises(RunCancelled, match="cancelled: cancelled on request"):
                        await run.result(20)
                assert (await other.cancel(), await found[0].cancel(), await runs[1].cancel()) == (0, False, False)
            assert bystander.now == 1
        assert (work.args, work.cut) == (["running"] * 2, ["running"] * 2)

    async def test_cancel_a_retry(self, make_store: MakeStore) -> None:
        """What waits for its next attempt ends cancelled without one, and so does what failed as it was cancelled."""
        work, store = Work(held=True, failures=9, retries=3, retry_delay="1h"), Faulty(make_store())
        (here, there), (job, _) = instances(2, work)
        async with going(store, here), going(make_store, there, jobs=[]):
            for waits in (False, True):
                run = await job.submit()
                await until(lambda: work.now)
                store.deaf = True  # it is told of it too late
                assert waits or await (await there.find(run.id)).cancel()
                work.release.set()
                await until(lambda: run.error)  # noqa: B023
                assert not waits or await run.cancel()
                work.release.clear()
                with pytest.raises(RunCancelled, match="was cancelled: cancelled on request"):
                    await run.result(20)
                found = await there.find(run.id)
                assert (found.state, found.reason, found.attempt) == (State.CANCELLED, "cancelled on request", 1)

    async def test_immediate(self, make_store: MakeStore) -> None:
        """An immediate job runs when any instance first lists it, and at no restart; `after` is each instance's own."""
        work, own = Work(every="1h", immediate=True), Work(name="own", after=0)
        for n in range(2):
            registries = several(3, work, own)
            async with going(make_store, *registries):
                await until(lambda: len(own.ended) == 3 * n + 3)  # noqa: B023
                for registry in registries:
                    await (await registry.jobs["work"].submit(n)).result(20)
        assert (work.args[0], work.args.count(None)) == (None, 1)

    @pytest.mark.parametrize(("schedule", "overlap", "gap", "keep", "number"), [
        ({"every": "1m"}, "skip", HOUR, 86_400, 1), ({"every": "1m"}, "queue", HOUR, 86_400, 1),
        ({"every": "1m"}, "all", HOUR, 86_400, 60), ({"cron": "* * * * *"}, "all", HOUR, 1800, 30),
        ({"every": "1m"}, "skip", 400 * DAY, 86_400, 1), ({"cron": "* * * * *"}, "skip", 400 * DAY, 86_400, 1),
    ])  # fmt: skip
    async def test_downtime(self, make_store: MakeStore, schedule: dict[str, str], overlap: str, gap: int, keep: int,
                            number: int) -> None:  # fmt: skip
        """The newest tick runs once, with "all" every one in order, back to `keep`; a new job has missed none."""
        work, new = Work(overlap=overlap, **schedule), Work(overlap=overlap, **schedule, name="new")
        offset = MINUTE // 2 - int(time.time() * 1000) % MINUTE  # between two ticks, for as long as the test takes
        await listed(Faulty(make_store(keep=keep), offset - gap), **schedule, overlap=overlap)
        now = (int(time.time() * 1000) + offset) // MINUTE * MINUTE
        async with going(lambda: Faulty(make_store(keep=keep), offset), *several(2, work, new)):
            await until(lambda: len(work.ended) >= number)
            await asyncio.sleep(0.1)
        assert work.ticks == [*range(now, now - number * MINUTE, -MINUTE)][::-1]
        assert (work.most, new.begun) == (1, [])

    @pytest.mark.parametrize(("on_crash", "state", "attempt"), [("rerun", "scheduled", 0), ("drop", "cancelled", 1)])
    async def test_hand_back(self, make_store: MakeStore, on_crash: str, state: str, attempt: int) -> None:
        """What a stop cuts short is another's, at the same attempt; what mustn't run twice is cancelled."""
        work, told = Work(held=True, on_crash=on_crash), []
        (here, there), (job, _) = instances(2, work)
        async with going(make_store, here, drain=0, on_event=lambda run: told.append((run.state, run.reason))):
            run = await job.after(0, key="k").submit(1)
            await until(lambda: work.now)
        assert (run.state, run.attempt, run.reason) == (state, attempt, "run() stopped")
        assert told == [("running", None), (state, "run() stopped")]
        work.release.set()
        async with going(make_store, there):
            end = await ending(await there.find(run.id))
        assert (end == 1, isinstance(end, RunCancelled)) == (on_crash == "rerun", on_crash == "drop")
        assert (work.attempts, work.cut, grows(work.tokens)) == ([1] * (2 - attempt), [1], True)

    async def test_jobs_that_come_and_go(self, make_store: MakeStore) -> None:
        """A job registered while it goes begins its schedule; a removed one starts nothing more, and its runs stay."""
        work, registry = Work(every="30ms", overlap="all"), Registry()
        async with going(make_store, registry):
            stays = await work(registry).after("300ms").submit("stays")
            await until(lambda: len(work.begun) > 1)
            registry.remove("work")
            begun = len(work.begun)
            await asyncio.sleep(0.4)
            assert (len(work.begun) <= begun + 1, "stays" in work.args) == (True, False)
        async with going(make_store, *several(1, work)):
            await until(lambda: "stays" in work.ended)
        assert stays.id in [run.id for run in work.begun]


ENDS = (State.SUCCEEDED, State.FAILED, State.CANCELLED, State.SKIPPED)


def row(id: str, state: State, **facts: Any) -> bgjob.Saved:
    return bgjob.Saved(**{"id": id, "job": "work", "state": state, "due": None, "expires": None, "body": "{}", **facts})


def change(job: str, version: int, *rows: bgjob.Saved, book: str = "[]") -> bgjob.Change:
    return bgjob.Change(job, version, book, rows)


async def push(store: Any, *ids: str, job: str = "work", due: int | None = None, delay: int = 0) -> Any:
    return await store.push([bgjob.Call(id, job, due, delay, f'{{"n":{n}}}') for n, id in enumerate(ids)])


@each_test(in_a_loop)
class Verbs:
    """What the verbs of a store mean, to the letter, where an engine would hide it: the third part of `Conformance`."""

    async def test_load(self, make_store: MakeStore) -> None:
        """One consistent read: of each job the oldest due rows by (due, id), as many as wanted, and the next due."""
        async with opened(make_store()) as store:
            now, _, pages = await store.load({"work": 9, "none": 0})
            assert abs(now - time.time() * 1000) < 60_000
            assert {job: (page.version, [*page.rows], page.later) for job, page in pages.items()} == {
                "work": (0, [], None), "none": (0, [], None),
            }  # fmt: skip
            for id, due in (("b", now - 2), ("a", now - 2), ("c", now - 3), ("e", now + HOUR), ("d", now + 2 * HOUR)):
                assert await push(store, id, due=due) == [due]
            await push(store, "other", job="other", due=now + 5)
            for wanted, ahead, ids, later in (
                (9, 0, "cab", now + HOUR), (2, 0, "ca", now + HOUR), (0, 0, "", now + HOUR),
                (9, HOUR + MINUTE, "cabe", now + 2 * HOUR), (9, 3 * HOUR, "cabed", None),
            ):  # fmt: skip
                _, _, pages = await store.load({"work": wanted}, ahead)
                assert ([id for id, _, _ in pages["work"].rows], pages["work"].later) == ([*ids], later)
            assert (*pages["work"].rows[0],) == ("c", now - 3, '{"n":0}')

    async def test_commit(self, make_store: MakeStore) -> None:
        """Each change is saved whole, and only if its job's version is still that one; `find` has its rows as saved."""
        async with opened(make_store()) as store, opened(make_store(), "other") as other:
            end = row("end", State.FAILED, expires=9 * 10**12, body='{"error":"ü 😀 \\u0000"}')
            rows = [row("a", State.SCHEDULED, due=5), row("b", State.RUNNING), end]
            assert {*await store.commit([change("work", 0, *rows, book="[1]"), change("new", 0)])} == {"work", "new"}
            found = {one.id: one._replace(expires=None) for one in await store.find(["a", "b", "none", "end"])}
            assert found == {one.id: one._replace(expires=None) for one in rows}
            _, _, pages = await other.load({"work": 9, "new": 9})
            assert (pages["work"].book, [*map(tuple, pages["work"].rows)]) == ("[1]", [("a", 5, "{}")])
            version = pages["work"].version
            stale = change("work", 0, row("a", State.CANCELLED), row("c", State.SCHEDULED, due=6), book="[2]")
            assert {*await other.commit([stale, change("new", pages["new"].version, book="[3]")])} == {"new"}
            _, _, pages = await store.load({"work": 9, "new": 9})
            assert (pages["work"].version, pages["work"].book, pages["new"].book) == (version, "[1]", "[3]")
            assert [found.id for found in await store.find(["a", "c"])] == ["a"]
            assert {*await store.commit([change("work", version, row("a", State.RUNNING), book="[4]")])} == {"work"}
            _, _, pages = await store.load({"work": 9})
            assert (pages["work"].book, [*pages["work"].rows], 0 < version < pages["work"].version) == ("[4]", [], True)

    async def test_commits_at_once(self, make_store: MakeStore) -> None:
        """Of those that decided by the same version one takes, and in whatever order jobs are named nobody blocks."""
        async with opened(make_store()) as store, opened(make_store(), "other") as other:
            jobs = [f"job {n}" for n in range(20)]
            for _ in range(5):
                _, _, pages = await store.load(dict.fromkeys(jobs, 0))
                changes = [change(job, pages[job].version) for job in jobs]
                asked = [one.commit(some) for one in (store, other) for some in (changes, changes[::-1])]
                took = [job for answer in await asyncio.gather(*asked) for job in answer]
                assert sorted(took) == sorted(jobs)

    async def test_push(self, make_store: MakeStore) -> None:
        """An id is taken while unfinished or kept, free once cancelled or skipped; who comes first has it."""
        async with opened(make_store()) as store, opened(make_store(), "other") as other:
            now, _, _ = await store.load({"work": 0})
            assert await push(store, "a", "b", "a", due=7) == [7, 7, None]
            answers = await asyncio.gather(*[push(one, "b", "c", due=8) for one in (store, other) for _ in range(5)])
            assert sorted(answers, key=str) == [[None, 8], *[[None, None]] * 9]
            (delayed,) = await push(store, "delayed", delay=HOUR)
            assert 0 <= delayed - now - HOUR < 60_000
            rows = [row("run", State.RUNNING), row("past", State.SUCCEEDED, expires=now + 1)]
            await store.commit([change("work", 0, *rows, *[row(state, state, expires=now + HOUR) for state in ENDS])])
            await asyncio.sleep(0.02)
            assert await push(store, "run", "past", *ENDS, due=9) == [None, 9, None, None, 9, 9]
            (again,) = await store.find([State.CANCELLED])
            assert (again.state, again.due, again.expires) == (State.SCHEDULED, again.due, None)
            _, _, pages = await store.load({"work": 9})
            assert [id for id, due, _ in pages["work"].rows if due == 9] == [State.CANCELLED, "past", State.SKIPPED]

    async def test_beat(self, make_store: MakeStore) -> None:
        """An instance lives for a lease from its last beat, or until it leaves; a beat that comes too late says so."""
        async with opened(make_store()) as store, opened(make_store(), "other") as other:
            before = asyncio.get_running_loop().time()
            when, late = await store.beat()
            assert (before <= when <= asyncio.get_running_loop().time(), late) == (True, False)
            now, alive, _ = await other.load({"work": 0})
            assert (alive.keys(), abs(alive["me"] - now - store.lease) < 10_000) == ({"me"}, True)
            assert (await store.beat())[1] is False
            twin = make_store()
            await twin.open("me", lambda: None)
            await twin.close("me")
            assert (await other.load({"work": 0}))[1] == {}
            assert [(await store.beat())[1] for _ in range(2)] == [True, False]
            await twin.open("left", lambda: None)
            await twin.beat()
            await twin.close(None)  # what it left behind stays until its lease ends
            assert (await other.load({"work": 0}))[1].keys() == {"me", "left"}

    async def test_ring(self, make_store: MakeStore) -> None:
        """A hint reaches those that are named, or all others; never who rings."""
        heard, stores = list[str](), {name: make_store() for name in "abc"}
        for name, store in stores.items():
            await store.open(name, functools.partial(heard.append, name))
            await store.beat()
        await asyncio.sleep(0.1)  # whoever begins to listen may have missed something, and looks
        for named, expected in ((["b"], {"b"}), ([], {"b", "c"}), (["c", "gone"], {"c"})):
            heard.clear()
            await stores["a"].ring(named)
            await until(lambda: expected <= {*heard})  # noqa: B023
            await asyncio.sleep(0.02)
            assert {*heard} == expected
        for name, store in stores.items():
            await store.close(name)

    async def test_overview(self, make_store: MakeStore) -> None:
        """All books, who lives, the next n that wait, the n that failed last; what isn't kept is forgotten."""
        async with opened(make_store()) as store:
            await store.beat()
            now, _, _ = await store.load({"work": 0})
            rows = [row(f"{state} {n}", state, expires=now + HOUR + n) for state in ENDS for n in range(12)]
            old = [row(f"old {n}", State.FAILED, expires=now + 1) for n in range(20)]
            for version in range(30):
                await store.commit([change("work", version, *rows, *([] if version else old), book="[1]")])
                await asyncio.sleep(0.002)
            await store.commit([change("b", 0, book="[2]")])
            for n in (2, 0, 1):
                await push(store, f"due {n}", job=f"job {n}", due=now + HOUR + n)
            assert [one.id for one in await store.find([*[one.id for one in old], "failed 0"])] == ["failed 0"]
            for n, failed in ((2, [11, 10]), (99, [*range(11, -1, -1)])):
                at, alive, books, found = await store.overview(n)
                assert (abs(at - now) < 60_000, alive.keys(), books) == (True, {"me"}, {"work": "[1]", "b": "[2]"})
                assert [one.id for one in found] == [*["due 0", "due 1", "due 2"][:n], *[f"failed {n}" for n in failed]]

    async def test_many(self, make_store: MakeStore) -> None:
        """Batches are as large as an engine makes them: 500 jobs, thousands of rows, a book of a thousand claims."""
        jobs, book = [f"job {n}" for n in range(500)], "[" + ",".join(["1234567890123"] * 6000) + "]"
        async with opened(make_store()) as store:
            ids = [f"{n:05}" for n in range(2500)]
            assert await push(store, *ids, due=5) == [5] * 2500
            assert len(await store.find(ids)) == 2500
            ended = [row(id, State.CANCELLED, expires=10**13) for id in ids[:1000]]
            changes = [change(job, 0) for job in jobs] + [change("work", 0, *ended, book=book)]
            assert len(await store.commit(changes)) == 501
            _, _, pages = await store.load({**dict.fromkeys(jobs, 5), "work": 1000})
            assert [id for id, _, _ in pages["work"].rows] == ids[1000:2000]
            assert (pages["work"].book == book, {pages[job].version > 0 for job in jobs}) == (True, {True})

    async def test_used_again(self, make_store: MakeStore) -> None:
        """A store object can be opened again once it is closed, not before; another prefix is another store."""
        store, apart = make_store(), make_store(prefix="apart")
        async with opened(store):
            await push(store, "a", due=5)
            with pytest.raises(BgjobError, match=r"in use: one run\(\) or running\(\) per store object"):
                await store.open("other", lambda: None)
        async with opened(store, "other"):
            assert ([one.id for one in await store.find(["a"])], (await store.beat())[1]) == (["a"], False)
        async with opened(apart):
            assert (await push(apart, "a", due=6), await apart.beat(), len(await apart.find(["a"])))[::2] == ([6], 1)
            _, alive, pages = await apart.load({"work": 5})
            assert (alive.keys(), [(id, due) for id, due, _ in pages["work"].rows]) == ({"me"}, [("a", 6)])


class Conformance(OneInstance, Instances, Verbs):
    """What every store must do. For a store of your own, in three lines:

    class TestMyStore(Conformance):
        @pytest.fixture
        def make_store(self, tmp_path):  # makes a new store object each time, for the same fresh place
            return functools.partial(MyStore, tmp_path)  # with the options prefix=, lease= and keep= (s)
    """


class TestMemory(OneInstance):
    @pytest.fixture
    def make_store(self) -> MakeStore:
        return lambda: None


class TestDictStore(Conformance):
    @pytest.fixture
    def make_store(self) -> MakeStore:
        return functools.partial(DictStore, {})


class TestStores(Conformance):
    @pytest.fixture
    def make_store(self, place: Place) -> MakeStore:
        return place.store


@each_test(in_virtual_time)
class TestFaults:
    """What an engine makes of its store's faults, in virtual time; by default with a lease of 30 s."""

    @pytest.fixture
    def make_store(self) -> MakeStore:
        make = functools.partial(DictStore, {})
        return lambda **options: Faulty(make(**options))

    async def test_outage(self, make_store: MakeStore, caplog: Caplog) -> None:
        """It is two lines; ticks keep their place, runs go on, ends wait; a submit is refused after 5 s."""
        work, ticks = Work(held=True), Work(name="ticks", every="1s", overlap="all", parallelism=3)
        (registry,), store = several(1, work, ticks), make_store()
        store.before = down = Down()
        job = registry.jobs["work"]
        async with going(store, registry):
            with pytest.raises(StoreError, match=r"job 'work': submit\(\): the store is unreachable for 5 s: down"):
                await job.submit("refused")
            down.on = False
            runs = [await job.submit(n) for n in range(9)]
            await until(lambda: work.now == 9 and ticks.begun)
            down.on = True
            work.release.set()
            await asyncio.sleep(20)
            begun = len(ticks.begun)
            down.on = False
            assert [await run.result(60) for run in runs] == [*range(9)]
            await until(lambda: len(ticks.begun) > begun + 25)
        assert ticks.ticks == [*range(ticks.ticks[0], ticks.ticks[-1] + 1000, 1000)]
        assert (work.attempts, down.asked < 200) == ([1] * 9, True)
        said = [re.sub(r"[0-9.]+ s", "n s", text) for text in lines(caplog, "store ")]
        assert said[:3] == ["store unreachable: down; retrying", "store back after n s, 0 results settled", said[0]]
        assert re.fullmatch("store back after n s, (9|1[0-9]) results settled", *said[3:])

    async def test_outage_longer_than_the_lease(self, make_store: MakeStore) -> None:
        """Runs are cut at 0.8 of it, and run or fail elsewhere at its end; what an old one returns is refused."""
        told, tokens, work = list[str](), list[int](), Work(held=True, parallelism=9)
        drop = Work(held=True, name="drop", on_crash="drop", on_error=lambda run, error: told.append(run.id))

        async def stubborn() -> int:
            tokens.append(token := current_run().token)
            with suppress(asyncio.CancelledError):
                await work.release.wait()
            return token

        (here, there), store = several(2, work, drop, lambda registry: registry.job(stubborn)), make_store()
        async with going(store, here):
            runs = [await here.jobs[name].after(0, key="k").submit() for name in ("work", "drop", "stubborn")]
            await until(lambda: work.now and drop.now and tokens)
            async with going(make_store, there):
                store.before = down = Down()
                await asyncio.sleep(20)
                assert not work.cut
                await until(lambda: len(work.begun) == len(tokens) == 2)
                assert (work.now, work.most, len(work.cut), len(drop.cut)) == (1, 1, 1, 1)
                found = [await there.find(run.id) for run in runs]
                down.on = False
                await until(lambda: runs[2].reason == "lease lost")
                work.release.set()
                for some in (runs, found):
                    assert [await some[0].result(60), await some[2].result(60)] == [None, tokens[1]]
                    with pytest.raises(RunFailed, match="run 'drop#k' failed: .*its process died"):
                        await some[1].result(60)
        assert (work.attempts, grows(work.tokens), grows(tokens), len(tokens)) == ([1, 2], True, True, 2)
        assert (len(drop.begun), told) == (1, ["drop#k"])

    async def test_late_beat(self, make_store: MakeStore) -> None:
        """What nobody took meanwhile is still ours: our book is saved anew before another takes it by what it has read."""
        work, gate, stores = Work(held=True), asyncio.Event(), [make_store(), make_store()]
        (here, there), (job, _) = instances(2, work)

        async def wait(verb: str, *_: object) -> None:
            await (gate.wait() if verb == "beat" else asyncio.sleep(0))

        async def take(verb: str, *_: object) -> None:
            if verb == "commit":
                gate.set()
                await asyncio.sleep(1)

        async with going(stores[0], here):
            run = await job.submit(1)
            await until(lambda: work.now)
            async with going(stores[1], there):
                await asyncio.sleep(1)
                stores[0].before, stores[1].before = wait, take
                asyncio.get_running_loop().blocked += 31  # longer than the lease
                await asyncio.sleep(10)
                assert gate.is_set()
                work.release.set()
                assert await run.result(20) == 1
        assert work.attempts == [1]

    async def test_cut_in_vain(self, make_store: MakeStore) -> None:
        """What was cut, returns all the same and wasn't taken by another has succeeded, and its result is kept."""
        (here, there), store = several(2), make_store()

        @here.job
        async def work() -> tuple[int]:
            store.before = down = Down()
            asyncio.get_running_loop().call_later(40, setattr, down, "on", False)
            await misbehave("swallows")
            return (1,)

        async with going(store, here), going(make_store, there, jobs=[]):
            run = await work.submit()
            assert [await one.result(200) for one in (run, await there.find(run.id))] == [[1], [1]]
        assert run.attempt == 1

    async def test_claim_that_comes_too_late(self, make_store: MakeStore) -> None:
        """What comes of a claim after the lease it gave isn't started here: it may have been, elsewhere."""
        work, store = Work(), make_store()
        (here, there), (job, _) = instances(2, work)

        async def freeze(verb: str, answer: object) -> None:
            if verb == "commit" and not work.begun:
                store.before = Down()
                await asyncio.sleep(40)
                store.before.on = False

        async with going(store, here):
            await job.after(0, key="k").submit(1)
            store.after = freeze
            await asyncio.sleep(5)
            async with going(make_store, there):
                assert await (await there.find("work#k")).result(100) == 1
                await asyncio.sleep(60)
        assert len(work.begun) == 1

    async def test_lost_replies(self, make_store: MakeStore, caplog: Caplog) -> None:
        """With every fifth reply lost, after what was asked is done, no run is lost and none runs twice; nor a tick."""
        work, ticks = Work(parallelism=50), Work(name="ticks", every="1s", overlap="all")
        stores, registries, chance = [make_store(), make_store()], several(2, work, ticks), random.Random(1)

        async def lose(verb: str, answer: object) -> None:
            if chance.random() < 0.2:
                raise bgjob.Unreachable("the reply was lost")

        async with going(stores[0], registries[0]), going(stores[1], registries[1]):
            for store in stores:
                store.after = lose
            runs = [await one.jobs["work"].submit(n) for n in range(100) for one in registries]
            for run in runs:
                await run.result(600)
            await asyncio.sleep(100)
            for store in stores:
                del store.after
        assert len({run.id for run in work.begun}) == len(work.begun) == 200
        assert not lines(caplog, "does not count")
        assert ticks.ticks == [*range(ticks.ticks[0], ticks.ticks[-1] + 1000, 1000)]

    async def test_what_would_not_stop(self, make_store: MakeStore) -> None:
        """It is its instance's until the lease ends, for it may go on; then it starts elsewhere within a second."""
        begun = list[float]()

        async def work() -> None:
            begun.append(time.time() * 1000)
            await misbehave("well" if begun[1:] else "swallows")

        here, there = several(2, lambda registry: registry.job(work))
        async with going(make_store, here, drain=0):
            await here.jobs["work"].submit()
            await asyncio.sleep(3)
        (end,) = make_store().store.disk["until"].values()
        async with going(make_store, there):
            await until(lambda: begun[1:])
        await asyncio.sleep(100)  # the first has ended
        assert end <= begun[1] <= end + 1000

    async def test_stopped_in_an_outage(self, make_store: MakeStore) -> None:
        """Who stops during an outage tries again before it ends: what has ended is recorded if the store is back."""
        work, store = Work(held=True), make_store()
        (here, there), (job, _) = instances(2, work)
        async with going(store, here):
            run = await job.submit(1)
            await until(lambda: work.now)
            store.before = down = Down()
            work.release.set()
            await until(lambda: down.asked > 3)
            asyncio.get_running_loop().call_later(1, setattr, down, "on", False)
        async with going(make_store, there, jobs=[]):
            assert (await (await there.find(run.id)).result(20), run.state) == (1, State.SUCCEEDED)

    @pytest.mark.parametrize("verb", ["commit", "push"])
    async def test_refused(self, make_store: MakeStore, verb: str, caplog: Caplog) -> None:
        """It is told in an ERROR, and settled with a text that the store takes, or at once; the innocent go on."""
        registry, store, tick = Registry(), make_store(), Work(name="tick", every="1s")
        tick(registry)

        async def refuse(asked: str, *arguments: object) -> None:
            if asked == verb and "poison" in repr(arguments):
                raise StoreError("can't encode it")

        @registry.job
        async def work(n: int, text: str = "") -> int:
            if n % 2:
                raise ValueError("poison" if n == 1 else "harmless")
            return n

        async with going(store, registry):
            store.before = refuse
            runs = [await work.submit(n) for n in range(5)]
            ends = [await ending(run) for run in runs]
            assert (ends[::2], [type(end) for end in ends[1::2]]) == ([0, 2, 4], [RunFailed, RunFailed])
            if verb == "push":
                with pytest.raises(StoreError, match="can't encode it"):
                    await work.submit(6, "poison")
                assert await (await work.submit(8)).result(20) == 8
            begun = len(tick.begun)
            await asyncio.sleep(10)
            assert len(tick.begun) >= begun + 9
            assert (await registry.find(runs[1].id)).state is State.FAILED
        assert (len(lines(caplog, "refuses.*can't encode it")) > 0) is (verb == "commit")
        assert not lines(caplog, "unreachable")

    @pytest.mark.parametrize(("on_crash", "begun", "state"), [("rerun", 4, "failed"), ("drop", 1, "cancelled")])
    async def test_function_that_cancels_itself(self, make_store: MakeStore, on_crash: str, begun: int,
                                                state: str) -> None:  # fmt: skip
        """A cancel by somebody else is the end of the run's process: it runs again, three times at most; no failure."""
        registry, starts = Registry(), list[int]()

        @registry.job(on_crash=on_crash, retries=9, retry_delay="1h")
        async def work() -> None:
            starts.append(1)
            await misbehave("cancels itself")

        async with going(make_store, registry):
            run = await work.submit()
            assert isinstance(await ending(run), RunFailed | RunCancelled)
        assert (len(starts), run.state) == (begun, state)

    async def test_clock_of_the_store(self, make_store: MakeStore, caplog: Caplog) -> None:
        """It decides: set back, ticks wait until it has passed the last one again; set forward, that is a gap."""
        work, store = Work(every="10s"), make_store()
        async with going(store, *several(1, work)):
            for wait, offset in ((25, -100_000), (90, -100_000), (40, HOUR), (25, HOUR)):
                await asyncio.sleep(wait)
                store.offset = offset
                assert len(work.begun) <= 3 or wait != 90
        steps = [after - before for before, after in itertools.pairwise(work.ticks)]
        assert (min(steps), max(steps) > HOUR - 200_000, len(steps) - steps.count(10_000)) == (10_000, True, 1)
        back, forward = lines(caplog, "clock")
        assert re.fullmatch(r"the store's clock went back by (100|99\.99\d) s", back)
        assert re.fullmatch(r"the store's clock went forward by 3,(700|699\.99\d) s", forward)


async def submit_until_refused(job: Job, runs: list[Run], pause: float = 0) -> None:
    async with asyncio.timeout(20):
        for n in itertools.count():
            runs.append(await job.submit([n, "x" * 20_000]))
            await asyncio.sleep(pause)


@each_test(in_a_loop)
class TestSQLite:
    """What only a file can do to its users."""

    async def test_short_lock(self, tmp_path: Path, caplog: Caplog) -> None:
        """A lock that is given back in time is no outage, at the start neither; who only reads needs none."""
        file, (registry,), (job,) = tmp_path / "jobs.db", *instances(1, Work())
        for prefix in ("one", "one", "two"):
            with ExitStack() as stack:
                stack.enter_context(locked(file))
                asyncio.get_running_loop().call_later(0.1, stack.close)
                async with going(SQLiteStore(file, prefix=prefix), registry):
                    stack.enter_context(locked(file))
                    asyncio.get_running_loop().call_later(0.1, stack.close)
                    assert await (await job.submit(1)).result(20) == 1
        async with opened(SQLiteStore(file)) as store:
            with locked(file):
                await store.load({"work": 1})
        assert "unreachable" not in caplog.text

    async def test_reader(self, tmp_path: Path) -> None:
        """An open read transaction stops nobody, however long the log gets by it; that is cut off when it has gone."""
        file, log = tmp_path / "jobs.db", tmp_path / "jobs.db-wal"
        large = [bgjob.Call(str(n), "large", 5, 0, "x" * (1 << 20)) for n in range(20)]
        async with opened(SQLiteStore(file, lease="1h")) as store:
            with closing(sqlite3.connect(file, isolation_level=None)) as reader:
                reader.execute("BEGIN")
                reader.execute("SELECT count(*) FROM sqlite_master").fetchone()
                await store.push(large)
                assert log.stat().st_size > 17 << 20
                for n in range(500):
                    assert await push(store, f"small {n}", due=5) == [5]
                    await asyncio.sleep(0.001)
            for n in itertools.count():
                await push(store, f"after {n}", due=5)
                await asyncio.sleep(0.001)
                if log.stat().st_size < 16 << 20:
                    break
            assert len(await store.find(["19", "small 499", "after 0"])) == 3

    @pytest.mark.parametrize("what", ["deleted", "replaced", "folder"])
    async def test_deleted(self, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch, caplog: Caplog) -> None:
        """Who deletes or replaces the file deletes its runs; that is two lines. It stays where the process began."""
        folder = tmp_path / "here"
        folder.mkdir()
        monkeypatch.chdir(folder)
        async with opened(SQLiteStore(tmp_path / "new.db")) as store:
            await push(store, "work#new", due=5)
        (registry,), (job,) = instances(1, work := Work(every="50ms"))
        async with going(SQLiteStore("jobs.db", lease=2), registry):
            monkeypatch.chdir(tmp_path)
            await until(lambda: work.begun)
            shutil.rmtree(folder)
            if what == "folder":
                with pytest.raises(StoreError, match="its folder must exist and be writable"):
                    await submit_until_refused(job, [], 0.1)
                return
            folder.mkdir()
            if what == "replaced":
                os.replace("new.db", folder / "jobs.db")
            await until(lambda: "store back after" in caplog.text)
            begun = len(work.begun)
            await until(lambda: len(work.begun) > begun)
            assert await (await job.submit(1)).result(20) == 1
            assert bool(await registry.find("work#new")) is (what == "replaced")
        assert re.search(f"store unreachable: .*the file was {what}; begun anew", *lines(caplog, "unreachable"))

    async def test_unusable_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What can't become a store by itself is refused at once, with the path and the reason."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "text").write_text("no database at all " * 100)
        (tmp_path / "folder").mkdir()
        for path, reason in (
            ("text", "file is not a database"),
            ("folder", "unable to open database file; its folder must exist and be writable"),
            ("missing/jobs.db", "unable to open database file; its folder must exist and be writable"),
            (":memory:", "no write-ahead log is possible there (journal_mode is 'memory')"),
        ):
            with pytest.raises(StoreError) as caught:
                await listed(SQLiteStore(path))
            assert (str(caught.value), type(caught.value)) == (f"SQLiteStore({path!r}): {reason}", StoreError)

    async def test_full_disk(self, tmp_path: Path) -> None:
        """A full disk refuses what it can't keep, and loses nothing that was acknowledged; with room it goes on."""
        resource = pytest.importorskip("resource", reason="a limit of file sizes stands in for the disk's")
        work, runs, limits = Work(held=True, parallelism=5), list[Run](), resource.getrlimit(resource.RLIMIT_FSIZE)
        (registry,), (job,) = instances(1, work)
        async with going(SQLiteStore(tmp_path / "jobs.db"), registry):
            resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, limits[1]))
            try:
                with pytest.raises(StoreError, match="the store is unreachable for 5 s: .*(full|disk I/O error)"):
                    await submit_until_refused(job, runs)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            work.release.set()
            for n, run in enumerate(runs):
                assert await run.result(20) == [n, "x" * 20_000]
        assert len(work.begun) == len(runs) > 20


# Faults: real processes, real signals, real servers, and an oracle that reads an append-only log -----------------------

WORKER = """
import asyncio, logging, os, signal, threading, time
import bgjob
from bgjob import Depends, current_run, job

log = os.open(os.environ["LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
logging.basicConfig(level=logging.WARNING, format="%(process)d %(message)s")

def note(what):
    run = current_run()
    line = f"{what} {run.job} {run.id} {run.attempt} {run.token} {os.getpid()} {time.time_ns()}\\n"
    os.write(log, line.encode())

def events():
    return open(os.environ["LOG"]).read()

class noted:
    def __enter__(self):
        note("start")
    def __exit__(self, kind, error, trace):
        note("end" if kind is None else "cut" if kind is asyncio.CancelledError else "error")

"""

JOBS = """
    @job(parallelism=20)
    async def work(n=0, seconds=0.05):
        with noted():
            await asyncio.sleep(seconds)
        return [n, os.getpid()]

    @job(on_crash="drop")
    async def once(n=0, seconds=0.05):
        with noted():
            await asyncio.sleep(seconds)
        return [n, os.getpid()]

    @job(every="500ms", overlap="all", parallelism=9)
    async def tick():
        with noted():
            await asyncio.sleep(0.02)

    @job
    async def hang():
        with noted():
            await asyncio.sleep(600 if current_run().attempt == 1 else 0)
        return os.getpid()
"""

MAIN = """
if __name__ == "__main__":
    asyncio.run(bgjob.run(store=URL, drain=os.environ.get("DRAIN", "20s")))
"""


class Event(NamedTuple):
    """A line of the log that workers append to."""

    what: str
    job: str
    id: str
    attempt: int
    token: int
    pid: int
    at: int  # ns


class Workers:
    """Real processes that run jobs, a log that they append to, and who was killed when."""

    def __init__(self, folder: Path, url: str, jobs: str) -> None:
        self.url = url
        self.log = folder / "log"
        self.stderr = folder / "stderr"
        self.jobs = jobs
        self.live: list[subprocess.Popen[bytes]] = []
        self.killed: dict[int, int] = {}  # pid -> ns
        self.script = folder / "worker.py"
        self.command = [str(self.script)]
        self.script.write_text(f"{WORKER}URL = {url!r}\n{textwrap.dedent(jobs)}\n{MAIN}")
        self.log.touch()
        self.stderr.touch()

    def start(self, number: int = 1, **environment: str) -> list[subprocess.Popen[bytes]]:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "LOG": str(self.log), **environment}
        command, folder = [sys.executable, *self.command], self.script.parent
        with self.stderr.open("a") as err:
            started = [subprocess.Popen(command, env=env, cwd=folder, stdout=err, stderr=err) for _ in range(number)]
        self.live += started
        return started

    async def kill(self, worker: subprocess.Popen[bytes]) -> None:
        """kill -9; who is dead already, by its own hand, is noted as killed now."""
        worker.kill()
        await self.reap(worker)
        self.killed[worker.pid] = time.time_ns()

    async def reap(self, worker: subprocess.Popen[bytes]) -> None:
        await until(lambda: worker.poll() is not None)
        self.live.remove(worker)

    async def stop(self) -> None:
        """Stop gracefully what still lives; one that was started a moment ago may not be listening yet, and just ends."""
        begun = {event.pid for event in self.events()}
        for worker in self.live:
            worker.terminate()
        for worker in [*self.live]:
            await self.reap(worker)
            early = (worker.returncode, worker.pid in begun) == (-signal.SIGTERM, False)
            assert worker.returncode == 0 or early, self.stderr.read_text()
        assert "bgjob itself failed" not in self.stderr.read_text()
        assert "never retrieved" not in self.stderr.read_text()

    def events(self, *what: str) -> list[Event]:
        lines = [line.split(" ") for line in self.log.read_text().splitlines()]
        events = [Event(*line[:3], *map(int, line[3:])) for line in lines]
        return [event for event in events if event.what in what or not what]

    async def wait(self, what: str, number: int) -> list[Event]:
        """Until there are so many events of a kind."""
        await until(lambda: len(self.events(what)) >= number)
        return self.events(what)

    def starts(self) -> dict[str, list[Event]]:
        found: dict[str, list[Event]] = {}
        for event in self.events("start"):
            found.setdefault(event.id, []).append(event)
        return found

    def whole(self, job: str, every: int) -> list[int]:
        """The ticks of a job that started; [] where one is missing between the first and the last."""
        ticks = sorted(tick_of(id) for id in self.starts() if id.startswith(f"{job}@"))
        return ticks if ticks and ticks == [*range(ticks[0], ticks[-1] + every, every)] else []

    def most(self, job: str) -> int:
        """How many runs of a job were alive at once, a killed process's until it was killed."""
        opened, changes = {}, []
        for event in self.events():
            if event.what == "start" and event.job == job:
                opened[event.id, event.token] = event
                changes.append((event.at, 1))
            elif (event.id, event.token) in opened:
                del opened[event.id, event.token]
                changes.append((event.at, -1))
        changes += [(self.killed[event.pid], -1) for event in opened.values()]
        return max(itertools.accumulate(change for _, change in sorted(changes)))

    def outages(self) -> dict[int, int]:
        """How often the store was unreachable and back again, for each process; -1 where it is still unreachable."""
        found: dict[int, list[str]] = {worker.pid: [] for worker in self.live}
        for pid, line in re.findall(r"^(\d+) (store .*)$", self.stderr.read_text(), re.MULTILINE):
            found[int(pid)].append(line)
        for lines in found.values():
            for n, line in enumerate(lines):
                assert line.startswith("store back after " if n % 2 else "store unreachable: "), lines
        return {pid: -1 if len(lines) % 2 else len(lines) // 2 for pid, lines in found.items()}

    def check_repeats(self, lost: Callable[[Event, Event], bool]) -> int:
        """A run starts again only where `lost` knows why, and with a greater token. How many did?"""
        number = 0
        for starts in self.starts().values():
            for first, again in itertools.pairwise(starts):
                number += 1
                assert first.token < again.token, starts
                assert lost(first, again), starts
        return number

    def owner_was_killed(self, first: Event, again: Event) -> bool:
        return first.at <= self.killed.get(first.pid, 1 << 63) <= again.at and first.attempt < again.attempt

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self.live:
            worker.kill()
            worker.wait(40)
        if error[0] is not None:
            print(f"--- {self.url.partition(':')[0]}\n{self.stderr.read_text()}")


def tick_of(id: str) -> int:
    return int(datetime.fromisoformat(id.partition("@")[2]).timestamp() * 1000 + 0.5)


@asynccontextmanager
async def client(workers: Workers) -> AsyncIterator[Registry]:
    """The workers' jobs, to be submitted from here."""
    registry = Registry()
    names: dict[str, Any] = {"job": registry.job, "os": os, "asyncio": asyncio, "bgjob": bgjob, "Depends": Depends}
    exec(textwrap.dedent(workers.jobs), names)
    async with registry.running(store=workers.url, jobs=[]):
        yield registry


Start = Callable[..., Workers]


def on_each(*stores: Callable[[Path], AbstractContextManager[Any]]) -> Callable[[Any], Callable[..., None]]:
    """Run a test of processes on several stores at once, for it mostly waits: `test(self, workers, place)`."""

    def decorate(test: Callable[[Any, Start, Any], Awaitable[None]]) -> Callable[..., None]:
        def wrapper(self: object, tmp_path: Path) -> None:
            missing, places = list[str](), list[Any]()
            with ExitStack() as stack:
                for store in stores:
                    try:
                        places.append(stack.enter_context(store(tmp_path)))
                    except pytest.skip.Exception as why:
                        missing.append(str(why))

                async def on_one(place: Any) -> None:
                    def workers(jobs: str, **options: Any) -> Workers:
                        folder = Path(tempfile.mkdtemp(prefix=place.kind, dir=tmp_path))
                        return groups.enter_context(Workers(folder, place.url(**options), jobs))

                    with ExitStack() as groups:
                        await test(self, workers, place)

                async def main() -> None:
                    async with asyncio.TaskGroup() as all_at_once:
                        for place in places:
                            all_at_once.create_task(on_one(place), name=place.kind)

                in_a_loop(main)()
            if missing:
                pytest.skip(f"only on {', '.join(place.kind for place in places)}: {'; '.join(missing)}")

        wrapper.__name__, wrapper.__doc__ = test.__name__, test.__doc__
        return wrapper

    return decorate


EACH = [functools.partial(found_place, kind) for kind in KINDS]


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
class TestProcesses:
    """Faults of the processes that share a store."""

    @on_each(*EACH)
    async def test_ticks(self, workers: Start, place: Any) -> None:
        """Each tick starts on exactly one of several processes, none is missing, and none is early by the store's clock,
        whatever the clocks of the machines say. One that is alone and 0.2 s fast misses nothing."""
        skewed = [["-2", "0.2", "2", *["0"] * 5], ["0.2"]]
        for n, skews in enumerate([["0"] * 8] if place.kind == "sqlite" else skewed):
            group = workers("""
                real, skew = time.time, float(os.environ["SKEW"])
                time.time = lambda: real() + skew

                @job(every="50ms", overlap="all", parallelism=4)
                async def tick():
                    note("start")
            """, prefix=f"p{n}")  # fmt: skip
            for skew in skews:
                group.start(1, SKEW=skew)
            await group.wait("start", 2000 if THOROUGH else 60)
            await until(lambda: len({event.pid for event in group.events()}) >= min(2, len(skews)))  # noqa: B023
            await group.stop()
            assert group.whole("tick", 50)
            assert group.check_repeats(lambda *_: False) == 0
            assert all(event.at >= tick_of(event.id) * 1_000_000 for event in group.events())
            assert "unreachable" not in group.stderr.read_text()

    @on_each(*EACH)
    async def test_kills(self, workers: Start, place: Any) -> None:
        """kill -9 at random: no run that was acknowledged is lost, none repeats without a kill or if it must not, and
        there are never more than three at once."""
        group = workers(JOBS.replace("parallelism=20", "parallelism=3"), lease="2s")
        rng, runs = random.Random(0), list[Run]()
        group.start(4)
        await group.wait("start", 1)
        async with client(group) as here:
            while len(group.killed) < (60 if THOROUGH else 5):
                for n in range(4):
                    runs.append(await here.jobs[rng.choice(["work", "once"])].after(rng.random()).submit(n))
                await group.wait("start", len(group.events("start")) + 2)
                await asyncio.sleep(rng.random() * 0.2)
                await group.kill(rng.choice(group.live))
                group.start()
            ends = await asyncio.gather(*[run.result(90) for run in runs], return_exceptions=True)
        await group.stop()
        starts = group.starts()
        for run, end in zip(runs, ends, strict=True):
            if isinstance(end, BaseException):
                assert str(end) == f"run {run.id!r} failed: BgjobError: its process died"
                assert run.job == "once"
                assert {event.pid for event in starts.get(run.id, [])} <= group.killed.keys()
            else:
                assert starts[run.id][-1].pid == end[1]
        group.check_repeats(group.owner_was_killed)
        assert all(len(starts.get(run.id, [])) <= 1 for run in runs if run.job == "once")
        assert group.most("work") <= 3
        assert group.whole("tick", 500)

    @on_each(*EACH)
    async def test_takeover(self, workers: Start, place: Any) -> None:
        """The run of a killed process starts elsewhere, as the next attempt. If that process submitted it to itself, no
        other has heard of it: it is found by looking, however much the others have to do."""
        group = workers("""
            @job
            async def work():
                note("start")
                await asyncio.sleep(600 if current_run().attempt == 1 else 0)

            @job(every="200ms")
            async def tick():
                note("tick")
                if os.environ.get("SUBMITS"):
                    await work.after("1ms", key="one").submit()
        """, lease="2s")  # fmt: skip
        (other,) = group.start()
        await group.wait("tick", 1)
        (first,) = group.start(SUBMITS="1")
        await group.wait("start", 1)
        await group.kill(first)
        lost, again = await group.wait("start", 2)
        await group.stop()
        assert (lost.pid, lost.attempt) == (first.pid, 1)
        assert (again.pid, again.attempt) == (other.pid, 2)
        assert again.token > lost.token
        assert again.at > group.killed[first.pid]

    @on_each(*EACH)
    async def test_killed_before_the_settle(self, workers: Start, place: Any) -> None:
        """Killed when the functions have returned, but nobody knows: run again, or failed where it must not be."""
        group = workers("""
            async def deadly():
                yield
                if os.environ.get("DIES"):
                    while events().count("end") < 2:
                        await asyncio.sleep(0.01)
                    os.kill(os.getpid(), 9)

            @job
            async def work(_=Depends(deadly)):
                with noted():
                    return os.getpid()

            @job(on_crash="drop")
            async def once(_=Depends(deadly)):
                with noted():
                    return os.getpid()
        """, lease="2s")  # fmt: skip
        (dying,) = group.start(DIES="1")
        async with client(group) as here:
            again, dropped = await here.jobs["work"].submit(), await here.jobs["once"].submit()
            await until(lambda: dying.poll() is not None)
            (second,) = group.start()
            assert await again.result(60) == second.pid
            with pytest.raises(RunFailed, match="BgjobError: its process died"):
                await dropped.result(60)
        group.live.remove(dying)
        await group.stop()
        assert sorted(event.id for event in group.events("end")) == sorted([again.id, again.id, dropped.id])

    @pytest.mark.parametrize("fault", ["frozen", "blocked"])
    def test_overtaken(self, fault: str, tmp_path: Path) -> None:
        """A process that is frozen for longer than its lease is overtaken once, or one whose loop a job blocks, where no
        thread can beat: what ran there is cancelled, its result is refused, and the process works on."""

        async def overtaken(self: object, workers: Start, place: Any) -> None:
            group = workers(f"""{JOBS}
    @job
    async def block():
        end = time.monotonic() + 3
        while current_run().attempt == 1 and (time.monotonic() < end or "TAKEN" in os.environ):
            time.sleep(0.1)
            if events().count("start hang") == 2:
                break
            """, lease="2s")  # fmt: skip
            beats = fault == "blocked" and place.kind == "sqlite"
            (first,) = group.start(1, **({} if beats else {"TAKEN": "waits until it is overtaken"}))
            async with client(group) as here:
                run = await here.jobs["hang"].submit()
                await until(lambda: run.id in group.starts())
                if fault == "frozen":
                    first.send_signal(signal.SIGSTOP)
                else:
                    await here.jobs["block"].submit()
                (second,) = group.start()
                if beats:
                    await until(lambda: second.pid in {event.pid for event in group.events("start")})
                    assert await run.cancel()
                else:
                    assert await run.result(60) == second.pid
                first.send_signal(signal.SIGCONT)
                await until(lambda: run.id in {event.id for event in group.events("cut")})
                await group.kill(second)
                assert await (await here.jobs["work"].submit(2)).result(60) == [2, first.pid]
            await group.stop()
            attempts = [(first.pid, 1)] if beats else [(first.pid, 1), (second.pid, 2)]
            assert [(event.pid, event.attempt) for event in group.starts()[run.id]] == attempts
            assert (f"hang {run.id}: lease lost; its attempt 1" in group.stderr.read_text()) != beats

        on_each(*EACH)(overtaken)(self, tmp_path)

    @on_each(*EACH)
    async def test_attempts_across_kills(self, workers: Start, place: Any) -> None:
        """What its process takes along uses up no retry: with one retry a run may fail once, and be killed besides. A run
        that kills its process is given up after the fourth; others aren't harmed."""
        group = workers("""
            @job(retries=1, retry_delay=0)
            async def flaky():
                with noted():
                    if current_run().attempt == 2:
                        os.kill(os.getpid(), 9)
                    raise ValueError(current_run().attempt)

            @job
            async def poison():
                note("start")
                os.kill(os.getpid(), 9)

            @job
            async def work():
                return 1
        """, lease="1s")  # fmt: skip
        group.start(2)
        async with client(group) as here:
            flaky = await here.jobs["flaky"].submit()
            with pytest.raises(RunFailed, match="ValueError: 3"):
                await flaky.result(60)
            poison = await here.jobs["poison"].submit()
            ending = asyncio.create_task(poison.result(60))
            while not ending.done():
                group.live = [worker for worker in group.live if worker.poll() is None]
                group.start(2 - len(group.live))
                await asyncio.sleep(0.05)
            with pytest.raises(RunFailed, match="BgjobError: its process died"):
                await ending
            assert await (await here.jobs["work"].submit()).result(60) == 1
        await group.stop()
        assert [event.attempt for event in group.starts()[poison.id]] == [1, 2, 3, 4]
        assert [(event.what, event.attempt) for event in group.events() if event.id == flaky.id] == [
            ("start", 1), ("error", 1), ("start", 2), ("start", 3), ("error", 3),
        ]  # fmt: skip

    @on_each(*EACH)
    async def test_cancels(self, workers: Start, place: Any) -> None:
        """Nothing starts once a cancel has removed a run; where it has signalled one, what was claimed is the last."""
        group = workers("""
            @job(retries=9, retry_delay=0.02, parallelism=5)
            async def work(n):
                with noted():
                    await asyncio.sleep(0.005)
                    raise ValueError
        """)
        rng, removed, signalled = random.Random(2), dict[str, int](), dict[str, int]()

        async def cancel_soon(run: Run) -> None:
            await asyncio.sleep(rng.random() * 0.2)
            if await run.cancel():
                answered = removed if run.state is State.CANCELLED else signalled
                answered[run.id] = time.time_ns()

        group.start(2)
        async with client(group) as here:
            await here.jobs["work"].submit(0)
            await group.wait("start", 1)
            for _ in range(10 if THOROUGH else 1):
                runs = [await here.jobs["work"].submit(n) for n in range(100)]
                await asyncio.gather(*map(cancel_soon, runs))
                ends = await asyncio.gather(*[run.result(60) for run in runs], return_exceptions=True)
                assert {type(end) for end in ends} <= {RunCancelled, RunFailed}
        await group.stop()
        assert len(removed) + len(signalled) > 50
        for id, starts in group.starts().items():
            assert all(event.at < removed.get(id, 1 << 63) for event in starts), starts
            assert sum(event.at > signalled.get(id, 1 << 63) for event in starts) <= 1, starts

    @on_each(*EACH)
    async def test_rolling_deploy(self, workers: Start, place: Any) -> None:
        """Stopped under load one after another, and started anew: nothing is lost, no attempt is counted, and what the
        old code doesn't know waits for the new. A signal that comes while a process opens ends it, with its clean-up."""
        group = workers("""
            async def slow():
                try:
                    if os.environ.get("OPENS"):
                        os.kill(os.getpid(), signal.SIGTERM)
                        await asyncio.sleep(0.1)
                    yield
                finally:
                    os.write(log, f"closed - - 0 0 {os.getpid()} 0\\n".encode())

            @job
            async def work(n, _=Depends(slow, scope="app")):
                with noted():
                    await asyncio.sleep(0.3)
                return n

            if "OLD" not in os.environ:
                @job
                async def new():
                    with noted():
                        return "new"
        """)
        group.start(2, DRAIN="200ms", OLD="1")
        async with client(group) as here:
            unknown = await here.jobs["new"].submit()
            runs = [await here.jobs["work"].submit(n) for n in range(200 if THOROUGH else 60)]
            for _ in range(6 if THOROUGH else 3):
                await group.wait("start", len(group.events("start")) + 10)
                group.live[0].terminate()
                await group.reap(group.live[0])
                group.start(1, DRAIN="200ms")
            (opening,) = group.start(OPENS="1")
            values = await asyncio.gather(*[run.result(60) for run in runs])
            assert await unknown.result(60) == "new"
        await group.reap(opening)
        assert opening.returncode == 0
        assert opening.pid in {event.pid for event in group.events("closed")}
        await group.stop()
        assert values == [*range(len(runs))]
        assert len(group.events("end")) == len(runs) + 1
        cut = {(event.id, event.token) for event in group.events("cut")}
        assert cut
        group.check_repeats(lambda first, again: (first.id, first.token) in cut)
        assert {event.attempt for event in group.events("start")} == {1}

    @on_each(*EACH)
    async def test_calls(self, workers: Start, place: Any) -> None:
        """Hundreds of delayed runs of a process that has gone: two others do each exactly once, a third reads them.
        Neither tasks nor threads nor descriptors become more by it."""
        number = 20_000 if THOROUGH else 400
        group = workers("""
            @job(parallelism=50)
            async def work(n):
                with noted():
                    return n * n

            @job
            async def count():
                open_files = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
                return [open_files, len(asyncio.all_tasks()), threading.active_count()]
        """)
        group.start()
        async with client(group) as here:
            ids = [(await here.jobs["work"].after(n % 10 / 10).submit(n)).id for n in range(number)]
            await here.jobs["work"].after("1h", key="later").submit(0)
            await group.wait("end", number // 2)
            before = await (await here.jobs["count"].submit()).result(60)
        (second,) = group.start()
        await group.wait("end", number)
        await group.kill(second)
        async with client(group) as here:
            after = await (await here.jobs["count"].submit()).result(60)
            for n, id in enumerate(ids):
                run = await here.find(id)
                assert run is not None
                assert await run.result(20) == n * n
        await group.stop()
        assert all(now <= then + 2 for then, now in zip(before, after, strict=True)), (before, after)
        assert len(group.events("start")) == len(group.starts()) == number

    @pytest.mark.parametrize("server", ["uvicorn --workers 4 --port 0", "gunicorn -w 4 -b 127.0.0.1:0 --preload -k"])
    def test_web_workers(self, server: str, tmp_path: Path) -> None:
        """In an application of four web workers, forked before or after the import, each tick runs on one of them."""
        for module in ("fastapi", "uvicorn", server.split()[0]):
            pytest.importorskip(module)
        worker_class = ["uvicorn.workers.UvicornWorker"] if server.endswith("-k") else []

        async def ticks(self: object, workers: Start, place: Any) -> None:
            group = workers("""
                from contextlib import asynccontextmanager
                from fastapi import FastAPI

                @job(every="100ms", overlap="all", parallelism=4)
                async def tick():
                    note("start")

                @asynccontextmanager
                async def lifespan(app):
                    async with bgjob.running(store=URL):
                        yield

                app = FastAPI(lifespan=lifespan)
            """)  # fmt: skip
            group.command = ["-m", *server.split(), *worker_class, "worker:app"]
            group.start()
            await group.wait("start", 300 if THOROUGH else 20)
            await until(lambda: len({event.pid for event in group.events()}) > 1)
            await group.stop()
            assert group.whole("tick", 100)
            assert group.check_repeats(lambda *_: False) == 0

        on_each(*EACH)(ticks)(self, tmp_path)


class Wire:
    """A TCP proxy. It can cut and refuse connections (`cut_off`), forget them so that nobody hears of it (`hole`), keep
    hints back, and lose answers: the server has done what was asked, and the connection is cut, or every tenth time
    stays open and silent."""

    def __init__(self, server: Any) -> None:
        self.server = server
        self.refusing = self.forgetting = False
        self.chance, self.loss, self.lost, self.kept_back = random.Random(7), 0.0, 0, False
        self.tasks: dict[asyncio.Task[None], list[asyncio.StreamWriter]] = {}

    async def __aenter__(self) -> "Wire":
        self.listener = await asyncio.start_server(self.connected, "127.0.0.1", 0)
        self.port = self.listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.listener.close()
        self.cut()
        await until(lambda: not self.tasks)

    def cut(self) -> None:
        for writer in itertools.chain.from_iterable(self.tasks.values()):
            writer.transport.abort()

    @asynccontextmanager
    async def cut_off(self) -> AsyncIterator[None]:
        self.refusing = True
        self.cut()
        yield
        self.refusing = False

    @asynccontextmanager
    async def hole(self) -> AsyncIterator[None]:
        self.forgetting = True
        yield
        self.forgetting = False

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks[task] = writers = [writer]
        with suppress(OSError):
            if not self.refusing:
                there, back = await asyncio.open_connection("127.0.0.1", self.server.port)
                writers.append(back)
                await asyncio.gather(self.carry(reader, back, False), self.carry(there, writer, True))
        for one in self.tasks.pop(task):
            one.transport.abort()

    async def carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, answers: bool) -> None:
        with suppress(OSError):
            while chunk := await source.read(1 << 16):
                if answers and self.kept_back:
                    chunk = self.server.HINT.sub(b"", chunk)
                silent = self.forgetting
                if answers and self.loss and self.server.DONE.search(chunk) and self.chance.random() < self.loss:
                    self.lost += 1
                    if self.lost % 10:
                        break
                    silent = True
                while silent and await source.read(1 << 16):
                    pass
                sink.write(chunk if not silent else b"")
        sink.transport.abort()


class LockedFile:
    """SQLite, as a server that can fail: another program holds the lock."""

    kind, port = "sqlite", 0

    def __init__(self, folder: Path) -> None:
        self.file = folder / "jobs.db"

    @classmethod
    @contextmanager
    def at(cls, folder: Path) -> Iterator["LockedFile"]:
        yield cls(folder)

    def url(self, port: int = 0, **options: str) -> str:
        return f"sqlite:///{self.file}?{urlencode(options)}"

    def faults(self, wire: Wire) -> list[Callable[[], Any]]:
        return [self.held]

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        with locked(self.file):
            yield


class OwnServer:
    """A server of a test's own, which it may kill and freeze; what it stored survives."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="bgjob-test-"))
        with closing(socket.socket()) as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None
        self.user: dict[str, Any] = {}
        self.command: list[str] = []

    def begin(self) -> None:
        null = subprocess.DEVNULL
        self.process = subprocess.Popen(self.command, cwd="/", stdout=null, stderr=null, **self.user)

    def kill(self) -> None:
        """At once: what wasn't committed is gone."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL if isinstance(self, RedisServer) else signal.SIGQUIT)
            self.process.wait(30)
            self.process = None

    async def ask(self, *words: object) -> Any:
        """What it answers, as soon as it answers."""
        while True:
            with suppress(OSError, *self.passing()):
                return await self.ask_once(*words)
            await asyncio.sleep(0.02)

    @asynccontextmanager
    async def killed(self) -> AsyncIterator[None]:
        self.kill()
        yield
        self.begin()

    def faults(self, wire: Wire) -> list[Callable[[], Any]]:
        return [self.killed, self.frozen, wire.hole, *[wire.cut_off] * THOROUGH]

    def stop(self, pids: list[int], how: signal.Signals) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, how)


class PostgresServer(OwnServer):
    """Its superuser has a password."""

    kind = "postgres"
    PASSWORD = "s3cret/w@rd"
    # The answer to what is committed: the statement's tag, then "ready" and in no transaction.
    DONE = re.compile(rb"C\0\0\0.(COMMIT|SELECT|INSERT|UPDATE|DELETE)[ \d]*\0Z\0\0\0\x05I\Z", re.DOTALL)
    HINT = re.compile(rb"\A(A\0\0\0.{5}[^\0]*\0[^\0]*\0)+", re.DOTALL)

    def __init__(self) -> None:
        super().__init__()
        folders = [*map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), os.environ["PATH"]]
        postgres, initdb = (shutil.which(name, path=os.pathsep.join(folders)) for name in ("postgres", "initdb"))
        if postgres is None or initdb is None:
            refuse_server("no PostgreSQL server is installed that tests could kill")
        if os.geteuid() == 0:  # the server refuses to run as root
            self.user = {"user": "postgres", "group": "postgres", "extra_groups": []}
            shutil.chown(self.folder, "postgres", "postgres")
        (self.folder / "password").write_text(self.PASSWORD)
        options = f"--auth-local=trust --auth-host=scram-sha-256 --pwfile {self.folder}/password -U postgres --no-sync"
        subprocess.run([initdb, "-D", f"{self.folder}/data", *options.split()], check=True, capture_output=True, cwd="/",
                       timeout=60, **self.user)  # fmt: skip
        where = f"-D {self.folder}/data -h 127.0.0.1 -p {self.port} -k {self.folder} -c fsync=off"
        self.command = [postgres, *where.split()]

    def url(self, port: int | None = None, user: str = "postgres", base: str = "postgres", **options: str) -> str:
        login = f"{user}:{quote(self.PASSWORD, safe='')}"
        return f"postgresql://{login}@127.0.0.1:{port or self.port}/{base}?{urlencode(options)}"

    def passing(self) -> tuple[type[Exception], ...]:
        return (importlib.import_module("asyncpg").CannotConnectNowError,)

    async def ask_once(self, sql: str = "SELECT 1") -> list[Any]:
        db = await importlib.import_module("asyncpg").connect(self.url(), timeout=5)
        try:
            return await db.fetch(sql)
        finally:
            await db.close()

    @asynccontextmanager
    async def frozen(self) -> AsyncIterator[None]:
        found = await self.ask("SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
        pids = [self.process.pid, *(pid for (pid,) in found)]
        self.stop(pids, signal.SIGSTOP)
        yield
        self.stop(pids, signal.SIGCONT)

    async def clients(self) -> int:
        sql = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
        return (await self.ask(sql))[0][0] - 1

    async def cut(self) -> None:
        await self.ask("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
                       " AND backend_type = 'client backend'")  # fmt: skip

    async def empty(self) -> None:
        await self.ask("DROP SCHEMA public CASCADE")
        await self.ask("CREATE SCHEMA public")
        await self.ask("GRANT USAGE ON SCHEMA public TO public")


class RedisServer(OwnServer):
    kind = "redis"
    DONE = re.compile(rb"\A[*:][^3]")  # what a script answers, and not a hint
    HINT = re.compile(rb"\*3\r\n\$7\r\nmessage(\r\n\$\d+\r\n[^\r]*){2}\r\n")

    def __init__(self) -> None:
        super().__init__()
        if shutil.which("redis-server") is None:
            refuse_server("no redis-server in the path")
        options = f"--bind 127.0.0.1 --dir {self.folder} --appendonly yes --appendfsync always --key-load-delay 300"
        self.command = ["redis-server", "--port", str(self.port), "--save", "", *options.split()]

    def url(self, port: int | None = None, **options: str) -> str:
        return f"redis://127.0.0.1:{port or self.port}/?{urlencode(options)}"

    def passing(self) -> tuple[type[Exception], ...]:
        found = importlib.import_module("redis.exceptions")
        return found.ConnectionError, found.BusyLoadingError

    async def ask_once(self, *words: object) -> Any:
        async with redis_client(self.url()) as client:
            return await client.execute_command(*words or ("PING",))

    @asynccontextmanager
    async def frozen(self) -> AsyncIterator[None]:
        self.stop([self.process.pid], signal.SIGSTOP)
        yield
        self.stop([self.process.pid], signal.SIGCONT)

    async def clients(self) -> int:
        return (await self.ask("CLIENT", "LIST")).count(b"\n") - 1

    async def cut(self) -> None:
        for kind in ("normal", "pubsub"):
            await self.ask("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")

    async def empty(self) -> None:
        await self.ask("FLUSHALL")


def redis_client(url: str, **options: object) -> Any:
    return importlib.import_module("redis.asyncio").from_url(url, **options)


CELLAR: dict[type, Any] = {}  # servers of the tests' own, until pytest ends


@pytest.fixture(scope="session", autouse=True)
def cellar() -> Iterator[None]:
    yield
    for server in CELLAR.values():
        server.kill()
        shutil.rmtree(server.folder)


@contextmanager
def own_server(make: Any, folder: Path | None = None) -> Iterator[Any]:
    """A server that is up, and may be killed."""
    need_driver(make.kind)
    server = CELLAR[make] = CELLAR.get(make) or make()
    if server.process is None:
        server.begin()
    asyncio.run(asyncio.wait_for(server.ask(), 60))
    yield server


OWN = [functools.partial(own_server, make) for make in (PostgresServer, RedisServer)]


@pytest.fixture(params=OWN, ids=["postgres", "redis"])
def own(request: pytest.FixtureRequest) -> Iterator[Any]:
    with request.param() as server:
        yield server


def name_prefix() -> str:
    return f"t{os.urandom(5).hex()}"


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
class TestServers:
    """Faults of a server and of the way to it: the same on both, and of SQLite's file."""

    async def settled(self, group: Workers, runs: list[Run], outages: int) -> None:
        """Until all have ended, no tick is missing, and each process has said that the last outage is over."""
        await until(lambda: {run.id for run in runs} <= {event.id for event in group.events("end")})
        await until(lambda: -1 not in group.outages().values())
        await until(lambda: group.whole("tick", 500))
        assert [worker.poll() for worker in group.live] == [None] * len(group.live)
        assert set(group.outages().values()) == {outages}

    async def outages(self, workers: Start, place: Any, seconds: float) -> Workers:
        """Faults one after another, with runs of all lengths, some of which come due meanwhile. The lease is 5 s."""
        runs = list[Run]()
        async with Wire(place) as wire:
            group = workers(JOBS, port=wire.port, prefix=name_prefix(), lease="5s")
            group.start(3)
            await group.wait("start", 3)
            for n, fault in enumerate(place.faults(wire)[: None if seconds < 5 or THOROUGH else 1], 1):
                async with client(group) as here:
                    work = here.jobs["work"]
                    runs += [await work.submit(n, n % 8 / 8 * (seconds + 2)) for n in range(16)]
                    runs += [await work.after(n / 8 * seconds).submit(n) for n in range(8)]
                    await until(lambda: runs[-24].id in group.starts())  # noqa: B023
                    async with fault():
                        await asyncio.sleep(seconds)
                    await self.settled(group, runs, n)
            await group.stop()
        return group

    @on_each(LockedFile.at, *OWN)
    async def test_short_outage(self, workers: Start, place: Any) -> None:
        """Another program locks the file; a server is killed and restarted, frozen, cut off, or behind a firewall that
        forgets connections, for less than half of the lease: nothing is cancelled, nothing runs twice. Each process
        tells each outage once, and its end."""
        group = await self.outages(workers, place, 2)
        assert (group.events("cut"), group.check_repeats(lambda *_: False)) == ([], 0)

    @on_each(LockedFile.at, *OWN)
    async def test_long_outage(self, workers: Start, place: Any) -> None:
        """For longer than the lease: what runs is cancelled before it starts elsewhere, and all ends."""
        group = await self.outages(workers, place, 6.5)
        over = {(event.id, event.token): event.at for event in group.events("cut", "end")}
        assert group.events("cut")
        group.check_repeats(lambda first, again: over[first.id, first.token] <= again.at)

    @on_each(*OWN)
    async def test_lost_answers(self, workers: Start, place: Any) -> None:
        """A fifth of all answers is lost after the commit: all runs and ticks end, and each start is another attempt."""
        number = 1000 if THOROUGH else 80
        async with Wire(place) as wire:
            group = workers(JOBS, port=wire.port, prefix=name_prefix(), lease="5s")
            group.start(3)
            await group.wait("start", 3)
            wire.loss = 0.2
            async with client(group) as here:
                runs = [await here.jobs["work"].submit(n) for n in range(number)]
                await until(lambda: {run.id for run in runs} <= {event.id for event in group.events("end")})
                wire.loss = 0.0
                assert [(await run.result(30))[0] for run in runs] == [*range(number)]
                await until(lambda: group.whole("tick", 500))
            await group.stop()
        assert wire.lost > number / 4
        assert group.check_repeats(lambda first, again: first.attempt < again.attempt) <= number / 20

    @on_each(*OWN)
    async def test_hints_kept_back(self, workers: Start, place: Any) -> None:
        """Where no hint arrives, though their connection looks whole, all is found by looking: what others submit, what
        is due again, what is to be cancelled, and the ticks."""
        async with Wire(place) as wire:
            wire.kept_back = True
            group = workers(JOBS, port=wire.port, prefix=name_prefix())
            group.start(2)
            await group.wait("start", 2)
            async with client(group) as here:
                work = here.jobs["work"]
                runs, long = [await work.submit(0), await work.after("1s").submit(1)], await work.submit(2, 600)
                assert [(await run.result(20))[0] for run in runs] == [0, 1]
                await until(lambda: long.id in group.starts())
                assert await long.cancel()
                with pytest.raises(RunCancelled):
                    await long.result(20)
                await self.settled(group, runs, 0)
            await group.stop()
        assert group.check_repeats(lambda *_: False) == 0

    @in_a_loop
    async def test_not_there(self, own: Any, caplog: pytest.LogCaptureFixture) -> None:
        """A server that isn't there at the start is an outage like any other; a submit says so after 5 s. One that is
        emptied is begun anew. Connections that break while they are idle cost nothing, and none is left at the end."""
        own.kill()
        work = Work(every="200ms", overlap="all")
        registries, (job, *_) = instances(2, work)
        async with going(own.url(prefix=name_prefix()), *registries):
            await until(lambda: caplog.text.count("store unreachable") == 2)
            with pytest.raises(StoreError, match=r"submit\(\): the store is unreachable for 5 s: "):
                await job.submit(1)
            own.begin()
            await until(lambda: caplog.text.count("store back") == 2)
            assert await (await job.submit(2)).result(20) == 2
            await own.empty()
            number = len(work.begun)
            await until(lambda: len(work.begun) > number + 2)
            caplog.clear()
            await own.cut()
            assert await (await job.submit(3)).result(20) == 3
            assert await (await job.after("100ms").submit(4)).result(20) == 4
        assert len(set(work.ticks)) == len(work.ticks)
        while await own.clients():  # one that was closed is gone a moment later  # noqa: ASYNC110
            await asyncio.sleep(0.02)

    @pytest.mark.parametrize(("kind", "driver"), [("postgres", "asyncpg"), ("redis", "redis.asyncio")])
    def test_missing_driver(self, kind: str, driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without the driver the error says what to install."""
        monkeypatch.setitem(sys.modules, driver, None)
        url = {"postgres": "postgresql://127.0.0.1", "redis": "redis://127.0.0.1"}[kind]
        with pytest.raises(StoreError, match=rf"^this store needs {driver}: pip install 'bgjob\[{kind}\]'$"):
            asyncio.run(Registry().run(store=url))

    @pytest.mark.parametrize("kind", ["postgres", "redis"])
    @in_a_loop
    async def test_untrusted(self, tmp_path: Path, kind: str) -> None:
        """A server whose certificate isn't trusted is one clear line at once, without a password; it is no outage."""
        need_driver(kind)
        if shutil.which("openssl") is None:
            refuse_server("no openssl, which makes certificates")
        make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=localhost"
        for name in ("trusted", "shown"):
            files = ["-keyout", tmp_path / f"{name}.key", "-out", tmp_path / name]
            subprocess.run([*make.split(), *files], check=True, capture_output=True)  # noqa: ASYNC221
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / "shown", tmp_path / "shown.key")

        async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with suppress(OSError, asyncio.IncompleteReadError):
                await reader.readexactly(8)  # "is there TLS?"
                writer.write(b"S")
                await writer.start_tls(context)
            writer.transport.abort()

        listener = await asyncio.start_server(greet, "127.0.0.1", 0, ssl=context if kind == "redis" else None)
        place = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        url = {
            "postgres": f"postgresql://u:s3cret@{place}/d?sslmode=verify-ca&sslrootcert={tmp_path}/trusted",
            "redis": f"rediss://:s3cret@{place}?ssl_ca_certs={tmp_path}/trusted",
        }[kind]
        with pytest.raises(StoreError, match=f"{place}.*CERTIFICATE_VERIFY_FAILED") as caught:
            await Registry().run(store=url)
        assert not isinstance(caught.value, bgjob.Unreachable)
        assert "s3cret" not in "".join(traceback.format_exception(caught.value))
        listener.close()
        await until(lambda: len(asyncio.all_tasks()) == 1)


async def refusal(url: str) -> str:
    """What is said at once, in one line and without a password, of a store that can't be used."""
    registry = Registry()
    Work(every="1h", immediate=True)(registry)
    with pytest.raises(BgjobError) as caught:
        await registry.run(store=url)
    assert not isinstance(caught.value, bgjob.Unreachable)
    shown = "".join(traceback.format_exception(caught.value))
    assert not re.search("s3cret|s3:cret|w@rd|wr0ng", shown), shown
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Pooler(Wire):
    """What PgBouncer does in transaction mode, at its worst: every transaction meets another session of the server."""

    async def answers(self, there: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        """All messages, until the session is ready and in no transaction."""
        with suppress(OSError, asyncio.IncompleteReadError):
            message = b""
            while message[:1] + message[5:] != b"ZI":
                head = await there.readexactly(5)
                message = head + await there.readexactly(int.from_bytes(head[1:]) - 4)
                sink.write(message)

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.tasks[asyncio.current_task()] = writers = [writer]
        sessions, answering = [], None
        with suppress(OSError, asyncio.IncompleteReadError):
            startup = await reader.readexactly(8)
            if startup[4:] == b"\x04\xd2\x16\x2f":  # "is there TLS?"
                writer.write(b"N")
                startup = await reader.readexactly(8)
            startup += await reader.readexactly(int.from_bytes(startup[:4]) - 8)
            for n in range(3):
                there, back = await asyncio.open_unix_connection(self.server.folder / f".s.PGSQL.{self.server.port}")
                back.write(startup)
                await self.answers(there, writer if n == 0 else Void())
                sessions.append((there, back))
                writers.append(back)
            while (chunk := await reader.read(1 << 20)) and chunk[:1] != b"X":
                if answering is None or answering.done():
                    sessions.append(sessions.pop(0))
                    answering = asyncio.create_task(self.answers(sessions[0][0], writer))
                sessions[0][1].write(chunk)
        if answering is not None:
            answering.cancel()
            await asyncio.wait({answering})
        for one in self.tasks.pop(asyncio.current_task()):
            one.transport.abort()


class Void:
    def write(self, data: bytes) -> None: ...


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("own", OWN[:1], indirect=True, ids=["postgres"])
class TestPostgres:
    """What only PostgreSQL, and the way to it, can do to its users."""

    @in_a_loop
    async def test_refusals(self, own: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What doesn't pass by itself is one clear line at once, without a password: also a right that is missing."""
        monkeypatch.setenv("HOME", str(tmp_path))
        there, good, guest, prefix = f"127.0.0.1:{own.port}/postgres", own.url(), name_prefix(), name_prefix()
        async with going(own.url(prefix=prefix), *instances(1, Work(every="1h"))[0]):
            pass
        await own.ask(f"CREATE ROLE {guest} LOGIN PASSWORD '{own.PASSWORD}'")
        await own.ask(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {guest}")
        cases = {
            good.replace(
                "s3cret%2Fw%40rd", "wr0ng"
            ): f'//…@{there}\'): password authentication failed for user "postgres"',
            good.replace("/postgres?", "/nope?"): 'database "nope" does not exist',
            own.url(user=guest, prefix="new"): "permission denied for schema public",
            own.url(user=guest, prefix=prefix): "permission denied",
            f"{good}sslmode=s3cret": "sslmode",
            f"{good}sslmode=verify-full": "root.crt",
            f"{good}sslmode=verify-ca&sslrootcert=/no%2Fwhere": "/no/where",
            f"{good}sslmode=verify-ca&sslrootcert={__file__}": "[X509: NO_CERTIFICATE_OR_CRL_FOUND]",
            f"postgresql://postgres:{own.PASSWORD}@{there}": "the URL can't be read; of : / ? # @ in a password write %3A",
            f"{good}nonsense=1": 'unrecognized configuration parameter "nonsense"',
            f"{good}keep=0s": "keep=",
            f"{good}prefix=A": "prefix='A'",
        }
        for url, text in cases.items():
            assert text in (said := await refusal(url)), (url, said)

    @pytest.mark.parametrize("size", [1, 4])
    @in_a_loop
    async def test_ready_pool(self, own: PostgresServer, caplog: pytest.LogCaptureFixture, size: int) -> None:
        """A ready pool is used, and left open and whole. Jobs that hold all of its connections for longer than the lease
        starve nobody's beats."""
        asyncpg = importlib.import_module("asyncpg")
        registry, begun = Registry(), list[int]()
        async with asyncpg.create_pool(own.url(), min_size=1, max_size=size) as pool:

            @registry.job(parallelism=3)
            async def report(n: int) -> int:
                begun.append(n)
                if size > 1:
                    async with pool.acquire() as db:
                        await db.fetch("SELECT pg_sleep(3)")
                return n

            async with registry.running(store=PostgresStore(pool, prefix=name_prefix(), lease="2s")):
                runs = [await report.submit(n) for n in range(3)]
                assert [await run.result(30) for run in runs] == [0, 1, 2]
            assert sorted(begun) == [0, 1, 2]
            assert await pool.fetchval("SELECT 1") == 1
            assert pool.get_size() == pool.get_idle_size()
        assert "lease lost" not in caplog.text

    @in_a_loop
    async def test_pooler(self, own: PostgresServer) -> None:
        """Behind a pooler in transaction mode all verbs work; what others submit is found."""
        async with Pooler(own) as pooler:
            url = own.url(port=pooler.port, prefix=name_prefix())
            (client, worker), (job, _) = instances(2, Work(parallelism=5))
            async with going(url, client, jobs=[]), going(url, worker):
                runs = [await job.submit(n) for n in range(20)]
                assert [await run.result(20) for run in runs] == [*range(20)]
                assert (await job.after("1h", key="k").submit(1)).id == (await job.after("1h", key="k").submit(2)).id
                assert await job.cancel() == 1


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("own", OWN[1:], indirect=True, ids=["redis"])
class TestRedis:
    """What only Redis can do to its users."""

    @in_a_loop
    async def test_refusals(self, own: RedisServer) -> None:
        """A wrong URL, password, database or right is one clear line at once, without the password."""
        await own.ask("ACL", "SETUSER", "weak", "on", ">s3cret", "~*", "+info", "&*")
        await own.ask("ACL", "SETUSER", "deaf", "on", ">s3cret", "~*", "+@all", "resetchannels")
        await own.ask("ACL", "SETUSER", "closed", "on", ">s3cret", "resetkeys", "~other*", "+@all", "&*")
        place = f"127.0.0.1:{own.port}"
        cases = {
            "redis://:s3cret@h/x": "'redis://…@h/x': after the host comes the number of a database, as in redis://host:6379/0",
            "redis://:s3:cret#@h?bogus=1&password=s3cret": "not a URL that redis-py can read; is the password percent-enc",
            "redis://u:s3cret@h?bogus=1": "keyword argument 'bogus'",
            "rediss://u:s3cret@h?ssl_cert_reqs=x": "Requirements Flag: x",
            "rediss://u:s3cret@h?ssl_ca_certs=/x": "No such file or directory",
            "redis://u:s3cret@h?prefix=A": "prefix='A': write up to 30 of a-z, 0-9 and _, a letter first",
            f"redis://weak:s3cret2@{place}": "invalid username-password pair or user is disabled.",
            f"redis://{place}/99": "DB index is out of range",
            f"redis://weak:s3cret@{place}": "this user has no permissions to run the '",
            f"redis://deaf:s3cret@{place}": "this user has no permissions to access one of the channels",
            f"redis://closed:s3cret@{place}": "ermission",
        }
        for url, text in cases.items():
            assert text in (said := await refusal(url)), (url, said)
        for client in (5, importlib.import_module("redis").Redis.from_url(own.url())):
            with pytest.raises(StoreError, match=r"pass a URL or a redis.asyncio.Redis"):
                await Registry().run(store=RedisStore(client))

    @in_a_loop
    async def test_memory(self, own: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
        """A server that would delete runs to free memory is refused; one that never frees any, or has no limit, isn't; one
        that forgets runs at a restart is warned of. A user who may not ask for such settings can use it all the same."""
        await own.ask("ACL", "SETUSER", "app", "on", ">pw", "~*", "&*", "+@all", "-@dangerous")
        await own.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru", "maxmemory", "1gb", "appendonly", "no")
        try:
            assert "maxmemory-policy noeviction" in await refusal(own.url())
            for url, warned in ((own.url().replace("//", "//app:pw@"), False), (own.url(), True)):
                (registry,), (job,) = instances(1, Work())
                async with registry.running(store=url):
                    assert await (await job.submit(1)).result(20) == 1
                assert ("set appendonly yes" in caplog.text) == warned
                await own.ask("CONFIG", "SET", "maxmemory", "0")
        finally:
            await own.ask("CONFIG", "SET", "maxmemory-policy", "noeviction", "maxmemory", "0", "appendonly", "yes")

    @pytest.mark.parametrize("options", [{}, {"decode_responses": True}, {"protocol": 3}, {"max_connections": 2}])
    @in_a_loop
    async def test_ready_client(self, own: RedisServer, options: dict[str, Any]) -> None:
        """A client that is there already is as good as a URL, whatever its settings, and isn't closed. A server that
        forgets the scripts is told them again."""
        client = redis_client(own.url(), **options)
        (registry,), (job,) = instances(1, Work())
        async with registry.running(store=RedisStore(client, prefix=name_prefix())):
            for n in range(3):
                await own.ask("SCRIPT", "FLUSH")
                assert await (await job.submit(n)).result(20) == n
        assert await client.ping()
        await client.aclose()


# 11 Command line ------------------------------------------------------------------------------------------------------

LISTED = """
import asyncio
from bgjob import job
@job(every="5m")
async def sync_products(): ...
@job(cron="0 6 * * mon-fri", tz="Europe/Rome")
async def morning_report(): ...
@job(after="10s")
async def warm_up(): ...
@job
async def send_mail(to: str, n: int = 1):
    return {"to": to, "n": n}
@job
async def fail():
    raise ValueError("no such\\x1b[2J user\\nsecond line")
@job(retries=1, retry_delay="1h")
async def again():
    raise OSError("503")
@job(timeout="5m")
async def sleep():
    await asyncio.sleep(600)
@job
async def stay():
    print("stays")
    while True:
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError: ...
"""
COMMAND = [sys.executable, "-P", "-c", "import bgjob, sys; sys.exit(bgjob.main())"]
STORE = ("--store", "sqlite:///jobs.db")
needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="sends signals")


class Project:
    """A folder with modules, in which the command line is used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        unset = ("COLUMNS", "NO_COLOR", "PYTHONPATH", "PYTHONUNBUFFERED")
        self.environment = {name: value for name, value in os.environ.items() if name not in unset}
        if not INSTALLED:
            self.environment["PYTHONPATH"] = os.path.dirname(bgjob.__file__)
        self.write("jobs.py", LISTED)

    def write(self, name: str, text: str) -> None:
        (self.path / name).parent.mkdir(exist_ok=True)
        (self.path / name).write_text(text, encoding="utf-8")

    def start(self, *command: str, **more: str) -> Any:
        return subprocess.Popen(command, cwd=self.path, env={**self.environment, **more}, text=True, encoding="utf-8",
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip

    def bgjob(self, *arguments: str, **more: str) -> tuple[int, str, str]:
        process = self.start(*COMMAND, *arguments, **more)
        out, err = process.communicate(timeout=30)
        return process.returncode, out, err

    def data(self, *arguments: str, **more: str) -> str:
        status, out, err = self.bgjob(*arguments, **more)
        assert (status, err) == (0, "")
        return out

    @contextmanager
    def running(self, *arguments: str) -> Iterator[Any]:
        process = self.start(*COMMAND, "run", "jobs.py", *STORE, *arguments)
        try:
            assert " INFO    bgjob " in process.stderr.readline()
            yield process
        finally:
            process.kill()
            process.communicate()

    def until(self, state: str, number: int) -> list[dict[str, object]]:
        """The runs of a state in `status --json`, once there are that many."""
        rows: list[dict[str, object]] = []
        for _ in range(100):
            rows = json.loads(self.data("status", "--json", *STORE))[state]
            if len(rows) == number:
                return rows
        raise AssertionError(rows)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


class TestCommandLine:
    def test_list(self, project: Project) -> None:
        """`list` in a pipe: jobs, schedules, ticks, and a strip of the next 24 hours, in 80 columns, without colours."""
        out = project.data("list", "jobs.py", "-n", "3", PYTHONIOENCODING="ascii")
        assert max(map(len, out.splitlines())) <= 80
        day, zone = r"\w{3} \d\d \w{3}", r"CES?T"
        table, strip = re.sub(r"\n {10,}", " ", out).split("\n\n")
        lines = [
            r"JOB +SCHEDULE +NEXT",
            rf"sync_products +every 5m +(in \S+|now): {day} .*\d\d:\d5.* UTC",
            rf"morning_report +0 6 \* \* mon-fri Europe/Rome +in \S+: ({day} 06:00,? ){{3}}{zone}",
            r"warm_up +10s after the start",
            *[rf"{name} +on submit" for name in ("send_mail", "fail", "again", "sleep", "stay")],
            rf"24 HOURS \({zone}\)  (\d\d    ){{7}}\d\d",
            r"sync_products +[·▁-▆]{2}▆{46}",
            r"morning_report +·*▁?·*",
            r"together +[·▁]*[▁▂]▁*",
        ]
        for line, wanted in zip([*table.splitlines(), *strip.splitlines()], lines, strict=True):
            assert re.fullmatch(wanted, line), line
        narrow = project.data("list", "jobs.py", COLUMNS="66")
        assert len(re.findall(rf"{day} 06:00(?:,| {zone})", narrow)) == 5  # no tick is torn

    @needs_signals
    @pytest.mark.parametrize(("more", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
    def test_colours(self, project: Project, more: dict[str, str], coloured: bool) -> None:
        """Colours on a terminal only, and not where NO_COLOR forbids them."""
        import pty

        ours, theirs = pty.openpty()
        subprocess.run([*COMMAND, "list", "jobs.py"], cwd=project.path, env={**project.environment, **more},
                       stdout=theirs, check=True, timeout=30)  # fmt: skip
        os.close(theirs)
        assert (b"\x1b[1m" in os.read(ours, 100)) is coloured
        os.close(ours)

    def test_copied_file(self, project: Project) -> None:
        """A copied file has one registry with what it imports: as a script, as a module, and in a package by its path."""
        source = Path(bgjob.__file__).read_text(encoding="utf-8")
        for name, text in {"bgjob.py": source, "app/bgjob.py": source, "app/__init__.py": ""}.items():
            project.write(name, text)
        project.write("app/jobs.py", LISTED.replace("from bgjob", "from .bgjob"))
        project.environment.pop("PYTHONPATH", None)
        for command in ("bgjob.py list jobs.py", "-m app.bgjob list app.jobs", "app/bgjob.py list app/jobs.py"):
            process = project.start(sys.executable, *command.split())
            out, err = process.communicate(timeout=30)
            assert (process.returncode, err) == (0, ""), command
            assert "sync_products" in out
        wrong = project.start(sys.executable, "bgjob.py", "list", "app.jobs")
        says = f"app.jobs: no jobs of {project.path}/bgjob.py there; decorate functions with its @job"
        assert (*wrong.communicate(timeout=30), wrong.returncode) == ("", f"bgjob: {says}\n", 1)

    def test_registries(self, project: Project) -> None:
        """A target's jobs are those of the one registry that has some; a path may be in a package."""
        project.write("app/__init__.py", "")
        project.write("app/other.py", "from bgjob import Registry\nmail = Registry()\n@mail.job\ndef b(): ...")
        project.write("app/jobs.py", "from .other import mail\n@mail.job\ndef a(): ...")
        for target in ("app/jobs.py", "app.jobs"):
            assert re.findall(r"^(\w+) +on submit", project.data("list", target), re.MULTILINE) == ["b", "a"]

    @pytest.mark.parametrize(
        ("arguments", "status", "message"),
        [
            ("list", 2, "missing a required argument: 'target'; see bgjob --help"),
            ("lits jobs.py", 2, "lits: no such command; write one of run, list, submit, status, cancel"),
            ("list jobs.py -n 0", 2, "-n=0: write a whole number, 1 or more"),
            ("list jbos.py", 1, "jbos.py: {missing}"),
            ("list empty.py", 1, "empty.py: no jobs of {bgjob} there; decorate functions with its @job"),
            ("list two.py", 1, "two.py: jobs in several registries; write a module for each"),
            ("run jobs.py --jobs stay,fial", 1, "jobs=['fial']: no such job; the registered ones are: {known}"),
            ("run jobs.py --drain 5x", 2, "drain='5x': {duration}"),
            ("run jobs.py --store sqlite:///no/x.db", 1,
             "SQLiteStore('no/x.db'): unable to open database file; its folder must exist and be writable"),
            ("run jobs.py --store sqlite:///x.db?lease=3q", 2, "lease='3q': {duration}"),
            ("submit jobs.py send_mial --store sqlite:///x.db", 1, "job 'send_mial': no such job; there is {jobs}"),
            ("submit jobs.py send_mail --store sqlite:///x.db --after soon", 2, "job 'send_mail': after='soon': {duration}"),
            ("submit jobs.py send_mail --store sqlite:///x.db --args {", 2, "--args='{{': {json}"),
            ("status --stroe sqlite:///x.db", 2, "option --stroe not recognized; see bgjob --help"),
            ("status --store sqlite:///x.db", 1,
             "SQLiteStore('x.db'): no such file in {here}; the first run() or submit makes it"),
            ("status --store sqlite://u:se@cret@h/x", 1,
             "store='sqlite://…@h/x': write sqlite:///jobs.db, or sqlite:////var/lib/jobs.db where absolute"),
            ("redis://:se/cret@h", 2, "redis://…@h: no such command; write one of run, list, submit, status, cancel"),
        ],
    )  # fmt: skip
    def test_mistakes(self, project: Project, arguments: str, status: int, message: str) -> None:
        """A user's mistake is one line on stderr that says what to write instead; a password isn't in it."""
        project.write("empty.py", "")
        project.write("two.py", "from bgjob import *\na, b = Registry(), Registry()\n@a.job\n@b.job\ndef f(): ...")
        known = "sync_products, morning_report, warm_up, send_mail, fail, again, sleep, stay"
        duration = "not a duration; write seconds (90), a timedelta, or text such as '30s' or '1h30m'"
        wanted = message.format(
            known=known, jobs=known.replace(", ", " or "), here=project.path, bgjob=bgjob.__file__, duration=duration,
            missing=f"not found in {project.path}; write a module (app.jobs) or a path (jobs.py)",
            json="""write a JSON array, '["a@b.c"]', or an object, '{"to": "a@b.c"}'""",
        )  # fmt: skip
        got, out, err = project.bgjob(*arguments.split())
        assert (got, out, err.replace("; the units are d, h, m, s and ms", "")) == (status, "", f"bgjob: {wanted}\n")
        assert not (project.path / "x.db").exists()

    @pytest.mark.parametrize(
        ("source", "files", "last"),
        [
            ("def f():\n    raise ValueError('boom')\nf()", 2, "ValueError: boom"),
            ("import nosuchthing", 1, "ModuleNotFoundError: No module named 'nosuchthing'"),
            ("import sys\nsys.exit(3)", 1, "SystemExit: 3"),
            ("def (", 1, "SyntaxError: invalid syntax (broken.py, line 1)"),
        ],
    )
    def test_broken_target(self, project: Project, source: str, files: int, last: str) -> None:
        """A module that fails to import shows its own traceback, which begins in it, and one line that says so."""
        project.write("broken.py", source)
        status, out, err = project.bgjob("list", "broken.py")
        assert (status, out) == (1, "")
        assert err.splitlines()[-1].startswith(f"bgjob: broken.py: its import failed: {last}")
        shown = re.findall(r'File "(.*?)"', err)
        assert shown[:files] == [str(project.path / "broken.py")] * files

    def test_help(self, project: Project) -> None:
        """`bgjob --help`, also after a command, is a page of 80 columns with every command and option."""
        page = project.data("--help")
        assert project.data("list", "--help") == project.data() == page
        assert [line for line in page.splitlines() if len(line) > 80] == []
        assert re.findall(r"^bgjob (\w+)", page, re.MULTILINE) == ["run", "list", "submit", "status", "cancel"]
        assert project.data("--version") == f"bgjob {bgjob.__version__}\n"

    @needs_signals
    def test_closed_pipe(self, project: Project) -> None:
        """`| head` ends it without a word."""
        process = project.start(*COMMAND, "list", "jobs.py")
        process.stdout.close()
        assert process.stderr.read() == ""
        process.wait(20)
        process.stderr.close()

    @needs_signals
    def test_a_service(self, project: Project) -> None:
        """Run, submit, status and cancel beside each other: what is printed, and the exit status of each."""
        with project.running("--drain", "1") as process:
            sleeping, again = (project.data("submit", "jobs.py", name, *STORE).strip() for name in ("sleep", "again"))
            later = project.data("submit", "jobs.py", "send_mail", "--args", '["a"]', "--after", "1h", *STORE).strip()
            mail = ("submit", "jobs.py", "send_mail", "--args", '{"to": "a@b.c", "n": 3}', "--wait", *STORE)
            assert json.loads(project.data(*mail)) == {"to": "a@b.c", "n": 3}
            status, out, err = project.bgjob("submit", "jobs.py", "fail", "--wait", *STORE)
            assert (status, out) == (1, "")
            assert re.fullmatch(r"bgjob: run '\S+' failed: ValueError: no such \[2J user\n", err)
            assert project.bgjob("submit", "jobs.py", "send_mail", *STORE)[:2] == (1, "")
            (run,) = project.until("running", 1)
            assert (run["id"], run["attempt"], run["timeout"]) == (sleeping, 1, 300.0)
            assert str(run["owner"]).split(":")[1] == str(process.pid)
            (run,) = project.until("retrying", 1)
            assert (run["id"], run["error"]) == (again, "OSError: 503")
            (failed,) = project.until("failed", 1)
            assert {str(run["job"]): run["id"] for run in project.until("due", 3)}["send_mail"] == later
            page = project.data("status", *STORE)
            assert max(map(len, page.splitlines())) <= 80
            text = " ".join(page.split())
            for row in (
                r"running \S+( ago)? 1 sleep \S+ on \S+:\d+, [01]% of 5m",
                r"due in \S+ (sync|morning)_\S+@\S+Z .*due in \S+ send_mail \S+",
                r"retrying in \S+ 1 again \S+: OSError: 503 failed \S+( ago)? 1 fail \S+: ValueError: no such \[2J user$",
            ):
                assert re.search(row, text), text
            for run_id in (sleeping, later):
                assert project.data("cancel", run_id, *STORE) == f"{run_id} cancelled on request\n"
            ended, unknown = "it has ended already: failed", "the store knows none; bgjob status shows ids"
            for run_id, why in ((str(failed["id"]), ended), ("nope", unknown)):
                assert project.bgjob("cancel", run_id, *STORE) == (1, "", f"bgjob: run '{run_id}': {why}\n")
            process.send_signal(signal.SIGTERM)
            log = process.communicate(timeout=20)[1]
            assert process.returncode == 0
        moment = r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
        assert "\x1b" not in log
        assert re.search(rf"{moment} INFO    send_mail \S+ succeeded in [\d.]+ s$", log, re.MULTILINE)
        assert re.search(rf"{moment} ERROR   fail \S+ failed at attempt 1: ValueError: no such", log, re.MULTILINE)

    @needs_signals
    def test_ctrl_c(self, project: Project) -> None:
        """A second Ctrl-C doesn't wait for what is going, and the exit status tells. A task that swallows every
        cancellation is named, and then left with the process; what it printed is not lost."""
        for job, drain, says, wanted in (
            ("sleep", "20s", "handed back", (130, "")), ("stay", "0", "would not stop", (0, "stays\n"))
        ):  # fmt: skip
            with project.running("--jobs", job, "--drain", drain) as process:
                project.data("submit", "jobs.py", job, *STORE)
                project.until("running", 1)
                process.send_signal(signal.SIGINT)
                if drain != "0":
                    assert re.search(r"draining 1 runs?, at most 20 s", process.stderr.readline())
                    process.send_signal(signal.SIGINT)
                out, log = process.communicate(timeout=20)
                assert says in log
                assert (process.returncode, out) == wanted
