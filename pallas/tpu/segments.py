"""Who sees whom where there are packed documents, padding or a state to go on from.

Each row and token has the number of its segment, and the slots that of the last token that entered
them; who has another number is not seen. The caller packs the numbers into two arrays
(`pack_row_segments`, `pack_chunk_segments`); in the kernel, `Segments` holds them for one chunk.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas.constants import MASKED_LOGIT
from pallas.tpu.arithmetic import LANES, join, matmul_tn
from pallas.tpu.spec import CallSpec


def pack_row_segments(
    *,
    row_segment: jax.Array,
    slot_segment: jax.Array,
    slots_filled: jax.Array,
    enters: jax.Array,
) -> jax.Array:
    """Packs what is known of each row, [B, T] each, into [B, 8, T] float32.

    Numbers take three rows each, digits of base 256: bfloat16 holds those exactly.

    Args:
      row_segment: the segment that the row reads, from 2 to 2^24; 1 for padding.
      slot_segment: the segment of the slots once the chunk's token r has entered, for the chunk's
        row r.
      slots_filled: whether the row's slots hold a token of its segment.
      enters: whether the row's token (of a wide window, the token that is due at this row) enters
        the slots at its turn.
    """
    digits = [(x >> shift) & 255 for x in (row_segment, slot_segment) for shift in (0, 8, 16)]
    return jnp.stack([*digits, slots_filled, enters], axis=1).astype(jnp.float32)


_PACKED_ROWS = {"row_segment": (0, 1, 2), "slot_segment": (3, 4, 5), "slots_filled": (6,)}
_ENTERS = slice(7, 8)


def pack_chunk_segments(
    token_segment: jax.Array, start_segment: jax.Array, end_segment: jax.Array
) -> jax.Array:
    """Packs what is known of each chunk into [B, T / C, 256 + chunk_tokens] float32.

    Args:
      token_segment: [B, T / C, chunk_tokens], the segments of the chunk's tokens; 0 for tokens that
        no row reads.
      start_segment, end_segment: [B, T / C], the segment of the slots at the chunk's start and end.
        The kernel wants these in every lane.
    """
    spread = [jnp.repeat(x[..., None], LANES, axis=-1) for x in (start_segment, end_segment)]
    return jnp.concatenate([*spread, token_segment], axis=-1).astype(jnp.float32)


def row_columns(row_segments: jax.Array, names: list[str]) -> jax.Array:
    """Unpacks [8, rows] of `pack_row_segments`: [rows, 128 for each name], all 128 lanes alike.

    The matrix unit transposes the digits, spreads them over the lanes and adds them up, exactly; it
    has the time, and lanes are slow to talk to each other.
    """
    weights = join([_digit_weights(_PACKED_ROWS[name]) for name in names], 1)
    return matmul_tn(row_segments.astype(jnp.bfloat16), weights)


def _digit_weights(digits: tuple[int, ...]) -> jax.Array:
    """What each packed row counts for in the number of these digits, [8, 128]."""
    row = lax.broadcasted_iota(jnp.int32, (8, LANES), 0)
    weights = jnp.zeros((8, LANES), jnp.float32)
    for power, digit in enumerate(digits):
        weights = jnp.where(row == digit, 256.0**power, weights)
    return weights.astype(jnp.bfloat16)


def where_entering(x: jax.Array, row_segments: jax.Array) -> jax.Array:
    """Keeps x [M, rows] for tokens that enter the slots, 0 for others; row_segments [8, rows]."""
    return jnp.where(row_segments[_ENTERS] > 0.0, x, 0.0)


class Segments:
    """The segment numbers of one chunk: of its rows, of its tokens, and of the slots.

    Attributes:
      row: [C, 128], the segment that a row reads.
      slot: [C, 128], the segment of the slots once the chunk's token of this index has entered.
      start, end: [1, 128], the segment of the slots at the chunk's start and end.
      token: [1, chunk_tokens], the segments of the chunk's tokens.
      least_max: [C, 128], a lower bound of the rows' largest logits. For padding it is above every
        logit, which makes all their softmax weights 0, here and in the backward.
      slots_filled: bool [C, 128], with spec.mask_empty: the slots hold a token of
        the row's segment.
    The 128 lanes are all alike.
    """

    def __init__(self, of_rows: dict[str, jax.Array], of_chunk: jax.Array, spec: CallSpec):
        """Unpacks of_rows, [C, 128] for each name of `row_columns`, and of_chunk [1, 256 + .]."""
        self._spec = spec
        self.row, self.slot = of_rows["row_segment"], of_rows["slot_segment"]
        self.start, self.end = of_chunk[:, :LANES], of_chunk[:, LANES : 2 * LANES]
        self.token = of_chunk[:, 2 * LANES :]
        self.least_max = jnp.where(self.row > 1.0, MASKED_LOGIT, -MASKED_LOGIT)
        if spec.mask_empty:
            self.slots_filled = of_rows["slots_filled"] > 0.0

    def row_sees_token(self) -> jax.Array:
        """Whether a token is of a row's segment, bool [C, chunk_tokens]."""
        return _spread(self.row, self._spec.chunk_tokens) == self.token

    def where_row_sees_start(self, x: jax.Array) -> jax.Array:
        """Keeps x [C, M] in rows of the segment of the slots at the chunk's start, else 0."""
        return jnp.where((self.row == self.start)[:, : x.shape[1]], x, 0.0)

    def where_token_reaches_end(self, x: jax.Array) -> jax.Array:
        """Keeps x [C, M] for tokens of the segment of the slots at the chunk's end, else 0."""
        return jnp.where((self.slot == self.end)[:, : x.shape[1]], x, 0.0)

    def where_start_reaches_end(self, x: jax.Array) -> jax.Array:
        """Keeps x [1, M] if the slots are of one segment at the chunk's start and end, else 0."""
        return jnp.where((self.start == self.end)[:, : x.shape[1]], x, 0.0)


def _spread(x: jax.Array, width: int) -> jax.Array:
    """Widens [C, 128], all lanes alike, to [C, width]."""
    return join([x] * -(-width // x.shape[1]), 1)[:, :width]
