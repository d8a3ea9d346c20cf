"""The slot weight and gates that `Model.diagnose` reports, against each layer's own operator."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nha_jax import Diagnostics, Model, ModelConfig, nha_attention
from nha_jax.ops import rope_tables

SEGMENT_IDS = jnp.asarray([[1] * 9 + [2] * 11 + [0] * 4, [1] * 24])


def tiny_model(**overrides) -> Model:
    sizes = {
        "vocab_size": 40,
        "num_layers": 4,
        "hidden_size": 16,
        "num_query_heads": 4,
        "num_kv_heads": 2,
        "num_slots": 5,
        "window_size": (4, None),
        "mlp_size": 24,
        "dtype": "float32",
        "initializer_range": 0.3,
        "implementation": "reference",  # the soonest compiled
    }
    return Model(ModelConfig.from_dict(sizes | overrides), rngs=nnx.Rngs(0))


TOKENS = jax.random.randint(jax.random.key(7), SEGMENT_IDS.shape, 0, 40)
diagnose = jax.jit(Model.diagnose)


@jax.jit
def layer_by_layer(
    model: Model, tokens: jax.Array, segment_ids: jax.Array | None, positions: jax.Array
) -> Diagnostics:
    """`diagnose`, each layer written out: its own projections given to the reference operator."""
    graph, stack = nnx.split(model.blocks)
    hidden = model.embed(tokens)
    rope = rope_tables(positions, model.config.key_dim)
    slot_weights, log_decays = [], []
    for index, window_size in enumerate(model.config.windows):
        block = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[index], stack))  # noqa: B023
        layer, inputs = block.attention, block.attention_norm(hidden)
        projections = layer._convolve(layer._projections(inputs), segment_ids)
        log_decays.append(layer._log_decay(inputs))
        seen = nha_attention(
            *layer._heads(*projections),
            log_decays[-1],
            window_size=window_size,
            rope=rope,
            segment_ids=segment_ids,
            empty_slots=model.config.empty_slots,
            return_slot_weight=True,
            implementation="reference",
        )
        slot_weights.append(seen.slot_weight)
        hidden = block(hidden, window_size=window_size, rope=rope, segment_ids=segment_ids)
    return Diagnostics(model.norm(hidden), jnp.stack(slot_weights), jnp.stack(log_decays))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("empty_slots", "segment_ids"),
    [("mask", None), ("attend", SEGMENT_IDS)],
    ids=["mask-one-segment", "attend-packed"],
)
def test_diagnostics_equal_those_of_the_layers_one_by_one(empty_slots, segment_ids):
    model = tiny_model(empty_slots=empty_slots)
    positions = jnp.arange(24)
    if segment_ids is not None:
        positions = jnp.asarray([[*range(9), *range(11), *range(4)], [*range(24)]])
    found = diagnose(model, TOKENS, segment_ids)
    expected = layer_by_layer(model, TOKENS, segment_ids, positions)
    real = np.ones((2, 24), bool) if segment_ids is None else np.asarray(segment_ids) != 0
    for one, other in zip(found, expected, strict=True):
        axes = (-3, -2) if one.ndim == 3 else (1, 2)  # of rows and tokens
        one, other = (np.moveaxis(x, axes, (0, 1))[real] for x in (one, other))
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)
    assert found.slot_weight.shape == (4, 2, 24, 4)
    assert found.log_decay.shape == (4, 2, 24, 2, 5)
    assert found.slot_weight.dtype == found.log_decay.dtype == jnp.float32


@pytest.mark.parametrize(
    "implementation", [pytest.param("reference", marks=pytest.mark.slow), "xla"]
)
def test_logits_do_not_change(implementation):
    model = tiny_model(num_layers=2, implementation=implementation)
    logits = jax.jit(Model.__call__)(model, TOKENS, SEGMENT_IDS)
    found = jax.jit(lambda m, *args: m.logits(m.diagnose(*args).hidden))
    chex.assert_trees_all_equal(found(model, TOKENS, SEGMENT_IDS), logits)


def test_slot_weight_is_a_share_and_slots_count_once_they_are_written():
    written = np.arange(24) >= 4  # the fifth token pushes the first out of a window of 4
    attended = diagnose(tiny_model(empty_slots="attend"), TOKENS).slot_weight
    masked = diagnose(tiny_model(empty_slots="mask"), TOKENS).slot_weight
    for slot_weight in (attended, masked):
        assert slot_weight.max() < 1
        assert slot_weight[::2, :, written].min() > 0
    assert attended.min() > 0
    np.testing.assert_array_equal(masked[1::2], 0)  # window None
    np.testing.assert_array_equal(masked[::2, :, ~written], 0)


def test_padding_and_other_documents_leave_no_trace_in_the_slot_weight():
    model = tiny_model()
    packed = diagnose(model, TOKENS, SEGMENT_IDS).slot_weight
    alone = diagnose(model, TOKENS[:1, 9:20]).slot_weight
    chex.assert_trees_all_close(packed[:, :1, 9:20], alone, atol=1e-5)
    np.testing.assert_array_equal(packed[:, 0, 20:], 0)


@pytest.mark.slow
def test_slot_weight_can_be_trained():
    """Its gradient, through the scan and rematerialisation, is that of the layers one by one."""
    model = tiny_model(num_layers=2, window_size=4, remat="operator")

    def gradient(diagnose):
        return jax.jit(jax.grad(lambda model: diagnose(model).slot_weight.mean()))(model)

    found = gradient(lambda model: model.diagnose(TOKENS))
    expected = gradient(lambda model: layer_by_layer(model, TOKENS, None, jnp.arange(24)))
    chex.assert_trees_all_close(found, expected, atol=1e-5, rtol=1e-3)
    assert jnp.abs(nnx.state(found).blocks.attention.f_proj.kernel[...]).max() > 1e-6


def test_a_model_without_slots_gives_them_nothing() -> None:
    model = tiny_model(num_slots=0, window_size=(4, None, 4, 4))
    seen = diagnose(model, TOKENS, SEGMENT_IDS)
    assert seen.log_decay.shape == (4, *TOKENS.shape, 2, 0)
    assert seen.slot_weight.shape == (4, *TOKENS.shape, 4)
    assert not seen.slot_weight.any()
    logits = jax.jit(lambda model: (model.logits(seen.hidden), model(TOKENS, SEGMENT_IDS)))(model)
    chex.assert_trees_all_close(*logits, atol=1e-5)
