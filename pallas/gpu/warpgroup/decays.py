"""The decays inside a chunk, between its rows and its tokens, and the products that carry them.

A gate block is 16 rows that share a reference, c_ref: c at their middle row. The decay from token
j to row r, s_j exp(c_r - c_j), is the product of two factors:

    row_decay_r = exp(c_r - c_ref)          token_decay_j = s_j exp(c_ref - c_j)

with the c_ref of the row's gate block. A row_decay spans 8 tokens, and so does the part of a
token_decay that grows: with FLOOR neither exceeds 2^93, however strong the
decays are. A gate block's product is of the whole chunk, with zeros for the rows of the others:
this layout has no products of fewer rows.

Several functions take what lies in shared memory as a function of the gate block, because a
reference must be indexed where it is used (see `addresses.py`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.gpu.spec import CHUNK, COLUMN, GATE_BLOCKS, GATE_ROWS
from pallas.gpu.warpgroup.masks import by_column, iota, reads_start
from pallas.gpu.warpgroup.matmul import Matmul

FLOOR = -8.0  # nats; the least decay of a token inside a chunk
LEAST_WRITE = 2.0**-60  # stands for s = 0 where s divides
MIDDLE = GATE_ROWS // 2 - 1  # the row of a gate block that its reference is of
MAX_EXPONENT = 100.0  # of 2, in factors that a mask removes

OfBlock = Callable[[int], Any]
"""Of a gate block: a reference to c_ref [slots] float32, or to token_decay [C, slots] bfloat16."""


def fetch_references(
    cumulative: Callable[[Any], Any], first_row: jax.Array, references: OfBlock, loaded: Any
) -> None:
    """Copies each gate block's c_ref, a row of c, from the device's memory.

    cumulative: the reference to a row of c [slots], by its index. first_row: the chunk's.
    loaded: the barrier at which the GATE_BLOCKS copies arrive.
    """
    for block in range(GATE_BLOCKS):
        row = cumulative(first_row + block * GATE_ROWS + MIDDLE)
        plgpu.copy_gmem_to_smem(row, references(block), loaded)


def store_references(cumulative: jax.Array, references: OfBlock) -> None:
    """Stores each gate block's c_ref of c [C, slots] in registers, of which no row can be taken.

    A masked sum over the rows takes it: across warps, see `launch`.
    """
    row = iota(cumulative.shape[1], 0)
    for block in range(GATE_BLOCKS):
        is_middle = row == block * GATE_ROWS + MIDDLE
        references(block)[...] = jnp.where(is_middle, cumulative, 0.0).sum(axis=0)


def write_of(log_decay: jax.Array) -> jax.Array:
    """s = 1 - exp(log_decay), float32, without loss near 0: there is no expm1."""
    x = log_decay
    series = -x * (1 + x * (1 / 2 + x * (1 / 6 + x / 24)))  # to 2e-6 of s
    return jnp.where(x > -1 / 8, series, 1 - jnp.exp(x))


def write_of_odds(odds: jax.Array) -> jax.Array:
    """s, at least LEAST_WRITE, of odds = exp(log_decay) / s: the two add up to 1."""
    return 1 / (1 + odds)


def token_decay(write: jax.Array, cumulative: jax.Array, reference: Any) -> jax.Array:
    """s_j exp(c_ref - c_j), [C, slots] bfloat16.

    write: s, [C, slots] float32. cumulative: c, [C, slots] in units of log 2. reference: to c_ref
    [slots] of a gate block.
    """
    reference = by_column(plgpu.load(reference, layout=COLUMN))
    exponent = jnp.minimum(reference - cumulative, MAX_EXPONENT)
    return (write * jnp.exp2(exponent)).astype(jnp.bfloat16)


def own_reference(references: OfBlock, slots: int) -> jax.Array:
    """[C, slots], the c_ref of each row's own gate block."""

    def of_block(block: int) -> jax.Array:
        return by_column(plgpu.load(references(block), layout=COLUMN))

    own = of_block(GATE_BLOCKS - 1)
    for block in reversed(range(GATE_BLOCKS - 1)):
        own = jnp.where(gate_block(slots) == block, of_block(block), own)
    return own


def start_decay(exponent: jax.Array, slot_access: Any | None) -> jax.Array:
    """exp(exponent), [C, slots], and 0 in rows that do not read the slots at the chunk's start.

    exponent: c_r, or the c_ref of the row. slot_access: a reference to `Segments.slot_access` of
    the rows; None: all rows read them.
    """
    decay = jnp.exp2(exponent)
    if slot_access is not None:
        decay = jnp.where(reads_start(slot_access, decay.shape[1]), decay, 0.0)
    return decay


def spread(
    scores: jax.Array,
    token_decays: OfBlock,
    slots: int,
    matmul: Matmul,
    start: jax.Array | None = None,
) -> jax.Array:
    """[C, C] of rows and tokens -> [C, slots]: start + sum_j scores_rj token_decay_jm."""

    def operands():
        for block in range(GATE_BLOCKS):
            rows = jnp.where(gate_block(CHUNK) == block, scores, 0.0).astype(jnp.bfloat16)
            yield rows, token_decays(block)

    return matmul(lambda: list(operands()), (CHUNK, slots), start)


def gather(
    weights: jax.Array, token_decays: OfBlock, matmul: Matmul, start: jax.Array | None = None
) -> jax.Array:
    """[C, slots] -> [C, C] of rows and tokens: start + sum_m weights_rm token_decay_jm.

    Finite or inf for tokens j > r, which the caller masks.
    """

    def operands():
        for block in range(GATE_BLOCKS):
            rows = jnp.where(gate_block(weights.shape[1]) == block, weights, 0.0)
            yield rows.astype(jnp.bfloat16), token_decays(block).T

    return matmul(lambda: list(operands()), (CHUNK, CHUNK), start)


def gate_block(columns: int) -> jax.Array:
    """[C, columns], the gate block that a row is in."""
    return lax.shift_right_logical(iota(columns, 0), jnp.int32(GATE_ROWS.bit_length() - 1))
