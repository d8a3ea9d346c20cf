"""Packed documents are strangers to each other, and padding is nothing at all."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nha_jax.ops import nha_attention
from tests.support.ops.cases import Case, make_inputs, relative_error

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
        ("0", "attend"),
        ("16", "mask"),
        ("64", "attend"),
        ("None", "mask"),
        *(pytest.param(*x, marks=pytest.mark.slow)
          for x in (("0", "mask"), ("16", "attend"), ("64", "mask"), ("None", "attend"))),
    ],
)  # fmt: skip
def test_packed_equals_alone(window, empty_slots):
    case = Case(T=sum(LENGTHS), window=window, G=2, K=16, V=8, B=1, gate="mixed")
    inputs = make_inputs(case)
    arrays = [jnp.asarray(inputs["arrays"][name]) for name in NAMES]
    cotangent, rope = jnp.asarray(inputs["cotangents"]["out"]), inputs["rest"]["rope"]
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


@pytest.mark.parametrize(
    ("window", "implementation"),
    [
        *itertools.product(["0", "5", "None"], ["reference", "xla"]),
        ("5", "pallas_tpu"),
        *(pytest.param("16", x, marks=pytest.mark.slow) for x in ("reference", "xla")),
    ],
)
def test_padding_is_zero_and_changes_nothing(window, implementation):
    case = Case(T=80, window=window, K=8, V=8, rope=None)
    inputs = make_inputs(case)["arrays"]
    ids = np.ones((2, 80), np.int32)
    ids[0, :13], ids[0, 60:], ids[1, 30:40] = 0, 0, 0
    poisoned = {name: np.where(ids[..., None, None] == 0, 1e4, x) for name, x in inputs.items()}
    poisoned["log_decay"] = -np.abs(poisoned["log_decay"])

    @jax.jit
    def results_and_gradients(arrays):
        def loss(arrays):
            result = nha_attention(
                *(arrays[name] for name in NAMES), window_size=case.window_size,
                segment_ids=jnp.asarray(ids), return_state=True, return_slot_weight=True,
                implementation=implementation,
            )  # fmt: skip
            return jnp.sum(result.out**2), result

        gradients, result = jax.grad(loss, has_aux=True)(arrays)
        return result, gradients

    (clean, _), (dirty, gradients) = map(results_and_gradients, (inputs, poisoned))
    for x, y in zip(jax.tree.leaves(clean[:2]), jax.tree.leaves(dirty[:2]), strict=True):
        if window == "None" and x.shape[1:2] == (80,):
            continue  # a growing ring has room, never read, behind its tokens
        np.testing.assert_array_equal(x, y)
    assert not np.any(np.asarray(clean.out)[ids == 0])
    assert not np.any(np.asarray(clean.slot_weight)[ids == 0])
    for gradient in gradients.values():
        assert np.all(np.isfinite(gradient))
        assert not np.any(np.asarray(gradient)[ids == 0])
