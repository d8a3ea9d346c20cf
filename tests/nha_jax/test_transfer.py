"""Each layer's attention against the original's, at the original's hidden states."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nha_jax
from nha_jax.layers.layer_stack import block_of_layer
from nha_jax.testing import relative_error
from nha_jax.transfer import attention_transfer
from tests.support.original import original_config

WINDOWS = (4, None, 6)


@pytest.fixture(scope="module")
def original() -> nha_jax.Model:
    """Three layers with full attention."""
    config = original_config(num_layers=3, implementation="reference")
    return nha_jax.Model(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def model(original: nha_jax.Model) -> nha_jax.Model:
    """The original with windows, and with other parameters in its attention."""
    graph, attention, rest = nnx.split(
        original.with_windows(WINDOWS), lambda path, _: "attention" in path, ...
    )
    noise = np.random.default_rng(0)
    moved = jax.tree.map(
        lambda x: x + 0.1 * noise.standard_normal(x.shape).astype(np.float32), attention
    )
    return nnx.merge(graph, moved, rest)


@pytest.fixture(scope="module")
def batch() -> tuple[jax.Array, jax.Array]:
    """Tokens, and segment ids of two documents and of padding."""
    tokens = np.random.default_rng(1).integers(0, 256, (2, 12), np.int32)
    segment_ids = np.ones((2, 12), np.int32)
    segment_ids[0, 5:] = 2
    segment_ids[1, 8:] = 0
    return jnp.asarray(tokens), jnp.asarray(segment_ids)


def of_each_layer(
    attention: nnx.State, model: nha_jax.Model, original: nha_jax.Model, batch: Any
) -> tuple[list[jax.Array], list[jax.Array]]:
    """What the attention of every layer gives, in the model and in the original, one by one."""
    tokens, segment_ids = batch
    graph, _, rest = nnx.split(model, lambda path, _: "attention" in path, ...)
    model = nnx.merge(graph, attention, rest)
    hidden, found, wanted = original.embed_tokens(tokens), [], []
    for layer, window in enumerate(WINDOWS):
        own, other = block_of_layer(model.blocks, layer), block_of_layer(original.blocks, layer)
        attend = own.attention.with_window(window)
        found.append(attend(own.attention_norm(hidden), segment_ids))
        wanted.append(other.attention(other.attention_norm(hidden), segment_ids))
        hidden = original.apply_layer(layer, hidden, None, segment_ids=segment_ids)
    return found, wanted


def naive_error(
    found: list[jax.Array], wanted: list[jax.Array], batch: Any, layers: list[int]
) -> jax.Array:
    real, total = (batch[1] > 0)[..., None], jnp.float32(0)
    for layer in layers:
        difference = jnp.where(real, found[layer] - wanted[layer], 0)
        whole = jnp.where(real, wanted[layer], 0)
        total += ((difference**2).sum((1, 2)) / (whole**2).sum((1, 2))).sum()
    return total


def attention_of(model: nha_jax.Model) -> nnx.State:
    return nnx.split(model, lambda path, _: "attention" in path, ...)[1]


def transfer_error(
    attention: nnx.State, model: nha_jax.Model, original: nha_jax.Model, batch: Any
) -> tuple[jax.Array, jax.Array]:
    """The error, and the hidden states."""
    graph, _, rest = nnx.split(model, lambda path, _: "attention" in path, ...)
    found = attention_transfer(nnx.merge(graph, attention, rest), original, *batch)
    return found.error, found.hidden


def test_error_and_gradient_are_those_of_a_loop_over_the_layers(
    model: nha_jax.Model, original: nha_jax.Model, batch: Any
) -> None:
    attention = attention_of(model)
    layers = [layer for layer, window in enumerate(WINDOWS) if window is not None]
    compute = jax.jit(jax.value_and_grad(transfer_error, has_aux=True))
    (error, hidden), slopes = compute(attention, model, original, batch)
    np.testing.assert_allclose(hidden, original.hidden_states(*batch), rtol=1e-6, atol=1e-6)

    def naive(attention: nnx.State) -> tuple[jax.Array, Any]:
        found, wanted = of_each_layer(attention, model, original, batch)
        return naive_error(found, wanted, batch, layers), (found, wanted)

    (_, (found, wanted)), expected = jax.jit(jax.value_and_grad(naive, has_aux=True))(attention)
    in_float64 = 0.0
    for layer in layers:
        own, other = (np.asarray(x[layer], np.float64) for x in (found, wanted))
        for row, mask in enumerate(np.asarray(batch[1] > 0)):
            difference = (own[row] - other[row])[mask]
            in_float64 += (difference**2).sum() / (other[row][mask] ** 2).sum()
    np.testing.assert_allclose(error, in_float64, rtol=1e-5)

    paths, found_slopes = zip(*jax.tree_util.tree_leaves_with_path(slopes), strict=True)
    for path, slope, like in zip(paths, found_slopes, jax.tree.leaves(expected), strict=True):
        assert relative_error(slope, like) < 1e-5, path
        assert not np.any(slope[1]), path  # that layer has full attention, as the original has
        assert np.any(slope[0]), path


@pytest.mark.slow
def test_a_layer_learns_nothing_from_another(
    model: nha_jax.Model, original: nha_jax.Model, batch: Any
) -> None:
    """The gradient in a layer is that of its own error, whatever comes after it."""
    attention = attention_of(model)
    slopes_of = jax.jit(jax.grad(transfer_error, has_aux=True))
    whole, _ = slopes_of(attention, model, original, batch)
    alone, _ = slopes_of(attention, model.with_windows((4, None, None)), original, batch)
    for slope, like in zip(jax.tree.leaves(alone), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(slope[0], like[0])
        assert not np.any(slope[1:])
        assert np.any(like[2])


def test_only_what_moves_costs_a_gradient(
    model: nha_jax.Model, original: nha_jax.Model, batch: Any
) -> None:
    def products(part: str) -> int:
        graph, moving, rest = nnx.split(model, lambda path, _: part in path, ...)

        def error(moving: nnx.State) -> jax.Array:
            return attention_transfer(nnx.merge(graph, moving, rest), original, *batch).error

        return str(jax.make_jaxpr(jax.grad(error))(moving)).count("dot_general")

    assert products("embed") < products("f_proj") < products("attention")
