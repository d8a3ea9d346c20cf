"""Tracing some steps with jax's profiler."""

import os
from pathlib import Path
from typing import Any, Self

import jax

from train.errors import ConfigError, do_without

_NAME = "logging.profile"


def check_profile(steps: tuple[int, int] | None, folder: Path) -> None:
    """Raises ConfigError if a trace is asked for and cannot be written into its folder."""
    writable = os.access(folder, os.W_OK) if folder.is_dir() else not folder.exists()
    if steps is not None and not writable:
        raise ConfigError(
            f"{_NAME} = {list(steps)}: cannot write into {folder}; remove it, or leave the key out"
        )


class Profiler:
    """Traces a range of steps into a folder; a context manager. A trace that fails is left out."""

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
            steps, self._steps = self._steps, None  # not tried again if it fails
            with do_without(_NAME):
                jax.profiler.start_trace(str(self._folder))
                self._steps, self._running = steps, True

    def after(self, step: int, results: Any) -> None:
        """Ends the trace after the last step, once the devices have computed its results."""
        if self._running and self._steps and step == self._steps[1]:
            jax.block_until_ready(results)
            self._stop()

    def _stop(self) -> None:
        if self._running:
            self._running = False
            with do_without(_NAME):
                jax.profiler.stop_trace()
