"""Full attention through cuDNN's fused kernels, for layers without a window on NVIDIA GPUs.

JAX's own door to them, `jax.nn.dot_product_attention(implementation="cudnn")`, rounds the
log-sum-exp to bfloat16 and gives it no gradient; so the calls behind that door are made here.
"""

import functools
import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as jax_cudnn
from jax.ad_checkpoint import checkpoint_name

from nha_jax.ops.rope import Rope, apply_rope
from nha_jax.ops.state import Tokens, build_timeline, next_state
from nha_jax.ops.types import NHAOutput, Options

HEAD_MULTIPLE = 8


def cudnn_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    *,
    rope: Rope | None,
    options: Options,
) -> NHAOutput:
    """`nha_attention` of which nothing leaves the window, with neither segments nor a past.

    Shapes as there; bfloat16, heads of up to 256.
    """
    B, T, H = key.shape[:3]
    M = log_decay.shape[3]
    rotated_key = apply_rope(key, rope)
    out, weight = cudnn_full_attention(
        apply_rope(query, rope), rotated_key, value, num_slots=M, options=options
    )
    state = None
    if options.return_state:
        tokens = Tokens(key, rotated_key, value, log_decay.astype(jnp.float32))
        timeline = build_timeline(tokens, None, None, None)
        slots = (
            jnp.zeros((B, H, M, key.shape[3]), jnp.float32),
            jnp.zeros((B, H, M, value.shape[3]), jnp.float32),
        )
        state = next_state(timeline, T, slots, None, None, options.window_size)
    return NHAOutput(out, state, weight if options.return_slot_weight else None)


def cudnn_full_attention(
    rotated_query: jax.Array,
    rotated_key: jax.Array,
    value: jax.Array,
    *,
    num_slots: int,
    options: Options,
) -> tuple[jax.Array, jax.Array]:
    """Causal softmax attention of T tokens to themselves, with the slots still empty.

    With attended empty slots, whose logits and values are 0, the softmax's denominator grows from
    exp(L) to exp(L) + M: the output shrinks by sigmoid(L - log M), and the slot weight is the rest.

    Args:
      rotated_query: [B, T, Hq, K] bfloat16, K up to 256.
      rotated_key: [B, T, Hkv, K].
      value: [B, T, Hkv, V], V up to 256.
      num_slots: M.

    Returns out [B, T, Hq, V] in bfloat16 and the slot weight [B, T, Hq] in float32, both
    differentiable (the slot weight as `options.slot_weight_gradient` says).
    """
    V = value.shape[3]
    # cuDNN takes sizes that differ on some chips only, and multiples of 8.
    size = -(-max(rotated_key.shape[3], V) // HEAD_MULTIPLE) * HEAD_MULTIPLE
    arrays = (_pad_last(x, size) for x in (rotated_query, rotated_key, value))
    empty = num_slots if options.empty_slots == "attend" else 0
    weight_pulls = options.return_slot_weight and options.slot_weight_gradient == "all"
    out, weight = _attend(float(options.scale), empty, weight_pulls, *arrays)
    return out[..., :V], weight.swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(scale: float, empty: int, weight_pulls: bool, query, key, value):
    """out [B, T, Hq, D] and the slot weight [B, Hq, T]."""
    return _attend_fwd(scale, empty, weight_pulls, query, key, value)[0]


def _attend_fwd(scale, empty, weight_pulls, query, key, value):
    out, log_mass = _forward(scale, query, key, value)
    if empty:
        out, log_mass = _with_empty_slots(out, log_mass, empty)
    # To a rematerialised layer both are given, so that its forward does not run again.
    out, log_mass = checkpoint_name(out, "nha_out"), checkpoint_name(log_mass, "nha_lse")
    return (out, _slot_weight(log_mass, empty)), (query, key, value, out, log_mass)


def _attend_bwd(scale, empty, weight_pulls, residuals, cotangents):
    """cuDNN's backward makes its probabilities of the log-sum-exp that it is given: with that of
    all, tokens and empty slots, and the output of all, its gradients are those of all.
    """
    query, key, value, out, log_mass = residuals
    out_cotangent, weight_cotangent = cotangents
    gradients = _backward(scale, query, key, value, out, log_mass, out_cotangent)
    if not empty or not weight_pulls:
        return gradients
    # The slot weight w falls with every logit, by its probability p: dw = -w sum_j p_j ds_j. Hence
    # dq = -w scale sum_j p_j k_j, an output with keys for values, and dk_j = -scale sum_t w p_tj
    # q_t, the gradient of such values.
    query_gradient, key_gradient, value_gradient = gradients
    weight = _slot_weight(log_mass, empty)
    pull = (-scale * weight * weight_cotangent).swapaxes(1, 2)[..., None]  # [B, T, Hq, 1]
    mean_key, mass_of_tokens = _forward(scale, query, key, key)
    mean_key, _ = _with_empty_slots(mean_key, mass_of_tokens, empty)
    pulled = (pull * query).astype(query.dtype)
    key_pull = _backward(scale, query, key, key, mean_key, log_mass, pulled)[2]
    query_gradient = (query_gradient + pull * mean_key).astype(query.dtype)
    return query_gradient, key_gradient + key_pull, value_gradient


_attend.defvjp(_attend_fwd, _attend_bwd)


def _with_empty_slots(out, log_mass, empty: int):
    """The output and log-sum-exp of tokens, with `empty` zeros of logit 0 beside them."""
    log_empty = math.log(empty)
    share = jax.nn.sigmoid(log_mass - log_empty)  # the tokens'
    out = (out * share.swapaxes(1, 2)[..., None]).astype(out.dtype)
    return out, jnp.logaddexp(log_mass, log_empty)


def _slot_weight(log_mass, empty: int):
    """Of the log-sum-exp of all."""
    return jnp.exp(math.log(empty) - log_mass) if empty else jnp.zeros_like(log_mass)


def _forward(scale: float, query, key, value) -> tuple[jax.Array, jax.Array]:
    """cuDNN's: output [B, T, Hq, D] and log-sum-exp [B, Hq, T] float32."""
    unused = jnp.zeros(0, query.dtype)
    out, log_mass = jax_cudnn._dot_product_attention_fwd_p_wrapper.bind(
        query, key, value, *[unused] * 7, **_parameters(scale), is_training=True
    )
    return out, log_mass


def _backward(
    scale: float, query, key, value, out, log_mass, cotangent
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """cuDNN's: with p = exp(s - log_mass), ds = p (do v^T - sum of do * out)."""
    unused = jnp.zeros(0, query.dtype)
    gradients = jax_cudnn._dot_product_attention_bwd_p_wrapper.bind(
        query, key, value, *[unused] * 7, log_mass, out, cotangent, **_parameters(scale)
    )
    return tuple(gradients)


def _parameters(scale: float) -> dict[str, Any]:
    """What both calls are told."""
    parameters = {
        "scale": scale,
        "seed": 0,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),  # no bias, no gradient of one
        "mask_type": jax_cudnn.MaskType.CAUSAL,
        "layout": jax_cudnn.AttentionLayout.BTNH.value,
        "sliding_window_length": None,
    }
    known = inspect.signature(jax_cudnn.dot_product_attention).parameters
    if "score_mod" in known:  # from jax 0.12 on
        parameters["score_mod"] = None
    return parameters


def _pad_last(x: jax.Array, size: int) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * 3 + [(0, size - x.shape[3])])
