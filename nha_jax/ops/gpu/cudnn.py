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
from nha_jax.ops.state import Tokens, empty_slots
from nha_jax.ops.timeline import build_timeline, next_state
from nha_jax.ops.types import NHAOutput, Options
from pallas.constants import LSE, OUT

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
    """Computes `nha_attention` where no token leaves the window, without segments or a past.

    Shapes as there; bfloat16, heads of up to 256.
    """
    M = log_decay.shape[3]
    rotated_key = apply_rope(key, rope)
    out, weight = cudnn_full_attention(
        apply_rope(query, rope), rotated_key, value, num_slots=M, options=options
    )
    state = None
    if options.return_state:
        tokens = Tokens(key, rotated_key, value, log_decay.astype(jnp.float32))
        timeline = build_timeline(tokens, None, None, options.window_size)
        state = next_state(timeline, empty_slots(key, value, M), None, None)
    return NHAOutput(out, state, weight if options.return_slot_weight else None)


def cudnn_full_attention(
    rotated_query: jax.Array,
    rotated_key: jax.Array,
    value: jax.Array,
    *,
    num_slots: int,
    options: Options,
) -> tuple[jax.Array, jax.Array]:
    """Computes causal softmax attention of T tokens to themselves, with the slots still empty.

    With attended empty slots, whose logits and values are 0, the softmax's denominator grows from
    exp(lse) to exp(lse) + M: the output shrinks by sigmoid(lse - log M), and the slot weight is
    the rest.

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
    out, lse = _forward(scale, query, key, value)
    if empty:
        out, lse = _with_empty_slots(out, lse, empty)
    # To a rematerialised layer both are given, so that its forward does not run again.
    out, lse = checkpoint_name(out, OUT), checkpoint_name(lse, LSE)
    return (out, _slot_weight(lse, empty)), (query, key, value, out, lse)


def _attend_bwd(scale, empty, weight_pulls, residuals, cotangents):
    """Computes the gradients by cuDNN's backward.

    It makes its probabilities from the log-sum-exp that it is given: given that of tokens and empty
    slots together, and their output, its gradients are those of the whole.
    """
    query, key, value, out, lse = residuals
    d_out, d_slot_weight = cotangents
    gradients = _backward(scale, query, key, value, out, lse, d_out)
    if not empty or not weight_pulls:
        return gradients
    # The slot weight w falls with every logit, by its probability p: dw = -w sum_j p_j ds_j. Hence
    # dq = -w scale sum_j p_j k_j, an output with keys for values, and dk_j = -scale sum_t w p_tj
    # q_t, the gradient of such values.
    d_query, d_key, d_value = gradients
    weight = _slot_weight(lse, empty)
    pull = (-scale * weight * d_slot_weight).swapaxes(1, 2)[..., None]  # [B, T, Hq, 1]
    mean_key, token_lse = _forward(scale, query, key, key)
    mean_key, _ = _with_empty_slots(mean_key, token_lse, empty)
    pulled = (pull * query).astype(query.dtype)
    key_pull = _backward(scale, query, key, key, mean_key, lse, pulled)[2]
    d_query = (d_query + pull * mean_key).astype(query.dtype)
    return d_query, d_key + key_pull, d_value


_attend.defvjp(_attend_fwd, _attend_bwd)


def _with_empty_slots(out, lse, empty: int):
    """The output and log-sum-exp of tokens, with `empty` zeros of logit 0 beside them."""
    log_empty = math.log(empty)
    share = jax.nn.sigmoid(lse - log_empty)  # the tokens'
    out = (out * share.swapaxes(1, 2)[..., None]).astype(out.dtype)
    return out, jnp.logaddexp(lse, log_empty)


def _slot_weight(lse, empty: int):
    """The slot weight, of the log-sum-exp of tokens and empty slots."""
    return jnp.exp(math.log(empty) - lse) if empty else jnp.zeros_like(lse)


def _forward(scale: float, query, key, value) -> tuple[jax.Array, jax.Array]:
    """Calls cuDNN's forward: output [B, T, Hq, D] and log-sum-exp [B, Hq, T] float32."""
    unused = jnp.zeros(0, query.dtype)
    out, lse = jax_cudnn._dot_product_attention_fwd_p_wrapper.bind(
        query, key, value, *[unused] * 7, **_parameters(scale), is_training=True
    )
    return out, lse


def _backward(
    scale: float, query, key, value, out, lse, cotangent
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Calls cuDNN's backward: with p = exp(s - lse), ds = p (do v^T - sum of do * out)."""
    unused = jnp.zeros(0, query.dtype)
    gradients = jax_cudnn._dot_product_attention_bwd_p_wrapper.bind(
        query, key, value, *[unused] * 7, lse, out, cotangent, **_parameters(scale)
    )
    return tuple(gradients)


def _parameters(scale: float) -> dict[str, Any]:
    """The parameters of both cuDNN calls."""
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
