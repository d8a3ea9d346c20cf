"""The operator on Hopper GPUs: our Mosaic kernels, and cuDNN for full attention."""

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from nha_jax.ops.backends import Arrays, Backend
from nha_jax.ops.gpu.attention import gpu_attention
from nha_jax.ops.gpu.support import compiling_for_gpus, not_hopper, served_by_cudnn, unsupported
from nha_jax.ops.kernels import decode_beyond_limits, decode_in_kernel, kernel_state
from nha_jax.ops.state import NHAState, Tokens
from nha_jax.ops.types import Options
from pallas.gpu import BlockSizes
from pallas.gpu.decode.launch import decode_attention, decode_unsupported

THREADS = 16  # with which the interpreter has been seen to run every kernel


def decode_gpu(
    query: jax.Array,
    rotated_query: jax.Array,
    token: Tokens,
    state: NHAState,
    active: jax.Array,
    *,
    options: Options,
    interpret: bool | plgpu.InterpretGPUParams = False,
) -> tuple[jax.Array, NHAState]:
    """Computes `Backend.decode` in one kernel, in place if the state is donated.

    A long ring of window_size=None takes a second, small step: see `pallas.gpu.decode.launch`.

    Args:
      interpret: run the kernel on the CPU.
    """
    if interpret is True:
        interpret = plgpu.InterpretGPUParams()
    attend = functools.partial(decode_attention, interpret=interpret)
    return decode_in_kernel(attend, query, rotated_query, token, state, active, options)


class GPUBackend(Backend):
    """A few launches forward and backward, one a decode step; cuDNN where no token leaves."""

    name = "pallas_gpu"
    platform = "gpu"
    reverse_mode_only = True
    options_type = BlockSizes
    attend = staticmethod(gpu_attention)
    decode = staticmethod(decode_gpu)

    def attend_unsupported(
        self, arrays: Arrays, *, has_segments: bool, has_past: bool, options: Options
    ) -> str | None:
        return unsupported(arrays, has_segments=has_segments, has_past=has_past, options=options)

    def decode_unsupported(self, query: jax.Array, state: NHAState, options: Options) -> str | None:
        reason = decode_beyond_limits(query, state) or decode_unsupported(kernel_state(state))
        return reason or not_hopper()

    def describe(self, arrays: Arrays, options: Options) -> str:
        if served_by_cudnn(arrays, has_segments=False, has_past=False, options=options):
            return "cuDNN, or fused GPU kernels where documents are packed"
        return "fused GPU kernels"

    def compiled_or_interpreted(
        self, compiled: Callable[..., Any], interpreted: Callable[..., Any]
    ) -> Callable[..., Any]:
        """Chooses by the device compiled for, not in the lowering as for TPUs.

        The GPU interpreter's effects cannot stand beside the kernel in one program. It runs each
        warpgroup in a thread of XLA's, where it waits for others: with too few threads, forever.
        """
        if compiling_for_gpus():
            return compiled
        threads = int(os.environ.get("NPROC") or os.cpu_count() or 1)
        if threads < THREADS:
            warnings.warn(
                f"implementation='pallas_gpu' is interpreted here, by threads that wait for one "
                f"another: with XLA's {threads} it may hang. Set NPROC={THREADS} before jax starts",
                RuntimeWarning,
                stacklevel=2,
            )
        return interpreted


BACKEND = GPUBackend()
