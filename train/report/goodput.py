"""Where the wall time of a run goes, over all the sessions in which it was trained.

Goodput is the share of it that went into steps which count: not into compiling, waiting for data,
evaluations, saves, starts, steps that a kill made it do again, or nothing at all between two
sessions.
"""

import contextlib
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from train.storage.atomic import write_atomically
from train.storage.small_json import read_whole

KINDS = ("steps", "data", "compiling", "evaluation", "checkpoints", "starting")
"""What a session's time goes into; of a step "data" is the wait for its batch."""

_WRITE_EVERY = 20.0  # seconds; so much a killed session may have been longer than is known


class Times:
    """Counts the wall time of this session by what it goes into.

    Attributes:
        began: when it began, in seconds since the epoch.
        kind: one of KINDS, which the present moment counts as.
        seconds: how long each has taken up to the last change.
    """

    def __init__(self) -> None:
        self.began = time.time()
        self.kind = "starting"
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self._since = time.perf_counter()

    def turn_to(self, kind: str) -> None:
        """Lets the time from now on count as `kind`."""
        now = time.perf_counter()
        self.seconds[self.kind] += now - self._since
        self.kind, self._since = kind, now

    @contextlib.contextmanager
    def spending(self, kind: str) -> Iterator[None]:
        """Lets the time inside the `with` count as `kind`."""
        before = self.kind
        self.turn_to(kind)
        try:
            yield
        finally:
            self.turn_to(before)


@dataclass
class Session:
    """One time that a run was trained, from its start to its end or kill.

    Attributes:
        began, ended: seconds since the epoch; the end is the last time that it wrote this.
        first_step: the step after which it began.
        last_step: the last that it did.
        seconds: how long it took, by KINDS.
    """

    began: float
    ended: float
    first_step: int
    last_step: int
    seconds: dict[str, float] = field(default_factory=dict)


class SessionLog:
    """The file with the sessions of a run, of which this process adds one."""

    def __init__(self, path: Path, times: Times, first_step: int):
        """Reads the sessions before; a damaged file counts as none.

        Args:
            path: the file.
            times: counts this session's time.
            first_step: the step after which it begins.
        """
        self._path, self._times = path, times
        self._session = Session(times.began, times.began, first_step, first_step)
        self._sessions = [*read_sessions(path), self._session]
        self._written = 0.0

    def update(self, step: int, *, now: bool = False) -> float:
        """Notes that a step is done, writes that down now and then, and returns the goodput.

        Args:
            step: the number of the step.
            now: whether to write in any case.
        """
        self._times.turn_to(self._times.kind)
        session = self._session
        session.ended, session.last_step = time.time(), step
        session.seconds = dict(self._times.seconds)
        if now or session.ended - self._written > _WRITE_EVERY:
            write_atomically(self._path, json.dumps([asdict(x) for x in self._sessions]) + "\n")
            self._written = session.ended
        return self.spent().goodput

    def spent(self) -> "Spent":
        """Adds up all sessions so far."""
        return add_up(self._sessions)


def read_sessions(path: Path) -> list[Session]:
    """Reads the sessions of a run; none if the file is missing or damaged."""
    return read_whole(path, list[Session]) or []


@dataclass(frozen=True)
class Spent:
    """The wall time of a run since it first began.

    Attributes:
        wall: all of it, in seconds.
        parts: what it went into: KINDS, "redone" (steps that a kill made it do again), "stopped"
            (between sessions) and "other".
    """

    wall: float
    parts: dict[str, float]

    @property
    def goodput(self) -> float:
        """The share of the wall time that went into steps which count."""
        return self.parts["steps"] / self.wall if self.wall > 0 else 0.0

    def __str__(self) -> str:
        """One line: the goodput, and what the rest went into, the largest first."""
        others = ((x, name) for name, x in self.parts.items() if name != "steps")
        rest = sorted(others, reverse=True)
        lost = ", ".join(
            f"{seconds / self.wall:.1%} {name}"
            for seconds, name in rest
            if self.wall > 0 and seconds / self.wall >= 0.0005
        )
        whole = f"{self.goodput:.1%} of {format_seconds(self.wall)} in steps"
        return f"{whole}; {lost}" if lost else whole


def add_up(sessions: Sequence[Session]) -> Spent:
    """Adds up sessions, in their order."""
    parts = dict.fromkeys((*KINDS, "redone", "stopped", "other"), 0.0)
    for session, following in itertools.zip_longest(sessions, sessions[1:]):
        for kind in KINDS:
            parts[kind] += session.seconds.get(kind, 0.0)
        done = session.last_step - session.first_step
        if following is not None and done > 0:
            kept = min(max(following.first_step - session.first_step, 0), done)
            redone = session.seconds.get("steps", 0.0) * (1 - kept / done)
            parts["steps"] -= redone
            parts["redone"] += redone
        if following is not None:
            parts["stopped"] += max(following.began - session.ended, 0.0)
    wall = sessions[-1].ended - sessions[0].began if sessions else 0.0
    parts["other"] = max(wall - sum(parts.values()), 0.0)
    return Spent(wall, parts)


def format_seconds(seconds: float) -> str:
    """Writes a time in its two largest units: "2 d 3 h", "4 min 5 s", "0.8 s"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    left, parts = round(seconds), list[str]()
    for name, size in units:
        if left >= size or parts:
            parts.append(f"{left // size} {name}")
            left %= size
    return " ".join(parts[:2])
