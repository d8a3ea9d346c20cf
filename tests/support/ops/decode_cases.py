"""Inputs of a decode step, and a step of a kernel held against the same in XLA."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from nha_jax.ops import init_state, rope_tables
from nha_jax.ops.rope import apply_rope
from nha_jax.ops.state import NHAState, Tokens
from nha_jax.ops.types import Options
from nha_jax.ops.xla.decode import decode_xla

K, V, M = 128, 128, 16

decode_in_xla = jax.jit(decode_xla, static_argnames="options")


def decode_options(window_size: int | None, empty_slots, feature_map) -> Options:
    return Options(
        window_size=window_size,
        scale=K**-0.5,
        slot_feature_map=feature_map,
        empty_slots=empty_slots,
        return_state=True,
        return_slot_weight=False,
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def make_token(
    seed: int, group: int, dtype, state: NHAState
) -> tuple[jax.Array, jax.Array, Tokens]:
    """query, rotated query and Tokens, [B, 1, heads, .]; decays mild, strong, -inf and 0."""
    keys = jax.random.split(jax.random.key(seed), 4)
    (B, H, M, K), V = state.slot_key.shape, state.slot_value.shape[3]
    query = jax.random.normal(keys[0], (B, 1, H * group, K), dtype)
    key = jax.random.normal(keys[1], (B, 1, H, K), dtype)
    value = jax.random.normal(keys[2], (B, 1, H, V), dtype)
    log_decay = -jnp.exp(jax.random.normal(keys[3], (B, 1, H, M)) * 3 - 3)
    log_decay = log_decay.at[:, :, 0, 0].set(-jnp.inf).at[:, :, 1, 1].set(0.0)
    rope = rope_tables(state.length[:, None], K)
    token = Tokens(key, apply_rope(key, rope), value, log_decay)
    return query, apply_rope(query, rope), token


def make_state(
    window_size: int | None, dtype, lengths: list[int], heads: int = 8, **sizes: int
) -> NHAState:
    """A state full of numbers, and of NaN where the rows' lengths say that there is no token.

    sizes: num_slots, key_dim, value_dim and max_length, of `init_state`.
    """
    sizes = {"num_slots": M, "key_dim": K, "value_dim": V, "max_length": 48} | sizes
    state = init_state(
        len(lengths), num_kv_heads=heads, window_size=window_size, dtype=dtype, **sizes
    )
    random = np.random.default_rng(0)
    fill = lambda x: jnp.asarray(random.standard_normal(x.shape), x.dtype)  # noqa: E731
    state = NHAState(*map(fill, state[:5]), -jnp.abs(fill(state[5])), *state[6:])
    length = jnp.array(lengths, jnp.int32)
    written = jnp.arange(state.capacity)[None] < length[:, None]
    filled = (length > state.capacity)[:, None, None, None]
    slots = (jnp.where(filled, x, jnp.nan) for x in state[:2])
    rings = (jnp.where(written[:, : x.shape[1], None, None], x, jnp.nan) for x in state[2:6])
    return NHAState(*slots, *rings, length=length, segment_id=state.segment_id)


def check_decode_step(
    arguments: tuple,
    options: Options,
    tolerance: float,
    kernel: Callable[..., tuple[jax.Array, NHAState]],
) -> NHAState:
    """Compares a kernel's step with XLA's; returns the state after it.

    The rings must be equal, the slots within 2e-6, the output within `tolerance`.
    """
    expected, after = decode_in_xla(*arguments, options=options)
    out, after_kernel = kernel(*arguments, options=options, interpret=True)
    assert (out.dtype, out.shape) == (expected.dtype, expected.shape)
    close = {"rtol": tolerance, "atol": tolerance}
    np.testing.assert_allclose(*map(np.float32, (out, expected)), **close)
    for name, x, y in zip(after._fields, after_kernel, after, strict=True):
        close = {"rtol": 2e-6, "atol": 2e-6} if name.startswith("slot") else {"rtol": 0}
        np.testing.assert_allclose(*map(np.float32, (x, y)), err_msg=name, **close)
    return after
