"""The gradients of the window's keys and values.

With the symbols of `window_queries.py`, sums over the rows that see token j, of all G query heads:

    dv_j = sum_r p_rj do_r
    dk_j = scale * sum_r ds_rj q_r

A thread block has 64 tokens of one KV head: a warpgroup walks the chunks of rows that see them,
with tokens down and rows across, so that what it has in registers needs no transposing.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.gpu.block_sizes import BlockSizes
from pallas.gpu.gates import LOG2E
from pallas.gpu.launch import Refs, launch
from pallas.gpu.masks import by_column, by_row, in_window, iota
from pallas.gpu.matmul import Matmul
from pallas.gpu.output_pass import Facts
from pallas.gpu.pipeline import fetch_ahead
from pallas.gpu.spec import CHUNK, COLUMN, LOGITS, ROW, Spec, tile
from pallas.gpu.window_queries import window_inputs


class WindowTokens(NamedTuple):
    """Gradients, [B, P, H, D] bfloat16."""

    rotated_key: jax.Array
    value: jax.Array


def window_tokens(
    rotated_query: jax.Array,
    rotated_key: jax.Array,
    value: jax.Array,
    out_grad: jax.Array,
    log_mass: jax.Array,
    delta: jax.Array,
    facts: Facts | None,
    *,
    spec: Spec,
    block_sizes: BlockSizes,
    interpret: Any = False,
) -> WindowTokens:
    """The kernel's call; arrays as for `window_queries`."""
    N, D = rotated_query.shape[1], rotated_query.shape[3]
    B, P, H, _ = value.shape
    grad = jax.ShapeDtypeStruct((B, P, H, D), jnp.bfloat16)
    grads = launch(
        functools.partial(_kernel, spec=spec, chunks=N // CHUNK, interpret=bool(interpret)),
        window_inputs(rotated_query, rotated_key, value, out_grad, log_mass, delta, facts),
        {"key_grad": grad, "value_grad": grad},
        _scratch(spec, block_sizes.window_stages, D, interpret=bool(interpret)),
        grid={"block": P // CHUNK, "head": H, "batch": B},
        warpgroups=2,
        name="nha_window_tokens",
        interpret=interpret,
    )
    return WindowTokens(*grads)


def _scratch(spec: Spec, stages: int, D: int, *, interpret: bool) -> dict[str, Any]:
    narrow, wide = jnp.bfloat16, jnp.float32
    tiles = tile(D)
    scratch = {
        "rotated_key": plgpu.SMEM((CHUNK, D), narrow, transforms=tiles),  # then their gradients
        "value": plgpu.SMEM((CHUNK, D), narrow, transforms=tiles),
        "rotated_query": plgpu.SMEM((stages, CHUNK, D), narrow, transforms=tiles),
        "out_grad": plgpu.SMEM((stages, CHUNK, D), narrow, transforms=tiles),
        "log_mass": plgpu.SMEM((stages, CHUNK), wide),
        "delta": plgpu.SMEM((stages, CHUNK), wide),
        "tokens_loaded": plgpu.Barrier(num_arrivals=2 + spec.masked),
        "rows_loaded": plgpu.Barrier(num_arrivals=4 + spec.masked, num_barriers=stages),
        "rows_read": plgpu.Barrier(num_barriers=stages),
    }
    if spec.masked:
        scratch["query_run"] = plgpu.SMEM((stages, CHUNK), jnp.int32)
        scratch["visible"] = plgpu.SMEM((CHUNK,), jnp.int32)
    if interpret:
        scratch["buffer"] = plgpu.SMEM((CHUNK, CHUNK), narrow)
    return scratch


class _Place:
    """Tokens of a thread block, and the chunks of rows that see some of them.

    Attributes:
      batch, head: indices.
      tokens: the block's rows in the arrays.
      first_token: the first of them on the timeline.
      items: how many pairs of a query head and a chunk there are.
    """

    def __init__(self, spec: Spec, chunks: int):
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
        self.items = self._chunks * spec.group

    def head_and_chunk(self, item: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A query head's chunks come one after the other."""
        head = self.head * self._group + lax.div(item, self._chunks)
        return head, self._first + lax.rem(item, self._chunks)


def _kernel(refs: Refs, shared: Refs, *, spec: Spec, chunks: int, interpret: bool) -> None:
    me = lax.axis_index("wg")
    place = _Place(spec, chunks)
    pl.when(me == 1)(lambda: _fetch(refs, shared, place))

    @pl.when(me == 0)
    def _():
        _compute(refs, shared, place, spec, Matmul(interpret, shared.get("buffer")))


def _fetch(refs: Refs, shared: Refs, place: _Place) -> None:
    b = place.batch
    own = {name: refs[name].at[b, place.tokens, place.head] for name in ("rotated_key", "value")}
    if "visible" in shared:
        own["visible"] = refs["visible"].at[b, place.tokens]
    for name, source in own.items():
        plgpu.copy_gmem_to_smem(source, shared[name], shared["tokens_loaded"])

    def fetch(item, stage):
        head, chunk = place.head_and_chunk(item)
        rows, loaded = pl.ds(chunk * CHUNK, CHUNK), shared["rows_loaded"].at[stage]
        sources = {name: refs[name].at[b, rows, head] for name in ("rotated_query", "out_grad")}
        sources |= {name: refs[name].at[b, head, rows] for name in ("log_mass", "delta")}
        if "query_run" in shared:
            sources["query_run"] = refs["query_run"].at[b, rows]
        for name, source in sources.items():
            plgpu.copy_gmem_to_smem(source, shared[name].at[stage], loaded)

    fetch_ahead(place.items, shared["rows_read"], fetch)


def _compute(refs: Refs, shared: Refs, place: _Place, spec: Spec, matmul: Matmul) -> None:
    stages, _, D = shared["rotated_query"].shape
    square, narrow = (CHUNK, CHUNK), jnp.bfloat16  # [tokens, rows]
    plgpu.barrier_wait(shared["tokens_loaded"])

    def step(item, totals):
        key_total, value_total = totals
        stage = lax.rem(item, jnp.int32(stages))
        _, chunk = place.head_and_chunk(item)
        plgpu.barrier_wait(shared["rows_loaded"].at[stage])
        b = matmul(lambda: [(shared["rotated_key"], shared["rotated_query"].at[stage].T)], square)
        seen = in_window(spec, iota(CHUNK, 1) + chunk * CHUNK, iota(CHUNK, 0) + place.first_token)
        if spec.masked:
            run = plgpu.load(shared["query_run"].at[stage], layout=COLUMN)
            visible = plgpu.load(shared["visible"], layout=ROW)
            seen &= by_column(run) == by_row(visible, CHUNK)
        log_mass = plgpu.load(shared["log_mass"].at[stage], layout=COLUMN) * LOG2E
        exponent = b * (spec.scale * LOG2E) - by_column(log_mass)
        p = jnp.exp2(jnp.where(seen, exponent, -jnp.inf))
        value_total = matmul(
            lambda: [(p.astype(narrow), shared["out_grad"].at[stage])], (CHUNK, D), value_total
        )
        dp = matmul(lambda: [(shared["value"], shared["out_grad"].at[stage].T)], square)
        ds = p * (dp - by_column(plgpu.load(shared["delta"].at[stage], layout=COLUMN)))
        key_total = matmul(
            lambda: [(ds.astype(narrow), shared["rotated_query"].at[stage])],
            (CHUNK, D),
            key_total,
        )
        plgpu.barrier_arrive(shared["rows_read"].at[stage])
        return key_total, value_total

    zeros = plgpu.layout_cast(jnp.zeros((CHUNK, D), jnp.float32), LOGITS)
    key_total, value_total = lax.fori_loop(0, place.items, step, (zeros, zeros))
    plgpu.commit_smem()  # all have read the tokens, whose place their gradients take
    shared["rotated_key"][...] = (key_total * spec.scale).astype(narrow)
    shared["value"][...] = value_total.astype(narrow)
    plgpu.commit_smem()
    for name, grad in (("rotated_key", "key_grad"), ("value", "value_grad")):
        target = refs[grad].at[place.batch, place.tokens, place.head]
        plgpu.copy_smem_to_gmem(shared[name], target)
    plgpu.wait_smem_to_gmem(0)
