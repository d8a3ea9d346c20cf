"""The operator on the Mosaic GPU kernels; JAX differentiates what lays out their arrays."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from nha_jax.ops.gpu.arrays import KernelArrays, default_sizes, lay_out
from nha_jax.ops.gpu.cudnn import cudnn_attention
from nha_jax.ops.gpu.support import served_by_cudnn, unsupported
from nha_jax.ops.rope import Rope, apply_rope
from nha_jax.ops.state import Past, Slots, Tokens, empty_slots
from nha_jax.ops.timeline import (
    Timeline,
    build_timeline,
    keep_last_segment,
    next_state,
    nothing_leaves,
)
from nha_jax.ops.types import NHAOutput, Options
from pallas.gpu import CHUNK, CallSpec, Fused, fused_attention


def gpu_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    *,
    rope: Rope | None,
    segment_ids: jax.Array | None,
    past: Past | None,
    options: Options,
    interpret: bool = False,
) -> NHAOutput:
    """Computes `nha_attention` by the kernels, or by cuDNN where it serves; shapes as there.

    Where the kernels rotate, no gradient flows to the rope tables.

    Args:
      interpret: run the kernels on the CPU.

    Raises:
      NotImplementedError: neither serves a device's part of the call; the message says why.
    """
    arrays = query, key, value, log_decay
    has_segments, has_past = segment_ids is not None, past is not None
    if served_by_cudnn(arrays, has_segments=has_segments, has_past=has_past, options=options):
        return cudnn_attention(*arrays, rope=rope, options=options)
    if reason := unsupported(arrays, has_segments=has_segments, has_past=has_past, options=options):
        raise NotImplementedError(f"implementation='pallas_gpu': {reason}")
    rope = None if options.window_size == 0 else rope  # which only the window's logits know
    tokens = Tokens(key, apply_rope(key, rope), value, log_decay.astype(jnp.float32))
    timeline = build_timeline(tokens, segment_ids, past, options.window_size)
    spec = _describe(query, timeline, segment_ids, past, options)
    kernel: KernelArrays = lay_out(query, tokens, timeline, rope, segment_ids, past, spec, options)
    fused = fused_attention(
        kernel.inputs,
        kernel.constants,
        spec=spec,
        block_sizes=options.implementation_options or default_sizes(tokens, spec.slots),
        interpret=plgpu.InterpretGPUParams() if interpret else False,
    )
    T = query.shape[1]
    out = fused.out[:, :T, :, : value.shape[3]]
    weight = fused.slot_weight.swapaxes(1, 2)[:, :T]
    state = None
    if options.return_state:
        state = next_state(timeline, _slots_at_end(fused, timeline), segment_ids, past)
    return NHAOutput(out, state, weight if options.return_slot_weight else None)


def _describe(
    query: jax.Array,
    timeline: Timeline,
    segment_ids: jax.Array | None,
    past: Past | None,
    options: Options,
) -> CallSpec:
    """Says in the kernels' terms what is asked for."""
    T, W, has_past = query.shape[1], options.window_size, past is not None
    M = timeline.tokens.log_decay.shape[3]
    full = nothing_leaves(W, T, past is not None)
    has_slots = M > 0 and not full
    return CallSpec(
        group=query.shape[2] // timeline.tokens.value.shape[2],
        slots=M if has_slots else 0,
        empty_slots=M if full and options.empty_slots == "attend" else 0,
        window=None if full else W,
        offset=timeline.rows_before,
        ahead=0 if W is None or full or has_past else _rows_ahead(W, T),
        scale=float(options.scale),
        masked=segment_ids is not None or has_past or options.empty_slots == "mask",
        state=has_slots and (has_past or options.return_state),
        weight=options.slot_weight_gradient if options.return_slot_weight else None,
    )


def _rows_ahead(W: int, T: int) -> int:
    """Chooses how many of the timeline's W leading rows of nothing the kernels do without.

    Where it is all of them, keys and values are read where they lie, and are not copied.
    """
    return W if W % CHUNK == 0 and T % CHUNK == 0 else 0


def _slots_at_end(fused: Fused, timeline: Timeline) -> Slots:
    """Cuts the slots after the call to their sizes: [B, H, D, M'] -> [B, H, M, .]."""
    key, _, value, log_decay = timeline.tokens
    M = log_decay.shape[3]
    if fused.end is None:
        return empty_slots(key, value, M)
    dims = key.shape[3], value.shape[3]
    ends = (x[:, :, :dim, :M] for x, dim in zip(fused.end, dims, strict=True))
    end_key, end_value = (x.swapaxes(2, 3) for x in ends)
    return keep_last_segment((end_key, end_value), timeline)
