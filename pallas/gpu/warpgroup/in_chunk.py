"""What happens inside a chunk, between its rows and its tokens: masks, decays and their products.

A gate block is 16 rows that share a reference, c_ref: c at their middle row. The decay from token
j to row r, s_j exp(c_r - c_j), is the product of the row's factor exp(c_r - c_ref), its row_decay,
and the token's factor s_j exp(c_ref - c_j), its token_decay. A row_decay spans 8 tokens, and so
does the part of a token_decay that grows: with the floor of `gates.py` neither exceeds 2^93,
however strong the decays are. Every block multiplies the whole chunk, with zeros for the rows of
the others: this layout has no products of fewer rows.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.gpu.spec import CHUNK, COLUMN, GATE_BLOCKS, GATE_ROWS, LOGITS, ROW, CallSpec
from pallas.gpu.warpgroup.chunk_index import ChunkIndex
from pallas.gpu.warpgroup.launch import Refs
from pallas.gpu.warpgroup.masks import by_column, by_row, iota
from pallas.gpu.warpgroup.matmul import Matmul, Operands

MAX_EXPONENT = 100.0  # of 2, in factors that a mask removes


class InChunk:
    """A warpgroup that works on a chunk; the slots lie in panels of up to 32.

    In `shared`: cumulative [panels, C, slots of a panel] and references [GATE_BLOCKS, M or more];
    with spec.masked query_segment and slot_access [C] and token_segment [stages, C].
    """

    def __init__(self, shared: Refs, index: ChunkIndex, matmul: Matmul, spec: CallSpec):
        self.shared, self.index, self.matmul, self.spec = shared, index, matmul, spec

    def _panels(self) -> tuple[int, int]:
        """How many there are, and the slots of each."""
        panels, _, width = self.shared["cumulative"].shape
        return panels, width

    def _token_decays(self, block: int, panel):
        """Where s_j exp(c_ref - c_j) lies, [C, slots of the panel] bfloat16."""
        raise NotImplementedError

    def _token_decay(self, block: int, panel, cumulative: jax.Array, write: jax.Array) -> jax.Array:
        """s_j exp(c_ref - c_j), of write = s."""
        exponent = jnp.minimum(
            self._reference(block, panel, cumulative.shape) - cumulative, MAX_EXPONENT
        )
        return (write * jnp.exp2(exponent)).astype(jnp.bfloat16)

    def _reference(self, block: int, panel, shape: tuple[int, ...]) -> jax.Array:
        slots = pl.ds(panel * shape[1], shape[1])
        reference = plgpu.load(self.shared["references"].at[block, slots], layout=COLUMN)
        return by_column(reference)

    def _from_start(self, panel) -> jax.Array:
        """exp(c_r), in the rows that read the slots at the chunk's start."""
        decay = jnp.exp2(plgpu.load(self.shared["cumulative"].at[panel], layout=LOGITS))
        if self.spec.masked:
            decay = jnp.where(self._slot_access(decay.shape) > 1, decay, 0.0)
        return decay

    def _row_decay(self, panel) -> jax.Array:
        """exp(c_r - c_ref), c_ref of the row's block."""
        cumulative = plgpu.load(self.shared["cumulative"].at[panel], layout=LOGITS)
        return jnp.exp2(cumulative - self._own_reference(panel, cumulative.shape))

    def _own_reference(self, panel, shape: tuple[int, ...]) -> jax.Array:
        """c_ref of the row's block."""
        return of_own_block(lambda block: self._reference(block, panel, shape), shape[1])

    def _to_slots(self, panel, scores: jax.Array, start: Operands) -> jax.Array:
        """[C, slots]: row_decay * spread(scores) + exp(c_r) * start, rows times the first slots."""
        shape = CHUNK, self.shared["cumulative"].shape[2]
        entered = self._spread(panel, scores, shape[1]) * self._row_decay(panel)
        return entered + self.matmul(start, shape) * self._from_start(panel)

    def _spread(
        self, panel, scores: jax.Array, width: int, start: jax.Array | None = None
    ) -> jax.Array:
        """[C, C] -> [C, slots]: sum_j scores_rj s_j exp(c_ref - c_j), c_ref of the row's block."""

        def operands():
            for block in range(GATE_BLOCKS):
                rows = jnp.where(gate_block(CHUNK) == block, scores, 0.0).astype(jnp.bfloat16)
                yield rows, self._token_decays(block, panel)

        return self.matmul(lambda: list(operands()), (CHUNK, width), start)

    def _gather(self, panel, p: jax.Array, start: jax.Array | None) -> jax.Array:
        """[C, slots] -> [C, C]: sum_m p_rm s_jm exp(c_ref - c_j), finite or inf for j > r."""

        def operands():
            for block in range(GATE_BLOCKS):
                rows = jnp.where(gate_block(p.shape[1]) == block, p, 0.0).astype(jnp.bfloat16)
                yield rows, self._token_decays(block, panel).T

        return self.matmul(lambda: list(operands()), (CHUNK, CHUNK), start)

    def _hide(self, panel, logits: jax.Array) -> jax.Array:
        """-inf where there is no slot, or the row reads none."""
        spec, (panels, width) = self.spec, self._panels()
        if spec.slots < panels * width:
            logits = jnp.where(iota(width, 1) < spec.slots - panel * width, logits, -jnp.inf)
        if spec.masked:
            logits = jnp.where(self._slot_access(logits.shape) > 0, logits, -jnp.inf)
        return logits

    def _entered(self) -> jax.Array:
        """[C, C], the first block's tokens that are in the row's slots."""
        index = self.index
        entered = iota(CHUNK, 1) + index.first_token <= iota(CHUNK, 0) + index.first_row
        return entered & self._same_segment(0) if self.spec.masked else entered

    def _same_segment(self, stage) -> jax.Array:
        """[C, C], of a row and a token; a padding row is of none, nor is a token that is none."""
        query_segment = plgpu.load(self.shared["query_segment"], layout=ROW)
        token_segment = plgpu.load(self.shared["token_segment"].at[stage], layout=COLUMN)
        return by_row(query_segment, CHUNK) == by_column(token_segment)

    def _slot_access(self, shape: tuple[int, ...]) -> jax.Array:
        slot_access = plgpu.load(self.shared["slot_access"], layout=ROW)
        return by_row(slot_access, shape[1])


def of_own_block(of_block: Callable[[int], jax.Array], columns: int) -> jax.Array:
    """[C, columns], in a row what is of its block."""
    own = of_block(GATE_BLOCKS - 1)
    for block in reversed(range(GATE_BLOCKS - 1)):
        own = jnp.where(gate_block(columns) == block, of_block(block), own)
    return own


def gate_block(columns: int) -> jax.Array:
    """[C, columns], which block of gates a row is in."""
    return lax.shift_right_logical(iota(columns, 0), jnp.int32(GATE_ROWS.bit_length() - 1))
