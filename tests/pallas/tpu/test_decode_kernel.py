"""The decode kernel in its interpreter against decode_step in XLA, from empty past a full ring."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nha_jax.ops import init_state, rope_tables
from nha_jax.ops.rope import apply_rope
from nha_jax.ops.state import NHAState, Tokens
from nha_jax.ops.tpu import decode_tpu
from nha_jax.ops.types import Options
from nha_jax.ops.xla.decode import decode_xla

B, K, V, M = 3, 128, 128, 16


def options(window_size: int | None, empty_slots, feature_map) -> Options:
    return Options(
        window_size=window_size,
        scale=K**-0.5,
        slot_feature_map=feature_map,
        empty_slots=empty_slots,
        return_state=True,
        return_slot_weight=False,
    )


def a_token(seed: int, group: int, dtype, state: NHAState):
    """query, rotated query, Tokens [B, 1, heads, .]; decays mild, strong and -inf."""
    keys = jax.random.split(jax.random.key(seed), 4)
    (B, H, M, K), V = state.slot_key.shape, state.slot_value.shape[3]
    query = jax.random.normal(keys[0], (B, 1, H * group, K), dtype)
    key = jax.random.normal(keys[1], (B, 1, H, K), dtype)
    value = jax.random.normal(keys[2], (B, 1, H, V), dtype)
    log_decay = -jnp.exp(jax.random.normal(keys[3], (B, 1, H, M)) * 3 - 3)
    log_decay = log_decay.at[:, :, 0, 0].set(-jnp.inf).at[:, :, 1, 1].set(0.0)
    rope = rope_tables(state.length[:, None], K)
    new = Tokens(key, apply_rope(key, rope), value, log_decay)
    return query, apply_rope(query, rope), new


def a_state(
    window_size: int | None, dtype, lengths: list[int], heads: int = 8, **sizes: int
) -> NHAState:
    """Full of numbers, also where the rows' lengths say that there is no token.

    sizes: num_slots, key_dim, value_dim and max_length, of `init_state`.
    """
    sizes = {"num_slots": M, "key_dim": K, "value_dim": V, "max_length": 48} | sizes
    state = init_state(
        len(lengths), num_kv_heads=heads, window_size=window_size, dtype=dtype, **sizes
    )
    random = np.random.default_rng(0)
    fill = lambda x: jnp.asarray(random.standard_normal(x.shape), x.dtype)  # noqa: E731
    state = NHAState(*map(fill, state[:5]), -jnp.abs(fill(state[5])), *state[6:])
    return state._replace(length=jnp.array(lengths, jnp.int32))


def check(arguments, chosen: Options, tolerance: float, kernel=decode_tpu) -> NHAState:
    """Compares one step; returns the state after it."""
    expected, after = decode_xla(*arguments, options=chosen)
    got, after_kernel = kernel(*arguments, options=chosen, interpret=True)
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    close = {"rtol": tolerance, "atol": tolerance}
    np.testing.assert_allclose(*map(np.float32, (got, expected)), **close)
    for name, x, y in zip(after._fields, after_kernel, after, strict=True):
        close = {"rtol": 2e-6, "atol": 2e-6} if name.startswith("slot") else {"rtol": 0}
        np.testing.assert_allclose(*map(np.float32, (x, y)), err_msg=name, **close)
    return after


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize(
    ("group", "window_size", "empty_slots", "feature_map"),
    [(1, 16, "attend", "identity"), (2, 32, "mask", "silu"), (2, None, "mask", "identity")],
)
def test_kernel_matches_xla(dtype, tolerance, group, window_size, empty_slots, feature_map) -> None:
    R = 48 if window_size is None else window_size
    # Rows of different age: empty, about to be full, and (with a window) long full.
    state = a_state(window_size, dtype, [0, R - 1, 3 * R + 5 if window_size else R // 2])
    chosen = options(window_size, empty_slots, feature_map)
    active = jnp.ones(B, bool)
    state = check((*a_token(0, group, dtype, state), state, active), chosen, tolerance)
    active = active.at[1].set(False)
    check((*a_token(1, group, dtype, state), state, active), chosen, tolerance)


def test_few_heads() -> None:
    """As the published 340M model has: four heads, W = 32."""
    state = a_state(32, jnp.float32, [0, 31, 100], heads=4)
    arguments = (*a_token(0, 1, jnp.float32, state), state, jnp.array([True, True, False]))
    check(arguments, options(32, "attend", "identity"), 2e-6)


def test_ring_of_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four blocks, read from the one with the entry on, and decays with entries innermost."""
    monkeypatch.setattr("pallas.tpu.decode.BLOCK_BYTES", 2**17)
    state = a_state(128, jnp.float32, [200, 128, 40])
    active = jnp.array([True, False, True])
    check(
        (*a_token(0, 2, jnp.float32, state), state, active),
        options(128, "attend", "identity"),
        2e-6,
    )
