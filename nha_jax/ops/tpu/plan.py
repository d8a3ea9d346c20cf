"""How a call of the fused TPU kernels is cut into grid steps, and whether VMEM holds them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nha_jax.ops.types import Options
from pallas.tpu import (
    LANES,
    ROW_TILE,
    VMEM_BYTES,
    BlockSizes,
    CallSpec,
    Sizes,
    default_block_sizes,
    vmem_needed,
)

FUSED_WINDOW = 256
"""The widest window that the fused kernels cover alone, if a grid step has as many rows."""


class CallShape(NamedTuple):
    """What the kernels' plan depends on beside the call's `Options`.

    A call that goes on from a past is one of `rows` rows too, whose tokens are rotated already.
    """

    rows: int
    group: int  # query heads to a key/value head
    Hkv: int
    K: int
    V: int
    M: int
    dtype: Any
    rope: bool  # the kernels rotate
    segments: bool  # who sees whom is not just a matter of order
    past: bool

    @classmethod
    def of(
        cls, query: jax.Array, key: jax.Array, value: jax.Array, log_decay: jax.Array, **flags: bool
    ) -> "CallShape":
        """Reads the sizes of arrays [B, rows, heads, .]."""
        rows, Hkv, K = key.shape[1:]
        M = max(log_decay.shape[3], 1)
        group = query.shape[2] // Hkv
        return cls(rows, group, Hkv, K, value.shape[3], M, query.dtype, **flags)


def plan(shape: CallShape, options: Options) -> tuple[CallSpec, BlockSizes]:
    """Says what is static about the call, and how its work is cut.

    Unless `options` give the block sizes, a grid step has as many of the default's chunks as VMEM
    holds.

    Raises ValueError if VMEM does not hold a grid step of the block sizes given.
    """
    sizes = options.implementation_options
    if sizes is not None:
        spec = _spec(shape, options, sizes)
        if _bytes(shape, spec) > VMEM_BYTES:
            raise ValueError(
                f"kernel_options['pallas_tpu']: chunk={sizes.chunk} and chunks_per_step="
                f"{sizes.chunks_per_step} {_too_much(shape, spec)}; take fewer, or leave them out"
            )
        return spec, sizes
    sizes = default_block_sizes(shape.group, _segments(shape, options))
    while _bytes(shape, spec := _spec(shape, options, sizes)) > VMEM_BYTES:
        smaller = sizes.with_half_the_chunks()
        if smaller is None:
            break
        sizes = smaller
    return spec, sizes


def beyond_vmem(shape: CallShape, options: Options) -> str | None:
    """Says in a line that VMEM does not hold a grid step of the call; None if it does."""
    spec, _ = plan(shape, options)
    if _bytes(shape, spec) <= VMEM_BYTES:
        return None
    return f"its kernels {_too_much(shape, spec)}"


def _too_much(shape: CallShape, spec: CallSpec) -> str:
    return (
        f"would need {-(-_bytes(shape, spec) >> 20)} MiB of VMEM, over {VMEM_BYTES >> 20}, for"
        f" {shape.group} query heads of {shape.K} and {shape.V} to a key/value head,"
        f" {shape.M} slots and {jnp.dtype(shape.dtype).name}"
    )


def _segments(shape: CallShape, options: Options) -> bool:
    return shape.segments or options.return_state or not options.read_slots


def _spec(shape: CallShape, options: Options, sizes: BlockSizes) -> CallSpec:
    W = options.window_size
    assert W is not None
    chunks = -(-shape.rows // sizes.chunk)
    return CallSpec(
        group=shape.group,
        slots=shape.M,
        window=W,
        wide_window=min(FUSED_WINDOW, sizes.chunk * sizes.chunks_per_step) < W,
        chunk=sizes.chunk,
        chunks=min(sizes.chunks_per_step, 1 << (chunks - 1).bit_length()),
        scale=options.scale,
        rope=shape.rope and W > 0,
        rotated=shape.past and W > 0,
        feature_map=options.slot_feature_map,
        mask_empty=options.empty_slots == "mask" or not options.read_slots,
        segments=_segments(shape, options),
        state=shape.past or options.return_state,
        slot_weight=options.return_slot_weight,
        pull_slots_only=options.slot_weight_gradient == "slots",
    )


def _bytes(shape: CallShape, spec: CallSpec) -> int:
    K, V = (size + -size % LANES for size in (shape.K, shape.V))
    M = shape.M + -shape.M % ROW_TILE
    return vmem_needed(Sizes(shape.Hkv, K, V, M, shape.dtype), spec)
