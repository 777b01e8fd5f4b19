# bgjob 0.1.0: background jobs for asyncio, in one file. MIT licence. From https://pypi.org/project/bgjob/
# The next three lines are for projects that copy this file: their linters and formatters leave it as it is.
# ruff: noqa
# fmt: off
# pyright: reportPrivateUsage=false

"""Background jobs for asyncio services, in one file: cron for your app that stays correct.

    import asyncio
    from bgjob import job, run

    @job(every="5m", retries=3, retry_delay="30s")
    async def sync_products(): ...

    if __name__ == "__main__":
        asyncio.run(run())

The map. A room uses only rooms above it; go to one by searching for its banner, "# 3 Schedules".

     0 Door          imports, the public names, the types that every room uses, the logger
     1 Errors        the family; a message gives the job, the value seen and the remedy
     2 Time          durations, instants, the clock and the virtual loop: no other room reads a clock
     3 Schedules     (schedule, after) -> ticks; cron and the daylight-saving rule
     4 Runs          `State`, `Run`, `current_run`, the log line of every outcome, what JSON takes
     5 Dependencies  `Depends`: read at the decorator, made for an attempt, cleaned up after it
     6 Jobs          `Options`, `Job`: every keyword of the decorator checked once; submit, cancel, next_ticks
     7 Book          every rule about ticks, claims, retries and crashes; pure
     8 Engine        one object per `run()`: wait, round, start, end, drain; with and without a store
     9 Stores        `Store`, then `SQLiteStore`, `PostgresStore`, `RedisStore`: they load and commit
    10 Registry      `Registry` and the default one, whose bound methods are `job`, `run`, `running`, `find`, `simulate`
    11 Command line  `main`: `bgjob run | list | submit | status | cancel`
"""

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
import os
import re
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import (
    AsyncExitStack,
    _AsyncGeneratorContextManager,
    _GeneratorContextManager,
    asynccontextmanager,
    closing,
    contextmanager,
    suppress,
)
from contextvars import ContextVar, copy_context
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from enum import StrEnum
from queue import SimpleQueue
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, Protocol, TypeAlias, TypedDict, cast, overload
from weakref import WeakSet, WeakValueDictionary
from zlib import crc32

__version__ = "0.1.0"
__all__ = ["Depends", "Job", "Options", "Registry", "Run", "State", "current_run"]
__all__ += ["default", "find", "job", "run", "running", "simulate"]
__all__ += ["PostgresStore", "RedisStore", "SQLiteStore", "Store"]
__all__ += ["BgjobError", "RunCancelled", "RunFailed", "ScheduleError", "StoreError"]

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import AsyncGenerator, AsyncIterator, Generator
    from typing import Final, TextIO, Unpack

    from typing_extensions import ParamSpec, TypeVar  # type checkers bring it; with defaults a bare `Run` is a type

    P = ParamSpec("P", default=...)
    T = TypeVar("T", default=object)
    R_co = TypeVar("R_co", covariant=True, default=object)
    C_co = TypeVar("C_co", covariant=True, default=object)
else:
    from typing import ParamSpec, TypeVar

    P = ParamSpec("P")  # a function's parameters
    T = TypeVar("T")
    R_co = TypeVar("R_co", covariant=True)  # what a job's function returns, awaited
    C_co = TypeVar("C_co", covariant=True)  # what calling it returns: a coroutine, or of a plain function R_co

Duration: TypeAlias = float | str | timedelta

_log = logging.getLogger("bgjob")


# 1 Errors -------------------------------------------------------------------------------------------------------------
# A message names the job, the value seen and what to write instead.


class BgjobError(Exception):
    """Base of every error that bgjob raises itself."""


class ScheduleError(BgjobError, ValueError):
    """A job's declaration, a duration or an instant is wrong. Raised when the decorator runs, not when the job does."""


class StoreError(BgjobError):
    """A store is missing, unreachable or refuses: nothing was stored."""


class Unreachable(StoreError):
    """A store doesn't answer, or is locked: an outage, which ends by itself. Any other `StoreError` doesn't."""


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
    """Milliseconds, from any form of duration (units: the largest first); `what` names the argument in the error."""
    ms = math.nan
    if isinstance(value, str):
        pattern = r"\s*".join(rf"(?:([0-9]+(?:\.[0-9]+)?)\s*{unit})?" for unit in _UNITS)
        match = re.fullmatch(pattern, value.strip())
        if match is not None and any(match.groups()):
            ms = sum(float(number or 0) * unit for number, unit in zip(match.groups(), _UNITS.values(), strict=True))
    elif isinstance(value, timedelta):
        ms = value / _MS
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        ms = max(min(value * 1000, 2 * _CENTURY), -_CENTURY)  # an int may be too large for a float
    if math.isnan(ms):
        remedy = "write seconds (90), a timedelta, or text such as '30s' or '1h30m'; the units are d, h, m, s and ms"
        raise ScheduleError(f"{what}={value!r:.80}: not a duration; {remedy}")
    if not -0.5 < ms <= _CENTURY or round(ms) < least:
        why = "more than 100 years" if ms > _CENTURY else "too short" if ms >= 0 else "negative"
        raise ScheduleError(f"{what}={value!r:.80}: {why}; write a duration of at least {least} ms, for instance '30s'")
    return round(ms)


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
    return text.replace("+00:00", "Z")


def _spread(text: str, upto: int) -> int:
    """A number in [0, upto) that depends on the text alone, so that all instances and all replays agree."""
    return crc32(text.encode()) * upto >> 32


def _wall_ms() -> int:
    return int(time.time() * 1000)


async def _set_within(seconds: float | None, event: asyncio.Event) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


class _Clock:
    """What one engine knows of time, in seconds: `mono` to wait and to measure, `wall` for schedules.

    With a `start` it is virtual: wall time begins there and moves with the loop, and ids are the same in every replay.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, start: float | None = None) -> None:
        self.virtual = start is not None
        self.slice: float = _SLICE if start is None else math.inf
        self.mono: Callable[[], float] = loop.time
        self.wall: Callable[[], float] = time.time if start is None else lambda: start + loop.time()

    def entropy(self) -> int:
        return 0 if self.virtual else int.from_bytes(os.urandom(8), "big")


_VirtualClock = _Clock


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
    """A field of a cron text; its values come round after `size`, so that 7 is Sunday again."""

    name: str
    low: int
    high: int
    size: int
    names: tuple[str, ...] = ()
    special: str = "(?!)"  # what else it takes, of Quartz and Cronos

    def number(self, text: str) -> int:
        """A number or a name."""
        if text in self.names:
            return self.low + self.names.index(text)
        if text.isdigit() and self.low <= int(text) <= self.high:
            return int(text)
        names = f" or {self.names[0]}-{self.names[-1]}" if self.names else ""
        hint = "; random fields differ in each process: use jitter=" if text.startswith(("R", "H")) else ""
        raise ScheduleError(f"{self.name} must be {self.low}-{self.high}{names}, got {text[:40] or 'nothing'}{hint}")

    def values(self, item: str) -> set[int]:
        """Those of `*`, `5`, `5-9` or `22-2`, each with a step if wanted; `5/15` goes on to the field's end."""
        match = re.fullmatch(r"(?:\*|(\w+)(?:-(\w+))?)(?:/(\d+))?", item)
        low, high, step = match.groups() if match else (item, None, None)
        if step and not 1 <= int(step) <= self.size:
            raise ScheduleError(f"step of {self.name} must be 1-{self.size}, got {step[:40]}")
        first = self.low if low is None else self.number(low)
        last = self.number(high) if high else first if low and not step else self.low + self.size - 1
        if first > last:  # 22-2 goes round midnight, and its step is counted on from 22
            last += self.size
        return {self.low + (value - self.low) % self.size for value in range(first, last + 1, int(step or 1))}

    def spell(self, text: str) -> list[str]:
        """The field in croniter's words: its numbers as one list, which leaves no range, step or name to misread, and
        each special form by itself, for croniter can't mix them."""
        items = {"*"} if text == "?" and self.special != "(?!)" else set(text.split(","))
        special = {item for item in items if re.fullmatch(self.special, item)}
        numbers = set[int]().union(*map(self.values, items - special))
        if len(numbers) == self.size:
            return ["*"]
        return [",".join(map(str, sorted(numbers)))] * bool(numbers) + sorted(set(map(self.mark, special)))

    def mark(self, item: str) -> str:
        if item in ("L", "LW"):
            return item.replace("LW", "W31")  # which croniter moves to the last working day of a shorter month
        day, form = re.split("(?=[LW]$|#)", item)
        number = self.low + (self.number(day) - self.low) % self.size
        if form == "W" and number > 28:  # Quartz has none in some months, and croniter moves it
            raise ScheduleError(f"{item[:40]}: not every month has that day; write LW for the last working day")
        return f"L{number}" if form == "L" else f"{number}{form}"


_FIELDS = (
    _Field("second", 0, 59, 60),
    _Field("minute", 0, 59, 60),
    _Field("hour", 0, 23, 24),
    _Field("day of month", 1, 31, 31, special=r"LW?|\d+W"),
    _Field("month", 1, 12, 12, ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")),
    _Field("day of week", 0, 7, 7, ("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"), r"(\d+|[A-Z]{3})(L|#[1-5])"),
)
_ALIASES = {"@yearly": "0 0 1 1 *", "@annually": "0 0 1 1 *", "@monthly": "0 0 1 * *", "@weekly": "0 0 * * 0"}
_ALIASES.update({"@daily": "0 0 * * *", "@midnight": "0 0 * * *", "@hourly": "0 * * * *"})


def _spell(text: object) -> tuple[list[str], bool]:
    """Read a cron text: the croniter expressions whose union it is, and whether the schedule is wild.

    Days by Debian's rule: either field is enough, unless one of the two starts with a star.
    """
    if not isinstance(text, str) or not text.isascii() or len(text) > 1000:  # all values spelled out take 535
        raise ScheduleError("must be plain ASCII text of at most 1000 characters, such as '*/5 * * * *'")
    fields = _ALIASES.get(text.strip().lower(), text).upper().split()
    if len(fields) not in (5, 6):
        forms = "5 fields (minute, hour, day of month, month, day of week), 6 with seconds first but no year"
        raise ScheduleError(f"must be {forms}, or {' '.join(_ALIASES)}; got {len(fields)}")
    # A line of Quartz, which has no 0, with a number that is neither a step nor the nth week.
    if len(fields) == 6 and fields[3] == "?" and re.match("(?!.*0).*(?<![#/])[1-7]", fields[5]):
        raise ScheduleError(f"day of week {fields[5]:.40} beside '?': in Quartz 1 is Sunday, here Monday; write names")
    fields = ["0", *fields][-6:]
    (second,), (minute,), (hour,), days, (month,), weekdays = (f.spell(t) for f, t in zip(_FIELDS, fields, strict=True))
    either = not any(fields[n].startswith(("*", "?")) for n in (3, 5))
    pairs = [*((d, "*") for d in days), *(("*", w) for w in weekdays)] if either else itertools.product(days, weekdays)
    seconds = [] if second == "0" else [second]  # croniter is a third faster without
    expressions = {" ".join([*seconds, minute, hour, day, month, weekday]) for day, weekday in pairs}
    return sorted(expressions), fields[1].startswith("*") or fields[2].startswith("*")


def _zone(tz: object) -> tzinfo:
    """The zone meant by `tz`: an IANA name, "local" or a tzinfo; "UTC" needs neither zoneinfo nor its database."""
    if tz == "UTC":
        return UTC
    if tz == "local":
        local = _needed("dateutil.tz")
        found = local.gettz()  # of TZ=GMT+2 it makes two hours east, where the C library and `date` are west
        zone: tzinfo = found if isinstance(found, local.tzfile) else local.tzlocal()
        return zone
    if isinstance(tz, tzinfo) and not hasattr(tz, "localize"):  # pytz ignores fold, which tells two passes apart
        _reading(0, tz)  # an unfinished one raises here
        return tz
    import difflib
    import zoneinfo

    name = str(tz)
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):  # also for paths, folders, endless names
        known = {one.lower(): one for one in zoneinfo.available_timezones()}
        near = difflib.get_close_matches(name[:40].lower(), known, n=1, cutoff=0.8)
        remedy = "write 'Europe/Rome', or 'Etc/GMT-2' for UTC+2; if no name is known, pip install tzdata"
        if near and not re.search("[0-9]", name):  # the nearest number is another offset
            remedy = f"did you mean {known[near[0]]!r}?"
        raise ScheduleError(f"tz={tz!r:.60}: unknown time zone; {remedy}") from None


def _reading(instant: int, zone: tzinfo) -> datetime:
    """The wall at an instant."""
    return _aware(instant, zone).replace(tzinfo=None, fold=0)


def _needed(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ScheduleError("needs croniter; pip install croniter") from error


class _Cron:
    """The schedule of a cron text in a zone: `wild` if its minute or hour starts with a star, else fixed.

    At changes of the clock the rule is that of Debian's cron(8), and of Cronos where the two agree: a wild one keeps to
    the readings, a fixed one neither fails to run for a jump of up to three hours nor runs twice when readings repeat.
    """

    def __init__(self, text: str, zone: tzinfo, spelled: tuple[list[str], bool] | None = None) -> None:
        self.text = text
        self.zone = zone
        try:
            expressions, wild = spelled or _spell(text)
            # A naive start, always: with aware ones croniter up to 6.0 and from 6.1 on give different schedules.
            make, start = _needed("croniter").croniter, datetime(2000, 1, 1)
            self._parsed = {line: make(line, start, day_or=False, second_at_beginning=True) for line in expressions}
            self.expressions = [line for line in expressions if next(self._walk(line, start), None)]
            if not self.expressions:
                raise ScheduleError("never matches: none of its months has such a day; L is the last one")
        except ScheduleError as error:
            raise ScheduleError(f"cron={text!r:.200}: {error}") from error.__cause__
        self.wild = wild and not isinstance(zone, timezone)  # whose clock is never set

    def ticks(self, after: int) -> Iterator[int]:
        """The ticks later than `after`, in order, up to the calendar's end in the year 9999."""
        with suppress(ValueError, OverflowError):  # the calendar ends
            start = _reading(after, self.zone)
            fall = start + timedelta(days=1) - _reading(after + _UNITS["d"], self.zone)
            start -= max(fall, timedelta(0))
            walls = itertools.tee(heapq.merge(*(self._walk(line, start) for line in self.expressions)), 1 + self.wild)
            for tick in heapq.merge(*map(self._instants, walls, (0, 1))):
                if tick > after:  # else a repeat, or from before the start
                    after = tick
                    yield tick

    def _walk(self, line: str, start: datetime) -> Iterator[datetime]:
        """The walls of one expression after `start`."""
        import copy

        walker = copy.copy(self._parsed[line])
        walker.set_current(start)
        with suppress(ValueError, OverflowError, OSError):  # nothing within 50 years, or past the C library's calendar
            while True:
                wall: datetime = walker.get_next(datetime)
                yield wall

    def _instants(self, walls: Iterator[datetime], fold: int) -> Iterator[int]:
        """When clocks show the walls, in the first or the second pass (PEP 495).

        Wild: in both, and never those that are jumped over. Fixed: in the first, or right after the jump.
        """
        last: datetime | None = None
        for wall in walls:
            last = last or wall
            if wall - last > timedelta(days=50 * 366):  # always in a gap, as `* 2 * 3 SUNL` in Rome
                return
            tick = (wall.replace(tzinfo=self.zone, fold=fold) - _EPOCH) // _MS
            jump = abs(_reading(tick, self.zone) - wall)
            if jump and (self.wild or jump > timedelta(hours=3)):
                continue
            if jump:
                near = range(tick - jump // _MS, tick + jump // _MS + 1)
                tick = near[bisect_left(near, wall, key=lambda instant: _reading(instant, self.zone))]
            last = wall
            yield tick


class _Every:
    """The grid start + n * every, n >= 1, in milliseconds."""

    def __init__(self, every: int, start: int = 0) -> None:
        self.every = every
        self.start = start

    def ticks(self, after: int) -> Iterator[int]:
        return itertools.count(self.start + self.every * max(1, (after - self.start) // self.every + 1), self.every)


_Schedule = _Every | _Cron


def _newest(schedule: _Schedule, after: int, upto: int) -> int | None:
    """The last tick later than `after` and not later than `upto`, at the same cost however far apart they are."""
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


def _meaning(schedule: _Schedule) -> str:
    """What a schedule means, as JSON: the same text for all its spellings, at every start and in every process."""
    import json

    if isinstance(schedule, _Every):
        return json.dumps({"every": schedule.every})
    zone = schedule.zone
    tz: object = getattr(zone, "key", None) or re.sub(" at 0x[0-9A-Fa-f]+", "", str(zone))  # else an address
    if isinstance(zone, timezone):
        tz = zone.utcoffset(None).total_seconds()
    return json.dumps({"cron": schedule.expressions, "wild": schedule.wild, "tz": tz})


def _schedule_of(meaning: str) -> _Schedule | None:
    """The schedule with that meaning; None where there is none, or where only its own process knows the zone."""
    import json

    with suppress(ValueError, LookupError, TypeError):
        facts = json.loads(meaning)
        if "every" in facts:
            return _Every(facts["every"])
        tz = facts["tz"]
        zone = timezone(timedelta(seconds=tz)) if isinstance(tz, float) else _zone(tz)
        return _Cron(meaning, zone, (facts["cron"], facts["wild"]))
    return None


# 4 Runs ---------------------------------------------------------------------------------------------------------------
# One execution of a job: its facts, its handle, and what the log says when it ends. Arguments and results are JSON.


class State(StrEnum):
    """Where a run is. The same words stand in logs, reprs, errors and stores."""

    SCHEDULED = "scheduled"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    SKIPPED = "skipped"


_SCHEDULED, _RUNNING, _SUCCEEDED, _FAILED, _CANCELLED, _SKIPPED = State
_UNFINISHED = (_SCHEDULED, _RUNNING)


class _Stop(StrEnum):
    """Why a run is stopped: written on it before its task is cancelled, and the words of `Run.reason`."""

    CANCEL = "cancelled on request"
    TIMEOUT = "timeout"
    SHUTDOWN = "run() stopped"
    REMOVED = "job removed"
    LEASE = "lease lost"
    OUTSIDE = "cancelled from outside"
    CRASH = "its process died"

    __repr__ = str.__repr__  # as `Run.reason` it is a text


_CUT = (_Stop.SHUTDOWN, _Stop.LEASE, _Stop.OUTSIDE)  # with a store the run goes on elsewhere


class Run(Generic[R_co]):
    """One execution of a job: the handle of whoever submitted it, and the context of the function that runs.

    Attributes:
        job: the job's name.
        attempt: number of the attempt, from 1; 0 before the first.
        state: what this process last learned.
        args, kwargs: the function's arguments, without dependencies.
        key: what was passed as `key=`, else None.
        token: fencing token; grows with every claim of the job.
        error: the last failure as one line, such as "ValueError: no such user", else None.
        reason: why the run was cancelled, skipped or handed back, else None.
    """

    args: tuple[object, ...] = ()
    kwargs: Mapping[str, object] = MappingProxyType({})
    attempt: int = 0
    state: State = _SCHEDULED
    key: str | None = None
    token: int = 0
    error: str | None = None
    reason: str | None = None
    _id: str | None = None  # of a submitted run
    _started: float | None = None  # wall seconds
    _took: float | None = None  # s, by the monotonic clock
    _value: object = None  # what `result()` returns
    _unkept: str | None = None  # why there is no result
    _exception: BaseException | None = None
    _done: asyncio.Event | None = None

    def __init__(self, job: str, at: int, owner: object) -> None:
        self.job = job
        self._at = at
        self._owner = cast("_Engine", owner)  # of which a public signature knows nothing

    @property
    def id(self) -> str:
        """The run's name, the same at every attempt and on every instance: an idempotency key.

        `job@2026-01-01T00:00:00Z` for a tick, `job#key` for a keyed run, else text that sorts by submission.
        """
        return self._id or _tick_id(self.job, self._at)

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
        """Seconds that the last attempt took; None while none has ended."""
        return self._took

    async def result(self, timeout: Duration | None = None) -> R_co:
        """Wait for the end of the run, retries included, and return what the function returned, as JSON gives it back.

        Args:
            timeout: how long to wait. Default: for ever.

        Raises:
            RunFailed: the last attempt failed; the cause is the original exception, where it ran in this process.
            RunCancelled: the run was cancelled or skipped.
            TimeoutError: it hasn't ended within `timeout`; it goes on.
            BgjobError: its result wasn't JSON, was over 1 MiB or is no longer kept; or another event loop runs it.
            StoreError: it runs elsewhere, and the store gave no answer for 5 s.
        """
        limit = None if timeout is None else _duration("timeout", timeout) / 1000
        if self.state in _UNFINISHED:
            await self._owner.ended(cast("_Live", self), limit)
        if self.state is _FAILED:
            raise RunFailed(f"run {self.id!r} failed: {self.error}") from self._exception
        if self.state is not _SUCCEEDED:
            raise RunCancelled(f"run {self.id!r} was {self.state}: {self.reason}")
        if self._unkept is not None:
            raise BgjobError(f"run {self.id!r} succeeded, but its result isn't kept: {self._unkept}")
        return cast(R_co, self._value)

    async def cancel(self) -> bool:
        """Cancel the run: a scheduled one never starts, a running one gets `CancelledError`, a retry is dropped.

        Returns once the run is signalled; `result()` waits for its end. False if it had already ended.
        """
        return self.state in _UNFINISHED and await self._owner.cancel(cast("_Live", self))

    def __str__(self) -> str:
        """How the log names it: by its job, also where the id alone doesn't."""
        return self.id if self.id.startswith((f"{self.job}@", f"{self.job}#")) else f"{self.job} {self.id}"

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


def _tick_id(job: str, at: int) -> str:
    return f"{job}@{_iso(at)}"


def _summary(error: BaseException) -> str:
    """The error as one line, of at most 1,000 characters and none that a store refuses; of a group the first leaf."""
    name, leaf = type(error).__name__, error
    while isinstance(leaf, BaseExceptionGroup):
        leaf = cast("BaseExceptionGroup[BaseException]", leaf).exceptions[0]
    if leaf is not error:
        name += f": {type(leaf).__name__}"
    try:
        text = next(iter(str(leaf).strip().splitlines()), "")
        text = text.encode(errors="backslashreplace").decode().replace("\0", r"\0")  # surrogates, as in file names
    except Exception:
        text = "<its str() raises>"
    line = f"{name}: {text}" if text else name
    return line if len(line) <= 1000 else f"{line[:999]}…"


def _log_facts(run: Run) -> dict[str, object]:
    """Attributes of a log record about a run, for JSON logs."""
    return {"job": run.job, "run": run.id, "attempt": run.attempt, "state": str(run.state), "duration": run.duration}


def _log_end(run: Run) -> None:
    """The one line of an ended run: a success is INFO, what was asked for too, the rest can't be overlooked."""
    facts = _log_facts(run)
    if run.state is _SUCCEEDED:
        note = f", attempt {run.attempt}" if run.attempt > 1 else ""
        note += f"; its result isn't kept: {run._unkept}" if run._unkept else ""
        _log.info("%s succeeded in %s%s", run, _span((run._took or 0) * 1000), note, extra=facts)
    elif run.state is _FAILED:
        _log.error("%s failed at attempt %d: %s", run, run.attempt, run.error, exc_info=run._exception, extra=facts)
    elif run._started is not None or run.reason != _Stop.SHUTDOWN:  # the drain tells in one line what never began
        level = logging.INFO if run.reason == _Stop.CANCEL else logging.WARNING
        _log.log(level, "%s %s: %s", run, run.state, run.reason, extra=facts)


class _Outcome(NamedTuple):
    """The state that a run goes to after an attempt; where that is `scheduled`, how it waits, and for how many ms."""

    state: State
    error: BaseException | None = None
    reason: str | None = None
    again: _Again = "retry"
    delay: int = 0


_SUCCESS = _Outcome(_SUCCEEDED)


def _judge(stop: _Stop | None, error: BaseException | None, timeout: int | None) -> _Outcome:
    """The reason of a stop decides, whatever the function then returned or raised."""
    if error is None and (stop is None or stop in _CUT):  # it was to be cut, but had ended well
        return _SUCCESS
    if stop is _Stop.TIMEOUT:
        late = TimeoutError(f"no end within {_span(timeout or 0)}")
        late.__cause__ = error  # its traceback shows where the function hung
        return _Outcome(_FAILED, late)
    if stop is None or stop is _Stop.CRASH:
        return _Outcome(_FAILED, error or BgjobError(stop))
    return _Outcome(_CANCELLED, None if isinstance(error, asyncio.CancelledError) else error, stop)


_MAX_JSON = 1 << 20  # bytes of arguments, or of a result


def _text(value: object) -> str:
    """What bgjob itself writes, as JSON."""
    import json

    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _loads(text: str | bytes) -> Any:
    import json

    return json.loads(text)


def _dumps(value: object) -> str:
    """A user's value as JSON; a TypeError, ValueError or RecursionError where JSON can't hold it as it is."""
    text, parts = _text(value), [value]
    for part in parts:  # which grows meanwhile
        if isinstance(part, dict):
            items = cast("dict[object, object]", part)
            for key in items:
                if not isinstance(key, str):  # json would write 1 as "1", where another "1" may be
                    raise TypeError(f"the key {key!r} isn't text")
            parts += items.values()
        elif isinstance(part, (list, tuple)):
            parts += cast("Iterable[object]", part)
    return text


def _packed(value: object) -> tuple[str | None, str | None]:
    """A result as JSON, or None and why there is none."""
    try:
        text = _dumps(value)
    except Exception as error:  # an object of the user's, whose methods may raise anything
        return None, f"it isn't JSON ({_summary(error)})"
    if len(text) > _MAX_JSON:
        return None, f"it is {len(text):,} bytes of JSON, and the limit is 1 MiB"
    return text, None


# 5 Dependencies -------------------------------------------------------------------------------------------------------
# `Depends` is read and checked at the decorator; what it names is made for an attempt, and cleaned up after it.

Scope: TypeAlias = Literal["run", "app"]
Factory: TypeAlias = Callable[..., object]
_Made: TypeAlias = (
    "Awaitable[T] | Iterator[T] | AsyncIterator[T] | _GeneratorContextManager[T] | _AsyncGeneratorContextManager[T]"
)
_Plain: TypeAlias = Callable[[Callable[[], object]], Awaitable[Any]]  # calls it where plain code runs


@overload
def Depends(factory: Callable[..., _Made[T]], scope: Scope = "run") -> T: ...
@overload
def Depends(factory: Callable[..., T], scope: Scope = "run") -> T: ...
def Depends(factory: Factory, scope: Scope = "run") -> object:
    """A dependency: `def sync(db: Database = Depends(get_db))`, or `db: Annotated[Database, Depends(get_db)]`.

    Args:
        factory: a function, async function, generator, async generator or context manager of contextlib's; its own
            parameters may be dependencies. What the job raised is raised at the `yield`: put the clean-up into a
            `finally` or `with`. An error that a factory swallows or replaces is still the job's.
        scope: "run" (the default): made for each attempt and cleaned up after it, in reverse order; plain factories of
            a plain job run in the job's thread. "app": made when `run()` starts, cleaned up after the last run.

    Raises:
        ScheduleError: `factory` isn't a hashable callable, nothing fills its parameters, or it needs what ends earlier.
    """
    if not callable(factory) or type(factory).__hash__ is None:
        raise ScheduleError(f"Depends({factory!r}): pass a function, without calling it")
    need = _Plan(factory, scope)
    if scope not in ("run", "app"):
        raise ScheduleError(f"{need}: scope={scope!r}: write 'run' or 'app'")
    if need.required:
        raise ScheduleError(f"{need}: nothing fills its {', '.join(need.required)}; give it a default or Depends")
    if scope == "app" and any(inner.scope == "run" for inner in need.needs.values()):
        raise ScheduleError(f"{need}: an 'app' dependency can't need a 'run' one; give both one scope")
    return need


class _Plan:
    """What the signature of a job's function or of a factory says; read once, for inspect is slow."""

    def __init__(self, function: Factory, scope: Scope = "run") -> None:
        self.function = function
        self.scope = scope
        self.is_async = inspect.iscoroutinefunction(function)
        self.signature = _signature(function)
        parameters = self.signature.parameters.values()
        self.needs = {p.name: need for p in parameters if (need := _need(p)) is not None}
        bare = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        self.required = [name for name in bare if name not in self.needs]  # what nothing fills
        self.direct = self.is_async and not self.needs  # called without a detour

    def __repr__(self) -> str:
        return f"Depends({getattr(self.function, '__name__', self.function)})"


def _signature(function: Factory) -> inspect.Signature:
    try:
        return inspect.signature(function, eval_str=True)
    except ScheduleError:  # of a `Depends` in an annotation
        raise
    except Exception:  # an annotation names what only type checkers import
        with suppress(ValueError):  # some built-ins have none: `dict` makes an empty one
            return inspect.signature(function)
    return inspect.Signature()


def _need(p: inspect.Parameter) -> _Plan | None:
    """The dependency in a parameter's default or in its `Annotated`."""
    for found in (p.default, *getattr(p.annotation, "__metadata__", ())):
        if isinstance(found, _Plan):
            return found
        if type(found).__name__ == "Depends" and type(found).__module__.startswith("fastapi"):
            raise ScheduleError(f"{p.name}: that Depends is FastAPI's; import it from bgjob")
    if isinstance(p.annotation, str) and "Depends(" in p.annotation:
        raise ScheduleError(f"{p}: can't be read in its module; write {p.name}=Depends(…)")
    return None


def _app_needs(plans: Iterable[_Plan]) -> Iterator[_Plan]:
    """The "app" dependencies of these functions, those of their "run" ones included."""
    for plan in plans:
        for need in plan.needs.values():
            yield from [need] if need.scope == "app" else _app_needs([need])


class _Resolver:
    """The dependencies of one scope: each made once, kept open on one stack, closed in reverse order."""

    def __init__(
        self, stack: AsyncExitStack, overrides: Mapping[Factory, Factory], plain: _Plain, app: _Resolver | None = None
    ) -> None:
        self._stack = stack
        self._overrides = overrides
        self._plain = plain
        self._app = app
        self._made: dict[Factory, object] = {}
        self._lock = asyncio.Lock()

    async def fill(self, needs: Mapping[str, _Plan], given: Collection[str] = ()) -> dict[str, object]:
        return {name: await self.get(need) for name, need in needs.items() if name not in given}

    async def get(self, need: _Plan) -> object:
        if need.scope == "app" and self._app is not None:
            async with self._app._lock:
                return await self._app.get(need)
        factory = self._overrides.get(need.function, need.function)
        if factory not in self._made:
            plan = need if factory is need.function else _Plan(factory)
            made = await self._plain(functools.partial(factory, **await self.fill(plan.needs)))
            self._made[factory] = await self._open(made)
        return self._made[factory]

    async def _open(self, made: Any) -> object:
        """Enter a generator or a context manager that contextlib made of one; await what can be awaited."""
        if inspect.isgenerator(made):
            made = contextmanager(lambda: made)()
        elif inspect.isasyncgen(made):
            made = asynccontextmanager(lambda: made)()
        if issubclass(type(made), _AsyncGeneratorContextManager):
            return await self._stack.enter_async_context(made)
        if issubclass(type(made), _GeneratorContextManager):  # to be left even if it is cancelled while it is entered

            async def leave(*raised: Any) -> Any:
                return await self._plain(functools.partial(made.__exit__, *raised))

            self._stack.push_async_exit(leave)
            return await self._plain(made.__enter__)
        return await made if inspect.isawaitable(made) else made  # a lock or a sqlite3.Connection stays as it is


@asynccontextmanager
async def _clean_up(name: object) -> AsyncGenerator[AsyncExitStack, None]:
    """A stack that leaves the job its own error, whatever a clean-up raises or swallows; else the clean-up's counts."""
    failure: BaseException | None = None
    try:
        async with AsyncExitStack() as stack:
            try:
                yield stack
            except BaseException as error:
                failure = error
                raise
    except Exception as error:
        if failure is None:
            raise
        if error is not failure:
            _log.error("%s: its clean-up failed, too: %s", name, _summary(error), exc_info=error)
    if failure is not None:
        raise failure


# 6 Jobs ---------------------------------------------------------------------------------------------------------------
# A registered function. Every keyword of the decorator is checked and converted here, once; later rooms read `_Spec`.

OnError: TypeAlias = Callable[["Run[Any]", BaseException], object]
RetryOn: TypeAlias = type[BaseException] | tuple[type[BaseException], ...] | Callable[[BaseException], bool]

_LATE = 1000  # ms after which the start of a tick is worth a warning
_LAST = 253_402_000_000_000  # ms: some days before the year 10000, where datetimes end in every zone
_OTHERS = {"seconds": "every", "minutes": "every", "interval": "every", "trigger": "cron", "timezone": "tz"}
_OTHERS.update({"max_instances": "parallelism", "max_retries": "retries"})  # words of other schedulers, and ours


class Options(TypedDict, total=False):
    """The keywords of `@job`, which says what they mean: `common: Options = {"retries": 3}`, then `@job(**common)`."""

    every: Duration | None
    cron: str | None
    after: Duration | None
    tz: str | tzinfo
    name: str | None
    args: Mapping[str, object] | None
    immediate: bool
    jitter: Duration
    parallelism: int | None
    overlap: Literal["skip", "queue", "all"]
    expires: Duration | None
    timeout: Duration | None
    retries: int
    retry_delay: Duration | Callable[[int], Duration] | Callable[[int, BaseException], Duration]
    retry_on: RetryOn
    on_error: OnError | None
    on_crash: Literal["rerun", "drop"]


class _Spec:
    """The keywords of one job, checked: durations in ms, policies as functions."""

    def __init__(self, name: str, plan: _Plan, options: Options) -> None:
        o = cast("Mapping[str, Any]", options)
        for word in o.keys() - Options.__annotations__.keys():
            import difflib

            ours = Options.__annotations__
            near = difflib.get_close_matches(_OTHERS.get(word, word), ours, 1) or ours
            raise ScheduleError(f"{word}={o[word]!r}: not a keyword of @job; write {', '.join(near)}")
        self.name = name
        self.plan = plan
        self.schedule = _schedule(o)
        self.after = _optional("after", o, 0)
        scheduled = self.schedule is not None or self.after is not None
        self.args, self.arguments = _args(plan, o.get("args"), scheduled)
        self.immediate: bool = _choice("immediate", o.get("immediate", False), (True, False))
        self.jitter = _duration("jitter", o.get("jitter", 0))
        parallelism, default = o.get("parallelism"), 1 if scheduled else 10
        self.parallelism = _int("parallelism", default if parallelism is None else parallelism, 1, 1000)
        self.overlap: str = _choice("overlap", o.get("overlap", "skip"), ("skip", "queue", "all"))
        self.expires = _optional("expires", o)
        self.timeout = _optional("timeout", o)
        self.retries = _int("retries", o.get("retries", 0), 0)
        self.delay = _retry_delay(o.get("retry_delay", "1s..5m"))
        self.retryable = _retryable(o.get("retry_on", Exception))
        self.on_error: OnError | None = o.get("on_error")
        self.on_crash: str = _choice("on_crash", o.get("on_crash", "rerun"), ("rerun", "drop"))
        if self.on_error is not None and not (callable(self.on_error) and _takes(self.on_error, 2)):
            raise ScheduleError(f"on_error={self.on_error!r}: write a function of (run, exception)")
        for what, idle in (("immediate", False), ("overlap", "skip"), ("jitter", 0)):
            if self.schedule is None and o.get(what, idle) != idle:
                raise ScheduleError(f"{what}={o[what]!r}: is for ticks; add every= or cron=")


def _schedule(o: Mapping[str, Any]) -> _Schedule | None:
    written = [f"{what}={o[what]!r}" for what in ("every", "cron", "after") if o.get(what) is not None]
    if len(written) > 1:
        raise ScheduleError(f"{' and '.join(written)}: a job has one schedule; stack a second @job with its own name")
    tz, cron, every = o.get("tz", "UTC"), o.get("cron"), o.get("every")
    if cron is not None:
        return _Cron(cron, _zone(tz))
    if tz != "UTC":
        raise ScheduleError(f"tz={tz!r}: only cron has a zone; leave it out, or write cron=")
    return None if every is None else _Every(_duration("every", every, 1))


def _optional(what: str, o: Mapping[str, Any], least: int = 1) -> int | None:
    return None if o.get(what) is None else _duration(what, o[what], least)


def _int(what: str, value: object, least: int, most: int | None = None) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most and value > most):
        upto = f"from {least} to {most:,}" if most else f"{least} or more"
        raise ScheduleError(f"{what}={value!r}: write a whole number, {upto}")
    return value


def _choice(what: str, value: T, choices: tuple[T, ...]) -> T:
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        raise ScheduleError(f"{what}={value!r}: write {' or '.join(map(repr, choices))}")
    return value


def _printable(what: str, value: object, most: int) -> str:
    if not isinstance(value, str) or not value.strip() or not value.isprintable() or len(value) > most:
        raise ScheduleError(f"{what}={value!r:.60}: write printable text of at most {most} characters")
    return value


def _args(plan: _Plan, given: Any, scheduled: bool) -> tuple[dict[str, object], Callable[[], dict[str, object]]]:
    """The keyword arguments of scheduled runs, and what copies them for an attempt."""
    import copy

    try:
        args: dict[str, object] = copy.deepcopy(dict(given or {}))
        plan.signature.bind_partial(**args)
        if scheduled:
            _check_filled(plan, args)
    except Exception as error:  # a copy may raise anything
        remedy = f"write a dict of values that can be copied, for {plan.signature}"
        raise ScheduleError(f"args={given!r}: {error}; {remedy}") from error
    return args, functools.partial(copy.deepcopy, args)


def _check_filled(plan: _Plan, names: Collection[str]) -> None:
    missing = ", ".join(name for name in plan.required if name not in names)
    if plan.required[:1] == ["self"]:
        raise TypeError("a method needs its instance; decorate the bound method, as in job(every='5m')(mailer.send)")
    if missing:
        raise TypeError(f"nothing fills the parameter {missing}")


def _takes(function: Callable[..., object], number: int) -> bool:
    """Whether it can be called with so many; the 10 in `lambda retry, base=10: …` says that `base` is none of ours."""
    try:
        bound = inspect.signature(function).bind(*range(number))
    except (TypeError, ValueError) as error:
        return isinstance(error, ValueError)  # some built-ins have no signature
    later = [bound.signature.parameters[name].default for name in bound.arguments][1:]
    return all(default in (inspect.Parameter.empty, None) for default in later)


def _retry_delay(value: Any) -> Callable[[int, BaseException, str], int]:
    """`(number of the retry, from 1; its error; text to spread by) -> ms`, from any form of `retry_delay`."""
    if callable(value):
        both = _takes(value, 2)
        if inspect.iscoroutinefunction(value) or not (both or _takes(value, 1)):
            raise ScheduleError(f"retry_delay={value!r}: write a plain function of (retry), or of (retry, error)")
        return lambda retry, error, text: _duration("retry_delay", value(retry, error) if both else value(retry))
    first, dots, last = value.partition("..") if isinstance(value, str) else (value, "", "")
    low = _duration("retry_delay", first, 1 if dots else 0)
    high = _duration("retry_delay", last, 1) if dots else low
    if low > high:
        raise ScheduleError(f"retry_delay={value!r}: begins longer than it ends; write '{last}..{first}'")

    def delay(retry: int, error: BaseException, text: str) -> int:
        """A doubling one is spread over the upper half: what failed together shouldn't return together."""
        top = min(low << min(retry - 1, 40), high)
        return top // 2 + _spread(text, top - top // 2 + 1) if dots else low

    return delay


def _retryable(retry_on: RetryOn) -> Callable[[BaseException], bool]:
    """Whether to retry an error. A predicate isn't asked about a group, but about its leaves."""
    kinds = cast("tuple[Any, ...]", retry_on if isinstance(retry_on, tuple) else (retry_on,))
    if all(isinstance(kind, type) and issubclass(kind, BaseException) for kind in kinds):
        return lambda error: isinstance(error, kinds) or _all_leaves(error, lambda leaf: isinstance(leaf, kinds))
    if isinstance(retry_on, (type, tuple)) or not callable(retry_on) or inspect.iscoroutinefunction(retry_on):
        raise ScheduleError(f"retry_on={retry_on!r}: write an exception class, a tuple of them, or a plain predicate")
    return lambda error: _all_leaves(error, retry_on)


def _all_leaves(error: BaseException, match: Callable[[BaseException], bool]) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(_all_leaves(one, match) for one in cast("BaseExceptionGroup[BaseException]", error).exceptions)
    return match(error)


def _check_function(function: object) -> None:
    if not callable(function) or isinstance(function, type):
        raise ScheduleError(f"{function!r} is no function; decorate an async function or a plain one")
    inner = inspect.unwrap(function)
    if inspect.isgeneratorfunction(inner) or inspect.isasyncgenfunction(inner):
        raise ScheduleError(f"{function!r} is a generator: nothing would iterate over it; decorate a function")


def _job_name(function: object, name: object) -> str:
    """The job's identity; '@' and '#' separate it from tick and key in the ids of its runs."""
    if name is None:
        name = getattr(function, "__name__", "<lambda>")
        if name == "<lambda>":
            raise ScheduleError(f"{function!r} has no name of its own; write @job(name='…')")
    text = _printable("name", name, 200)
    if "@" in text or "#" in text:
        raise ScheduleError(f"name={name!r}: write it without '@' and '#'")
    return text


class Later(Generic[P, R_co]):
    """What `job.after(…)` and `job.at(…)` return: the job, to be submitted for then, under that key."""

    def __init__(
        self, spec: Any, registry: Registry, delay: int = 0, at: int | None = None, key: str | None = None
    ) -> None:
        self._spec: _Spec = spec
        self._registry = registry
        self._delay = delay
        self._at = at
        self._key = key if key is None else _printable(f"job {spec.name!r}: key", key, 500)

    @property
    def name(self) -> str:
        """Its identity in logs and stores."""
        return self._spec.name

    async def submit(self, /, *args: P.args, **kwargs: P.kwargs) -> Run[R_co]:
        """Run the job in the background as soon as there is room. Arguments make a round trip through JSON.

        Those that are left out are taken from the job's `args=`.

        Raises:
            TypeError: the arguments don't fit the function, or one isn't JSON.
            ValueError: they are more than 1 MiB of JSON.
            BgjobError: nothing runs: call it inside `run()` or `running()`.
            StoreError: the store gave no answer for 5 s.
        """
        spec, job = self._spec, cast("Job[..., Any, R_co]", self)
        payload = _payload(spec, args, kwargs)
        engine = self._registry._going(f"job {spec.name!r}: submit()")
        return cast("Run[R_co]", await engine.submit(job, payload, self._delay, self._at, self._key))


class Job(Later[P, R_co], Generic[P, C_co, R_co]):
    """A registered function: call it, submit it, look at it, cancel it. `@job` makes it; pickle keeps its name."""

    def __init__(self, spec: Any, registry: Registry) -> None:
        super().__init__(spec, registry)
        functools.update_wrapper(self, spec.plan.function, updated=())
        if spec.plan.is_async and sys.version_info >= (3, 12):
            inspect.markcoroutinefunction(self)
        elif spec.plan.is_async:
            self._is_coroutine: object = vars(asyncio.coroutines)["_is_coroutine"]  # what asyncio looks at

    @property
    def function(self) -> Callable[P, C_co]:
        """What was decorated."""
        return cast("Callable[P, C_co]", self._spec.plan.function)

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> C_co:
        """Call the function as if it weren't a job, for tests and for reuse: no run, no retries, no log.

        Raises:
            TypeError: a parameter that `Depends` would fill was left out.
        """
        plan = self._spec.plan
        given = plan.signature.bind_partial(*args, **kwargs).arguments if plan.needs else ()
        missing = ", ".join(f"{name}=…" for name in plan.needs if name not in given)
        if missing:
            raise TypeError(f"job {self.name!r}: a direct call resolves no Depends; pass {missing}")
        return self.function(*args, **kwargs)

    def after(self, delay: Duration, *, key: str | None = None) -> Later[P, R_co]:
        """`await job.after("5m").submit(…)`: run it that long from now; 0 is at once.

        Args:
            delay: how long to wait.
            key: printable text of at most 500 characters. The same key is the same run: submitted once, however often
                it is asked for. It stays taken while the run is unfinished, and for the store's `keep` (in memory:
                among the last thousand that ended) after it succeeded or failed; it is free at once when cancelled.
        """
        return Later(self._spec, self._registry, _duration(f"job {self.name!r}: after", delay), None, key)

    def at(self, when: datetime, *, key: str | None = None) -> Later[P, R_co]:
        """`await job.at(datetime(…)).submit(…)`: run it at an aware datetime; one in the past is at once.

        `key` is that of `after`.
        """
        return Later(self._spec, self._registry, 0, _to_ms(f"job {self.name!r}: at", when), key)

    async def cancel(self) -> int:
        """Cancel every scheduled and running run of this job; how many. Its next tick still fires.

        Raises:
            BgjobError: nothing runs: call it inside `run()` or `running()`.
        """
        engine = self._registry._going(f"job {self.name!r}: cancel()")
        return await engine.cancel_all(cast("Job[..., Any, Any]", self))

    def next_ticks(self, n: int = 5, start: datetime | None = None) -> list[datetime]:
        """The next `n` ticks, aware and in the job's zone; `[]` without `every` or `cron`.

        Args:
            n: how many; fewer come back where the schedule ends.
            start: an aware datetime that they come after; None (the default) is now. An interval's ticks
                are shown on the grid of the Unix epoch, as with a shared store.
        """
        schedule, n = self._spec.schedule, _int(f"job {self.name!r}: n", n, 0)
        after = _wall_ms() if start is None else _to_ms(f"job {self.name!r}: start", start)
        ticks = itertools.islice(schedule.ticks(after) if schedule else (), n)
        zone = schedule.zone if isinstance(schedule, _Cron) else UTC
        return [_aware(tick, zone) for tick in itertools.takewhile(_LAST.__gt__, ticks)]

    def __reduce__(self) -> str:
        return getattr(self.function, "__qualname__", self.name)

    def __repr__(self) -> str:
        schedule, after = self._spec.schedule, self._spec.after
        if isinstance(schedule, _Cron):
            return f"<Job {self.name} cron={schedule.text!r} tz={schedule.zone}>"
        if schedule is not None:
            return f"<Job {self.name} every={_span(schedule.every)}>"
        return f"<Job {self.name} {'on submit' if after is None else f'after={_span(after)}'}>"


def _payload(spec: _Spec, args: tuple[object, ...], kwargs: Mapping[str, object]) -> str:
    """The arguments as JSON, checked against the signature; the one that can't be JSON is named."""
    name = ""
    try:
        given = spec.plan.signature.bind_partial(*args, **kwargs).arguments
        left = {name: value for name, value in spec.args.items() if name not in given}
        _check_filled(spec.plan, given.keys() | left)
        arguments = {**given, **left}
        for name in arguments:
            _dumps(arguments[name])
    except (TypeError, ValueError, RecursionError) as error:
        why = f"argument {name} isn't JSON ({error}); pass plain values" if name else error
        raise TypeError(f"job {spec.name!r}: {why}") from None
    sent = {**left, **kwargs}
    text = _dumps([args, sent]) if args or sent else ""
    if len(text) > _MAX_JSON:
        raise ValueError(f"job {spec.name!r}: {len(text):,} bytes of arguments, over 1 MiB as JSON; pass a reference")
    return text


def _arguments(payload: str) -> tuple[tuple[object, ...], dict[str, object]]:
    args, kwargs = cast("tuple[list[object], dict[str, object]]", _loads(payload or "[[],{}]"))
    return tuple(args), kwargs


# 7 Book ---------------------------------------------------------------------------------------------------------------
# Every rule that instances share, once, for memory and for stores. Pure: a job's book and its waiting rows are what the
# rules decide on; a store only loads and saves them. Instants and durations are in ms, `now` is the store's clock.

_MAX_LOST = 3
_MAX_ENDED = 1000  # ended runs that memory remembers


def _verdict(tries: int, lost: int, retries: int, on_crash: str) -> Literal["run", "fail"]:
    """Whether a run may be tried again after `tries` claims have ended, `lost` of them with their process.

    A lost attempt is no failure of the job, so it uses up no retry; but a job that kills its process three
    times, or one that must run at most once (`on_crash="drop"`), is not given another to kill.
    """
    if lost > _MAX_LOST or (lost and on_crash == "drop"):
        return "fail"
    return "run" if tries - lost <= retries else "fail"


_Key: TypeAlias = int | str  # how a book calls a run: the instant of its tick, or the id of a call


class _Claim:
    """An unfinished run: nobody's while it has no owner."""

    tries = 0  # claims, those whose owner died included
    lost = 0  # claims whose owner died
    token = 0
    owner: str | None = None
    since: int | None = None  # when it was last claimed
    error: str | None = None
    cancel = False
    # What a book leaves out: of a call what stands in its row (None: not read), and in memory the run itself.
    args: str | None = None
    by: str | None = None  # who submitted it, and is told of its end
    run: _Live | None = None

    def __init__(self, at: int, due: int) -> None:
        self.at = at
        self.due = due


_Word: TypeAlias = Literal["won", "skipped", "full", "lost", "early"]
_Again: TypeAlias = Literal["retry", "back", "lost"]
_Row: TypeAlias = tuple[_Key, _Claim]
_Ended: TypeAlias = tuple[_Key, _Claim, State, str]  # with the reason


class _Book:
    """A job: its last tick, and every unfinished run that is a tick's or is claimed."""

    def __init__(self, last: int = 0) -> None:
        self.last = last  # the last tick handed out
        self.schedule = ""
        self.timeout: int | None = None
        self.token = 0  # the newest
        self.claims: dict[_Key, _Claim] = {}

    @property
    def ticks(self) -> int:
        """How many ticks are unfinished."""
        return sum(isinstance(key, int) for key in self.claims) if self.claims else 0

    def crash(self, alive: Collection[str]) -> None:
        """The claims of a dead instance are nobody's, and have lost one more."""
        for claim in self.claims.values():
            if claim.owner is not None and claim.owner not in alive:
                claim.owner = None
                claim.lost += 1

    def enlist(self, schedule: str, timeout: int | None, immediate: bool, new: bool, now: int) -> bool:
        """A new or changed schedule begins now, a new one with `immediate` by a run. Whether anything changed."""
        if not new and (self.schedule, self.timeout) == (schedule, timeout):
            return False
        if new or schedule != self.schedule:
            self.last = max(now, self.last)
        self.schedule, self.timeout = schedule, timeout
        if new and immediate:
            self.claims[now] = _Claim(now, now)
        return True

    def tick(self, at: int, due: int, now: int, spec: _Spec) -> _Word:
        """Whose is a tick? It is won by moving `last` on; beside `parallelism` unfinished ones it overlaps."""
        if at <= self.last or at in self.claims:
            return "lost"
        if at > now:
            return "early"
        if self.ticks < spec.parallelism + (spec.overlap == "queue"):
            self.last = at
            self.claims[at] = _Claim(at, due)
            return "won"
        if spec.overlap == "all":
            return "full"  # `last` is the cursor: the tick is asked for again when another has ended
        self.last = at
        return "skipped"

    def claim(self, rows: Iterable[_Row], room: int, now: int, spec: _Spec, owner: str, lag: int = 0) -> _Claimed:
        """The oldest that are due among nobody's claims and the waiting rows, as many as there are slots here (`room`)
        and everywhere. What is cancelled, or would start too late for the first time, ends without one; late is by a
        clock that is `lag` ms behind."""
        taken, ended = list[_Row](), list[_Ended]()
        waiting = [row for row in self.claims.items() if row[1].owner is None]
        room = min(room, spec.parallelism - len(self.claims) + len(waiting))
        if rows:
            waiting.extend(rows)
        if len(waiting) > 1:
            waiting.sort(key=lambda row: (row[1].due, str(row[0])))
        for row in waiting:
            key, claim = row
            if claim.due > now:
                return _Claimed(taken, ended, claim.due)
            if claim.cancel:
                ended.append((key, claim, _CANCELLED, _Stop.CANCEL))
                self.claims.pop(key, None)
            elif claim.since is None and spec.expires is not None and (late := now - claim.at - lag) > spec.expires:
                ended.append((key, claim, _SKIPPED, f"expired: {_span(late)} late, expires={_span(spec.expires)}"))
                self.claims.pop(key, None)
            elif len(taken) < room:
                self.token += 1
                claim.owner, claim.since, claim.token = owner, now, self.token
                claim.tries += 1
                self.claims[key] = claim
                taken.append(row)
            else:
                break
        return _Claimed(taken, ended, None)

    def settle(
        self, key: _Key, owner: str, token: int, state: State, again: _Again, due: int | None, error: str | None
    ) -> State | None:
        """The state that the end of an attempt leads to; None where the claim is another's, or nobody's, by now.

        A scheduled run is tried again: a retry; handed back, which returns its try; or lost with what ran it. A call
        that waits is a row, so its claim goes.
        """
        claim = self.claims.get(key)
        if claim is None or claim.owner != owner or claim.token != token:
            return None
        if state is _SCHEDULED and claim.cancel:
            state = _CANCELLED
        claim.owner, claim.error = None, error
        if state is _SCHEDULED:
            claim.tries -= again == "back"
            claim.lost += again == "lost"
            claim.due = claim.due if due is None else due
        if state is not _SCHEDULED or isinstance(key, str):
            del self.claims[key]
        return state

    def cancel(self, key: _Key) -> _Claim | None:
        """Nobody's run is removed; to a running one its owner is signalled."""
        claim = self.claims.get(key)
        if claim is not None and claim.owner is None:
            del self.claims[key]
        elif claim is not None:
            claim.cancel = True
        return claim


class _Claimed(NamedTuple):
    """What `_Book.claim` answers: claimed runs, those that ended instead and how, and when the next one is due."""

    taken: list[_Row]
    ended: list[_Ended]
    later: int | None


_NOTHING = _Claimed([], [], None)


def _key_of(job: str, id: str) -> _Key:
    """How a book calls the run with that id."""
    if id.startswith(f"{job}@"):
        with suppress(ValueError):
            return (datetime.fromisoformat(id[len(job) + 1 :]) - _EPOCH) // _MS
    return id


def _id_of(job: str, key: _Key) -> str:
    return key if isinstance(key, str) else _tick_id(job, key)


# What a store keeps: books and rows, and who is alive.


class Saved(NamedTuple):
    """A row: a submitted run, waiting if it has a `due`, running, or ended; or a tick's run that ended otherwise than
    well. `body` is JSON. `expires` is when an end is forgotten; the id of a cancelled or skipped one is free at once.
    """

    id: str
    job: str
    state: State
    due: int | None
    expires: int | None
    body: str


class Page(NamedTuple):
    """A job as a store has it: its book, the oldest due rows that were asked for (id, due, body), the next due."""

    version: int  # 0: not there
    book: str
    rows: Sequence[tuple[str, int, str]]
    later: int | None


class Change(NamedTuple):
    """A job's next book and rows, to be saved if its version is still that one."""

    job: str
    version: int
    book: str
    rows: Sequence[Saved]


class Call(NamedTuple):
    """A run to be submitted: due then, or where that is None so many ms from the store's now."""

    id: str
    job: str
    due: int | None
    delay: int
    body: str


class Store(Protocol):
    """What the engine needs of a store. Its verbs raise `Unreachable` for an outage, within a quarter of the lease and
    4 s at most; any other `StoreError` means that this very request is refused. the tests' `Conformance` tests one."""

    lease: int  # ms that an instance lives without a beat
    keep: int  # ms that ends are kept

    async def open(self, owner: str, hint: Callable[[], None]) -> None:
        """Open the store for the instance `owner`, whole or not at all; `hint` is called when it is rung."""

    async def close(self, owner: str | None) -> None:
        """Close it, and forget the instance; None leaves it, for its lease protects what would not stop."""

    async def load(self, jobs: Mapping[str, int], ahead: int = 0) -> tuple[int, Mapping[str, int], Mapping[str, Page]]:
        """`{job: rows wanted} -> now, {instance: alive until}, pages`, one consistent read, the instances last. A row
        is wanted if it is due by now, or by `ahead` ms later."""
        ...

    async def commit(self, changes: Sequence[Change]) -> Collection[str]:
        """Save each change whole, if nobody changed its job meanwhile: the jobs that took."""
        ...

    async def push(self, calls: Sequence[Call]) -> Sequence[int | None]:
        """Insert rows: when each is due, None where its id is taken."""
        ...

    async def find(self, ids: Sequence[str]) -> Sequence[Saved]:
        """The rows with these ids, as far as there are any."""
        ...

    async def beat(self) -> tuple[float, bool]:
        """Extend the lease: when, by the loop's clock, the last beat was asked for; whether one came too late."""
        ...

    async def ring(self, owners: Collection[str]) -> None:
        """Hint to these instances, or to all others if empty. May be lost."""

    async def overview(self, n: int) -> tuple[int, Mapping[str, int], Mapping[str, str], Sequence[Saved]]:
        """`now, {instance: alive until}, {job: book}`, and the next n waiting and the last n failed rows."""
        ...


def _book_text(book: _Book) -> str:
    claims = [
        [key, c.at, c.due, c.tries, c.lost, c.token, c.owner, c.since, c.error, c.cancel]
        for key, c in book.claims.items()
    ]
    return _dumps([book.last, book.schedule, book.timeout, book.token, claims])


def _book_of(page: Page, alive: Collection[str], now: int = 0) -> _Book:
    """A job's book; a new one where the store has none."""
    book = _Book(now)
    if page.version:
        book.last, book.schedule, book.timeout, book.token, claims = _loads(page.book)
        for key, at, due, *facts in claims:
            claim = book.claims[key] = _Claim(at, due)
            claim.tries, claim.lost, claim.token, claim.owner, claim.since, claim.error, claim.cancel = facts
        book.crash(alive)
    return book


# A row's body: what a claim says, and what became of it.
_FACTS = ("args", "by", "at", "tries", "lost", "token", "owner", "since", "error")


def _body(**facts: object) -> str:
    return _dumps({name: value for name, value in facts.items() if value is not None and value != 0})


def _claim_of(due: int, body: str) -> _Claim:
    """The claim that a waiting row will be."""
    facts = cast("dict[str, Any]", _loads(body))
    claim = _Claim(facts.pop("at", due), due)
    claim.args = ""
    vars(claim).update(facts)
    claim.owner = None
    return claim


class Row(NamedTuple):
    """A run as people look at it."""

    id: str
    job: str
    state: State
    due: int
    at: int
    args: str = ""
    by: str | None = None
    tries: int = 0
    lost: int = 0
    token: int = 0
    owner: str | None = None
    since: int | None = None  # start of the current or last attempt
    error: str | None = None
    finished: int | None = None
    reason: str | None = None
    result: str | None = None
    unkept: str | None = None  # why there is no result


def _row_of(saved: Saved) -> Row:
    facts: dict[str, Any] = {"at": saved.due or 0, **cast("dict[str, Any]", _loads(saved.body))}
    return Row(saved.id, saved.job, saved.state, saved.due or 0, **facts)


def _row_of_claim(job: str, key: _Key, claim: _Claim, args: str = "") -> Row:
    facts: dict[str, Any] = {name: getattr(claim, name) for name in _FACTS} | {"args": args}
    state = _SCHEDULED if claim.owner is None else _RUNNING
    reason = _Stop.CANCEL if claim.cancel else None
    return Row(_id_of(job, key), job, state, claim.due, **facts, reason=reason)


class Overview(NamedTuple):
    """What `bgjob status` shows: all jobs, all that runs, what is due next, waits for a retry, and failed last."""

    now: int
    jobs: Mapping[str, _Book]
    running: Sequence[Row]
    due: Sequence[Row]
    retrying: Sequence[Row]
    failed: Sequence[Row]


def _overview(now: int, alive: Collection[str], books: Mapping[str, str], saved: Sequence[Saved]) -> Overview:
    jobs = {job: _book_of(Page(1, text, (), None), alive) for job, text in sorted(books.items()) if text}
    claims = [_row_of_claim(job, key, c) for job, book in jobs.items() for key, c in book.claims.items()]
    rows = [*map(_row_of, saved), *claims]
    waiting = sorted((row for row in rows if row.state is _SCHEDULED), key=lambda row: (row.due, row.id))
    running = sorted((row for row in claims if row.state is _RUNNING), key=lambda row: row.since or 0)
    due = [row for row in waiting if not row.tries]
    retrying = [row for row in waiting if row.tries]
    return Overview(now, jobs, running, due, retrying, [row for row in rows if row.state is _FAILED])


# 8 Engine -------------------------------------------------------------------------------------------------------------
# One object per `run()`. Each job has a lane; a round over the lanes that have something to ask or to say gets their
# books and rows, decides, keeps what changed, and tells. A book in memory is at hand: its round is a plain call.
#
#   tick     the timer wakes the lane: `_wake` -> `_round_here`, or for a store `_pump` -> `_round`
#   claim    `_decide` asks the book for the tick, and claims what is due where slots are free
#   start    `_tell` hands each claim to `_start`, which makes the run and its task
#   attempt  `_attempt` calls the function and returns an outcome; `_stop` writes the reason first, then cancels
#   end      `_end`, the task's callback, lays the outcome in the lane
#   settle   the lane's next round puts it into the book, and what is left of the run into a row
#   told     `_tell_end`, once that is kept: state, log, `on_event`, whoever waits for the result
#   again    a run to be retried or handed back is nobody's claim, or a waiting row: see claim

_BATCH = range(100)  # lanes served between two turns of the loop: others would wait
_GRACE = 5.0  # s for what was cancelled at the end of a drain
_HOOK_LIMIT = 30_000  # ms for on_error where the job has no timeout
_COUNTED = 1000  # missed ticks of a cron are counted up to here; those of an interval cost nothing to count
_PATIENCE = 5.0  # s that whoever submits or cancels waits for a store
_BACKOFF_FIRST, _BACKOFF_LAST = 500, 30_000  # ms between two tries to reach a store that is down
_AT_ONCE = 500  # jobs in one round: more would hold the store's lock, and on SQLite the loop, for too long
_YIELD = 0.005  # s after which a loop that does nothing but submit lets others run
_GATHER = 0.01  # s that who lost a race for a book leaves to others: meanwhile ends gather, and go together
_BEATS = 5  # in a lease
_TRUST = 0.8  # of a lease, without a beat: then another instance may soon start its runs, so they are cancelled here
_POLL = 5.0  # s between two looks at all jobs: hints may be lost
_RING = 0.003  # s between two hints
_REST = 1000  # ms before a run that was handed back, though nothing stops here, is claimed again
_REFUSED = "the store refuses its error or result"


class _Lane:
    """One job in one engine: its next tick, what runs, and in memory its book and rows, too."""

    def __init__(self, name: str, spec: _Spec, seq: int, stored: bool, now: int) -> None:
        self.name = name
        self.seq = seq
        self.stored = stored
        self.book = _Book(now)
        self.rows = _Rows()
        self.held: dict[_Key, _Live] = {}  # claimed, and not settled yet
        self.ends: list[tuple[_Live, _Outcome]] = []  # to be settled
        self.listed = False  # in the book
        self.doubted = 0.0  # when a beat came late: its claims may be another instance's
        self.alarm = _LAST  # when the heap has it
        self.start = 0
        self.at: int | None = None  # the next tick, and the one after it
        self.then: int | None = None
        self.walk: Iterator[int] = iter(())  # those after that
        self.missed: int | None = None  # the first of those that came due together with the next
        self.skipped = 0  # ticks since the last that was handed out
        self.become(spec)

    def become(self, spec: _Spec) -> None:
        """Take on a job: the first, or one that is registered again."""
        self.spec = spec
        self.removed = False
        self.grid = spec.schedule
        self.step = spec.schedule.every if isinstance(spec.schedule, _Every) else 0
        self.wall = not self.stored and isinstance(spec.schedule, _Cron)  # its ticks go by the wall's clock

    def begin(self, last: int) -> None:
        """The first tick after `last`, when the job became known; an interval's grid in memory begins there."""
        self.start = 0 if self.stored or not self.step else last % self.step
        self.grid = _Every(self.step, last - self.step) if self.start else self.spec.schedule
        if self.spec.after is None:
            self.move(last)
        else:
            self.book.last, self.at = last - 1, last + self.spec.after

    def move(self, last: int) -> None:
        """Make the first tick after `last` the next one."""
        step = self.step
        if step:
            self.at = at = last + step - (last - self.start) % step
            self.then = at + step
        elif self.grid is None:
            self.at = None
        else:
            if last != self.at or self.then is None:
                self.walk = self.grid.ticks(last)
                self.then = next(self.walk, None)
            self.at, self.then = self.then, next(self.walk, None)

    def offer(self, now: int, keep: int) -> tuple[int, int]:
        """The tick to ask for, and when it is due: of several the newest, or with overlap="all" the oldest of those
        that are still kept. It is computed, for a gap of a week costs no more than one of a minute."""
        if self.at is not None and self.at <= now - keep and self.spec.overlap == "all":
            _log.warning("job %r: its ticks up to %s are not made up for: see keep=", self.name, _iso(now - keep))
            self.move(now - keep)
        elif self.then is not None and self.then <= now and self.spec.overlap != "all":
            self.missed = self.at if self.missed is None else self.missed
            at, grid = self.at or 0, cast(_Schedule, self.grid)
            self.move((now - (now - self.start) % self.step if self.step else _newest(grid, at, now) or at) - 1)
        at, jitter = self.at or 0, self.spec.jitter
        if jitter:
            upto = jitter if self.then is None else min(jitter, self.then - at)
            return at, at + _spread(_tick_id(self.name, at), upto)
        return at, at

    def room(self) -> int:
        """Slots that are free once what has ended is settled."""
        return 0 if self.removed else max(0, self.spec.parallelism - len(self.held) + len(self.ends))


class _Rows:
    """The waiting calls of a job in memory, the oldest due first."""

    def __init__(self) -> None:
        self.waiting: dict[str, _Claim] = {}
        self.instants: set[str] = set()  # of those, which are for an instant, by the wall's clock
        self.heap: list[tuple[int, str]] = []  # with entries of calls that were claimed or cancelled since

    def put(self, id: str, claim: _Claim) -> None:
        self.waiting[id] = claim
        heapq.heappush(self.heap, (claim.due, id))

    def take(self, id: str) -> None:
        self.waiting.pop(id, None)
        self.instants.discard(id)

    def shift(self, ms: int) -> None:
        """The wall's clock was set back so far, or if negative on."""
        for id in self.instants:
            self.waiting[id].due += ms
            heapq.heappush(self.heap, (self.waiting[id].due, id))

    def due(self, now: int, n: int) -> tuple[list[_Row], int | None]:
        """The n oldest that are due, and when the next one is."""
        heap, found = self.heap, dict[str, _Row]()
        while heap and (heap[0][1] not in self.waiting or (heap[0][0] <= now and len(found) < n)):
            due, id = heapq.heappop(heap)
            claim = self.waiting.get(id)
            if claim is not None and claim.due == due:
                found[id] = id, claim
        later = heap[0][0] if heap and heap[0][0] > now else None  # what is due waits for a slot
        for id, (_, claim) in found.items():
            heapq.heappush(heap, (claim.due, id))
        return list(found.values()), later


class _Live(Run[object]):
    """A run of this process: what the engine has to know of it beside its facts."""

    task: asyncio.Task[_Outcome] | None = None
    stop: _Stop | None = None
    leased = math.inf  # monotonic time at which the claim was asked for
    _result: str | None = None  # what it returned, as JSON

    def __init__(self, lane: _Lane, key: _Key, claim: _Claim, owner: _Engine) -> None:
        super().__init__(lane.name, claim.at, owner)
        self.lane = lane
        self.place = key
        self.claim = claim
        self.call = isinstance(key, str)  # submitted, not a tick
        if isinstance(key, str):
            self._id, self.key = key, key.partition("#")[2] or None


class _Turn:
    """What a round decides about one lane: kept whole or not at all, and then told."""

    changed = False
    word: _Word | None = None  # what became of the tick `at`
    at = 0
    later = _LAST  # when something comes due
    claimed = _NOTHING
    ends: Sequence[tuple[_Live, _Outcome, State | None]] = ()

    def __init__(self, lane: _Lane, book: _Book, version: int = 0) -> None:
        self.lane = lane
        self.book = book
        self.version = version
        self.rows: list[_Kept] = []


_Kept: TypeAlias = tuple[_Key, _Claim, State, str | None, _Live | None]  # a row to save, with the reason and the run


class _Thread:
    """The one thread of a plain job's attempt, so that a connection that a factory opens there works in the job."""

    def __init__(self, loop: asyncio.AbstractEventLoop, name: str, ended: WeakSet[threading.Thread]) -> None:
        self._loop = loop
        self._context = copy_context()
        self._calls: SimpleQueue[tuple[Callable[[], object], asyncio.Future[_Answer]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"bgjob {name}", daemon=True)
        self._ended = ended
        self._left = False

    async def call(self, function: Callable[[], object]) -> object:
        """What the function returns or raises. Whoever is cancelled meanwhile leaves the thread at work, for good."""
        if self._left:
            raise BgjobError("its thread is still at work, and this can't run beside it")
        future: asyncio.Future[_Answer] = self._loop.create_future()
        self._calls.put((function, future))
        if not self._thread.is_alive():
            self._thread.start()
        try:
            value, error = await future
        except asyncio.CancelledError:
            self._left = True
            raise
        if error is not None:
            raise error
        return value

    def end(self) -> None:
        self._calls.put(None)
        if self._thread.is_alive() and not self._left:
            self._ended.add(self._thread)

    def _work(self) -> None:
        while (asked := self._calls.get()) is not None:
            function, future = asked
            try:
                answer: _Answer = self._context.run(function), None
            except BaseException as error:
                answer = None, error
            with suppress(RuntimeError):  # the loop was closed: the drain named this thread when it gave it up
                self._loop.call_soon_threadsafe(self._deliver, future, answer)
            del asked, function, future, answer

    @staticmethod
    def _deliver(future: asyncio.Future[_Answer], answer: _Answer) -> None:
        if not future.done():
            future.set_result(answer)


_Answer: TypeAlias = tuple[object, BaseException | None]


async def _inline(function: Callable[[], object]) -> object:
    return function()


class _Engine:
    """Executes the jobs of a registry in this process, alone or with a store beside other instances."""

    def __init__(
        self,
        registry: Registry,
        jobs: Sequence[str] | None,
        drain: int,
        on_event: Callable[[Run], object] | None,
        clock: _Clock,
        store: Store | None = None,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.pid = os.getpid()
        self._registry = registry
        self._names = None if jobs is None else frozenset(jobs)
        self._drain = drain
        self._on_event = on_event
        self._clock = clock
        self._mono, self._wall, self._slice = clock.mono, clock.wall, clock.slice
        self._offset = self._wall_offset = clock.wall() - clock.mono()
        self._lag = 0  # ms that the wall's clock is behind ours, which never goes back
        self._now = round(clock.wall() * 1000)
        self._thread = threading.get_ident()
        self._context = copy_context()
        self._stack = AsyncExitStack()
        self._app = _Resolver(self._stack, registry.overrides, _inline)
        self._seq = itertools.count()
        self._lanes: dict[str, _Lane] = {}  # for ever: a job that is registered again keeps what runs of it
        self._heap: list[tuple[int, int, _Lane]] = []
        self._timer: asyncio.Handle | None = None
        self._armed: float | None = math.inf  # None while it is called
        self._live: dict[asyncio.Task[_Outcome], _Live] = {}
        self._handles: WeakValueDictionary[str, _Live] = WeakValueDictionary()  # of calls, by id
        self._past: deque[_Live] = deque(maxlen=_MAX_ENDED)  # of what memory keeps
        self._last_id, self._entropy = 0, clock.entropy()
        self._me = f"{socket.gethostname()}:{self.pid}:{clock.entropy():016x}"  # new at every start
        self._opened: asyncio.Future[None] = self.loop.create_future()
        self._opener = asyncio.current_task()
        self._threads: WeakSet[threading.Thread] = WeakSet()  # that have returned
        self._closing = self._closed = False
        # With a store
        self._shared = store is not None
        self._store = cast(Store, store)
        self._lease, self._keep = (0.0, _UNITS["d"]) if store is None else (store.lease / 1000, store.keep)
        self._stirred: dict[_Lane, None] = {}  # there is something to ask or to say
        self._alive: Mapping[str, int] = {}
        self._beaten = self._mono()
        self._late = -math.inf  # when a beat last came after the lease had ended
        self._poked, self._reached = asyncio.Event(), asyncio.Event()
        self._synced = self._ending = self._lost_race = False
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._beating: asyncio.Task[tuple[float, bool]] | None = None
        self._poll: asyncio.TimerHandle | None = None
        self._watched: set[_Live] = set()
        self._strikes: list[tuple[_Live, asyncio.Future[bool]]] = []  # that are asked for
        self._striking = asyncio.Lock()
        self._rings: set[str] = set()
        self._down_since: float | None = None
        self._failures = self._waited = 0
        self._yielded = 0.0

    # Open and close

    async def open(self) -> None:
        """Start: "app" dependencies first, then the schedules. On an error nothing is left behind."""
        registry = self._registry
        jobs = [job for job in registry.jobs.values() if self._serves(job.name)]
        unknown = (self._names or frozenset()) - registry.jobs.keys()
        if unknown:
            known = ", ".join(registry.jobs) or "none"
            raise BgjobError(f"jobs={sorted(unknown)}: no such job; the registered ones are: {known}")
        registry._engine = self
        try:
            for need in _app_needs(job._spec.plan for job in jobs):
                await self._app.get(need)
            self._read_clocks()
            if self._shared:
                await self._join()
            for job in registry.jobs.values():  # with those that came meanwhile
                if self._serves(job.name):
                    self._enter(job)
            self._log_start()
        except BaseException:
            self._closing = self._closed = True
            registry._engine = None
            self._opened.cancel()
            await self._close_app()
            raise
        self._opened.set_result(None)
        self._arm()

    def _log_start(self) -> None:
        if not self._lanes and self._names is None:
            _log.warning("run() has no jobs: was the module that registers them imported?")
        elif _log.isEnabledFor(logging.INFO):
            coming = [(lane.at, lane.name) for lane in self._lanes.values() if lane.at is not None]
            first = f"; next {min(coming)[1]} at {_iso(min(coming)[0])}" if coming else ""
            me = "" if not self._shared else f" as {self._me}"
            _log.info("bgjob %s runs %d jobs%s%s", __version__, len(self._lanes), me, first)

    async def ready(self, what: str) -> None:
        """Who asks while `run()` is opening waits; an "app" dependency would wait for itself."""
        if asyncio.get_running_loop() is not self.loop:
            raise BgjobError(f"{what}: another event loop runs the jobs; use asyncio.run_coroutine_threadsafe")
        if not self._opened.done():
            if asyncio.current_task() is self._opener:
                raise BgjobError(f"{what}: run() is still opening; its dependencies can't use its jobs yet")
            await asyncio.wait({self._opened})
        if self._opened.cancelled():
            raise BgjobError(f"{what}: run() could not be opened")

    def _enter(self, job: Job) -> None:
        """Give a job its lane, or a lane its new job: what runs of it goes on, and still counts."""
        spec, stored = job._spec, self._shared and job._spec.after is None
        lane = self._lanes.get(job.name)
        if lane is None or lane.stored != stored:
            lane = self._lanes[job.name] = _Lane(job.name, spec, next(self._seq), stored, self._now)
        lane.become(spec)
        if stored:
            lane.listed = False  # its next round says it
        elif lane.book.enlist(_text_of(spec), spec.timeout, spec.immediate, not lane.listed, self._now):
            lane.listed = True
            lane.begin(self._now)
        self._alarm(lane, self._now if stored or lane.book.claims or lane.at is None else lane.at)

    def changed(self, name: str) -> None:
        """A job was registered or removed, in whichever thread."""
        if threading.get_ident() != self._thread:
            self.loop.call_soon_threadsafe(self.changed, name)
            return
        job, lane = self._registry.jobs.get(name), self._lanes.get(name)
        if job is None and lane is not None:
            lane.removed, lane.at, lane.listed = True, None, False
            self._drop_waiting(lane, _Stop.REMOVED)
        elif job is not None and self._opened.done() and not self._closing and self._serves(name):
            self._read_clocks()
            self._enter(job)

    def _serves(self, name: str) -> bool:
        return self._names is None or name in self._names

    async def close(self) -> None:
        """Drain, and leave nothing behind. A cancel that comes meanwhile ends the wait, and is raised at the end."""
        self._closing = True
        if self._timer is not None:
            self._timer.cancel()
        cancelled: asyncio.CancelledError | None = None
        stages = [self._wait_for_runs, self._cut_runs, self._close_app, self._abandon_runs]
        for stage in [*stages, self._leave] if self._shared else stages:
            try:
                await stage()
            except asyncio.CancelledError as error:
                cancelled = error
        for thread in list(self._threads):
            thread.join(_GRACE)  # it has given its result, and only wants the interpreter once more to end
        self._registry._engine = None
        if cancelled is not None:
            raise cancelled

    async def _wait_for_runs(self) -> None:
        if self._live and self._drain:
            n, names = len(self._live), _some([*self._live.values()])
            _log.warning("draining %d runs, at most %s; Ctrl-C again cancels them: %s", n, _span(self._drain), names)
            await asyncio.wait(self._live, timeout=self._drain / 1000)

    async def _cut_runs(self) -> None:
        for run in self._live.values():
            self._stop(run, _Stop.SHUTDOWN)
        if self._live:
            await asyncio.wait(self._live, timeout=_GRACE)

    async def _close_app(self) -> None:
        try:
            async with asyncio.timeout(_GRACE):
                await self._stack.aclose()
        except Exception as error:
            _log.error("clean-up of app dependencies failed: %s", _summary(error), exc_info=error)

    async def _abandon_runs(self) -> None:
        """Name what would not stop, and what memory can't keep. In a store the former keeps its instance's lease."""
        self._closed = True
        for task, run in list(self._live.items()):
            _log.error("%s would not stop: it ignored its cancellation for %s", run, _span(_GRACE * 1000))
            del self._live[task]
            if not run.lane.stored:
                run.lane.ends.append((run, _Outcome(_CANCELLED, None, _Stop.SHUTDOWN)))
                self._round_here(run.lane)
            task.cancel()  # a run in a thread is only waited for, and the wait now ends
        lost = [run for lane in self._lanes.values() for run in self._drop_waiting(lane, _Stop.SHUTDOWN)]
        if lost and not self._clock.virtual:
            _log.warning("%d scheduled runs are lost, for memory keeps none: %s", len(lost), _some(lost))

    def _drop_waiting(self, lane: _Lane, why: _Stop) -> list[_Live]:
        """End all that waits in this process alone."""
        nobodys = {key: claim for key, claim in lane.book.claims.items() if claim.owner is None}
        for key in nobodys:
            lane.book.cancel(key)
        waiting: dict[Any, _Claim] = {**nobodys, **lane.rows.waiting}
        lane.rows = _Rows()
        return [self._tell_unstarted(lane, key, claim, _CANCELLED, why) for key, claim in waiting.items()]

    # Wait

    def _read_clocks(self) -> None:
        """Our clock: a store's, else the wall's; set back, it goes on with monotonic time until the wall catches up."""
        mono = self._mono()
        if not self._shared:
            offset = self._wall() - mono
            step = offset - self._wall_offset
            self._wall_offset = offset
            if offset > self._offset:
                self._offset = offset
            lag, self._lag = self._lag, int((self._offset - offset) * 1000)
            if step > _JUMP or step < -_JUMP:
                self._jumped(round(step * 1000), self._lag - lag)
        self._now = int((mono + self._offset) * 1000)

    def _jumped(self, step: int, back: int) -> None:
        """The clock was set, or the machine slept. Forward is elapsed time: what it skipped is caught up like any gap.

        Back: delays and intervals don't notice, instants come later. Cron waits until its last tick has passed again,
        as Debian's does; or begins anew where that would take more than three hours.
        """
        _log.warning("the clock went %s by %s", "forward" if step > 0 else "back", _span(abs(step)))
        now = int((self._mono() + self._offset) * 1000)
        for lane in self._lanes.values():
            if lane.wall and step < -3 * _UNITS["h"]:
                lane.book.last = now - self._lag
                lane.move(now - self._lag)
            lane.rows.shift(back)
            if lane.wall or lane.rows.instants:
                self._alarm(lane, now)

    def _alarm(self, lane: _Lane, when: int) -> None:
        """Wake the lane at an instant, or earlier."""
        if when < lane.alarm:
            lane.alarm = when
            heapq.heappush(self._heap, (when, lane.seq, lane))
            if len(self._heap) > 2 * len(self._lanes) + 100:  # entries whose lane is woken earlier
                self._heap[:] = {e[1]: e for e in self._heap if e[0] == e[2].alarm}.values()
                heapq.heapify(self._heap)
            self._arm()

    def _arm(self) -> None:
        """Have `_wake` called when the first lane is to be woken."""
        if self._heap and self._armed is not None:
            due, latest = self._heap[0][0], self._now + self._slice
            when = (due if due < latest else latest) / 1000 - self._offset
            if when < self._armed and not self._closing and self._opened.done():
                if self._timer is not None:
                    self._timer.cancel()
                self._armed = when
                self._timer = self.loop.call_at(when, self._wake, context=self._context)

    def _wake(self) -> None:
        self._timer = self._armed = None
        try:
            self._read_clocks()
            heap, now = self._heap, self._now
            for woken in _BATCH:
                if not heap or heap[0][0] > (now if woken else now + _EARLY):
                    break
                when, _, lane = heapq.heappop(heap)
                if when == lane.alarm:
                    lane.alarm = _LAST
                    if when > now:
                        now = self._now = when
                    (self._stir if lane.stored else self._round_here)(lane)
        finally:  # else one bug would stop every job for good
            self._armed = math.inf
            self._arm()

    # The round

    def _stir(self, lane: _Lane) -> None:
        """Have a round soon."""
        if lane.stored:
            self._stirred[lane] = None
            self._poked.set()
        else:
            self._alarm(lane, self._now)

    def _round_here(self, lane: _Lane) -> None:
        """The round of a job in memory: nothing is awaited, so nobody comes between."""
        turn = _Turn(lane, lane.book)
        rows, later = lane.rows.due(self._now, lane.room()) if lane.rows.heap else ((), None)
        self._decide(turn, rows, later, len(lane.ends))
        if turn.rows:
            self._keep_here(turn)
        self._tell(turn, math.inf)

    def _keep_here(self, turn: _Turn) -> None:
        for key, claim, state, _, _ in turn.rows:
            if state is _SCHEDULED:
                turn.lane.rows.put(cast(str, key), claim)
            else:
                turn.lane.rows.take(cast(str, key))

    async def _round(self, lanes: Sequence[_Lane], ends: int = sys.maxsize) -> None:
        """The round of jobs in a store: load, decide, commit, tell. What others changed meanwhile is asked again."""
        if self._fenced():
            await self._beat()
        for lane in lanes:
            self._stirred.pop(lane, None)
        asked = self._mono()
        try:
            wanted = {lane.name: 0 if self._closing else lane.room() for lane in lanes}
            now, alive, pages = await self._store.load(wanted)
            if self._me not in alive:  # late, or the store was emptied: others must see us before we judge them
                await self._beat()
                now, alive, pages = await self._store.load(wanted)
            self._alive = {**alive, self._me: _LAST}
            self._look_in_time()
            self._heard(now, asked)
            turns = [self._decide_page(lane, pages[lane.name], wanted[lane.name], ends) for lane in lanes]
            took = await self._commit(turns)
            await self._read_arguments(turns)
        except BaseException as error:
            for lane in lanes:
                self._stirred[lane] = None  # whatever was kept, it will be read
            if not isinstance(error, StoreError) or isinstance(error, Unreachable):
                raise
            await self._ask_apart(lanes, ends, error)
            return
        self._failures, self._lost_race = 0, False
        for turn in turns:
            if turn.changed and turn.lane.name not in took:
                self._stirred[turn.lane] = None
                self._lost_race = True
                continue
            turn.lane.listed |= not self._closing
            self._tell(turn, asked)

    async def _commit(self, turns: Iterable[_Turn]) -> Collection[str]:
        changes = list[Change]()
        for turn in turns:
            if turn.changed:
                rows = [self._saved(turn.lane.name, *row) for row in turn.rows]
                changes.append(Change(turn.lane.name, turn.version, _book_text(turn.book), rows))
        return await self._store.commit(changes) if changes else ()

    def _saved(self, job: str, key: _Key, claim: _Claim, state: State, reason: str | None, run: _Live | None) -> Saved:
        """The row of a run, whatever its state is now."""
        facts = {name: getattr(claim, name) for name in _FACTS}
        due = claim.due if state is _SCHEDULED else None
        if state in _UNFINISHED:
            return Saved(_id_of(job, key), job, state, due, None, _body(**facts))
        if run is not None:
            facts.update(error=run.error, result=run._result, unkept=run._unkept)
        body = _body(**facts, reason=reason, finished=self._now)
        return Saved(_id_of(job, key), job, state, due, self._now + self._keep, body)

    async def _read_arguments(self, turns: Iterable[_Turn]) -> None:
        """Those of calls that were taken over from the dead: their rows are where they were."""
        taken = itertools.chain.from_iterable(turn.claimed.taken for turn in turns)
        strays = {key: claim for key, claim in taken if claim.args is None and isinstance(key, str)}
        for row in map(_row_of, await self._store.find([*strays]) if strays else ()):
            strays[row.id].args, strays[row.id].by = row.args, row.by

    async def _ask_apart(self, lanes: Sequence[_Lane], ends: int, error: StoreError) -> None:
        """The store refuses something, for good: find the job, then the end, and settle that with less to say."""
        if len(lanes) > 1:
            for lane in lanes:
                await self._round([lane])
            return
        (lane,) = lanes
        if ends > 1 and lane.ends:
            for _ in range(len(lane.ends)):
                await self._round([lane], 1)
            return
        _log.error("job %r: the store refuses what was asked: %s", lane.name, error)
        for run, outcome in lane.ends[:1]:
            if _REFUSED not in (run.error, run._unkept):
                succeeded = outcome.state is _SUCCEEDED
                run.error, run._unkept, run._result = (None, _REFUSED, None) if succeeded else (_REFUSED, None, None)
                await self._round([lane], 1)
                return
        self._stirred.pop(lane, None)
        self._alarm(lane, self._now + _BACKOFF_LAST)

    def _decide_page(self, lane: _Lane, page: Page, asked: int, ends: int) -> _Turn:
        """What only a store needs: list the job, adopt what a lost answer left us, see what became of our claims."""
        book = _book_of(page, self._alive, self._now)
        turn = _Turn(lane, book, page.version)
        turn.changed = lane.doubted > 0
        if not lane.removed and not self._closing and not (lane.listed and page.version):
            text, new = _text_of(lane.spec), not page.version
            turn.changed |= book.enlist(text, lane.spec.timeout, lane.spec.immediate, new, self._now)
            if lane.spec.schedule is not None and not lane.listed:
                lane.begin(book.last)
        self._decide(turn, [(id, _claim_of(due, body)) for id, due, body in page.rows], page.later, ends)
        taken = dict(turn.claimed.taken)
        for key, claim in book.claims.items():
            if claim.owner == self._me and key not in lane.held:
                taken[key] = claim
        for key, run in lane.held.items():
            kept = book.claims.get(key)
            if kept is None or kept.owner != self._me or kept.token != run.token:
                self._stop(run, _Stop.LEASE)
            elif kept.cancel:
                self._stop(run, _Stop.CANCEL)
        turn.claimed = turn.claimed._replace(taken=[*taken.items()])
        owned = sum(claim.owner is not None for claim in book.claims.values())
        if len(page.rows) >= asked and lane.room() > len(taken) and owned < lane.spec.parallelism:
            turn.later = self._now  # ends came while it was loaded, so there is room for more rows than were asked for
        return turn

    def _decide(self, turn: _Turn, rows: Sequence[_Row], later: int | None, ends: int) -> None:
        """All that is to be said and asked of a job, by the rules of its book: ends, then a tick, then claims."""
        lane, book, now = turn.lane, turn.book, self._now
        if lane.ends:
            turn.ends = [(run, outcome, self._settle(turn, run, outcome)) for run, outcome in lane.ends[:ends]]
        if self._closing or lane.removed:
            return
        lag = self._lag if lane.wall else 0
        if lane.at is not None and lane.at <= now - lag:
            turn.at, due = lane.offer(now - lag, self._keep)
            turn.word = book.tick(turn.at, due, now - lag, lane.spec)
            turn.changed |= turn.word in ("won", "skipped")
        if rows or book.claims:
            turn.claimed = claimed = book.claim(rows, lane.room(), now, lane.spec, self._me, lag)
            turn.changed |= bool(claimed.taken or claimed.ended)
            if rows or claimed.ended:
                turn.rows.extend((*ended, None) for ended in claimed.ended)
                # A call whose process died has left its row, with its arguments.
                begun = [(key, claim) for key, claim in claimed.taken if claim.args is not None]
                turn.rows.extend((key, claim, _RUNNING, None, None) for key, claim in begun)
            if claimed.later is not None and claimed.later < turn.later:
                turn.later = claimed.later
        if later is not None and later < turn.later:
            turn.later = later

    def _settle(self, turn: _Turn, run: _Live, outcome: _Outcome) -> State | None:
        """The state a run goes to; None where its claim isn't ours any more."""
        key, claim = run.place, turn.book.claims.get(run.place)
        due = self._now + outcome.delay if outcome.delay else None
        state = turn.book.settle(key, self._me, run.token, outcome.state, outcome.again, due, run.error)
        if state is None or claim is None:
            return outcome.state if run.leased > self._late else None  # it was kept, and the answer lost
        turn.changed = True
        if state is _SCHEDULED:
            claim.run = None if turn.lane.stored else run
            turn.later = min(turn.later, claim.due)
        if run.call or state not in (_SUCCEEDED, _SCHEDULED):
            claim.args, claim.by = run.claim.args, run.claim.by
            reason = outcome.reason if state is outcome.state else _Stop.CANCEL
            turn.rows.append((key, claim, state, reason, run))
        return state

    def _tell(self, turn: _Turn, asked: float) -> None:
        """What was decided is kept: now it holds."""
        lane, word = turn.lane, turn.word
        if turn.ends:
            del lane.ends[: len(turn.ends)]
            for run, outcome, state in turn.ends:
                self._tell_end(lane, run, outcome, state)
        if 0 < lane.doubted <= asked:
            lane.doubted = 0.0
            for key, run in lane.held.items():
                claim = turn.book.claims.get(key)
                if claim is not None and claim.owner == self._me and claim.token == run.token:
                    run.leased = asked
        if word is not None and word != "full":
            self._tell_tick(lane, word, turn.at, turn.book.last)
        for key, claim, state, reason in turn.claimed.ended:
            self._tell_unstarted(lane, key, claim, state, reason)
        for key, claim in turn.claimed.taken:
            self._start(lane, key, claim, asked)
        when, at = turn.later, lane.at
        if at is not None and at < when and word != "full":
            when = at + self._lag if lane.wall else at
        if when < lane.alarm:
            self._alarm(lane, when)
        if lane.ends:
            self._stir(lane)

    def _tell_tick(self, lane: _Lane, word: _Word, at: int, last: int) -> None:
        """What became of a tick, by the rules of `_Book.tick`."""
        if word == "skipped":
            run = _Live(lane, at, _Claim(at, at), self)
            run.state, run.reason = _SKIPPED, "overlap"
            if not lane.skipped:
                limit = lane.spec.parallelism + (lane.spec.overlap == "queue")
                _log.warning(
                    "%s skipped: %d earlier ticks of the job are unfinished", run, limit, extra=_log_facts(run)
                )
            lane.skipped += 1
            self._emit(run)
        elif word == "won":
            if lane.missed is not None and _log.isEnabledFor(logging.WARNING):
                count = _count(cast(_Schedule, lane.grid), lane.missed, at, _COUNTED)
                number, first = f"{count}{' or more' * (count == _COUNTED)}", _iso(lane.missed)
                text = "job %r: %s ticks came due together, %s to %s: only the newest runs"
                _log.warning(text, lane.name, number, first, _iso(at))
            if lane.skipped:
                _log.warning("job %r runs again: %d ticks were skipped", lane.name, lane.skipped)
                lane.skipped = 0
        lane.missed = None
        lane.move(last if last > at else at)

    def _tell_end(self, lane: _Lane, run: _Live, outcome: _Outcome, state: State | None) -> None:
        if lane.held.get(run.place) is run:
            del lane.held[run.place]
        if state is not None and state is not _SCHEDULED:
            self._tell_run(run, state, outcome.reason if state is outcome.state else _Stop.CANCEL)
            self._ring_submitter(run.claim)
            return
        reason = outcome.reason if state is not None else outcome.reason or _Stop.LEASE
        run.state, run.reason, run.stop = _SCHEDULED, reason, None
        if state is None:
            _log.warning("%s: %s; its attempt %d does not count", run, reason, run.attempt, extra=_log_facts(run))
        elif outcome.again == "retry":
            text = "%s failed at attempt %d of %d: %s; retry in %s"
            most, pause = lane.spec.retries + 1, _span(outcome.delay)
            _log.warning(text, run, run.attempt, most, run.error, pause, extra=_log_facts(run))
        else:
            run.attempt -= outcome.again == "back"
            _log.info("%s handed back: %s", run, reason, extra=_log_facts(run))
        self._emit(run)
        if run._done is not None and lane.stored:
            run._done.set()  # whoever waits asks the store from now on

    def _tell_unstarted(self, lane: _Lane, key: _Key, claim: _Claim, state: State, reason: str) -> _Live:
        """The end of a run that nobody had."""
        run = claim.run or (self._handles.get(key) if isinstance(key, str) else None) or _Live(lane, key, claim, self)
        claim.run = None
        if run.state in _UNFINISHED:
            self._tell_run(run, state, reason)
        self._ring_submitter(claim)
        return run

    def _tell_run(self, run: _Live, state: State, reason: str | None) -> None:
        """A run's last change of state: told to the log, the hook and the waiters."""
        run.state, run.reason = state, reason
        if not run.lane.stored:
            self._past.append(run)
        if state is not _SUCCEEDED or _log.isEnabledFor(logging.INFO):
            _log_end(run)
        if run._exception is not None:
            run._exception.__traceback__ = None  # it has been logged, and would hold the job's variables
        self._emit(run)
        if run._done is not None:
            run._done.set()

    def _emit(self, run: _Live) -> None:
        if self._on_event is not None:
            try:
                self._on_event(run)
            except KeyboardInterrupt:
                raise
            except BaseException as bug:
                _log.error("%s: on_event failed: %s", run, _summary(bug), exc_info=bug)

    # The run

    def _start(self, lane: _Lane, key: _Key, claim: _Claim, asked: float) -> None:
        """Start a run that we claimed."""
        spec = lane.spec
        run = claim.run or (self._handles.get(key) if isinstance(key, str) else None)
        # A key may be another submission's by now; and an attempt whose lease was lost may still be ending here.
        if run is None or run.task is not None or run.claim.args != claim.args or run.state not in _UNFINISHED:
            run = _Live(lane, key, claim, self)
        run.lane, run.claim, run.leased, run.state = lane, claim, asked, _SCHEDULED
        claim.run = None  # the lane holds it now; a circle would wait for the garbage collector
        run.attempt, run.token = claim.tries, claim.token
        run.args, run.kwargs = _arguments(claim.args or "") if run.call else ((), spec.arguments())
        lane.held[key] = run
        # Its own claim, which is counted already, has yet to end.
        if claim.lost and _verdict(claim.tries - 1, claim.lost, spec.retries, spec.on_crash) == "fail":
            run.stop, run.attempt = _Stop.CRASH, claim.tries - 1
        if claim.cancel:
            self._end_unstarted(run, _Outcome(_CANCELLED, None, _Stop.CANCEL))
        elif self._closing or (lane.stored and self._fenced()):  # frozen since: it may run elsewhere by now
            why = _Stop.SHUTDOWN if self._closing else _Stop.LEASE
            self._end_unstarted(run, _Outcome(_SCHEDULED, None, why, "back", 0 if self._closing else _REST))
        else:
            late = self._now - claim.at - (self._lag if lane.wall else 0)
            if late > _LATE + spec.jitter and claim.tries == 1 and not run.call:
                _log.warning("%s starts %s late", run, _span(late), extra=_log_facts(run))
            self._create_task(run, spec)

    def _create_task(self, run: _Live, spec: _Spec) -> None:
        attempt = self._attempt(run, spec)
        try:
            task = self.loop.create_task(attempt, name=spec.name)
        except BaseException as error:  # a task factory of somebody else's
            attempt.close()
            run.error, run._exception = _summary(error), error
            self._end_unstarted(run, _Outcome(_FAILED, error))
            return
        run.task = task
        self._live[task] = run
        task.add_done_callback(self._end, context=self._context)

    async def _attempt(self, run: _Live, spec: _Spec) -> _Outcome:
        """One attempt; what it returns, its task's callback takes."""
        _current.set(run)
        if run.task is None:  # an eager one, which `_create_task` doesn't know yet
            run.task = asyncio.current_task()
        if run.stop is _Stop.CRASH:  # claimed only to be given up
            return await self._after_failure(run, _judge(run.stop, None, None))
        error: BaseException | None = None
        timer: asyncio.TimerHandle | None = None
        thread: asyncio.Task[_Answer] | None = None
        begun = self._mono()
        run._started = begun + self._offset - (self._lag / 1000 if run.lane.wall else 0)
        run.state, run._took = _RUNNING, None
        if _log.isEnabledFor(logging.DEBUG):
            _log.debug("%s starts, attempt %d", run, run.attempt, extra=_log_facts(run))
        self._emit(run)
        if spec.timeout is not None:
            timer = self.loop.call_later(spec.timeout / 1000, self._stop, run, _Stop.TIMEOUT)
        try:
            if spec.plan.direct:
                run._value = await cast("Awaitable[object]", spec.plan.function(*run.args, **run.kwargs))
            elif spec.plan.is_async or self._clock.virtual:
                run._value = await self._call(run, spec, _inline)
            else:
                thread = self.loop.create_task(self._call_in_thread(run, spec), name=f"{spec.name} thread")
                await self._outlast(run, thread, _Stop.TIMEOUT)
                run._value, error = thread.result() if thread.done() else (None, None)
        except BaseException as raised:
            if isinstance(raised, KeyboardInterrupt) or not _is_running(run.task):
                raise  # Ctrl-C, or the coroutine is being closed, with a closed loop or as garbage
            error = raised
        if timer is not None:
            timer.cancel()
        run._took = self._mono() - begun
        outcome = self._outcome(run, spec, error)
        if outcome.state is _FAILED:
            if thread is not None and not thread.done():
                limit = _span(spec.timeout or 0)
                _log.error("%s: no end within %s; its thread goes on, and keeps its slot", run, limit)
            outcome = await self._after_failure(run, outcome)
        if thread is not None:
            await self._outlast(run, thread)
        return outcome

    def _outcome(self, run: _Live, spec: _Spec, error: BaseException | None) -> _Outcome:
        """What the end of an attempt means; a thread was not stopped, so only a timeout and a cancel count."""
        stop = run.stop
        if stop is None and isinstance(error, asyncio.CancelledError) and run.task and run.task.cancelling():
            stop = _Stop.OUTSIDE
        if stop in (_Stop.SHUTDOWN, _Stop.LEASE) and not spec.plan.is_async:
            stop = None
        outcome = _judge(stop, error, spec.timeout)
        if outcome is _SUCCESS and run._value is not None:
            run._result, run._unkept = _packed(run._value)
            run._value = None if run._result is None else _loads(run._result)
        return outcome

    def _end(self, task: asyncio.Task[_Outcome]) -> None:
        """The end of an attempt, however it came: somebody may cancel a task before its first step."""
        run = self._live.pop(task, None)
        if run is None:  # given up at the end of a drain
            return
        spec, lane = run.lane.spec, run.lane
        if task.cancelled():
            outcome = _judge(run.stop or _Stop.OUTSIDE, asyncio.CancelledError(), spec.timeout)
        elif (error := task.exception()) is None:
            outcome = task.result()
            if outcome is _SUCCESS and run.stop is not None and spec.plan.is_async:  # stopped since it returned
                outcome = _judge(run.stop, None, spec.timeout)
        elif isinstance(error, KeyboardInterrupt):
            outcome = _Outcome(_CANCELLED, None, _Stop.SHUTDOWN)
        else:
            outcome = _Outcome(_FAILED, error)
        run.task = None
        if outcome.error is not None:
            run.error, run._exception = _summary(outcome.error), outcome.error
            if outcome.state is _CANCELLED:
                _log.error("%s failed while it was cancelled: %s", run, run.error, exc_info=outcome.error)
        if lane.stored and spec.on_crash == "rerun" and outcome.state is _CANCELLED and outcome.reason in _CUT:
            again: _Again = "lost" if outcome.reason == _Stop.OUTSIDE else "back"
            outcome = _Outcome(_SCHEDULED, None, outcome.reason, again, 0 if self._closing else _REST)
        lane.ends.append((run, outcome))
        if lane.stored:
            self._stir(lane)
        else:
            self._read_clocks()
            self._round_here(lane)

    def _end_unstarted(self, run: _Live, outcome: _Outcome) -> None:
        run.lane.ends.append((run, outcome))
        self._stir(run.lane)

    async def _call(self, run: _Live, spec: _Spec, plain: _Plain) -> object:
        """Call a function that needs dependencies, or a thread: `plain` runs what isn't async."""
        plan = spec.plan
        async with _clean_up(run) as stack:
            given = plan.signature.bind_partial(*run.args, **run.kwargs).arguments if plan.needs else ()
            resolver = _Resolver(stack, self._registry.overrides, plain, self._app)
            made = await resolver.fill(plan.needs, given)
            function = functools.partial(plan.function, *run.args, **run.kwargs, **made)
            value = function() if plan.is_async else await plain(function)
            return await value if inspect.isawaitable(value) else value

    async def _call_in_thread(self, run: _Live, spec: _Spec) -> _Answer:
        """A plain job's attempt: a task of its own, for a thread can't be cancelled, and outlives its timeout."""
        thread = _Thread(self.loop, spec.name, self._threads)
        try:
            return await self._call(run, spec, thread.call), None
        except BaseException as error:
            return None, error
        finally:
            thread.end()

    async def _outlast(self, run: _Live, thread: asyncio.Task[_Answer], until: _Stop | None = None) -> None:
        """Wait for a thread: were the wait to end at a cancellation, a second run would start beside it."""
        while not thread.done():
            try:
                await asyncio.wait({thread})
            except asyncio.CancelledError:
                if self._closed:
                    thread.cancel()
                    raise
                if run.stop is not None and run.stop is until:
                    return

    async def _after_failure(self, run: _Live, failed: _Outcome) -> _Outcome:
        """Another try, or the last word: `on_error`, in the attempt's own task and slot."""
        spec, error = run.lane.spec, cast(BaseException, failed.error)
        run.error, run._exception = _summary(error), error
        try:
            if _verdict(run.attempt, run.claim.lost, spec.retries, spec.on_crash) == "run" and spec.retryable(error):
                delay = spec.delay(run.attempt - run.claim.lost, error, f"{run.id} {run.attempt}")
                return _Outcome(_SCHEDULED, error, None, "retry", delay)
        except KeyboardInterrupt:
            raise
        except BaseException as bug:
            _log.error("%s: retry_on or retry_delay failed: %s", run, _summary(bug), exc_info=bug)
        if spec.on_error is not None:
            await self._hook(run, spec.on_error, error)
        return failed

    async def _hook(self, run: _Live, hook: OnError, error: BaseException) -> None:
        while run.task is not None and run.task.cancelling():
            run.task.uncancel()  # a timeout of ours is over; the hook's own timeouts and task groups look at this count
        call = functools.partial(hook, run, error)
        thread = _Thread(self.loop, f"{run.job} on_error", self._threads)
        here = inspect.iscoroutinefunction(hook) or self._clock.virtual
        try:
            async with asyncio.timeout((run.lane.spec.timeout or _HOOK_LIMIT) / 1000):
                value = call() if here else await thread.call(call)
                if inspect.isawaitable(value):
                    await value
        except KeyboardInterrupt:
            raise
        except BaseException as bug:
            _log.error("%s: on_error failed: %s", run, _summary(bug), exc_info=bug)
        finally:
            thread.end()

    def _stop(self, run: _Live, why: _Stop) -> None:
        """Stop an attempt: the reason first, then the signal; once, for its `finally` may be at work by then."""
        if run.task is not None and run.stop is None:
            run.stop = why
            if why is _Stop.CANCEL:
                run.reason = why
            run.task.cancel()

    # What users ask for

    async def submit(self, job: Job, payload: str, delay: int, at: int | None, key: str | None) -> _Live:
        """Submit a run of a job: the run, or with a key that is taken the one that has it."""
        what = f"job {job.name!r}: submit()"
        await self.ready(what)
        self._read_clocks()
        here = not self._shared or job._spec.after is not None
        lane = self._lanes.get(job.name)
        served = lane is not None and not lane.removed  # by this instance
        if self._closed or (here and self._closing):
            raise BgjobError(f"{what}: run() is stopping, and memory would lose the run")
        if here and not served:
            raise BgjobError(f"{what}: it isn't executed here; see jobs= and Registry.remove")
        lane = lane or _Lane(job.name, job._spec, 0, True, 0)
        id = self._new_id() if key is None else f"{job.name}#{key}"
        end = self._mono() + _PATIENCE
        while (due := await self._push(lane, id, payload, delay, at)) is None:
            known = await self.find(id)
            if known is not None and (known.state is not _RUNNING or known.reason != _Stop.CANCEL):
                return known
            if self._mono() > end:
                raise BgjobError(
                    f"{what}: the run with key={key!r} is cancelled, but not at its end; await its result()"
                )
            await asyncio.sleep(0.02)
        claim = _Claim(due, due)
        claim.args, claim.by = payload, None if here else self._me
        run = self._handles[id] = _Live(lane, id, claim, self)
        run.args, run.kwargs = _arguments(payload)
        if here:
            claim.run = run
            lane.rows.put(id, claim)
            if at is not None:
                lane.rows.instants.add(id)
        mine = served and (lane.room() > 0 or due > self._now)
        if mine:
            self._alarm(lane, due)
        if not here and (not mine or due > self._now):
            self._ring("")
        # SQLite answers without a pause, and a loop of submits must not keep everybody else from running.
        if self._mono() - self._yielded > _YIELD:
            await asyncio.sleep(0)
            self._yielded = self._mono()
        return run

    def _new_id(self) -> str:
        """A UUID of version 7 (RFC 9562): ids sort by submission, also within a millisecond."""
        self._last_id = max(self._now << 12, self._last_id + 1)
        ms, count = divmod(self._last_id, 1 << 12)
        text = f"{ms << 80 | 7 << 76 | count << 64 | 2 << 62 | self._entropy >> 2:032x}"
        return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))

    async def _push(self, lane: _Lane, id: str, payload: str, delay: int, at: int | None) -> int | None:
        """When a new call is due; None where its id is taken."""
        if lane.stored:
            call = Call(id, lane.name, at, delay, _body(args=payload, by=self._me))
            (due,) = await self._insist(f"job {lane.name!r}: submit()", lambda: self._store.push([call]))
            return due
        known = self._known(lane.name, id)
        if known is None or known.state in (_CANCELLED, _SKIPPED):
            return self._now + delay if at is None else at + self._lag
        return None

    def _known(self, job: str, key: _Key) -> _Live | None:
        """A run of this process: a call that is unfinished, or what memory remembers."""
        run = self._handles.get(key) if isinstance(key, str) else None
        if run is not None and (run.lane.stored or run.state in _UNFINISHED):
            return run
        found = (past for past in reversed(self._past) if past.place == key and (past.call or past.job == job))
        return next(found, None)

    async def cancel(self, run: _Live) -> bool:
        """Those of one job that come meanwhile go together: of a hot job each by itself would lose every race."""
        await self.ready(f"run {run.id!r}: cancel()")
        answer: asyncio.Future[bool] = self.loop.create_future()
        self._strikes.append((run, answer))
        async with self._striking:
            if not answer.done():
                going = [strike for strike in self._strikes if strike[0].job == run.job]
                self._strikes = [strike for strike in self._strikes if strike[0].job != run.job]
                try:
                    struck = await self._strike(run.job, {one.id: one for one, _ in going})
                except BaseException as error:
                    told = error if isinstance(error, StoreError) else BgjobError("cancel() was cut short")
                    for _, other in going:
                        other.set_exception(told)
                        other.exception()  # whoever asked may be gone
                    raise
                for one, other in going:
                    other.set_result(one.id in struck)
        return await answer

    async def cancel_all(self, job: Job) -> int:
        await self.ready(f"job {job.name!r}: cancel()")
        count, found = 0, 1000
        while found >= 1000:
            found = len(await self._strike(job.name, None))
            count += found
        return count

    async def _strike(self, job: str, runs: Mapping[str, _Live] | None) -> Collection[str]:
        """Cancel runs, or all of a job: the ids of those that were told to stop, or won't start."""

        async def strike() -> tuple[_Turn, dict[_Key, _Claim]]:
            while True:
                turn, waiting = await self._look_up(job, 1000 if runs is None else 0)
                if runs is not None and turn.lane.stored:
                    saved = [row for row in await self._store.find([*runs]) if row.state is _SCHEDULED]
                    waiting = {row.id: _claim_of(row.due or 0, row.body) for row in saved}
                keys = [*turn.book.claims] if runs is None else [_key_of(job, id) for id in runs]
                found = {key: claim for key in keys if (claim := turn.book.cancel(key)) is not None}
                found.update((key, claim) for key, claim in waiting.items() if runs is None or key in runs)
                turn.changed = bool(found)
                turn.rows = [(k, c, _CANCELLED, _Stop.CANCEL, None) for k, c in found.items() if c.owner is None]
                if not turn.lane.stored:
                    self._keep_here(turn)
                elif found and not await self._commit([turn]):
                    continue
                return turn, found

        turn, found = await self._insist(f"job {job!r}: cancel()", strike)
        lane = turn.lane
        struck = {_id_of(job, key): (key, claim) for key, claim in found.items()}
        for id, (key, claim) in struck.items():
            if claim.owner is not None and key in lane.held:
                self._stop(lane.held[key], _Stop.CANCEL)
            elif claim.owner is None:
                run = self._tell_unstarted(lane, key, claim, _CANCELLED, _Stop.CANCEL)
                asked = run if runs is None else runs[id]
                asked.state, asked.reason = run.state, run.reason
        if lane.stored and found:
            owners = {claim.owner for claim in found.values() if claim.owner is not None}
            self._ring(*owners, *([""] if turn.rows else []))
        elif found:
            self._stir(lane)
        return struck

    async def _look_up(self, job: str, rows: int) -> tuple[_Turn, dict[_Key, _Claim]]:
        """A job's book, in a turn, and waiting rows, due or not."""
        registered = self._registry.jobs.get(job)
        spec = _unknown() if registered is None else registered._spec
        lane = self._lanes.get(job) or _Lane(job, spec, 0, self._shared, 0)
        if not lane.stored:
            return _Turn(lane, lane.book), dict(lane.rows.waiting.items())
        asked = self._mono()
        now, alive, pages = await self._store.load({job: rows}, _CENTURY)
        self._heard(now, asked)
        book = _book_of(pages[job], alive)
        waiting: dict[_Key, _Claim] = {id: _claim_of(due, body) for id, due, body in pages[job].rows}
        return _Turn(lane, book, pages[job].version), waiting

    async def ended(self, run: _Live, timeout: float | None) -> None:
        """Return once a run is over, wherever it is executed; a hint may be lost, so it is asked for now and then."""
        await self.ready(f"run {run.id!r}: result()")
        done, delay = run._done or asyncio.Event(), 0.05
        run._done = done
        self._watched.add(run)
        try:
            async with asyncio.timeout(timeout):
                while run.state in _UNFINISHED:
                    done.clear()
                    if run.lane.stored and run.lane.held.get(run.place) is not run:
                        await self._ask_after(run)
                    if run.state in _UNFINISHED:
                        await _set_within(delay if run.lane.stored else None, done)
                    delay = min(delay * 1.5, 1.0)
        except TimeoutError:
            raise TimeoutError(f"run {run.id!r} has not ended within {timeout:g} s; it is {run.state}") from None
        finally:
            self._watched.discard(run)

    async def _ask_after(self, run: _Live) -> None:
        """Ask the store what became of a run that isn't executed here, or not now."""
        if self._closed:
            raise BgjobError(f"run {run.id!r} is {run.state}, and run() has stopped here")
        row = await self._insist(f"run {run.id!r}: result()", lambda: self._seen(run.id, run.job))
        if run.state not in _UNFINISHED or run.lane.held.get(run.place) is run:
            return  # it began here, or was told, while the store was asked
        if row is not None:
            _learn(run, row)
        elif run.state is _RUNNING and not run.call:
            run.state, run._unkept = _SUCCEEDED, "a tick that succeeds leaves no result in the store"
        else:
            raise BgjobError(f"run {run.id!r} is no longer kept: see the store's keep=")

    async def find(self, id: str) -> _Live | None:
        """The run with that id, here or in the store."""
        await self.ready("find()")
        job = id.partition("#")[0] if "#" in id else id.rpartition("@")[0]
        lane, key = self._lanes.get(job), _key_of(job, id)
        known = self._known(job, key)
        lane = known.lane if known is not None else lane
        if lane is not None and key in lane.held:
            return lane.held[key]
        if lane is not None and not lane.stored:
            claim = lane.book.claims.get(key)
            if claim is not None and claim.run is None:
                claim.run = _Live(lane, key, claim, self)
            return known if claim is None else claim.run
        row = await self._insist("find()", lambda: self._seen(id, job)) if self._shared else None
        if row is None:
            return None
        registered = self._registry.jobs.get(row.job)
        spec = _unknown() if registered is None else registered._spec
        run = known
        if run is None or run.state not in _UNFINISHED or run.claim.args != row.args:
            claim = _claim_of(row.due, _body(at=row.at, args=row.args))
            run = _Live(lane or _Lane(row.job, spec, 0, True, 0), _key_of(row.job, id), claim, self)
            run.args, run.kwargs = _arguments(row.args) if run.call else ((), spec.arguments())
        _learn(run, row)
        return run

    async def _seen(self, id: str, job: str) -> Row | None:
        """A run as the store has it."""
        for _ in range(2):
            saved = next(iter(await self._store.find([id])), None)
            if saved is not None and saved.state is not _RUNNING:
                return _row_of(saved)
            job = job if saved is None else saved.job
            turn, _ = await self._look_up(job, 0)
            claim = turn.book.claims.get(_key_of(job, id))
            if claim is not None:
                return _row_of_claim(job, _key_of(job, id), claim, _row_of(saved).args if saved else "")
        return None  # looked up twice, for it may have ended in between

    async def overview(self, n: int) -> Overview:
        return _overview(*await self._insist("status", lambda: self._store.overview(n)))

    async def _insist(self, what: str, verb: Callable[[], Awaitable[T]]) -> T:
        """The answer to a verb, or `StoreError` after some seconds; it is repeated meanwhile, as all of them may be."""
        end = self._mono() + _PATIENCE
        while True:
            try:
                async with asyncio.timeout(end - self._mono()):
                    return await verb()
            except (Unreachable, TimeoutError) as error:
                if end - self._mono() < 0.2:
                    why = str(error) or "no answer"
                    raise StoreError(f"{what}: the store is unreachable for {_PATIENCE:g} s: {why}") from error
            await asyncio.sleep(0.1)

    # With a store: its clock, hints, outages and the lease

    async def _join(self) -> None:
        opening = self.loop.create_task(self._store.open(self._me, self._hint))
        try:
            await asyncio.shield(opening)
            await self._beat()
        except Unreachable as error:
            self._went_down(error, self._mono())
        except BaseException:
            await asyncio.wait({opening})
            if not opening.cancelled() and opening.exception() is None:
                await self._store.close(None)
            raise
        self._keep_task("pump", self._pump)
        self._keep_task("keeper", self._keeper)
        self._look_everywhere()

    def _keep_task(self, name: str, duty: Callable[[], Coroutine[object, object, None]]) -> None:
        """Keep a task for a duty. Somebody who cancels all tasks of the loop may not end it: runs would hang."""

        def ended(task: asyncio.Task[None]) -> None:
            if not self._ending:
                self._keep_task(name, duty)

        task = self._tasks[name] = self.loop.create_task(duty(), name=f"bgjob {name}")
        task.add_done_callback(ended)

    async def _leave(self) -> None:
        """Tell the store all that has ended."""
        self._ending = True
        self._poked.set()
        self._reached.set()  # no back-off is waited for any more
        try:
            if self._down_since is None or self._unsettled():
                await asyncio.wait({self._tasks["pump"]}, timeout=_GRACE)
            if lost := self._unsettled():
                _log.error("store unreachable: %d results are lost with this process", lost)
            if self._down_since is None:
                with suppress(StoreError):
                    await self._store.ring(())
        finally:
            self._hint()
            if self._poll is not None:
                self._poll.cancel()
            tasks: list[asyncio.Task[Any]] = [*self._tasks.values(), *([self._beating] if self._beating else ())]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            held = self._down_since is not None or any(lane.held for lane in self._lanes.values() if lane.stored)
            await self._store.close(None if held else self._me)

    async def _pump(self) -> None:
        while not self._ending or self._unsettled():
            asked = self._mono()
            try:
                await self._poked.wait()
                asked = self._mono()
                self._poked.clear()
                if self._down_since is not None:
                    await self._beat()
                self._waited = max(self._waited, self._unsettled())
                while self._stirred:
                    await self._round([*itertools.islice(self._stirred, _AT_ONCE)])
                    # SQLite answers without a pause
                    await asyncio.sleep(_GATHER if self._lost_race else 0)
                if self._down_since is not None:
                    gone, self._down_since = self._mono() - self._down_since, None
                    _log.warning("store back after %s, %d results settled", _span(gone * 1000), self._waited)
                self._waited = 0
            except StoreError as error:
                self._went_down(error, asked)
                self._failures += 1
                top = min(_BACKOFF_FIRST << min(self._failures - 1, 10), _BACKOFF_LAST)
                delay = 200 if self._ending else top - _spread(f"{self._me} {self._failures}", top // 2)
                await _set_within(delay / 1000, self._reached)  # shorter where a beat has come through
            except Exception as bug:  # else one bug would stop every job for good
                _log.error("bgjob itself failed: %s", _summary(bug), exc_info=bug)
                await asyncio.sleep(1)

    def _unsettled(self) -> int:
        return sum(len(lane.ends) for lane in self._lanes.values() if lane.stored)

    def _went_down(self, error: StoreError, asked: float) -> None:
        if self._down_since is None:
            _log.warning("store unreachable: %s; retrying", error)
            self._down_since = self._mono()
        if self._beaten <= asked:  # no beat has come through since
            self._reached.clear()
        self._poked.set()

    def _hint(self) -> None:
        for run in self._watched:
            cast(asyncio.Event, run._done).set()  # whoever waits for the end of a run elsewhere asks for it
        self._look_everywhere()

    def _look_everywhere(self) -> None:
        """Hints may be lost, and instances die: then their runs are anybody's."""
        if self._poll is not None:
            self._poll.cancel()
            self._poll = None
        for lane in self._lanes.values():
            if lane.stored and not lane.removed and not self._closing:
                self._stir(lane)
        self._look_in_time()

    def _look_in_time(self) -> None:
        """The next look comes when the first of the others may be dead, and soon enough."""
        dies = min((until for owner, until in self._alive.items() if owner != self._me), default=_LAST)
        wait = max(0.05, min((dies + 1) / 1000 - self._offset - self._mono(), _POLL))
        if self._poll is not None and self._poll.when() > self._mono() + wait:
            self._poll.cancel()
            self._poll = None
        if self._poll is None:
            self._poll = self.loop.call_later(wait, self._look_everywhere)

    def _ring_submitter(self, claim: _Claim) -> None:
        if claim.by is not None and claim.by != self._me:
            self._ring(claim.by)

    def _ring(self, *owners: str) -> None:
        """Hint to these instances, "" is all: soon, for whoever submits a thousand runs rings seldom."""
        self._rings.update(owners)

        async def ring() -> None:
            while self._rings:
                await asyncio.sleep(_RING)
                owners, self._rings = self._rings - {self._me}, set()
                with suppress(StoreError):
                    await self._store.ring(() if "" in owners else owners)

        if "ring" not in self._tasks or self._tasks["ring"].done():
            self._tasks["ring"] = self.loop.create_task(ring(), name="bgjob ring")

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

    async def _keeper(self) -> None:
        while True:
            await asyncio.sleep(max(self._beaten + self._lease / _BEATS - self._mono(), self._lease / 30))
            with suppress(StoreError):
                await self._beat()

    def _fenced(self) -> bool:
        return self._mono() - self._beaten >= self._lease * _TRUST

    async def _beat(self) -> None:
        """Extend the lease of this instance; cut its runs where it can't be trusted any more.

        A beat goes on beyond that point, else it could never connect anew. One that begins beyond it is waited for
        first: a job has blocked this loop, and a thread may have beaten meanwhile.
        """
        beating = self._beating
        if beating is None or beating.done():
            beating = self._beating = self.loop.create_task(self._store.beat(), name="bgjob beat")
            beating.add_done_callback(lambda beat: beat.cancelled() or beat.exception())  # whoever waited may be gone
        asked, fence = self._mono(), self._beaten + self._lease * _TRUST - self._mono()
        await asyncio.wait({beating}, timeout=fence if fence > 0 else None)
        held = [lane for lane in self._lanes.values() if lane.stored and lane.held]
        if self._fenced() and (not beating.done() or beating.exception() is not None):
            for lane in held:
                for run in lane.held.values():
                    self._stop(run, _Stop.LEASE)
        await asyncio.wait({beating})
        try:
            beaten, late = beating.result()
        except StoreError as error:
            self._went_down(error, asked)
            raise
        self._reached.set()
        if late:  # what nobody took is still ours, once its book is saved anew: nobody takes it by what was read before
            self._late = beaten
            for lane in held:
                lane.doubted = beaten
                self._stir(lane)
        self._beaten = beaten


@functools.cache
def _unknown() -> _Spec:
    """Of a job that only the store knows."""
    return _Spec("unknown", _Plan(_inline), {})


def _text_of(spec: _Spec) -> str:
    return "" if spec.schedule is None else _meaning(spec.schedule)


def _some(runs: Collection[_Live]) -> str:
    """The names of a few runs."""
    names = [str(run) for run in itertools.islice(runs, 3)]
    return ", ".join(names) + (f" and {len(runs) - 3} more" if len(runs) > 3 else "")


def _is_running(task: asyncio.Task[Any] | None) -> bool:
    """Whether this is called by the task, and not because its coroutine is closed, as garbage or with its loop."""
    try:
        return asyncio.current_task() is task
    except RuntimeError:
        return False


def _learn(run: _Live, row: Row) -> None:
    """Write what the store knows on a handle."""
    run.state, run.attempt, run.token = row.state, row.tries, row.token
    run.error, run.reason = row.error, row.reason
    if row.since is not None:
        run._started = row.since / 1000
        run._took = None if row.finished is None else (row.finished - row.since) / 1000
    if row.state is _SUCCEEDED:
        run._value = None if row.result is None else _loads(row.result)
        run._unkept = row.unkept


# 9 Stores -------------------------------------------------------------------------------------------------------------
# They load and commit, and know no rule of the book. Statements stand on top of their store, with the default prefix.

_FORMAT = 2  # of tables and keys; 1 had no books
_LOG = 16 << 20  # bytes of SQLite's log that are cut off
_VERB_LIMIT = 4.0  # s that one verb may take, or a quarter of the lease: less than whoever submits waits
_REMEDIES = {  # by what a driver's error is called or says
    "unable to open": "its folder must exist and be writable",
    "MovedError|non local key": "it is a node of a cluster; write the URL of a single server",
}
_TLS_FILES = "[?&](?:sslrootcert|sslcert|sslkey|sslcrl|ssl_ca_certs|ssl_certfile|ssl_keyfile)=([^&]+)"  # in URLs


class _BaseStore(Store):
    """What all stores share: options, how they open, what they refuse, what the errors of a driver mean."""

    _needs: tuple[str, str]  # the driver's module, and the extra that installs it
    _schemes = ""  # of URLs
    _example = ""

    def __init__(self, source: Any, prefix: str, lease: Duration, keep: Duration) -> None:
        self._source = source
        self._place = f"{type(source).__module__}.{type(source).__name__}"
        if isinstance(source, str):
            self._place = _no_password(source).partition("?")[0]
        if isinstance(source, str) and re.match(self._schemes, source) is None:
            raise StoreError(f"{self._place!r}: write {self._example}")
        if re.fullmatch("[a-z][a-z0-9_]{0,29}", str(prefix)) is None:
            raise StoreError(f"prefix={prefix!r}: write up to 30 of a-z, 0-9 and _, a letter first")
        self.lease: int = _duration("lease", lease, 1000)
        self.keep: int = _duration("keep", keep, 1)
        if self.lease < 10_000:
            _log.warning("lease=%r is short: a process that pauses longer loses its runs; the default is 30s", lease)
        self._prefix = prefix
        self._limit = min(_VERB_LIMIT, self.lease / 4000)  # s
        self._beat_limit = min(self._limit, max(0.3, self.lease / 8000))  # one that hangs leaves time for the next
        self._driver: Any = None
        self._owner = ""  # the instance, while the store is open
        self._hint: Callable[[], None] = lambda: None
        self._begun = self._checked = False  # whether it has beaten; whether what is there can be used

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._place!r})"

    async def open(self, owner: str, hint: Callable[[], None]) -> None:
        if self._owner:
            raise BgjobError(f"{self!r} is in use: one run() or running() per store object; make another")
        self._owner, self._hint, self._begun, self._checked = owner, hint, False, False
        from urllib.parse import unquote

        module, extra = self._needs
        try:
            try:
                self._driver = importlib.import_module(module)
                for path in re.findall(_TLS_FILES, str(self._source)):
                    os.stat(unquote(path))  # drivers go on without it, or take it for an outage
            except ModuleNotFoundError as error:
                raise StoreError(f"this store needs {module}: pip install 'bgjob[{extra}]'") from error
            except OSError as error:
                raise StoreError(f"{self!r}: {error}") from None
            with suppress(Unreachable):  # an outage, at start too: the verbs try again
                await self._start()
        except BaseException:
            await self.close(None)
            raise

    async def _start(self) -> None:
        """Reach the store for the first time."""

    def _passes(self, error: BaseException) -> bool | None:
        """Whether what an error of the driver tells passes by itself; None where it is no error of the driver."""

    def _meaning(self, error: BaseException) -> BaseException:
        """What is raised for an error: an outage, that what was asked is refused, or itself if it is no driver's."""
        passes = self._passes(error)
        if passes is None:
            return error
        text = _no_password(str(error).partition("\n")[0]) or f"no answer within {self._limit:g} s"
        remedies = [remedy for sign, remedy in _REMEDIES.items() if re.search(sign, f"{type(error).__name__}: {text}")]
        passes = passes and "certificate" not in text.lower()
        return (Unreachable if passes else StoreError)("; ".join([f"{self!r}: {text}", *remedies]))

    def _check_format(self, found: object) -> None:
        if found != _FORMAT:
            what = f"what is there has format {found}, this bgjob has {_FORMAT}"
            remedy = f"let its runs end with the bgjob that made it, then drop it, or write prefix={self._prefix}2"
            raise StoreError(f"{self!r}: {what}; {remedy}")

    def _heard(self, text: str) -> None:
        """Pass on what was rung: who rings, then for whom; nobody named is everybody."""
        names = text.split()
        if self._owner in names[1:] or (len(names) < 2 and self._owner not in names):
            self._hint()


class _SQLStore(_BaseStore):
    """What is asked in the same way of SQLite and PostgreSQL."""

    async def _rows(self, statement: str, *arguments: object) -> list[Any]:
        raise NotImplementedError

    async def _saved(self, statement: str, argument: object) -> list[Saved]:
        return [Saved._make((*row[:2], State(row[2]), *row[3:])) for row in await self._rows(statement, argument)]

    async def find(self, ids: Sequence[str]) -> Sequence[Saved]:
        return await self._saved("find", _dumps([*ids]))

    async def overview(self, n: int) -> tuple[int, Mapping[str, int], Mapping[str, str], Sequence[Saved]]:
        books = dict(await self._rows("books"))
        rows = [*await self._saved("next", n), *await self._saved("failed", n)]
        now, alive, _ = await self.load({"": 0})
        return now, alive, books, rows


_ROWS = "SELECT id, job, state, due, expires, body FROM bgjob_run"
_SQL = {  # $1 is ? in SQLite
    "format": "SELECT max(number) FROM bgjob_format",
    "books": "SELECT name, book FROM bgjob_job",
    "next": f"{_ROWS} WHERE due IS NOT NULL ORDER BY due LIMIT $1",
    "failed": f"{_ROWS} WHERE state = 'failed' AND expires IS NOT NULL ORDER BY expires DESC LIMIT $1",
}
_SQLITE = {name: sql.replace("$1", "?") for name, sql in _SQL.items()} | {
    "schema": f"""CREATE TABLE bgjob_format(number INTEGER NOT NULL);
        INSERT INTO bgjob_format VALUES({_FORMAT});
        CREATE TABLE bgjob_job(name TEXT PRIMARY KEY, version INTEGER NOT NULL, book TEXT NOT NULL) WITHOUT ROWID;
        CREATE TABLE bgjob_run(id TEXT PRIMARY KEY, job TEXT NOT NULL, state TEXT NOT NULL, due INTEGER,
          expires INTEGER, body TEXT NOT NULL);
        CREATE INDEX bgjob_due ON bgjob_run(job, due, id) WHERE due IS NOT NULL;
        CREATE INDEX bgjob_ended ON bgjob_run(expires) WHERE expires IS NOT NULL;
        CREATE TABLE bgjob_instance(owner TEXT PRIMARY KEY, until INTEGER NOT NULL, port INTEGER)""",
    "tables": "SELECT sum(name = 'bgjob_format'), sum(name = 'bgjob_run') FROM sqlite_master",
    "begin": "BEGIN IMMEDIATE",
    "load": """SELECT j.value, ifnull(b.version, 0), ifnull(b.book, ''),
        (SELECT r.due FROM bgjob_run r WHERE r.job = j.value AND r.due IS NOT NULL ORDER BY r.due LIMIT 1)
        FROM json_each(?) j LEFT JOIN bgjob_job b ON b.name = j.value""",
    "due": "SELECT id, due, body FROM bgjob_run WHERE job = ? AND due <= ? ORDER BY due, id LIMIT ?",
    "later": "SELECT min(due) FROM bgjob_run WHERE job = ? AND due > ?",
    "alive": "SELECT owner, until FROM bgjob_instance WHERE until > ?",
    "commit": """INSERT INTO bgjob_job(name, version, book) VALUES(?, ? + 1, ?) ON CONFLICT(name)
        DO UPDATE SET version = version + 1, book = excluded.book WHERE version = ?""",
    "save": "INSERT OR REPLACE INTO bgjob_run(id, job, state, due, expires, body) VALUES(?, ?, ?, ?, ?, ?)",
    "push": """INSERT INTO bgjob_run(id, job, state, due, body) VALUES(?, ?, 'scheduled', ?, ?) ON CONFLICT(id)
        DO UPDATE SET state = excluded.state, due = excluded.due, expires = NULL, body = excluded.body
        WHERE state IN ('cancelled', 'skipped') OR expires <= ?""",
    "prune": "DELETE FROM bgjob_run WHERE id IN (SELECT id FROM bgjob_run WHERE expires <= ? ORDER BY expires LIMIT ?)",
    "find": f"{_ROWS} WHERE id IN (SELECT value FROM json_each(?))",
    "until": "SELECT until FROM bgjob_instance WHERE owner = ?",
    "beat": "INSERT OR REPLACE INTO bgjob_instance(owner, until, port) VALUES(?, ?, ?)",
    "gone": "DELETE FROM bgjob_instance WHERE owner = ? OR until < ?",
    "ports": "SELECT owner, port FROM bgjob_instance WHERE until > ? AND port IS NOT NULL",
}


class SQLiteStore(_SQLStore):
    """A file that the processes of one machine share. Not for network drives, whose locks can't be relied on.

    Transactions take some 30 µs, a third of a change of threads, so they run in the event loop. What can take long
    doesn't: a lock is waited for by sleeping; a thread makes checkpoints, and beats where a job blocks the loop.

    Args:
        path: the file, made on first use. Its folder must exist.
        prefix: of the names of tables, or keys: two applications can share a database. Default: "bgjob".
        lease: how long the runs of an instance that died stay its own; 10 s or more is wise. Default: 30 s.
        keep: how long ends and results are kept, and keys taken. Default: a day.

    Raises:
        StoreError: the prefix is wrong; from `run()`: the file can't be opened, written or is no database.
        ScheduleError: a duration is wrong.
    """

    _needs = "sqlite3", "sqlite"

    def __init__(
        self, path: str | os.PathLike[str], *, prefix: str = "bgjob", lease: Duration = "30s", keep: Duration = "1d"
    ) -> None:
        self.path: str = os.fspath(path)
        # Whatever folder the process goes to. What SQLite keeps in memory is no file, and is refused.
        super().__init__(self.path if self.path == ":memory:" else os.path.abspath(self.path), prefix, lease, keep)
        self._place = self.path
        self._sql = {name: sql.replace("bgjob_", f"{prefix}_") for name, sql in _SQLITE.items()}
        self._db: sqlite3.Connection | None = None
        self._identity: object = None  # of the file that is open
        self._time: Callable[[], float] = lambda: 0.0
        self._bell: asyncio.DatagramTransport | None = None
        self._thread: threading.Thread | None = None
        self._stir = threading.Event()
        self._asked = 0
        self._beaten = -math.inf  # when the last beat was asked for
        self._late = False

    async def _start(self) -> None:
        loop = asyncio.get_running_loop()
        self._time, self._beaten, self._late = loop.time, -math.inf, False
        with suppress(OSError):  # a machine without IPv4: then the other instances poll
            self._bell, _ = await loop.create_datagram_endpoint(
                lambda: _Bell(self._owner.encode(), self._hint), local_addr=("127.0.0.1", 0)
            )
        self._thread = threading.Thread(target=self._guard, args=(self._owner,), name="bgjob sqlite", daemon=True)
        self._thread.start()
        await self._execute("format")

    async def close(self, owner: str | None) -> None:
        me, self._owner = self._owner, ""
        self._stir.set()
        if self._bell is not None:
            self._bell.close()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, _GRACE)
        if self._db is not None and owner is not None:
            with suppress(StoreError):
                await self._execute("gone", me, _wall_ms() - 10 * self.lease)
        if self._db is not None:  # it may have been deleted
            self._db.close()
        self._db = self._bell = self._thread = None

    def _passes(self, error: BaseException) -> bool | None:
        lite = self._driver
        if not isinstance(error, (lite.Error, OverflowError, UnicodeError)):
            return None
        return getattr(error, "sqlite_errorcode", 0) & 0xFF in (lite.SQLITE_BUSY, lite.SQLITE_FULL, lite.SQLITE_IOERR)

    def _connect(self) -> sqlite3.Connection:
        """The open file; it is opened and its tables are made where that isn't done yet."""
        if self._db is not None:
            if self._identify() == self._identity:
                return self._db
            self._db.close()
            self._db = None
            raise Unreachable(f"{self!r}: the file was {'replaced' if self._identify() else 'deleted'}; begun anew")
        db = self._driver.connect(self._source, timeout=0, isolation_level=None, cached_statements=64)
        try:
            (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
            if mode != "wal":
                raise StoreError(f"{self!r}: no write-ahead log is possible there (journal_mode is {mode!r})")
            for statement in ("PRAGMA synchronous = NORMAL", "PRAGMA wal_autocheckpoint = 0", "BEGIN IMMEDIATE"):
                db.execute(statement)
            formats, runs = db.execute(self._sql["tables"]).fetchone()
            if not formats and not runs:
                for statement in self._sql["schema"].split(";"):
                    db.execute(statement)
            self._check_format(1 if runs and not formats else db.execute(self._sql["format"]).fetchone()[0])
            db.execute("COMMIT")
        except BaseException:
            db.close()
            raise
        self._db, self._identity = db, self._identify()
        return cast("sqlite3.Connection", db)

    def _identify(self) -> object:
        try:
            found = os.stat(self._source)
        except OSError:
            return None
        return found.st_dev, found.st_ino

    async def _execute(self, statement: str, *arguments: object) -> sqlite3.Cursor:
        """Execute, and where the file is locked try again: sleeping, for SQLite's own waiting would block the loop."""
        self._asked += 1
        if self._asked % 500 == 0:
            self._stir.set()  # now and then the log is moved into the file
        end, pause = self._time() + self._limit, 0.001
        while True:
            try:
                return self._connect().execute(self._sql[statement], arguments)
            except Exception as error:
                busy = getattr(error, "sqlite_errorcode", 0) & 0xFF == self._driver.SQLITE_BUSY
                if not busy or self._time() > end:
                    raise self._meaning(error) from None
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, 0.05)

    async def _rows(self, statement: str, *arguments: object) -> list[Any]:
        return (await self._execute(statement, *arguments)).fetchall()

    @asynccontextmanager
    async def _transaction(self) -> AsyncGenerator[sqlite3.Connection, None]:
        """What stands in it must not await: the connection is everybody's."""
        db = (await self._execute("begin")).connection
        try:
            yield db
            db.execute("COMMIT")
        except BaseException as error:
            with suppress(self._driver.Error):  # a full disk has rolled it back already
                db.execute("ROLLBACK")
            raise self._meaning(error) from None

    def _guard(self, owner: str) -> None:
        """The thread: checkpoints, and beats where the loop is late with them."""
        while self._owner == owner:
            self._stir.wait(self.lease / 6000)
            self._stir.clear()
            if self._db is None or self._identify() != self._identity:
                continue
            # A lock, a full disk: the loop meets it too, and says so.
            with suppress(Exception), closing(self._driver.connect(self._source, timeout=self._limit)) as db:
                db.isolation_level = None
                if -math.inf < self._beaten < self._time() - self.lease / 2000 and self._owner == owner:
                    db.execute("BEGIN IMMEDIATE")
                    self._beat_by(db, owner)
                    db.execute("COMMIT")
                # A passive one never blocks, but ends only where nobody writes: a log that has grown is cut off. With
                # a timeout that would hold the write lock while it waits for readers.
                large = os.path.getsize(f"{self._source}-wal") > _LOG
                db.execute("PRAGMA busy_timeout = 0")
                db.execute(f"PRAGMA wal_checkpoint({'TRUNCATE' if large else 'PASSIVE'})")

    def _beat_by(self, db: sqlite3.Connection, owner: str) -> None:
        asked, now = self._time(), _wall_ms()
        row = db.execute(self._sql["until"], (owner,)).fetchone()
        port = None if self._bell is None else self._bell.get_extra_info("sockname")[1]
        db.execute(self._sql["beat"], (owner, now + self.lease, port))
        self._late |= self._beaten > -math.inf and (row is None or row[0] <= now)
        self._beaten = asked

    async def beat(self) -> tuple[float, bool]:
        async with self._transaction() as db:
            self._beat_by(db, self._owner)
        late, self._late = self._late, False
        return self._beaten, late

    async def ring(self, owners: Collection[str]) -> None:
        if self._bell is not None:
            for owner, port in await self._rows("ports", _wall_ms()):
                if owner in owners or (not owners and owner != self._owner):
                    self._bell.sendto(owner.encode(), ("127.0.0.1", port))

    async def load(self, jobs: Mapping[str, int], ahead: int = 0) -> tuple[int, Mapping[str, int], Mapping[str, Page]]:
        now = _wall_ms()
        upto, pages = now + ahead, dict[str, Page]()
        for job, version, book, first in await self._rows("load", _dumps([*jobs])):
            rows, later = list[Any](), first
            if first is not None and first <= upto:
                rows = await self._rows("due", job, upto, jobs[job]) if jobs[job] else rows
                ((later,),) = await self._rows("later", job, upto)
            pages[job] = Page(version, book, rows, later)
        return now, dict(await self._rows("alive", now)), pages

    async def commit(self, changes: Sequence[Change]) -> Collection[str]:
        async with self._transaction() as db:
            took = {
                c.job
                for c in changes
                if db.execute(self._sql["commit"], (c.job, c.version, c.book, c.version)).rowcount
            }
            rows = [row for c in changes if c.job in took for row in c.rows]
            if rows:
                db.executemany(self._sql["save"], rows)
                db.execute(self._sql["prune"], (_wall_ms(), 2 * len(rows)))
        return took

    async def push(self, calls: Sequence[Call]) -> Sequence[int | None]:
        now, dues = _wall_ms(), list[int | None]()
        for id, job, at, delay, body in calls:  # each a transaction by itself, which saves a fifth
            due = now + delay if at is None else at
            dues.append(due if (await self._execute("push", id, job, due, body, now)).rowcount else None)
        return dues


class _Bell(asyncio.DatagramProtocol):
    """Where other processes of the machine can ring: the text is our name, which they have from the file."""

    def __init__(self, name: bytes, hint: Callable[[], None]) -> None:
        self._name = name
        self._hint = hint

    def datagram_received(self, data: bytes, addr: object) -> None:
        if data == self._name:
            self._hint()


# KEYS: books (HASH job -> "version book"), instances and failed (ZSETs); ARGV[1] is what all other keys begin with.
_REDIS_NOW = "local t = redis.call('TIME') local now = t[1] * 1000 + math.floor(t[2] / 1000) local p = ARGV[1] "
_REDIS = {
    "load": f"""{_REDIS_NOW}
local upto, out = now + ARGV[2], {{}}
for i = 3, #ARGV, 2 do
  local due, rows = p .. 'due:' .. ARGV[i], {{}}
  local found = redis.call('ZRANGEBYSCORE', due, '-inf', upto, 'WITHSCORES', 'LIMIT', 0, ARGV[i + 1])
  for k = 1, #found, 2 do
    local row = redis.call('GET', p .. 'run:' .. found[k])
    if row then rows[#rows + 1] = {{found[k], found[k + 1], row}} end
  end
  local after = '(' .. string.format('%.0f', upto)
  local later = redis.call('ZRANGEBYSCORE', due, after, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
  out[#out + 1] = {{redis.call('HGET', KEYS[1], ARGV[i]), rows, later[2]}}
end
local alive = redis.call('ZRANGEBYSCORE', KEYS[2], '(' .. string.format('%.0f', now), '+inf', 'WITHSCORES')
return {{now, alive, out}}""",
    # of each change: job, version, book, number of rows; of each row: id, state, due, expires, body
    "commit": f"""{_REDIS_NOW}
local took, i = {{}}, 2
while i <= #ARGV do
  local job, version, n = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 3])
  local old = redis.call('HGET', KEYS[1], job)
  local same = (old and string.match(old, '^%d+') or '0') == version
  if same then
    took[#took + 1] = job
    redis.call('HSET', KEYS[1], job, string.format('%.0f', version + 1) .. ' ' .. ARGV[i + 2])
  end
  i = i + 4
  for _ = 1, n do
    if same then
      local id, state, due, expires = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
      local key = p .. 'run:' .. id
      local row = state .. ' ' .. due .. ' ' .. expires .. '\\n' .. job .. '\\n' .. ARGV[i + 4]
      if due == '' then redis.call('ZREM', p .. 'due:' .. job, id)
      else redis.call('ZADD', p .. 'due:' .. job, due, id) end
      if expires == '' then redis.call('SET', key, row)
      else redis.call('SET', key, row, 'PX', math.max(1, expires - now)) end
      if state == 'failed' then
        redis.call('ZADD', KEYS[3], expires, id)
        redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now)
      end
    end
    i = i + 5
  end
end
return took""",
    "push": f"""{_REDIS_NOW}
local out = {{}}
for i = 2, #ARGV, 5 do
  local id, job, due = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local old = redis.call('GET', p .. 'run:' .. id)
  if old and not string.find(old, '^cancelled') and not string.find(old, '^skipped') then out[#out + 1] = -1
  else
    if due == '' then due = string.format('%.0f', now + ARGV[i + 3]) end
    redis.call('SET', p .. 'run:' .. id, 'scheduled ' .. due .. ' \\n' .. job .. '\\n' .. ARGV[i + 4])
    redis.call('ZADD', p .. 'due:' .. job, due, id)
    redis.call('HSETNX', KEYS[1], job, '0 ')
    out[#out + 1] = tonumber(due)
  end
end
return out""",
    "beat": f"""{_REDIS_NOW}
local old = redis.call('ZSCORE', KEYS[2], ARGV[2])
redis.call('ZADD', KEYS[2], string.format('%.0f', now + ARGV[3]), ARGV[2])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', string.format('%.0f', now - 10 * ARGV[3]))
return (old and tonumber(old) > now) and 0 or 1""",
    # the format that is there; the first who comes writes it
    "format": """if redis.call('EXISTS', ARGV[1] .. 'tick') == 1 then return '1' end
redis.call('SET', ARGV[1] .. 'format', ARGV[2], 'NX')
return redis.call('GET', ARGV[1] .. 'format')""",
}
# What a server says while it loads, fails over, is full, has a slow script or forgot ours: all of that passes.
_REDIS_PASSING = r"\b(LOADING|BUSY|READONLY|MASTERDOWN|OOM|MISCONF|NOREPLICAS|CLUSTERDOWN|TRYAGAIN|matching script)\b"


class RedisStore(_BaseStore):
    """A Redis server, 5 or later, that the processes of many machines share; its clock decides.

    It must not evict (`maxmemory-policy noeviction`), and forgets at a restart what it has not saved: `appendonly yes`.
    An asynchronous failover can lose the last writes.

    Args:
        url_or_client: "redis://:password@host:6379/0", rediss:// or unix:// and whatever redis-py takes in a URL; or a
            ready `redis.asyncio.Redis`, which is not closed.
        prefix, lease, keep: as for `SQLiteStore`.

    Raises:
        StoreError, ScheduleError: as `SQLiteStore`; from `run()` also: the driver is missing, the server isn't trusted,
            refuses (password, database, rights), evicts, or is a node of a cluster.
    """

    _needs = "redis.asyncio", "redis"
    _schemes = "(rediss?|unix)://"
    _example = "redis://host:6379/0, rediss:// or unix:///path"

    def __init__(
        self, url_or_client: Any, *, prefix: str = "bgjob", lease: Duration = "30s", keep: Duration = "1d"
    ) -> None:
        super().__init__(url_or_client, prefix, lease, keep)
        if re.match(r"rediss?://[^/]*/(?!\d*$)", self._place):
            what = "after the host comes the number of a database, as in redis://host:6379/0"
            raise StoreError(f"{self._place!r}: {what}")
        self._key = f"{{{prefix}}}:"
        self._db: Any = None
        self._scripts: dict[str, Any] = {}
        self._ears: asyncio.Task[None] | None = None

    async def _start(self) -> None:
        # One repeat, for a pooled connection that died meanwhile: commits are conditional, so it does no harm.
        none = importlib.import_module("redis.backoff").NoBackoff()
        retry = importlib.import_module("redis.asyncio.retry").Retry(none, 1)
        try:
            ready = not isinstance(self._source, str)
            self._db = self._source if ready else self._driver.Redis.from_url(self._source, retry=retry)
        except (ValueError, TypeError, OSError):
            raise StoreError(f"{self!r}: not a URL that redis-py can read; is the password percent-encoded?") from None
        if not isinstance(self._db, self._driver.Redis):
            raise StoreError(f"{self!r}: pass a URL or a redis.asyncio.Redis")
        self._scripts = {name: self._db.register_script(text) for name, text in _REDIS.items()}
        await self._check()

    async def close(self, owner: str | None) -> None:
        while self._ears is not None and not self._ears.done():  # redis-py swallows a cancellation while it connects
            self._ears.cancel()
            await asyncio.wait({self._ears}, timeout=0.1)
        if self._db is not None:
            if owner is not None:
                with suppress(StoreError):
                    await self._ask(self._db.zrem(f"{self._key}instances", owner))
            if isinstance(self._source, str):
                await self._db.aclose()
        self._owner, self._db, self._ears = "", None, None

    async def _check(self) -> None:
        """Whether the server keeps what it is given, and what is there can be read. If so it is listened to."""
        self._check_format(int(await self._run("format", _FORMAT)))
        await self.ring([self._owner])  # whether it may
        facts: dict[str, Any] = {}
        try:
            facts = await self._ask(self._db.info())
        except Unreachable:
            raise
        except StoreError as error:
            _log.warning("%s; whether the server evicts (maxmemory-policy) can't be seen", error)
        policy = facts.get("maxmemory_policy", "noeviction")
        if policy != "noeviction" and facts.get("maxmemory"):
            raise StoreError(f"{self!r}: it deletes runs to free memory ({policy}); set maxmemory-policy noeviction")
        if facts.get("aof_enabled") == 0:
            _log.warning("%r: a restart of Redis forgets runs; set appendonly yes", self)
        self._checked = True
        if self._ears is None:
            self._ears = asyncio.get_running_loop().create_task(self._listen(), name="bgjob redis")

    def _passes(self, error: BaseException) -> bool | None:
        known = self._driver
        if not isinstance(error, (known.RedisError, OSError, TypeError)):  # a TypeError tells of a URL's unknown option
            return None
        way = isinstance(error, (known.ConnectionError, known.TimeoutError, OSError))
        final = isinstance(error, known.AuthenticationError)
        return not final and (way or re.search(_REDIS_PASSING, str(error)) is not None)

    async def _ask(self, asked: Awaitable[Any], limit: float = math.inf) -> Any:
        try:
            async with asyncio.timeout(min(limit, self._limit)):
                return _decoded(await asked)
        except Exception as error:
            raise self._meaning(error) from None

    async def _run(self, script: str, *arguments: object) -> Any:
        if not self._checked and script != "format":
            await self._check()
        keys = [f"{self._key}{name}" for name in ("books", "instances", "failed")]
        limit = self._beat_limit if script == "beat" else self._limit
        return await self._ask(self._scripts[script](keys, [self._key, *arguments]), limit)

    async def _listen(self) -> None:
        """Be woken, for ever; without it the engine looks every now and then."""
        while True:
            try:
                async with self._db.pubsub(ignore_subscribe_messages=True) as ears:
                    await ears.subscribe(f"{self._key}wake")
                    self._hint()
                    async for heard in ears.listen():
                        self._heard(_decoded(heard["data"]))
            except (self._driver.RedisError, OSError):
                self._hint()  # the verbs meet it too, and say so
                await asyncio.sleep(1)

    async def ring(self, owners: Collection[str]) -> None:
        await self._ask(self._db.publish(f"{self._key}wake", " ".join([self._owner, *owners])))

    async def beat(self) -> tuple[float, bool]:
        asked, begun = asyncio.get_running_loop().time(), self._begun
        late = await self._run("beat", self._owner, self.lease)
        self._begun = True
        return asked, bool(late) and begun

    async def load(self, jobs: Mapping[str, int], ahead: int = 0) -> tuple[int, Mapping[str, int], Mapping[str, Page]]:
        now, alive, found = await self._run("load", ahead, *itertools.chain.from_iterable(jobs.items()))
        pages = dict[str, Page]()
        for job, (text, rows, *later) in zip(jobs, found, strict=True):
            version, _, book = (text or "0 ").partition(" ")
            due = [(id, int(at), body.split("\n", 2)[2]) for id, at, body in rows]
            pages[job] = Page(int(version), book, due, int(later[0]) if later else None)
        return now, {name: int(until) for name, until in zip(alive[::2], alive[1::2], strict=True)}, pages

    async def commit(self, changes: Sequence[Change]) -> Collection[str]:
        arguments = list[object]()
        for c in changes:
            arguments += (c.job, c.version, c.book, len(c.rows))
            for r in c.rows:
                arguments += (r.id, str(r.state), "" if r.due is None else r.due, r.expires or "", r.body)
        return cast("list[str]", await self._run("commit", *arguments))

    async def push(self, calls: Sequence[Call]) -> Sequence[int | None]:
        rows = [(c.id, c.job, "" if c.due is None else c.due, c.delay, c.body) for c in calls]
        found = await self._run("push", *itertools.chain.from_iterable(rows))
        return [None if due < 0 else due for due in found]

    async def find(self, ids: Sequence[str]) -> Sequence[Saved]:
        keys, rows = [f"{self._key}run:{id}" for id in ids], list[Saved]()
        found: list[Any] = await self._ask(self._db.mget(keys)) if keys else []
        for id, text in zip(ids, found, strict=True):
            if text:
                head, job, body = text.split("\n", 2)
                state, due, expires = head.split(" ")
                rows.append(Saved(id, job, State(state), int(due or 0) or None, int(expires or 0) or None, body))
        return rows

    async def overview(self, n: int) -> tuple[int, Mapping[str, int], Mapping[str, str], Sequence[Saved]]:
        found = await self._ask(self._db.hkeys(f"{self._key}books"))
        ended = await self.find(await self._ask(self._db.zrevrange(f"{self._key}failed", 0, n - 1)))
        now, alive, pages = await self.load(dict.fromkeys(found, n), _CENTURY)
        books = {job: page.book for job, page in pages.items() if page.book}
        rows = [Saved(i, job, _SCHEDULED, due, None, body) for job, page in pages.items() for i, due, body in page.rows]
        return now, alive, books, [*sorted(rows, key=lambda row: row.due or 0)[:n], *ended]


def _decoded(answer: Any) -> Any:
    """An answer of redis-py as text, whether the client decodes or not."""
    if isinstance(cast(object, answer), list):
        return [_decoded(part) for part in answer]
    return answer.decode() if isinstance(answer, bytes) else answer


_POSTGRES_NOW = "floor(extract(epoch FROM statement_timestamp()) * 1000)::bigint"  # a constant, so indexes serve it
# Each verb is one statement: no transaction stays open, and a pooler may stand between.
_POSTGRES = _SQL | {
    "schema": f"""CREATE TABLE IF NOT EXISTS bgjob_format(number INTEGER NOT NULL);
        INSERT INTO bgjob_format SELECT {_FORMAT} WHERE NOT EXISTS (SELECT 1 FROM bgjob_format);
        CREATE TABLE IF NOT EXISTS bgjob_job(name TEXT PRIMARY KEY, version BIGINT NOT NULL, book TEXT NOT NULL)
          WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.02);
        CREATE TABLE IF NOT EXISTS bgjob_run(id TEXT PRIMARY KEY, job TEXT NOT NULL, state TEXT NOT NULL, due BIGINT,
          expires BIGINT, body TEXT NOT NULL) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02);
        CREATE INDEX IF NOT EXISTS bgjob_due ON bgjob_run(job, due, id) WHERE due IS NOT NULL;
        CREATE INDEX IF NOT EXISTS bgjob_ended ON bgjob_run(expires) WHERE expires IS NOT NULL;
        CREATE TABLE IF NOT EXISTS bgjob_instance(owner TEXT PRIMARY KEY, until BIGINT NOT NULL)""",
    "tables": "SELECT pg_backend_pid(), to_regclass('bgjob_format') IS NOT NULL, to_regclass('bgjob_run') IS NOT NULL",
    "rights": """SELECT t, r FROM unnest(ARRAY['bgjob_job', 'bgjob_run', 'bgjob_instance']) t,
        unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) r WHERE NOT has_table_privilege(t, r)""",
    "load": f"""SELECT {_POSTGRES_NOW}, (SELECT coalesce(json_object_agg(owner, until), '{{}}')
            FROM bgjob_instance WHERE until > {_POSTGRES_NOW})::text, j.version, j.book,
        CASE WHEN w.n > 0 THEN (SELECT json_agg(json_build_array(x.id, x.due, x.body)) FROM (
            SELECT r.id, r.due, r.body FROM bgjob_run r WHERE r.job = w.job AND r.due <= {_POSTGRES_NOW} + $3::bigint
            ORDER BY r.due, r.id LIMIT w.n) x)::text END,
        (SELECT min(r.due) FROM bgjob_run r WHERE r.job = w.job AND r.due > {_POSTGRES_NOW} + $3::bigint)
        FROM unnest($1::text[], $2::int[]) WITH ORDINALITY w(job, n, o) LEFT JOIN bgjob_job j ON j.name = w.job
        ORDER BY w.o""",
    "commit": """WITH c AS MATERIALIZED (SELECT * FROM unnest($1::text[], $2::bigint[], $3::text[])
            AS c(job, version, book)),
        new AS (INSERT INTO bgjob_job(name, version, book) SELECT job, 1, book FROM c WHERE version = 0 ORDER BY job
            ON CONFLICT DO NOTHING RETURNING name),
        held AS MATERIALIZED (SELECT j.name FROM c JOIN bgjob_job j ON j.name = c.job AND j.version = c.version
            ORDER BY j.name FOR NO KEY UPDATE OF j),
        old AS (UPDATE bgjob_job j SET version = c.version + 1, book = c.book FROM c
            WHERE j.name = c.job AND j.version = c.version AND j.name = ANY(ARRAY(SELECT name FROM held))
            RETURNING j.name),
        took AS MATERIALIZED (SELECT name FROM new UNION ALL SELECT name FROM old),
        saved AS (INSERT INTO bgjob_run(id, job, state, due, expires, body)
            SELECT r.* FROM unnest($4::text[], $5::text[], $6::text[], $7::bigint[], $8::bigint[], $9::text[])
            AS r(id, job, state, due, expires, body) JOIN took ON took.name = r.job ORDER BY r.id
            ON CONFLICT (id) DO UPDATE SET state = excluded.state, due = excluded.due, expires = excluded.expires,
            body = excluded.body)
        SELECT name FROM took""",
    "prune": f"""DELETE FROM bgjob_run WHERE id = ANY(ARRAY(SELECT id FROM bgjob_run
        WHERE expires <= {_POSTGRES_NOW} ORDER BY expires LIMIT 1000 FOR UPDATE SKIP LOCKED))""",
    "push": f"""INSERT INTO bgjob_run(id, job, state, due, body)
        SELECT id, job, 'scheduled', coalesce(due, {_POSTGRES_NOW} + delay), body
        FROM unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[], $5::text[]) AS p(id, job, due, delay, body)
        ORDER BY id ON CONFLICT (id) DO UPDATE SET state = excluded.state, due = excluded.due, expires = NULL,
        body = excluded.body WHERE bgjob_run.state IN ('cancelled', 'skipped') OR bgjob_run.expires <= {_POSTGRES_NOW}
        RETURNING id, due""",
    "find": f"{_ROWS} WHERE id = ANY(ARRAY(SELECT json_array_elements_text($1::json)))",
    "beat": f"""WITH old AS (SELECT until FROM bgjob_instance WHERE owner = $1),
        new AS (INSERT INTO bgjob_instance(owner, until) VALUES($1, {_POSTGRES_NOW} + $2::bigint)
            ON CONFLICT (owner) DO UPDATE SET until = excluded.until)
        SELECT coalesce((SELECT until FROM old) <= {_POSTGRES_NOW}, true)""",
    "gone": f"DELETE FROM bgjob_instance WHERE owner = $1 OR until < {_POSTGRES_NOW} - 10 * $2::bigint",
    "ring": "SELECT pg_notify('bgjob_wake', $1)",
}
# SQLSTATEs of what passes by itself: connections, full disks, restarts, deadlocks, locks, tables that are gone
_POSTGRES_PASSING = ("08", "25", "40", "53", "55P03", "57", "58", "42P01")


class PostgresStore(_SQLStore):
    """A PostgreSQL database (12 or later) that the processes of many machines share; the server's clock decides.

    A process has one connection for hints (LISTEN) and beats, and one for all else, both kept.

    Args:
        url_or_pool: "postgresql://user:password@host:5432/database", with asyncpg's options; or an asyncpg pool, which
            needs two connections to spare and is not closed.
        prefix, lease, keep: as for `SQLiteStore`.

    Raises:
        StoreError, ScheduleError: as `SQLiteStore`; from `run()` also: asyncpg is missing, the server isn't trusted or
            refuses (password, database, rights).
    """

    _needs = "asyncpg", "postgres"
    _schemes = "postgres(ql)?://"
    _example = "postgresql://user:password@host:5432/database"

    def __init__(
        self, url_or_pool: Any, *, prefix: str = "bgjob", lease: Duration = "30s", keep: Duration = "1d"
    ) -> None:
        super().__init__(url_or_pool, prefix, lease, keep)
        self._sql = {name: sql.replace("bgjob_", f"{prefix}_") for name, sql in _POSTGRES.items()}
        self._wire = self._ears = _PostgresWire(self, self._limit)
        self._waiting: dict[str, Call] = {}  # what is pushed next
        self._pushed: dict[str, int] = {}  # what became of it
        self._direct = False  # no pooler stands between, as far as is known
        self._writes = 0

    async def _start(self) -> None:
        self._direct = False
        self._wire = self._ears = _PostgresWire(self, self._limit)
        if isinstance(self._source, str) or self._source.get_max_size() > 1:
            self._ears = _PostgresWire(self, self._beat_limit)
        await self._ears.fetch("format")

    async def close(self, owner: str | None) -> None:
        if owner is not None:
            with suppress(StoreError):
                await self._rows("gone", owner, self.lease)
        self._hint = lambda: None
        await self._wire.drop()
        await self._ears.drop()
        self._owner = ""

    async def connect(self) -> Any:
        """A new connection, or one of the pool's."""
        if not isinstance(self._source, str):
            return await self._source.acquire()
        try:
            # Behind a pooler a prepared statement could be another's.
            size = 100 if self._direct else 0
            return await self._driver.connect(self._source, timeout=self._limit, statement_cache_size=size)
        except ValueError as error:  # some texts have part of the password in them
            if isinstance(error, (OSError, self._driver.InterfaceError)):
                raise
            remedy = "of : / ? # @ in a password write %3A %2F …"
            raise StoreError(f"{self!r}: the URL can't be read; {remedy}") from None

    async def prepare(self, db: Any, wire: _PostgresWire) -> None:
        """The first connection sees to the tables, and the ears listen."""
        if not self._checked:
            ((server, formats, runs),) = await db.fetch(self._sql["tables"])
            if not formats and not runs:
                key = crc32(self._prefix.encode()) >> 1
                await db.execute(f"BEGIN; SELECT pg_advisory_xact_lock({key}); {self._sql['schema']}; COMMIT")
            self._check_format(1 if runs and not formats else await db.fetchval(self._sql["format"]))
            for table, right in await db.fetch(self._sql["rights"]):
                raise StoreError(f"{self!r}: permission denied: no {right} on table {table}; grant it")
            self._direct, self._checked = server == db.get_server_pid(), True
        if wire is self._wire and self._direct:
            await db.execute("SET enable_seqscan = off; SET jit = off")  # a plan made for a small table stays
        if wire is self._ears:
            db.add_termination_listener(self._rung)  # an outage is met at once
            await db.add_listener(f"{self._prefix}_wake", self._rung)
            self._hint()  # for what was rung meanwhile

    def _rung(self, db: object, pid: int = 0, channel: str = "", text: str = "") -> None:
        self._heard(text)

    def _passes(self, error: BaseException) -> bool | None:
        pg = self._driver
        if not isinstance(error, (pg.PostgresError, pg.InterfaceError, pg.InternalClientError, OSError)):
            return None
        state = str(getattr(error, "sqlstate", None) or "")
        if not state:  # it comes from the way to the server
            return not isinstance(error, ValueError) and "pool is" not in str(error)
        self._checked &= state != "42P01"  # a table was dropped behind our back: the next connection makes it
        return state.startswith(_POSTGRES_PASSING)

    async def _rows(self, statement: str, *arguments: object) -> list[Any]:
        return await self._wire.fetch(statement, *arguments)

    async def ring(self, owners: Collection[str]) -> None:
        await self._rows("ring", " ".join([self._owner, *owners]))

    async def beat(self) -> tuple[float, bool]:
        asked, begun = asyncio.get_running_loop().time(), self._begun
        ((late,),) = await self._ears.fetch("beat", self._owner, self.lease)
        self._begun = True
        return asked, late and begun

    async def load(self, jobs: Mapping[str, int], ahead: int = 0) -> tuple[int, Mapping[str, int], Mapping[str, Page]]:
        found = await self._rows("load", [*jobs], [*jobs.values()], ahead)
        pages = {
            job: Page(version or 0, book or "", [(*row,) for row in _loads(rows or "[]")], later)
            for job, (_, _, version, book, rows, later) in zip(jobs, found, strict=True)
        }
        return found[0][0], _loads(found[0][1]), pages

    async def commit(self, changes: Sequence[Change]) -> Collection[str]:
        rows = [row for change in changes for row in change.rows]
        books = _columns(3, [change[:3] for change in changes])
        found = await self._rows("commit", *books, *_columns(6, rows))
        self._writes += len(rows)
        if self._writes > 1000:
            self._writes = 0
            await self._rows("prune")
        return {name for (name,) in found}

    async def push(self, calls: Sequence[Call]) -> Sequence[int | None]:
        # What comes while a push is under way goes together: so many submits share few commits.
        waiting, pushed = self._waiting, self._pushed
        for call in calls:
            waiting.setdefault(call.id, call)  # of two with one id the first wins
        async with self._wire.lock:
            if waiting is self._waiting:
                self._waiting, self._pushed = {}, {}
                try:
                    pushed.update(await self._wire.fetch_now("push", *_columns(5, [*waiting.values()])))
                    waiting.clear()
                except StoreError as error:
                    if isinstance(error, Unreachable) or len(waiting) == len(calls):
                        raise
            if waiting:  # it was cut short, or refused because of one of them
                pushed = dict(await self._wire.fetch_now("push", *_columns(5, calls)))
        return [pushed.pop(call.id, None) for call in calls]


class _PostgresWire:
    """A connection that is made when it is needed, and anew when it broke; one statement at a time."""

    def __init__(self, store: PostgresStore, limit: float) -> None:
        self.lock: asyncio.Lock = asyncio.Lock()
        self._store = store
        self._limit = limit
        self._db: Any = None

    async def fetch(self, statement: str, *arguments: object) -> list[Any]:
        async with self.lock:
            return await self.fetch_now(statement, *arguments)

    async def fetch_now(self, statement: str, *arguments: object) -> list[Any]:
        """For who has the lock. Whatever breaks a statement off drops the connection, for its answer may yet come."""
        store = self._store
        try:
            async with asyncio.timeout(self._limit):
                if self._db is None or self._db.is_closed():
                    await self.drop()
                    self._db = await store.connect()
                    await store.prepare(self._db, self)
                return cast("list[Any]", await self._db.fetch(store._sql[statement], *arguments))
        except BaseException as error:
            await self.drop()
            raise store._meaning(error) from None

    async def drop(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            db.terminate()
            if not isinstance(self._store._source, str):
                with suppress(Exception):
                    await self._store._source.release(db)


def _columns(width: int, rows: Sequence[Sequence[object]]) -> list[list[object]]:
    return [[row[n] for row in rows] for n in range(width)]


def _store_of(store: Store | str) -> Store:
    """The store meant by a URL; anything that isn't text is one."""
    if not isinstance(store, str):
        if not callable(getattr(store, "commit", None)):
            raise StoreError(f"store={store!r}: neither a URL nor a Store; write 'sqlite:///jobs.db'")
        return store
    from urllib.parse import unquote, unquote_plus

    # By hand: the errors of urllib for what it can't read show a password. Options that aren't ours are the driver's.
    ours = "(?<=[?&])(prefix|lease|keep)=([^&]*)&?"
    options = {name: unquote_plus(value) for name, value in re.findall(ours, store)}
    url, shown = re.sub(ours, "", store).rstrip("?&"), _no_password(store)
    for kind in (PostgresStore, RedisStore):
        if re.match(kind._schemes, url):
            return kind(url, **options)
    if not url.startswith("sqlite:"):
        raise StoreError(f"store={shown!r}: write sqlite:///jobs.db, postgresql://user@host/database or redis://host/0")
    path, _, unknown = url.partition("?")
    if unknown:
        raise StoreError(f"store={shown!r}: unknown option {unknown.partition('=')[0]!r}; write prefix, lease or keep")
    if not path.startswith("sqlite:///") or path == "sqlite:///":
        raise StoreError(f"store={shown!r}: write sqlite:///jobs.db, or sqlite:////var/lib/jobs.db where absolute")
    return SQLiteStore(unquote(path.removeprefix("sqlite:///")), **options)


def _no_password(url: str) -> str:
    """What of a URL may be shown. Passwords contain slashes and at signs too, and some drivers take them as options."""
    return re.sub(r"(?i)(password=)[^&\s'\"]*", r"\1…", re.sub(r"(?<!/)//(?!/).*@", "//…@", url))


# 10 Registry ----------------------------------------------------------------------------------------------------------
# A set of jobs and what runs them. The default one's bound methods are the module's functions.

_Coro: TypeAlias = "Coroutine[object, object, T]"


@contextmanager
def _signals() -> Generator[list[int], None, None]:
    """SIGINT and SIGTERM cancel this task, where only Python or asyncio.run handles them; yields those that came.

    Such a cancellation ends here, unless somebody else cancels, too. Beside the program's main task the first signal
    is raised again at the end, under the handlers from before, so that the rest of the program ends as well.
    """
    loop, pid = asyncio.get_running_loop(), os.getpid()
    main = task = cast("asyncio.Task[object]", asyncio.current_task())
    came: list[int] = []
    before: dict[int, Any] = {}
    signals: Sequence[int] = (signal.SIGINT, signal.SIGTERM)
    for number in signals if threading.current_thread() is threading.main_thread() else ():
        handler: Any = signal.getsignal(number)
        cancelled = getattr(handler, "keywords", {}).get("main_task")  # by asyncio.run's own handler, without a drain
        main = cancelled or main
        if cancelled or handler in (signal.SIG_DFL, signal.default_int_handler):
            before[number] = handler

    def cancel(number: int) -> None:
        if before:  # else it comes too late
            came.append(number)
            task.cancel()

    def on_signal(number: int, frame: object) -> None:
        if os.getpid() == pid and not loop.is_closed():
            loop.call_soon_threadsafe(cancel, number)
        else:  # in a forked child, or after somebody closed the loop
            signal.signal(number, before[number])
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, on_signal)
    try:
        yield came
    except asyncio.CancelledError:
        if not came or task.cancelling() > len(came):
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        before.clear()
        for _ in came:
            task.uncancel()
        if came and main is not task:
            signal.raise_signal(came[0])


def _place(function: Callable[..., object]) -> str:
    code = getattr(function, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else repr(function)


class _Decorator(Protocol):
    """What `@job(...)` returns."""

    @overload
    def __call__(self, function: Callable[P, _Coro[T]], /) -> Job[P, _Coro[T], T]: ...
    @overload
    def __call__(self, function: Callable[P, T], /) -> Job[P, T, T]: ...


class Registry:
    """A set of jobs. The module's `job`, `run`, `running`, `find` and `simulate` are those of one, `bgjob.default`.

    Attributes:
        overrides: `registry.overrides[factory] = other` puts `other` in a dependency's place, for tests.
    """

    def __init__(self) -> None:
        self.overrides: dict[Factory, Factory] = {}
        self._jobs: dict[str, Job] = {}
        self._engine: _Engine | None = None

    @property
    def jobs(self) -> Mapping[str, Job]:
        """The registered jobs by name; read-only."""
        return MappingProxyType(self._jobs)

    @overload
    def job(self, function: Callable[P, _Coro[T]], /) -> Job[P, _Coro[T], T]: ...
    @overload
    def job(self, function: Callable[P, T], /) -> Job[P, T, T]: ...
    @overload
    def job(self, /, **options: Unpack[Options]) -> _Decorator: ...
    def job(self, function: Callable[..., object] | None = None, /, **options: Unpack[Options]) -> object:
        """Register a function as a job: `@job`, or `@job(...)` with keywords.

        At most one of `every`, `cron`, `after`; with none of them the job runs only when it is submitted. An async
        function runs in the event loop, a plain one in a daemon thread. Stacked decorators give one function several
        schedules, each with its `name` and `args`. Durations are seconds, a timedelta, or text such as "30s".

        Args:
            every: interval. Ticks lie at start + n * every, n >= 1; with a shared store on the grid of the Unix epoch
                (so "7d" is a Thursday). Default: none.
            cron: 5 fields, 6 with seconds first, or "@hourly", "@daily" … Default: none.
            after: once, that long after `run()` started, in each process; never in a store. Default: none.
            tz: zone for `cron`: an IANA name, "local", or a tzinfo. Default: "UTC".
            name: identity in logs and stores. Default: the function's `__name__`.
            args: keyword arguments of scheduled runs, copied for each attempt; `submit()`'s defaults. Default: none.
            immediate: a new job starts as if it had just missed a tick. In a shared store it is new once, so a restart
                repeats nothing. Default: False.
            jitter: start up to that much later, never past the next tick. Default: 0.
            parallelism: runs at the same time, 1 to 1,000; with a shared store over all instances. Default: 1 with a
                schedule, 10 without.
            overlap: ticks that find `parallelism` earlier ones unfinished: "skip" them, let one wait ("queue"), or
                let all wait and run in order ("all"). After a gap "skip" and "queue" run the newest missed tick once,
                "all" every one. Default: "skip".
            expires: skip what would start later than this. Default: never.
            timeout: limit for one attempt. Default: none.
            retries: further attempts after the first fails or times out. Default: 0.
            retry_delay: a duration; or "1s..5m", doubling from the first to the second and spread over the upper
                half; or a function of the retry's number, from 1, and if it takes two of the error. Default: "1s..5m".
            retry_on: which failures to retry: an exception class, a tuple, or a predicate. Default: `Exception`.
            on_error: called with (run, exception) after the last attempt failed, for at most `timeout`, else 30 s;
                an async function, or a plain one (in a thread). Default: none.
            on_crash: shared store: a run whose process died is run again ("rerun") or fails ("drop"). Default: "rerun".

        Raises:
            ScheduleError: a keyword or its value is wrong, the function can't be a job, or the name is taken.
        """
        return functools.partial(self._add, options) if function is None else self._add(options, function)

    def _add(self, options: Options, function: Callable[..., object]) -> Job:
        if isinstance(function, Job):
            function = function.function
        name = _job_name(function, options.get("name"))
        try:
            _check_function(function)
            self._check_name(name, inspect.unwrap(function))
            job: Job = Job(_Spec(name, _Plan(function), options), self)
        except ScheduleError as error:
            raise ScheduleError(f"job {name!r}: {error}") from error.__cause__
        self._jobs[name] = job
        if engine := self._going_engine():
            engine.changed(name)
        return job

    def _check_name(self, name: str, new: Callable[..., object]) -> None:
        """A module that is loaded again replaces its jobs; any other second use of a name is a mistake."""
        if name not in self._jobs:
            return
        old: Any = inspect.unwrap(self._jobs[name].function)
        modules = [getattr(function, "__module__", "?") for function in (old, new)]
        names = [getattr(function, "__qualname__", repr(function)) for function in (old, new)]
        if old is new or modules[0] != modules[1] or names[0] != names[1]:
            twice = modules[0] != modules[1] and _place(old) == _place(new)
            remedy = (
                "the file is loaded twice: import it by one name" if twice else "give one of them a name= of its own"
            )
            places = f"{_place(old)} in {modules[0]}, this is {_place(new)} in {modules[1]}"
            raise ScheduleError(f"the name is taken by {places}; {remedy}")
        if getattr(old, "__code__", None) is getattr(new, "__code__", ()):  # what is loaded again is compiled again
            told = (
                "job %r: %s made another function of that name, which replaces the first; in a loop give each a name="
            )
            _log.warning(told, name, _place(new))

    def remove(self, name: str) -> None:
        """Forget a job: no new ticks, and no new runs here. What runs ends; stored runs stay, for other instances.

        Raises:
            BgjobError: there is no such job.
        """
        if self._jobs.pop(name, None) is None:
            known = ", ".join(self._jobs) or "none"
            raise BgjobError(f"job {name!r}: not registered; the registered ones are: {known}")
        if engine := self._going_engine():
            engine.changed(name)

    def _going_engine(self) -> _Engine | None:
        """The engine, unless somebody closed its loop under it."""
        return None if self._engine is None or self._engine.loop.is_closed() else self._engine

    def _going(self, what: str) -> _Engine:
        engine = self._going_engine()
        if engine is None:
            raise BgjobError(f"{what} needs jobs that run: call it inside run() or `async with running():`")
        if engine.pid != os.getpid():
            parent = f"process {engine.pid}, which forked this one, runs the jobs"
            raise BgjobError(f"{what}: {parent}; start this one with 'spawn', or let that one submit")
        return engine

    def _check_idle(self, what: str) -> None:
        if self._going_engine() is not None:
            self._going(what)  # which says it, in a forked child
            raise BgjobError(f"{what}: these jobs run already: one run() or running() per registry at a time")

    async def find(self, id: str) -> Run | None:
        """The run with that id, or None. Without a store: an unfinished one, or one of the last thousand that ended.

        Raises:
            BgjobError: nothing runs: call it inside `run()` or `running()`.
            StoreError: the store gave no answer for 5 s.
        """
        return await self._going("find()").find(id)

    async def run(
        self,
        *,
        store: Store | str | None = None,
        jobs: Sequence[str] | None = None,
        drain: Duration = "20s",
        on_event: Callable[[Run], object] | None = None,
    ) -> None:
        """Run the jobs until cancelled (then it drains and raises `CancelledError`), SIGINT or SIGTERM (then returns).

        It handles signals in the main thread alone, and only those that nobody but Python or asyncio.run handles. As
        one of several tasks it passes the signal on after its drain, which ends the program; better use `running()`.

        Args:
            store: a `Store`, or a URL such as "sqlite:///jobs.db" (three slashes relative, four absolute), with
                ?prefix=…&lease=30s&keep=1d if wanted. Default: the memory of this process.
            jobs: names of the jobs that this instance executes. Default: all.
            drain: how long to wait at the end for the runs that are going; a second signal or cancel ends the wait.
                Then they are cancelled and given 5 s more; what would not stop is named in the log. Default: 20 s.
            on_event: a plain function called with the run at every change of its state. Default: none.

        Raises:
            BgjobError: these jobs run already, or a name in `jobs` is unknown.
            StoreError: the store's URL is wrong, or it can't be opened. One that doesn't answer is waited for.
            Exception: what an "app" dependency raised when it was made.
        """
        with _signals():
            async with self.running(store=store, jobs=jobs, drain=drain, on_event=on_event):
                await asyncio.Event().wait()

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

        Takes and raises what `run()` does, yields the registry, and never touches signals.
        """
        self._check_idle("running()")
        if isinstance(jobs, str):
            raise BgjobError(f"jobs={jobs!r}: write a list of names, [{jobs!r}]")
        if on_event is not None and (not callable(on_event) or inspect.iscoroutinefunction(on_event)):
            raise BgjobError(f"on_event={on_event!r}: not a plain function; pass one that takes the run")
        place = None if store is None else _store_of(store)
        clock = _Clock(asyncio.get_running_loop())
        engine = _Engine(self, jobs, _duration("drain", drain), on_event, clock, place)
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
        """Run the jobs in virtual time, where `asyncio.sleep` and timeouts cost nothing: for tests.

        Plain functions run inline; override real I/O, and use `run.tick` in place of `datetime.now()`. The same input
        gives the same runs, ids included: those that ended, in that order. What still runs at the end is cancelled.

        Args:
            duration: how much virtual time to run; a tick at its very end is part of it.
            start: an aware datetime to begin at. Default: now.
            main: an async function that runs beside the jobs: it submits, cancels, asserts. What it raises is raised.

        Raises:
            BgjobError: called in async code.
        """
        self._check_idle("simulate()")
        span = _duration("duration", duration, 1) / 1000
        begin = _wall_ms() if start is None else _to_ms("start", start)
        with suppress(RuntimeError):  # there is no loop, as it should be
            asyncio.get_running_loop()
            remedy = "call it from a plain function, or in a notebook await asyncio.to_thread(simulate, …)"
            raise BgjobError(f"simulate() makes an event loop of its own: {remedy}")
        with asyncio.Runner(loop_factory=_VirtualLoop) as runner:
            return runner.run(self._simulate(span, begin / 1000, main))

    async def _simulate(self, span: float, begin: float, main: Callable[[], _Coro[object]] | None) -> list[Run]:
        ended: list[Run] = []

        def collect(run: Run) -> None:
            if run.state not in _UNFINISHED:
                ended.append(run)

        engine = _Engine(self, None, 0, collect, _Clock(asyncio.get_running_loop(), begin))
        await engine.open()
        limit = asyncio.timeout(span + 0.0005)  # less than a tick more: what is due at the very end still runs
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
find: Final = default.find
simulate: Final = default.simulate


# 11 Command line ------------------------------------------------------------------------------------------------------
# `bgjob run | list | submit | status | cancel`, as the installed script and as `python bgjob.py`. Results go to stdout,
# all else to stderr. A table is as wide as the terminal, in a pipe 80 columns, and in colour on a terminal only.

_HELP = """\
bgjob run TARGET... [--store URL] [--jobs a,b] [--drain 20s]
    Run jobs until Ctrl-C or SIGTERM; a second Ctrl-C waits no longer for runs.
bgjob list TARGET... [-n 5]
    Show jobs, their next ticks, and when they fire in the next 24 hours. A bar
    is as high as its half an hour has minutes with a tick, 8 or more at most;
    in the last line, as jobs fire in the same minute.
bgjob submit TARGET JOB --store URL [--args JSON] [--after 5m] [--wait]
    Submit a run and print its id, or wait for its end and print its result.
    JSON is '["a@b.c"]', in order, or '{"to": "a@b.c"}', by name.
bgjob status --store URL [--json]
    Show what runs where, what is due, what waits to be retried, what failed.
bgjob cancel RUN --store URL
    Cancel a run, wherever it waits or runs.

TARGET is a module (app.jobs) or path (jobs.py) with jobs of @job, or else of a
Registry in a variable; URL sqlite:///jobs.db (four slashes: absolute), redis://
or postgresql://, each with ?prefix=...&lease=30s&keep=1d if wanted.
Exit status: 0 done, 1 refused or failed, 2 wrong usage, 130 second Ctrl-C."""
_SHOWN = 20  # runs of each state in the table of `bgjob status`; --json has a thousand
_COLOURS = {"TITLE": 1, "WARNING": 33, "retrying": 33, "ERROR": 31, "failed": 31}


class _Misuse(BgjobError, ValueError):
    """The command line itself is wrong: exit status 2."""


def _words(ms: int) -> str:
    """A duration as one would write it: 1h30m, 250ms."""
    words = ""
    for unit, size in _UNITS.items():
        number, ms = divmod(ms, size)
        words += f"{number}{unit}" if number else ""
    return words or "0s"


def _relative(ms: int) -> str:
    """At a glance: in whole seconds, from an hour on in minutes."""
    unit = _UNITS["s"] if abs(ms) < _UNITS["h"] else _UNITS["m"]
    words = _words(abs(ms) // unit * unit)
    return "now" if words == "0s" else f"in {words}" if ms > 0 else f"{words} ago"


def _paint(stream: TextIO, kind: str, text: str) -> str:
    """In the colour of its kind on a terminal; without what one would obey, for a store's texts come from elsewhere."""
    text = "".join(sign if sign.isprintable() or sign == "\n" else " " for sign in text)
    colour = _COLOURS.get(kind) if stream.isatty() and not os.environ.get("NO_COLOR") else None
    return f"\x1b[{colour}m{text}\x1b[0m" if colour else text


class _LogFormat(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _paint(sys.stderr, record.levelname, super().format(record))


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    """A title and rows, coloured by their first cell. Columns are as wide as their cells; only the last is wrapped."""
    import shutil
    import textwrap

    *widths, _ = (max(map(len, column)) + 2 for column in zip(*rows, strict=True))
    indent = " " * sum(widths)
    width = max(shutil.get_terminal_size().columns, len(indent) + 20)
    for n, (*cells, last) in enumerate(rows):
        start = "".join(map(str.ljust, cells, widths))
        lines = textwrap.wrap(last, width - len(indent), break_long_words=False, break_on_hyphens=False)
        print(_paint(sys.stdout, cells[0] if n else "TITLE", (start + f"\n{indent}".join(lines)).rstrip()))


def _list(target: str, *more: str, n: str = "5") -> None:
    count = _int("-n", int(n) if n.isdecimal() else n, 1)
    jobs, now, minute = _load(target, *more).jobs.values(), _wall_ms(), _UNITS["m"]
    zone = next((job._spec.schedule.zone for job in jobs if isinstance(job._spec.schedule, _Cron)), UTC)
    begin = now // minute - _aware(now, zone).minute  # the full hour
    table, fires = [("JOB", "SCHEDULE", "NEXT")], dict[str, set[int]]()
    for job in jobs:
        spec, schedule, ticks = job._spec, job._spec.schedule, job.next_ticks(count, _aware(now))
        words = "on submit" if spec.after is None else f"{_words(spec.after)} after the start"
        if isinstance(schedule, _Every):
            words = f"every {_words(schedule.every)}"
        elif schedule is not None:
            words = f"{schedule.text} {schedule.zone}"
        days = itertools.groupby(ticks, lambda tick: f"{tick:%a %d %b }".replace(" ", "\xa0"))
        at = ", ".join(day + " ".join(f"{at:%H:%M:%S}".removesuffix(":00") for at in group) for day, group in days)
        soon = f"{_relative(_to_ms('', ticks[0]) - now)}: {at}\xa0{ticks[0]:%Z}" if ticks else ""
        table.append((job.name, words, soon))
        if schedule is not None:
            day = itertools.takewhile(lambda tick: tick < (begin + 1440) * minute, schedule.ticks(now))
            fires[job.name] = {tick // minute - begin for tick in day}
    together = Counter(itertools.chain.from_iterable(fires.values()))
    heights = {name: Counter(at // 30 for at in minutes) for name, minutes in fires.items()}
    heights["together"] = Counter({bar: max(together[30 * bar + at] for at in range(30)) for bar in range(48)})
    hours = "    ".join(f"{_aware((begin + 180 * i) * minute, zone):%H}" for i in range(8))
    strip = [(f"24 HOURS ({_aware(now, zone):%Z})", hours)]
    strip += [(name, "".join("·▁▂▃▄▅▆▇█"[min(row[bar], 8)] for bar in range(48))) for name, row in heights.items()]
    _print_table(table)
    print()
    _print_table(strip)


async def _status(*, store: str, json: bool = False) -> None:
    async with _client(Registry(), store) as registry:
        seen = await cast(_Engine, registry._engine).overview(1000)
    due = list(seen.due)
    for job, book in seen.jobs.items():  # the next tick, which the store has yet to hand out
        schedule = _schedule_of(book.schedule)
        at = next(schedule.ticks(book.last), None) if schedule else None
        due += [] if at is None else [Row(_id_of(job, at), job, _SCHEDULED, at, at)]
    due.sort(key=lambda row: row.due)
    states = {"running": seen.running, "due": due, "retrying": seen.retrying, "failed": seen.failed}
    timeouts = {job: book.timeout for job, book in seen.jobs.items()}
    if json:
        print(_dumps({state: [_facts(row, timeouts.get(row.job)) for row in rows] for state, rows in states.items()}))
        return
    table = [("STATE", "WHEN", "ATTEMPT", "RUN")]
    for state, rows in states.items():
        for row in rows[:_SHOWN]:
            run = row.id if row.id.startswith((f"{row.job}@", f"{row.job}#")) else f"{row.job} {row.id}"
            when = row.due if row.state is _SCHEDULED else row.finished or row.since or seen.now
            if row.state is _RUNNING:
                run += f" on {(row.owner or '').rpartition(':')[0]}"  # host and process
                if timeout := timeouts.get(row.job):
                    run += f", {(seen.now - when) * 100 // timeout}% of {_words(timeout)}"
            elif row.error:
                run += f": {row.error}"
            table.append((state, _relative(when - seen.now), str(row.tries or ""), run))
        table += [(state, "", "", f"and {len(rows) - _SHOWN} more")] if len(rows) > _SHOWN else []
    _print_table(table)


def _facts(row: Row, timeout: int | None) -> dict[str, object]:
    """A run as `--json` shows it: instants as text, the timeout in seconds, no arguments or results."""
    instants = {"tick": row.at, "due": row.due, "since": row.since, "finished": row.finished}
    facts: dict[str, object] = {name: getattr(row, name) for name in ("id", "job", "state", "owner", "error", "reason")}
    facts |= {name: _iso(ms) if ms else None for name, ms in instants.items()}
    return facts | {"attempt": row.tries, "timeout": timeout and timeout / 1000}


def _client(registry: Registry, url: str, new: bool = False) -> _AsyncGeneratorContextManager[Registry]:
    """An instance that runs nothing."""
    _log.setLevel(logging.ERROR)  # an outage is the command's error; advice about the lease is for `bgjob run`
    store = _store_of(url)
    if isinstance(store, SQLiteStore) and not (new or os.path.exists(store.path)):
        raise StoreError(f"{store!r}: no such file in {os.getcwd()}; the first run() or submit makes it")
    return registry.running(store=store, jobs=[])


async def _submit(target: str, job: str, *, store: str, args: str = "[]", after: str = "0", wait: bool = False) -> None:
    given: Any = None
    with suppress(ValueError, RecursionError):
        given = _loads(args)
    if not isinstance(given, (dict, list)):
        raise _Misuse(f"""--args={args!r}: write a JSON array, '["a@b.c"]', or an object, '{{"to": "a@b.c"}}'""")
    registry = _load(target)
    if job not in registry.jobs:
        raise BgjobError(f"job {job!r}: no such job; there is {' or '.join(registry.jobs)}")
    later = registry.jobs[job].after(after + "s" * after[-1:].isdigit())
    async with _client(registry, store, new=True):
        try:
            run = await (later.submit(**given) if isinstance(given, dict) else later.submit(*given))
        except (TypeError, ValueError) as error:
            raise BgjobError(str(error)) from None
        print(_dumps(await run.result()) if wait else run.id)


async def _cancel(run: str, *, store: str) -> int:
    async with _client(Registry(), store) as registry:
        found = await registry.find(run)
        if found is None or not await found.cancel():
            why = f"it has ended already: {found.state}" if found else "the store knows none; bgjob status shows ids"
            raise BgjobError(f"run {run!r}: {why}")
        with suppress(RunFailed, RunCancelled, TimeoutError):
            await found.result(_PATIENCE)
    print(run, "is told to stop" if found.state in _UNFINISHED else found.reason or found.state)
    return int(found.state in (_SUCCEEDED, _FAILED, _SKIPPED))


def _run(target: str, *more: str, store: str | None = None, jobs: str | None = None, drain: str = "20s") -> int:
    registry, names = _load(target, *more), None if jobs is None else jobs.split(",")
    handler = logging.StreamHandler()
    handler.setFormatter(_LogFormat("%(asctime)s %(levelname)-7s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])  # nothing, where the target has set its log up

    async def serve() -> int:
        with _signals() as came:  # run() then leaves them to these handlers
            await registry.run(store=store, jobs=names, drain=drain + "s" * drain[-1:].isdigit())
        return 0 if len(came) == 1 else 130

    with asyncio.Runner() as runner:
        status = runner.run(serve())
        sys.stdout.flush()
        # asyncio waits for ever for a task that swallows every cancellation, and for the threads of its executor.
        timer = threading.Timer(2, os._exit, [status])
        timer.start()
    timer.cancel()
    return status


def _load(*targets: str) -> Registry:
    """The default registry, or where that has no jobs the one that a target holds in a variable."""
    held = [default]
    for target in targets:
        name = _module_of(target) if os.path.isfile(target) else target
        try:
            __import__(name)  # unlike import_module it leaves the import system out of tracebacks
        except (Exception, SystemExit) as error:
            if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
                why = f"not found in {os.getcwd()}; write a module (app.jobs) or a path (jobs.py)"
                raise BgjobError(f"{target}: {why}") from None
            traceback.print_exception(error.with_traceback(error.__traceback__ and error.__traceback__.tb_next))
            raise BgjobError(f"{target}: its import failed: {_summary(error)}") from None
        held += [value for value in vars(sys.modules[name]).values() if isinstance(value, Registry)]
    found = [registry for registry in dict.fromkeys(held) if registry.jobs]
    if len(found) == 1:
        return found[0]
    none = f"no jobs of {__file__} there; decorate functions with its @job"
    raise BgjobError(
        f"{', '.join(targets)}: {'jobs in several registries; write a module for each' if found else none}"
    )


def _module_of(path: str) -> str:
    """The name under which a file is imported: from the folder above its packages, as Python would find it."""
    folder, name = os.path.split(os.path.abspath(path).removesuffix(".py"))
    while os.path.isfile(os.path.join(folder, "__init__.py")):
        folder, package = os.path.split(folder)
        name = f"{package}.{name}"
    sys.path.insert(0, folder)
    return name


def _call(name: str, *rest: str) -> int:
    """Call a command. Its function's parameters are its options; those that are False without it are flags."""
    import getopt

    if name == "--version" or "--help" in (name, *rest):
        print(f"bgjob {__version__}" if name == "--version" else _HELP)
        return 0
    commands: dict[str, Callable[..., Any]] = {f.__name__[1:]: f for f in (_run, _list, _submit, _status, _cancel)}
    if name not in commands:
        raise _Misuse(f"{name}: no such command; write one of {', '.join(commands)}")
    signature = inspect.signature(commands[name])
    flags = {f"--{name}" for name, parameter in signature.parameters.items() if parameter.default is False}
    options = [name + "=" * (f"--{name}" not in flags) for name in signature.parameters]
    try:
        given, words = getopt.gnu_getopt(rest, "n:", options)
        bound = signature.bind(*words, **{key.lstrip("-"): key in flags or value for key, value in given})
    except (getopt.GetoptError, TypeError) as error:
        raise _Misuse(f"{error}; see bgjob --help") from None
    done = commands[name](*bound.args, **bound.kwargs)
    return (asyncio.run(done) if inspect.iscoroutine(done) else done) or 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line, see `bgjob --help`; returns the exit status."""
    sys.path.insert(0, os.getcwd())
    if reconfigure := getattr(sys.stdout, "reconfigure", None):
        reconfigure(encoding="utf-8", errors="backslashreplace")  # pipes of Windows have no block characters
    try:
        status = _call(*(sys.argv[1:] if arguments is None else arguments) or ["--help"])
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `| head` has seen enough; what is left may not fail again when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130
    except BgjobError as error:
        print("bgjob:", _paint(sys.stderr, "", _no_password(" ".join(str(error).split()))), file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1  # a wrong duration is one, too


if __name__ == "__main__":
    # This file is loaded as `__main__` now; the targets import it by its name, and theirs is the registry to use.
    sys.exit(importlib.import_module(__spec__.name if __spec__ else _module_of(__file__)).main())
