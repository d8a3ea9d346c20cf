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
from pallas.gpu.forward.gates import LOG2E
from pallas.gpu.forward.output_pass import Facts
from pallas.gpu.spec import CHUNK, COLUMN, LOGITS, ROW, Spec, tile
from pallas.gpu.warpgroup.addresses import ZERO, store_zero
from pallas.gpu.warpgroup.launch import Refs, check_shared_memory, launch
from pallas.gpu.warpgroup.masks import by_column, by_row, in_window, iota
from pallas.gpu.warpgroup.matmul import Matmul
from pallas.gpu.warpgroup.pipeline import fetch_ahead
from pallas.gpu.warpgroup.place import Place
from pallas.gpu.warpgroup.rotation import Rotation, arrival, halves_tile, rotate, rotate_copied


class WindowQueries(NamedTuple):
    query: jax.Array  # [B, N, H * G, D] bfloat16, the gradient of window_query
    pulled: jax.Array  # [B, H * G, N] float32


def window_queries(
    window_query: jax.Array,
    window_key: jax.Array,
    value: jax.Array,
    out_grad: jax.Array,
    log_mass: jax.Array,
    delta: jax.Array,
    facts: Facts | None,
    rotation: Rotation | None,
    *,
    spec: Spec,
    block_sizes: BlockSizes,
    interpret: Any = False,
) -> WindowQueries:
    """The kernel's call.

    window_query, out_grad: [B, N, H * G, D] bfloat16. window_key, value: [B, P, H, D] bfloat16.
    log_mass, of base e, and delta, the sum over what a row sees of p times its gradient:
    [B, H * G, N] float32. facts: with spec.masked. rotation: of window_query and window_key, which
    their gradients are rotated back by; None: they are rotated, and so are their gradients.
    interpret: as for `fused_attention`.

    Raises:
      ValueError: block_sizes.window_stages of them do not fit.
    """
    B, N, heads, D = window_query.shape
    arrays = window_query, window_key, value, out_grad, log_mass, delta
    modes = {"rotates": rotation is not None, "interpret": bool(interpret)}
    result = launch(
        functools.partial(_kernel, spec=spec, interpret=bool(interpret)),
        window_inputs(*arrays, facts, rotation),
        {
            "query_grad": jax.ShapeDtypeStruct((B, N, heads, D), jnp.bfloat16),
            "pulled": jax.ShapeDtypeStruct((B, heads, N), jnp.float32),
        },
        _scratch(spec, block_sizes.window_stages, D, **modes),
        grid={"chunk": N // CHUNK, "heads": heads, "batch": B},
        warpgroups=2,
        name="nha_window_queries",
        interpret=interpret,
    )
    return WindowQueries(*result)


def window_inputs(
    window_query: jax.Array,
    window_key: jax.Array,
    value: jax.Array,
    out_grad: jax.Array,
    log_mass: jax.Array,
    delta: jax.Array,
    facts: Facts | None,
    rotation: Rotation | None,
) -> dict[str, jax.Array]:
    """By name; what `window_tokens` reads as well."""
    inputs = {"window_query": window_query, "window_key": window_key, "value": value}
    inputs |= {"out_grad": out_grad, "log_mass": log_mass, "delta": delta}
    if facts is not None:
        inputs |= {"query_run": facts.query, "visible": facts.visible}
    if rotation is not None:
        inputs |= rotation._asdict()
    return inputs


def _scratch(spec: Spec, stages: int, D: int, *, rotates: bool, interpret: bool) -> Refs:
    narrow, wide = jnp.bfloat16, jnp.float32
    tiles = tile(D)
    turned = halves_tile(D) if rotates else tiles
    scratch = {
        "window_query": plgpu.SMEM((1, CHUNK, D), narrow, transforms=turned),  # then its gradient
        "out_grad": plgpu.SMEM((1, CHUNK, D), narrow, transforms=tiles),
        "log_mass": plgpu.SMEM((CHUNK,), wide),
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
        scratch["query_run"] = plgpu.SMEM((CHUNK,), jnp.int32)
        scratch["visible"] = plgpu.SMEM((stages, CHUNK), jnp.int32)
    check_shared_memory(scratch, "window_stages", stages)
    if interpret:
        scratch["buffer"] = plgpu.SMEM((CHUNK, CHUNK), narrow)
    return scratch


def _kernel(refs: Refs, shared: Refs, *, spec: Spec, interpret: bool) -> None:
    me = lax.axis_index("wg")
    place = Place(spec, 1)
    pl.when(me == 1)(lambda: _fetch(refs, shared, place))

    @pl.when(me == 0)
    def _():
        _compute(refs, shared, place, spec, Matmul(interpret, shared.get("buffer")))


def _fetch(refs: Refs, shared: Refs, place: Place) -> None:
    b, h = place.batch, place.heads
    own = {name: refs[name].at[b, place.rows, h] for name in ("window_query", "out_grad")}
    own |= {name: refs[name].at[b, h, place.rows] for name in ("log_mass", "delta")}
    if "query_run" in shared:
        own["query_run"] = refs["query_run"].at[b, place.rows]
    for name, source in own.items():
        target = shared[name].at[0] if len(shared[name].shape) == 3 else shared[name]
        plgpu.copy_gmem_to_smem(source, target, shared["rows_loaded"])

    loaded = shared["block_loaded"]

    def fetch(block, stage):
        rows = place.token_rows(block)
        tokens = {name: refs[name].at[b, rows, place.kv_head] for name in ("window_key", "value")}
        if "visible" in shared:
            tokens["visible"] = refs["visible"].at[b, rows]
        for name, source in tokens.items():
            copied = arrival(shared, name, loaded).at[stage]
            plgpu.copy_gmem_to_smem(source, shared[name].at[stage], copied)

    def rotate_key(block, stage):
        rotate_copied(refs, shared, "window_key", stage, b, place.token_rows(block), loaded)

    fetch_ahead(place.blocks, shared["block_read"], fetch, rotate_key)


def _compute(refs: Refs, shared: Refs, place: Place, spec: Spec, matmul: Matmul) -> None:
    D = shared["window_query"].shape[2]
    square = CHUNK, CHUNK
    store_zero(shared["zero"])
    plgpu.barrier_wait(shared["rows_loaded"])
    if "cos" in refs:
        rotate(shared["window_query"].at[0], refs, place.batch, place.positions)
        plgpu.commit_smem()

    def step(block, total):
        stage = lax.rem(block, jnp.int32(shared["value"].shape[0]))
        plgpu.barrier_wait(shared["block_loaded"].at[stage])
        zero = shared["zero"][0]
        stage += zero  # a single stage is as little known to the compiler
        b = matmul(
            lambda: [(shared["window_query"].at[zero], shared["window_key"].at[stage].T)], square
        )
        row = iota(CHUNK, 0) + place.first_row
        token = iota(CHUNK, 1) + (place.first_token + block * CHUNK)
        seen = in_window(spec, row, token)
        if spec.masked:
            run = plgpu.load(shared["query_run"], layout=ROW)
            visible = plgpu.load(shared["visible"].at[stage], layout=COLUMN)
            seen &= by_row(run, CHUNK) == by_column(visible)
        log_mass = plgpu.load(shared["log_mass"], layout=ROW) * LOG2E
        exponent = b * (spec.scale * LOG2E) - by_row(log_mass, CHUNK)
        p = jnp.exp2(jnp.where(seen, exponent, -jnp.inf))
        dp = matmul(lambda: [(shared["out_grad"].at[zero], shared["value"].at[stage].T)], square)
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
    total = lax.fori_loop(0, place.blocks, step, zeros)
    plgpu.commit_smem()  # all have read the queries, whose place their gradient takes
    b, head, query_grad = place.batch, place.heads, shared["window_query"].at[0]
    query_grad[...] = (total * spec.scale).astype(jnp.bfloat16)
    if "cos" in refs:
        rotate(query_grad, refs, b, place.positions, back=True)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(query_grad, refs["query_grad"].at[b, place.rows, head])
    plgpu.copy_smem_to_gmem(shared["pulled"], refs["pulled"].at[b, head, place.rows])
    plgpu.wait_smem_to_gmem(0)
