"""Learning from marked tokens alone: what is masked has no part in a step, however it is packed."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import nha_jax
from nha_jax.testing import relative_error
from tests.support.train.gradients_on_meshes import make_config
from train.config import LossConfig, OptimizerConfig, TrainConfig
from train.data.batches import Batch
from train.devices.mesh import make_mesh
from train.step.losses import counts, losses
from train.step.update import TrainingFunctions

ROWS, LENGTH = 8, 32
# Question and answer of each dialogue; of the last, nothing is learned.
DIALOGUES = [(3, 9), (12, 2), (6, 1), (5, 8), (1, 20), (4, 0)]


def config(**changes: Any) -> TrainConfig:
    """One small layer with a window of 6; an update is smooth in the gradient."""
    whole = make_config("from-scratch", {"data": 1})
    model = dataclasses.replace(
        whole.model, window_size=6, num_layers=1, remat="none", implementation="reference"
    )
    optimizer = OptimizerConfig(epsilon=1.0, learning_rate=0.1, weight_decay=0.0)
    return dataclasses.replace(whole, model=model, optimizer=optimizer, **changes)


def place(rows: list[list[tuple[int, int]]]) -> Batch:
    """A batch of dialogues, whose tokens are drawn by their sizes; the rest of it is padding."""
    batch: Batch = {
        name: np.zeros((ROWS, LENGTH), np.int32) for name in ("tokens", "targets", "segment_ids")
    }
    batch["loss_mask"] = np.zeros((ROWS, LENGTH), bool)
    for row, dialogues in enumerate(rows):
        start = 0
        for number, (question, answer) in enumerate(dialogues, 1):
            stop = start + question + answer - 1  # the last token is a target alone
            drawn = np.random.default_rng([question, answer]).integers(0, 263, stop + 1 - start)
            batch["tokens"][row, start:stop] = drawn[:-1]
            batch["targets"][row, start:stop] = drawn[1:]
            batch["segment_ids"][row, start:stop] = number
            batch["loss_mask"][row, start + question - 1 : stop] = True
            start = stop
    return batch


ALONE = place([[each] for each in DIALOGUES])
NOTHING = ALONE | {"loss_mask": np.zeros((ROWS, LENGTH), bool)}
PACKED = place([DIALOGUES[:2], [*DIALOGUES[3:4], *DIALOGUES[2:3]], DIALOGUES[4:]])


@pytest.fixture(scope="module")
def gradients() -> Any:
    """Loss and gradients in the parameters of a small model."""
    model = nha_jax.Model(config().model, rngs=nnx.Rngs(0))
    graph, parameters = nnx.split(model)

    @jax.jit
    @jax.value_and_grad
    def run(parameters: Any, batch: Batch) -> jax.Array:
        total = counts(model.config, batch)
        return losses(nnx.merge(graph, parameters), batch, LossConfig(z_loss=0.1), total)[0]

    return lambda batch: jax.device_get(run(parameters, batch))


def test_packing_changes_no_loss_and_no_gradient(gradients: Any) -> None:
    assert ALONE["loss_mask"].sum() == PACKED["loss_mask"].sum() == 40
    (alone, by_alone), (packed, by_packed) = gradients(ALONE), gradients(PACKED)
    np.testing.assert_allclose(packed, alone, rtol=1e-6)
    errors = jax.tree.map(relative_error, by_packed, by_alone)
    assert max(jax.tree.leaves(errors)) < 1e-6


def test_the_gradient_of_a_masked_token_is_exactly_zero(gradients: Any) -> None:
    """Behind the last answer of a document nothing is learned of what stands there."""
    batch = {name: array.copy() for name, array in PACKED.items()}
    row = np.flatnonzero(batch["segment_ids"][2] == 1)
    batch["loss_mask"][2, row[10:]] = False  # from here on, what follows is masked
    _, before = gradients(batch)
    unseen = 263
    assert not np.isin(unseen, batch["tokens"])
    batch["tokens"][2, row[11]] = unseen
    batch["targets"][2, row[10:]] = (batch["targets"][2, row[10:]] + 1) % 264
    _, after = gradients(batch)
    assert not np.any(after["embed"]["embedding"][...][unseen])
    for x, y in zip(*map(jax.tree.leaves, (after, before)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_masked_target_may_be_any(gradients: Any) -> None:
    batch = dict(PACKED)
    masked = ~batch["loss_mask"]
    batch["targets"] = np.where(masked, (batch["targets"] + 17) % 264, batch["targets"])
    for x, y in zip(*map(jax.tree.leaves, (gradients(batch), gradients(PACKED))), strict=True):
        np.testing.assert_array_equal(x, y)


def update(batch: Batch, micro_batches: int) -> tuple[dict[str, Any], Any, Any]:
    """Metrics, and the parameters before and after an update."""
    chosen = config(micro_batches=micro_batches)
    mesh = make_mesh(chosen, jax.devices()[:1])
    with jax.set_mesh(mesh):
        functions = TrainingFunctions(chosen, mesh)
        state = functions.initial_state()
        before = jax.device_get(state.model)
        state, metrics = functions.update(state, batch)
        return jax.device_get(metrics), before, jax.device_get(state.model)


@pytest.mark.slow
def test_parts_of_a_batch_count_by_their_targets() -> None:
    """The parts have 11, 9, 20 and no targets, and are means of none by themselves."""
    metrics, _, parameters = update(ALONE, micro_batches=1)
    by_parts, before, parameters_by_parts = update(ALONE, micro_batches=4)
    np.testing.assert_allclose(by_parts["loss"], metrics["loss"], rtol=1e-6)
    errors = jax.tree.map(relative_error, parameters_by_parts, parameters)
    assert max(jax.tree.leaves(errors)) < 1e-6
    moved = jax.tree.map(relative_error, parameters, before)
    assert max(jax.tree.leaves(moved)) > 1e-4


def test_without_a_target_loss_and_gradients_are_zero(gradients: Any) -> None:
    loss, pulled = gradients(NOTHING)
    assert loss == 0
    assert not any(np.any(each) for each in jax.tree.leaves(pulled))


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_a_step_without_a_target_moves_nothing(micro_batches: int) -> None:
    metrics, before, after = update(NOTHING, micro_batches)
    assert (metrics["loss"], metrics["gradient_norm"], metrics["skipped"]) == (0, 0, 0)
    for x, y in zip(*map(jax.tree.leaves, (after, before)), strict=True):
        np.testing.assert_array_equal(x, y)
