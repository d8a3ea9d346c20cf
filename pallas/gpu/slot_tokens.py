"""The gradients of the tokens that enter the slots, and of their decays.

With symbols as in `spec.py` and `in_chunk.py`, f_j the token's fall, x and y its key and value, S0
the slots at the chunk's start, dS the gradient of those at its end, wS = s_j exp(G_C - G_j), and of
a query head the rows' ds' = ds rise and p' = p rise (`slot_queries`):

    L_rj = sum_m ds'_rm f_jm,  A_rj = sum_m p'_rm f_jm       j <= r, f by the row's block
    dx = sum_g L^T q + wS dSK,  dy = sum_g A^T do + wS dSV

The keys and the values are two sides of one arithmetic. With X = q k^T, or do v^T, the gradient of
the decay of token j, in parts that are summed over the sides and the heads of the group:

    R_r = ds'_r sum_j X_rj f_j + (ds_r exp(G_r)) (q_r . S0)
    sY_j = f_j sum_r X_rj ds'_r,  Y_j = sY_j / s_j,  E_j = k_j . dSK + v_j . dSV
    dg_j = sum_{r >= j} (R_r - sY_r) - e_j Y_j                          inside the chunk
           + total (S0 . dS) + sum_{i < j} wS_i E_i - e_j (wS_j / s_j) E_j          to its end

The first sum nearly cancels where decays are strong, so both its terms are made of the very
operands, rounded, that enter the products. No term of the second does. Where nothing decays s is 0,
and Y is needed all the same: 2^-60 stands for s, in f and wS too, which no result can tell from 0.

A block works on 64 slots of a chunk, with one warpgroup, and returns its share of dx and dy. The
sums over rows are products with a triangle. It works on columns of a gate block's 16 rows, not on
all the chunk's with zeros: so X^T and L^T have tokens for rows, and all operands lie in shared
memory 16 columns to a tile, for a contraction may be as short as the tile is wide.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.gpu.block_sizes import BlockSizes
from pallas.gpu.gates import FLOOR, Gates
from pallas.gpu.in_chunk import MAX_EXPONENT, gate_block, iota
from pallas.gpu.matmul import Matmul
from pallas.gpu.output_pass import Facts
from pallas.gpu.spec import CHUNK, COLUMN, GATE_BLOCKS, GATE_ROWS, LOGITS, ROW, Spec, tile

MOST_SLOTS = 64  # of a block
LEAST_WRITE = 2.0**-60  # stands for s = 0
FLOOR_ODDS = 1 / math.expm1(-FLOOR)  # e / s; at less, nothing inside a chunk goes by the decay
SIDES = ("key", "value")


class SlotTokens(NamedTuple):
    """Gradients, by the timeline's rows 0 to N."""

    key: jax.Array  # [B, N, H, D] bfloat16, as far as the slots go
    value: jax.Array
    log_decay: jax.Array  # [B, N, H, M] float32


def slot_tokens(
    query: jax.Array,
    out_grad: jax.Array,
    key: jax.Array,
    value: jax.Array,
    logits: tuple[jax.Array, jax.Array],
    weights: tuple[jax.Array, jax.Array],
    log_decay: jax.Array,
    written: jax.Array | None,
    gates: Gates,
    starts: tuple[jax.Array, jax.Array],
    end_grads: tuple[jax.Array, jax.Array],
    facts: Facts | None,
    *,
    spec: Spec,
    block_sizes: BlockSizes,
    interpret: Any = False,
) -> SlotTokens:
    """The kernel's call.

    query, out_grad: [B, N, H * G, D] bfloat16. key, value: [B, P, H, D] bfloat16, as for the output
    pass. logits, weights: ds and p, each times rise and times exp(G), [B, N, H * G, M] bfloat16.
    log_decay, written: as for `chunk_gates`. starts, end_grads: of keys and values, [B, H, N / C,
    D, M] bfloat16, the slots at the chunks' starts and the gradients of those at their ends.
    interpret: as for `fused_attention`.
    """
    B, N, _, D = query.shape
    H, M = gates.cumulative.shape[2:]
    width = min(M, MOST_SLOTS)
    panels, stages = M // width, min(block_sizes.token_stages, 2 * spec.group)
    to_end, odds = _decays(log_decay, written, gates)
    inputs = {
        "query": query, "out_grad": out_grad, "key": key, "value": value,
        "logits_rise": logits[0], "weights_rise": weights[0],
        "logits_start": logits[1], "weights_start": weights[1],
        "cumulative": gates.cumulative, "write": gates.write, "to_end": to_end,
        "total": gates.total, "odds": odds,
        "start_key": starts[0], "start_value": starts[1],
        "end_key": end_grads[0], "end_value": end_grads[1],
    }  # fmt: skip
    if facts is not None:
        inputs |= {"query_run": facts.query, "visible": facts.visible}
    share = jax.ShapeDtypeStruct((panels, B, N, H, D), jnp.bfloat16)
    outputs = {
        "key_grad": share,
        "value_grad": share,
        "decay_grad": jax.ShapeDtypeStruct((B, N, H, M), jnp.float32),
    }

    def entry(*refs, **shared):
        named = dict(zip([*inputs, *outputs], refs, strict=True))
        matmul = Matmul(bool(interpret), shared.get("buffer"))
        _Block(named, shared, spec, matmul).run()

    call = plgpu.kernel(
        entry,
        out_type=list(outputs.values()),
        grid=(N // CHUNK, H * panels, B),
        grid_names=("chunk", "panel", "batch"),
        scratch_types=_scratch(stages, D, width, facts is not None, interpret=bool(interpret)),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="nha_slot_tokens",
        interpret=interpret,
    )
    key_grad, value_grad, decay_grad = call(*inputs.values())
    return SlotTokens(_sum_panels(key_grad), _sum_panels(value_grad), decay_grad)


def _decays(
    log_decay: jax.Array, written: jax.Array | None, gates: Gates
) -> tuple[jax.Array, jax.Array]:
    """wS, which `Gates` has too but for the least s, and e / s; [B, N, H, M] bfloat16."""
    B, N, H, M = log_decay.shape
    write = jnp.maximum(gates.write.astype(jnp.float32), LEAST_WRITE)
    chunks = log_decay.reshape(B, N // CHUNK, CHUNK, H, M)
    from_row = jnp.cumsum(chunks[:, :, ::-1], axis=2)[:, :, ::-1]
    after = jnp.pad(from_row[:, :, 1:], ((0, 0), (0, 0), (0, 1), (0, 0), (0, 0)))
    to_end = write * jnp.exp(after).reshape(log_decay.shape)
    if written is not None:
        to_end = jnp.where(written[..., None, None], to_end, 0)
    return to_end.astype(jnp.bfloat16), (jnp.exp(log_decay) / write).astype(jnp.bfloat16)


def _sum_panels(shares: jax.Array) -> jax.Array:
    if shares.shape[0] == 1:
        return shares[0]
    return shares.sum(0, dtype=jnp.float32).astype(shares.dtype)


def _scratch(stages: int, D: int, width: int, masked: bool, *, interpret: bool) -> dict:
    narrow, wide = jnp.bfloat16, jnp.float32

    def tiled(*shape):
        return plgpu.SMEM(shape, narrow, transforms=tile(GATE_ROWS))

    added = plgpu.SMEM((CHUNK, width), wide, transforms=tile(width, 4))
    scratch = {
        "rows": tiled(stages, CHUNK, D),  # q or do
        "rise": tiled(stages, CHUNK, width),
        "start": tiled(stages, CHUNK, width),
        "head_loaded": plgpu.Barrier(num_arrivals=3, num_barriers=stages),
        "tokens": tiled(CHUNK, D),
        "slots": tiled(D, width),
        "slot_grads": tiled(D, width),
        "side_loaded": plgpu.Barrier(num_arrivals=3),
        "falls": tiled(GATE_BLOCKS, CHUNK, width),  # s before, in the last
        "cumulative": added,  # then dg
        "row_sums": added,  # R
        "token_sums": added,  # sY
        "references": plgpu.SMEM((GATE_BLOCKS, width), wide),
        "total": plgpu.SMEM((width,), wide),
        "to_end": tiled(CHUNK, width),
        "odds": tiled(CHUNK, width),
        "part": tiled(CHUNK, width),
        "gates_loaded": plgpu.Barrier(num_arrivals=5 + GATE_BLOCKS + 2 * masked),
    }
    if masked:
        scratch["query_run"] = plgpu.SMEM((CHUNK,), jnp.int32)
        scratch["visible"] = plgpu.SMEM((CHUNK,), jnp.int32)
    if interpret:
        scratch["buffer"] = plgpu.SMEM((CHUNK, CHUNK), narrow)
    return scratch


class _Block:
    """Some slots of a chunk and KV head."""

    def __init__(self, refs: dict, shared: dict, spec: Spec, matmul: Matmul):
        self.refs, self.shared, self.spec, self.matmul = refs, shared, spec, matmul
        self.stages, _, self.D = shared["rows"].shape
        self.width = shared["rise"].shape[2]
        self.b, self.chunk = lax.axis_index("batch"), lax.axis_index("chunk")
        panels = jnp.int32(refs["cumulative"].shape[3] // self.width)
        self.panel = lax.rem(lax.axis_index("panel"), panels)
        self.h = lax.div(lax.axis_index("panel"), panels)
        self.first = self.chunk * CHUNK
        self.own = pl.ds(self.first, CHUNK)
        self.columns = pl.ds(self.panel * self.width, self.width)
        self.gates_shape = CHUNK, self.width

    def run(self) -> None:
        self._load_gates()
        self._load_side(0)
        for item in range(self.stages):
            self._load_head(jnp.int32(item), item)
        plgpu.barrier_wait(self.shared["gates_loaded"])
        self._build_falls()
        for side in range(len(SIDES)):
            self._side(side)
        self._store_decays()
        plgpu.wait_smem_to_gmem(0)

    # Copies

    def _load_gates(self) -> None:
        refs, shared, b, h = self.refs, self.shared, self.b, self.h
        loaded = shared["gates_loaded"]
        last = shared["falls"].at[GATE_BLOCKS - 1]
        targets = {
            "write": last,
            **{x: shared[x] for x in ("cumulative", "to_end", "odds")},
        }
        for name, target in targets.items():
            plgpu.copy_gmem_to_smem(refs[name].at[b, self.own, h, self.columns], target, loaded)
        total = refs["total"].at[b, h, self.chunk, self.columns]
        plgpu.copy_gmem_to_smem(total, shared["total"], loaded)
        for block in range(GATE_BLOCKS):
            middle = self.first + block * GATE_ROWS + GATE_ROWS // 2 - 1
            reference = refs["cumulative"].at[b, middle, h, self.columns]
            plgpu.copy_gmem_to_smem(reference, shared["references"].at[block], loaded)
        if self.spec.masked:
            plgpu.copy_gmem_to_smem(refs["query_run"].at[b, self.own], shared["query_run"], loaded)
            visible = refs["visible"].at[b, self._token_rows()]
            plgpu.copy_gmem_to_smem(visible, shared["visible"], loaded)

    def _load_side(self, side: int) -> None:
        refs, shared, name, loaded = self.refs, self.shared, SIDES[side], self.shared["side_loaded"]
        tokens = refs[name].at[self.b, self._token_rows(), self.h]
        plgpu.copy_gmem_to_smem(tokens, shared["tokens"], loaded)
        for source, target in (("start_", "slots"), ("end_", "slot_grads")):
            features = pl.ds(0, self.D)
            states = refs[source + name].at[self.b, self.h, self.chunk, features, self.columns]
            plgpu.copy_gmem_to_smem(states, shared[target], loaded)

    def _token_rows(self):
        return pl.ds(jnp.maximum(self.first - self.spec.ahead, 0), CHUNK)

    def _load_head(self, item, stage) -> None:
        """The rows of a head, of the first side and then of the second."""
        shared, group = self.shared, jnp.int32(self.spec.group)
        head = self.h * group + lax.rem(item, group)

        def load(rows, rise, start):
            loaded = shared["head_loaded"].at[stage]
            source = self.refs[rows].at[self.b, self.own, head]
            plgpu.copy_gmem_to_smem(source, shared["rows"].at[stage], loaded)
            for name, target in ((rise, "rise"), (start, "start")):
                source = self.refs[name].at[self.b, self.own, head, self.columns]
                plgpu.copy_gmem_to_smem(source, shared[target].at[stage], loaded)

        pl.when(item < group)(lambda: load("query", "logits_rise", "logits_start"))
        pl.when(item >= group)(lambda: load("out_grad", "weights_rise", "weights_start"))

    # Work

    def _build_falls(self) -> None:
        """f_j for each block's reference."""
        shared = self.shared
        G = plgpu.load(shared["cumulative"], layout=LOGITS)
        write = self._wide(shared["falls"].at[GATE_BLOCKS - 1])
        write = jnp.maximum(write, LEAST_WRITE)
        for name in ("row_sums", "token_sums"):
            shared[name][...] = plgpu.layout_cast(jnp.zeros(G.shape, G.dtype), LOGITS)
        for block in range(GATE_BLOCKS):
            reference = plgpu.load(shared["references"].at[block], layout=COLUMN)
            exponent = self._to_rows(reference) - G
            fall = write * jnp.exp2(jnp.minimum(exponent, MAX_EXPONENT))
            shared["falls"].at[block][...] = fall.astype(jnp.bfloat16)
        plgpu.commit_smem()

    def _side(self, side: int) -> None:
        """Adds to R and sY what this side's heads do; stores the side's dx."""
        shared = self.shared
        plgpu.barrier_wait(shared["side_loaded"])
        self._decays_to_end(side)
        grad = self.matmul(lambda: [(shared["to_end"], shared["slot_grads"].T)], (CHUNK, self.D))
        head = functools.partial(self._head, side)
        grad = lax.fori_loop(0, self.spec.group, head, grad)
        plgpu.commit_smem()  # all have read the tokens, whose place their gradient takes
        shared["tokens"][...] = grad.astype(jnp.bfloat16)
        plgpu.commit_smem()
        target = self.refs[SIDES[side] + "_grad"].at[self.panel, self.b, self.own, self.h]
        plgpu.copy_smem_to_gmem(shared["tokens"], target)
        if side + 1 < len(SIDES):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            self._load_side(side + 1)

    def _decays_to_end(self, side: int) -> None:
        """What the decays' gradients owe to the slots at the chunk's end, by one side."""
        shared = self.shared
        ending = self.matmul(lambda: [(shared["tokens"], shared["slot_grads"])], self.gates_shape)
        ending *= self._wide(shared["to_end"])
        grad = self._sum_rows(ending, lambda j, i: i < j, parts=2)
        grad -= ending * self._wide(shared["odds"])
        total = plgpu.load(shared["total"], layout=COLUMN)
        for first in range(0, self.D, CHUNK):
            features = pl.ds(first, CHUNK)
            product = self._wide(shared["slots"].at[features]) * self._wide(
                shared["slot_grads"].at[features]
            )
            grad += self._to_rows(total * product.sum(axis=0))
        if side:
            grad += plgpu.load(shared["cumulative"], layout=LOGITS)
        shared["cumulative"][...] = grad

    def _sum_rows(self, x: jax.Array, chosen, parts: int) -> jax.Array:
        """[C, slots]: for each row j the sum of the rows i of x with chosen(j, i)."""
        triangle = jnp.where(chosen(iota(CHUNK, 0), iota(CHUNK, 1)), 1.0, 0.0).astype(jnp.bfloat16)
        total: jax.Array | None = None
        buffer = self.shared["part"]
        for _ in range(parts):
            part = x.astype(jnp.bfloat16)
            x = x - part.astype(jnp.float32)
            plgpu.commit_smem()  # all have multiplied the part before
            buffer[...] = part
            plgpu.commit_smem()
            total = self.matmul(lambda: [(triangle, self.shared["part"])], self.gates_shape, total)
        assert total is not None
        return total

    def _head(self, side: int, i, grad: jax.Array) -> jax.Array:
        """dx with one more head."""
        item, shared = i + side * self.spec.group, self.shared
        stage = lax.rem(item, jnp.int32(self.stages))
        plgpu.barrier_wait(shared["head_loaded"].at[stage])
        self._add("row_sums", self._into_rows(stage))
        turned = self.matmul(
            lambda: [(shared["tokens"], shared["rows"].at[stage].T)], (CHUNK, CHUNK)
        )
        turned = jnp.where(self._entered(turned=True), turned, 0.0).astype(jnp.bfloat16)
        sums = plgpu.layout_cast(jnp.zeros(self.gates_shape, jnp.float32), LOGITS)
        for block in range(GATE_BLOCKS):
            grad, sums = self._block_rows(block, stage, turned, grad, sums)
        self._add("token_sums", sums)
        plgpu.commit_smem()  # all have read the head's rows
        more = item + self.stages < len(SIDES) * self.spec.group
        pl.when(more)(lambda: self._load_head(item + self.stages, stage))
        return grad

    def _add(self, name: str, x: jax.Array) -> None:
        """In shared memory, for registers are short."""
        self.shared[name][...] = plgpu.load(self.shared[name], layout=LOGITS) + x

    def _into_rows(self, stage) -> jax.Array:
        """A head's part of R."""
        shared = self.shared
        scores = self.matmul(
            lambda: [(shared["rows"].at[stage], shared["tokens"].T)], (CHUNK, CHUNK)
        )
        scores = jnp.where(self._entered(), scores, 0.0)

        def operands():
            for block in range(GATE_BLOCKS):
                tokens = (block + 1) * GATE_ROWS
                rows = lax.slice(scores, (0, 0), (CHUNK, tokens))
                rows = jnp.where(gate_block(tokens) == block, rows, 0.0).astype(jnp.bfloat16)
                yield rows, shared["falls"].at[block, pl.ds(0, tokens)]

        spread = self.matmul(lambda: list(operands()), self.gates_shape)
        within = spread * self._wide(shared["rise"].at[stage])
        carried = self.matmul(
            lambda: [(shared["rows"].at[stage], shared["slots"])], self.gates_shape
        )
        return within + carried * self._wide(shared["start"].at[stage])

    def _block_rows(self, block: int, stage, turned, grad, sums):
        """What the rows of a gate block add to dx and sY."""
        shared, first = self.shared, block * GATE_ROWS
        rows, end = pl.ds(first, GATE_ROWS), first + GATE_ROWS
        scores = lax.slice(turned, (0, first), (CHUNK, end))
        product = self.matmul(lambda: [(scores, shared["rise"].at[stage, rows])], self.gates_shape)
        sums += product * self._wide(shared["falls"].at[block])
        gathered = self.matmul(
            lambda: [(shared["falls"].at[block], shared["rise"].at[stage, rows].T)],
            (CHUNK, GATE_ROWS),
        )
        gathered = jnp.where(self._entered(turned=True, block=block), gathered, 0.0)
        gathered = gathered.astype(jnp.bfloat16)
        grad = self.matmul(
            lambda: [(gathered, shared["rows"].at[stage, rows])], (CHUNK, self.D), grad
        )
        return grad, sums

    def _entered(self, turned: bool = False, block: int | None = None) -> jax.Array:
        """[C, C], of a row and a token that is in its slots; turned: of a token and a row.

        block: of a token and the rows of a gate block only.
        """
        first, columns = (0, CHUNK) if block is None else (block * GATE_ROWS, GATE_ROWS)
        down, across = iota(columns, 0), iota(columns, 1) + first
        entered = down <= across if turned else across <= down
        if self.spec.masked:
            names = ("visible", "query_run") if turned else ("query_run", "visible")
            of_rows = plgpu.load(self.shared[names[0]], layout=ROW)
            of_columns = self.shared[names[1]].at[pl.ds(first, columns)]
            of_columns = plgpu.load(of_columns, layout=COLUMN)
            shape = CHUNK, columns
            entered &= lax.broadcast_in_dim(of_rows, shape, [0]) == lax.broadcast_in_dim(
                of_columns, shape, [1]
            )
        return entered

    def _store_decays(self) -> None:
        shared = self.shared
        from_rows, from_tokens = (
            plgpu.load(shared[name], layout=LOGITS) for name in ("row_sums", "token_sums")
        )
        later = self._sum_rows(from_rows - from_tokens, lambda j, r: r >= j, parts=3)
        odds = self._wide(shared["odds"])
        within = later - odds * plgpu.load(shared["token_sums"], layout=LOGITS)
        within = jnp.where(odds > FLOOR_ODDS, within, 0.0)
        shared["cumulative"][...] = within + plgpu.load(shared["cumulative"], layout=LOGITS)
        plgpu.commit_smem()
        target = self.refs["decay_grad"].at[self.b, self.own, self.h, self.columns]
        plgpu.copy_smem_to_gmem(shared["cumulative"], target)

    def _wide(self, ref) -> jax.Array:
        return plgpu.load(ref, layout=LOGITS).astype(jnp.float32)

    def _to_rows(self, x: jax.Array) -> jax.Array:
        return lax.broadcast_in_dim(x, self.gates_shape, [1])
