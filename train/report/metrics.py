"""Where a run reports to: rows in a file, TensorBoard events, a progress bar."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar
from tqdm import tqdm

from train.errors import do_without
from train.storage.atomic import write_if_changed

Row = dict[str, Any]
"""The metrics of one step: `step`, and numbers, lists of a number a layer, or text, by name."""

_RENAMED = {"slot_share": "slot_weight"}
"""Metrics as rows of an earlier version call them -> as they are called now."""


class Reporter(Protocol):
    """A place that rows are written to."""

    def write(self, row: Row) -> None:
        """Writes a row."""

    def close(self) -> None:
        """Ends the report: no row will follow."""


class JsonLines:
    """A file with one row a line, in the order of their steps.

    A row is written whole and at once, so a kill leaves at most one torn line, the last. Numbers
    that are not finite are null.
    """

    def __init__(self, path: Path, after_step: int):
        """Opens or makes the file; drops rows after the step `after_step`, and a torn last one."""
        kept = [row for row in read_rows(path) if row["step"] <= after_step]
        write_if_changed(path, "".join(map(_to_line, kept)))
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Row) -> None:
        self._file.write(_to_line(row))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """A folder of TensorBoard events; numbers that are not finite are left out."""

    def __init__(self, folder: Path, after_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        # Not its SummaryWriter: on a full disk that one's thread dies, and then its queue blocks.
        self._events = EventsWriter(str(folder / "events"))
        # Tells TensorBoard to forget what an earlier session wrote from this step on.
        start = SessionLog(status=SessionLog.START)
        self._add(after_step + 1, session_log=start)

    def write(self, row: Row) -> None:
        for name, value in scalars(row).items():
            self._add(row["step"], summary=scalar(name, value))
        self._events.flush()

    def close(self) -> None:
        self._events.close()

    def _add(self, step: int, **content: Any) -> None:
        self._events.write_event(Event(step=step, wall_time=time.time(), **content))


class Dispensable:
    """A reporter that a run can do without: when it fails, a line says so and it gets no more."""

    def __init__(self, name: str, make: Callable[[], Reporter]):
        """Makes the reporter, if that works.

        Args:
            name: what the line calls it.
            make: makes it.
        """
        self._name = name
        self._reporter: Reporter | None = None
        with do_without(name):
            self._reporter = make()

    def write(self, row: Row) -> None:
        reporter, self._reporter = self._reporter, None
        if reporter is not None:
            with do_without(self._name):
                reporter.write(row)
                self._reporter = reporter

    def close(self) -> None:
        if self._reporter is not None:
            with do_without(self._name):
                self._reporter.close()


class MetricsLog:
    """Writes every row to JSON lines, to TensorBoard and to further reporters."""

    def __init__(self, path: Path, events: Path, after_step: int, more: Sequence[Reporter] = ()):
        """Opens the log to continue after a step.

        Args:
            path: the JSON lines.
            events: TensorBoard's folder.
            after_step: the last step that counts as done; 0 starts afresh.
            more: closed with the log.
        """
        lines = JsonLines(path, after_step)
        board = Dispensable("TensorBoard", lambda: TensorBoard(events, after_step))
        self._reporters: tuple[Reporter, ...] = (lines, board, *more)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.ExitStack() as stack:  # all of them, though one may fail
            for reporter in self._reporters:
                stack.callback(reporter.close)

    def write(self, row: Row) -> None:
        """Hands on a row; see `Reporter.write`."""
        for reporter in self._reporters:
            reporter.write(row)


def scalars(row: Row) -> dict[str, float]:
    """The finite numbers of a row except its step; a list's are named name/layer_0 and so on."""
    flat: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, list):
            flat |= {f"{name}/layer_{layer}": entry for layer, entry in enumerate(value)}
        elif name != "step":
            flat[name] = value
    return {name: value for name, value in flat.items() if _is_finite(value)}


def _is_finite(value: Any) -> bool:
    """Whether it is a number, and a finite one; text and None are not."""
    return isinstance(value, int | float) and math.isfinite(value)


def read_rows(path: Path) -> list[Row]:
    """Reads all whole rows of a metrics file; none if there is no file.

    Metrics that an earlier version called otherwise get their present names.
    """
    return parse_rows(path.read_bytes()) if path.exists() else []


def parse_rows(content: bytes) -> list[Row]:
    """Does what `read_rows` does with the content of a file, or of the end of one."""
    rows = []
    for line in content.split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:  # the torn last line, or the empty one after the last
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(_with_present_names(row))
    return rows


def _with_present_names(row: Row) -> Row:
    return {_RENAMED.get(name, name): value for name, value in row.items()}


class ProgressBar:
    """A tqdm bar on stderr: steps (or what `unit` names), the time left, and named values."""

    def __init__(self, total: int, initial: int, unit: str = "step", shown: bool = True):
        # Where no one watches it live, a line every ten seconds is enough.
        interval = 0.1 if sys.stderr.isatty() else 10.0
        self._bar = tqdm(
            total=max(total, initial),
            initial=initial,
            unit=unit,
            mininterval=interval,
            dynamic_ncols=True,
            disable=not shown,
        )
        self._shown: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def expect(self, more: int) -> None:
        """Adds `more` steps to those that the bar is to reach."""
        self._bar.total = (self._bar.total or 0) + more
        self._bar.refresh()

    def advance(self, **shown: str) -> None:
        """Advances by a step; `shown` replaces the values beside the bar that have these names."""
        self._shown |= shown
        self._bar.set_postfix(self._shown, refresh=False)
        self._bar.update()


def _to_line(row: Row) -> str:
    # JSON has no NaN: the loss of a skipped update is null.
    def finite(value: Any) -> Any:
        if isinstance(value, list):
            return list(map(finite, value))
        return value if isinstance(value, str) or _is_finite(value) else None

    numbers = {name: finite(value) for name, value in row.items()}
    return json.dumps(numbers, allow_nan=False) + "\n"
