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
    11 Registry      `Registry` and the default one, whose bound methods are `job`, `run`, `running`, `simulate`

Durations are everywhere the same: seconds (int or float), a `timedelta`, or text such as "30s",
"1h30m", "250ms", "2d". Ticks, the scheduled instants of a job, are whole milliseconds in UTC.
"""

# pyright: reportPrivateUsage=false
# One file is one unit: its rooms see each other's underscores, its users don't.

# 0 Door ---------------------------------------------------------------------------------------------------------------
# Nothing below starts a thread, a loop or a handler at import; croniter, zoneinfo and json wait until they are used.

from __future__ import annotations

import asyncio
import copy
import difflib
import functools
import heapq
import importlib
import inspect
import itertools
import logging
import math
import os
import re
import selectors
import signal
import threading
import time
from bisect import bisect_left
from collections import OrderedDict, deque
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
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar, copy_context
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from enum import StrEnum
from types import FrameType, MappingProxyType
from typing import TYPE_CHECKING, Generic, Literal, NamedTuple, Protocol, TypeAlias, cast, overload
from zlib import crc32

if TYPE_CHECKING:
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
    "Registry",
    "Run",
    "RunCancelled",
    "RunFailed",
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
        ms = value * 1000
    else:
        ms = math.nan
    if math.isnan(ms):
        raise ScheduleError(
            f"{what}={value!r}: not a duration; write seconds (90), a timedelta, or text such as '30s' or '1h30m'"
        )
    if not -0.5 < ms <= _CENTURY or round(ms) < least:
        bounds = "more than 100 years" if ms > 0 and ms > _CENTURY else "too short" if ms >= 0 else "negative"
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


_DAY_MS = 86_400_000
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
        _reading(0, tz)  # the error of an unfinished tzinfo shows here, not as a schedule that never matches
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
        self.text = text
        self.zone = zone
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
        fall = start + timedelta(days=1) - _reading(after + _DAY_MS, self.zone)
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
        self.every = every
        self.start = start

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
    if callable(value):
        function = value
        return lambda retry, text: _duration("retry_delay", function(retry))
    first, dots, last = value.partition("..") if isinstance(value, str) else (value, "", "")
    if not dots:
        fixed = _duration("retry_delay", value)
        return lambda retry, text: fixed
    low, high = _duration("retry_delay", first, 1), _duration("retry_delay", last, 1)
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


class _Owner(Protocol):
    """What a run asks of the engine that it belongs to."""

    async def cancel(self, run: Run) -> bool: ...
    async def ended(self, run: Run, timeout: float | None) -> None: ...


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

    __slots__ = (
        "__weakref__",
        "_at",
        "_exception",
        "_id",
        "_owner",
        "_started",
        "_took",
        "_value",
        "args",
        "attempt",
        "error",
        "job",
        "key",
        "kwargs",
        "reason",
        "state",
    )
    key: str | None
    error: str | None
    reason: str | None
    _id: str | None
    _started: float | None  # wall seconds
    _took: float | None  # s, by the monotonic clock
    _value: object
    _exception: BaseException | None

    def __init__(self, job: str, at: int, kwargs: Mapping[str, object], owner: _Owner) -> None:
        self.job = job
        self.args: tuple[object, ...] = ()
        self.kwargs = kwargs
        self.attempt = 0
        self.state: State = _SCHEDULED
        self.key = self.error = self.reason = None
        self._id = self._started = self._took = self._value = self._exception = None
        self._at = at
        self._owner = owner

    @property
    def id(self) -> str:
        """The run's name, the same at every attempt and on every instance: an idempotency key.

        `job@2026-01-01T00:00:00Z` for a tick, `job#key` for a keyed run, else text that sorts by submission.
        """
        if self._id is None:
            self._id = f"{self.job}@{_iso(self._at)}"
        return self._id

    @property
    def token(self) -> int:
        """Fencing token: grows with every attempt that is started. In one process it is the attempt's number."""
        return self.attempt

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
        """
        limit = None if timeout is None else _duration("timeout", timeout) / 1000
        await self._owner.ended(self, limit)
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
    """The error as one line; an exception whose `__str__` raises must not take the engine along."""
    try:
        first = str(error).partition("\n")[0]
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

    __slots__ = ("factory", "scope")

    def __init__(self, factory: Factory, scope: Scope) -> None:
        self.factory = factory
        self.scope: Scope = scope

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
            clean-up. Its own parameters may be dependencies. It runs in the event loop, a plain one too.
        scope: "run" (the default): made once per attempt, and cleaned up after it in reverse order, whatever the
            outcome. "app": made when `run()` starts and cleaned up after the last run; it can't need a "run" one.

    Raises:
        ScheduleError: `factory` can't be called, or `scope` is unknown.
    """
    if not callable(factory):
        raise ScheduleError(f"Depends({factory!r}): not callable; pass the factory itself, without calling it")
    if scope not in ("run", "app"):
        raise ScheduleError(f"Depends({_name_of(factory)}, scope={scope!r}): write 'run' or 'app'")
    return _Dependency(factory, scope)


def _name_of(function: object) -> str:
    return str(getattr(function, "__name__", None) or repr(function))


def _is_async(function: Factory) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


class _Plan:
    """What a signature says of a function or factory; read once, for inspect is slow."""

    __slots__ = ("accepted", "any_name", "direct", "function", "is_async", "needs", "required", "signature")

    def __init__(self, function: Factory) -> None:
        self.function = cast(Callable[..., Awaitable[object]], function)
        self.is_async = _is_async(function)
        self.signature = _signature(function)
        parameters = self.signature.parameters.values()
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        self.any_name = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.accepted = frozenset(p.name for p in named if p.kind is not p.POSITIONAL_ONLY)
        self.required = frozenset(p.name for p in named if p.default is p.empty)
        self.needs = {p.name: p.default for p in named if isinstance(p.default, _Dependency)}
        self.direct = self.is_async and not self.needs  # called without a detour


def _signature(function: Factory) -> inspect.Signature:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # some built-ins have none
        raise ScheduleError(f"{function!r}: its parameters can't be read; wrap it in a function of your own") from None


def _check_needs(plan: _Plan, scope: Scope | None = None, path: tuple[Factory, ...] = ()) -> None:
    """Refuse now what could only fail later: a circle, an unfilled parameter, an "app" that needs a "run"."""
    for need in plan.needs.values():
        factory, chain = need.factory, " -> ".join(_name_of(f) for f in (*path, need.factory))
        if factory in path:
            raise ScheduleError(f"Depends: {chain} is a circle; break it")
        if scope == "app" and need.scope == "run":
            raise ScheduleError(f"Depends: {chain}: an 'app' dependency can't need a 'run' one; give both one scope")
        inner = _Plan(factory)
        if inner.required:
            unfilled = ", ".join(sorted(inner.required))
            raise ScheduleError(
                f"Depends: {chain}: nothing fills its parameter {unfilled}; give it a default or Depends"
            )
        _check_needs(inner, need.scope, (*path, factory))


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
            self._made[factory] = await self._make(factory)
        return self._made[factory]

    async def _make(self, factory: Factory) -> object:
        arguments = await self.fill(_Plan(factory).needs)
        if inspect.isasyncgenfunction(factory):
            return await self._stack.enter_async_context(asynccontextmanager(factory)(**arguments))
        if inspect.isgeneratorfunction(factory):
            return self._stack.enter_context(contextmanager(factory)(**arguments))
        made = factory(**arguments)
        return await made if inspect.isawaitable(made) else made


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
_LAST = 253_402_000_000_000  # ms: some days before the year 10000, where datetimes end in every zone
_BACKOFF = functools.partial(_doubling, 1000, 300_000)  # "1s..5m"


class _Settings(NamedTuple):
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
        "plan",
        "retries",
        "retryable",
        "schedule",
        "timeout",
    )

    def __init__(self, name: str, plan: _Plan, s: _Settings) -> None:
        self.name = name
        self.plan = plan
        self.schedule, self.after = _when(s)
        scheduled = self.schedule is not None or self.after is not None
        self.args = _scheduled_args(plan, s.args, scheduled)
        self.immediate = _flag("immediate", s.immediate)
        self.jitter = _duration("jitter", s.jitter) if s.jitter else 0
        self.parallelism = (1 if scheduled else 10) if s.parallelism is None else _int("parallelism", s.parallelism, 1)
        self.overlap = _choice("overlap", s.overlap, ("skip", "queue", "all"))
        self.expires = None if s.expires is None else _duration("expires", s.expires, 1)
        self.timeout = None if s.timeout is None else _duration("timeout", s.timeout, 1)
        self.retries = _int("retries", s.retries, 0)
        self.delay = _BACKOFF if s.retry_delay == "1s..5m" else _retry_delay(s.retry_delay)
        self.retryable = _retryable(s.retry_on)
        self.on_error = s.on_error
        self.on_crash = _choice("on_crash", s.on_crash, ("rerun", "drop"))
        if s.on_error is not None and not callable(s.on_error):
            raise ScheduleError(f"on_error={s.on_error!r}: not callable; pass a function of (run, exception)")
        if not scheduled:
            _refuse_unscheduled(s)
        elif self.schedule is None and (s.immediate or s.overlap != "skip"):
            raise ScheduleError(f"after={s.after!r} runs once: immediate and overlap say nothing here; leave them out")


def _when(s: _Settings) -> tuple[_Every | _Cron | None, int | None]:
    """The schedule of `every` or `cron`, or the ms of `after`."""
    if s[:3].count(None) < 2:
        written = [f"{what}={value!r}" for what, value in zip(s._fields[:3], s[:3], strict=True) if value is not None]
        raise ScheduleError(f"{' and '.join(written)}: a job has one schedule; stack a second @job with its own name")
    if s.tz is not None and s.cron is None:
        raise ScheduleError(f"tz={s.tz!r}: only cron has a zone; leave it out, or write cron=")
    if s.cron is not None:
        return _Cron(s.cron, _zone("UTC" if s.tz is None else s.tz)), None
    if s.every is not None:
        return _interval(_duration("every", s.every, 1)), None
    return None, None if s.after is None else _duration("after", s.after)


def _refuse_unscheduled(s: _Settings) -> None:
    for what, given in (
        ("args", s.args is not None),
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
    unknown = [] if plan.any_name else [name for name in args if name not in plan.accepted]
    if unknown:
        known = ", ".join(sorted(plan.accepted)) or "none"
        raise ScheduleError(f"args: unknown parameter {', '.join(map(repr, unknown))}; the function's are: {known}")
    missing = plan.required.difference(args) if scheduled else ()
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
    if isinstance(retry_on, (tuple, type)) or not callable(retry_on):
        raise ScheduleError(f"retry_on={retry_on!r}: write an exception class, a tuple of them, or a predicate")
    return retry_on


def _check_function(function: object) -> None:
    """Refuse what can't be run as a job, and say what can."""
    remedy = "decorate an async function or a plain one"
    if isinstance(function, type):
        raise ScheduleError(f"{function!r} is a class; {remedy}")
    if inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
        raise ScheduleError(f"{_name_of(function)!r} is a generator: nothing would iterate over it; {remedy}")
    if not callable(function):
        raise ScheduleError(f"{function!r} can't be called; {remedy}")


def _job_name(function: object, name: object) -> str:
    """The job's identity; '@' and '#' separate it from tick and key in the ids of its runs."""
    if name is None:
        name = getattr(function, "__name__", None)
        if name is None or name == "<lambda>":
            raise ScheduleError(f"{function!r} has no name of its own; write @job(name='…')")
    if not isinstance(name, str) or not name.strip() or not name.isprintable() or "@" in name or "#" in name:
        raise ScheduleError(f"name={name!r}: write printable text without '@' and '#'")
    return name


def _place(function: object) -> str:
    """Where a function stands, as file:line."""
    code = getattr(inspect.unwrap(cast(Factory, function)), "__code__", None)
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

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> C_co:
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

    async def submit(self, *args: P.args, **kwargs: P.kwargs) -> Run[R_co]:
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
                the run is unfinished and for a day after it succeeded or failed; it is free at once when cancelled.
        """
        return Later(self, _duration("after", delay), None, key)

    def at(self, when: datetime, *, key: str | None = None) -> Later[P, R_co]:
        """`await job.at(datetime(…)).submit(…)`: run it at an aware datetime; one in the past is at once.

        Args:
            when: an aware datetime.
            key: as for `after`.
        """
        return Later(self, 0, _to_ms("at", when), key)

    async def cancel(self) -> int:
        """Cancel every scheduled and running run of this job; how many. Its next tick still fires."""
        return await self._registry._cancel(cast(Job, self))

    def next_ticks(self, n: int = 5, start: datetime | None = None) -> list[datetime]:
        """The next `n` ticks, aware and in the job's zone; `[]` without `every` or `cron`.

        Args:
            n: how many; fewer come back where the schedule ends.
            start: an aware datetime that they come after; None (the default) is now. An interval's ticks
                are shown on the grid of the Unix epoch, as with a shared store.
        """
        schedule = self._spec.schedule
        after = _wall_ms() if start is None else _to_ms("start", start)
        if schedule is None or not _int("n", n, 0):
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

    async def submit(self, *args: P.args, **kwargs: P.kwargs) -> Run[R_co]:
        """Submit the run; as `Job.submit`."""
        job = cast(Job, self._job)
        payload = _payload(job.name, job._spec.plan, args, kwargs)
        run = await job._registry._submit(job, payload, self._delay, self._at, self._key)
        return cast("Run[R_co]", run)


def _payload(job: str, plan: _Plan, args: tuple[object, ...], kwargs: Mapping[str, object]) -> str:
    """The arguments as JSON, checked against the signature; the one that can't be JSON is named."""
    try:
        bound = plan.signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise TypeError(f"job {job!r}: {error}") from None
    try:
        text = _dumps([args, kwargs]) if args or kwargs else ""
    except (TypeError, ValueError, RecursionError):
        for name, value in bound.items():
            _refuse_unless_json(job, name, value)
        raise
    if len(text) > _MAX_ARGS:
        raise ValueError(
            f"job {job!r}: the arguments are {len(text):,} bytes of JSON, the limit is 1 MiB; pass a reference"
        )
    return text


def _refuse_unless_json(job: str, name: str, value: object) -> None:
    try:
        _dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(
            f"job {job!r}: argument {name}={value!r:.200} isn't JSON ({error}); pass plain values"
        ) from None


def _dumps(value: object) -> str:
    import json

    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _arguments(payload: str) -> tuple[tuple[object, ...], Mapping[str, object]]:
    if not payload:
        return (), _NO_ARGS
    import json

    args, kwargs = json.loads(payload)
    return tuple(args), kwargs


# 8 Store --------------------------------------------------------------------------------------------------------------
# What the engine needs of a store that several processes share. Instants and durations are whole milliseconds, `now` is
# the store's clock. Every verb is atomic, takes many at once, and is safe to repeat when a reply was lost.


class Claimed(NamedTuple):
    """A run as its new owner gets it; `args` is the JSON that was pushed, "" for a tick."""

    id: str
    job: str
    at: int
    args: str
    tries: int
    lost: int
    token: int
    cancel: bool


class Store(Protocol):
    """The verbs of a shared store. Losing a tick or a fenced write is a normal answer, not an error.

    A store that can't be reached raises `StoreError`.
    """

    async def enlist(self, jobs: Mapping[str, tuple[str, int | None]]) -> tuple[int, Mapping[str, int]]:
        """`{job: (schedule's text, tick before now where immediate)} -> now, {job: last tick handed out}`."""
        ...

    async def tick(
        self, ticks: Sequence[tuple[str, int, int, int]]
    ) -> Sequence[Literal["won", "skipped", "lost", "early"]]:
        """`[(job, at, delay, limit of unfinished ticks)]`: hand each out to one instance, once."""
        ...

    async def push(self, calls: Sequence[tuple[str, str, int, str]]) -> Sequence[bool]:
        """`[(id, job, delay, args)]`: durable calls; False where the id is taken."""
        ...

    async def claim(
        self, owner: str, free: Mapping[str, int], lease: int
    ) -> tuple[Sequence[Claimed], int | None, Sequence[str]]:
        """Due runs of these jobs for this owner, when the next is due, and the ids of its runs to cancel."""
        ...

    async def beat(self, runs: Sequence[tuple[str, int]], lease: int) -> Mapping[str, bool]:
        """`[(id, token)] -> {id: cancel}`: extend the leases; an id that is missing is lost."""
        ...

    async def settle(self, outcomes: Sequence[tuple[str, int, State, int, str]]) -> Sequence[bool]:
        """`[(id, token, state, delay where scheduled again, result as JSON or error)]`; False where fenced off."""
        ...

    async def cancel(self, id: str) -> Literal["removed", "signalled", "gone"]:
        """Finish a waiting run as cancelled, or flag a running one for its owner."""
        ...

    async def wait(self, timeout: int) -> None:
        """Return early when something may be due, cancelled or finished; a hint."""
        ...


# 9 Engine -------------------------------------------------------------------------------------------------------------
# One object per `run()`: wait, admit, execute, settle, drain. No cron and no SQL in it. One timer serves all that is
# due; whatever becomes ready starts from that timer's callback, hence in the context in which `run()` was called.

_BATCH = 100  # entries admitted between two turns of the loop: more would leave the cache, and others would wait
_GRACE = 5.0  # s for what was cancelled at the end of a drain
_HOOK_LIMIT = 30_000  # ms for on_error where the job has no timeout
_COUNTED = 1000  # missed ticks of a cron are counted up to here; those of an interval cost nothing to count
_LATE = 1000  # ms after which the start of a tick is worth a warning
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

    Only what ended well in spite of a shutdown has ended well.
    """
    if stop is _Stop.TIMEOUT:
        late = TimeoutError(f"no end within {_span(timeout or 0)}")
        late.__cause__ = error  # its traceback shows where the function hung
        return _Outcome(_FAILED, late)
    if stop is None or (stop is _Stop.SHUTDOWN and error is None):
        return _SUCCESS if error is None else _Outcome(_FAILED, error)
    return _Outcome(_CANCELLED, None, stop)


_NO_TICKS: Iterator[int] = iter(())


class _Lane:
    """One job in one engine: its ticks, its slots, and who waits for one."""

    __slots__ = ("busy", "limit", "parked", "seq", "skipped", "spec", "ticks", "unfinished", "waiting")

    def __init__(self, spec: _Spec, seq: int) -> None:
        self.spec = spec
        self.seq = seq
        self.ticks: Iterator[int] | int = _NO_TICKS  # those after the one in the heap; the ms between them if even
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
            self.ticks = spec.schedule.every
        elif spec.schedule is not None:
            self.ticks = spec.schedule.ticks(now)
        elif spec.after is not None:
            self.ticks = iter((now + spec.after,))
        return now if spec.immediate else self.following(now)

    def following(self, tick: int) -> int | None:
        ticks = self.ticks
        return tick + ticks if isinstance(ticks, int) else next(ticks, None)

    def grid(self, tick: int) -> _Every | _Cron:
        schedule = self.spec.schedule
        return schedule if isinstance(schedule, _Cron) else _Every(cast(_Every, schedule).every, tick)

    def catch_up(self, due: int, now: int) -> int:
        """The newest tick up to now: computed, for a gap of a week costs no more than one of a minute."""
        grid = self.grid(due)
        newest = _newest(grid, due, now) or due
        if isinstance(grid, _Cron):
            self.ticks = grid.ticks(newest)
        if not _log.isEnabledFor(logging.WARNING):
            return newest
        count = _count(grid, due, newest, _COUNTED)
        _log.warning(
            "job %r: %s ticks came due together, %s to %s: only the newest runs",
            self.spec.name, count if count != _COUNTED else f"{count} or more", _iso(due), _iso(newest),
        )  # fmt: skip
        return newest


class _Live(Run[object]):
    """A run of this process: what the engine has to know of it beside its facts."""

    __slots__ = ("call", "done", "elapsed", "lane", "stop", "task")
    task: asyncio.Task[None] | None
    stop: _Stop | None
    done: asyncio.Event | None

    def __init__(self, lane: _Lane, at: int, kwargs: Mapping[str, object], owner: _Owner) -> None:
        super().__init__(lane.spec.name, at, kwargs, owner)
        self.lane = lane
        self.call = False  # submitted, not a tick
        self.elapsed = True  # its due time is a delay, so it moves along when the clock is set back; False for `at`
        self.task = self.stop = self.done = None


class _Past:
    """What memory remembers of ended runs, so that `find()` and keys work: bounded, and without tracebacks."""

    def __init__(self) -> None:
        self._recent: OrderedDict[str, _Live] = OrderedDict()
        self._keyed: dict[str, _Live] = {}
        self._keys: deque[tuple[int, str]] = deque()

    def add(self, run: _Live, now: int) -> None:
        if run.key is not None and run.state is not _CANCELLED:
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
        self._mono, self._wall = clock.mono, clock.wall
        self._offset = clock.wall() - clock.mono()
        self._now = round(clock.wall() * 1000)
        self._thread = threading.get_ident()
        self._context = copy_context()
        self._app = _AppScope(registry.overrides)
        self._seq = itertools.count()
        self._lanes: dict[str, _Lane] = {}
        self._heap: list[tuple[int, int, _Lane | _Live]] = []
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
        self._closing = self._closed = False

    # Open and close

    async def open(self) -> None:
        """Start: "app" dependencies first, then the schedules. On an error nothing is left behind."""
        registry = self._registry
        if registry._engine is not None:
            raise BgjobError("these jobs run already: one run() or running() per registry at a time")
        jobs = [job for job in registry.jobs.values() if self._names is None or job.name in self._names]
        unknown = (self._names or frozenset()) - registry.jobs.keys()
        if unknown:
            known = ", ".join(registry.jobs) or "none"
            raise BgjobError(f"jobs={sorted(unknown)}: no such job; the registered ones are: {known}")
        registry._engine = self
        try:
            for need in _app_needs(job._spec.plan for job in jobs):
                await self._app.get(need)
        except BaseException:
            registry._engine = None
            await self._app.close(_GRACE)
            raise
        self._read_clocks()
        for job in jobs:
            self._enter(job)
        heapq.heapify(self._heap)
        _log.info("bgjob %s runs %d jobs", __version__, len(self._lanes))
        self._arm()

    def _enter(self, job: Job) -> None:
        lane = _Lane(job._spec, next(self._seq))
        self._lanes[job.name] = lane
        first = lane.begin(self._now)
        if first is not None:
            self._heap.append((first, lane.seq, lane))

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
        self._enter(job)
        heapq.heapify(self._heap)
        self._arm()

    def _unregister(self, job: Job) -> None:
        lane = self._lanes.pop(job.name, None)
        if lane is not None:
            self._retire(lane)
            for run in self._scheduled(lane):
                self._drop(run, _Stop.REMOVED)

    def _retire(self, lane: _Lane) -> None:
        """End a schedule; the runs it has begun are left alone."""
        lane.ticks, lane.parked = _NO_TICKS, None
        self._heap = [entry for entry in self._heap if entry[2] is not lane]
        heapq.heapify(self._heap)

    def stop(self) -> None:
        """A signal: the first one begins the drain, the second ends its wait."""
        if self.stopping.is_set():
            self._wake_close()
        self.stopping.set()

    async def close(self) -> None:
        """Drain, and leave nothing behind. A cancel that comes meanwhile ends the wait, and is raised at the end."""
        self._closing = True
        self.loop.call_soon(self._check_entered)
        self._armed = -math.inf  # no timer is early enough any more
        if self._timer is not None:
            self._timer.cancel()
        cancelled: asyncio.CancelledError | None = None
        for stage in (self._wait_for_runs, self._cut_runs, self._close_app):
            try:
                await stage()
            except asyncio.CancelledError as error:
                cancelled = error
        self._abandon_runs()
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

    def _abandon_runs(self) -> None:
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
        read_mono, read_wall = self._mono, self._wall
        wall = read_wall()
        offset = wall - read_mono()
        step = offset - self._offset
        self._offset = offset
        self._now = int(wall * 1000)
        if abs(step) > _JUMP:
            self._jumped(round(step * 1000))

    def _jumped(self, step: int) -> None:
        """The clock was set, or the machine slept. Forward is elapsed time: what it skipped is caught up like any gap.

        Back: delays and intervals move along, so none freezes. Cron follows Debian's: a wild schedule goes on by the
        new time; a fixed one waits until its last tick has passed again, unless the step is of more than three hours.
        """
        _log.warning("the clock went %s by %s", "forward" if step > 0 else "back", _span(abs(step)))
        if step > 0:
            return
        old, self._heap = self._heap, []
        for due, seq, item in old:
            moved = self._moved(item, due, step)
            if moved is not None:
                self._heap.append((moved, seq, item))
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
            when = min(self._heap[0][0], self._now + self._clock.slice) / 1000 - self._offset
        else:
            return
        if when < self._armed:
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
        for admitted in range(_BATCH):
            if not heap:
                break
            due, seq, item = heap[0]
            if due > now:
                if admitted or due > now + _EARLY:
                    break
                now = self._now = due
            if isinstance(item, _Live):
                heapq.heappop(heap)
                self._ready(item)
                continue
            if item.unfinished >= item.limit and item.spec.overlap == "all":
                heapq.heappop(heap)
                item.parked = due
                continue
            following = item.following(due)
            if following is not None and following <= now and item.spec.overlap != "all":
                due = item.catch_up(due, now)
                following = item.following(due)
            if following is None:
                heapq.heappop(heap)
            else:
                heapq.heapreplace(heap, (following, seq, item))
            self._tick(item, due, following)

    def _tick(self, lane: _Lane, at: int, following: int | None) -> None:
        """Hand out a tick, or skip it where its job has as many unfinished ones as it may."""
        spec = lane.spec
        run = _Live(lane, at, spec.args, self)
        if lane.unfinished >= lane.limit:
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
            _log.warning("%s skipped: %d earlier ticks of the job are unfinished", run, lane.unfinished)
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
        late = self._now - run._at
        if spec.expires is not None and not run.attempt and late > spec.expires:
            self._end(run, _SKIPPED, f"expired: {_span(late)} late, expires={_span(spec.expires)}")
            return
        if late > _LATE and late > _LATE + spec.jitter and not run.call and not run.attempt:
            _log.warning("%s starts %s late", run, _span(late))
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
        if run.done is not None:
            self.loop.call_soon(self._check_entered)
        if run.stop is not None and run.state is _RUNNING:
            # An eager task factory ran the first steps inside create_task, and they cancelled this very run when it
            # had no task yet.
            run.task.cancel()

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
                self._finish(run, _Outcome(_FAILED, asyncio.CancelledError("cancelled before its first step")))
            else:
                self._entering += 1

    async def _attempt(self, run: _Live, spec: _Spec) -> None:
        """One attempt, from its first step to its settlement."""
        self._entering -= 1
        _current.set(run)
        error: BaseException | None = None
        timer = None
        clock = self._mono
        begun = clock()
        try:
            if run.stop is None:  # else cancelled between create_task and this first step
                run.state, run._started, run._took = _RUNNING, begun + self._offset, None
                if self._on_event is not None:
                    self._emit(run)
                if spec.timeout is not None:
                    timer = self.loop.call_later(spec.timeout / 1000, self._interrupt, run, _Stop.TIMEOUT)
                plan = spec.plan
                run._value = await (plan.function(*run.args, **run.kwargs) if plan.direct else self._call(run, spec))
        except (KeyboardInterrupt, GeneratorExit):
            # Ctrl-C where nobody turned it into a cancellation, or a loop that was closed with us inside: no failure
            # of the job, and not ours to swallow.
            self._finish(run, _Outcome(_CANCELLED, None, _Stop.SHUTDOWN))
            raise
        except BaseException as raised:
            error = raised
        if timer is not None:
            timer.cancel()
        run._took = clock() - begun
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
        failure: BaseException
        given = spec.plan.signature.bind_partial(*run.args, **run.kwargs).arguments
        async with AsyncExitStack() as stack:
            try:
                made = await _Resolver(stack, self._registry.overrides, self._app.get).fill(spec.plan.needs, given)
                kwargs = {**run.kwargs, **made}
                if spec.plan.is_async:
                    return await spec.plan.function(*run.args, **kwargs)
                return await self._call_plain(run, spec, kwargs)
            except BaseException as error:
                failure = error
                raise
        raise failure  # a factory swallowed what was raised at its yield; the attempt has failed all the same

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
            if not future.done():
                future.set_result(ended)

        def work() -> None:
            try:
                ended = functools.partial(_identity, context.run(call))
            except BaseException as error:
                ended = functools.partial(_raise, error)
            with suppress(RuntimeError):  # the loop was closed long ago: the drain named this thread when it gave it up
                self.loop.call_soon_threadsafe(deliver, ended)

        threading.Thread(target=work, name=f"bgjob {name}", daemon=True).start()
        return future

    async def _after_failure(self, run: _Live, failed: _Outcome) -> _Outcome:
        """Another try, or the last word: `on_error`, in the attempt's own task and slot."""
        spec, error = run.lane.spec, cast(BaseException, failed.error)
        run.error, run._exception = _summary(error), error
        try:
            if _verdict(run.attempt, 0, spec.retries, spec.on_crash) == "run" and spec.retryable(error):
                return _Outcome(_SCHEDULED, error, delay=spec.delay(run.attempt, f"{run.id} {run.attempt}"))
        except Exception as bug:
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
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as bug:
            _log.error("%s: on_error failed: %s", run, _summary(bug), exc_info=bug)

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
            self._end(run, outcome.state, outcome.reason)
        if lane.waiting:
            self._free(lane)
        if self._idle is not None and not self._live:
            self._wake_close()

    def _free(self, lane: _Lane) -> None:
        self._freed.append(lane)
        self._arm()

    def _again(self, run: _Live, delay: int) -> None:
        _log.warning(
            "%s failed at attempt %d of %d: %s; retry in %s",
            run, run.attempt, run.lane.spec.retries + 1, run.error, _span(delay),
        )  # fmt: skip
        run.state, run.stop = _SCHEDULED, None
        self._emit(run)
        self._read_clocks()
        self._schedule(run, self._now + delay)
        self._arm()

    def _end(self, run: _Live, state: State, reason: str | None = None) -> None:
        """A run's last change of state: told to the log, the hook, the waiters and the past."""
        run.state = state
        if reason is not None:
            run.reason = reason
        if run.call:
            del self._calls[run.id]
        else:
            lane = run.lane
            lane.unfinished -= 1
            if lane.parked is not None:
                self._free(lane)
        if state is not _SUCCEEDED or _log.isEnabledFor(logging.INFO):
            _log_end(run)
        if self._on_event is not None:
            self._emit(run)
        if run.done is not None:
            run.done.set()
        if run.call or state is not _SUCCEEDED:
            self._past.add(run, self._now)

    def _emit(self, run: _Live) -> None:
        if self._on_event is None:
            return
        try:
            self._on_event(run)
        except (Exception, SystemExit, asyncio.CancelledError) as bug:
            _log.error("%s: on_event failed: %s", run, _summary(bug), exc_info=bug)

    # What users ask for

    def submit(self, job: Job, payload: str, delay: int, at: int | None, key: str | None) -> Run:
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

    def cancel_all(self, job: Job) -> int:
        lane = self._lanes.get(job.name)
        runs = [run for run in self._unfinished() if run.lane is lane]
        return sum(self._cancel(run) for run in runs)

    async def ended(self, run: Run, timeout: float | None) -> None:
        if run.state not in (_SCHEDULED, _RUNNING):
            return
        live = cast(_Live, run)
        live.done = live.done or asyncio.Event()
        self.loop.call_soon(self._check_entered)
        try:
            async with asyncio.timeout(timeout):
                await live.done.wait()
        except TimeoutError:
            raise TimeoutError(f"run {run.id!r} has not ended within {timeout:g} s; it is {run.state}") from None

    def find(self, id: str) -> Run | None:
        known = self._calls.get(id) or self._past.get(id)
        return known or next((run for run in self._unfinished() if run.id == id), None)

    def _unfinished(self) -> Iterator[_Live]:
        yield from self._live
        yield from self._scheduled()

    def _scheduled(self, lane: _Lane | None = None) -> Iterator[_Live]:
        """The runs that wait: for their time, or for a slot."""
        due = [item for _, _, item in self._heap if isinstance(item, _Live) and item.state is _SCHEDULED]
        for one in self._lanes.values() if lane is None else (lane,):
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
            self._heap = [e for e in self._heap if isinstance(e[2], _Lane) or e[2].state is _SCHEDULED]
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
                yield from _app_needs([_Plan(need.factory)])


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
        overrides: `registry.overrides[factory] = other` puts `other` in a dependency's place, for tests.
    """

    def __init__(self) -> None:
        self.overrides: dict[Factory, Factory] = {}
        self._jobs: dict[str, Job] = {}
        self._plans: dict[Factory, _Plan] = {}
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
            every, cron, after, tz, name, args, immediate, jitter, parallelism, overlap,
            expires, timeout, retries, retry_delay, retry_on, on_error, on_crash,
        )  # fmt: skip
        return functools.partial(self._add, settings) if function is None else self._add(settings, function)

    def _add(self, settings: _Settings, function: Callable[..., object]) -> Job:
        if isinstance(function, Job):
            function = function.function
        plan = self._plans.get(function) if callable(function) else None
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
        if self._engine is not None:
            self._engine.registered(job)
        return job

    def _plan(self, function: Factory) -> _Plan:
        plan = _Plan(function)
        _check_needs(plan)
        self._plans[function] = plan
        return plan

    def _refuse_taken(self, job: Job) -> None:
        """A module that is loaded again replaces its jobs; any other second use of a name is a mistake."""
        taken = self._jobs.get(job.name)
        if taken is None:
            return
        old, new = taken.function, job.function
        if old is new or any(getattr(old, a, None) != getattr(new, a, None) for a in ("__module__", "__qualname__")):
            raise ScheduleError(
                f"the name is taken by {_place(old)}, this is {_place(new)}; give one of them a name= of its own"
            )

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
        if self._engine is not None:
            self._engine.unregistered(job)

    def _new_engine(
        self,
        store: Store | str | None,
        jobs: Sequence[str] | None,
        drain: Duration,
        on_event: Callable[[Run], object] | None,
    ) -> _Engine:
        if store is not None:
            raise StoreError(f"store={store!r}: this version has no shared stores yet; leave store out")
        if isinstance(jobs, str):
            raise BgjobError(f"jobs={jobs!r}: write a list of names, [{jobs!r}]")
        if on_event is not None and not callable(on_event):
            raise BgjobError(f"on_event={on_event!r}: not callable; pass a function of one run")
        return _Engine(self, jobs, _duration("drain", drain), on_event, _Clock(asyncio.get_running_loop()))

    async def find(self, id: str) -> Run | None:
        """The run with that id, or None. Without a store: an unfinished one, one of the last thousand that were
        submitted or failed, or a keyed one of the last day."""
        return self._going("find()").find(id)

    def _going(self, what: str) -> _Engine:
        if self._engine is None:
            raise BgjobError(f"{what} needs jobs that run: call it inside run() or `async with running():`")
        if asyncio.get_running_loop() is not self._engine.loop:
            raise BgjobError(f"{what}: another event loop runs the jobs; use asyncio.run_coroutine_threadsafe")
        return self._engine

    async def _submit(self, job: Job, payload: str, delay: int, at: int | None, key: str | None) -> Run:
        return self._going(f"job {job.name!r}: submit()").submit(job, payload, delay, at, key)

    async def _cancel(self, job: Job) -> int:
        return self._going(f"job {job.name!r}: cancel()").cancel_all(job)

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
            store: reserved for shared stores; this version has the memory of one process only, so leave it out.
            jobs: names of the jobs that this instance executes. Default: all.
            drain: at the end, how long to wait for the runs that are going. Then they are cancelled and given 5 s
                more; what would not stop is named in the log. A second signal or cancel ends the wait. Default: 20 s.
            on_event: a plain function called with the run at every change of its state. Default: none.

        Raises:
            BgjobError: these jobs run already, or a name in `jobs` is unknown.
            Exception: what an "app" dependency raised when it was made.
        """
        engine = self._new_engine(store, jobs, drain, on_event)
        with _signals(engine.stop):
            await engine.open()
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
default = Registry()
job = default.job
run = default.run
running = default.running
simulate = default.simulate
