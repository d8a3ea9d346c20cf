"""Wrong arguments are refused in one line that names them."""

import jax.numpy as jnp
import pytest

from nha_jax.ops import decode_step, init_state, nha_attention, resize_state, rope_tables

B, T, HQ, HKV, K, V, M = 2, 6, 4, 2, 8, 5, 3
F32, INT = jnp.float32, jnp.int32


def arguments(**changes):
    shapes = {
        "query": (B, T, HQ, K), "key": (B, T, HKV, K), "value": (B, T, HKV, V),
        "log_decay": (B, T, HKV, M),
    }  # fmt: skip
    return {name: jnp.zeros(shape) for name, shape in shapes.items()} | {"window_size": 4} | changes


def state(window_size=4, max_length=None, **changes):
    empty = init_state(
        B, num_kv_heads=HKV, num_slots=M, key_dim=K, value_dim=V, window_size=window_size,
        dtype=F32, max_length=max_length,
    )  # fmt: skip
    return empty._replace(**changes)


WRONG = {
    "query-rank": (
        {"query": jnp.zeros((B, T, K))}, r"query must be \[B, T, heads, dim\].*\(2, 6, 8\)"
    ),
    "query-integers": (
        {"query": jnp.zeros((B, T, HQ, K), INT)}, "query must have a floating dtype"
    ),
    "query-empty": ({"query": jnp.zeros((B, 0, HQ, K))}, "query must not be empty"),
    "heads": ({"query": jnp.zeros((B, T, 3, K))}, "3 heads.*multiple of the 2 heads"),
    "key-tokens": ({"key": jnp.zeros((B, T + 1, HKV, K))}, r"key must have shape \(2, 6, 2, 8\)"),
    "key-dim": ({"key": jnp.zeros((B, T, HKV, K + 1))}, r"key must have shape.*got \(2, 6, 2, 9\)"),
    "key-dtype": (
        {"key": jnp.zeros((B, T, HKV, K), jnp.bfloat16)}, "key must have the query's dtype"
    ),
    "value-heads": ({"value": jnp.zeros((B, T, 1, V))}, r"value must have shape \(2, 6, 2, 5\)"),
    "log_decay-tokens": ({"log_decay": jnp.zeros((B, 1, HKV, M))}, "log_decay must have shape"),
    "window-negative": ({"window_size": -1}, "window_size must be at least 0 .* got -1"),
    "window-wide": ({"window_size": 2**40}, r"window_size must be .* below 2\*\*31, got 1099"),
    "window-float": ({"window_size": 4.0}, "window_size must be an int or None.*4.0"),
    "window-bool": ({"window_size": True}, "window_size must be an int or None.*True"),
    "delay-long": ({"slot_delay": 5}, "slot_delay must be from 0 to window_size=4, got 5"),
    "delay-negative": ({"slot_delay": -1}, "slot_delay must be from 0 to window_size=4, got -1"),
    "delay-float": ({"slot_delay": 1.5}, "slot_delay must be an int or None.*1.5"),
    "delay-of-everything": (
        {"slot_delay": 0, "window_size": None}, "slot_delay=0 needs a window_size that is finite"
    ),
    "scale": ({"scale": float("nan")}, "scale must be a finite number, got nan"),
    "feature-map": ({"slot_feature_map": "gelu"}, "slot_feature_map must be one of.*'gelu'"),
    "empty-slots": ({"empty_slots": "skip"}, "empty_slots must be one of.*'skip'"),
    "rope-one": ({"rope": jnp.zeros((T, K // 2))}, r"rope must be a pair \(cos, sin\)"),
    "rope-shape": (
        {"rope": rope_tables(jnp.arange(T + 1), K)}, r"rope's cos must have shape \(6, 4\) or"
    ),
    "segments-shape": (
        {"segment_ids": jnp.ones((T,), INT)}, r"segment_ids must have shape \(2, 6\)"
    ),
    "segments-dtype": ({"segment_ids": jnp.ones((B, T))}, "segment_ids must have an integer dtype"),
    "implementation": ({"implementation": "triton"}, "implementation must be one of.*'triton'"),
    "state-type": ({"initial_state": (1, 2)}, "initial_state must be an NHAState, got tuple"),
    "state-window": (
        {"initial_state": state(window_size=5)}, r"initial_state.window_key must have shape \(2, 4"
    ),
    "state-of-everything": (
        {"initial_state": state(window_size=None, max_length=9)},
        "initial_state is of window_size=None .*the call of window_size=4: pass window_size=None",
    ),
    "state-of-a-window": (
        {"initial_state": state(), "window_size": None},
        "initial_state is of window_size=4, the call of window_size=None: pass window_size=4",
    ),
    "state-without-a-window": (
        {"initial_state": state(window_size=0), "window_size": None},
        "initial_state is of window_size=0, the call of window_size=None",
    ),
    "state-slots": (
        {"initial_state": state(slot_key=jnp.zeros((B, HKV, M + 1, K)))},
        r"initial_state.slot_key must have shape \(2, 2, 3, 8\)",
    ),
    "state-dtype": (
        {"initial_state": state(slot_value=jnp.zeros((B, HKV, M, V), jnp.bfloat16))},
        "initial_state.slot_value must have dtype float32",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(changes, message):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        nha_attention(**arguments(**changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("pallas_gpu", {}, "multiply in bfloat16, got query of float32"),
        ("pallas_tpu", {"scale": -1.0}, "scale"),
        ("pallas_tpu", {"slot_delay": 0}, "slot_delay=0 with window_size=4"),
        ("pallas_gpu", {"slot_delay": 1, "window_size": 90}, "slot_delay=1 with window_size=90"),
        ("pallas_tpu", {"log_decay": jnp.zeros((B, T, HKV, 200))}, "200"),
    ],
    ids=["dtype", "scale", "delay", "delay of a window over all", "slots"],
)
def test_a_kernel_that_cannot_serve_says_why(name, changes, message):
    with pytest.raises(NotImplementedError, match=f"'{name}'.*{message}"):
        nha_attention(**arguments(**changes, implementation=name))


def test_a_kernel_takes_no_decode_step_with_a_delay():
    one = {name: jnp.zeros((B, 1, *x.shape[2:])) for name, x in list(arguments().items())[:4]}
    with pytest.raises(NotImplementedError, match=r"'pallas_tpu'.*slot_delay=2"):
        decode_step(**one, state=state(), window_size=4, slot_delay=2, implementation="pallas_tpu")


def test_an_odd_key_dim_cannot_be_rotated():
    odd = {name: jnp.zeros((B, T, heads, 7)) for name, heads in (("query", HQ), ("key", HKV))}
    table = jnp.zeros((T, 3))
    with pytest.raises(ValueError, match=r"even key dimension.*K=7"):
        nha_attention(**arguments(**odd, rope=(table, table)))
    with pytest.raises(ValueError, match="head_dim must be even, got 7"):
        rope_tables(jnp.arange(3), 7)


def test_decode_takes_one_token():
    changes = arguments()
    window = changes.pop("window_size")
    with pytest.raises(
        ValueError, match=r"one token at a time, got query with shape \(2, 6, 4, 8\)"
    ):
        decode_step(**changes, state=state(), window_size=window)


def test_decode_takes_a_state_of_its_window():
    one = {name: jnp.zeros((B, 1, *x.shape[2:])) for name, x in list(arguments().items())[:4]}
    with pytest.raises(ValueError, match=r"^state is of window_size=None .*window_size=4"):
        decode_step(**one, state=state(window_size=None, max_length=9), window_size=4)


def test_a_state_of_the_whole_past_needs_room():
    with pytest.raises(ValueError, match=r"window_size=None keeps every token.*max_length"):
        state(window_size=None)
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        state(window_size=None, max_length=0)
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        resize_state(state(window_size=None, max_length=2), 0)


@pytest.mark.parametrize("window_size", [0, 4])
def test_only_a_state_of_the_whole_past_is_resized(window_size):
    with pytest.raises(ValueError, match=f"state is of window_size={window_size}.*fixed size"):
        resize_state(state(window_size=window_size), 8)


def test_only_what_was_asked_for():
    assert nha_attention(**arguments()).shape == (B, T, HQ, V)
    result = nha_attention(**arguments(return_slot_weight=True))
    assert result.state is None
    assert result.slot_weight.shape == (B, T, HQ)
    assert result.slot_weight.dtype == F32
    assert nha_attention(**arguments(return_state=True)).slot_weight is None
