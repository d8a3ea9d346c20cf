"""What a run's folder says of the run, also while it is trained: one page."""

import contextlib
import fcntl
import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nha_jax.storage.stores import Store, local_copy
from train.errors import ConfigError
from train.paths import user_location
from train.report.goodput import Session, add_up, format_seconds, read_sessions
from train.report.metrics import Row, parse_rows
from train.storage.lease import OWNERS, RELEASED
from train.storage.result import Result
from train.storage.small_json import read_whole

_TAIL_BYTES = 1 << 18  # of metrics.jsonl: some hundred rows
_TREND_ROWS = 20
_SILENT = 120.0  # seconds without a sign of life after which a run in a store may have ended


@dataclass(frozen=True)
class Status:
    """What is known of a run.

    Attributes:
        run: the folder as it was named.
        state: "training", "finished", "stopped", or "not begun".
        step, steps: updates done, and in all.
        metrics: the newest row of metrics.
        held_out: the newest row that has an evaluation; None if there is none.
        trend: by how much the loss changed from the twenty rows before the last twenty to those;
            None if there are too few.
        seconds_left: how long the rest takes at the present rate; None if it is not known.
        checkpoints: steps of the checkpoints, ascending.
        checkpoint_age: seconds since the newest was written; None in a store.
        sessions: when it was trained, and where the time went.
        result: what it reached, if it is finished.
        warnings: what someone should look at.
    """

    run: str
    state: str
    step: int
    steps: int | None
    metrics: Row
    held_out: Row | None
    trend: float | None
    seconds_left: float | None
    checkpoints: tuple[int, ...]
    checkpoint_age: float | None
    sessions: tuple[Session, ...]
    result: Result | None
    warnings: tuple[str, ...]

    def to_json(self) -> str:
        """The same as JSON, with the wall time by what it went into."""
        spent = add_up(self.sessions)
        values: dict[str, Any] = {
            **{name: getattr(self, name) for name in ("run", "state", "step", "steps")},
            "metrics": self.metrics,
            "held_out": self.held_out,
            "loss_trend": self.trend,
            "seconds_left": self.seconds_left,
            "checkpoints": self.checkpoints,
            "checkpoint_age": self.checkpoint_age,
            "goodput": spent.goodput if self.sessions else None,
            "seconds": spent.parts,
            "warnings": self.warnings,
        }
        return json.dumps(values, indent=2)

    def __str__(self) -> str:
        """The page."""
        lines = [("run", self.run), ("state", self._state()), ("step", self._step())]
        loss = _number(self.metrics, "loss", "attention_transfer")
        if loss is not None:
            trend = "" if self.trend is None else f", {self.trend:+.4f} over {_TREND_ROWS} rows"
            lines.append(("loss", f"{loss:.4f}{trend}"))
        bits = _number(self.held_out or {}, "held_out_bits_per_byte")
        if bits is not None and self.held_out is not None:
            lines.append(("held out", f"{bits:.4f} bits a byte at step {self.held_out['step']}"))
        rate = _number(self.metrics, "tokens_per_second")
        if rate is not None:
            mfu = _number(self.metrics, "mfu")
            lines.append(("rate", f"{rate:,.0f} tokens/s" + (f", MFU {mfu:.1%}" if mfu else "")))
        lines.append(("saved", self._saved()))
        skipped = _number(self.metrics, "skipped_updates")
        if skipped is not None:
            lines.append(("skipped", f"{skipped:.0f} updates"))
        if self.sessions:
            count = f" in {len(self.sessions)} sessions" if len(self.sessions) > 1 else ""
            lines.append(("goodput", f"{add_up(self.sessions)}{count}"))
        slowest = _number(self.metrics, "slowest_process")
        if slowest is not None:
            lines.append(("slowest", f"process {slowest:.0f} waits longest for data"))
        lines += [("warning", warning) for warning in self.warnings]
        return "\n".join(f"{name:<9}{text}" for name, text in lines)

    def _state(self) -> str:
        if self.result is not None and self.state == "finished":
            return f"finished: {self.result.held_out_bits_per_byte:.4f} bits a byte held out"
        if self.seconds_left is not None and self.state == "training":
            return f"training, {format_seconds(self.seconds_left)} left"
        return self.state

    def _step(self) -> str:
        if not self.steps:
            return f"{self.step:,}"
        return f"{self.step:,} of {self.steps:,} ({self.step / self.steps:.1%})"

    def _saved(self) -> str:
        if not self.checkpoints:
            return "no checkpoint yet"
        age = self.checkpoint_age
        ago = "" if age is None else f", {format_seconds(age)} ago"
        return f"step {self.checkpoints[-1]:,}{ago}"


def read_status(run: str) -> Status:
    """Reads what a run's folder says, on a disk or in a store.

    Raises:
        ConfigError: there is no such folder, or no run in it.
        StoreError: the store stays away.
    """
    location = user_location(run, "RUN")
    if isinstance(location, Path):
        return _read(run, location, _checkpoints_of(location), _is_locked(location))
    names = location.files()
    if "run.json" not in names:
        raise ConfigError(f"RUN = {run!r}: no run in this folder of the store")
    folder = local_copy(location.url, _is_read)
    reports = [name for name in names if name.startswith("watchdog/")]
    steps = {
        int(parts[1])
        for parts in (name.split("/") for name in names)
        if parts[0] == "checkpoints" and parts[1].isdecimal()
    }
    return _read(run, folder, dict.fromkeys(steps), _is_owned(location, folder), reports)


def _is_read(name: str) -> bool:
    """Whether a file of a run in a store is read for its status."""
    return "/" not in name and name.endswith((".json", ".jsonl"))


def _read(
    run: str,
    folder: Path,
    saved: Mapping[int, float | None],
    training: bool,
    reports: Iterable[str] = (),
) -> Status:
    if not folder.is_dir():
        raise ConfigError(f"RUN = {run!r}: no such folder")
    record = read_whole(folder / "run.json", dict[str, Any])
    if record is None and not saved and not (folder / "metrics.jsonl").exists():
        raise ConfigError(f"RUN = {run!r}: no run in this folder")
    config = (record or {}).get("config", {})
    rows = _last_rows(folder / "metrics.jsonl")
    newest = rows[-1] if rows else {}
    step, steps = int(newest.get("step", max(saved, default=0))), config.get("steps")
    result = Result.read(folder / "result.json")
    finished = result is not None and steps is not None and result.step >= steps
    state = "training" if training else "finished" if finished else "stopped"
    if not training and not rows and not saved:
        state = "not begun"
    evaluated = [row for row in rows if row.get("held_out_bits_per_byte") is not None]
    tokens = config.get("batch_size", 0) * config.get("data", {}).get("sequence_length", 0)
    rate = _number(newest, "tokens_per_second")
    left = None if not (rate and steps) else max(steps - step, 0) * tokens / rate
    written = saved[max(saved)] if saved else None
    names = [*reports, *(f"watchdog/{path.name}" for path in (folder / "watchdog").glob("*.txt"))]
    return Status(
        run=run,
        state=state,
        step=step,
        steps=steps,
        metrics=newest,
        held_out=evaluated[-1] if evaluated else None,
        trend=_trend(rows),
        seconds_left=left,
        checkpoints=tuple(sorted(saved)),
        checkpoint_age=None if written is None else max(time.time() - written, 0.0),
        sessions=tuple(read_sessions(folder / "sessions.json")),
        result=result,
        warnings=tuple(_warnings(record, rows, names, folder)),
    )


def _warnings(
    record: Mapping[str, Any] | None, rows: list[Row], reports: list[str], folder: Path
) -> list[str]:
    found = []
    if record is None:
        found.append("run.json is missing or damaged; the `nha train` command writes it again")
    if rows and any(name in rows[-1] and rows[-1][name] is None for name in ("loss",)):
        found.append(f"the loss of step {rows[-1]['step']} is not finite: its update was skipped")
    skipped = [_number(row, "skipped_updates") or 0 for row in rows]
    if skipped and skipped[-1] > skipped[0]:
        found.append(f"{skipped[-1] - skipped[0]:.0f} updates skipped in the last {len(rows)} rows")
    if reports:
        newest = max(reports)
        found.append(f"the watchdog ended it {len(reports)} times, see {newest}")
    damaged = sorted(path.name for path in (folder / "checkpoints").glob("damaged-*"))
    if damaged:
        found.append(f"set aside in checkpoints: {', '.join(damaged)}")
    return found


def _checkpoints_of(folder: Path) -> dict[int, float | None]:
    """When each checkpoint was written, by its step."""
    found: dict[int, float | None] = {}
    for path in (folder / "checkpoints").glob("[0-9]*"):
        if path.name.isdecimal():
            with contextlib.suppress(FileNotFoundError):
                found[int(path.name)] = path.stat().st_mtime
    return found


def _is_locked(folder: Path) -> bool:
    """Whether a process of this machine is training in a folder."""
    try:
        with (folder / ".lock").open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _is_owned(store: Store, folder: Path) -> bool:
    """Whether a process seems to be training in a store: its owner has not said that it ended.

    One that was killed says nothing: then the sessions tell when it last wrote.
    """
    beats = [name for name in store.files(OWNERS) if name.endswith(".beat")]
    if not beats or store.read(max(beats)) == RELEASED:
        return False
    sessions = read_sessions(folder / "sessions.json")
    return not sessions or time.time() - sessions[-1].ended < _SILENT


def _last_rows(path: Path) -> list[Row]:
    try:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - _TAIL_BYTES, 0))
            return parse_rows(file.read())
    except FileNotFoundError:
        return []


def _trend(rows: list[Row]) -> float | None:
    losses = [x for row in rows if (x := _number(row, "loss", "attention_transfer")) is not None]
    if len(losses) < 2 * _TREND_ROWS:
        return None
    before, after = losses[-2 * _TREND_ROWS : -_TREND_ROWS], losses[-_TREND_ROWS:]
    return (sum(after) - sum(before)) / _TREND_ROWS


def _number(row: Mapping[str, Any], *names: str) -> float | None:
    for name in names:
        value = row.get(name)
        if isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    return None
