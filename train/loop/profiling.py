"""Tracing some steps with jax's profiler."""

from pathlib import Path
from typing import Any, Self

import jax


class Profiler:
    """Traces a range of steps into a folder; a context manager."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path):
        """Starts nothing yet.

        Args:
            steps: first and last step to trace; None: no trace.
            folder: where the trace goes, for TensorBoard's profile plugin or Perfetto.
        """
        self._steps = steps
        self._folder = folder
        self._running = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """Starts the trace if `step` is to be traced."""
        if self._steps and not self._running and self._steps[0] <= step <= self._steps[1]:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, results: Any) -> None:
        """Ends the trace after the last step, once the devices have computed its results."""
        if self._running and self._steps and step == self._steps[1]:
            jax.block_until_ready(results)
            self._stop()

    def _stop(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
