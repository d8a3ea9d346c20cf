"""Which rows, tokens and heads a thread block works on, and where they lie in the arrays."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas.gpu.spec import CHUNK, CallSpec


def entering_rows(first_row: int | jax.Array, ahead: int):
    """The slice of the arrays of tokens with the tokens that enter the slots in a chunk.

    first_row: of the chunk, among the query rows. The `ahead` token rows before the arrays' first
    hold nothing (see `CallSpec`): a chunk that would read them reads the first rows instead, and
    the kernels mask or replace what they have read.
    """
    return pl.ds(jnp.maximum(first_row - ahead, 0), CHUNK)


class ChunkIndex:
    """A chunk's rows of some query heads of one KV head: what most kernels give a thread block.

    The grid's axes are "batch", "heads", by `warpgroups` query heads, and "chunk".

    Attributes:
      batch, chunk, kv_head: indices.
      heads: the first of the query heads.
      first_row: of the chunk, among the query rows.
      rows: the chunk's rows.
      positions: theirs in tables of rotation.
      first_token: the timeline's row of the first block of tokens that the chunk reads.
      blocks: how many blocks of C tokens it reads.
    """

    def __init__(self, spec: CallSpec, warpgroups: int = 1):
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
        """The rows of a block of tokens in the arrays; see `entering_rows`."""
        return entering_rows(self.first_token + block * CHUNK, self._ahead)


class EnteringIndex:
    """The tokens that enter some slots of one KV head in a chunk.

    The grid's axes are "batch", "chunk" and "panel": the KV heads' panels of slots, in turn.

    Attributes:
      batch, chunk, head, panel: indices; head of keys and values, panel of the head's slots.
      slots: the panel's slice of the slots.
      first_row: of the chunk, among the query rows.
      rows: the chunk's rows.
      read: where the tokens lie in the arrays of tokens; see `entering_rows`.
      written: where their gradients go. What is of no token goes where the last tokens' would,
        which never enter.
    """

    def __init__(self, spec: CallSpec, panels: int, width: int, rows: int):
        """panels: of a head's slots, width slots each. rows: of queries, in all."""
        self.batch, self.chunk = lax.axis_index("batch"), lax.axis_index("chunk")
        self.panel = lax.rem(lax.axis_index("panel"), jnp.int32(panels))
        self.head = lax.div(lax.axis_index("panel"), jnp.int32(panels))
        self.slots = pl.ds(self.panel * width, width)
        self.first_row = self.chunk * CHUNK
        self.rows = pl.ds(self.first_row, CHUNK)
        self.read = entering_rows(self.first_row, spec.ahead)
        first = self.first_row - spec.ahead
        self.written = pl.ds(first + jnp.where(first < 0, rows, 0), CHUNK)


class TokenIndex:
    """A block of C tokens of one KV head, and the chunks of rows that see some of them.

    The grid's axes are "batch", "head", of keys and values, and "block".

    Attributes:
      batch, head: indices.
      tokens: the block's rows in the arrays, and in tables of rotation.
      first_token: the first of them on the timeline.
      items: how many pairs of a query head and a chunk there are.
    """

    def __init__(self, spec: CallSpec, chunks: int):
        """chunks: of query rows, in all."""
        self.batch, self.head, block = (lax.axis_index(x) for x in ("batch", "head", "block"))
        self.tokens = pl.ds(block * CHUNK, CHUNK)
        self.first_token = block * CHUNK + spec.ahead
        block += spec.ahead // CHUNK
        if spec.blocks is None:
            first, last = block - (spec.offset + CHUNK - 1) // CHUNK, jnp.int32(chunks - 1)
        else:
            first, last = block - (spec.blocks - 1), jnp.minimum(block, chunks - 1)
        self._first = jnp.maximum(first, 0)
        self._chunks = jnp.maximum(last - self._first + 1, 0)
        self._group = spec.group
        self._before = spec.offset - spec.ahead
        self.items = self._chunks * spec.group

    def head_and_chunk(self, item: jax.Array) -> tuple[jax.Array, jax.Array]:
        """An item's query head and chunk; a query head's chunks come one after the other."""
        head = self.head * self._group + lax.div(item, self._chunks)
        return head, self._first + lax.rem(item, self._chunks)

    def positions(self, item: jax.Array):
        """The rows of an item's queries in tables of rotation."""
        _, chunk = self.head_and_chunk(item)
        return pl.ds(chunk * CHUNK + self._before, CHUNK)
