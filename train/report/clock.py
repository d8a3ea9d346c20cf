"""The speed of training, evaluations and saves left out."""

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Measures tokens a second between readings; started after the first step, which compiles."""

    def __init__(self, tokens_per_step: int):
        self._tokens_per_step = tokens_per_step
        self._start: tuple[float, int] | None = None
        self._paused_seconds = 0.0

    def start_once(self, step: int) -> None:
        """Starts the clock after `step`, unless it is running already."""
        if self._start is None:
            self._start = (time.perf_counter(), step)

    def stop(self) -> None:
        """Stops the clock, as the step that follows compiles."""
        self._start = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time spent inside the `with`."""
        before = time.perf_counter()
        yield
        self._paused_seconds += time.perf_counter() - before

    def tokens_per_second(self, step: int) -> float | None:
        """Reads the speed after `step` and starts anew; None if no step has passed since."""
        before, self._start = self._start, (time.perf_counter(), step)
        paused, self._paused_seconds = self._paused_seconds, 0.0
        if before is None or before[1] == step:
            return None
        return (step - before[1]) * self._tokens_per_step / (self._start[0] - before[0] - paused)
