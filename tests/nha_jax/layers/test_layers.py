"""The layers against plain formulas."""

import functools
import inspect
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st

import nha_jax
from nha_jax import ModelConfig, NHAttention, layers, nha_attention
from nha_jax.layers import ShortConvolution, SwiGLU
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


def attention(**options) -> NHAttention:
    """The layer of CONFIG, with other options."""
    return NHAttention(**vars(CONFIG.layer) | options, rngs=nnx.Rngs(0))


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


apply = jax.jit(ShortConvolution.__call__)


@settings(max_examples=25, deadline=None)
@example(width=4, segment_ids=[1])
@given(
    width=st.integers(2, 5),
    segment_ids=st.lists(st.integers(0, 2), min_size=10, max_size=10),  # one shape: compiled once
)
def test_convolution_equals_its_definition(width, segment_ids):
    layer = convolution(width, channels=3)
    rows = np.asarray([segment_ids, segment_ids[::-1]])
    inputs = np.random.default_rng(0).normal(size=(*rows.shape, 3)).astype(np.float32)
    outputs = apply(layer, inputs, rows)
    expected = convolution_by_loops(np.asarray(layer.kernel[...]), inputs, rows)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)
    if set(segment_ids) == {1}:
        # Another program, which may add up its products with other roundings.
        np.testing.assert_allclose(apply(layer, inputs), outputs, rtol=1e-6, atol=1e-7)


def test_convolution_reads_nothing_of_padding():
    layer = convolution(3, channels=2)
    ids = jnp.array([[0, 1, 1, 0, 0, 2, 2, 2]])
    x = jax.random.normal(jax.random.key(0), (1, 8, 2))

    @jax.jit
    def results(layer, x, cotangent):
        out, pullback = jax.vjp(lambda layer, x: layer(x, ids), layer, x)
        return out, pullback(cotangent)

    def with_holes(x, holes):
        return jnp.where((ids != 0)[..., None], x, holes)

    expected = results(layer, with_holes(x, 0), with_holes(x + 1, 0))
    assert jax.tree.all(jax.tree.map(lambda x: bool(jnp.isfinite(x).all()), expected))
    for holes in (jnp.nan, jnp.inf, -jnp.inf):
        found = results(layer, with_holes(x, holes), with_holes(x + 1, holes))
        chex.assert_trees_all_equal(found, expected)


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


@pytest.mark.parametrize(
    "conv_width",
    [pytest.param(0, marks=pytest.mark.slow), 4],
    ids=["no-convolution", "convolution"],
)
def test_attention_layer_equals_its_formula(conv_width):
    layer = attention(conv_width=conv_width, window_size=2)
    x = jax.random.normal(jax.random.key(0), (2, 7, CONFIG.hidden_size))
    query, key, value = (x @ p.kernel[...] for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    if conv_width:
        query, key, value = layer.q_conv(query), layer.k_conv(key), layer.v_conv(value)
    attended = nha_attention(
        query.reshape(2, 7, 4, 6),
        key.reshape(2, 7, 2, 6),
        jax.nn.silu(value).reshape(2, 7, 2, 5),
        jax.nn.log_sigmoid(x @ layer.f_proj.kernel[...]).reshape(2, 7, 2, 3) / 8,
        window_size=2,
        rope=rope_tables(jnp.arange(7), CONFIG.key_dim),
        implementation="reference",
    )
    gated = jax.nn.silu(attended).reshape(2, 7, 20)
    normed = gated / jnp.sqrt((gated**2).mean(-1, keepdims=True) + CONFIG.norm_eps)
    expected = normed @ layer.o_proj.kernel[...]
    chex.assert_trees_all_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def softmax_attention(parameters, x, segment_ids, rope) -> np.ndarray:
    """A pretrained model's attention, in float64: no gate, no slot, a token and a head at a time.

    parameters: by dotted name, as CONFIG sizes them.
    """
    heads = {"q": 4, "k": 2, "v": 2}

    def project(name, x):
        return x @ parameters[f"{name}_proj.kernel"] + parameters[f"{name}_proj.bias"]

    def norm(name, x):
        mean_square = (x**2).mean(-1, keepdims=True)
        return x / np.sqrt(mean_square + CONFIG.norm_eps) * parameters[f"{name}_norm.scale"]

    def rotate(x):
        cos, sin = (table[:, None] for table in rope)
        first, second = np.split(x, 2, axis=-1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    B, T, _ = x.shape
    query, key, value = (project(n, x).reshape(B, T, heads[n], -1) for n in heads)
    query, key = rotate(norm("q", query)), rotate(norm("k", key))
    attended = np.zeros((B, T, 4, 5))
    for b, t, h in np.ndindex(B, T, 4):
        seen = (segment_ids[b] == segment_ids[b, t]) & (np.arange(T) <= t)
        if segment_ids[b, t] == 0:
            continue
        weights = np.exp(key[b, seen, h // 2] @ query[b, t, h] / np.sqrt(6))
        attended[b, t, h] = weights / weights.sum() @ value[b, seen, h // 2]
    return project("o", attended.reshape(B, T, -1))


CONVERTED = {
    "conv_width": 0,
    "value_activation": "identity",
    "output_norm": False,
    "qk_norm": True,
    "attention_bias": "all",
    "empty_slots": "mask",
}


def converted_layer(**options) -> NHAttention:
    """Its scales and biases drawn at random too, as training leaves them."""
    layer = attention(**CONVERTED, **options)
    rngs = nnx.Rngs(1)
    draw = lambda leaf: leaf + 0.3 * jax.random.normal(rngs.params(), leaf.shape)  # noqa: E731
    nnx.update(layer, jax.tree.map(draw, nnx.state(layer)))
    return layer


# Two documents and padding; in the second row padding comes first, too.
PACKED = np.array([[1] * 4 + [2] * 5 + [0] * 2, [0] * 3 + [1] * 8])


@pytest.mark.parametrize(
    "implementation", [pytest.param("reference", marks=pytest.mark.slow), "xla"]
)
def test_without_a_window_a_converted_layer_is_softmax_attention(implementation):
    layer = converted_layer(window_size=None, implementation=implementation)
    x = jax.random.normal(jax.random.key(0), (2, 11, CONFIG.hidden_size))
    rope = rope_tables(jnp.arange(11), CONFIG.key_dim)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def loss(layer, x):
        outputs = layer(x, jnp.asarray(PACKED), rope=rope)
        return jnp.sum(jnp.sin(outputs) * (PACKED != 0)[..., None]), outputs

    (_, outputs), gradients = loss(layer, x)
    parameters = {
        ".".join(map(str, path)): np.asarray(leaf[...], np.float64)
        for path, leaf in nnx.to_flat_state(nnx.state(layer))
    }
    rope = tuple(np.asarray(table, np.float64) for table in rope)
    expected = softmax_attention(parameters, np.asarray(x, np.float64), PACKED, rope)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
    chex.assert_tree_all_finite(gradients)
    assert not jnp.any(gradients[1][PACKED == 0])
    assert not jnp.any(gradients[0].f_proj.kernel[...])  # nothing ever enters the slots
    used = (
        leaf for path, leaf in nnx.to_flat_state(nnx.state(gradients[0])) if "f_proj" not in path
    )
    assert all(jnp.any(leaf[...]) for leaf in used)


@pytest.mark.parametrize(
    "window_size",
    [3, pytest.param(0, marks=pytest.mark.slow), None],
    ids=["window", "slots-only", "full"],
)
def test_what_a_biased_layer_makes_of_padding_reaches_no_token(window_size):
    layer = converted_layer(window_size=window_size)
    x = jax.random.normal(jax.random.key(0), (2, 11, CONFIG.hidden_size))

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def run(layer, x):
        out = layer(x, jnp.asarray(PACKED), jnp.arange(11))
        return jnp.sum(jnp.where((PACKED != 0)[..., None], out, 0) ** 2), out

    (_, expected), wanted = run(layer, x)
    for holes in (1e3, jnp.nan, jnp.inf):
        (_, found), pulled = run(layer, jnp.where((PACKED != 0)[..., None], x, holes))
        np.testing.assert_array_equal(found[PACKED != 0], expected[PACKED != 0])
        chex.assert_trees_all_equal(pulled, wanted)


def test_decay_and_norm_are_float32_in_bfloat16_compute():
    layer = attention(dtype=jnp.bfloat16, window_size=2)
    x = jnp.ones((1, 3, CONFIG.hidden_size), jnp.bfloat16)
    wide = jnp.ones((1, 3, 20), jnp.bfloat16)
    decay, normed, outputs = jax.eval_shape(
        lambda layer: (layer._log_decay(x), layer.o_norm(wide), layer(x)), layer
    )
    assert decay.dtype == normed.dtype == jnp.float32
    assert outputs.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(layer))} == {jnp.dtype("float32")}


MODULES = [
    kind
    for kind in (nha_jax.Model, *(getattr(layers, name) for name in layers.__all__))
    if isinstance(kind, type) and issubclass(kind, nnx.Module)
]


@pytest.mark.parametrize("kind", MODULES, ids=lambda kind: kind.__name__)
def test_every_module_says_what_it_is_made_of(kind):
    said = re.findall(r"^    ([\w, ]+): ", inspect.getdoc(kind.__init__), re.MULTILINE)
    said = {name for names in said for name in names.split(", ")}
    assert said >= set(inspect.signature(kind.__init__).parameters) - {"self"}


def test_axis_names_are_checked():
    with pytest.raises(ValueError, match="'head' is no logical axis; there are layers, vocab"):
        partitioned(jax.nn.initializers.zeros, "embed", "head")
