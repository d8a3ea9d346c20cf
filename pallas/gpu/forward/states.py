"""The slots at the start of every chunk.

One block walks the chunks of 64 features of a KV head's keys or values, in turn:

    S_{n+1} = total_n S_n + sum_j to_end_j x_j        [64, M]

The sum is a product of the transposed tokens and the gates; S stays in registers, in float32.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.gpu.block_sizes import BlockSizes
from pallas.gpu.forward.gates import EndGates
from pallas.gpu.spec import ALIGNED, CHUNK, COLUMN, LOGITS, CallSpec, tile
from pallas.gpu.warpgroup.matmul import Matmul

FEATURES = 64  # of a block: the rows of a warpgroup's product


class States(NamedTuple):
    """Slots of keys and values, features first."""

    key: jax.Array  # [B, Hkv, Tq / C, D, M] bfloat16, at the chunks' starts
    value: jax.Array
    end_key: jax.Array | None  # [B, Hkv, D, M] float32, after the last chunk; with spec.state
    end_value: jax.Array | None


def state_pass(
    key: jax.Array,
    value: jax.Array,
    gates: EndGates,
    start: tuple[jax.Array, jax.Array] | None,
    *,
    spec: CallSpec,
    block_sizes: BlockSizes,
    interpret: Any = False,
) -> States:
    """The kernel's call.

    key, value: [B, Tk, Hkv, D] bfloat16, the timeline without its first spec.ahead rows; at row t
    enters token row t. start: with spec.state, [B, Hkv, D, M] float32 each.
    interpret: as for `fused_attention`.
    """
    B, Hkv, D = key.shape[0], key.shape[2], key.shape[3]
    M, chunks = gates.total.shape[3], gates.total.shape[2]
    narrow, wide = jnp.bfloat16, jnp.float32
    starts = jax.ShapeDtypeStruct((B, Hkv, chunks, D, M), narrow)
    end = jax.ShapeDtypeStruct((B, Hkv, D, M), wide)
    stages = min(block_sizes.state_stages, chunks)
    scratch: dict[str, Any] = {
        "tokens": plgpu.SMEM((stages, CHUNK, FEATURES), narrow, transforms=tile(min(FEATURES, M))),
        "to_end": plgpu.SMEM((stages, CHUNK, M), narrow, transforms=tile(M)),
        "total": plgpu.SMEM((stages, max(M, ALIGNED)), wide),
        "slots": plgpu.SMEM((2, FEATURES, M), narrow, transforms=tile(M)),
        "loaded": plgpu.Barrier(num_arrivals=3, num_barriers=stages),
    }
    if spec.state:
        scratch["wide"] = plgpu.SMEM((FEATURES, M), wide, transforms=tile(M, 4))
        scratch["wide_loaded"] = plgpu.Barrier()
    call = plgpu.kernel(
        functools.partial(_kernel, spec=spec, chunks=chunks, interpret=bool(interpret)),
        out_type=(starts, starts, end, end) if spec.state else (starts, starts),
        grid=(2 * D // FEATURES, Hkv, B),
        grid_names=("features", "head", "batch"),
        scratch_types=scratch,
        kernel_name="nha_states",
        interpret=interpret,
    )
    result = call(key, value, gates.to_end, gates.total, *(start or ()))
    return States(*result, *(() if spec.state else (None, None)))


def _kernel(*refs, spec: CallSpec, chunks: int, interpret: bool, **scratch):
    if spec.state:
        key, value, to_end, total, *start, starts_key, starts_value, end_key, end_value = refs
        ends = end_key, end_value
    else:
        key, value, to_end, total, starts_key, starts_value = refs
    b, h, block = (lax.axis_index(name) for name in ("batch", "head", "features"))
    blocks = key.shape[3] // FEATURES
    features = pl.ds(lax.rem(block, jnp.int32(blocks)) * FEATURES, FEATURES)
    stages, _, M = scratch["to_end"].shape
    shape = (FEATURES, M)
    matmul = Matmul(interpret)

    def of_keys_or_values(do, of_keys, of_values):
        """`do` of one of the two, by the block's features."""
        pl.when(block < blocks)(lambda: do(of_keys))
        pl.when(block >= blocks)(lambda: do(of_values))

    def load(chunk, stage):
        loaded = scratch["loaded"].at[stage]
        rows = pl.ds(jnp.maximum(chunk * CHUNK - spec.ahead, 0), CHUNK)
        of_keys_or_values(
            lambda tokens: plgpu.copy_gmem_to_smem(
                tokens.at[b, rows, h, features], scratch["tokens"].at[stage], loaded
            ),
            key,
            value,
        )
        own = pl.ds(chunk * CHUNK, CHUNK)
        plgpu.copy_gmem_to_smem(to_end.at[b, own, h], scratch["to_end"].at[stage], loaded)
        plgpu.copy_gmem_to_smem(
            total.at[b, h, chunk], scratch["total"].at[stage, pl.ds(0, M)], loaded
        )

    def store(chunk, buffer):
        of_keys_or_values(
            lambda starts: plgpu.copy_smem_to_gmem(
                scratch["slots"].at[buffer], starts.at[b, h, chunk, features]
            ),
            starts_key,
            starts_value,
        )

    for stage in range(stages):
        load(jnp.int32(stage), stage)
    if spec.state:
        of_keys_or_values(
            lambda slots: plgpu.copy_gmem_to_smem(
                slots.at[b, h, features], scratch["wide"], scratch["wide_loaded"]
            ),
            *start,
        )
        plgpu.barrier_wait(scratch["wide_loaded"])
        slots = plgpu.load(scratch["wide"], layout=LOGITS)
    else:
        slots = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), LOGITS)

    def step(chunk, slots):
        stage, buffer = lax.rem(chunk, jnp.int32(stages)), lax.rem(chunk, jnp.int32(2))
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the store two chunks ago left its buffer
        scratch["slots"].at[buffer][...] = slots.astype(jnp.bfloat16)
        plgpu.barrier_wait(scratch["loaded"].at[stage])
        total = plgpu.load(scratch["total"].at[stage, pl.ds(0, M)], layout=COLUMN)
        decayed = slots * lax.broadcast_in_dim(total, shape, [1])
        plgpu.commit_smem()  # of the slots, and of the read total, before copies touch them
        store(chunk, buffer)
        slots = matmul(
            lambda: [(scratch["tokens"].at[stage].T, scratch["to_end"].at[stage])], shape, decayed
        )
        plgpu.commit_smem()  # all warps have multiplied what the next copies overwrite
        pl.when(chunk + stages < chunks)(lambda: load(chunk + stages, stage))
        return slots

    slots = lax.fori_loop(0, chunks, step, slots)
    if spec.state:
        scratch["wide"][...] = slots
        plgpu.commit_smem()
        of_keys_or_values(
            lambda end: plgpu.copy_smem_to_gmem(scratch["wide"], end.at[b, h, features]), *ends
        )
    plgpu.wait_smem_to_gmem(0)
