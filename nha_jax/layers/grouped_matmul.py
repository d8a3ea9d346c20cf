"""Products of grouped rows with a matrix for each group, for the experts of a mixture."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

MOST_ROWS = 512
"""The most rows that are multiplied at once."""


def grouped_dot(rows: jax.Array, matrices: jax.Array, sizes: jax.Array) -> jax.Array:
    """Multiplies every row by the matrix of its group, as `jax.lax.ragged_dot` does.

    On TPUs XLA has a kernel for that. Elsewhere (jax 0.12) it would multiply [rows, groups * in] by
    [groups * in, out]: `groups` times the work and the memory. There we take the rows in blocks.

    Args:
        rows: [rows, in], the first sizes[0] of them in group 0, the next sizes[1] in group 1, ...
        matrices: [groups, in, out], in the rows' dtype.
        sizes: [groups] int32, rows of each group; they add up to the number of rows.

    Returns:
        [rows, out] in the rows' dtype, accumulated in float32.
    """
    return lax.platform_dependent(
        rows, matrices, sizes, tpu=lax.ragged_dot, default=grouped_dot_by_blocks
    )


@jax.custom_vjp
def grouped_dot_by_blocks(rows: jax.Array, matrices: jax.Array, sizes: jax.Array) -> jax.Array:
    """Computes `grouped_dot` as a loop over blocks of rows, each of one group."""
    return _times(rows, matrices, sizes, contracted=1)


def _forward(rows, matrices, sizes):
    return grouped_dot_by_blocks(rows, matrices, sizes), (rows, matrices, sizes)


def _backward(residuals, d_out):
    rows, matrices, sizes = residuals
    d_rows = _times(d_out, matrices, sizes, contracted=2)
    d_matrices = _outer(rows, d_out, sizes).astype(matrices.dtype)
    return d_rows, d_matrices, None


grouped_dot_by_blocks.defvjp(_forward, _backward)


class _RowBlock(NamedTuple):
    """Rows that are multiplied at once by the matrix of one group.

    Where the block reaches past the group's last row, those rows belong to other groups.
    """

    group: jax.Array  # int32 scalar
    start: jax.Array  # int32 scalar, the block's first row
    end: jax.Array  # int32 scalar, the row after the group's last


def _times(rows: jax.Array, matrices: jax.Array, sizes: jax.Array, *, contracted: int) -> jax.Array:
    """Multiplies rows by their group's matrix [in, out], or by its transpose.

    Args:
        rows: [rows, in]; with contracted=2, [rows, out].
        matrices: [groups, in, out].
        sizes: [groups].
        contracted: the axis of `matrices` that is summed over.

    Returns:
        [rows, out]; with contracted=2, [rows, in].
    """
    block_rows = _block_rows(rows, sizes)
    padded = jnp.pad(rows, ((0, block_rows), (0, 0)))
    width = matrices.shape[3 - contracted]

    def multiply(block: _RowBlock, outputs: jax.Array) -> jax.Array:
        operand = lax.dynamic_slice_in_dim(padded, block.start, block_rows)
        product = lax.dot_general(
            operand,
            matrices[block.group],
            (((1,), (contracted - 1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        # Rows past the group's end are wrong, until the block of their own group overwrites them.
        return lax.dynamic_update_slice_in_dim(
            outputs, product.astype(rows.dtype), block.start, axis=0
        )

    outputs = jnp.zeros((len(padded), width), rows.dtype)
    return _for_blocks(multiply, outputs, sizes, len(rows), block_rows)[: len(rows)]


def _outer(rows: jax.Array, d_out: jax.Array, sizes: jax.Array) -> jax.Array:
    """Sums, for each group, the outer products of its rows: the gradient of the matrices.

    Args:
        rows: [rows, in].
        d_out: [rows, out].
        sizes: [groups].

    Returns:
        [groups, in, out] float32.
    """
    block_rows = _block_rows(rows, sizes)
    left, right = (jnp.pad(x, ((0, block_rows), (0, 0))) for x in (rows, d_out))

    def add(block: _RowBlock, total: jax.Array) -> jax.Array:
        own = block.start + jnp.arange(block_rows, dtype=jnp.int32) < block.end
        left_rows, right_rows = (
            jnp.where(own[:, None], lax.dynamic_slice_in_dim(x, block.start, block_rows), 0)
            for x in (left, right)
        )
        product = lax.dot_general(
            left_rows,
            right_rows,
            (((0,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        return total.at[block.group].add(product)

    total = jnp.zeros((len(sizes), rows.shape[1], d_out.shape[1]), jnp.float32)
    return _for_blocks(add, total, sizes, len(rows), block_rows)


def _block_rows(rows: jax.Array, sizes: jax.Array) -> int:
    """Chooses the rows of a block: what a group has on average, a power of 2 in [8, MOST_ROWS]."""
    average = -(-len(rows) // len(sizes))
    return min(max(8, 1 << (average - 1).bit_length()), MOST_ROWS)


def _for_blocks(
    step: Callable[[_RowBlock, jax.Array], jax.Array],
    value: jax.Array,
    sizes: jax.Array,
    num_rows: int,
    block_rows: int,
) -> jax.Array:
    """Computes value = step(block, value) for all blocks, in the order of their groups.

    The loop runs as often as the sizes may need at most; past the last block, `step` gets rows past
    the last row.
    """
    ends = jnp.cumsum(sizes)
    counts = -(-sizes // block_rows)
    ends_of_blocks = jnp.cumsum(counts)  # of each group, the number of the block after its last
    numbers = jnp.arange(min(num_rows, num_rows // block_rows + len(sizes)), dtype=jnp.int32)
    groups = jnp.searchsorted(ends_of_blocks, numbers, side="right").clip(max=len(sizes) - 1)
    starts = (ends - sizes)[groups] + (numbers - (ends_of_blocks - counts)[groups]) * block_rows

    def body(number: jax.Array, value: jax.Array) -> jax.Array:
        group = groups[number]
        return step(_RowBlock(group, starts[number], ends[group]), value)

    return lax.fori_loop(0, len(numbers), body, value)
