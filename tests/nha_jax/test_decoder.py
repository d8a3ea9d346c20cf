"""The model with a cache: prefill and decode steps against the forward pass."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nha_jax import Model
from tests.nha_jax.test_model import (
    CONVERTED,
    UNKNOWN,
    WINDOWS,
    forward,
    random_tokens,
    tiny_model,
)

MODELS = {name: {"window_size": windows} for name, windows in WINDOWS.items()} | {
    "no-slots": {"window_size": (4, None, 4), "num_slots": 0},
    "converted": CONVERTED,
}
# Every run tries rows of one length on one model and of different lengths on others. Prompts of
# "mixed" are read in chunks below, and texts of imported models are compared in hf/.
EVEN, RAGGED = ("slots-only",), ("full",)


@pytest.mark.parametrize(
    ("overrides", "lengths"),
    [
        pytest.param(
            overrides,
            lengths,
            id=f"{name}-{'ragged' if lengths else 'even'}",
            marks=() if name in (RAGGED if lengths else EVEN) else pytest.mark.slow,
        )
        for name, overrides in MODELS.items()
        for lengths in (None, (17, 5, 1))
    ],
)
def test_prefill_and_decode_equal_the_forward(overrides, lengths):
    model = tiny_model(**overrides)
    tokens = np.asarray(random_tokens(3, 24))
    expected = np.asarray(forward(model, tokens))
    starts = np.asarray(lengths or (17, 17, 17))
    prompt = np.where(np.arange(17) < starts[:, None], tokens[:, :17], 39)

    @jax.jit
    def prefill(model, prompt):
        return model.prefill(prompt, lengths=lengths and starts, max_length=24)

    step = jax.jit(Model.decode_step)
    logits, cache = prefill(model, prompt)
    for distance in range(7):
        index = (starts + distance)[:, None]
        wanted = np.take_along_axis(expected, index[..., None] - 1, axis=1)[:, 0]
        chex.assert_trees_all_close(logits, wanted, atol=2e-5, rtol=1e-5)
        logits, cache = step(model, np.take_along_axis(tokens, index, axis=1)[:, 0], cache)
    np.testing.assert_array_equal(cache.length, starts + 7)


@pytest.mark.parametrize("conv_width", [pytest.param(0, marks=pytest.mark.slow), 4])
def test_prompts_read_in_chunks_equal_prompts_read_at_once(conv_width):
    model = tiny_model(window_size=(8, None), num_layers=2, conv_width=conv_width)
    tokens, lengths = np.asarray(random_tokens(3, 32)), np.array([30, 11, 1])
    prefill = jax.jit(Model.prefill, static_argnames="max_length")
    expected, whole = prefill(model, tokens, lengths=lengths, max_length=40)
    cache, logits = model.init_cache(3, max_length=40), jnp.zeros_like(expected)
    for start in range(0, 32, 8):
        present = np.clip(lengths - start, 0, 8)
        chunk = tokens[:, start : start + 8]
        found, cache = prefill(model, chunk, lengths=present, cache=cache)
        logits = jnp.where((present > 0)[:, None], found, logits)
    chex.assert_trees_all_close(logits, expected, rtol=1e-4, atol=1e-5)
    following = logits.argmax(-1)
    step, active = jax.jit(Model.decode_step), jnp.array([True, False, True])
    found, after = step(model, following, cache, active=active)
    expected, _ = step(model, following, whole)
    chex.assert_trees_all_close(found[::2], expected[::2], rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_equal(after.length, jnp.array([31, 11, 2]))
    waiting = lambda cache: jax.tree.map(lambda leaf: leaf[1], cache)  # noqa: E731
    chex.assert_trees_all_equal(waiting(after), waiting(cache))


SMALL = {"num_layers": 1, "window_size": 4, "implementation": "reference"}


@pytest.mark.parametrize(
    ("overrides", "lengths"),
    [
        pytest.param(SMALL, (11, 3, 1), id="small-ragged"),
        pytest.param(SMALL, None, id="small-even", marks=pytest.mark.slow),
        *(
            pytest.param(x, (11, 3, 1), id=f"{name}-ragged", marks=pytest.mark.slow)
            for name, x in MODELS.items()
        ),
    ],
)
def test_padded_prompts_equal_prompts_as_they_are(overrides, lengths):
    """Outside of `jax.jit` 11 tokens become 16; inside nothing changes their number."""
    model, tokens = tiny_model(**overrides), np.asarray(random_tokens(3, 22))
    lengths = None if lengths is None else np.array(lengths)

    def read(prefill):
        _, cache = prefill(model, tokens[:, :11], lengths=lengths, max_length=24)
        return prefill(model, tokens[:, 11:], cache=cache)

    expected = read(jax.jit(Model.prefill, static_argnames="max_length"))
    chex.assert_trees_all_close(read(Model.prefill), expected, rtol=1e-4, atol=1e-5)


def test_prompts_are_not_padded_inside_of_jit():
    model = tiny_model(num_layers=1, window_size=4, implementation="reference")
    tokens = np.zeros((1, 11), np.int32)
    for program in (
        jax.make_jaxpr(lambda model: model.prefill(tokens))(model),
        jax.make_jaxpr(lambda tokens: model.prefill(tokens))(tokens),
    ):
        assert "i32[1,11]" in str(program)
        assert "i32[1,16]" not in str(program)


def test_the_cache_of_finite_windows_does_not_grow():
    model = tiny_model(window_size=(8, 0, 4))
    shapes = [
        jax.eval_shape(lambda m, t: m.prefill(t)[1], model, random_tokens(2, length))
        for length in (3, 48)
    ]
    chex.assert_trees_all_equal_shapes_and_dtypes(*shapes)
    one_more = jax.eval_shape(Model.decode_step, model, random_tokens(2), shapes[0])[1]
    chex.assert_trees_all_equal_shapes_and_dtypes(one_more, shapes[0])


@pytest.mark.parametrize(
    "unknown", [UNKNOWN["below"], pytest.param(UNKNOWN["of-64-bits"], marks=pytest.mark.slow)]
)
def test_unknown_tokens_harm_their_own_row_of_the_cache_only(unknown):
    model = tiny_model(num_layers=1, window_size=4, implementation="reference")
    tokens, lengths = np.asarray(random_tokens(3, 5), np.int64), [5, 3, 5]
    harmed = tokens.copy()
    harmed[1, 3:] = unknown  # not read
    harmed[2, 1] = unknown
    (wanted, _), (logits, cache) = (model.prefill(x, lengths=lengths) for x in (tokens, harmed))
    assert np.isnan(logits).all(-1).tolist() == [False, False, True]
    np.testing.assert_array_equal(logits[:2], wanted[:2])
    active = jnp.array([True, False, True])
    logits, after = model.decode_step(np.array([3, unknown, 3]), cache, active=active)
    assert np.isnan(logits).all(-1)[[0, 2]].tolist() == [False, True]
    for x, before in zip(*map(jax.tree.leaves, (after, cache)), strict=True):
        np.testing.assert_array_equal(x[1], before[1])
    logits, _ = model.decode_step(np.array([unknown, 3, 3]), cache)
    assert np.isnan(logits).all(-1).tolist() == [True, False, True]
