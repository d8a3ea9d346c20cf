"""Prints the losses of a run's first steps and of those after a checkpoint, on all devices.

Usage: losses_on_a_mesh.py CONFIG CHECKPOINTS
"""

import json
from pathlib import Path

import jax

from train.checkpoint.checkpoints import Checkpoints, Progress
from train.data.batches import Sequences, training_batches
from train.data.corpus import load_corpus
from train.devices.mesh import make_mesh
from train.load_config import load_config
from train.step.update import TrainingFunctions, TrainState


def main(config_file: str, folder: str) -> None:
    config = load_config(config_file, [("mesh.fsdp", "2")])
    sequences = Sequences(load_corpus(config.data).training, config.data.sequence_length)
    mesh = make_mesh(config)
    losses = {}

    def follow(state: TrainState, progress: Progress, count: int) -> None:
        batches = training_batches(sequences, config.batch_size, config.seed, progress.next_batch)
        for step in range(progress.step + 1, progress.step + count + 1):
            state, metrics = functions.update(state, next(batches))
            losses[step] = float(metrics["loss"])

    with jax.set_mesh(mesh), Checkpoints(Path(folder), config.checkpoint) as checkpoints:
        functions = TrainingFunctions(config, mesh)
        follow(functions.initial_state(), Progress(), 3)
        restored = checkpoints.restore(functions.abstract_state, functions.shardings)
        assert restored is not None
        follow(*restored, 5)
    assert mesh.devices.size == 8
    print(json.dumps(losses))
