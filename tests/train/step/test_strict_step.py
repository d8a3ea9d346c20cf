"""An update under JAX's strict settings."""

from typing import Any

import jax
import numpy as np
import pytest

from tests.support.train.tiny_run import Nha
from train.data.batches import Batch
from train.devices.mesh import make_mesh
from train.load_config import load_config
from train.step.update import TrainingFunctions

OPTIONS = [
    ("batch_size", "2"),
    ("micro_batches", "2"),
    ("head_parts", "2"),
    ("model.remat", "full"),
    ("loss.slot_loss", "0.1"),
]


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory, tiny_values: dict[str, Any]):
    nha = Nha(tmp_path_factory.mktemp("strict"), tiny_values)
    config = load_config(str(nha.config_file), OPTIONS)
    return TrainingFunctions(config, make_mesh(config))


@pytest.fixture
def batch() -> Batch:
    """Two documents and padding in each row."""
    tokens = np.random.default_rng(0).integers(0, 256, (2, 33), np.int32)
    segment_ids = np.repeat(np.array([[1] * 10 + [2] * 15 + [0] * 7], np.int32), 2, axis=0)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": segment_ids,
        "loss_mask": segment_ids > 0,
    }


@pytest.mark.slow
def test_nothing_moves_between_host_and_device_in_an_update(functions, batch) -> None:
    state, placed = functions.initial_state(), functions.place(batch)
    with jax.transfer_guard("disallow"):
        state, metrics = functions.update_placed(state, placed)
        state, metrics = functions.update_placed(state, placed)
        jax.block_until_ready(metrics)
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            functions.update_placed(state, batch)


@pytest.mark.slow
def test_an_update_gives_no_nan(functions, batch) -> None:
    with jax.debug_nans(True):
        state, metrics = functions.update(functions.initial_state(), batch)
        functions.evaluate(state.model, batch)
    assert metrics["skipped"] == 0


@pytest.mark.slow
def test_no_tracer_leaks_of_an_update(functions) -> None:
    with jax.checking_leaks():
        functions.trace_update()


@pytest.mark.slow
def test_64_bits_change_no_update(functions, batch) -> None:
    expected = functions.update(functions.initial_state(), batch)
    with jax.enable_x64(True):
        found = functions.update(functions.initial_state(), batch)
    for x, y in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
