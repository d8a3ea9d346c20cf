"""What runs from a converted model start with: the model, and a batch to learn."""

from pathlib import Path

import numpy as np
import pytest
from flax import nnx

import nha_jax
from tests.support.original import original_config
from train.data.batches import Batch


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model of two layers with full attention, as an import leaves it."""
    config = original_config(num_layers=2, hidden_size=32, num_slots=8, mlp_size=48)
    folder = tmp_path_factory.mktemp("original") / "model"
    files = {"generation_config.json": b'{"temperature": 0.5}'}
    nha_jax.save(folder, nha_jax.Model(config, rngs=nnx.Rngs(0)), files=files)
    return folder


@pytest.fixture
def batch() -> Batch:
    tokens = np.random.default_rng(0).integers(0, 256, (8, 33), np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones((8, 32), np.int32),
        "loss_mask": np.ones((8, 32), bool),
    }
