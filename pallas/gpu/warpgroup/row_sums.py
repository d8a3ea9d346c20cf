"""Sums of a chunk's log decays over its rows, inside a kernel.

Mosaic GPU has no cumulative sum; a product with zeros and ones is one. The tensor cores multiply
bfloat16, so float32 is split in three parts, which hold all of its bits.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.gpu.spec import LOGITS
from pallas.gpu.warpgroup.matmul import Matmul

PARTS = 3
Parts = Callable[[int], Any]
"""References of [C, slots] bfloat16 in shared memory, of the parts 0, 1 and 2."""


def store_parts(x: jax.Array, parts: Parts) -> None:
    """x [C, slots] float32, finite, is the sum of its parts; `commit_smem` is the caller's."""
    for i in range(PARTS):
        part = x.astype(jnp.bfloat16)
        parts(i)[...] = part
        x = x - part.astype(jnp.float32)


def store_chosen(chosen: jax.Array, place: Any) -> None:
    """The rows that `sum_rows` adds, [C, C] bool, as the product needs them: place is bfloat16."""
    place[...] = jnp.where(chosen, 1.0, 0.0).astype(jnp.bfloat16)


def store_zeros(place: Any) -> None:
    """In the place of log decays [C, slots] that no token has."""
    place[...] = plgpu.layout_cast(jnp.zeros(place.shape, jnp.float32), LOGITS)


def sum_rows(chosen: Callable[[], Any], parts: Parts, matmul: Matmul) -> jax.Array:
    """For each row r, the sum of x over the rows j with chosen_rj."""
    return matmul(lambda: [(chosen(), parts(i)) for i in range(PARTS)], parts(0).shape)


def write_of(log_decay: jax.Array) -> jax.Array:
    """s = 1 - exp(log_decay), float32, without loss near 0: there is no expm1."""
    x = log_decay
    series = -x * (1 + x * (1 / 2 + x * (1 / 6 + x / 24)))  # to 2e-6 of s
    return jnp.where(x > -1 / 8, series, 1 - jnp.exp(x))
