"""The gradients of the tokens that enter the slots, and of their decays.

With symbols as in `spec.py` and `decays.py`, f_j the token's decay (token_decay), x and y its
key and value, S0 the slots at the chunk's start, dS the gradient of those at its end,
wS = s_j exp(c_C - c_j), and of a query head the rows' ds' = ds row_decay and p' = p row_decay
(`slot_query_gradients`), each with the c_ref of the row's gate block:

    L_rj = sum_m ds'_rm f_jm,  A_rj = sum_m p'_rm f_jm       j <= r, f by the row's block
    dx = sum_g L^T q + wS dSK,  dy = sum_g A^T do + wS dSV

The keys and the values are two sides of one arithmetic. With X = q k^T, or do v^T, the gradient of
the decay of token j, in parts that are summed over the sides and the heads of the group:

    row_sum_r = ds'_r (sum_j X_rj f_j + exp(c_ref) q_r . S0)
    sY_j = f_j sum_r X_rj ds'_r,  Y_j = sY_j / s_j,  E_j = k_j . dSK + v_j . dSV
    dg_j = sum_{r >= j} (row_sum_r - sY_r) - e_j Y_j                          inside the chunk
           + total (S0 . dS) + sum_{i < j} wS_i E_i - e_j (wS_j / s_j) E_j          to its end

The first sum nearly cancels where decays are strong, so both its terms are made of the very
operands, rounded, that enter the products. No term of the second does. Where nothing decays s is 0,
and Y is needed all the same: 2^-60 stands for s, in f and wS too, which no result can tell from 0.
The kernel reads e / s, and makes s of it.

A block works on up to 64 slots of a chunk. Where they are all, what the window's kernel found of dx
and dy is added here, in its place; else a block returns its share, and all are summed outside. It
has two warpgroups, as more would leave each too few registers: one finds dx, dy and
the products of dg's second line, and fetches what both read, the other dg. Both in one kernel read
the rows once; with K = V = 128, M = 64 and G = 1 it moves 224 KB a chunk and head, and two kernels
would move 360; with K = V = 256 it moves 384. There the rows of one head are all that fits beside
the tokens and the states, so that no head is fetched while another is worked on. With half of the
slots to a block two would fit, but dx and dy would go out twice, to be summed, with 640 KB in all.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.gpu.backward.decay_grads import DecayGrads
from pallas.gpu.backward.slot_worker import SIDES
from pallas.gpu.backward.token_grads import TokenGrads
from pallas.gpu.block_sizes import BlockSizes
from pallas.gpu.forward.gates import Gates
from pallas.gpu.spec import ALIGNED, CHUNK, GATE_BLOCKS, GATE_ROWS, CallSpec, Segments, tile
from pallas.gpu.warpgroup.addresses import ZERO
from pallas.gpu.warpgroup.launch import SHARED_MEMORY, Refs, launch, size_of
from pallas.gpu.warpgroup.matmul import Matmul

MOST_SLOTS = 64  # of a block


class SlotTokenGradients(NamedTuple):
    """Gradients."""

    key: jax.Array  # [B, Tk, Hkv, D] bfloat16, with the window's, where that is given
    value: jax.Array
    log_decay: jax.Array  # [B, Tq, Hkv, M] float32, by its rows; 0 for tokens that do not enter


def slot_token_gradients(
    query: jax.Array,
    d_out: jax.Array,
    key: jax.Array,
    value: jax.Array,
    logits: jax.Array,
    weights: jax.Array,
    gates: Gates,
    starts: tuple[jax.Array, jax.Array],
    d_ends: tuple[jax.Array, jax.Array],
    segments: Segments | None,
    window_gradients: Mapping[str, jax.Array],
    *,
    spec: CallSpec,
    block_sizes: BlockSizes,
    interpret: Any = False,
) -> SlotTokenGradients:
    """The kernel's call.

    query, d_out: [B, Tq, Hq, D] bfloat16. key, value: [B, Tk, Hkv, D] bfloat16, as for the output
    pass. logits, weights: ds' and p', [B, Tq, Hq, M] bfloat16. starts, d_ends: of keys and
    values, [B, Hkv, Tq / C, D, M] bfloat16, the slots at the chunks' starts and the gradients of
    those at their ends. window_gradients: what is added to the gradients of the "key" and of
    the "value", [B, Tk, Hkv, D] bfloat16, as it is; what is not there is not added.
    interpret: as for `fused_attention`.
    """
    B, Tq, _, D = query.shape
    Hkv, M = gates.cumulative.shape[2:]
    width = min(M, MOST_SLOTS)
    panels, masked = M // width, segments is not None
    updated = {f"d_{side}": x[None] for side, x in window_gradients.items() if panels == 1}
    added = tuple(f"d_{side}" in updated for side in SIDES)
    items = 2 * spec.group + sum(added)
    stages = min(block_sizes.token_stages, items, _most_stages(D, width, masked))
    inputs = {
        "query": query, "d_out": d_out, "key": key, "value": value,
        "logits": logits, "weights": weights,
        "cumulative": gates.cumulative,
        "to_end": gates.to_end, "total": gates.total, "odds": gates.odds,
        "start_key": starts[0], "start_value": starts[1],
        "d_end_key": d_ends[0], "d_end_value": d_ends[1],
    }  # fmt: skip
    if segments is not None:
        inputs |= segments.arrays(slots=True)
    share = jax.ShapeDtypeStruct((panels, B, Tq, Hkv, D), jnp.bfloat16)
    outputs = {x: share for x in ("d_key", "d_value") if x not in updated}
    outputs["d_log_decay"] = jax.ShapeDtypeStruct((B, Tq, Hkv, M), jnp.float32)
    results = launch(
        functools.partial(_kernel, spec=spec, added=added, interpret=bool(interpret)),
        inputs,
        outputs,
        _scratch(stages, D, width, masked, interpret=bool(interpret)),
        grid={"chunk": Tq // CHUNK, "panel": Hkv * panels, "batch": B},
        warpgroups=2,
        name="nha_slot_tokens",
        interpret=interpret,
        updated=updated,
    )
    grads = dict(zip([*outputs, *updated], results, strict=True))
    if panels > 1:
        rest = {f"d_{side}": x for side, x in window_gradients.items()}
        grads |= {x: _sum_shares(grads[x], rest.get(x)) for x in ("d_key", "d_value")}
    return SlotTokenGradients(
        _with_rows(grads["d_key"][0], key.shape[1]),
        _with_rows(grads["d_value"][0], key.shape[1]),
        grads["d_log_decay"],
    )


def _sum_shares(shares: jax.Array, window_grad: jax.Array | None) -> jax.Array:
    """[panels, B, Tq, Hkv, D] -> [1, B, Tq or Tk, Hkv, D]."""
    total = shares.sum(0, dtype=jnp.float32)
    if window_grad is not None:
        total = _with_rows(total, window_grad.shape[1]) + window_grad
    return total.astype(shares.dtype)[None]


def _with_rows(x: jax.Array, rows: int) -> jax.Array:
    """[B, Tq, Hkv, D] with zeros after, which the slots do not reach."""
    return jnp.pad(x, ((0, 0), (0, rows - x.shape[1]), (0, 0), (0, 0)))


def _most_stages(D: int, width: int, masked: bool) -> int:
    """How many heads' rows fit in shared memory."""
    one, two = (size_of(_scratch(x, D, width, masked, interpret=False)) for x in (1, 2))
    return 1 + (SHARED_MEMORY - one) // (two - one)


def _scratch(stages: int, D: int, width: int, masked: bool, *, interpret: bool) -> dict[str, Any]:
    narrow, wide = jnp.bfloat16, jnp.float32

    def tiled(*shape):
        return plgpu.SMEM(shape, narrow, transforms=tile(GATE_ROWS))

    scratch = {
        "rows": tiled(stages, CHUNK, D),  # q, do, or what is added to dx or dy
        "row_weights": tiled(stages, CHUNK, width),
        "item_loaded": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "item_read": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "tokens": tiled(1, CHUNK, D),
        "slots": tiled(1, D, width),
        "d_slots": tiled(1, D, width),
        "side_loaded": plgpu.Barrier(num_arrivals=3),
        "side_read": plgpu.Barrier(num_arrivals=1),
        "cumulative": plgpu.SMEM((CHUNK, width), wide, transforms=tile(width, 4)),  # then wS E
        "row_sums": plgpu.SMEM((CHUNK, width), wide, transforms=tile(width, 4)),
        "references": plgpu.SMEM((GATE_BLOCKS, max(width, ALIGNED)), wide),
        "total": plgpu.SMEM((width,), wide),
        "to_end": tiled(1, CHUNK, width),
        "odds": tiled(CHUNK, width),
        "gates_loaded": plgpu.Barrier(num_arrivals=4 + GATE_BLOCKS + 3 * masked),
        "token_decays": tiled(GATE_BLOCKS, CHUNK, width),
        "token_decays_ready": plgpu.Barrier(num_arrivals=2),
        "d_total": plgpu.SMEM((width,), wide),  # S0 . dS
        "zero": ZERO,
        "ends_ready": plgpu.Barrier(num_arrivals=1),
    }
    if masked:
        scratch |= {
            x: plgpu.SMEM((CHUNK,), jnp.int32)
            for x in ("query_segment", "token_segment", "slot_access")
        }
    if interpret:
        scratch["buffer"] = plgpu.SMEM((2, CHUNK, CHUNK), narrow)
    return scratch


def _kernel(
    refs: Refs, shared: Refs, *, spec: CallSpec, added: tuple[bool, ...], interpret: bool
) -> None:
    for me, worker in enumerate((TokenGrads, DecayGrads)):

        @pl.when(lax.axis_index("wg") == me)
        def _(me=me, worker=worker):
            matmul = Matmul(interpret, shared["buffer"].at[me] if interpret else None)
            worker(refs, shared, spec, matmul, added).run()
