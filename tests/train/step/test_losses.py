"""What is added to the cross-entropy, and a batch that is learned from in parts."""

import dataclasses
import json
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nha_jax
from nha_jax.argument_checks import default_positions
from nha_jax.testing import relative_error
from tests.support.eight_devices import run_on_eight_devices
from tests.support.train.gradients_on_meshes import make_batch, make_config
from train.config import LossConfig, OptimizerConfig, TrainConfig
from train.devices.mesh import make_mesh
from train.step.losses import (
    Counts,
    Teacher,
    counts,
    cross_entropy,
    losses,
    measure_hidden,
    slot_weight_cross_entropy,
)
from train.step.update import TrainingFunctions

WEIGHTS = LossConfig(z_loss=0.01, slot_loss=0.1, slot_target=0.3)


def train_config(implementation: str = "reference", **changes: Any) -> TrainConfig:
    """One small layer with a window of 6; see `gradients_on_meshes.make_config`.

    With so large an epsilon an update is smooth in the gradient, near 0 too. The reference is
    compiled soonest.
    """
    config = dataclasses.replace(
        make_config("from-scratch", {"data": 1}),
        optimizer=OptimizerConfig(epsilon=1.0, learning_rate=0.1),
    )
    model = dataclasses.replace(
        config.model,
        window_size=6,
        num_layers=1,
        remat="none",
        implementation=implementation,
    )
    return dataclasses.replace(config, model=model, **changes)


def update(config: TrainConfig) -> tuple[dict[str, Any], Any]:
    """Metrics and state after one update of one device."""
    mesh = make_mesh(config, jax.devices()[:1])
    with jax.set_mesh(mesh):
        functions = TrainingFunctions(config, mesh)
        state, metrics = functions.update(functions.initial_state(), make_batch())
        return jax.device_get(metrics), jax.device_get(state)


@pytest.mark.parametrize(
    ("loss", "parts"),
    [
        pytest.param(LossConfig(), {"micro_batches": 2, "head_parts": 4}, id="both"),
        *(
            pytest.param(WEIGHTS, parts, id="-".join(["all terms", *parts]), marks=pytest.mark.slow)
            for parts in (
                {"micro_batches": 2, "head_parts": 4},
                {"micro_batches": 4},
                {"head_parts": 2},
            )
        ),
    ],
)
def test_parts_of_a_batch_and_of_its_tokens_make_the_same_update(
    loss: LossConfig, parts: dict[str, int]
) -> None:
    metrics, state = update(train_config("xla", loss=loss))
    metrics_by_parts, state_by_parts = update(train_config("xla", loss=loss, **parts))
    assert metrics.keys() == metrics_by_parts.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(metrics_by_parts[name], value, rtol=1e-6, err_msg=name)
    errors = jax.tree.map(relative_error, state_by_parts, state)
    assert max(jax.tree.leaves(errors)) < 1e-6


@pytest.mark.slow
def test_parts_at_the_head_need_less_memory() -> None:
    """Seven eighths of the logits at least, which are the widest thing there is here."""
    config = train_config()
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, vocab_size=8192, tie_embeddings=False)
    )

    def temporaries(head_parts: int) -> int:
        mesh = make_mesh(config, jax.devices()[:1])
        with jax.set_mesh(mesh):
            functions = TrainingFunctions(dataclasses.replace(config, head_parts=head_parts), mesh)
            compiled = functions.trace_update().lower().compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 4 * config.batch_size * config.data.sequence_length * config.model.vocab_size
    assert temporaries(1) - temporaries(8) > 7 / 8 * logits


@pytest.mark.slow
def test_evaluation_does_not_depend_on_the_parts() -> None:
    def evaluate(**parts: int) -> Any:
        config = train_config(**parts)
        mesh = make_mesh(config, jax.devices()[:1])
        with jax.set_mesh(mesh):
            functions = TrainingFunctions(config, mesh)
            return functions.evaluate(functions.initial_state().model, make_batch())

    whole, parts = evaluate(), evaluate(micro_batches=4, head_parts=4)
    assert whole.loss.targets == parts.loss.targets
    assert whole.slot_weights == parts.slot_weights
    np.testing.assert_allclose(parts.loss.nats, whole.loss.nats, rtol=1e-5)
    np.testing.assert_allclose(parts.slot_weight, whole.slot_weight, rtol=1e-5)


@pytest.mark.slow
def test_parts_of_a_batch_on_eight_devices() -> None:
    """Rows stay where they are: nothing is gathered to be cut."""
    done = run_on_eight_devices("tests.support.train.micro_batches_on_a_mesh")
    assert done.returncode == 0, done.stderr
    assert "nvoluntary full rematerialization" not in done.stderr
    differences = json.loads(done.stdout.splitlines()[-1])
    assert {"loss", "z_loss", "slot_loss", "gradient_norm", "state"} <= differences.keys()
    assert max(differences.values()) < 1e-5, differences


def model_and_batch() -> tuple[nha_jax.Model, dict[str, jax.Array]]:
    model = nha_jax.Model(train_config().model, rngs=nnx.Rngs(0))
    return model, {name: jnp.asarray(array) for name, array in make_batch().items()}


def test_terms_are_those_of_their_definitions() -> None:
    model, batch = model_and_batch()
    total = counts(model.config, batch)
    loss, terms = losses(model, batch, WEIGHTS, total)
    seen = model.diagnose(batch["tokens"], batch["segment_ids"])
    lse = jax.nn.logsumexp(model.logits(seen.hidden), axis=-1)
    expected = np.mean(np.asarray(lse)[np.asarray(batch["loss_mask"])] ** 2)
    np.testing.assert_allclose(terms["z_loss"], expected, rtol=1e-5)

    entropies = []
    omega, ids = np.asarray(seen.slot_weight[0], np.float64), np.asarray(batch["segment_ids"])
    for row, token in np.argwhere(ids > 0):
        if token >= 6 and (ids[row, token - 6 : token] == ids[row, token]).all():
            weight = omega[row, token]
            entropies += list(-0.3 * np.log(weight) - 0.7 * np.log1p(-weight))
    assert total.slot_weights == len(entropies) > 0
    np.testing.assert_allclose(terms["slot_loss"], np.mean(entropies), rtol=1e-5)
    wanted = terms["loss"] + 0.01 * terms["z_loss"] + 0.1 * terms["slot_loss"]
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)


def test_where_few_targets_count_their_logits_alone_are_made() -> None:
    model, batch = model_and_batch()
    few = np.zeros(batch["tokens"].shape, bool)
    few[::2, 3], few[::3, 17] = True, True  # none, one or two in a row
    batch["loss_mask"] &= few
    assert batch["loss_mask"].sum(axis=1).max() == 2
    hidden = jax.random.normal(jax.random.key(0), (*few.shape, model.config.hidden_size))

    run = jax.jit(
        lambda model, hidden, most: jax.value_and_grad(
            lambda *args: measure_hidden(*args, batch, most_targets=most)[0].nats, (0, 1)
        )(model, hidden),
        static_argnums=2,
    )
    errors = jax.tree.map(relative_error, run(model, hidden, 2), run(model, hidden, None))
    assert max(jax.tree.leaves(errors)) < 1e-6
    logits = "x".join(map(str, (*few.shape, model.config.vocab_size)))
    assert f"tensor<{logits}x" in run.lower(model, hidden, None).as_text()
    assert f"tensor<{logits}x" not in run.lower(model, hidden, 2).as_text()


def test_what_the_mask_does_not_admit_changes_no_loss_and_no_gradient() -> None:
    model, batch = model_and_batch()
    padding = batch["segment_ids"] == 0
    assert padding.any()
    total = counts(model.config, batch)
    config = dataclasses.replace(WEIGHTS, distillation=0.2)

    @jax.jit
    @jax.value_and_grad
    def run(model: nha_jax.Model, batch: dict, hole: jax.Array) -> jax.Array:
        hidden = jax.lax.stop_gradient(model.hidden_states(batch["tokens"], batch["segment_ids"]))
        hidden = jnp.where(padding[..., None], hole, hidden)
        return losses(model, batch, config, total, Teacher(model, hidden))[0]

    expected = run(model, batch, jnp.float32(0))
    for token, target in ((-1, -100), (10**9, 264)):
        holes = {"tokens": token, "targets": target}
        filled = batch | {n: jnp.where(padding, hole, batch[n]) for n, hole in holes.items()}
        chex.assert_trees_all_equal(run(model, filled, jnp.float32(jnp.nan)), expected)


@pytest.mark.parametrize("hole", [np.nan, np.inf, -np.inf])
def test_logits_that_the_mask_does_not_admit_may_hold_anything(hole: float) -> None:
    logits = np.random.default_rng(0).standard_normal((1, 4, 5)).astype(np.float32)
    mask = np.array([[True, False, True, False]])
    targets = np.array([[4, -1, 0, 2**40]])
    pulled = jax.value_and_grad(lambda x, targets: cross_entropy(x, _batch(targets, mask)).nats)
    expected = pulled(logits, np.where(mask, targets, 0))
    found = pulled(np.where(mask[..., None], logits, hole).astype(np.float32), targets)
    chex.assert_trees_all_equal(found, expected)
    assert not np.any(found[1][~mask])


@pytest.mark.parametrize("target", [-1, -5, 5, 2**32 + 1])
def test_a_target_that_is_not_in_the_vocabulary_gives_nan(target: int) -> None:
    batch = _batch(np.array([[0, target]]), np.ones((1, 2), bool))
    assert np.isnan(cross_entropy(np.zeros((1, 2, 5), np.float32), batch).nats)


def _batch(targets: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
    return {"targets": targets, "loss_mask": mask}


def test_slot_loss_pulls_the_slots_logits_only() -> None:
    """Gates reach nothing else: theirs is the whole gradient; queries reach the window too."""
    model, batch = model_and_batch()
    total = counts(model.config, batch)

    def loss(model: nha_jax.Model) -> jax.Array:
        return losses(model, batch, WEIGHTS, total)[1]["slot_loss"]

    def pulling_all(model: nha_jax.Model) -> jax.Array:
        slot_weight = model.diagnose(batch["tokens"], batch["segment_ids"]).slot_weight
        entropy = slot_weight_cross_entropy(slot_weight, WEIGHTS.slot_target)
        inside = default_positions(32, batch["segment_ids"]) >= 6
        inside &= batch["segment_ids"] > 0
        return jnp.where(inside[..., None], entropy, 0.0).sum() / total.slot_weights

    found, every = jax.jit(lambda model: (jax.grad(loss)(model), jax.grad(pulling_all)(model)))(
        model
    )
    gate, every_gate, query, every_query = (
        np.asarray(getattr(gradient.blocks.attention, name).kernel[...])
        for name in ("f_proj", "q_proj")
        for gradient in (found, every)
    )
    assert np.abs(gate).max() > 0
    assert relative_error(gate, every_gate) < 1e-4
    assert relative_error(query, every_query) > 1e-2


def test_terms_without_a_weight_are_not_computed() -> None:
    model, batch = model_and_batch()
    total = Counts(jnp.int32(1), jnp.int32(1), jnp.int32(1))

    def program(config: LossConfig) -> str:
        return str(jax.make_jaxpr(lambda: losses(model, batch, config, total)[0])())

    plain = jax.make_jaxpr(lambda: model(batch["tokens"], segment_ids=batch["segment_ids"]))()
    assert losses(model, batch, LossConfig(), total)[1].keys() == {"loss"}
    assert program(LossConfig()).count("log_softmax") == str(plain).count("log_softmax") == 0
    assert len(program(LossConfig())) < len(program(LossConfig(slot_loss=1e-3)))


@pytest.mark.parametrize("weight", [0.0, 1e-38, 0.3, 1 - 2.0**-23, 1.0])
def test_cross_entropy_of_any_slot_weight_is_finite(weight: float) -> None:
    value, slope = jax.value_and_grad(slot_weight_cross_entropy)(jnp.float32(weight), 0.3)
    assert jnp.isfinite(value)
    assert jnp.isfinite(slope)
    if weight == 0.3:
        assert abs(slope) < 1e-6
    if 0 < weight < 1 and weight >= 1e-30:  # through the sigmoid
        np.testing.assert_allclose(
            slope * weight * (1 - weight), weight - 0.3, rtol=1e-3, atol=1e-7
        )


def test_slot_loss_needs_a_layer_with_slots_and_a_window() -> None:
    config = train_config()
    model = dataclasses.replace(config.model, window_size=None)
    with pytest.raises(ValueError, match=r"loss.slot_loss = 0.1: expected 0, as no layer"):
        dataclasses.replace(config, model=model, loss=WEIGHTS)


def test_parameters_and_moments_are_float32_and_activations_bfloat16() -> None:
    config = train_config()
    model = dataclasses.replace(config.model, dtype="bfloat16")
    mesh = make_mesh(config, jax.devices()[:1])
    with jax.set_mesh(mesh):
        functions = TrainingFunctions(dataclasses.replace(config, model=model), mesh)
        numbers = [leaf.dtype for leaf in jax.tree.leaves(functions.abstract_state) if leaf.ndim]
        assert set(numbers) == {np.dtype("float32")}
        built = functions.model(functions.initial_state().model)
        tokens = jnp.zeros((2, 32), jnp.int32)
        hidden = built.embed_tokens(tokens)
        assert hidden.dtype == jnp.bfloat16
        assert built.apply_layer(0, hidden, 6).dtype == jnp.bfloat16
        parts = jax.make_jaxpr(built.__call__)(tokens).eqns  # the layers, and the head
        inside = [x for part in parts if "jaxpr" in part.params for x in part.params["jaxpr"].eqns]
        layers = [each for each in inside if each.primitive.name == "scan"]
        assert [each.outvars[0].aval.dtype for each in layers] == [jnp.bfloat16]
