"""Products of rows in groups with a matrix for each group."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

MOST_ROWS = 512  # of a block


def grouped_dot(rows: jax.Array, matrices: jax.Array, sizes: jax.Array) -> jax.Array:
    """Every row times the matrix of its group, as `jax.lax.ragged_dot`.

    For TPUs XLA has kernels of that. Elsewhere it would (jax 0.12) multiply [N, E * D] by
    [E * D, I], E times the work and the memory; there we go through the rows block by block.

    Args:
      rows: [N, D], the first sizes[0] of them in group 0, and so on.
      matrices: [E, D, I], of the rows' dtype.
      sizes: [E] int32, which add up to N.

    Returns:
      [N, I] in the rows' dtype; accumulated in float32.
    """
    return lax.platform_dependent(
        rows, matrices, sizes, tpu=lax.ragged_dot, default=grouped_dot_by_blocks
    )


@jax.custom_vjp
def grouped_dot_by_blocks(rows: jax.Array, matrices: jax.Array, sizes: jax.Array) -> jax.Array:
    """`grouped_dot` as a loop over blocks of rows of one group."""
    return _times(rows, matrices, sizes, contracted=1)


def _forward(rows, matrices, sizes):
    return grouped_dot_by_blocks(rows, matrices, sizes), (rows, matrices, sizes)


def _backward(residuals, gradient):
    rows, matrices, sizes = residuals
    of_rows = _times(gradient, matrices, sizes, contracted=2)
    of_matrices = _outer(rows, gradient, sizes).astype(matrices.dtype)
    return of_rows, of_matrices, None


grouped_dot_by_blocks.defvjp(_forward, _backward)


class _Block(NamedTuple):
    """Rows that are multiplied at once: all of one group, but for those behind its last."""

    group: jax.Array
    start: jax.Array
    end: jax.Array  # of the group


def _times(rows: jax.Array, matrices: jax.Array, sizes: jax.Array, *, contracted: int) -> jax.Array:
    """[N, D] and [E, D, I] -> [N, I]; or, contracting axis 2, [N, I] and [E, D, I] -> [N, D]."""
    B = _block_rows(rows, sizes)
    padded = jnp.pad(rows, ((0, B), (0, 0)))
    width = matrices.shape[3 - contracted]

    def multiply(block: _Block, outputs: jax.Array) -> jax.Array:
        some = lax.dynamic_slice_in_dim(padded, block.start, B)
        product = lax.dot_general(
            some,
            matrices[block.group],
            (((1,), (contracted - 1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        # Rows behind the group's last are wrong until their own group comes, which is later.
        return lax.dynamic_update_slice_in_dim(
            outputs, product.astype(rows.dtype), block.start, axis=0
        )

    outputs = jnp.zeros((len(padded), width), rows.dtype)
    return _for_blocks(multiply, outputs, sizes, len(rows), B)[: len(rows)]


def _outer(rows: jax.Array, gradient: jax.Array, sizes: jax.Array) -> jax.Array:
    """[N, D] and [N, I] -> [E, D, I] float32: of each group, the sum of its rows' products."""
    B = _block_rows(rows, sizes)
    left, right = (jnp.pad(x, ((0, B), (0, 0))) for x in (rows, gradient))

    def add(block: _Block, total: jax.Array) -> jax.Array:
        own = block.start + jnp.arange(B) < block.end
        left_rows, right_rows = (
            jnp.where(own[:, None], lax.dynamic_slice_in_dim(x, block.start, B), 0)
            for x in (left, right)
        )
        product = lax.dot_general(
            left_rows,
            right_rows,
            (((0,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        return total.at[block.group].add(product)

    total = jnp.zeros((len(sizes), rows.shape[1], gradient.shape[1]), jnp.float32)
    return _for_blocks(add, total, sizes, len(rows), B)


def _block_rows(rows: jax.Array, sizes: jax.Array) -> int:
    """As many as a group has on average, as a power of 2 in [8, MOST_ROWS]."""
    average = -(-len(rows) // len(sizes))
    return min(max(8, 1 << (average - 1).bit_length()), MOST_ROWS)


def _for_blocks(
    step: Callable[[_Block, jax.Array], jax.Array],
    value: jax.Array,
    sizes: jax.Array,
    num_rows: int,
    B: int,
) -> jax.Array:
    """step(block, value) for all blocks of B rows, in order of their groups.

    The loop is as long as it may have to be; after the last block its rows are behind the last.
    """
    ends = jnp.cumsum(sizes)
    counts = -(-sizes // B)
    behind = jnp.cumsum(counts)  # of each group, the number of its last block, plus 1
    numbers = jnp.arange(min(num_rows, num_rows // B + len(sizes)))
    groups = jnp.searchsorted(behind, numbers, side="right").clip(max=len(sizes) - 1)
    starts = (ends - sizes)[groups] + (numbers - (behind - counts)[groups]) * B

    def body(number: jax.Array, value: jax.Array) -> jax.Array:
        group = groups[number]
        return step(_Block(group, starts[number], ends[group]), value)

    return lax.fori_loop(0, len(numbers), body, value)
