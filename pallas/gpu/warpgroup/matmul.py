"""Matrix products of a warpgroup."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

Operands = Callable[[], Sequence[tuple[Any, Any]]]


class Matmul:
    """Computes start + the sum of a @ b over pairs of operands, in float32.

    b is a reference to shared memory, a is one or an array in registers, both bfloat16. The
    operands are made by a function, because references must be indexed where they are used. The
    call returns when all of its products are done.
    """

    def __init__(self, interpret: bool, buffer: Any = None):
        """Prepares for the GPU, or with `interpret` for the interpreter.

        buffer: with `interpret`, [C, 64] bfloat16 of shared memory of the warpgroup's own, through
          which an a in registers passes: the interpreter multiplies what lies in shared memory.
        """
        self.interpret, self.buffer = interpret, buffer

    def __call__(
        self, operands: Operands, shape: tuple[int, int], start: jax.Array | None = None
    ) -> jax.Array:
        if self.interpret:
            return self._interpreted(operands, shape, start)

        def accumulate(acc):
            for a, b in operands():
                plgpu.wgmma(acc, a, b)

        def product(acc):
            accumulate(acc)
            return acc[...]

        if start is None:
            return pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))
        return pl.run_state(accumulate)(plgpu.ACC.init(start))

    def _interpreted(
        self, operands: Operands, shape: tuple[int, int], start: jax.Array | None
    ) -> jax.Array:
        total = jnp.zeros(shape, jnp.float32) if start is None else start
        for a, b in operands():
            if isinstance(a, jax.Array):
                buffer = self.buffer.at[:, pl.ds(0, a.shape[1])]
                buffer[...] = a
                plgpu.commit_smem()
                a = buffer

            def product(acc, a=a, b=b):
                plgpu.wgmma(acc, a, b)
                return acc[...]

            total += pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))
        return total
