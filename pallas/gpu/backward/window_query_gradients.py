"""The gradient of the window's queries, and the window's part of the sum that is delta.

With symbols as in `spec.py`, q and k rotated, b the window's logits, do the output's gradient:

    p_rj = exp(b_rj - log_mass_r)
    ds_rj = p_rj (do_r . v_j - delta_r)
    dq_r = scale * sum_j ds_rj k_j
    pulled_r = sum_j p_rj (do_r . v_j)

A thread block has the rows of a chunk of one query head: a warpgroup walks the blocks of tokens
that they see, and another fetches them. If the kernel rotates, the one rotates its queries, and
their gradient back, and the other the keys.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.gpu.block_sizes import BlockSizes
from pallas.gpu.spec import CHUNK, LOG2E, LOGITS, ROW, CallSpec, Segments, tile
from pallas.gpu.warpgroup.addresses import ZERO, OpaqueZero
from pallas.gpu.warpgroup.chunk_index import ChunkIndex
from pallas.gpu.warpgroup.launch import Refs, check_shared_memory, launch
from pallas.gpu.warpgroup.masks import by_row, same_segment, sees
from pallas.gpu.warpgroup.matmul import Matmul
from pallas.gpu.warpgroup.pipeline import fetch_ahead
from pallas.gpu.warpgroup.rotation import Rotation, arrival, halves_tile, rotate, rotate_copied


class WindowQueryGradients(NamedTuple):
    query: jax.Array  # [B, Tq, Hq, D] bfloat16, the gradient of window_query
    pulled: jax.Array  # [B, Hq, Tq] float32


def window_query_gradients(
    window_query: jax.Array,
    window_key: jax.Array,
    value: jax.Array,
    d_out: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    segments: Segments | None,
    rotation: Rotation | None,
    *,
    spec: CallSpec,
    block_sizes: BlockSizes,
    interpret: Any = False,
) -> WindowQueryGradients:
    """The kernel's call.

    window_query, d_out: [B, Tq, Hq, D] bfloat16. window_key, value: [B, Tk, Hkv, D] bfloat16.
    lse, of base e, and delta, the sum over what a row sees of p times its gradient:
    [B, Hq, Tq] float32. segments: with spec.masked. rotation: of window_query and window_key, which
    their gradients are rotated back by; None: they are rotated, and so are their gradients.
    interpret: as for `fused_attention`.

    Raises:
      ValueError: block_sizes.window_stages of them do not fit.
    """
    B, Tq, heads, D = window_query.shape
    arrays = window_query, window_key, value, d_out, lse, delta
    modes = {"rotates": rotation is not None, "interpret": bool(interpret)}
    result = launch(
        functools.partial(_kernel, spec=spec, interpret=bool(interpret)),
        window_inputs(*arrays, segments, rotation),
        {
            "d_query": jax.ShapeDtypeStruct((B, Tq, heads, D), jnp.bfloat16),
            "pulled": jax.ShapeDtypeStruct((B, heads, Tq), jnp.float32),
        },
        _scratch(spec, block_sizes.window_stages, D, **modes),
        grid={"chunk": Tq // CHUNK, "heads": heads, "batch": B},
        warpgroups=2,
        name="nha_window_queries",
        interpret=interpret,
    )
    return WindowQueryGradients(*result)


def window_inputs(
    window_query: jax.Array,
    window_key: jax.Array,
    value: jax.Array,
    d_out: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    segments: Segments | None,
    rotation: Rotation | None,
) -> dict[str, jax.Array]:
    """By name; what `window_token_gradients` reads as well."""
    inputs = {"window_query": window_query, "window_key": window_key, "value": value}
    inputs |= {"d_out": d_out, "lse": lse, "delta": delta}
    if segments is not None:
        inputs |= segments.arrays(slots=False)
    if rotation is not None:
        inputs |= rotation._asdict()
    return inputs


def _scratch(spec: CallSpec, stages: int, D: int, *, rotates: bool, interpret: bool) -> Refs:
    narrow, wide = jnp.bfloat16, jnp.float32
    tiles = tile(D)
    turned = halves_tile(D) if rotates else tiles
    scratch = {
        "window_query": plgpu.SMEM((1, CHUNK, D), narrow, transforms=turned),  # then its gradient
        "d_out": plgpu.SMEM((1, CHUNK, D), narrow, transforms=tiles),
        "lse": plgpu.SMEM((CHUNK,), wide),
        "delta": plgpu.SMEM((CHUNK,), wide),
        "pulled": plgpu.SMEM((CHUNK,), wide),
        "window_key": plgpu.SMEM((stages, CHUNK, D), narrow, transforms=turned),
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
    index = ChunkIndex(spec, 1)
    pl.when(me == 1)(lambda: _fetch(refs, shared, index))

    @pl.when(me == 0)
    def _():
        _compute(refs, shared, index, spec, Matmul(interpret, shared.get("buffer")))


def _fetch(refs: Refs, shared: Refs, index: ChunkIndex) -> None:
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
    D = shared["window_query"].shape[2]
    square = CHUNK, CHUNK
    zero = OpaqueZero(shared["zero"])
    zero.store()
    plgpu.barrier_wait(shared["rows_loaded"])
    if "cos" in refs:
        rotate(shared["window_query"].at[0], refs, index.batch, index.positions)
        plgpu.commit_smem()

    def step(block, total):
        stage = lax.rem(block, jnp.int32(shared["value"].shape[0]))
        plgpu.barrier_wait(shared["block_loaded"].at[stage])
        stage += zero.renew()  # a single stage is as little known to the compiler
        b = matmul(
            lambda: [(shared["window_query"].at[zero.value], shared["window_key"].at[stage].T)],
            square,
        )
        seen = sees(spec, index, block)
        if spec.masked:
            seen &= same_segment(shared["query_segment"], shared["token_segment"].at[stage])
        lse = plgpu.load(shared["lse"], layout=ROW) * LOG2E
        exponent = b * (spec.scale * LOG2E) - by_row(lse, CHUNK)
        p = jnp.exp2(jnp.where(seen, exponent, -jnp.inf))
        dp = matmul(lambda: [(shared["d_out"].at[zero.value], shared["value"].at[stage].T)], square)
        pulled = (p * dp).sum(axis=1)  # kept in shared memory: registers are scarce
        shared["pulled"][...] = plgpu.load(shared["pulled"], layout=ROW) + pulled
        ds = p * (dp - by_row(plgpu.load(shared["delta"], layout=ROW), CHUNK))
        total = matmul(
            lambda: [(ds.astype(jnp.bfloat16), shared["window_key"].at[stage])],
            (CHUNK, D),
            total,
        )
        if spec.masked:
            plgpu.commit_smem()  # who is visible has been read, before a copy takes its place
        plgpu.barrier_arrive(shared["block_read"].at[stage])
        return total

    zeros = plgpu.layout_cast(jnp.zeros((CHUNK, D), jnp.float32), LOGITS)
    shared["pulled"][...] = plgpu.layout_cast(jnp.zeros(CHUNK, jnp.float32), ROW)
    total = lax.fori_loop(0, index.blocks, step, zeros)
    plgpu.commit_smem()  # all have read the queries, whose place their gradient takes
    b, head, d_query = index.batch, index.heads, shared["window_query"].at[0]
    d_query[...] = (total * spec.scale).astype(jnp.bfloat16)
    if "cos" in refs:
        rotate(d_query, refs, b, index.positions, back=True)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(d_query, refs["d_query"].at[b, index.rows, head])
    plgpu.copy_smem_to_gmem(shared["pulled"], refs["pulled"].at[b, head, index.rows])
    plgpu.wait_smem_to_gmem(0)
