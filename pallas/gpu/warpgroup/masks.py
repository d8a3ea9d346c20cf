"""Who sees whom, in a product of 64 rows and some columns, and what else has that shape."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.gpu.spec import CHUNK, COLUMN, GATE_ROWS, ROW, CallSpec
from pallas.gpu.warpgroup.chunk_index import ChunkIndex


def iota(columns: int, axis: int) -> jax.Array:
    """[C, columns], each number's index on the axis.

    Made of one axis, then spread: so a thread has few different numbers to hold.
    """
    if axis == 0:
        return by_row(plgpu.broadcasted_iota(jnp.int32, (CHUNK,), 0, layout=ROW), columns)
    return by_column(plgpu.broadcasted_iota(jnp.int32, (columns,), 0, layout=COLUMN))


def by_row(x: jax.Array, columns: int) -> jax.Array:
    """[C] -> [C, columns]."""
    return lax.broadcast_in_dim(x, (CHUNK, columns), [0])


def by_column(x: jax.Array) -> jax.Array:
    """[columns] -> [C, columns]."""
    return lax.broadcast_in_dim(x, (CHUNK, *x.shape), [1])


def sees(spec: CallSpec, index: ChunkIndex, block: int | jax.Array) -> jax.Array:
    """[C, C], whether a row of the chunk sees a token of the block in its window.

    Segments aside, which `same_segment` tells.
    """
    row = iota(CHUNK, 0) + index.first_row
    token = iota(CHUNK, 1) + (index.first_token + block * CHUNK)
    return in_window(spec, row, token)


def in_window(spec: CallSpec, row: jax.Array, token: jax.Array) -> jax.Array:
    """Whether query row `row` has the timeline's row `token` in its window, segments aside."""
    now = row + spec.offset
    inside = token <= now
    if spec.window is not None:
        inside &= token > now - spec.window
    # Without segments nothing precedes the queries.
    first = spec.ahead if spec.masked else spec.offset
    return inside & (token >= first) if first else inside


def entered(index: ChunkIndex) -> jax.Array:
    """[C, C], whether a token that enters in the chunk is in the slots that a row reads.

    Segments aside, which `same_segment` tells.
    """
    return iota(CHUNK, 1) + index.first_token <= iota(CHUNK, 0) + index.first_row


def block_entered(block: int, *, tokens_down: bool) -> jax.Array:
    """[C, 16], as `entered`, of the chunk's rows and a gate block's tokens.

    tokens_down: of the chunk's tokens and a gate block's rows.
    """
    ahead = iota(GATE_ROWS, 0) - iota(GATE_ROWS, 1)
    first = block * GATE_ROWS
    return ahead <= first if tokens_down else ahead >= first


def same_segment(rows: Any, columns: Any) -> jax.Array:
    """[C, columns], whether a row and a column are of one segment.

    rows, columns: references to `Segments.query` and `Segments.token`, or the other way around. A
    padding row is of no segment, nor is a token that is none.
    """
    of_rows = plgpu.load(rows, layout=ROW)
    of_columns = plgpu.load(columns, layout=COLUMN)
    return by_row(of_rows, of_columns.shape[0]) == by_column(of_columns)


def hide_slots(
    logits: jax.Array, first_slot: Any, padded_slots: int, slot_access: Any | None, spec: CallSpec
) -> jax.Array:
    """[C, slots] with -inf for slots that are padding, and in rows that read no slots.

    first_slot: of these columns, among padded_slots. slot_access: a reference to
    `Segments.slot_access` of the rows; None: all rows read.
    """
    columns = logits.shape[1]
    if spec.slots < padded_slots:
        logits = jnp.where(iota(columns, 1) < spec.slots - first_slot, logits, -jnp.inf)
    if slot_access is not None:
        logits = jnp.where(_access(slot_access, columns) > 0, logits, -jnp.inf)
    return logits


def reads_start(slot_access: Any, columns: int) -> jax.Array:
    """[C, columns], whether a row reads what the slots held at the chunk's start."""
    return _access(slot_access, columns) > 1


def _access(slot_access: Any, columns: int) -> jax.Array:
    return by_row(plgpu.load(slot_access, layout=ROW), columns)
