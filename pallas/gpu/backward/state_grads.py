"""The gradients of the slots at the end of every chunk: the state pass, backwards.

One block walks the chunks of 64 features of a KV head's keys or values, from the last:

    dS_{n-1} = total_n dS_n + sum over the heads and rows of x_r (p_r exp(c_r))        [64, M]

where x is the query and p the logits' gradient for the slots' keys, and x the output's gradient and
p the softmax for their values; dS_n is of the slots at the end of chunk n. dS stays in registers,
in float32; a head's rows of a chunk are one product.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.gpu.block_sizes import BlockSizes
from pallas.gpu.forward.gates import Gates
from pallas.gpu.forward.states import FEATURES
from pallas.gpu.spec import ALIGNED, CHUNK, COLUMN, LOGITS, CallSpec, tile
from pallas.gpu.warpgroup.matmul import Matmul


class StateGrads(NamedTuple):
    """Of the slots' keys and values, features first."""

    key: jax.Array  # [B, Hkv, Tq / C, D, M] bfloat16, at the chunks' ends
    value: jax.Array
    start_key: jax.Array | None  # [B, Hkv, D, M] float32, before the first chunk; with spec.state
    start_value: jax.Array | None


def state_grads(
    query: jax.Array,
    d_out: jax.Array,
    d_logits_to_start: jax.Array,
    weights_to_start: jax.Array,
    gates: Gates,
    d_end: tuple[jax.Array, jax.Array] | None,
    *,
    spec: CallSpec,
    block_sizes: BlockSizes,
    interpret: Any = False,
) -> StateGrads:
    """The kernel's call.

    query, d_out: [B, Tq, Hq, D] bfloat16. d_logits_to_start, weights_to_start: [B, Tq, Hq, M]
    bfloat16, the gradient of the slots' logits and their softmax, times exp(c), as `slot_queries`
    returns them. d_end: with spec.state, of the slots after the last chunk, [B, Hkv, D, M] float32
    each; None: zero.
    interpret: as for `fused_attention`.
    """
    B, D, M = query.shape[0], query.shape[3], gates.total.shape[3]
    Hkv, chunks = gates.total.shape[1:3]
    narrow, wide = jnp.bfloat16, jnp.float32
    grads = jax.ShapeDtypeStruct((B, Hkv, chunks, D, M), narrow)
    start = jax.ShapeDtypeStruct((B, Hkv, D, M), wide)
    stages = min(block_sizes.state_stages, chunks * spec.group)
    scratch: dict[str, Any] = {
        "rows": plgpu.SMEM((stages, CHUNK, FEATURES), narrow, transforms=tile(min(FEATURES, M))),
        "weights": plgpu.SMEM((stages, CHUNK, M), narrow, transforms=tile(M)),
        "total": plgpu.SMEM((stages, max(M, ALIGNED)), wide),
        "slots": plgpu.SMEM((2, FEATURES, M), narrow, transforms=tile(M)),
        "loaded": plgpu.Barrier(num_arrivals=3, num_barriers=stages),
    }
    if spec.state:
        scratch["wide"] = plgpu.SMEM((FEATURES, M), wide, transforms=tile(M, 4))
        scratch["wide_loaded"] = plgpu.Barrier()
    inputs = {
        "query": query,
        "d_out": d_out,
        "logits": d_logits_to_start,
        "weights": weights_to_start,
        "total": gates.total,
    }
    if d_end is not None:
        inputs |= {"end_key": d_end[0], "end_value": d_end[1]}
    outputs = {"key": grads, "value": grads}
    if spec.state:
        outputs |= {"start_key": start, "start_value": start}

    def entry(*refs, **shared):
        named = dict(zip([*inputs, *outputs], refs, strict=True))
        _Walk(named, shared, spec, chunks, Matmul(bool(interpret))).run()

    call = plgpu.kernel(
        entry,
        out_type=list(outputs.values()),
        grid=(2 * D // FEATURES, Hkv, B),
        grid_names=("features", "head", "batch"),
        scratch_types=scratch,
        kernel_name="nha_state_grads",
        interpret=interpret,
    )
    result = call(*inputs.values())
    return StateGrads(*result, *(() if spec.state else (None, None)))


class _Walk:
    """A block's way through the chunks; it loads a head's rows of a chunk at a time."""

    def __init__(self, refs: dict, shared: dict, spec: CallSpec, chunks: int, matmul: Matmul):
        self.refs, self.shared, self.spec = refs, shared, spec
        self.chunks, self.matmul = chunks, matmul
        self.b, self.h, self.block = (lax.axis_index(x) for x in ("batch", "head", "features"))
        self.blocks = refs["query"].shape[3] // FEATURES
        self.features = pl.ds(lax.rem(self.block, jnp.int32(self.blocks)) * FEATURES, FEATURES)
        self.stages, _, M = shared["weights"].shape
        self.shape = FEATURES, M

    def run(self) -> None:
        for stage in range(self.stages):
            self._load(jnp.int32(stage), stage)
        slots = lax.fori_loop(0, self.chunks, self._chunk, self._end())
        if self.spec.state:
            self.shared["wide"][...] = slots
            plgpu.commit_smem()
            self._of_either(
                lambda start: plgpu.copy_smem_to_gmem(
                    self.shared["wide"], start.at[self.b, self.h, self.features]
                ),
                ("start_key", "start_value"),
            )
        plgpu.wait_smem_to_gmem(0)

    def _end(self) -> jax.Array:
        """The gradient of the slots after the last chunk."""
        if "end_key" not in self.refs:
            return plgpu.layout_cast(jnp.zeros(self.shape, jnp.float32), LOGITS)
        wide, loaded = self.shared["wide"], self.shared["wide_loaded"]
        self._of_either(
            lambda end: plgpu.copy_gmem_to_smem(
                end.at[self.b, self.h, self.features], wide, loaded
            ),
            ("end_key", "end_value"),
        )
        plgpu.barrier_wait(loaded)
        return plgpu.load(wide, layout=LOGITS)

    def _chunk(self, step, slots: jax.Array) -> jax.Array:
        shared, group = self.shared, self.spec.group
        first, buffer = step * group, lax.rem(step, jnp.int32(2))
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the store two chunks ago left its buffer
        shared["slots"].at[buffer][...] = slots.astype(jnp.bfloat16)
        plgpu.barrier_wait(shared["loaded"].at[self._stage(first)])
        total = plgpu.load(self._total(self._stage(first)), layout=COLUMN)
        decayed = slots * lax.broadcast_in_dim(total, self.shape, [1])
        plgpu.commit_smem()  # of the slots, and of the read total, before copies touch them
        self._of_either(
            lambda grads: plgpu.copy_smem_to_gmem(
                shared["slots"].at[buffer],
                grads.at[self.b, self.h, self.chunks - 1 - step, self.features],
            ),
            ("key", "value"),
        )
        slots = self._add_head(first, decayed)

        def head(i, slots):
            plgpu.barrier_wait(shared["loaded"].at[self._stage(first + i)])
            return self._add_head(first + i, slots)

        return lax.fori_loop(1, group, head, slots) if group > 1 else slots

    def _add_head(self, item, slots: jax.Array) -> jax.Array:
        stage, shared = self._stage(item), self.shared
        slots = self.matmul(
            lambda: [(shared["rows"].at[stage].T, shared["weights"].at[stage])], self.shape, slots
        )
        plgpu.commit_smem()  # all warps have multiplied, before copies touch the operands
        more = item + self.stages < self.chunks * self.spec.group
        pl.when(more)(lambda: self._load(item + self.stages, stage))
        return slots

    def _load(self, item, stage) -> None:
        """The rows of a head of a chunk: the heads in turn, the chunks from the last."""
        group, shared, loaded = jnp.int32(self.spec.group), self.shared, self.shared["loaded"]
        chunk = self.chunks - 1 - lax.div(item, group)
        head, own = self.h * group + lax.rem(item, group), pl.ds(chunk * CHUNK, CHUNK)

        def load(rows, weights):
            source = rows.at[self.b, own, head, self.features]
            plgpu.copy_gmem_to_smem(source, shared["rows"].at[stage], loaded.at[stage])
            source = weights.at[self.b, own, head]
            plgpu.copy_gmem_to_smem(source, shared["weights"].at[stage], loaded.at[stage])

        self._of_either(load, ("query", "d_out"), ("logits", "weights"))
        total = self.refs["total"].at[self.b, self.h, chunk]
        plgpu.copy_gmem_to_smem(total, self._total(stage), loaded.at[stage])

    def _total(self, stage):
        return self.shared["total"].at[stage, pl.ds(0, self.shape[1])]

    def _stage(self, item):
        return lax.rem(item, jnp.int32(self.stages))

    def _of_either(self, do, *names: tuple[str, str]) -> None:
        """`do` with what is of the keys, or of the values, by the block's features."""
        of_keys, of_values = ([self.refs[pair[i]] for pair in names] for i in (0, 1))
        pl.when(self.block < self.blocks)(lambda: do(*of_keys))
        pl.when(self.block >= self.blocks)(lambda: do(*of_values))
