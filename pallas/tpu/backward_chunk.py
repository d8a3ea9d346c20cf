"""A chunk of the fused backward, stage by stage.

Symbols as in `spec.py`, S0 the slots at the chunk's start and S_end at its end. With the forward's
factors w_rj = s_j exp(c_r - c_j), of tokens j in the slots of row r:

    a = exp(c) (q SK0^T) + sum_j (q k^T)_rj w_rj     da = exp(c) (d_out SV0^T) + sum_j D_rj w_rj
    ds = scale p (da - delta)                        db = p_b (D - delta)
    A_rj = sum_m p_rm w_rjm                          L_rj = sum_m ds_rm w_rjm

with D = d_out value^T, p the softmax weights of the slots and p_b those of the window. The slot
weight omega = sum p, of gradient d_omega, adds d_omega to da and so to delta; with
spec.pull_slots_only, d_omega (1 - omega) is added to da and nothing to delta.

One map takes q k^T to a and D to da, and its transpose takes ds to L and p to A: each pair is
stacked and goes through one product. The gradients:

    dq = (ds exp(c)) SK0 + L k + rotate_back(db rotated_k)
    dk = L^T q + (s exp(c_C - c)) d_SK + rotate_back(db^T rotated_q)
    dv = P^T d_out + (s exp(c_C - c)) d_SV, with P as in `forward.py`: A, and p_b for the others
    dg_j = x + sum_{r >= j} (R_r - s_r Y_r) - exp(g_j) Y_j

d_SK and d_SV are the gradients of S_end; R_r is the sum over the heads of ds a + p da; Y_j is the
gradient of s_j; x = sum(d_S_end * S_end). dg is a difference of sums that nearly cancel when decays
are strong, so R, Y and x are made of the very operands, rounded, that enter the products: what
cancels in exact arithmetic then cancels here.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas.constants import MASKED_LOGIT
from pallas.tpu.arithmetic import (
    LOG2E,
    apply_feature_map,
    join,
    matmul,
    matmul_nt,
    matmul_tn,
    merge_group,
    overlay,
    pad_columns,
    scaled,
    split_group,
    to_column,
    to_row,
)
from pallas.tpu.chunk_tokens import Refs, read_group, rows_of, segments_of, window_queries
from pallas.tpu.decays import ChunkDecays
from pallas.tpu.gradients import (
    ChunkGradients,
    ChunkStates,
    DecayGradients,
    GridStep,
    add_to_first,
    decay_gradient,
    store_decays,
    store_tokens,
)
from pallas.tpu.masks import Masks
from pallas.tpu.spec import CallSpec


def forward_stages(n: int, step: GridStep) -> Iterator[None]:
    """Emits chunk n's decays and states, which `backward_stages` find in step.states[n]."""
    spec, tokens, dtype = step.spec, step.tokens, step.refs["token_value"].dtype
    C, K = spec.chunk, step.refs["token_key"].shape[2]
    decays = ChunkDecays(tokens.of_chunk("decay", n, spec.entering_tokens), spec, dtype)
    yield
    bare_to_end, total = decays.bare_to_end, jnp.exp2(decays.at_end)
    segments = segments_of(step.refs, tokens, n, spec)
    if segments is not None:
        bare_to_end = segments.where_token_reaches_end(bare_to_end)
        total = segments.where_start_reaches_end(total)
    to_end = (decays.write[:C] * bare_to_end).astype(dtype)
    total = to_column(total)
    key_value = [tokens.of_chunk(name, n, C) for name in ("entering_key", "value")]
    entered = matmul_tn(to_end, jnp.concatenate(key_value, 1))
    yield
    start = step.slots
    start_key, start_value = (x.astype(dtype) for x in (start[:, :K], start[:, K:]))
    end = step.slots = total * start + entered
    step.states[n] = ChunkStates(
        decays, segments, bare_to_end, to_end, total, start_key, start_value, end
    )
    yield


def backward_stages(n: int, step: GridStep) -> Iterator[None]:
    """Emits chunk n's gradients, a stage up to each `yield`."""
    states = step.states[n]
    reads = _read(n, step)
    yield
    logits = _slot_logits(n, step, reads, states)
    yield
    softmax = _softmax(n, step, reads, states, logits)
    yield
    products = _transposed_products(step.spec, reads, states, logits, softmax)
    yield
    gradients, decay_gradients = _gradients(step, reads, states, logits, softmax, products)
    yield
    d_decay = decay_gradient(n, step, states, decay_gradients)
    store_tokens(n, step, gradients)
    store_decays(n, step, d_decay)
    yield


class _Reads(NamedTuple):
    """What a chunk reads, and the products that need nothing else."""

    entering_key: jax.Array  # [entering_tokens, K], after the feature map
    value: jax.Array  # [chunk_tokens, V]
    window_key: jax.Array  # [chunk_tokens, K], rotated
    query: jax.Array  # [G * C, K]
    d_out: jax.Array  # [G * C, V]
    window_query: jax.Array  # [G * C, K], rotated
    slot_query: jax.Array  # [G * C, K], after the feature map
    query_key: jax.Array  # q k^T of the slots' branch, [G, C, entering_tokens] float32
    d_out_value: jax.Array  # D, [G, C, chunk_tokens] float32
    lse: jax.Array  # [G, C, 1] float32


def _read(n: int, step: GridStep) -> _Reads:
    spec, refs, tokens = step.spec, step.refs, step.tokens
    rows, G = rows_of(n, spec), spec.group
    entering_key = tokens.of_chunk("entering_key", n, spec.entering_tokens)
    value = tokens.of_chunk("value", n, spec.chunk_tokens)
    window_key = tokens.of_chunk("window_key", n, spec.chunk_tokens)
    query = read_group(refs["query"], rows, G)
    d_out = read_group(refs["d_out"], rows, G)
    window_query = window_queries(refs, rows, spec)
    slot_query = apply_feature_map(query, spec.feature_map)
    query_key = split_group(matmul_nt(slot_query, entering_key), G)
    d_out_value = split_group(matmul_nt(d_out, value), G)
    lse = _row_column(refs, "lse", rows)
    return _Reads(
        entering_key, value, window_key, query, d_out, window_query, slot_query, query_key,
        d_out_value, lse,
    )  # fmt: skip


class _Logits(NamedTuple):
    """The slots' logits a and their softmax weights' gradients da, with all that they are made of.

    Lists have an entry for each gate block; "a over da" are [2 * G * rows, .], a's rows first.
    """

    masks: Masks
    from_start: jax.Array  # exp(c_r), [C, M] float32
    token_decays: list[jax.Array]  # [the block's tokens, M]
    row_decays: list[jax.Array]  # [the block's rows, M] float32
    block_products: list[jax.Array]  # a over da: q k^T and D, [., the block's tokens]
    block_sums: list[jax.Array]  # a over da, before the row's decay: [., M] float32
    start_a: jax.Array  # q SK0^T, [G, C, M] float32
    start_da: jax.Array  # d_out SV0^T, [G, C, M] float32
    window_product: jax.Array | None  # rotated q k^T, [G, C, chunk_tokens] float32
    a: jax.Array  # [G, C, M] float32
    da: jax.Array  # [G, C, M] float32


def _slot_logits(n: int, step: GridStep, reads: _Reads, states: ChunkStates) -> _Logits:
    spec, decays, segments, G = step.spec, states.decays, states.segments, step.spec.group
    masks = Masks(spec, segments, n, step.index)
    from_start = jnp.exp2(decays.at_rows)
    if segments is not None:
        from_start = segments.where_row_sees_start(from_start)
    blocks = range(len(decays.gate_blocks))
    token_decays = [decays.token_decay(i) for i in blocks]
    row_decays = [decays.row_decay(i) for i in blocks]
    products = [
        jnp.where(masks.entering, x[..., : spec.entering_tokens], 0.0)
        for x in (reads.query_key, reads.d_out_value)
    ]
    block_products = [
        jnp.concatenate([merge_group(x[:, rows, seen]) for x in products], 0).astype(
            reads.value.dtype
        )
        for rows, seen in zip(decays.gate_blocks, decays.block_tokens, strict=True)
    ]
    start_a = split_group(matmul_nt(reads.slot_query, states.start_key), G)
    start_da = split_group(matmul_nt(reads.d_out, states.start_value), G)
    block_sums = [matmul(x, w) for x, w in zip(block_products, token_decays, strict=True)]
    window_product = None
    if spec.has_window:
        window_product = split_group(matmul_nt(reads.window_query, reads.window_key), G)
    half = G * decays.gate_blocks[0].stop
    a, da = (
        start_product * from_start[None]
        + join([
            split_group(sums[part], G) * row_decay[None]
            for sums, row_decay in zip(block_sums, row_decays, strict=True)
        ], 1)
        for start_product, part in ((start_a, slice(0, half)), (start_da, slice(half, None)))
    )  # fmt: skip
    return _Logits(
        masks, from_start, token_decays, row_decays, block_products, block_sums, start_a,
        start_da, window_product, a, da,
    )  # fmt: skip


class _Softmax(NamedTuple):
    """The softmax weights and the logits' gradients, as operands of the products to come."""

    window_p: jax.Array | None  # p_b, [G, C, chunk_tokens] float32
    db: jax.Array | None  # [G * C, chunk_tokens]
    start_ds: jax.Array  # ds exp(c), [G * C, M]
    start_p: jax.Array  # p exp(c), [G * C, M]
    block_ds_p: list[jax.Array]  # for each gate block: ds over p, times the row's decay


def _softmax(
    n: int, step: GridStep, reads: _Reads, states: ChunkStates, logits: _Logits
) -> _Softmax:
    spec, refs, rows, dtype = step.spec, step.refs, rows_of(n, step.spec), reads.value.dtype
    da, d_out_value = logits.da, reads.d_out_value
    a = logits.masks.slot_logits(logits.a * (spec.scale * LOG2E))
    slot_p = jnp.exp2(a - reads.lse)
    d_slot_weight = _row_column(refs, "d_slot_weight", rows) if spec.slot_weight else 0.0
    window_p = db = None
    if logits.window_product is not None:
        b = scaled(logits.window_product, spec.window_scale)
        window_p = jnp.exp2(jnp.where(logits.masks.window, b, MASKED_LOGIT) - reads.lse)
    if spec.wide_window:
        delta = _row_column(refs, "delta", rows)
    else:
        window_term = None if window_p is None else window_p * d_out_value
        slot_term = slot_p * (da if spec.pull_slots_only else da + d_slot_weight)
        delta = jnp.sum(overlay(jnp.add, slot_term, window_term, 0.0), -1, keepdims=True)
    ds = slot_p * ((da + (d_slot_weight - delta)) * spec.scale)
    if window_p is not None:
        d_logits = window_p * ((d_out_value - delta) * spec.window_slope)
        db = merge_group(d_logits).astype(dtype)
    start_ds, start_p = (
        merge_group(x * logits.from_start[None]).astype(dtype) for x in (ds, slot_p)
    )
    block_ds_p = [
        jnp.concatenate(
            [merge_group(x[:, block] * row_decay[None]) for x in (ds, slot_p)], 0
        ).astype(dtype)
        for block, row_decay in zip(states.decays.gate_blocks, logits.row_decays, strict=True)
    ]
    return _Softmax(window_p, db, start_ds, start_p, block_ds_p)


class _Products(NamedTuple):
    """What the logits' gradients and softmax weights give back, but for the tokens' gradients."""

    d_at_rows: jax.Array  # R, [C, M] float32
    d_query_key: jax.Array  # L, [G * C, entering_tokens]
    token_p: jax.Array  # P, [G * C, chunk_tokens]
    d_token_decays: list[jax.Array]  # for each gate block, [its tokens, M] float32
    d_start: jax.Array  # of the slots at the chunk's start, [M, K + V] float32
    d_window_query: jax.Array | None  # [G, C, K] float32
    d_window_key: jax.Array | None  # [chunk_tokens, K] float32


def _transposed_products(
    spec: CallSpec, reads: _Reads, states: ChunkStates, logits: _Logits, softmax: _Softmax
) -> _Products:
    G, dtype = spec.group, reads.value.dtype
    half = G * states.decays.gate_blocks[0].stop
    d_at_rows = _row_decay_gradient(G, logits, softmax)
    gathered = [
        matmul_nt(x, w) for x, w in zip(softmax.block_ds_p, logits.token_decays, strict=True)
    ]
    d_query_key = join(
        [pad_columns(split_group(x[:half], G), spec.entering_tokens) for x in gathered], 1
    )
    d_query_key = merge_group(jnp.where(logits.masks.entering, d_query_key, 0.0)).astype(dtype)
    slot_token_p = join(
        [pad_columns(split_group(x[half:], G), spec.chunk_tokens) for x in gathered], 1
    )
    window_p = 0.0 if softmax.window_p is None else softmax.window_p
    token_p = merge_group(jnp.where(logits.masks.slots, slot_token_p, window_p)).astype(dtype)
    d_token_decays = [
        matmul_tn(x, y) for x, y in zip(logits.block_products, softmax.block_ds_p, strict=True)
    ]
    d_start = jnp.concatenate(
        [matmul_tn(softmax.start_ds, reads.slot_query), matmul_tn(softmax.start_p, reads.d_out)], 1
    )
    d_window_query = d_window_key = None
    if softmax.db is not None:
        d_window_query = split_group(matmul(softmax.db, reads.window_key), G)
        d_window_key = matmul_tn(softmax.db, reads.window_query)
    return _Products(
        d_at_rows, d_query_key, token_p, d_token_decays, d_start, d_window_query, d_window_key
    )


def _row_decay_gradient(G: int, logits: _Logits, softmax: _Softmax) -> jax.Array:
    """The gradient R of c at the rows, [C, M]."""
    within_chunk = [
        jnp.sum((ds_p.astype(jnp.float32) * sums).reshape(2 * G, -1, sums.shape[1]), 0)
        for ds_p, sums in zip(softmax.block_ds_p, logits.block_sums, strict=True)
    ]
    through_start = (
        split_group(softmax.start_ds.astype(jnp.float32), G) * logits.start_a
        + split_group(softmax.start_p.astype(jnp.float32), G) * logits.start_da
    )
    return join(within_chunk, 0) + jnp.sum(through_start, 0)


def _gradients(
    step: GridStep,
    reads: _Reads,
    states: ChunkStates,
    logits: _Logits,
    softmax: _Softmax,
    products: _Products,
) -> tuple[ChunkGradients, DecayGradients]:
    """Takes the gradient of the slots at the chunk's end from `step`, leaves that of its start."""
    spec, dtype, later = step.spec, reads.value.dtype, step.later
    C, K = spec.chunk, reads.entering_key.shape[1]
    d_end = later["d_slots"]
    d_end_key, d_end_value = (x.astype(dtype) for x in (d_end[:, :K], d_end[:, K:]))
    d_end_operand = jnp.concatenate([d_end_key, d_end_value], 1)
    d_at_end = jnp.sum(d_end_operand.astype(jnp.float32) * states.end, -1, keepdims=True)
    d_at_end = to_row(d_at_end)[None]  # [1, M]
    later["d_slots"] = states.total * d_end + products.d_start

    d_query = matmul(softmax.start_ds, states.start_key)
    d_query += matmul(products.d_query_key, reads.entering_key)
    d_query = split_group(d_query, spec.group)
    through_end = matmul(states.to_end, d_end_operand)  # [C, K + V]
    d_key = matmul_tn(products.d_query_key, reads.slot_query)
    d_value = matmul_tn(products.token_p, reads.d_out)
    d_key, d_value = (
        add_to_first(x, y) for x, y in ((d_key, through_end[:, :K]), (d_value, through_end[:, K:]))
    )
    d_to_end = matmul_nt(reads.entering_key[:C], d_end_key)
    d_to_end += matmul_nt(reads.value[:C], d_end_value)
    return (
        ChunkGradients(
            reads.query, d_query, d_key, d_value, products.d_window_query, products.d_window_key
        ),
        DecayGradients(
            products.d_at_rows, logits.token_decays, products.d_token_decays, d_to_end, d_at_end
        ),
    )


def _row_column(refs: Refs, name: str, rows: slice) -> jax.Array:
    """Reads the chunk's rows of [1, 1, G, step rows] as columns [G, C, 1]."""
    return to_column(refs[name][0, 0, :, rows][:, None, :])
