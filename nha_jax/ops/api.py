"""`nha_attention`: one door to every implementation of the operator."""

import functools
import numbers
from collections.abc import Callable
from typing import Literal, get_args, overload

import jax
import jax.numpy as jnp
from jax import lax

from nha_jax.ops.gpu.attention import gpu_attention
from nha_jax.ops.gpu.support import compiling_for_gpus
from nha_jax.ops.mesh.division import over_mesh
from nha_jax.ops.reference import reference_attention
from nha_jax.ops.rope import Rope
from nha_jax.ops.state import NHAState
from nha_jax.ops.tpu.attention import can_compile_for_tpus, tpu_attention, tpu_unsupported
from nha_jax.ops.types import EmptySlots, NHAOutput, Options, SlotFeatureMap, SlotWeightGradient
from nha_jax.ops.validation import validate_arrays, validate_rest
from nha_jax.ops.xla.chunked import chunked_attention
from pallas.tpu import BlockSizes

Implementation = Literal["reference", "xla", "pallas_tpu", "pallas_gpu"]


@overload
def nha_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    *,
    window_size: int | None,
    rope: Rope | None = None,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
    slot_feature_map: SlotFeatureMap = "identity",
    empty_slots: EmptySlots = "attend",
    initial_state: NHAState | None = None,
    return_state: Literal[False] = False,
    return_slot_weight: Literal[False] = False,
    slot_weight_gradient: SlotWeightGradient = "all",
    implementation: Implementation | None = None,
    block_sizes: BlockSizes | None = None,
) -> jax.Array: ...


@overload
def nha_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    *,
    window_size: int | None,
    rope: Rope | None = None,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
    slot_feature_map: SlotFeatureMap = "identity",
    empty_slots: EmptySlots = "attend",
    initial_state: NHAState | None = None,
    return_state: bool = False,
    return_slot_weight: bool = False,
    slot_weight_gradient: SlotWeightGradient = "all",
    implementation: Implementation | None = None,
    block_sizes: BlockSizes | None = None,
) -> jax.Array | NHAOutput: ...


def nha_attention(
    query,
    key,
    value,
    log_decay,
    *,
    window_size,
    rope=None,
    scale=None,
    segment_ids=None,
    slot_feature_map="identity",
    empty_slots="attend",
    initial_state=None,
    return_state=False,
    return_slot_weight=False,
    slot_weight_gradient="all",
    implementation=None,
    block_sizes=None,
):
    """Native Hybrid Attention (arXiv 2510.07019): gated slots and a window under one softmax.

    B batch, T tokens, Hq query heads, Hkv key/value heads (each serves Hq / Hkv query heads),
    K key dim, V value dim, M slots, W window. Within a segment, at step t, the token j = t - W
    enters the slots, with s = 1 - exp(log_decay_j):

        SK_t = exp(log_decay_j) SK_{t-1} + s key_j        (M x K; SV the same with value_j)
        a_t = scale query_t . SK_t                        M slot logits, not rotated
        b_t = scale rot(query_t) . rot(key_i)             t - W < i <= t
        out_t = softmax([a_t ; b_t]) [SV_t ; value_i]

    Args:
      query: [B, T, Hq, K], not rotated.
      key: [B, T, Hkv, K], not rotated, of the query's dtype.
      value: [B, T, Hkv, V], of the query's dtype.
      log_decay: [B, T, Hkv, M], natural log of the gate, in [-inf, 0]; computed in float32. M may
        be 0: sliding-window attention.
      window_size: W, the tokens read exactly: 0 reads slots only, None the whole past.
      rope: (cos, sin), each [T, K/2] or [B, T, K/2]; rotates the window's logits only.
      scale: of all logits; K ** -0.5 by default.
      segment_ids: [B, T] integers. A segment is a maximal run of equal ids; tokens see, and slots
        hold, their own segment only. 0 is padding: it gives 0 and writes nothing.
      slot_feature_map: "identity", "silu" or "relu", of queries and keys in the slot branch.
      empty_slots: before the first token entered the slots, "attend" reads them as zeros (as
        published), "mask" leaves them out of the softmax.
      initial_state: the `NHAState` an earlier call returned. Its segment goes on if the call's
        first id is the state's, or if segment_ids is None.
      return_state: return the state after each row's last real token: padding at the end of a row
        leaves no trace. With window_size=None the state grows by T tokens.
      return_slot_weight: return the softmax mass on the slots, [B, T, Hq] float32; differentiable.
      slot_weight_gradient: what the slot weight's gradient reaches. It is sigmoid(A - B), A and B
        the logs of the sums of exp(a_t) and exp(b_t): "all" is its gradient as it stands, "slots"
        that of sigmoid(A - stop_gradient(B)), so that the window's logits are not pulled.
      implementation: "reference", "xla", "pallas_tpu" or "pallas_gpu"; None picks the fastest that
        serves this call on the platform it is compiled for (on GPUs "xla", until someone has
        measured). Kernels run interpreted, and slowly, on other platforms than their own, and need
        `jax.set_mesh` where a mesh divides the arrays: see `nha_jax.ops.mesh.division`.
        "pallas_gpu" is for Hopper and bfloat16; what it does not serve runs as "xla", with a
        warning that says why.
      block_sizes: how the TPU kernels cut their work; None: as suits the chip.

    Returns:
      out [B, T, Hq, V] in the query's dtype, or, if a state or the slot weight was asked for,
      `NHAOutput(out, state, slot_weight)` with None for what was not.

    Raises:
      ValueError, TypeError: an argument has a wrong value, shape or dtype; the message names it.
      NotImplementedError: the implementation named cannot serve; the message says why.
    """
    query, key, value, log_decay = map(jnp.asarray, (query, key, value, log_decay))
    validate_arrays(query, key, value, log_decay)
    options = Options(
        window_size=int(window_size) if _is_integer(window_size) else window_size,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        slot_feature_map=slot_feature_map,
        empty_slots=empty_slots,
        return_state=return_state,
        return_slot_weight=return_slot_weight,
        slot_weight_gradient=slot_weight_gradient,
        block_sizes=block_sizes,
    )
    rest = {
        "rope": rope,
        "segment_ids": segment_ids,
        "initial_state": initial_state,
        "options": options,
    }
    validate_rest(query, key, value, log_decay, **rest)
    unsupported = functools.partial(tpu_unsupported, query, key, value, log_decay, options=options)
    attend = _implementation(implementation, unsupported, block_sizes)
    result = attend(query, key, value, log_decay, **rest)
    return result if return_state or return_slot_weight else result.out


def _is_integer(x) -> bool:
    return isinstance(x, numbers.Integral) and not isinstance(x, bool)


def _implementation(
    name: str | None, unsupported: Callable[[], str | None], block_sizes: BlockSizes | None
) -> Callable[..., NHAOutput]:
    """Raises as `nha_attention` does; `unsupported` says why the TPU kernels can't serve."""
    match name:
        case "reference":
            return over_mesh(reference_attention)
        case "xla":
            return over_mesh(chunked_attention)
        case "pallas_tpu":
            if reason := unsupported():
                raise NotImplementedError(f"implementation={name!r}: {reason}")
            interpreted = functools.partial(tpu_attention, interpret=True)
            return _by_platform(tpu=over_mesh(tpu_attention), default=over_mesh(interpreted))
        case None:  # on GPUs plain XLA: nobody has measured their kernels yet
            if unsupported() or not can_compile_for_tpus():
                return over_mesh(chunked_attention)
            return _by_platform(tpu=over_mesh(tpu_attention), default=over_mesh(chunked_attention))
        case "pallas_gpu":
            if block_sizes is not None:
                raise NotImplementedError(
                    f"implementation={name!r}: block_sizes are those of the TPU kernels: pass None"
                )
            return over_mesh(functools.partial(gpu_attention, interpret=not compiling_for_gpus()))
    raise ValueError(f"implementation must be one of {get_args(Implementation)}, got {name!r}")


def _by_platform(
    tpu: Callable[..., NHAOutput], default: Callable[..., NHAOutput]
) -> Callable[..., NHAOutput]:
    """The one for the platform that the program is lowered for, which may not be this machine's.

    Both are traced; what the other one leaves for the gradient is dropped by the compiler.
    """

    def attend(query, key, value, log_decay, *, options, **rest):
        def call(implementation):
            return lambda arrays, rest: implementation(*arrays, **rest, options=options)

        arrays = (query, key, value, log_decay)
        return lax.platform_dependent(arrays, rest, tpu=call(tpu), default=call(default))

    return attend
