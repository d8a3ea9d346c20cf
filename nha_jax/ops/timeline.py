"""Who enters the slots when, and who sees whom: said once, for every implementation.

A call's T tokens stand behind the R tokens that came before them, oldest first, as rows of one
timeline. A query row is the row of its token. In a row's turn, before it reads the slots, the token
W rows before it enters them (with a `slot_delay`, the one so many rows before), if both are real
and of one segment; after a batch row's last real token nothing enters, so that the slots stay as
that token left them. The window of a row holds the last W tokens of its segment, its own included.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from nha_jax.ops.state import NHAState, Past, Slots, Tokens, rotate_rows

PADDING_ROW = -1
"""Stands for the segment of a row that asks nothing. It is no token's segment."""
NO_TOKEN = -2
"""Stands for the segment of a row that holds no token. It is no query's segment."""


def nothing_leaves(delay: int | None, num_tokens: int, has_past: bool) -> bool:
    """Whether no token of the call leaves the window: then no slot is ever written.

    A state of a finite window may hold as many tokens as the window, so the next one lets one go.

    Args:
      delay: how many steps after its own a token leaves for the slots, `Options.delay`: the
        window's size, or a `slot_delay`, with which it stays in the window too.
    """
    return delay is None or (delay >= num_tokens and not has_past)


@dataclasses.dataclass(frozen=True)
class Timeline:
    """A call's T tokens behind the R that came before it, oldest first: R + T rows.

    Fields:
      tokens: of all rows, [B, R + T, Hkv, .]. Of a `window_size=None` state's tokens there are no
        keys and log decays: those here are the call's T.
      segment: [B, R + T] int32, numbers the segments from 0, the one that the past belongs to.
      real: [B, R + T] bool; False for padding and for rows before the first token.
      num_tokens: T.
      window_size: W; None: the whole past.
      slot_delay: how many rows after its own a token enters the slots; None: W.
    """

    tokens: Tokens
    segment: jax.Array
    real: jax.Array
    num_tokens: int
    window_size: int | None
    slot_delay: int | None = None

    @property
    def num_rows(self) -> int:
        """R + T."""
        return self.segment.shape[1]

    @property
    def rows_before(self) -> int:
        """R."""
        return self.num_rows - self.num_tokens

    @property
    def row_segment(self) -> jax.Array:
        """[B, R + T] int32, the segment that a row's query may read; `PADDING_ROW` for padding."""
        return jnp.where(self.real, self.segment, PADDING_ROW)

    @property
    def token_segment(self) -> jax.Array:
        """[B, R + T] int32, the segment of a row's token; `NO_TOKEN` where there is none."""
        return jnp.where(self.real, self.segment, NO_TOKEN)

    @property
    def query_real(self) -> jax.Array:
        """[B, T] bool, `real` of the call's own rows."""
        return self.real[:, -self.num_tokens :]

    @property
    def last(self) -> jax.Array:
        """[B] int32, the index in the call of the last real token; -1 if there is none."""
        index = jnp.arange(self.num_tokens, dtype=jnp.int32)
        return jnp.max(jnp.where(self.query_real, index, -1), axis=1)

    @property
    def first_to_enter(self) -> int:
        """The row of the token that enters the slots in the call's turn 0; negative if none."""
        assert self.window_size is not None
        delay = self.window_size if self.slot_delay is None else self.slot_delay
        return self.rows_before - delay

    @property
    def last_to_enter(self) -> jax.Array:
        """[B] int32, the row of the last token that enters the slots; negative if none does."""
        return self.last + self.first_to_enter

    @property
    def enters(self) -> jax.Array:
        """[B, R + T] bool, whether a row's token has entered the slots when the call ends."""
        row = jnp.arange(self.num_rows, dtype=jnp.int32)[None]
        return self.real & (row <= self.last_to_enter[:, None])

    @property
    def reads_own_slots(self) -> jax.Array:
        """[B, T] bool, whether the slots that a query row reads hold a token of its segment."""
        own = self.entering(self.segment) == self.row_segment[:, -self.num_tokens :]
        return self.entering(self.real) & own

    def entering(self, x: jax.Array) -> jax.Array:
        """Takes what belongs to the token that enters in each turn: [B, R + T, ...] -> [B, T, ...].

        The W rows before the call's must be there.
        """
        assert self.rows_before == self.window_size
        first = self.first_to_enter
        return lax.slice_in_dim(x, first, first + self.num_tokens, axis=1)

    def slot_segment(self, first: int, count: int) -> jax.Array:
        """Returns [B, count] int32: the segment that the slots belong to, turn by turn.

        Entry i holds after the turn of the token in row `first + i`, which may lie outside the
        timeline: before it the slots belong to segment 0, and from the last token to enter on they
        stay that token's.
        """
        last = self.last_to_enter[:, None]
        turn = first + jnp.arange(count, dtype=jnp.int32)[None]
        now = at_offset(self.segment, first, count, outside=0)
        return jnp.where(turn > last, self._segment_at(last), now)

    def _segment_at(self, row: jax.Array) -> jax.Array:
        """[B, 1] -> [B, 1] int32: the segment of a row; 0 for rows before the timeline."""
        at_row = jnp.take_along_axis(self.segment, jnp.maximum(row, 0), axis=1)
        return jnp.where(row >= 0, at_row, 0)


def build_timeline(
    tokens: Tokens,
    segment_ids: jax.Array | None,
    past: Past | None,
    window_size: int | None,
    *,
    slot_delay: int | None = None,
    leading_rows: bool = True,
) -> Timeline:
    """Joins a call's T tokens with those of the past.

    Args:
      leading_rows: whether, without a past, W rows that hold nothing come first if any token enters
        the slots, so that without a slot_delay the token in row t enters in the call's turn t.
    """
    B, T = tokens.key.shape[:2]
    if segment_ids is None:
        segment, real = jnp.zeros((B, T), jnp.int32), jnp.ones((B, T), bool)
    else:
        before = segment_ids[:, 0] if past is None else past.segment_id
        changed = segment_ids != jnp.concatenate([before[:, None], segment_ids[:, :-1]], axis=1)
        segment, real = jnp.cumsum(changed, axis=1, dtype=jnp.int32), segment_ids != 0
    if past is None:
        delay = window_size if slot_delay is None else slot_delay
        leaves = leading_rows and not nothing_leaves(delay, T, past is not None)
        R = window_size if leaves and window_size is not None else 0
        past_tokens = tokens.map(lambda x: jnp.zeros((B, R, *x.shape[2:]), x.dtype))
        past_real = jnp.zeros((B, R), bool)
    else:
        past_tokens, past_real = past.tokens, past.real
        R = past_real.shape[1]
    joined = (jnp.concatenate(pair, axis=1) for pair in zip(past_tokens, tokens, strict=True))
    return Timeline(
        tokens=Tokens(*joined),
        segment=jnp.concatenate([jnp.zeros((B, R), jnp.int32), segment], axis=1),
        real=jnp.concatenate([past_real, real], axis=1),
        num_tokens=T,
        window_size=window_size,
        slot_delay=slot_delay,
    )


def at_offset(x: jax.Array, first: int, count: int, *, outside: int | bool) -> jax.Array:
    """Returns x [B, n] at positions first to first + count, `outside` where there are none.

    By slices, because gathers are slow on a TPU.
    """
    before = max(-first, 0)
    after = max(first + count - x.shape[1], 0)
    padded = jnp.pad(x, ((0, 0), (before, after)), constant_values=outside)
    return lax.slice_in_dim(padded, first + before, first + before + count, axis=1)


def keep_last_segment(slots: Slots, timeline: Timeline) -> Slots:
    """Empties the slots of batch rows whose last segment has not reached them yet."""
    last = timeline.last[:, None]
    entered = timeline._segment_at(timeline.last_to_enter[:, None])
    now = timeline._segment_at(timeline.rows_before + last)
    keep = ((last < 0) | (entered == now))[..., None, None]  # [B, 1, 1, 1]
    return jnp.where(keep, slots[0], 0), jnp.where(keep, slots[1], 0)


def next_state(
    timeline: Timeline,
    slots: Slots,
    segment_ids: jax.Array | None,
    past: Past | None,
) -> NHAState:
    """Builds the state after the call, given the slots as each batch row's last token left them.

    The ring of a finite window keeps window_size tokens; that of `window_size=None` all, so it
    grows by T, but none of their keys and log decays.
    """
    R, W = timeline.rows_before, timeline.window_size
    capacity = timeline.num_rows if W is None else W
    last = timeline.last
    segment = timeline.segment[:, R:]
    last_segment = jnp.where(
        last >= 0, jnp.take_along_axis(segment, last[:, None], 1, mode="clip")[:, 0], 0
    )
    inside = timeline.query_real & (segment == last_segment[:, None])
    length = jnp.sum(inside, axis=1, dtype=jnp.int32)
    if past is not None:
        length += jnp.where(last_segment == 0, past.length, 0)

    def ring(x):  # the capacity rows that end with the last real token, at their ring entries
        padded = jnp.pad(x, ((0, 0), (capacity - R, 0), (0, 0), (0, 0)))
        rows = last[:, None] + 1 + jnp.arange(capacity, dtype=jnp.int32)[None]
        return rotate_rows(jnp.take_along_axis(padded, rows[:, :, None, None], 1), length)

    tokens = timeline.tokens
    rotated_key, value = map(ring, (tokens.rotated_key, tokens.value))
    if W is None:
        key, log_decay = tokens.key[:, :0], tokens.log_decay[:, :0]
    else:
        key, log_decay = map(ring, (tokens.key, tokens.log_decay))
    B = timeline.segment.shape[0]
    segment_id = jnp.ones(B, jnp.int32) if past is None else past.segment_id
    if segment_ids is not None:
        at_last = jnp.take_along_axis(segment_ids, last[:, None], 1, mode="clip")[:, 0]
        segment_id = jnp.where(last >= 0, at_last.astype(jnp.int32), segment_id)
    return NHAState(
        *slots, key, rotated_key, value, log_decay, length=length, segment_id=segment_id
    )
