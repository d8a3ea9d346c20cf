"""The fused forward kernel: slots, window, rotation and one softmax in one pass over the rows.

Inputs (symbols as in `spec.py`, blocks in `grid.py`; `token_` arrays are of the tokens that chunks
read: the rows' own or, of a wide window, those that enter the slots at the rows). bfloat16 or
float32, where it does not say float32:

    query              [B, T, Hq K]
    token_key          [B, T, Hkv K]
    token_value        [B, T, Hkv V]
    token_log_decay    [B, Hkv, M, T] float32
    rotated_query      as query              with spec.rotated
    token_rotated_key  as token_key          with spec.rotated
    rope_table         [1 or B, T, K2]       with spec.rope; float32, `expand_table` of the rotation
                                             times the root of scale * log2(e)
    token_rope_table   as rope_table         with spec.rope and spec.wide_window: for the tokens
    row_segments       [B, 8, T]             with spec.segments; float32, of `pack_row_segments`
    chunk_segments     [B, T / C, 256 + chunk_tokens]  likewise, of `pack_chunk_segments`
    slots              [B, Hkv, M, K + V]    with spec.state; float32, the slots at the start

Outputs, all but out float32:

    out                [B, T, Hq V]
    lse                [B, Hkv, G, T]        in units of log 2
    slot_weight        [B, Hkv, G, T]        with spec.slot_weight
    end                [B, Hkv, M, K + V]    with spec.state: the slots at the end
    starts             [B, Hkv, steps, M, K + V]     with save: the slots at each step's start

Scratch, for each of the heads that take turns: the slots, and the halo of the next step in all
forms of `StepTokens`. Grid steps run from the first rows to the last.

What a chunk computes, for row r, token i and slot m, with S0 the slots at its start:

    a_r = exp(c_r) (q_r . SK0) + sum_{i <= r + halo_padding} (q_r . k_i) s_i exp(c_r - c_i)
    o_r = (p_r exp(c_r)) SV0 + sum_i P_ri v_i
    P_ri = sum_m p_rm s_im exp(c_rm - c_im) for tokens in the slots, the window's p for the others
    S_end = exp(c_C) S0 + sum_{i < C} s_i exp(c_C - c_i) [k_i v_i]
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

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
from pallas.tpu.chunk_tokens import (
    Refs,
    StepTokens,
    own_tokens,
    read_group,
    rows_of,
    segments_of,
    window_queries,
    write_group,
)
from pallas.tpu.decays import ChunkDecays
from pallas.tpu.emission import emit
from pallas.tpu.grid import Grid
from pallas.tpu.launch import Arrays, Blocks, Output, launch
from pallas.tpu.masks import Masks
from pallas.tpu.segments import Segments
from pallas.tpu.spec import CallSpec


def forward(
    inputs: Arrays, spec: CallSpec, *, lockstep: int, skew: int, save: bool, interpret: bool
) -> Arrays:
    """Launches the kernel; inputs and outputs by name as in this module's docstring.

    lockstep, skew: of `emit`. save: return the starts, which the backward needs.
    """
    return launch(
        functools.partial(_kernel, spec=spec, lockstep=lockstep, skew=skew),
        forward_blocks(inputs, spec, save=save),
        name="nha_forward",
        grid=Grid.of(inputs, spec).shape,
        parallel=2,
        interpret=interpret,
    )


def forward_blocks(inputs: Arrays, spec: CallSpec, *, save: bool) -> Blocks:
    """Returns what a grid step has in VMEM; of the inputs, only shapes and dtypes are read."""
    grid = Grid.of(inputs, spec)
    B, Hkv, T, K, V, M = grid.B, grid.Hkv, grid.T, grid.K, grid.V, grid.M
    dtype, float32 = inputs["query"].dtype, jnp.float32
    outputs = {
        "out": Output((B, T, Hkv * spec.group * V), dtype, grid.tokens(spec.group * V)),
        "lse": Output((B, Hkv, spec.group, T), float32, grid.lanes(spec.group)),
    }
    if spec.slot_weight:
        outputs["slot_weight"] = outputs["lse"]
    if spec.state:
        outputs["end"] = Output((B, Hkv, M, K + V), float32, grid.slots())
    if save:
        outputs["starts"] = Output((B, Hkv, grid.steps, M, K + V), float32, grid.starts())
    scratch = {"slots": pltpu.VMEM((grid.heads, M, K + V), float32)}
    if spec.halo:
        scratch |= {
            name: pltpu.VMEM((grid.heads, spec.halo, size), kind)
            for name, size, kind in (
                ("entering_key", K, dtype), ("window_key", K, dtype), ("value", V, dtype),
                ("decay", M, float32),
            )
        }  # fmt: skip
    return Blocks(((inputs, grid.input_specs(inputs)),), outputs, scratch)


def _kernel(refs: Refs, outs: Refs, carried: Refs, *, spec: CallSpec, lockstep: int, skew: int):
    step, head = pl.program_id(2), pl.program_id(3)
    halo_forms = ["entering_key", "window_key", "value", "decay"] if spec.halo else []

    @pl.when(step == 0)
    def _():
        for ref in (carried[name] for name in ("slots", *halo_forms)):
            ref[head] = jnp.zeros(ref.shape[1:], ref.dtype)
        if spec.state:
            carried["slots"][head] = refs["slots"][0, 0]

    halo = {name: carried[name][head] for name in halo_forms}
    tokens = StepTokens(spec, own_tokens(refs, spec), halo)
    tokens.compute_all()  # transpositions and rotations take long: they go first
    shared = _GridStep(refs, outs, tokens, spec, step, slots=carried["slots"][head])
    if "starts" in outs:
        outs["starts"][0, 0, 0] = shared.slots
    emit([_chunk_stages(n, shared) for n in range(spec.chunks)], lockstep, skew)
    carried["slots"][head] = shared.slots
    if spec.state:
        outs["end"][0, 0] = shared.slots
    for name in halo_forms:
        carried[name][head] = tokens.of_chunk(name, spec.chunks, spec.halo)


@dataclasses.dataclass
class _GridStep:
    """What the chunks of a grid step share.

    `slots` is the one value that chunks hand on to each other: each takes it as its start and
    leaves its end there, in one stage, so it is right as long as the chunks reach that stage in
    their order, as `emit` has them do.
    """

    refs: Refs
    outs: Refs
    tokens: StepTokens
    spec: CallSpec
    index: jax.Array  # of the step
    slots: jax.Array  # [M, K + V], at the start of the next chunk


def _chunk_stages(n: int, step: _GridStep) -> Iterator[None]:
    """Emits chunk n's work, a stage up to each `yield`."""
    reads = _read(n, step)
    yield
    slots = _pass_slots_on(n, step, reads)
    yield
    logits = _slot_logits(step.spec, reads, slots)
    yield
    softmax = _softmax(step.spec, reads, slots, logits)
    yield
    sums = _sum_values(step.spec, reads, slots, logits, softmax)
    yield
    _store(n, step, reads, softmax, sums)
    yield


class _Reads(NamedTuple):
    """What a chunk reads, and the products that need nothing else."""

    slot_query: jax.Array  # [G * C, K], after the feature map
    window_query: jax.Array  # [G * C, K], rotated
    entering_key: jax.Array  # [entering_tokens, K]
    value: jax.Array  # [chunk_tokens, V]
    segments: Segments | None
    masks: Masks
    query_key: jax.Array  # [G, C, entering_tokens] float32, q . k of the slots' branch
    decays: ChunkDecays


def _read(n: int, step: _GridStep) -> _Reads:
    spec, refs, tokens = step.spec, step.refs, step.tokens
    rows = rows_of(n, spec)
    entering_key = tokens.of_chunk("entering_key", n, spec.entering_tokens)
    value = tokens.of_chunk("value", n, spec.chunk_tokens)
    window_query = window_queries(refs, rows, spec)
    query = read_group(refs["query"], rows, spec.group)
    slot_query = apply_feature_map(query, spec.feature_map)
    segments = segments_of(refs, tokens, n, spec)
    masks = Masks(spec, segments, n, step.index)
    query_key = split_group(matmul_nt(slot_query, entering_key), spec.group)
    decays = ChunkDecays(tokens.of_chunk("decay", n, spec.entering_tokens), spec, value.dtype)
    return _Reads(slot_query, window_query, entering_key, value, segments, masks, query_key, decays)


class _Slots(NamedTuple):
    """The slots at the chunk's start, and what is left of them."""

    start_key: jax.Array  # SK0, [M, K] in the operands' dtype
    start_value: jax.Array  # SV0, [M, V]
    from_start: jax.Array  # exp(c_r), [C, M] float32
    window_product: jax.Array | None  # [G, C, chunk_tokens] float32, rotated q . k


def _pass_slots_on(n: int, step: _GridStep, reads: _Reads) -> _Slots:
    """Takes the slots at the chunk's start from `step` and leaves those at its end there."""
    spec, decays, segments, dtype = step.spec, reads.decays, reads.segments, reads.value.dtype
    C, K = spec.chunk, reads.entering_key.shape[1]
    to_end = decays.write[:C] * decays.bare_to_end  # s exp(c_C - c), [C, M]
    total = jnp.exp2(decays.at_end)
    from_start = jnp.exp2(decays.at_rows)
    if segments is not None:
        to_end = segments.where_token_reaches_end(to_end)
        total = segments.where_start_reaches_end(total)
        from_start = segments.where_row_sees_start(from_start)
    total = to_column(total)
    key_value = jnp.concatenate([reads.entering_key[:C], reads.value[:C]], 1)
    entered = matmul_tn(to_end.astype(dtype), key_value)
    window_product = None
    if spec.has_window:
        window_key = step.tokens.of_chunk("window_key", n, spec.chunk_tokens)
        window_product = split_group(matmul_nt(reads.window_query, window_key), spec.group)
    start_key, start_value = (x.astype(dtype) for x in (step.slots[:, :K], step.slots[:, K:]))
    step.slots = total * step.slots + entered
    return _Slots(start_key, start_value, from_start, window_product)


class _Logits(NamedTuple):
    """The slots' logits, and the factors that their softmax weights take back to the tokens."""

    a: jax.Array  # [G, C, M] float32, in units of log 2
    token_decays: list[jax.Array]  # for each gate block, [its tokens, M]
    row_decays: list[jax.Array]  # for each gate block, [its rows, M] float32


def _slot_logits(spec: CallSpec, reads: _Reads, slots: _Slots) -> _Logits:
    G, decays, dtype = spec.group, reads.decays, reads.value.dtype
    query_key = jnp.where(reads.masks.entering, reads.query_key, 0.0)
    blocks = range(len(decays.gate_blocks))
    token_decays = [decays.token_decay(i) for i in blocks]
    row_decays = [decays.row_decay(i) for i in blocks]
    a = split_group(matmul_nt(reads.slot_query, slots.start_key), G) * slots.from_start[None]
    a += join([
        split_group(matmul(merge_group(query_key[:, rows, seen]).astype(dtype), token_decay), G)
        * row_decay[None]
        for rows, seen, token_decay, row_decay in zip(
            decays.gate_blocks, decays.block_tokens, token_decays, row_decays, strict=True
        )
    ], 1)  # fmt: skip
    return _Logits(a * (spec.scale * LOG2E), token_decays, row_decays)


class _Softmax(NamedTuple):
    """One softmax over slots and window, before the division by its sum."""

    row_max: jax.Array  # [G, C, 1] float32
    slot_p: jax.Array  # [G, C, M] float32
    window_p: jax.Array | None  # [G, C, chunk_tokens] float32
    row_sum: jax.Array  # [G, C, 1] float32
    inverse_sum: jax.Array  # [G, C, 1] float32


def _softmax(spec: CallSpec, reads: _Reads, slots: _Slots, logits: _Logits) -> _Softmax:
    a, b, segments = reads.masks.slot_logits(logits.a), slots.window_product, reads.segments
    if b is not None:
        b = jnp.where(reads.masks.window, scaled(b, spec.window_scale), MASKED_LOGIT)
    highest = overlay(jnp.maximum, a, b, MASKED_LOGIT)
    if segments is not None:
        highest = overlay(jnp.maximum, highest, segments.least_max[None], MASKED_LOGIT)
    row_max = jnp.max(highest, -1, keepdims=True)
    slot_p = jnp.exp2(a - row_max)
    window_p = None if b is None else jnp.exp2(b - row_max)
    row_sum = jnp.sum(overlay(jnp.add, slot_p, window_p, 0.0), -1, keepdims=True)
    if segments is not None:
        row_sum = jnp.maximum(row_sum, 0.5)  # that of padding is 0
    inverse_sum = pltpu.reciprocal(row_sum, approx=reads.value.dtype != jnp.float32)
    return _Softmax(row_max, slot_p, window_p, row_sum, inverse_sum)


class _Sums(NamedTuple):
    """What is left of the output's sum."""

    start_out: jax.Array  # [G * C, V] float32, what the slots at the chunk's start give
    token_p: jax.Array  # P, [G, C, chunk_tokens] float32


def _sum_values(
    spec: CallSpec, reads: _Reads, slots: _Slots, logits: _Logits, softmax: _Softmax
) -> _Sums:
    G, dtype, slot_p = spec.group, reads.value.dtype, softmax.slot_p
    start_out = matmul(
        merge_group(slot_p * slots.from_start[None]).astype(dtype), slots.start_value
    )
    to_tokens = [
        matmul_nt(merge_group(slot_p[:, rows] * row_decay[None]).astype(dtype), token_decay)
        for rows, token_decay, row_decay in zip(
            reads.decays.gate_blocks, logits.token_decays, logits.row_decays, strict=True
        )
    ]
    p = join([pad_columns(split_group(x, G), spec.chunk_tokens) for x in to_tokens], 1)
    window_p = 0.0 if softmax.window_p is None else softmax.window_p
    return _Sums(start_out, jnp.where(reads.masks.slots, p, window_p))


def _store(n: int, step: _GridStep, reads: _Reads, softmax: _Softmax, sums: _Sums) -> None:
    outs, rows, dtype = step.outs, rows_of(n, step.spec), reads.value.dtype
    out = sums.start_out + matmul(merge_group(sums.token_p).astype(dtype), reads.value)
    write_group(outs["out"], rows, split_group(out, step.spec.group) * softmax.inverse_sum)
    outs["lse"][0, 0, :, rows] = to_row(softmax.row_max + jnp.log2(softmax.row_sum))
    if step.spec.slot_weight:
        weight = jnp.sum(softmax.slot_p, -1, keepdims=True) * softmax.inverse_sum
        outs["slot_weight"][0, 0, :, rows] = to_row(weight)
