"""Times a step of the quick start with each optimizer, and counts the bytes of its state.

    uv run python benchmarks/optimizers.py

The bare compiled updates, each on a batch that is on the device already, take turns of some steps
each. It prints medians over the turns, of the time on the clock and of the processors' time, which
other programs disturb less, and each beside AdamW's of the same turn.
"""

import argparse
import time
from pathlib import Path

import jax
import numpy as np

from train.data.batches import Sequences, training_batches
from train.data.corpus import load_corpus
from train.devices.mesh import make_mesh
from train.load_config import load_config
from train.optimizers import OPTIMIZERS
from train.step.update import TrainingFunctions

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
NOT_GIVEN = [(f"optimizer.{key}", "null") for key in ("beta2", "schedule")]
"""What the file gives and not every optimizer takes."""


class Contender:
    """One optimizer, and the state of a run with it."""

    def __init__(self, name: str):
        config = load_config(str(CONFIG), [*NOT_GIVEN, ("optimizer.name", name)])
        self._functions = TrainingFunctions(config, make_mesh(config))
        sequences = Sequences(load_corpus(config.data).training, config.data.sequence_length)
        batch = next(training_batches(sequences, config.batch_size, config.seed, 0))
        self._batch = self._functions.place(batch)
        self._state = self._functions.initial_state()
        self.bytes = sum(x.nbytes for x in jax.tree.leaves(self._state.optimizer))

    def step(self, count: int) -> np.ndarray:
        """Returns [2], of a step: seconds on the clock, and of this process on all processors."""
        start = np.array([time.perf_counter(), time.process_time()])
        for _ in range(count):
            self._state, metrics = self._functions.update_placed(self._state, self._batch)
            jax.block_until_ready(metrics)
        return (np.array([time.perf_counter(), time.process_time()]) - start) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--steps", type=int, default=10, help="of each in a turn")
    parser.add_argument("--only", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS))
    options = parser.parse_args()
    contenders = {name: Contender(name) for name in dict.fromkeys(["adamw", *options.only])}
    for contender in contenders.values():
        contender.step(2)
    times = {name: [] for name in contenders}
    for _ in range(options.turns):
        for name, contender in contenders.items():
            times[name].append(contender.step(options.steps))
    print("| optimizer | ms a step | of AdamW's | processors' ms | of AdamW's | state, MB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, contender in contenders.items():
        clock, processors = 1e3 * np.median(times[name], axis=0)
        ratios = np.median(np.divide(times[name], times["adamw"]), axis=0)
        figures = f"{clock:.1f} | {ratios[0]:.2f} | {processors:.1f} | {ratios[1]:.2f}"
        print(f"| {name} | {figures} | {contender.bytes / 1e6:.1f} |")


if __name__ == "__main__":
    main()
