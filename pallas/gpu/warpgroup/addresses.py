"""Addresses that the compiler does not keep.

LLVM computes the addresses of all operands of a kernel's products once, and keeps each in a
register that others need. Indexed by a 0 that is read from shared memory, which no compiler knows,
an operand has its address computed where it is used.
"""

from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

NUMBERS = 128  # a warpgroup's threads store one each; element 0 is read

ZERO = plgpu.SMEM((NUMBERS,), jnp.int32)


def store_zero(zero: Any) -> None:
    """zero: a reference to what `ZERO` describes."""
    layout = plgpu.Layout.WG_STRIDED((NUMBERS,), 1)
    zero[...] = plgpu.layout_cast(jnp.zeros(NUMBERS, jnp.int32), layout)
