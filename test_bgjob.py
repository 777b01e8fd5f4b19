"""The tests of bgjob, in the order of its rooms; a test's docstring is the rule it guards."""

import ast
import asyncio
import calendar
import contextlib
import functools
import gc
import hashlib
import heapq
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import ssl
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import weakref
import zoneinfo
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    closing,
    contextmanager,
    suppress,
)
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode, urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bgjob
from bgjob import (
    BgjobError,
    Depends,
    Job,
    Registry,
    Run,
    RunCancelled,
    RunFailed,
    ScheduleError,
    SQLiteStore,
    State,
    StoreError,
    _count,
    _Cron,
    _duration,
    _Every,
    _minutes,
    _newest,
    _no_password,
    _print_table,
    _relative,
    _retry_delay,
    _schedule_words,
    _spread,
    _strip,
    _tick_words,
    _verdict,
    _words,
    _zone,
    current_run,
)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as of `pytest &` in a script; the processes of tests inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000
# so many random schedules, and minutes of faults for seconds
THOROUGH = int(os.environ.get("BGJOB_TEST_THOROUGH", "0"))


def at(*parts: int, zone: str = "UTC", fold: int = 0) -> int:
    """The instant of a reading, in milliseconds."""
    return (datetime(*parts, tzinfo=zoneinfo.ZoneInfo(zone), fold=fold) - EPOCH) // timedelta(milliseconds=1)


def upto(last: int, found: Iterator[int]) -> list[int]:
    return [*takewhile(lambda tick: tick <= last, found)]


def shown(instant: int, zone: tzinfo) -> str:
    return (EPOCH + timedelta(milliseconds=instant)).astimezone(zone).strftime("%d %H:%M:%S %z").replace(":00 ", " ")


def ticks(text: str, zone: str, after: int, until: int) -> list[str]:
    """Ticks of a cron text as "day time offset", seconds only where there are some."""
    cron = _Cron(text, _zone(zone))
    return [shown(tick, cron.zone) for tick in upto(until, cron.ticks(after))]


def first(text: str, number: int, after: int = at(2025, 1, 1)) -> list[str]:
    """The first ticks in UTC after the start of 2025, as dates and times."""
    found = islice(_Cron(text, UTC).ticks(after), number)
    return [f"{EPOCH + timedelta(milliseconds=tick):%m-%d %H:%M}" for tick in found]


def same(one: str, other: str) -> bool:
    start = at(2023, 12, 31, 23)
    return [*islice(_Cron(one, UTC).ticks(start), 40)] == [*islice(_Cron(other, UTC).ticks(start), 40)]


class TestZones:
    def test_nothing_is_imported_before_it_is_needed(self) -> None:
        """Neither croniter nor zoneinfo is imported with the module, nor for "UTC" and "local"."""
        code = (
            "import bgjob, sys; bgjob._zone('UTC'); bgjob._zone('local'); bgjob._Every(5);"
            "sys.exit(bool({'croniter', 'zoneinfo'} & set(sys.modules)))"
        )
        assert subprocess.run([sys.executable, "-c", code], cwd=os.path.dirname(__file__)).returncode == 0

    def test_names_and_zones(self) -> None:
        """ "UTC" is datetime's own, other names are zoneinfo's, a tzinfo is taken as it is."""
        assert _zone("UTC") is UTC
        assert _zone("Europe/Rome") is zoneinfo.ZoneInfo("Europe/Rome")
        offset = timezone(timedelta(hours=2))
        assert _zone(offset) is offset

    def test_unfinished_tzinfo(self) -> None:
        """A tzinfo that can't tell the time is refused at once, with its own error as the cause."""

        class Unfinished(tzinfo):
            def utcoffset(self, when: datetime | None) -> timedelta:
                return timedelta(hours=1)

        with pytest.raises(ScheduleError, match=r"tz=.*: gives no offset from UTC \(.*; write an IANA name") as caught:
            _zone(Unfinished())
        assert isinstance(caught.value.__cause__, NotImplementedError)

    def test_pytz_zones_are_taken_by_name(self) -> None:
        """A pytz zone doesn't know fold, so its namesake of zoneinfo is used."""

        class Pytz(tzinfo):
            localize = None

            def __str__(self) -> str:
                return "Europe/Rome"

        assert _zone(Pytz()) is zoneinfo.ZoneInfo("Europe/Rome")

    @pytest.mark.parametrize(
        ("tz", "message"),
        [
            ("Europe/Roma", "tz='Europe/Roma': unknown time zone; did you mean 'Europe/Rome'?"),
            ("europe/rome", "tz='europe/rome': unknown time zone; did you mean 'Europe/Rome'?"),
            ("utc", "tz='utc': unknown time zone; did you mean 'UTC'?"),
            ("", "tz='': unknown time zone; use an IANA name such as 'Europe/Rome', 'local' or a tzinfo"),
            ("/etc/x", "tz='/etc/x': unknown time zone; use an IANA name such as 'Europe/Rome', 'local' or a tzinfo"),
            (
                "../x\0",
                "tz='../x\\x00': unknown time zone; use an IANA name such as 'Europe/Rome', 'local' or a tzinfo",
            ),
            (5, "tz=5: must be an IANA name such as 'Europe/Rome', 'local' or a tzinfo"),
            (None, "tz=None: must be an IANA name such as 'Europe/Rome', 'local' or a tzinfo"),
        ],
    )
    def test_messages(self, tz: object, message: str) -> None:
        """A zone that isn't there is refused with the value seen and a remedy."""
        with pytest.raises(ScheduleError) as caught:
            _zone(tz)
        assert str(caught.value) == message

    @pytest.mark.parametrize("tz", ["Europe", "x" * 5000, "Europe/Rome/x", "\ud800"])
    def test_no_other_error(self, tz: str) -> None:
        """A folder, an endless name, a lone surrogate are errors of the schedule too."""
        with pytest.raises(ScheduleError):
            _zone(tz)

    def test_without_a_zone_database(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where there is no zone database, the message says what to install."""
        monkeypatch.setattr(zoneinfo, "available_timezones", set)
        with pytest.raises(ScheduleError, match=r"^tz='No/Where': there is no zone database here; pip install tzdata$"):
            _zone("No/Where")

    @pytest.mark.skipif(not hasattr(time, "tzset"), reason="this system can't change its zone within a process")
    @pytest.mark.parametrize("name", ["Europe/Rome", "Australia/Lord_Howe", "America/Santiago", "Europe/Dublin"])
    def test_local_reads_as_the_machine(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """ "local" maps like the named zone in both directions, in gaps and overlaps too."""
        monkeypatch.setenv("TZ", name)
        time.tzset()
        try:
            local, named = _zone("local"), zoneinfo.ZoneInfo(name)
            assert repr(local) == str(local) == "local"
            assert local.utcoffset(None) is local.dst(None) is None
            for instant in (EPOCH + timedelta(minutes=10 * n) for n in range(2_895_000, 2_948_000, 9)):
                ours, theirs = instant.astimezone(local), instant.astimezone(named)
                assert ours.replace(tzinfo=None) == theirs.replace(tzinfo=None)
                assert ours.fold == theirs.fold
                assert ours.tzname() == theirs.tzname()
                for fold in (0, 1):
                    wall = ours.replace(tzinfo=None, fold=fold)
                    moved = wall + timedelta(hours=1)
                    assert wall.replace(tzinfo=local).utcoffset() == wall.replace(tzinfo=named).utcoffset()
                    assert moved.replace(tzinfo=local).utcoffset() == moved.replace(tzinfo=named).utcoffset()
            for text, start in [("30 2 * * *", 1), ("15 0,1 * * *", 1), ("*/30 * * * *", 4), ("*/30 * * * *", 10)]:
                here = islice(_Cron(text, local).ticks(at(2025, start, 1)), 600)
                assert [*here] == [*islice(_Cron(text, named).ticks(at(2025, start, 1)), 600)]
        finally:
            monkeypatch.undo()
            time.tzset()


ALIASES = "@yearly @annually @monthly @weekly @daily @midnight @hourly"
LAYOUT = (
    "must be 5 fields (minute, hour, day of month, month, day of week), 6 with seconds first, or an alias like @daily"
)
MESSAGES = {
    "61 * * * *": "minute must be 0-59, got 61",
    "60 * * * * *": "second must be 0-59, got 60",
    "* 24 * * *": "hour must be 0-23, got 24",
    "* * 0 * *": "day of month must be 1-31, got 0",
    "* * 32 * *": "day of month must be 1-31, got 32",
    "* * * 13 *": "month must be 1-12 or JAN-DEC, got 13",
    "* * * foo *": "month must be 1-12 or JAN-DEC, got 'FOO'",
    "* * * * 8": "day of week must be 0-7 or SUN-SAT, got 8",
    "* * * * MONDAY": "day of week must be 0-7 or SUN-SAT, got 'MONDAY'",
    "* * * * L": "day of week must be 0-7 or SUN-SAT, got 'L'",
    "MON * * * *": "minute must be 0-59, got 'MON'",
    "? * * * *": "minute must be 0-59, got '?'",
    "-1 * * * *": "minute must be 0-59, got '-1'",
    "5- * * * *": "minute must be 0-59, got '5-'",
    "5-61 * * * *": "minute must be 0-59, got 61",
    "1.5 * * * *": "minute must be 0-59, got '1.5'",
    "1-2-3 * * * *": "minute must be 0-59, got '1-2-3'",
    "*-5 * * * *": "minute must be 0-59, got '*-5'",
    "** * * * *": "minute must be 0-59, got '**'",
    "1_0 * * * *": "minute must be 0-59, got '1_0'",
    "*/61 * * * *": "step of minute must be 1-60, got 61",
    "*/0 * * * *": "step of minute must be 1-60, got 0",
    "*/ * * * *": "step of minute must be 1-60, got '*/'",
    "*/2/3 * * * *": "step of minute must be 1-60, got '*/2/3'",
    "* */25 * * *": "step of hour must be 1-24, got 25",
    "* * * * */8": "step of day of week must be 1-7, got 8",
    "1,,2 * * * *": "minute has an empty item in '1,,2'; remove the comma",
    "1,2, * * * *": "minute has an empty item in '1,2,'; remove the comma",
    "R * * * *": "random fields (R) are another schedule in each instance; name the value and use jitter=; got 'R'",
    "R(0-9)/2 * * * *": "random fields (R) are another schedule in each instance; name the value and use jitter=;"
    " got 'R(0-9)/2'",
    "* 1,h * * *": "hashed fields (H) are not supported; name the value and use jitter=; got '1,H'",
    "* * * * MON#6": "day of week takes #1 to #5, got 'MON#6'",
    "* * * * MON#": "day of week takes #1 to #5, got 'MON#'",
    "* * * * MON-FRI#1": "day of week must be 0-7 or SUN-SAT, got 'MON-FRI#1'",
    "* * W * *": "day of month must be 1-31, got 'W'",
    "* * L-3 * *": "day of month must be 1-31, got 'L-3'",
    "* * * 5W *": "month must be 1-12 or JAN-DEC, got '5W'",
    "* 5L * * *": "hour must be 0-23, got '5L'",
    "* 5#2 * * *": "hour must be 0-23, got '5#2'",
    "* * 31W * *": "day of month 31W does not exist in every month; use LW for the last working day",
    "* * 29W 2 *": "day of month 29W does not exist in every month; use LW for the last working day",
    "* * 1W,15W * *": "'1W,15W' or '*' mixes #, L or W with others; stack a @job for each",
    "* * * * MON#1,FRI": "'*' or 'MON#1,FRI' mixes #, L or W with others; stack a @job for each",
    "* * 1 * MON#1": "'1' and 'MON#1' can't be either-or with #, L or W; stack a @job for each",
    "* * 15W * MON": "'15W' and 'MON' can't be either-or with #, L or W; stack a @job for each",
    "* * L * 5L": "'L' and '5L' can't be either-or with #, L or W; stack a @job for each",
    "0 0 30 2 *": "never matches: none of its months has such a day; L is the last one",
    "0 0 31 4,6,9,11 *": "never matches: none of its months has such a day; L is the last one",
    "0 0 */30 * MON#2": "never matches: none of its months has such a day; L is the last one",
    "": f"{LAYOUT}; got 0",
    "* * * *": f"{LAYOUT}; got 4",
    "* * * * * * *": f"{LAYOUT}; got 7, and a year field is not supported",
    "* * * * * * * *": f"{LAYOUT}; got 8",
    "@reboot": "@reboot is no schedule; use immediate=True with a schedule, or after='1s' alone",
    "@every 5m": "@every is spelled every= here, as in every='5m'",
    "@fortnightly": f"must be one of {ALIASES}, alone, or 5 or 6 fields",
    "@daily 5": f"must be one of {ALIASES}, alone, or 5 or 6 fields",
    "\u0665 * * * *": "must be plain ASCII of at most 1000 characters, such as '*/5 * * * *'",
    "*\u00a0* * * *": "must be plain ASCII of at most 1000 characters, such as '*/5 * * * *'",
    5: "must be text such as '*/5 * * * *'",
    None: "must be text such as '*/5 * * * *'",
}


class TestCronParsing:
    @pytest.mark.parametrize("text", MESSAGES)
    def test_messages(self, text: object) -> None:
        """What can't be read, or would be read wrongly, is refused with the value seen and a remedy."""
        with pytest.raises(ScheduleError) as caught:
            _Cron(text, UTC)  # type: ignore[arg-type]
        assert str(caught.value) == f"cron={text!r}: {MESSAGES[text]}"

    def test_huge_text(self) -> None:
        """A text of any length is refused at once and not repeated in the message."""
        begin = time.perf_counter()
        with pytest.raises(ScheduleError) as caught:
            _Cron("1," * 5_000_000, UTC)
        assert len(str(caught.value)) < 300
        assert time.perf_counter() - begin < 1
        with pytest.raises(ScheduleError, match=r"minute must be 0-59, got 9{40}$"):
            _Cron("9" * 900 + " * * * *", UTC)

    def test_without_croniter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A copied file without croniter says what to install."""
        monkeypatch.setitem(sys.modules, "croniter", None)
        with pytest.raises(ScheduleError) as caught:
            _Cron("* * * * *", UTC)
        assert str(caught.value) == "cron='* * * * *': needs croniter; pip install croniter"
        assert isinstance(caught.value.__cause__, ImportError)

    @pytest.mark.parametrize(
        ("text", "meaning"),
        [
            ("@yearly", "0 0 1 1 *"),
            ("@annually", "0 0 1 1 *"),
            ("@monthly", "0 0 1 * *"),
            ("@weekly", "0 0 * * 0"),
            ("@daily", "0 0 * * *"),
            ("@Midnight", "0 0 * * *"),
            ("@HOURLY", "0 * * * *"),
            ("  0\t0  * * *\n", "0 0 * * *"),
            ("0 0 0 * * *", "0 0 * * *"),
            ("05 007 * * *", "5 7 * * *"),
            ("0 0 * jan-Mar *", "0 0 * 1,2,3 *"),
            ("0 0 * * Mon,wed,FRI", "0 0 * * 1,3,5"),
            ("0 0 ? * MON", "0 0 * * 1"),
            ("0 0 1 * ?", "0 0 1 * *"),
            ("0 0 * * 7", "0 0 * * 0"),
            ("0 0 * * 5-7", "0 0 * * 5,6,0"),
            ("0 0 * * 0-7", "0 0 * * *"),
            ("0 0 * * 1-7/2", "0 0 * * 1,3,5,0"),
            ("0 0 * * SAT-SUN", "0 0 * * 6,0"),
            ("0 0 * * FRI-SUN", "0 0 * * 5,6,0"),
            ("0 0 * * FRI-MON", "0 0 * * 5,6,0,1"),
            ("0 0 * * 7-2", "0 0 * * 0,1,2"),
            ("0 0 * * 7-0", "0 0 * * 0"),
            ("0 0 * * */7", "0 0 * * 0"),
            ("0 7-7 * * *", "0 7 * * *"),
            ("0 0 * * MON-MON", "0 0 * * 1"),
            ("30-30/5 * * * *", "30 * * * *"),
            ("0 0 * 3-3 *", "0 0 * 3 *"),
            ("0 22-2 * * *", "0 22,23,0,1,2 * * *"),
            ("0 17-9/2 * * *", "0 17,19,21,23,1,3,5,7,9 * * *"),
            ("0 0 25-5/3 * *", "0 0 25,28,31,3 * *"),
            ("0 0 1 NOV-FEB *", "0 0 1 11,12,1,2 *"),
            ("5/15 * * * *", "5,20,35,50 * * * *"),
            ("59/15 * * * *", "59 * * * *"),
            ("0 0 * * 7/2", "0 0 * * 0,2,4,6"),
            ("0 0 * * MON/2", "0 0 * * 1,3,5"),
            ("*/60 * * * *", "0 * * * *"),
            ("*/1 0 * * *", "* 0 * * *"),
            ("0 0 1-31 * MON", "0 0 * * *"),
            ("0 0 1 * 0-6", "0 0 * * *"),
            ("0 0 30,31 2 MON", "0 0 * 2 1"),
            ("0 0 * * 5l", "0 0 * * FRIL"),
        ],
    )
    def test_spellings(self, text: str, meaning: str) -> None:
        """Each spelling means its plain list of numbers."""
        assert same(text, meaning)

    @pytest.mark.parametrize(
        ("text", "dates"),
        [
            ("0 0 13 * FRI", "01-03 01-10 01-13 01-17"),
            ("0 0 31 * MON", "01-06 01-13 01-20 01-27 01-31 02-03"),
            ("0 0 30 4 MON", "04-07 04-14 04-21 04-28 04-30"),
            ("0 0 */2 * MON", "01-13 01-27 02-03 02-17"),
            ("0 0 1-7 * */7", "01-05 02-02 03-02 04-06"),
            ("0 0 L * *", "01-31 02-28 03-31 04-30"),
            ("0 0 15,L 2-3 *", "02-15 02-28 03-15 03-31"),
            ("0 0 L * FRI", "01-03 01-10 01-17 01-24 01-31 02-07 02-14 02-21 02-28 03-07 03-14 03-21 03-28 03-31"),
            ("0 0 2-31,L 2-3 *", "02-02 02-03"),
            ("0 0 LW * *", "01-31 02-28 03-31 04-30 05-30"),
            ("0 0 1W * *", "02-03 03-03 04-01"),
            ("0 0 15W * *", "01-15 02-14 03-14 04-15 05-15 06-16"),
            ("0 0 31W 5,8 *", "05-30 08-29"),
            ("0 0 * * FRIL", "01-31 02-28 03-28"),
            ("0 0 * * MON#1,WED#3", "01-06 01-15 02-03 02-19"),
            ("0 0 * * 7#5", "03-30 06-29 08-31"),
            ("0 0 * * 1L,7#1", "01-05 01-27 02-02 02-24"),
            ("0 0 */2 * MON#2", "01-13 06-09"),
        ],
    )
    def test_days(self, text: str, dates: str) -> None:
        """Both days restricted: either is enough; if one starts with a star, both must match."""
        wanted = dates.split()
        assert all(map(str.startswith, first(text, len(wanted)), wanted)), first(text, len(wanted))

    @pytest.mark.parametrize(
        ("text", "wild"),
        [
            ("* * * * *", True),
            ("*/15,7 2 * * *", True),
            ("0 */2 * * *", True),
            ("@hourly", True),
            ("7,*/15 2 * * *", False),
            ("0-59 0-23 * * *", False),
            ("0 2 * * *", False),
            ("@daily", False),
            ("*/10 0 2 * * *", False),
            ("0 * 2 * * *", True),
        ],
    )
    def test_wild(self, text: str, wild: bool) -> None:
        """A schedule is wild when its minute or hour starts with a star; seconds don't count."""
        assert _Cron(text, UTC).wild is wild


class TestCronIteration:
    def test_strictly_after(self) -> None:
        """A tick at `after` itself isn't listed, one a millisecond later is."""
        cron, tick = _Cron("*/5 * * * *", UTC), at(2025, 1, 1)
        assert next(cron.ticks(tick)) == tick + 5 * MINUTE
        assert next(cron.ticks(tick - 1)) == tick
        assert next(_Cron("* * * * * *", UTC).ticks(tick + 999)) == tick + 1000

    def test_iterators_are_independent(self) -> None:
        """Iterators of one schedule don't disturb each other, wherever they are."""
        cron = _Cron("*/20 * * * *", _zone("Europe/Rome"))
        one, two = cron.ticks(0), cron.ticks(at(2025, 1, 1))
        mixed = [next(iterator) for _ in range(50) for iterator in (one, two)]
        assert mixed[::2] == [*islice(cron.ticks(0), 50)]
        assert mixed[1::2] == [*islice(cron.ticks(at(2025, 1, 1)), 50)]

    def test_parsed_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A new iterator doesn't parse the text again."""
        import croniter

        cron = _Cron("*/5 * * * *", UTC)
        monkeypatch.setattr(croniter.croniter, "__init__", None)
        monkeypatch.setattr(croniter.croniter, "_expand", None)
        assert next(cron.ticks(0)) == 5 * MINUTE

    @pytest.mark.parametrize("text", ["* * * * *", "30 2 * * *", "0 0 29 2 *", "*/7 * * * * *"])
    @pytest.mark.parametrize("zone", ["UTC", "Europe/Rome", "Pacific/Apia", "Africa/Monrovia", "Asia/Manila"])
    @pytest.mark.parametrize("after", [-(10**30), at(1, 1, 1), at(1, 6, 1), at(1844, 12, 30), at(1900, 1, 1), -1])
    def test_far_past(self, text: str, zone: str, after: int) -> None:
        """Ticks go on from any instant of the past, through the odd offsets of local mean time."""
        found = [*islice(_Cron(text, _zone(zone)).ticks(after), 50)]
        assert len(found) == 50
        assert found == sorted({*found})
        assert found[0] > after

    @pytest.mark.parametrize("year", [1600, 1900, 1969, 2025, 2400, 2900, 9000])
    def test_croniter_starts_within_four_centuries(self, year: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """croniter is never started before 1970, which it can't on Windows; the days are right all the same."""
        import croniter

        starts, begin = [], croniter.croniter.set_current

        def set_current(self: object, start_time: datetime, force: bool = True) -> object:
            starts.append(start_time)
            return begin(self, start_time, force)

        cron = _Cron("0 0 29 2 *", UTC)
        monkeypatch.setattr(croniter.croniter, "set_current", set_current)
        leap = next(leap for leap in range(year, year + 9) if calendar.isleap(leap))
        assert next(cron.ticks(at(year, 1, 1))) == at(leap, 2, 29)
        assert 2000 <= starts[0].year < 2400

    @pytest.mark.parametrize("zone", ["UTC", "local", "Europe/Rome", "Pacific/Apia", "America/New_York"])
    @pytest.mark.parametrize("text", ["0 * * * *", "0 5 * * *", "0 0 29 2 *", "0 0 1 * MON"])
    @pytest.mark.parametrize("after", [at(9999, 12, 29), at(9999, 12, 31, 23, 59, 59), at(9999, 10, 1), 10**15, 10**40])
    def test_the_end(self, zone: str, text: str, after: int) -> None:
        """Where the calendar ends, the ticks do, without an error."""
        found = [*islice(_Cron(text, _zone(zone)).ticks(after), 50_000)]
        assert found == sorted({*found})
        assert all(tick > after for tick in found)

    def test_rare(self) -> None:
        """Forty years without a tick are no end: 29 February on a Sunday, across the year 2100."""
        found = islice(_Cron("0 0 29 2 */7", UTC).ticks(at(2080, 1, 1)), 3)
        assert [(EPOCH + timedelta(milliseconds=tick)).year for tick in found] == [2088, 2128, 2156]


CHANGES = [  # zone, instant after which, and until which, in UTC, text, ticks
    # Rome in 2025, the table of DESIGN
    ("Europe/Rome", (3, 30, 0), (3, 31, 0, 45), "30 2 * * *", "30 03:00 +0200, 31 02:30 +0200"),
    ("Europe/Rome", (3, 30, 0, 31), (3, 30, 1, 20), "*/15 * * * *", "30 01:45 +0100, 30 03:00 +0200, 30 03:15 +0200"),
    ("Europe/Rome", (3, 30, 0), (3, 30, 2), "30 * * * *", "30 01:30 +0100, 30 03:30 +0200"),
    ("Europe/Rome", (3, 30, 0), (3, 30, 3), "30 2-4 * * *", "30 03:00 +0200, 30 03:30 +0200, 30 04:30 +0200"),
    ("Europe/Rome", (10, 25, 22), (10, 26, 4), "30 2 * * *", "26 02:30 +0200"),
    (
        "Europe/Rome",
        (10, 26, 0, 10),
        (10, 26, 2, 0),
        "*/15 * * * *",
        "26 02:15 +0200, 26 02:30 +0200, 26 02:45 +0200, 26 02:00 +0100, 26 02:15 +0100, 26 02:30 +0100,"
        " 26 02:45 +0100, 26 03:00 +0100",
    ),
    ("Europe/Rome", (10, 26, 0), (10, 26, 2), "30 * * * *", "26 02:30 +0200, 26 02:30 +0100"),
    ("Europe/Rome", (10, 26, 0), (10, 26, 4), "30 2-4 * * *", "26 02:30 +0200, 26 03:30 +0100, 26 04:30 +0100"),
    # one tick, where several readings are jumped over, and where the moved one meets another
    ("Europe/Rome", (3, 30, 0), (3, 30, 1, 15), "0-59/10 2,3 * * *", "30 03:00 +0200, 30 03:10 +0200"),
    # begun days before
    (
        "Europe/Rome",
        (10, 24, 12),
        (10, 27, 0),
        "*/30 2 * * *",
        "25 02:00 +0200, 25 02:30 +0200, 26 02:00 +0200, 26 02:30 +0200, 26 02:00 +0100, 26 02:30 +0100",
    ),
    # begun within the first pass, and within the second
    ("Europe/Rome", (10, 26, 0, 40), (10, 26, 1, 20), "*/20 * * * *", "26 02:00 +0100, 26 02:20 +0100"),
    ("Europe/Rome", (10, 26, 1, 10), (10, 26, 1, 40), "*/20 * * * *", "26 02:20 +0100, 26 02:40 +0100"),
    ("Europe/Rome", (10, 26, 1, 10), (10, 27, 2), "50 2 * * *", "27 02:50 +0100"),
    # seconds with a star and a fixed hour are fixed
    ("Europe/Rome", (3, 30, 0), (3, 30, 4), "*/20 30 2 * * *", "30 03:00 +0200"),
    (
        "Europe/Rome",
        (10, 26, 0),
        (10, 26, 4),
        "*/20 30 2 * * *",
        "26 02:30 +0200, 26 02:30:20 +0200, 26 02:30:40 +0200",
    ),
    # wild, and all its readings in the gap
    ("Europe/Rome", (3, 30, 0), (3, 31, 1), "*/30 2 * * *", "31 02:00 +0200, 31 02:30 +0200"),
    # half an hour
    ("Australia/Lord_Howe", (10, 4, 15), (10, 5, 0), "15 2 * * *", "05 02:30 +1100"),
    (
        "Australia/Lord_Howe",
        (10, 4, 15),
        (10, 4, 16),
        "*/15 * * * *",
        "05 01:45 +1030, 05 02:30 +1100, 05 02:45 +1100, 05 03:00 +1100",
    ),
    ("Australia/Lord_Howe", (4, 5, 13), (4, 6, 3), "45 1 * * *", "06 01:45 +1100"),
    (
        "Australia/Lord_Howe",
        (4, 5, 13),
        (4, 5, 17),
        "45 * * * *",
        "06 00:45 +1100, 06 01:45 +1100, 06 01:45 +1030, 06 02:45 +1030",
    ),
    # at midnight
    ("America/Santiago", (9, 6, 5), (9, 8, 4), "0 0 * * *", "07 01:00 -0300, 08 00:00 -0300"),
    ("America/Santiago", (9, 7, 2), (9, 7, 5), "@hourly", "06 23:00 -0400, 07 01:00 -0300, 07 02:00 -0300"),
    ("America/Santiago", (4, 5, 4), (4, 7, 4), "30 23 * * *", "05 23:30 -0300, 06 23:30 -0400"),
    ("Asia/Beirut", (3, 29, 0), (3, 30, 22), "0 0 * * *", "30 01:00 +0300, 31 00:00 +0300"),
    ("America/Havana", (3, 8, 12), (3, 10, 12), "30 0 * * *", "09 01:00 -0400, 10 00:30 -0400"),
    ("America/Havana", (11, 1, 12), (11, 2, 12), "30 0 * * *", "02 00:30 -0400"),
    ("Africa/Cairo", (4, 24, 0), (4, 25, 22), "0 0 * * FRI", "25 01:00 +0300"),
    (
        "Africa/Cairo",
        (10, 30, 0),
        (10, 31, 0),
        "*/30 23 * * *",
        "30 23:00 +0300, 30 23:30 +0300, 30 23:00 +0200, 30 23:30 +0200",
    ),
    # negative daylight saving
    ("Europe/Dublin", (3, 30, 0), (3, 30, 4), "30 1 * * *", "30 02:00 +0100"),
    ("Europe/Dublin", (10, 25, 23), (10, 26, 4), "30 1 * * *", "26 01:30 +0100"),
    ("Africa/Casablanca", (2, 23, 0), (2, 23, 4), "30 2 * * *", "23 02:30 +0100"),
    ("Africa/Casablanca", (4, 6, 0), (4, 6, 4), "30 2 * * *", "06 03:00 +0100"),
    # two hours
    ("Antarctica/Troll", (3, 30, 0), (3, 30, 4), "30 1-4 * * *", "30 03:00 +0200, 30 03:30 +0200, 30 04:30 +0200"),
]
OTHER_YEARS = [
    # a lost day isn't made up for, a gap of three hours is
    ("Pacific/Apia", (2011, 12, 29, 11), (2011, 12, 31, 11), "0 12 * * *", "29 12:00 -1000, 31 12:00 +1400"),
    (
        "Pacific/Apia",
        (2011, 12, 30, 8),
        (2011, 12, 30, 11),
        "@hourly",
        "29 23:00 -1000, 31 00:00 +1400, 31 01:00 +1400",
    ),
    ("Antarctica/Casey", (2009, 10, 17, 16), (2009, 10, 17, 20), "30 0 * * *", "18 00:30 +0800"),
    ("Antarctica/Casey", (2009, 10, 17, 17), (2009, 10, 18, 1), "30 3 * * *", "18 05:00 +1100"),
    # plain changes of the offset
    ("Asia/Pyongyang", (2018, 5, 4, 12), (2018, 5, 5, 0), "45 23 * * *", "05 00:00 +0900"),
    ("Asia/Pyongyang", (2015, 8, 14, 12), (2015, 8, 15, 0), "45 23 * * *", "14 23:45 +0900"),
    ("America/Caracas", (2016, 5, 1, 0), (2016, 5, 1, 12), "45 2 * * *", "01 03:00 -0400"),
    # an offset with seconds
    ("Africa/Monrovia", (1972, 1, 6, 12), (1972, 1, 7, 12), "20 0 * * *", "07 00:44:30 +0000"),
]


class TestDaylightSaving:
    @pytest.mark.parametrize(
        ("zone", "after", "until", "text", "wanted"),
        [(zone, (2025, *after), (2025, *until), text, wanted) for zone, after, until, text, wanted in CHANGES]
        + OTHER_YEARS,
    )
    def test_table(self, zone: str, after: tuple[int], until: tuple[int], text: str, wanted: str) -> None:
        """Fixed: once, at the first of two or right after a jump of at most three hours; wild: whatever reads so."""
        assert ", ".join(ticks(text, zone, at(*after), at(*until))) == wanted


# The oracle: steps real instants, reads them in zoneinfo, knows no cron library ---------------------------------------

NAMES = {name.upper(): n for names in (calendar.month_abbr, calendar.day_abbr) for n, name in enumerate(names)}
NAMES.update(SUN=0, MON=1, TUE=2, WED=3, THU=4, FRI=5, SAT=6)
CYCLES = [range(60), range(60), range(24), range(1, 32), range(1, 13), range(7)]


def number(text: str) -> int:
    return NAMES[text.upper()] if text.upper() in NAMES else int(text)


def expand(cycle: range, text: str) -> set[int]:
    """Values of a field, found by walking round from the start to the end and taking every step-th."""
    found = set()
    for item in text.split(","):
        span, _, step = item.partition("/")
        start, end = (span.split("-") * 2)[:2] if "*" not in span else (str(cycle[0]), str(cycle[-1]))
        first = position = number(start) % 7 if len(cycle) == 7 else number(start)
        full = len(cycle) == 7 and number(start) < 7 <= number(end)  # 0-7 is the whole week
        last = number(end) % 7 if len(cycle) == 7 else number(end)
        if step and span not in ("*",) and "-" not in span:
            last = cycle[-1]
        taken = 0
        while True:
            if taken % int(step or 1) == 0:
                found.add(position)
            if position == last and not (full and last == first and taken == 0):
                break
            taken += 1
            position = cycle[0] if position == cycle[-1] else position + 1
    return found


def month_length(day: date) -> int:
    return calendar.monthrange(day.year, day.month)[1]


def is_day(item: str, day: date) -> bool:
    item = item.upper()
    if item == "L":
        return day.day == month_length(day)
    if item == "LW":
        return day == max(d for n in range(1, month_length(day) + 1) if (d := day.replace(day=n)).weekday() < 5)
    if item.endswith("W"):
        working = [d for n in range(1, month_length(day) + 1) if (d := day.replace(day=n)).weekday() < 5]
        return day == min(working, key=lambda d: abs(d.day - int(item[:-1])))
    return day.day in expand(CYCLES[3], item)


def is_weekday(item: str, day: date) -> bool:
    item = item.upper()
    weekday = day.isoweekday() % 7
    if "#" in item:
        name, nth = item.split("#")
        return number(name) % 7 == weekday and (day.day + 6) // 7 == int(nth)
    if item.endswith("L"):
        return number(item[:-1]) % 7 == weekday and day.day + 7 > month_length(day)
    return weekday in expand(CYCLES[5], item)


class Oracle:
    def __init__(self, text: str) -> None:
        fields = text.split()
        fields = fields if len(fields) == 6 else ["0", *fields]
        self.second, self.minute, self.hour, _, self.month, _ = (
            set() if n in (3, 5) else expand(CYCLES[n], fields[n]) for n in range(6)
        )
        self.day, self.weekday = fields[3].replace("?", "*"), fields[5].replace("?", "*")
        self.wild = "*" in (fields[1][0], fields[2][0])

    def on(self, day: date) -> bool:
        if day.month not in self.month:
            return False
        both = is_day_list(self.day, day, is_day), is_day_list(self.weekday, day, is_weekday)
        return all(both) if "*" in (self.day[0], self.weekday[0]) else any(both)

    def fires(self, window: list[tuple[int, datetime]], step: timedelta) -> list[int]:
        days = {}
        found, seen, last = [], set(), window[0][1] - step

        def match(wall: datetime) -> bool:
            if wall.minute not in self.minute or wall.hour not in self.hour or wall.second not in self.second:
                return False
            if wall.date() not in days:
                days[wall.date()] = self.on(wall.date())
            return days[wall.date()]

        for instant, wall in window:
            jump = wall - last - step
            late = timedelta(0) < jump <= timedelta(hours=3) and not self.wild
            skipped = [last + step * n for n in range(1, jump // step + 1)] if late else []
            if any(map(match, skipped)) or (match(wall) and (self.wild or wall not in seen)):
                found.append(instant)
            seen.add(wall)
            last = wall
        return found


def is_day_list(text: str, day: date, test: object) -> bool:
    return any(test(item, day) for item in text.split(","))  # type: ignore[operator]


CLOCK_CHANGES = """
    Europe/Rome 2025-03-30 2025-10-26, Europe/London 2024-03-31 2024-10-27, Europe/Dublin 2025-03-30 2025-10-26,
    Europe/Lisbon 1996-10-27, Europe/Moscow 2011-03-27 2014-10-26, Europe/Istanbul 2015-11-08,
    Europe/Chisinau 2021-03-28, America/New_York 2025-03-09 2025-11-02, America/St_Johns 2010-03-14 2010-11-07,
    America/Santiago 2025-04-06 2025-09-07, America/Havana 2025-03-09 2025-11-02,
    America/Sao_Paulo 2018-11-04 2018-02-18, America/Asuncion 2024-03-24, America/Caracas 2007-12-09 2016-05-01,
    America/Nuuk 2024-03-31 2024-10-27, Africa/Cairo 2025-04-25 2025-10-30,
    Africa/Casablanca 2025-02-23 2025-04-06, Africa/Monrovia 1972-01-07, Asia/Beirut 2025-03-30 2025-10-25,
    Asia/Pyongyang 2015-08-14 2018-05-04, Asia/Kathmandu 1985-12-31, Asia/Tehran 2021-03-21 2021-09-21,
    Asia/Gaza 2023-04-29 2023-10-28, Asia/Amman 2021-03-26, Asia/Vladivostok 2014-10-25, Asia/Kolkata 1942-08-31,
    Australia/Lord_Howe 2025-04-06 2025-10-05, Australia/Sydney 2025-04-06 2025-10-05, Pacific/Auckland 2025-04-06,
    Pacific/Chatham 2025-04-06 2025-09-28, Antarctica/Troll 2025-03-30 2025-10-26,
    Antarctica/Casey 2009-10-17 2010-03-04, Pacific/Apia 2011-12-30, Pacific/Fakaofo 2011-12-30,
    Pacific/Kwajalein 1969-09-30 1993-08-21, Pacific/Kiritimati 1994-12-31
"""


def changes() -> list[tuple[str, int, int]]:
    """Zone, instant of the change, and by how many milliseconds the clock jumps there."""
    found = []
    for line in CLOCK_CHANGES.split(","):
        name, *days = line.split()
        zone = zoneinfo.ZoneInfo(name)
        for day in days:
            noon = datetime.fromisoformat(day).replace(tzinfo=UTC)
            steps = [noon + timedelta(seconds=30 * n) for n in range(-2880, 2 * 2880)]
            offsets = [step.astimezone(zone).utcoffset() for step in steps]
            where = [n for n in range(1, len(steps)) if offsets[n] != offsets[n - 1]]
            assert where, line
            jump = offsets[where[0]] - offsets[where[0] - 1]
            found.append(
                (name, (steps[where[0]] - EPOCH) // timedelta(milliseconds=1), jump // timedelta(milliseconds=1))
            )
    return found


def window(name: str, change: int, around: int, step: int) -> list[tuple[int, datetime]]:
    zone = zoneinfo.ZoneInfo(name)
    start = EPOCH + timedelta(milliseconds=change - around)
    instants = (start + timedelta(milliseconds=n) for n in range(0, 2 * around, step))
    return [
        ((t - EPOCH) // timedelta(milliseconds=1), t.astimezone(zone).replace(tzinfo=None, fold=0)) for t in instants
    ]


class Texts:
    """Random cron texts that tend to fire near a given wall."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice

    def value(self, index: int, near: int) -> int:
        cycle = CYCLES[index]
        if self.dice.random() < 0.6:
            return cycle[(near + self.dice.randint(-1, 1) - cycle[0]) % len(cycle)]
        return self.dice.choice(cycle)

    def word(self, index: int, value: int) -> str:
        if self.dice.random() < 0.3 and index in (4, 5):
            names = calendar.month_abbr if index == 4 else ["sun", "mon", "tue", "wed", "thu", "fri", "sat"]
            return self.dice.choice([str.upper, str.lower, str.title])(names[value])
        return "7" if index == 5 and value == 0 and self.dice.random() < 0.4 else str(value)

    def item(self, index: int, near: int) -> str:
        dice, size = self.dice, len(CYCLES[index])
        start, end = (self.word(index, self.value(index, near)) for _ in range(2))
        step = f"/{dice.choice([1, 2, 3, 5, 7, 15, 20, 30, size]) % size or size}"
        forms = [
            start,
            start,
            f"{start}-{end}",
            f"{start}-{end}{step}",
            f"{start}-{start}{step}",
            f"{start}{step}",
            f"*{step}",
        ]
        return dice.choice(forms)

    def field(self, index: int, near: int, star: float) -> str:
        if self.dice.random() < star:
            return "*"
        return ",".join(self.item(index, near) for _ in range(self.dice.choice([1, 1, 1, 2, 3])))

    def special(self, index: int, day: date) -> str:
        dice, near = self.dice, day.isoweekday() % 7
        if index == 3:
            return dice.choice(
                ["L", f"{day.day},L", "LW", f"{min(28, day.day)}W", f"{dice.randint(1, 28)}W", "lw", "1-30,L"]
            )
        items = [f"#{(day.day + 6) // 7}", f"#{dice.randint(1, 5)}", "L", "l"]
        return ",".join(self.word(5, self.value(5, near)) + dice.choice(items) for _ in range(dice.choice([1, 1, 2])))

    def days(self, day: date) -> tuple[str, str]:
        weekday, either = day.isoweekday() % 7, self.dice.random()
        if either < 0.4:
            return "*", "*"
        if either < 0.6:
            return self.field(3, day.day, 0), self.field(5, weekday, 0)
        if either < 0.8:
            return self.field(3, day.day, 0.5), self.field(5, weekday, 0.5)
        star = self.dice.choice(["*", "*", "?", "*/2", "*/3"])
        return (self.special(3, day), star) if self.dice.random() < 0.5 else (star, self.special(5, day))

    def text(self, wall: datetime, seconds: bool) -> str:
        days, weekdays = self.days(wall.date())
        minute = self.field(1, wall.minute, 0.2)
        hour = self.field(2, wall.hour, 0.25)
        fields = [minute, hour, days, self.field(4, wall.month, 0.8), weekdays]
        return " ".join([self.field(0, wall.second, 0.2), *fields] if seconds else fields)


PIECES = ["*", "*/5", "5", "0", "31", "30", "29W", "L", "LW", "5L", "5#5", "1-7", "7-1/3", "2", "12", "?", "59,1"]


def compare(seconds: bool, number: int) -> None:
    """Compare `number` random schedules around every clock change with the oracle."""
    dice = random.Random(f"bgjob {seconds} {number} {os.environ.get('BGJOB_TEST_SEED', '')}")
    texts, fired, places = Texts(dice), 0, changes()
    if seconds:
        places = [place for place in places if abs(place[2]) <= HOUR]
    for index, (name, change, jump) in enumerate(places):
        zone = _zone(name)
        around = abs(jump) + 20 * MINUTE if seconds else abs(jump) + 8 * HOUR
        step = 1_000 if seconds or jump % MINUTE else MINUTE
        around = min(around, 2 * HOUR) if step == 1_000 else around
        stretch = window(name, change, around, step)
        for _ in range(number * (index + 1) // len(places) - number * index // len(places)):
            wall = stretch[len(stretch) // 2 - dice.randint(0, 2)][1]
            wall += dice.choice([0, 0, 1, -1]) * timedelta(milliseconds=abs(jump))
            text = texts.text(wall, seconds)
            try:
                cron = _Cron(text, zone)
            except ScheduleError as error:
                assert "never matches" in str(error), error
                assert not any(Oracle(text).on(date(2000, 1, 1) + timedelta(days=n)) for n in range(366 * 60)), text
                continue
            wanted = Oracle(text).fires(stretch, timedelta(milliseconds=step))
            first, last = stretch[0][0], stretch[-1][0]
            anywhere = dice.randint(first, change + max(0, -jump) if cron.wild else last)
            after = dice.choice([first, change - 1, change, change + 1, anywhere, anywhere, anywhere])
            wanted = [tick for tick in wanted if tick > after]
            got = upto(last, cron.ticks(after))
            assert got == wanted, (text, name, after)
            assert _newest(cron, after, last) == (wanted or [None])[-1], (text, name, after)
            fired += bool(wanted)
    assert fired > number / 3


class TestOracle:
    def test_minutes(self) -> None:
        """Random schedules equal the oracle's around clock changes in over thirty zones."""
        compare(seconds=False, number=THOROUGH or 200)

    def test_seconds(self) -> None:
        """The same to the second, with a field for seconds."""
        compare(seconds=True, number=THOROUGH // 4 or 30)

    def test_a_year(self) -> None:
        """Day rules hold day by day over years, both-day rule, L, # and W included."""
        dice = random.Random("a year")
        texts, days = Texts(dice), [date(2023, 12, 25) + timedelta(days=n) for n in range(800)]
        for _ in range(THOROUGH or 25):
            day, weekday = texts.days(dice.choice(days))
            text = f"0 0 {day} {texts.field(4, 6, 0.7)} {weekday}"
            oracle = Oracle(text)
            wanted = [at(d.year, d.month, d.day) for d in days if oracle.on(d)]
            try:
                cron = _Cron(text, UTC)
            except ScheduleError as error:
                assert "never matches" in str(error)
                assert not wanted
                continue
            start, end = at(2023, 12, 24, 23), at(days[-1].year, days[-1].month, days[-1].day)
            assert upto(end, cron.ticks(start)) == wanted, text

    @settings(max_examples=THOROUGH or 100, deadline=None)
    @given(
        st.one_of(
            st.text(),
            st.text(alphabet="0123456789*/,-LW#?@RHMONSUFRI ", max_size=30),
            st.lists(st.text(alphabet="0123456789*/,-LW#?", min_size=1, max_size=4), min_size=5, max_size=6).map(
                " ".join
            ),
            st.lists(st.sampled_from(PIECES), min_size=5, max_size=6).map(" ".join),
        ),
        st.sampled_from(["UTC", "Europe/Rome", "Australia/Lord_Howe", "Pacific/Apia"]),
        st.integers(at(1, 1, 1), at(9999, 12, 31)),
    )
    def test_any_text(self, text: str, zone: str, after: int) -> None:
        """Any text raises ScheduleError or yields strictly increasing ticks."""
        try:
            cron = _Cron(text, _zone(zone))
        except ScheduleError:
            return
        last = after
        for tick in islice(cron.ticks(after), 5):
            assert tick > last
            last = tick


class TestNewest:
    def test_every(self) -> None:
        """An interval's ticks are start + n * every with n >= 1."""
        grid = _Every(10, 3)
        assert [*islice(grid.ticks(-100), 3)] == [13, 23, 33]
        assert [*islice(grid.ticks(13), 2)] == [23, 33]
        assert [*islice(grid.ticks(12), 1)] == [13]

    @pytest.mark.parametrize(
        ("after", "upto", "newest"),
        [
            (0, 12, None),
            (0, 13, 13),
            (13, 13, None),
            (13, 22, None),
            (13, 23, 23),
            (0, 10**18 + 3, 10**18 + 3),
            (20, 5, None),
            (-99, 3, None),
        ],
    )
    def test_newest_of_every(self, after: int, upto: int, newest: int | None) -> None:
        """The newest tick lies later than `after` and not later than `upto`."""
        assert _newest(_Every(10, 3), after, upto) == newest

    def test_newest_of_cron(self) -> None:
        """It is the last that walking there would find, at a cost that doesn't grow with the gap."""
        cron = _Cron("*/7 * * * * *", _zone("Europe/Rome"))
        start = at(2025, 10, 26, 0, 59, 58)
        walked = upto(start + 60_000, cron.ticks(start))
        assert _newest(cron, start, start + 60_000) == walked[-1]
        assert _newest(cron, start, walked[0]) == walked[0]
        assert _newest(cron, walked[0], walked[0]) is None
        assert _newest(cron, walked[0], walked[1] - 1) is None
        begin = time.perf_counter()
        assert _newest(_Cron("0 0 1 1 *", UTC), at(9999, 1, 1), at(9999, 12, 31)) is None
        assert _newest(cron, 0, at(2500, 1, 1)) == at(2500, 1, 1, 0, 0, 0)
        assert time.perf_counter() - begin < 0.5

    def test_newest_across_an_overlap(self) -> None:
        """In the second pass it is the newest instant, not the greatest reading."""
        cron = _Cron("*/20 * * * *", _zone("Europe/Rome"))
        assert _newest(cron, 0, at(2025, 10, 26, 1, 5)) == at(2025, 10, 26, 1, 0)

    @pytest.mark.parametrize(
        ("first", "last", "number"),
        [(13, 13, 1), (0, 12, 0), (14, 22, 0), (13, 33, 3), (0, 10**6, 99_999), (50, 20, 0)],
    )
    def test_count_of_every(self, first: int, last: int, number: int) -> None:
        """Ticks of an interval are counted by arithmetic, both ends included."""
        assert _count(_Every(10, 3), first, last) == number

    def test_count_of_cron(self) -> None:
        """Those of a cron are walked, up to the limit, both ends included."""
        cron, start = _Cron("0 * * * *", UTC), at(2025, 1, 1)
        assert _count(cron, start, start + 5 * HOUR) == 6
        assert _count(cron, start + 1, start + 5 * HOUR - 1) == 4
        assert _count(cron, start, start + 365 * DAY) == 100
        assert _count(cron, start, start + 365 * DAY, limit=7) == 7
        assert _count(cron, start, start - 1) == 0


START = datetime(2026, 1, 1, tzinfo=UTC)


def ended(runs: list[Run], state: State = State.SUCCEEDED) -> list[str]:
    return [run.id for run in runs if run.state is state]


@contextlib.asynccontextmanager
async def driven(registry: Registry, on_event: object = None, drain: int = 0) -> AsyncIterator[bgjob._Engine]:
    """The jobs of a registry in a virtual loop, with what `simulate` has no parameter for."""
    clock = bgjob._VirtualClock(asyncio.get_running_loop(), START.timestamp())
    engine = bgjob._Engine(registry, None, drain, on_event, clock)
    await engine.open()
    try:
        yield engine
    finally:
        await engine.close()


def virtually(main: object) -> object:
    with asyncio.Runner(loop_factory=bgjob._VirtualLoop) as runner:
        return runner.run(main)


@contextlib.contextmanager
def suppress_logging() -> Iterator[None]:
    logging.disable()
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


class TestTime:
    @pytest.mark.parametrize(
        ("text", "ms"),
        [(90, 90_000), (0.25, 250), ("250ms", 250), ("30s", 30_000), ("1h30m", 5_400_000), ("2d", 172_800_000),
         ("1.5h", 5_400_000), (timedelta(minutes=5), 300_000), ("5m 30s", 330_000)],
    )  # fmt: skip
    def test_forms(self, text: object, ms: int) -> None:
        """Seconds, timedelta and text mean the same everywhere."""
        assert _duration("every", text) == ms

    @pytest.mark.parametrize(
        "text", ["", "5", "5x", "m5", "-5s", "1m1m", "5s1m", float("nan"), float("inf"), -1, True, None]
    )
    def test_refusals(self, text: object) -> None:
        """What isn't a duration is refused with a remedy."""
        with pytest.raises(ScheduleError, match="write "):
            _duration("every", text)

    @given(st.integers(0, 99), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59), st.integers(0, 999))
    def test_compositions(self, d: int, h: int, m: int, s: int, ms: int) -> None:
        """A text of several units is their sum."""
        assert _duration("x", f"{d}d{h}h{m}m{s}s{ms}ms") == (((d * 24 + h) * 60 + m) * 60 + s) * 1000 + ms

    @given(st.text(), st.integers(1, 10**9))
    def test_spread(self, text: str, limit: int) -> None:
        """Jitter depends on the text alone and stays below its limit."""
        assert 0 <= _spread(text, limit) < limit
        assert _spread(text, limit) == _spread(text, limit)

    def test_virtual_time(self) -> None:
        """The virtual clock jumps only where nothing is ready: what can be read already comes first, at its time."""

        async def main() -> list[float]:
            loop, read = asyncio.get_running_loop(), []
            here, there = socket.socketpair()
            with here, there:
                there.send(b"x")
                loop.add_reader(here, lambda: (read.append(loop.time()), loop.remove_reader(here)))
                await asyncio.sleep(1000)
            return [*read, round(loop.time())]

        assert virtually(main()) == [0, 1000]

    def test_one_room_reads_clocks(self) -> None:
        """Only the Time room reads a clock."""
        source = Path(bgjob.__file__).read_text()
        begin, end = (source[: source.index(banner)].count("\n") for banner in ("# 2 Time -", "# 3 Schedules -"))
        calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
        names = [(ast.unparse(call.func), call.lineno) for call in calls]
        readers = [line for name, line in names if re.search(r"^time\.|datetime\.(now|utcnow|today)$", name)]
        assert readers
        assert all(begin < line <= end for line in readers)


class TestRetries:
    @pytest.mark.parametrize(
        ("tries", "lost", "retries", "on_crash", "verdict"),
        [(1, 0, 0, "rerun", "fail"), (1, 0, 1, "rerun", "run"), (2, 0, 1, "rerun", "fail"), (1, 1, 0, "rerun", "run"),
         (1, 1, 0, "drop", "fail"), (3, 3, 0, "rerun", "run"), (4, 4, 9, "rerun", "fail"), (3, 1, 1, "rerun", "fail"),
         (3, 1, 2, "rerun", "run"), (1, 0, 1, "drop", "run")],
    )  # fmt: skip
    def test_verdict(self, tries: int, lost: int, retries: int, on_crash: str, verdict: str) -> None:
        """Lost attempts use up no retry; the fourth loss, or the first with drop, ends the run."""
        assert _verdict(tries, lost, retries, on_crash) == verdict

    @given(st.integers(1, 200), st.text())
    def test_backoff(self, retry: int, text: str) -> None:
        """The delay doubles up to its limit and is spread over the upper half."""
        top = min(1000 * 2 ** (retry - 1), 300_000)
        assert top // 2 <= _retry_delay("1s..5m")(retry, text) <= top

    def test_spread_of_delays(self) -> None:
        """What failed together is tried again at times that fill the upper half, its two ends too."""
        assert {_retry_delay("10ms..1s")(1, str(run)) for run in range(1000)} == {*range(5, 11)}

    def test_attempts(self) -> None:
        """A failing job is tried `retries` times more, with the delays of `retry_delay`, then on_error is called once."""
        registry, calls, told = Registry(), [], []

        @registry.job(
            after=0, retries=2, retry_delay=lambda n: n * 10, on_error=lambda run, e: told.append((run.state, e))
        )
        async def bad() -> None:
            calls.append(asyncio.get_running_loop().time())
            raise ValueError("no")

        (run,) = registry.simulate("1h", start=START)
        assert [round(t) for t in calls] == [0, 10, 30]
        assert (run.state, run.attempt, run.error) == ("failed", 3, "ValueError: no")
        assert [(state, str(error)) for state, error in told] == [("running", "no")]

    @pytest.mark.parametrize(
        ("retry_on", "attempts"),
        [(OSError, 2), (LookupError, 1), ((LookupError, OSError), 2), ((), 1), (lambda error: error.errno == 5, 2),
         (lambda error: error.errno == 6, 1), (Exception, 2), (BaseException, 2)],
    )  # fmt: skip
    def test_retry_on(self, retry_on: object, attempts: int) -> None:
        """An exception is tried again if it is of the class, or of one of them, or if the predicate says so."""
        registry = Registry()

        @registry.job(after=0, retries=1, retry_on=retry_on)
        async def bad() -> None:
            raise OSError(5, "no")

        (run,) = registry.simulate("1h", start=START)
        assert (run.state, run.attempt) == ("failed", attempts)

    @pytest.mark.parametrize(
        "raised",
        [SystemExit(2), BaseExceptionGroup("g", [SystemExit()]), asyncio.CancelledError(), GeneratorExit()],
    )
    def test_base_exceptions(self, raised: BaseException) -> None:
        """SystemExit, GeneratorExit, groups, a CancelledError that nobody asked for are failures; the slot is free."""
        registry = Registry()

        @registry.job(every="1m")
        async def bad() -> None:
            raise raised

        runs = registry.simulate("5m", start=START)
        assert [run.state for run in runs] == ["failed"] * 5

    @pytest.mark.parametrize(
        "raised", [ValueError(), SystemExit(2), BaseExceptionGroup("g", [SystemExit()]), GeneratorExit()]
    )
    @pytest.mark.parametrize("hook", ["retry_on", "retry_delay", "on_error", "on_event"])
    def test_hooks_that_raise(self, hook: str, raised: BaseException) -> None:
        """Whatever a hook raises is logged; the run ends as it would, its slot comes back, nothing stops."""
        registry, begun = Registry(), []

        def broken(*_: object) -> bool:
            raise raised

        @registry.job(every="1m", overlap="all", retries=1, **({} if hook == "on_event" else {hook: broken}))
        async def bad() -> None:
            begun.append(asyncio.get_running_loop().time())
            await asyncio.sleep(90)
            raise KeyError

        async def main() -> None:
            async with driven(registry, broken if hook == "on_event" else None):
                await asyncio.sleep(1000)

        virtually(main())
        assert len(begun) == 11


async def nothing(*_: object) -> None: ...


class TestDeclarations:
    WRONG = (
        ({"every": "5x"}, "job 'f': every='5x': not a duration; write seconds (90), a timedelta, or text such as '30s' or '1h30m'"),
        ({"every": 0}, "job 'f': every=0: too short; write a duration of at least 1 ms, for instance '30s'"),
        ({"every": -1}, "job 'f': every=-1: negative; write a duration of at least 1 ms, for instance '30s'"),
        ({"every": "1s", "cron": "* * * * *"}, "job 'f': every='1s' and cron='* * * * *': a job has one schedule; stack a second @job with its own name"),
        ({"every": 1, "after": 2}, "job 'f': every=1 and after=2: a job has one schedule; stack a second @job with its own name"),
        ({"cron": "61 * * * *"}, "job 'f': cron='61 * * * *': minute must be 0-59, got 61"),
        ({"every": "1s", "tz": "Europe/Rome"}, "job 'f': tz='Europe/Rome': only cron has a zone; leave it out, or write cron="),
        ({"cron": "@daily", "tz": "Europe/Roma"}, "job 'f': tz='Europe/Roma': unknown time zone; did you mean 'Europe/Rome'?"),
        ({"args": {"a": 1}}, "job 'f': args: unknown parameter 'a'; the function's are: none"),
        ({"every": 1, "args": 5}, "job 'f': args=5: not a mapping; write args={'name': value}"),
        ({"immediate": True}, "job 'f': immediate=True: is for scheduled runs; add every=, cron= or after="),
        ({"every": 1, "immediate": "yes"}, "job 'f': immediate='yes': write True or False"),
        ({"jitter": "1s"}, "job 'f': jitter='1s': is for scheduled runs; add every=, cron= or after="),
        ({"overlap": "all"}, "job 'f': overlap='all': is for scheduled runs; add every=, cron= or after="),
        ({"every": 1, "overlap": "none"}, "job 'f': overlap='none': write 'skip' or 'queue' or 'all'"),
        ({"after": 1, "immediate": True}, "job 'f': after=1 runs once: immediate and overlap say nothing here; leave them out"),
        ({"after": 1, "overlap": "all"}, "job 'f': after=1 runs once: immediate and overlap say nothing here; leave them out"),
        ({"parallelism": 0}, "job 'f': parallelism=0: write a whole number, 1 or more"),
        ({"parallelism": True}, "job 'f': parallelism=True: write a whole number, 1 or more"),
        ({"retries": -1}, "job 'f': retries=-1: write a whole number, 0 or more"),
        ({"retries": 1.5}, "job 'f': retries=1.5: write a whole number, 0 or more"),
        ({"retry_delay": "5m..1s"}, "job 'f': retry_delay='5m..1s': begins longer than it ends; write '1s..5m'"),
        ({"retry_delay": "5x"}, "job 'f': retry_delay='5x': not a duration; write seconds (90), a timedelta, or text such as '30s' or '1h30m'"),
        ({"retry_on": 5}, "job 'f': retry_on=5: write an exception class, a tuple of them, or a plain predicate"),
        ({"retry_on": int}, "job 'f': retry_on=<class 'int'>: write an exception class, a tuple of them, or a plain predicate"),
        ({"retry_on": (OSError, int)}, "job 'f': retry_on=(<class 'OSError'>, <class 'int'>): write an exception class, a tuple of them, or a plain predicate"),
        ({"retry_on": nothing}, f"job 'f': retry_on={nothing!r}: write an exception class, a tuple of them, or a plain predicate"),
        ({"retry_delay": nothing}, f"job 'f': retry_delay={nothing!r}: nothing would await it; write a plain function"),
        ({"on_error": 5}, "job 'f': on_error=5: not callable; pass a function of (run, exception)"),
        ({"on_crash": "retry"}, "job 'f': on_crash='retry': write 'rerun' or 'drop'"),
        ({"timeout": 0}, "job 'f': timeout=0: too short; write a duration of at least 1 ms, for instance '30s'"),
        ({"expires": "soon"}, "job 'f': expires='soon': not a duration; write seconds (90), a timedelta, or text such as '30s' or '1h30m'"),
        ({"every": 10**400}, f"job 'f': every={10**400}: more than 100 years; write a duration of at least 1 ms, for instance '30s'"),
        ({"every": 1, "jitter": ""}, "job 'f': jitter='': not a duration; write seconds (90), a timedelta, or text such as '30s' or '1h30m'"),
        ({"retry_delay": "1s.."}, "job 'f': retry_delay='1s..': write two durations of at least 1 ms, such as '1s..5m'"),
        ({"name": "a@b"}, "name='a@b': write printable text without '@' and '#'"),
        ({"name": 5}, "name=5: write printable text without '@' and '#'"),
        ({"name": "a#b"}, "name='a#b': write printable text without '@' and '#'"),
        ({"name": " "}, "name=' ': write printable text without '@' and '#'"),
        ({"name": "a\nb"}, "name='a\\nb': write printable text without '@' and '#'"),
        ({"name": ""}, "name='': write printable text without '@' and '#'"),
    )  # fmt: skip

    @pytest.mark.parametrize(("keywords", "message"), WRONG)
    def test_messages(self, keywords: dict[str, object], message: str) -> None:
        """A wrong keyword fails when the decorator runs, with the job, the value and the remedy."""

        async def f() -> None: ...

        with pytest.raises(ScheduleError) as caught:
            Registry().job(**keywords)(f)
        assert str(caught.value) == message

    def test_messages_of_calls(self) -> None:
        """What is wrong about a call of a job is told with the job's name, too."""
        job = Registry().job(nothing)
        for call, message in (
            (lambda: job.after("soon"), "job 'nothing': after='soon': not a duration"),
            (lambda: job.after(0, key=""), "job 'nothing': key='': write printable text"),
            (lambda: job.at(datetime(2026, 1, 1)), "job 'nothing': at=datetime.*: needs an aware datetime"),
            (lambda: job.next_ticks(start=5), "job 'nothing': start=5: needs an aware datetime"),
            (lambda: job.next_ticks(-1), "job 'nothing': n=-1: write a whole number, 0 or more"),
        ):
            with pytest.raises(ScheduleError, match=message):
                call()

    def test_defaults(self) -> None:
        """Every keyword's default may be written out, whatever the schedule."""
        defaults = {
            "every": None, "cron": None, "after": None, "tz": "UTC", "name": "f", "args": {}, "immediate": False,
            "jitter": 0, "parallelism": 10, "overlap": "skip", "expires": None, "timeout": None, "retries": 0,
            "retry_delay": "1s..5m", "retry_on": Exception, "on_error": None, "on_crash": "rerun",
        }  # fmt: skip
        for schedule in ({}, {"every": 1}, {"cron": "@daily"}, {"after": 1}):
            Registry().job(**defaults | schedule)(nothing)

    def test_callables(self) -> None:
        """A callable that isn't hashable is a job, no factory; names are text; Depends can't fill by position."""
        registry = Registry()

        class Callable:
            __hash__ = None

            def __call__(self, **names: object) -> None: ...

        async def by_position(x: int = Depends(int), /) -> None: ...

        registry.job(name="callable")(Callable())
        for call, message in (
            (lambda: registry.job(every=1, name="x", args={1: 2})(Callable()), "job 'x': args: unknown parameter 1;"),
            (lambda: Depends(Callable()), "not hashable, so it couldn't be overridden; wrap it in a function"),
            (lambda: registry.job(by_position), "can't fill the positional-only parameter x; remove the '/' behind it"),
        ):
            with pytest.raises(ScheduleError, match=message):
                call()
        registry.remove("callable")

    def test_needs(self) -> None:
        """What a dependency can't be made from is refused by the decorator, with the way that leads there."""

        def circle(x: object = None) -> None: ...
        def one(x: object = Depends(circle)) -> None: ...
        def needy(b: int, a: int) -> None: ...
        def plain() -> None: ...
        def pool(x: object = Depends(plain)) -> None: ...

        def unread() -> None: ...

        circle.__defaults__ = (Depends(one),)
        unread.__signature__ = 5
        for factory, scope, message in (
            (5, "run", "Depends(5): not callable; pass the factory itself, without calling it"),
            (plain, "job", "Depends(plain, scope='job'): write 'run' or 'app'"),
            (unread, "run", f"job 'f': {unread!r}: its parameters can't be read; wrap it in a function of your own"),
            (one, "run", "job 'f': Depends: one -> circle -> one is a circle; break it"),
            (needy, "run", "job 'f': Depends: needy: nothing fills its parameter a, b; give it a default or Depends"),
            (pool, "app", "job 'f': Depends: pool -> plain: an 'app' dependency can't need a 'run' one; give both one scope"),
        ):  # fmt: skip
            with pytest.raises(ScheduleError) as caught:

                @Registry().job
                async def f(x: object = Depends(factory, scope)) -> None: ...

            assert str(caught.value) == message

        def app(x: object = Depends(plain, "app")) -> None: ...

        @Registry().job
        async def fine(
            x: object = Depends(app, "app"), y: object = Depends(pool), z: object = Depends(app)
        ) -> None: ...

    def test_on_event(self) -> None:
        """An async function as on_event would never be awaited, so it is refused."""

        async def hook(run: Run) -> None: ...

        for wrong in (hook, 5):
            with pytest.raises(BgjobError, match="not a plain function; pass one that takes the run"):
                asyncio.run(Registry().run(on_event=wrong))

    def test_functions(self) -> None:
        """What can't be a job is refused: generators, classes, nameless functions, unfilled parameters, taken names."""
        registry = Registry()

        async def agen():
            yield

        async def needy(a): ...

        def gen():
            yield

        for wrong, message in (
            (agen, "^'agen' is a generator: nothing would iterate over it; decorate an async function or a plain one$"),
            (gen, "^'gen' is a generator: nothing would iterate over it; decorate an async function or a plain one$"),
            (int, "^<class 'int'> is a class; decorate an async function or a plain one$"),
            (lambda: 1, r"<lambda> at .* has no name of its own; write @job\(name='…'\)$"),
            (functools.partial(int), r"^functools.partial.* has no name of its own; write @job\(name='…'\)$"),
            (5, "^5 can't be called; decorate an async function or a plain one$"),
        ):
            with pytest.raises(ScheduleError, match=message):
                registry.job(wrong)
        with pytest.raises(ScheduleError, match="job 'needy': nothing fills the parameter a"):
            registry.job(every=1)(needy)
        registry.job(needy)
        exec("async def needy(a): ...", loaded := {"__name__": "elsewhere"})
        loaded["needy"].__qualname__ = needy.__qualname__
        for other in (needy, nothing):
            with pytest.raises(
                ScheduleError, match="the name is taken by .*test_bgjob.py:.*, this is .*test_bgjob.py:"
            ):
                registry.job(name="needy")(other)
        with pytest.raises(ScheduleError, match="the name is taken by .*test_bgjob.py:.*, this is <string>:1"):
            registry.job(loaded["needy"])
        assert list(registry.jobs) == ["needy"]

        async def by_place(a, /, **names): ...

        with pytest.raises(ScheduleError, match="job 'by_place': nothing fills the parameter a"):
            registry.job(every=1, args={"a": 1})(by_place)

    def test_replaced(self, caplog: pytest.LogCaptureFixture) -> None:
        """What is loaded again replaces in silence; a loop, or a second object's method, loses a job and is told so."""
        registry, code = Registry(), "async def work(): ..."

        class Feed:
            async def poll(self) -> None: ...

            async def __call__(self) -> None: ...

        for _ in range(2):
            exec(code, loaded := {"__name__": "jobs"})
            registry.job(loaded["work"])
            registry.job(name="part")(functools.partial(loaded["work"]))
        assert not caplog.records
        registry.job(Feed().poll)
        registry.job(name="feed")(Feed())
        for again in (lambda: registry.job(Feed().poll), lambda: registry.job(name="feed")(Feed())):
            again()
            assert "which replaces the first; in a loop give each a name=" in caplog.records.pop().getMessage()
        for other in (Feed().poll, functools.partial(Feed().poll)):
            with pytest.raises(ScheduleError, match="job 'part': the name is taken by"):
                registry.job(name="part")(other)

    def test_any_parameter(self) -> None:
        """A parameter may have any name, `self` too."""
        registry = Registry()

        @registry.job
        async def echo(**names: object) -> object:
            return names

        async def main() -> object:
            async with driven(registry):
                return await (await echo.submit(self=1, job=2, key=3)).result()

        assert virtually(main()) == asyncio.run(echo(self=1, job=2, key=3)) == {"self": 1, "job": 2, "key": 3}

    def test_next_ticks(self) -> None:
        """next_ticks answers in the job's zone, on the epoch's grid for an interval, and [] without a schedule."""
        registry = Registry()

        @registry.job(cron="30 2 * * *", tz="Europe/Rome")
        async def nightly() -> None: ...

        @registry.job(every="1h", name="hourly")
        @registry.job
        async def plain() -> None: ...

        start = datetime(2025, 3, 29, 12, tzinfo=UTC)
        assert [t.isoformat() for t in nightly.next_ticks(2, start)] == [
            "2025-03-30T03:00:00+02:00",
            "2025-03-31T02:30:00+02:00",
        ]
        assert registry.jobs["hourly"].next_ticks(1, start) == [start + timedelta(hours=1)]
        assert registry.jobs["plain"].next_ticks() == []
        assert len(nightly.next_ticks()) == 5

    def test_stacked(self) -> None:
        """Decorators can be stacked: each is a job of the function itself, with its schedule and arguments."""
        registry, seen = Registry(), []

        @registry.job(every="2s", name="two", args={"n": 2})
        @registry.job(every="3s", name="three", args={"m": 3})
        async def work(**given: int) -> None:
            seen.append(given)

        assert registry.jobs["two"].function is registry.jobs["three"].function
        registry.simulate("3s", start=START)
        assert seen == [{"n": 2}, {"m": 3}]
        with pytest.raises(ScheduleError, match=r"args=\{'n': 1\}: is for scheduled runs; add every=, cron= or after="):
            registry.job(name="none", args={"n": 1})(work.function)

    def test_repr(self) -> None:
        """A job shows its name and its schedule, a run its job, state and attempt."""
        registry, shown = Registry(), []
        for name, schedule in (
            ("a", {"cron": "@daily", "tz": "Europe/Rome"}),
            ("b", {"every": "1h30m"}),
            ("c", {"after": 0.25}),
            ("d", {}),
        ):
            shown.append(repr(registry.job(name=name, **schedule)(nothing)))
        assert shown == [
            "<Job a cron='@daily' tz=Europe/Rome>",
            "<Job b every=5,400 s>",
            "<Job c after=0.25 s>",
            "<Job d on submit>",
        ]
        assert repr(Depends(nothing)) == "Depends(nothing)"

        async def main() -> None:
            run = await registry.jobs["d"].submit()
            assert (repr(run), str(run)) == (f"<Run d {run.id} scheduled attempt=0>", f"d {run.id}")
            assert str(await registry.jobs["d"].after(1, key="k").submit()) == "d#k"

        registry.simulate("1s", start=START, main=main)

    def test_wrong_arguments(self) -> None:
        """Arguments that don't fit the function are refused when they are submitted, by name or without one."""
        registry = Registry()

        @registry.job
        async def work(a: object, b: object = 0) -> None: ...

        @registry.job
        async def named(a: int = 0, *, b: int) -> None: ...

        class Unshown:
            def __repr__(self) -> str:
                raise LookupError

        deep: list[object] = []
        for _ in range(100_000):
            deep = [deep]

        async def main() -> None:
            for args, kwargs, message in (
                ((deep,), {}, r"argument a=<list> isn't JSON \(.*\); pass plain values"),
                ((Unshown(),), {}, r"argument a=<Unshown> isn't JSON \(.*\); pass plain values"),
                ((), {}, "missing a required argument: 'a'"),
                ((1, 2, 3), {}, "too many positional arguments"),
                ((1,), {"c": 3}, "got an unexpected keyword argument 'c'"),
                ((1,), {"a": 1}, "multiple values for argument 'a'"),
                ((float("nan"),), {}, r"argument a=nan isn't JSON \(.*\); pass plain values"),
                ((1,), {"b": {2}}, r"argument b=\{2\} isn't JSON \(.*\); pass plain values"),
            ):
                with pytest.raises(TypeError, match=f"^job 'work': {message}"):
                    await work.submit(*args, **kwargs)
            with pytest.raises(TypeError, match=r"missing a required (keyword-only )?argument: 'b'"):
                await named.submit(1)
            largest = "x" * (2**20 - len('[[""],{}]'))
            await work.submit(largest)
            with pytest.raises(ValueError, match="are 1,048,577 bytes of JSON, the limit is 1 MiB; pass a reference"):
                await work.submit(largest + "x")

        assert len(registry.simulate("1s", start=START, main=main)) == 1


class TestEngine:
    def test_grid(self) -> None:
        """Ticks of an interval lie at start + n * every, however long the runs take."""
        registry = Registry()

        @registry.job(every="10s")
        async def slow() -> None:
            await asyncio.sleep(7.3)

        runs = registry.simulate("1m", start=START)
        assert [run.tick for run in runs] == [START + timedelta(seconds=10 * n) for n in range(1, 6)]

    @pytest.mark.parametrize(
        ("overlap", "starts", "skipped"),
        [("skip", [10, 40, 70, 100], 8), ("queue", [10, 35, 60, 85, 110], 6), ("all", [10, 35, 60, 85, 110], 0)],
    )
    def test_overlap(self, overlap: str, starts: list[int], skipped: int) -> None:
        """skip drops ticks that overlap, queue lets one wait, all runs every one in order."""
        registry, begun, ticks = Registry(), [], []

        @registry.job(every="10s", overlap=overlap)
        async def slow() -> None:
            begun.append(round(asyncio.get_running_loop().time()))
            ticks.append(current_run().tick)
            await asyncio.sleep(25)

        runs = registry.simulate("2m", start=START)
        assert begun == starts
        assert len(ended(runs, State.SKIPPED)) == skipped
        assert ticks == sorted(ticks)
        if overlap == "all":
            assert ticks == [START + timedelta(seconds=10 * n) for n in range(1, 6)]

    def test_parallelism(self) -> None:
        """Never more than `parallelism` runs at once; submitted runs start first in, first out, and none is skipped."""
        registry, order, now, most = Registry(), [], 0, 0

        @registry.job(parallelism=3)
        async def work(n: int) -> int:
            nonlocal now, most
            now, order[len(order) :] = now + 1, [n]
            most = max(most, now)
            await asyncio.sleep(1)
            now -= 1
            return n * n

        async def main() -> None:
            runs = [await work.submit(n) for n in range(50)]
            assert [await run.result() for run in runs] == [n * n for n in range(50)]

        registry.simulate("1h", start=START, main=main)
        assert most == 3
        assert order == list(range(50))

    def test_keys(self) -> None:
        """The same key is the same run, submitted once; a cancelled one frees its key, a finished one keeps it a day."""
        registry = Registry()

        @registry.job
        async def mail(to: str) -> str:
            return to

        async def main() -> None:
            one = await mail.after("5m", key="k").submit("a")
            assert await mail.after("1m", key="k").submit("b") is one
            assert await one.cancel()
            with pytest.raises(RunCancelled, match="run 'mail#k' was cancelled: cancelled on request"):
                await one.result()
            two = await mail.after("1m", key="k").submit("b")
            assert await two.result() == "b"
            await asyncio.sleep(86_000)
            assert await mail.after("1m", key="k").submit("c") is two
            await asyncio.sleep(500)
            assert await mail.after("1m", key="k").submit("c") is not two

        registry.simulate("2d", start=START, main=main)

    def test_key_of_a_long_run(self) -> None:
        """A key is kept for a day from the end of its run, however long that took."""
        registry = Registry()

        @registry.job
        async def long() -> None:
            await asyncio.sleep(30 * 3600)

        async def main() -> None:
            one = await long.after(0, key="k").submit()
            await one.result()
            await asyncio.sleep(86_000)
            assert await long.after(0, key="k").submit() is one
            await asyncio.sleep(500)
            assert await long.after(0, key="k").submit() is not one

        registry.simulate("3d", start=START, main=main)

    def test_timeout_and_cancel(self, caplog: pytest.LogCaptureFixture) -> None:
        """The reason written before the cancellation decides, clean-ups run, and the next tick still fires.

        What a clean-up raises after a cancel changes nothing, but isn't swallowed.
        """
        registry, cleaned = Registry(), []

        @registry.job(every="1m", timeout="5s")
        async def hangs() -> None:
            try:
                await asyncio.sleep(1000)
            finally:
                cleaned.append(1)

        @registry.job
        async def swallows() -> None:
            try:
                await asyncio.sleep(1000)
            except asyncio.CancelledError:
                raise ValueError("instead") from None

        async def main() -> None:
            run = await swallows.submit()
            await asyncio.sleep(1)
            assert await run.cancel()
            with pytest.raises(RunCancelled):
                await run.result()
            assert not await run.cancel()
            assert run.error == "ValueError: instead"

        runs = [run for run in registry.simulate("5m30s", start=START, main=main) if run.job == "hangs"]
        assert [(run.state, run.error) for run in runs] == [("failed", "TimeoutError: no end within 5 s")] * 5
        assert len(cleaned) == 5
        assert [r.exc_info is not None for r in caplog.records if "while it was cancelled" in r.getMessage()] == [True]

    def test_cancelled_before_first_step(self) -> None:
        """A task that somebody cancels before its first step gives its slot back."""
        registry = Registry()

        @registry.job(parallelism=1)
        async def work() -> int:
            return 1

        async def main() -> None:
            async with registry.running():
                run = await work.submit()
                while not (tasks := [t for t in asyncio.all_tasks() if t.get_name() == "work"]):
                    await asyncio.sleep(0)
                    if run.state is State.SUCCEEDED:
                        break
                for task in tasks:
                    task.cancel()
                second = await work.submit()
                assert await second.result(5) == 1

        asyncio.run(main())

    @pytest.mark.parametrize("cancelled", [False, True])
    def test_who_waits_for_a_slot_that_never_began(self, cancelled: bool) -> None:
        """Nobody has to ask for a run behind it to start, and a reason that was written before decides."""
        registry, runs = Registry(), []

        @registry.job(parallelism=1)
        async def work(n: int) -> None: ...

        def factory(loop: asyncio.AbstractEventLoop, coro: object, **keywords: object) -> asyncio.Task[object]:
            loop.set_task_factory(None)
            if cancelled:
                asyncio.Task(runs[0].cancel(), loop=loop)
            task = asyncio.Task(coro, loop=loop, **keywords)
            task.cancel()
            return task

        async def main() -> None:
            async with driven(registry):
                runs.extend([await work.submit(n) for n in range(2)])
                asyncio.get_running_loop().set_task_factory(factory)
                await asyncio.sleep(1)

        virtually(main())
        assert [run.state for run in runs] == ["cancelled" if cancelled else "failed", "succeeded"]

    def test_dependencies(self) -> None:
        """Dependencies are made once per attempt and cleaned up in reverse order, whatever the outcome."""
        registry, events = Registry(), []

        def a():
            events.append("a")
            try:
                yield 1
            finally:
                events.append("-a")

        async def b(a: int = Depends(a)):
            events.append("b")
            yield a + 1
            events.append("-b")

        @registry.job(after=0)
        async def work(x: int = Depends(a), y: int = Depends(b)) -> int:
            events.append(f"{x}{y}")
            return x + y

        for keywords, message in (({}, "pass x=…, y=…$"), ({"x": 1}, "pass y=…$")):
            with pytest.raises(TypeError, match=message):
                work(**keywords)
        assert asyncio.run(work(5, y=6)) == 11
        assert events.pop() == "56"
        (run,) = registry.simulate("1m", start=START)
        assert run.state is State.SUCCEEDED
        assert events == ["a", "b", "12", "-b", "-a"]

    def test_given_dependencies(self) -> None:
        """An argument that is passed wins over its dependency, which isn't made."""
        registry, made = Registry(), []

        @registry.job
        async def work(x: int = Depends(lambda: made.append(1) or 1), y: int = Depends(lambda: 2)) -> list[int]:
            return [x, y]

        async def main() -> None:
            assert await (await work.submit(y=5, x=6)).result() == [6, 5]
            assert await (await work.submit(7)).result() == [7, 2]
            assert made == []

        assert len(registry.simulate("1m", start=START, main=main)) == 2

    def test_factories(self) -> None:
        """Whatever can be called without arguments is a factory.

        A built-in type is one, a class whose objects aren't hashable, and an object that a generator makes callable.
        """
        registry, events = Registry(), []

        @dataclass
        class Settings:
            limit: int = 5

        class Opens:
            def __call__(self) -> Iterator[str]:
                yield "opened"
                events.append("closed")

        class OpensLater:
            async def __call__(self) -> AsyncIterator[str]:
                yield "opened later"
                events.append("closed later")

        @registry.job(after=0)
        async def work(
            a: int = Depends(int),
            s: Settings = Depends(Settings),  # noqa: B008
            b: str = Depends(Opens()),
            c: str = Depends(OpensLater()),
        ) -> None:
            events.append((a, s, b, c))

        (run,) = registry.simulate("1s", start=START)
        assert run.state is State.SUCCEEDED
        assert events == [(0, Settings(5), "opened", "opened later"), "closed later", "closed"]

    def test_signatures_are_read_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A factory's signature is read when the decorator checks it, not at each attempt; a replacement's then."""
        registry, read, signature = Registry(), [], bgjob._signature
        monkeypatch.setattr(bgjob, "_signature", lambda function: (read.append(function), signature(function))[1])

        def inner() -> int:
            return 1

        def outer(n: int = Depends(inner)) -> int:
            return n

        @registry.job(every="1s")
        async def work(n: int = Depends(outer)) -> int:
            return n

        assert len(registry.simulate("5s", start=START)) == 5
        assert read == [work.function, outer, inner]
        registry.overrides[inner] = int
        (run,) = registry.simulate("1s", start=START)
        assert run.error is None
        assert read[3:] == [int]

    def test_threads(self) -> None:
        """A plain function runs in a daemon thread with the run's context; its error is the run's."""
        registry, seen = Registry(), []

        @registry.job
        def plain(n: int) -> int:
            seen.append((threading.current_thread().daemon, current_run().job))
            return 1 // n

        async def main() -> None:
            async with registry.running():
                assert await (await plain.submit(1)).result(5) == 1
                with pytest.raises(RunFailed, match="ZeroDivisionError"):
                    await (await plain.submit(0)).result(5)

        asyncio.run(main())
        assert seen == [(True, "plain")] * 2

    def test_no_thread_left(self) -> None:
        """A thread that has given its result has ended when run() has, however late it gets the interpreter back."""
        registry = Registry()

        @registry.job
        def plain() -> None: ...

        async def main() -> None:
            async with registry.running():
                await (await plain.submit()).result()

        before = threading.active_count()
        for _ in range(50):
            asyncio.run(main())
            assert threading.active_count() == before

    def test_replay(self) -> None:
        """A year of weekday mornings with retries gives the same runs twice."""

        def year() -> list[tuple[str, int, str]]:
            registry, calls = Registry(), 0

            @registry.job(cron="0 6 * * mon-fri", retries=2)
            async def morning() -> None:
                nonlocal calls
                calls += 1
                if calls % 3 == 0:
                    raise ValueError

            return [(r.id, r.attempt, str(r.state)) for r in registry.simulate("365d", start=START)]

        first = year()
        assert len(first) == 261
        assert first == year()

    def test_clock_steps(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A clock set back neither freezes nor repeats an interval; set forward, it is caught up with one run."""
        registry, ticks, step = Registry(), [], 0.0
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + step)

        @registry.job(every="50ms")
        async def beat() -> None:
            ticks.append(1)

        async def main() -> None:
            nonlocal step
            async with registry.running():
                for step in (0.0, -3600.0, 0.0):
                    before = len(ticks)
                    await asyncio.sleep(0.4)
                    assert 3 <= len(ticks) - before <= 10

        asyncio.run(main())

    def test_shutdown(self) -> None:
        """Cancelling run() drains, cancels what is left, and is raised; nothing stays behind."""
        registry = Registry()

        @registry.job(after=0)
        async def long() -> None:
            await asyncio.sleep(1000)

        async def main() -> None:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await registry.run(drain="100ms")
            assert asyncio.all_tasks() == {asyncio.current_task()}

        before = threading.active_count(), signal.getsignal(signal.SIGTERM)
        asyncio.run(main())
        assert (threading.active_count(), signal.getsignal(signal.SIGTERM)) == before
        with pytest.raises(BgjobError, match="call it inside run"):
            asyncio.run(registry.find("x"))

    @pytest.mark.parametrize("signalled", [False, True])
    def test_stopped_while_it_opens(self, signalled: bool) -> None:
        """An "app" dependency that hangs doesn't keep a signal or a cancellation from ending run()."""
        registry, ended = Registry(), []

        async def hangs() -> None:
            try:
                await asyncio.sleep(10_000)
            finally:
                ended.append("hangs")

        @registry.job(every="1h")
        async def work(x: None = Depends(hangs, scope="app")) -> None: ...

        async def late() -> None:
            ended.append("late")

        async def main() -> None:
            task = asyncio.create_task(registry.run())
            await asyncio.sleep(1)
            registry.job(every="10s", name="late")(late)
            stop = registry._engine.stop if signalled else task.cancel
            stop()
            stop()
            with contextlib.suppress(asyncio.CancelledError):
                ended.append(await task)
            await asyncio.sleep(100)
            assert asyncio.get_running_loop().time() < 200
            assert registry._engine is None
            assert asyncio.all_tasks() == {asyncio.current_task()}

        virtually(main())
        assert ended == (["hangs", None] if signalled else ["hangs"])

    def test_replaced_and_removed(self) -> None:
        """The runs of a job that is replaced or removed are still found: by its cancel, and at the end."""
        registry, runs = Registry(), []

        def load(wait: float) -> bgjob.Job:
            @registry.job(parallelism=1)
            async def work(n: int) -> None:
                await asyncio.sleep(wait)

            return work

        async def main() -> None:
            async with driven(registry):
                runs.extend([await load(1000).submit(n) for n in range(1)])
                runs.append(await registry.jobs["work"].submit(1))
                await asyncio.sleep(1)
                runs.append(await load(1000).submit(2))
                await asyncio.sleep(1)
                assert await runs[0].cancel()
                await asyncio.sleep(1)
                assert [run.state for run in runs] == ["cancelled", "running", "running"]
                assert await registry.jobs["work"].cancel() == 2
                runs.append(await registry.jobs["work"].submit(3))
                runs.append(await registry.jobs["work"].submit(4))
                await asyncio.sleep(1)
                load(1)
            assert [run.state for run in runs] == ["cancelled"] * 5
            await runs[4].result()

        with pytest.raises(RunCancelled, match="stopped"):
            virtually(main())

    def test_what_would_not_stop(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        """A task that ignores its cancellation and a thread are named in the log, and don't hold the shutdown."""
        registry, release = Registry(), threading.Event()
        monkeypatch.setattr(bgjob, "_GRACE", 0.1)

        @registry.job(after=0)
        async def stubborn() -> None:
            while not release.is_set():
                try:
                    await asyncio.sleep(0.01)
                except asyncio.CancelledError:
                    continue

        @registry.job(after=0)
        def blocked() -> None:
            release.wait(10)

        async def main() -> set[str]:
            async with registry.running(drain="50ms"):
                await asyncio.sleep(0.1)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            left = {task.get_name() for task in asyncio.all_tasks()} - {asyncio.current_task().get_name()}
            release.set()
            await asyncio.sleep(0.1)
            return left

        assert asyncio.run(main()) == {"stubborn"}
        named = sorted(r.getMessage().split("@")[0] for r in caplog.records if "would not stop" in r.getMessage())
        assert named == ["blocked", "stubborn"]
        gc.collect()
        assert not [r for r in caplog.records if r.name == "asyncio"]

    @pytest.mark.skipif(not hasattr(asyncio, "eager_task_factory"), reason="needs Python 3.12")
    def test_eager_tasks(self) -> None:
        """With an eager task factory slots, order and a run that cancels itself in its first step are right."""
        registry, cancelled = Registry(), []

        @registry.job(parallelism=2)
        async def work(n: int) -> int:
            if n == 5:
                await current_run().cancel()
                try:
                    await asyncio.sleep(1)
                except asyncio.CancelledError:
                    cancelled.append(n)
                    raise
            return n

        async def main() -> list[object]:
            asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
            async with registry.running():
                runs = [await work.submit(n) for n in range(2000)]
                with pytest.raises(RunCancelled):
                    await runs[5].result(5)
                return [await run.result(5) for run in runs if run is not runs[5]]

        assert asyncio.run(main()) == [n for n in range(2000) if n != 5]
        assert cancelled == [5]

    @pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_signals(self, number: int) -> None:
        """SIGINT and SIGTERM drain, and run() returns."""
        code = (
            "import asyncio, bgjob, os, logging; logging.basicConfig(level=20)\n"
            f"@bgjob.job(every='100ms')\nasync def f(): os.kill(os.getpid(), {int(number)}); await asyncio.sleep(.2)\n"
            "asyncio.run(bgjob.run()); print('returned')"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=False)
        assert (done.returncode, done.stdout) == (0, "returned\n")
        assert "draining 1 runs, at most 20 s" in done.stderr

    def test_changes_from_an_event(self) -> None:
        """A hook that removes and adds jobs while others are being handed out makes no tick come twice."""
        registry, fired = Registry(), []

        async def unrelated() -> None: ...

        def hook(run: Run) -> None:
            if run.state is State.SKIPPED:
                registry.remove("unrelated")
                registry.job(every="1h")(unrelated)

        async def noted() -> None:
            fired.append(current_run().id)
            if current_run().job == "first":
                await asyncio.sleep(1000)

        async def main() -> None:
            async with driven(registry, hook):
                await asyncio.sleep(65)

        registry.job(every="1h")(unrelated)
        for name in ("first", "second", "third"):
            registry.job(every="10s", name=name)(noted)
        virtually(main())
        assert len(fired) == len(set(fired)) == 1 + 2 * 6

    @pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
    @pytest.mark.parametrize(("first", "second"), [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)])
    def test_second_signal(self, first: int, second: int) -> None:
        """A second signal ends the wait for what runs; what was installed before the first is put back."""
        code = (
            "import asyncio, bgjob, os, logging, signal; logging.basicConfig(level=20)\n"
            "@bgjob.job(after=0)\nasync def f():\n"
            f"    os.kill(os.getpid(), {int(first)})\n"
            "    while not bgjob.default._engine._idle: await asyncio.sleep(.01)\n"
            f"    os.kill(os.getpid(), {int(second)})\n    await asyncio.sleep(1000)\n"
            "asyncio.run(bgjob.run(drain='10m'))\n"
            "print(signal.getsignal(2) is signal.default_int_handler, signal.getsignal(15) is signal.SIG_DFL)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=False)
        assert (done.returncode, done.stdout) == (0, "True True\n"), done.stderr
        assert "draining 1 runs, at most 600 s; Ctrl-C again cancels them" in done.stderr
        assert "cancelled: run() stopped" in done.stderr

    @pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
    def test_uvicorn(self) -> None:
        """In an ASGI server's lifespan its own signal handling is untouched, and the drain is part of its shutdown."""
        pytest.importorskip("uvicorn", reason="uvicorn isn't installed: pip install uvicorn")
        code = (
            "import asyncio, bgjob, os, signal, uvicorn\n"
            "def handlers(): return [getattr(signal.getsignal(n), '__name__', '?') for n in (2, 15)]\n"
            "@bgjob.job(after='10ms')\nasync def f():\n"
            "    while not server.started: await asyncio.sleep(.01)\n"
            "    print(handlers()); os.kill(os.getpid(), 15)\n"
            "    while not bgjob.default._engine._closing: await asyncio.sleep(.01)\n"
            "    print('drained', flush=True)\n"
            "async def app(scope, receive, send):\n"
            "    assert (await receive())['type'] == 'lifespan.startup'\n"
            "    before = handlers()\n"
            "    async with bgjob.running():\n"
            "        assert handlers() == before\n"
            "        await send({'type': 'lifespan.startup.complete'}); await receive()\n"
            "    assert handlers() == before\n"
            "    await send({'type': 'lifespan.shutdown.complete'})\n"
            "server = uvicorn.Server(uvicorn.Config(app, port=0, log_level='warning'))\n"
            "server.run()"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=False)
        assert done.stdout == "['handle_exit', 'handle_exit']\ndrained\n", done.stderr
        assert done.returncode == -signal.SIGTERM, done.stderr

    def test_thread_outlives_its_timeout(self) -> None:
        """A thread can't be cancelled: timeout and cancel decide its outcome, but it keeps its slot until it ends."""
        registry, release, begun = Registry(), threading.Event(), []

        @registry.job(parallelism=1, timeout="20ms")
        def blocked(n: int) -> str:
            begun.append(n)
            release.wait(10)
            return "too late"

        async def main() -> None:
            async with registry.running():
                runs = [await blocked.submit(n) for n in range(3)]
                with pytest.raises(TimeoutError, match="it is running"):
                    await runs[0].result("100ms")
                assert (runs[0].stop, begun) == ("timeout", [0])
                assert await runs[0].cancel()
                release.set()
                with pytest.raises(RunFailed, match=r"TimeoutError: no end within 0.02 s"):
                    await runs[0].result(5)
                assert await runs[1].result(5) == await runs[2].result(5) == "too late"

        asyncio.run(main())

    def test_slots_come_back(self) -> None:
        """However a run ends, as many new ones as `parallelism` start after it."""
        registry, misdeeds, now, most = Registry(), iter(()), 0, 0

        class Base(BaseException):
            pass

        async def fails() -> None:
            raise Base

        async def group() -> None:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(fails())
                await asyncio.sleep(1)

        async def swallows() -> None:
            for _ in range(5):
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(10)

        async def cancels_itself() -> None:
            asyncio.current_task().cancel()
            await asyncio.sleep(1)

        async def exits() -> None:
            sys.exit(3)

        @registry.job(parallelism=2, timeout="10s")
        async def work() -> None:
            nonlocal now, most
            misdeed = next(misdeeds, None)
            if misdeed:
                await misdeed()
            now += 1
            most = max(most, now)
            await asyncio.sleep(1)
            now -= 1

        async def main() -> None:
            nonlocal misdeeds, most
            for misdeed in (fails, group, swallows, cancels_itself, exits):
                misdeeds, most = iter([misdeed] * 3), 0
                for run in [await work.submit() for _ in range(3)]:
                    with pytest.raises(RunFailed):
                        await run.result()
                for run in [await work.submit() for _ in range(4)]:
                    await run.result()
                assert most == 2, misdeed

        registry.simulate("1h", start=START, main=main)

    def test_memory(self) -> None:
        """What has ended is let go: the number of objects doesn't grow with the number of runs."""
        registry, counts = Registry(), []

        @registry.job(every="1s")
        async def often() -> None: ...

        @registry.job(every="1s", retries=1, retry_delay=0)
        async def fails() -> None:
            raise ValueError

        @registry.job
        async def mail(n: int) -> int:
            return n

        async def main() -> None:
            async with driven(registry, lambda run: None):
                for _ in range(3):
                    for n in range(1500):
                        await (await mail.submit(n)).result()
                        await (await mail.after("1h").submit(n)).cancel()
                        await asyncio.sleep(1)
                    gc.collect()
                    counts.append(len(gc.get_objects()))

        with suppress_logging():
            virtually(main())
        assert abs(counts[2] - counts[1]) < 300, counts

    def test_traceback_without_configuration(self) -> None:
        """The last failure's traceback is on stderr though nobody configured logging."""
        code = (
            "import bgjob\n@bgjob.job(after=0, retries=1)\nasync def f(): raise ValueError('boom')\n"
            "bgjob.simulate('1h')"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=False)
        assert "failed at attempt 1 of 2: ValueError: boom; retry in" in done.stderr
        assert done.stderr.count("Traceback") == 1


class Stepped(bgjob._VirtualClock):
    """A virtual clock that somebody sets."""

    slice = 30_000
    step = 0.0

    def __init__(self, loop: asyncio.AbstractEventLoop, start: float) -> None:
        super().__init__(loop, start)
        wall = self.wall
        self.wall = lambda: wall() + self.step


class TestClockSteps:
    """Each job starts at 00:00, the clock is set at 00:33:20, and what counts is seconds since the start."""

    @pytest.mark.parametrize(
        ("step", "every", "wild", "fixed", "delay", "instant"),
        [
            # half an hour on: one catch-up within 30 s, and on by the new time
            (3600, [2010, 4500], [2010, 2400], [2010, 5400], 2010, 2010),
            # an hour back: intervals and delays as if nothing had been; fixed waits for its next, wild goes on at once
            (-3600, [2700, 5400], [2400, 3000], [9000, 12600], 3650, 7200),
            # more than three hours back: fixed goes by the new time too
            (-4 * 3600, [2700, 5400], [2400, 3000], [16200, 19800], 3650, 18000),
        ],
    )
    def test_steps(self, step: int, every: list[int], wild: list[int], fixed: list[int], delay: int,
                   instant: int) -> None:  # fmt: skip
        """A step is seen within 30 s; nothing bursts, freezes or comes twice, whichever way the clock is set."""
        registry, begun = Registry(), {}

        async def noted(seconds: float = 0) -> None:
            begun.setdefault(current_run().key or current_run().job, []).append(asyncio.get_running_loop().time())
            await asyncio.sleep(seconds)

        registry.job(every="45m", name="every")(noted)
        registry.job(cron="*/10 * * * *", name="wild")(noted)
        registry.job(cron="30 * * * *", name="hourly")(noted)
        registry.job(cron="30 0-5 * * *", name="fixed")(noted)
        registry.job(every="10m", name="parked", overlap="all", args={"seconds": 1000})(noted)
        registry.job(name="call")(noted)

        async def main() -> None:
            clock = Stepped(asyncio.get_running_loop(), START.timestamp())
            engine = bgjob._Engine(registry, None, 0, None, clock)
            await engine.open()
            await asyncio.sleep(50)
            calls = registry.jobs["call"]
            await calls.after("1h", key="delay").submit()
            await calls.at(START + timedelta(hours=1), key="instant").submit()
            await asyncio.sleep(1950)
            clock.step = step
            await asyncio.sleep(6 * 3600)
            await engine.close()

        virtually(main())
        near = {name: [t for t in times if t > 2000] for name, times in begun.items()}
        assert near["every"][:2] == every
        assert near["wild"][:2] == wild
        assert near["fixed"][:2] == fixed
        assert near["parked"][:3] == [2600, 3600, 4600]
        assert (near["delay"], near["instant"]) == ([delay], [instant])

    def test_waiting_ticks(self) -> None:
        """A tick that waits while the clock is set back isn't late by less than it waited."""
        registry, late = Registry(), []

        @registry.job(every="10s", overlap="queue")
        async def slow() -> None:
            late.append(round(current_run().late))
            await asyncio.sleep(25)

        async def main() -> None:
            clock = Stepped(asyncio.get_running_loop(), START.timestamp())
            engine = bgjob._Engine(registry, None, 0, None, clock)
            await engine.open()
            await asyncio.sleep(22)
            clock.step = -3600
            await asyncio.sleep(15)
            await engine.close()

        virtually(main())
        assert late == [0, 15]

    def test_gap(self, caplog: pytest.LogCaptureFixture) -> None:
        """A week's gap of an interval is one run and one line with first, last and number."""
        registry = Registry()

        @registry.job(every="1s")
        async def often() -> None: ...

        async def main() -> None:
            await asyncio.sleep(10)
            asyncio.get_running_loop()._virtual.elapsed += 7 * 86_400

        runs = registry.simulate("604815s", start=START, main=main)
        assert len(runs) == 16
        assert [r.getMessage() for r in caplog.records if "came due" in r.getMessage()] == [
            "job 'often': 604800 ticks came due together, 2026-01-01T00:00:11Z to 2026-01-08T00:00:10Z:"
            " only the newest runs"
        ]


class TestEdges:
    def test_early_timers(self) -> None:
        """What is due within 2 ms is due, once."""
        registry, begun = Registry(), []

        @registry.job(every="10s")
        async def work() -> None:
            begun.append(asyncio.get_running_loop().time())

        async def main() -> None:
            async with driven(registry) as engine:
                await asyncio.sleep(9.9985)
                engine._wake()
                await asyncio.sleep(1)

        virtually(main())
        assert [round(t, 4) for t in begun] == [9.9985]

    def test_nothing_begins_in_a_drain(self) -> None:
        """Not even where the store's clock went on or back meanwhile, which sets the timer anew."""
        registry, begun = Registry(), []

        @registry.job(every="10s", parallelism=9)
        async def work() -> None:
            begun.append(1)
            await asyncio.sleep(100)

        async def main() -> None:
            async with driven(registry, drain=90_000) as engine:
                await asyncio.sleep(11)
                asyncio.get_running_loop().call_later(5, setattr, engine, "_armed", float("inf"))
                asyncio.get_running_loop().call_later(5, engine._arm)

        virtually(main())
        assert begun == [1]

    def test_one_bug_stops_nothing(self) -> None:
        """The timer is set again also when admitting failed."""
        registry, begun = Registry(), []

        @registry.job(every="10s")
        async def work() -> None:
            begun.append(1)

        async def main() -> None:
            async with driven(registry):
                with pytest.MonkeyPatch.context() as patch:

                    def once(_: object) -> None:
                        patch.undo()
                        raise RuntimeError

                    patch.setattr(bgjob._Engine, "_admit", once)
                    await asyncio.sleep(60)

        with suppress_logging():
            virtually(main())
        assert begun

    def test_no_run(self) -> None:
        """Outside a run there is no current one."""
        with pytest.raises(BgjobError, match="no run is executing here; call it inside a job's function"):
            current_run()

    def test_context(self) -> None:
        """Every run starts in a copy of the context in which run() was called, whoever submits it."""
        registry, where = Registry(), ContextVar("where", default="nowhere")

        @registry.job
        async def work() -> str:
            return where.get()

        async def main() -> None:
            where.set("at the start")
            async with driven(registry):
                where.set("later")
                assert await (await work.submit()).result() == "at the start"

        virtually(main())

    def test_task_factory_that_fails(self) -> None:
        """A task that can't be made is a failed run, and its slot comes back."""
        registry = Registry()

        @registry.job(parallelism=1)
        async def work() -> int:
            return 1

        def factory(loop: asyncio.AbstractEventLoop, coro: object, **keywords: object) -> object:
            loop.set_task_factory(None)
            raise OSError("no task")

        async def main() -> None:
            runs = [await work.submit() for _ in range(2)]
            asyncio.get_running_loop().set_task_factory(factory)
            assert await runs[1].result() == 1
            with pytest.raises(RunFailed, match="OSError: no task"):
                await runs[0].result()

        registry.simulate("1m", start=START, main=main)

    @pytest.mark.parametrize("asked", ["before", "after", "never"])
    def test_task_that_never_began(self, asked: str) -> None:
        """It ends its run for whoever waits for it, before or after, and doesn't hold the drain."""
        registry = Registry()

        @registry.job
        async def work() -> None: ...

        def factory(loop: asyncio.AbstractEventLoop, coro: object, **keywords: object) -> asyncio.Task[object]:
            loop.set_task_factory(None)
            task = asyncio.Task(coro, loop=loop, **keywords)
            task.cancel()
            return task

        async def main() -> float:
            async with driven(registry, drain=1_000_000):
                run = await work.submit()
                waiter = asyncio.create_task(run.result("5s"))
                if asked != "before":
                    waiter.cancel()
                await asyncio.sleep(0)
                asyncio.get_running_loop().set_task_factory(factory)
                await asyncio.sleep(1)
                with contextlib.suppress(asyncio.CancelledError, RunFailed):
                    await waiter
                if asked == "after":
                    with pytest.raises(RunFailed, match="cancelled before its first step"):
                        await run.result("5s")
            assert run.state is State.FAILED
            return asyncio.get_running_loop().time()

        assert virtually(main()) < 2

    def test_cancel_between_start_and_first_step(self) -> None:
        """A run that is cancelled there never begins."""
        registry, begun = Registry(), []

        @registry.job
        async def work() -> None:
            begun.append(1)

        def factory(loop: asyncio.AbstractEventLoop, coro: object, **keywords: object) -> asyncio.Task[object]:
            loop.set_task_factory(None)
            asyncio.Task(runs[0].cancel(), loop=loop)
            return asyncio.Task(coro, loop=loop, **keywords)

        async def main() -> None:
            runs.append(await work.submit())
            asyncio.get_running_loop().set_task_factory(factory)
            with pytest.raises(RunCancelled, match="on request"):
                await runs[0].result()

        runs: list[Run] = []
        registry.simulate("1m", start=START, main=main)
        assert begun == []

    def test_cancel_everywhere(self) -> None:
        """A cancelled run never starts: not when it is due, not when a slot is free, not when it would be retried."""
        registry, begun = Registry(), []

        @registry.job(parallelism=1, retries=1, retry_delay="10s")
        async def work(name: str, seconds: float = 0) -> None:
            begun.append(name)
            await asyncio.sleep(seconds)
            if name == "fails":
                raise ValueError

        async def main() -> None:
            fails = await work.submit("fails")
            await asyncio.sleep(1)
            runs = [fails, await work.after("1m").submit("delayed")]
            first = await work.submit("first", 5)
            runs.append(await work.submit("waiting"))
            await asyncio.sleep(1)
            assert [await run.cancel() for run in runs] == [True] * 3
            assert {run.state for run in runs} == {State.CANCELLED}
            await first.result()
            assert not await first.cancel()
            assert await registry.find("unknown") is None
            assert await registry.find(first.id) is first

        registry.simulate("1h", start=START, main=main)
        assert begun == ["fails", "first"]

    def test_attempts_are_apart(self) -> None:
        """Neither the timeout of an earlier attempt nor its reason touches the next, and a retry counts from the end."""
        registry, begun = Registry(), []

        @registry.job(timeout="10s", retries=1, retry_delay="5s")
        async def work(seconds: list[float]) -> str:
            begun.append(asyncio.get_running_loop().time())
            await asyncio.sleep(seconds[current_run().attempt - 1])
            if current_run().attempt == 1:
                raise ValueError
            return "done"

        async def main() -> None:
            assert await (await work.submit([1, 9])).result() == "done"
            assert await (await work.submit([99, 9])).result() == "done"

        registry.simulate("1h", start=START, main=main)
        assert begun == [0, 6, 15, 30]

    def test_events(self) -> None:
        """on_event sees every change of a run's state, in order."""
        registry, seen = Registry(), []

        @registry.job(after=0, retries=1, retry_delay="5s")
        async def work() -> None:
            if current_run().attempt == 1:
                raise ValueError

        async def main() -> None:
            async with driven(registry, lambda run: seen.append(f"{run.state} {run.attempt}")):
                await asyncio.sleep(60)

        virtually(main())
        assert seen == ["running 1", "scheduled 1", "running 2", "succeeded 2"]

    def test_on_error(self, caplog: pytest.LogCaptureFixture) -> None:
        """It runs once, before the run is settled, free of the timeout's cancellation, and for 30 s at most."""
        registry, told = Registry(), []

        async def hook(run: Run, error: BaseException) -> None:
            told.append((run.state, repr(error), asyncio.current_task().cancelling(), current_run() is run))
            await asyncio.sleep(10_000)

        @registry.job(on_error=hook)
        async def fails() -> None:
            raise ValueError

        @registry.job(on_error=hook, timeout="5s")
        async def hangs() -> None:
            await asyncio.sleep(10_000)

        async def main() -> None:
            for job, end in ((fails, 30), (hangs, 40)):
                with pytest.raises(RunFailed):
                    await (await job.submit()).result()
                assert round(asyncio.get_running_loop().time()) == end

        registry.simulate("1h", start=START, main=main)
        assert told == [
            (State.RUNNING, "ValueError()", 0, True),
            (State.RUNNING, "TimeoutError('no end within 5 s')", 0, True),
        ]
        assert sum("on_error failed: TimeoutError" in r.getMessage() for r in caplog.records) == 2

    def test_on_error_in_a_thread(self) -> None:
        """A plain on_error runs in a thread, so that it can't block the loop."""
        registry, threads = Registry(), []

        @registry.job(on_error=lambda run, error: threads.append(threading.current_thread().name))
        async def fails() -> None:
            raise ValueError

        async def main() -> None:
            async with registry.running():
                with pytest.raises(RunFailed):
                    await (await fails.submit()).result(5)

        asyncio.run(main())
        assert threads == ["bgjob fails on_error"]

    def test_expires(self) -> None:
        """What would start later than `expires` is skipped, judged at the first start only."""
        registry, begun = Registry(), []

        @registry.job(parallelism=1, expires="5s", retries=1, retry_delay="1m")
        async def work(n: int) -> None:
            begun.append(n)
            await asyncio.sleep(4)
            if current_run().attempt == 1:
                raise ValueError

        async def main() -> None:
            runs.extend([await work.submit(n) for n in range(3)])

        runs: list[Run] = []
        registry.simulate("10m", start=START, main=main)
        assert [(run.state, run.reason) for run in runs] == [
            ("succeeded", None), ("succeeded", None), ("skipped", "expired: 8 s late, expires=5 s"),
        ]  # fmt: skip
        assert begun == [0, 1, 0, 1]

    def test_expires_soon(self) -> None:
        """A start that would be too late by less than a second, where no lateness is warned of, is skipped as well."""
        registry = Registry()

        @registry.job(parallelism=1, expires="500ms")
        async def work() -> None:
            await asyncio.sleep(0.4)

        async def main() -> None:
            for _ in range(3):
                await work.submit()

        runs = registry.simulate("1m", start=START, main=main)
        assert [run.state for run in runs] == ["succeeded", "succeeded", "skipped"]

    def test_jitter(self) -> None:
        """Jitter spreads the starts, never past the next tick, and is the same in every replay."""

        def starts() -> list[float]:
            registry = Registry()

            @registry.job(every="10s", jitter="1h")
            async def work() -> None: ...

            return [run.late for run in registry.simulate("10m", start=START)]

        first = starts()
        assert first == starts()
        assert all(0 <= late < 10 for late in first)
        assert len({round(late) for late in first}) > 5

    def test_warnings(self, caplog: pytest.LogCaptureFixture) -> None:
        """Ticks skipped by overlap are one line at the first and one with the number; a late start is a warning."""
        registry = Registry()

        @registry.job(every="10s")
        async def slow() -> None:
            await asyncio.sleep(55 if current_run().tick.minute == 0 and current_run().tick.second == 10 else 1)

        @registry.job(every="10s", overlap="queue")
        async def queued() -> None:
            await asyncio.sleep(12)

        registry.simulate("85s", start=START)
        lines = [r.getMessage() for r in caplog.records]
        assert [line for line in lines if "slow" in line] == [
            "slow@2026-01-01T00:00:20Z skipped: 1 earlier ticks of the job are unfinished",
            "job 'slow' runs again: 5 ticks were skipped",
        ]
        assert "queued@2026-01-01T00:00:20Z starts 2 s late" in lines

    def test_times_of_a_run(self) -> None:
        """A run tells when its last attempt started and ended, what it took and how late it was; nothing before that."""
        registry, seen = Registry(), []

        def note(run: Run) -> None:
            times = [when and (when - START).total_seconds() for when in (run.started_at, run.finished_at)]
            seen.append((*times, run.duration, run.late, run.attempt))

        @registry.job(retries=1, retry_delay=60)
        async def work() -> None:
            note(current_run())
            await asyncio.sleep(1.5)
            if current_run().attempt == 1:
                raise ValueError

        async def main() -> None:
            run = await work.after(5).submit()
            note(run)
            await run.result()
            note(run)

        registry.simulate("10m", start=START, main=main)
        assert seen == [
            (None, None, None, 0, 0),
            (5, None, None, 0, 1),
            (66.5, None, None, 61.5, 2),
            (66.5, 68, 1.5, 61.5, 2),
        ]

    def test_ends_in_the_log(self, caplog: pytest.LogCaptureFixture) -> None:
        """A success is INFO with what it took and, after a failure, the attempt; so is what was asked for, the rest is more."""
        caplog.set_level(logging.INFO)
        registry = Registry()

        class Odd(Exception):
            def __str__(self) -> str:
                raise ValueError

        @registry.job(after=0)
        async def first() -> None:
            await asyncio.sleep(1.5)

        @registry.job(after=3, retries=1, retry_delay=1)
        async def second() -> None:
            if current_run().attempt == 1:
                raise Odd

        @registry.job(after=5)
        async def third() -> None:
            raise Odd

        @registry.job(parallelism=1, expires=5)
        async def fourth() -> None:
            await asyncio.sleep(30)

        async def main() -> None:
            runs = [await fourth.after(10, key=key).submit() for key in "abc"]
            await runs[2].cancel()
            await asyncio.sleep(20)
            await runs[0].cancel()

        registry.simulate("1m", start=START, main=main)
        words = "succeeded|failed|cancelled|skipped"
        ends = [(r.levelname, r.getMessage()) for r in caplog.records if re.search(words, r.getMessage())]
        assert ends == [
            ("INFO", "fourth#c cancelled: cancelled on request"),
            ("INFO", "first@2026-01-01T00:00:00Z succeeded in 1.5 s"),
            ("WARNING", "second@2026-01-01T00:00:03Z failed at attempt 1 of 2: Odd: <its str() raises>; retry in 1 s"),
            ("INFO", "second@2026-01-01T00:00:03Z succeeded in 0 s, attempt 2"),
            ("ERROR", "third@2026-01-01T00:00:05Z failed at attempt 1: Odd: <its str() raises>"),
            ("INFO", "fourth#a cancelled: cancelled on request"),
            ("WARNING", "fourth#b skipped: expired: 10 s late, expires=5 s"),
        ]

    @pytest.mark.parametrize(("reason", "state"), [("cancel", "cancelled"), ("shutdown", "succeeded")])
    def test_a_cancellation_that_is_caught(self, reason: str, state: str) -> None:
        """Who returns all the same is cancelled if that was asked for, and done where only the end of run() came."""
        registry = Registry()

        @registry.job
        async def saves() -> None:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(1000)

        async def main() -> str:
            async with driven(registry):
                run = await saves.submit()
                await asyncio.sleep(1)
                if reason == "cancel":
                    await run.cancel()
            return run.state

        assert virtually(main()) == state

    def test_failures_let_go(self) -> None:
        """A failed run is remembered with its traceback, but not with what the function's variables held."""
        registry, held = Registry(), []

        class Big:
            pass

        @registry.job(after=0)
        async def work() -> None:
            big = Big()
            held.append(weakref.ref(big))
            raise ValueError("no")

        async def main() -> None:
            async with driven(registry) as engine:
                await asyncio.sleep(1)
                gc.collect()
                (run,) = engine._past._recent.values()
                assert (held[0](), run.error) == (None, "ValueError: no")
                with pytest.raises(RunFailed) as failed:
                    await run.result()
                assert "in work" in "".join(traceback.format_exception(failed.value.__cause__))

        virtually(main())

    def test_failures_let_others_go_on(self) -> None:
        """An exception object that another task has met before doesn't end that one when a run fails with it."""
        registry, broken, seen = Registry(), ConnectionError("lost"), []

        def numbers() -> Iterator[int]:
            with contextlib.suppress(ConnectionError):
                raise broken
            yield from (1, 2)

        async def stream() -> AsyncIterator[int]:
            for number in numbers():
                with contextlib.suppress(ConnectionError):
                    raise broken
                await asyncio.sleep(2)
                yield number

        @registry.job(after="1s")
        async def fails() -> None:
            raise broken

        async def main() -> None:
            async for number in stream():
                seen.append(number)

        (run,) = registry.simulate("1m", start=START, main=main)
        assert (run.error, seen) == ("ConnectionError: lost", [1, 2])

    def test_what_follows_the_yield(self) -> None:
        """It runs whatever the outcome; what was raised is seen by a `try` or `with` around the yield, and by no other."""
        events: list[str] = []

        @contextlib.contextmanager
        def transaction():
            try:
                yield
                events.append("commit")
            except BaseException as error:
                events.append(f"rollback {type(error).__name__}")
                raise

        def plain():
            for number in (1, 2):
                if number == 2:
                    yield 1
            events.append("plain")

        def within():
            with transaction():
                yield 1

        async def async_plain():
            yield 1
            await asyncio.sleep(0)
            events.append("async plain")

        async def async_within():
            try:
                yield 1
            finally:
                events.append("finally")

        def left_before():
            with contextlib.suppress(ValueError):
                int("1")
            yield 1
            events.append("left before")

        def far_down():
            values = [int("1"), int("2"), int("3"), int("4"), int("5"), int("6"), int("7"), int("8"), int("9")]
            values += [int("1"), int("2"), int("3"), int("4"), int("5"), int("6"), int("7"), int("8"), int("9")]
            with transaction():
                yield sum(values)

        factories = (plain, within, async_plain, async_within, left_before, far_down)
        for outcome in ("succeeds", "fails", "hangs"):
            for factory in factories:
                registry = Registry()

                @registry.job(after=0, timeout="1s")
                async def work(x: int = Depends(factory), outcome: str = outcome) -> None:
                    if outcome == "fails":
                        raise ValueError
                    await asyncio.sleep(5 if outcome == "hangs" else 0)

                registry.simulate("1m", start=START)
        ends = [["commit"], ["rollback ValueError"], ["rollback CancelledError"]]
        rest = ("async plain", "finally", "left before")
        assert events == [event for end in ends for event in ("plain", *end, *rest, *end)]

    def test_a_factory_that_swallows(self) -> None:
        """A dependency that swallows what was raised at its yield doesn't turn a failure into a success."""
        registry = Registry()

        def swallows():
            with contextlib.suppress(ValueError):
                yield 1

        @registry.job(after=0)
        async def work(x: int = Depends(swallows)) -> None:
            raise ValueError("no")

        (run,) = registry.simulate("1m", start=START)
        assert (run.state, run.error) == ("failed", "ValueError: no")

    def test_app_dependencies(self) -> None:
        """They are made before the first run, also where only a "run" one needs them, and outlive the last."""
        registry, events = Registry(), []

        async def pool():
            events.append("open")
            yield "pool"
            events.append("close")

        def connection(pool: str = Depends(pool, scope="app")) -> str:
            return pool

        @registry.job(every="1s")
        async def work(x: str = Depends(connection)) -> None:
            try:
                await asyncio.sleep(1000)
            finally:
                events.append("ended")

        async def main() -> None:
            async with driven(registry):
                assert events == ["open"]
                await asyncio.sleep(1.5)

        virtually(main())
        assert events == ["open", "ended", "close"]

    def test_app_failure(self) -> None:
        """An "app" dependency that fails is the failure of run(), which leaves the registry free for another."""
        registry = Registry()

        def fails() -> None:
            raise ValueError("no")

        @registry.job
        async def work(x: None = Depends(fails, scope="app")) -> None: ...

        for _ in range(2):
            with pytest.raises(ValueError, match="no"):
                registry.simulate("1s", start=START)

    def test_app_clean_up(self, caplog: pytest.LogCaptureFixture) -> None:
        """A clean-up of an "app" dependency that fails or hangs is logged, and holds nothing up for ever."""

        async def fails():
            yield
            raise ValueError("no")

        async def hangs():
            yield
            await asyncio.Event().wait()

        for factory in (fails, hangs):
            registry = Registry()

            @registry.job
            async def work(x: None = Depends(factory, scope="app")) -> None: ...

            registry.simulate("1s", start=START)
        assert [(r.levelname, r.getMessage(), r.exc_info and r.exc_info[0]) for r in caplog.records] == [
            ("ERROR", "clean-up of app dependencies failed: ValueError: no", ValueError),
            ("ERROR", "clean-up of app dependencies did not end within 5 s; cancelled", None),
        ]

    def test_drain(self) -> None:
        """While it drains nothing starts, no tick, no waiting run, no call; afterwards no timer fires."""
        registry, begun = Registry(), []

        @registry.job(every="1s", name="ticks")
        async def ticks() -> None:
            begun.append("tick")

        @registry.job(parallelism=1)
        async def work(n: int) -> None:
            begun.append(n)
            await asyncio.sleep(10)

        async def main() -> None:
            async with driven(registry, drain=60_000):
                runs = [await work.submit(n) for n in range(2)]
                await asyncio.sleep(1.5)
                asyncio.get_running_loop().call_later(1, asyncio.ensure_future, late())
            await asyncio.sleep(100)
            assert [run.state for run in runs] == ["succeeded", "cancelled"]

        async def late() -> None:
            with pytest.raises(BgjobError, match="is stopping"):
                await work.submit(2)
            begun.append("refused")

        virtually(main())
        assert begun == [0, "tick", "refused"]

    @pytest.mark.parametrize("first", ["cancel", "stop"])
    def test_cancel_while_draining(self, first: str, caplog: pytest.LogCaptureFixture) -> None:
        """A cancel that comes while it drains ends the wait, lets clean-ups run, and is raised."""
        registry, cleaned = Registry(), []

        @registry.job(after=0)
        async def long() -> None:
            try:
                await asyncio.sleep(10_000)
            finally:
                await asyncio.sleep(0)
                cleaned.append(asyncio.get_running_loop().time())

        async def main() -> None:
            task = asyncio.create_task(registry.run(drain="1h"))
            await asyncio.sleep(1)
            registry._engine.stop() if first == "stop" else task.cancel()
            await asyncio.sleep(1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.sleep(1)

        virtually(main())
        assert [round(t) for t in cleaned] == [2]
        assert "would not stop" not in caplog.text

    def test_refusals_at_the_start(self) -> None:
        """A second run() of the same jobs and an unknown name in `jobs` are errors that say what there is."""
        registry = Registry()

        @registry.job
        async def work() -> None: ...

        async def main() -> None:
            async with registry.running():
                with pytest.raises(BgjobError, match="these jobs run already"):
                    await registry.run()
                with pytest.raises(
                    BgjobError, match="another event loop runs the jobs; use asyncio.run_coroutine_threads"
                ):
                    await asyncio.to_thread(asyncio.run, work.submit())
            with pytest.raises(BgjobError, match=r"jobs=\['mail'\]: no such job; the registered ones are: work"):
                await registry.run(jobs=["mail"])
            with pytest.raises(BgjobError, match=r"write a list of names, \['work'\]"):
                await registry.run(jobs="work")
            with pytest.raises(ScheduleError, match="drain=-1: negative; write a duration of 0 or more"):
                await registry.run(drain=-1)
            with pytest.raises(BgjobError, match="call it from a plain function"):
                registry.simulate("1s")

        asyncio.run(main())

    def test_main_of_a_simulation(self, caplog: pytest.LogCaptureFixture) -> None:
        """What main raises is raised, a TimeoutError of its own too; one that waits at the end is cancelled, with a warning."""
        registry, ended = Registry(), []

        async def late() -> None:
            async with asyncio.timeout(1):
                await asyncio.Event().wait()

        async def waits() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(asyncio.get_running_loop().time())

        with pytest.raises(TimeoutError):
            registry.simulate("2s", main=late)
        assert registry.simulate("2s", main=lambda: asyncio.sleep(1)) == []
        assert not caplog.records
        registry.simulate("2s", main=waits)
        assert [r.getMessage() for r in caplog.records] == ["simulate(): main was still waiting at the end; cancelled"]
        assert [round(at, 2) for at in ended] == [2]

    def test_loop_closed_in_the_middle(self) -> None:
        """A loop that somebody closed under run() leaves a registry that can be used again, from threads too."""
        registry, begun = Registry(), []
        loop = asyncio.new_event_loop()
        coroutine = registry.run()
        task = loop.create_task(coroutine)
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()

        @registry.job(after=0)
        async def work() -> None:
            begun.append(1)

        async def main() -> None:
            async with registry.running():
                await asyncio.sleep(0.02)

        asyncio.run(main())
        assert begun == [1]
        task._log_destroy_pending = False
        with pytest.raises(RuntimeError):
            coroutine.throw(GeneratorExit)

    @pytest.mark.parametrize("hook", ["retry_on", "on_error"])
    def test_interrupted_hook(self, hook: str, caplog: pytest.LogCaptureFixture) -> None:
        """A Ctrl-C that comes in a hook ends the run too, so that the drain doesn't wait for it."""
        registry, tasks = Registry(), []

        def interrupted(*_: object) -> bool:
            raise KeyboardInterrupt

        @registry.job(after=0, retries=int(hook == "retry_on"), **{hook: interrupted})
        async def bad() -> None:
            tasks.append(asyncio.current_task())
            raise ValueError

        with pytest.raises(KeyboardInterrupt):
            registry.simulate("1m", start=START)
        assert isinstance(tasks[0].exception(), KeyboardInterrupt)
        told = [record.getMessage().partition(" ")[2] for record in caplog.records if record.name == "bgjob"]
        assert told == ["cancelled: run() stopped"]

    def test_closed_in_a_hook(self) -> None:
        """A coroutine that is closed while its `on_error` waits ends there, without a word more from the job."""
        registry, told = Registry(), []

        async def hook(run: Run, error: BaseException) -> None:
            try:
                await asyncio.sleep(1000)
            finally:
                told.append(run)

        @registry.job(after=0, on_error=hook)
        async def bad() -> None:
            raise ValueError

        async def main() -> None:
            async with driven(registry) as engine:
                await asyncio.sleep(1)
                (run,) = engine._live
                task = run.task
                task.get_coro().close()
                assert (told, run.state, engine._live) == ([run], "cancelled", {})
                task.cancel()
                await asyncio.wait({task})

        virtually(main())

    def test_some_jobs(self) -> None:
        """With `jobs` only those are executed, of the ones that are registered later too; submitting another says so."""
        registry, begun = Registry(), []

        async def noted() -> None:
            begun.append(current_run().job)

        for name in ("a", "b"):
            registry.job(every="10ms", name=name)(noted)

        async def main() -> None:
            async with registry.running(jobs=["a"]):
                registry.job(every="10ms", name="c")(noted)
                await asyncio.sleep(0.05)
                with pytest.raises(BgjobError, match="it isn't executed here"):
                    await registry.jobs["b"].submit()

        asyncio.run(main())
        assert set(begun) == {"a"}

    def test_added_by_a_thread(self) -> None:
        """A job that another thread registers begins at once, though the loop has nothing else to wake up for."""
        registry = Registry()

        async def main() -> None:
            begun = asyncio.Event()

            async def work() -> None:
                begun.set()

            async with registry.running():
                await asyncio.sleep(0)
                threading.Timer(0.02, registry.job(every="10ms"), [work]).start()
                waiting = asyncio.ensure_future(begun.wait())
                watchdog = threading.Timer(5, asyncio.get_running_loop().call_soon_threadsafe, [waiting.cancel])
                watchdog.start()
                assert await waiting
                watchdog.cancel()

        asyncio.run(main())

    def test_removed(self) -> None:
        """A removed job has no more ticks, its scheduled runs are cancelled, what runs ends."""
        registry, begun = Registry(), []

        @registry.job(every="10s")
        async def work(n: int = 0) -> str:
            begun.append(n)
            await asyncio.sleep(5)
            return "done"

        async def main() -> None:
            running, waiting, delayed = await work.submit(1), await work.submit(2), await work.after(60).submit(3)
            await asyncio.sleep(1)
            registry.remove("work")
            assert [waiting.state, delayed.reason] == ["cancelled", "job removed"]
            assert repr(delayed.reason) == "'job removed'"
            assert await running.result() == "done"
            with pytest.raises(BgjobError, match="job 'work': not registered; the registered ones are: none"):
                registry.remove("work")

        registry.simulate("10m", start=START, main=main)
        assert begun == [1]

    def test_removed_is_let_go(self) -> None:
        """The registry keeps nothing of the function of a removed job."""
        registry = Registry()

        @registry.job
        async def work() -> None: ...

        function = weakref.ref(work.function)
        registry.remove("work")
        del work
        gc.collect()
        assert function() is None

    def test_ids(self) -> None:
        """Ids of submitted runs sort by submission: many in a millisecond, and with the clock set back."""
        ids = bgjob._Ids(5)
        made = [ids.new(now) for now in (10, 10, 9, *[11] * 5000, 3, 12, 500)]
        assert made == sorted(set(made))

    def test_ids_of_ticks(self) -> None:
        """A tick's id is its instant, to the millisecond where it isn't a whole second."""
        registry = Registry()
        registry.job(every="250ms", name="a")(nothing)
        ids = [run.id for run in registry.simulate("1s", start=START)]
        assert ids[2:] == ["a@2026-01-01T00:00:00.750Z", "a@2026-01-01T00:00:01Z"]

    @pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
    def test_foreign_handlers(self) -> None:
        """Somebody else's handler stays in place, and a run() outside the main thread touches none."""
        registry = Registry()

        async def main() -> None:
            task = asyncio.create_task(registry.run())
            await asyncio.sleep(0.01)
            seen.append((signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)))
            registry._engine.stop()
            await task
            seen.append(task.result())

        def foreign(number: int, frame: object) -> None: ...

        seen: list[object] = []
        before = signal.signal(signal.SIGTERM, foreign)
        try:
            default = signal.getsignal(signal.SIGINT)
            thread = threading.Thread(target=lambda: asyncio.run(main()))
            thread.start()
            thread.join()
            assert seen == [(foreign, default), None]
            asyncio.run(main())
            assert seen[2][0] is foreign
            assert seen[2][1] is not default
            assert signal.getsignal(signal.SIGINT) is default
        finally:
            signal.signal(signal.SIGTERM, before)


class SQLitePlace:
    """A fresh place for a store, and a way to look into it behind the back of its users."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "jobs.db"

    def url(self, prefix: str = "bgjob", **options: object) -> str:
        return f"sqlite:///{self.file}?{urlencode({'prefix': prefix, **options})}"

    async def rewind(self, job: str, last: int, prefix: str = "bgjob") -> None:
        with closing(sqlite3.connect(self.file)) as db, db:
            assert db.execute(f"UPDATE {prefix}_tick SET last = ? WHERE job = ?", (last, job)).rowcount == 1

    def expire(self) -> None:
        """As if the owners of all that runs had died a lease ago."""
        with closing(sqlite3.connect(self.file)) as db, db:
            db.execute("UPDATE bgjob_run SET due = at WHERE owner IS NOT NULL")

    async def drop(self) -> None:
        pass


class PostgresPlace:
    def __init__(self) -> None:
        self.server = os.environ.get("BGJOB_TEST_POSTGRES", "postgresql://postgres@127.0.0.1:5432/postgres")
        self.prefix = f"t{os.urandom(5).hex()}"

    def url(self, prefix: str = "bgjob", **options: object) -> str:
        mark = "&" if "?" in self.server else "?"
        return f"{self.server}{mark}{urlencode({'prefix': f'{self.prefix}_{prefix}', **options})}"

    async def rewind(self, job: str, last: int, prefix: str = "bgjob") -> None:
        await self._execute(f"UPDATE {self.prefix}_{prefix}_tick SET last = $1 WHERE job = $2", last, job)

    async def drop(self) -> None:
        tables = f"SELECT tablename FROM pg_tables WHERE tablename LIKE '{self.prefix}\\_%'"
        for (table,) in await self._execute(tables):
            await self._execute(f"DROP TABLE {table}")

    async def _execute(self, sql: str, *parameters: object) -> list[tuple[str]]:
        connection = await importlib.import_module("asyncpg").connect(self.server)
        try:
            return await connection.fetch(sql, *parameters)
        finally:
            await connection.close()


class RedisPlace:
    def __init__(self) -> None:
        self.server = os.environ.get("BGJOB_TEST_REDIS", "redis://127.0.0.1:6379")
        self.prefix = f"t{os.urandom(5).hex()}"

    def url(self, prefix: str = "bgjob", **options: object) -> str:
        return f"{self.server}?{urlencode({'prefix': f'{self.prefix}_{prefix}', **options})}"

    async def rewind(self, job: str, last: int, prefix: str = "bgjob") -> None:
        async with self._client() as client:
            await client.hset(f"{{{self.prefix}_{prefix}}}:tick", job, last)

    async def drop(self) -> None:
        async with self._client() as client:
            async for key in client.scan_iter(f"*{self.prefix}_*"):
                await client.delete(key)

    def _client(self) -> AbstractAsyncContextManager:
        return importlib.import_module("redis.asyncio").from_url(self.server)


PLACES = {"sqlite": SQLitePlace, "postgres": PostgresPlace, "redis": RedisPlace}


def refuse_server(why: str) -> None:
    """A test without its server is skipped and says so; where everything must be tested, it fails."""
    if "CI" in os.environ:
        pytest.fail(why)
    pytest.skip(why)


def need_driver(kind: str) -> None:
    driver = {"postgres": "asyncpg", "redis": "redis"}[kind]
    if importlib.util.find_spec(driver) is None:
        refuse_server(f"no {driver}: pip install 'bgjob[{kind}]'")


def found_place(kind: str, folder: Path) -> SQLitePlace | PostgresPlace | RedisPlace:
    if kind == "sqlite":
        return SQLitePlace(folder)
    if not hasattr(bgjob, f"{kind.capitalize()}Store"):
        pytest.skip(f"no {kind.capitalize()}Store")
    place = PLACES[kind]()
    server = urlsplit(place.server)
    need_driver(kind)
    try:
        socket.create_connection((server.hostname, server.port or PORTS[kind]), 2).close()
    except OSError as error:
        refuse_server(f"no {kind} at {server.hostname}:{server.port}: {error}; set BGJOB_TEST_{kind.upper()}")
    return place


PORTS = {"postgres": 5432, "redis": 6379}


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SQLitePlace]:
    found = found_place(request.param, tmp_path)
    yield found
    asyncio.run(found.drop())


@pytest.fixture(params=["memory", *PLACES])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str | None]:
    """Where one instance is enough: memory too, which is None."""
    if request.param == "memory":
        yield None
        return
    found = found_place(request.param, tmp_path)
    yield found.url()
    asyncio.run(found.drop())


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


@asynccontextmanager
async def going(store: SQLiteStore | str | None, *registries: Registry, **options: Any) -> AsyncIterator[None]:
    """Run registries beside each other, each with a store object of its own: they are instances."""
    async with AsyncExitStack() as stack:
        for registry in registries:
            await stack.enter_async_context(registry.running(store=store, **options))
        yield


@asynccontextmanager
async def opened(store: Any, owner: str = "me") -> AsyncIterator[Any]:
    """A store without an engine."""
    await store.open(owner, lambda: None)
    try:
        yield store
    finally:
        await store.close()


NO_SCHEDULE = bgjob.Listing("", False, None)


@asynccontextmanager
async def two_owners(place: "SQLitePlace", *jobs: str) -> AsyncIterator[Any]:
    """A store as two owners know it, and the last ticks of some jobs, which aren't now any more."""
    async with opened(bgjob._store_of(place.url())) as store, opened(bgjob._store_of(place.url()), "other") as other:
        _, lasts = await store.enlist(dict.fromkeys(jobs, NO_SCHEDULE))
        await asyncio.sleep(0.01)
        yield store, other, lasts


def a_call(id: str, job: str = "work", delay: int = 0) -> bgjob.Call:
    return bgjob.Call(id, job, None, delay, "[[1],{}]")


def an_end(
    run: bgjob.Claimed, state: State, delay: int = 0, back: bool = False, error: str | None = None
) -> bgjob.Settlement:
    reason = "cancelled on request" if state is State.SCHEDULED else None
    return bgjob.Settlement(run.id, run.token, run.job, run.at, run.call, state, delay, back, 1, error, reason, "null")


@contextmanager
def locked(file: Path) -> Iterator[sqlite3.Connection]:
    """The file as another program has it that writes for long."""
    with closing(sqlite3.connect(file, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        yield db
        db.execute("COMMIT")


Declare = Callable[[Registry], object]


def several(number: int, declare: Declare) -> list[Registry]:
    registries = [Registry() for _ in range(number)]
    for registry in registries:
        declare(registry)
    return registries


class Work:
    """A job that notes what it does, fails as often as it is told, and can be held until it is released."""

    def __init__(self, held: bool = False, failures: int = 0, **options: Any) -> None:
        self.options = {"name": "work", **options}
        self.release = asyncio.Event()
        self.failures = failures
        self.begun: list[Run] = []
        self.args: list[object] = []
        self.ticks: list[int] = []
        self.tokens: list[tuple[int, int]] = []
        self.ended: list[object] = []
        self.cut: list[object] = []
        self.now = self.most = 0
        if not held:
            self.release.set()

    def __call__(self, registry: Registry) -> Job:
        @registry.job(**self.options)
        async def work(n: object = None) -> object:
            self.note(n)
            try:
                await self.release.wait()
                if len(self.begun) <= self.failures:
                    raise ValueError(f"failure {len(self.begun)}")
                self.ended.append(n)
                return n
            except asyncio.CancelledError:
                self.cut.append(n)
                raise
            finally:
                self.now -= 1

        return work

    def note(self, n: object) -> None:
        run = current_run()
        self.begun.append(run)
        self.args.append(n)
        self.ticks.append(int(run.tick.timestamp() * 1000 + 0.5))
        self.tokens.append((run.attempt, run.token))
        self.now += 1
        self.most = max(self.most, self.now)


def instances(number: int, work: Work) -> tuple[list[Registry], list[Job]]:
    registries = several(number, work)
    return registries, [registry.jobs[work.options["name"]] for registry in registries]


class TestConformance:
    """`run()` as a black box: the same over memory and every store, by one instance or by several."""

    @in_a_loop
    async def test_error_text(self, url: str | None) -> None:
        """Whatever text a failure has (file names hold surrogates), it is stored, and stops nobody."""
        registry = Registry()

        @registry.job
        async def bad() -> None:
            raise ValueError("\udcff \0 ü")

        @registry.job
        async def good() -> int:
            return 1

        async with going(url, registry):
            failing, fine = await bad.submit(), await good.submit()
            assert await fine.result(20) == 1
            with pytest.raises(RunFailed, match=r"ValueError: \\udcff \\0 ü$"):
                await failing.result(20)

    @in_a_loop
    async def test_result_that_raises(self, place: SQLitePlace) -> None:
        """A result that raises while it is turned into JSON isn't JSON; nothing else comes of it."""

        class Lazy(dict[str, int]):
            def items(self) -> Any:
                raise RuntimeError("detached")

        def declare(registry: Registry) -> None:
            @registry.job
            async def lazy() -> dict[str, int]:
                return Lazy(a=1)

        here, there = several(2, declare)
        async with going(place.url(), here), going(place.url(), there, jobs=[]):
            assert await (await here.jobs["lazy"].submit()).result(20) == {"a": 1}
            with pytest.raises(BgjobError, match="isn't JSON and stayed where it ran"):
                await (await there.jobs["lazy"].submit()).result(20)

    @in_a_loop
    async def test_key_with_other_arguments(self, place: SQLitePlace) -> None:
        """A key that is free again runs what is submitted then; the handle of the cancelled run stays as it ended."""
        work = Work()
        (here, there), (job, other) = instances(2, work)
        async with going(place.url(), here), going(place.url(), there, jobs=[]):
            old = await job.after("1h", key="k").submit(1)
            assert await old.cancel()
            assert await (await other.after(0, key="k").submit(2)).result(20) == 2
            assert (work.args, old.state) == ([2], State.CANCELLED)

    @in_a_loop
    async def test_cancelled_as_it_failed(self, place: SQLitePlace) -> None:
        """A failure whose retry the store refuses, for the run was cancelled meanwhile, ends cancelled and says why."""
        here, there = Registry(), Registry()

        @here.job(retries=3)
        async def work() -> None:
            here._engine._cut = lambda run, why: None  # told of it too late
            await (await there.find(current_run().id)).cancel()
            raise ValueError

        async with going(place.url(), here), going(place.url(), there, jobs=[]):
            run = await work.submit()
            with pytest.raises(RunCancelled, match="was cancelled: cancelled on request"):
                await run.result(20)
            found = await there.find(run.id)
            assert (found.reason, found.error) == ("cancelled on request", "ValueError")

    @in_a_loop
    async def test_tokens_of_a_key(self, place: SQLitePlace) -> None:
        """Tokens of a run's id grow for ever: what was cancelled under a key can't pass for its successor."""
        work = Work(held=True)
        (here,), (job,) = instances(1, work)
        async with going(place.url(), here):
            for _ in range(3):
                run = await job.after(0, key="k").submit()
                await until(lambda: work.now)
                assert await run.cancel()
                with pytest.raises(RunCancelled):
                    await run.result(20)
        assert work.tokens == [(1, 1), (1, 2), (1, 3)]

    @in_a_loop
    async def test_find_by_key(self, place: SQLitePlace) -> None:
        """A run is found by its id elsewhere with its key and arguments, also where the key has the '@' of ticks."""
        (here, there), (job, _) = instances(2, Work())
        async with going(place.url(), here, there):
            run = await job.after("1h", key="a@b.c").submit(n=1)
            found = await there.find(run.id)
            assert found is not None
            assert (found.key, found.kwargs, found.state, found.tick) == ("a@b.c", {"n": 1}, run.state, run.tick)
            assert await there.find("work#other") is None

    @in_a_loop
    async def test_skipped_ticks_in_the_log(self, url: str | None, caplog: pytest.LogCaptureFixture) -> None:
        """Ticks skipped by overlap are one line when it begins, and one with their number when the job runs again."""
        work, events = Work(held=True, every="50ms"), []
        (registry,), _ = instances(1, work)
        async with going(url, registry, on_event=lambda run: events.append((run.state, run.reason))):
            await until(lambda: events.count((State.SKIPPED, "overlap")) > 2)
            skipped = len(events) - 1
            work.release.set()
            await until(lambda: len(work.begun) > 1)
        lines = [line for line in caplog.messages if "skipped" in line]
        assert re.fullmatch(r"work@\S+Z skipped: 1 earlier ticks of the job are unfinished", lines[0])
        assert re.fullmatch(rf"job 'work' runs again: ({skipped}|{skipped + 1}) ticks were skipped", lines[1])

    @in_a_loop
    async def test_ticks(self, place: SQLitePlace) -> None:
        """Each tick of the epoch's grid starts on exactly one instance, and not before its time."""
        work = Work(every="20ms", overlap="all", parallelism=5)
        registries, _ = instances(3, work)
        async with going(place.url(), *registries):
            await until(lambda: len(work.begun) >= 25)
        ticks = sorted(work.ticks)
        assert ticks == [*range(ticks[0], ticks[-1] + 20, 20)]
        assert ticks[0] % 20 == 0
        assert min(run.late for run in work.begun) >= 0
        assert all(run.started_at >= run.tick for run in work.begun)
        assert {run.id for run in work.begun} == {bgjob._tick_id("work", tick) for tick in ticks}

    @in_a_loop
    async def test_cron(self, place: SQLitePlace) -> None:
        """A cron's tick starts on one of several instances."""
        work = Work(cron="* * * * * *")
        registries, (job, *_) = instances(3, work)
        expected = job.next_ticks(2)
        async with going(place.url(), *registries):
            await until(lambda: len(work.begun) == 2)
        assert [run.tick for run in work.begun] in (expected, job.next_ticks(2, expected[0]))

    @in_a_loop
    async def test_jitter(self, place: SQLitePlace) -> None:
        """All instances agree on a tick's delay, which is not the same for each."""
        work = Work(every="60ms", jitter="50ms", overlap="all", parallelism=9)
        registries, _ = instances(3, work)
        async with going(place.url(), *registries):
            await until(lambda: len(work.begun) >= 8)
        assert len({*work.ticks}) == len(work.ticks)
        for run in work.begun:
            assert run.late * 1000 >= bgjob._spread(run.id, 50)

    @in_a_loop
    async def test_submit(self, url: str | None) -> None:
        """A submitted run gets its arguments as they come from JSON, and whoever submitted it what it returned."""
        registry, seen = Registry(), []

        @registry.job
        async def add(a: int, *more: object, b: object = None) -> list[object]:
            seen.append(current_run())
            return [a, *more, b]

        async with going(url, registry):
            run = await add.submit(1, (2, "ü"), b={"c": [None, 1.5]})
            assert await run.result(20) == [1, [2, "ü"], {"c": [None, 1.5]}]
            assert (run.state, run.attempt, run.error, run.reason, run.key) == (State.SUCCEEDED, 1, None, None, None)
            assert run.started_at <= run.finished_at
            found = await registry.find(run.id)
            assert (found.id, found.args, found.kwargs) == (run.id, (1, [2, "ü"]), {"b": {"c": [None, 1.5]}})
            assert (found.state, await found.result(20)) == (State.SUCCEEDED, [1, [2, "ü"], {"c": [None, 1.5]}])
            assert [r.id for r in seen] == [run.id]
            assert await registry.find("unknown") is None
            with pytest.raises(TypeError, match=r"argument a=\{1\} isn't JSON"):
                await add.submit({1})
        with pytest.raises(BgjobError, match="nothing|needs jobs that run"):
            await add.submit(1)

    @in_a_loop
    async def test_delays(self, url: str | None) -> None:
        """A delayed run doesn't start before its time; one of the past starts at once."""
        work = Work()
        (registry,), (job,) = instances(1, work)
        async with going(url, registry):
            now = datetime.now(UTC)
            late = await job.at(now + timedelta(milliseconds=250)).submit("late")
            soon = await job.after("100ms").submit("soon")
            past = await job.at(now - timedelta(hours=1)).submit("past")
            assert (late.tick - now, late.state) == (
                timedelta(milliseconds=250),
                State.SCHEDULED,
            ) or now.microsecond % 1000
            for run in (past, soon, late):
                await run.result(20)
                assert run.started_at >= run.tick
        assert work.args == ["past", "soon", "late"]

    @in_a_loop
    async def test_order(self, place: SQLitePlace) -> None:
        """Submitted runs start first in, first out, wherever there is room."""
        work = Work(parallelism=1)
        registries, (job, other, *_) = instances(3, work)
        async with going(place.url(), *registries):
            runs = [await job.submit(n) for n in range(30)]
            for run in runs:
                await run.result(20)
            more = [await one.after("100ms").submit(n) for n in range(30, 34) for one in (job, other)]
            for run in more:
                await run.result(20)
        assert work.args[:30] == [*range(30)]
        assert work.most == 1
        assert [run.id for run in runs] == sorted(run.id for run in runs)

    @in_a_loop
    async def test_restart(self, place: SQLitePlace) -> None:
        """What was submitted outlives who submitted it: all that was, in order, and a third reads the results."""
        work = Work(parallelism=1)
        (client, worker, reader), (job, *_) = instances(3, work)
        async with going(place.url(), client, jobs=[]):
            runs = [await job.submit(n) for n in range(10)]
            runs.append(await job.after("50ms").submit(10))
            runs.append(await job.after("50ms", key="k").submit(11))
        with pytest.raises(BgjobError, match=r"run\(\) has stopped|call it inside"):
            await runs[0].result(1)
        async with going(place.url(), worker):
            await until(lambda: len(work.ended) == 12)
        async with going(place.url(), reader, jobs=[]):
            found = [await reader.find(run.id) for run in runs]
            assert [await run.result(20) for run in found] == [*range(12)]
        assert work.args == [*range(12)]

    @in_a_loop
    async def test_key(self, url: str | None) -> None:
        """The same key is the same run: the first call's arguments and delay win, while it is unfinished and after."""
        work = Work(held=True)
        (registry,), (job,) = instances(1, work)
        async with going(url, registry):
            one = await job.after(0, key="k").submit(1)
            assert (one.id, one.key) == ("work#k", "k")
            assert (await job.after("1h", key="k").submit(2)).id == one.id
            await until(lambda: work.now)
            two = await job.after("1h", key="k").submit(3)
            work.release.set()
            assert [await run.result(20) for run in (one, two, await job.after(0, key="k").submit(4))] == [1, 1, 1]
            waiting = await job.after("1h", key="other").submit(5)
            assert await waiting.cancel()
            assert await (await job.after(0, key="other").submit(6)).result(20) == 6
        assert work.args == [1, 6]

    @in_a_loop
    async def test_key_of_a_skipped_run(self, url: str | None) -> None:
        """A key is free when its run was skipped: what never ran was neither a success nor a failure."""
        registry = Registry()

        @registry.job(expires="1m")
        async def work(n: int) -> int:
            return n

        async with going(url, registry):
            late = await work.at(datetime.now(UTC) - timedelta(hours=1), key="k").submit(1)
            with pytest.raises(RunCancelled, match="run 'work#k' was skipped: expired"):
                await late.result(20)
            assert await (await work.after(0, key="k").submit(2)).result(20) == 2

    @in_a_loop
    async def test_key_over_instances(self, place: SQLitePlace) -> None:
        """A key that many instances submit at once is one run, and is taken after a restart as well."""
        work = Work()
        registries, jobs = instances(4, work)
        async with going(place.url(), *registries):
            calls = [job.after("20ms", key="k").submit(n) for n, job in enumerate(jobs * 5)]
            runs = await asyncio.gather(*calls)
            assert {run.id for run in runs} == {"work#k"}
            assert {await run.result(20) for run in runs} == {work.args[0]}
        (again,), (job,) = instances(1, work)
        async with going(place.url(), again):
            assert await (await job.after(0, key="k").submit("late")).result(20) == work.args[0]
        assert len(work.args) == 1

    @in_a_loop
    async def test_key_of_a_failure(self, place: SQLitePlace) -> None:
        """A key stays taken after its run failed, with the failure for whoever submits it again."""
        (registry, other), (job, again) = instances(2, Work(failures=9))
        async with going(place.url(), registry, other):
            for one in (job, again):
                with pytest.raises(RunFailed, match="run 'work#k' failed: ValueError: failure 1"):
                    await (await one.after(0, key="k").submit()).result(20)

    @in_a_loop
    async def test_key_no_longer_kept(self, place: SQLitePlace) -> None:
        """A key is free again when its run is no longer kept."""
        work = Work()
        (registry,), (job,) = instances(1, work)
        async with going(place.url(keep="1ms"), registry):
            for n in range(2):
                run = await job.after(0, key="k").submit(n)
                await until(lambda: len(work.ended) == n + 1)  # noqa: B023
                await until(lambda: run.state is State.SUCCEEDED)  # noqa: B023
                await asyncio.sleep(0.01)
        assert work.args == [0, 1]

    @in_a_loop
    async def test_results_elsewhere(self, place: SQLitePlace) -> None:
        """A result is read where it wasn't made: a value, a failure by its text, a cancel, or that it isn't JSON."""

        def declare(registry: Registry) -> None:
            @registry.job(expires="1ms")
            async def end(how: str) -> object:
                if how == "fail":
                    raise ValueError("no such user\nand more")
                if how == "hang":
                    await asyncio.sleep(1000)
                return {"value": [1, None], "set": {1}}[how]

        here, there = several(2, declare)
        end = there.jobs["end"]
        long_ago = datetime.now(UTC) - timedelta(minutes=1)
        async with going(place.url(), here), going(place.url(), there, jobs=[]):
            here.jobs["end"]._spec.expires = None
            assert await (await end.submit("value")).result(20) == [1, None]
            with pytest.raises(RunFailed, match="failed: ValueError: no such user$"):
                await (await end.submit("fail")).result(20)
            with pytest.raises(BgjobError, match="succeeded, but its result isn't JSON and stayed where it ran"):
                await (await end.submit("set")).result(20)
            hanging = await end.submit("hang")
            with pytest.raises(TimeoutError, match="has not ended within 0.05 s; it is"):
                await hanging.result("50ms")
            assert await hanging.cancel()
            with pytest.raises(RunCancelled, match="was cancelled: cancelled on request"):
                await hanging.result(20)
            here.jobs["end"]._spec.expires = 1
            with pytest.raises(RunCancelled, match=r"was skipped: expired: .* late, expires=0.001 s"):
                await (await end.at(long_ago).submit("value")).result(20)

    @in_a_loop
    async def test_result_no_longer_kept(self, place: SQLitePlace) -> None:
        """A result that was kept for less than it took to ask for it is an error that says so; a cancel finds nothing."""
        (here, there), (_, job) = instances(2, Work())
        async with going(place.url(keep="1ms"), here), going(place.url(keep="1ms"), there, jobs=[]):
            run = await job.submit(1)
            for _ in range(5):
                with contextlib.suppress(BgjobError):
                    await (await job.submit(2)).result(20)
                await asyncio.sleep(0.01)
            with pytest.raises(BgjobError, match="is no longer kept: the store keeps ends for a limited time"):
                await run.result(20)
            assert not await run.cancel()
            assert await there.find(run.id) is None

    @in_a_loop
    async def test_find_elsewhere(self, place: SQLitePlace) -> None:
        """Any instance finds a run in any state; a tick too, while it is unfinished."""
        work = Work(held=True, every="30ms")
        (here, there), (job, _) = instances(2, work)
        async with going(place.url(), here), going(place.url(), there, jobs=[]):
            waiting = await there.find((await job.after("1h").submit(1)).id)
            assert (waiting.state, waiting.attempt, waiting.started_at, waiting.args) == (
                State.SCHEDULED,
                0,
                None,
                (1,),
            )
            await until(lambda: work.now)
            found = await there.find(work.begun[0].id)
            assert (found.state, found.attempt, found.token) == (State.RUNNING, 1, 1)
            assert found.tick == work.begun[0].tick
            assert abs(found.started_at - work.begun[0].started_at) < timedelta(seconds=20)
            ending = asyncio.create_task(found.result(20))
            await asyncio.sleep(0.1)
            work.release.set()
            assert await ending is None

    @in_a_loop
    async def test_retries(self, url: str | None) -> None:
        """A failed attempt is tried again after its delay, with the same id and tick, as often as it may."""
        work, events = Work(failures=2, retries=2, retry_delay=lambda n: n * 0.05), []
        (registry,), (job,) = instances(1, work)
        async with going(url, registry, on_event=lambda run: events.append((run.state, run.attempt))):
            run = await job.submit(1)
            starts = []
            for n in range(3):
                await until(lambda: len(work.begun) > n)  # noqa: B023
                starts.append(asyncio.get_running_loop().time())
            assert await run.result(20) == 1
        assert [attempt for attempt, _ in work.tokens] == [1, 2, 3]
        assert [token for _, token in work.tokens] == [1, 2, 3]
        assert len({*work.ticks}) == 1
        assert starts[1] - starts[0] > 0.03
        assert starts[2] - starts[1] > 0.08
        assert events == [
            (State.RUNNING, 1), (State.SCHEDULED, 1), (State.RUNNING, 2),
            (State.SCHEDULED, 2), (State.RUNNING, 3), (State.SUCCEEDED, 3),
        ]  # fmt: skip

    @in_a_loop
    async def test_retry_after_a_restart(self, place: SQLitePlace) -> None:
        """A run's attempts are counted wherever they were made, and its retries are used up once."""
        work = Work(failures=9, retries=2, retry_delay="200ms")
        for _ in range(3):
            (registry,), (job,) = instances(1, work)
            before = len(work.begun)
            async with going(place.url(), registry):
                run = await registry.find("work#k") or await job.after(0, key="k").submit()
                await until(lambda: len(work.begun) > before)  # noqa: B023
        (registry,), _ = instances(1, work)
        async with going(place.url(), registry, jobs=[]):
            run = await registry.find("work#k")
            with pytest.raises(RunFailed, match="failure 3"):
                await run.result(20)
        assert (run.attempt, run.state) == (3, State.FAILED)
        assert work.tokens == [(1, 1), (2, 2), (3, 3)]

    @in_a_loop
    async def test_timeout(self, url: str | None) -> None:
        """An attempt that takes too long is cancelled, and counts as a failure, to be retried like any other."""
        work = Work(held=True, timeout="50ms", retries=1, retry_delay=0)
        (registry,), (job,) = instances(1, work)
        async with going(url, registry):
            run = await job.submit(1)
            with pytest.raises(RunFailed, match=r"TimeoutError: no end within 0.05 s"):
                await run.result(20)
        assert (work.cut, run.attempt) == ([1, 1], 2)

    @in_a_loop
    async def test_parallelism(self, place: SQLitePlace) -> None:
        """Never more than `parallelism` runs at once over all instances, and as many wherever they are."""
        work = Work(held=True, parallelism=3)
        registries, jobs = instances(3, work)
        async with going(place.url(), *registries):
            runs = [await job.submit(n) for n, job in enumerate(jobs * 4)]
            await until(lambda: work.now == 3)
            await asyncio.sleep(0.1)
            assert work.now == 3
            work.release.set()
            for run in runs:
                await run.result(20)
        assert (len(work.begun), work.most) == (12, 3)

    @in_a_loop
    @pytest.mark.parametrize("overlap", ["skip", "queue", "all"])
    async def test_overlap(self, place: SQLitePlace, overlap: str) -> None:
        """With a tick unfinished anywhere, "skip" skips the next, "queue" lets one wait, "all" lets all of them."""
        work, skipped = Work(held=True, every="30ms", overlap=overlap), []

        def on_event(run: Run) -> None:
            if run.state is State.SKIPPED:
                skipped.append(run.tick)

        registries, (job, *_) = instances(3, work)
        async with going(place.url(), *registries, on_event=on_event):
            await until(lambda: work.now)
            after = job.next_ticks(6, work.begun[0].tick)
            await until(lambda: datetime.now(UTC) > after[-1] and (len(skipped) > 1 or overlap == "all"))
            held = len(skipped)
            work.release.set()
            await until(lambda: len(work.begun) > 3)
        ticks, most = [run.tick for run in work.begun], work.most
        assert (ticks, most) == (sorted({*ticks}), 1)
        if overlap == "all":
            assert (ticks[1:4], skipped) == (after[:3], [])
        elif overlap == "queue":
            assert ticks[1] < min(skipped)
        else:
            assert ticks[1] > max(skipped[:held])

    @in_a_loop
    async def test_submitted_runs_and_ticks(self, place: SQLitePlace) -> None:
        """Submitted runs never make a tick skip; it waits for its slot behind those that came before."""
        work = Work(held=True, every="1h")
        (registry,), (job,) = instances(1, work)
        async with going(place.url(), registry, drain=0):
            await job.submit("call")
            await until(lambda: work.now)
        (registry,), (job,) = instances(1, work)
        await place.rewind("work", int(time.time() * 1000) - HOUR)
        work.release.set()
        async with going(place.url(), registry):
            await until(lambda: len(work.ended) == 2)
        assert work.args == ["call", "call", None]

    @in_a_loop
    async def test_cancel(self, place: SQLitePlace) -> None:
        """Any instance cancels a run in any state: what waits never starts, what runs is interrupted, what ended isn't."""
        work = Work(held=True, parallelism=1)
        (here, there), (job, other) = instances(2, work)
        async with going(place.url(), here), going(place.url(), there, jobs=[]):
            running = await job.submit("running")
            await until(lambda: work.now)
            due = await job.submit("due")
            waiting = await other.after("1h").submit("waiting")
            for run in (due, waiting, running):
                found = await there.find(run.id)
                assert await found.cancel()
                with pytest.raises(RunCancelled, match="cancelled: cancelled on request"):
                    await run.result(20)
                with pytest.raises(RunCancelled, match="cancelled: cancelled on request"):
                    await found.result(20)
                assert not await found.cancel()
                assert not await (await there.find(run.id)).cancel()
            work.release.set()
            assert await (await other.submit("next")).result(20) == "next"
        assert (work.args, work.cut) == (["running", "next"], ["running"])

    @in_a_loop
    async def test_cancel_a_retry(self, url: str | None) -> None:
        """A run that waits for its next attempt is cancelled without one."""
        work, told = Work(failures=9, retries=9, retry_delay="1h"), []
        (registry,), (job,) = instances(1, work)
        async with going(url, registry, on_event=lambda run: told.append(run.state)):
            run = await job.submit(1)
            await until(lambda: told == [State.RUNNING, State.SCHEDULED])
            assert await run.cancel()
            with pytest.raises(RunCancelled):
                await run.result(20)
            assert not await run.cancel()
        assert (len(work.begun), told[-1]) == (1, State.CANCELLED)

    @in_a_loop
    async def test_cancel_races(self, place: SQLitePlace) -> None:
        """A cancel that says a run was removed is true: it hasn't started, and won't; and one that was, ended so."""
        work = Work()
        (here, there), (_, job) = instances(2, work)
        async with going(place.url(), here), going(place.url(), there, jobs=[]):
            runs = [await job.submit(n) for n in range(100)]
            answers = await asyncio.gather(*[run.cancel() for run in reversed(runs)])
            ends = await asyncio.gather(*[run.result(20) for run in runs], return_exceptions=True)
        for n, (answer, end) in enumerate(zip(reversed(answers), ends, strict=True)):
            assert end == n or isinstance(end, RunCancelled)
            assert answer or end == n
            assert work.args.count(n) == (end == n or n in work.cut)

    @in_a_loop
    async def test_cancel_a_job(self, place: SQLitePlace) -> None:
        """Job.cancel ends every scheduled and running run of the job on all instances, and says how many; no other's."""
        work, bystander = Work(held=True, parallelism=1), Work(held=True, name="bystander")

        def declare(registry: Registry) -> None:
            work(registry)
            bystander(registry)

        here, there = several(2, declare)
        async with going(place.url(), here, drain=0), going(place.url(), there, jobs=[]):
            runs = [await here.jobs["work"].submit(n) for n in range(3)]
            runs.append(await here.jobs["work"].after("1h").submit(3))
            await here.jobs["bystander"].submit()
            await until(lambda: work.now and bystander.now)
            assert await there.jobs["work"].cancel() == 4
            for run in runs:
                with pytest.raises(RunCancelled):
                    await run.result(20)
            assert await there.jobs["work"].cancel() == 0
            assert bystander.now == 1
        assert work.args == [0]

    @in_a_loop
    async def test_expires(self, url: str | None) -> None:
        """A run that would start later than it may is skipped; at a retry nobody asks again."""
        work = Work(expires="10s", failures=1, retries=1, retry_delay=0)
        (registry,), (job,) = instances(1, work)
        async with going(url, registry):
            with pytest.raises(RunCancelled, match=r"was skipped: expired: .* late, expires=10 s"):
                await (await job.at(datetime.now(UTC) - timedelta(seconds=30)).submit(1)).result(20)
            work.options["expires"] = registry.jobs["work"]._spec.expires = 500
            run = await job.submit(2)
            await until(lambda: work.begun)
            assert await run.result(20) == 2
        assert work.args == [2, 2]

    @in_a_loop
    async def test_immediate(self, place: SQLitePlace) -> None:
        """An immediate job runs at its first start ever, once for all instances, and at no restart."""
        work = Work(every="1h", immediate=True)
        for _ in range(2):
            registries, _ = instances(3, work)
            async with going(place.url(), *registries):
                await until(lambda: work.ended)
                await asyncio.sleep(0.1)
        assert len(work.begun) == 1

    @in_a_loop
    @pytest.mark.parametrize(("overlap", "number"), [("skip", 1), ("queue", 1), ("all", 60)])
    async def test_downtime(self, place: SQLitePlace, overlap: str, number: int) -> None:
        """After 60 missed ticks "skip" and "queue" run the newest once, "all" every one in order; a new job has none."""
        work, new = Work(every="1h", overlap=overlap), Work(every="1h", overlap=overlap, name="new")
        (registry,), _ = instances(1, work)
        async with going(place.url(), registry):
            pass
        await asyncio.sleep(max(0, time.time() // 3600 * 3600 + 5 - time.time()))
        hour = int(time.time() // 3600 * HOUR)
        await place.rewind("work", hour - 60 * HOUR)
        registries, _ = instances(2, work)
        for registry in registries:
            new(registry)
        async with going(place.url(), *registries):
            await until(lambda: len(work.ended) == number)
            await asyncio.sleep(0.1)
        assert work.ticks == [*range(hour, hour - number * HOUR, -HOUR)][::-1]
        assert (work.most, new.begun) == (1, [])

    @in_a_loop
    async def test_downtime_of_years(self, place: SQLitePlace) -> None:
        """A gap of years costs no more than one of a minute, and doesn't keep other jobs waiting."""
        work, other = Work(every="10s"), Work(name="other")
        (registry,), _ = instances(1, work)
        async with going(place.url(), registry):
            pass
        await place.rewind("work", 1000)
        (registry,), _ = instances(1, work)
        job = other(registry)
        async with going(place.url(), registry):
            assert await (await job.submit(1)).result(20) == 1
            await until(lambda: work.ended)
        assert abs(work.ticks[0] - time.time() * 1000) < 60_000

    @in_a_loop
    async def test_changed_schedule(self, place: SQLitePlace) -> None:
        """A job whose schedule has changed has missed nothing; the same one at a restart has."""
        for every, begun in (("1h", 0), ("2h", 0), ("2h", 1)):
            work = Work(every=every)
            (registry,), _ = instances(1, work)
            async with going(place.url(), registry):
                await asyncio.sleep(0.1)
                assert len(work.begun) == begun
            await place.rewind("work", int(time.time() * 1000) - 5 * HOUR)

    @in_a_loop
    async def test_unknown_jobs(self, place: SQLitePlace) -> None:
        """Runs of jobs that an instance doesn't execute are left alone: older code, `jobs=`, or a client only."""
        work, other = Work(), Work(name="other")

        def declare(registry: Registry) -> None:
            work(registry)
            other(registry)

        (old,), _ = instances(1, work)
        client, narrow, new = several(3, declare)
        async with (
            going(place.url(), old),
            going(place.url(), narrow, jobs=["work"]),
            going(place.url(), client, jobs=[]),
        ):
            left = await client.jobs["other"].submit(1)
            assert await (await client.jobs["work"].submit(2)).result(20) == 2
            assert (await client.find(left.id)).state is State.SCHEDULED
            assert await (await narrow.jobs["work"].submit(3)).result(20) == 3
            assert other.begun == []
            async with going(place.url(), new, jobs=["other"]):
                assert await left.result(20) == 1
        assert other.tokens == [(1, 1)]
        with pytest.raises(BgjobError, match=r"jobs=\['nope'\]: no such job; the registered ones are: work, other"):
            async with going(place.url(), new, jobs=["nope"]):
                pass

    @in_a_loop
    async def test_hand_back(self, place: SQLitePlace) -> None:
        """What a stop cuts short goes back, and another instance runs it: the same attempt, a higher token."""
        work, told = Work(held=True), []
        (here, there), (job, _) = instances(2, work)
        async with going(place.url(), there, jobs=[]):
            async with going(place.url(), here, drain=0, on_event=lambda run: told.append((run.state, run.reason))):
                run = await job.after(0, key="k").submit(1)
                await until(lambda: work.now)
            assert (run.state, run.attempt, run.reason) == (State.SCHEDULED, 0, "run() stopped")
            assert told == [(State.RUNNING, None), (State.SCHEDULED, "run() stopped")]
        work.release.set()
        (there,), _ = instances(1, work)
        async with going(place.url(), there):
            assert await (await there.find(run.id)).result(20) == 1
        assert (work.tokens, work.cut) == ([(1, 1), (1, 2)], [1])

    @in_a_loop
    async def test_drain(self, url: str | None) -> None:
        """A stop waits for what runs, and what ends meanwhile is recorded."""
        work = Work(held=True)
        (registry,), (job,) = instances(1, work)
        async with going(url, registry):
            run = await job.submit(1)
            await until(lambda: work.now)
            asyncio.get_running_loop().call_later(0.1, work.release.set)
        assert (run.state, work.ended) == (State.SUCCEEDED, [1])

    @in_a_loop
    async def test_drop_at_shutdown(self, url: str | None) -> None:
        """A run that must not run twice isn't handed back: it ends cancelled, as every one does in memory."""
        work = Work(held=True, on_crash="drop")
        (registry, other), (job, _) = instances(2, work)
        async with going(url, registry, drain=0):
            run = await job.submit(1)
            await until(lambda: work.now)
        assert (run.state, run.reason) == (State.CANCELLED, "run() stopped")
        async with going(url, other):
            found = await other.find(run.id)
            assert found is None if url is None else (found.state, found.reason) == (State.CANCELLED, "run() stopped")

    @in_a_loop
    async def test_log(self, url: str | None, caplog: pytest.LogCaptureFixture) -> None:
        """A success is INFO, an attempt to be retried a WARNING in one line, the last failure an ERROR with traceback."""
        caplog.set_level(logging.INFO, "bgjob")
        (registry,), (job,) = instances(1, Work(failures=2, retries=1, retry_delay=0))
        async with going(url, registry):
            with pytest.raises(RunFailed):
                await (await job.after(0, key="a").submit()).result(20)
            await (await job.after(0, key="b").submit()).result(20)
        lines = [
            (record.levelname, record.getMessage(), bool(record.exc_info))
            for record in caplog.records
            if "appendonly" not in record.msg
        ]
        assert lines[0][1].startswith(f"bgjob {bgjob.__version__} runs 1 jobs")
        assert lines[1:3] == [
            ("WARNING", "work#a failed at attempt 1 of 2: ValueError: failure 1; retry in 0 s", False),
            ("ERROR", "work#a failed at attempt 2: ValueError: failure 2", True),
        ]
        assert re.fullmatch(r"work#b succeeded in [0-9.]+ s", lines[3][1])

    @in_a_loop
    async def test_one_run_per_store(self, place: SQLitePlace) -> None:
        """A store object serves one `run()` at a time, and another one afterwards."""
        work = Work()
        (here, there), (job, other) = instances(2, work)
        store = bgjob._store_of(place.url())
        async with going(store, here):
            with pytest.raises(BgjobError, match="one run.. or running.. per store object; make another"):
                async with going(store, there):
                    pass
            assert await (await job.submit(1)).result(20) == 1
        async with going(store, there):
            assert await (await other.submit(2)).result(20) == 2

    @in_a_loop
    async def test_prefix(self, place: SQLitePlace) -> None:
        """Two prefixes are two stores: neither sees the other's ticks, runs or keys."""
        one, two = Work(every="1h", immediate=True), Work(every="1h", immediate=True)
        (here,), (job,) = instances(1, one)
        (there,), (other,) = instances(1, two)
        async with going(place.url("one"), here), going(place.url("two"), there):
            await until(lambda: one.ended and two.ended)
            assert await (await job.after(0, key="k").submit(1)).result(20) == 1
            assert await (await other.after(0, key="k").submit(2)).result(20) == 2
            assert await here.jobs["work"].cancel() == 0
        assert (one.args, two.args) == ([None, 1], [None, 2])

    @in_a_loop
    async def test_fencing(self, place: SQLitePlace) -> None:
        """The result of a claim that has been overtaken is refused, and what overtook it goes on undisturbed."""
        work, thief = Work(held=True), bgjob._store_of(place.url())
        (here, there), (job, _) = instances(2, work)
        async with going(place.url(), here, jobs=["work"]):
            run = await job.after(0, key="k").submit(1)
            await until(lambda: work.now == 1)
            await thief.open("thief", lambda: None)
            here._engine._closing, here._engine._names = True, frozenset()  # it claims nothing more
            row = await thief.find("work#k")
            back = bgjob.Settlement(
                row.id, row.token, "work", row.at, True, State.SCHEDULED, 0, True, 1, None, None, None
            )
            assert await thief.settle([back]) == ["done"]
            await thief.close()
            async with going(place.url(), there):
                await until(lambda: work.now == 2)
                stale, fresh = work.begun
                work.failures = 0
                work.release.set()
                await until(lambda: stale.reason == "lease lost" and fresh.state is State.SUCCEEDED)
                found = await there.find("work#k")
                assert (found.token, found.attempt, found.state) == (2, 1, State.SUCCEEDED)
            here._engine._closing = False
            assert await run.result(20) == 1
        assert work.tokens == [(1, 1), (1, 2)]

    @in_a_loop
    async def test_frozen_while_it_claims(self, place: SQLitePlace) -> None:
        """What comes of a claim after the lease it gave isn't started: it may have been, elsewhere. It goes back."""
        work, store = Work(on_crash="drop"), bgjob._store_of(place.url(lease="1s"))
        (registry,), (job,) = instances(1, work)
        claim, frozen = store.claim, []

        async def claim_slowly(free: Any) -> bgjob.News:
            news = await claim(free)
            if news.runs and not frozen:
                frozen.append(time.sleep(1))  # noqa: ASYNC251
            return news

        store.claim = claim_slowly
        async with going(store, registry):
            assert await (await job.submit(1)).result(20) == 1
        assert work.tokens == [(1, 2)]

    @in_a_loop
    async def test_odd_names(self, url: str | None) -> None:
        """Names, keys and values are data to a store, whatever characters it has a use for."""
        name, key = "jöb; DROP 'x' {a}:* 😀", "k'\"\\;--{}*?[]@#%_ 😀"
        (registry,), (job,) = instances(1, Work(name=name))
        async with going(url, registry):
            run = await job.after(0, key=key).submit("\0\ud800 '")
            assert await run.result(20) == "\0\ud800 '"
            found = await registry.find(f"{name}#{key}")
            assert (found.job, found.key, found.args) == (name, key, ("\0\ud800 '",))
            assert not await found.cancel()

    @in_a_loop
    async def test_after(self, place: SQLitePlace) -> None:
        """A job with `after` is each instance's own, and never in the store."""
        work = Work(after=0)
        registries, _ = instances(2, work)
        async with going(place.url(), *registries):
            await until(lambda: len(work.ended) == 2)
            assert await registries[0].jobs["work"].cancel() == 0

    @in_a_loop
    async def test_threads(self, url: str | None) -> None:
        """A plain function runs in a thread, with the run's context; its value and its error are the run's."""
        registry = Registry()

        @registry.job
        def plain(n: int) -> list[object]:
            return [1 // n, current_run().id, threading.current_thread() is threading.main_thread()]

        async with going(url, registry):
            run = await plain.submit(1)
            assert await run.result(20) == [1, run.id, False]
            with pytest.raises(RunFailed, match="ZeroDivisionError"):
                await (await plain.submit(0)).result(20)

    @in_a_loop
    async def test_jobs_that_come_and_go(self, place: SQLitePlace) -> None:
        """A job registered while it goes begins its schedule; a removed one starts nothing more, and its runs stay."""
        work, other = Work(every="30ms", overlap="all"), Work(name="other")
        registry = Registry()
        (late,), _ = instances(1, other)
        async with going(place.url(), registry):
            work(registry)
            job = other(registry)
            await until(lambda: len(work.begun) > 1)
            stays = await job.after("50ms").submit(1)
            registry.remove("work")
            registry.remove("other")
            begun = len(work.begun)
            await asyncio.sleep(0.2)
            assert len(work.begun) <= begun + 1
            assert other.begun == []
        async with going(place.url(), late):
            assert await (await late.find(stays.id)).result(20) == 1
        assert work.ticks == [*range(work.ticks[0], work.ticks[-1] + 30, 30)]

    @in_a_loop
    async def test_on_error(self, url: str | None) -> None:
        """`on_error` is called once, after the last attempt, and before the run is settled."""
        told: list[tuple[object, ...]] = []

        def on_error(run: Run, error: BaseException) -> None:
            told.append((run.id, run.attempt, run.state, str(error)))

        (registry,), (job,) = instances(1, Work(failures=9, retries=1, retry_delay=0, on_error=on_error))
        async with going(url, registry):
            with pytest.raises(RunFailed):
                await (await job.after(0, key="k").submit()).result(20)
        assert told == [("work#k", 2, State.RUNNING, "failure 2")]


class TestVerbs:
    """What the verbs of a store mean, to the letter, where an engine would hide it: the same for every store."""

    @in_a_loop
    async def test_ticks_of_one_call(self, place: SQLitePlace) -> None:
        """Each tick of a call gets its own answer, by the facts of its own job; the winner its run where there's room."""
        expected = {
            "lost": ("lost", 3, False), "early": ("early", 0, False), "skipped": ("skipped", 1, False),
            "full": ("full", 1, False), "won": ("won", 1, True), "late": ("won", 1, False),
            "waits": ("won", 1, False), "no room": ("won", 1, False), "busy": ("won", 1, False),
        }  # fmt: skip
        async with two_owners(place, *expected) as (store, _, lasts):

            def tick(job: str, after: int = 1, **options: Any) -> bgjob.Tick:
                facts = {"delay": 0, "limit": 1, "hold": False, "free": 1, "parallelism": 1, **options}
                return bgjob.Tick(job, lasts[job] + after, **facts)

            before = [tick("lost", 3), tick("skipped"), tick("full")]
            _, answers = await store.tick(before)
            await store.settle([an_end(answers[0].run, State.SUCCEEDED)])
            await store.push([a_call("1", "busy"), a_call("2", "busy", HOUR), a_call("3", "won", HOUR)], False)
            await store.claim({"busy": (1, 1)})
            await store.push([a_call("4", "waits")], False)
            asked = [
                tick("lost"), tick("early", HOUR), tick("skipped", 2), tick("full", 2, hold=True), tick("won"),
                tick("late", delay=50), tick("waits", parallelism=2), tick("no room", free=0), tick("busy"),
            ]  # fmt: skip
            _, answers = await store.tick(asked)
            told = {a.tick.job: (a.word, a.last - lasts[a.tick.job], a.run is not None) for a in answers}
            assert told == expected | {"skipped": ("skipped", told["skipped"][1], False)}
            won = asked[4]
            assert answers[4].run == bgjob.Claimed(won.id, "won", won.at, False, "", 1, 0, 1, False)
            row, late = await store.find(won.id), await store.find(asked[5].id)
            assert (row.state, row.owner, row.due - row.since) == (State.RUNNING, "me", store.lease)
            assert (late.state, late.owner, late.due, late.at) == (State.SCHEDULED, None, asked[5].at + 50, asked[5].at)
            _, last = await store.enlist(dict.fromkeys([*expected, "new"], NO_SCHEDULE))
            moved = {job: last[job] - before for job, before in lasts.items()}
            assert moved == {**dict.fromkeys(expected, 1), "lost": 3, "early": 0, "skipped": 2}

    @in_a_loop
    async def test_lost_ticks(self, place: SQLitePlace) -> None:
        """Who lost all the ticks of a call is told how far the others have gone with each of the jobs."""
        async with two_owners(place, "one", "two") as (store, other, lasts):
            for job, after in (("one", 1), ("two", 1), ("two", 5)):
                await other.tick([bgjob.Tick(job, lasts[job] + after, 0, 9, False, 0, 1)])
            _, answers = await store.tick([bgjob.Tick(job, lasts[job] + 1, 0, 9, False, 1, 1) for job in lasts])
            assert {a.tick.job: (a.word, a.last - lasts[a.tick.job]) for a in answers} == {
                "one": ("lost", 1), "two": ("lost", 5),
            }  # fmt: skip

    @in_a_loop
    async def test_claims(self, place: SQLitePlace) -> None:
        """A claim takes the oldest that are due, by `due` and id, of the jobs asked for, up to both limits of each."""
        async with two_owners(place, "work", "left") as (store, other, _):
            past = int(time.time() * 1000) - 10_000
            calls = [("a", 2), ("c", 1), ("b", 2), ("d", 3), ("e", 5)]
            await store.push([bgjob.Call(id, "work", past + n, 0, "[[],{}]") for id, n in calls], False)
            await store.push([bgjob.Call("z", "left", past, 0, "[[],{}]"), a_call("later", "left", HOUR)], False)
            await store.push([a_call("sooner", "work", HOUR - 9000), a_call("y", "work", HOUR)], False)
            news = await store.claim({"work": (2, 9)})
            assert [(run.id, run.tries, run.lost, run.token) for run in news.runs] == [("c", 1, 0, 1), ("a", 1, 0, 1)]
            (first, second), row = [await store.find(id) for id in "ca"], await store.find("sooner")
            assert first.owner == "me"
            assert 0 <= first.due - first.since - store.lease <= 50  # PostgreSQL reads its clock for each
            for parallelism in (2, 1):  # it may have been more before
                full = await store.claim({"work": (2, parallelism)})
                # not what is due, or it would be asked for ever
                assert (full.runs, full.next_due) == ([], min(first.due, second.due))
            assert [run.id for run in (await other.claim({"work": (9, 4)})).runs] == ["b", "d"]
            assert await store.cancel("work", "b")
            assert (await store.claim({})).cancelled == []
            assert (await other.claim({})).cancelled == ["b"]
            await store.settle([an_end(run, State.SUCCEEDED) for run in news.runs])
            news = await other.claim({"work": (9, 9)})
            assert ([run.id for run in news.runs], news.cancelled) == (["e"], ["b"])
            news = await store.claim({"work": (9, 9)})
            assert (news.runs, news.next_due) == ([], min([(await store.find(id)).due for id in "bde"]))
            await other.settle(
                [bgjob.Settlement(id, 1, "work", 0, True, State.FAILED, *[0, False, 1], *[None] * 3) for id in "bde"]
            )
            assert (await store.claim({"work": (9, 9), "left": (0, 9)})).next_due == row.due

    @in_a_loop
    async def test_again(self, place: SQLitePlace) -> None:
        """Again keeps the count and is due after its delay; a hand-back is as if it had never been claimed."""
        async with two_owners(place, "work", "other") as (store, _, _):
            await store.push([a_call("one"), a_call("two", "other")], False)
            (run,) = (await store.claim({"work": (1, 1)})).runs
            assert await store.settle([an_end(run, State.SCHEDULED, HOUR, error="E")]) == ["done"]
            row = await store.find("one")
            assert (row.state, row.attempt, row.owner, row.error, row.at) == (State.SCHEDULED, 1, None, "E", run.at)
            assert abs(row.due - time.time() * 1000 - HOUR) < 60_000
            (run,) = (await store.claim({"other": (1, 1)})).runs
            assert await store.settle([an_end(run, State.SCHEDULED, HOUR, back=True)]) == ["done"]
            assert (await store.find("two")).due == run.at
            assert (await store.claim({"other": (1, 1)})).runs == [run._replace(token=2)]

    @in_a_loop
    async def test_what_is_remembered(self, place: SQLitePlace) -> None:
        """The end of a call, of a failure, and what somebody waits for is kept; a tick's success leaves nothing."""
        jobs = ("plain", "bad", "awaited", "cancelled")
        async with two_owners(place, "work", *jobs) as (store, _, lasts):
            _, answers = await store.tick([bgjob.Tick(job, lasts[job] + 1, 0, 1, False, 1, 1) for job in jobs])
            await store.push([a_call("call")], False)
            (call,) = (await store.claim({"work": (1, 1)})).runs
            plain, bad, awaited, cancelled = [answer.run for answer in answers]
            await store.find(plain.id)
            await store.find(awaited.id, watch=True)
            await store.cancel("cancelled", cancelled.id)
            ends = [an_end(run, State.SUCCEEDED) for run in (plain, call, awaited)]
            ends += [an_end(bad, State.FAILED, error="E"), an_end(cancelled, State.SCHEDULED)]
            assert await store.settle(ends) == ["done", "done", "done", "done", "cancelled"]
            rows = [await store.find(run.id) for run in (plain, call, awaited, bad, cancelled)]
            assert [row and row.state for row in rows] == [
                None, State.SUCCEEDED, State.SUCCEEDED, State.FAILED, State.CANCELLED,
            ]  # fmt: skip
            assert (rows[1].result, rows[1].args, rows[1].attempt) == ("null", "[[1],{}]", 1)
            assert (rows[3].error, rows[4].reason) == ("E", "cancelled on request")

    @in_a_loop
    @pytest.mark.parametrize("several", [False, True])
    async def test_keys(self, place: SQLitePlace, several: bool) -> None:
        """An id is taken while its run is unfinished and after it succeeded or failed, and free after it was cancelled
        or skipped; then its tokens go on. Calls that are pushed together are as independent as others."""
        ends = (State.SUCCEEDED, State.FAILED, State.CANCELLED, State.SKIPPED)

        async with two_owners(place, "work") as (store, _, _):

            async def push(*calls: bgjob.Call) -> list[bool]:
                batches = [calls] if several else [[call] for call in calls]
                return [at is not None for batch in batches for at in await store.push(batch, False)]

            calls = [*map(a_call, ends)]
            assert await push(*calls) == [True] * 4
            assert await push(*calls) == [False] * 4
            runs = (await store.claim({"work": (9, 9)})).runs
            assert await push(*calls) == [False] * 4
            await store.settle([an_end(run, State(run.id)) for run in runs])
            assert await push(*calls, a_call("new")) == [False, False, True, True, True]
            tokens = {run.id: run.token for run in (await store.claim({"work": (9, 9)})).runs}
            assert tokens == {State.CANCELLED: 2, State.SKIPPED: 2, "new": 1}
            assert await store.push([bgjob.Call("at", "work", 5, 9, ""), a_call("x")][: 1 + several], False)
            assert (await store.find("at")).due == 5

    @in_a_loop
    async def test_cancels(self, place: SQLitePlace) -> None:
        """A cancel finds the unfinished runs of its job, and where it has an id only that one."""
        async with two_owners(place, "work", "other") as (store, _, _):
            await store.push([*map(a_call, "abc"), a_call("d", delay=HOUR), a_call("other", "other")], False)
            runs = (await store.claim({"work": (2, 9), "other": (1, 1)})).runs
            await store.push([a_call("waits", "other")], False)
            assert await store.cancel("work", "other") == await store.cancel("work", "waits") == {}
            found = {id: one.signalled for id in "ac" for id, one in (await store.cancel("work", id)).items()}
            assert found == {"a": True, "c": False}
            assert {id: one.signalled for id, one in (await store.cancel("work")).items()} == {
                "a": True, "b": True, "d": False,
            }  # fmt: skip
            assert await store.beat({run.id: 1 for run in runs}) == {"a": True, "b": True, "other": False}
            assert (await store.find("waits")).state is State.SCHEDULED
            assert (await store.find("d")).state is State.CANCELLED

    @in_a_loop
    async def test_overview(self, place: SQLitePlace) -> None:
        """What runs, by its start; what is due, what waits for a retry and what failed: so many of each, nearest first."""
        async with two_owners(place) as (store, _, _):
            await store.enlist({"work": NO_SCHEDULE})
            await store.enlist({job: bgjob.Listing(f'"{job}"', False, n) for n, job in enumerate("bac")})
            await store.enlist({"b": bgjob.Listing('"b"', False, 7)})
            for state in (State.FAILED, State.SUCCEEDED, State.SCHEDULED, State.RUNNING):
                for n in range(3):
                    await store.push([a_call(f"{state} {n}")], False)
                    (run,) = (await store.claim({"work": (1, 99)})).runs
                    if state is not State.RUNNING:
                        await store.settle([an_end(run, state, HOUR - 9000 * n)])
                    await asyncio.sleep(0.002)
            await store.push([a_call(f"due {n}", delay=HOUR - 9000 * n) for n in range(3)], False)
            seen = await store.overview(2)
            assert [(job.job, job.schedule, job.timeout) for job in seen.jobs] == [
                ("a", '"a"', 1), ("b", '"b"', 7), ("c", '"c"', 2), ("work", "", None),
            ]  # fmt: skip
            assert [row.id for row in seen.running] == [f"running {n}" for n in range(3)]
            assert [row.id for row in seen.due] == ["due 2", "due 1"]
            assert [row.id for row in seen.retrying] == ["scheduled 2", "scheduled 1"]
            assert [row.id for row in seen.failed] == ["failed 2", "failed 1"]

    @in_a_loop
    async def test_enlisting(self, place: SQLitePlace) -> None:
        """A known job keeps its place under the same schedule only; a new one begins now, if immediate with a run."""
        hourly, daily = (bgjob.Listing(text, True, None) for text in "hd")
        async with opened(bgjob._store_of(place.url())) as store:
            _, first = await store.enlist(
                {"same": hourly, "changed": hourly, "later": hourly._replace(immediate=False)}
            )
            await asyncio.sleep(0.01)
            now, second = await store.enlist({"same": hourly, "changed": daily, "later": hourly})
            assert second == {"same": first["same"], "changed": now, "later": first["later"]}
            now, third = await store.enlist({"new": hourly, "changed": daily})
            assert third == {"new": now, "changed": second["changed"]}
            due = {row.job: row for row in (await store.overview(9)).due}
            assert due.keys() == {"same", "changed", "new"}
            assert all(row.id == bgjob._tick_id(job, row.at) for job, row in due.items())
            assert due["changed"].at <= first["changed"]


async def fill(store: SQLiteStore, number: int) -> None:
    """Runs of the far future, and as many that are due of a job that is blocked."""
    await store._begin()
    with store._transaction() as db:
        for job, due in (("job", 1 << 50), ("blocked", 0)):
            rows = ((f"{job} {n} of {number}", job, due + n) for n in range(number))
            db.executemany("INSERT INTO bgjob_run(id, job, due, at, call) VALUES(?, ?, ?, 0, 1)", rows)


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system that is nearly full, and a file in it that may be removed."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mount isn't allowed")
    try:
        (folder / "ballast").write_bytes(bytes(48 << 20))
        yield folder / "ballast"
    finally:
        subprocess.run(["umount", folder], check=True)


@contextmanager
def nobody() -> Iterator[None]:
    """Permissions say nothing to root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


async def submit_until_refused(job: Job, runs: list[Run]) -> None:
    for n in itertools.count():
        runs.append(await job.submit([n, "x" * 20_000]))


async def steps(store: SQLiteStore, verb: Awaitable[object]) -> int:
    """What SQLite does for a verb, counted: no clock tells it as well."""
    done: list[int] = []
    store._db.set_progress_handler(lambda: done.append(1), 1)
    assert await verb
    store._db.set_progress_handler(None, 0)
    return len(done)


class TestSQLite:
    """What only a file can do to its users."""

    @in_a_loop
    async def test_immediate_at_once(self, tmp_path: Path) -> None:
        """Instances that start at once agree on which of them has the immediate run."""
        stores = [SQLiteStore(tmp_path / "jobs.db") for _ in range(4)]
        for number, store in enumerate(stores):
            await store.open(str(number), lambda: None)
        listing = {"work": bgjob.Listing("", True, None)}
        with locked(tmp_path / "jobs.db"):
            tasks = [asyncio.create_task(store.enlist(listing)) for store in stores]
            await asyncio.sleep(0.02)
        await asyncio.gather(*tasks)
        assert len((await stores[0].overview(9)).due) == 1
        for store in stores:
            await store.close()

    @in_a_loop
    async def test_stale_tokens(self, tmp_path: Path) -> None:
        """What comes late under an old token doesn't take a newer claim of the run from the thread that beats for it."""
        async with opened(SQLiteStore(tmp_path / "jobs.db")) as store:
            store._held["x"] = 2
            assert await store.beat({"x": 1}) == {}
            late = bgjob.Settlement("x", 1, "work", 0, True, State.FAILED, *[0, False, 1], *[None] * 3)
            assert await store.settle([late]) == ["refused"]
            assert store._held == {"x": 2}
            assert await store.beat({"x": 2}) == {}
            assert store._held == {}

    @in_a_loop
    async def test_expired_lease(self, tmp_path: Path) -> None:
        """A run whose lease has ended is anybody's: it has no slot, isn't running, can be claimed and cancelled."""
        place, jobs = SQLitePlace(tmp_path), ("again", "one", "all", "kept")
        async with two_owners(place, *jobs) as (store, other, _):
            await store.push([a_call(job, job) for job in jobs], False)
            runs = {run.id: run for run in (await store.claim(dict.fromkeys(jobs, (1, 1)))).runs}
            assert (await other.claim(dict.fromkeys(jobs, (1, 1)))).runs == []
            place.expire()
            assert await store.beat({"kept": 1, "again": 2, "nothing": 1}) == {"kept": False}
            seen = await other.overview(9)
            assert ([row.id for row in seen.running], len(seen.retrying)) == (["kept"], 3)
            assert (await other.find("again")).state is State.SCHEDULED
            assert await other.cancel("one", "one") == {"one": bgjob.Cancelled(False, runs["one"].at)}
            assert await other.cancel("all") == {"all": bgjob.Cancelled(False, runs["all"].at)}
            news = await other.claim(dict.fromkeys(jobs, (1, 1)))
            assert news.runs == [runs["again"]._replace(tries=2, lost=1, token=2)]
            assert await store.beat({"again": 1}) == {}
            for state, back in (
                (State.SUCCEEDED, False),
                (State.FAILED, False),
                (State.SCHEDULED, False),
                (State.SCHEDULED, True),
            ):
                assert await store.settle([an_end(runs["again"], state, back=back)]) == ["refused"]
            assert (await other.find("again")).owner == "other"
            assert await other.settle([an_end(news.runs[0], State.SUCCEEDED)]) == ["done"]

    @in_a_loop
    async def test_expired_tick(self, tmp_path: Path) -> None:
        """The end of a tick that was overtaken is refused, by whomever; its slot is free, and what waits goes first."""
        place = SQLitePlace(tmp_path)
        async with two_owners(place, "work", "idle") as (store, other, lasts):
            _, (first,) = await store.tick([bgjob.Tick("work", lasts["work"] + 1, 0, 9, False, 9, 1)])
            place.expire()
            for owner, token in ((other, 2), (store, 3)):
                (again,) = (await owner.claim({"work": (1, 1)})).runs
                assert again == first.run._replace(tries=token, lost=token - 1, token=token)
                for state in (State.SUCCEEDED, State.FAILED):
                    assert await store.settle([an_end(first.run, state)]) == ["refused"]
                place.expire()
            await store.push([a_call("call")], False)
            ticks = [bgjob.Tick(job, lasts[job] + 2, 0, 9, False, 9, 1) for job in ("work", "idle")]
            _, (second, idle) = await store.tick(ticks)
            assert (second.word, second.run, idle.run is None) == ("won", None, False)
            assert [run.id for run in (await store.claim({"work": (1, 1)})).runs] == [again.id]

    @in_a_loop
    async def test_jobs_deleted(self, tmp_path: Path) -> None:
        """A tick of a job that isn't in the file is an outage, at whose end the jobs are enlisted again; none is won."""
        place = SQLitePlace(tmp_path)
        async with two_owners(place, "work", "gone") as (store, _, lasts):
            with closing(sqlite3.connect(place.file)) as db, db:
                db.execute("DELETE FROM bgjob_tick WHERE job = 'gone'")
            ticks = [bgjob.Tick(job, lasts[job] + 1, 0, 1, False, 1, 1) for job in ("work", "gone")]
            for asked in (ticks, ticks[1:]):
                with pytest.raises(bgjob.Unreachable, match="its jobs were deleted"):
                    await store.tick(asked)
            assert [answer.word for answer in (await store.tick(ticks[:1]))[1]] == ["won"]

    @in_a_loop
    async def test_tick_that_is_there(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A tick that is handed out again, as its job was deleted meanwhile, doesn't start what runs a second time."""
        place = SQLitePlace(tmp_path)
        async with two_owners(place, "work", "next") as (store, other, lasts):
            ticks = [bgjob.Tick(job, lasts[job] + 1, 0, 9, False, 9, 9) for job in ("work", "next")]
            now, (first,) = await store.tick(ticks[:1])
            for again, asked, clock in ((other, ticks, now), (store, ticks[:1], now + 1)):
                await place.rewind("work", lasts["work"])
                monkeypatch.setattr(bgjob, "_wall_ms", lambda clock=clock: clock)
                _, (answer, *more) = await again.tick(asked)
                assert (answer.word, answer.run) == ("won", None)
                assert all(one.run is not None for one in more)
            assert await store.beat({first.run.id: 1}) == {first.run.id: False}

    @in_a_loop
    async def test_lock_before_the_clock(self, tmp_path: Path) -> None:
        """What waits for a lock goes by the clock when it has got it: no lease is short, and no tick lost or early."""
        async with two_owners(SQLitePlace(tmp_path), "work", "call") as (store, _, _):
            await store.push([a_call("one", "call")], False)
            soon = int(time.time() * 1000) + 40
            with locked(tmp_path / "jobs.db"):
                claim = asyncio.create_task(store.claim({"call": (1, 1)}))
                tick = asyncio.create_task(store.tick([bgjob.Tick("work", soon, 0, 1, False, 1, 1)]))
                await asyncio.sleep(0.15)
                unlocked = int(time.time() * 1000)
            _, (answer,) = await tick
            await claim
            assert answer.word == "won"
            for id in ("one", answer.run.id):
                assert (await store.find(id)).due >= unlocked + store.lease

    @in_a_loop
    async def test_claim_of_nothing(self, tmp_path: Path) -> None:
        """A claim that finds nothing due takes no lock, so that idle instances don't stand in the way of others."""
        async with two_owners(SQLitePlace(tmp_path), "work", "other") as (store, _, _):
            await store.push([a_call("other", "other"), a_call("one", delay=HOUR)], False)
            with locked(tmp_path / "jobs.db"):
                assert (await asyncio.wait_for(store.claim({"work": (1, 1)}), 1)).runs == []

    @in_a_loop
    async def test_short_lock(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """A lock that is given back in time is no outage, at the start neither: processes start together."""
        file, (registry,), (job,) = tmp_path / "jobs.db", *instances(1, Work())
        for prefix in ("one", "one", "two"):
            with contextlib.ExitStack() as stack:
                stack.enter_context(locked(file))
                asyncio.get_running_loop().call_later(0.1, stack.close)
                async with going(SQLiteStore(file, prefix=prefix), registry):
                    assert await (await job.submit(1)).result(20) == 1
        assert "unreachable" not in caplog.text

    @in_a_loop
    @pytest.mark.parametrize(("lease", "limit"), [("1s", 4), ("30s", 0.25)])
    async def test_patience(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lease: str, limit: float) -> None:
        """A verb that meets a lock gives up after a quarter of the lease, while somebody may still beat, and before the
        patience of whoever submits ends."""
        monkeypatch.setattr(bgjob, "_VERB_LIMIT", limit)
        async with opened(SQLiteStore(tmp_path / "jobs.db", lease=lease)) as store:
            with locked(tmp_path / "jobs.db"):
                began = time.monotonic()
                with pytest.raises(bgjob.Unreachable, match="database is locked"):
                    await store.push([a_call("one")], False)
                assert 0.2 < time.monotonic() - began < 2

    @in_a_loop
    async def test_error_codes(self, tmp_path: Path) -> None:
        """Locks, a full disk and I/O errors are outages, whatever SQLite has to add to the code; nothing else is. A
        lock is tried again first."""
        store, tried = SQLiteStore(tmp_path / "jobs.db"), []

        class Broken:
            def execute(self, *_: object) -> None:
                tried.append(1)
                if len(tried) < 4:
                    raise self.error
                raise sqlite3.OperationalError("at last")

        broken = Broken()
        async with opened(store):
            whole, store._db = store._db, broken
            for name, kind, number in (
                ("SQLITE_BUSY", StoreError, 4),
                ("SQLITE_BUSY_SNAPSHOT", StoreError, 4),
                ("SQLITE_FULL", bgjob.Unreachable, 1),
                ("SQLITE_IOERR", bgjob.Unreachable, 1),
                ("SQLITE_IOERR_SHMSIZE", bgjob.Unreachable, 1),
                ("SQLITE_CORRUPT", StoreError, 1),
            ):
                broken.error = sqlite3.OperationalError(name)
                broken.error.sqlite_errorcode = getattr(sqlite3, name)
                tried.clear()
                with pytest.raises(StoreError) as caught:
                    await store.find("x")
                assert (name, type(caught.value), len(tried)) == (name, kind, number)
            tried.clear()
            store._look()
            store._db = whole

            class Full:
                def execute(self, sql: str, *values: object) -> sqlite3.Cursor:
                    if sql != store._sql.push:
                        return whole.execute(sql, *values)
                    whole.execute("ROLLBACK")  # as SQLite does by itself then
                    raise broken.error

            broken.error.sqlite_errorcode, store._db = sqlite3.SQLITE_FULL, Full()
            with pytest.raises(bgjob.Unreachable):
                await store.push([a_call("1"), a_call("2")], False)
            store._db = whole

    @in_a_loop
    async def test_replaced(self, tmp_path: Path) -> None:
        """A file that was replaced is opened anew by the verb that is next, and by it alone; the others wait for it."""
        file, hints = tmp_path / "jobs.db", []
        async with opened(SQLiteStore(tmp_path / "new.db")) as other:
            await other.push([a_call("there")], False)
        store = SQLiteStore(file)
        await store.open("me", lambda: hints.append(1))
        for end in ("", "-wal", "-shm"):
            (tmp_path / f"jobs.db{end}").unlink()
        os.replace(tmp_path / "new.db", file)
        store._look()
        assert hints == [1]
        connect, begun = store._connect, []
        store._connect = lambda: begun.append(1) or connect()
        with locked(file):
            tasks = [asyncio.create_task(store.find("there")) for _ in range(3)]
            await asyncio.sleep(0.05)
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert begun == [1]
        assert str(answers[0]) == f"{store!r}: the file was replaced; begun anew"
        assert [row.id for row in answers[1:]] == ["there", "there"]
        assert [row.owner for row in [await store.find("there")]] == [None]
        await store.close()

    @in_a_loop
    async def test_used_again(self, tmp_path: Path) -> None:
        """A store object begins afresh each time: what was wrong with its file or held by its last owner is past. Nor
        does an end make a file that was deleted."""
        file, store = tmp_path / "jobs.db", SQLiteStore(tmp_path / "jobs.db")
        await store.close()  # it wasn't open
        async with opened(store):
            await store.push([a_call("one")], False)
            await store.claim({"work": (1, 1)})
            for path in tmp_path.iterdir():  # noqa: ASYNC240
                path.unlink()
            store._look()
        assert (os.listdir(tmp_path), store._watch.cancelled(), store._thread_ended.done()) == ([], True, True)
        async with opened(store):
            assert await store.find("one") is None
            assert store._held == {}
        assert file.exists()

    @in_a_loop
    async def test_failed_start(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What fails at the start leaves nothing behind, and the store can be opened again."""
        store = SQLiteStore(tmp_path / "jobs.db")
        with monkeypatch.context() as patch:
            patch.setattr(store, "beat", lambda runs: exec("raise RuntimeError"))
            with pytest.raises(RuntimeError):
                await store.open("me", lambda: None)
        with monkeypatch.context() as patch:
            patch.setattr(sqlite3, "sqlite_version_info", (3, 34, 1))
            with pytest.raises(StoreError, match="needs SQLite 3.35"):
                await store.open("me", lambda: None)
        async with opened(store):
            assert await store.beat({}) == {}

    @in_a_loop
    async def test_outage_at_the_start(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without a file there's nothing to look at or to close, and the next verb tries again, for all that come."""
        monkeypatch.setattr(bgjob, "_VERB_LIMIT", 0.02)
        store = SQLiteStore(tmp_path / "jobs.db")

        async def find(delay: float) -> object:
            await asyncio.sleep(delay)
            store._look()
            return await store.find("x")

        with locked(tmp_path / "jobs.db"):
            await store.open("me", lambda: None)
            store._look()
            answers = await asyncio.gather(*map(find, (0, 0.005, 0.01)), return_exceptions=True)
            assert [type(answer) for answer in answers] == [bgjob.Unreachable] * 3
            assert store._db is None
        assert await store.find("x") is None
        with locked(tmp_path / "jobs.db"):
            waiting = asyncio.create_task(store.push([a_call("x")], True))
            await asyncio.sleep(0.005)
            store._disconnect()
            with pytest.raises(bgjob.Unreachable, match="it isn't open"):
                await waiting
        await store.close()

    @in_a_loop
    async def test_hints(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Who may have something to do is rung at once: at a call, at a cancel, at an end that is waited for, and also
        where the one that rings stops. A call of the far future, and one's own writes, wake nobody."""
        monkeypatch.setattr(bgjob, "_GLANCE", 1e6)
        mine, heard, stores = [], [], [SQLiteStore(tmp_path / "jobs.db") for _ in range(2)]
        for store, calls in zip(stores, (mine, heard), strict=True):
            await store.open(f"{id(calls)}", lambda calls=calls: calls.append(1))
        store, other = stores

        async def rings(*verbs: Awaitable[object]) -> bool:
            await asyncio.sleep(0.02)
            heard.clear()
            for verb in verbs:
                await verb
            await asyncio.sleep(0.05)
            return bool(heard)

        assert not await rings(store.push([a_call("far", delay=HOUR)], True), store.push([a_call("quiet")], False))
        assert await rings(store.push([a_call("due")], True))
        assert await rings(store.push([a_call("soon", delay=1000)], True))
        runs = (await store.claim({"work": (2, 9)})).runs
        assert not await rings(store.settle([an_end(runs[0], State.SUCCEEDED)]), store.push([a_call("due")], True))
        await other.find(runs[1].id, watch=True)
        assert await rings(store.settle([an_end(runs[1], State.SUCCEEDED)]))
        assert await rings(store.cancel("work", "far"))
        many = [verb for n in range(100) for verb in (store.push([a_call(f"{n}")], True), asyncio.sleep(0))]
        assert await rings(*many)
        assert (len(heard) < 50, mine) == (True, [])
        assert await rings(store.push([a_call("last")], True), store.close())
        await other.close()

    @in_a_loop
    @pytest.mark.parametrize(("lease", "glance"), [("1s", 5), ("30s", 0.3)])
    async def test_look(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lease: str, glance: float) -> None:
        """Where there's no bell, another's writes are seen at the next look, after five seconds or a third of the lease;
        one's own aren't news."""

        async def no_bell(*_: object, **__: object) -> None:
            raise OSError("no IPv4")

        monkeypatch.setattr(asyncio.get_running_loop(), "create_datagram_endpoint", no_bell)
        monkeypatch.setattr(bgjob, "_GLANCE", glance)
        hints: list[int] = []
        store = SQLiteStore(tmp_path / "jobs.db", lease=lease)
        await store.open("me", lambda: hints.append(1))
        async with opened(SQLiteStore(tmp_path / "jobs.db"), "other") as other:
            await store.push([a_call("own")], True)
            store._watch.cancel()
            store._look()
            assert hints == []
            for number in (1, 2):
                await other.push([a_call(f"{number}")], True)
                async with asyncio.timeout(2):
                    await until(lambda: len(hints) == number)  # noqa: B023
        await store.close()

    @in_a_loop
    async def test_bell(self, tmp_path: Path) -> None:
        """A bell hears its own name only, for its port was another's before. Who hasn't signed in for three leases is
        forgotten, and so is who leaves."""
        hints: list[int] = []
        store = SQLiteStore(tmp_path / "jobs.db")

        def peers() -> dict[str, int]:
            with closing(sqlite3.connect(store.path)) as db:
                return dict(db.execute("SELECT owner, port FROM bgjob_peer").fetchall())

        await store.open("me", lambda: hints.append(1))
        async with opened(SQLiteStore(store.path), "other"):
            assert peers().keys() == {"me", "other"}
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ringing:
                for name in (b"somebody", b"me"):
                    ringing.sendto(name, ("127.0.0.1", peers()["me"]))
            await until(lambda: hints)
            await asyncio.sleep(0.02)
            assert hints == [1]
            with closing(sqlite3.connect(store.path)) as db, db:
                db.execute("UPDATE bgjob_peer SET seen = seen - 100000")
            await store.beat({})
            assert peers().keys() == {"me"}
        await asyncio.wait_for(store.close(), 2)  # the thread is woken, too
        assert peers() == {}

    @in_a_loop
    async def test_thread_beats(self, tmp_path: Path) -> None:
        """Where the loop is late the thread beats for what is held, by its token and once it has the lock; else it
        doesn't, and it never makes a file."""
        place = SQLitePlace(tmp_path)
        async with two_owners(place, "work", "tick") as (store, other, lasts):
            await store.push([a_call("one"), a_call("two"), a_call("waits", delay=HOUR)], False)
            runs = (await store.claim({"work": (2, 2)})).runs
            _, (answer,) = await store.tick([bgjob.Tick("tick", lasts["tick"] + 1, 0, 1, False, 1, 1)])
            await store.settle([an_end(runs[1], State.SUCCEEDED)])
            before = (await other.find("one")).due
            await asyncio.sleep(0.01)
            store._guard_once()
            assert (await other.find("one")).due == before
            with locked(place.file):
                beaten = store._beaten = store._loop.time() - store.lease / 1900
                beating = asyncio.create_task(asyncio.to_thread(store._guard_once))
                await asyncio.sleep(0.1)
                unlocked = time.time() * 1000
            await beating
            for id in ("one", answer.run.id):
                assert (await other.find(id)).due >= unlocked + store.lease
            assert store._beaten > beaten
            assert store._held == {"one": 1, answer.run.id: 1}
            place.expire()
            await other.claim({"work": (2, 2), "tick": (1, 1)})
            assert await store.beat({"one": 1}) == {}
            store._beaten, before = 0.0, (await other.find("one")).due
            await asyncio.sleep(0.002)
            store._guard_once()
            assert (await other.find("one")).due == before
            assert store._held == {answer.run.id: 1}
        for path in tmp_path.iterdir():  # noqa: ASYNC240
            path.unlink()
        with pytest.raises(sqlite3.OperationalError):
            store._guard_once()
        assert os.listdir(tmp_path) == []

    @in_a_loop
    async def test_thread(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The thread does what it is stirred for once, is at rest else, tries again what failed, and where the loop is
        late doesn't try without a pause."""
        done: list[int] = []
        store = SQLiteStore(tmp_path / "jobs.db", lease="1s")
        monkeypatch.setattr(store, "_guard_once", lambda: done.append(1) or 1 / 0)
        async with opened(store):
            for number in (1, 2):
                store._stir.set()
                await asyncio.sleep(0.1)
                assert len(done) == number
                store._beaten = asyncio.get_running_loop().time()
            store._beaten, _ = 0.0, store._stir.set()
            await asyncio.sleep(0.2)
            assert 4 < len(done) < 9

    def test_loop_closed(self, tmp_path: Path) -> None:
        """The thread ends with a process whose loop was closed without the store."""
        store = SQLiteStore(tmp_path / "jobs.db")
        threads = set(threading.enumerate())

        async def main() -> None:
            await store.open("me", lambda: None)
            store._bell.close()
            await asyncio.sleep(0)

        asyncio.run(main())
        store._stopped = True
        store._stir.set()
        for thread in set(threading.enumerate()) - threads:
            thread.join(5)
            assert not thread.is_alive()
        store._disconnect()

    @in_a_loop
    async def test_checkpoints(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The log is moved into the file after 200 writes, by the thread: never by who writes, for it may take long."""
        store = SQLiteStore(tmp_path / "jobs.db")

        async def grown(calls: int) -> bool:
            for n in range(calls):
                await store.push([a_call(f"{calls} {n}")], False)
            return os.stat(store.path).st_size > size

        async with opened(store):
            size = os.stat(store.path).st_size
            with monkeypatch.context() as patch:
                patch.setattr(store, "_guard_once", lambda: None)
                assert not await grown(600)
            assert store._writes > 600
            await grown(201)
            await until(lambda: os.stat(store.path).st_size > size)

    @in_a_loop
    async def test_long_log(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A log that is long is cut off before long, though nobody writes any more."""
        monkeypatch.setattr(bgjob, "_GLANCE", 0.05)
        monkeypatch.setattr(bgjob, "_LOG", 1000)
        async with opened(SQLiteStore(tmp_path / "jobs.db", lease="1h")):
            await until(lambda: (tmp_path / "jobs.db-wal").stat().st_size == 0)

    @in_a_loop
    async def test_prune(self, tmp_path: Path) -> None:
        """With each end two that aren't kept any more are forgotten, the oldest first: never many at once."""
        async with opened(SQLiteStore(tmp_path / "jobs.db")) as store:
            old = [(f"old {n}", n) for n in (3, 1, 2, 5, 4)]
            with closing(sqlite3.connect(store.path)) as db, db:
                db.executemany("INSERT INTO bgjob_past(id, job, state, at, args, attempt, token, finished) "
                               "VALUES(?, 'work', 'failed', 0, '', 1, 1, ?)", old)  # fmt: skip
            await store.push([a_call("one")], False)
            (run,) = (await store.claim({"work": (1, 1)})).runs
            await store.settle([an_end(run, State.FAILED)])
            assert [row.id for row in (await store.overview(9)).failed] == ["one", "old 5", "old 4", "old 3"]

    @in_a_loop
    async def test_cancel_of_many(self, tmp_path: Path) -> None:
        """However many runs wait, a cancel of their job removes them all."""
        async with opened(SQLiteStore(tmp_path / "jobs.db")) as store:
            await store.push([a_call(f"{n}", delay=HOUR) for n in range(2500)], False)
            assert len(await store.cancel("work")) == 2500

    @in_a_loop
    async def test_change_of_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A relative path is that of the start, whatever folder the process goes to."""
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path)
        store = SQLiteStore("jobs.db")
        (registry,), (job,) = instances(1, Work())
        async with going(store, registry):
            monkeypatch.chdir(tmp_path / "elsewhere")
            store._look()
            assert await (await job.submit(1)).result(20) == 1
        assert not (tmp_path / "elsewhere/jobs.db").exists()

    @in_a_loop
    async def test_locked_at_the_start(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A file that is locked is an outage, at start too: it is waited for, and said in two lines."""
        monkeypatch.setattr(bgjob, "_VERB_LIMIT", 0.05)
        file, (registry,), (job,) = tmp_path / "jobs.db", *instances(1, Work())
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(file))
            async with going(SQLiteStore(file), registry):
                waiting = asyncio.create_task(job.submit(1))
                await asyncio.sleep(0.2)
                stack.close()
                assert await (await waiting).result(20) == 1

    @in_a_loop
    @pytest.mark.parametrize("when", ["start", "later"])
    async def test_locked_at_the_end(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
        """An outage at the end leaves nothing of the process behind either."""
        monkeypatch.setattr(bgjob, "_VERB_LIMIT", 0.05)
        file, (registry,), _ = tmp_path / "jobs.db", *instances(1, Work(every="1h"))
        with contextlib.ExitStack() as stack:
            if when == "start":
                stack.enter_context(locked(file))
            async with going(SQLiteStore(file), registry):
                if when == "later":
                    stack.enter_context(locked(file))

    @in_a_loop
    async def test_folder_deleted(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """Where the file's folder was deleted nothing is stored, a submit says so, and the end leaves nothing behind."""
        (tmp_path / "folder").mkdir()
        store = SQLiteStore(tmp_path / "folder/jobs.db")
        (registry,), (job,) = instances(1, Work())
        async with going(store, registry):
            shutil.rmtree(tmp_path / "folder")
            store._look()
            await until(lambda: "store unreachable" in caplog.text)
            with pytest.raises(StoreError, match="its folder must exist and be writable"):
                await job.submit(1)
        assert os.listdir(tmp_path) == []

    @in_a_loop
    async def test_stopped_in_an_outage(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Who stops during an outage tries once more at the end: what has ended is recorded if the file is free again."""
        monkeypatch.setattr(bgjob, "_VERB_LIMIT", 0.05)
        monkeypatch.setattr(bgjob, "_BACKOFF_FIRST", 30_000)
        work, store, reader = Work(held=True), SQLiteStore(tmp_path / "jobs.db"), SQLiteStore(tmp_path / "jobs.db")
        (registry, other), (job, _) = instances(2, work)
        async with going(store, registry):
            run = await job.submit(1)
            await until(lambda: work.now)
            with locked(tmp_path / "jobs.db"):
                work.release.set()
                await until(lambda: registry._engine._failures)
        async with going(reader, other, jobs=[]):
            found = await other.find(run.id)
            assert found is not None
            assert await found.result(20) == 1

    @in_a_loop
    async def test_removed_while_claimed(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """A run that was claimed while its job was removed runs all the same, and those that came with it."""
        file, work = tmp_path / "jobs.db", Work()
        (here, there), (_, job) = instances(2, work)
        async with going(SQLiteStore(file), here), going(SQLiteStore(file), there, jobs=[]):
            run = await job.after("1h").submit(1)
            await until(lambda: not here._engine._look)
            with locked(file) as db:
                db.execute("UPDATE bgjob_run SET due = at - 3600000")
                here._engine._look_everywhere()
                db.execute("COMMIT")
                db.execute("BEGIN IMMEDIATE")
                await asyncio.sleep(0.05)
                here.remove("work")
            assert await run.result(20) == 1
        assert "bgjob itself failed" not in caplog.text

    @in_a_loop
    async def test_cost_of_a_cancel(self, tmp_path: Path) -> None:
        """To cancel one run costs the same however many its job has."""
        store = SQLiteStore(tmp_path / "jobs.db")
        await store.open("me", lambda: None)
        await store.push([bgjob.Call(str(n), "job", None, HOUR, "") for n in range(1000)], False)
        assert await steps(store, store.cancel("job", "7")) < 1000
        await store.close()

    @in_a_loop
    async def test_locked_for_long(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A long lock is one outage of two lines: ticks keep their place, results wait, a submit is refused in time."""
        monkeypatch.setattr(bgjob, "_VERB_LIMIT", 0.05)
        monkeypatch.setattr(bgjob, "_PATIENCE", 0.5)
        monkeypatch.setattr(bgjob, "_BACKOFF_LAST", 500)
        work, ticks = Work(held=True), Work(name="ticks", every="100ms", overlap="all", parallelism=3)
        (registry,), (job,) = instances(1, work)
        ticks(registry)
        async with going(f"sqlite:///{tmp_path / 'jobs.db'}", registry):
            runs = [await job.submit(n) for n in range(10)]
            await until(lambda: work.now == 10 and ticks.begun)
            with locked(tmp_path / "jobs.db"):
                work.release.set()
                with pytest.raises(StoreError, match=r"job 'work': submit\(\): the store is unreachable for 0.5 s: "):
                    await job.submit("refused")
                await asyncio.sleep(20 if THOROUGH else 1)
                begun = len(ticks.begun)
            assert [await run.result(20) for run in runs] == [*range(10)]
            await until(lambda: len(ticks.begun) > begun + 10)
        assert ticks.ticks == [*range(ticks.ticks[0], ticks.ticks[-1] + 100, 100)]
        assert (len(work.begun), {run.attempt for run in runs}) == (10, {1})
        said = [text for text in caplog.messages if "store" in text]
        assert re.fullmatch(r"store unreachable: SQLiteStore\(.*\): database is locked; retrying", said[0])
        assert re.fullmatch(r"store back after [0-9.]+ s, 10 results settled", said[1])
        assert len(said) == 2

    @in_a_loop
    async def test_blocked_among_others(self, tmp_path: Path) -> None:
        """A job that blocks its loop past the lease isn't cut for a lock that it meets when the loop is back."""
        registry, starts = Registry(), []

        @registry.job
        async def block() -> None:
            starts.append(1)
            time.sleep(1.2)  # noqa: ASYNC251
            other.execute("BEGIN IMMEDIATE")
            threading.Timer(0.1, other.execute, ["COMMIT"]).start()
            await asyncio.sleep(0.2)

        async with going(SQLiteStore(tmp_path / "jobs.db", lease="1s"), registry):
            other = sqlite3.connect(tmp_path / "jobs.db", isolation_level=None, check_same_thread=False)
            await (await block.submit()).result(20)
            other.close()
        assert len(starts) == 1

    @in_a_loop
    async def test_full_disk(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A full disk refuses what it can't keep, and loses nothing that was acknowledged; with room it goes on."""
        monkeypatch.setattr(bgjob, "_PATIENCE", 0.3)
        monkeypatch.setattr(bgjob, "_BACKOFF_LAST", 500)
        work, store = Work(held=True, parallelism=1000), SQLiteStore(tmp_path / "jobs.db")
        (registry,), (job,) = instances(1, work)
        async with going(store, registry):
            pages = store._db.execute("PRAGMA page_count").fetchone()[0]
            store._db.execute(f"PRAGMA max_page_count = {pages + 500}")
            runs: list[Run] = []
            with pytest.raises(StoreError, match="the store is unreachable for 0.3 s: .*: database or disk is full"):
                await submit_until_refused(job, runs)
            assert len(runs) > 20
            work.release.set()
            await until(lambda: "disk is full; retrying" in caplog.text or len(work.ended) == len(runs))
            store._db.execute("PRAGMA max_page_count = 100000")
            for n, run in enumerate(runs):
                assert await run.result(20) == [n, "x" * 20_000]
            assert await (await job.submit("room")).result(20) == "room"
        assert len(work.begun) == len(runs) + 1

    @in_a_loop
    @pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a file system")
    async def test_full_file_system(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same where it isn't a limit of SQLite's but of the file system, log file and index included."""
        monkeypatch.setattr(bgjob, "_PATIENCE", 0.3)
        monkeypatch.setattr(bgjob, "_BACKOFF_LAST", 500)
        work = Work(held=True, parallelism=5)
        (registry,), (job,) = instances(1, work)
        with small_disk(tmp_path / "small") as ballast:
            async with going(f"sqlite:///{tmp_path / 'small/jobs.db'}", registry):
                runs: list[Run] = []
                with pytest.raises(StoreError, match="the store is unreachable for 0.3 s: .*(full|disk I/O error)"):
                    await submit_until_refused(job, runs)
                assert len(runs) > 20
                work.release.set()
                ballast.unlink()
                for n, run in enumerate(runs):
                    assert await run.result(20) == [n, "x" * 20_000]
        assert len(work.begun) == len(runs)

    @in_a_loop
    async def test_deleted(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """Who deletes the file deletes its runs; two lines say so, ticks and submits go on in a new one."""
        work = Work(every="50ms")
        registries, (job, _) = instances(2, work)
        async with going(f"sqlite:///{tmp_path / 'jobs.db'}", *registries):
            await until(lambda: work.begun)
            for file in tmp_path.iterdir():  # noqa: ASYNC240
                file.unlink()
            await until(lambda: caplog.text.count("store back after") == 2)
            begun = len(work.begun)
            await until(lambda: len(work.begun) > begun)
            assert await (await job.submit(1)).result(20) == 1
        assert caplog.text.count("store unreachable") == 2
        assert re.search(r"the file was (deleted|replaced); begun anew; retrying", caplog.text)

    @in_a_loop
    async def test_unusable_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What can't become a store by itself is refused at once, with the path and the reason."""
        monkeypatch.setattr(bgjob, "_VERB_LIMIT", 0.05)
        monkeypatch.chdir(tmp_path)
        (tmp_path / "text").write_text("no database at all " * 100)
        (tmp_path / "folder").mkdir()
        (registry,), _ = instances(1, Work())
        for path, reason in (
            ("text", "file is not a database"),
            ("folder", "unable to open database file; its folder must exist and be writable"),
            ("missing/jobs.db", "unable to open database file; its folder must exist and be writable"),
            (":memory:", "no write-ahead log is possible there (journal_mode is 'memory')"),
        ):
            with pytest.raises(StoreError) as caught:
                async with going(SQLiteStore(path), registry):
                    pass
            assert str(caught.value) == f"SQLiteStore({path!r}): {reason}"
            assert type(caught.value) is StoreError

    @in_a_loop
    @pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
    async def test_read_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A file that mustn't be written is refused at the start, and an outage that is said once if it comes later."""
        (registry,), (job,) = instances(1, Work())
        with tempfile.TemporaryDirectory() as folder:
            url = f"sqlite:///{folder}/jobs.db"
            async with going(url, registry):
                assert await (await job.submit(1)).result(20) == 1
            os.chmod(f"{folder}/jobs.db", 0o444)
            os.chmod(folder, 0o555)
            try:
                with (
                    nobody(),
                    pytest.raises(StoreError, match=r"jobs.db'\): (unable to open|attempt to write a readonly)"),
                ):
                    async with going(url, registry):
                        pass
            finally:
                os.chmod(folder, 0o755)

    @in_a_loop
    async def test_cost_beside_many(self, tmp_path: Path) -> None:
        """100,000 future runs and 100,000 due ones of a blocked job don't slow a claim, a tick or an end."""
        store, costs = SQLiteStore(tmp_path / "jobs.db"), []
        await store.open("me", lambda: None)
        await store.enlist({name: bgjob.Listing("", False, None) for name in ("job", "blocked")})
        for number in (10, 100_000):
            await fill(store, number)
            await asyncio.sleep(0.01)  # a job that is new has no tick yet
            costs.append([await steps(store, verb) for verb in self.verbs(store)])
        await store.close()
        assert all(many < 2 * few for few, many in zip(*costs, strict=True)), costs

    def verbs(self, store: SQLiteStore) -> Iterator[Awaitable[object]]:
        """What an instance does all day, with both jobs at hand and the blocked one at its limit."""
        free = {"job": (5, 5), "blocked": (1, 0)}
        now = int(time.time() * 1000)
        yield store.push([bgjob.Call(f"call {now}", "job", None, 0, "")], False)
        yield store.claim(free)
        yield store.claim(free)
        yield store.tick([bgjob.Tick("job", now, 0, 1, False, 1, 5)])
        yield store.beat({f"call {now}": 1})
        yield store.settle(
            [bgjob.Settlement(f"call {now}", 1, "job", now, True, State.SUCCEEDED, 0, False, 1, *[None] * 3)]
        )
        yield store.settle(
            [bgjob.Settlement(bgjob._tick_id("job", now), 1, "job", now, False, State.FAILED, 0, False, 1, *[None] * 3)]
        )
        yield store.find(f"call {now}")

    @in_a_loop
    async def test_size(self, tmp_path: Path) -> None:
        """What is no longer kept leaves room: the file doesn't grow with the runs that have been."""
        (registry,), (job,) = instances(1, Work(parallelism=100))
        sizes = []
        async with going(SQLiteStore(tmp_path / "jobs.db", keep="200ms"), registry):
            db = registry._engine._store._db
            for _ in range(5):
                runs = [await job.submit("x" * 500) for _ in range(2500 if THOROUGH else 500)]
                for run in runs:
                    await run.result(20)
                await asyncio.sleep(0.3)
                sizes += db.execute("PRAGMA page_count").fetchone()  # with what the log has yet to bring to the file
            (kept,) = db.execute("SELECT count(*) FROM bgjob_past").fetchone()
        assert kept <= len(runs)
        assert sizes[4] <= 1.2 * sizes[2], sizes

    @in_a_loop
    async def test_log_of_large_runs(self, tmp_path: Path) -> None:
        """The log is cut off when it has grown, by however few runs."""
        (registry,), (job,) = instances(1, Work())
        log = tmp_path / "jobs.db-wal"
        async with going(SQLiteStore(tmp_path / "jobs.db", lease="1h"), registry):
            for _ in range(15):
                await (await job.submit("x" * (1 << 19))).result(20)
            await until(lambda: log.stat().st_size <= bgjob._LOG)


WORKER = """
import asyncio, logging, os, random, signal, sys, time
import bgjob
from bgjob import current_run, job

log = os.open(os.environ["LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
logging.basicConfig(level=logging.WARNING, format="%(process)d %(message)s")

def note(what):
    run = current_run()
    line = f"{what} {run.id} {run.attempt} {run.token} {os.getpid()} {time.time_ns()}\\n"
    os.write(log, line.encode())

class noted:
    def __enter__(self):
        note("start")
    def __exit__(self, kind, error, trace):
        note("end" if kind is None else "cut" if kind is asyncio.CancelledError else "error")

"""


MAIN = """
if __name__ == "__main__":
    asyncio.run(bgjob.run(store=URL, drain=os.environ.get("DRAIN", "20s")))
"""


class Event(NamedTuple):
    """A line of the log that workers append to."""

    what: str
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
        self.jobs = jobs
        self.live: list[subprocess.Popen[bytes]] = []
        self.killed: dict[int, int] = {}  # pid -> ns
        self.stderr = folder / "stderr"
        self.script = folder / "worker.py"
        self.command = [str(self.script)]
        self.script.write_text(f"{WORKER}URL = {url!r}\n{textwrap.dedent(jobs)}\n{MAIN}")

    def start(self, number: int = 1, **environment: str) -> list[subprocess.Popen[bytes]]:
        self.log.touch()
        self.stderr.touch()
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "LOG": str(self.log), **environment}
        with self.stderr.open("a") as stderr:
            started = [subprocess.Popen([sys.executable, *self.command], env=env, cwd=self.script.parent, stdout=stderr,
                                        stderr=stderr) for _ in range(number)]  # fmt: skip
        self.live += started
        return started

    @property
    def said(self) -> str:
        return self.stderr.read_text()

    def kill(self, worker: subprocess.Popen[bytes]) -> None:
        worker.kill()
        self._reap(worker)
        self.killed[worker.pid] = time.time_ns()

    def _reap(self, worker: subprocess.Popen[bytes]) -> None:
        worker.wait(40)
        self.live.remove(worker)

    def stop(self) -> None:
        """Stop gracefully what still lives; one that was started a moment ago may not be listening yet, and just ends."""
        begun = {event.pid for event in self.events()}
        for worker in self.live:
            worker.terminate()
        for worker in [*self.live]:
            self._reap(worker)
            assert worker.returncode == 0 or (worker.returncode, worker.pid in begun) == (-signal.SIGTERM, False), (
                self.said
            )

    def events(self, *what: str) -> list[Event]:
        lines = [line.split(" ") for line in self.log.read_text().splitlines()]
        events = [Event(line[0], line[1], *map(int, line[2:])) for line in lines]
        return [event for event in events if event.what in what or not what]

    async def wait(self, what: str, number: int, patience: float = 60) -> list[Event]:
        """Until there are so many events of a kind."""
        async with asyncio.timeout(patience):
            while len(events := self.events(what)) < number:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            return events

    def starts(self) -> dict[str, list[Event]]:
        found: dict[str, list[Event]] = {}
        for event in self.events("start"):
            found.setdefault(event.id, []).append(event)
        return found

    def most(self) -> int:
        """How many runs were alive at once, a killed process's until it was killed."""
        opened, changes = {}, []
        for event in self.events():
            if event.what == "start":
                opened[event.id, event.token] = event
                changes.append((event.at, 1))
            else:
                del opened[event.id, event.token]
                changes.append((event.at, -1))
        changes += [(self.killed[event.pid], -1) for event in opened.values()]
        return max(itertools.accumulate(change for _, change in sorted(changes)))

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: object) -> None:
        for worker in [*self.live]:
            worker.kill()
            self._reap(worker)
        if error[0] is not None:
            print(self.said)


@pytest.fixture
def workers(place: SQLitePlace, tmp_path: Path) -> Iterator[Callable[..., Workers]]:
    with contextlib.ExitStack() as stack:
        yield lambda jobs, **options: stack.enter_context(Workers(tmp_path, place.url(**options), jobs))


def tick_of(id: str) -> int:
    return int(datetime.fromisoformat(id.partition("@")[2]).timestamp() * 1000 + 0.5)


@asynccontextmanager
async def client(workers: Workers) -> AsyncIterator[dict[str, Job]]:
    """The workers' jobs, to submit them from here."""
    registry = Registry()
    names: dict[str, Any] = {"job": registry.job, "os": os, "asyncio": asyncio, "bgjob": bgjob}
    exec(textwrap.dedent(workers.jobs), names)
    async with registry.running(store=workers.url, jobs=[]):
        yield {name: names[name] for name in registry.jobs}


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
class TestProcesses:
    """Faults, with real processes, real signals and an oracle that reads an append-only log."""

    JOBS = """
        @job
        async def work(n=0, seconds=0.05):
            with noted():
                await asyncio.sleep(seconds)
            return [n, os.getpid()]

        @job(on_crash="drop")
        async def once(n=0, seconds=0.05):
            with noted():
                await asyncio.sleep(seconds)
            return [n, os.getpid()]
    """

    @in_a_loop
    async def test_ticks(self, workers: Callable[..., Workers]) -> None:
        """With four processes each tick starts on exactly one, none is missing and none is early."""
        group = workers("""
            @job(every="100ms", overlap="all", parallelism=4)
            async def tick():
                note("start")
        """)
        group.start(8 if THOROUGH else 4)
        await group.wait("start", 600 if THOROUGH else 40, patience=120)
        group.stop()
        events = group.events()
        ticks = [tick_of(event.id) for event in events]
        assert sorted(ticks) == [*range(min(ticks), max(ticks) + 100, 100)]
        assert all(event.at >= tick * 1_000_000 for event, tick in zip(events, ticks, strict=True))
        assert len({event.pid for event in events}) > 1

    @in_a_loop
    async def test_kills(self, workers: Callable[..., Workers]) -> None:
        """kill -9 at random: no run that was acknowledged is lost, none repeats without a kill or if it must not."""
        group = workers(f"""{self.JOBS}
        @job(every="200ms", overlap="all", parallelism=9)
        async def tick():
            with noted():
                await asyncio.sleep(0.02)
        """, lease="2s")  # fmt: skip
        rng, runs = random.Random(0), []
        group.start(3)
        await group.wait("start", 1)
        end = time.monotonic() + (30 if THOROUGH else 6)
        async with client(group) as jobs:
            while time.monotonic() < end:
                for n in range(8):
                    runs.append(await jobs[rng.choice(["work", "once"])].after(rng.random()).submit(n))
                await asyncio.sleep(rng.random() * 0.2)
                if rng.random() < 0.3:
                    group.kill(rng.choice(group.live))
                    group.start()
            ends = await asyncio.gather(*[run.result(60) for run in runs], return_exceptions=True)
        group.stop()
        self.check_kills(group, runs, ends)

    def check_kills(self, group: Workers, runs: list[Run], ends: list[object]) -> None:
        starts = group.starts()
        assert len(group.killed) > 3
        for run, end in zip(runs, ends, strict=True):
            if isinstance(end, BaseException):
                assert str(end) == f"run {run.id!r} failed: BgjobError: its process died"
                assert run.job == "once"
                assert {event.pid for event in starts.get(run.id, [])} <= group.killed.keys()
            else:
                assert starts[run.id][-1].pid == end[1]
        for id, claims in starts.items():
            for lost, again in itertools.pairwise(claims):
                assert lost.at <= group.killed[lost.pid] <= again.at, (id, claims)
                assert again.token == again.attempt > lost.attempt
        assert all(len(starts.get(run.id, [])) <= 1 for run in runs if run.job == "once")
        ticks = sorted(tick_of(id) for id in starts if id.startswith("tick"))
        assert ticks == [*range(ticks[0], ticks[-1] + 200, 200)]

    @in_a_loop
    async def test_takeover(self, workers: Callable[..., Workers]) -> None:
        """The run of a killed process starts elsewhere within its lease and a second, as the next attempt."""
        group = workers(self.JOBS, lease="2s")
        (first,) = group.start()
        async with client(group) as jobs:
            run = await jobs["work"].submit(1, 2)
            await group.wait("start", 1)
            (second,) = group.start()
            await asyncio.sleep(1)
            group.kill(first)
            lost, again = await group.wait("start", 2)
            assert await run.result(60) == [1, second.pid]
        group.stop()
        assert (lost.attempt, again.attempt, again.token) == (1, 2, 2)
        assert (again.at - group.killed[first.pid]) / 1e9 < (3 if THOROUGH else 5)

    @in_a_loop
    async def test_takeover_unasked(self, workers: Callable[..., Workers]) -> None:
        """Of a run that a process submitted to itself no other has heard. When it dies the run is found by looking,
        however much the others have to do: their own ticks don't put that off."""
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
        group.kill(first)
        lost, again = await group.wait("start", 2, patience=20)
        assert (lost.pid, again.pid, again.attempt) == (first.pid, other.pid, 2)
        group.stop()

    @in_a_loop
    async def test_frozen(self, workers: Callable[..., Workers]) -> None:
        """A process frozen for longer than its lease is overtaken once; its run is cancelled, its result refused."""
        group = workers(self.JOBS, lease="2s")
        (first,) = group.start()
        async with client(group) as jobs:
            run = await jobs["work"].submit(1, 4)
            await group.wait("start", 1)
            (second,) = group.start()
            first.send_signal(signal.SIGSTOP)
            await group.wait("start", 2)
            first.send_signal(signal.SIGCONT)
            (cut,) = await group.wait("cut", 1)
            assert await run.result(60) == [1, second.pid]
            group.kill(second)
            assert await (await jobs["work"].submit(2)).result(60) == [2, first.pid]
        group.stop()
        assert (cut.pid, cut.token) == (first.pid, 1)
        assert [(event.pid, event.attempt) for event in group.starts()[run.id]] == [(first.pid, 1), (second.pid, 2)]
        assert "its attempt 1 here does not count" in group.said

    @in_a_loop
    async def test_poison(self, workers: Callable[..., Workers]) -> None:
        """A run that kills its process is given up after the fourth, whoever restarts them; others aren't harmed."""
        group = workers(f"""{self.JOBS}
        @job
        async def poison():
            note("start")
            os.kill(os.getpid(), 9)
        """, lease="1s")  # fmt: skip
        async with client(group) as jobs:
            run = await jobs["poison"].submit()
            ending = asyncio.create_task(run.result(60))
            while not ending.done():
                for worker in group.live.copy():
                    if worker.poll() is not None:
                        group.kill(worker)
                group.start(2 - len(group.live))
                await asyncio.sleep(0.1)
            with pytest.raises(RunFailed, match="BgjobError: its process died"):
                await ending
            assert (await (await jobs["work"].submit(1)).result(60))[0] == 1
        group.stop()
        assert [event.attempt for event in group.starts()[run.id]] == [1, 2, 3, 4]

    @in_a_loop
    @pytest.mark.parametrize("on_crash", ["rerun", "drop"])
    async def test_killed_before_the_settle(self, workers: Callable[..., Workers], on_crash: str) -> None:
        """Killed when the function has returned, but nobody knows: run again, or failed where it must not be."""
        group = workers(f"""
            @job(on_crash={on_crash!r})
            async def work():
                with noted():
                    return os.getpid()

            if os.environ.get("DIES"):
                type(bgjob._store_of(URL)).settle = lambda *_: os.kill(os.getpid(), 9)
        """, lease="1s")  # fmt: skip
        (dying,) = group.start(DIES="1")
        async with client(group) as jobs:
            run = await jobs["work"].submit()
            await group.wait("end", 1)
            dying.wait(20)
            (second,) = group.start()
            if on_crash == "rerun":
                assert await run.result(60) == second.pid
            else:
                with pytest.raises(RunFailed, match="BgjobError: its process died"):
                    await run.result(60)
        group.kill(dying)
        group.stop()
        assert len(group.events("end")) == (2 if on_crash == "rerun" else 1)

    @in_a_loop
    async def test_retries_and_kills(self, workers: Callable[..., Workers]) -> None:
        """What its process takes along uses up no retry: with one retry a run may fail once, and be killed besides."""
        group = workers("""
            @job(retries=1, retry_delay=0)
            async def work():
                with noted():
                    if current_run().attempt == 2:
                        os.kill(os.getpid(), 9)
                    raise ValueError(current_run().attempt)
        """, lease="1s")  # fmt: skip
        (first,) = group.start()
        async with client(group) as jobs:
            run = await jobs["work"].submit()
            first.wait(20)
            group.start()
            with pytest.raises(RunFailed, match="ValueError: 3"):
                await run.result(60)
        group.kill(first)
        group.stop()
        assert [(event.what, event.attempt) for event in group.events()] == [
            ("start", 1), ("error", 1), ("start", 2), ("start", 3), ("error", 3),
        ]  # fmt: skip

    @in_a_loop
    async def test_cancels(self, workers: Callable[..., Workers]) -> None:
        """Nothing starts once a cancel has removed a run; where it has signalled one, what was claimed is the last."""
        group = workers("""
            @job(retries=9, retry_delay=0.02, parallelism=5)
            async def work(n):
                with noted():
                    await asyncio.sleep(0.005)
                    raise ValueError
        """)
        rng, removed, signalled = random.Random(2), {}, {}

        async def cancel_soon(run: Run) -> None:
            await asyncio.sleep(rng.random() * 0.2)
            if await run.cancel():
                answered = removed if run.state is State.CANCELLED else signalled
                answered[run.id] = time.time_ns()

        group.start(2)
        async with client(group) as jobs:
            await jobs["work"].submit(0)
            await group.wait("start", 1)
            for _ in range(10 if THOROUGH else 2):
                runs = [await jobs["work"].submit(n) for n in range(100)]
                await asyncio.gather(*map(cancel_soon, runs))
                ends = await asyncio.gather(*[run.result(60) for run in runs], return_exceptions=True)
                assert {type(end) for end in ends} <= {RunCancelled, RunFailed}
        group.stop()
        assert len(removed) + len(signalled) > 100
        for id, starts in group.starts().items():
            assert all(event.at < removed.get(id, 1 << 63) for event in starts), starts
            assert sum(event.at > signalled.get(id, 1 << 63) for event in starts) <= 1, starts

    @in_a_loop
    @pytest.mark.parametrize("then", ["await asyncio.sleep(0.5)", "pass"])
    async def test_blocked(self, workers: Callable[..., Workers], place: SQLitePlace, then: str) -> None:
        """A job that blocks its loop for longer than the lease isn't overtaken where a thread can beat. Elsewhere it is,
        once: its result is refused with a warning, also if it never waits again, and its process works on."""
        group = workers(f"""{self.JOBS}
        @job
        async def block():
            with noted():
                if current_run().attempt == 1:
                    time.sleep(3)
                    while "TAKEN" in os.environ and open(os.environ["LOG"]).read().count("start") < 2:
                        time.sleep(0.1)
                    {then}
            return os.getpid()
        """, lease="1s")  # fmt: skip
        beats = isinstance(place, SQLitePlace)
        (first,) = group.start(1, **({} if beats else {"TAKEN": "waits until it is overtaken"}))
        async with client(group) as jobs:
            run = await jobs["block"].submit()
            await group.wait("start", 1)
            (second,) = group.start()
            if beats:
                assert await run.result(60) == first.pid
                group.stop()
                assert [(event.what, event.token) for event in group.events()] == [("start", 1), ("end", 1)]
                return
            await group.wait("end" if then == "pass" else "cut", 2 if then == "pass" else 1)
            assert (await run.result(60), run.attempt) == (second.pid, 2)
            group.kill(second)
            assert await (await jobs["work"].submit(1)).result(60) == [1, first.pid]
        group.stop()
        assert [(event.pid, event.attempt) for event in group.starts()[run.id]] == [(first.pid, 1), (second.pid, 2)]
        assert group.said.count(f"{first.pid} block {run.id}: lease lost; its attempt 1 here does not count") == 1

    @in_a_loop
    async def test_submitter_exits(self, workers: Callable[..., Workers]) -> None:
        """Hundreds of delayed runs of a process that has gone: two others do each exactly once, a third reads them."""
        number = 2000 if THOROUGH else 500
        group = workers("""
            @job(parallelism=50)
            async def work(n):
                with noted():
                    return n * n
        """)
        async with client(group) as jobs:
            ids = [(await jobs["work"].after(n % 10 / 10).submit(n)).id for n in range(number)]
        group.start(2)
        await group.wait("end", number)
        group.stop()
        async with client(group) as jobs:
            found = [await jobs["work"]._registry.find(id) for id in ids]
            assert [await run.result(20) for run in found] == [n * n for n in range(number)]
        assert len(group.events("start")) == len(group.starts()) == number

    @in_a_loop
    async def test_parallelism(self, workers: Callable[..., Workers]) -> None:
        """Never more than three at once over four processes, whoever is killed; the slots of the dead come back."""
        group = workers("""
            @job(parallelism=3)
            async def work(n):
                with noted():
                    await asyncio.sleep(0.1)
        """, lease="1s")  # fmt: skip
        rng = random.Random(1)
        group.start(4)
        async with client(group) as jobs:
            runs = [await jobs["work"].submit(n) for n in range(300 if THOROUGH else 60)]
            for _ in range(12 if THOROUGH else 3):
                await group.wait("start", len(group.events("start")) + 5)
                group.kill(rng.choice(group.live))
                group.start()
            await asyncio.gather(*[run.result(90) for run in runs])
        group.stop()
        assert group.most() == 3
        assert {event.id for event in group.events("end")} == {run.id for run in runs}

    @in_a_loop
    async def test_rolling_stop(self, workers: Callable[..., Workers]) -> None:
        """Stopped under load one after another: nothing is lost or counted, and each leaves soon after its drain."""
        group = workers(self.JOBS)
        group.start(2, DRAIN="200ms")
        async with client(group) as jobs:
            runs = [await jobs["work"].submit(n, 0.3) for n in range(200 if THOROUGH else 60)]
            for _ in range(6 if THOROUGH else 3):
                await group.wait("start", len(group.events("start")) + 10)
                began = time.monotonic()
                group.live[0].terminate()
                group._reap(group.live[0])
                assert time.monotonic() - began < (1.2 if THOROUGH else 4)
                group.start(1, DRAIN="200ms")
            values = await asyncio.gather(*[run.result(60) for run in runs])
        group.stop()
        assert [n for n, _ in values] == [*range(len(runs))]
        assert len(group.events("end")) == len(runs)
        assert group.events("cut") != []
        assert {event.attempt for event in group.events()} == {1}
        assert all([e.token for e in starts] == [*range(1, len(starts) + 1)] for starts in group.starts().values())

    @in_a_loop
    @pytest.mark.parametrize("server", ["uvicorn --workers 4 --port 0", "gunicorn -w 4 -b 127.0.0.1:0 --preload -k"])
    async def test_web_workers(self, workers: Callable[..., Workers], server: str) -> None:
        """In an application of four web workers, forked before or after the import, each tick runs on one of them."""
        for module in ("fastapi", "uvicorn", server.split()[0]):
            pytest.importorskip(module)
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
        """)
        worker_class = ["uvicorn.workers.UvicornWorker"] if server.endswith("-k") else []
        group.command = ["-m", *server.split(), *worker_class, "worker:app"]
        group.start()
        await group.wait("start", 300 if THOROUGH else 20)
        await until(lambda: len({event.pid for event in group.events()}) > 1)
        group.stop()
        ticks = sorted(tick_of(event.id) for event in group.events())
        assert ticks == [*range(ticks[0], ticks[-1] + 100, 100)]


USER = '''
"""What a user writes, under strict checkers: each type that comes back is the one meant, each mistake is seen."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import assert_type

from bgjob import BgjobError, Depends, Job, Registry, Run, State, current_run, job, run, running, simulate


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
    assert_type(db, Database)
    assert_type(current_run(), Run)
    return len(await db.fetch(secret))


@job(cron="0 6 * * mon-fri", tz="Europe/Rome", args={"name": "daily"})
@job(every=3600, name="hourly", args={"name": "hourly"}, overlap="queue", jitter=0.5)
def report(name: str, path: str = Depends(folder), depth: int = Depends(limit, scope="app")) -> bytes:
    assert_type(path, str)
    assert_type(depth, int)
    return (name + path).encode()


@job
async def send_mail(to: str, *, copies: int = 1) -> str:
    return to * copies


async def main() -> None:
    async with running(drain=5, on_event=lambda run: print(run.state)) as registry:
        assert_type(registry, Registry)
        one = await send_mail.submit("a@b.c", copies=2)
        assert_type(one, Run[str])
        assert_type(await one.result(timeout="5s"), str)
        assert_type((one.state, one.tick, one.duration), tuple[State, datetime, float | None])
        later = await send_mail.after("5m", key="welcome").submit("a@b.c")
        assert_type(later, Run[str])
        assert_type(await (await send_mail.at(datetime.now(UTC)).submit("a@b.c")).result(), str)
        assert_type(await (await sync.submit()).result(), int)
        assert_type(await (await report.submit("x")).result(), bytes)
        assert_type(await send_mail("a@b.c"), str)
        assert_type(await asyncio.create_task(send_mail("a@b.c")), str)
        assert_type(report("x", path="y", depth=3), bytes)
        assert_type(send_mail.next_ticks(3), list[datetime])
        assert_type(await registry.find(one.id), Run | None)
        assert_type(await later.cancel(), bool)
        assert_type(await sync.cancel(), int)
        await send_mail.submit(5)  # type: ignore[arg-type]
        await send_mail.submit()  # type: ignore[call-arg]
        await send_mail.after("5m").submit("a", copy=2)  # type: ignore[call-arg]
        job(evry="5m")  # type: ignore[call-overload]


@asynccontextmanager
async def lifespan(_: object) -> AsyncGenerator[None, None]:
    async with running(jobs=["sync"]):
        yield


def test_simulated() -> None:
    registry = Registry()

    @registry.job(every="1h")
    async def hourly() -> None: ...

    registry.overrides[database] = Database
    assert_type(hourly, Job[[], Coroutine[object, object, None], None])
    assert_type(registry.simulate("2h", start=datetime(2026, 1, 1, tzinfo=UTC)), list[Run])
    assert_type(simulate("1d", main=main), list[Run])


if __name__ == "__main__":
    asyncio.run(run())
'''
INSTALLED = Path(bgjob.__file__).name == "__init__.py"


class TestTypes:
    def check(self, folder: Path, *command: str) -> None:
        """Run a checker beside the user's code: on the installed package, or on a copy of the file."""
        pytest.importorskip(command[0], reason=f"{command[0]} isn't installed: pip install {command[0]}")
        (folder / "user.py").write_text(USER)
        (folder / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
        if not INSTALLED:
            shutil.copy(bgjob.__file__, folder)
        path = os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"]))  # where pyright looks for Python
        done = subprocess.run([sys.executable, "-m", *command], cwd=folder, env={**os.environ, "PATH": path},
                              capture_output=True, text=True, check=False)  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    def test_mypy(self, tmp_path: Path) -> None:
        """mypy --strict understands a user's code, with the package installed and with the file copied."""
        self.check(tmp_path, "mypy", "--strict", "--cache-dir", os.devnull, ".")

    def test_pyright(self, tmp_path: Path) -> None:
        """pyright strict does too."""
        self.check(tmp_path, "pyright")

    @pytest.mark.skipif(not INSTALLED, reason="bgjob is not installed, but the file beside the tests")
    def test_completeness(self, tmp_path: Path) -> None:
        """Every public symbol of the installed package has a known type."""
        self.check(tmp_path, "pyright", "--verifytypes", "bgjob", "--ignoreexternal")

    @pytest.mark.skipif(not INSTALLED, reason="bgjob is not installed, but the file beside the tests")
    def test_wheel(self) -> None:
        """The wheel holds the one file, as a package with its marker that `python -m` runs, and needs croniter alone."""
        files = [str(file) for file in importlib.metadata.files("bgjob") or ()]
        assert sorted(file for file in files if not re.search(r"dist-info|__pycache__|^\.\.", file)) == [
            "bgjob/__init__.py",
            "bgjob/__main__.py",
            "bgjob/py.typed",
        ]
        needs = importlib.metadata.requires("bgjob") or []
        assert [re.split(r"\W", need)[0] for need in needs if "extra ==" not in need] == ["croniter"]


class TestUrls:
    @pytest.mark.parametrize(
        ("url", "shown"),
        [
            ("redis://:secret@h:6379/0", "redis://…@h:6379/0"),
            ("postgresql://u:se/cr@et@h/db", "postgresql://…@h/db"),
            ("postgres://h/db?user=u&password=secret&prefix=p", "postgres://h/db?user=u&password=…&prefix=p"),
            ("sqlite:////var/a@b.db", "sqlite:////var/a@b.db"),
            ("sqlite://u:secret@h/x", "sqlite://…@h/x"),
        ],
    )
    def test_no_password(self, url: str, shown: str) -> None:
        """No password of a URL is shown, whatever signs it contains."""
        assert _no_password(url) == shown

    def test_no_store(self) -> None:
        """What is neither a URL nor a store is refused with what to write; a path is neither."""
        for wrong in (Path("jobs.db"), 5):
            with pytest.raises(StoreError, match=r"store=.*: neither a URL nor a Store; write 'sqlite:///jobs.db'"):
                asyncio.run(Registry().run(store=wrong))


class TestHouse:
    def test_import(self) -> None:
        """Importing starts nothing, changes no handler, and loads neither croniter nor a store's driver nor slow modules."""
        code = (
            "import signal, sys, threading; before = [signal.getsignal(n) for n in (2, 15)]\n"
            "import bgjob; assert threading.active_count() == 1\n"
            "assert [signal.getsignal(n) for n in (2, 15)] == before\n"
            "late = 'croniter zoneinfo sqlite3 json uuid redis asyncpg argparse typing_extensions'.split()\n"
            "print([module for module in late if module in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=True)
        assert done.stdout == "[]\n"

    def test_map(self) -> None:
        """The map in the docstring names the rooms, in the order of their banners."""
        source = Path(bgjob.__file__).read_text()
        banners = re.findall(r"^# (\d+b? [\w ]+) -+$", source, flags=re.MULTILINE)
        assert banners == re.findall(r"^ +(\d+b? [A-Z]\w+(?: \w+)?)  ", bgjob.__doc__ or "", flags=re.MULTILINE)
        assert len(banners) == 14

    def test_budget(self) -> None:
        """A function has at most 40 lines, its docstring apart, and blocks at most three deep."""
        blocks = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.Try, ast.With, ast.AsyncWith, ast.Match)
        functions = (ast.FunctionDef, ast.AsyncFunctionDef)

        def depth(node: ast.AST, within: ast.AST) -> int:
            if node is not within and isinstance(node, (*functions, ast.ClassDef)):
                return 0
            orelse = getattr(node, "orelse", [])
            elif_ = (
                orelse[0] if isinstance(node, ast.If) and len(orelse) == 1 and isinstance(orelse[0], ast.If) else None
            )
            inner = [depth(child, within) - (child is elif_) for child in ast.iter_child_nodes(node)]
            return isinstance(node, blocks) + max(inner, default=0)

        tree = ast.parse(Path(bgjob.__file__).read_text())
        found = [node for node in ast.walk(tree) if isinstance(node, functions)]
        assert len(found) > 200
        for node in found:
            doc = node.body[0] if ast.get_docstring(node) else None
            lines = node.end_lineno - node.lineno + 1 - (doc.end_lineno - doc.lineno + 1 if doc else 0)
            assert lines <= 40, (node.name, lines)
            assert depth(node, node) <= 3, node.name

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
        """Every Python block of the README runs."""
        readme = Path("README.md")
        if not readme.exists():
            pytest.skip("no README beside the tests")
        blocks = re.findall(r"```python\n(.*?)```", readme.read_text(), flags=re.DOTALL)
        assert len(blocks) == 5
        environment = {**os.environ, "PYTHONPATH": os.path.dirname(bgjob.__file__)}
        for block in blocks:
            code = f"import bgjob\n{block}\nbgjob.simulate('1d') if bgjob.default.jobs else None\n"
            done = subprocess.run([sys.executable, "-c", code.replace("__main__", "__block__")], capture_output=True,
                                  text=True, timeout=60, check=False, cwd=tmp_path, env=environment)  # fmt: skip
            if "No module named 'fastapi'" not in done.stderr:
                assert done.returncode == 0, block + done.stderr


class PostgresServer:
    """A server of the tests' own, which they may kill. Its superuser has a password."""

    PASSWORD = "s3cret/w@rd"
    # The answer to what is committed: the statement's tag, then "ready" and in no transaction.
    COMMITTED = re.compile(rb"C\0\0\0.(COMMIT|SELECT|INSERT|UPDATE|DELETE)[ \d]*\0Z\0\0\0\x05I\Z", re.DOTALL)
    HINT = re.compile(rb"\AA\0\0\0")
    UNREADY = "the database system is"  # starting up, or not yet accepting connections

    def __init__(self) -> None:
        folders = [*map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), os.environ["PATH"]]
        path = os.pathsep.join(folders)
        self.postgres, initdb = (shutil.which(name, path=path) for name in ("postgres", "initdb"))
        if self.postgres is None or initdb is None:
            refuse_server("no PostgreSQL server is installed that tests could kill")
        self.folder = Path(tempfile.mkdtemp(prefix="bgjob-postgres-"))
        self.port, self.user = free_port(), {}
        if os.geteuid() == 0:  # the server refuses to run as root
            self.user = {"user": "postgres", "group": "postgres", "extra_groups": []}
            shutil.chown(self.folder, "postgres", "postgres")
        (self.folder / "password").write_text(self.PASSWORD)
        options = [
            "--auth-local=trust",
            "--auth-host=scram-sha-256",
            "--pwfile",
            self.folder / "password",
            "-U",
            "postgres",
            "--no-sync",
        ]
        subprocess.run([initdb, "-D", self.folder / "data", *options], check=True, capture_output=True, cwd="/",
                       timeout=60, **self.user)  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = ["-h", "127.0.0.1", "-p", str(self.port), "-k", self.folder, "-c", "fsync=off"]
        self.process = subprocess.Popen([self.postgres, "-D", self.folder / "data", *options], cwd="/",
                                        stderr=subprocess.DEVNULL, **self.user)  # fmt: skip

    def kill(self) -> None:
        """At once: what wasn't committed is gone."""
        if self.process is not None:
            self.process.send_signal(signal.SIGQUIT)
            self.process.wait(30)
            self.process = None

    def remove(self) -> None:
        self.kill()
        shutil.rmtree(self.folder)

    def url(self, port: int | None = None, user: str = "postgres", base: str = "postgres", **options: str) -> str:
        login = f"{user}:{quote(self.PASSWORD, safe='')}"
        return f"postgresql://{login}@127.0.0.1:{port or self.port}/{base}?{urlencode(options)}"

    async def fill(self) -> None:
        """Have it need a second to start again, in which it says so."""
        await self.execute("CREATE TABLE filler AS SELECT n, repeat('x', 100) FROM generate_series(1, 500000) AS n")
        await self.execute("DROP TABLE filler")

    async def execute(self, sql: str) -> list[Any]:
        async with asyncio.timeout(30):
            while True:
                with contextlib.suppress(OSError, asyncpg_error()):  # it is starting
                    db = await importlib.import_module("asyncpg").connect(self.url(), timeout=5)
                    break
                await asyncio.sleep(0.05)
        try:
            return await db.fetch(sql)
        finally:
            await db.close()


def asyncpg_error() -> type[Exception]:
    return importlib.import_module("asyncpg").CannotConnectNowError


def free_port() -> int:
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def make_certificate(path: Path) -> Path:
    """One that signs itself, and its key, in one file."""
    if shutil.which("openssl") is None:
        refuse_server("no openssl, which makes certificates")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=localhost"
    key = path.with_suffix(".key")
    subprocess.run([*command.split(), "-keyout", key, "-out", path], check=True, capture_output=True)
    path.write_text(path.read_text() + key.read_text())
    return path


class Wire:
    """A TCP proxy. It can fall silent, cut what is connected, keep hints back, and lose answers: the server has done
    what was asked, and the connection is cut, or every tenth time stays open and silent."""

    def __init__(self, port: int) -> None:
        self.target, self.silent = port, False
        self.chance, self.loss, self.lost = random.Random(7), 0.0, 0
        self.losable: re.Pattern[bytes] = re.compile(b"")
        self.kept_back: re.Pattern[bytes] | None = None
        self.kept = 0
        self.writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> "Wire":
        self.server = await asyncio.start_server(self.connected, "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.server.close()
        self.cut()
        while len(asyncio.all_tasks()) > 1 and self.writers:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    def cut(self) -> None:
        for writer in self.writers:
            writer.transport.abort()

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.add(writer)
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            self.writers.discard(writer)
            return
        self.writers.add(back)
        try:
            await asyncio.gather(self.carry(reader, back, False), self.carry(there, writer, True))
        finally:
            for one in (writer, back):
                one.transport.abort()
                self.writers.discard(one)

    async def carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, answers: bool) -> None:
        with contextlib.suppress(OSError):
            while chunk := await source.read(1 << 16):
                if answers and self.kept_back is not None and self.kept_back.search(chunk):
                    self.kept += 1
                    continue
                if answers and self.losable.search(chunk) and self.chance.random() < self.loss:
                    self.lost += 1
                    while self.lost % 10 == 0 and await source.read(1 << 16):
                        pass
                    break
                if not self.silent:
                    sink.write(chunk)
        self.shut(sink)

    def shut(self, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, RuntimeError):
            sink.write_eof()
        sink.transport.abort()


class Pooler:
    """What PgBouncer does in transaction mode, at its worst: every transaction of a client meets another server."""

    def __init__(self, server: PostgresServer) -> None:
        self.path = server.folder / f".s.PGSQL.{server.port}"
        self.free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self.clients: list[asyncio.StreamWriter] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.greeting = b""

    async def __aenter__(self) -> "Pooler":
        for _ in range(12):
            reader, writer = await asyncio.open_unix_connection(self.path)
            body = struct.pack("!i", 196608) + b"user\0postgres\0database\0postgres\0\0"
            writer.write(struct.pack("!i", len(body) + 4) + body)
            said = [await self.message(reader)]
            while said[-1][:1] != b"Z":
                said.append(await self.message(reader))
            self.greeting = b"".join(one for one in said if one[:1] != b"K")
            self.free.append((reader, writer))
        self.listener = await asyncio.start_server(self.connected, "127.0.0.1", 0)
        self.port = self.listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.listener.close()
        for writer in (*self.clients, *(writer for _, writer in self.free)):
            writer.transport.abort()
        await asyncio.wait(self.tasks)

    async def message(self, reader: asyncio.StreamReader) -> bytes:
        head = await reader.readexactly(5)
        return head + await reader.readexactly(struct.unpack("!i", head[1:])[0] - 4)

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.clients.append(writer)
        self.tasks.append(asyncio.current_task())
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            size, code = struct.unpack("!ii", await reader.readexactly(8))
            if code == 80877103:  # "is there TLS?"
                writer.write(b"N")
                size, code = struct.unpack("!ii", await reader.readexactly(8))
            await reader.readexactly(size - 8)
            key = b"K" + struct.pack("!iii", 12, 1, 1)  # no process that exists
            writer.write(self.greeting[:-6] + key + self.greeting[-6:])
            await self.carry(reader, writer)
        writer.transport.abort()

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """What the client says goes to one server, until that is idle again."""
        answers: asyncio.Task[None] | None = None
        while (chunk := await reader.read(1 << 20)) and chunk[:1] != b"X":
            if answers is None or answers.done():
                there, back = self.free.pop(0)
                answers = asyncio.create_task(self.answers(there, back, writer))
            back.write(chunk)
        if answers is not None and not answers.done():
            answers.cancel()
            back.transport.abort()

    async def answers(self, there: asyncio.StreamReader, back: asyncio.StreamWriter, to: asyncio.StreamWriter) -> None:
        said = b""
        while said[:1] + said[5:] != b"ZI":
            said = await self.message(there)
            to.write(said)
        self.free.append((there, back))


@pytest.fixture(scope="class")
def killable() -> Iterator[PostgresServer]:
    pytest.importorskip("asyncpg")
    server = PostgresServer()
    yield server
    server.remove()


@pytest.fixture
def server(killable: PostgresServer) -> PostgresServer:
    if killable.process is None:
        killable.start()
    asyncio.run(killable.execute("SELECT 1"))
    return killable


class Wiretap:
    """Counts what is asked of the server over a connection."""

    def __init__(self, db: Any) -> None:
        self.db, self.asked = db, 0

    def __getattr__(self, name: str) -> Any:
        self.asked += name in ("execute", "fetch")
        return getattr(self.db, name)


def name_prefix() -> str:
    return f"t{os.urandom(5).hex()}"


class TestPostgres:
    """What only a server, and the way to it, can do to its users."""

    @in_a_loop
    async def test_errors(self, server: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What doesn't pass by itself is one clear line at once, without a password."""
        monkeypatch.setenv("HOME", str(tmp_path))
        secret = quote(server.PASSWORD, safe="")
        there = f"127.0.0.1:{server.port}/postgres"
        good = server.url()
        await server.execute(f"CREATE ROLE guest LOGIN PASSWORD '{server.PASSWORD}'")
        cases = {
            good.replace(secret, "wr0ng"): f'//…@{there}\'): password authentication failed for user "postgres"',
            good.replace("/postgres?", "/nope?"): 'database "nope" does not exist',
            server.url(user="guest", prefix="guest"): "permission denied for schema public",
            good.replace("?", "?sslmode=s3cret&"): "`sslmode` parameter must be one of: disable, allow",
            good.replace("?", "?sslmode=verify-full&"): "root.crt",
            f"{good}sslrootcert=/no%2Fwhere": "sslrootcert: [Errno 2] No such file or directory: '/no/where'",
            f"{good}sslmode=verify-ca&sslrootcert={__file__}": "[X509: NO_CERTIFICATE_OR_CRL_FOUND]",
            f"postgresql://postgres:{server.PASSWORD}@{there}": "the URL can't be read; write postgresql://user:pass",
            f"{good}nonsense=1": 'unrecognized configuration parameter "nonsense"',
            f"{good}keep=0s": "keep=",
            f"{good}prefix=A": "prefix='A'",
        }
        for url, text in cases.items():
            with pytest.raises(BgjobError, match=re.escape(text)) as caught:
                async with Registry().running(store=url, jobs=[]):
                    pass
            shown = "".join(traceback.format_exception(caught.value))
            assert "\n" not in str(caught.value)
            assert not re.search("s3cret/w|w@rd|s3cret%2F|wr0ng", shown), shown

    @in_a_loop
    async def test_missing_rights(self, server: PostgresServer) -> None:
        """A right on a table that is missing is told at the start, not when it is first used."""
        prefix = name_prefix()
        async with Registry().running(store=server.url(prefix=prefix), jobs=[]):
            pass
        await server.execute(f"CREATE ROLE {prefix} LOGIN PASSWORD '{server.PASSWORD}'")
        await server.execute(f"GRANT SELECT ON {prefix}_tick, {prefix}_run, {prefix}_past TO {prefix}")
        with pytest.raises(StoreError, match=f"permission denied: no INSERT on table {prefix}_"):
            async with Registry().running(store=server.url(user=prefix, prefix=prefix), jobs=[]):
                pass
        await server.execute(f"GRANT INSERT, UPDATE, DELETE ON {prefix}_tick, {prefix}_run, {prefix}_past TO {prefix}")
        async with Registry().running(store=server.url(user=prefix, prefix=prefix), jobs=[]):
            pass

    @in_a_loop
    async def test_passing(self, server: PostgresServer, caplog: pytest.LogCaptureFixture) -> None:
        """Too many connections and a server that only reads are outages."""
        await server.execute(f"CREATE ROLE crowd LOGIN CONNECTION LIMIT 0 PASSWORD '{server.PASSWORD}'")
        prefix = name_prefix()
        for url in (
            server.url(user="crowd"),
            server.url(prefix=prefix, default_transaction_read_only="on"),
        ):
            caplog.clear()
            async with Registry().running(store=url, jobs=[]):
                pass
            assert "store unreachable" in caplog.text
            assert "s3cret" not in caplog.text

    def test_missing_driver(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without asyncpg the error says what to install."""
        monkeypatch.setitem(sys.modules, "asyncpg", None)

        async def main() -> None:
            with pytest.raises(StoreError, match=re.escape("needs asyncpg: pip install 'bgjob[postgres]'")):
                async with Registry().running(store="postgresql://127.0.0.1", jobs=[]):
                    pass

        asyncio.run(main())

    def test_shown(self) -> None:
        """No repr shows a password, however it was written; options of bgjob don't reach asyncpg."""
        for url in ("postgresql://a:pw@h/db", "postgres://a:p@w/pw@h/db?password=pw", "postgres://h/db?password=pw"):
            store = bgjob._store_of(f"{url}{'&' if '?' in url else '?'}prefix=p&lease=12s&sslmode=require&keep=2s")
            assert "pw" not in repr(store)
            assert (store._prefix, store.lease, store.keep) == ("p", 12000, 2000)
            assert store._url == f"{url}{'&' if '?' in url else '?'}sslmode=require"
        with pytest.raises(StoreError, match="write postgresql://"):
            bgjob.PostgresStore("mysql://h")

    @in_a_loop
    async def test_ready_pool(self, server: PostgresServer) -> None:
        """A ready pool is used, also by hints, and left open and whole."""
        asyncpg = importlib.import_module("asyncpg")
        async with asyncpg.create_pool(server.url(), min_size=1, max_size=6) as pool:
            stores = [bgjob.PostgresStore(pool, prefix=name_prefix()) for _ in range(2)]
            stores[1]._sql, stores[1]._prefix = stores[0]._sql, stores[0]._prefix
            assert repr(stores[0]) == "PostgresStore(pool)"
            (client, worker), (job, _) = instances(2, Work())
            async with client.running(store=stores[0], jobs=[]), worker.running(store=stores[1]):
                await until(lambda: {store.poll for store in stores} == {5000})
                began = time.monotonic()
                assert await (await job.submit(1)).result(20) == 1
                assert time.monotonic() - began < 1
            assert await pool.fetchval("SELECT 1") == 1
            assert pool.get_size() == pool.get_idle_size()

    @in_a_loop
    async def test_small_pool(self, server: PostgresServer) -> None:
        """A pool of one connection is none for hints."""
        asyncpg = importlib.import_module("asyncpg")
        async with asyncpg.create_pool(server.url(), min_size=1, max_size=1) as pool:
            (registry,), (job,) = instances(1, Work())
            async with registry.running(store=bgjob.PostgresStore(pool, prefix=name_prefix())):
                assert await (await job.submit(1)).result(20) == 1

    @in_a_loop
    async def test_tables_at_once(self, server: PostgresServer) -> None:
        """Instances that start at once make the tables once; an immediate job runs once."""
        stores = [bgjob.PostgresStore(server.url(), prefix="atonce") for _ in range(8)]
        await asyncio.gather(*(store.open(str(n), lambda: None) for n, store in enumerate(stores)))
        listing = {"work": bgjob.Listing("", True, None)}
        await asyncio.gather(*(store.enlist(listing) for store in stores))
        assert len((await stores[0].overview(9)).due) == 1
        await asyncio.gather(*(store.close() for store in stores))
        # A connection that was closed is gone a moment later.
        left = "SELECT 1 FROM pg_stat_activity WHERE query LIKE '%atonce%' AND pid <> pg_backend_pid()"
        async with asyncio.timeout(10):
            while await server.execute(left):  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    @in_a_loop
    async def test_tables_dropped(self, server: PostgresServer) -> None:
        """Tables that are dropped are made again, and the jobs listed anew."""
        prefix = name_prefix()
        (registry,), (job,) = instances(1, Work())
        async with registry.running(store=server.url(prefix=prefix)):
            assert await (await job.submit(1)).result(20) == 1
            await server.execute(f"DROP TABLE {prefix}_run, {prefix}_tick, {prefix}_past")
            assert await (await job.submit(2)).result(20) == 2

    @in_a_loop
    async def test_round_trips(self, server: PostgresServer) -> None:
        """A thousand jobs due at one instant cost a few round trips; whoever is late asks once."""
        stores = [bgjob.PostgresStore(server.url(), prefix=name_prefix())] * 2
        stores[1] = bgjob.PostgresStore(server.url(), prefix=stores[0]._prefix)
        listing = {f"j{n}": bgjob.Listing("x", False, None) for n in range(1000)}
        answers: list[set[str]] = []
        taps: list[Wiretap] = []
        for number, store in enumerate(stores):
            await store.open(str(number), lambda: None)
            now, _ = await store.enlist(listing)
            store._idle[:] = [Wiretap(db) for db in store._idle]
            taps.append(store._idle[-1])
        await asyncio.sleep(0.01)
        for store in stores:
            _, found = await store.tick([bgjob.Tick(job, now + 1, 0, 1, False, 1, 1) for job in listing])
            answers.append({answer.word for answer in found})
        assert answers == [{"won"}, {"lost"}]
        assert [tap.asked for tap in taps] == [6, 1]
        for store in stores:
            await store.close()

    @in_a_loop
    async def test_many_submits(self, server: PostgresServer) -> None:
        """Submits that come together share their commits; of equal keys the first one wins."""
        (registry,), (job,) = instances(1, Work(parallelism=100))
        store = bgjob.PostgresStore(server.url(), prefix=name_prefix())
        async with registry.running(store=store, jobs=[]):
            store._idle[:] = taps = [Wiretap(db) for db in store._idle]
            runs = await asyncio.gather(*(job.after("1h").submit(n) for n in range(300)))
            assert len({run.id for run in runs}) == 300
            assert sum(tap.asked for tap in taps) < 20
            other = job.after("1h").submit(-1)
            _, *same = await asyncio.gather(other, *(job.after("1h", key="k").submit(n) for n in range(50)))
            assert {(run.id, run.args) for run in same} == {("work#k", (0,))}
            assert await job.cancel() == 302

    @in_a_loop
    async def test_killed_and_restarted(self, server: PostgresServer, caplog: pytest.LogCaptureFixture) -> None:
        """A server that is killed and comes back during runs: two lines, nothing lost, nothing twice."""
        work = Work(held=True, parallelism=3)
        (registry,), (job,) = instances(1, work)
        async with registry.running(store=server.url(prefix=name_prefix())):
            runs = [await job.submit(n) for n in range(5)]
            await until(lambda: len(work.begun) == 3)
            server.kill()
            work.release.set()
            await until(lambda: "store unreachable" in caplog.text)
            with pytest.raises(StoreError, match="unreachable for 5 s"):
                await job.submit(5)
            server.start()
            assert [await run.result(30) for run in runs] == [*range(5)]
        assert len(work.begun) == 5
        assert [caplog.text.count(text) for text in ("store unreachable", "store back")] == [1, 1]

    @in_a_loop
    async def test_not_there_at_the_start(self, server: PostgresServer, caplog: pytest.LogCaptureFixture) -> None:
        """A server that isn't there at the start is an outage like any other."""
        server.kill()
        (registry,), (job,) = instances(1, Work())
        async with registry.running(store=server.url(prefix=name_prefix())):
            assert "store unreachable" in caplog.text
            server.start()
            await until(lambda: "store back" in caplog.text)
            assert await (await job.submit(1)).result(20) == 1

    @in_a_loop
    async def test_black_hole(self, server: PostgresServer) -> None:
        """A verb gives up within its limit where nothing answers, and the next one doesn't meet the same connection."""
        async with Wire(server.port) as wire:
            url = server.url(port=wire.port)
            store = bgjob.PostgresStore(url, prefix=name_prefix(), lease="2s")
            await store.open("me", lambda: None)
            wire.silent = True
            for verb in (lambda: store.find("x"), lambda: store.beat({}), lambda: store.cancel("x")):
                began = time.monotonic()
                with pytest.raises(bgjob.Unreachable, match="no answer within 0.5 s"):
                    await verb()
                assert 0.4 < time.monotonic() - began < 1
            wire.silent = False
            wire.cut()
            assert await store.find("x") is None
            await store.close()

    @in_a_loop
    async def test_held_lock(self, server: PostgresServer) -> None:
        """A client that stops in the middle of a transaction holds others up for a second at most."""
        stores = [bgjob.PostgresStore(server.url(), prefix="held") for _ in range(2)]
        for number, store in enumerate(stores):
            await store.open(str(number), lambda: None)
            now, _ = await store.enlist({"work": bgjob.Listing("x", False, None)})
        stopped = await stores[0]._new_one(time.monotonic() + 4)
        await stopped.execute(stores[0]._sql.begin)
        await stopped.fetch(stores[0]._sql.lock_jobs, ["work"])
        _, (answer,) = await stores[1].tick([bgjob.Tick("work", now, 0, 1, False, 1, 1)._replace(at=now + 1)])
        assert answer.word == "won"
        stopped.terminate()
        for store in stores:
            await store.close()

    @in_a_loop
    async def test_limit(self, server: PostgresServer) -> None:
        """Whoever claims waits for those who claim runs of the same job, so that together they keep to parallelism."""
        stores = [bgjob.PostgresStore(server.url(), prefix="limit") for _ in range(2)]
        for number, store in enumerate(stores):
            await store.open(str(number), lambda: None)
            now, _ = await store.enlist({"work": bgjob.Listing("", False, None)})
        await stores[0].push([bgjob.Call(str(n), "work", now - n, 0, "") for n in range(3)], False)
        other = await stores[0]._new_one(time.monotonic() + 4)
        await other.execute(stores[0]._sql.begin)
        await other.fetch(stores[0]._sql.lock_jobs, ["work"])
        rows = await other.fetch(stores[0]._sql.claim, ["work"], [3], [3], "0", 30_000)
        await stores[0].push([bgjob.Call("older", "work", now - 99, 0, "")], False)
        claiming = asyncio.create_task(stores[1].claim({"work": (3, 3)}))
        await asyncio.sleep(0.3)
        assert not claiming.done()
        await other.execute("COMMIT")
        assert (len(rows), (await claiming).runs) == (3, [])
        other.terminate()
        for store in stores:
            await store.close()

    @in_a_loop
    async def test_fence(self, server: PostgresServer) -> None:
        """What was claimed by another meanwhile is neither extended nor settled; a key is free after `keep`."""
        store = bgjob.PostgresStore(server.url(), prefix="fence", lease="2s", keep="1s")
        await store.open("me", lambda: None)
        await store.enlist({"work": bgjob.Listing("", False, None)})
        call = bgjob.Call("work#k", "work", None, 0, "")
        assert await store.push([call], False) != [None]
        (old,) = (await store.claim({"work": (1, 1)})).runs
        await asyncio.sleep(2.05)
        (new,) = (await store.claim({"work": (1, 1)})).runs
        assert (new.tries, new.lost, new.token) == (2, 1, 2)
        done = bgjob.Settlement("work#k", 1, "work", old.at, True, State.SUCCEEDED, 0, False, 1, None, None, "1")
        assert await store.beat({"work#k": old.token}) == {}
        assert await store.settle([done, done._replace(state=State.SCHEDULED)]) == ["refused", "refused"]
        assert await store.beat({"work#k": new.token}) == {"work#k": False}
        assert await store.settle([done._replace(token=2), done._replace(id="other")]) == ["done", "refused"]
        again = done._replace(token=2)
        assert await store.settle([again, again._replace(state=State.FAILED), done]) == ["done", "refused", "refused"]
        assert await store.push([call], False) == [None]
        await asyncio.sleep(1.05)
        assert await store.push([call], False) != [None]
        await store.close()

    @in_a_loop
    async def test_lost_claims(self, server: PostgresServer) -> None:
        """Runs that were claimed by a call whose answer was lost come with the next claim, as if that were the first."""
        async with Wire(server.port) as wire:
            store = bgjob.PostgresStore(server.url(port=wire.port), prefix=name_prefix())
            await store.open("me", lambda: None)
            wire.losable = re.compile(rb"COMMIT\0")
            now, _ = await store.enlist(
                {"work": bgjob.Listing("", False, None), "tick": bgjob.Listing("x", False, None)}
            )
            await store.push([bgjob.Call(id, "work", None, 0, "") for id in ("one", "two")], False)
            (known,) = (await store.claim({"work": (1, 9)})).runs
            ticks = [bgjob.Tick("tick", now + 1, 0, 1, False, 1, 1)]
            for verb in (lambda: store.claim({"work": (5, 9)}), lambda: store.tick(ticks)):
                wire.loss = 1.0
                with pytest.raises(bgjob.Unreachable):
                    await verb()
                wire.loss = 0.0
            _, (answer,) = await store.tick(ticks)
            assert (answer.word, answer.run) == ("lost", None)
            found = (await store.claim({"work": (5, 9), "tick": (1, 1)})).runs
            assert {(run.id, run.tries, run.lost, run.token) for run in found} == {
                ("two", 1, 0, 1),
                (ticks[0].id, 1, 0, 1),
            }
            assert not (await store.claim({"work": (5, 9), "tick": (1, 1)})).runs
            assert len(await store.beat({known.id: 1, "two": 1, ticks[0].id: 1, "x": 1})) == 3
            await store.close()

    @in_a_loop
    async def test_hints_cut(self, server: PostgresServer) -> None:
        """Where hints break off, runs are found by looking, and another connection for hints is made."""
        prefix = name_prefix()
        stores = [bgjob.PostgresStore(server.url(prefix=prefix).partition("?")[0], prefix=prefix) for _ in range(2)]
        (client, worker), (job, _) = instances(2, Work())
        async with client.running(store=stores[0], jobs=[]), worker.running(store=stores[1]):
            await until(lambda: {store.poll for store in stores} == {5000})
            listening = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'"
            assert len(await server.execute(listening)) == 2
            await until(lambda: stores[1].poll == 1000)
            assert await (await job.submit(1)).result(20) == 1
            await until(lambda: {store.poll for store in stores} == {5000})
            began = time.monotonic()
            assert await (await job.submit(2)).result(20) == 2
            assert time.monotonic() - began < 1

    @in_a_loop
    async def test_pooler(self, server: PostgresServer) -> None:
        """Behind a pooler in transaction mode all verbs work; what others submit is seen within a second."""
        prefix = name_prefix()
        async with Pooler(server) as pooler:
            url = server.url(port=pooler.port, prefix=prefix)
            (client, worker), (job, _) = instances(2, Work(parallelism=5))
            async with client.running(store=url, jobs=[]), worker.running(store=url):
                runs = [await job.submit(n) for n in range(20)]
                assert [await run.result(20) for run in runs] == [*range(20)]
                assert (await job.after("1h", key="k").submit(1)).id == (await job.after("1h", key="k").submit(2)).id
                assert await job.cancel() == 1

    @in_a_loop
    async def test_prefixes(self, server: PostgresServer) -> None:
        """Two applications in one database don't see each other's runs, keys and hints."""
        works = [Work(), Work()]
        registries = [Registry(), Registry()]
        jobs = [work(registry) for work, registry in zip(works, registries, strict=True)]
        one, two = (server.url(prefix=name_prefix()) for _ in works)
        async with registries[0].running(store=one), registries[1].running(store=two):
            for number, job in enumerate(jobs):
                run = await job.after("1ms", key="same").submit(number)
                assert await run.result(20) == number
        assert [work.args for work in works] == [[0], [1]]


class RedisServer:
    """A Redis of the test's own, which it can kill; what it stored survives."""

    COMMITTED = re.compile(rb"\A\$\d+\r\n[^#]")  # what a script answers; INFO's answer begins with a #
    HINT = re.compile(rb"\A\*3\r\n\$7\r\nmessage")
    UNREADY = "Redis is loading the dataset in memory"

    def __init__(self, folder: Path, *options: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.options = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "",
                        "--appendonly", "yes", "--appendfsync", "always", *options]  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None

    def url(self, port: int | None = None, **options: object) -> str:
        return f"redis://127.0.0.1:{port or self.port}/?{urlencode(options)}"

    def start(self) -> None:
        self.process = subprocess.Popen(["redis-server", *self.options], stdout=subprocess.DEVNULL)
        for _ in range(500):
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as client:
                client.sendall(b"PING\r\n")
                if b"LOADING" not in client.recv(100):
                    return
            time.sleep(0.02)
        pytest.fail("redis-server doesn't start")

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    async def fill(self) -> None:
        """Have it need two seconds to start again, in which it says so."""
        await self.ask("EVAL", "for n = 1, 3000 do redis.call('SET', 'filler' .. n, '') end", 0)
        self.options += ["--key-load-delay", "600"]

    async def ask(self, *words: object) -> Any:
        async with redis_client(f"redis://127.0.0.1:{self.port}") as client:
            return await client.execute_command(*words)


def redis_client(url: str, **options: object) -> Any:
    return importlib.import_module("redis.asyncio").from_url(url, **options)


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    if shutil.which("redis-server") is None or importlib.util.find_spec("redis") is None:
        refuse_server("no redis-server, or no redis-py, in the path")
    server = RedisServer(tmp_path)
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def shared_redis(tmp_path: Path) -> Iterator[RedisPlace]:
    found = found_place("redis", tmp_path)
    yield found
    asyncio.run(found.drop())


class Proxy:
    """Between a client and its server: it can lose answers of what was done, forward nothing, and refuse."""

    def __init__(self, server: RedisServer) -> None:
        self.server = server
        self.lose: Callable[[bytes], bool] = lambda asked: False
        self.silent = self.closed = False
        self.lost = 0
        self.writers: set[asyncio.StreamWriter] = set()
        self.tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "Proxy":
        self.listener = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.port = self.listener.sockets[0].getsockname()[1]
        return self

    def url(self, **options: object) -> str:
        return f"redis://127.0.0.1:{self.port}/?{urlencode(options)}"

    async def __aexit__(self, *_: object) -> None:
        self.listener.close()
        self.cut()
        while self.tasks:
            await asyncio.wait(self.tasks.copy())

    def cut(self) -> None:
        for writer in self.writers:
            writer.close()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        self.writers.add(writer)
        with suppress(OSError):
            if not self.closed:
                there = await asyncio.open_connection("127.0.0.1", self.server.port)
                self.writers.add(there[1])
                asked = [b""]
                async with asyncio.TaskGroup() as both:
                    both.create_task(self.forward(reader, there[1], asked))
                    both.create_task(self.answer(there[0], writer, asked, there[1]))
        writer.close()

    async def forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: list[bytes]) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                asked[0] = data
                if not self.silent:
                    writer.write(data)
        writer.close()

    async def answer(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        asked: list[bytes],
        there: asyncio.StreamWriter,
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                if self.lose(asked[0]):
                    self.lost += 1
                    there.close()
                    break
                if not self.silent:
                    writer.write(data)
        writer.close()


def script_of(verb: str) -> bytes:
    """How a call of a verb's script begins, the first apart, which brings its text."""
    text = bgjob._REDIS_PRELUDE + getattr(bgjob._Redis, verb)
    return hashlib.sha1(text.encode()).hexdigest().encode()


async def claimed(store: bgjob.RedisStore) -> list[bgjob.Claimed]:
    """What the store believes to have claimed, for who hasn't kept it."""
    rows = (await store.overview(99)).running
    return [bgjob.Claimed(r.id, r.job, r.at, True, r.args, r.attempt, 0, r.token, False) for r in rows]


class TestRedis:
    """What only a Redis server can do to its users."""

    @pytest.mark.parametrize(
        ("url", "message"),
        [
            ("redis://:s3cret@h/x", "'redis://…@h/x': after the host comes the number of a database, as in redis://host:6379/0"),
            ("redis://:s3:cret#@h?bogus=1&password=s3cret", r"RedisStore\('redis://…@h\?bogus=1&password=…'\): not a URL that redis-py can read; is the password percent-encoded\?"),
            ("redis://u:s3cret@h?bogus=1", r"RedisStore\('redis://…@h\?bogus=1'\): .*unexpected keyword argument 'bogus'"),
            ("rediss://u:s3cret@h?ssl_cert_reqs=x", r"RedisStore\('rediss://…@h\?ssl_cert_reqs=x'\): .*Requirements Flag: x"),
            ("rediss://u:s3cret@h?ssl_ca_certs=/x", r"RedisStore\('rediss://…@h\?ssl_ca_certs=/x'\): .*No such file or directory"),
            ("redis://u:s3cret@h?prefix=A", "prefix='A': write up to 30 of a-z, 0-9 and _, a letter first"),
        ],
    )  # fmt: skip
    def test_wrong_urls(self, url: str, message: str) -> None:
        """A wrong URL is one clear line without the password."""
        if "bogus" in url or "ssl" in url:
            need_driver("redis")
        with pytest.raises(StoreError, match=f"^{message}$") as caught:
            asyncio.run(asyncio.wait_for(Registry().run(store=url), 20))
        assert "s3" not in str(caught.value)

    @in_a_loop
    async def test_refusals(self, redis_server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
        """A wrong password, database or right is one clear line at once, without the password; it is no outage."""
        await redis_server.ask("ACL", "SETUSER", "weak", "on", ">s3cret", "~*", "+info", "&*")
        await redis_server.ask("ACL", "SETUSER", "deaf", "on", ">s3cret", "~*", "+@all", "resetchannels")
        await redis_server.ask("CONFIG", "SET", "requirepass", "s3cret")
        place = f"127.0.0.1:{redis_server.port}"
        for url, message in [
            (f"redis://:s3cret2@{place}", "invalid username-password pair or user is disabled."),
            (f"redis://{place}", "Authentication required."),
            (f"redis://:s3cret@{place}/99", "DB index is out of range"),
            (f"redis://weak:s3cret@{place}", "this user has no permissions to run the 'evalsha' command"),
            (f"redis://deaf:s3cret@{place}", "this user has no permissions to access one of the channels"),
        ]:
            with pytest.raises(StoreError) as caught:
                await Registry().run(store=url)
            assert not isinstance(caught.value, bgjob.Unreachable)
            shown = url.replace("weak:", ":").replace("deaf:", ":").replace(":s3cret2@", "…@").replace(":s3cret@", "…@")
            assert str(caught.value).startswith(f"RedisStore({shown!r}): {message}")
        assert "s3cret" not in caplog.text

    def test_driver_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without redis-py the error says what to install."""
        monkeypatch.setitem(sys.modules, "redis.asyncio", None)
        with pytest.raises(StoreError, match=r"^this store needs redis.asyncio: pip install 'bgjob\[redis\]'$"):
            asyncio.run(Registry().run(store="redis://127.0.0.1"))

    @in_a_loop
    async def test_eviction_is_refused(self, redis_server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
        """A server that would delete runs to free memory is refused; one that never frees any, or has no limit, isn't."""
        for policy, limit, refused in (
            ("allkeys-lru", "1gb", True),
            ("allkeys-lru", "0", False),
            ("noeviction", "1gb", False),
        ):
            await redis_server.ask("CONFIG", "SET", "maxmemory-policy", policy)
            await redis_server.ask("CONFIG", "SET", "maxmemory", limit)
            store = bgjob.RedisStore(redis_server.url())
            if not refused:
                async with opened(store):
                    continue
            with pytest.raises(
                StoreError,
                match="with maxmemory-policy allkeys-lru it would delete runs to free memory; set maxmemory-policy noeviction$",
            ):
                await store.open("me", lambda: None)
        assert "appendonly" not in caplog.text
        await redis_server.ask("CONFIG", "SET", "appendonly", "no")
        async with opened(bgjob.RedisStore(redis_server.url())) as store:
            await asyncio.gather(*(store.find("x") for _ in range(20)))
        assert caplog.text.count("a restart of Redis forgets runs; set appendonly yes") == 1

    @pytest.mark.parametrize("options", [{}, {"decode_responses": True}, {"protocol": 3}, {"max_connections": 1}])
    @in_a_loop
    async def test_ready_client(self, shared_redis: RedisPlace, options: dict[str, Any]) -> None:
        """A client that is there already is as good as a URL, whatever its settings, and isn't closed."""
        client = redis_client(shared_redis.server, **options)
        work = Work()
        (registry,), (job,) = instances(1, work)
        store = bgjob.RedisStore(client, prefix=f"{shared_redis.prefix}_x")
        async with registry.running(store=store):
            assert await (await job.submit(2)).result(20) == 2
            with pytest.raises(BgjobError, match="is in use"):
                await store.open("other", lambda: None)
        assert await client.ping()
        await client.aclose()

    def test_other_clients(self) -> None:
        """A client that blocks, or none at all, is refused."""
        need_driver("redis")
        with pytest.raises(StoreError, match="'int': pass a URL or a redis.asyncio.Redis"):
            bgjob.RedisStore(5)  # type: ignore[arg-type]
        client = importlib.import_module("redis").Redis()
        with pytest.raises(
            StoreError, match=r"^RedisStore\('localhost:6379/0'\): pass a URL or a redis.asyncio.Redis, not a Redis$"
        ):
            asyncio.run(Registry().run(store=bgjob.RedisStore(client)))
        client.close()

    @in_a_loop
    async def test_leaves_nothing(self, redis_server: RedisServer) -> None:
        """After the end no connection of ours is left, also where the start failed."""

        async def connections() -> int:
            return (await redis_server.ask("CLIENT", "LIST")).count(b"\n")

        before = await connections()
        (registry,), (job,) = instances(1, Work(parallelism=100))
        async with registry.running(store=redis_server.url()):
            runs = await asyncio.gather(*(job.submit(n) for n in range(50)))
            await asyncio.gather(*(run.result(20) for run in runs))
            assert await redis_server.ask("PUBSUB", "CHANNELS", "*wake:*")
        await redis_server.ask("CONFIG", "SET", "maxmemory", "1gb", "maxmemory-policy", "allkeys-lru")
        with pytest.raises(StoreError):
            await registry.run(store=redis_server.url())
        await redis_server.ask("CONFIG", "SET", "maxmemory", "0")
        for _ in range(20):
            async with opened(bgjob.RedisStore(redis_server.url())):
                pass  # before its listener has begun
        assert await connections() == before

    @in_a_loop
    async def test_prefixes(self, shared_redis: RedisPlace) -> None:
        """Two applications in one database don't see each other, and every key of one is in one slot of a cluster."""
        works = [Work(), Work()]
        (one,), (first,) = instances(1, works[0])
        (two,), (second,) = instances(1, works[1])
        async with going(shared_redis.url("a"), one), going(shared_redis.url("b"), two):
            runs = [await first.after(0, key="k").submit(1), await second.after(0, key="k").submit(2)]
            assert [await run.result(20) for run in runs] == [1, 2]
            later = await first.after("1h").submit(3)
            assert await two.find(later.id) is None
            assert await second.cancel() == 0
            async with shared_redis._client() as client:
                keys = [key async for key in client.scan_iter(f"*{shared_redis.prefix}*")]
        assert (works[0].args, works[1].args) == ([1], [2])
        assert {key.partition(b":")[0] for key in keys} == {
            b"{%s_%s}" % (shared_redis.prefix.encode(), x) for x in (b"a", b"b")
        }

    @in_a_loop
    async def test_script_flush(self, shared_redis: RedisPlace) -> None:
        """A server that forgets the scripts is told them again: nothing is lost, and no line is logged."""
        work = Work(parallelism=20)
        registries, (job, *_) = instances(2, work)
        async with going(shared_redis.url(), *registries):
            runs = []
            for n in range(30):
                async with shared_redis._client() as client:
                    await client.script_flush()
                runs.append(await job.submit(n))
            assert [await run.result(20) for run in runs] == [*range(30)]
        assert sorted(work.args) == [*range(30)]

    @in_a_loop
    async def test_killed_and_restarted(self, redis_server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
        """A server that is killed during runs and comes back: all run once, one line at each end of the outage."""
        work = Work(parallelism=10)
        work.release.clear()
        (here, there), (job, other) = instances(2, work)
        async with going(redis_server.url(lease="20s"), here, there):
            runs = [await (job, other)[n % 2].submit(n) for n in range(30)]
            await until(lambda: work.now == 10)
            redis_server.kill()
            work.release.set()
            await until(lambda: caplog.text.count("store unreachable") == 2)
            with pytest.raises(StoreError, match="unreachable for 5 s: RedisStore"):
                await job.submit(99)
            redis_server.start()
            assert [await run.result(30) for run in runs] == [*range(30)]
            assert await (await job.submit(99)).result(20) == 99
        assert sorted(work.args) == [*range(30), 99]
        lines = [record.getMessage() for record in caplog.records]
        assert sum("store unreachable: RedisStore" in line and "; retrying" in line for line in lines) == 2
        assert sum(line.startswith("store back after") for line in lines) == 2
        assert {run.attempt for run in work.begun} == {1}

    @in_a_loop
    async def test_absent_at_start(self, redis_server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
        """A server that isn't there at the start is an outage, which ends when it comes."""
        redis_server.kill()
        work = Work(every="100ms")
        (registry,), _ = instances(1, work)
        async with going(redis_server.url(), registry):
            await until(lambda: "store unreachable" in caplog.text)
            assert not work.begun
            redis_server.start()
            await until(lambda: len(work.begun) > 1)
        assert len(set(work.ticks)) == len(work.ticks)

    @in_a_loop
    async def test_frozen_server(self, redis_server: RedisServer) -> None:
        """Each verb gives up in less than a quarter of the lease on a server that doesn't answer, at the start too."""
        async with Proxy(redis_server) as proxy:
            store = bgjob.RedisStore(proxy.url(), lease=2)
            loop = asyncio.get_running_loop()

            async def takes(verb: Callable[[], Awaitable[object]]) -> float:
                began = loop.time()
                with pytest.raises(bgjob.Unreachable, match=r"no answer within 0.5 s$"):
                    await verb()
                return loop.time() - began

            async with opened(store):
                await store.beat({})
                proxy.silent = True
                assert 0.4 < await takes(lambda: store.claim({"work": (1, 1)})) < 1
                many = [takes(lambda: store.push([a_call("x")], True)) for _ in range(20)]
                assert max(await asyncio.gather(*many)) < 1
            proxy.closed = True
            began = loop.time()
            async with opened(bgjob.RedisStore(proxy.url(), lease=2)):
                assert loop.time() - began < 1

    @in_a_loop
    async def test_lost_answers(self, redis_server: RedisServer) -> None:
        """A fifth of all answers is lost after the server did what it was told: nothing runs twice, nothing is lost."""
        chance = random.Random(1)
        work = Work(parallelism=8)
        (here, there), (job, other) = instances(2, work)
        async with Proxy(redis_server) as proxy:
            async with going(proxy.url(lease="20s"), here, there):
                proxy.lose = lambda asked: b"EVAL" in asked and chance.random() < 0.2
                runs = [await (job, other)[n % 2].submit(n) for n in range(150)]
                assert [await run.result(50) for run in runs] == [*range(150)]
                proxy.lose = lambda asked: False
            assert proxy.lost > 30
        assert sorted(work.args) == [*range(150)]
        assert {run.attempt for run in work.begun} == {1}

    @in_a_loop
    async def test_lost_settles(self, redis_server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
        """A tick's success of which nothing is left is taken as told where its answer was lost, else as another's."""
        async with Proxy(redis_server) as proxy, opened(bgjob.RedisStore(proxy.url())) as store:
            await store.enlist({"work": bgjob.Listing("x", False, None)})
            await store.settle([])  # so that the server knows the script
            now, _ = await store.tick([])
            _, (answer,) = await store.tick([bgjob.Tick("work", now, 0, 1, False, 1, 1)])
            assert answer.run is not None
            end = an_end(answer.run, State.SUCCEEDED)
            left = iter([True])
            proxy.lose = lambda asked: script_of("settle") in asked and next(left, False)
            assert await store.settle([end]) == ["done"]  # said twice
            assert proxy.lost == 1
            store._doubtful = -1.0
            assert await store.settle([end]) == ["refused"]

    @in_a_loop
    async def test_beat_ends_an_outage(self, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch,
                                       caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
        """Whatever the back-off, a beat that comes through ends an outage, also one that was longer than a lease, and
        where an answer takes its time: results that wait are no reason to hurry."""
        beat = bgjob.RedisStore.beat

        async def slow(store: bgjob.RedisStore, runs: Any) -> Any:
            await asyncio.sleep(0.1)
            return await beat(store, runs)

        monkeypatch.setattr(bgjob.RedisStore, "beat", slow)
        monkeypatch.setattr(bgjob, "_BACKOFF_FIRST", 100_000)
        monkeypatch.setattr(bgjob, "_BACKOFF_LAST", 100_000)
        work = Work(held=True)
        (registry,), (job,) = instances(1, work)
        async with going(redis_server.url(lease="2s"), registry):
            await job.submit()
            await until(lambda: work.begun)
            redis_server.kill()
            work.release.set()
            await until(lambda: "store unreachable" in caplog.text)
            await asyncio.sleep(2)
            redis_server.start()
            async with asyncio.timeout(15):
                await until(lambda: "store back" in caplog.text)

    @in_a_loop
    async def test_lost_claims(self, redis_server: RedisServer) -> None:
        """Runs that were claimed by a call whose answer was lost come with the next claim, as if that were the first."""
        async with Proxy(redis_server) as proxy, opened(bgjob.RedisStore(proxy.url())) as store:
            await store.enlist({"tick": bgjob.Listing("x", False, None)})
            await store.push([a_call("one"), a_call("two")], False)
            (known,) = (await store.claim({"work": (1, 9)})).runs
            now = (await store.tick([]))[0]
            ticks = [bgjob.Tick("tick", now, 0, 1, False, 1, 1)]
            for verb, again in (("claim", store.claim({"work": (5, 9)})), ("tick", store.tick(ticks))):
                proxy.lose = lambda asked, verb=verb: script_of(verb) in asked
                with pytest.raises(bgjob.Unreachable):
                    await again
            proxy.lose = lambda asked: False
            _, (answer,) = await store.tick(ticks)
            news = await store.claim({"work": (5, 9), "tick": (1, 1)})
            assert (answer.word, answer.run) == ("lost", None)
            assert [(run.id, run.tries, run.lost, run.token) for run in news.runs] == [
                ("two", 1, 0, 1),
                (ticks[0].id, 1, 0, 1),
            ]
            assert not (await store.claim({"work": (5, 9), "tick": (1, 1)})).runs
            assert await store.beat({known.id: 1, "two": 1, ticks[0].id: 1, "x": 1}) == dict.fromkeys(
                [known.id, "two", ticks[0].id], False
            )

    @in_a_loop
    async def test_said_again(self, redis_server: RedisServer) -> None:
        """What is said again because the answer was lost changes nothing, and is answered as before."""
        async with Proxy(redis_server) as proxy, opened(bgjob.RedisStore(proxy.url())) as store:

            async def twice(verb: str, call: Callable[[], Awaitable[Any]]) -> Any:
                proxy.lose = lambda asked: script_of(verb) in asked
                with pytest.raises(bgjob.Unreachable):
                    await call()
                proxy.lose = lambda asked: False
                return await call()

            for empty in (store.push([], True), store.claim({}), store.settle([])):
                await empty
            await store.cancel("work", "nothing")
            assert await twice("push", lambda: store.push([a_call("one")], True)) == [None]
            (run,) = (await store.claim({"work": (1, 1)})).runs
            assert await twice("settle", lambda: store.settle([an_end(run, State.SCHEDULED, back=True)])) == ["done"]
            (run,) = (await store.claim({"work": (1, 1)})).runs
            assert (run.tries, run.token) == (1, 2)
            assert await twice("settle", lambda: store.settle([an_end(run, State.SCHEDULED)])) == ["done"]
            found = await twice("cancel", lambda: store.cancel("work", "one"))
            assert found == {"one": bgjob.Cancelled(False, run.at)}
            assert await store.cancel("work", "one") == {}
            assert await store.settle([an_end(run, State.SUCCEEDED)]) == ["refused"]
            await store.push([a_call("two")], False)
            (run,) = (await store.claim({"work": (1, 1)})).runs
            assert list(await store.cancel("work")) == ["two"]
            assert await twice("settle", lambda: store.settle([an_end(run, State.SCHEDULED)])) == ["cancelled"]
            row = await store.find("two")
            assert row is not None
            assert (row.state, row.token) == (State.CANCELLED, 1)
            await store.push([a_call("three")], False)
            (run,) = (await store.claim({"work": (1, 1)})).runs
            await store.settle([an_end(run, State.SUCCEEDED)])
            row = await store.find("three")
            await asyncio.sleep(0.01)
            assert await store.settle([an_end(run, State.SUCCEEDED)]) == ["done"]
            assert await store.find("three") == row

    @in_a_loop
    async def test_taken_over(self, shared_redis: RedisPlace) -> None:
        """A run whose lease has ended is another's, which is told when to ask; what its last owner says is refused."""
        url, prefix = shared_redis.server, f"{shared_redis.prefix}_x"
        store, other = (bgjob.RedisStore(url, prefix=prefix, lease=1) for _ in range(2))
        async with opened(store), opened(other, "other"):
            await store.push([a_call("one")], False)
            news = await store.claim({"work": (1, 1)})
            (run,) = news.runs
            beside = await other.claim({"work": (1, 1)})
            assert (beside.runs, beside.next_due) == ([], news.now + 1000)
            await asyncio.sleep(0.5)
            assert await store.beat({"one": 1}) == {"one": False}
            await asyncio.sleep(0.7)
            assert not (await other.claim({"work": (1, 1)})).runs
            await asyncio.sleep(0.4)
            (again,) = (await other.claim({"work": (1, 1)})).runs
            assert again == run._replace(tries=2, lost=1, token=2)
            assert await store.beat({"one": 1}) == {}
            assert await store.settle([an_end(run, State.SUCCEEDED)]) == ["refused"]
            assert await other.settle([an_end(again, State.SUCCEEDED)]) == ["done"]

    @in_a_loop
    async def test_ticks_ahead(self, shared_redis: RedisPlace) -> None:
        """A tick that the server's clock hasn't reached is early, and nobody's yet."""
        async with opened(bgjob.RedisStore(shared_redis.server, prefix=f"{shared_redis.prefix}_x")) as store:
            now, lasts = await store.enlist({"work": bgjob.Listing("x", False, None)})
            tick = bgjob.Tick("work", now + 300, 0, 1, False, 1, 1)
            assert (await store.tick([tick]))[1] == [bgjob.Answer(tick, "early", lasts["work"])]
            await asyncio.sleep(0.3)
            _, (answer,) = await store.tick([tick])
            assert (answer.word, answer.last, answer.run is None) == ("won", tick.at, False)

    @in_a_loop
    async def test_wakes_who_waits(self, redis_server: RedisServer) -> None:
        """Whoever waits for an end is woken at it, and nobody else; an owner when its run is to be cancelled."""
        heard: dict[str, list[int]] = {"me": [], "waits": [], "other": []}
        async with AsyncExitStack() as stack:
            stores = {}
            for owner, calls in heard.items():
                stores[owner] = store = bgjob.RedisStore(redis_server.url())
                await store.open(owner, lambda calls=calls: calls.append(1))
                stack.push_async_callback(store.close)
            store = stores["me"]
            await store.push([a_call("one"), a_call("two")], False)
            await store.claim({"work": (2, 2)})
            assert await stores["waits"].find("one", watch=True)
            await store.settle([an_end(run, State.SUCCEEDED) for run in await claimed(store)])
            await until(lambda: heard["waits"])
            await store.push([a_call("three")], False)
            await store.claim({"work": (2, 2)})
            assert await stores["other"].cancel("work", "three")
            await until(lambda: heard["me"])
            assert (await store.claim({})).cancelled == ["three"]
            await asyncio.sleep(0.1)
            assert (len(heard["waits"]), len(heard["other"])) == (1, 0)

    @in_a_loop
    async def test_idle_connections(self, redis_server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
        """Connections that something in between has closed while they were idle are no outage."""
        (registry,), (job,) = instances(1, Work(parallelism=9))
        async with going(redis_server.url(), registry):
            for n in range(3):
                runs = await asyncio.gather(*(job.submit(n) for _ in range(8)))
                await asyncio.gather(*(run.result(20) for run in runs))
                await redis_server.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            await (await job.submit(9)).result(20)
        assert "unreachable" not in caplog.text

    @in_a_loop
    async def test_submitted_during_a_claim(self, shared_redis: RedisPlace, monkeypatch: pytest.MonkeyPatch) -> None:
        """A delayed run that is submitted while a claim is under way isn't late, though the claim's answer lacks it."""
        claim, asked, go = bgjob.RedisStore.claim, asyncio.Event(), asyncio.Event()

        async def slow(store: bgjob.RedisStore, free: Any) -> bgjob.News:
            news = await claim(store, free)
            asked.set()
            await go.wait()
            return news

        monkeypatch.setattr(bgjob.RedisStore, "claim", slow)
        (registry,), (job,) = instances(1, Work())
        async with going(shared_redis.url(), registry):
            await asked.wait()
            run = await job.after("300ms").submit(1)
            go.set()
            assert await run.result(3) == 1

    @in_a_loop
    async def test_rests(self, place: SQLitePlace, monkeypatch: pytest.MonkeyPatch) -> None:
        """An instance that has nothing to do does nothing, one without jobs and one that drains too."""
        exchange, number = bgjob._Shared._exchange, 0

        async def counted(engine: bgjob._Shared) -> None:
            nonlocal number
            number += 1
            await exchange(engine)

        monkeypatch.setattr(bgjob._Shared, "_exchange", counted)
        (client, worker), (job, _) = instances(2, Work(held=True))
        async with going(place.url(), client, jobs=[]), going(place.url(), worker, drain="300ms"):
            await job.submit()
            await asyncio.sleep(0.3)
        assert 0 < number < 30

    @in_a_loop
    async def test_deaf(self, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
        """Hints are hints: without them what another instance submits is found by looking."""

        async def deaf(store: bgjob.RedisStore) -> None:
            raise bgjob.Unreachable("deaf")

        monkeypatch.setattr(bgjob.RedisStore, "_subscribe", deaf)
        monkeypatch.setattr(bgjob.RedisStore, "poll", 300)
        (here, there), (job, _) = instances(2, Work())
        async with going(redis_server.url(), here, jobs=[]), going(redis_server.url(), there):
            assert await (await job.submit(1)).result(20) == 1

    @in_a_loop
    async def test_hears_again(self, redis_server: RedisServer) -> None:
        """A subscription that was cut is begun anew."""
        heard = asyncio.Event()
        store, other = bgjob.RedisStore(redis_server.url()), bgjob.RedisStore(redis_server.url())
        await store.open("me", heard.set)
        await store.enlist({"work": bgjob.Listing("", False, None)})
        async with opened(other, "other"):
            await other.push([a_call("one")], True)
            await asyncio.wait_for(heard.wait(), 10)
            await redis_server.ask("CLIENT", "KILL", "TYPE", "pubsub")
            heard.clear()
            await asyncio.wait_for(heard.wait(), 10)  # what was missed meanwhile
            heard.clear()
            await other.push([a_call("two")], True)
            await asyncio.wait_for(heard.wait(), 10)
            heard.clear()
            await store.push([a_call("three")], True)  # its own isn't news
            await asyncio.sleep(0.2)
            assert not heard.is_set()
        await store.close()

    @in_a_loop
    async def test_outages(self, redis_server: RedisServer) -> None:
        """A server that can't write for a while, for memory, a script or being a replica, is an outage."""
        async with opened(bgjob.RedisStore(redis_server.url(), lease="30s")) as store:
            await redis_server.ask("CONFIG", "SET", "maxmemory", "1")
            with pytest.raises(bgjob.Unreachable, match="command not allowed when used memory > 'maxmemory'"):
                await store.push([a_call("one")], True)
            await redis_server.ask("CONFIG", "SET", "maxmemory", "0")
            await redis_server.ask("REPLICAOF", "127.0.0.1", "1")
            with pytest.raises(bgjob.Unreachable, match="You can't write against a read only replica"):
                await store.push([a_call("one")], True)
            await redis_server.ask("REPLICAOF", "NO", "ONE")
            await redis_server.ask("CONFIG", "SET", "lua-time-limit", "50")
            endless = asyncio.create_task(redis_server.ask("EVAL", "while true do end", 0))
            await asyncio.sleep(0.3)
            with pytest.raises(bgjob.Unreachable, match="BUSY Redis is busy running a script"):
                await store.push([a_call("one")], True)
            await redis_server.ask("SCRIPT", "KILL")
            with pytest.raises(importlib.import_module("redis").ResponseError):
                await endless
            assert await store.push([a_call("one")], True) != [None]

    @in_a_loop
    async def test_emptied(self, redis_server: RedisServer) -> None:
        """A database that is emptied under its instances is begun anew."""
        work = Work(every="100ms")
        registries, _ = instances(2, work)
        async with going(redis_server.url(), *registries):
            await until(lambda: len(work.begun) > 2)
            await redis_server.ask("FLUSHALL")
            number = len(work.begun)
            await until(lambda: len(work.begun) > number + 2)
        assert len(set(work.ticks)) == len(work.ticks)

    @in_a_loop
    async def test_overview(self, shared_redis: RedisPlace) -> None:
        """What is due and what waits for a retry are told apart, the nearest first; failures are kept for a while."""
        store = bgjob.RedisStore(shared_redis.server, prefix=f"{shared_redis.prefix}_x", keep="400ms")
        async with opened(store):
            await store.push([a_call(f"{n:03}", delay=3_600_000 * (n > 5)) for n in range(30)], False)
            runs = (await store.claim({"work": (6, 9)})).runs
            ends = [an_end(run, State.SCHEDULED, delay=n * 1000 + 60_000) for n, run in enumerate(runs[:3])]
            await store.settle([*ends, an_end(runs[3], State.FAILED), an_end(runs[4], State.SUCCEEDED)])
            seen = await store.overview(2)
            assert [[row.id for row in rows] for rows in (seen.running, seen.due, seen.retrying, seen.failed)] == [
                ["005"], ["006", "007"], ["000", "001"], ["003"],
            ]  # fmt: skip
            await asyncio.sleep(0.5)
            assert (await store.overview(2)).failed == []
            assert await store.push([a_call("003")], False) != [None]
            assert len(await store.cancel("work")) == 29

    @in_a_loop
    async def test_many(self, shared_redis: RedisPlace) -> None:
        """More than a call may take goes by several: a thousand runs, ten megabytes of arguments."""
        async with opened(bgjob.RedisStore(shared_redis.server, prefix=f"{shared_redis.prefix}_x", keep="1s")) as store:
            big = [bgjob.Call(f"big{n}", "big", None, 0, "x" * 1_000_000) for n in range(10)]
            many = [a_call(f"{n:04}") for n in range(1200)]
            assert None not in await store.push([*big, *many], False)
            found, calls = 0, 0
            while (news := await store.claim({"work": (2000, 2000), "big": (10, 10)})).runs:
                found, calls = found + len(news.runs), calls + 1
                assert len(news.runs) <= 500
                assert sum(len(run.args) for run in news.runs) < 6_000_000
                if found < 1210:
                    assert news.next_due is not None
                    assert news.next_due <= news.now
            assert (found, calls) == (1210, 5)
            held = store._held.copy()
            assert len(await store.beat(held)) == 1210
            assert len(await store.cancel("work")) == 1200


@pytest.fixture(params=["server", "redis_server"])
def own(request: pytest.FixtureRequest) -> PostgresServer | RedisServer:
    return request.getfixturevalue(request.param)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
class TestServers:
    """Faults of a server, of the way to it and of the machines' clocks, with real processes: the same on both."""

    JOBS = """
        @job(parallelism=20)
        async def work(n, seconds=0.05):
            with noted():
                await asyncio.sleep(seconds)
            return n

        @job(every="500ms", overlap="all", parallelism=9)
        async def tick():
            with noted():
                await asyncio.sleep(0.02)
    """

    def whole(self, group: Workers) -> list[int]:
        """The ticks that started; none may be missing between the first and the last."""
        ticks = sorted(tick_of(id) for id in group.starts() if id.startswith("tick"))
        return ticks if ticks == [*range(ticks[0], ticks[-1] + 500, 500)] else []

    def outages(self, group: Workers) -> dict[int, list[str]]:
        """What each process said of the store: in turn that it is unreachable, and that it is back."""
        found: dict[int, list[str]] = {worker.pid: [] for worker in group.live}
        for pid, line in re.findall(r"^(\d+) (store .*)$", group.said, re.MULTILINE):
            found[int(pid)].append(line)
        for lines in found.values():
            for n, line in enumerate(lines):
                assert line.startswith("store back after " if n % 2 else "store unreachable: "), lines
        return found

    async def settled(self, group: Workers, runs: list[Run]) -> None:
        """Until all have ended and no tick is missing, and for every process the outage is over."""
        await until(lambda: {run.id for run in runs} <= {event.id for event in group.events("end")})
        await until(lambda: self.whole(group))
        await until(lambda: not any(len(lines) % 2 for lines in self.outages(group).values()))
        assert [worker.poll() for worker in group.live] == [None] * len(group.live)

    def repeats(self, group: Workers) -> int:
        """How many starts were not the first of their run. Each is recorded as another attempt."""
        starts = group.starts().values()
        for claims in starts:
            assert all(lost.attempt < again.attempt for lost, again in itertools.pairwise(claims)), claims
        return sum(map(len, starts)) - len(starts)

    @pytest.mark.parametrize("kind", ["postgres", "redis"])
    @in_a_loop
    async def test_untrusted(self, tmp_path: Path, kind: str) -> None:
        """A server whose certificate isn't trusted is one clear line at once, without a password; it is no outage."""
        need_driver(kind)
        trusted, shown = make_certificate(tmp_path / "trusted"), make_certificate(tmp_path / "shown")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(shown)

        async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with suppress(OSError, asyncio.IncompleteReadError):
                await reader.readexactly(8)  # "is there TLS?"
                writer.write(b"S")
                await writer.start_tls(context)
            writer.transport.abort()

        server = await asyncio.start_server(greet, "127.0.0.1", 0, ssl=context if kind == "redis" else None)
        place = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        url = {
            "postgres": f"postgresql://u:s3cret@{place}/d?sslmode=verify-ca&sslrootcert={trusted}",
            "redis": f"rediss://:s3cret@{place}?ssl_ca_certs={trusted}",
        }[kind]
        with pytest.raises(StoreError, match=f"{place}.*CERTIFICATE_VERIFY_FAILED") as caught:
            await Registry().run(store=url)
        assert not isinstance(caught.value, bgjob.Unreachable)
        assert "s3cret" not in "".join(traceback.format_exception(caught.value))
        server.close()
        while len(asyncio.all_tasks()) > 1:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    @in_a_loop
    async def test_lost_answers(self, own: PostgresServer | RedisServer, tmp_path: Path) -> None:
        """A fifth of all answers is lost after the commit: all runs and ticks end, as good as none starts twice."""
        number = 1000 if THOROUGH else 150
        async with Wire(own.port) as wire:
            url = own.url(port=wire.port, prefix=name_prefix(), lease="4s")
            with Workers(tmp_path, url, self.JOBS) as group:
                group.start(3)
                await group.wait("start", 3)
                wire.losable, wire.loss = own.COMMITTED, 0.2
                runs: list[Run] = []
                async with client(group) as jobs:
                    while len(runs) < number:
                        runs += await asyncio.gather(*(jobs["work"].submit(len(runs) + n) for n in range(5)))
                    await until(lambda: {run.id for run in runs} <= {event.id for event in group.events("end")})
                    wire.loss = 0.0
                    assert [await run.result(30) for run in runs] == [*range(number)]
                    await self.settled(group, runs)
                await asyncio.to_thread(group.stop)
        assert wire.lost > number / 4
        assert self.repeats(group) <= number / 20

    async def heard(self, url: str) -> str:
        """What a store says that is asked again and again, until there is an answer."""
        said: list[str] = []
        async with opened(bgjob._store_of(url)) as store:
            while True:
                try:
                    await store.find("x")
                    return "\n".join(said)
                except bgjob.Unreachable as error:
                    said.append(str(error))
                await asyncio.sleep(0.02)

    @in_a_loop
    async def test_restarts(self, own: PostgresServer | RedisServer, tmp_path: Path) -> None:
        """A server that dies during runs, and then says for a while that it is starting, is one outage, which two lines
        tell. Nothing is lost, nothing is twice."""
        number, heard = 5 if THOROUGH else 1, ""
        with Workers(tmp_path, own.url(prefix=name_prefix(), lease="20s"), self.JOBS) as group:
            group.start(3)
            await own.fill()
            await group.wait("start", 3)
            async with client(group) as jobs:
                runs: list[Run] = []
                for _ in range(number):
                    runs += [await jobs["work"].submit(n, n % 5) for n in range(len(runs), len(runs) + 40)]
                    await group.wait("start", len(group.events("start")) + 5)
                    own.kill()
                    await asyncio.sleep(0.5)
                    heard += (await asyncio.gather(self.heard(group.url), asyncio.to_thread(own.start)))[0]
                    await self.settled(group, runs)
                assert [await run.result(30) for run in runs] == [*range(40 * number)]
            said = self.outages(group)
            group.stop()
        assert [len(lines) for lines in said.values()] == [2 * number] * 3
        assert own.UNREADY in heard  # the workers' lines tell of their first failure only
        assert self.repeats(group) == 0

    @in_a_loop
    async def test_demoted(self, redis_server: RedisServer, tmp_path: Path) -> None:
        """A Redis that is a replica for a while, which only reads, or without its master not even that, is one outage,
        which two lines tell. Nothing is lost, nothing is twice."""
        with Workers(tmp_path, redis_server.url(prefix=name_prefix(), lease="20s"), self.JOBS) as group:
            group.start(3)
            await group.wait("start", 3)
            async with client(group) as jobs:
                runs: list[Run] = []
                for stale in ("yes", "no"):
                    runs += [await jobs["work"].submit(n, n % 5 / 2) for n in range(len(runs), len(runs) + 40)]
                    await group.wait("start", len(group.events("start")) + 5)
                    await redis_server.ask("CONFIG", "SET", "replica-serve-stale-data", stale)
                    await redis_server.ask("REPLICAOF", "127.0.0.1", free_port())
                    await asyncio.sleep(2)
                    await redis_server.ask("REPLICAOF", "NO", "ONE")
                    await self.settled(group, runs)
                assert [await run.result(30) for run in runs] == [*range(80)]
            said = self.outages(group)
            group.stop()
        for lines in said.values():
            assert len(lines) == 4
            assert "You can't write against a read only replica" in lines[0]
            assert "MASTERDOWN" in lines[2] or "Link with MASTER is down" in lines[2]
        assert self.repeats(group) == 0

    @in_a_loop
    async def test_hints_kept_back(self, own: PostgresServer | RedisServer, tmp_path: Path) -> None:
        """Where no hint arrives, though their connection looks whole, all is found by looking: what others submit, what
        is due again, what is to be cancelled, and the ticks."""
        async with Wire(own.port) as wire:
            wire.kept_back = own.HINT
            url = own.url(port=wire.port, prefix=name_prefix(), lease="6s")
            with Workers(tmp_path, url, self.JOBS) as group:
                group.start(2)
                await group.wait("start", 2)
                async with client(group) as jobs:
                    runs = [await jobs["work"].submit(n) for n in range(20)]
                    runs += [await jobs["work"].after("1s").submit(n) for n in range(20, 30)]
                    long = await jobs["work"].submit(30, 600)
                    assert [await run.result(20) for run in runs] == [*range(30)]
                    await until(lambda: long.id in group.starts())
                    assert await long.cancel()
                    with pytest.raises(RunCancelled):
                        await long.result(20)
                    await self.settled(group, runs)
                await asyncio.to_thread(group.stop)
        assert wire.kept > 0
        assert self.repeats(group) == 0
        assert "unreachable" not in group.said

    @in_a_loop
    @pytest.mark.parametrize("skews", [["-2", "0", "0.2", "2"], ["0.2"]], ids=["four", "lone"])
    async def test_skewed_clocks(self, own: PostgresServer | RedisServer, tmp_path: Path, skews: list[str]) -> None:
        """Whatever the clocks of the machines say: each tick exactly once, none missing, and by the server's clock none
        early. One that is alone and 0.2 s fast misses nothing."""
        jobs = """
            real, skew = time.time, float(os.environ["SKEW"])
            time.time = lambda: real() + skew

            @job(every="100ms", overlap="all", parallelism=4)
            async def fast():
                note("start")

            @job(every="1s", overlap="all", parallelism=4)
            async def slow():
                note("start")
        """
        with Workers(tmp_path, own.url(prefix=name_prefix()), jobs) as group:
            for skew in skews:
                group.start(1, SKEW=skew)
            await group.wait("start", 600 if THOROUGH else 40, patience=120)
            group.stop()
        for job, every in (("fast", 100), ("slow", 1000)):
            events = [event for event in group.events() if event.id.startswith(job)]
            ticks = [tick_of(event.id) for event in events]
            assert sorted(ticks) == [*range(min(ticks), max(ticks) + every, every)]
            assert all(event.at >= tick * 1_000_000 for event, tick in zip(events, ticks, strict=True))
        assert len({event.pid for event in group.events()}) >= min(2, len(skews))
        assert "unreachable" not in group.said


JOBS = """
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
"""
WORK = """
import asyncio
from bgjob import job

@job(every="1h")
async def purge(): ...

@job
async def send_mail(to: str, n: int = 1):
    return {"to": to, "n": n}

@job
async def fail():
    raise ValueError("no such user\\nsecond line")

@job(retries=1, retry_delay="1h")
async def again():
    raise OSError("503")

@job(timeout="5m")
async def sleep():
    await asyncio.sleep(600)

@job
async def stay():
    while True:
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            pass
"""
COMMAND = [sys.executable, "-P", "-c", "import bgjob, sys; sys.exit(bgjob.main())"]
STORE = ("--store", "sqlite:///jobs.db")


def environment(**more: str) -> dict[str, str]:
    file = Path(bgjob.__file__)
    folder = file.parent if file.name == "bgjob.py" else file.parent.parent
    plain = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR")}
    return {**plain, "PYTHONPATH": str(folder), "PYTHONIOENCODING": "utf-8", **more}


class Folder:
    """A folder with modules in it, where the command line is used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.write("jobs.py", JOBS)
        self.write("work.py", WORK)

    def write(self, name: str, text: str) -> None:
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        (self.path / name).write_text(text)

    def bgjob(self, *arguments: str, **more: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [*COMMAND, *arguments], cwd=self.path, env=environment(**more), capture_output=True, text=True, timeout=30
        )
        return done.returncode, done.stdout, done.stderr

    def data(self, *arguments: str) -> str:
        status, out, err = self.bgjob(*arguments)
        assert (status, err) == (0, "")
        return out

    @contextmanager
    def running(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        process = subprocess.Popen(
            [*COMMAND, "run", *arguments], cwd=self.path, env=environment(), stderr=subprocess.PIPE, text=True
        )
        try:
            assert process.stderr is not None
            assert " runs " in process.stderr.readline()
            yield process
        finally:
            process.kill()
            process.communicate()

    def until(self, part: str, number: int) -> list[dict[str, object]]:
        """The rows of a part of `status --json`, once there are as many as that."""
        for _ in range(100):
            rows: list[dict[str, object]] = json.loads(self.data("status", "--json", *STORE))[part]
            if len(rows) == number:
                return rows
            time.sleep(0.05)
        raise AssertionError(rows)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


class TestCommandLine:
    @pytest.mark.parametrize(
        ("ms", "brief", "exact"),
        [
            (0, "0s", "0s"),
            (250, "0s", "250ms"),
            (1000, "1s", "1s"),
            (90_500, "1m30s", "1m30s500ms"),
            (3 * MINUTE, "3m", "3m"),
            (26 * HOUR + 3 * MINUTE + 1, "1d2h", "1d2h3m1ms"),
            (9 * DAY, "9d", "9d"),
        ],
    )
    def test_durations(self, ms: int, brief: str, exact: str) -> None:
        """A duration at a glance has at most two units; an exact one can be pasted into a decorator."""
        assert (_words(ms, True), _words(ms)) == (brief, exact)
        assert _duration("every", exact) == ms

    def test_relative(self) -> None:
        """What is due reads "in 3m", "now" or "3m late"."""
        ms = (3 * MINUTE, 90 * MINUTE, 1000, 400, -900, -3 * MINUTE)
        assert [*map(_relative, ms)] == ["in 3m", "in 1h30m", "in 1s", "now", "now", "3m late"]

    @pytest.mark.parametrize(
        ("cron", "words"),
        [
            ("* * * * *", "every minute"),
            ("*/15 * * * *", "every 15 minutes"),
            ("*/7 * * * *", "*/7 * * * *"),
            ("5 * * * *", "hourly at :05"),
            ("30 2 * * *", "daily at 02:30"),
            ("10 30 2 * * *", "10 30 2 * * *"),
            ("0 6 * * mon-fri", "Mon-Fri at 06:00"),
            ("0 6 * * 0,SAT", "0 6 * * 0,SAT"),
            ("0 6 * * fri#2", "0 6 * * fri#2"),
            ("0 0 1,15 * *", "0 0 1,15 * *"),
            ("0 6 * * sat,sun", "Sat,Sun at 06:00"),
            ("@daily", "@daily"),
            ("@yearly", "@yearly"),
        ],
    )
    def test_cron_words(self, cron: str, words: str) -> None:
        """Common schedules are told in words, others as they were written."""
        registry = Registry()
        registry.job(cron=cron, tz="Europe/Rome", name="f")(lambda: None)
        assert _schedule_words(registry.jobs["f"]._spec) == f"{words} Europe/Rome"

    def test_ticks(self) -> None:
        """A tick's day and zone are told where they change, seconds where there are some."""
        rome = zoneinfo.ZoneInfo("Europe/Rome")
        now = at(2025, 10, 25, 12, zone="Europe/Rome")
        days = [(25, 14), (25, 15), (26, 1), (26, 4), (31, 4), (31, 5)]
        ticks = [datetime(2025, 10, day, hour, 5, tzinfo=rome) for day, hour in days]
        assert _tick_words(ticks, now).replace("\xa0", " ") == (
            "14:05 CEST, 15:05, Sun 01:05, 04:05 CET, Fri 04:05, 05:05"
        )
        late = [datetime(2026, 1, 1, 0, 0, 30, 250_000, tzinfo=UTC), datetime(2026, 1, 1, 0, 1, 30, tzinfo=UTC)]
        assert _tick_words(late, now).replace("\xa0", " ") == "2026-01-01 00:00:30.250 UTC, 00:01:30"

    @pytest.mark.parametrize(
        ("rows", "width", "lines"),
        [
            ([("JOB", "AT"), ("sync", "a\xa0b c\xa0d e\xa0f")], 80, ["JOB   AT", "sync  a b c d e f"]),
            ([("JOB", "AT"), ("sync", "a\xa0b c\xa0d e\xa0f")], 14, ["JOB   AT", "sync  a b c d", "      e f"]),
            ([("JOB", "AT"), ("sync", "a\xa0b c\xa0d e\xa0f")], 5, ["JOB   AT", "sync  a b", "      c d", "      e f"]),
            ([("", ""), ("a", "")], 80, ["", "a"]),
            ([("\x1b[2J", "b")], 80, [" [2J  b"]),
        ],
    )  # fmt: skip
    def test_table(self, rows: list[tuple[str, str]], width: int, lines: list[str],
                   monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
        """The widest column gives way first; no word is cut, a hard space doesn't break, and no terminal is commanded."""
        monkeypatch.setenv("COLUMNS", str(width))
        _print_table(rows, {})
        assert capsys.readouterr().out.splitlines() == lines

    def test_minutes(self) -> None:
        """The minutes with a tick, however many ticks are in one, from any schedule."""
        begin, end = 100 * MINUTE + 30_000, 104 * MINUTE
        assert [*_minutes(_Every(2 * MINUTE), begin, end)] == [102]
        assert [*_minutes(_Every(10), begin, end)] == [101, 102, 103]
        assert [*_minutes(_Cron("*/20 * * * * *", UTC), begin, end)] == [100, 101, 102, 103]
        assert [*_minutes(_Cron("*/3 * * * *", UTC), begin, end)] == [102]

    def test_strip(self) -> None:
        """A strip adds up the minutes of a cell; the one of all jobs takes the fullest."""
        minutes = {60: 1, 89: 3, 90: 1, 60 + 24 * 60 - 1: 20}
        assert _strip(minutes, 60, 30, sum) == "▄▁" + "·" * 45 + "█"
        assert _strip(minutes, 60, 30, max) == "▃▁" + "·" * 45 + "█"

    def test_list(self, folder: Folder) -> None:
        """In a pipe: 80 columns, no colours, no cut lines, and every job with its strip."""
        out = folder.data("list", "jobs.py")
        assert max(map(len, out.splitlines())) <= 80
        assert "\x1b" not in out
        assert "…" not in out
        assert re.search(r"^sync_products +every 5m +(in [\dms]+|now) +\d\d:\d\d UTC, \d\d:\d\d", out, re.MULTILINE)
        assert re.search(r"^morning_report +Mon-Fri at 06:00", out, re.MULTILINE)
        assert re.search(r"^warm_up +once, 10s after the start$", out, re.MULTILINE)
        assert re.search(r"^send_mail +on submit$", out, re.MULTILINE)
        assert re.search(r"^morning_report  [·▁]{48}$", out, re.MULTILINE)
        assert re.search(r"^sync_products   [·▁-▆]{48}$", out, re.MULTILINE)
        assert re.search(r"^together        [·▁▂]{48}$", out, re.MULTILINE)

    def test_list_is_as_wide_as_the_terminal(self, folder: Folder) -> None:
        """COLUMNS, as terminals and `watch` set it, decides; a pipe that knows ASCII alone, as on Windows, gets UTF-8."""
        env = environment(COLUMNS="200", PYTHONIOENCODING="ascii")
        command = [*COMMAND, "list", "jobs.py", "-n", "1"]
        out = subprocess.run(
            command, cwd=folder.path, env=env, capture_output=True, timeout=30, check=True
        ).stdout.decode()
        assert re.search(r"^morning_report  [·▁]{144}$", out, re.MULTILINE)
        assert re.search(r"^sync_products +every 5m +\S+( \S+)? +\d\d:\d\d UTC$", out, re.MULTILINE)

    @pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
    @pytest.mark.parametrize(("more", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
    def test_colours(self, folder: Folder, more: dict[str, str], coloured: bool) -> None:
        """Colours on a terminal only, and not where NO_COLOR or a dumb one forbids them."""
        import pty

        ours, theirs = pty.openpty()
        command = [*COMMAND, "list", "jobs.py"]
        env = environment(**{"TERM": "xterm", "COLUMNS": "80", **more})
        subprocess.run(command, cwd=folder.path, env=env, stdout=theirs, check=True, timeout=30)
        os.close(theirs)
        assert (b"\x1b[1m" in os.read(ours, 100)) is coloured
        os.close(ours)

    def test_copied_file(self, folder: Folder) -> None:
        """`python bgjob.py` and `python -m app.bgjob` have one registry with the jobs they import."""
        source = Path(bgjob.__file__).read_text()
        folder.write("bgjob.py", source)
        folder.write("app/__init__.py", "")
        folder.write("app/bgjob.py", source)
        folder.write("app/jobs.py", JOBS.replace("from bgjob", "from .bgjob"))
        for command in (["bgjob.py", "list", "jobs.py"], ["-m", "app.bgjob", "list", "app.jobs"]):
            done = subprocess.run([sys.executable, *command], cwd=folder.path, capture_output=True, timeout=30)
            assert (done.returncode, done.stderr) == (0, b"")
            assert b"sync_products" in done.stdout
        done = subprocess.run([sys.executable, "bgjob.py", "list", "app.jobs"], cwd=folder.path, capture_output=True,
                              text=True, timeout=30)  # fmt: skip
        assert (done.returncode, done.stdout) == (1, "")
        assert (
            done.stderr
            == f"bgjob: {folder.path}/app/jobs.py: no jobs of {folder.path}/bgjob.py there; decorate functions with its @job\n"
        )

    def test_registries(self, folder: Folder) -> None:
        """A target's jobs are those of the one registry that has some; a path may be in a package."""
        folder.write("app/__init__.py", "")
        folder.write("app/other.py", "from bgjob import Registry\nmail = Registry()\n@mail.job\ndef b(): ...")
        folder.write("app/jobs.py", "from .other import mail\n@mail.job\ndef a(): ...")
        for target in ("app/jobs.py", "app.jobs"):
            assert folder.data("list", target).split()[4::3] == ["b", "a"]
        folder.write(
            "two.py", "from bgjob import Registry\na, b = Registry(), Registry()\ndef f(): ...\na.job(f), b.job(f)"
        )
        message = f"bgjob: {folder.path}/two.py: 2 registries have jobs there; write a module for each\n"
        assert folder.bgjob("list", "two.py") == (1, "", message)

    @pytest.mark.parametrize(
        ("arguments", "status", "message"),
        [
            ("", 2, "the following arguments are required: COMMAND; see bgjob --help"),
            ("list", 2, "the following arguments are required: TARGET; see bgjob list --help"),
            ("list jbos.py", 1, "jbos.py: {missing}"),
            ("list app.jobs", 1, "app.jobs: {missing}"),
            ("list jobs:registry", 1, "jobs:registry: {missing}"),
            ("list empty.py", 1, "{here}/empty.py: no jobs of {bgjob} there; decorate functions with its @job"),
            ("list heapq.py", 1, "{heapq}: no jobs of {bgjob} there; decorate functions with its @job"),
            ("run work.py --jobs purge,fial", 1, "jobs=['fial']: no such job; {known}"),
            ("run work.py --jobs x", 1, "jobs=['x']: no such job; {known}"),
            ("run work.py --drain 5x", 2, "argument --drain: '5x' is no duration; write 90, 30s or 1h30m; see bgjob run --help"),
            ("run work.py --store sqlite:///no/x.db", 1,
             "SQLiteStore('no/x.db'): unable to open database file; its folder must exist and be writable"),
            ("run work.py --store sqlite:///x.db?lease=3q", 1,
             "lease='3q': not a duration; write seconds (90), a timedelta, or text such as '30s' or '1h30m'"),
            ("submit work.py send_mial --store sqlite:///x.db", 1, "job 'send_mial': no such job; there is send_mail"),
            ("submit work.py send_mail --store sqlite:///x.db", 1, "job 'send_mail': missing a required argument: 'to'"),
            ("submit work.py send_mail --store sqlite:///x.db --args [1,2,3]", 1, "job 'send_mail': too many positional arguments"),
            ("submit work.py send_mail --store sqlite:///x.db --args {", 2,
             """argument --args: no JSON object or array; write '{{"to": "a@b.c"}}' or '["a@b.c"]'; see bgjob submit --help"""),
            ("submit work.py send_mail --store sqlite:///x.db --args 5", 2,
             """argument --args: no JSON object or array; write '{{"to": "a@b.c"}}' or '["a@b.c"]'; see bgjob submit --help"""),
            ("submit work.py send_mail", 2, "the following arguments are required: --store; see bgjob submit --help"),
            ("status --store sqlite:///typo.db", 1,
             "SQLiteStore('typo.db'): no such file in {here}; the first run() or submit makes it"),
            ("status --store sqlite://u:se@cret@h/x", 1,
             "store='sqlite://…@h/x': write sqlite:///jobs.db, or sqlite:////var/lib/jobs.db where absolute"),
            ("status --store sqlite:///x.db redis://:se/cret@h", 2,
             "unrecognized arguments: redis://…@h; see bgjob --help"),
        ],
    )  # fmt: skip
    def test_mistakes(self, folder: Folder, arguments: str, status: int, message: str) -> None:
        """A user's mistake is one line on stderr that says what to write instead; a password isn't in it."""
        folder.write("empty.py", "")
        folder.write("heapq.py", "")
        missing = f"not found in {folder.path}; write a module (app.jobs) or a path (jobs.py)"
        known = "the registered ones are: purge, send_mail, fail, again, sleep, stay"
        wanted = message.format(
            known=known, here=folder.path, heapq=heapq.__file__, bgjob=bgjob.__file__, missing=missing
        )
        assert folder.bgjob(*arguments.split()) == (status, "", f"bgjob: {wanted}\n")
        assert not (folder.path / "x.db").exists()

    @pytest.mark.parametrize(
        ("source", "lines", "last"),
        [
            ("def f():\n    raise ValueError('boom')\nf()", 2, "ValueError: boom"),
            ("import nosuchthing", 1, "ModuleNotFoundError: No module named 'nosuchthing'"),
            ("from bgjob import job\n@job(cron='61 * * * *')\ndef f(): ...", 1,
             "ScheduleError: job 'f': cron='61 * * * *': minute must be 0-59, got 61"),
            ("import sys\nsys.exit(3)", 1, "SystemExit: 3; put what it runs under if __name__ == '__main__':"),
            ("def (", 1, "SyntaxError: invalid syntax (broken.py, line 1)"),
        ],
    )  # fmt: skip
    def test_broken_target(self, folder: Folder, source: str, lines: int, last: str) -> None:
        """A module that fails to import shows its own traceback, without a line of ours, and one line that says so."""
        folder.write("broken.py", source)
        status, out, err = folder.bgjob("list", "broken.py")
        assert (status, out) == (1, "")
        assert err.splitlines()[-1] == f"bgjob: broken.py: its import failed: {last}"
        files = re.findall(r'File "(.*?)"', err)
        assert files == [str(folder.path / "broken.py")] * lines

    def test_help(self, folder: Folder) -> None:
        """`bgjob --help` is a page of 80 columns with every command; each command has its own."""
        page = folder.data("--help")
        assert [line for line in page.splitlines() if len(line) > 80] == []
        for name in ("run", "list", "submit", "status", "cancel"):
            assert re.search(rf"^    {name} +[A-Z]", page, re.MULTILINE)
            assert folder.data(name, "--help").startswith(f"usage: bgjob {name} ")
        assert folder.data("--version") == f"bgjob {bgjob.__version__}\n"

    @pytest.mark.skipif(sys.platform == "win32", reason="no SIGPIPE there")
    def test_closed_pipe(self, folder: Folder) -> None:
        """`| head` ends it without a word."""
        ours, theirs = os.pipe()
        os.close(ours)
        for arguments in (["list", "jobs.py"], ["--help"]):
            done = subprocess.run([*COMMAND, *arguments], cwd=folder.path, env=environment(), stdout=theirs,
                                  stderr=subprocess.PIPE, timeout=30, check=False)  # fmt: skip
            assert done.stderr == b""
        os.close(theirs)

    @pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
    def test_a_service(self, folder: Folder) -> None:
        """Submit, status, cancel and run beside each other: what is printed, and the exit status of each."""
        with folder.running("work.py", *STORE, "--drain", "1") as process:
            sleeping = folder.data("submit", "work.py", "sleep", *STORE)
            assert re.fullmatch(r"[0-9a-f-]{36}\n", sleeping)
            sleeping = sleeping.strip()
            later = folder.data("submit", "work.py", "send_mail", "--args", '["a"]', "--after", "1h", *STORE).strip()
            again = folder.data("submit", "work.py", "again", *STORE).strip()
            mail = ("submit", "work.py", "send_mail", "--args", '{"to": "a@b.c", "n": 3}', "--wait", *STORE)
            assert json.loads(folder.data(*mail)) == {"to": "a@b.c", "n": 3}
            status, out, err = folder.bgjob("submit", "work.py", "fail", "--wait", *STORE)
            assert (status, out) == (1, "")
            assert re.fullmatch(r"bgjob: run '[0-9a-f-]{36}' failed: ValueError: no such user\n", err)

            (running,) = folder.until("running", 1)
            assert (running["id"], running["attempt"], running["timeout"]) == (sleeping, 1, 300.0)
            assert str(running["owner"]).split(":")[1] == str(process.pid)
            (retry,) = folder.until("retrying", 1)
            assert (retry["id"], retry["error"]) == (again, "OSError: 503")
            (failed,) = folder.until("failed", 1)
            assert failed["error"] == "ValueError: no such user"
            tick, call = sorted(folder.until("due", 2), key=lambda row: row["id"] == later)
            assert (tick["job"], call["id"]) == ("purge", later)
            self.check_page(folder.data("status", *STORE), process.pid)

            assert folder.data("cancel", sleeping, *STORE) == f"{sleeping} cancelled on request\n"
            assert folder.data("cancel", later, *STORE) == f"{later} cancelled on request\n"
            assert folder.data("cancel", later, *STORE) == f"{later} cancelled on request\n"
            refused = f"bgjob: run '{failed['id']}' has failed already; there is nothing to cancel\n"
            assert folder.bgjob("cancel", str(failed["id"]), *STORE) == (1, "", refused)
            unknown = "bgjob: run 'nope': the store knows no such run; bgjob status shows ids\n"
            assert folder.bgjob("cancel", "nope", *STORE) == (1, "", unknown)
            process.send_signal(signal.SIGTERM)
            _, log = process.communicate(timeout=20)
            assert process.returncode == 0
        assert "\x1b" not in log
        assert re.search(
            r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO    send_mail \S+ succeeded in [\d.]+ s$", log, re.MULTILINE
        )
        assert re.search(r"ERROR   fail \S+ failed at attempt 1: ValueError: no such user$", log, re.MULTILINE)

    def check_page(self, page: str, pid: int) -> None:
        assert max(map(len, page.splitlines())) <= 80
        assert "second line" not in page
        text = " ".join(page.split())
        assert re.search(
            rf"RUNNING 1 \ds [01]% of 5m sleep \S+, attempt 1 on \S+:{pid} since \S+T\d\d:\d\d:\d\dZ ", text
        )
        assert re.search(r"DUE 2 in [\dhms]+ \S+Z ", text)
        assert re.search(r"RETRYING 1 in (1h|59m\d+s) after attempt 1 again \S+ OSError: 503", text)
        assert re.search(r"FAILED 1 \d+s ago at attempt 1 fail \S+ ValueError: no such user$", text)

    @pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
    def test_second_signal(self, folder: Folder) -> None:
        """A second Ctrl-C cancels what is going, and the exit status tells."""
        with folder.running("work.py", *STORE) as process:
            folder.data("submit", "work.py", "sleep", *STORE)
            folder.until("running", 1)
            process.send_signal(signal.SIGINT)
            assert process.stderr is not None
            assert "draining 1 runs, at most 20 s" in process.stderr.readline()
            process.send_signal(signal.SIGINT)
            assert "handed back" in process.communicate(timeout=10)[1]
            assert process.returncode == 130

    @pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
    def test_what_would_not_stop(self, folder: Folder) -> None:
        """A task that swallows every cancellation is named, and then left with the process."""
        with folder.running("work.py", *STORE, "--drain", "0") as process:
            folder.data("submit", "work.py", "stay", *STORE)
            folder.until("running", 1)
            process.send_signal(signal.SIGINT)
            log = process.communicate(timeout=20)[1]
            assert "would not stop" in log
            assert process.returncode == 0

    def test_failed_start(self, folder: Folder) -> None:
        """A dependency that can't be made is a failed start: its traceback, and 1."""
        folder.write("app.py", "from bgjob import Depends, job\ndef db(): raise OSError('no database')\n"
                               "@job\nasync def f(d=Depends(db, scope='app')): ...")  # fmt: skip
        status, out, err = folder.bgjob("run", "app.py")
        assert (status, out) == (1, "")
        assert err.splitlines()[-1] == "OSError: no database"

    @pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
    def test_interrupted_wait(self, folder: Folder) -> None:
        """Ctrl-C ends the wait and not the run, and says so."""
        command = [*COMMAND, "submit", "work.py", "fail", "--wait", *STORE]
        process = subprocess.Popen(command, cwd=folder.path, env=environment(), stderr=subprocess.PIPE, text=True)
        while not (folder.path / "jobs.db").exists():
            time.sleep(0.02)
        (run,) = folder.until("due", 1)
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=10)[1]
        assert (process.returncode, err) == (
            130,
            f"bgjob: run {run['id']} goes on; to end it: bgjob cancel {run['id']}\n",
        )

    def test_unreachable(self, folder: Folder) -> None:
        """A locked file is one line, after a bounded time."""
        folder.data("submit", "work.py", "fail", *STORE)
        with closing(sqlite3.connect(folder.path / "jobs.db", isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            begun = time.monotonic()
            status, out, err = folder.bgjob("status", *STORE)
            assert time.monotonic() - begun < 8
        assert (status, out) == (1, "")
        assert err == "bgjob: store sqlite:///jobs.db unreachable: no answer in 5 s; it may be down, or locked\n"

    def test_no_answer(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        """A server that takes the connection and says nothing is one line, without the password."""

        class Silent:
            async def open(self, owner: str, hint: object) -> None:
                await asyncio.sleep(600)

            async def close(self) -> None: ...

            lease = poll = 1000

        monkeypatch.setattr(bgjob, "_store_of", lambda url: Silent())
        monkeypatch.setattr(bgjob, "_PATIENCE", 0.1)
        assert bgjob.main(["status", "--store", "redis://:secret@h"]) == 1
        assert capsys.readouterr() == (
            "",
            "bgjob: store redis://…@h unreachable: no answer in 0.1 s; it may be down, or locked\n",
        )
