"""Background jobs for asyncio services, in one file: cron for your app that stays correct.

    import asyncio
    from bgjob import job, run

    @job(every="5m", retries=3, retry_delay="30s")
    async def sync_products(): ...

    if __name__ == "__main__":
        asyncio.run(run())

The map. A room uses only rooms above it; go to one by searching for its banner, "# 3 Schedules".

     0 Door          imports, `__all__`, the type of a duration, the logger
     1 Errors        the family; each message gives the job, the value seen and the remedy
     2 Time          durations, instants, the clock and the virtual loop: the only place that reads a clock
     3 Schedules     (schedule, after) -> ticks; cron and the daylight-saving rule
     4 Retries       whether a failed attempt is tried again, and when
     5 Runs          `State`, `Run`, `current_run`, and the log line of every outcome
     6 Dependencies  `Depends`: checked at the decorator, made for an attempt, cleaned up after it
     7 Jobs          `Job`: every argument of the decorator checked once; submit, cancel, next_ticks
     8 Store         `Store`: what the engine needs of a store that several processes share
     9 Engine        one object per `run()`: wait, admit, execute, settle, drain
    9b Sharing       the same beside other instances, with a store between them
    10 Adapters      `SQLiteStore`, `PostgresStore`, `RedisStore`
    11 Registry      `Registry` and the default one, whose bound methods are `job`, `run`, `running`, `simulate`
    12 Command line  `main`: `bgjob run | list | submit | status | cancel`

Durations are everywhere the same: seconds (int or float), a `timedelta`, or text such as "30s",
"1h30m", "250ms", "2d". Ticks, the scheduled instants of a job, are whole milliseconds in UTC.
"""

# pyright: reportPrivateUsage=false
# One file is one unit: its rooms see each other's underscores, its users don't.

# 0 Door ---------------------------------------------------------------------------------------------------------------
# Nothing below starts a thread, a loop or a handler at import; croniter, zoneinfo and json wait until they are used.

from __future__ import annotations

import asyncio
import functools
import heapq
import importlib
import inspect
import itertools
import logging
import math
import opcode
import os
import re
import selectors
import signal
import sys
import threading
import time
import traceback
from bisect import bisect_left
from collections import Counter, OrderedDict, deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import AsyncExitStack, asynccontextmanager, closing, contextmanager, suppress
from contextvars import ContextVar, copy_context
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from enum import StrEnum
from types import FrameType, MappingProxyType, ModuleType
from typing import (
    TYPE_CHECKING,
    Any,
    Final,
    Generic,
    Literal,
    NamedTuple,
    NoReturn,
    Protocol,
    TextIO,
    TypeAlias,
    cast,
    overload,
)
from weakref import WeakSet, WeakValueDictionary
from zlib import crc32

if TYPE_CHECKING:
    import argparse
    import sqlite3

    from typing_extensions import ParamSpec, TypeVar  # checkers have it; defaults make a bare `Run` a type
else:
    import typing

    def TypeVar(name, *, default=None, covariant=False):  # at run time a default changes nothing
        return typing.TypeVar(name, covariant=covariant)

    def ParamSpec(name, *, default=None):
        return typing.ParamSpec(name)


__version__ = "0.1.0"
__all__ = [
    "BgjobError",
    "Depends",
    "Job",
    "PostgresStore",
    "RedisStore",
    "Registry",
    "Run",
    "RunCancelled",
    "RunFailed",
    "SQLiteStore",
    "ScheduleError",
    "State",
    "Store",
    "StoreError",
    "current_run",
    "job",
    "run",
    "running",
    "simulate",
]

Duration: TypeAlias = float | str | timedelta
P = ParamSpec("P", default=...)
T = TypeVar("T", default=object)
A = TypeVar("A", default=object)
R_co = TypeVar("R_co", covariant=True, default=object)  # what a job's function returns, awaited
C_co = TypeVar("C_co", covariant=True, default=object)  # what calling it returns: a coroutine, or for a plain def R

_log = logging.getLogger("bgjob")


# 1 Errors -------------------------------------------------------------------------------------------------------------
# A message names the job, the value seen and what to write instead.


class BgjobError(Exception):
    """Base of every error that bgjob raises itself."""


class ScheduleError(BgjobError, ValueError):
    """A job's declaration, a duration or an instant is wrong. Raised when the decorator runs, not when the job does."""


class StoreError(BgjobError):
    """A store is missing, unreachable or refuses: nothing was stored."""


class RunFailed(BgjobError):
    """`Run.result()` of a run whose last attempt failed; `__cause__` is the original exception where it is at hand."""


class RunCancelled(BgjobError):
    """`Run.result()` of a run that was cancelled or skipped."""


# 2 Time ---------------------------------------------------------------------------------------------------------------
# Durations and instants as whole milliseconds, and the clocks. No other room reads one; `_spread` is all the jitter.

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MS = timedelta(milliseconds=1)
_UNITS = {"d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1000, "ms": 1}
_CENTURY = 36_525 * _UNITS["d"]
_EARLY = 2  # ms: uvloop's timers fire up to that much before their time, and what is due so soon is due
_JUMP = 0.5  # s between wall and monotonic time: less is the clock being slewed, more is a step or a suspended machine
_SLICE = 30_000  # ms: the longest sleep without comparing the two


def _duration(what: str, value: object, least: int = 0) -> int:
    """Milliseconds, from any form of duration; `what` names the argument in the error."""
    if isinstance(value, str):
        ms = _parse_duration(value)
    elif isinstance(value, timedelta):
        ms = value / _MS
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        ms = max(min(value * 1000, 2 * _CENTURY), -_CENTURY)  # an int may be too large for a float
    else:
        ms = math.nan
    if math.isnan(ms):
        raise ScheduleError(
            f"{what}={value!r}: not a duration; write seconds (90), a timedelta, or text such as '30s' or '1h30m'"
        )
    if not -0.5 < ms <= _CENTURY or round(ms) < least:
        bounds = "more than 100 years" if ms > _CENTURY else "too short" if ms >= 0 else "negative"
        raise ScheduleError(f"{what}={value!r}: {bounds}; write a duration of {_least(least)}, for instance '30s'")
    return round(ms)


def _least(ms: int) -> str:
    return "at least 1 ms" if ms else "0 or more"


def _parse_duration(text: str) -> float:
    """Milliseconds; NaN where it is none. The largest unit comes first and each at most once: '1h30m', '1.5h'."""
    pattern = r"\s*".join(rf"(?:([0-9]+(?:\.[0-9]+)?)\s*{unit})?" for unit in _UNITS)
    match = re.fullmatch(pattern, text.strip())
    if match is None or not any(match.groups()):
        return math.nan
    return sum(float(number) * scale for number, scale in zip(match.groups(), _UNITS.values(), strict=True) if number)


def _span(ms: float) -> str:
    return f"{ms / 1000:,.3f}".rstrip("0").rstrip(".") + " s"


def _aware(ms: int, zone: tzinfo = UTC) -> datetime:
    return (_EPOCH + ms * _MS).astimezone(zone)


def _to_ms(what: str, when: object) -> int:
    """Milliseconds since the epoch; a naive datetime is refused, for it means another instant on another machine."""
    if not isinstance(when, datetime) or when.utcoffset() is None:
        raise ScheduleError(f"{what}={when!r}: needs an aware datetime, for instance datetime.now(UTC)")
    return (when - _EPOCH) // _MS


@functools.lru_cache(maxsize=16)  # where a thousand jobs are due in one second
def _iso(ms: int) -> str:
    text = (_EPOCH + ms * _MS).isoformat(timespec="milliseconds" if ms % 1000 else "seconds")
    return text[: -len("+00:00")] + "Z"


def _spread(text: str, upto: int) -> int:
    """A number in [0, upto) that depends on the text alone, so that all instances and all replays agree."""
    return crc32(text.encode()) * upto >> 32


class _Clock:
    """What one engine knows of time: `mono` to wait and to measure, `wall` for schedules, both in seconds."""

    slice: float = _SLICE
    virtual = False

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        # asyncio's own loops read time.monotonic; called without their detour, for every run asks three times.
        plain = type(loop).time is asyncio.BaseEventLoop.time
        self.mono: Callable[[], float] = time.monotonic if plain else loop.time
        self.wall: Callable[[], float] = time.time

    def entropy(self) -> int:
        return int.from_bytes(os.urandom(8), "big")


def _wall_ms() -> int:
    return int(time.time() * 1000)


class _VirtualClock(_Clock):
    """Wall time that moves with a virtual loop, and ids that are the same in every replay."""

    slice = math.inf
    virtual = True

    def __init__(self, loop: asyncio.AbstractEventLoop, start: float) -> None:
        super().__init__(loop)
        self.wall = lambda: start + self.mono()

    def entropy(self) -> int:
        return 0


class _VirtualSelector(selectors.DefaultSelector):
    """Never waits while there is a timer to jump to."""

    elapsed = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(None if timeout is None else 0)
        if timeout and not events:
            self.elapsed += timeout
        return events


class _VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in which waiting costs nothing: with nothing ready, its clock jumps to the next timer.

    asyncio takes a timer as due within the clock's resolution. The usual 1e-9 vanishes in a float after
    2**24 seconds, and the loop would spin for ever before a timer that it can't reach: hence 1e-6, from 0.
    """

    def __init__(self) -> None:
        self._virtual = _VirtualSelector()
        super().__init__(self._virtual)
        self._clock_resolution = 1e-6

    def time(self) -> float:
        return self._virtual.elapsed


# 3 Schedules ----------------------------------------------------------------------------------------------------------
# Pure: (schedule, after) -> next ticks. No clock, no I/O. Instants are milliseconds since the epoch, UTC; a *wall* is a
# naive reading of a clock in some zone. croniter walks over walls, the daylight-saving rule maps them to instants here.


class _Field(NamedTuple):
    """A field of a cron line; `size` values make it come round, so that 7 is Sunday again."""

    name: str
    low: int
    high: int
    size: int
    names: tuple[str, ...] = ()

    def value(self, text: str, item: str) -> int:
        """The number or name `text`, a part of `item`."""
        if text in self.names:
            return self.low + self.names.index(text)
        if text.isdigit() and self.low <= int(text) <= self.high:
            return int(text)
        names = f" or {self.names[0]}-{self.names[-1]}" if self.names else ""
        raise ScheduleError(
            f"{self.name} must be {self.low}-{self.high}{names}, got {_seen(text if text.isdigit() else item)}"
        )

    def step(self, text: str, item: str) -> int:
        if text.isdigit() and 1 <= int(text) <= self.size:
            return int(text)
        raise ScheduleError(f"step of {self.name} must be 1-{self.size}, got {_seen(text if text.isdigit() else item)}")

    def around(self, value: int) -> int:
        return self.low + (value - self.low) % self.size


_MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
_WEEKDAYS = ("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT")
_DAY = _Field("day of month", 1, 31, 31)
_MONTH = _Field("month", 1, 12, 12, _MONTHS)
_WEEKDAY = _Field("day of week", 0, 7, 7, _WEEKDAYS)
_FIELDS = (_Field("second", 0, 59, 60), _Field("minute", 0, 59, 60), _Field("hour", 0, 23, 24), _DAY, _MONTH, _WEEKDAY)
_ALIASES = {
    "@YEARLY": "0 0 1 1 *",
    "@ANNUALLY": "0 0 1 1 *",
    "@MONTHLY": "0 0 1 * *",
    "@WEEKLY": "0 0 * * 0",
    "@DAILY": "0 0 * * *",
    "@MIDNIGHT": "0 0 * * *",
    "@HOURLY": "0 * * * *",
}
_REFUSED_ALIASES = {
    "@REBOOT": "is no schedule; use immediate=True with a schedule, or after='1s' alone",
    "@EVERY": "is spelled every= here, as in every='5m'",
}
_REFUSED_LETTERS = {
    "R": "random fields (R) are another schedule in each instance; name the value and use jitter=",
    "H": "hashed fields (H) are not supported; name the value and use jitter=",
}
_LAYOUT = "5 fields (minute, hour, day of month, month, day of week), 6 with seconds first, or an alias like @daily"
_LONGEST = 1000  # every value of every field spelled out takes 535 characters
_DAYS_IN_MONTH = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


def _seen(text: str) -> str:
    """A wrong value as a message shows it: numbers bare, all else quoted, nothing endless."""
    return f"{text:.40}" if text.isdigit() else f"{text!r:.40}"


def _split(text: object) -> list[str]:
    """Cut a cron text, in any case, into six fields, seconds first."""
    if not isinstance(text, str):
        raise ScheduleError("must be text such as '*/5 * * * *'")
    if len(text) > _LONGEST or not text.isascii():
        raise ScheduleError(f"must be plain ASCII of at most {_LONGEST} characters, such as '*/5 * * * *'")
    fields = text.upper().split()
    if fields and fields[0].startswith("@"):
        return _split(_alias(fields))
    if len(fields) == 7:
        raise ScheduleError(f"must be {_LAYOUT}; got 7, and a year field is not supported")
    if len(fields) not in (5, 6):
        raise ScheduleError(f"must be {_LAYOUT}; got {len(fields)}")
    return fields if len(fields) == 6 else ["0", *fields]


def _alias(fields: list[str]) -> str:
    name = fields[0]
    if name in _REFUSED_ALIASES:
        raise ScheduleError(f"{name.lower()} {_REFUSED_ALIASES[name]}")
    if name not in _ALIASES or len(fields) > 1:
        raise ScheduleError(f"must be one of {' '.join(_ALIASES).lower()}, alone, or 5 or 6 fields")
    return _ALIASES[name]


def _values(field: _Field, text: str) -> set[str]:
    """Spell a field out in croniter's words, so that it has no range, step or name left to misread."""
    if text == "?" and field in (_DAY, _WEEKDAY):
        text = "*"
    items = text.split(",")
    if "" in items:
        raise ScheduleError(f"{field.name} has an empty item in {_seen(text)}; remove the comma")
    refused = next((item[0] for item in items if item[0] in _REFUSED_LETTERS), None)
    if refused:
        raise ScheduleError(f"{_REFUSED_LETTERS[refused]}; got {_seen(text)}")
    return {value for item in items for value in _special(field, item) or _plain(field, item)}


def _plain(field: _Field, item: str) -> set[str]:
    """Values of `*`, `5`, `5-9` or `22-2`, each with a step if wanted.

    As for croniter and cronie, `5/15` goes on to the field's end, which is Saturday for a day of the week.
    """
    span, slash, step = item.partition("/")
    stride = field.step(step, item) if slash else 1
    low, dash, high = span.partition("-")
    end = field.low + field.size - 1
    first = field.low if span == "*" else field.value(low, item)
    last = field.value(high, item) if dash else end if slash or span == "*" else first
    if first > last:  # 22-2 goes round midnight, and its step is counted on from 22
        last += field.size
    return {str(field.around(value)) for value in range(first, last + 1, stride)}


def _special(field: _Field, item: str) -> set[str]:
    """The forms of Quartz and Cronos for days: `L`, `LW`, `15W`, `FRIL` and `FRI#2`."""
    if field is _DAY and item in ("L", "LW"):
        return {item}
    if field is _DAY and item.endswith("W"):
        return {f"{field.value(item[:-1], item)}W"}
    if field is not _WEEKDAY:
        return set()
    day, mark, nth = item.partition("#")
    if mark and nth not in tuple("12345"):
        raise ScheduleError(f"day of week takes #1 to #5, got {_seen(item)}")
    if mark:
        return {f"{field.around(field.value(day, item))}#{nth}"}
    return {f"L{field.around(field.value(item[:-1], item))}"} if item[1:].endswith("L") else set()


def _days(fields: list[str], days: set[str], months: set[str], weekdays: set[str]) -> tuple[set[str], set[str], bool]:
    """Settle the two day fields: what each allows, and whether either is enough or both must match.

    Debian's cron: either, unless one of the two starts with a star. croniter finds that out from the values, not from
    the text, and can't do it at all with `#`, `L` and `W`.
    """
    either = not any(text.startswith(("*", "?")) for text in (fields[3], fields[5]))
    marked = {value for value in days | weekdays if not value.isdigit() and value != "L"}
    if either and marked:
        raise ScheduleError(f"{fields[3]!r} and {fields[5]!r} can't be either-or with #, L or W; stack a @job for each")
    if (marked & days and len(days) > 1) or (marked & weekdays and not weekdays <= marked):
        raise ScheduleError(f"{fields[3]!r} or {fields[5]!r} mixes #, L or W with others; stack a @job for each")
    longest = max(_DAYS_IN_MONTH[int(month) - 1] for month in months)
    if either and (len(weekdays) == 7 or len(days - {"L"}) == 31):
        return {"*"}, {"*"}, False
    if either and all(day.isdigit() and int(day) > longest for day in days):
        return {"*"}, weekdays, False  # croniter 6 finds nothing at all where one of the two never comes
    return {_workday(day, months) if day in marked else day for day in days}, weekdays, either


def _workday(day: str, months: set[str]) -> str:
    """croniter moves `31W` to the last working day of a short month, where Quartz has none: there only as `LW`."""
    shortest = min(_DAYS_IN_MONTH[int(month) - 1] - (month == "2") for month in months)
    if day == "LW":
        return "31W"
    if int(day[:-1]) > shortest:
        raise ScheduleError(f"day of month {day} does not exist in every month; use LW for the last working day")
    return day


def _spell(text: object) -> tuple[str, bool, bool]:
    """Read a cron text: croniter's expression, whether either day is enough, whether the schedule is wild."""
    fields = _split(text)
    second, minute, hour, days, months, weekdays = map(_values, _FIELDS, fields)
    days, weekdays, either = _days(fields, days, months, weekdays)
    spelled = [
        "*" if len(values) == field.size and all(map(str.isdigit, values)) else ",".join(sorted(values))
        for field, values in zip(_FIELDS, (second, minute, hour, days, months, weekdays), strict=True)
    ]
    if spelled[0] == "0":
        del spelled[0]  # croniter is a third faster without seconds
    if spelled[-1] == "*":
        spelled[-1] = "?"  # beside a star here, croniter takes any 31 days for the whole month, be one of them L or not
    return " ".join(spelled), either, fields[1].startswith("*") or fields[2].startswith("*")


_FIRST = (datetime(1, 1, 4, tzinfo=UTC) - _EPOCH) // _MS  # leaves room to step back a day in any zone
_FOUR_CENTURIES = timedelta(days=146_097)
# croniter found nothing within 50 years, or someone met the end of the year 9999 or of what the C library can read.
_NO_MORE = (ValueError, OverflowError, OSError)
_FARTHEST_JUMP = timedelta(hours=3)


class _Local(tzinfo):
    """The machine's own zone, as the C library knows it: the only form that needs no zone database on any system."""

    def utcoffset(self, when: datetime | None) -> timedelta | None:
        if when is None:
            return None
        # timestamp() and not astimezone(): in a gap the latter has the two folds the wrong way round.
        wall = when.replace(tzinfo=None, microsecond=0)
        return wall.replace(tzinfo=UTC) - _EPOCH - timedelta(seconds=wall.timestamp())

    def fromutc(self, when: datetime) -> datetime:
        instant = when.replace(tzinfo=UTC)
        wall = instant.astimezone().replace(tzinfo=None)
        return wall.replace(tzinfo=self, fold=wall.timestamp() != instant.timestamp())

    def dst(self, when: datetime | None) -> timedelta | None:
        return None

    def tzname(self, when: datetime | None) -> str | None:
        return "local" if when is None else when.replace(tzinfo=None).astimezone().tzname()

    def __repr__(self) -> str:
        return "local"


def _zone(tz: object) -> tzinfo:
    """The zone meant by `tz`: an IANA name, "local" or a tzinfo; "UTC" needs neither zoneinfo nor its database."""
    if hasattr(tz, "localize"):  # a pytz zone ignores fold, by which the two passes of an overlap are told apart
        tz = str(tz)
    if tz == "UTC":
        return UTC
    if tz == "local":
        return _Local()
    if isinstance(tz, tzinfo):
        try:
            _reading(0, tz)  # an unfinished tzinfo shows here, not as a schedule that never matches
        except Exception as error:
            raise ScheduleError(f"tz={tz!r}: gives no offset from UTC ({error}); write an IANA name") from error
        return tz
    if not isinstance(tz, str):
        raise ScheduleError(f"tz={tz!r}: must be an IANA name such as 'Europe/Rome', 'local' or a tzinfo")
    import zoneinfo

    try:
        return zoneinfo.ZoneInfo(tz)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):  # KeyError, but also paths, folders, endless names
        raise ScheduleError(f"tz={_seen(tz)}: {_remedy(tz, zoneinfo.available_timezones())}") from None


def _remedy(tz: str, known: set[str]) -> str:
    if not known:
        return "there is no zone database here; pip install tzdata"
    import difflib

    names = {name.lower(): name for name in known}
    close = difflib.get_close_matches(tz[:40].lower(), names, n=1, cutoff=0.8)
    if close:
        return f"unknown time zone; did you mean {names[close[0]]!r}?"
    return "unknown time zone; use an IANA name such as 'Europe/Rome', 'local' or a tzinfo"


def _reading(instant: int, zone: tzinfo) -> datetime:
    """The wall at an instant."""
    return (_EPOCH + instant * _MS).astimezone(zone).replace(tzinfo=None, fold=0)


def _instant(wall: datetime, zone: tzinfo, fold: int = 0) -> int:
    """The instant at which clocks show `wall`; the two ways to read a wall differ by `fold` (PEP 495)."""
    return (wall.replace(tzinfo=zone, fold=fold) - _EPOCH) // _MS


class _Walker(Protocol):
    """What is used of a croniter."""

    def set_current(self, start_time: datetime) -> float: ...
    def get_next(self, ret_type: type[datetime]) -> datetime: ...


def _walker(expression: str, either: bool) -> _Walker:
    try:
        module = importlib.import_module("croniter")
    except ModuleNotFoundError as error:
        raise ScheduleError("needs croniter; pip install croniter") from error
    # A naive start, always: with aware ones croniter up to 6.0 and from 6.1 on give different schedules, both wrong.
    walker: _Walker = module.croniter(expression, datetime(2000, 1, 1), day_or=either, second_at_beginning=True)
    return walker


class _Cron:
    """The schedule of a cron text in a zone: `wild` if its minute or hour starts with a star, else fixed.

    At changes of the clock the rule is that of Debian's cron(8), and of Cronos where the two agree: a wild one keeps to
    the readings, a fixed one neither fails to run for a jump of up to three hours nor runs twice when readings repeat.
    """

    __slots__ = ("_parsed", "text", "wild", "zone")

    def __init__(self, text: str, zone: tzinfo) -> None:
        self.text: str = text
        self.zone: tzinfo = zone
        self.wild: bool
        try:
            expression, either, self.wild = _spell(text)
            self._parsed = _walker(expression, either)
            if next(self.ticks(0), None) is None:
                raise ScheduleError("never matches: none of its months has such a day; L is the last one")
        except ScheduleError as error:
            raise ScheduleError(f"cron={text!r:.200}: {error}") from error.__cause__

    def ticks(self, after: int) -> Iterator[int]:
        """The ticks later than `after`, in order, up to the calendar's end in the year 9999."""
        after = max(after, _FIRST)
        with suppress(*_NO_MORE):
            for tick in self._wild(after) if self.wild else self._fixed(after):
                if tick > after:  # else a repeat, or from before the start
                    after = tick
                    yield tick

    def _walls(self, start: datetime) -> Iterator[datetime]:
        """Walls after `start` that match."""
        import copy

        # The calendar repeats after 400 years to the weekday: croniter always begins within 2000-2399, since it can't
        # start before 1970 on Windows.
        shift = _FOUR_CENTURIES * (start.year // 400 - 5)
        walker = copy.copy(self._parsed)
        walker.set_current(start - shift)
        while True:
            yield walker.get_next(datetime) + shift

    def _fixed(self, after: int) -> Iterator[int]:
        """Each wall once: at the first of two passes, or where it is jumped over, right after the jump."""
        for wall in self._walls(_reading(after, self.zone)):
            tick = _instant(wall, self.zone)
            jump = abs(_reading(tick, self.zone) - wall)
            if not jump:
                yield tick
            elif jump <= _FARTHEST_JUMP:
                near = range(tick - jump // _MS, tick + jump // _MS + 1)
                yield near[bisect_left(near, wall, key=lambda instant: _reading(instant, self.zone))]

    def _wild(self, after: int) -> Iterator[int]:
        """Each instant that reads as one of the walls."""
        start = _reading(after, self.zone)
        fall = start + timedelta(days=1) - _reading(after + _UNITS["d"], self.zone)
        walls = self._walls(start - max(fall, timedelta(0)))
        if isinstance(self.zone, timezone):
            return (_instant(wall, self.zone) for wall in walls)
        return heapq.merge(*(self._pass(walls, fold) for fold, walls in enumerate(itertools.tee(walls))))

    def _pass(self, walls: Iterator[datetime], fold: int) -> Iterator[int]:
        for wall in walls:
            tick = _instant(wall, self.zone, fold)
            if _reading(tick, self.zone) == wall:
                yield tick


class _Every:
    """The grid start + n * every, n >= 1, in milliseconds."""

    __slots__ = ("every", "start")

    def __init__(self, every: int, start: int = 0) -> None:
        self.every: int = every
        self.start: int = start

    def ticks(self, after: int) -> Iterator[int]:
        return itertools.count(self.start + self.every * max(1, (after - self.start) // self.every + 1), self.every)


_interval = functools.lru_cache(_Every)  # thousands of jobs have few different intervals
_Schedule = _Every | _Cron


def _newest(schedule: _Schedule, after: int, upto: int) -> int | None:
    """The last tick later than `after` and not later than `upto`, at the same cost however far apart they are."""
    if isinstance(schedule, _Every):
        newest = upto - (upto - schedule.start) % schedule.every
        return newest if newest > max(after, schedule.start) else None
    last: int | None = None
    while after < upto:
        middle = (after + upto) // 2
        tick = next(schedule.ticks(middle), None)
        if tick is None or tick > upto:
            upto = middle
        else:
            last = after = tick
    return last


def _count(schedule: _Schedule, first: int, last: int, limit: int = 100) -> int:
    """How many ticks lie in [first, last]; those of a cron are counted one by one, up to `limit`."""
    ticks = schedule.ticks(first - 1)
    if isinstance(schedule, _Every):
        return max(0, (last - next(ticks)) // schedule.every + 1)
    return sum(1 for _ in itertools.takewhile(lambda tick: tick <= last, itertools.islice(ticks, limit)))


# 4 Retries ------------------------------------------------------------------------------------------------------------
# Pure: what the end of an attempt means, and how long to wait before the next.

RetryDelay: TypeAlias = Duration | Callable[[int], Duration]
RetryOn: TypeAlias = type[BaseException] | tuple[type[BaseException], ...] | Callable[[BaseException], bool]
_MAX_LOST = 3


def _verdict(tries: int, lost: int, retries: int, on_crash: str) -> Literal["run", "fail"]:
    """Whether a run may be tried again after `tries` attempts have ended, `lost` of them with their process.

    A lost attempt is no failure of the job, so it uses up no retry; but a job that kills its process three
    times, or one that must run at most once (`on_crash="drop"`), is not given another to kill.
    """
    if lost > _MAX_LOST or (lost and on_crash == "drop"):
        return "fail"
    return "run" if tries - lost <= retries else "fail"


def _retry_delay(value: RetryDelay) -> Callable[[int, str], int]:
    """`(number of the retry, from 1; text to spread by) -> ms`, from any form of `retry_delay`."""
    if inspect.iscoroutinefunction(value):
        raise ScheduleError(f"retry_delay={value!r}: nothing would await it; write a plain function")
    if callable(value):
        function = value
        return lambda retry, text: _duration("retry_delay", function(retry))
    first, dots, last = value.partition("..") if isinstance(value, str) else (value, "", "")
    if not dots:
        fixed = _duration("retry_delay", value)
        return lambda retry, text: fixed
    try:
        low, high = _duration("retry_delay", first, 1), _duration("retry_delay", last, 1)
    except ScheduleError:
        raise ScheduleError(f"retry_delay={value!r}: write two durations of at least 1 ms, such as '1s..5m'") from None
    if low > high:
        raise ScheduleError(f"retry_delay={value!r}: begins longer than it ends; write '{last}..{first}'")
    return functools.partial(_doubling, low, high)


def _doubling(low: int, high: int, retry: int, text: str) -> int:
    """Doubles from `low` to `high`; spread over the upper half: what failed together shouldn't return together."""
    top = min(low << min(retry - 1, 40), high)
    return top // 2 + _spread(text, top - top // 2 + 1)


# 5 Runs ---------------------------------------------------------------------------------------------------------------
# One execution of a job: its facts, its handle, and what the log says when it ends.


class State(StrEnum):
    """Where a run is. The same words stand in logs, reprs, errors and stores."""

    SCHEDULED = "scheduled"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    SKIPPED = "skipped"


_SCHEDULED, _RUNNING, _SUCCEEDED, _FAILED, _CANCELLED, _SKIPPED = State


class _Stop(StrEnum):
    """Why a run is stopped: written on it before its task is cancelled, and the words of `Run.reason`."""

    CANCEL = "cancelled on request"
    TIMEOUT = "timeout"
    SHUTDOWN = "run() stopped"
    REMOVED = "job removed"
    LEASE = "lease lost"
    CRASH = "its process died"

    __repr__ = str.__repr__  # users see a text


def _tick_id(job: str, at: int) -> str:
    return f"{job}@{_iso(at)}"


class _Owner(Protocol):
    """What a run asks of the engine that it belongs to."""

    async def cancel(self, run: Run) -> bool: ...
    async def ended(self, run: Run, timeout: float | None) -> None: ...


_NOT_KEPT = object()  # the value of a run whose result stayed elsewhere


class Run(Generic[R_co]):
    """One execution of a job: the handle of whoever submitted it, and the context of the function that runs.

    Attributes:
        job: the job's name.
        attempt: number of the attempt, from 1; 0 before the first.
        state: what this process last learned.
        args, kwargs: the arguments the function gets, without dependencies.
        key: what was passed as `key=`, else None.
        error: the last failure as one line, such as "ValueError: no such user", else None.
        reason: why the run was cancelled, skipped or cut short, else None.
    """

    # What few runs change is a default of the class: to set it for each would take longer than to start the task.
    args: tuple[object, ...] = ()
    attempt: int = 0
    state: State = _SCHEDULED
    key: str | None = None
    error: str | None = None
    reason: str | None = None
    _id: str | None = None
    _token = 0
    _started: float | None = None  # wall seconds
    _took: float | None = None  # s, by the monotonic clock
    _value: object = None
    _exception: BaseException | None = None
    _done: asyncio.Event | None = None

    def __init__(self, job: str, at: int, kwargs: Mapping[str, object], owner: _Owner) -> None:
        self.job: str = job
        self.kwargs: Mapping[str, object] = kwargs
        self._at = at
        self._owner = owner

    @property
    def id(self) -> str:
        """The run's name, the same at every attempt and on every instance: an idempotency key.

        `job@2026-01-01T00:00:00Z` for a tick, `job#key` for a keyed run, else text that sorts by submission.
        """
        if self._id is None:
            self._id = _tick_id(self.job, self._at)
        return self._id

    @property
    def token(self) -> int:
        """Fencing token: grows with every claim. Without a store it is the attempt's number."""
        return self._token or self.attempt

    @property
    def tick(self) -> datetime:
        """The scheduled or asked-for instant: aware, UTC, equal on every instance and at every attempt."""
        return _aware(self._at)

    @property
    def started_at(self) -> datetime | None:
        """When the current or last attempt started: aware, UTC; None before the first."""
        return None if self._started is None else _aware(round(self._started * 1000))

    @property
    def finished_at(self) -> datetime | None:
        """When the last attempt ended: aware, UTC; None while none has."""
        if self._started is None or self._took is None:
            return None
        return _aware(round((self._started + self._took) * 1000))

    @property
    def late(self) -> float:
        """Seconds from the tick to the start of the current or last attempt; 0.0 before the first."""
        return 0.0 if self._started is None else max(0.0, self._started - self._at / 1000)

    @property
    def duration(self) -> float | None:
        """Seconds that the last attempt took, by the monotonic clock; None while none has ended."""
        return self._took

    async def result(self, timeout: Duration | None = None) -> R_co:
        """Wait for the end of the run, retries included, and return what the function returned.

        Args:
            timeout: how long to wait; None (the default) is for ever.

        Raises:
            RunFailed: the last attempt failed; the cause is the original exception.
            RunCancelled: the run was cancelled or skipped.
            TimeoutError: it hasn't ended within `timeout`. The run itself goes on.
            BgjobError: it ran elsewhere, and its result wasn't JSON or is no longer kept.
            StoreError: it runs elsewhere, and the store gave no answer for 5 s.
        """
        limit = None if timeout is None else _duration("timeout", timeout) / 1000
        await self._owner.ended(self, limit)
        if self._value is _NOT_KEPT:
            raise BgjobError(f"run {self.id!r} succeeded, but its result isn't JSON and stayed where it ran")
        if self.state is _SUCCEEDED:
            return cast(R_co, self._value)
        if self.state is _FAILED:
            raise RunFailed(f"run {self.id!r} failed: {self.error}") from self._exception
        raise RunCancelled(f"run {self.id!r} was {self.state}: {self.reason}")

    async def cancel(self) -> bool:
        """Cancel the run: a scheduled one never starts, a running one gets `CancelledError`, a retry is dropped.

        Returns once the run is signalled; `result()` waits for its end. False if it had already ended.
        """
        return await self._owner.cancel(self)

    def __str__(self) -> str:
        """How the log names it: by its job, also where the id alone doesn't."""
        return self.id if self.id.startswith(self.job) else f"{self.job} {self.id}"

    def __repr__(self) -> str:
        return f"<Run {self} {self.state} attempt={self.attempt}>"


_current: ContextVar[Run] = ContextVar("bgjob.current_run")


def current_run() -> Run:
    """The run of the function that is executing, in plain functions and tasks that it starts too.

    Raises:
        BgjobError: called outside a run.
    """
    run = _current.get(None)
    if run is None:
        raise BgjobError("current_run(): no run is executing here; call it inside a job's function")
    return run


def _summary(error: BaseException) -> str:
    """The error as one line that every store takes; one whose `__str__` raises must not take the engine along."""
    try:
        first = str(error).partition("\n")[0]
        first = first.encode(errors="backslashreplace").decode().replace("\0", r"\0")  # surrogates, as in file names
    except Exception:
        first = "<its str() raises>"
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _log_end(run: Run) -> None:
    """The one line of an ended run: a success is INFO, what was asked for too, the rest can't be overlooked."""
    if run.state is _SUCCEEDED:
        note = f", attempt {run.attempt}" if run.attempt > 1 else ""
        _log.info("%s succeeded in %s%s", run, _span((run._took or 0) * 1000), note)
    elif run.state is _FAILED:
        _log.error("%s failed at attempt %d: %s", run, run.attempt, run.error, exc_info=run._exception)
    elif run.started_at is not None or run.reason != _Stop.SHUTDOWN:  # what never began is one line of the drain's own
        level = logging.INFO if run.reason == _Stop.CANCEL else logging.WARNING
        _log.log(level, "%s %s: %s", run, run.state, run.reason)


# 6 Dependencies -------------------------------------------------------------------------------------------------------
# What a function needs beside its arguments: checked at the decorator, made for an attempt, cleaned up after it.

Scope: TypeAlias = Literal["run", "app"]
Factory: TypeAlias = Callable[..., object]


class _Dependency:
    """The default value that `Depends` leaves in a signature."""

    __slots__ = ("_plan", "factory", "scope")

    def __init__(self, factory: Factory, scope: Scope) -> None:
        self.factory = factory
        self.scope: Scope = scope
        self._plan: _Plan | None = None

    @property
    def plan(self) -> _Plan:
        """What the factory needs in turn; read once, when the decorator asks for it."""
        if self._plan is None:
            self._plan = _Plan(self.factory)
        return self._plan

    def __repr__(self) -> str:
        return f"Depends({_name_of(self.factory)})"


@overload
def Depends(factory: Callable[..., AsyncIterator[T]], scope: Scope = "run") -> T: ...
@overload
def Depends(factory: Callable[..., Iterator[T]], scope: Scope = "run") -> T: ...
@overload
def Depends(factory: Callable[..., Awaitable[T]], scope: Scope = "run") -> T: ...
@overload
def Depends(factory: Callable[..., T], scope: Scope = "run") -> T: ...
def Depends(factory: Factory, scope: Scope = "run") -> object:
    """A dependency, as the default of a parameter: `async def sync(db: Database = Depends(get_db))`.

    Args:
        factory: a function, async function, generator or async generator; what follows its `yield` is the
            clean-up, and runs whatever the outcome. Where the `yield` stands in a `try` or `with`, what the function
            raised is raised there, so that `with transaction(): yield` rolls back. Its own parameters may be
            dependencies. It runs in the event loop, a plain one too.
        scope: "run" (the default): made once per attempt, and cleaned up after it in reverse order, whatever the
            outcome. "app": made when `run()` starts and cleaned up after the last run; it can't need a "run" one.

    Raises:
        ScheduleError: `factory` can't be called or isn't hashable, or `scope` is unknown.
    """
    if not callable(factory):
        raise ScheduleError(f"Depends({factory!r}): not callable; pass the factory itself, without calling it")
    if type(factory).__hash__ is None:
        raise ScheduleError(f"Depends({factory!r}): not hashable, so it couldn't be overridden; wrap it in a function")
    if scope not in ("run", "app"):
        raise ScheduleError(f"Depends({_name_of(factory)}, scope={scope!r}): write 'run' or 'app'")
    return _Dependency(factory, scope)


def _name_of(function: object) -> str:
    return str(getattr(function, "__name__", None) or repr(function))


def _is(kind: Callable[[object], bool], function: Factory) -> bool:
    """Whether a function, or what makes an object callable, is of a kind that inspect knows."""
    return kind(function) or kind(type(function).__call__)


def _is_async(function: Factory) -> bool:
    return _is(inspect.iscoroutinefunction, function)


class _Plan:
    """What a signature says of a function or factory; read once, for inspect is slow."""

    __slots__ = (
        "accepted",
        "any_name",
        "direct",
        "function",
        "is_async",
        "least",
        "most",
        "needs",
        "required",
        "signature",
    )

    def __init__(self, function: Factory) -> None:
        self.function: Callable[..., Awaitable[object]] = cast(Callable[..., Awaitable[object]], function)
        self.is_async: bool = _is_async(function)
        self.signature: inspect.Signature = _signature(function)
        parameters = self.signature.parameters.values()
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        self.any_name: bool = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.accepted: frozenset[str] = frozenset(p.name for p in named if p.kind is not p.POSITIONAL_ONLY)
        self.required: frozenset[str] = frozenset(p.name for p in named if p.default is p.empty)
        self.needs: dict[str, _Dependency] = {p.name: p.default for p in named if isinstance(p.default, _Dependency)}
        self.direct: bool = self.is_async and not self.needs  # called without a detour
        by_place = [p for p in named if p.kind is not p.KEYWORD_ONLY]
        # Arguments without names fit from `least` on up to `most`.
        self.least: int = len(self.required) if self.required.issubset(p.name for p in by_place) else sys.maxsize
        self.most: int = len(by_place)


def _signature(function: Factory) -> inspect.Signature:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # some built-ins have none
        if isinstance(function, type):
            return inspect.Signature()  # dict, str, int: a factory of empty ones
        raise ScheduleError(f"{function!r}: its parameters can't be read; wrap it in a function of your own") from None


def _check_needs(plan: _Plan, scope: Scope | None = None, path: tuple[Factory, ...] = ()) -> None:
    """Refuse now what could only fail later: a circle, an unfilled parameter, an "app" that needs a "run"."""
    for name, need in plan.needs.items():
        if name not in plan.accepted:
            raise ScheduleError(f"Depends can't fill the positional-only parameter {name}; remove the '/' behind it")
        factory, chain = need.factory, " -> ".join(_name_of(f) for f in (*path, need.factory))
        if factory in path:
            raise ScheduleError(f"Depends: {chain} is a circle; break it")
        if scope == "app" and need.scope == "run":
            raise ScheduleError(f"Depends: {chain}: an 'app' dependency can't need a 'run' one; give both one scope")
        if need.plan.required:
            unfilled = ", ".join(sorted(need.plan.required))
            raise ScheduleError(
                f"Depends: {chain}: nothing fills its parameter {unfilled}; give it a default or Depends"
            )
        _check_needs(need.plan, need.scope, (*path, factory))


class _Resolver:
    """The dependencies of one scope: each made once, kept open on one stack, closed in reverse order."""

    def __init__(
        self,
        stack: AsyncExitStack,
        overrides: Mapping[Factory, Factory],
        app: Callable[[_Dependency], Awaitable[object]] | None = None,
    ) -> None:
        self._stack = stack
        self._overrides = overrides
        self._app = app
        self._made: dict[Factory, object] = {}

    async def fill(self, needs: Mapping[str, _Dependency], given: Collection[str] = ()) -> dict[str, object]:
        return {name: await self.get(need) for name, need in needs.items() if name not in given}

    async def get(self, need: _Dependency) -> object:
        if need.scope == "app" and self._app is not None:
            return await self._app(need)
        factory = self._overrides.get(need.factory, need.factory)
        if factory not in self._made:
            plan = need.plan if factory is need.factory else _Plan(factory)
            self._made[factory] = await self._make(factory, plan.needs)
        return self._made[factory]

    async def _make(self, factory: Factory, needs: Mapping[str, _Dependency]) -> object:
        made = factory(**await self.fill(needs))
        if _is(inspect.isasyncgenfunction, factory):
            opened = asynccontextmanager(lambda: cast(AsyncGenerator[object], made))()
            value = await opened.__aenter__()
            self._stack.push_async_exit(_leaving(made, opened.__aexit__))
            return value
        if _is(inspect.isgeneratorfunction, factory):
            held = contextmanager(lambda: cast("Generator[object, None, None]", made))()
            value = held.__enter__()
            self._stack.push_async_exit(_leaving(made, held.__exit__))
            return value
        return await made if inspect.isawaitable(made) else made


def _leaving(generator: object, leave: Callable[..., object]) -> Callable[..., Coroutine[object, object, bool]]:
    """The clean-up of a generator that stands at its `yield`.

    What follows the `yield` runs whatever the outcome, so what was raised isn't raised there, but where a `try` or
    `with` around it is there to see it: `with transaction(): yield` must roll back.
    """
    frame = cast(FrameType, getattr(generator, "gi_frame", None) or getattr(generator, "ag_frame", None))
    sees = _handler(frame) != _no_handler()

    async def clean_up(*raised: object) -> bool:
        left = leave(*(raised if sees else (None, None, None)))
        if inspect.isawaitable(left):
            await left
        return False  # a factory that swallows it doesn't make the attempt a success

    return clean_up


def _handler(frame: FrameType) -> bytes:
    """The instruction at which a frame would go on if an exception were raised in it now, by its code's own table.

    Source: InternalDocs/exception_handling.md of CPython. 7 bits a byte: first of an entry, another follows, number.
    """
    code, at = frame.f_code, frame.f_lasti
    table = iter(code.co_exceptiontable)

    def number() -> int:
        byte = next(table)
        value = byte & 63
        while byte & 64:
            byte = next(table)
            value = value << 6 | byte & 63
        return value

    with suppress(StopIteration):
        while True:
            start, length, target, _ = [2 * number() for _ in range(4)]
            if start <= at < start + length:
                return code.co_code[target : target + 2]
    return b""


@functools.cache
def _no_handler() -> bytes:
    """From Python 3.12 on all of a generator is in a handler of its own, which turns `StopIteration` into an error."""

    def bare() -> Iterator[FrameType | None]:
        yield inspect.currentframe()

    generator = bare()
    return _handler(cast(FrameType, next(generator)))


class _AppScope:
    """The "app" dependencies of one engine, opened and closed in one task of their own, as cancel scopes demand."""

    def __init__(self, overrides: Mapping[Factory, Factory]) -> None:
        self._overrides = overrides
        self._wanted: asyncio.Queue[tuple[_Dependency, asyncio.Future[object]] | None] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    async def get(self, need: _Dependency) -> object:
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._serve(), name="bgjob app dependencies")
        answer: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self._wanted.put_nowait((need, answer))
        serving = cast("asyncio.Future[object]", self._task)
        await asyncio.wait({answer, serving}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise BgjobError(f"{need!r}: the app dependencies are closed already")
        return answer.result()

    async def _serve(self) -> None:
        async with AsyncExitStack() as stack:
            resolver = _Resolver(stack, self._overrides)
            while (wanted := await self._wanted.get()) is not None:
                need, answer = wanted
                try:
                    value = await resolver.get(need)
                except Exception as error:
                    answer.set_exception(error)
                else:
                    answer.set_result(value)

    async def close(self, timeout: float) -> None:
        """Clean up, for at most `timeout` seconds; a clean-up that fails or hangs is logged."""
        if self._task is None:
            return
        self._wanted.put_nowait(None)
        try:
            await asyncio.wait({self._task}, timeout=timeout)
        finally:
            if not self._task.done():
                self._task.cancel()
                _log.error("clean-up of app dependencies did not end within %s; cancelled", _span(timeout * 1000))
            elif not self._task.cancelled() and (error := self._task.exception()):
                _log.error("clean-up of app dependencies failed: %s", _summary(error), exc_info=error)


# 7 Jobs ---------------------------------------------------------------------------------------------------------------
# A registered function. Every argument of the decorator is checked here, once; what the engine reads is final.

Overlap: TypeAlias = Literal["skip", "queue", "all"]
OnCrash: TypeAlias = Literal["rerun", "drop"]
OnError: TypeAlias = Callable[[Run, BaseException], object]

_MAX_ARGS = 1 << 20  # bytes of JSON
_LATE = 1000  # ms after which the start of a tick is worth a warning
_LAST = 253_402_000_000_000  # ms: some days before the year 10000, where datetimes end in every zone
_BACKOFF = functools.partial(_doubling, 1000, 300_000)  # "1s..5m"


class _Settings:
    """The decorator's keywords as they were written."""

    every: Duration | None
    cron: str | None
    after: Duration | None
    tz: str | tzinfo | None
    name: str | None
    args: Mapping[str, object] | None
    immediate: bool
    jitter: Duration
    parallelism: int | None
    overlap: Overlap
    expires: Duration | None
    timeout: Duration | None
    retries: int
    retry_delay: RetryDelay
    retry_on: RetryOn
    on_error: OnError | None
    on_crash: OnCrash

    def __init__(self, **written: object) -> None:
        vars(self).update(written)


class _Spec:
    """The decorator's keywords checked and converted: durations in ms, policies as functions."""

    __slots__ = (
        "after",
        "args",
        "delay",
        "expires",
        "immediate",
        "jitter",
        "name",
        "on_crash",
        "on_error",
        "overlap",
        "parallelism",
        "patience",
        "plan",
        "retries",
        "retryable",
        "schedule",
        "timeout",
    )

    def __init__(self, name: str, plan: _Plan, s: _Settings) -> None:
        self.name: str = name
        self.plan: _Plan = plan
        self.schedule: _Schedule | None
        self.after: int | None
        self.schedule, self.after = _when(s)
        scheduled = self.schedule is not None or self.after is not None
        self.args: Mapping[str, object] = _scheduled_args(plan, s.args, scheduled)
        self.immediate: bool = _flag("immediate", s.immediate)
        self.jitter: int = _duration("jitter", s.jitter)
        default = 1 if scheduled else 10
        self.parallelism: int = default if s.parallelism is None else _int("parallelism", s.parallelism, 1)
        self.overlap: str = _choice("overlap", s.overlap, ("skip", "queue", "all"))
        self.expires: int | None = None if s.expires is None else _duration("expires", s.expires, 1)
        self.patience: int = _LATE if self.expires is None else min(_LATE, self.expires)
        self.timeout: int | None = None if s.timeout is None else _duration("timeout", s.timeout, 1)
        self.retries: int = _int("retries", s.retries, 0)
        self.delay: Callable[[int, str], int] = _BACKOFF if s.retry_delay == "1s..5m" else _retry_delay(s.retry_delay)
        self.retryable: Callable[[BaseException], bool] = _retryable(s.retry_on)
        self.on_error: OnError | None = s.on_error
        self.on_crash: str = _choice("on_crash", s.on_crash, ("rerun", "drop"))
        if s.on_error is not None and not callable(s.on_error):
            raise ScheduleError(f"on_error={s.on_error!r}: not callable; pass a function of (run, exception)")
        if not scheduled:
            _refuse_unscheduled(s)
        elif self.schedule is None and (s.immediate or s.overlap != "skip"):
            raise ScheduleError(f"after={s.after!r} runs once: immediate and overlap say nothing here; leave them out")


def _when(s: _Settings) -> tuple[_Every | _Cron | None, int | None]:
    """The schedule of `every` or `cron`, or the ms of `after`."""
    if (s.every, s.cron, s.after).count(None) < 2:
        schedules = {"every": s.every, "cron": s.cron, "after": s.after}
        written = [f"{what}={value!r}" for what, value in schedules.items() if value is not None]
        raise ScheduleError(f"{' and '.join(written)}: a job has one schedule; stack a second @job with its own name")
    if s.tz not in (None, "UTC") and s.cron is None:
        raise ScheduleError(f"tz={s.tz!r}: only cron has a zone; leave it out, or write cron=")
    if s.cron is not None:
        return _Cron(s.cron, _zone("UTC" if s.tz is None else s.tz)), None
    if s.every is not None:
        return _interval(_duration("every", s.every, 1)), None
    return None, None if s.after is None else _duration("after", s.after)


def _refuse_unscheduled(s: _Settings) -> None:
    for what, given in (
        ("args", bool(s.args)),
        ("immediate", s.immediate),
        ("jitter", s.jitter != 0),
        ("overlap", s.overlap != "skip"),
    ):
        if given:
            raise ScheduleError(f"{what}={getattr(s, what)!r}: is for scheduled runs; add every=, cron= or after=")


_NO_ARGS: Mapping[str, object] = MappingProxyType({})


def _scheduled_args(plan: _Plan, given: object, scheduled: bool) -> Mapping[str, object]:
    """The keyword arguments of scheduled runs: all that the function needs, and none that it doesn't know."""
    if given is not None and not isinstance(given, Mapping):
        raise ScheduleError(f"args={given!r}: not a mapping; write args={{'name': value}}")
    args = dict(cast(Mapping[str, object], given)) if given else _NO_ARGS
    accepted = args if plan.any_name else plan.accepted
    unknown = [name for name in args if name not in accepted or not isinstance(cast(object, name), str)]
    if unknown:
        known = ", ".join(sorted(plan.accepted)) or "none"
        raise ScheduleError(f"args: unknown parameter {', '.join(map(repr, unknown))}; the function's are: {known}")
    missing = plan.required - plan.accepted.intersection(args) if scheduled else ()  # a positional-only one stays so
    if missing:
        raise ScheduleError(f"nothing fills the parameter {', '.join(sorted(missing))}; add it to args= or default it")
    return args


def _flag(what: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ScheduleError(f"{what}={value!r}: write True or False")
    return value


def _int(what: str, value: object, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ScheduleError(f"{what}={value!r}: write a whole number, {least} or more")
    return value


def _choice(what: str, value: object, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise ScheduleError(f"{what}={value!r}: write {' or '.join(map(repr, choices))}")
    return value


def _is_exception(error: BaseException) -> bool:
    return isinstance(error, Exception)


def _retryable(retry_on: RetryOn) -> Callable[[BaseException], bool]:
    if retry_on is Exception:
        return _is_exception
    kinds = cast(tuple[object, ...], retry_on if isinstance(retry_on, tuple) else (retry_on,))
    if all(isinstance(kind, type) and issubclass(kind, BaseException) for kind in kinds):
        classes = cast(tuple[type[BaseException], ...], kinds)
        return lambda error: isinstance(error, classes)
    if isinstance(retry_on, (tuple, type)) or not callable(retry_on) or _is_async(retry_on):
        raise ScheduleError(f"retry_on={retry_on!r}: write an exception class, a tuple of them, or a plain predicate")
    return retry_on


def _check_function(function: object) -> None:
    """Refuse what can't be run as a job, and say what can."""
    remedy = "decorate an async function or a plain one"
    if not callable(function):
        raise ScheduleError(f"{function!r} can't be called; {remedy}")
    if isinstance(function, type):
        raise ScheduleError(f"{function!r} is a class; {remedy}")
    if _is(inspect.isasyncgenfunction, function) or _is(inspect.isgeneratorfunction, function):
        raise ScheduleError(f"{_name_of(function)!r} is a generator: nothing would iterate over it; {remedy}")


def _job_name(function: object, name: object) -> str:
    """The job's identity; '@' and '#' separate it from tick and key in the ids of its runs."""
    if name is None:
        name = getattr(function, "__name__", None)
        if name is None or name == "<lambda>":
            raise ScheduleError(f"{function!r} has no name of its own; write @job(name='…')")
    if not isinstance(name, str) or not name.strip() or not name.isprintable() or "@" in name or "#" in name:
        raise ScheduleError(f"name={name!r}: write printable text without '@' and '#'")
    return name


def _named(function: object) -> object:
    """What of a callable has a qualified name and code: itself, what it wraps, or what makes an object callable."""
    if isinstance(function, functools.partial):
        return _named(cast("functools.partial[object]", function).func)
    function = inspect.unwrap(cast(Factory, function))
    return function if hasattr(function, "__qualname__") else type(function).__call__


def _place(function: object) -> str:
    """Where what `_named` found stands, as file:line."""
    code = getattr(function, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else repr(function)


class _Submitter(Protocol):
    """What a job asks of its registry; each raises `BgjobError` while nothing runs."""

    async def _submit(self, job: Job, payload: str, delay: int, at: int | None, key: str | None) -> Run: ...
    async def _cancel(self, job: Job) -> int: ...


class Job(Generic[P, C_co, R_co]):
    """A registered function: call it, submit it, look at it, cancel it. `@job` makes it."""

    __slots__ = ("_registry", "_spec")

    def __init__(self, spec: _Spec, registry: _Submitter) -> None:
        self._spec = spec
        self._registry = registry

    @property
    def name(self) -> str:
        """Its identity in logs and stores."""
        return self._spec.name

    @property
    def function(self) -> Callable[P, C_co]:
        """What was decorated."""
        return cast(Callable[P, C_co], self._spec.plan.function)

    __wrapped__ = function  # so that inspect.signature and help see the function

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> C_co:
        """Call the function as if it weren't a job, for tests and for reuse: no run, no retries, no log.

        Raises:
            TypeError: a parameter that `Depends` would fill was left out.
        """
        needs = self._spec.plan.needs
        if needs:
            given = self._spec.plan.signature.bind_partial(*args, **kwargs).arguments
            unfilled = [name for name in needs if name not in given]
            if unfilled:
                example = ", ".join(f"{name}=…" for name in unfilled)
                raise TypeError(f"job {self.name!r}: a direct call resolves no Depends; pass {example}")
        return self.function(*args, **kwargs)

    async def submit(self, /, *args: P.args, **kwargs: P.kwargs) -> Run[R_co]:
        """Run the job in the background as soon as there is room. Arguments make a round trip through JSON.

        Raises:
            TypeError: the arguments don't fit the function, or one isn't JSON.
            ValueError: they are more than 1 MiB of JSON.
            BgjobError: nothing runs: call it inside `run()` or `running()`.
        """
        return await Later(self, 0, None, None).submit(*args, **kwargs)

    def after(self, delay: Duration, *, key: str | None = None) -> Later[P, R_co]:
        """`await job.after("5m").submit(…)`: run it that long from now.

        Args:
            delay: how long to wait; 0 is at once.
            key: the same key is the same run: submitted once, however often it is asked for. It stays taken while
                the run is unfinished and for a day after it succeeded or failed; it is free at once when cancelled
                or skipped.
        """
        return Later(self, _duration(f"job {self.name!r}: after", delay), None, key)

    def at(self, when: datetime, *, key: str | None = None) -> Later[P, R_co]:
        """`await job.at(datetime(…)).submit(…)`: run it at an aware datetime; one in the past is at once.

        Args:
            when: an aware datetime.
            key: as for `after`.
        """
        return Later(self, 0, _to_ms(f"job {self.name!r}: at", when), key)

    async def cancel(self) -> int:
        """Cancel every scheduled and running run of this job; how many. Its next tick still fires.

        Raises:
            BgjobError: nothing runs: call it inside `run()` or `running()`.
        """
        return await self._registry._cancel(cast(Job, self))

    def next_ticks(self, n: int = 5, start: datetime | None = None) -> list[datetime]:
        """The next `n` ticks, aware and in the job's zone; `[]` without `every` or `cron`.

        Args:
            n: how many; fewer come back where the schedule ends.
            start: an aware datetime that they come after; None (the default) is now. An interval's ticks
                are shown on the grid of the Unix epoch, as with a shared store.
        """
        schedule = self._spec.schedule
        after = _wall_ms() if start is None else _to_ms(f"job {self.name!r}: start", start)
        if not _int(f"job {self.name!r}: n", n, 0) or schedule is None:
            return []
        zone = schedule.zone if isinstance(schedule, _Cron) else UTC
        ticks = itertools.takewhile(_LAST.__gt__, itertools.islice(schedule.ticks(after), n))
        return [_aware(tick, zone) for tick in ticks]

    def __repr__(self) -> str:
        return f"<Job {self.name} {_describe(self._spec)}>"


def _describe(spec: _Spec) -> str:
    if isinstance(spec.schedule, _Cron):
        return f"cron={spec.schedule.text!r} tz={spec.schedule.zone}"
    if spec.schedule is not None:
        return f"every={_span(spec.schedule.every)}"
    return "on submit" if spec.after is None else f"after={_span(spec.after)}"


def _check_key(job: str, key: object) -> None:
    if key is not None and (not isinstance(key, str) or not key or not key.isprintable()):
        raise ScheduleError(f"job {job!r}: key={key!r}: write printable text")


class Later(Generic[P, R_co]):
    """What `job.after(…)` and `job.at(…)` return; its one method is `submit`."""

    __slots__ = ("_at", "_delay", "_job", "_key")

    def __init__(self, job: Job[P, object, R_co], delay: int, at: int | None, key: str | None) -> None:
        _check_key(job.name, key)
        self._job = job
        self._delay = delay
        self._at = at
        self._key = key

    async def submit(self, /, *args: P.args, **kwargs: P.kwargs) -> Run[R_co]:
        """Submit the run; as `Job.submit`."""
        job = cast(Job, self._job)
        payload = _payload(job.name, job._spec.plan, args, kwargs)
        run = await job._registry._submit(job, payload, self._delay, self._at, self._key)
        return cast("Run[R_co]", run)


def _payload(job: str, plan: _Plan, args: tuple[object, ...], kwargs: Mapping[str, object]) -> str:
    """The arguments as JSON, checked against the signature; the one that can't be JSON is named."""
    if kwargs or not plan.least <= len(args) <= plan.most:  # else they fit; to bind takes longer than to store
        _bind(job, plan, args, kwargs)
    try:
        text = _dumps([args, kwargs]) if args or kwargs else ""
    except (TypeError, ValueError, RecursionError):
        for name, value in _bind(job, plan, args, kwargs).items():
            _refuse_unless_json(job, name, value)
        raise
    if len(text) > _MAX_ARGS:
        raise ValueError(
            f"job {job!r}: the arguments are {len(text):,} bytes of JSON, the limit is 1 MiB; pass a reference"
        )
    return text


def _bind(job: str, plan: _Plan, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Mapping[str, object]:
    try:
        return plan.signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise TypeError(f"job {job!r}: {error}") from None


def _refuse_unless_json(job: str, name: str, value: object) -> None:
    try:
        _dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        shown = f"<{type(value).__name__}>"
        with suppress(Exception):  # what is nested too deeply for JSON is so for repr(), too
            shown = f"{value!r:.200}"
        raise TypeError(f"job {job!r}: argument {name}={shown} isn't JSON ({error}); pass plain values") from None


@functools.cache
def _encoder() -> Callable[[object], str]:
    import json

    return json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode  # json.dumps would make one for each call


def _dumps(value: object) -> str:
    return _encoder()(value)


def _loads(text: str | bytes) -> object:
    import json

    return json.loads(text)


def _arguments(payload: str) -> tuple[tuple[object, ...], Mapping[str, object]]:
    if not payload:
        return (), _NO_ARGS
    args, kwargs = cast(tuple[list[object], dict[str, object]], _loads(payload))
    return tuple(args), kwargs


# 8 Store --------------------------------------------------------------------------------------------------------------
# What the engine needs of a store that several instances share. Instants and durations are whole milliseconds, `now` is
# the store's clock. Every verb is atomic, takes many at once, and is safe to repeat when a reply was lost.


class Unreachable(StoreError):
    """The store doesn't answer, or is locked: an outage, which ends by itself. Any other `StoreError` doesn't."""


class Listing(NamedTuple):
    """A job that an instance executes, as the store and `bgjob status` know it."""

    schedule: str  # JSON; a text that differs from the stored one is another schedule, which has missed nothing
    immediate: bool
    timeout: int | None


class Tick(NamedTuple):
    """A tick of which one instance gets the run."""

    job: str
    at: int
    delay: int
    limit: int  # unfinished ticks of the job beyond which it is skipped
    hold: bool  # or kept for later, where overlap="all"
    free: int  # runs of the job that may start here ...
    parallelism: int  # ... and everywhere

    @property
    def id(self) -> str:
        """That of the run."""
        return _tick_id(self.job, self.at)


class Call(NamedTuple):
    """A submitted run; `args` is JSON, `at` the asked-for instant, or None: `delay` from now."""

    id: str
    job: str
    at: int | None
    delay: int
    args: str


class Claimed(NamedTuple):
    """A run as its new owner gets it. `lost` of its `tries` claims ended with their process."""

    id: str
    job: str
    at: int
    call: bool
    args: str
    tries: int
    lost: int
    token: int
    cancel: bool


class Answer(NamedTuple):
    """What became of a tick: of the words, "full" is a held one, and "early" one that the store's clock hasn't reached.

    `last` is the newest tick of the job that was handed out. Where a slot was free, the winner has its `run` at once.
    """

    tick: Tick
    word: Literal["won", "skipped", "full", "lost", "early"]
    last: int
    run: Claimed | None = None


class News(NamedTuple):
    """What a claim brings: runs, when to ask again at the latest, and which of the owner's runs are to be cancelled."""

    now: int
    runs: Sequence[Claimed]
    next_due: int | None
    cancelled: Sequence[str]


class Settlement(NamedTuple):
    """The end of an attempt: the run's last state, or "scheduled", which is again after `delay`, or if `back` at once
    and as if it had not been claimed. `reason` is that of the state, of an again that of a run found cancelled."""

    id: str
    token: int
    job: str
    at: int
    call: bool
    state: State
    delay: int
    back: bool
    attempt: int
    error: str | None
    reason: str | None
    result: str | None  # JSON; None where it can't be


class Cancelled(NamedTuple):
    """A run that a cancel found: its owner was signalled, or it was waiting and is removed."""

    signalled: bool
    at: int


_Settled: TypeAlias = Literal["done", "cancelled", "refused"]


class Row(NamedTuple):
    """A run as the store knows it, finished or not."""

    id: str
    job: str
    state: State
    at: int
    due: int  # when it may be claimed; of a running one the end of its lease
    args: str
    attempt: int
    token: int
    owner: str | None
    since: int | None  # start of the current or last attempt
    finished: int | None
    error: str | None
    reason: str | None
    result: str | None


class Standing(NamedTuple):
    """A job as the store knows it: what its last instance listed, and the newest tick that was handed out."""

    job: str
    last: int
    schedule: str
    timeout: int | None


class Overview(NamedTuple):
    """What people look at: all jobs, all that runs, what is due next, what waits for a retry, the last failures."""

    now: int
    jobs: Sequence[Standing]
    running: Sequence[Row]
    due: Sequence[Row]
    retrying: Sequence[Row]
    failed: Sequence[Row]


class Store(Protocol):
    """The verbs of a shared store. Losing a tick or a fenced write is a normal answer, not an error.

    A store that can't be reached raises `StoreError`; each verb gives up in less than a quarter of `lease`.

    Attributes:
        lease: ms that a claim lasts without a beat.
        poll: ms after which to claim even if no hint came.
    """

    lease: int
    poll: int

    async def open(self, owner: str, hint: Callable[[], None]) -> None:
        """Begin; one instance at a time per object. Call `hint` when something may be due, cancelled or finished."""
        ...

    async def close(self) -> None:
        """End, and leave nothing behind."""
        ...

    async def enlist(self, jobs: Mapping[str, Listing]) -> tuple[int, Mapping[str, int]]:
        """Make the jobs known: `now, {job: last tick handed out}`. A new or changed one begins now: with nothing to
        catch up, and if new and `immediate` with a run whose tick is now."""
        ...

    async def tick(self, ticks: Sequence[Tick]) -> tuple[int, Sequence[Answer]]:
        """`now` and an answer for each tick, of which there is one a job."""
        ...

    async def push(self, calls: Sequence[Call], wake: bool) -> Sequence[int | None]:
        """Store calls: the instant of each, None where the id is taken. `wake`: hint to the other instances."""
        ...

    async def claim(self, free: Mapping[str, tuple[int, int]]) -> News:
        """`{job: (free slots here, parallelism everywhere)}`: take the oldest due runs of each."""
        ...

    async def beat(self, runs: Mapping[str, int]) -> Mapping[str, bool]:
        """`{id: token} -> {id: cancel}`: extend the leases; an id that is missing is lost."""
        ...

    async def settle(self, ended: Sequence[Settlement]) -> Sequence[_Settled]:
        """Record ends: "cancelled" is an again that found the run cancelled, "refused" one by a stale token."""
        ...

    async def cancel(self, job: str, id: str | None = None) -> Mapping[str, Cancelled]:
        """Finish a waiting run as cancelled, flag a running one for its owner. Without `id`, all runs of the job."""
        ...

    async def find(self, id: str, watch: bool = False) -> Row | None:
        """The run, unless it is unknown or no longer kept. `watch`: hint when it ends."""
        ...

    async def overview(self, n: int) -> Overview:
        """For `bgjob status`; at most `n` rows of what is due, retrying and failed, the nearest first."""
        ...


# 9 Engine -------------------------------------------------------------------------------------------------------------
# One object per `run()`: wait, admit, execute, settle, drain. No cron and no SQL in it. One timer serves all that is
# due; whatever becomes ready starts from that timer's callback, hence in the context in which `run()` was called.

_BATCH = range(100)  # entries admitted between two turns of the loop: more would leave the cache, and others would wait
_GRACE = 5.0  # s for what was cancelled at the end of a drain
_HOOK_LIMIT = 30_000  # ms for on_error where the job has no timeout
_COUNTED = 1000  # missed ticks of a cron are counted up to here; those of an interval cost nothing to count
_PAST = 1000  # ended runs that memory remembers
_KEEP = _UNITS["d"]  # how long it keeps a key taken


class _Outcome(NamedTuple):
    """What the end of an attempt means: the state its run goes to, which is `scheduled` where it is tried again."""

    state: State
    error: BaseException | None = None
    reason: str | None = None
    delay: int = 0


_SUCCESS = _Outcome(_SUCCEEDED)


def _judge(stop: _Stop | None, error: BaseException | None, timeout: int | None) -> _Outcome:
    """A reason written before the task was cancelled decides, whatever the function then returned or raised.

    Only what ended well in spite of a shutdown has ended well; and of a lost lease, if the store takes the result.
    """
    if stop is _Stop.TIMEOUT:
        late = TimeoutError(f"no end within {_span(timeout or 0)}")
        late.__cause__ = error  # its traceback shows where the function hung
        return _Outcome(_FAILED, late)
    if stop is _Stop.CRASH:
        return _Outcome(_FAILED, BgjobError(stop))
    if stop is None or (stop in (_Stop.SHUTDOWN, _Stop.LEASE) and error is None):
        return _SUCCESS if error is None else _Outcome(_FAILED, error)
    return _Outcome(_CANCELLED, None if isinstance(error, asyncio.CancelledError) else error, stop)


class _Lane:
    """One job in one engine: its ticks, its slots, and who waits for one."""

    __slots__ = (
        "__weakref__",
        "busy",
        "limit",
        "parked",
        "seq",
        "skipped",
        "spec",
        "step",
        "ticks",
        "unfinished",
        "waiting",
    )

    def __init__(self, spec: _Spec, seq: int) -> None:
        self.spec = spec
        self.seq = seq
        self.step = 0  # ms between ticks where they are even; else those after the one in the heap are in `ticks`
        self.ticks: Iterator[int] | None = None
        self.parked: int | None = None  # overlap="all": the next tick, not in the heap while there is no room for it
        self.busy = 0  # slots taken
        self.unfinished = 0  # ticks that run, wait, or will be retried
        self.limit = spec.parallelism + (spec.overlap == "queue")
        self.skipped = 0  # ticks since the last that was handed out
        self.waiting: OrderedDict[_Live, None] | None = None

    def begin(self, now: int) -> int | None:
        """The first tick of a job that starts now; `ticks` holds those after it."""
        spec = self.spec
        if isinstance(spec.schedule, _Every):
            self.step = spec.schedule.every
        elif spec.schedule is not None:
            self.ticks = spec.schedule.ticks(now)
        elif spec.after is not None:
            self.ticks = iter((now + spec.after,))
        return now if spec.immediate else self.following(now)

    def following(self, tick: int) -> int | None:
        if self.step:
            return tick + self.step
        return None if self.ticks is None else next(self.ticks, None)

    def grid(self, tick: int) -> _Every | _Cron:
        """The schedule with `tick` as one of its ticks: an interval's begin one interval after its start."""
        if isinstance(self.spec.schedule, _Cron):
            return self.spec.schedule
        return _Every(self.step, tick - self.step)

    def catch_up(self, due: int, now: int) -> int:
        """The newest tick up to now: computed, for a gap of a week costs no more than one of a minute."""
        grid = self.grid(due)
        newest = _newest(grid, due, now) or due
        if isinstance(grid, _Cron):
            self.ticks = grid.ticks(newest)
        _log_gap(self.spec.name, grid, due, newest)
        return newest


def _log_gap(job: str, grid: _Schedule, first: int, last: int) -> None:
    if _log.isEnabledFor(logging.WARNING):
        count = _count(grid, first, last, _COUNTED)
        _log.warning(
            "job %r: %s ticks came due together, %s to %s: only the newest runs",
            job, count if count != _COUNTED else f"{count} or more", _iso(first), _iso(last),
        )  # fmt: skip


class _Live(Run[object]):
    """A run of this process: what the engine has to know of it beside its facts."""

    call: bool  # submitted, not a tick
    elapsed = True  # its due time is a delay, so it moves along when the clock is set back; False for `at`
    task: asyncio.Task[None] | None = None
    stop: _Stop | None
    lost = 0  # claims that ended with their process: none, for without a store it is this one

    def __init__(self, lane: _Lane, at: int, kwargs: Mapping[str, object], owner: _Owner) -> None:
        self.job = lane.spec.name  # by hand: super().__init__() would take as long as all of these
        self.kwargs = kwargs
        self._at = at
        self._owner = owner
        self.lane = lane
        # Defaults that every run asks for: as the class's, they would be looked up anew each time.
        self.args = ()
        self.attempt = 0
        self.call = False
        self.stop = None
        self._done = None


class _Stored(_Live):
    """A run that a shared store has: claimed by this process, or submitted by it."""

    gone = False  # another instance's by now
    leased = 0.0  # monotonic time at which the claim or the last beat was asked for
    payload = ""  # of a call: its arguments, as they are stored


_Entry: TypeAlias = tuple[int, int, _Lane | _Live]  # due, order of entering, what is due


def _forget_frames(error: BaseException) -> None:
    """Forget the variables in an error's traceback, but for those of coroutines and generators that are to go on.

    One exception object may be raised in several tasks, as a broken asyncio stream does, and has the frames of them
    all. Up to Python 3.12, to clear one that waits at a `yield` or `await` ends it, silently.
    """
    waiting = opcode.opmap["YIELD_VALUE"]
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_code[frame.f_lasti] != waiting:
            with suppress(RuntimeError):  # it is executing
                frame.clear()


class _Past:
    """What memory remembers of ended runs, so that `find()` and keys work: the last thousand, and a day's keys."""

    def __init__(self) -> None:
        self._recent: OrderedDict[str, _Live] = OrderedDict()
        self._keyed: dict[str, _Live] = {}
        self._keys: deque[tuple[int, str]] = deque()

    def add(self, run: _Live, now: int) -> None:
        if run._exception is not None:
            _forget_frames(run._exception)  # it has been logged, and would hold the job's variables
        if run.key is not None and run.state in (_SUCCEEDED, _FAILED):
            self._keyed[run.id] = run
            self._keys.append((now + _KEEP, run.id))
        else:
            self._recent[run.id] = run
            if len(self._recent) > _PAST:
                self._recent.popitem(last=False)

    def get(self, id: str) -> _Live | None:
        return self._keyed.get(id) or self._recent.get(id)

    def taken(self, id: str, now: int) -> _Live | None:
        while self._keys and self._keys[0][0] <= now:
            self._keyed.pop(self._keys.popleft()[1], None)
        return self._keyed.get(id)


class _Engine:
    """Executes the jobs of a registry in this process."""

    __slots__ = (  # beyond 30 attributes Python looks each up in a dict, which takes a microsecond a fire
        "__weakref__",
        "_app",
        "_armed",
        "_calls",
        "_clock",
        "_closed",
        "_closing",
        "_context",
        "_dead",
        "_drain",
        "_entering",
        "_freed",
        "_heap",
        "_idle",
        "_ids",
        "_lanes",
        "_live",
        "_mono",
        "_names",
        "_now",
        "_offset",
        "_on_event",
        "_opening",
        "_past",
        "_registry",
        "_retired",
        "_returned",
        "_seq",
        "_slice",
        "_thread",
        "_timer",
        "_wall",
        "loop",
        "stopping",
    )

    def __init__(
        self,
        registry: Registry,
        jobs: Sequence[str] | None,
        drain: int,
        on_event: Callable[[Run], object] | None,
        clock: _Clock,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.stopping = asyncio.Event()
        self._registry = registry
        self._names = None if jobs is None else frozenset(jobs)
        self._drain = drain
        self._on_event = on_event
        self._clock = clock
        self._mono, self._wall, self._slice = clock.mono, clock.wall, clock.slice
        self._offset: float = clock.wall() - clock.mono()
        self._now = round(clock.wall() * 1000)
        self._thread = threading.get_ident()
        self._context = copy_context()
        self._app = _AppScope(registry.overrides)
        self._seq = itertools.count()
        self._lanes: dict[str, _Lane] = {}
        self._retired: WeakSet[_Lane] = WeakSet()  # of replaced and removed jobs, while a run holds on to them
        self._heap: list[_Entry] = []
        self._dead = 0  # entries of the heap that were cancelled
        self._timer: asyncio.Handle | None = None
        self._armed = math.inf
        self._freed: list[_Lane] = []
        self._entering = 0  # tasks that may not have taken their first step yet
        self._live: dict[_Live, None] = {}
        self._calls: dict[str, _Live] = {}
        self._past = _Past()
        self._ids = _Ids(clock.entropy())
        self._idle: asyncio.Future[None] | None = None
        self._opening: asyncio.Task[object] | None = None
        self._returned: WeakSet[threading.Thread] = WeakSet()
        self._closing = self._closed = False

    # Open and close

    async def open(self) -> None:
        """Start: "app" dependencies first, then the schedules. On an error nothing is left behind."""
        registry = self._registry
        if registry._going_engine() is not None:
            raise BgjobError("these jobs run already: one run() or running() per registry at a time")
        jobs = [job for job in registry.jobs.values() if self._names is None or job.name in self._names]
        unknown = (self._names or frozenset()) - registry.jobs.keys()
        if unknown:
            known = ", ".join(registry.jobs) or "none"
            raise BgjobError(f"jobs={sorted(unknown)}: no such job; the registered ones are: {known}")
        registry._engine = self
        self._opening = asyncio.current_task()
        try:
            for need in _app_needs(job._spec.plan for job in jobs):
                await self._app.get(need)
            await self._begin(jobs)
        except BaseException:
            self._closing = True  # a job registered meanwhile has set the timer
            if self._timer is not None:
                self._timer.cancel()
            registry._engine = None
            await self._app.close(_GRACE)
            raise
        self._opening = None
        self._arm()

    async def opened(self) -> bool:
        """Open, unless a signal comes first, whose cancellation ends here."""
        try:
            await self.open()
        except asyncio.CancelledError:
            task = cast("asyncio.Task[object]", self._opening)
            if not self.stopping.is_set() or task.uncancel():
                raise
            return False
        return True

    async def _begin(self, jobs: Sequence[Job]) -> None:
        self._read_clocks()
        for job in jobs:
            self._heap.extend(self._enter(job))
        heapq.heapify(self._heap)
        _log.info("bgjob %s runs %d jobs", __version__, len(self._lanes))

    def _enter(self, job: Job) -> list[_Entry]:
        """Give a job its lane; what goes into the heap for it, where it has a schedule."""
        lane = _Lane(job._spec, next(self._seq))
        self._lanes[job.name] = lane
        first = lane.begin(self._now)
        return [] if first is None else [(first, lane.seq, lane)]

    def registered(self, job: Job) -> None:
        self._here(self._register, job)

    def unregistered(self, job: Job) -> None:
        self._here(self._unregister, job)

    def _here(self, change: Callable[[Job], None], job: Job) -> None:
        """A change of the registry, made in this loop from whichever thread."""
        if threading.get_ident() == self._thread:
            change(job)
        else:
            self.loop.call_soon_threadsafe(change, job)

    def _register(self, job: Job) -> None:
        if self._closing or (self._names is not None and job.name not in self._names):
            return
        old = self._lanes.get(job.name)
        if old is not None:
            self._retire(old)
        self._read_clocks()
        for entry in self._enter(job):
            heapq.heappush(self._heap, entry)
        self._arm()

    def _unregister(self, job: Job) -> None:
        lane = self._lanes.pop(job.name, None)
        if lane is not None:
            self._retire(lane)
            for run in self._scheduled(lane):
                self._drop(run, _Stop.REMOVED)

    def _retire(self, lane: _Lane) -> None:
        """End a schedule; the runs it has begun are left alone."""
        lane.step, lane.ticks, lane.parked = 0, None, None
        self._retired.add(lane)
        self._heap[:] = [entry for entry in self._heap if entry[2] is not lane]  # in place: _admit may be at it
        heapq.heapify(self._heap)

    def stop(self) -> None:
        """A signal: the first one begins the drain, the second ends its wait. An "app" dependency may hang before."""
        if self.stopping.is_set():
            self._wake_close()
        elif self._opening is not None:
            self._opening.cancel()
        self.stopping.set()

    async def close(self) -> None:
        """Drain, and leave nothing behind. A cancel that comes meanwhile ends the wait, and is raised at the end."""
        self._closing = True
        self.loop.call_soon(self._check_entered)
        if self._timer is not None:
            self._timer.cancel()
        cancelled: asyncio.CancelledError | None = None
        for stage in (self._wait_for_runs, self._cut_runs, self._close_app, self._abandon_runs):
            try:
                await stage()
            except asyncio.CancelledError as error:
                cancelled = error
        for thread in list(self._returned):
            thread.join(_GRACE)  # it has given its result, and only wants the interpreter once more to end
        self._registry._engine = None
        if cancelled is not None:
            raise cancelled

    async def _wait_for_runs(self) -> None:
        if self._live and self._drain:
            _log.info("draining %d runs, at most %s; Ctrl-C again cancels them", len(self._live), _span(self._drain))
            await self._until_idle(self._drain / 1000)

    async def _cut_runs(self) -> None:
        for run in list(self._live):
            self._interrupt(run, _Stop.SHUTDOWN)
        await self._until_idle(_GRACE)

    async def _close_app(self) -> None:
        await self._app.close(_GRACE)

    async def _until_idle(self, seconds: float) -> None:
        if self._live:
            self._idle = self.loop.create_future()
            try:
                await asyncio.wait({self._idle}, timeout=seconds)
            finally:
                self._idle = None

    def _wake_close(self) -> None:
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    async def _abandon_runs(self) -> None:
        """Name what would not stop, and what memory can't keep."""
        self._closed = True
        for run in list(self._live):
            _log.error("%s would not stop: it ignored its cancellation for %s", run, _span(_GRACE * 1000))
            task = run.task
            self._finish(run, _Outcome(_CANCELLED, None, _Stop.SHUTDOWN))
            if task is not None:
                task.cancel()  # a run in a thread is only waited for, and the wait now ends
        lost = list(self._scheduled())
        if lost and not self._clock.virtual:
            _log.warning("%d scheduled runs are lost, for memory keeps none: %s", len(lost), _examples(lost))
        for run in lost:
            self._drop(run, _Stop.SHUTDOWN)

    # Wait

    def _read_clocks(self) -> None:
        wall = self._wall()
        offset = wall - self._mono()
        step = offset - self._offset
        self._offset = offset
        self._now = int(wall * 1000)
        if step > _JUMP or step < -_JUMP:
            self._jumped(round(step * 1000))

    def _jumped(self, step: int) -> None:
        """The clock was set, or the machine slept. Forward is elapsed time: what it skipped is caught up like any gap.

        Back: delays and intervals move along, so none freezes. Cron follows Debian's: a wild schedule goes on by the
        new time; a fixed one waits until its last tick has passed again, unless the step is of more than three hours.
        """
        _log.warning("the clock went %s by %s", "forward" if step > 0 else "back", _span(abs(step)))
        if step > 0:
            return
        moved = [(self._moved(item, due, step), seq, item) for due, seq, item in self._heap]
        self._heap[:] = [(due, seq, item) for due, seq, item in moved if due is not None]
        for lane in self._lanes.values():
            if lane.parked is not None:
                lane.parked = self._moved(lane, lane.parked, step)
        for run in self._unfinished():
            if run.elapsed:
                run._at += step
        heapq.heapify(self._heap)

    def _moved(self, item: _Lane | _Live, due: int, step: int) -> int | None:
        if isinstance(item, _Live):
            return due + step if item.elapsed else due
        schedule = item.spec.schedule
        if isinstance(schedule, _Cron):
            if not schedule.wild and step >= -3 * _UNITS["h"]:
                return due
            item.ticks = schedule.ticks(self._now)
            return next(item.ticks, None)
        return due + step

    def _arm(self) -> None:
        """Have `_wake` called when the first entry of the heap is due, or at once where a slot was freed."""
        if self._freed:
            when = 0.0
        elif self._heap:
            due, latest = self._heap[0][0], self._now + self._slice
            when = (due if due < latest else latest) / 1000 - self._offset
        else:
            return
        if when < self._armed and not self._closing:
            if self._timer is not None:
                self._timer.cancel()
            self._armed = when
            self._timer = self.loop.call_at(when, self._wake, context=self._context)

    def _wake(self) -> None:
        self._timer, self._armed = None, math.inf
        try:
            self._read_clocks()
            if self._entering:
                self._check_entered()
            while self._freed:
                self._refill(self._freed.pop(0))
            self._admit()
        finally:  # else one bug would stop every job for good
            self._arm()

    # Admit

    def _admit(self) -> None:
        """Hand out what is due, a batch at a time, so that neither the loop nor the processor's cache is flooded."""
        heap, now = self._heap, self._now
        for admitted in _BATCH:
            if not heap:
                break
            due, _, item = heap[0]
            if due > now:
                if admitted or due > now + _EARLY:
                    break
                now = self._now = due
            if isinstance(item, _Live):
                heapq.heappop(heap)
                self._ready(item)
            else:
                self._tick(item, due)

    def _tick(self, lane: _Lane, at: int) -> None:
        """Hand out a tick, or skip it where its job has as many unfinished ones as it may; have the next one ready."""
        spec, full = lane.spec, lane.unfinished >= lane.limit
        if full and spec.overlap == "all":
            heapq.heappop(self._heap)
            lane.parked = at
            return
        following = at + lane.step if lane.step else lane.following(at)
        if following is not None and following <= self._now and spec.overlap != "all":
            at = lane.catch_up(at, self._now)
            following = lane.following(at)
        if following is None:
            heapq.heappop(self._heap)
        else:
            heapq.heapreplace(self._heap, (following, lane.seq, lane))
        run = _Live(lane, at, spec.args, self)
        if full:
            self._overlapped(run)
            return
        if lane.skipped:
            _log.warning("job %r runs again: %d ticks were skipped", spec.name, lane.skipped)
            lane.skipped = 0
        lane.unfinished += 1
        if spec.jitter:
            upto = spec.jitter if following is None else min(spec.jitter, following - at)
            self._schedule(run, at + _spread(run.id, upto))
        elif lane.waiting or lane.busy >= spec.parallelism:
            self._wait_for_slot(run)
        else:
            self._start(run)

    def _overlapped(self, run: _Live) -> None:
        lane = run.lane
        if not lane.skipped:
            _log.warning("%s skipped: %d earlier ticks of the job are unfinished", run, lane.limit)
        lane.skipped += 1
        run.state, run.reason = _SKIPPED, "overlap"
        self._emit(run)

    def _schedule(self, run: _Live, due: int) -> None:
        heapq.heappush(self._heap, (due, next(self._seq), run))

    def _ready(self, run: _Live) -> None:
        """A scheduled run is due: it takes a slot, or waits for one behind those that came before."""
        lane = run.lane
        if run.state is not _SCHEDULED:
            self._dead -= 1
        elif lane.waiting or lane.busy >= lane.spec.parallelism:
            self._wait_for_slot(run)
        else:
            self._start(run)

    def _wait_for_slot(self, run: _Live) -> None:
        if run.lane.waiting is None:
            run.lane.waiting = OrderedDict()
        run.lane.waiting[run] = None
        if self._entering:
            self.loop.call_soon(self._check_entered)

    def _refill(self, lane: _Lane) -> None:
        while lane.waiting and lane.busy < lane.spec.parallelism:
            self._start(lane.waiting.popitem(last=False)[0])
        if lane.parked is not None and lane.unfinished < lane.limit:
            heapq.heappush(self._heap, (lane.parked, lane.seq, lane))
            lane.parked = None

    # Execute

    def _start(self, run: _Live) -> None:
        lane = run.lane
        spec = lane.spec
        if self._now - run._at > spec.patience and run._started is None and self._expired(run, spec):
            return
        lane.busy += 1
        run.attempt += 1
        self._live[run] = None
        self._entering += 1
        attempt = self._attempt(run, spec)
        try:
            run.task = self.loop.create_task(attempt, name=spec.name)
        except BaseException as error:  # a task factory of somebody else's
            attempt.close()
            self._finish(run, _Outcome(_FAILED, error))
            return
        if run._done is not None:
            self.loop.call_soon(self._check_entered)
        if run.stop is not None and run.state is _RUNNING:
            # An eager task factory ran the first steps inside create_task, and they cancelled this very run when it
            # had no task yet.
            run.task.cancel()

    def _expired(self, run: _Live, spec: _Spec) -> bool:
        """Whether it is too late for a first start; one that is only late is worth a warning, if it is a tick's."""
        late = self._now - run._at
        if spec.expires is not None and late > spec.expires:
            self._end(run, _SKIPPED, f"expired: {_span(late)} late, expires={_span(spec.expires)}")
            return True
        if late > _LATE + spec.jitter and not run.call:
            _log.warning("%s starts %s late", run, _span(late))
        return False

    def _check_entered(self) -> None:
        # Somebody cancels all tasks between our create_task and their first step: such a task never enters its
        # coroutine, so nothing in there could give the slot back. Looked for before slots are wanted and while
        # somebody waits for a run; a done-callback on every task would cost as much as the rest of the start.
        if not self._entering:
            return
        self._entering = 0
        for run in list(self._live):
            if run.state is not _SCHEDULED or run.task is None:
                continue
            if run.task.done():
                self._finish(run, _judge(run.stop, asyncio.CancelledError("cancelled before its first step"), None))
            else:
                self._entering += 1

    async def _attempt(self, run: _Live, spec: _Spec) -> None:
        """One attempt, from its first step to its settlement."""
        self._entering -= 1
        _current.set(run)
        error: BaseException | None = None
        timer = None
        mono = self._mono
        begun = mono()
        try:
            if run.stop is None:  # else cancelled between create_task and this first step
                run.state = _RUNNING
                run._started = begun + self._offset
                run._took = None
                if self._on_event is not None:
                    self._emit(run)
                if spec.timeout is not None:
                    timer = self.loop.call_later(spec.timeout / 1000, self._interrupt, run, _Stop.TIMEOUT)
                plan = spec.plan
                run._value = await (plan.function(*run.args, **run.kwargs) if plan.direct else self._call(run, spec))
        except BaseException as raised:
            if self._ends_attempt(run, raised):
                raise
            error = raised
        if timer is not None:
            timer.cancel()
        run._took = mono() - begun
        if error is None and run.stop is None:
            self._finish(run, _SUCCESS)
            return
        outcome = _judge(run.stop, error, spec.timeout)
        if outcome.state is _FAILED:
            outcome = await self._after_failure(run, outcome)
        self._finish(run, outcome)

    async def _call(self, run: _Live, spec: _Spec) -> object:
        """A function that needs dependencies, or a thread."""
        if spec.plan.needs:
            return await self._call_with_needs(run, spec)
        return await self._call_plain(run, spec, run.kwargs)

    async def _call_with_needs(self, run: _Live, spec: _Spec) -> object:
        given = spec.plan.signature.bind_partial(*run.args, **run.kwargs).arguments
        async with AsyncExitStack() as stack:
            made = await _Resolver(stack, self._registry.overrides, self._app.get).fill(spec.plan.needs, given)
            kwargs = {**run.kwargs, **made}
            if spec.plan.is_async:
                return await spec.plan.function(*run.args, **kwargs)
            return await self._call_plain(run, spec, kwargs)
        raise AssertionError("no clean-up swallows what was raised")

    async def _call_plain(self, run: _Live, spec: _Spec, kwargs: Mapping[str, object]) -> object:
        call: Callable[[], object] = functools.partial(spec.plan.function, *run.args, **kwargs)
        if not self._clock.virtual:
            call = await self._thread_end(self._in_thread(call, spec.name))
        value = call()
        return await value if inspect.isawaitable(value) else value

    async def _thread_end(self, future: asyncio.Future[Callable[[], object]]) -> Callable[[], object]:
        # A thread can't be cancelled. Timeout: the task is cancelled, the thread goes on; were the wait to end here, a
        # second run would start beside it. So it goes on until the thread has ended, or the engine has given it up.
        while not future.done():
            try:
                await asyncio.wait({future})
            except asyncio.CancelledError:
                if self._closed:
                    raise
        return future.result()

    def _in_thread(self, call: Callable[[], object], name: str) -> asyncio.Future[Callable[[], object]]:
        """Run a plain function in a daemon thread of its own, in a copy of this context.

        The future's result is a function that returns what the call returned, or raises what it raised.
        """
        future: asyncio.Future[Callable[[], object]] = self.loop.create_future()
        context = copy_context()

        def deliver(ended: Callable[[], object]) -> None:
            self._returned.add(thread)
            if not future.done():
                future.set_result(ended)

        def work() -> None:
            try:
                ended = functools.partial(_identity, context.run(call))
            except BaseException as error:
                ended = functools.partial(_raise, error)
            with suppress(RuntimeError):  # the loop was closed long ago: the drain named this thread when it gave it up
                self.loop.call_soon_threadsafe(deliver, ended)

        thread = threading.Thread(target=work, name=f"bgjob {name}", daemon=True)
        thread.start()
        return future

    async def _after_failure(self, run: _Live, failed: _Outcome) -> _Outcome:
        """Another try, or the last word: `on_error`, in the attempt's own task and slot."""
        spec, error = run.lane.spec, cast(BaseException, failed.error)
        run.error, run._exception = _summary(error), error
        try:
            if _verdict(run.attempt, run.lost, spec.retries, spec.on_crash) == "run" and spec.retryable(error):
                return _Outcome(_SCHEDULED, error, delay=spec.delay(run.attempt, f"{run.id} {run.attempt}"))
        except BaseException as bug:
            if self._ends_attempt(run, bug):
                raise
            _log.error("%s: retry_on or retry_delay failed: %s", run, _summary(bug), exc_info=bug)
        if spec.on_error is not None:
            await self._hook(run, spec.on_error, error)
        return failed

    async def _hook(self, run: _Live, hook: OnError, error: BaseException) -> None:
        if run.task is not None and run.task.cancelling():
            run.task.uncancel()  # a timeout of ours is over; the hook's own timeouts and task groups look at this count
        try:
            async with asyncio.timeout((run.lane.spec.timeout or _HOOK_LIMIT) / 1000):
                if self._clock.virtual or _is_async(hook):
                    value = hook(run, error)
                else:
                    value = (await self._in_thread(functools.partial(hook, run, error), f"{run.job} on_error"))()
                if inspect.isawaitable(value):
                    await value
        except BaseException as bug:
            if self._ends_attempt(run, bug):
                raise
            _log.error("%s: on_error failed: %s", run, _summary(bug), exc_info=bug)

    def _ends_attempt(self, run: _Live, error: BaseException) -> bool:
        """Finish a run at Ctrl-C, where nobody turned it into a cancellation, or where its coroutine is being closed,
        with a closed loop or as garbage: no failure of the job, and not ours to swallow.

        The function's own GeneratorExit is a failure like any other: it comes while the run's task executes.
        """
        if isinstance(error, GeneratorExit):
            task = asyncio.current_task(self.loop)
            if task is not None and run in self._live and run.task in (None, task):  # None in an eager first step
                return False
        elif not isinstance(error, KeyboardInterrupt):
            return False
        self._finish(run, _Outcome(_CANCELLED, None, _Stop.SHUTDOWN))
        return True

    def _interrupt(self, run: _Live, why: _Stop) -> None:
        """Stop a run that has a slot: the reason first, then the signal; one without a task or a first step sees it."""
        if run.stop is None:
            run.stop = why
        if run.task is not None and run.state is _RUNNING:
            run.task.cancel()

    # Settle

    def _finish(self, run: _Live, outcome: _Outcome) -> None:
        """The end of an attempt: its slot is given back, exactly once, and its outcome recorded."""
        try:
            del self._live[run]
        except KeyError:  # given up at the end of a drain, and ended since
            return
        run.task = None
        lane = run.lane
        lane.busy -= 1
        if outcome is _SUCCESS:
            self._end(run, _SUCCEEDED)
        elif outcome.state is _SCHEDULED:
            self._again(run, outcome.delay)
        else:
            if outcome.error is not None:
                run.error, run._exception = _summary(outcome.error), outcome.error
                if outcome.state is _CANCELLED:
                    _log.error("%s failed while it was cancelled: %s", run, run.error, exc_info=outcome.error)
            self._end(run, outcome.state, outcome.reason)
        if lane.waiting:
            self._free(lane)
        if self._idle is not None and not self._live:
            self._wake_close()

    def _free(self, lane: _Lane) -> None:
        self._freed.append(lane)
        self._arm()

    def _again(self, run: _Live, delay: int) -> None:
        self._tell_again(run, delay)
        self._read_clocks()
        self._schedule(run, self._now + delay)
        self._arm()

    def _tell_again(self, run: _Live, delay: int) -> None:
        _log.warning(
            "%s failed at attempt %d of %d: %s; retry in %s",
            run, run.attempt, run.lane.spec.retries + 1, run.error, _span(delay),
        )  # fmt: skip
        run.state, run.stop = _SCHEDULED, None
        self._emit(run)

    def _end(self, run: _Live, state: State, reason: str | None = None) -> None:
        """The end of a run, in this process's books."""
        if run.call:
            del self._calls[run.id]
        else:
            lane = run.lane
            lane.unfinished -= 1
            if lane.parked is not None:
                self._free(lane)
        self._tell(run, state, reason)
        if run.call or state is not _SUCCEEDED:
            if run.key is not None:
                self._read_clocks()  # its key is kept from the end, and nothing may have woken us since the start
            self._past.add(run, self._now)

    def _tell(self, run: Run, state: State, reason: str | None = None) -> None:
        """A run's last change of state: told to the log, the hook and the waiters."""
        run.state = state
        if reason is not None:
            run.reason = reason
        if state is not _SUCCEEDED or _log.isEnabledFor(logging.INFO):
            _log_end(run)
        if self._on_event is not None:
            self._emit(run)
        if run._done is not None:
            run._done.set()

    def _emit(self, run: Run) -> None:
        if self._on_event is None:
            return
        try:
            self._on_event(run)
        except BaseException as bug:
            if isinstance(bug, KeyboardInterrupt):
                raise
            _log.error("%s: on_event failed: %s", run, _summary(bug), exc_info=bug)

    # What users ask for

    async def submit(self, job: Job, payload: str, delay: int, at: int | None, key: str | None) -> Run:
        lane = self._lanes.get(job.name)
        if self._closing:
            raise BgjobError(f"job {job.name!r}: submit(): run() is stopping, and memory would lose the run")
        if lane is None:
            raise BgjobError(f"job {job.name!r}: submit(): it isn't executed here; see jobs= and Registry.remove")
        self._read_clocks()
        id = self._ids.new(self._now) if key is None else f"{job.name}#{key}"
        known = None if key is None else self._calls.get(id) or self._past.taken(id, self._now)
        if known is not None:
            return known
        run = _Live(lane, self._now + delay if at is None else at, _NO_ARGS, self)
        run.args, run.kwargs = _arguments(payload)
        run.call, run.elapsed, run.key, run._id = True, at is None, key, id
        self._calls[id] = run
        self._schedule(run, run._at)
        self._arm()
        return run

    async def cancel(self, run: Run) -> bool:
        return isinstance(run, _Live) and self._cancel(run)

    def _cancel(self, run: _Live) -> bool:
        if run in self._live:
            self._interrupt(run, _Stop.CANCEL)
        elif run.state is _SCHEDULED:
            self._drop(run, _Stop.CANCEL)
        else:
            return False
        return True

    async def cancel_all(self, job: Job) -> int:
        runs = [run for run in self._unfinished() if run.job == job.name]
        return sum(self._cancel(run) for run in runs)

    async def ended(self, run: Run, timeout: float | None) -> None:
        if run.state not in (_SCHEDULED, _RUNNING):
            return
        run._done = run._done or asyncio.Event()
        self.loop.call_soon(self._check_entered)
        try:
            async with asyncio.timeout(timeout):
                await run._done.wait()
        except TimeoutError:
            raise TimeoutError(f"run {run.id!r} has not ended within {timeout:g} s; it is {run.state}") from None

    async def find(self, id: str) -> Run | None:
        known = self._calls.get(id) or self._past.get(id)
        return known or next((run for run in self._unfinished() if run.id == id), None)

    def _unfinished(self) -> Iterator[_Live]:
        yield from self._live
        yield from self._scheduled()

    def _scheduled(self, lane: _Lane | None = None) -> Iterator[_Live]:
        """The runs that wait: for their time, or for a slot."""
        due = [item for _, _, item in self._heap if isinstance(item, _Live) and item.state is _SCHEDULED]
        for one in (*self._lanes.values(), *self._retired) if lane is None else (lane,):
            due.extend(one.waiting or ())
        return (run for run in due if lane is None or run.lane is lane)

    def _drop(self, run: _Live, why: _Stop) -> None:
        """End a scheduled run. Its entry in the heap is left until most entries are dead, as asyncio does."""
        waiting = run.lane.waiting
        if waiting is not None and run in waiting:
            del waiting[run]
        else:
            self._dead += 1
        self._end(run, _CANCELLED, why)
        if self._dead > 100 and self._dead > len(self._heap) // 2:
            self._heap[:] = [e for e in self._heap if isinstance(e[2], _Lane) or e[2].state is _SCHEDULED]
            heapq.heapify(self._heap)
            self._dead = 0


class _Ids:
    """Ids of submitted runs: laid out as UUIDv7, so that they sort by submission, also within a millisecond."""

    def __init__(self, entropy: int) -> None:
        self._entropy = entropy & (1 << 62) - 1
        self._last = (0, 0)

    def new(self, now: int) -> str:
        ms, n = self._last
        if now > ms:
            ms, n = now, 0
        else:
            n += 1
        if n >> 12:
            ms, n = ms + 1, 0
        self._last = ms, n
        number = ms << 80 | 7 << 76 | n << 64 | 2 << 62 | self._entropy
        text = f"{number:032x}"
        return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def _app_needs(plans: Iterable[_Plan]) -> Iterator[_Dependency]:
    """The "app" dependencies of these functions, those of their "run" ones included."""
    for plan in {id(plan): plan for plan in plans if plan.needs}.values():
        for need in plan.needs.values():
            if need.scope == "app":
                yield need
            else:
                yield from _app_needs([need.plan])


def _examples(runs: Sequence[Run]) -> str:
    more = len(runs) - 3
    return ", ".join(map(str, runs[:3])) + (f" and {more} more" if more > 0 else "")


def _identity(value: object) -> object:
    return value


def _raise(error: BaseException) -> object:
    raise error


@contextmanager
def _signals(stop: Callable[[], None]) -> Generator[None, None, None]:
    """SIGINT and SIGTERM call `stop`, where nobody but Python or asyncio.run handles them; put back afterwards."""
    loop = asyncio.get_running_loop()
    previous: dict[signal.Signals, Callable[[int, FrameType | None], object] | int] = {}

    def on_signal(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(stop)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if handler in (signal.SIG_DFL, signal.default_int_handler) or _is_runners(handler):
                previous[number] = cast(signal.Handlers, handler)
                signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, cast(signal.Handlers, handler))


def _is_runners(handler: object) -> bool:
    """Whether asyncio.run installed it: it would cancel the main task, without a drain."""
    method = getattr(handler, "func", None)
    return isinstance(getattr(method, "__self__", None), asyncio.Runner)


# 9b Sharing -----------------------------------------------------------------------------------------------------------
# The engine beside others, with a store between them. A due tick goes from the heap to `_wanted`, is won in the store,
# taken and started; the end of a run goes to `_ended`, and is told once the store has it.

_PATIENCE = 5.0  # s that whoever submits or cancels waits for a store
_BACKOFF_FIRST, _BACKOFF_LAST = 500, 30_000  # ms between two tries to reach a store that is down
_AT_ONCE = 500  # ticks or ends in one call: more would hold the store's lock, and on SQLite the loop, for too long
_YIELD = 0.005  # s after which a loop that does nothing but submit lets others run
_TRUST = 0.8  # of a lease, without a beat: then another instance may soon start the run, so it is cancelled here


class _SharedLane(_Lane):
    """A lane whose ticks are handed out by a store: it is in the heap, or in the pump's hands, or parked."""

    __slots__ = ("at", "missed", "then", "walk")

    def __init__(self, spec: _Spec, seq: int) -> None:
        super().__init__(spec, seq)
        self.at: int = 0  # the next tick
        self.then: int | None = None  # the one after it
        self.missed: int | None = None  # the first of those that came due together with it
        self.walk: Iterator[int] = iter(())  # those after that

    def move(self, last: int) -> bool:
        """Make the first tick after `last` the next one; False where there is none."""
        if last != self.at or self.then is None:
            self.walk = cast(_Schedule, self.spec.schedule).ticks(last)
            self.then = next(self.walk, None)
        if self.then is None:
            return False
        self.at, self.then = self.then, next(self.walk, None)
        return True

    def offer(self, now: int) -> Tick:
        """The tick to ask for: of several that are due the newest, or with overlap="all" the oldest."""
        spec = self.spec
        every_one = spec.overlap == "all"
        if self.then is not None and self.then <= now and not every_one:
            self.missed = self.at if self.missed is None else self.missed
            self.move((_newest(cast(_Schedule, spec.schedule), self.at, now) or self.at) - 1)
        delay = 0
        if spec.jitter:
            upto = spec.jitter if self.then is None else min(spec.jitter, self.then - self.at)
            delay = _spread(_tick_id(spec.name, self.at), upto)
        free = spec.parallelism - self.busy
        return Tick(spec.name, self.at, delay, self.limit, every_one, free, spec.parallelism)


class _Ended(NamedTuple):
    """The end of an attempt that the store has yet to learn."""

    run: _Stored
    state: State
    reason: str | None
    delay: int = 0
    back: bool = False

    def settlement(self) -> Settlement:
        run = self.run
        result = None if self.state is not _SUCCEEDED else "null" if run._value is None else _result_json(run._value)
        reason = _Stop.CANCEL if self.state is _SCHEDULED else self.reason or run.reason
        return Settlement(
            run.id, run._token, run.job, run._at, run.call, self.state, self.delay, self.back,
            run.attempt, run.error, reason, result,
        )  # fmt: skip


class _Shared(_Engine):
    """Executes the jobs of a registry beside other instances. Jobs with `after` stay in this process, as in memory."""

    def __init__(
        self,
        registry: Registry,
        jobs: Sequence[str] | None,
        drain: int,
        on_event: Callable[[Run], object] | None,
        clock: _Clock,
        store: Store,
    ) -> None:
        super().__init__(registry, jobs, drain, on_event, clock)
        self._store = store
        self._lease = store.lease / 1000
        self._arrivals: dict[_SharedLane, bool] = {}  # to be enlisted; True where new, else once more after an outage
        self._wanted: dict[_SharedLane, None] = {}  # a tick of theirs is due
        self._ended: list[_Ended] = []
        self._look: dict[_Lane, None] = {}  # may have due runs in the store
        self._held: dict[str, _Stored] = {}  # claimed, and not settled yet
        self._handles: WeakValueDictionary[str, _Stored] = WeakValueDictionary()
        self._next_due = 0
        self._looked = self._mono()
        self._poked = asyncio.Event()
        self._synced = self._ending = False
        self._poll: asyncio.TimerHandle | None = None
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._watched: set[Run] = set()
        self._reached = asyncio.Event()
        self._down_since: float | None = None
        self._failures = 0
        self._doubt = False  # a settle whose reply was lost may have been applied
        self._yielded = 0.0

    # Open and close

    async def _begin(self, jobs: Sequence[Job]) -> None:
        owner = _owner_name(self._clock.entropy())
        await self._store.open(owner, self._hint)
        try:
            for job in jobs:
                self._heap.extend(self._enter(job))
            heapq.heapify(self._heap)
            try:
                await self._enlist()
            except Unreachable as error:
                self._went_down(error)
        except BaseException:
            await self._store.close()
            raise
        _log.info("bgjob %s runs %d jobs as %s", __version__, len(self._lanes), owner)
        self._spawn("pump", self._pump)
        self._spawn("keeper", self._keeper)
        self._look_everywhere()

    def _spawn(self, name: str, duty: Callable[[], Coroutine[object, object, None]]) -> None:
        """Keep a task for a duty. Somebody who cancels all tasks of the loop may not end it: runs would hang."""

        def ended(task: asyncio.Task[None]) -> None:
            if not self._ending:
                self._spawn(name, duty)

        task = self._tasks[name] = self.loop.create_task(duty(), name=f"bgjob {name}")
        task.add_done_callback(ended)

    def _enter(self, job: Job) -> list[_Entry]:
        lane = _SharedLane(job._spec, next(self._seq))
        self._lanes[job.name] = lane
        self._arrivals[lane] = True
        self._poked.set()
        return [] if job._spec.after is None else [(self._now + job._spec.after, lane.seq, lane)]

    def _retire(self, lane: _Lane) -> None:
        super()._retire(lane)
        self._arrivals.pop(cast(_SharedLane, lane), None)
        self._wanted.pop(cast(_SharedLane, lane), None)
        self._look.pop(lane, None)

    async def _abandon_runs(self) -> None:
        """What would not stop keeps its lease, which then ends by itself; the pump tells the store all the rest."""
        for run in self._live:
            if isinstance(run, _Stored):
                run.gone = True
        await super()._abandon_runs()
        self._ending = True
        self._poked.set()
        self._reached.set()  # no back-off is waited for any more
        try:
            await asyncio.wait({self._tasks["pump"]}, timeout=_GRACE)
            if self._ended:
                _log.error("store unreachable: %d results are lost with this process", len(self._ended))
        finally:
            for task in self._tasks.values():
                task.cancel()
            if self._poll is not None:
                self._poll.cancel()
            self._look_again()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)
            await self._store.close()

    # Wait

    def _read_clocks(self) -> None:
        self._now = int((self._mono() + self._offset) * 1000)

    def _heard(self, now: int, asked: float) -> None:
        """The store's clock, from an answer to what was asked at `asked`.

        It was read between then and now, and is cut to whole milliseconds: what is known of it is an interval. Within
        that nothing is changed, so that the timer is neither early, which costs a second question, nor late.
        """
        low, high = now / 1000 - self._mono(), (now + 1) / 1000 - asked
        step = 0.0 if low <= self._offset <= high else (low if self._offset < low else high) - self._offset
        self._offset += step
        self._read_clocks()
        if abs(step) > _JUMP and self._synced:
            _log.warning("the store's clock went %s by %s", "forward" if step > 0 else "back", _span(abs(step) * 1000))
            self._armed = math.inf
            self._arm()
        self._synced = True

    def _hint(self) -> None:
        self._look_again()
        self._look_everywhere()

    def _look_again(self) -> None:
        """Whoever waits for the end of a run that is executed elsewhere asks for it."""
        for run in self._watched:
            cast(asyncio.Event, run._done).set()

    def _look_everywhere(self) -> None:
        self._look = dict.fromkeys(self._lanes.values())
        self._looked = self._mono()
        self._next_due = sys.maxsize  # until a claim says more; where none follows, as in a drain, the poll is enough
        self._poked.set()

    def _plan(self) -> None:
        """Look again when the next run is due, and now and then even so: hints may be lost, and instances die. That
        counts from the last look everywhere, or a tick every second would put it off for ever."""
        if self._poll is not None:
            self._poll.cancel()
        when = min(self._next_due / 1000 - self._offset, self._looked + self._store.poll / 1000)
        self._poll = self.loop.call_at(when, self._look_everywhere)

    async def _pump(self) -> None:
        while not self._ending or self._ended:
            try:
                await self._poked.wait()
                self._poked.clear()
                await self._exchange()
            except StoreError as error:
                self._went_down(error)
                self._failures += 1
                await self._back_off()
            except Exception as bug:  # else one bug would stop every job for good
                _log.error("bgjob itself failed: %s", _summary(bug), exc_info=bug)
                await asyncio.sleep(1)
            self._plan()

    async def _exchange(self) -> None:
        """What there is to say to the store, each verb once for all."""
        if self._entering:
            self._check_entered()
        if self._arrivals and not self._closing:
            await self._enlist()
        settled = len(self._ended)
        while self._ended:
            await self._settle()
        if not self._closing:
            while self._wanted:
                await self._hand_out()
            if self._look or self._down_since is not None:
                await self._claim()
        if self._down_since is not None and (settled or not self._closing):
            self._came_back(settled)

    def _went_down(self, error: StoreError) -> None:
        if self._down_since is None:
            _log.warning("store unreachable: %s; retrying", error)
            self._down_since = self._mono()
        self._doubt = True
        for lane in self._lanes.values():
            self._arrivals.setdefault(cast(_SharedLane, lane), False)  # it may have lost everything
        self._reached.clear()
        self._poked.set()

    def _came_back(self, settled: int) -> None:
        gone, self._down_since, self._failures = self._mono() - cast(float, self._down_since), None, 0
        _log.warning("store back after %s, %d results settled", _span(gone * 1000), settled)

    async def _back_off(self) -> None:
        """Wait before the next try; shorter where a beat has come through, or at the end, when there's little time."""
        top = min(_BACKOFF_FIRST << min(self._failures - 1, 10), _BACKOFF_LAST)
        delay = top - _spread(f"{id(self)} {self._failures}", top // 2)
        await _set_within(min(delay, 200 if self._ending else delay) / 1000, self._reached)

    # Admit

    async def _enlist(self) -> None:
        lanes = list(self._arrivals)
        asked = self._mono()
        now, lasts = await self._store.enlist({lane.spec.name: _listing(lane.spec) for lane in lanes})
        self._heard(now, asked)
        for lane in lanes:
            new = self._arrivals.pop(lane, False)  # also where it was removed meanwhile
            if new and lane.spec.schedule is not None and lane.move(lasts[lane.spec.name]):
                heapq.heappush(self._heap, (lane.at, lane.seq, lane))
        self._look_everywhere()
        self._arm()

    def _tick(self, lane: _Lane, at: int) -> None:
        if lane.spec.schedule is None:
            super()._tick(lane, at)
        else:
            heapq.heappop(self._heap)
            self._wanted[cast(_SharedLane, lane)] = None
            self._poked.set()

    async def _hand_out(self) -> None:
        self._read_clocks()
        while self._heap and self._heap[0][0] <= self._now and len(self._wanted) < _AT_ONCE:
            lane = self._heap[0][2]
            if not isinstance(lane, _SharedLane) or lane.spec.schedule is None:
                break
            heapq.heappop(self._heap)  # or a thousand jobs of one second would be a call for each of _admit's batches
            self._wanted[lane] = None
        lanes = list(itertools.islice(self._wanted, _AT_ONCE))
        asked = self._mono()
        now, answers = await self._store.tick([lane.offer(self._now) for lane in lanes])
        self._failures = 0
        self._heard(now, asked)
        for lane, answer in zip(lanes, answers, strict=True):
            if lane in self._wanted:  # else its job was removed meanwhile, and only what it won still counts
                del self._wanted[lane]
                self._answered(lane, answer)
            if answer.run is not None:
                self._take(answer.run, asked, lane)
        self._arm()

    def _answered(self, lane: _SharedLane, answer: Answer) -> None:
        tick = answer.tick
        if answer.word == "early":
            heapq.heappush(self._heap, (max(tick.at, self._now + 1), lane.seq, lane))
            return
        if answer.word == "full":
            lane.parked = tick.at
            return
        if answer.word == "skipped":
            self._overlapped(_Live(lane, tick.at, lane.spec.args, self))
        elif answer.word == "won":
            self._won(lane, answer)
        lane.missed = None
        if lane.move(max(tick.at, answer.last)):
            heapq.heappush(self._heap, (lane.at, lane.seq, lane))

    def _won(self, lane: _SharedLane, answer: Answer) -> None:
        tick = answer.tick
        if lane.missed is not None:
            _log_gap(lane.spec.name, cast(_Schedule, lane.spec.schedule), lane.missed, tick.at)
        if lane.skipped:
            _log.warning("job %r runs again: %d ticks were skipped", lane.spec.name, lane.skipped)
            lane.skipped = 0
        if answer.run is None:
            self._expect(lane, tick.at + tick.delay)

    def _expect(self, lane: _Lane, due: int) -> None:
        """The store has a run of this lane that is due then."""
        if due > self._now:
            self._next_due = min(self._next_due, due)
        else:
            self._look[lane] = None
        self._poked.set()

    async def _claim(self) -> None:
        lanes, self._look = self._look, {}
        if len(lanes) >= len(self._lanes):
            self._next_due = sys.maxsize  # before it is asked: what is submitted meanwhile isn't in the answer
        free = {
            lane.spec.name: (lane.spec.parallelism - lane.busy, lane.spec.parallelism)
            for lane in lanes
            if lane.busy < lane.spec.parallelism and self._lanes.get(lane.spec.name) is lane
        }
        asked = self._mono()
        try:
            news = await self._store.claim(free)
        except BaseException:
            self._look.update(lanes)
            raise
        self._heard(news.now, asked)
        next_due = sys.maxsize if news.next_due is None else news.next_due
        self._next_due = min(self._next_due, next_due)
        asking = {lane.spec.name: lane for lane in lanes}
        for claimed in news.runs:
            self._take(claimed, asked, asking[claimed.job])
        for id in news.cancelled:
            if id in self._held:
                self._cut(self._held[id], _Stop.CANCEL)
        for lane in lanes:
            if lane.parked is not None:
                self._unpark(cast(_SharedLane, lane))

    def _unpark(self, lane: _SharedLane) -> None:
        lane.parked = None
        self._wanted[lane] = None
        self._poked.set()

    def _take(self, claimed: Claimed, asked: float, lane: _Lane) -> None:
        """Start a run that the store gave us, also where its job was removed or replaced while we asked."""
        lane = self._lanes.get(claimed.job) or lane
        run = self._handles.get(claimed.id) if claimed.call else None
        # A key may be another submission's by now; and an attempt whose lease was lost may still be ending here.
        if run is None or run in self._live or run.payload != claimed.args or run.state not in (_SCHEDULED, _RUNNING):
            run = self._handle(claimed.id, lane, claimed.at, claimed.call, claimed.args)
        run.gone, run.leased, run.lost = False, asked, claimed.lost
        run.attempt, run._token, run.state = claimed.tries - 1, claimed.token, _SCHEDULED
        if claimed.token > 1:
            run._started = run._started or self._now / 1000  # judged by `expires` when it first started
        # Its own claim, which is counted already, has yet to end.
        if claimed.lost and _verdict(claimed.tries - 1, claimed.lost, lane.spec.retries, lane.spec.on_crash) == "fail":
            run.stop, run.attempt = _Stop.CRASH, claimed.tries - 2
        self._held[claimed.id] = run
        if claimed.cancel:
            self._end(run, _CANCELLED, _Stop.CANCEL)
        elif self._closing:
            self._send(_Ended(run, _SCHEDULED, _Stop.SHUTDOWN, back=True))
        elif self._mono() - asked >= self._lease * _TRUST:  # frozen since it was asked for: it may run elsewhere by now
            self._send(_Ended(run, _SCHEDULED, _Stop.LEASE, back=True))
        else:
            self._start(run)

    def _handle(self, id: str, lane: _Lane, at: int, call: bool, payload: str) -> _Stored:
        run = _Stored(lane, at, _NO_ARGS if call else lane.spec.args, self)
        run._id, run.call = id, call
        if call:
            run.payload = payload
            run.args, run.kwargs = _arguments(payload)
            _, mark, key = id.partition("#")
            run.key = key if mark else None
        return run

    # Settle

    def _cut(self, run: _Live, why: _Stop) -> None:
        # Once: the store tells of a cancelled run at every beat and claim, and its `finally` may be at work by then.
        if run in self._live and run.stop is None:
            self._interrupt(run, why)

    def _again(self, run: _Live, delay: int) -> None:
        if isinstance(run, _Stored):
            self._send(_Ended(run, _SCHEDULED, None, delay))
        else:
            super()._again(run, delay)

    def _end(self, run: _Live, state: State, reason: str | None = None) -> None:
        if not isinstance(run, _Stored):
            super()._end(run, state, reason)
        elif run.gone:
            self._let_go(run, reason or _Stop.LEASE)
        elif reason in (_Stop.SHUTDOWN, _Stop.LEASE) and run.lane.spec.on_crash == "rerun":
            self._send(_Ended(run, _SCHEDULED, reason, back=True))
        else:
            self._send(_Ended(run, state, reason))

    def _send(self, end: _Ended) -> None:
        self._ended.append(end)
        self._poked.set()

    async def _settle(self) -> None:
        ended = self._ended[:_AT_ONCE]
        answers = await self._store.settle([end.settlement() for end in ended])
        self._failures = 0
        del self._ended[: len(ended)]
        doubt, self._doubt = self._doubt, bool(self._ended) and self._doubt
        for end, answer in zip(ended, answers, strict=True):
            run = end.run
            self._held.pop(run.id, None)
            self._look[run.lane] = None
            if answer == "refused" and not (doubt and self._mono() - run.leased < self._lease):  # else it was applied
                self._let_go(run, _Stop.LEASE)
            elif answer == "cancelled":
                self._tell(run, _CANCELLED, _Stop.CANCEL)
            elif end.back:
                self._handed_back(run, cast(str, end.reason))
            elif end.state is _SCHEDULED:
                self._tell_again(run, end.delay)
            else:
                self._tell(run, end.state, end.reason)

    def _let_go(self, run: _Stored, reason: str) -> None:
        """The run is another instance's, or will be when its lease ends; what happened here doesn't count."""
        self._held.pop(run.id, None)
        _log.warning("%s: %s; its attempt %d here does not count", run, reason, run.attempt)
        self._put_back(run, reason)

    def _handed_back(self, run: _Stored, reason: str) -> None:
        _log.info("%s handed back: %s", run, reason)
        run.attempt -= 1
        self._put_back(run, reason)

    def _put_back(self, run: _Stored, reason: str) -> None:
        run.state, run.reason, run.stop = _SCHEDULED, reason, None
        self._emit(run)
        if run._done is not None:
            run._done.set()

    # Beat

    async def _keeper(self) -> None:
        """Extend the leases of all that is held; cancel what can't be trusted to be ours any more."""
        while True:
            oldest = min((run.leased for run in self._held.values()), default=None)
            due = self._lease / 3 if oldest is None else oldest + self._lease / 3 - self._mono()
            await asyncio.sleep(max(due, self._lease / 30))
            await self._beat()

    async def _beat(self) -> None:
        held = self._held.copy()
        asked = self._mono()
        # Of what has ended, or is being stopped already, nothing is left to be cut.
        trusted = (run.leased for run in held.values() if run in self._live and run.stop is None)
        fence = min(trusted, default=asked) + self._lease * _TRUST - asked
        # A job blocked this loop: a thread may have beaten meanwhile, and if none has, the answer says so.
        if fence <= 0 and self._down_since is None:
            fence = self._lease
        try:
            async with asyncio.timeout(max(0.01, min(self._lease / 4, fence))):
                answers = await self._store.beat({id: run._token for id, run in held.items()})
        except (StoreError, TimeoutError) as error:
            self._went_down(error if isinstance(error, StoreError) else Unreachable("no answer to a beat"))
            for run in held.values():
                if self._mono() - run.leased >= self._lease * _TRUST:
                    self._cut(run, _Stop.LEASE)
            return
        self._reached.set()
        for id, run in held.items():
            if id in answers:
                run.leased = asked
            if answers.get(id):
                self._cut(run, _Stop.CANCEL)
            elif id not in answers and self._held.get(id) is run and run in self._live:
                run.gone = True
                self._cut(run, _Stop.LEASE)

    # What users ask for

    async def _insist(self, what: str, verb: Callable[[], Awaitable[T]], began: float | None = None) -> T:
        """The answer to a verb, or `StoreError` after some seconds; it is repeated meanwhile, as all of them may be."""
        end = (self._mono() if began is None else began) + _PATIENCE
        while True:
            try:
                async with asyncio.timeout(end - self._mono()):
                    return await verb()
            except (Unreachable, TimeoutError) as error:
                if end - self._mono() < 0.2:
                    why = str(error) or "no answer"
                    raise StoreError(f"{what}: the store is unreachable for {_PATIENCE:g} s: {why}") from error
            await asyncio.sleep(0.1)

    async def submit(self, job: Job, payload: str, delay: int, at: int | None, key: str | None) -> Run:
        if self._closed:
            raise BgjobError(f"job {job.name!r}: submit(): run() has stopped")
        lane = self._lanes.get(job.name)
        self._read_clocks()
        id = self._ids.new(self._now) if key is None else f"{job.name}#{key}"
        call = Call(id, job.name, at, delay, payload)
        wake = lane is None or lane.busy >= lane.spec.parallelism
        while True:
            began = self._mono()
            try:
                (stored,) = await self._store.push([call], wake)
            except Unreachable:
                what = f"job {job.name!r}: submit()"
                (stored,) = await self._insist(what, lambda: self._store.push([call], wake), began)
            if stored is not None or key is None:
                break
            known = await self.find(id)
            if known is not None:
                return known
        run = self._submitted(job, call, lane, self._now + delay if stored is None else stored)
        # SQLite answers without a pause, and a loop of submits must not keep everybody else from running.
        if self._mono() - self._yielded > _YIELD:
            await asyncio.sleep(0)
            self._yielded = self._mono()
        return run

    def _submitted(self, job: Job, call: Call, lane: _Lane | None, at: int) -> Run:
        run = self._handle(call.id, lane or _Lane(job._spec, 0), at, True, call.args)
        self._handles[call.id] = run
        if lane is not None:
            self._expect(lane, at)
        return run

    async def cancel(self, run: Run) -> bool:
        if isinstance(run, _Live) and not isinstance(run, _Stored):
            return self._cancel(run)
        if run.state not in (_SCHEDULED, _RUNNING):
            return False
        found = await self._insist(f"{run}: cancel()", lambda: self._store.cancel(run.job, run.id))
        self._cancelled(run.job, found, run)
        return bool(found)

    async def cancel_all(self, job: Job) -> int:
        found = await self._insist(f"job {job.name!r}: cancel()", lambda: self._store.cancel(job.name))
        self._cancelled(job.name, found)
        own = [run for run in self._unfinished() if run.job == job.name and not isinstance(run, _Stored)]
        return len(found) + sum(map(self._cancel, own))

    def _cancelled(self, job: str, found: Mapping[str, Cancelled], asked: Run | None = None) -> None:
        for id, (signalled, at) in found.items():
            if signalled:
                if id in self._held:
                    self._cut(self._held[id], _Stop.CANCEL)
                continue
            run = asked or self._handles.get(id) or Run(job, at, _NO_ARGS, self)
            run._id = id
            if run.state in (_SCHEDULED, _RUNNING):
                self._tell(run, _CANCELLED, _Stop.CANCEL)

    async def ended(self, run: Run, timeout: float | None) -> None:
        if isinstance(run, _Live) and not isinstance(run, _Stored):
            await super().ended(run, timeout)
            return
        try:
            async with asyncio.timeout(timeout):
                await self._watch(run)
        except TimeoutError:
            raise TimeoutError(f"run {run.id!r} has not ended within {timeout:g} s; it is {run.state}") from None

    async def _watch(self, run: Run) -> None:
        """Wait until a run is over, wherever it is executed; a hint may be lost, so it is asked for now and then."""
        run._done = run._done or asyncio.Event()
        delay = 0.05
        self._watched.add(run)
        try:
            while run.state in (_SCHEDULED, _RUNNING):
                if self._closed:
                    raise BgjobError(f"run {run.id!r} is {run.state}, and run() has stopped here")
                run._done.clear()
                if self._held.get(run.id) is not run and await self._refresh(run):
                    return
                await _set_within(delay, run._done)
                delay = min(delay * 1.5, 1.0)
        finally:
            self._watched.discard(run)

    async def _refresh(self, run: Run) -> bool:
        """Learn from the store what became of a run; whether that was its end."""
        row = await self._insist(f"{run}: result()", lambda: self._store.find(run.id, watch=True))
        if self._held.get(run.id) is run or run.state not in (_SCHEDULED, _RUNNING):
            return False
        if row is None:
            raise BgjobError(f"run {run.id!r} is no longer kept: the store keeps ends for a limited time, see keep=")
        _learn(run, row)
        return row.finished is not None

    async def find(self, id: str) -> Run | None:
        local = self._held.get(id) or await super().find(id)
        if local is not None:
            return local
        row = await self._insist("find()", lambda: self._store.find(id))
        if row is None:
            return None
        job = self._registry.jobs.get(row.job)
        args, kwargs = _arguments(row.args)
        if job is not None and id.startswith(f"{row.job}@"):
            kwargs = job._spec.args
        run: Run = Run(row.job, row.at, kwargs, self)
        run.args, run._id = args, id
        run.key = id.partition("#")[2] or None
        _learn(run, row)
        return run


async def _set_within(seconds: float, event: asyncio.Event) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


def _learn(run: Run, row: Row) -> None:
    """Write what the store knows on a handle."""
    run.state, run.attempt, run._token = row.state, row.attempt, row.token
    run.error, run.reason = row.error, row.reason
    if row.since is not None:
        run._started = row.since / 1000
        run._took = None if row.finished is None else (row.finished - row.since) / 1000
    if row.state is _SUCCEEDED:
        run._value = _NOT_KEPT if row.result is None else _loads(row.result)


def _result_json(value: object) -> str | None:
    try:
        text = _dumps(value)
    except Exception:  # an object of the user's, whose methods may raise anything
        return None
    return text if len(text) <= _MAX_ARGS else None


def _listing(spec: _Spec) -> Listing:
    schedule = spec.schedule
    if isinstance(schedule, _Cron):
        text = _dumps({"cron": schedule.text, "tz": str(schedule.zone)})
    else:
        text = "" if schedule is None else _dumps({"every": schedule.every})
    return Listing(text, spec.immediate, spec.timeout)


def _owner_name(entropy: int) -> str:
    """An instance's name, new at every start: the random part is its identity, the rest tells people where it is."""
    import platform

    return f"{platform.node()}:{os.getpid()}:{entropy:016x}"


# 10 Adapters ----------------------------------------------------------------------------------------------------------
# The stores. Statements stand on top, with the default prefix; the methods follow the order of `Store`. Before you add
# one: it must pass the conformance tests against a real server in CI.

_LOG = 16 << 20  # bytes of SQLite's log that are cut off
_GLANCE = 5.0  # s between two looks whether other processes wrote to an SQLite file, and whether its log is long
_VERB_LIMIT = 4.0  # s that one verb may take, or a quarter of the lease: less than whoever submits waits


def _lease(lease: Duration) -> int:
    ms = _duration("lease", lease, 1000)
    if ms < 10_000:
        _log.warning("lease=%r is short: a process that pauses for longer loses its runs; 30s is the default", lease)
    return ms


def _driver(module: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise StoreError(f"this store needs {module}: pip install 'bgjob[{extra}]'") from error


def _checked_prefix(prefix: object) -> str:
    if not isinstance(prefix, str) or re.fullmatch("[a-z][a-z0-9_]{0,29}", prefix) is None:
        raise StoreError(f"prefix={prefix!r}: write up to 30 of a-z, 0-9 and _, a letter first")
    return prefix


class _Statements:
    """The SQL of a store, for tables with its prefix."""

    def __init__(self, prefix: str) -> None:
        for name, sql in vars(type(self)).items():
            if not name.startswith("__"):
                setattr(self, name, sql.replace("bgjob_", f"{prefix}_"))


def _decide(tick: Tick, now: int, last: int, unfinished: int, busy: int, waiting: int) -> Answer:
    """What becomes of a tick. The winner starts it at once where there's room and nobody of its job waits before it."""
    if last >= tick.at:
        return Answer(tick, "lost", last)
    if tick.at > now:
        return Answer(tick, "early", last)
    if unfinished >= tick.limit:
        return Answer(tick, "full" if tick.hold else "skipped", last)
    if tick.delay or waiting or tick.free <= 0 or busy >= tick.parallelism:
        return Answer(tick, "won", tick.at)
    return Answer(tick, "won", tick.at, Claimed(tick.id, tick.job, tick.at, False, "", 1, 0, 1, False))


def _let_go(held: dict[str, int], runs: Iterable[tuple[str, int]]) -> None:
    """Forget claims, unless the run has been claimed again under another token."""
    for id, token in runs:
        if held.get(id) == token:
            del held[id]


def _schema(tick: str, run: str, past: str) -> str:
    """The tables that the SQL stores have in common, which differ in their options."""
    return f"""
        CREATE TABLE IF NOT EXISTS bgjob_tick(
          job TEXT PRIMARY KEY, last BIGINT NOT NULL, schedule TEXT NOT NULL, timeout BIGINT) {tick};
        CREATE TABLE IF NOT EXISTS bgjob_run(
          id TEXT PRIMARY KEY, job TEXT NOT NULL, due BIGINT NOT NULL, at BIGINT NOT NULL, call INTEGER NOT NULL,
          args TEXT NOT NULL DEFAULT '', tries INTEGER NOT NULL DEFAULT 0, lost INTEGER NOT NULL DEFAULT 0,
          token INTEGER NOT NULL DEFAULT 0, owner TEXT, since BIGINT, error TEXT, cancel INTEGER NOT NULL DEFAULT 0,
          awaited INTEGER NOT NULL DEFAULT 0) {run};
        CREATE INDEX IF NOT EXISTS bgjob_due ON bgjob_run(job, due, id);
        CREATE INDEX IF NOT EXISTS bgjob_busy ON bgjob_run(job) WHERE owner IS NOT NULL;
        CREATE INDEX IF NOT EXISTS bgjob_ticks ON bgjob_run(job) WHERE call = 0;
        CREATE INDEX IF NOT EXISTS bgjob_flagged ON bgjob_run(owner) WHERE cancel = 1;
        CREATE TABLE IF NOT EXISTS bgjob_past(
          id TEXT PRIMARY KEY, job TEXT NOT NULL, state TEXT NOT NULL, at BIGINT NOT NULL, args TEXT NOT NULL,
          attempt INTEGER NOT NULL, token INTEGER NOT NULL, owner TEXT, since BIGINT, finished BIGINT NOT NULL,
          error TEXT, reason TEXT, result TEXT) {past};
        CREATE INDEX IF NOT EXISTS bgjob_past_finished ON bgjob_past(finished);"""


_PAST_ROW = "id, job, state, at, finished, args, attempt, token, owner, since, finished, error, reason, result"
_SQLITE_ROW = """id, job, CASE WHEN owner IS NOT NULL AND due > ? THEN 'running' ELSE 'scheduled' END, at, due, args,
    tries, token, owner, since, NULL, error, NULL, NULL"""


class _SQLiteStatements(_Statements):
    """The immediate transaction that most stand in serialises writers, so that counts and limits are exact."""

    schema: str = f"""{_schema("WITHOUT ROWID", "WITHOUT ROWID", "WITHOUT ROWID")}
        CREATE TABLE IF NOT EXISTS bgjob_peer(owner TEXT PRIMARY KEY, port INTEGER NOT NULL, seen INTEGER NOT NULL);"""
    enlist: str = """INSERT INTO bgjob_tick(job, last, schedule, timeout) VALUES(?, ?, ?, ?) ON CONFLICT(job)
        DO UPDATE SET last = CASE WHEN schedule = excluded.schedule THEN last ELSE excluded.last END,
        schedule = excluded.schedule, timeout = excluded.timeout"""
    last: str = "SELECT job, last FROM bgjob_tick WHERE job IN (SELECT key FROM json_each(?))"
    # how far the others have gone with the ticks that are asked for: the least and the most
    ahead: str = """SELECT min(ifnull(last, 0) - value), max(ifnull(last, 0) - value)
        FROM json_each(?) LEFT JOIN bgjob_tick ON job = key"""
    # whose lease has ended counts as busy, too: it is due, and with one that waits no tick is started at once
    facts: str = """SELECT t.job, t.last, (SELECT count(*) FROM bgjob_run r WHERE r.job = t.job AND r.call = 0),
        (SELECT count(*) FROM bgjob_run r WHERE r.job = t.job AND r.owner IS NOT NULL),
        EXISTS(SELECT 1 FROM bgjob_run r WHERE r.job = t.job AND r.due <= ?)
        FROM bgjob_tick t WHERE t.job IN (SELECT key FROM json_each(?))"""
    handed_out: str = "UPDATE bgjob_tick SET last = ? WHERE job = ?"
    won: str = """INSERT INTO bgjob_run(id, job, due, at, call, tries, token, owner, since)
        VALUES(?, ?, ?, ?, 0, ?, ?, ?, ?) ON CONFLICT DO NOTHING"""
    mine: str = "SELECT id FROM bgjob_run WHERE owner = ? AND since = ?"
    push: str = """INSERT INTO bgjob_run(id, job, due, at, call, args, token)
        SELECT c.id, c.job, c.at, c.at, 1, c.args, ifnull(p.token, 0)
        FROM (SELECT ? AS id, ? AS job, ? AS at, ? AS args) c LEFT JOIN bgjob_past p ON p.id = c.id
        WHERE p.id IS NULL OR p.state NOT IN ('succeeded', 'failed') OR p.finished <= ? ON CONFLICT DO NOTHING"""
    # two seeks a job: no job blocks another's head of line
    heads: str = """SELECT j.value, EXISTS(SELECT 1 FROM bgjob_run WHERE job = j.value AND due <= ?),
        (SELECT min(due) FROM bgjob_run WHERE job = j.value AND due > ?) FROM json_each(?) j"""
    flagged: str = "SELECT id FROM bgjob_run WHERE owner = ? AND cancel = 1"
    # "+due" keeps the planner off bgjob_due: it would walk over all that waits
    busy: str = "SELECT count(*) FROM bgjob_run WHERE job = ? AND owner IS NOT NULL AND +due > ?"
    claim: str = """UPDATE bgjob_run SET owner = ?, due = ?, since = ?, token = token + 1, tries = tries + 1,
        lost = lost + (owner IS NOT NULL) WHERE id IN (
        SELECT id FROM bgjob_run WHERE job = ? AND due <= ? ORDER BY due, id LIMIT ?)
        RETURNING id, job, at, call, args, tries, lost, token, cancel"""
    beat: str = "UPDATE bgjob_run SET due = ? WHERE id = ? AND token = ? RETURNING cancel"
    again: str = """UPDATE bgjob_run SET due = ?, owner = NULL, tries = tries - ?, error = ?
        WHERE id = ? AND token = ? AND cancel = 0"""
    finish: str = "DELETE FROM bgjob_run WHERE id = ? AND token = ? RETURNING args, owner, since, awaited"
    finish_plain: str = """DELETE FROM bgjob_run WHERE id IN (SELECT value FROM json_each(?)) AND owner = ?
        AND awaited = 0 RETURNING id"""
    remember: str = """INSERT OR REPLACE INTO bgjob_past(id, job, state, at, args, attempt, token, owner, since,
        finished, error, reason, result) VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"""
    prune: str = """DELETE FROM bgjob_past WHERE id IN (
        SELECT id FROM bgjob_past WHERE finished <= ? ORDER BY finished LIMIT ?)"""
    # whose lease has ended is removed then
    signal: str = """UPDATE bgjob_run SET cancel = 1
        WHERE job = ? AND id = ifnull(?, id) AND owner IS NOT NULL RETURNING id, at"""
    remove: str = """DELETE FROM bgjob_run WHERE id IN (
        SELECT id FROM bgjob_run WHERE id = ? AND job = ? AND (owner IS NULL OR due <= ?) UNION ALL
        SELECT id FROM bgjob_run WHERE ? IS NULL AND job = ? AND (owner IS NULL OR due <= ?) LIMIT 1000)
        RETURNING id, job, at, args, tries, token, owner, since, error"""
    find: str = f"SELECT {_SQLITE_ROW}, awaited FROM bgjob_run WHERE id = ?"
    find_past: str = f"SELECT {_PAST_ROW} FROM bgjob_past WHERE id = ?"
    jobs: str = "SELECT job, last, schedule, timeout FROM bgjob_tick ORDER BY job"
    running: str = f"SELECT {_SQLITE_ROW} FROM bgjob_run WHERE owner IS NOT NULL AND +due > ? ORDER BY since"
    due: str = f"SELECT {_SQLITE_ROW} FROM bgjob_run WHERE tries = 0 ORDER BY due, id LIMIT ?"
    retrying: str = f"""SELECT {_SQLITE_ROW} FROM bgjob_run WHERE tries > 0 AND (owner IS NULL OR due <= ?)
        ORDER BY due, id LIMIT ?"""
    failed: str = f"""SELECT {_PAST_ROW} FROM bgjob_past WHERE state = 'failed'
        ORDER BY finished DESC LIMIT ?"""
    watch: str = "UPDATE bgjob_run SET awaited = 1 WHERE id = ?"
    peers: str = "SELECT owner, port FROM bgjob_peer WHERE owner <> ?"
    here: str = "INSERT OR REPLACE INTO bgjob_peer(owner, port, seen) VALUES(?, ?, ?)"
    gone: str = "DELETE FROM bgjob_peer WHERE owner = ? OR seen < ?"


class SQLiteStore:
    """A file that the processes of one machine share. Not for network drives, whose locks can't be relied on.

    Transactions take some 30 µs, a third of a change of threads, so they run in the event loop, but nothing that can
    take long does: a lock is waited for by sleeping, and checkpoints, which write to the disk, are made by a thread.
    The same thread beats where the loop doesn't, because a job blocks it.

    Args:
        path: the file, made on first use. Its folder must exist.
        prefix: of the tables' names: two applications can share a file. Default: "bgjob".
        lease: how long the runs of an instance that died stay its own; 10 s or more is wise. Default: 30 s.
        keep: how long ends and results are kept, and keys taken. Default: a day.

    Raises:
        StoreError: the prefix is wrong; from `run()`: the file can't be opened, written or is no database.
        ScheduleError: a duration is wrong.
    """

    poll: int = _SLICE  # it looks by itself

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        prefix: str = "bgjob",
        lease: Duration = "30s",
        keep: Duration = "1d",
    ) -> None:
        self.path: str = os.fspath(path)
        # Whatever folder the process goes to. What SQLite keeps in memory is no file, and is refused.
        self._file = self.path if self.path == ":memory:" else os.path.abspath(self.path)
        self.lease: int = _lease(lease)
        self.keep: int = _duration("keep", keep, 1)
        self._sql = _SQLiteStatements(_checked_prefix(prefix))
        self._db: sqlite3.Connection | None = None
        self._held: dict[str, int] = {}
        self._writes = 0
        self._fault: str | None = None
        self._opened = False

    def __repr__(self) -> str:
        return f"SQLiteStore({self.path!r})"

    # Open and close

    async def open(self, owner: str, hint: Callable[[], None]) -> None:
        if self._opened:
            raise BgjobError(f"{self!r} is in use: one run() or running() per store object; make another")
        self._owner, self._hint, self._fault = owner, hint, None
        self._loop, self._reopening = asyncio.get_running_loop(), asyncio.Lock()
        self._held.clear()
        with suppress(Unreachable):  # an outage, at start too: the verbs try again
            await self._connect()
        self._opened = True
        try:
            await self._move_in()
        except BaseException:
            await self.close()
            raise

    async def _move_in(self) -> None:
        self._stir, self._stopped = threading.Event(), False
        self._thread_ended = self._loop.create_future()
        self._beaten = self._loop.time()
        self._thread = threading.Thread(target=self._guard, name="bgjob sqlite", daemon=True)
        self._thread.start()
        self._bell: asyncio.DatagramTransport | None = None
        with suppress(OSError):  # a machine without IPv4: then the other instances poll
            self._bell, _ = await self._loop.create_datagram_endpoint(
                lambda: _Bell(self._owner.encode(), self._hint), local_addr=("127.0.0.1", 0)
            )
        self._rung: asyncio.Handle | None = None
        self._last_ring = 0.0
        self._watch = self._loop.call_later(_GLANCE, self._look)
        if self._db is not None:
            await self.beat({})

    async def _connect(self) -> None:
        """Open the file and make the tables; a lock is waited for, for two processes may do so at once."""
        import sqlite3

        if sqlite3.sqlite_version_info < (3, 35):
            raise StoreError(f"{self!r}: needs SQLite 3.35, Python has {sqlite3.sqlite_version} here")
        try:
            self._db = sqlite3.connect(self._file, timeout=0, isolation_level=None, cached_statements=64)
            (mode,) = (await self._retry("PRAGMA journal_mode = WAL")).fetchone()
            if mode != "wal":
                raise StoreError(f"{self!r}: no write-ahead log is possible there (journal_mode is {mode!r})")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute("PRAGMA wal_autocheckpoint = 0")
            await self._retry("BEGIN IMMEDIATE")
            with self._transaction():
                for statement in self._sql.schema.split(";"):
                    self._db.execute(statement)
            self._inode = os.stat(self._file).st_ino
            self._version = self._data_version()
        except BaseException as error:
            self._disconnect()
            if isinstance(error, sqlite3.Error):
                raise self._error(error) from None
            raise

    def _disconnect(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            db.close()

    async def close(self) -> None:
        if not self._opened:
            return
        self._stopped = True
        self._stir.set()
        self._watch.cancel()
        if self._rung is not None:
            self._rung.cancel()
            self._ring()
        with suppress(StoreError):
            await self._retry("BEGIN IMMEDIATE")
            with self._transaction() as db:
                db.execute(self._sql.gone, (self._owner, 0))
        if self._bell is not None:
            self._bell.close()
        await asyncio.wait({self._thread_ended}, timeout=_GRACE)
        if self._thread_ended.done():
            self._thread.join(_GRACE)
        self._disconnect()
        self._opened = False

    # Locks and errors

    async def _patiently(self, sql: str, parameters: Sequence[object] = ()) -> sqlite3.Cursor:
        """Execute, in an outage after another try to connect, and wait where the file is locked."""
        if self._db is None or self._fault is not None or self._reopening.locked():
            await self._reopen()
        return await self._retry(sql, parameters)

    async def _retry(self, sql: str, parameters: Sequence[object] = ()) -> sqlite3.Cursor:
        """Execute, and where the file is locked try again: sleeping, for SQLite's own waiting would block the loop."""
        import sqlite3

        began, pause = self._loop.time(), 0.001
        while True:
            if self._db is None:
                raise Unreachable(f"{self!r}: it isn't open")
            try:
                return self._db.execute(sql, parameters)
            except sqlite3.Error as error:
                if getattr(error, "sqlite_errorcode", 0) & 0xFF != sqlite3.SQLITE_BUSY:
                    raise self._error(error) from error
                if self._loop.time() - began > min(_VERB_LIMIT, self.lease / 4000):
                    raise self._error(error) from error
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, 0.05)

    async def _begin(self) -> int:
        """Begin a transaction, and read the clock when the lock is ours."""
        await self._patiently("BEGIN IMMEDIATE")
        return _wall_ms()

    def _begin_at_once(self) -> bool:
        import sqlite3

        try:
            cast("sqlite3.Connection", self._db).execute("BEGIN IMMEDIATE")
        except sqlite3.Error:
            return False
        return True

    @contextmanager
    def _transaction(self) -> Generator[sqlite3.Connection, None, None]:
        import sqlite3

        db = cast("sqlite3.Connection", self._db)
        try:
            yield db
            db.execute("COMMIT")
        except BaseException as error:
            with suppress(sqlite3.Error):  # a full disk has rolled it back already
                db.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                raise self._error(error) from error
            raise
        self._wrote()

    def _wrote(self) -> None:
        """Have the log moved into the file: now and then, and when it has grown."""
        self._writes += 1
        if self._writes % 200 == 0 or (self._writes % 10 == 0 and self._log_is_long()):
            self._stir.set()

    def _log_is_long(self) -> bool:
        try:
            return os.stat(f"{self._file}-wal").st_size > _LOG
        except OSError:
            return False

    def _error(self, error: sqlite3.Error) -> StoreError:
        import sqlite3

        passing = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
        kind = Unreachable if getattr(error, "sqlite_errorcode", 0) & 0xFF in passing else StoreError
        hint = "; its folder must exist and be writable" if "unable to open" in str(error) else ""
        return kind(f"{self!r}: {error}{hint}")

    # Hints

    def _data_version(self) -> int:
        return int(cast("sqlite3.Connection", self._db).execute("PRAGMA data_version").fetchone()[0])

    def _look(self) -> None:
        """Did another process write, so that something may be due? It rings as well; this is in case the bell isn't
        heard, as from another container. And is the file still there?"""
        self._watch = self._loop.call_later(min(_GLANCE, self.lease / 3000), self._look)
        if self._db is None or self._reopening.locked():
            return
        try:
            if os.stat(self._file).st_ino != self._inode:
                self._fault = "was replaced"
        except OSError:
            self._fault = "was deleted"
        version = self._version
        with suppress(Exception):  # whatever it is, the next verb meets it too
            self._version = self._data_version()
        if self._version != version or self._fault is not None:
            self._hint()

    async def _reopen(self) -> None:
        """Whoever deletes the file deletes its runs. The outage makes the engine enlist its jobs in the new one."""
        async with self._reopening:
            if self._db is not None and self._fault is None:  # somebody else did meanwhile
                return
            self._disconnect()
            await self._connect()
            fault, self._fault = self._fault, None
        if fault is not None:  # else it wasn't there at the start
            raise Unreachable(f"{self!r}: the file {fault}; begun anew")

    def _wake_others(self) -> None:
        """Ring at the end of this turn of the loop, or a little later: whoever submits a thousand runs rings seldom."""
        if self._rung is None:
            wait = self._last_ring + 0.002 - self._loop.time()
            self._rung = self._loop.call_later(wait, self._ring) if wait > 0 else self._loop.call_soon(self._ring)

    def _ring(self) -> None:
        self._rung, self._last_ring = None, self._loop.time()
        if self._bell is None or self._db is None:
            return
        with suppress(Exception):  # a hint
            for owner, port in self._db.execute(self._sql.peers, (self._owner,)).fetchall():
                self._bell.sendto(owner.encode(), ("127.0.0.1", port))

    def _sign_in(self, db: sqlite3.Connection, now: int) -> None:
        """Say where we can be rung; forget those who haven't for long."""
        if self._bell is not None:
            port = self._bell.get_extra_info("sockname")[1]
            db.execute(self._sql.here, (self._owner, port, now))
        db.execute(self._sql.gone, ("", now - 3 * self.lease))

    def _guard(self) -> None:
        """The thread: checkpoints, and beats where the loop is late with them."""
        while not self._stopped:
            # Now and then in any case: a few large runs make the log long without stirring, and a checkpoint gives way.
            late_in = self._beaten + self.lease / 2000 - self._loop.time()
            stirred = self._stir.wait(min(2 * _GLANCE, max(late_in, self.lease / 20_000)))
            self._stir.clear()
            if not (stirred or self._log_is_long() or self._is_late()):
                continue
            with suppress(Exception):  # a lock, a full disk: the loop meets it too, and says so
                self._guard_once()
        with suppress(RuntimeError):  # the loop was closed without us
            self._loop.call_soon_threadsafe(self._thread_ended.set_result, None)

    def _is_late(self) -> bool:
        return self._loop.time() - self._beaten > self.lease / 2000

    def _guard_once(self) -> None:
        import sqlite3
        from pathlib import Path

        file = f"{Path(self._file).as_uri()}?mode=rw"  # or the file would come back after it was deleted
        with closing(sqlite3.connect(file, uri=True, timeout=self.lease / 4000, isolation_level=None)) as db:
            db.execute("PRAGMA synchronous = NORMAL")
            asked = self._loop.time()
            if self._is_late():
                db.execute("BEGIN IMMEDIATE")
                due = _wall_ms() + self.lease
                for id, token in self._held.copy().items():
                    db.execute(self._sql.beat, (due, id, token)).fetchall()
                db.execute("COMMIT")
                self._beaten = asked
            # A passive one never blocks, but ends only where nobody writes: a log that has grown is cut off.
            db.execute(f"PRAGMA wal_checkpoint({'TRUNCATE' if self._log_is_long() else 'PASSIVE'})")

    # The verbs

    async def enlist(self, jobs: Mapping[str, Listing]) -> tuple[int, Mapping[str, int]]:
        names = _dumps(dict.fromkeys(jobs))
        now = await self._begin()
        with self._transaction() as db:
            known = dict(db.execute(self._sql.last, (names,)).fetchall())
            db.executemany(self._sql.enlist, [(job, now, one.schedule, one.timeout) for job, one in jobs.items()])
            fresh = [job for job, one in jobs.items() if one.immediate and job not in known]
            db.executemany(self._sql.won, [(_tick_id(job, now), job, now, now, 0, 0, None, None) for job in fresh])
            return now, dict(db.execute(self._sql.last, (names,)).fetchall())

    async def tick(self, ticks: Sequence[Tick]) -> tuple[int, Sequence[Answer]]:
        asked = _dumps({tick.job: tick.at for tick in ticks})
        pause = 0.001 + 2e-5 * len(ticks)
        for _ in range(4):
            least, most = (await self._patiently(self._sql.ahead, (asked,))).fetchone()
            if least >= 0:  # most often: another instance was first
                last = dict((await self._patiently(self._sql.last, (asked,))).fetchall()) if most else {}
                return _wall_ms(), [Answer(tick, "lost", last.get(tick.job, tick.at)) for tick in ticks]
            if self._begin_at_once():
                now = _wall_ms()
                break
            await asyncio.sleep(pause)  # it is being first
            pause *= 2
        else:
            now = await self._begin()
        with self._transaction() as db:
            facts = {job: fact for job, *fact in db.execute(self._sql.facts, (now, asked))}
            if len(facts) < len(ticks):
                raise Unreachable(f"{self!r}: its jobs were deleted")
            decided = [_decide(tick, now, *facts[tick.job]) for tick in ticks]
            gone = [(a.tick.at, a.tick.job) for a in decided if a.word in ("won", "skipped")]
            db.executemany(self._sql.handed_out, gone)
            won = [answer for answer in decided if answer.word == "won"]
            count = db.executemany(self._sql.won, [self._new_run(answer, now) for answer in won]).rowcount
            started = {answer.run.id for answer in won if answer.run is not None}
            if count < len(won):  # a tick that was handed out before its job was deleted and enlisted again
                started &= {id for (id,) in db.execute(self._sql.mine, (self._owner, now))}
        self._held.update(dict.fromkeys(started, 1))
        return now, [a if a.run is None or a.run.id in started else a._replace(run=None) for a in decided]

    def _new_run(self, answer: Answer, now: int) -> tuple[object, ...]:
        tick = answer.tick
        if answer.run is None:
            return tick.id, tick.job, tick.at + tick.delay, tick.at, 0, 0, None, None
        return answer.run.id, tick.job, now + self.lease, tick.at, 1, 1, self._owner, now

    async def push(self, calls: Sequence[Call], wake: bool) -> Sequence[int | None]:
        alone = len(calls) == 1  # a transaction by itself, which saves a fifth
        now = _wall_ms() if alone else await self._begin()
        dues = [now + call.delay if call.at is None else call.at for call in calls]
        rows = [(call.id, call.job, due, call.args, now - self.keep) for call, due in zip(calls, dues, strict=True)]
        if alone:
            new = [(await self._patiently(self._sql.push, rows[0])).rowcount]
            self._wrote()
        else:
            with self._transaction() as db:
                new = [db.execute(self._sql.push, row).rowcount for row in rows]
        stored = [due if count else None for due, count in zip(dues, new, strict=True)]
        if wake and any(due is not None and due <= now + self.poll for due in stored):
            self._wake_others()
        return stored

    async def claim(self, free: Mapping[str, tuple[int, int]]) -> News:
        now = _wall_ms()
        heads = (await self._patiently(self._sql.heads, (now, now, _dumps([*free])))).fetchall()
        flagged = [id for (id,) in await self._patiently(self._sql.flagged, (self._owner,))]
        next_due = min((later for _, _, later in heads if later is not None), default=None)
        jobs = [job for job, due, _ in heads if due]
        if not jobs:
            return News(now, [], next_due, flagged)
        now = await self._begin()
        with self._transaction() as db:
            runs = [run for job in jobs for run in self._claim_of(db, job, *free[job], now)]
        self._held.update((run.id, run.token) for run in runs)
        return News(now, runs, next_due, flagged)

    def _claim_of(self, db: sqlite3.Connection, job: str, free: int, parallelism: int, now: int) -> list[Claimed]:
        (busy,) = db.execute(self._sql.busy, (job, now)).fetchone()
        n = min(free, parallelism - busy)
        if n <= 0:
            return []
        rows = db.execute(self._sql.claim, (self._owner, now + self.lease, now, job, now, n)).fetchall()
        return sorted((Claimed(*row) for row in rows), key=lambda run: (run.at, run.id))

    async def beat(self, runs: Mapping[str, int]) -> Mapping[str, bool]:
        asked = self._loop.time()
        now = await self._begin()
        due = now + self.lease
        with self._transaction() as db:
            found = {id: db.execute(self._sql.beat, (due, id, token)).fetchone() for id, token in runs.items()}
            self._sign_in(db, now)
        _let_go(self._held, ((id, token) for id, token in runs.items() if found[id] is None))
        self._beaten = asked
        return {id: bool(row[0]) for id, row in found.items() if row is not None}

    async def settle(self, ended: Sequence[Settlement]) -> Sequence[_Settled]:
        now = await self._begin()
        with self._transaction() as db:
            # Successful ticks leave nothing behind, and are many where a thousand jobs come due together. All others,
            # and those that somebody waits for, are remembered.
            plain = [end.id for end in ended if not end.call and end.state is _SUCCEEDED and self._owns(end)]
            done = {id for (id,) in db.execute(self._sql.finish_plain, (_dumps(plain), self._owner))} if plain else ()
            answers: list[_Settled] = ["done" if end.id in done else self._settle_one(db, end, now) for end in ended]
            db.execute(self._sql.prune, (now - self.keep, 2 * len(ended)))
        _let_go(self._held, ((end.id, end.token) for end in ended))
        return answers

    def _owns(self, end: Settlement) -> bool:
        return self._held.get(end.id) == end.token

    def _settle_one(self, db: sqlite3.Connection, end: Settlement, now: int) -> _Settled:
        state = end.state
        if state is _SCHEDULED:
            due = end.at if end.back else now + end.delay
            if db.execute(self._sql.again, (due, end.back, end.error, end.id, end.token)).rowcount:
                return "done"
            state = _CANCELLED
        row = db.execute(self._sql.finish, (end.id, end.token)).fetchone()
        if row is None:
            return "refused"
        args, owner, since, awaited = row
        past = (end.id, end.job, state, end.at, args, end.attempt, end.token, owner, since, now, end.error, end.reason)
        db.execute(self._sql.remember, (*past, end.result))
        if awaited:
            self._wake_others()
        return "cancelled" if end.state is _SCHEDULED else "done"

    async def cancel(self, job: str, id: str | None = None) -> Mapping[str, Cancelled]:
        found: dict[str, Cancelled] = {}
        more = True
        while more:
            now = await self._begin()
            with self._transaction() as db:
                for run, at in db.execute(self._sql.signal, (job, id)).fetchall():
                    found[run] = Cancelled(True, at)
                removed = db.execute(self._sql.remove, (id, job, now, id, job, now)).fetchall()
                for run, job, at, args, tries, token, owner, since, error in removed:
                    found[run] = Cancelled(False, at)
                    past = (run, job, _CANCELLED, at, args, tries, token, owner, since, now, error, _Stop.CANCEL, None)
                    db.execute(self._sql.remember, past)
            more = len(removed) == 1000
        if found:
            self._wake_others()
        return found

    async def find(self, id: str, watch: bool = False) -> Row | None:
        row = (await self._patiently(self._sql.find, (_wall_ms(), id))).fetchone()
        if row is not None and watch and not row[-1]:
            await self._begin()
            with self._transaction() as db:
                db.execute(self._sql.watch, (id,))
        if row is None:
            row = (await self._patiently(self._sql.find_past, (id,))).fetchone()
        return None if row is None else _row(row[:14])

    async def overview(self, n: int) -> Overview:
        now, sql = _wall_ms(), self._sql
        jobs = [Standing(*row) for row in await self._patiently(sql.jobs)]
        lists = [
            [_row(row) for row in await self._patiently(*asked)]
            for asked in (
                (sql.running, (now, now)),
                (sql.due, (now, n)),
                (sql.retrying, (now, now, n)),
                (sql.failed, (n,)),
            )
        ]
        return Overview(now, jobs, *lists)


def _row(row: Any) -> Row:
    return Row(row[0], row[1], State(row[2]), *row[3:])


class _Bell(asyncio.DatagramProtocol):
    """Where other processes of the machine can ring: the text is our name, which they have from the file."""

    def __init__(self, name: bytes, hint: Callable[[], None]) -> None:
        self._name = name
        self._hint = hint

    def datagram_received(self, data: bytes, addr: object) -> None:
        if data == self._name:
            self._hint()


_POSTGRES_CONNECTIONS = 4  # of a process, beside the one for hints
_POSTGRES_RING = 0.01  # s between two notifications: their commits queue up, and each wakes all instances
_POSTGRES_DEAF = 1000  # ms between two looks where hints don't arrive
# SQLSTATEs: outages and whatever passes by itself; what is tried again at once (deadlock, serialization, a statement
# that isn't prepared any more); a table that isn't there
_POSTGRES_PASSING = ("08", "25", "40", "53", "55P03", "57", "58")
_POSTGRES_AGAIN = ("40", "0A000", "26000")
_POSTGRES_NO_TABLE = "42P01"

# The server's clock. A plan can use an index up to the first, which stands still within a statement; the second moves
# on while a statement waits for a lock, so that a lease that is set by it is never short.
_POSTGRES_NOW = "floor(extract(epoch FROM statement_timestamp()) * 1000)::bigint"
_POSTGRES_CLOCK = "floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint"

_POSTGRES_ROW = f"""id, job, CASE WHEN owner IS NOT NULL AND due > {_POSTGRES_NOW} THEN 'running' ELSE 'scheduled' END,
    at, due, args, tries, token, owner, since, NULL::bigint, error, NULL::text, NULL::text"""
_POSTGRES_REMEMBER = """INSERT INTO bgjob_past(id, job, state, at, args, attempt, token, owner, since, finished, error,
        reason, result)"""
_POSTGRES_REPLACE = """ON CONFLICT (id) DO UPDATE SET (job, state, at, args, attempt, token, owner, since, finished,
        error, reason, result) = (excluded.job, excluded.state, excluded.at, excluded.args, excluded.attempt,
        excluded.token, excluded.owner, excluded.since, excluded.finished, excluded.error, excluded.reason,
        excluded.result)"""


class _PostgresStatements(_Statements):
    """A statement sees what was committed when it began. Hence limits are counted in another one than takes the locks,
    and rows are locked in the order of their keys, before they are changed by `id = ANY(ARRAY(…))`, which is a seek."""

    schema: str = _schema("WITH (fillfactor = 70)", "WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02)", "")
    # a client that stops in the middle keeps its locks no longer than this
    begin: str = """BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL idle_in_transaction_session_timeout = 1000;
        SET LOCAL lock_timeout = 4000; SET LOCAL statement_timeout = 4000"""
    # behind a pooler the process that answers isn't the one that the client was told of
    server: str = "SELECT pg_backend_pid(), to_regclass('bgjob_past') IS NOT NULL"
    missing: str = """SELECT name, right_to FROM unnest(ARRAY['bgjob_tick', 'bgjob_run', 'bgjob_past']) AS name,
        unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS right_to
        WHERE NOT has_table_privilege(name, right_to) LIMIT 1"""
    listed: str = f"""SELECT {_POSTGRES_NOW}, t.job, t.last, t.schedule, t.timeout
        FROM (VALUES (1)) AS one LEFT JOIN bgjob_tick t ON t.job = ANY($1::text[])"""
    enlist: str = """WITH e AS MATERIALIZED (SELECT * FROM unnest($2::text[], $3::text[], $4::bigint[], $5::text[])
            AS e(job, schedule, timeout, first)),
        new AS (INSERT INTO bgjob_tick(job, last, schedule, timeout) SELECT job, $1, schedule, timeout FROM e
            ORDER BY job ON CONFLICT DO NOTHING RETURNING job),
        changed AS (UPDATE bgjob_tick t SET last = CASE WHEN t.schedule = e.schedule THEN t.last ELSE $1 END,
            schedule = e.schedule, timeout = e.timeout FROM e
            WHERE t.job = e.job AND (t.schedule, t.timeout) IS DISTINCT FROM (e.schedule, e.timeout))
        INSERT INTO bgjob_run(id, job, due, at, call) SELECT first, job, $1, $1, 0 FROM new JOIN e USING (job)
            WHERE first IS NOT NULL ON CONFLICT DO NOTHING"""
    last: str = f"SELECT {_POSTGRES_NOW}, job, last FROM bgjob_tick WHERE job = ANY($1::text[])"
    lock_ticks: str = """SELECT t.job FROM unnest($1::text[], $2::bigint[]) AS w(job, at)
        JOIN bgjob_tick t ON t.job = w.job WHERE t.last < w.at ORDER BY t.job FOR NO KEY UPDATE OF t"""
    # "due + 0" keeps the planner off bgjob_due: it would walk over all that waits
    facts: str = f"""SELECT {_POSTGRES_NOW}, t.job, t.last,
        (SELECT count(*) FROM bgjob_run r WHERE r.job = t.job AND r.call = 0),
        (SELECT count(*) FROM bgjob_run r WHERE r.job = t.job AND r.owner IS NOT NULL AND r.due + 0 > {_POSTGRES_NOW}),
        EXISTS(SELECT 1 FROM bgjob_run r WHERE r.job = t.job AND r.due <= {_POSTGRES_NOW})
        FROM bgjob_tick t WHERE t.job = ANY($1::text[])"""
    hand_out: str = f"""WITH w AS MATERIALIZED (SELECT * FROM unnest($1::text[], $2::text[], $3::bigint[],
            $4::bigint[], $5::int[]) AS w(id, job, at, due, started)),
        t AS (UPDATE bgjob_tick t SET last = w.at FROM w WHERE t.job = w.job)
        INSERT INTO bgjob_run(id, job, due, at, call, tries, token, owner, since)
        SELECT id, job, CASE started WHEN 1 THEN {_POSTGRES_CLOCK} + $6::bigint ELSE due END, at, 0, started, started,
            CASE started WHEN 1 THEN $7::text END, CASE started WHEN 1 THEN {_POSTGRES_CLOCK} END
        FROM w WHERE due IS NOT NULL ON CONFLICT DO NOTHING RETURNING id"""
    # the same for one call and for many, which costs the server twice as much
    push_one: str = f"""INSERT INTO bgjob_run(id, job, due, at, call, args, token)
        SELECT $1, $2, c.at, c.at, 1, $5, coalesce(p.token, 0)
        FROM (SELECT coalesce($3::bigint, {_POSTGRES_NOW} + $4::bigint) AS at) AS c
        LEFT JOIN bgjob_past p ON p.id = $1 WHERE NOT EXISTS(SELECT 1 FROM bgjob_run WHERE id = $1)
        AND (p.id IS NULL OR p.state NOT IN ('succeeded', 'failed') OR p.finished <= {_POSTGRES_NOW} - $6::bigint)
        ON CONFLICT DO NOTHING RETURNING id, at, CASE WHEN $7 AND at <= {_POSTGRES_NOW} + $8::bigint
        THEN pg_notify('bgjob_wake', $9::text)::text END"""
    push: str = f"""WITH c AS MATERIALIZED (SELECT id, job, coalesce(at, {_POSTGRES_NOW} + delay) AS at, args
            FROM unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[], $5::text[])
            AS c(id, job, at, delay, args)),
        new AS (INSERT INTO bgjob_run(id, job, due, at, call, args, token)
            SELECT c.id, c.job, c.at, c.at, 1, c.args, coalesce(p.token, 0) FROM c
            LEFT JOIN bgjob_past p ON p.id = c.id WHERE NOT EXISTS(SELECT 1 FROM bgjob_run r WHERE r.id = c.id)
            AND (p.id IS NULL OR p.state NOT IN ('succeeded', 'failed') OR p.finished <= {_POSTGRES_NOW} - $6::bigint)
            ORDER BY c.id ON CONFLICT DO NOTHING RETURNING id, at)
        SELECT id, at, CASE WHEN $7 AND at <= {_POSTGRES_NOW} + $8::bigint
            THEN pg_notify('bgjob_wake', $9::text)::text END FROM new"""
    # two seeks a job: no job blocks another's head of line
    heads: str = f"""SELECT {_POSTGRES_NOW}, array_agg(job) FILTER (WHERE is_due), min(later),
        ARRAY(SELECT id FROM bgjob_run WHERE owner = $2 AND cancel = 1)
        FROM (SELECT w.job, EXISTS(SELECT 1 FROM bgjob_run r WHERE r.job = w.job AND r.due <= {_POSTGRES_NOW}),
            (SELECT r.due FROM bgjob_run r WHERE r.job = w.job AND r.due > {_POSTGRES_NOW} ORDER BY r.due LIMIT 1)
            FROM unnest($1::text[]) AS w(job)) AS h(job, is_due, later)"""
    lock_jobs: str = "SELECT job FROM bgjob_tick WHERE job = ANY($1::text[]) ORDER BY job FOR NO KEY UPDATE"
    # not SKIP LOCKED: whoever begins to wait for a run's end locks it for a moment, and the next would overtake it
    claim: str = f"""UPDATE bgjob_run SET owner = $4, due = {_POSTGRES_CLOCK} + $5::bigint, since = {_POSTGRES_CLOCK},
        token = token + 1, tries = tries + 1, lost = lost + (owner IS NOT NULL)::int
        WHERE id = ANY(ARRAY(SELECT id FROM bgjob_run WHERE due <= {_POSTGRES_NOW} AND id = ANY(ARRAY(
            SELECT p.id FROM unnest($1::text[], $2::int[], $3::int[]) AS w(job, free, parallelism),
            LATERAL (SELECT id FROM bgjob_run WHERE job = w.job AND due <= {_POSTGRES_NOW} ORDER BY due, id
            LIMIT greatest(0, least(w.free, w.parallelism - (SELECT count(*) FROM bgjob_run b
                WHERE b.job = w.job AND b.owner IS NOT NULL AND b.due + 0 > {_POSTGRES_NOW})))) AS p))
            ORDER BY id FOR UPDATE))
        RETURNING id, job, at, call = 1, args, tries, lost, token, cancel = 1"""
    # what was claimed for us by a call whose answer we didn't get
    unheard: str = f"""UPDATE bgjob_run SET due = {_POSTGRES_CLOCK} + $5::bigint WHERE id = ANY(ARRAY(
            SELECT id FROM bgjob_run WHERE job = ANY($1::text[]) AND owner = $2 AND due + 0 > {_POSTGRES_NOW}
            AND (id, token) NOT IN (SELECT * FROM unnest($3::text[], $4::int[])) ORDER BY id FOR NO KEY UPDATE))
        RETURNING id, job, at, call = 1, args, tries, lost, token, cancel = 1"""
    beat: str = f"""UPDATE bgjob_run SET due = {_POSTGRES_CLOCK} + $3::bigint WHERE id = ANY(ARRAY(
            SELECT r.id FROM unnest($1::text[], $2::int[]) AS b(id, token) JOIN bgjob_run r
            ON r.id = b.id AND r.token = b.token ORDER BY r.id FOR NO KEY UPDATE OF r))
        RETURNING id, cancel = 1"""
    # an end that is in the history already was said before, and the answer was lost
    settle: str = f"""WITH e AS MATERIALIZED (SELECT * FROM unnest($1::text[], $2::int[], $3::text[], $4::bigint[],
            $5::bool[], $6::text[], $7::bigint[], $8::bool[], $9::int[], $10::text[], $11::text[], $12::text[])
            WITH ORDINALITY AS e(id, token, job, at, call, state, delay, back, attempt, error, reason, result, n)),
        held AS MATERIALIZED (SELECT r.id, r.args, r.owner, r.since, r.awaited,
            CASE WHEN e.state = 'scheduled' AND r.cancel = 1 THEN 'cancelled' ELSE e.state END AS state
            FROM e JOIN bgjob_run r ON r.id = e.id AND r.token = e.token ORDER BY r.id FOR UPDATE OF r),
        again AS (UPDATE bgjob_run r SET due = CASE WHEN e.back THEN e.at ELSE {_POSTGRES_CLOCK} + e.delay END,
            owner = NULL, tries = r.tries - e.back::int, error = e.error FROM e
            WHERE e.id = r.id AND r.id = ANY(ARRAY(SELECT id FROM held WHERE state = 'scheduled'))),
        finished AS (DELETE FROM bgjob_run WHERE id = ANY(ARRAY(SELECT id FROM held WHERE state <> 'scheduled'))),
        kept AS ({_POSTGRES_REMEMBER} SELECT e.id, e.job, h.state, e.at, h.args, e.attempt, e.token, h.owner, h.since,
            {_POSTGRES_CLOCK}, e.error, e.reason, e.result FROM e JOIN held h USING (id)
            WHERE h.state <> 'scheduled' AND (e.call OR h.awaited = 1 OR h.state <> 'succeeded') {_POSTGRES_REPLACE}),
        pruned AS (DELETE FROM bgjob_past WHERE id = ANY(ARRAY(SELECT id FROM bgjob_past
            WHERE finished <= {_POSTGRES_NOW} - $13::bigint AND id <> ALL($1) ORDER BY finished
            LIMIT 2 * cardinality($1) FOR UPDATE SKIP LOCKED)))
        SELECT e.state, coalesce(h.state, (SELECT p.state FROM bgjob_past p WHERE h.id IS NULL AND p.id = e.id
            AND p.token = e.token AND (p.state = e.state OR e.state = 'scheduled' AND p.state = 'cancelled'))),
            CASE WHEN h.awaited = 1 AND h.state <> 'scheduled'
            THEN pg_notify('bgjob_wake', $14::text)::text END FROM e LEFT JOIN held h USING (id) ORDER BY e.n"""
    # those that are flagged already and still run are left out of all pages but the first
    page: str = f"""SELECT id FROM bgjob_run WHERE job = $1 AND ($2 OR cancel = 0 OR owner IS NULL
        OR due <= {_POSTGRES_NOW}) LIMIT 1000"""
    cancel: str = f"""WITH found AS MATERIALIZED (SELECT id, job, at, args, tries, token, owner, since, error,
            owner IS NOT NULL AND due > {_POSTGRES_CLOCK} AS running
            FROM bgjob_run WHERE job = $1 AND id = ANY($2::text[]) ORDER BY id FOR UPDATE),
        signalled AS (UPDATE bgjob_run SET cancel = 1 WHERE id = ANY(ARRAY(SELECT id FROM found WHERE running))),
        removed AS (DELETE FROM bgjob_run WHERE id = ANY(ARRAY(SELECT id FROM found WHERE NOT running))),
        kept AS ({_POSTGRES_REMEMBER} SELECT id, job, 'cancelled', at, args, tries, token, owner, since,
            {_POSTGRES_CLOCK}, error, $3::text, NULL FROM found WHERE NOT running {_POSTGRES_REPLACE})
        SELECT id, running, at, pg_notify('bgjob_wake', $4::text)::text FROM found"""
    find: str = f"""WITH watched AS (UPDATE bgjob_run SET awaited = 1 WHERE id = ANY(ARRAY(SELECT id FROM bgjob_run
            WHERE id = ANY($2::text[]) AND awaited = 0 ORDER BY id FOR NO KEY UPDATE)))
        SELECT {_PAST_ROW} FROM bgjob_past WHERE id = ANY($1::text[])
        UNION ALL SELECT {_POSTGRES_ROW} FROM bgjob_run WHERE id = ANY($1::text[])"""
    ring: str = "SELECT pg_notify('bgjob_wake', $1::text)::text"
    now: str = f"SELECT {_POSTGRES_NOW}"
    jobs: str = "SELECT job, last, schedule, timeout FROM bgjob_tick ORDER BY job"
    running: str = f"""SELECT {_POSTGRES_ROW} FROM bgjob_run WHERE owner IS NOT NULL AND due + 0 > {_POSTGRES_NOW}
        ORDER BY since"""
    due: str = f"SELECT {_POSTGRES_ROW} FROM bgjob_run WHERE tries = 0 ORDER BY due, id LIMIT $1"
    retrying: str = f"""SELECT {_POSTGRES_ROW} FROM bgjob_run WHERE tries > 0
        AND (owner IS NULL OR due <= {_POSTGRES_NOW}) ORDER BY due, id LIMIT $1"""
    failed: str = f"SELECT {_PAST_ROW} FROM bgjob_past WHERE state = 'failed' ORDER BY finished DESC LIMIT $1"


class _PostgresConnection(Protocol):
    """What is used of asyncpg's connections; a pool's stand-ins have it as well."""

    async def execute(self, query: str, /) -> object: ...
    async def fetch(self, query: str, /, *args: object) -> list[Any]: ...
    async def add_listener(self, channel: str, callback: Callable[..., object], /) -> None: ...
    def add_termination_listener(self, callback: Callable[..., object], /) -> None: ...
    def get_server_pid(self) -> int: ...
    def is_closed(self) -> bool: ...
    def terminate(self) -> None: ...


class _PostgresPool(Protocol):
    """What is used of an asyncpg pool."""

    def acquire(self, *, timeout: Any = ...) -> Any: ...
    async def release(self, connection: Any, /, *, timeout: Any = ...) -> Any: ...
    def get_max_size(self) -> Any: ...


class _Together(Generic[A, T]):
    """Joins calls: while one is under way, those that come wait, and go as one. So many submits share few commits."""

    def __init__(self, verb: Callable[[list[A]], Awaitable[Sequence[T]]]) -> None:
        self._verb = verb
        self._going = False
        self._waiting: list[tuple[A, asyncio.Future[T]]] = []
        self.task: asyncio.Task[None] | None = None

    async def ask(self, item: A) -> T:
        if self._going:
            answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
            self._waiting.append((item, answer))
            return await answer
        self._going = True
        try:
            return (await self._verb([item]))[0]
        finally:
            self._going = bool(self._waiting)
            if self._going:
                self.task = asyncio.create_task(self._work(), name="bgjob postgres")

    async def _work(self) -> None:
        try:
            while self._waiting:
                going, self._waiting = self._waiting[:100], self._waiting[100:]
                await self._go([(item, answer) for item, answer in going if not answer.done()])
        finally:
            self._going = False

    async def _go(self, going: list[tuple[A, asyncio.Future[T]]]) -> None:
        try:
            answers = await self._verb([item for item, _ in going])
        except Exception as error:
            for _, answer in going:
                if not answer.done():
                    answer.set_exception(type(error)(*error.args))
            return
        for (_, answer), found in zip(going, answers, strict=True):
            if not answer.done():
                answer.set_result(found)


class PostgresStore:
    """A PostgreSQL database (12 or later) that the processes of many machines share; the server's clock decides.

    A process has one connection for hints (LISTEN) and, as it needs them, up to four for all else. PgBouncer in
    transaction mode is recognised: there, hints don't arrive, and what others submit is seen within a second.

    Args:
        url_or_pool: "postgresql://user:password@host:5432/database", where wanted with asyncpg's options, such as
            "?sslmode=require"; or a ready asyncpg pool: it isn't closed, and one of its connections is kept for hints.
        prefix: of the tables' names: two applications can share a database. Default: "bgjob".
        lease: how long the runs of an instance that died stay its own; 10 s or more is wise. Default: 30 s.
        keep: how long ends and results are kept, and keys taken. Default: a day.

    Raises:
        StoreError: the URL or the prefix is wrong; from `run()`: asyncpg is missing, the server's certificate isn't
            trusted, or the server refuses the password, the database or a right. A server that doesn't answer is an
            outage, at start too.
        ScheduleError: a duration is wrong.
    """

    poll: int = 5000

    def __init__(
        self,
        url_or_pool: str | _PostgresPool,
        *,
        prefix: str = "bgjob",
        lease: Duration = "30s",
        keep: Duration = "1d",
    ) -> None:
        self._url = url_or_pool if isinstance(url_or_pool, str) else None
        self._pool = None if isinstance(url_or_pool, str) else url_or_pool
        if self._url is not None and not self._url.startswith(("postgresql://", "postgres://")):
            raise StoreError(f"{_no_password(self._url)!r}: write postgresql://user:password@host:5432/database")
        self.lease: int = _lease(lease)
        self.keep: int = _duration("keep", keep, 1)
        self._prefix = _checked_prefix(prefix)
        self._sql = _PostgresStatements(prefix)
        self._limit = min(_VERB_LIMIT, self.lease / 4000)
        self._owner: str | None = None
        self._held: dict[str, int] = {}  # claimed runs that we know of

    def __repr__(self) -> str:
        if self._url is None:
            return "PostgresStore(pool)"
        return f"PostgresStore({_no_password(self._url).partition('?')[0]!r})"

    # Open and close

    async def open(self, owner: str, hint: Callable[[], None]) -> None:
        if self._owner is not None:
            raise BgjobError(f"{self!r} is in use: one run() or running() per store object; make another")
        driver = _driver("asyncpg", "postgres")
        self._check_files()
        self._connect = cast("Callable[..., Awaitable[_PostgresConnection]]", driver.connect)
        self._faults: tuple[type[Exception], ...] = (
            driver.PostgresError, driver.InterfaceError, driver.InternalClientError, OSError,
        )  # fmt: skip
        self._owner, self._hint = owner, hint
        self._loop = asyncio.get_running_loop()
        self._ready = self._pooled = self._warm = False
        self._held.clear()
        self._doubtful = -math.inf
        self._idle: list[_PostgresConnection] = []
        self._busy: set[_PostgresConnection] = set()
        self._room = asyncio.Semaphore(_POSTGRES_CONNECTIONS)
        self._cancelling = asyncio.Lock()
        self._pushes = _Together(self._push)
        self._finds = _Together(self._find)
        self._listener: asyncio.Task[None] | None = None
        self._ringer: asyncio.Task[None] | None = None
        self._rung, self._unrung = 0.0, False
        self.poll = _POSTGRES_DEAF
        try:
            await self._do(_nothing, self._limit / 4)
        except Unreachable:
            pass  # the verbs connect as they are used
        except BaseException:
            await self.close()
            raise
        self._listener = self._loop.create_task(self._listen(), name="bgjob postgres")

    async def close(self) -> None:
        if self._owner is None:
            return
        if self._ringer is not None:
            await asyncio.wait({self._ringer}, timeout=self._limit)
        tasks = [one for one in (self._listener, self._ringer, self._pushes.task, self._finds.task) if one is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for db in [*self._busy, *self._idle]:
            db.terminate()
        self._idle.clear()
        self._owner = None
        await asyncio.sleep(0)  # the transports close at the next turn

    def _check_files(self) -> None:
        """Of a file that isn't there asyncpg says what it says of a server's socket that isn't: without a name."""
        from urllib.parse import parse_qsl

        for name, path in parse_qsl((self._url or "").partition("?")[2]):
            if name in ("sslrootcert", "sslcert", "sslkey", "sslcrl"):
                try:
                    open(path, "rb").close()
                except OSError as error:
                    raise StoreError(f"{self!r}: {name}: {error}") from None

    async def _prepare(self, until: float) -> None:
        """What is asked once: is there a pooler between, are the tables and rights there? On a connection that has no
        prepared statements, for behind a pooler they could be another's."""
        db = await self._take_one(until, statement_cache_size=0)
        try:
            await self._within(until, db, self._look_round(db))
        finally:
            if self._pool is None:
                db.terminate()
            await self._give_back(db, until)
        self._ready = True

    async def _look_round(self, db: _PostgresConnection) -> None:
        ((pid, made),) = await db.fetch(self._sql.server)
        if not made:
            lock = f"SELECT pg_advisory_xact_lock({crc32(b'bgjob') >> 1}, {crc32(self._prefix.encode()) >> 1})"
            await db.execute(f"{self._sql.begin}; {lock}; {self._sql.schema} COMMIT")
        missing = await db.fetch(self._sql.missing)
        if missing:
            raise StoreError(f"{self!r}: permission denied: no {missing[0][1]} on table {missing[0][0]}")
        self._pooled = pid != db.get_server_pid()

    async def _take_one(self, until: float, **options: object) -> _PostgresConnection:
        """A new connection, or the pool's."""
        left = until - self._loop.time()
        if left <= 0:
            raise TimeoutError
        if self._pool is not None:
            return cast(_PostgresConnection, await self._pool.acquire(timeout=left))
        try:
            return await self._connect(self._url, timeout=left, **options)
        except ValueError as error:  # its text may hold a part of the password
            if isinstance(error, OSError):  # a certificate that isn't trusted is both
                raise
            text = str(error).partition("\n")[0]
            wrong = text if "onfiguration" in type(error).__name__ else "the URL can't be read"
            remedy = "write postgresql://user:password@host:5432/database, and of : / ? # @ in a password %3A %2F …"
            raise StoreError(f"{self!r}: {wrong}; {remedy}") from None

    async def _give_back(self, db: _PostgresConnection, until: float) -> None:
        if self._pool is not None:
            with suppress(*self._faults):  # asyncpg asks the server to reset it
                await self._pool.release(db, timeout=max(0.1, until - self._loop.time()))
        elif self._owner is None:
            db.terminate()
        elif not db.is_closed():
            self._idle.append(db)

    # Transactions and errors

    async def _do(self, steps: Callable[[_PostgresConnection], Awaitable[T]], limit: float | None = None) -> T:
        """A verb on a connection, within its limit. After an error the connection is given up: the server rolls back.
        What lost against another transaction is tried again."""
        if self._owner is None:
            raise StoreError(f"{self!r}: it isn't open")
        until = self._loop.time() + (limit or self._limit)
        for attempt in itertools.count(1):
            try:
                async with self._room:
                    return await self._try(steps, until)
            except self._faults as error:
                state = str(getattr(error, "sqlstate", None) or "")
                if state == _POSTGRES_NO_TABLE:
                    self._ready = False
                if attempt == 3 or not state.startswith(_POSTGRES_AGAIN):
                    raise self._error(error, state, until) from None
        raise AssertionError

    async def _try(self, steps: Callable[[_PostgresConnection], Awaitable[T]], until: float) -> T:
        if not self._ready:
            await self._prepare(until)
        while self._idle and self._idle[-1].is_closed():  # the server was restarted meanwhile
            self._idle.pop()
        db = self._idle.pop() if self._idle else await self._new_one(until)
        self._busy.add(db)
        try:
            return await self._within(until, db, steps(db))
        except BaseException:
            self._doubtful = self._loop.time() + self.lease / 1000  # the server may have done what was asked
            raise
        finally:
            self._busy.discard(db)
            await self._give_back(db, until)

    async def _new_one(self, until: float) -> _PostgresConnection:
        if self._pool is not None or self._pooled:
            return await self._take_one(until, statement_cache_size=0)
        db = await self._take_one(until)
        # A plan that was made while a table was small stays in use until the next ANALYZE.
        await self._within(until, db, db.execute("SET enable_seqscan = off; SET jit = off"))
        return db

    async def _within(self, until: float, db: _PostgresConnection, asked: Awaitable[T]) -> T:
        """The limit doesn't cancel: asyncpg would ask the server over another connection to stop, and wait for that."""
        expiry = self._loop.call_at(until, db.terminate)
        try:
            return await asked
        except Exception as error:
            if self._loop.time() >= until:  # whatever asyncpg makes of a connection that was ended under it
                raise TimeoutError from error
            db.terminate()
            raise
        except BaseException:
            db.terminate()
            raise
        finally:
            expiry.cancel()

    @asynccontextmanager
    async def _transaction(self, db: _PostgresConnection) -> AsyncGenerator[None, None]:
        await db.execute(self._sql.begin)
        yield
        await db.execute("COMMIT")

    def _error(self, error: Exception, state: str, until: float) -> StoreError:
        text = str(error).partition("\n")[0] or type(error).__name__
        if self._loop.time() >= until - 0.001 or isinstance(error, TimeoutError):
            return Unreachable(f"{self!r}: no answer within {self._limit:g} s")
        if state == _POSTGRES_NO_TABLE:
            return Unreachable(f"{self!r}: its tables were deleted; begun anew")
        # Certificates that aren't trusted, pools that are closed, and files that hold no certificate or key.
        config = isinstance(error, ValueError) or re.search(r"pool is|\[X509|PEM lib", text) is not None
        passing = state.startswith(_POSTGRES_PASSING) if state else not config
        return (Unreachable if passing else StoreError)(f"{self!r}: {text}")

    # Hints

    async def _listen(self) -> None:
        """Hear of what others did, on a connection of its own; where it breaks another is made, and until then
        looked for more often."""
        self._deaf = 0
        while not self._pooled and (self._pool is None or self._pool.get_max_size() > 1):
            with suppress(StoreError, *self._faults):
                if not self._ready:
                    await self._do(_nothing)
                if not self._pooled:
                    await self._hear()
            self.poll = _POSTGRES_DEAF
            top = min(_BACKOFF_FIRST << min(self._deaf, 10), _BACKOFF_LAST)
            self._deaf += 1
            await asyncio.sleep((top - _spread(f"{self._owner} {self._deaf}", top // 2)) / 1000)

    async def _hear(self) -> None:
        until = self._loop.time() + self._limit
        db = await self._take_one(until)
        lost = asyncio.Event()

        def ended(_: object) -> None:
            lost.set()

        try:
            db.add_termination_listener(ended)
            await self._within(until, db, db.add_listener(f"{self._prefix}_wake", self._heard))
            self._deaf, self.poll = 0, PostgresStore.poll
            self._hint()
            while not lost.is_set():
                await _set_within(2 * self.poll / 1000, lost)
                # A router that has forgotten a silent connection tells nobody.
                await self._within(self._loop.time() + self._limit, db, db.execute("SELECT 1"))
        finally:
            db.terminate()
            await self._give_back(db, until)

    def _heard(self, _db: object, _pid: int, _channel: str, owner: str) -> None:
        if owner != self._owner:
            self._hint()

    def _rings(self) -> bool:
        """Whether to notify at once; else that is done a little later: whoever submits a thousand runs rings seldom."""
        now = self._loop.time()
        if now < self._rung + _POSTGRES_RING:
            return False
        self._rung, self._unrung = now, False
        return True

    def _ring_later(self) -> None:
        self._unrung = True
        if self._ringer is None or self._ringer.done():
            self._ringer = self._loop.create_task(self._ring(), name="bgjob postgres")

    async def _ring(self) -> None:
        while self._unrung:
            # Where submits go on, one of them rings by the way: a notification of its own is another commit.
            await asyncio.sleep(self._rung + 1.5 * _POSTGRES_RING - self._loop.time())
            if self._unrung and self._rings():
                with suppress(StoreError):
                    await self._do(lambda db: db.fetch(self._sql.ring, self._owner))

    # The verbs

    async def enlist(self, jobs: Mapping[str, Listing]) -> tuple[int, Mapping[str, int]]:
        return await self._do(lambda db: self._enlist(db, jobs))

    async def _enlist(self, db: _PostgresConnection, jobs: Mapping[str, Listing]) -> tuple[int, Mapping[str, int]]:
        names = [*jobs]
        rows = await db.fetch(self._sql.listed, names)
        now: int = rows[0][0]
        known = {job: (schedule, timeout) for _, job, _, schedule, timeout in rows}
        new = {job: one for job, one in jobs.items() if known.get(job) != (one.schedule, one.timeout)}
        if new:
            first = [_tick_id(job, now) if one.immediate else None for job, one in new.items()]
            schedules, timeouts = [one.schedule for one in new.values()], [one.timeout for one in new.values()]
            await db.fetch(self._sql.enlist, now, [*new], schedules, timeouts, first)
            rows = await db.fetch(self._sql.listed, names)
        if names and not self._pooled and not self._warm:
            self._warm = True  # once: in an outage it would be so many answers more that could be lost
            await self._warm_up(db)
        return now, {job: last for _, job, last, _, _ in rows if job is not None}

    async def _warm_up(self, db: _PostgresConnection) -> None:
        """Have the statements planned that the first ticks would wait for; the connection that was used last is next.
        Of no rows they do nothing."""
        sql, none = self._sql, cast("list[object]", [])
        for statement in (sql.last, sql.facts, sql.lock_jobs):
            await db.fetch(statement, none)
        await db.fetch(sql.lock_ticks, none, none)
        await db.fetch(sql.hand_out, none, none, none, none, none, self.lease, self._owner)
        await db.fetch(sql.heads, none, self._owner)
        await db.fetch(sql.claim, none, none, none, self._owner, self.lease)

    async def tick(self, ticks: Sequence[Tick]) -> tuple[int, Sequence[Answer]]:
        now, answers = await self._do(lambda db: self._tick(db, ticks))
        self._held.update((answer.run.id, answer.run.token) for answer in answers if answer.run is not None)
        return now, answers

    async def _tick(self, db: _PostgresConnection, ticks: Sequence[Tick]) -> tuple[int, Sequence[Answer]]:
        now, lasts = await self._lasts(db, ticks)
        first = {tick.job: _decide(tick, now, lasts[tick.job], 0, 0, 0) for tick in ticks}
        mine = [answer.tick for answer in first.values() if answer.word not in ("lost", "early")]
        if mine:  # most often another instance was first
            async with self._transaction(db):
                now, won = await self._hand_out(db, mine, now)
            first |= won
        return now, [first[tick.job] for tick in ticks]

    async def _lasts(self, db: _PostgresConnection, ticks: Sequence[Tick]) -> tuple[int, Mapping[str, int]]:
        rows = await db.fetch(self._sql.last, [tick.job for tick in ticks])
        if len(rows) < len(ticks):
            raise Unreachable(f"{self!r}: its jobs were deleted")
        return rows[0][0], {job: last for _, job, last in rows}

    async def _hand_out(self, db: _PostgresConnection, ticks: list[Tick], now: int) -> tuple[int, dict[str, Answer]]:
        """Decide while nobody else can: the jobs' rows are locked, and what is counted is counted after that."""
        ours = {job for (job,) in await db.fetch(self._sql.lock_ticks, *_columns(ticks, "job", "at"))}
        answers: dict[str, Answer] = {}
        if len(ours) < len(ticks):
            rows = {job: last for _, job, last in await db.fetch(self._sql.last, [tick.job for tick in ticks])}
            lost = [tick for tick in ticks if tick.job not in ours]
            answers = {tick.job: Answer(tick, "lost", max(tick.at, rows.get(tick.job, 0))) for tick in lost}
        if not ours:
            return now, answers
        facts = await db.fetch(self._sql.facts, [*ours])
        now = facts[0][0]
        found = {job: fact for _, job, *fact in facts}
        answers |= {tick.job: _decide(tick, now, *found[tick.job]) for tick in ticks if tick.job in ours}
        return now, await self._write(db, answers)

    async def _write(self, db: _PostgresConnection, answers: dict[str, Answer]) -> dict[str, Answer]:
        out = [answer for answer in answers.values() if answer.word in ("won", "skipped")]
        if not out:
            return answers
        dues = [answer.tick.at + answer.tick.delay if answer.word == "won" else None for answer in out]
        started = [int(answer.run is not None) for answer in out]
        ids = [answer.tick.id if answer.run is None else answer.run.id for answer in out]
        columns = _columns([answer.tick for answer in out], "job", "at")
        rows = await db.fetch(self._sql.hand_out, ids, *columns, dues, started, self.lease, self._owner)
        new = {id for (id,) in rows}  # all but those that were handed out before their job was deleted and listed again
        return {job: a if a.run is None or a.run.id in new else a._replace(run=None) for job, a in answers.items()}

    async def push(self, calls: Sequence[Call], wake: bool) -> Sequence[int | None]:
        return await self._pushes.ask((calls, wake))

    async def _push(self, asked: list[tuple[Sequence[Call], bool]]) -> Sequence[Sequence[int | None]]:
        new = {call.id: call for calls, _ in reversed(asked) for call in reversed(calls)}  # the first of equal ones
        wake = any(wake for _, wake in asked)
        at_once = wake and self._rings()
        args: Sequence[object]
        if len(new) == 1:
            ((id, job, at, delay, payload),) = new.values()
            statement, args = self._sql.push_one, (id, job, at, delay, payload)
        else:
            statement, args = self._sql.push, _columns([*new.values()], "id", "job", "at", "delay", "args")
        args = *args, self.keep, at_once, PostgresStore.poll, self._owner
        stored = {id: at for id, at, _ in await self._do(lambda db: db.fetch(statement, *args))}
        if wake and not at_once:
            self._ring_later()
        return [[stored.pop(call.id, None) for call in calls] for calls, _ in asked]

    async def claim(self, free: Mapping[str, tuple[int, int]]) -> News:
        news = await self._do(lambda db: self._claim(db, free))
        self._held.update((run.id, run.token) for run in news.runs)
        return news

    async def _claim(self, db: _PostgresConnection, free: Mapping[str, tuple[int, int]]) -> News:
        rows = list[Any]()
        if self._loop.time() < self._doubtful:
            held = [*self._held], [*self._held.values()]
            rows += await db.fetch(self._sql.unheard, [*free], self._owner, *held, self.lease)
        ((now, jobs, next_due, flagged),) = await db.fetch(self._sql.heads, [*free], self._owner)
        if jobs:
            async with self._transaction(db):
                if len(await db.fetch(self._sql.lock_jobs, jobs)) < len(jobs):
                    raise Unreachable(f"{self!r}: its jobs were deleted")
                here, everywhere = zip(*(free[job] for job in jobs), strict=True)
                rows += await db.fetch(self._sql.claim, jobs, here, everywhere, self._owner, self.lease)
        runs = sorted((Claimed(*row) for row in rows), key=lambda run: (run.at, run.id))
        return News(now, runs, next_due, flagged)

    async def beat(self, runs: Mapping[str, int]) -> Mapping[str, bool]:
        args = [*runs], [*runs.values()], self.lease
        known = dict(map(tuple, await self._do(lambda db: db.fetch(self._sql.beat, *args))))
        _let_go(self._held, ((id, token) for id, token in runs.items() if id not in known))
        return known

    async def settle(self, ended: Sequence[Settlement]) -> Sequence[_Settled]:
        names = "id", "token", "job", "at", "call", "state", "delay", "back", "attempt", "error", "reason", "result"
        args = *_columns(ended, *names), self.keep, self._owner
        rows = await self._do(lambda db: db.fetch(self._sql.settle, *args))
        _let_go(self._held, ((end.id, end.token) for end in ended))
        return ["refused" if new is None else "done" if new == old else "cancelled" for old, new, _ in rows]

    async def cancel(self, job: str, id: str | None = None) -> Mapping[str, Cancelled]:
        found: dict[str, Cancelled] = {}
        async with self._cancelling:  # whoever cancels a thousand runs at once leaves connections to others
            more = True
            while more:
                page = await self._do(functools.partial(self._cancel, job=job, id=id, first=not found))
                found |= page
                more = len(page) == 1000
        return found

    async def _cancel(self, db: _PostgresConnection, job: str, id: str | None, first: bool) -> dict[str, Cancelled]:
        ids = [id] if id is not None else [id for (id,) in await db.fetch(self._sql.page, job, first)]
        rows = await db.fetch(self._sql.cancel, job, ids, _Stop.CANCEL, self._owner) if ids else []
        return {id: Cancelled(running, at) for id, running, at, _ in rows}

    async def find(self, id: str, watch: bool = False) -> Row | None:
        return await self._finds.ask((id, watch)) if id.isprintable() else None

    async def _find(self, asked: list[tuple[str, bool]]) -> Sequence[Row | None]:
        args = [id for id, _ in asked], [id for id, watch in asked if watch]
        rows = await self._do(lambda db: db.fetch(self._sql.find, *args))
        found = {row[0]: _row(row) for row in rows}  # an unfinished one is later than an end by the same key
        return [found.get(id) for id, _ in asked]

    async def overview(self, n: int) -> Overview:
        return await self._do(lambda db: self._overview(db, n))

    async def _overview(self, db: _PostgresConnection, n: int) -> Overview:
        sql = self._sql
        ((now,),) = await db.fetch(sql.now)
        jobs = [Standing(*row) for row in await db.fetch(sql.jobs)]
        running = [_row(row) for row in await db.fetch(sql.running)]
        lists = [[_row(row) for row in await db.fetch(one, n)] for one in (sql.due, sql.retrying, sql.failed)]
        return Overview(now, jobs, running, *lists)


async def _nothing(_: object) -> None: ...


def _columns(rows: Sequence[object], *names: str) -> list[list[object]]:
    """The fields of many rows, each as the array that `unnest` makes rows of again."""
    return [[getattr(row, name) for row in rows] for name in names]


_REDIS_CONNECTIONS = 4  # at the same time: more would not be faster, for the server does one thing at a time
_REDIS_SILENCE = 10.0  # s
_REDIS_PASSING = r"\b(LOADING|BUSY|READONLY|MASTERDOWN|OOM|MISCONF|NOREPLICAS|CLUSTERDOWN|TRYAGAIN)\b"

# Every instant and duration is a whole number of milliseconds; a text that is missing is ''. A script is never rolled
# back, so that `rows` converts its arguments before the first write. ARGV[1] is always the caller.
_REDIS_PRELUDE = """
local call, P, time = redis.call, KEYS[1], redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function rows(first, width, ...)
  local all = {}
  for i = first, #ARGV, width do
    local row = {unpack(ARGV, i, i + width - 1)}
    for _, k in ipairs({...}) do row[k] = assert(tonumber(row[k]), 'not a number') end
    all[#all + 1] = row
  end
  return all
end
local function score(reply) return tonumber(reply or nil) end
local function wake(owner)  -- a hint: missing rights must not end a script half-way
  if owner ~= ARGV[1] then redis.pcall('PUBLISH', P .. 'wake:' .. owner, '') end
end
local function wake_workers()
  for _, owner in ipairs(call('ZRANGE', P .. 'workers', 0, -1)) do wake(owner) end
end
local function wake_waiting(awaited)
  for owner in string.gmatch(awaited or '', '[^\\n]+') do wake(owner) end
end
local function remember(run, keep, state, attempt, error, reason, result)
  call('HSET', run, 'state', state, 'finished', now, 'attempt', attempt, 'error', error, 'reason', reason,
    'result', result)
  call('PEXPIRE', run, keep)
end
local function row(id)
  local r = call('HMGET', P .. 'run:' .. id, 'job', 'state', 'at', 'args', 'tries', 'token', 'owner', 'since', 'error',
    'finished', 'attempt', 'reason', 'result')
  if not r[1] then return false end
  if r[2] then return {id, r[1], r[2], r[3], r[10], r[4] or '', r[11], r[6], r[7], r[8], r[10], r[9], r[12], r[13]} end
  local ends = score(call('ZSCORE', P .. 'busy:' .. r[1], id))
  local state = ends and ends > now and 'running' or 'scheduled'
  local due = ends or score(call('ZSCORE', P .. 'due:' .. r[1], id)) or r[3]
  return {id, r[1], state, r[3], due, r[4] or '', r[5], r[6], r[7], r[8], false, r[9], false, false}
end
"""


class _Redis:
    """One a verb. Keys, all after the prefix in braces, which is one slot of a cluster:

    HASH `tick`, `schedule`, `timeout`: job to its last tick, what was listed. HASH `run:<id>`: a run; with a `state`
    and a time to live once it has ended. ZSET `due:<job>`: id to when it may be claimed. ZSET `busy:<job>`: id to the
    end of its lease; it is in one of the two. SET `ticks:<job>`: unfinished ticks. ZSET `retry`: what waits for a
    second attempt. ZSET `failed`: the latest. SET `flag:<owner>`: runs of that owner that are to be cancelled. SET
    `jobs`: of calls. ZSET `workers`: owner to when it was last seen. Channel `wake:<owner>`.
    """

    enlist: str = """
    local out = {}
    for _, r in ipairs(rows(2, 6, 6)) do
      local job, schedule, timeout, immediate, id, at = unpack(r)
      local last, known = call('HGET', P .. 'tick', job), call('HGET', P .. 'schedule', job)
      if not last or known ~= schedule then
        call('HSET', P .. 'tick', job, now)
        call('HSET', P .. 'schedule', job, schedule)
      end
      call('HSET', P .. 'timeout', job, timeout)
      call('SADD', P .. 'jobs', job)
      if not last and immediate == '1' and call('HSETNX', P .. 'run:' .. id, 'job', job) == 1 then
        call('HSET', P .. 'run:' .. id, 'at', at)
        call('SADD', P .. 'ticks:' .. job, id)
        call('ZADD', P .. 'due:' .. job, at, id)
      end
      out[#out + 1] = tonumber(call('HGET', P .. 'tick', job))
    end
    if #out > 0 then call('ZADD', P .. 'workers', now, ARGV[1]) end
    return cjson.encode({now, out})
    """
    tick: str = """
    local owner, lease = ARGV[1], assert(tonumber(ARGV[2]))
    local asked, last, out = rows(3, 8, 3, 4, 5, 7, 8), {}, {}
    for n, r in ipairs(asked) do
      last[n] = score(call('HGET', P .. 'tick', r[2]))
      if not last[n] then return cjson.encode({now, {}}) end
    end
    local function start(id, job, at, delay, free, parallelism)
      local run, due, busy = P .. 'run:' .. id, P .. 'due:' .. job, P .. 'busy:' .. job
      if call('HSETNX', run, 'job', job) == 0 then return 0 end
      call('SADD', P .. 'ticks:' .. job, id)
      local room = delay == 0 and free > 0 and call('ZCOUNT', due, '-inf', now) == 0
      if room and call('ZCARD', busy) > 0 then
        room = call('ZCOUNT', busy, '-inf', now) == 0 and call('ZCARD', busy) < parallelism
      end
      if not room then
        call('HSET', run, 'at', at)
        call('ZADD', due, at + delay, id)
        return 0
      end
      call('HSET', run, 'at', at, 'tries', 1, 'token', 1, 'owner', owner, 'since', now)
      call('ZADD', busy, now + lease, id)
      return 1
    end
    for n, r in ipairs(asked) do
      local id, job, at, delay, limit, hold, free, parallelism = unpack(r)
      local word, run = 'won', 0
      if last[n] >= at then word = 'lost'
      elseif at > now then word = 'early'
      elseif call('SCARD', P .. 'ticks:' .. job) >= limit then word = hold == '1' and 'full' or 'skipped'
      else run = start(id, job, at, delay, free, parallelism) end
      if word == 'won' or word == 'skipped' then call('HSET', P .. 'tick', job, at) end
      out[n] = {word, word == 'won' and at or last[n], run}
    end
    return cjson.encode({now, out})
    """
    push: str = """
    local horizon, soon, out = assert(tonumber(ARGV[2])), false, {}
    for n, r in ipairs(rows(3, 5, 3, 4)) do
      local id, job, at, delay, args = unpack(r)
      local run = P .. 'run:' .. id
      local known = call('HMGET', run, 'job', 'state', 'token')
      if known[1] and (not known[2] or known[2] == 'succeeded' or known[2] == 'failed') then
        out[n] = '-'
      else
        if delay >= 0 then at = now + delay end
        if known[1] then call('DEL', run) end
        call('HSET', run, 'job', job, 'at', at, 'args', args, 'token', known[3] or 0)
        call('ZADD', P .. 'due:' .. job, at, id)
        call('SADD', P .. 'jobs', job)
        soon = soon or at <= now + horizon
        out[n] = string.format('%.0f', at)
      end
    end
    if soon then wake_workers() end
    return table.concat(out, ' ')
    """
    claim: str = """
    local owner, lease, room = ARGV[1], assert(tonumber(ARGV[2])), assert(tonumber(ARGV[3]))
    local held = ARGV[4] ~= '' and cjson.decode(ARGV[4])
    local asked, runs, next_due, bytes = rows(5, 3, 2, 3), {}, nil, 0
    local function later(first)
      if first and (not next_due or first < next_due) then next_due = first end
    end
    local function give(job, id, r, tries, lost, token)
      call('ZADD', P .. 'busy:' .. job, now + lease, id)
      runs[#runs + 1] = {id, job, r[1], r[2] and true or false, r[2] or '', tries, lost, token, r[7] and true or false}
      room, bytes = room - 1, bytes + #(r[2] or '')
      if bytes > 4000000 then room = 0 end
    end
    local function facts(id)
      return call('HMGET', P .. 'run:' .. id, 'at', 'args', 'tries', 'lost', 'token', 'owner', 'cancel', 'state')
    end
    local function again(job, free)  -- what was claimed for us by a call whose answer we didn't get
      for _, id in ipairs(call('ZRANGEBYSCORE', P .. 'busy:' .. job, '(' .. now, '+inf')) do
        local r = facts(id)
        if r[6] == owner and not r[8] and held[id] ~= tonumber(r[5]) and free > 0 and room > 0 then
          give(job, id, r, tonumber(r[3]), tonumber(r[4] or 0), tonumber(r[5]))
          free = free - 1
        end
      end
      return free
    end
    local function take(job, id)
      local r = facts(id)
      call('ZREM', P .. 'due:' .. job, id)
      if not r[1] or r[8] then call('ZREM', P .. 'busy:' .. job, id) return end
      local tries, lost, token = (r[3] or 0) + 1, (r[4] or 0) + (r[6] and 1 or 0), (r[5] or 0) + 1
      call('HSET', P .. 'run:' .. id, 'owner', owner, 'since', now, 'tries', tries, 'lost', lost, 'token', token)
      if tries > 1 then call('ZREM', P .. 'retry', id) end
      give(job, id, r, tries, lost, token)
    end
    local function oldest(due, busy, n)  -- of what waits, and of what died
      local all = {}
      for _, key in ipairs({due, busy}) do
        local found = call('ZRANGEBYSCORE', key, '-inf', now, 'WITHSCORES', 'LIMIT', 0, n)
        for i = 1, #found, 2 do all[#all + 1] = {tonumber(found[i + 1]), found[i]} end
      end
      table.sort(all, function(a, b) return a[1] < b[1] or a[1] == b[1] and a[2] < b[2] end)
      return all
    end
    local function first(key) return score(call('ZRANGE', key, 0, 0, 'WITHSCORES')[2]) end
    local function after(key)
      return score(call('ZRANGEBYSCORE', key, '(' .. now, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)[2])
    end
    for _, r in ipairs(asked) do
      local job, free, parallelism = unpack(r)
      local due, busy = P .. 'due:' .. job, P .. 'busy:' .. job
      if held then free = again(job, free) end
      local waits, ends = first(due), first(busy)
      if waits and waits <= now or ends and ends <= now then
        local n = math.min(free, room, parallelism - call('ZCOUNT', busy, '(' .. now, '+inf'))
        if n > 0 then
          local all = oldest(due, busy, n)
          for k = 1, math.min(n, #all) do if room > 0 then take(job, all[k][2]) end end
        end
        waits, ends = after(due), after(busy)
      end
      later(waits)
      later(ends)
    end
    if room <= 0 then next_due = now end
    return cjson.encode({now, runs, next_due or false, call('SMEMBERS', P .. 'flag:' .. owner)})
    """
    beat: str = """
    local lease, out = assert(tonumber(ARGV[2])), {}
    if ARGV[3] == '1' then
      call('ZADD', P .. 'workers', now, ARGV[1])
      call('ZREMRANGEBYSCORE', P .. 'workers', '-inf', now - 3 * lease)
    end
    for n, r in ipairs(rows(4, 2)) do
      local known = call('HMGET', P .. 'run:' .. r[1], 'token', 'owner', 'state', 'job', 'cancel')
      local ours = known[1] == r[2] and known[2] and not known[3]
      if ours then call('ZADD', P .. 'busy:' .. known[4], now + lease, r[1]) end
      out[n] = ours and (known[5] and 1 or 0) or -1
    end
    return cjson.encode({now, out})
    """
    # a token that is right, of a run that has ended or has no owner: this was said before, and the answer was lost
    settle: str = """
    local keep, back, out = assert(tonumber(ARGV[2])), false, {}
    local function again(run, r, known)
      local id, job, tries = r[1], r[3], known[6] - r[8]
      call('HDEL', run, 'owner')
      call('HSET', run, 'tries', tries, 'error', r[10])
      call('ZADD', P .. 'due:' .. job, r[8] == 1 and r[4] or now + r[7], id)
      if tries > 0 then call('ZADD', P .. 'retry', now + r[7], id) end
      back = back or r[8] == 1
    end
    local function finish(run, r, known, state)
      local id, job, is_call = r[1], r[3], r[5] == '1'
      if known[4] then call('SREM', P .. 'flag:' .. known[2], id) end
      if not is_call then call('SREM', P .. 'ticks:' .. job, id) end
      if not is_call and not known[5] and state == 'succeeded' then call('DEL', run) return end
      remember(run, keep, state, r[9], r[10], r[11], r[12])
      if state == 'failed' then
        call('ZADD', P .. 'failed', now, id)
        call('ZREMRANGEBYSCORE', P .. 'failed', '-inf', now - keep)
        call('ZREMRANGEBYRANK', P .. 'failed', 0, -1001)
      end
      wake_waiting(known[5])
    end
    for n, r in ipairs(rows(3, 12, 4, 7, 8, 9)) do
      local id, token, job, state = r[1], r[2], r[3], r[6]
      local run = P .. 'run:' .. id
      local known = call('HMGET', run, 'token', 'owner', 'state', 'cancel', 'awaited', 'tries')
      out[n] = 'done'
      if not known[1] then
        out[n] = 'gone'
      elseif known[1] ~= token then
        out[n] = 'refused'
      elseif known[3] then
        out[n] = state == 'scheduled' and known[3] == 'cancelled' and 'cancelled' or 'done'
      elseif known[2] then
        call('ZREM', P .. 'busy:' .. job, id)
        if state == 'scheduled' and not known[4] then again(run, r, known)
        elseif state == 'scheduled' then finish(run, r, known, 'cancelled') out[n] = 'cancelled'
        else finish(run, r, known, state) end
      end
    end
    if back then wake_workers() end
    return cjson.encode({now, out})
    """
    cancel: str = """
    local keep, job, id, first, repeated, reason = assert(tonumber(ARGV[2])), unpack(ARGV, 3)
    local due, busy, found = P .. 'due:' .. job, P .. 'busy:' .. job, {}
    local function signal(id, owner)
      call('HSET', P .. 'run:' .. id, 'cancel', 1)
      call('SADD', P .. 'flag:' .. owner, id)
      call('PEXPIRE', P .. 'flag:' .. owner, 86400000)
      wake(owner)
    end
    local function remove(id, known)
      local run = P .. 'run:' .. id
      call('ZREM', due, id)
      call('ZREM', busy, id)
      call('ZREM', P .. 'retry', id)
      call('SREM', P .. 'ticks:' .. job, id)
      if not known[1] or known[4] then return end
      call('HINCRBY', run, 'token', 1)  -- its last owner may only have been slow
      remember(run, keep, 'cancelled', known[5] or 0, known[6] or '', reason, '')
      wake_waiting(known[7])
    end
    local function one(id)
      local known = call('HMGET', P .. 'run:' .. id, 'job', 'owner', 'at', 'state', 'tries', 'error', 'awaited')
      if known[1] and known[1] ~= job then return end
      local ends = score(call('ZSCORE', busy, id))
      local runs = known[2] and ends and ends > now
      if runs then signal(id, known[2]) else remove(id, known) end
      if known[1] and (not known[4] or known[4] == 'cancelled' and repeated == '1') then
        found[#found + 1] = {id, runs and true or false, known[3]}
      end
    end
    local some = id == '' and call('ZRANGE', due, 0, 499) or {id}
    if id == '' and first == '1' then
      for _, other in ipairs(call('ZRANGE', busy, 0, -1)) do one(other) end
    end
    for _, other in ipairs(some) do one(other) end
    return cjson.encode({#some == 500, found})
    """
    find: str = """
    local run, me = P .. 'run:' .. ARGV[2], ARGV[1] .. '\\n'
    local known = call('HMGET', run, 'job', 'state', 'awaited')
    if ARGV[3] == '1' and known[1] and not known[2] and not string.find(known[3] or '', me, 1, true) then
      call('HSET', run, 'awaited', (known[3] or '') .. me)
    end
    return cjson.encode({row(ARGV[2])})
    """
    overview: str = """
    local n, names = assert(tonumber(ARGV[2])), call('SMEMBERS', P .. 'jobs')
    local function cut(list, limit)
      table.sort(list, function(a, b) return a[1] < b[1] or a[1] == b[1] and a[2] < b[2] end)
      for k = #list, limit + 1, -1 do list[k] = nil end
    end
    local function add(list, limit, found)
      for i = 1, #found, 2 do list[#list + 1] = {tonumber(found[i + 1]), found[i]} end
      if #list > 2 * limit + 100 then cut(list, limit) end
    end
    local retries = math.min(1000, call('ZCARD', P .. 'retry'))  -- they stand among what is due
    local due, running, retrying = {}, {}, {}
    add(retrying, n, call('ZRANGE', P .. 'retry', 0, n - 1, 'WITHSCORES'))
    for _, job in ipairs(names) do
      local key = P .. 'busy:' .. job
      add(due, n + retries, call('ZRANGE', P .. 'due:' .. job, 0, n + retries - 1, 'WITHSCORES'))
      add(running, 1000, call('ZRANGEBYSCORE', key, '(' .. now, '+inf', 'WITHSCORES', 'LIMIT', 0, 1000))
      add(retrying, n, call('ZRANGEBYSCORE', key, '-inf', now, 'WITHSCORES', 'LIMIT', 0, n))
    end
    local function shown(list, limit, skip)
      local out = {}
      cut(list, limit + retries)
      for _, one in ipairs(list) do
        local found = #out < limit and not (skip and call('ZSCORE', skip, one[2])) and row(one[2])
        if found then out[#out + 1] = found end
      end
      return out
    end
    local failed = {}
    for _, id in ipairs(call('ZREVRANGE', P .. 'failed', 0, n - 1)) do
      local found = row(id)
      if found and found[3] == 'failed' then failed[#failed + 1] = found end
    end
    local jobs = {call('HGETALL', P .. 'tick'), call('HGETALL', P .. 'schedule'), call('HGETALL', P .. 'timeout')}
    return cjson.encode({now, jobs, shown(running, 1000), shown(due, n, P .. 'retry'), shown(retrying, n), failed})
    """


class _RedisConnection(Protocol):
    """What is used of redis-py's connections; in its versions 5 to 8 they are the same, and half as dear as clients."""

    async def connect(self) -> None: ...
    async def disconnect(self, nowait: bool = False) -> None: ...
    async def send_packed_command(self, command: bytes, check_health: bool = True) -> None: ...
    async def read_response(
        self, disable_decoding: bool = False, timeout: float | None = None, *, push_request: bool | None = False
    ) -> Any: ...


class _RedisClient(Protocol):
    """A `redis.asyncio.Redis`."""

    @property
    def connection_pool(self) -> Any: ...


class RedisStore:
    """A Redis server, 5 or later, that the processes of many machines share; its clock decides.

    It must not evict (`maxmemory-policy noeviction`), and forgets at a restart what it has not saved: `appendonly yes`.
    An asynchronous failover can lose the last writes.

    Args:
        url_or_client: "redis://", "rediss://" or "unix://" and whatever redis-py takes in a URL, or a
            `redis.asyncio.Redis`, whose settings are used for connections of our own; it is not closed.
        prefix: of the keys: two applications can share a database. Default: "bgjob".
        lease: how long the runs of an instance that died stay its own; 10 s or more is wise. Default: 30 s.
        keep: how long ends and results are kept, and keys taken. Default: a day.

    Raises:
        StoreError: the URL or the prefix is wrong; from `run()`: the driver is missing, the server's certificate isn't
            trusted, or the server refuses: a wrong password or database, missing rights, or it evicts.
        ScheduleError: a duration is wrong.
    """

    poll: int = 5000

    def __init__(
        self,
        url_or_client: str | _RedisClient,
        *,
        prefix: str = "bgjob",
        lease: Duration = "30s",
        keep: Duration = "1d",
    ) -> None:
        self._source = url_or_client
        self._shown = _redis_place(url_or_client)
        self.lease: int = _lease(lease)
        self.keep: int = _duration("keep", keep, 1)
        self._key = f"{{{_checked_prefix(prefix)}}}:"
        self._limit = min(_VERB_LIMIT, self.lease / 4000)
        self._heads: dict[str, tuple[bytes, bytes]] = {}
        self._held: dict[str, int] = {}  # claimed runs that we know of
        self._unanswered: set[str] = set()  # cancels
        self._ears: _RedisConnection | None = None
        self._listener: asyncio.Task[None] | None = None
        self._opened = False

    def __repr__(self) -> str:
        return f"RedisStore({self._shown!r})"

    # Open and close

    async def open(self, owner: str, hint: Callable[[], None]) -> None:
        if self._opened:
            raise BgjobError(f"{self!r} is in use: one run() or running() per store object; make another")
        self._configure()
        self._owner, self._hint = owner, hint
        self._loop = asyncio.get_running_loop()
        self._slots: asyncio.LifoQueue[_RedisConnection | None] = asyncio.LifoQueue()
        for _ in range(_REDIS_CONNECTIONS):
            self._slots.put_nowait(None)
        self._heads.clear()
        self._held.clear()
        self._unanswered.clear()
        self._doubtful = -math.inf
        self._works = self._greeted = False
        self._opened = True
        try:
            with suppress(Unreachable):  # then each verb tries to connect
                await self._call(_Redis.enlist)
                self._ears = await self._subscribe()
        except BaseException:
            await self.close()
            raise
        self._listener = self._loop.create_task(self._listen(), name="bgjob redis")

    def _configure(self) -> None:
        """Find out how connections are made, from the URL or from the client."""
        redis = _driver("redis.asyncio", "redis")
        self._errors = _driver("redis.exceptions", "redis")
        if isinstance(self._source, str):
            try:
                pool = redis.ConnectionPool.from_url(self._source)
            except ValueError:  # its text may be a piece of the password
                raise StoreError(
                    f"{self!r}: not a URL that redis-py can read; is the password percent-encoded?"
                ) from None
        elif isinstance(self._source, redis.Redis):
            pool = self._source.connection_pool
        else:
            raise StoreError(f"{self!r}: pass a URL or a redis.asyncio.Redis, not a {type(self._source).__name__}")
        ours: dict[str, object] = {"protocol": 2, "socket_timeout": None, "retry": None, "retry_on_error": list[type]()}
        settings = {name: value for name, value in pool.connection_kwargs.items() if not name.startswith("maint_")}
        self._make = functools.partial(pool.connection_class, **settings | ours)
        try:
            context = getattr(self._make(), "ssl_context", None)
            if context is not None:
                context.get()  # reads the files of certificates and keys
        except (TypeError, OSError, self._errors.RedisError) as error:  # an unknown option in the URL, a wrong file
            raise StoreError(f"{self!r}: {error}") from None

    async def close(self) -> None:
        if not self._opened:
            return
        self._opened = False
        if self._listener is not None:
            self._listener.cancel()
            await asyncio.wait({self._listener})
            self._listener = None
        if self._ears is not None:
            await self._drop(self._ears)
            self._ears = None
        while not self._slots.empty():
            connection = self._slots.get_nowait()
            if connection is not None:
                await self._drop(connection)

    async def _drop(self, connection: _RedisConnection) -> None:
        with suppress(Exception):
            await connection.disconnect(nowait=True)

    # Connections and errors

    async def _connect(self) -> _RedisConnection:
        connection = cast(_RedisConnection, self._make())
        try:
            await connection.connect()
            if not self._greeted:
                await connection.send_packed_command(b"*1\r\n$4\r\nINFO\r\n", check_health=False)
                self._greet(await connection.read_response(disable_decoding=True))
        except BaseException:
            await self._drop(connection)
            raise
        return connection

    def _greet(self, info: bytes) -> None:
        """Refuse a server that would lose runs."""
        facts = dict(line.split(":", 1) for line in info.decode().splitlines() if ":" in line)
        version = facts.get("redis_version", "5")
        if int(version.partition(".")[0]) < 5:
            raise StoreError(f"{self!r}: needs Redis 5, the server is {version}")
        policy = facts.get("maxmemory_policy", "noeviction")
        if policy != "noeviction" and facts.get("maxmemory", "0") != "0":
            raise StoreError(
                f"{self!r}: with maxmemory-policy {policy} it would delete runs to free memory; "
                "set maxmemory-policy noeviction"
            )
        if facts.get("aof_enabled") == "0" and not self._greeted:
            _log.warning("%r: a restart of Redis forgets runs; set appendonly yes", self)
        self._greeted = True

    async def _call(self, script: str, *arguments: str | int) -> bytes:
        """What a script answers, in one round trip; two where the server doesn't know it, or no longer."""
        by_name, by_text = self._heads.get(script) or self._learn(script)
        count, tail = len(arguments) + 5, b"".join(map(_redis_bulk, arguments))
        try:
            async with asyncio.timeout(self._limit):
                try:
                    return await self._ask(b"*%d\r\n%b%b" % (count, by_name, tail))
                except self._errors.NoScriptError:
                    return await self._ask(b"*%d\r\n%b%b" % (count, by_text, tail))
        except (self._errors.RedisError, OSError, TimeoutError) as error:
            raise self._error(error) from error

    async def _facts(self, script: str, *arguments: str | int) -> Any:
        return _loads(await self._call(script, *arguments))

    def _learn(self, script: str) -> tuple[bytes, bytes]:
        """The beginning of a command that runs a script, by its name and by its text, with us as first argument."""
        import hashlib

        text = _REDIS_PRELUDE + script
        name = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        end = _redis_bulk(1) + _redis_bulk(self._key) + _redis_bulk(self._owner)
        heads = _redis_bulk("EVALSHA") + _redis_bulk(name) + end, _redis_bulk("EVAL") + _redis_bulk(text) + end
        self._heads[script] = heads
        return heads

    async def _ask(self, command: bytes) -> bytes:
        connection = await self._slots.get()
        try:
            if connection is not None:
                with suppress(self._errors.ConnectionError):  # it may have died long ago, which is no outage
                    return await self._round_trip(connection, command)
                self._loop.call_soon(self._hint)  # or this answer was lost, and with it runs: claim
                connection = None
            connection = await self._connect()
            return await self._round_trip(connection, command)
        except BaseException as error:
            if not isinstance(error, self._errors.ResponseError):
                connection = None
            raise
        finally:
            await self._give_back(connection)

    async def _round_trip(self, connection: _RedisConnection, command: bytes) -> bytes:
        try:
            await connection.send_packed_command(command, check_health=False)
            return cast(bytes, await connection.read_response(disable_decoding=True))
        except self._errors.ResponseError:
            raise
        except BaseException:
            self._doubtful = self._loop.time() + self.lease / 1000
            await self._drop(connection)
            raise

    async def _give_back(self, connection: _RedisConnection | None) -> None:
        if self._opened:
            self._slots.put_nowait(connection)
        elif connection is not None:
            await self._drop(connection)

    async def _each(
        self, script: str, fixed: Sequence[str | int], items: Iterable[Sequence[str | int]]
    ) -> tuple[int, list[Any]]:
        """`now`, and what a script answers to each item, in as many calls as keep the server's pauses short."""
        now, answers = 0, list[Any]()
        for part in _redis_parts(items):
            now, some = await self._facts(script, *fixed, *part)
            answers += some
        return now, answers

    def _error(self, error: Exception) -> StoreError:
        errors, text = self._errors, str(error).partition("\n")[0] or type(error).__name__
        if isinstance(error, TimeoutError):
            return Unreachable(f"{self!r}: no answer within {self._limit:g} s")
        if type(error.__context__).__name__ == "SSLCertVerificationError":
            return StoreError(f"{self!r}: {error.__context__}")
        passing = (
            OSError, errors.ConnectionError, errors.TimeoutError, errors.ReadOnlyError, errors.OutOfMemoryError,
            errors.ClusterDownError, errors.TryAgainError,
        )  # fmt: skip
        refused = isinstance(error, (errors.AuthenticationError, errors.AuthorizationError))
        outage = isinstance(error, passing) or re.search(_REDIS_PASSING, text) is not None
        return (Unreachable if outage and not refused else StoreError)(f"{self!r}: {text}")

    # Hints

    async def _subscribe(self) -> _RedisConnection:
        connection = cast(_RedisConnection, self._make())
        command = b"*2\r\n" + _redis_bulk("SUBSCRIBE") + _redis_bulk(f"{self._key}wake:{self._owner}")
        try:
            async with asyncio.timeout(self._limit):
                await connection.connect()
                await connection.send_packed_command(command, check_health=False)
                await connection.read_response(disable_decoding=True)
        except (self._errors.RedisError, OSError, TimeoutError) as error:
            await self._drop(connection)
            raise self._error(error) from error
        except BaseException:
            await self._drop(connection)
            raise
        return connection

    async def _listen(self) -> None:
        """Be woken, for ever; without it the engine looks every now and then."""
        failures = 0
        while True:
            try:
                if self._ears is None:
                    self._ears = await self._subscribe()
                    self._hint()
                failures = 0
                await self._hear(self._ears)
            except (StoreError, self._errors.RedisError, OSError):
                pass  # the verbs meet it too, and say so
            if self._ears is not None:
                await self._drop(self._ears)
                self._ears = None
            top = min(_BACKOFF_FIRST << min(failures, 10), _BACKOFF_LAST)
            failures += 1
            await asyncio.sleep((top - _spread(f"{self._owner} {failures}", top // 2)) / 1000)

    async def _hear(self, ears: _RedisConnection) -> None:
        """Pass hints on, until the connection is dead: one that stays silent is asked, for it may be half-open."""
        asked = False
        while True:
            message = await ears.read_response(disable_decoding=True, timeout=_REDIS_SILENCE)
            if message is None:
                if asked:
                    return
                await ears.send_packed_command(b"*1\r\n$4\r\nPING\r\n", check_health=False)
            elif message[0] == b"message":
                self._hint()
            asked = message is None

    # The verbs

    async def enlist(self, jobs: Mapping[str, Listing]) -> tuple[int, Mapping[str, int]]:
        at = 0
        if any(one.immediate for one in jobs.values()):
            at, _ = await self._each(_Redis.enlist, (), ())  # the server can't write the id of a tick
        now, lasts = await self._each(
            _Redis.enlist,
            (),
            [(job, one.schedule, one.timeout or "", one.immediate, _tick_id(job, at), at) for job, one in jobs.items()],
        )
        self._works = self._works or bool(jobs)
        return now, dict(zip(jobs, lasts, strict=True))

    async def tick(self, ticks: Sequence[Tick]) -> tuple[int, Sequence[Answer]]:
        ids = [tick.id for tick in ticks]
        items = [(id, *tick) for id, tick in zip(ids, ticks, strict=True)]
        now, answers = await self._each(_Redis.tick, (self.lease,), items)
        if len(answers) < len(ticks):
            raise Unreachable(f"{self!r}: its jobs were deleted")
        return now, [self._answer(tick, id, *answer) for tick, id, answer in zip(ticks, ids, answers, strict=True)]

    def _answer(self, tick: Tick, id: str, word: Any, last: int, started: int) -> Answer:
        if not started:
            return Answer(tick, word, last)
        self._held[id] = 1
        return Answer(tick, word, last, Claimed(id, tick.job, tick.at, False, "", 1, 0, 1, False))

    async def push(self, calls: Sequence[Call], wake: bool) -> Sequence[int | None]:
        items = [
            (call.id, call.job, 0, call.delay, call.args)
            if call.at is None
            else (call.id, call.job, call.at, -1, call.args)
            for call in calls
        ]
        stored: list[bytes] = []
        for part in _redis_parts(items):
            stored += (await self._call(_Redis.push, self.poll if wake else -_CENTURY, *part)).split()
        return [None if at == b"-" else int(at) for at in stored]

    async def claim(self, free: Mapping[str, tuple[int, int]]) -> News:
        doubt = self._loop.time() < self._doubtful
        held = _dumps(self._held) if doubt else ""
        asked = [argument for job, slots in free.items() for argument in (job, *slots)]
        now, found, next_due, flagged = await self._facts(_Redis.claim, self.lease, _AT_ONCE, held, *asked)
        runs = [Claimed(id, job, int(at), *rest) for id, job, at, *rest in found]
        self._held.update((run.id, run.token) for run in runs)
        return News(now, runs, int(next_due) if next_due else None, [*flagged])

    async def beat(self, runs: Mapping[str, int]) -> Mapping[str, bool]:
        _, answers = await self._each(_Redis.beat, (self.lease, self._works), runs.items())
        lost = (run for run, answer in zip(runs.items(), answers, strict=True) if answer < 0)
        _let_go(self._held, lost)
        return {id: answer == 1 for id, answer in zip(runs, answers, strict=True) if answer >= 0}

    async def settle(self, ended: Sequence[Settlement]) -> Sequence[_Settled]:
        items = [
            (
                end.id, end.token, end.job, end.at, end.call, end.state, end.delay, end.back, end.attempt,
                end.error or "", end.reason or "", end.result or "",
            )
            for end in ended
        ]  # fmt: skip
        _, answers = await self._each(_Redis.settle, (self.keep,), items)
        _let_go(self._held, ((end.id, end.token) for end in ended))
        # A tick that succeeded leaves nothing behind: that was said before, if an answer was lost of late.
        gone: _Settled = "done" if self._loop.time() < self._doubtful else "refused"
        return [gone if answer == "gone" else answer for answer in answers]

    async def cancel(self, job: str, id: str | None = None) -> Mapping[str, Cancelled]:
        found: dict[str, Cancelled] = {}
        more = first = True
        repeated = id in self._unanswered
        if id is not None:
            self._unanswered.add(id)  # until there is an answer
        while more:
            more, some = await self._facts(_Redis.cancel, self.keep, job, id or "", first, repeated, _Stop.CANCEL)
            found.update((run, Cancelled(signalled, int(at))) for run, signalled, at in some)
            first = False
        self._unanswered.discard(id or "")
        return found

    async def find(self, id: str, watch: bool = False) -> Row | None:
        (row,) = await self._facts(_Redis.find, id, watch)
        return _redis_row(row) if row else None

    async def overview(self, n: int) -> Overview:
        now, jobs, running, *lists = await self._facts(_Redis.overview, n)
        lasts, schedules, timeouts = (dict(zip(flat[::2], flat[1::2], strict=True)) for flat in map(list[str], jobs))
        listed = [
            Standing(job, int(last), schedules.get(job, ""), int(timeouts.get(job) or 0) or None)
            for job, last in sorted(lasts.items())
        ]
        due, retrying, failed = ([_redis_row(row) for row in rows] for rows in lists)
        return Overview(
            now, listed, sorted(map(_redis_row, running), key=lambda row: row.since or 0), due, retrying, failed
        )


def _redis_row(row: Sequence[Any]) -> Row:
    id, job, state, at, due, args, attempt, token, owner, since, finished, error, reason, result = row
    return Row(
        id, job, State(state), int(at), int(due), args, int(attempt or 0), int(token or 0), owner or None,
        int(since) if since else None, int(finished) if finished else None, error or None, reason or None,
        result or None,
    )  # fmt: skip


def _redis_place(source: object) -> str:
    """Where the server is, to be shown."""
    if isinstance(source, str):
        shown = _no_password(source)
        if re.match("(rediss?|unix)://", source) is None:
            raise StoreError(f"{shown!r}: write redis://host:6379/0, rediss:// or unix:///path")
        path = source.partition("://")[2].partition("?")[0].partition("/")[2]
        if not source.startswith("unix") and path and not path.isdecimal():
            raise StoreError(f"{shown!r}: after the host comes the number of a database, as in redis://host:6379/0")
        return shown
    settings = getattr(getattr(source, "connection_pool", None), "connection_kwargs", None)
    if settings is None:
        raise StoreError(f"{type(source).__name__!r}: pass a URL or a redis.asyncio.Redis")
    where = settings.get("path") or f"{settings.get('host', 'localhost')}:{settings.get('port', 6379)}"
    return f"{where}/{settings.get('db') or 0}"


def _redis_bulk(word: str | int) -> bytes:
    raw = word.encode(errors="replace") if isinstance(word, str) else b"%d" % word
    return b"$%d\r\n%b\r\n" % (len(raw), raw)


def _redis_parts(items: Iterable[Sequence[str | int]]) -> Iterator[list[str | int]]:
    """Arguments for calls of no more than `_AT_ONCE` items, and not much more than 4 MB; at least one call."""
    part, count, size = list[str | int](), 0, 0
    for item in items:
        if count == _AT_ONCE or size > 4_000_000:
            yield part
            part, count, size = [], 0, 0
        part += item
        count, size = count + 1, size + len(str(item[-1]))
    yield part


def _store_of(store: Store | str) -> Store:
    """The store meant by a URL; anything that isn't text is one."""
    if not isinstance(store, str):
        if not callable(getattr(store, "claim", None)):
            raise StoreError(f"store={store!r}: neither a URL nor a Store; write 'sqlite:///jobs.db'")
        return store
    scheme = store.partition(":")[0]
    url, options = _our_options(store)
    if scheme in ("postgresql", "postgres"):
        return PostgresStore(url, **options)
    if scheme in ("redis", "rediss", "unix"):
        return RedisStore(url, **options)
    if scheme == "sqlite":
        return SQLiteStore(_sqlite_path(store, url), **options)
    known = "sqlite:///jobs.db, postgresql://user@host/database or redis://host/0"
    raise StoreError(f"store={_no_password(store)!r}: write {known}")


def _our_options(url: str) -> tuple[str, dict[str, str]]:
    """Divide a URL: the rest is the driver's. By hand, for urllib's error for what it can't read shows a password."""
    from urllib.parse import unquote_plus

    base, _, query = url.partition("?")
    named = [(text.partition("="), text) for text in query.split("&") if text]
    ours = {name: unquote_plus(value) for (name, _, value), _ in named if name in ("prefix", "lease", "keep")}
    rest = "&".join(text for (name, _, _), text in named if name not in ours)
    return (f"{base}?{rest}" if rest else base), ours


def _sqlite_path(store: str, url: str) -> str:
    from urllib.parse import unquote

    base, _, unknown = url.partition("?")
    if unknown:
        option = unknown.partition("=")[0]
        raise StoreError(f"store={_no_password(store)!r}: unknown option {option!r}; prefix, lease and keep are known")
    path = base.removeprefix("sqlite:///")
    if path == base or not path:
        example = "sqlite:///jobs.db, or sqlite:////var/lib/jobs.db where absolute"
        raise StoreError(f"store={_no_password(store)!r}: write {example}")
    return unquote(path)


def _no_password(url: str) -> str:
    """What of a URL may be shown. Passwords contain slashes and at signs too, and some drivers take them as options."""
    return re.sub(r"(?i)(password=)[^&\s'\"]*", r"\1…", re.sub(r"(?<!/)//(?!/).*@", "//…@", url))


# 11 Registry ----------------------------------------------------------------------------------------------------------
# A set of jobs and what runs them. The default one's bound methods are the module's functions.

_MOMENT = 0.0005  # s, less than a tick: what is due at the very end of a simulation still runs


def _in_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class _Decorator(Protocol):
    """What `@job(...)` returns."""

    @overload
    def __call__(
        self, function: Callable[P, Coroutine[object, object, T]], /
    ) -> Job[P, Coroutine[object, object, T], T]: ...
    @overload
    def __call__(self, function: Callable[P, T], /) -> Job[P, T, T]: ...


class Registry:
    """A set of jobs. The module's `job`, `run`, `running` and `simulate` are those of one default registry.

    Attributes:
        overrides: `registry.overrides[factory] = other` puts `other` in a dependency's place, for tests. Those of the
            module's own functions are `bgjob.default.overrides`.
    """

    def __init__(self) -> None:
        self.overrides: dict[Factory, Factory] = {}
        self._jobs: dict[str, Job] = {}
        self._plans: dict[int, _Plan] = {}  # by the function's id, for a callable need not be hashable
        self._engine: _Engine | None = None

    @property
    def jobs(self) -> Mapping[str, Job]:
        """The registered jobs by name; read-only."""
        return MappingProxyType(self._jobs)

    @overload
    def job(
        self, function: Callable[P, Coroutine[object, object, T]], /
    ) -> Job[P, Coroutine[object, object, T], T]: ...
    @overload
    def job(self, function: Callable[P, T], /) -> Job[P, T, T]: ...
    @overload
    def job(
        self,
        function: None = None,
        /,
        *,
        every: Duration | None = None,
        cron: str | None = None,
        after: Duration | None = None,
        tz: str | tzinfo | None = None,
        name: str | None = None,
        args: Mapping[str, object] | None = None,
        immediate: bool = False,
        jitter: Duration = 0,
        parallelism: int | None = None,
        overlap: Overlap = "skip",
        expires: Duration | None = None,
        timeout: Duration | None = None,
        retries: int = 0,
        retry_delay: RetryDelay = "1s..5m",
        retry_on: RetryOn = Exception,
        on_error: OnError | None = None,
        on_crash: OnCrash = "rerun",
    ) -> _Decorator: ...
    def job(
        self,
        function: Callable[..., object] | None = None,
        /,
        *,
        every: Duration | None = None,
        cron: str | None = None,
        after: Duration | None = None,
        tz: str | tzinfo | None = None,
        name: str | None = None,
        args: Mapping[str, object] | None = None,
        immediate: bool = False,
        jitter: Duration = 0,
        parallelism: int | None = None,
        overlap: Overlap = "skip",
        expires: Duration | None = None,
        timeout: Duration | None = None,
        retries: int = 0,
        retry_delay: RetryDelay = "1s..5m",
        retry_on: RetryOn = Exception,
        on_error: OnError | None = None,
        on_crash: OnCrash = "rerun",
    ) -> object:
        """Register a function as a job: `@job`, or `@job(...)` with keywords.

        At most one of `every`, `cron`, `after`; with none of them the job runs only when it is submitted. An async
        function runs in the event loop, a plain one in a daemon thread of its own. Decorators can be stacked: one
        function, several schedules, each with its `name` and `args`.

        Args:
            every: interval. Ticks lie at start + n * every, n >= 1, and never drift.
            cron: 5 fields, 6 with seconds first, or "@hourly", "@daily" …
            after: once, that long after `run()` started.
            tz: zone for `cron`: an IANA name, "local", or a tzinfo. Default: UTC.
            name: identity in logs and stores. Default: the function's `__name__`.
            args: keyword arguments for scheduled runs. Default: none.
            immediate: run as soon as `run()` starts as well. Default: False.
            jitter: start up to that much later, never past the next tick. Default: 0.
            parallelism: how many runs at the same time. Default: 1 with a schedule, 10 without.
            overlap: ticks that find `parallelism` earlier ones unfinished: "skip" them (the default), let one wait
                ("queue"), or let all wait and run in order ("all"). After a gap "skip" and "queue" run the newest
                missed tick once, "all" every one.
            expires: skip what would start later than this. Default: never.
            timeout: limit for one attempt. Default: none.
            retries: further attempts after the first fails or times out. Default: 0.
            retry_delay: a duration; or "1s..5m" (the default), doubling from the first to the second and spread over
                the upper half; or a function of the retry's number, from 1.
            retry_on: exception class, tuple of them, or predicate: which failures to retry. Default: `Exception`.
            on_error: called with (run, exception) after the last attempt failed, for at most `timeout`, else 30 s;
                an async function, or a plain one (in a thread). Default: none.
            on_crash: shared store: a run whose process died is run again ("rerun", the default), or fails ("drop").

        Raises:
            ScheduleError: an argument is wrong, the function can't be a job, or the name is taken.
        """
        settings = _Settings(
            every=every, cron=cron, after=after, tz=tz, name=name, args=args, immediate=immediate, jitter=jitter,
            parallelism=parallelism, overlap=overlap, expires=expires, timeout=timeout, retries=retries,
            retry_delay=retry_delay, retry_on=retry_on, on_error=on_error, on_crash=on_crash,
        )  # fmt: skip
        return functools.partial(self._add, settings) if function is None else self._add(settings, function)

    def _add(self, settings: _Settings, function: Callable[..., object]) -> Job:
        if isinstance(function, Job):
            function = function.function
        plan = self._plans.get(id(function))
        if plan is None:
            _check_function(function)
        name = _job_name(function, settings.name)
        try:
            plan = plan or self._plan(function)
            job: Job = Job(_Spec(name, plan, settings), self)
            self._refuse_taken(job)
        except ScheduleError as error:
            raise ScheduleError(f"job {name!r}: {error}") from error.__cause__
        self._jobs[name] = job
        engine = self._going_engine()
        if engine is not None:
            engine.registered(job)
        return job

    def _plan(self, function: Factory) -> _Plan:
        plan = _Plan(function)
        _check_needs(plan)
        self._plans[id(function)] = plan
        return plan

    def _refuse_taken(self, job: Job) -> None:
        """A module that is loaded again replaces its jobs; any other second use of a name is a mistake."""
        taken = self._jobs.get(job.name)
        if taken is None:
            return
        old, new = _named(taken.function), _named(job.function)
        same = taken.function is job.function
        if same or any(getattr(old, a, None) != getattr(new, a, None) for a in ("__module__", "__qualname__")):
            raise ScheduleError(
                f"the name is taken by {_place(old)}, this is {_place(new)}; give one of them a name= of its own"
            )
        if getattr(old, "__code__", None) is getattr(new, "__code__", ()):  # what is loaded again is compiled again
            _log.warning(
                "job %r: %s made another function of that name, which replaces the first; in a loop give each a name=",
                job.name, _place(new),
            )  # fmt: skip

    def remove(self, name: str) -> None:
        """Forget a job: no new ticks, its scheduled runs are cancelled, what runs ends.

        Raises:
            BgjobError: there is no such job.
        """
        job = self._jobs.pop(name, None)
        if job is None:
            raise BgjobError(
                f"job {name!r}: not registered; the registered ones are: {', '.join(self._jobs) or 'none'}"
            )
        self._plans.pop(id(job.function), None)
        engine = self._going_engine()
        if engine is not None:
            engine.unregistered(job)

    def _new_engine(
        self,
        store: Store | str | None,
        jobs: Sequence[str] | None,
        drain: Duration,
        on_event: Callable[[Run], object] | None,
    ) -> _Engine:
        if isinstance(jobs, str):
            raise BgjobError(f"jobs={jobs!r}: write a list of names, [{jobs!r}]")
        if on_event is not None and (not callable(on_event) or _is_async(on_event)):
            raise BgjobError(f"on_event={on_event!r}: not a plain function; pass one that takes the run")
        clock = _Clock(asyncio.get_running_loop())
        if store is None:
            return _Engine(self, jobs, _duration("drain", drain), on_event, clock)
        return _Shared(self, jobs, _duration("drain", drain), on_event, clock, _store_of(store))

    async def find(self, id: str) -> Run | None:
        """The run with that id, or None. Without a store: an unfinished one, one of the last thousand that were
        submitted or failed, or a keyed one of the last day.

        Raises:
            BgjobError: nothing runs: call it inside `run()` or `running()`.
            StoreError: the store gave no answer for 5 s.
        """
        return await self._going("find()").find(id)

    def _going(self, what: str) -> _Engine:
        engine = self._going_engine()
        if engine is None:
            raise BgjobError(f"{what} needs jobs that run: call it inside run() or `async with running():`")
        if asyncio.get_running_loop() is not engine.loop:
            raise BgjobError(f"{what}: another event loop runs the jobs; use asyncio.run_coroutine_threadsafe")
        return engine

    def _going_engine(self) -> _Engine | None:
        """The engine, unless somebody closed its loop under it."""
        return None if self._engine is None or self._engine.loop.is_closed() else self._engine

    async def _submit(self, job: Job, payload: str, delay: int, at: int | None, key: str | None) -> Run:
        return await self._going(f"job {job.name!r}: submit()").submit(job, payload, delay, at, key)

    async def _cancel(self, job: Job) -> int:
        return await self._going(f"job {job.name!r}: cancel()").cancel_all(job)

    async def run(
        self,
        *,
        store: Store | str | None = None,
        jobs: Sequence[str] | None = None,
        drain: Duration = "20s",
        on_event: Callable[[Run], object] | None = None,
    ) -> None:
        """Run the jobs until cancelled (then it drains and raises `CancelledError`), SIGINT or SIGTERM (then returns).

        Args:
            store: a `Store`, or a URL such as "sqlite:///jobs.db" (three slashes relative, four absolute), with
                ?prefix=…&lease=30s&keep=1d if wanted. Default: the memory of this process.
            jobs: names of the jobs that this instance executes. Default: all.
            drain: at the end, how long to wait for the runs that are going. Then they are cancelled and given 5 s
                more; what would not stop is named in the log. A second signal or cancel ends the wait. Default: 20 s.
            on_event: a plain function called with the run at every change of its state. Default: none.

        Raises:
            BgjobError: these jobs run already, or a name in `jobs` is unknown.
            StoreError: the store's URL is wrong, or it can't be opened. One that doesn't answer is waited for.
            Exception: what an "app" dependency raised when it was made.
        """
        engine = self._new_engine(store, jobs, drain, on_event)
        with _signals(engine.stop):
            if not await engine.opened():
                return
            try:
                await engine.stopping.wait()
            finally:
                await engine.close()

    @asynccontextmanager
    async def running(
        self,
        *,
        store: Store | str | None = None,
        jobs: Sequence[str] | None = None,
        drain: Duration = "20s",
        on_event: Callable[[Run], object] | None = None,
    ) -> AsyncGenerator[Registry, None]:
        """`async with running():` runs the jobs beside your own code, for instance in FastAPI's lifespan.

        Takes what `run()` takes, yields the registry, and never touches signals.
        """
        engine = self._new_engine(store, jobs, drain, on_event)
        await engine.open()
        try:
            yield self
        finally:
            await engine.close()

    def simulate(
        self,
        duration: Duration,
        *,
        start: datetime | None = None,
        main: Callable[[], Coroutine[object, object, object]] | None = None,
    ) -> list[Run]:
        """Run the jobs in virtual time: `asyncio.sleep` and timeouts cost nothing. For tests; needs no test framework.

        Plain functions run inline; real I/O has to be overridden, and `run.tick` used in place of `datetime.now()`.
        The same input gives the same runs, ids included.

        Args:
            duration: how much virtual time to run; a tick at its very end is part of it.
            start: an aware datetime to begin at. Default: now.
            main: an async function that runs beside the jobs: it submits, cancels, asserts. What it raises is raised.

        Returns:
            Every run that ended, in the order of their ends. What still runs at the end is cancelled and not returned.

        Raises:
            BgjobError: called in async code.
        """
        span = _duration("duration", duration, 1) / 1000
        begin = _wall_ms() if start is None else _to_ms("start", start)
        if _in_a_loop():
            raise BgjobError("simulate() makes an event loop of its own: call it from a plain function")
        with asyncio.Runner(loop_factory=_VirtualLoop) as runner:
            return runner.run(self._simulate(span, begin / 1000, main))

    async def _simulate(
        self, span: float, begin: float, main: Callable[[], Coroutine[object, object, object]] | None
    ) -> list[Run]:
        ended: list[Run] = []

        def collect(run: Run) -> None:
            if run.state not in (_SCHEDULED, _RUNNING):
                ended.append(run)

        engine = _Engine(self, None, 0, collect, _VirtualClock(asyncio.get_running_loop(), begin))
        await engine.open()
        limit = asyncio.timeout(span + _MOMENT)
        try:
            async with limit:
                if main is not None:
                    await main()
                main = None
                await asyncio.Event().wait()
        except TimeoutError:
            if not limit.expired():
                raise
            if main is not None:
                _log.warning("simulate(): main was still waiting at the end; cancelled")
        finally:
            runs = ended.copy()
            await engine.close()
        return runs


# The one registry that exists without being asked for, and the module's functions: its bound methods.
default: Final = Registry()
job: Final = default.job
run: Final = default.run
running: Final = default.running
simulate: Final = default.simulate


# 12 Command line ------------------------------------------------------------------------------------------------------
# `bgjob run | list | submit | status | cancel`, as the installed script and as `python bgjob.py`. Data goes to stdout,
# all else to stderr. Colours are for terminals; a line is wrapped at the terminal's width or at 80, never cut.

_NOTES = """\
TARGET is a module (app.jobs) or a path (jobs.py). It is imported; its jobs are
those of @job, or else of the one Registry that it holds in a variable.

URL is sqlite:///jobs.db (three slashes relative, four absolute), redis://... or
postgresql://..., each with ?prefix=...&lease=30s&keep=1d if wanted.

Exit status: 0 done or stopped as asked, 1 refused or failed, 2 wrong usage,
130 interrupted (run: by a second Ctrl-C). NO_COLOR=1 turns colours off.

  bgjob run app.jobs --store sqlite:///jobs.db
  bgjob submit app.jobs send_mail --args '["a@b.c"]' --store sqlite:///jobs.db
  watch bgjob status --store sqlite:///jobs.db
"""
_ROWS = 10  # of each part of `bgjob status`, but for what runs; with --json a hundred times as many
_BOLD, _DIM, _RED, _GREEN, _YELLOW = 1, 2, 31, 32, 33
_COLOURS = {"INFO": _GREEN, "WARNING": _YELLOW, "ERROR": _RED, "CRITICAL": _RED, "retrying": _YELLOW, "failed": _RED}
_SIGNS = "·▁▂▃▄▅▆▇█"
_NBSP = "\xa0"  # between words that a table keeps together
_CRON_WORDS = {
    r"\* \* \* \* \*": "every minute",
    r"\*/(2|3|4|5|6|10|12|15|20|30) \* \* \* \*": "every {0} minutes",
    r"(\d+) \* \* \* \*": "hourly at :{0:0>2}",
    r"(\d+) (\d+) \* \* \*": "daily at {1:0>2}:{0:0>2}",
    r"(\d+) (\d+) \* \* ([A-Z]{3}(?:[-,][A-Z]{3})*)": "{2} at {1:0>2}:{0:0>2}",
}


def _words(ms: int, brief: bool = False) -> str:
    """A duration as one would write it, 1h30m or 250ms; if brief whole seconds, and its two largest units."""
    rest = ms // 1000 * 1000 if brief else ms
    parts: list[str] = []
    for unit, size in _UNITS.items():
        number, rest = divmod(rest, size)
        parts += [f"{number}{unit}"] if number else []
    return "".join(parts[:2] if brief else parts) or "0s"


def _relative(ms: int) -> str:
    return "now" if abs(ms) < 1000 else f"in {_words(ms, True)}" if ms > 0 else f"{_words(-ms, True)} late"


def _schedule_words(spec: _Spec) -> str:
    """The common forms of cron in words, any other as it is."""
    if isinstance(spec.schedule, _Every):
        return f"every {_words(spec.schedule.every)}"
    if spec.schedule is None:
        return "on submit" if spec.after is None else f"once, {_words(spec.after)} after the start"
    text = words = spec.schedule.text
    for pattern, form in _CRON_WORDS.items():
        if match := re.fullmatch(pattern, text.upper()):
            words = form.format(*map(str.title, match.groups()))
    return f"{words} {spec.schedule.zone}"


def _tick_words(ticks: Sequence[datetime], now: int) -> str:
    """Ticks in their own zone; day and zone are said where they change, seconds where there are some."""
    words: list[str] = []
    zone: str | None = None
    today = day = _aware(now, ticks[0].tzinfo or UTC).date()
    for tick in ticks:
        soon = (tick.date() - today).days < 7
        date = "" if tick.date() == day else f"{tick:%a} " if soon else f"{tick:%Y-%m-%d} "
        clock = tick.isoformat(timespec="milliseconds")[11:23].removesuffix(".000").removesuffix(":00")
        words.append(date + clock + (f" {tick.tzname()}" if tick.tzname() != zone else ""))
        day, zone = tick.date(), tick.tzname()
    return ", ".join(word.replace(" ", _NBSP) for word in words)  # a tick isn't torn apart


def _print_table(rows: Sequence[Sequence[str]], colours: Mapping[int, int]) -> None:
    """Columns as wide as they need to be, the widest wrapped until all fit, no word cut; rows by number in colour."""
    import textwrap

    columns = [*zip(*rows, strict=True)]
    widths = [max(1, *map(len, column)) for column in columns]
    least = [max(len(word) for cell in column for word in cell.split(" ")) for column in columns]
    while sum(widths) + 2 * (len(widths) - 1) > _width() and widths != least:
        widths[max(range(len(widths)), key=lambda n: (widths[n] > least[n], widths[n]))] -= 1
    fold = functools.partial(textwrap.wrap, break_long_words=False, break_on_hyphens=False)
    for n, row in enumerate(rows):
        lines = itertools.zip_longest(*map(fold, row, widths), fillvalue="")
        texts = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
        print("\n".join(_paint(sys.stdout, colours.get(n, 0), text) for text in texts))


def _width() -> int:
    import shutil

    return shutil.get_terminal_size().columns


def _paint(stream: TextIO, colour: int, text: str) -> str:
    """In that colour on a terminal; without what one would obey, for a store's texts come from elsewhere."""
    text = "".join(sign if sign.isprintable() else " " for sign in text)
    plain = not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain or not colour else f"\x1b[{colour}m{text}\x1b[0m"


class _LogFormat(logging.Formatter):
    """Time, level, what happened to which job. The date is for files: whoever looks at a terminal knows it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s", "%H:%M:%S" if sys.stderr.isatty() else "%Y-%m-%d %H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        level = _paint(sys.stderr, _COLOURS.get(record.levelname, _DIM), f"{record.levelname:7}")
        source = "" if record.name in ("root", "bgjob") else f"{record.name}: "
        return f"{_paint(sys.stderr, _DIM, record.asctime)} {level} {source}{record.message}"


def _complain(text: str) -> None:
    print(f"bgjob: {_paint(sys.stderr, 0, _no_password(' '.join(text.split())))}", file=sys.stderr, flush=True)


def _list_command(options: Any) -> None:
    """Show each job, its schedule, its next ticks in its own zone, and when it fires in the next 24 hours. Those of
    intervals are as with a shared store; in memory they count from the start."""
    jobs, now = _load(options.targets).jobs.values(), _wall_ms()
    rows = [("JOB", "SCHEDULE", "NEXT", "AT")]
    for job in jobs:
        ticks = job.next_ticks(max(options.n, 1), _aware(now))
        soon = _relative(_to_ms("tick", ticks[0]) - now).replace(" ", _NBSP) if ticks else ""
        rows.append((job.name, _schedule_words(job._spec), soon, _tick_words(ticks, now) if ticks else ""))
    _print_table(rows, {0: _BOLD})
    if schedules := {job.name: job._spec.schedule for job in jobs if job._spec.schedule is not None}:
        _print_day(schedules, now)


def _print_day(schedules: Mapping[str, _Schedule], now: int) -> None:
    """When each job fires in the next 24 hours, and where they collide."""
    zone = next((schedule.zone for schedule in schedules.values() if isinstance(schedule, _Cron)), UTC)
    title = f"24 HOURS ({_aware(now, zone).tzname()})"
    margin = max(map(len, (title, *schedules))) + 2
    per_hour = min(max((_width() - margin) // 24, 1), 6)
    begin = now // _UNITS["m"] - _aware(now, zone).minute
    fires = {name: _minutes(schedule, now, (begin + 1440) * _UNITS["m"]) for name, schedule in schedules.items()}
    together = Counter(itertools.chain.from_iterable(fires.values()))
    hours = (f"{_aware((begin + n * 60) * _UNITS['m'], zone):%H}".ljust(3 * per_hour) for n in range(0, 24, 3))
    print("\n" + _paint(sys.stdout, _BOLD, title.ljust(margin) + "".join(hours).rstrip()))
    for name, minutes in fires.items():
        print(name.ljust(margin) + _strip(dict.fromkeys(minutes, 1), begin, 60 // per_hour, sum))
    print("together".ljust(margin) + _paint(sys.stdout, _YELLOW, _strip(together, begin, 60 // per_hour, max)))
    note = f"Each sign is {60 // per_hour}m: ▁ has a tick in one of its minutes, █ in eight or more."
    if together:
        minute = min(together, key=lambda minute: (-together[minute], minute))
        names = ", ".join([name for name, minutes in fires.items() if minute in minutes][:9])
        when = _tick_words([_aware(minute * _UNITS["m"], zone)], now)
        note += f" Most together: {together[minute]} at {when}: {names}{', ...' if together[minute] > 9 else ''}"
    _print_table([(note,)], {0: _DIM})


def _minutes(schedule: _Schedule, begin: int, end: int) -> Iterable[int]:
    """The minutes, counted from the epoch, in which there are ticks."""
    if isinstance(schedule, _Every):
        schedule = _Every(max(schedule.every, _UNITS["m"]))  # more are one to the eye
    ticks = itertools.takewhile(lambda tick: tick < end, schedule.ticks(begin - 1))
    return dict.fromkeys(tick // _UNITS["m"] for tick in ticks)


def _strip(numbers: Mapping[int, int], begin: int, cell: int, join: Callable[[Iterable[int]], int]) -> str:
    """24 hours in cells of so many minutes: how high their joined numbers are."""
    cells = (join([numbers.get(n + minute, 0) for minute in range(cell)]) for n in range(begin, begin + 1440, cell))
    return "".join(_SIGNS[min(number, 8)] for number in cells)


async def _status_command(options: Any) -> None:
    """Show what runs where since when, what is due, what waits for a retry, and what failed; by the store's clock."""
    async with _client(Registry(), options.store) as engine:
        seen = await engine._insist("status", lambda: engine._store.overview(100 * _ROWS))
    timeouts = {job.job: job.timeout for job in seen.jobs}
    due = sorted([*seen.due, *_coming(seen.jobs)], key=lambda row: abs(row.due - seen.now))
    parts = {"running": seen.running, "due": due, "retrying": seen.retrying, "failed": seen.failed}
    if options.json:
        print(_dumps({k: [_facts(row, timeouts.get(row.job), seen.now) for row in rows] for k, rows in parts.items()}))
        return
    rows, colours = [(f"{len(seen.jobs)} jobs", f"{_aware(seen.now):%Y-%m-%d %H:%M:%S} UTC", "")], {0: _DIM}
    for part, found in parts.items():
        shown = found if part == "running" else found[:_ROWS]
        number = f"{len(shown)} of {len(found)}" if len(shown) < len(found) else str(len(found) or "none")
        colours[len(rows) + 1] = _COLOURS.get(part, _BOLD) if found else _DIM
        rows += [("", "", ""), (part.upper(), number, "")]
        rows += [_status_row(row, timeouts.get(row.job), seen.now) for row in shown]
    _print_table([tuple(cell.replace(" ", _NBSP) for cell in row[:2]) + row[2:] for row in rows], colours)


def _coming(jobs: Iterable[Standing]) -> Iterator[Row]:
    """The next tick of each job that the store has yet to hand out, as if it were there."""
    for job in jobs:
        facts = cast("dict[str, Any]", _loads(job.schedule or "{}"))
        with suppress(ScheduleError):  # a zone, or a form of cron, that only the job's own machine knows
            schedule = _Cron(facts["cron"], _zone(facts["tz"])) if "cron" in facts else _Every(facts.get("every", 0))
            at = next(schedule.ticks(job.last), None) if facts else None
            if at is not None:
                yield Row(
                    _tick_id(job.job, at), job.job, _SCHEDULED, at, at, "", 0, 0, None, None, None, None, None, None
                )


def _facts(row: Row, timeout: int | None, now: int) -> dict[str, object]:
    """A run as `--json` shows it: instants as text, durations in seconds."""
    due = row.due if row.state is _SCHEDULED else None
    instants = {"tick": row.at, "due": due, "since": row.since, "finished": row.finished}
    return {
        **{name: getattr(row, name) for name in ("id", "job", "state", "attempt", "owner", "error", "reason")},
        **{name: None if ms is None else _iso(ms) for name, ms in instants.items()},
        "age": (now - row.since) / 1000 if row.since is not None and row.state is _RUNNING else None,
        "timeout": None if timeout is None else timeout / 1000,
    }


def _status_row(row: Row, timeout: int | None, now: int) -> tuple[str, str, str]:
    """When, how far, and which run."""
    name = row.id if row.id.startswith(row.job) else f"{row.job} {row.id}"
    why = f"{name}: {(row.error or _Stop.CRASH).partition(chr(10))[0]}"
    if row.finished is not None:
        return f"{_words(now - row.finished, True)} ago", f"at attempt {row.attempt}", why
    if row.state is _RUNNING:
        since = row.since or now
        part = f"{(now - since) * 100 // timeout}% of {_words(timeout)}" if timeout else "no timeout"
        place = f"attempt {row.attempt} on {(row.owner or '?').rpartition(':')[0]}"  # host and process
        return _words(now - since, True), part, f"{name}, {place} since {_iso(since // 1000 * 1000)}"
    detail = f"after attempt {row.attempt}" if row.attempt else _iso(row.due // 1000 * 1000)
    return _relative(row.due - now), detail, why if row.attempt else name


@asynccontextmanager
async def _client(registry: Registry, url: str, new: bool = False) -> AsyncGenerator[_Shared, None]:
    """An instance that runs nothing; whoever waits for an answer is told when there won't be any."""
    _log.setLevel(logging.ERROR)  # advice about the lease is for those who run jobs
    store = _store_of(url)
    if isinstance(store, SQLiteStore) and not (new or os.access(store.path, os.F_OK)):
        raise StoreError(f"{store!r}: no such file in {os.getcwd()}; the first run() or submit makes it")
    try:
        async with asyncio.timeout(_PATIENCE) as limit, registry.running(store=store, jobs=[]):
            limit.reschedule(None)
            yield cast(_Shared, registry._engine)
    except TimeoutError:
        raise StoreError(f"store {url} unreachable: no answer in {_PATIENCE:g} s; it may be down, or locked") from None


async def _submit_command(options: Any) -> None:
    """Submit one run of a job, to whoever runs it with the same store; print its id, or with --wait its result."""
    import difflib

    registry = _load(options.targets)
    job = registry.jobs.get(options.job)
    if job is None:
        close = difflib.get_close_matches(str(options.job), registry.jobs) or [*registry.jobs]
        raise BgjobError(f"job {options.job!r}: no such job; there is {' or '.join(close)}")
    try:
        payload = _payload(job.name, job._spec.plan, *options.args)
    except (TypeError, ValueError) as error:
        raise BgjobError(str(error)) from None
    async with _client(registry, options.store, new=True) as engine:
        run = await engine.submit(job, payload, options.after, None, None)
        try:
            print(_dumps(await run.result()) if options.wait else run.id)
        except (asyncio.CancelledError, StoreError):
            _complain(f"run {run.id} goes on; to end it: bgjob cancel {run.id}")
            raise


async def _cancel_command(options: Any) -> int:
    """Cancel a run, waiting or running, and say what became of it."""
    async with _client(registry := Registry(), options.store):
        run = await registry.find(options.run)
        if run is None:
            raise BgjobError(f"run {options.run!r}: the store knows no such run; bgjob status shows ids")
        if not await run.cancel() and run.state is not _CANCELLED:
            raise BgjobError(f"run {run.id!r} has {run.state} already; there is nothing to cancel")
        with suppress(RunFailed, RunCancelled, TimeoutError):
            await run.result(_PATIENCE)
    ended = run.reason if run.state is _CANCELLED else run.state
    print(run.id, "is told to stop, and still runs" if run.state in (_SCHEDULED, _RUNNING) else ended)
    return int(run.state in (_SUCCEEDED, _FAILED, _SKIPPED))


def _run_command(options: Any) -> int:
    """Run jobs until Ctrl-C or SIGTERM, then wait for those going; a second Ctrl-C cancels them."""
    registry = _load(options.targets)
    names = options.jobs and options.jobs.split(",")
    handler = logging.StreamHandler()
    handler.setFormatter(_LogFormat())
    logging.basicConfig(level=logging.INFO, handlers=[handler])  # nothing, where the target has set its log up
    with asyncio.Runner() as runner:
        status = runner.run(_run(registry, options.store, names, options.drain / 1000))
        # asyncio waits for ever for a task that swallows every cancellation, and for the threads of its executor.
        timer = threading.Timer(2, _leave, [status])
        timer.daemon = True
        timer.start()
    timer.cancel()
    return status


async def _run(registry: Registry, store: str | None, names: Sequence[str] | None, drain: float) -> int:
    """Run until a signal; the exit status."""
    signals: list[None] = []

    def stop() -> None:
        signals.append(None)
        if registry._engine is not None:
            registry._engine.stop()

    with _signals(stop):
        await registry.run(store=store, jobs=names, drain=drain)
    return 130 if len(signals) > 1 else 0


def _leave(status: int) -> None:
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)


def _load(targets: Sequence[str]) -> Registry:
    """The default registry, or where that has no jobs the one that a target holds in a variable."""
    modules = [_import(target) for target in targets]
    held = [value for module in modules for value in vars(module).values() if issubclass(type(value), Registry)]
    found: list[Registry] = [registry for registry in dict.fromkeys([default, *held]) if registry.jobs]
    if len(found) == 1:
        return found[0]
    where = ", ".join(getattr(module, "__file__", None) or module.__name__ for module in modules)
    if found:
        raise BgjobError(f"{where}: {len(found)} registries have jobs there; write a module for each")
    raise BgjobError(f"{where}: no jobs of {__file__} there; decorate functions with its @job")


def _import(target: str) -> ModuleType:
    name = _module_of(target) if os.path.isfile(target) else target.lstrip(f".{os.sep}")
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            raise BgjobError(
                f"{target}: not found in {os.getcwd()}; write a module (app.jobs) or a path (jobs.py)"
            ) from None
        _print_traceback(error)
        hint = "; put what it runs under if __name__ == '__main__':" if isinstance(error, SystemExit) else ""
        raise BgjobError(f"{target}: its import failed: {_summary(error)}{hint}") from None


def _module_of(path: str) -> str:
    """The name under which a file is imported: from the folder above its packages, as Python would find it."""
    folder, name = os.path.split(os.path.abspath(path).removesuffix(".py"))
    while os.path.isfile(os.path.join(folder, "__init__.py")):
        folder, package = os.path.split(folder)
        name = f"{package}.{name}"
    sys.path.insert(0, folder)
    return name


def _print_traceback(error: BaseException) -> None:
    """The traceback of somebody else's error, without our own lines in it."""
    ours = (_load.__code__.co_filename, importlib.__file__)
    shown = traceback.TracebackException.from_exception(error)
    theirs = [line for line in shown.stack if line.filename not in ours and "<frozen " not in line.filename]
    shown.stack = traceback.StackSummary.from_list(theirs)
    print("".join(shown.format()), end="", file=sys.stderr)


def _milliseconds(text: str) -> int:
    import argparse

    try:
        return _duration("", float(text) if re.fullmatch(r"[\d.]+", text) else text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration; write 90, 30s or 1h30m") from None


def _given(text: str) -> tuple[tuple[object, ...], Mapping[str, object]]:
    """Arguments in order, or by name."""
    import argparse

    with suppress(ValueError, RecursionError):
        value = _loads(text)
        if isinstance(value, (dict, list)):
            given = cast("dict[str, object] | list[object]", value)
            return ((), given) if isinstance(given, dict) else (tuple(given), {})
    raise argparse.ArgumentTypeError("""no JSON object or array; write '{"to": "a@b.c"}' or '["a@b.c"]'""")


_ARGUMENTS: Mapping[str, tuple[str | None, Callable[[str], object], object, str]] = {
    "targets": ("TARGET", str, None, "a module (app.jobs) or a path (jobs.py)"),
    "job": ("JOB", str, None, "the name of a job"),
    "run": ("RUN", str, None, "the id of a run, as submit and status print it"),
    "--store": ("URL", str, None, "sqlite:///jobs.db, redis://..., postgresql://..."),
    "--jobs": ("a,b", str, None, "names of the jobs to run (all)"),
    "--drain": ("20s", _milliseconds, "20s", "at the end, how long to wait for runs that are going (20s)"),
    "-n": ("5", int, 5, "how many ticks of each job (5)"),
    "--args": ("JSON", _given, "[]", """'{"to": "a@b.c"}' by name, or '["a@b.c"]' in order"""),
    "--after": ("5m", _milliseconds, 0, "run it that long from now (at once)"),
    "--wait": (None, bool, False, "wait for its end; print its result as JSON, and exit by it"),
    "--json": (None, bool, False, "one object: running, due, retrying, failed"),
}


def _parser() -> argparse.ArgumentParser:
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            _complain(f"{message}; see {self.prog} --help")
            sys.exit(2)

    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser("bgjob", description="Background jobs for asyncio services.", epilog=_NOTES, formatter_class=layout)
    parser.add_argument("--version", action="version", version=f"bgjob {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, function, takes in (
        ("run", _run_command, "targets --store --jobs --drain"),
        ("list", _list_command, "targets -n"),
        ("submit", _submit_command, "targets job --args --after --wait --store"),
        ("status", _status_command, "--store --json"),
        ("cancel", _cancel_command, "run --store"),
    ):
        command = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        command.set_defaults(function=function)
        for argument in takes.split():
            metavar, kind, default, text = _ARGUMENTS[argument]
            settings: dict[str, Any] = {"metavar": metavar, "type": kind} if metavar else {"action": "store_true"}
            if argument == "targets":
                settings["nargs"] = 1 if name == "submit" else "+"
            if argument == "--store":
                settings["required"] = name != "run"
            command.add_argument(argument, default=default, help=text, **settings)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line, see `bgjob --help`: returns the exit status; wrong usage and `--help` raise `SystemExit`."""
    sys.path.insert(0, os.getcwd())
    if reconfigure := getattr(sys.stdout, "reconfigure", None):
        reconfigure(encoding="utf-8", errors="backslashreplace")  # pipes of Windows have no block characters
    try:
        try:
            options = _parser().parse_args(arguments)
            done = options.function(options)
            return (asyncio.run(done) if inspect.iscoroutine(done) else done) or 0
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough; what is left may not fail again when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130
    except BgjobError as error:
        _complain(str(error))
        return 1


if __name__ == "__main__":
    # This file is loaded as `__main__` now; the targets import it by its name, and theirs is the registry to use.
    sys.exit(importlib.import_module(__spec__.name if __spec__ else "bgjob").main())
