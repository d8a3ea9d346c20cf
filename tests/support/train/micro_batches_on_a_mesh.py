"""One update by parts on eight devices, in one slice and in two, against one of the whole batch.

For test_losses.py.

Prints the largest differences, relative to the largest entry, as JSON. XLA warns on stderr.
"""

import dataclasses
import json

import jax
import numpy as np

from tests.support.train.gradients_on_meshes import make_batch, make_config
from train.config import LossConfig, OptimizerConfig, TrainConfig
from train.devices.mesh import make_mesh
from train.step.update import TrainingFunctions


def update(config: TrainConfig) -> tuple[dict[str, float], list[np.ndarray]]:
    """Metrics and state after one update."""
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        functions = TrainingFunctions(config, mesh)
        state, metrics = functions.update(functions.initial_state(), make_batch())
        return jax.device_get(metrics), jax.tree.leaves(jax.device_get(state))


def main() -> None:
    config = dataclasses.replace(
        make_config("from-scratch", {"data": 2, "fsdp": 2, "context": 2}),
        loss=LossConfig(z_loss=1e-2, slot_loss=1e-1),
        # An update that is smooth in the gradient, near 0 too.
        optimizer=OptimizerConfig(epsilon=1.0, learning_rate=0.1),
    )
    metrics, state = update(config)
    parts = {"micro_batches": 2, "head_parts": 4}
    slices = {"mesh": dataclasses.replace(config.mesh, slices=2)}
    differences: dict[str, float] = {}
    for changes in (parts, slices, parts | slices):
        found, found_state = update(dataclasses.replace(config, **changes))
        errors = {name: abs(found[name] / metrics[name] - 1) for name in found if metrics[name]}
        errors["state"] = max(
            float(np.abs(x - wanted).max() / max(np.abs(wanted).max(), 1e-30))
            for x, wanted in zip(found_state, state, strict=True)
        )
        for name, error in errors.items():
            differences[name] = max(differences.get(name, 0), float(error))
    print(json.dumps(differences))
