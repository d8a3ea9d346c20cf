"""Sums of a chunk's numbers over some of its rows, inside a kernel.

Mosaic GPU has no cumulative sum; a product with zeros and ones is one. The tensor cores multiply
bfloat16, so float32 is split in parts: three hold all of its bits, two hold 16.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.gpu.spec import CHUNK, LOGITS
from pallas.gpu.warpgroup.matmul import Matmul

PARTS = 3
Parts = Callable[[int], Any]
"""References of [C, slots] bfloat16 in shared memory, of the parts 0, 1 and 2."""


def split_bfloat16(x: jax.Array, parts: int) -> Iterator[jax.Array]:
    """The bfloat16 numbers, largest first, whose sum is x, float32 and finite."""
    for _ in range(parts):
        part = x.astype(jnp.bfloat16)
        x = x - part.astype(jnp.float32)
        yield part


def store_parts(x: jax.Array, parts: Parts) -> None:
    """Stores the three parts of x [C, slots] float32; `commit_smem` is the caller's."""
    for i, part in enumerate(split_bfloat16(x, PARTS)):
        parts(i)[...] = part


def store_chosen(chosen: jax.Array, target: Any) -> None:
    """Stores the rows that `sum_rows` adds, [C, C] bool, as its product needs them: bfloat16."""
    target[...] = jnp.where(chosen, 1.0, 0.0).astype(jnp.bfloat16)


def store_zeros(target: Any) -> None:
    """Stores zeros in place of the log decays [C, slots] of tokens that there are none of."""
    target[...] = plgpu.layout_cast(jnp.zeros(target.shape, jnp.float32), LOGITS)


def sum_rows(chosen: Callable[[], Any], parts: Parts, matmul: Matmul) -> jax.Array:
    """[C, slots]: for each row r, the sum of x over the rows j with chosen_rj.

    parts: where `store_parts` left x. chosen: [C, C] bfloat16, in registers or a reference.
    """
    return matmul(lambda: [(chosen(), parts(i)) for i in range(PARTS)], parts(0).shape)


def sum_rows_by_parts(
    chosen: jax.Array, x: jax.Array, parts: int, buffer: Callable[[], Any], matmul: Matmul
) -> jax.Array:
    """As `sum_rows`, of x in registers, with room for one part in shared memory.

    chosen: [C, C] bool. buffer: a reference to [C, slots] bfloat16, which the parts take in turn.
    """
    ones = jnp.where(chosen, 1.0, 0.0).astype(jnp.bfloat16)
    total: jax.Array | None = None
    for part in split_bfloat16(x, parts):
        plgpu.commit_smem()  # all have multiplied what lay there
        buffer()[...] = part
        plgpu.commit_smem()
        total = matmul(lambda: [(ones, buffer())], (CHUNK, x.shape[1]), total)
    assert total is not None
    return total
