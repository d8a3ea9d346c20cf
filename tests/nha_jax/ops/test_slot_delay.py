"""Slots that a token enters before it leaves the window: every path against the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nha_jax import ops
from nha_jax.ops.types import Options
from nha_jax.testing import Case, make_inputs, relative_error

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


@pytest.mark.parametrize("gradient", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("T", "window", "slot_delay", "empty_slots", "segments"),
    [
        (75, "16", 0, "attend", True),
        pytest.param(75, "16", 5, "mask", True, marks=pytest.mark.slow),
        pytest.param(300, "64", 33, "attend", False, marks=pytest.mark.slow),
        pytest.param(75, "T+5", 0, "attend", True, marks=pytest.mark.slow),
        pytest.param(300, "T+5", 70, "mask", True, marks=pytest.mark.slow),
    ],
)
def test_chunks_agree_with_the_definition(T, window, slot_delay, empty_slots, segments, gradient):
    case = Case(T=T, window=window, G=2, M=5, K=6, V=4, gate="mixed", segments=segments)
    inputs = make_inputs(case)
    arrays = [jnp.asarray(inputs.arrays[name]) for name in NAMES]
    ids = inputs.rest["segment_ids"]

    def results(implementation, arrays):
        def loss(arrays):
            result = ops.nha_attention(
                *arrays, rope=inputs.rest["rope"], segment_ids=ids, window_size=case.window_size,
                slot_delay=slot_delay, slot_feature_map="silu", empty_slots=empty_slots,
                return_state=True, return_slot_weight=True, implementation=implementation,
            )  # fmt: skip
            floats = (result.out, result.slot_weight, result.state.slot_key)
            return sum(jnp.sum(jnp.sin(x)) for x in floats), result

        return jax.jit(jax.grad(loss, has_aux=True) if gradient else loss)(arrays)

    with jax.enable_x64():
        expected = results("reference", [x.astype(jnp.float64) for x in arrays])
    found = results("xla", arrays)
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
