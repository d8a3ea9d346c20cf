"""Which of the chunk's tokens its rows read, through the slots and in the window."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas.constants import MASKED_LOGIT
from pallas.tpu.segments import Segments
from pallas.tpu.spec import CallSpec


class Masks:
    """The masks of one chunk, of the chunk's tokens in columns.

    Attributes:
      slots: bool [C, chunk_tokens], the tokens that a row finds in its slots.
      entering: bool [C, entering_tokens], the same, of the tokens that may be in the slots.
      window: bool [C, chunk_tokens], the tokens that a row reads itself.
    """

    def __init__(self, spec: CallSpec, segments: Segments | None, n: int, step: jax.Array):
        """Makes the masks of chunk n of grid step `step`."""
        self._spec, self._segments = spec, segments
        self._first_row = step * spec.step_rows + n * spec.chunk  # of the call
        # Whether the chunk may read tokens from before the call's first.
        self._may_be_first = spec.wide_window or n * spec.chunk < spec.halo
        shape = (spec.chunk, spec.chunk_tokens)
        row, token = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        self.slots = token <= row + spec.halo_padding
        self.window = ~self.slots
        if not spec.wide_window:
            self.window &= token <= row + spec.halo
        if segments is not None:
            visible = segments.row_sees_token()
            self.slots &= visible
            self.window &= visible
        self.entering = self.slots[:, : spec.entering_tokens]
        if segments is None and self._may_be_first:
            tokens_before = (spec.window if spec.wide_window else spec.halo) - self._first_row
            self.window &= token >= tokens_before

    def slot_logits(self, a: jax.Array) -> jax.Array:
        """Masks, in a [G, C, M], the slots that are padding and, if so asked, the empty ones."""
        spec = self._spec
        if spec.slots < a.shape[-1]:
            slot = lax.broadcasted_iota(jnp.int32, a.shape, 2)
            a = jnp.where(slot < spec.slots, a, MASKED_LOGIT)
        if not spec.mask_empty:
            return a
        if self._segments is not None:
            return jnp.where(self._segments.slots_filled[:, : a.shape[2]], a, MASKED_LOGIT)
        if not self._may_be_first:
            return a
        row = lax.broadcasted_iota(jnp.int32, (spec.chunk, 1), 0)
        return jnp.where(row >= spec.window - self._first_row, a, MASKED_LOGIT)
