"""Times the training loop against the bare compiled step: data, transfers, metrics, the bar.

    uv run python benchmarks/loop.py

The loop of `nha train`, and the same update on one batch that is on the devices already, take turns
of some steps each. Evaluations and checkpoints are left out. It prints medians over the turns: of
the time on the clock, and of the processors' time, which other programs disturb less.
"""

import argparse
import contextlib
import os
import signal
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from train.checkpoint.checkpoints import Checkpoints
from train.config import TrainConfig
from train.data.batches import Sequences, training_batches
from train.data.corpus import load_corpus
from train.devices.mesh import make_mesh
from train.load_config import load_config
from train.loop.trainer import Trainer
from train.step.update import TrainingFunctions
from train.storage.run_folder import RunFolder

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
SIZES: dict[str, list[tuple[str, str]]] = {
    "quick start": [],
    "4x the tokens, 2x the width": [("batch_size", "8"), ("model.hidden_size", "256")],
}


Times = np.ndarray
"""[2]: seconds on the clock, and of this process on all processors."""


def now() -> Times:
    return np.array([time.perf_counter(), time.process_time()])


class Turns:
    """One configuration, trained by the loop and by hand in turns."""

    def __init__(self, config: TrainConfig, checkpoints: Checkpoints):
        mesh, corpus = make_mesh(config), load_corpus(config.data)
        self._trainer = Trainer(config, corpus, mesh, RunFolder(config.run), checkpoints)
        self._functions = TrainingFunctions(config, mesh)
        sequences = Sequences(corpus.training, config.data.sequence_length)
        batch = next(training_batches(sequences, config.batch_size, config.seed, 0))
        self._batch = self._functions.place(batch)
        self._state = self._functions.initial_state()

    def by_the_loop(self, steps: int) -> Times:
        """Returns the times of a step, from the start of the second to that of the last one."""
        starts: list[Times] = []
        interruption = SimpleNamespace(signal=None)
        update = self._trainer._functions.update

        def timed(*arguments: Any) -> Any:
            starts.append(now())
            if len(starts) == steps:
                interruption.signal = signal.SIGINT
            return update(*arguments)

        self._trainer._functions.update = timed  # type: ignore[method-assign]
        self._trainer.run(interruption)  # type: ignore[arg-type]
        self._trainer._functions.update = update  # type: ignore[method-assign]
        return (starts[-1] - starts[1]) / (steps - 2)

    def bare(self, steps: int) -> Times:
        """Returns the times of a bare step; the host waits for the step before, so none pile up."""
        starts: list[Times] = []
        before = None
        for _ in range(steps):
            starts.append(now())
            self._state, metrics = self._functions.update_placed(self._state, self._batch)
            jax.block_until_ready(before)
            before = metrics
        jax.block_until_ready(before)
        return (starts[-1] - starts[1]) / (steps - 2)


def measure(overrides: list[tuple[str, str]], turns: int, steps: int) -> tuple[Times, Times]:
    """Returns the medians, over the turns, of a bare step's times and of a step in the loop."""
    with tempfile.TemporaryDirectory() as folder:
        # Longer than all turns, and with no evaluation or checkpoint within them.
        far = str(10 * turns * steps)
        settings = [("steps", far), ("evaluation.every", far), ("checkpoint.every", far)]
        config = load_config(str(CONFIG), [*overrides, *settings, ("run", folder)])
        times: dict[str, list[Times]] = {"bare": [], "loop": []}
        with (
            jax.set_mesh(make_mesh(config)),
            Checkpoints(Path(folder) / "checkpoints", config.checkpoint) as checkpoints,
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            pair = Turns(config, checkpoints)
            pair.bare(3)
            pair.by_the_loop(3)
            for _ in range(turns):
                times["bare"].append(pair.bare(steps))
                times["loop"].append(pair.by_the_loop(steps))
    return np.median(times["bare"], axis=0), np.median(times["loop"], axis=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--steps", type=int, default=30, help="of each in a turn")
    parser.add_argument("--only", choices=list(SIZES), help="one configuration")
    options = parser.parse_args()
    print("| configuration | bare step, ms | in the loop, ms | overhead | of processor time |")
    print("| --- | --- | --- | --- | --- |")
    for name in [options.only] if options.only else SIZES:
        overrides = SIZES[name]
        bare, loop = measure(overrides, options.turns, options.steps)
        milliseconds = f"{1e3 * bare[0]:.1f} | {1e3 * loop[0]:.1f}"
        overhead, of_processors = loop / bare - 1
        print(f"| {name} | {milliseconds} | {overhead:+.1%} | {of_processors:+.1%} |")


if __name__ == "__main__":
    main()
