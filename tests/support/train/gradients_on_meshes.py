"""Loss and gradients of a model on eight devices against those on one; for test_mesh.py.

Usage: gradients_on_meshes.py KIND MESH..., a key of KINDS, and meshes as JSON, e.g.
'{"data": 4, "context": 2}'. Prints the largest differences, relative to the largest gradient, as
JSON. XLA warns on stderr.
"""

import json
from typing import Any

import jax
import numpy as np
from flax import nnx

from nha_jax import ModelConfig
from train.config import DataConfig, MeshConfig, TrainConfig
from train.devices.mesh import make_mesh
from train.step.losses import loss_sum
from train.step.update import TrainingFunctions

B, T, VOCABULARY = 8, 32, 264
KINDS: dict[str, dict[str, Any]] = {
    "from-scratch": {},
    "converted": {
        "conv_width": 0,
        "value_activation": "identity",
        "output_norm": False,
        "qk_norm": True,
        "attention_bias": "all",
        "empty_slots": "mask",
        "experts": {"count": 5, "per_token": 2, "size": 24},
    },
    "two-key-heads": {"num_kv_heads": 2},
}


def make_config(kind: str, mesh: dict[str, int]) -> TrainConfig:
    """With a window and with full attention; every axis of the mesh can be 8."""
    model = ModelConfig(
        vocab_size=VOCABULARY,
        num_layers=2,
        hidden_size=64,
        num_query_heads=8,
        num_slots=8,
        window_size=(6, None),
        tie_embeddings="tensor" in mesh,
        dtype="float32",
        **KINDS[kind],
    )
    return TrainConfig(
        run="unused",
        steps=10,
        batch_size=B,
        model=model,
        data=DataConfig(corpus="unused", sequence_length=T),
        mesh=MeshConfig(**{"data": 1, **mesh}),
    )


def make_batch() -> dict[str, np.ndarray]:
    """Packed documents, which end anywhere, and some padding."""
    rng = np.random.default_rng(0)
    segment_ids = 1 + np.cumsum(rng.random((B, T)) < 0.1, axis=1)
    segment_ids[: B // 2, -3:] = 0
    tokens, targets = rng.integers(0, VOCABULARY, (2, B, T))
    batch = {"tokens": tokens, "targets": targets, "segment_ids": segment_ids}
    return {name: x.astype(np.int32) for name, x in batch.items()} | {"loss_mask": segment_ids > 0}


def gradients(config: TrainConfig, devices: list[jax.Device]) -> tuple[float, dict[str, Any]]:
    """The mean loss of the batch, and its gradients on the host."""
    mesh = make_mesh(config, devices)
    with jax.set_mesh(mesh):
        functions = TrainingFunctions(config, mesh)
        batch = functions.place(make_batch())

        def mean_loss(state: Any) -> jax.Array:
            total = loss_sum(functions.model(state), batch)
            return total.nats / total.targets

        loss, found = jax.jit(jax.value_and_grad(mean_loss))(functions.initial_state().model)
        return float(loss), jax.device_get(nnx.to_pure_dict(found))


def main(kind: str, *meshes: str) -> None:
    differences = {}
    for text in meshes:
        config = make_config(kind, json.loads(text))
        alone = make_config(kind, dict.fromkeys(json.loads(text), 1))
        loss, found = gradients(config, jax.devices())
        expected_loss, expected = gradients(alone, jax.devices()[:1])
        pairs = zip(*map(jax.tree.leaves, (found, expected)), strict=True)
        largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
        difference = max(float(np.abs(x - wanted).max()) for x, wanted in pairs)
        differences[text] = {
            "loss": abs(loss - expected_loss) / expected_loss,
            "gradients": difference / largest,
        }
    print(json.dumps(differences))
