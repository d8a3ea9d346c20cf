"""Packed documents are strangers to each other, and padding is nothing at all."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nha_jax.ops import nha_attention
from nha_jax.testing import Case, make_inputs, relative_error

LENGTHS = (37, 1, 70, 12)  # of the documents of one row; the chunk is 64
NAMES = ("query", "key", "value", "log_decay")


@functools.partial(jax.jit, static_argnames=("window_size", "empty_slots"))
def outputs_and_gradients(arrays, cotangent, rope, segment_ids, **options):
    def attend(*arrays):
        return nha_attention(
            *arrays, rope=rope, segment_ids=segment_ids, implementation="xla", **options
        )

    out, pullback = jax.vjp(attend, *arrays)
    return out, *pullback(cotangent)


@pytest.mark.parametrize(
    ("window", "empty_slots"),
    [
        ("16", "mask"),
        ("None", "mask"),
        *(
            pytest.param(*x, marks=pytest.mark.slow)
            for x in itertools.product(("0", "16", "64", "None"), ("attend", "mask"))
            if x not in (("16", "mask"), ("None", "mask"))
        ),
    ],
)
def test_packed_equals_alone(window, empty_slots):
    case = Case(T=sum(LENGTHS), window=window, G=2, K=16, V=8, B=1, gate="mixed")
    inputs = make_inputs(case)
    arrays = [jnp.asarray(inputs.arrays[name]) for name in NAMES]
    cotangent, rope = jnp.asarray(inputs.cotangents["out"]), inputs.rest["rope"]
    ids = jnp.repeat(jnp.array([1, 2, 1, 3]), jnp.array(LENGTHS), total_repeat_length=case.T)[None]
    options = {"window_size": case.window_size, "empty_slots": empty_slots}
    packed = outputs_and_gradients(arrays, cotangent, rope, ids, **options)

    # Each document alone in a row; what follows it there no token of it sees, and nothing pulls.
    starts = np.cumsum([0, *LENGTHS[:-1]])[:, None]
    index = np.minimum(starts + np.arange(max(LENGTHS)), case.T - 1)
    inside = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    alone = outputs_and_gradients(
        [x[0, index] for x in arrays], cotangent[0, index] * inside[..., None, None],
        tuple(table[index] for table in rope), None, **options,
    )  # fmt: skip
    for row, (start, length) in enumerate(zip(starts[:, 0], LENGTHS, strict=True)):
        for name, x, expected in zip(("out", *NAMES), packed, alone, strict=True):
            found = np.asarray(x[0, start : start + length])
            # A lone token under empty_slots="mask" has one logit: its gradient is rounding.
            error = relative_error(found, np.asarray(expected[row, :length]), zero=1e-6)
            assert error < 5e-6, (name, row)


def check_padding(window, implementation):
    """Padding is zero, and changes nothing, whatever it holds."""
    case = Case(T=80, window=window, K=8, V=8, rope="rows")
    inputs = make_inputs(case)
    ids = np.ones((2, 80), np.int32)
    ids[0, :13], ids[0, 60:], ids[1, 30:40] = 0, 0, 0

    def fill_padding(x, holes):
        """NaN and infinities by turns in the padding, the gradient's too; x comes [B, T, ...]."""
        holes = np.resize(holes, x.shape).astype(x.dtype)
        return np.where((ids == 0).reshape(2, 80, *(1,) * (x.ndim - 2)), holes, x)

    @jax.jit
    def results_and_gradients(arrays, rope, cotangents):
        def attend(*arrays):
            return nha_attention(
                *arrays, rope=rope, window_size=case.window_size, segment_ids=jnp.asarray(ids),
                return_state=True, return_slot_weight=True, implementation=implementation,
            )  # fmt: skip

        result, pullback = jax.vjp(attend, *arrays)
        state = jax.tree.map(
            lambda x: (
                jnp.ones_like(x)
                if jnp.issubdtype(x.dtype, jnp.floating)
                else np.zeros(x.shape, jax.dtypes.float0)
            ),
            result.state,
        )
        return result, pullback(result._replace(state=state, **cotangents))

    given = (
        [inputs.arrays[name] for name in NAMES],
        inputs.rest["rope"],
        {name: inputs.cotangents[name] for name in ("out", "slot_weight")},
    )
    finite, nan = (
        jax.tree.map(lambda x: fill_padding(np.asarray(x), holes), given)  # noqa: B023
        for holes in ([-1e4], [np.nan, np.inf, -np.inf])
    )
    (clean, gradients), dirty = results_and_gradients(*finite), results_and_gradients(*nan)
    for x, y in zip(*map(jax.tree.leaves, ((clean, gradients), dirty)), strict=True):
        np.testing.assert_array_equal(x, y)
    assert not np.any(np.asarray(clean.out)[ids == 0])
    assert not np.any(np.asarray(clean.slot_weight)[ids == 0])
    for gradient in gradients:
        assert np.all(np.isfinite(gradient))
        assert not np.any(np.asarray(gradient)[ids == 0])


@pytest.mark.parametrize(
    ("window", "implementation"),
    [
        *itertools.product(["0", "5", "None"], ["reference", "xla"]),
        *(pytest.param("16", x, marks=pytest.mark.slow) for x in ("reference", "xla")),
    ],
)
def test_padding_is_zero_and_changes_nothing_whatever_it_holds(window, implementation):
    check_padding(window, implementation)
