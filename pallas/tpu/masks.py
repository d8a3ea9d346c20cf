"""Which columns of cat a chunk's rows read, of the slots and of the window."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas.tpu.arithmetic import MASKED
from pallas.tpu.segments import Facts
from pallas.tpu.spec import Spec


class Masks:
    """Of chunk n of grid step `step`.

    Attributes:
      slots: bool [C, width], the columns that a row finds in its slots.
      causal: [C, columns], of `slots`.
      window: [C, width], those that it reads itself.
    """

    def __init__(self, spec: Spec, facts: Facts | None, n: int, step: jax.Array):
        self.spec, self.facts = spec, facts
        self.first = step * spec.rows + n * spec.chunk  # the chunk's first row in the sequence
        self.may_be_first = spec.wide or n * spec.chunk < spec.halo
        shape = (spec.chunk, spec.width)
        row, column = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        self.slots = column <= row + spec.shift
        self.window = ~self.slots
        if not spec.wide:
            self.window &= column <= row + spec.reach
        if facts is not None:
            same = facts.same()
            self.slots &= same
            self.window &= same
        self.causal = self.slots[:, : spec.columns]
        if facts is None and self.may_be_first:  # without the columns before the sequence
            self.window &= column >= (spec.window if spec.wide else spec.halo) - self.first

    def slot_logits(self, a: jax.Array) -> jax.Array:
        """a [G, C, M] without the slots that are padding, or still empty if those are masked."""
        if self.spec.slots < a.shape[-1]:
            a = jnp.where(lax.broadcasted_iota(jnp.int32, a.shape, 2) < self.spec.slots, a, MASKED)
        if not self.spec.mask_empty:
            return a
        if self.facts is not None:
            return jnp.where(self.facts.enters[:, : a.shape[2]], a, MASKED)
        if not self.may_be_first:
            return a
        row = lax.broadcasted_iota(jnp.int32, (self.spec.chunk, 1), 0)
        return jnp.where(row >= self.spec.window - self.first, a, MASKED)
