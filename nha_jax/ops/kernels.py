"""What the kernels of every chip have in common: limits, and a decode step's arrays."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nha_jax.ops.backends import Arrays
from nha_jax.ops.state import NHAState, Tokens
from nha_jax.ops.types import Options
from pallas.constants import MOST_SLOTS
from pallas.decode_types import DecodeState, DecodeToken, SlotState, SlotToken


def attend_beyond_limits(arrays: Arrays, largest_head: int) -> str | None:
    """Says in a line which size is beyond those of a chip's fused kernels; None if none is.

    largest_head: the largest key and value dim that they serve.
    """
    _, key, value, log_decay = arrays
    for name, x in (("key", key), ("value", value)):
        if x.shape[3] > largest_head:
            return f"its kernels take heads of up to {largest_head}, got {name} of {x.shape[3]}"
    if log_decay.shape[3] > MOST_SLOTS:
        return f"its kernels take up to {MOST_SLOTS} slots, got log_decay of {log_decay.shape[3]}"
    return None


def decode_beyond_limits(query: jax.Array, state: NHAState) -> str | None:
    """Says in a line why no chip's kernel serves such a decode step; None if one may."""
    if state.slot_key.shape[2] == 0:
        return "its kernel takes at least one slot, got none"
    if query.dtype not in (jnp.bfloat16, jnp.float32):
        return f"its kernel takes bfloat16 and float32, got query of {query.dtype}"
    return None


def decode_in_kernel(
    attend: Callable[..., Any],
    query: jax.Array,
    rotated_query: jax.Array,
    token: Tokens,
    state: NHAState,
    active: jax.Array,
    options: Options,
) -> tuple[jax.Array, NHAState]:
    """Runs `attend`, a chip's `decode_attention`, on the arrays of a `Backend.decode`."""
    key, rotated_key, value, log_decay = token.map(lambda x: x[:, 0])
    entering = None
    if options.window_size is not None:
        entering = SlotToken(options.feature_map(query[:, 0]), key, log_decay)
    out, after = attend(
        DecodeToken(rotated_query[:, 0], rotated_key, value, entering),
        kernel_state(state),
        state.length % max(state.capacity, 1),
        state.length,
        active.astype(jnp.int32),
        scale=options.scale,
        num_slots=log_decay.shape[2],
        mask_empty=options.empty_slots == "mask",
        feature_map=options.slot_feature_map,
    )
    length = state.length + active.astype(jnp.int32)
    state = state._replace(
        window_rotated_key=after.rotated_key, window_value=after.value, length=length
    )
    if after.slots is not None:
        state = state._replace(
            slot_key=after.slots.slot_key,
            slot_value=after.slots.slot_value,
            window_key=after.slots.key,
            window_log_decay=after.slots.log_decay,
        )
    return out[:, None], state


def kernel_state(state: NHAState) -> DecodeState:
    """The state's arrays as the kernels take them; `slots` is None where nothing ever enters."""
    slots = None
    if state.window_key.shape[1] or not state.capacity:
        slots = SlotState(
            state.slot_key, state.slot_value, state.window_key, state.window_log_decay
        )
    return DecodeState(state.window_rotated_key, state.window_value, slots)
