"""What a thread block of the output pass works on."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas.gpu.spec import CHUNK, CallSpec


class ChunkIndex:
    """A chunk's rows of some query heads of one KV head.

    Attributes:
      batch, chunk, kv_head: indices.
      heads: the first of the query heads.
      first_row: of the chunk, among the query rows.
      rows: the chunk's rows.
      positions: theirs in tables of rotation.
      first_token: the timeline's row of the first block of tokens that the chunk reads.
      blocks: how many blocks of C tokens it reads.
    """

    def __init__(self, spec: CallSpec, warpgroups: int):
        self.batch, group, self.chunk = (lax.axis_index(x) for x in ("batch", "heads", "chunk"))
        self.heads = group * warpgroups
        self.kv_head = lax.div(self.heads, jnp.int32(spec.group))
        self.first_row = self.chunk * CHUNK
        self.rows = pl.ds(self.first_row, CHUNK)
        self.positions = pl.ds(self.first_row + spec.offset - spec.ahead, CHUNK)
        self._ahead = spec.ahead
        self.blocks: int | jax.Array
        if spec.blocks is None:
            self.first_token = jnp.int32(0)
            last = self.first_row + CHUNK - 1 + spec.offset
            self.blocks = lax.div(last, jnp.int32(CHUNK)) + 1
        else:
            self.first_token = self.first_row
            self.blocks = spec.blocks

    def token_rows(self, block: int | jax.Array):
        """Those of a block of tokens in the arrays; what lies ahead of them is masked later."""
        first = self.first_token + block * CHUNK - self._ahead
        return pl.ds(jnp.maximum(first, 0), CHUNK)
