"""What the two warpgroups of `slot_token_gradients.py`, which has the formulas, have in common.

X^T and L^T are computed, with tokens for rows: the 16 rows of a gate block are then columns, and
its products have 16 columns or contract 16, not the whole chunk with zeros. A contraction may be
as short as a tile of shared memory is wide, so all operands lie 16 columns to a tile.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.gpu.spec import CHUNK, GATE_BLOCKS, GATE_ROWS, LOGITS, CallSpec
from pallas.gpu.warpgroup.addresses import OpaqueZero
from pallas.gpu.warpgroup.chunk_index import EnteringIndex
from pallas.gpu.warpgroup.decays import token_decay, write_of_odds
from pallas.gpu.warpgroup.masks import block_entered, same_segment
from pallas.gpu.warpgroup.matmul import Matmul

SIDES = ("key", "value")


class Worker:
    """A warpgroup at some slots of a chunk and KV head.

    Items come and go in stages: of each side the rows of its heads, then, if it has been `added`,
    what its gradient is added to.
    """

    TOKEN_DECAY_BLOCKS: tuple[int, ...]  # the gate blocks whose token_decays it builds

    def __init__(
        self, refs: dict, shared: dict, spec: CallSpec, matmul: Matmul, added: tuple[bool, ...]
    ):
        self.refs, self.shared, self.spec, self.matmul = refs, shared, spec, matmul
        self.added = added
        self.stages, _, self.D = shared["rows"].shape
        self.width = shared["row_weights"].shape[2]
        panels = refs["cumulative"].shape[3] // self.width
        rows = refs["d_log_decay"].shape[1]
        self.index = EnteringIndex(spec, panels, self.width, rows)
        self.gates_shape = CHUNK, self.width
        self.zero = OpaqueZero(shared["zero"])

    def operand(self, name: str):
        """An array of products' operands, of which there is one."""
        return self.shared[name].at[self.zero.value]

    def reference(self, block):
        return self.shared["references"].at[block, pl.ds(0, self.width)]

    def build_token_decays(self) -> None:
        shared = self.shared
        plgpu.barrier_wait(shared["gates_loaded"])
        cumulative = plgpu.load(shared["cumulative"], layout=LOGITS)
        write = write_of_odds(self.wide(shared["odds"]))
        for block in self.TOKEN_DECAY_BLOCKS:
            decay = token_decay(write, cumulative, self.reference(block))
            shared["token_decays"].at[self.zero.value + block][...] = decay
        plgpu.commit_smem()
        plgpu.barrier_arrive(shared["token_decays_ready"])
        plgpu.barrier_wait(shared["token_decays_ready"])

    def first_item(self, side: int) -> int:
        return side * self.spec.group + sum(self.added[:side])

    def over_heads(self, side: int, head: Callable, start: jax.Array) -> jax.Array:
        """start, as head(item, start) changes it; right after `zero.renew`.

        A loop even over one head, which would else be laid out among what surrounds it.
        """
        group, first = self.spec.group, self.first_item(side)
        begin = 0 if group > 1 else self.zero.value
        return lax.fori_loop(begin, group, lambda i, x: head(first + i, x), start)

    def wait_for(self, item):
        """An item's stage."""
        stage = lax.rem(jnp.int32(item), jnp.int32(self.stages))
        plgpu.barrier_wait(self.shared["item_loaded"].at[stage])
        return stage + self.zero.renew()

    def leave(self, stage) -> None:
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.shared["item_read"].at[stage])

    def entered(self, block: int, *, turned: bool) -> jax.Array:
        """[C, 16], which of a gate block's tokens are in a row's slots.

        turned: of tokens and a gate block's rows.
        """
        mask = block_entered(block, tokens_down=turned)
        if self.spec.masked:
            rows, columns = (self.shared[x] for x in ("query_segment", "token_segment"))
            if turned:
                rows, columns = columns, rows
            mask &= same_segment(rows, columns.at[pl.ds(block * GATE_ROWS, GATE_ROWS)])
        return mask

    def masked_blocks(self, scores: jax.Array, *, turned: bool) -> list[jax.Array]:
        """[C, C] in four of [C, 16] bfloat16, zeros where nothing entered."""
        blocks = []
        for block in range(GATE_BLOCKS):
            first = block * GATE_ROWS
            columns = lax.slice(scores, (0, first), (CHUNK, first + GATE_ROWS))
            columns = jnp.where(self.entered(block, turned=turned), columns, 0.0)
            blocks.append(columns.astype(jnp.bfloat16))
        return blocks

    def wide(self, ref) -> jax.Array:
        return plgpu.load(ref, layout=LOGITS).astype(jnp.float32)
