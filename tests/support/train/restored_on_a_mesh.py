"""Saves a state of all devices there are, or restores one, and prints a digest of its arrays.

Usage: restored_on_a_mesh.py CONFIG CHECKPOINTS [KEY=VALUE ...]

Without a checkpoint it saves random numbers as step 1; else it restores the newest step and saves
what it got as the next.
"""

import hashlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from train.checkpoint.checkpoints import Checkpoints, Progress
from train.devices.mesh import make_mesh
from train.load_config import load_config
from train.step.update import TrainingFunctions, TrainState


def made_up(state: TrainState) -> TrainState:
    """The same arrays with other numbers everywhere, the empty optimizer's too."""

    def change(array: jax.Array) -> jax.Array:
        numbers = jnp.sin(jnp.arange(array.size, dtype=jnp.float32)).reshape(array.shape)
        return array + numbers.astype(array.dtype)

    return jax.tree.map(change, state)


def main(config_file: str, folder: str, *overrides: str) -> None:
    pairs = [tuple(override.split("=")) for override in overrides]
    config = load_config(config_file, pairs)
    mesh = make_mesh(config)
    with jax.set_mesh(mesh), Checkpoints(Path(folder), config.checkpoint) as checkpoints:
        functions = TrainingFunctions(config, mesh)
        restored = checkpoints.restore(functions.abstract_state, functions.shardings)
        if restored is None:
            create = jax.jit(made_up, out_shardings=functions.shardings)
            restored = create(functions.initial_state()), Progress()
        state, progress = restored
        for array, sharding in zip(
            jax.tree.leaves(state), jax.tree.leaves(functions.shardings), strict=True
        ):
            assert array.sharding.is_equivalent_to(sharding, array.ndim)
        checkpoints.save(state, Progress(progress.step + 1, progress.step + 1, 0))
    digest = hashlib.sha256()
    for array in jax.tree.leaves(state):
        digest.update(np.asarray(array).tobytes())
    print(len(mesh.devices.flat), progress.step, digest.hexdigest())


if __name__ == "__main__":
    main(*sys.argv[1:])
