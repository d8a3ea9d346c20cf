"""The warpgroups of `slot_token_gradients.py`, whose docstring has the formulas and the barriers.

L and A are computed with tokens down: the 16 rows of a gate block are then columns, and its
products have 16 columns or contract 16, not the whole chunk with zeros for the other rows.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.gpu.backward.slot_token_memory import SlotTokenMemory
from pallas.gpu.spec import CHUNK, COLUMN, GATE_BLOCKS, GATE_ROWS, LOGITS, SIDES, CallSpec
from pallas.gpu.warpgroup.decays import (
    FLOOR,
    gate_block,
    own_reference,
    start_decay,
    token_decay,
    write_of_odds,
)
from pallas.gpu.warpgroup.masks import block_entered, by_column, iota, same_segment
from pallas.gpu.warpgroup.matmul import Matmul
from pallas.gpu.warpgroup.row_sums import store_zeros, sum_rows_by_parts

# The odds of a log decay at the floor. With less, c holds the floor and not the decay, so that
# nothing inside the chunk depends on it.
FLOOR_ODDS = 1 / math.expm1(-FLOOR)


class TokenWarpgroup:
    """Fetches what both warpgroups read, and finds dx of both sides.

    It also leaves S0 . dS and to_end E, summed over the sides, for the other warpgroup.
    """

    def __init__(self, memory: SlotTokenMemory, matmul: Matmul, spec: CallSpec):
        self.memory, self.matmul, self.spec = memory, matmul, spec
        self.shared = memory.shared

    def run(self) -> None:
        memory = self.memory
        memory.fetch_gates()
        memory.fetch_states(0)
        memory.fetch_tokens(0)
        for item in range(memory.stages):
            memory.fetch_item(jnp.int32(item), item)
        memory.zero.store()
        _build_token_decays(memory, blocks=(0, 1))
        for side in range(len(SIDES)):
            self._find_side(side)
        plgpu.wait_smem_to_gmem(0)

    def _find_side(self, side: int) -> None:
        """Finds dx of a side, which goes out through the place of x, and fetches the next side."""
        memory, shared, index = self.memory, self.shared, self.memory.index
        plgpu.barrier_wait(shared["side_loaded"])
        memory.zero.renew()
        self._sum_to_end(side)
        grad = self.matmul(
            lambda: [(memory.operand("to_end"), memory.operand("d_slots").T)], (CHUNK, memory.D)
        )
        grad = _over_heads(memory, side, self._add_head, grad)
        if self.spec.ahead:  # nothing ahead of the tokens has a gradient
            is_token = iota(memory.D, 0) + index.first_row >= self.spec.ahead
            grad = jnp.where(is_token, grad, 0.0)
        if memory.added[side]:
            grad = self._add_window(memory.window_item(side), grad)
        plgpu.barrier_wait(shared["side_read"])
        memory.zero.renew()
        more = side + 1 < len(SIDES)
        if more:
            memory.fetch_states(side + 1)
        memory.operand("tokens")[...] = grad.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(memory.operand("tokens"), memory.d_tokens(side))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if more:
            memory.fetch_tokens(side + 1)

    def _sum_to_end(self, side: int) -> None:
        """Adds a side to S0 . dS and to to_end E, which overwrites c; after both, tells the other.

        This sums across warps; the other warpgroup never does, see `launch`.
        """
        memory, shared = self.memory, self.shared
        gates_shape = CHUNK, memory.width

        def add_features(block, products):
            where = memory.zero.value, pl.ds(block * CHUNK, CHUNK)
            slots, d_slots = (_wide(shared[x].at[where]) for x in ("slots", "d_slots"))
            return products + slots * d_slots

        products = plgpu.layout_cast(jnp.zeros(gates_shape, jnp.float32), LOGITS)
        products = lax.fori_loop(0, memory.D // CHUNK, add_features, products)
        d_total = products.sum(axis=0)
        to_end = self.matmul(
            lambda: [(memory.operand("tokens"), memory.operand("d_slots"))], gates_shape
        )
        to_end *= _wide(memory.operand("to_end"))
        if side:
            d_total += plgpu.load(shared["d_total"], layout=COLUMN)
            to_end += plgpu.load(shared["cumulative"], layout=LOGITS)
        shared["d_total"][...] = d_total
        shared["cumulative"][...] = to_end
        if side:
            plgpu.commit_smem()
            plgpu.barrier_arrive(shared["ends_ready"])

    def _add_head(self, item, grad: jax.Array) -> jax.Array:
        """Returns dx with one more head."""
        stage = self.memory.wait_for_item(item)
        for block in range(GATE_BLOCKS):
            grad = self._add_gate_block(block, stage, grad)
        self._leave(item, stage)
        return grad

    def _add_gate_block(self, block: int, stage, grad: jax.Array) -> jax.Array:
        """Returns dx with a head's rows of one more gate block."""
        memory, rows = self.memory, pl.ds(block * GATE_ROWS, GATE_ROWS)
        ys, ws = self.shared["rows"], self.shared["row_weights"]
        L = self.matmul(
            lambda: [(memory.token_decays(block), ws.at[stage, rows].T)], (CHUNK, GATE_ROWS)
        )
        L = jnp.where(_entered(memory, block, tokens_down=True), L, 0.0).astype(jnp.bfloat16)
        return self.matmul(lambda: [(L, ys.at[stage, rows])], (CHUNK, memory.D), grad)

    def _add_window(self, item, grad: jax.Array) -> jax.Array:
        """Returns dx with the window's gradient.

        It is added as a product with the unit matrix, which takes no registers for it.
        """
        memory, shared = self.memory, self.shared
        stage = memory.wait_for_item(item)
        one = jnp.where(iota(CHUNK, 0) == iota(CHUNK, 1), 1.0, 0.0).astype(jnp.bfloat16)
        grad = self.matmul(lambda: [(one, shared["rows"].at[stage])], (CHUNK, memory.D), grad)
        self._leave(item, stage)
        return grad

    def _leave(self, item, stage) -> None:
        self.memory.leave_item(stage)
        self.memory.fetch_next_item(item, stage)


class DecayWarpgroup:
    """Finds dg.

    row_sum is summed in shared memory, token_sum in registers, which have no room for both.
    """

    def __init__(self, memory: SlotTokenMemory, matmul: Matmul, spec: CallSpec):
        self.memory, self.matmul, self.spec = memory, matmul, spec
        self.shared = memory.shared
        self.gates_shape = CHUNK, memory.width

    def run(self) -> None:
        memory, shared = self.memory, self.shared
        _build_token_decays(memory, blocks=(2, 3))
        token_sums = plgpu.layout_cast(jnp.zeros(self.gates_shape, jnp.float32), LOGITS)
        shared["row_sums"][...] = token_sums
        for side in range(len(SIDES)):
            plgpu.barrier_wait(shared["side_loaded"])
            memory.zero.renew()
            token_sums = _over_heads(memory, side, self._add_head, token_sums)
            if memory.added[side]:  # nothing of it is read here, but both say that they have
                memory.leave_item(memory.wait_for_item(memory.window_item(side)))
            plgpu.commit_smem()
            plgpu.barrier_arrive(shared["side_read"])
        self._store(token_sums)

    def _add_head(self, item, token_sums: jax.Array) -> jax.Array:
        """Returns token_sum with one more head, and adds the head to row_sum where that lies."""
        stage = self.memory.wait_for_item(item)
        self._add_row_sums(stage)
        token_sums = self._add_token_sums(stage, token_sums)
        self.memory.leave_item(stage)
        return token_sums

    def _add_row_sums(self, stage) -> None:
        """Adds a head to row_sum.

        A gate block's rows are those of a warp, so that each warp needs one of the four products.
        """
        memory, shared = self.memory, self.shared
        scores = self.matmul(
            lambda: [(shared["rows"].at[stage], memory.operand("tokens").T)], (CHUNK, CHUNK)
        )
        blocks = self._masked_blocks(scores, tokens_down=False)

        def operands():
            for block in range(GATE_BLOCKS):
                mine = gate_block(GATE_ROWS) == block
                for tokens in range(block + 1):
                    rows = jnp.where(mine, blocks[tokens], jnp.bfloat16(0))
                    of_tokens = pl.ds(tokens * GATE_ROWS, GATE_ROWS)
                    yield rows, memory.token_decays(block, of_tokens)

        spread = self.matmul(lambda: list(operands()), self.gates_shape)
        spread *= _wide(shared["row_weights"].at[stage])
        shared["row_sums"][...] = self._load("row_sums") + spread
        of_start = self.matmul(
            lambda: [(shared["rows"].at[stage], memory.operand("slots"))], self.gates_shape
        )
        of_start *= self._start_decay() * _wide(shared["row_weights"].at[stage])
        shared["row_sums"][...] = self._load("row_sums") + of_start

    def _start_decay(self) -> jax.Array:
        """exp(c_ref) with the row's own c_ref, 0 in rows that do not read S0."""
        memory = self.memory
        reference = own_reference(lambda x: memory.references(memory.zero.value + x), memory.width)
        return start_decay(reference, self.shared.get("slot_access"))

    def _add_token_sums(self, stage, token_sums: jax.Array) -> jax.Array:
        """Returns token_sum with one more head."""
        memory, shared = self.memory, self.shared
        scores = self.matmul(
            lambda: [(memory.operand("tokens"), shared["rows"].at[stage].T)], (CHUNK, CHUNK)
        )
        for block, columns in enumerate(self._masked_blocks(scores, tokens_down=True)):
            token_sums += self._token_sums_of(block, stage, columns)
        return token_sums

    def _token_sums_of(self, block: int, stage, scores: jax.Array) -> jax.Array:
        """The part of a head's token_sum that a gate block's rows make up.

        scores: A, [tokens, 16 rows] bfloat16.
        """
        rows, ws = pl.ds(block * GATE_ROWS, GATE_ROWS), self.shared["row_weights"]
        sums = self.matmul(lambda: [(scores, ws.at[stage, rows])], self.gates_shape)
        return sums * _wide(self.memory.token_decays(block))

    def _masked_blocks(self, scores: jax.Array, *, tokens_down: bool) -> list[jax.Array]:
        """scores [C, C] in four blocks [C, 16] bfloat16, 0 for tokens not in a row's slots."""
        blocks = []
        for block in range(GATE_BLOCKS):
            first = block * GATE_ROWS
            columns = lax.slice(scores, (0, first), (CHUNK, first + GATE_ROWS))
            mask = _entered(self.memory, block, tokens_down=tokens_down)
            blocks.append(jnp.where(mask, columns, 0.0).astype(jnp.bfloat16))
        return blocks

    def _store(self, token_sums: jax.Array) -> None:
        """Writes dg, whose sums take the places of row_sum and of to_end E: registers are short."""
        memory, shared, index = self.memory, self.shared, self.memory.index
        odds = lambda: _wide(shared["odds"])  # noqa: E731
        memory.zero.renew()
        plgpu.barrier_wait(shared["ends_ready"])  # and the other needs no more of the slots
        shared["row_sums"][...] = self._load("row_sums") - token_sums
        d_total = plgpu.load(shared["d_total"], layout=COLUMN)
        d_total *= plgpu.load(shared["total"], layout=COLUMN)
        to_end = self._load("cumulative")
        inside = jnp.where(odds() > FLOOR_ODDS, token_sums, 0.0)
        shared["cumulative"][...] = by_column(d_total) - odds() * (inside + to_end)
        earlier = self._sum_rows(to_end, parts=2, earlier=True)
        shared["cumulative"][...] = self._load("cumulative") + earlier
        later = self._sum_rows(self._load("row_sums"), parts=3, earlier=False)
        inside = jnp.where(odds() > FLOOR_ODDS, later + self._load("row_sums"), 0.0)
        shared["cumulative"][...] = self._load("cumulative") + inside
        pl.when(index.first_row < self.spec.ahead)(lambda: store_zeros(shared["cumulative"]))
        plgpu.commit_smem()
        where = index.batch, index.written, index.head, index.slots
        plgpu.copy_smem_to_gmem(shared["cumulative"], memory.refs["d_log_decay"].at[*where])
        plgpu.wait_smem_to_gmem(0)

    def _load(self, name: str) -> jax.Array:
        return plgpu.load(self.shared[name], layout=LOGITS)

    def _sum_rows(self, x: jax.Array, *, parts: int, earlier: bool) -> jax.Array:
        """[C, slots]: for each row the sum of x over the earlier rows, or over the later.

        parts: as for `sum_rows_by_parts`; they lie in the place of S0.
        """
        row, other = iota(CHUNK, 0), iota(CHUNK, 1)
        place = self.memory.zero.value, pl.ds(0, CHUNK)
        return sum_rows_by_parts(
            other < row if earlier else other > row,
            x,
            parts,
            lambda: self.shared["slots"].at[place],
            self.matmul,
        )


def _build_token_decays(memory: SlotTokenMemory, blocks: tuple[int, ...]) -> None:
    """Builds the token decays of some gate blocks, and waits for the other warpgroup's."""
    shared = memory.shared
    plgpu.barrier_wait(shared["gates_loaded"])
    cumulative = plgpu.load(shared["cumulative"], layout=LOGITS)
    write = write_of_odds(_wide(shared["odds"]))
    for block in blocks:
        decay = token_decay(write, cumulative, memory.references(block))
        memory.token_decays(block)[...] = decay
    plgpu.commit_smem()
    plgpu.barrier_arrive(shared["token_decays_ready"])
    plgpu.barrier_wait(shared["token_decays_ready"])


def _over_heads(
    memory: SlotTokenMemory,
    side: int,
    add_head: Callable[[jax.Array, jax.Array], jax.Array],
    start: jax.Array,
) -> jax.Array:
    """Returns what add_head(item, sum) makes of start, head after head; after a `zero.renew`.

    It is a loop even for one head: else its operations would be scheduled among those around it.
    """
    first = memory.first_item(side)
    begin = 0 if memory.group > 1 else memory.zero.value
    return lax.fori_loop(begin, memory.group, lambda i, x: add_head(first + i, x), start)


def _entered(memory: SlotTokenMemory, block: int, *, tokens_down: bool) -> jax.Array:
    """[C, 16], whether a token is in the slots that a row reads.

    The 16 columns are a gate block's tokens, and the rows the chunk's; with tokens_down the columns
    are a gate block's rows, and the rows the chunk's tokens.
    """
    mask, shared = block_entered(block, tokens_down=tokens_down), memory.shared
    if "query_segment" in shared:
        down, across = shared["query_segment"], shared["token_segment"]
        if tokens_down:
            down, across = across, down
        mask &= same_segment(down, across.at[pl.ds(block * GATE_ROWS, GATE_ROWS)])
    return mask


def _wide(ref) -> jax.Array:
    return plgpu.load(ref, layout=LOGITS).astype(jnp.float32)
