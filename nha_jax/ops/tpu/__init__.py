"""The operator on TPUs: our Mosaic kernels, and JAX's splash attention for full attention."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from nha_jax.ops.backends import Arrays, Backend
from nha_jax.ops.kernels import (
    attend_beyond_limits,
    decode_beyond_limits,
    decode_in_kernel,
    kernel_state,
)
from nha_jax.ops.state import NHAState, Tokens
from nha_jax.ops.timeline import nothing_leaves
from nha_jax.ops.tpu.attention import tpu_attention
from nha_jax.ops.tpu.plan import CallShape, beyond_vmem
from nha_jax.ops.types import Options
from pallas.tpu import LARGEST_HEAD, BlockSizes
from pallas.tpu.decode import decode_attention, decode_unsupported


def decode_tpu(
    query: jax.Array,
    rotated_query: jax.Array,
    token: Tokens,
    state: NHAState,
    active: jax.Array,
    *,
    options: Options,
    interpret: bool = False,
) -> tuple[jax.Array, NHAState]:
    """Computes `Backend.decode` in one kernel, in place if the state is donated.

    Args:
      interpret: run the kernel on the CPU.
    """
    attend = functools.partial(
        decode_attention, interpret=pltpu.InterpretParams() if interpret else False
    )
    return decode_in_kernel(attend, query, rotated_query, token, state, active, options)


class TPUBackend(Backend):
    """The fused kernels: a pass over the tokens forward, one backward, a launch a decode step."""

    name = "pallas_tpu"
    platform = "tpu"
    reverse_mode_only = True
    options_type = BlockSizes
    attend = staticmethod(tpu_attention)
    decode = staticmethod(decode_tpu)

    def attend_unsupported(
        self, arrays: Arrays, *, has_segments: bool, has_past: bool, options: Options
    ) -> str | None:
        query = arrays[0]
        if query.dtype not in (jnp.bfloat16, jnp.float32):
            return f"its kernels take bfloat16 and float32, got query of {query.dtype}"
        if reason := attend_beyond_limits(arrays, LARGEST_HEAD):
            return reason
        if options.scale < 0:
            return f"its kernels take a scale of at least 0, got {options.scale}"
        if nothing_leaves(options.window_size, query.shape[1], has_past):
            return None
        shape = CallShape.of(*arrays, rope=not has_past, segments=has_segments, past=has_past)
        return beyond_vmem(shape, options)

    def decode_unsupported(self, query: jax.Array, state: NHAState, options: Options) -> str | None:
        return decode_beyond_limits(query, state) or decode_unsupported(kernel_state(state))

    def describe(self, arrays: Arrays, options: Options) -> str:
        return "fused TPU kernels"


BACKEND = TPUBackend()
