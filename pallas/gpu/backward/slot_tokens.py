"""The gradients of the tokens that enter the slots, and of their decays.

With symbols as in `spec.py` and `in_chunk.py`, f_j the token's fall, x and y its key and value, S0
the slots at the chunk's start, dS the gradient of those at its end, wS = s_j exp(G_C - G_j), and of
a query head the rows' ds' = ds rise and p' = p rise (`slot_queries`), the rise from the reference
G' of the row's block:

    L_rj = sum_m ds'_rm f_jm,  A_rj = sum_m p'_rm f_jm       j <= r, f by the row's block
    dx = sum_g L^T q + wS dSK,  dy = sum_g A^T do + wS dSV

The keys and the values are two sides of one arithmetic. With X = q k^T, or do v^T, the gradient of
the decay of token j, in parts that are summed over the sides and the heads of the group:

    R_r = ds'_r (sum_j X_rj f_j + exp(G') q_r . S0)
    sY_j = f_j sum_r X_rj ds'_r,  Y_j = sY_j / s_j,  E_j = k_j . dSK + v_j . dSV
    dg_j = sum_{r >= j} (R_r - sY_r) - e_j Y_j                          inside the chunk
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
from pallas.gpu.forward.output_pass import Facts
from pallas.gpu.spec import ALIGNED, CHUNK, GATE_BLOCKS, GATE_ROWS, Spec, tile
from pallas.gpu.warpgroup.addresses import ZERO
from pallas.gpu.warpgroup.launch import SHARED_MEMORY, Refs, launch, size_of
from pallas.gpu.warpgroup.matmul import Matmul

MOST_SLOTS = 64  # of a block


class SlotTokens(NamedTuple):
    """Gradients."""

    key: jax.Array  # [B, P, H, D] bfloat16, with the window's, where that is given
    value: jax.Array
    log_decay: jax.Array  # [B, N, H, M] float32, by its rows; 0 for tokens that do not enter


def slot_tokens(
    query: jax.Array,
    out_grad: jax.Array,
    key: jax.Array,
    value: jax.Array,
    logits: jax.Array,
    weights: jax.Array,
    gates: Gates,
    starts: tuple[jax.Array, jax.Array],
    end_grads: tuple[jax.Array, jax.Array],
    facts: Facts | None,
    window_grads: Mapping[str, jax.Array],
    *,
    spec: Spec,
    block_sizes: BlockSizes,
    interpret: Any = False,
) -> SlotTokens:
    """The kernel's call.

    query, out_grad: [B, N, H * G, D] bfloat16. key, value: [B, P, H, D] bfloat16, as for the output
    pass. logits, weights: ds' and p', [B, N, H * G, M] bfloat16. starts, end_grads: of keys and
    values, [B, H, N / C, D, M] bfloat16, the slots at the chunks' starts and the gradients of those
    at their ends. window_grads: what is added to the gradients of the "key" and of the "value",
    [B, P, H, D] bfloat16, as it is; what is not there is not added.
    interpret: as for `fused_attention`.
    """
    B, N, _, D = query.shape
    H, M = gates.cumulative.shape[2:]
    width = min(M, MOST_SLOTS)
    panels, masked = M // width, facts is not None
    updated = {f"{side}_grad": x[None] for side, x in window_grads.items() if panels == 1}
    added = tuple(f"{side}_grad" in updated for side in SIDES)
    items = 2 * spec.group + sum(added)
    stages = min(block_sizes.token_stages, items, _most_stages(D, width, masked))
    inputs = {
        "query": query, "out_grad": out_grad, "key": key, "value": value,
        "logits": logits, "weights": weights,
        "cumulative": gates.cumulative,
        "to_end": gates.to_end, "total": gates.total, "odds": gates.odds,
        "start_key": starts[0], "start_value": starts[1],
        "end_key": end_grads[0], "end_value": end_grads[1],
    }  # fmt: skip
    if facts is not None:
        assert facts.reads is not None  # there are slots
        inputs |= {"query_run": facts.query, "visible": facts.visible, "reads": facts.reads}
    share = jax.ShapeDtypeStruct((panels, B, N, H, D), jnp.bfloat16)
    outputs = {x: share for x in ("key_grad", "value_grad") if x not in updated}
    outputs["decay_grad"] = jax.ShapeDtypeStruct((B, N, H, M), jnp.float32)
    results = launch(
        functools.partial(_kernel, spec=spec, added=added, interpret=bool(interpret)),
        inputs,
        outputs,
        _scratch(stages, D, width, masked, interpret=bool(interpret)),
        grid={"chunk": N // CHUNK, "panel": H * panels, "batch": B},
        warpgroups=2,
        name="nha_slot_tokens",
        interpret=interpret,
        updated=updated,
    )
    grads = dict(zip([*outputs, *updated], results, strict=True))
    if panels > 1:
        rest = {f"{side}_grad": x for side, x in window_grads.items()}
        grads |= {x: _sum_shares(grads[x], rest.get(x)) for x in ("key_grad", "value_grad")}
    return SlotTokens(
        _with_rows(grads["key_grad"][0], key.shape[1]),
        _with_rows(grads["value_grad"][0], key.shape[1]),
        grads["decay_grad"],
    )


def _sum_shares(shares: jax.Array, window_grad: jax.Array | None) -> jax.Array:
    """[panels, B, N, H, D] -> [1, B, N or P, H, D]."""
    total = shares.sum(0, dtype=jnp.float32)
    if window_grad is not None:
        total = _with_rows(total, window_grad.shape[1]) + window_grad
    return total.astype(shares.dtype)[None]


def _with_rows(x: jax.Array, rows: int) -> jax.Array:
    """[B, N, H, D] with zeros after, which the slots do not reach."""
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
        "rise": tiled(stages, CHUNK, width),
        "item_loaded": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "item_read": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "tokens": tiled(1, CHUNK, D),
        "slots": tiled(1, D, width),
        "slot_grads": tiled(1, D, width),
        "side_loaded": plgpu.Barrier(num_arrivals=3),
        "side_read": plgpu.Barrier(num_arrivals=1),
        "cumulative": plgpu.SMEM((CHUNK, width), wide, transforms=tile(width, 4)),  # then wS E
        "row_sums": plgpu.SMEM((CHUNK, width), wide, transforms=tile(width, 4)),  # R
        "references": plgpu.SMEM((GATE_BLOCKS, max(width, ALIGNED)), wide),
        "total": plgpu.SMEM((width,), wide),
        "to_end": tiled(1, CHUNK, width),
        "odds": tiled(CHUNK, width),
        "gates_loaded": plgpu.Barrier(num_arrivals=4 + GATE_BLOCKS + 3 * masked),
        "falls": tiled(GATE_BLOCKS, CHUNK, width),
        "falls_ready": plgpu.Barrier(num_arrivals=2),
        "through": plgpu.SMEM((width,), wide),  # S0 . dS
        "zero": ZERO,
        "ends_ready": plgpu.Barrier(num_arrivals=1),
    }
    if masked:
        scratch |= {x: plgpu.SMEM((CHUNK,), jnp.int32) for x in ("query_run", "visible", "reads")}
    if interpret:
        scratch["buffer"] = plgpu.SMEM((2, CHUNK, CHUNK), narrow)
    return scratch


def _kernel(
    refs: Refs, shared: Refs, *, spec: Spec, added: tuple[bool, ...], interpret: bool
) -> None:
    for me, worker in enumerate((TokenGrads, DecayGrads)):

        @pl.when(lax.axis_index("wg") == me)
        def _(me=me, worker=worker):
            matmul = Matmul(interpret, shared["buffer"].at[me] if interpret else None)
            worker(refs, shared, spec, matmul, added).run()
