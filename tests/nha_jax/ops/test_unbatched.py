"""One sequence may do without a batch axis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nha_jax import nha_attention
from nha_jax.ops import decode_step, rope_tables

T, W = 5, 2
RNG = np.random.default_rng(0)
QUERY, KEY, VALUE = (RNG.standard_normal((T, heads, 4)).astype(np.float32) for heads in (2, 1, 1))
LOG_DECAY = -np.abs(RNG.standard_normal((T, 1, 3))).astype(np.float32)
ARRAYS = (QUERY, KEY, VALUE, LOG_DECAY)
NAMED = dict(zip(("query", "key", "value", "log_decay"), ARRAYS, strict=True))
IDS = np.array([1, 1, 1, 2, 2])
COS, SIN = (np.asarray(x) for x in rope_tables(jnp.arange(T), 4))


def attend(*arrays, **options):
    fixed = {"window_size": W, "rope": (COS, SIN), "implementation": "reference"}
    return nha_attention(*arrays, **fixed | options)


def step(*arrays, **options):
    rope = (COS[:1], SIN[:1])
    return decode_step(*arrays, window_size=W, rope=rope, implementation="reference", **options)


def test_results_are_those_of_a_batch_of_one():
    batch = [x[None] for x in ARRAYS]
    more = {"return_state": True, "return_slot_weight": True}
    wanted = attend(*batch, segment_ids=IDS[None], **more)
    found = attend(*ARRAYS, segment_ids=IDS, **more)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y[0]), found, wanted)
    assert found.out.shape == (T, 2, 4)

    def go_on(arrays, state, active):
        query, *rest = (x[..., :1, :, :] for x in arrays)
        return step(query, *rest, state, active=active)

    wanted = go_on(batch, wanted.state, np.array([True]))
    found = go_on(ARRAYS, found.state, np.array(True))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y[0]), found, wanted)


@pytest.mark.slow
def test_vmap_of_sequences_is_a_batch():
    batch = [np.stack([x, 2 * x]) for x in ARRAYS]
    np.testing.assert_allclose(jax.vmap(attend)(*batch), attend(*batch), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_state_without_a_batch_axis_goes_on():
    state = attend(*ARRAYS, return_state=True).state
    found = attend(**NAMED, initial_state=state)
    batch = jax.tree.map(lambda x: np.asarray(x)[None], (*ARRAYS, state))
    wanted = attend(*batch[:4], initial_state=batch[4])
    np.testing.assert_array_equal(found, wanted[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"value": VALUE[None]},
            r"value must be \[T, heads, dim\], as query and key have no batch",
        ),
        ({"log_decay": LOG_DECAY[0]}, r"log_decay must be \[T, heads, slots\]"),
        ({"segment_ids": IDS[None]}, r"segment_ids must be \[T\], .* got shape \(1, 5\)"),
        ({"query": QUERY[None]}, r"key must be .*, or \[T, heads, dim\] as all .* \(5, 1, 4\)"),
        ({"key": KEY[None]}, r"query must be .*, or \[T, heads, dim\] as all .* \(5, 2, 4\)"),
        ({"query": QUERY[0]}, r"query must be \[B, T, heads, dim\], or .* got shape \(2, 4\)"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_does_not_fit_the_query_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        attend(**NAMED | change)


def test_arguments_that_are_too_many_or_too_few_are_errors_of_python():
    with pytest.raises(TypeError, match="positional argument"):
        attend(*ARRAYS, None, None)
    with pytest.raises(TypeError, match="missing"):
        attend(QUERY, KEY)
