"""Packed documents are strangers to each other, and padding is nothing at all."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nha_jax.ops import nha_attention
from tests.support.ops.cases import Case, make_inputs, relative_error

LENGTHS = (37, 1, 70, 12)  # of the documents of one row; the chunk is 64
NAMES = ("query", "key", "value", "log_decay")


def outputs_and_gradients(arrays, cotangent, window_size, **options):
    empty_slots = options.pop("empty_slots")

    @jax.jit
    def run(arrays, cotangent, options):
        def attend(*arrays):
            return nha_attention(
                *arrays, window_size=window_size, empty_slots=empty_slots, implementation="xla",
                **options,
            )  # fmt: skip

        out, pullback = jax.vjp(attend, *arrays)
        return out, *pullback(cotangent)

    inputs = [jnp.asarray(arrays[name]) for name in NAMES]
    return [np.asarray(x) for x in run(inputs, jnp.asarray(cotangent), options)]


@pytest.mark.parametrize("empty_slots", ["attend", "mask"])
@pytest.mark.parametrize("window", ["0", "16", "64", "None"])
def test_packed_equals_alone(window, empty_slots):
    case = Case(T=sum(LENGTHS), window=window, G=2, K=16, V=8, B=1, gate="mixed")
    inputs = make_inputs(case)
    ids = np.repeat([1, 2, 1, 3], LENGTHS)[None]
    rope, cotangent = inputs["rest"]["rope"], inputs["cotangents"]["out"]
    packed = outputs_and_gradients(
        inputs["arrays"], cotangent, case.window_size, segment_ids=jnp.asarray(ids), rope=rope,
        empty_slots=empty_slots,
    )  # fmt: skip
    start = 0
    for length in LENGTHS:
        rows = slice(start, start + length)
        alone = outputs_and_gradients(
            {name: x[:, rows] for name, x in inputs["arrays"].items()}, cotangent[:, rows],
            case.window_size, rope=tuple(table[rows] for table in rope), empty_slots=empty_slots,
        )  # fmt: skip
        for name, x, expected in zip(("out", *NAMES), packed, alone, strict=True):
            # A lone token under empty_slots="mask" has one logit: its gradient is rounding.
            assert relative_error(x[:, rows], expected, zero=1e-6) < 5e-6, (name, rows)
        start += length


@pytest.mark.parametrize(
    ("window", "implementation"),
    [
        *itertools.product(["0", "5", "16", "None"], ["reference", "xla"]),
        ("5", "pallas_tpu"),
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
    def attend(arrays):
        return nha_attention(
            *(jnp.asarray(arrays[name]) for name in NAMES), window_size=case.window_size,
            segment_ids=jnp.asarray(ids), return_state=True, return_slot_weight=True,
            implementation=implementation,
        )  # fmt: skip

    clean, dirty = attend(inputs), attend(poisoned)
    for x, y in zip(jax.tree.leaves(clean[:2]), jax.tree.leaves(dirty[:2]), strict=True):
        if window == "None" and x.shape[1:2] == (80,):
            continue  # a growing ring has room, never read, behind its tokens
        np.testing.assert_array_equal(x, y)
    assert not np.any(np.asarray(clean.out)[ids == 0])
    assert not np.any(np.asarray(clean.slot_weight)[ids == 0])

    gradients = jax.grad(lambda arrays: jnp.sum(attend(arrays).out ** 2))(
        {name: jnp.asarray(x) for name, x in poisoned.items()}
    )
    for gradient in gradients.values():
        assert np.all(np.isfinite(gradient))
        assert not np.any(np.asarray(gradient)[ids == 0])
