"""The part of a wide window that the fused kernel leaves: blockwise attention within a band.

Row r of the sequence, in the fused kernel's chunk of C rows that begins at c, reads the tokens
c + C - W <= j <= r of its segment here, and everything else there. The forward goes on with the
fused kernel's softmax: it takes the normalised output and log-sum-exp of the part, and gives those
of the whole. The backward needs only the whole's log-sum-exp, so it knows nothing of the part.

Symbols as in `spec.py`. Blocks of R rows; `span` blocks of keys reach a block of queries.
"""

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas.constants import MASKED_LOGIT
from pallas.tpu.arithmetic import (
    identity_mask,
    join,
    matmul,
    matmul_nt,
    rotate,
    rotate_back,
    scaled,
    to_row,
)
from pallas.tpu.launch import Arrays, launch, like
from pallas.tpu.spec import CallSpec


@dataclasses.dataclass(frozen=True)
class Band:
    """The grid (B, H, blocks, span): a block stays while the `span` others that meet it go by."""

    B: int
    H: int
    K: int
    V: int
    blocks: int
    dtype: jnp.dtype
    spec: CallSpec

    @classmethod
    def of(cls, inputs: Arrays, spec: CallSpec) -> Self:
        B, H, _, T = inputs["lse"].shape
        K, V = (inputs[name].shape[2] // H for name in ("key", "value"))
        return cls(B, H, K, V, T // spec.step_rows, inputs["query"].dtype, spec)

    @property
    def span(self) -> int:
        reach = max(self.spec.window - self.spec.chunk, 0)
        return min(-(-reach // self.spec.step_rows), self.blocks - 1) + 1

    @property
    def grid(self) -> tuple[int, ...]:
        return (self.B, self.H, self.blocks, self.span)

    def stays(self, i, j):
        return i

    def key_block(self, i, j):
        """The j-th block of keys of the i-th of queries; negative: none."""
        return i - (self.span - 1) + j

    def query_block(self, i, j):
        """The j-th block of queries of the i-th of keys; beyond the last: none."""
        return i + j

    def tokens(self, size: int, which) -> pl.BlockSpec:
        """[B, T, H * size]."""
        return self._block((1, self.spec.step_rows, size), lambda b, h, n: (b, n, h), which)

    def lanes(self, which) -> pl.BlockSpec:
        """[B, H, G, T]."""
        shape = (1, 1, self.spec.group, self.spec.step_rows)
        return self._block(shape, lambda b, h, n: (b, h, 0, n), which)

    def _block(self, shape, index, which) -> pl.BlockSpec:
        last = self.blocks - 1
        return pl.BlockSpec(shape, lambda b, h, i, j: index(b, h, jnp.clip(which(i, j), 0, last)))

    def specs(self, inputs: Arrays, queries, keys) -> dict[str, pl.BlockSpec]:
        """Blocks of the inputs; `queries` and `keys` say which block of each a grid point takes."""
        G, rows, K = self.spec.group, self.spec.step_rows, self.K
        specs = {
            "query": self.tokens(G * K, queries),
            "key": self.tokens(K, keys),
            "value": self.tokens(self.V, keys),
            "out": self.tokens(G * self.V, queries),
            "out_cotangent": self.tokens(G * self.V, queries),
            "lse": self.lanes(queries),
            "delta": self.lanes(queries),
        }
        if self.spec.rope:
            shared = inputs["query_table"].shape[0] == 1
            table = lambda b, h, n: (0 if shared else b, n, 0)  # noqa: E731
            specs["query_table"] = self._block((1, rows, 2 * K), table, queries)
            specs["key_table"] = self._block((1, rows, 2 * K), table, keys)
        if self.spec.segments:
            run = lambda b, h, n: (b, 0, n)  # noqa: E731
            specs["query_segment"] = self._block((1, 1, rows), run, queries)
            specs["token_segment"] = self._block((1, 1, rows), run, keys)
        return {name: specs[name] for name in inputs}

    def query_scratch(self, columns: tuple[str, ...], size: int) -> dict[str, Any]:
        """What a block of queries keeps while the keys go by: the queries, rotated; some columns
        [G, R, 128], all lanes alike; and a sum [G, R, size]."""
        G, R, wide = self.spec.group, self.spec.step_rows, jnp.float32
        scratch = {name: pltpu.VMEM((G, R, 128), wide) for name in columns}
        scratch |= {
            "query": pltpu.VMEM((G, R, self.K), self.dtype),
            "sum": pltpu.VMEM((G, R, size), wide),
        }
        return scratch | self.run_scratch()

    def run_scratch(self) -> dict[str, Any]:
        """For the numbers of the segments of the rows that stay."""
        return (
            {"run": pltpu.VMEM((self.spec.step_rows, 128), jnp.float32)}
            if self.spec.segments
            else {}
        )

    def launch(self, kernel, name, inputs, specs, outputs, scratch, interpret) -> Arrays:
        return launch(
            functools.partial(kernel, band=self), (inputs, specs), name=name, grid=self.grid,
            parallel=3, outputs=outputs, scratch=scratch, interpret=interpret,
        )  # fmt: skip


def band_forward(inputs: Arrays, spec: CallSpec, *, interpret: bool) -> Arrays:
    """Goes on with the softmax of the fused kernel's part.

    inputs: query, key, value as `forward`; out and lse, the part's; with spec.rope, query_table
    and key_table, both the table; with spec.segments, query_segment and token_segment
    [B, 1, T] float32. T is a multiple of the block.

    Returns out and lse of the whole.
    """
    band = Band.of(inputs, spec)
    specs = band.specs(inputs, band.stays, band.key_block)
    outputs = {name: like(inputs[name], specs[name]) for name in ("out", "lse")}
    scratch = band.query_scratch(("top", "mass"), band.V)
    return band.launch(
        _forward_kernel, "nha_band_forward", inputs, specs, outputs, scratch, interpret
    )


def _forward_kernel(refs, outs, now, *, band: Band):
    spec = band.spec
    i, j = pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _():
        _keep_queries(refs, now, spec)
        for g in range(spec.group):
            now["top"][g] = _column(refs["lse"][0, 0, g : g + 1])
            now["mass"][g] = jnp.ones(now["mass"].shape[1:], jnp.float32)
            now["sum"][g] = refs["out"][0, :, g * band.V : (g + 1) * band.V].astype(jnp.float32)

    @pl.when(band.key_block(i, j) >= 0)
    def _():
        key, value = _rotated(refs, "key", spec), refs["value"][0]
        mask = _mask(i, band.key_block(i, j), now, refs, spec)
        for g in range(spec.group):
            logits = jnp.where(mask, _logits(now["query"][g], key, spec), MASKED_LOGIT)
            before = now["top"][g][:, :1]
            top = jnp.maximum(before, jnp.max(logits, -1, keepdims=True))
            p, scale = jnp.exp2(logits - top), jnp.exp2(before - top)
            mass = scale * now["mass"][g][:, :1] + jnp.sum(p, -1, keepdims=True)
            now["sum"][g] = scale * now["sum"][g] + matmul(p.astype(value.dtype), value)
            now["top"][g], now["mass"][g] = (
                jnp.broadcast_to(x, (spec.step_rows, 128)) for x in (top, mass)
            )

    @pl.when(j == band.span - 1)
    def _():
        for g in range(spec.group):
            mass = now["mass"][g][:, :1]
            columns = slice(g * band.V, (g + 1) * band.V)
            outs["out"][0, :, columns] = (now["sum"][g] / mass).astype(outs["out"].dtype)
            outs["lse"][0, 0, g : g + 1] = _row(now["top"][g][:, :1] + jnp.log2(mass))


def band_backward(inputs: Arrays, spec: CallSpec, *, interpret: bool) -> Arrays:
    """The band's share of the cotangents of query, key and value.

    inputs: as `band_forward`, but lse of the whole, out_cotangent in place of out, and delta
    [B, H, G, T] float32.
    """
    band, wide = Band.of(inputs, spec), jnp.float32
    specs = band.specs(inputs, band.stays, band.key_block)
    outputs = {"query": like(inputs["query"], specs["query"])}
    scratch = band.query_scratch(("lse", "delta"), band.K)
    of_query = band.launch(
        _query_kernel, "nha_band_backward_query", inputs, specs, outputs, scratch, interpret
    )
    specs = band.specs(inputs, band.query_block, band.stays)
    outputs = {name: like(inputs[name], specs[name]) for name in ("key", "value")}
    scratch = {
        "rotated_key": pltpu.VMEM((spec.step_rows, band.K), band.dtype),
        "key": pltpu.VMEM((spec.step_rows, band.K), wide),
        "value": pltpu.VMEM((spec.step_rows, band.V), wide),
    } | band.run_scratch()
    return of_query | band.launch(
        _key_kernel, "nha_band_backward_key", inputs, specs, outputs, scratch, interpret
    )


def _query_kernel(refs, outs, now, *, band: Band):
    spec = band.spec
    i, j = pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _():
        _keep_queries(refs, now, spec)
        for g in range(spec.group):
            now["lse"][g] = _column(refs["lse"][0, 0, g : g + 1])
            now["delta"][g] = _column(refs["delta"][0, 0, g : g + 1])
            now["sum"][g] = jnp.zeros(now["sum"].shape[1:], jnp.float32)

    @pl.when(band.key_block(i, j) >= 0)
    def _():
        key, value = _rotated(refs, "key", spec), refs["value"][0]
        mask = _mask(i, band.key_block(i, j), now, refs, spec)
        for g in range(spec.group):
            logits = jnp.where(mask, _logits(now["query"][g], key, spec), MASKED_LOGIT)
            p = jnp.exp2(logits - now["lse"][g][:, :1])
            d_out = refs["out_cotangent"][0, :, g * band.V : (g + 1) * band.V]
            d_logits = p * ((matmul_nt(d_out, value) - now["delta"][g][:, :1]) * spec.window_slope)
            now["sum"][g] += matmul(d_logits.astype(key.dtype), key)

    @pl.when(j == band.span - 1)
    def _():
        for g in range(spec.group):
            d = now["sum"][g]
            if spec.rope:
                d = rotate_back(d, refs["query_table"][0])
            outs["query"][0, :, g * band.K : (g + 1) * band.K] = d.astype(outs["query"].dtype)


def _key_kernel(refs, outs, now, *, band: Band):
    """Logits are transposed here, [keys, queries]: then nothing else need be."""
    spec, K, V = band.spec, band.K, band.V
    i, j = pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _():
        now["rotated_key"][...] = _rotated(refs, "key", spec)
        if spec.segments:
            now["run"][...] = _column(refs["token_segment"][0])
        for name in ("key", "value"):
            now[name][...] = jnp.zeros(now[name].shape, jnp.float32)

    @pl.when(band.query_block(i, j) < band.blocks)
    def _():
        key, value = now["rotated_key"][...], refs["value"][0]
        mask = _mask(band.query_block(i, j), i, now, refs, spec, transposed=True)
        for g in range(spec.group):
            query = _rotated(refs, "query", spec, slice(g * K, (g + 1) * K))
            logits = jnp.where(mask, _logits(key, query, spec), MASKED_LOGIT)
            p = jnp.exp2(logits - refs["lse"][0, 0, g : g + 1])
            d_out = refs["out_cotangent"][0, :, g * V : (g + 1) * V]
            now["value"][...] += matmul(p.astype(d_out.dtype), d_out)
            d_p = matmul_nt(value, d_out) - refs["delta"][0, 0, g : g + 1]
            now["key"][...] += matmul((p * (d_p * spec.window_slope)).astype(query.dtype), query)

    @pl.when(j == band.span - 1)
    def _():
        d = now["key"][...]
        if spec.rope:
            d = rotate_back(d, refs["key_table"][0])
        outs["key"][0] = d.astype(outs["key"].dtype)
        outs["value"][0] = now["value"][...].astype(outs["value"].dtype)


def _keep_queries(refs, now, spec: CallSpec) -> None:
    K = now["query"].shape[2]
    for g in range(spec.group):
        now["query"][g] = _rotated(refs, "query", spec, slice(g * K, (g + 1) * K))
    if spec.segments:
        now["run"][...] = _column(refs["query_segment"][0])


def _rotated(refs, name: str, spec: CallSpec, columns: slice = slice(None)) -> jax.Array:
    x = refs[name][0, :, columns]
    if not spec.rope:
        return x
    return rotate(x, refs[f"{name}_table"][0]).astype(x.dtype)


def _logits(a: jax.Array, b: jax.Array, spec: CallSpec) -> jax.Array:
    return scaled(matmul_nt(a, b), spec.window_scale)


def _mask(
    query_block, key_block, now, refs, spec: CallSpec, *, transposed: bool = False
) -> jax.Array:
    """[queries, keys], or transposed: the band, and within it the query's segment."""
    R, C = spec.step_rows, spec.chunk
    row, column = (
        lax.broadcasted_iota(jnp.int32, (R, R), axis) for axis in ((1, 0) if transposed else (0, 1))
    )
    column += (key_block - query_block) * R  # from the start of the block of queries
    mask = (column <= row) & (column >= (row & -C) + (C - spec.window))
    if spec.segments:
        mask &= now["run"][:, :1] == refs["query_segment" if transposed else "token_segment"][0]
    return mask


def _column(row: jax.Array) -> jax.Array:
    """[1, R] -> [R, 128], all lanes alike."""
    size = min(128, row.shape[1])
    eye = identity_mask(size)
    return join([
        jnp.broadcast_to(
            jnp.sum(jnp.where(eye, row[:, i : i + size], 0.0), -1, keepdims=True), (size, 128)
        )
        for i in range(0, row.shape[1], size)
    ], 0)  # fmt: skip


def _row(column: jax.Array) -> jax.Array:
    """[R, 1] -> [1, R]."""
    size = min(128, column.shape[0])
    return join([
        to_row(column[i : i + size])[None] for i in range(0, column.shape[0], size)
    ], 1)  # fmt: skip
