"""The state that carries Native Hybrid Attention from one call to the next."""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

Slots = tuple[jax.Array, jax.Array]  # keys [B, Hkv, M, K] and values [B, Hkv, M, V]


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
        """The ring's four arrays."""
        return Tokens(
            self.window_key, self.window_rotated_key, self.window_value, self.window_log_decay
        )

    @property
    def carried(self) -> "Carried":
        """The same with the ring unrolled."""
        return Carried(
            slots=(self.slot_key, self.slot_value),
            tokens=self.tokens.map(lambda x: _rotate_rows(x, -self.length)),
            real=jnp.arange(self.capacity) >= self.capacity - self.length[:, None],
            length=self.length,
            segment_id=self.segment_id,
        )


class Tokens(NamedTuple):
    """What the operator keeps of a token, for N tokens: [B, N, Hkv, .] each.

    In a `window_size=None` state there are 0 instead of N keys and log decays.
    """

    key: jax.Array
    rotated_key: jax.Array
    value: jax.Array
    log_decay: jax.Array

    def map(self, function) -> Self:
        return type(self)(*map(function, self))


class Carried(NamedTuple):
    """What a call goes on from: the slots, and the R tokens before it, oldest first.

    `real` are those tokens that belong to the segment of the last of them; only they are ever seen.
    """

    slots: Slots  # as the last token before the call left them
    tokens: Tokens  # [B, R, Hkv, .]
    real: jax.Array  # [B, R] bool
    length: jax.Array  # [B] int32, tokens so far of that segment
    segment_id: jax.Array  # [B] int32, its id


class Timeline(NamedTuple):
    """A call's tokens behind the R that came before it, oldest first: N = R + T rows.

    A run numbers the segments from 0, the one the carried state belongs to. A row is real unless
    it is padding or lies before the first token. Of a `window_size=None` state's tokens there are
    no keys and log decays: those in `tokens` are the call's T.
    """

    tokens: Tokens
    run: jax.Array  # [B, N] int32
    real: jax.Array  # [B, N] bool


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
    """An empty state. `max_length`, required for `window_size=None` only, is the room it has.

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
    accumulator = jnp.promote_types(dtype, jnp.float32)
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
    """The state of a `window_size=None` layer with room for `max_length` tokens.

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


def build_timeline(
    tokens: Tokens,
    segment_ids: jax.Array | None,
    carried: Carried | None,
    window_size: int | None,
) -> Timeline:
    """Joins a call's T tokens with those carried over, or with as many rows of nothing.

    Without any, R is min(window_size, T) (a longer window reaches no further back), and 0 for
    `window_size=None`.
    """
    B, T = tokens.key.shape[:2]
    if segment_ids is None:
        run, real = jnp.zeros((B, T), jnp.int32), jnp.ones((B, T), bool)
    else:
        before = segment_ids[:, 0] if carried is None else carried.segment_id
        changed = segment_ids != jnp.concatenate([before[:, None], segment_ids[:, :-1]], axis=1)
        run, real = jnp.cumsum(changed, axis=1, dtype=jnp.int32), segment_ids != 0
    if carried is None:
        R = 0 if window_size is None else min(window_size, T)
        past = tokens.map(lambda x: jnp.zeros((B, R, *x.shape[2:]), x.dtype))
        past_real = jnp.zeros((B, R), bool)
    else:
        past, past_real = carried.tokens, carried.real
        R = past_real.shape[1]
    joined = (jnp.concatenate(pair, axis=1) for pair in zip(past, tokens, strict=True))
    return Timeline(
        tokens=Tokens(*joined),
        run=jnp.concatenate([jnp.zeros((B, R), jnp.int32), run], axis=1),
        real=jnp.concatenate([past_real, real], axis=1),
    )


def last_real(timeline: Timeline, num_tokens: int) -> jax.Array:
    """Per row [B], the index in the call of the last real token; -1 if there is none."""
    index = jnp.arange(num_tokens)
    return jnp.max(jnp.where(timeline.real[:, -num_tokens:], index, -1), axis=1)


def of_last_segment(slots: Slots, timeline: Timeline, T: int) -> Slots:
    """Empties the slots of rows whose last segment has not reached them yet."""
    last = last_real(timeline, T)[:, None]
    entered, now = (
        jnp.take_along_axis(run, last, axis=1, mode="clip")
        for run in (timeline.run[:, :T], timeline.run[:, -T:])
    )
    keep = ((last < 0) | (entered == now))[..., None, None]  # [B, 1, 1, 1]
    return jnp.where(keep, slots[0], 0), jnp.where(keep, slots[1], 0)


def next_state(
    timeline: Timeline,
    num_tokens: int,
    slots: Slots,
    segment_ids: jax.Array | None,
    carried: Carried | None,
    window_size: int | None,
) -> NHAState:
    """The state after the call, given the slots [B, Hkv, M, .] as each row's last token left them.

    Of a window the ring keeps window_size tokens; of `window_size=None` all, so it grows by T, but
    of their keys and log decays none.
    """
    T = num_tokens
    B, N = timeline.run.shape
    R = N - T
    capacity = R + T if window_size is None else window_size
    last = last_real(timeline, T)
    run = timeline.run[:, R:]
    last_run = jnp.where(
        last >= 0, jnp.take_along_axis(run, last[:, None], 1, mode="clip")[:, 0], 0
    )
    inside = timeline.real[:, R:] & (run == last_run[:, None])
    length = jnp.sum(inside, axis=1, dtype=jnp.int32)
    if carried is not None:
        length += jnp.where(last_run == 0, carried.length, 0)

    def ring(x):  # the capacity rows that end with the last real token, at their ring entries
        padded = jnp.pad(x, ((0, 0), (capacity - R, 0), (0, 0), (0, 0)))
        rows = last[:, None] + 1 + jnp.arange(capacity)
        return _rotate_rows(jnp.take_along_axis(padded, rows[:, :, None, None], 1), length)

    tokens = timeline.tokens
    rotated_key, value = map(ring, (tokens.rotated_key, tokens.value))
    if window_size is None:
        key, log_decay = tokens.key[:, :0], tokens.log_decay[:, :0]
    else:
        key, log_decay = map(ring, (tokens.key, tokens.log_decay))
    segment_id = jnp.ones(B, jnp.int32) if carried is None else carried.segment_id
    if segment_ids is not None:
        at_last = jnp.take_along_axis(segment_ids, last[:, None], 1, mode="clip")[:, 0]
        segment_id = jnp.where(last >= 0, at_last.astype(jnp.int32), segment_id)
    return NHAState(
        *slots, key, rotated_key, value, log_decay, length=length, segment_id=segment_id
    )


def _rotate_rows(x: jax.Array, shift: jax.Array) -> jax.Array:
    """Rolls x [B, R, ...] along R by shift [B]: entry i goes to (i + shift) % R."""
    R = x.shape[1]
    if R == 0:
        return x
    source = (jnp.arange(R) - shift[:, None]) % R  # [B, R]
    return jnp.take_along_axis(x, source.reshape(*source.shape, *(1,) * (x.ndim - 2)), axis=1)
