"""The state that carries Native Hybrid Attention from one call to the next."""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

Slots = tuple[jax.Array, jax.Array]
"""Slot keys [B, Hkv, M, K] and slot values [B, Hkv, M, V], in the compute dtype."""


def compute_dtype(x: jax.Array) -> jnp.dtype:
    """The dtype of states, softmax and sums: float32, or float64 for float64 inputs."""
    return at_least_float32(x.dtype)


def at_least_float32(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """Promotes a floating dtype, whatever jax_numpy_dtype_promotion says of arrays."""
    return np.promote_types(jnp.dtype(dtype), np.float32)


def empty_slots(key: jax.Array, value: jax.Array, num_slots: int) -> Slots:
    """The slots before the first token entered: zeros, for keys and values [B, T, Hkv, .]."""
    B, _, H, K = key.shape
    dtype = compute_dtype(key)
    slots = (B, H, num_slots)
    return jnp.zeros((*slots, K), dtype), jnp.zeros((*slots, value.shape[3]), dtype)


class NHAState(NamedTuple):
    """What a layer remembers of each batch row after its last real (non-padding) token.

    B rows, Hkv heads, M slots, R ring entries: R = window_size, or, for `window_size=None`, the
    number of tokens there is room for. The token with index i of its segment sits at ring entry
    `i % R`. float64 inputs give float64 where float32 stands here.

    With `window_size=None` no token ever enters the slots: they stay zero and are not read, and
    what only they would need, `window_key` and `window_log_decay`, has 0 ring entries.
    """

    slot_key: jax.Array  # [B, Hkv, M, K] float32
    slot_value: jax.Array  # [B, Hkv, M, V] float32
    window_key: jax.Array  # [B, R, Hkv, K], not rotated: what will enter the slots
    window_rotated_key: jax.Array  # [B, R, Hkv, K], rotated: what the window's logits read
    window_value: jax.Array  # [B, R, Hkv, V]
    window_log_decay: jax.Array  # [B, R, Hkv, M] float32
    length: jax.Array  # [B] int32, tokens so far of the row's current segment
    segment_id: jax.Array  # [B] int32, id of the row's current segment

    @property
    def capacity(self) -> int:
        """R, the tokens the ring has room for."""
        return self.window_value.shape[1]

    @property
    def tokens(self) -> "Tokens":
        """The four arrays of the ring, in its order."""
        return Tokens(
            self.window_key, self.window_rotated_key, self.window_value, self.window_log_decay
        )

    def past(self, slot_delay: int | None = None) -> "Past":
        """Unrolls the ring, oldest token first.

        What no token has written yet, slots and ring entries, is 0 there, whatever it holds.

        Args:
          slot_delay: how many steps after its own a token enters the slots; None: R.
        """
        row = jnp.arange(self.capacity, dtype=jnp.int32)[None]
        real = row >= self.capacity - self.length[:, None]
        delay = self.capacity if slot_delay is None else slot_delay
        entered = (self.length > delay)[:, None, None, None]

        def unroll(ring: jax.Array) -> jax.Array:
            rows = rotate_rows(ring, -self.length)
            return jnp.where(real[:, : rows.shape[1], None, None], rows, 0)

        return Past(
            slots=(
                jnp.where(entered, self.slot_key, 0),
                jnp.where(entered, self.slot_value, 0),
            ),
            tokens=self.tokens.map(unroll),
            real=real,
            length=self.length,
            segment_id=self.segment_id,
        )


class Tokens(NamedTuple):
    """What the operator keeps of tokens: four arrays [B, tokens, Hkv, .].

    A `window_size=None` state has no keys and log decays: 0 tokens in those two arrays.
    """

    key: jax.Array
    rotated_key: jax.Array
    value: jax.Array
    log_decay: jax.Array

    def map(self, function) -> Self:
        """Applies the function to each of the four arrays."""
        return type(self)(*map(function, self))


class Past(NamedTuple):
    """What a call goes on from: the slots, and the R tokens before it, oldest first.

    `real` are those tokens that belong to the segment of the last of them; only they are ever seen.
    """

    slots: Slots  # as the last token before the call left them
    tokens: Tokens  # [B, R, Hkv, .]
    real: jax.Array  # [B, R] bool
    length: jax.Array  # [B] int32, tokens so far of that segment
    segment_id: jax.Array  # [B] int32, its id


def init_state(
    batch_size: int,
    *,
    num_kv_heads: int,
    num_slots: int,
    key_dim: int,
    value_dim: int,
    window_size: int | None,
    dtype: jax.typing.DTypeLike,
    max_length: int | None = None,
) -> NHAState:
    """Builds an empty state.

    Args:
      max_length: the tokens that the state of `window_size=None` has room for; it is required there
        and ignored elsewhere.

    Raises ValueError if `window_size` is None and `max_length` is not given or below 1.
    """
    capacity = window_size if window_size is not None else max_length
    if capacity is None:
        raise ValueError("init_state: window_size=None keeps every token, so it needs max_length")
    if window_size is None and capacity < 1:
        raise ValueError(f"init_state: max_length must be at least 1, got {capacity}")
    ring = (batch_size, capacity, num_kv_heads)
    entering = (batch_size, 0 if window_size is None else capacity, num_kv_heads)
    slots = (batch_size, num_kv_heads, num_slots)
    accumulator = at_least_float32(dtype)
    return NHAState(
        slot_key=jnp.zeros((*slots, key_dim), accumulator),
        slot_value=jnp.zeros((*slots, value_dim), accumulator),
        window_key=jnp.zeros((*entering, key_dim), dtype),
        window_rotated_key=jnp.zeros((*ring, key_dim), dtype),
        window_value=jnp.zeros((*ring, value_dim), dtype),
        window_log_decay=jnp.zeros((*entering, num_slots), accumulator),
        length=jnp.zeros(batch_size, jnp.int32),
        segment_id=jnp.ones(batch_size, jnp.int32),
    )


def resize_state(state: NHAState, max_length: int) -> NHAState:
    """Changes the room of a `window_size=None` layer's state to `max_length` tokens.

    No row may hold more tokens than that: the ones beyond it would be lost.

    Raises ValueError if the state is of a finite window, or `max_length` is below 1.
    """
    if state.window_key.shape[1] or not state.capacity:
        raise ValueError(
            f"resize_state: state is of window_size={state.capacity}, whose ring has a fixed size; "
            "only a window_size=None layer's can be resized"
        )
    if max_length < 1:
        raise ValueError(f"resize_state: max_length must be at least 1, got {max_length}")
    room = max(max_length - state.capacity, 0)

    # Nothing was evicted, so entry i holds token i and the spare room is at the end.
    def resize(ring):
        return jnp.pad(ring[:, :max_length], ((0, 0), (0, room), (0, 0), (0, 0)))

    return state._replace(
        window_rotated_key=resize(state.window_rotated_key),
        window_value=resize(state.window_value),
    )


def rotate_rows(x: jax.Array, shift: jax.Array) -> jax.Array:
    """Rolls x [B, R, ...] along R by shift [B]: entry i moves to (i + shift) % R."""
    R = x.shape[1]
    if R == 0:
        return x
    source = (jnp.arange(R, dtype=jnp.int32)[None] - shift[:, None]) % R  # [B, R]
    return jnp.take_along_axis(x, source.reshape(*source.shape, *(1,) * (x.ndim - 2)), axis=1)
