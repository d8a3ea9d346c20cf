"""The layers against plain formulas."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from nha_jax import ModelConfig, nha_attention
from nha_jax.layers import NativeHybridAttention, ShortConvolution, SwiGLU
from nha_jax.layers.parameters import partitioned
from nha_jax.ops import rope_tables

CONFIG = ModelConfig(
    vocab_size=11,
    num_layers=1,
    hidden_size=12,
    num_query_heads=4,
    num_kv_heads=2,
    key_dim=6,
    value_dim=5,
    num_slots=3,
    window_size=4,
    dtype="float32",
    initializer_range=0.3,
)


def convolution(width: int, channels: int) -> ShortConvolution:
    config = ModelConfig.preset("nha-tiny", conv_width=width)
    return ShortConvolution(config, channels, "heads", rngs=nnx.Rngs(width))


def convolution_by_loops(kernel, inputs, segment_ids) -> np.ndarray:
    """The definition: token t and the width - 1 before it, as far as its own segment reaches."""
    width = len(kernel)
    total = np.zeros(inputs.shape)
    for b, t in np.ndindex(inputs.shape[:2]):
        if segment_ids[b, t] == 0:
            continue
        for distance in range(width):
            if t - distance < 0 or segment_ids[b, t - distance] != segment_ids[b, t]:
                break
            total[b, t] += kernel[width - 1 - distance] * inputs[b, t - distance]
    return total / (1 + np.exp(-total))


@settings(max_examples=25, deadline=None)
@given(
    width=st.integers(2, 5),
    segment_ids=st.lists(st.integers(0, 2), min_size=1, max_size=12),
)
def test_convolution_equals_its_definition(width, segment_ids):
    layer = convolution(width, channels=3)
    rows = np.asarray([segment_ids, segment_ids[::-1]])
    inputs = np.random.default_rng(0).normal(size=(*rows.shape, 3)).astype(np.float32)
    outputs = layer(jnp.asarray(inputs), jnp.asarray(rows))
    expected = convolution_by_loops(np.asarray(layer.kernel[...]), inputs, rows)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)
    if set(segment_ids) == {1}:
        np.testing.assert_array_equal(layer(jnp.asarray(inputs)), outputs)


@pytest.mark.parametrize("lengths", [(1, 2), (3, 9), (4, 5)], ids=str)
def test_convolution_continues_from_its_state(lengths):
    layer = convolution(4, channels=3)
    inputs = jax.random.normal(jax.random.key(0), (2, 12, 3))
    expected = layer(inputs)
    state = layer.state_after(inputs[:, : max(lengths)], jnp.asarray(lengths))
    for step in range(3):
        index = jnp.asarray(lengths)[:, None, None] + step
        outputs, state = layer.decode_step(jnp.take_along_axis(inputs, index, axis=1), state)
        chex.assert_trees_all_close(
            outputs, jnp.take_along_axis(expected, index, axis=1), rtol=1e-5
        )


def test_swiglu_equals_its_formula():
    layer = SwiGLU(CONFIG, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 3, CONFIG.hidden_size))
    gate, up = x @ layer.gate_proj.kernel[...], x @ layer.up_proj.kernel[...]
    expected = (gate * jax.nn.sigmoid(gate) * up) @ layer.down_proj.kernel[...]
    chex.assert_trees_all_close(layer(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("conv_width", [0, 4], ids=["no-convolution", "convolution"])
def test_attention_layer_equals_its_formula(conv_width):
    config = ModelConfig.from_dict(CONFIG.to_dict() | {"conv_width": conv_width})
    layer = NativeHybridAttention(config, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 7, config.hidden_size))
    rope = rope_tables(jnp.arange(7), config.key_dim)
    query, key, value = (x @ p.kernel[...] for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    if conv_width:
        query, key, value = layer.q_conv(query), layer.k_conv(key), layer.v_conv(value)
    attended = nha_attention(
        query.reshape(2, 7, 4, 6),
        key.reshape(2, 7, 2, 6),
        jax.nn.silu(value).reshape(2, 7, 2, 5),
        jax.nn.log_sigmoid(x @ layer.f_proj.kernel[...]).reshape(2, 7, 2, 3) / 8,
        window_size=2,
        rope=rope,
        implementation="reference",
    )
    gated = jax.nn.silu(attended).reshape(2, 7, 20)
    normed = gated / jnp.sqrt((gated**2).mean(-1, keepdims=True) + config.norm_eps)
    expected = normed @ layer.o_proj.kernel[...]
    chex.assert_trees_all_close(layer(x, window_size=2, rope=rope), expected, rtol=1e-4, atol=1e-5)


def test_decay_and_norm_are_float32_in_bfloat16_compute():
    config = ModelConfig.from_dict(CONFIG.to_dict() | {"dtype": "bfloat16"})
    layer = NativeHybridAttention(config, rngs=nnx.Rngs(0))
    x = jnp.ones((1, 3, config.hidden_size), jnp.bfloat16)
    assert layer._log_decay(x).dtype == jnp.float32
    assert layer.o_norm(jnp.ones((1, 3, 20), jnp.bfloat16)).dtype == jnp.float32
    outputs = layer(x, window_size=2, rope=rope_tables(jnp.arange(3), config.key_dim))
    assert outputs.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(layer))} == {jnp.dtype("float32")}


def test_axis_names_are_checked():
    with pytest.raises(ValueError, match="'head' is no logical axis; there are layers, vocab"):
        partitioned(jax.nn.initializers.zeros, "embed", "head")
