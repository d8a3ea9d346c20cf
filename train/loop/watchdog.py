"""A thread that ends a run which does not move, so that a scheduler can start it again."""

import contextlib
import faulthandler
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable

import jax

from train.config import WatchdogConfig
from train.devices.heartbeats import Beat, Heartbeats
from train.failures import STUCK
from train.report.goodput import Times, format_seconds

_TICK = 1.0
_STEPS = 100  # of which the median is taken
_LEAST_STEPS = 5  # before that their median says little

_IN_STEPS = ("steps", "data")


class Watchdog:
    """Ends the process with exit code STUCK if no step, and nothing else, comes to its end in time.

    Steps, and the wait for their data, may take `watchdog.factor` times the median of the last
    hundred, but at least `watchdog.least_seconds`; all else, such as compiling or a save, has
    `watchdog.other_seconds`. Time in which this very process was stopped does not count. What it
    knows is written down first: every thread's stack, and which processes do not answer or are at
    another step.
    """

    def __init__(self, config: WatchdogConfig, times: Times, report: Callable[[str, bytes], None]):
        """Watches nothing yet.

        Args:
            config: the section `watchdog`.
            times: says what the run is at.
            report: writes a file of a name into the run's folder.
        """
        self._config, self._times, self._report = config, times, report
        self._heartbeats = Heartbeats(self._describe)
        self._durations: deque[float] = deque(maxlen=_STEPS)
        self._step, self._at_last_step = 0, self._in_steps()
        self._moved = 0
        self._ended = threading.Event()

    def __enter__(self) -> "Watchdog":
        self._heartbeats.__enter__()
        if self._config.factor is not None:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._heartbeats.__exit__()

    def step(self, step: int) -> None:
        """Notes that a step has come to its end."""
        spent = self._in_steps()
        self._durations.append(spent - self._at_last_step)
        self._step, self._at_last_step = step, spent
        self._moved += 1

    def slowest(self) -> dict[str, float]:
        """Names the process that waited longest for data, of several: metrics for a row."""
        beats = self._heartbeats.read() if jax.process_count() > 1 else None
        if not beats:
            return {}
        process, beat = max(beats.items(), key=lambda item: item[1]["data"])
        return {"slowest_process": process, "slowest_process_data_seconds": beat["data"]}

    def _in_steps(self) -> float:
        return sum(self._times.seconds[kind] for kind in _IN_STEPS)

    def _describe(self) -> Beat:
        """What the other processes are told."""
        seconds = self._times.seconds
        return {"step": self._step, "at": self._times.kind, "data": round(seconds["data"], 3)}

    def _bound(self, kind: str) -> float:
        """How many seconds may pass without anything coming to its end."""
        config = self._config
        assert config.factor is not None
        if kind not in _IN_STEPS or len(self._durations) < _LEAST_STEPS:
            return config.other_seconds
        usual = statistics.median(self._durations)
        return max(config.factor * usual, config.least_seconds)

    def _watch(self) -> None:
        idle, before, seen = 0.0, time.monotonic(), (self._moved, self._times.kind)
        while not self._ended.wait(_TICK):
            now = time.monotonic()
            passed, before = now - before, now
            present = self._moved, self._times.kind
            # A tick that took long is one in which this process was stopped.
            idle = idle + min(passed, 2 * _TICK) if present == seen else 0.0
            seen = present
            if idle > self._bound(present[1]) and not self._ended.is_set():
                self._end(idle, present[1])

    def _end(self, idle: float, kind: str) -> None:
        """Writes down what is known, and ends the process."""
        usual = statistics.median(self._durations) if self._durations else None
        lines = [
            f"nothing has come to its end for {format_seconds(idle)} after step {self._step}; "
            f"this process is at: {kind}"
            + (f" (a step takes {format_seconds(usual)})" if usual is not None else "")
        ]
        lines += self._others()
        name = f"watchdog/{time.strftime('%Y%m%d-%H%M%S')}-process-{jax.process_index()}.txt"
        text = "\n".join(lines).encode() + b"\n\n" + _stacks()
        with contextlib.suppress(Exception):
            self._report(name, text)
        print(f"\nnha: watchdog: {'; '.join(lines)}; see {name}", file=sys.stderr)
        print("nha: the same command resumes", file=sys.stderr, flush=True)
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(STUCK)

    def _others(self) -> list[str]:
        """Says of each other process that does not answer, or is elsewhere, so."""
        if jax.process_count() == 1:
            return []
        before = self._heartbeats.read()
        time.sleep(6.0)  # in which a living process beats at least twice
        after = self._heartbeats.read()
        if before is None or after is None:
            return ["process 0, through which the others are reached, does not answer"]
        lines = []
        for process in range(jax.process_count()):
            beat = after.get(process)
            if process == jax.process_index():
                continue
            if beat is None or beat["count"] == before.get(process, {}).get("count"):
                last = f"; it was last at step {beat['step']}: {beat['at']}" if beat else ""
                lines.append(f"process {process} does not answer{last}")
            else:
                lines.append(f"process {process} is at step {beat['step']}: {beat['at']}")
        return lines


def _stacks() -> bytes:
    """What every thread of this process is at."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
