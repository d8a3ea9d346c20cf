"""The gradient of the window's queries, and the window's part of the sum that is delta.

With symbols as in `spec.py`, q and k rotated, b_rj the logit of row r and token j, do the gradient
of the output, and sums over the tokens j that row r sees:

    p_rj  = exp(b_rj - lse_r)               dp_rj = do_r . v_j
    ds_rj = p_rj (dp_rj - delta_r)          dq_r  = scale * sum_j ds_rj k_j
    window_delta_r = sum_j p_rj dp_rj

Inputs:
  window_query, d_out  [B, Tq, Hq, D] bfloat16; C divides Tq
  window_key, value    [B, Tk, Hkv, D] bfloat16, the timeline without its first spec.ahead rows
  lse, delta           [B, Hq, Tq] float32; lse of base e
  query_segment,       with spec.masked: of `Segments`
  token_segment
  cos, sin             of `Rotation`: window_query and window_key are to be rotated, and d_query
                       back. Without them they come rotated, and d_query is of the rotated query
Outputs:
  d_query              [B, Tq, Hq, D] bfloat16
  window_delta         [B, Hq, Tq] float32

Warpgroups of a thread block, which has a chunk's rows of one query head:
  0, compute  rotates its queries, walks the blocks of C tokens that the rows see, with dq in
              registers, and rotates dq back
  1, fetch    copies the rows, once, and the blocks' tokens, and rotates the keys

| barrier                  | arrivals (number)                       | waits   | how often         |
| ------------------------ | --------------------------------------- | ------- | ----------------- |
| rows_loaded              | the copies of query, do, lse and delta; | compute | once              |
|                          | with spec.masked of query_segment (4/5) |         |                   |
| window_key_copied[stage] | the copy of the keys (1)                | fetch   | once a block,     |
|                          |                                         |         | with cos          |
| block_loaded[stage]      | the copies of keys and values; with cos | compute | once a block      |
|                          | fetch, having rotated, for the keys';   |         |                   |
|                          | with spec.masked of token_segment (2/3) |         |                   |
| block_read[stage]        | compute, having multiplied (1)          | fetch   | once a block      |
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.gpu.block_sizes import BlockSizes
from pallas.gpu.spec import CHUNK, LOG2E, LOGITS, ROW, CallSpec, tile
from pallas.gpu.warpgroup.addresses import ZERO, OpaqueZero
from pallas.gpu.warpgroup.chunk_index import ChunkIndex
from pallas.gpu.warpgroup.launch import Refs, check_shared_memory, launch
from pallas.gpu.warpgroup.masks import by_row, same_segment, sees
from pallas.gpu.warpgroup.matmul import Matmul
from pallas.gpu.warpgroup.pipeline import fetch_ahead
from pallas.gpu.warpgroup.rotation import arrival, halves_tile, rotate, rotate_copied


class WindowQueryGradients(NamedTuple):
    """The launch's outputs, as above."""

    query: jax.Array
    window_delta: jax.Array


def window_query_gradients(
    inputs: dict[str, jax.Array],
    *,
    spec: CallSpec,
    block_sizes: BlockSizes,
    interpret: Any = False,
) -> WindowQueryGradients:
    """The gradient of window_query, and window_delta, of `inputs` named and shaped as above.

    Raises:
      ValueError: block_sizes.window_stages blocks of such heads do not fit shared memory.
    """
    B, Tq, heads, D = inputs["window_query"].shape
    modes = {"rotates": "cos" in inputs, "interpret": bool(interpret)}
    result = launch(
        functools.partial(_kernel, spec=spec, interpret=bool(interpret)),
        inputs,
        {
            "d_query": jax.ShapeDtypeStruct((B, Tq, heads, D), jnp.bfloat16),
            "window_delta": jax.ShapeDtypeStruct((B, heads, Tq), jnp.float32),
        },
        _scratch(spec, block_sizes.window_stages, D, **modes),
        grid={"chunk": Tq // CHUNK, "heads": heads, "batch": B},
        warpgroups=2,
        name="nha_window_queries",
        interpret=interpret,
    )
    return WindowQueryGradients(*result)


def _scratch(spec: CallSpec, stages: int, D: int, *, rotates: bool, interpret: bool) -> Refs:
    """Shared memory and barriers; see the table above."""
    narrow, wide = jnp.bfloat16, jnp.float32
    tiles = tile(D)
    rotated = halves_tile(D) if rotates else tiles
    scratch = {
        "window_query": plgpu.SMEM((1, CHUNK, D), narrow, transforms=rotated),  # then dq
        "d_out": plgpu.SMEM((1, CHUNK, D), narrow, transforms=tiles),
        "lse": plgpu.SMEM((CHUNK,), wide),
        "delta": plgpu.SMEM((CHUNK,), wide),
        "window_delta": plgpu.SMEM((CHUNK,), wide),
        "window_key": plgpu.SMEM((stages, CHUNK, D), narrow, transforms=rotated),
        "value": plgpu.SMEM((stages, CHUNK, D), narrow, transforms=tiles),
        "zero": ZERO,
        "rows_loaded": plgpu.Barrier(num_arrivals=4 + spec.masked),
        "block_loaded": plgpu.Barrier(num_arrivals=2 + spec.masked, num_barriers=stages),
        "block_read": plgpu.Barrier(num_barriers=stages),
    }
    if rotates:
        scratch["window_key_copied"] = plgpu.Barrier(num_barriers=stages)
    if spec.masked:
        scratch["query_segment"] = plgpu.SMEM((CHUNK,), jnp.int32)
        scratch["token_segment"] = plgpu.SMEM((stages, CHUNK), jnp.int32)
    check_shared_memory(scratch, "window_stages", stages)
    if interpret:
        scratch["buffer"] = plgpu.SMEM((CHUNK, CHUNK), narrow)
    return scratch


def _kernel(refs: Refs, shared: Refs, *, spec: CallSpec, interpret: bool) -> None:
    me = lax.axis_index("wg")
    index = ChunkIndex(spec)
    pl.when(me == 1)(lambda: _fetch(refs, shared, index))

    @pl.when(me == 0)
    def _():
        _compute(refs, shared, index, spec, Matmul(interpret, shared.get("buffer")))


def _fetch(refs: Refs, shared: Refs, index: ChunkIndex) -> None:
    """The fetch warpgroup."""
    b, h = index.batch, index.heads
    own = {name: refs[name].at[b, index.rows, h] for name in ("window_query", "d_out")}
    own |= {name: refs[name].at[b, h, index.rows] for name in ("lse", "delta")}
    if "query_segment" in shared:
        own["query_segment"] = refs["query_segment"].at[b, index.rows]
    for name, source in own.items():
        target = shared[name].at[0] if len(shared[name].shape) == 3 else shared[name]
        plgpu.copy_gmem_to_smem(source, target, shared["rows_loaded"])

    loaded = shared["block_loaded"]

    def fetch(block, stage):
        rows = index.token_rows(block)
        tokens = {name: refs[name].at[b, rows, index.kv_head] for name in ("window_key", "value")}
        if "token_segment" in shared:
            tokens["token_segment"] = refs["token_segment"].at[b, rows]
        for name, source in tokens.items():
            copied = arrival(shared, name, loaded).at[stage]
            plgpu.copy_gmem_to_smem(source, shared[name].at[stage], copied)

    def rotate_key(block, stage):
        rotate_copied(refs, shared, "window_key", stage, b, index.token_rows(block), loaded)

    fetch_ahead(index.blocks, shared["block_read"], fetch, rotate_key)


def _compute(refs: Refs, shared: Refs, index: ChunkIndex, spec: CallSpec, matmul: Matmul) -> None:
    """The compute warpgroup."""
    D = shared["window_query"].shape[2]
    zero = OpaqueZero(shared["zero"])
    zero.store()
    plgpu.barrier_wait(shared["rows_loaded"])
    if "cos" in refs:
        rotate(shared["window_query"].at[0], refs, index.batch, index.positions)
        plgpu.commit_smem()
    zeros = plgpu.layout_cast(jnp.zeros((CHUNK, D), jnp.float32), LOGITS)
    shared["window_delta"][...] = plgpu.layout_cast(jnp.zeros(CHUNK, jnp.float32), ROW)
    add_block = functools.partial(_add_block, shared, index, spec, matmul, zero)
    total = lax.fori_loop(0, index.blocks, add_block, zeros)
    plgpu.commit_smem()  # all have read the queries, whose place dq takes
    b, head, d_query = index.batch, index.heads, shared["window_query"].at[0]
    d_query[...] = (total * spec.scale).astype(jnp.bfloat16)
    if "cos" in refs:
        rotate(d_query, refs, b, index.positions, back=True)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(d_query, refs["d_query"].at[b, index.rows, head])
    plgpu.copy_smem_to_gmem(shared["window_delta"], refs["window_delta"].at[b, head, index.rows])
    plgpu.wait_smem_to_gmem(0)


def _add_block(
    shared: Refs, index: ChunkIndex, spec: CallSpec, matmul: Matmul, zero: OpaqueZero, block, total
) -> jax.Array:
    """Adds a block of tokens to total, which is dq before its scale, and to window_delta."""
    square = CHUNK, CHUNK
    stage = lax.rem(block, jnp.int32(shared["value"].shape[0]))
    plgpu.barrier_wait(shared["block_loaded"].at[stage])
    stage += zero.renew()  # with one stage, its address would be known too
    query, key = shared["window_query"], shared["window_key"]
    b = matmul(lambda: [(query.at[zero.value], key.at[stage].T)], square)
    seen = sees(spec, index, block)
    if spec.masked:
        seen &= same_segment(shared["query_segment"], shared["token_segment"].at[stage])
    lse = plgpu.load(shared["lse"], layout=ROW) * LOG2E
    exponent = b * (spec.scale * LOG2E) - by_row(lse, CHUNK)
    p = jnp.exp2(jnp.where(seen, exponent, -jnp.inf))
    dp = matmul(lambda: [(shared["d_out"].at[zero.value], shared["value"].at[stage].T)], square)
    window_delta = (p * dp).sum(axis=1)  # kept in shared memory: registers are scarce
    shared["window_delta"][...] = plgpu.load(shared["window_delta"], layout=ROW) + window_delta
    ds = p * (dp - by_row(plgpu.load(shared["delta"], layout=ROW), CHUNK))
    total = matmul(lambda: [(ds.astype(jnp.bfloat16), key.at[stage])], (CHUNK, key.shape[2]), total)
    if spec.masked:
        plgpu.commit_smem()  # token_segment has been read, before a copy takes its place
    plgpu.barrier_arrive(shared["block_read"].at[stage])
    return total
