"""A zero that no compiler knows, so that addresses are computed where they are used.

LLVM computes the addresses of all operands of a kernel's products once, and keeps each in a
register that others need. Indexed by a 0 that is read from shared memory, an operand has its
address computed where it is used. So has a stage or block, with that 0 added to its number.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

NUMBERS = 128  # a warpgroup's threads store one each; element 0 is read

ZERO = plgpu.SMEM((NUMBERS,), jnp.int32)


class OpaqueZero:
    """The zero of a warpgroup, or of warpgroups that synchronise after one has stored it.

    Attributes:
      value: what was read last, an int32 scalar; 0 before the first `renew`. It holds inside the
        loop or branch in which it was read.
    """

    def __init__(self, ref: Any):
        """ref: a reference to what `ZERO` describes."""
        self._ref = ref
        self.value: int | jax.Array = 0

    def store(self) -> None:
        layout = plgpu.Layout.WG_STRIDED((NUMBERS,), 1)
        self._ref[...] = plgpu.layout_cast(jnp.zeros(NUMBERS, jnp.int32), layout)

    def renew(self) -> int | jax.Array:
        """Reads the zero again: addresses that use it from now on are computed anew."""
        self.value = self._ref[0]
        return self.value
