"""`nha_attention`: one door to every implementation of the operator."""

import numbers
from typing import Literal, get_args, overload

import jax
import jax.numpy as jnp

from nha_jax.ops.chunked import chunked_attention
from nha_jax.ops.reference import reference_attention
from nha_jax.ops.rope import Rope
from nha_jax.ops.state import NHAState
from nha_jax.ops.types import EmptySlots, NHAOutput, Options, SlotFeatureMap
from nha_jax.ops.validation import validate_arrays, validate_rest

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
    implementation: Implementation | None = None,
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
    implementation: Implementation | None = None,
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
    implementation=None,
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
      log_decay: [B, T, Hkv, M], natural log of the gate, in [-inf, 0]; computed in float32.
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
      implementation: "reference", "xla", "pallas_tpu" or "pallas_gpu"; None picks the fastest that
        serves this call on this platform.

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
    )
    rest = {
        "rope": rope,
        "segment_ids": segment_ids,
        "initial_state": initial_state,
        "options": options,
    }
    validate_rest(query, key, value, log_decay, **rest)
    attend = _implementation(implementation)
    result = attend(query, key, value, log_decay, **rest)
    return result if return_state or return_slot_weight else result.out


def _is_integer(x) -> bool:
    return isinstance(x, numbers.Integral) and not isinstance(x, bool)


def _implementation(name: str | None):
    match name:
        case None | "xla":
            return chunked_attention
        case "reference":
            return reference_attention
        case "pallas_tpu" | "pallas_gpu":
            raise NotImplementedError(
                f"implementation={name!r}: this version has no such kernel yet; "
                "use 'xla', or None for the fastest there is"
            )
    raise ValueError(f"implementation must be one of {get_args(Implementation)}, got {name!r}")
