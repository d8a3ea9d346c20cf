"""muP in training: the steps of a wider model, and activations that move alike at every width."""

from typing import Any

import numpy as np
import pytest

from benchmarks.coordinate_check import KINDS, check, slope
from nha_jax.sizes import by_name
from tests.support.train.tiny_run import Nha
from train.config import TrainConfig
from train.data.batches import Batch
from train.devices.mesh import make_mesh
from train.step import update
from train.step.update import TrainingFunctions

LEARNING_RATE = 0.01


def config_of(nha: Nha, **overrides: Any) -> TrainConfig:
    fixed = {"optimizer__learning_rate": LEARNING_RATE, "optimizer__schedule": "constant"}
    return nha.config(**fixed, optimizer__warmup_steps=0, **overrides)


def test_the_optimizer_is_told_how_much_wider_the_model_is(
    nha: Nha, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    make = update.make_optimizer
    monkeypatch.setattr(update, "make_optimizer", lambda *x: told.append(x[3]) or make(*x))
    for base_width in (8, None):
        config = config_of(nha, model__mup_base_width=base_width)
        TrainingFunctions(config, make_mesh(config))
    assert told == [4.0, 1.0]


@pytest.mark.slow
def test_a_first_step_of_adamw_is_as_large_as_the_width_asks(nha: Nha) -> None:
    config = config_of(nha, model__mup_base_width=8, model__implementation="reference")
    functions = TrainingFunctions(config, make_mesh(config))
    tokens = np.arange(8 * 32, dtype=np.int32).reshape(8, 32)
    ones = np.ones_like(tokens)
    batch = Batch(tokens=tokens, targets=tokens[:, ::-1], segment_ids=ones, loss_mask=ones > 0)
    state = functions.initial_state()
    before = {name: np.array(x) for name, x in by_name(state.model).items()}
    after, _ = functions.update(state, batch)
    for name, array in by_name(after.model).items():
        factor = 1 / 4 if name.endswith("_proj.kernel") else 1.0
        # The first step of Adam is the gradient's sign; weights decay by far less.
        largest = np.abs(np.asarray(array) - before[name]).max() / LEARNING_RATE
        np.testing.assert_allclose(largest, factor, rtol=0.15, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "least"), [("adamw", 0.4), ("muon", 0.25)])
def test_updates_of_activations_depend_on_the_width_without_mup_alone(
    nha: Nha, optimizer: str, least: float
) -> None:
    """AdamW's matter most: without muP they would grow as the width, and Muon's as its root."""

    def slopes(base_width: int | None) -> dict[str, float]:
        rows = []
        for width in (32, 256):
            config = config_of(
                nha,
                model__hidden_size=width,
                model__num_query_heads=width // 16,
                model__mup_base_width=base_width,
                model__mlp_size=4 * width,
                model__initializer_range=0.1,
                model__tie_embeddings=True,
                optimizer__name=optimizer,
            )
            rows += [{"width": width} | row for row in check(config, steps=3, seeds=2)]
        return {kind: slope(rows, "update", -1, kind=kind) for kind in KINDS}

    standard, mup = slopes(None), slopes(32)
    assert min(standard.values()) > least, standard
    assert max(map(abs, mup.values())) < 0.15, mup
