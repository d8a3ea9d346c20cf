"""A run from a converted model on eight devices; for test_hybridize.py.

Usage: hybridize_on_a_mesh.py CONFIG WHAT. What is printed, as JSON: `read`, of each parameter the
entries of the largest part that was read, and of the whole; `train`, the metrics of three updates;
`slices`, the same of two slices and two micro-batches.
"""

import json
import math
from collections import Counter

import jax
import numpy as np

from nha_jax.storage.weights import Index, WeightSource
from train.devices.mesh import make_mesh
from train.load_config import load_config
from train.step.update import TrainingFunctions
from train.storage.initial_model import InitialModel, teacher_config


class Recorded:
    """A source that remembers the entries of the largest part that was read of each parameter."""

    def __init__(self, source: WeightSource):
        self.name, self.shapes = source.name, source.shapes
        self.largest: Counter[str] = Counter()
        self._source = source

    def read(self, name: str, index: Index) -> np.ndarray:
        part = self._source.read(name, index)
        self.largest[name] = max(self.largest[name], part.size)
        return part


def main(config_file: str, what: str) -> None:
    mesh_sizes = [("mesh.data", "1"), ("mesh.fsdp", "8")]
    if what == "slices":
        mesh_sizes = [("mesh", "{data: 2, fsdp: 2, context: 2, slices: 2}"), ("micro_batches", "2")]
    learning = [("loss.distillation", "1"), ("loss.attention_transfer", "1")]
    config = load_config(config_file, [*mesh_sizes, *learning])
    mesh = make_mesh(config)
    assert mesh.devices.size == 8
    with jax.set_mesh(mesh):
        initial = InitialModel.open(config.initial_model or "")
        source = Recorded(initial.source(config.model))
        functions = TrainingFunctions(config, mesh, teacher_config(config))
        state, original = functions.initial_state(source), functions.read_teacher(source)
        if what == "read":
            shapes = {name: math.prod(shape.shape) for name, shape in source.shapes.items()}
            print(json.dumps({name: (source.largest[name], shapes[name]) for name in shapes}))
            return
        tokens = np.random.default_rng(0).integers(0, 256, (8, 33), np.int32)
        batch = {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "segment_ids": np.ones((8, 32), np.int32),
            "loss_mask": np.ones((8, 32), bool),
        }
        rows = []
        for _ in range(3):
            state, metrics = functions.update(state, batch, original)
            rows.append({name: float(x) for name, x in metrics.items()})
        print(json.dumps(rows))
