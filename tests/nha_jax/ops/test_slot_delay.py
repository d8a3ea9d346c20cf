"""Slots that a token enters before it leaves the window: every path against the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nha_jax import ops
from nha_jax.ops.types import Options
from nha_jax.testing import Case, make_inputs, relative_error
from nha_jax.testing.comparison import attend
from tests.support.ops.suite import check

STATIC = (
    "window_size", "slot_delay", "slot_feature_map", "empty_slots", "return_state",
    "return_slot_weight", "implementation",
)  # fmt: skip
nha_attention = jax.jit(ops.nha_attention, static_argnames=STATIC)
decode_step = jax.jit(
    ops.decode_step,
    static_argnames=("window_size", "slot_delay", "empty_slots", "implementation"),
)
NAMES = ("query", "key", "value", "log_decay")


SIZES = {"G": 2, "M": 5, "K": 6, "V": 4, "gate": "mixed"}

CASES = [
    Case(T=75, window="16", slot_delay=0, segments=True, slot_feature_map="silu", **SIZES),
    Case(T=75, window="16", slot_delay=5, state=True, empty_slots="mask", **SIZES),
    Case(T=300, window="64", slot_delay=33, segments=True, empty_slots="mask", **SIZES),
    Case(T=300, window="T+5", slot_delay=70, scale=1.0, slot_weight_gradient="slots", **SIZES),
    Case(T=75, window="T+5", slot_delay=0, segments=True, rope="rows", state=True, **SIZES),
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_chunks_and_their_gradients_agree_with_the_definition(case, dtype):
    check(case, "xla", dtype, make_inputs(case).rounded(dtype))


def test_chunks_agree_with_the_definition():
    case = CASES[0]
    inputs = make_inputs(case)
    found, expected = (
        jax.jit(functools.partial(attend, case, implementation=name))(inputs.arrays, inputs.rest)
        for name in ("xla", "reference")
    )
    for x, wanted in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert relative_error(np.asarray(x), np.asarray(wanted)) < 5e-6


@pytest.mark.slow  # tests/nha_jax/hf/test_published.py generates with a delay, every time
@pytest.mark.parametrize(
    ("implementation", "slot_delay", "empty_slots"),
    [
        ("xla", 0, "mask"),
        ("xla", 5, "attend"),
        ("reference", 0, "attend"),
        ("reference", 5, "mask"),
    ],
)
def test_any_calls_are_one_call(implementation, slot_delay, empty_slots):
    """A prompt shorter than the window, a chunk, and tokens one by one; a row that pauses."""
    T = 40
    case = Case(T=T, window="16", G=2, H=2, K=6, V=4, M=5)
    inputs = make_inputs(case)
    options = {
        "window_size": case.window_size, "slot_delay": slot_delay, "empty_slots": empty_slots,
        "implementation": implementation,
    }  # fmt: skip

    def part(start, stop):
        arrays = [jnp.asarray(inputs.arrays[name][:, start:stop]) for name in NAMES]
        rope = tuple(jnp.asarray(table[start:stop]) for table in inputs.rest["rope"])
        return arrays, options | {"rope": rope}

    arrays, keywords = part(0, T)
    whole = nha_attention(*arrays, **keywords, return_state=True)
    outs, state = [], None
    for start, stop in ((0, 3), (3, 24)):
        arrays, keywords = part(start, stop)
        result = nha_attention(*arrays, **keywords, initial_state=state, return_state=True)
        outs, state = [*outs, result.out], result.state
    paused = np.arange(case.B) == 0
    for t in range(24, T):
        arrays, keywords = part(t, t + 1)
        _, once = decode_step(*arrays, state, **keywords, active=jnp.asarray(~paused))
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[0], y[0]), once, state)
        out, state = decode_step(*arrays, state, **keywords)
        outs.append(out)
    close = {"rtol": 0, "atol": 2e-6}
    np.testing.assert_allclose(np.concatenate(outs, axis=1), whole.out, **close)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **close), state, whole.state)


def test_the_delay_of_the_window_makes_no_other_program():
    plain, same, early = (Options(4, 0.5, "silu", "attend", False, False, slot_delay=delay)
                          for delay in (None, np.int32(4), np.int32(0)))  # fmt: skip
    assert plain == same != early
    assert (plain.delay, early.delay, type(early.slot_delay)) == (4, 0, int)
