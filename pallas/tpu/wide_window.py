"""The part of a wide window that the fused kernels leave: blockwise attention.

Row r of the call, in the fused kernels' chunk of C rows that begins at row c, reads here the tokens
j of its segment with c + C - W <= j <= r, and everything else there. The forward goes on with the
fused kernel's softmax: it takes the normalised output and the log-sum-exp of that part, and gives
those of the whole. The backward needs only the whole's log-sum-exp: it knows nothing of the part.

Three kernels: forward, backward of the queries, backward of the keys and values. A block is as many
rows as the fused kernels have in a grid step, for all heads of a group. Inputs:

    query          [B, T, Hq K]              key, value     [B, T, Hkv K or V]
    query_table    [1 or B, T, K2] float32   key_table      the same table; both with spec.rope
    query_segment  [B, 1, T] float32         token_segment  as that; both with spec.segments
    lse            [B, Hkv, G, T] float32    the part's in the forward, the whole's in the backward
    out            [B, T, Hq V]              the part's; the forward only
    d_out          [B, T, Hq V]              the backward only
    delta          [B, Hkv, G, T] float32    the backward only

Outputs: out and lse of the whole; d_query; d_key and d_value: this part's share of the gradients.

Grid (B, Hkv, blocks, blocks_met): on the last axis, one block (of queries; of keys in the last
kernel) stays while the blocks that meet it go by. Scratch holds what stays in a handy form, and the
sums. The other axes may run in any order.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas.constants import MASKED_LOGIT
from pallas.tpu.arithmetic import (
    LANES,
    identity_mask,
    join,
    matmul,
    matmul_nt,
    rotate,
    rotate_back,
    scaled,
    table_columns,
    to_row,
)
from pallas.tpu.chunk_tokens import Refs
from pallas.tpu.launch import Arrays, Blocks, launch, like
from pallas.tpu.spec import CallSpec

WhichBlock = Callable[[Any, Any], Any]  # from the last two grid indices to a block's number


@dataclasses.dataclass(frozen=True)
class BlockGrid:
    """The grid (B, Hkv, blocks, blocks_met), and the blocks of the arrays."""

    B: int
    Hkv: int
    K: int
    V: int
    blocks: int  # of rows
    dtype: jnp.dtype
    spec: CallSpec

    @classmethod
    def of(cls, inputs: Arrays, spec: CallSpec) -> Self:
        B, Hkv, _, T = inputs["lse"].shape
        K, V = (inputs[name].shape[2] // Hkv for name in ("key", "value"))
        return cls(B, Hkv, K, V, T // spec.step_rows, inputs["query"].dtype, spec)

    @property
    def blocks_met(self) -> int:
        """Blocks of keys that rows of one block of queries read, and the other way round."""
        furthest = max(self.spec.window - self.spec.chunk, 0)
        return min(-(-furthest // self.spec.step_rows), self.blocks - 1) + 1

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.B, self.Hkv, self.blocks, self.blocks_met)

    def staying(self, i, j):
        """The block that stays."""
        return i

    def key_block(self, i, j):
        """The j-th block of keys that the i-th block of queries meets; negative: there is none."""
        return i - (self.blocks_met - 1) + j

    def query_block(self, i, j):
        """The j-th block of queries that the i-th of keys meets; `blocks` or more: none."""
        return i + j

    def _block(self, shape: tuple[int, ...], index: Callable[..., Any], which: WhichBlock):
        last = self.blocks - 1
        return pl.BlockSpec(shape, lambda b, h, i, j: index(b, h, jnp.clip(which(i, j), 0, last)))

    def tokens(self, size: int, which: WhichBlock) -> pl.BlockSpec:
        """A block of [B, T, Hkv * size]."""
        return self._block((1, self.spec.step_rows, size), lambda b, h, n: (b, n, h), which)

    def lanes(self, which: WhichBlock) -> pl.BlockSpec:
        """A block of [B, Hkv, G, T]."""
        shape = (1, 1, self.spec.group, self.spec.step_rows)
        return self._block(shape, lambda b, h, n: (b, h, 0, n), which)

    def specs(
        self, inputs: Arrays, queries: WhichBlock, keys: WhichBlock
    ) -> dict[str, pl.BlockSpec]:
        """The inputs' blocks; `queries` and `keys` say which of them a grid point takes."""
        G, rows, K = self.spec.group, self.spec.step_rows, self.K
        specs = {
            "query": self.tokens(G * K, queries),
            "key": self.tokens(K, keys),
            "value": self.tokens(self.V, keys),
            "out": self.tokens(G * self.V, queries),
            "d_out": self.tokens(G * self.V, queries),
            "lse": self.lanes(queries),
            "delta": self.lanes(queries),
        }
        if self.spec.rope:
            shared = inputs["query_table"].shape[0] == 1
            columns = table_columns(K)
            table = lambda b, h, n: (0 if shared else b, n, 0)  # noqa: E731
            specs["query_table"] = self._block((1, rows, columns), table, queries)
            specs["key_table"] = self._block((1, rows, columns), table, keys)
        if self.spec.segments:
            segment = lambda b, h, n: (b, 0, n)  # noqa: E731
            specs["query_segment"] = self._block((1, 1, rows), segment, queries)
            specs["token_segment"] = self._block((1, 1, rows), segment, keys)
        return {name: specs[name] for name in inputs}

    def query_scratch(self, columns: tuple[str, ...], size: int) -> dict[str, Any]:
        """What a block of queries keeps while the keys go by.

        The queries, rotated [G, rows, K]; each of `columns` [G, rows, 128], all lanes alike; a sum
        [G, rows, size]; and the segments.
        """
        G, rows = self.spec.group, self.spec.step_rows
        scratch = {name: pltpu.VMEM((G, rows, LANES), jnp.float32) for name in columns}
        scratch |= {
            "query": pltpu.VMEM((G, rows, self.K), self.dtype),
            "sum": pltpu.VMEM((G, rows, size), jnp.float32),
        }
        return scratch | self.segment_scratch()

    def segment_scratch(self) -> dict[str, Any]:
        """The segments of the block that stays, [rows, 128], all lanes alike."""
        if not self.spec.segments:
            return {}
        return {"segment": pltpu.VMEM((self.spec.step_rows, LANES), jnp.float32)}

    def launch(
        self, kernel: Callable[..., None], name: str, blocks: Blocks, interpret: bool
    ) -> Arrays:
        return launch(
            functools.partial(kernel, grid=self), blocks, name=f"nha_wide_window_{name}",
            grid=self.shape, parallel=3, interpret=interpret,
        )  # fmt: skip


def wide_window_forward(inputs: Arrays, spec: CallSpec, *, interpret: bool) -> Arrays:
    """Returns out and lse of the whole, by name; inputs as in this module's docstring."""
    blocks = wide_window_forward_blocks(inputs, spec)
    return BlockGrid.of(inputs, spec).launch(_forward_kernel, "forward", blocks, interpret)


def wide_window_forward_blocks(inputs: Arrays, spec: CallSpec) -> Blocks:
    """Returns what a grid step has in VMEM; of the inputs, only shapes and dtypes are read."""
    grid = BlockGrid.of(inputs, spec)
    specs = grid.specs(inputs, grid.staying, grid.key_block)
    outputs = {name: like(inputs[name], specs[name]) for name in ("out", "lse")}
    return Blocks(((inputs, specs),), outputs, grid.query_scratch(("row_max", "row_sum"), grid.V))


def _forward_kernel(refs: Refs, outs: Refs, kept: Refs, *, grid: BlockGrid):
    spec, V = grid.spec, grid.V
    i, j = pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _():
        _keep_queries(refs, kept, spec)
        for g in range(spec.group):
            kept["row_max"][g] = _column(refs["lse"][0, 0, g : g + 1])
            kept["row_sum"][g] = jnp.ones(kept["row_sum"].shape[1:], jnp.float32)
            kept["sum"][g] = refs["out"][0, :, g * V : (g + 1) * V].astype(jnp.float32)

    @pl.when(grid.key_block(i, j) >= 0)
    def _():
        key, value = _rotated(refs, "key", spec), refs["value"][0]
        mask = _mask(i, grid.key_block(i, j), kept, refs, spec)
        for g in range(spec.group):
            logits = jnp.where(mask, _logits(kept["query"][g], key, spec), MASKED_LOGIT)
            before = kept["row_max"][g][:, :1]
            row_max = jnp.maximum(before, jnp.max(logits, -1, keepdims=True))
            p, rescale = jnp.exp2(logits - row_max), jnp.exp2(before - row_max)
            row_sum = rescale * kept["row_sum"][g][:, :1] + jnp.sum(p, -1, keepdims=True)
            kept["sum"][g] = rescale * kept["sum"][g] + matmul(p.astype(value.dtype), value)
            kept["row_max"][g], kept["row_sum"][g] = (
                jnp.broadcast_to(x, (spec.step_rows, LANES)) for x in (row_max, row_sum)
            )

    @pl.when(j == grid.blocks_met - 1)
    def _():
        for g in range(spec.group):
            row_sum = kept["row_sum"][g][:, :1]
            columns = slice(g * V, (g + 1) * V)
            outs["out"][0, :, columns] = (kept["sum"][g] / row_sum).astype(outs["out"].dtype)
            lse = kept["row_max"][g][:, :1] + jnp.log2(row_sum)
            outs["lse"][0, 0, g : g + 1] = _row(lse)


def wide_window_backward(inputs: Arrays, spec: CallSpec, *, interpret: bool) -> Arrays:
    """Returns this part's share of d_query, d_key and d_value; inputs as in the docstring above."""
    grid = BlockGrid.of(inputs, spec)
    of_queries, of_keys = wide_window_backward_blocks(inputs, spec)
    d_query = grid.launch(_query_kernel, "backward_query", of_queries, interpret)
    return d_query | grid.launch(_key_kernel, "backward_key", of_keys, interpret)


def wide_window_backward_blocks(inputs: Arrays, spec: CallSpec) -> tuple[Blocks, Blocks]:
    """Returns what grid steps of the two backward kernels have in VMEM: of queries, of keys."""
    grid = BlockGrid.of(inputs, spec)
    specs = grid.specs(inputs, grid.staying, grid.key_block)
    outputs = {"d_query": like(inputs["query"], specs["query"])}
    of_queries = Blocks(((inputs, specs),), outputs, grid.query_scratch(("lse", "delta"), grid.K))
    specs = grid.specs(inputs, grid.query_block, grid.staying)
    outputs = {f"d_{name}": like(inputs[name], specs[name]) for name in ("key", "value")}
    scratch = {
        "key": pltpu.VMEM((spec.step_rows, grid.K), grid.dtype),
        "d_key": pltpu.VMEM((spec.step_rows, grid.K), jnp.float32),
        "d_value": pltpu.VMEM((spec.step_rows, grid.V), jnp.float32),
    } | grid.segment_scratch()
    return of_queries, Blocks(((inputs, specs),), outputs, scratch)


def _query_kernel(refs: Refs, outs: Refs, kept: Refs, *, grid: BlockGrid):
    spec, K, V = grid.spec, grid.K, grid.V
    i, j = pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _():
        _keep_queries(refs, kept, spec)
        for g in range(spec.group):
            kept["lse"][g] = _column(refs["lse"][0, 0, g : g + 1])
            kept["delta"][g] = _column(refs["delta"][0, 0, g : g + 1])
            kept["sum"][g] = jnp.zeros(kept["sum"].shape[1:], jnp.float32)

    @pl.when(grid.key_block(i, j) >= 0)
    def _():
        key, value = _rotated(refs, "key", spec), refs["value"][0]
        mask = _mask(i, grid.key_block(i, j), kept, refs, spec)
        for g in range(spec.group):
            logits = jnp.where(mask, _logits(kept["query"][g], key, spec), MASKED_LOGIT)
            p = jnp.exp2(logits - kept["lse"][g][:, :1])
            d_p = matmul_nt(refs["d_out"][0, :, g * V : (g + 1) * V], value)
            d_logits = p * ((d_p - kept["delta"][g][:, :1]) * spec.window_slope)
            kept["sum"][g] += matmul(d_logits.astype(key.dtype), key)

    @pl.when(j == grid.blocks_met - 1)
    def _():
        for g in range(spec.group):
            d_query = kept["sum"][g]
            if spec.rope:
                d_query = rotate_back(d_query, refs["query_table"][0])
            columns = slice(g * K, (g + 1) * K)
            outs["d_query"][0, :, columns] = d_query.astype(outs["d_query"].dtype)


def _key_kernel(refs: Refs, outs: Refs, kept: Refs, *, grid: BlockGrid):
    """Logits are transposed here, [keys, queries], so that nothing else need be."""
    spec, K, V = grid.spec, grid.K, grid.V
    i, j = pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _():
        kept["key"][...] = _rotated(refs, "key", spec)
        if spec.segments:
            kept["segment"][...] = _column(refs["token_segment"][0])
        for name in ("d_key", "d_value"):
            kept[name][...] = jnp.zeros(kept[name].shape, jnp.float32)

    @pl.when(grid.query_block(i, j) < grid.blocks)
    def _():
        key, value = kept["key"][...], refs["value"][0]
        mask = _mask(grid.query_block(i, j), i, kept, refs, spec, transposed=True)
        for g in range(spec.group):
            query = _rotated(refs, "query", spec, slice(g * K, (g + 1) * K))
            logits = jnp.where(mask, _logits(key, query, spec), MASKED_LOGIT)
            p = jnp.exp2(logits - refs["lse"][0, 0, g : g + 1])
            d_out = refs["d_out"][0, :, g * V : (g + 1) * V]
            kept["d_value"][...] += matmul(p.astype(d_out.dtype), d_out)
            d_p = matmul_nt(value, d_out) - refs["delta"][0, 0, g : g + 1]
            kept["d_key"][...] += matmul((p * (d_p * spec.window_slope)).astype(query.dtype), query)

    @pl.when(j == grid.blocks_met - 1)
    def _():
        d_key = kept["d_key"][...]
        if spec.rope:
            d_key = rotate_back(d_key, refs["key_table"][0])
        outs["d_key"][0] = d_key.astype(outs["d_key"].dtype)
        outs["d_value"][0] = kept["d_value"][...].astype(outs["d_value"].dtype)


def _keep_queries(refs: Refs, kept: Refs, spec: CallSpec) -> None:
    K = kept["query"].shape[2]
    for g in range(spec.group):
        kept["query"][g] = _rotated(refs, "query", spec, slice(g * K, (g + 1) * K))
    if spec.segments:
        kept["segment"][...] = _column(refs["query_segment"][0])


def _rotated(refs: Refs, name: str, spec: CallSpec, columns: slice = slice(None)) -> jax.Array:
    """Queries or keys [rows, K], rotated if the kernels rotate."""
    x = refs[name][0, :, columns]
    if not spec.rope:
        return x
    return rotate(x, refs[f"{name}_table"][0]).astype(x.dtype)


def _logits(a: jax.Array, b: jax.Array, spec: CallSpec) -> jax.Array:
    return scaled(matmul_nt(a, b), spec.window_scale)


def _mask(
    query_block: jax.Array,
    key_block: jax.Array,
    kept: Refs,
    refs: Refs,
    spec: CallSpec,
    *,
    transposed: bool = False,
) -> jax.Array:
    """Which tokens rows read here, bool [queries, keys], or transposed."""
    rows, C = spec.step_rows, spec.chunk
    row, token = (
        lax.broadcasted_iota(jnp.int32, (rows, rows), axis)
        for axis in ((1, 0) if transposed else (0, 1))
    )
    token += (key_block - query_block) * rows  # counted from the start of the block of queries
    mask = (token <= row) & (token >= (row & -C) + (C - spec.window))
    if spec.segments:
        going_by = refs["query_segment" if transposed else "token_segment"]
        mask &= kept["segment"][:, :1] == going_by[0]
    return mask


def _column(row: jax.Array) -> jax.Array:
    """Transposes [1, rows] to [rows, 128], all lanes alike."""
    size = min(LANES, row.shape[1])
    eye = identity_mask(size)
    return join([
        jnp.broadcast_to(
            jnp.sum(jnp.where(eye, row[:, i : i + size], 0.0), -1, keepdims=True), (size, LANES)
        )
        for i in range(0, row.shape[1], size)
    ], 0)  # fmt: skip


def _row(column: jax.Array) -> jax.Array:
    """Transposes [rows, 1] to [1, rows]."""
    size = min(LANES, column.shape[0])
    return join([
        to_row(column[i : i + size])[None] for i in range(0, column.shape[0], size)
    ], 1)  # fmt: skip
