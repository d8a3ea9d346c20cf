"""The operator on the kernels' own arrays: forward and backward joined by one custom_vjp.

A call without a wide window is one kernel forward and one backward. With a wide window, the fused
kernels take the tokens as they enter the slots, and the kernels of `wide_window.py` the remainder
of the window; here the two parts are put together.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas.constants import LSE, OUT, SLOT_WEIGHT, STARTS
from pallas.tpu.backward import backward
from pallas.tpu.block_sizes import BlockSizes
from pallas.tpu.forward import forward
from pallas.tpu.launch import Arrays
from pallas.tpu.spec import CallSpec
from pallas.tpu.wide_window import wide_window_backward, wide_window_forward

# The tokens' arrays, by their names outside of the fused kernels, and their axis of rows.
_TOKEN_ARRAYS = {"key": 1, "rotated_key": 1, "value": 1, "log_decay": 3}


class Fused(NamedTuple):
    """What the kernels return; None for what was not asked for."""

    out: jax.Array  # [B, T, Hq V]
    slot_weight: jax.Array | None  # [B, Hkv, G, T] float32
    end: jax.Array | None  # [B, Hkv, M, K + V] float32, the slots after the last token that entered


def fused_attention(
    inputs: Arrays,
    constants: Arrays,
    *,
    spec: CallSpec,
    block_sizes: BlockSizes,
    interpret: bool = False,
) -> Fused:
    """Computes the operator; `inputs` are differentiated, `constants` are not.

    T is a multiple of spec.step_rows, K and V of 128, M of 16.

    Args:
      inputs: query [B, T, Hq K], key [B, T, Hkv K], value [B, T, Hkv V], of one dtype, bfloat16 or
        float32; log_decay [B, Hkv, M, T] float32; with spec.rotated, rotated_query and rotated_key;
        with spec.state, slots [B, Hkv, M, K + V] float32, those at the start.
      constants: with spec.rope, rope_table [1 or B, T, K2] float32, `expand_table` of the rotation
        times the root of scale * log2(e); with spec.segments, row_segments (`pack_row_segments`)
        and chunk_segments (`pack_chunk_segments`) and, with spec.wide_window, query_segment and
        token_segment [B, 1, T] float32, the numbers of the segments of all rows and tokens.
      interpret: as for `pallas_call`: True runs the kernels on the CPU.

    Saved for the backward, beside the inputs: the log-sum-exp, the slots at each grid step's start,
    the output if the window is wide, and the slot weight if the backward reads it. A
    `jax.checkpoint` policy that saves `pallas.constants.RESIDUAL_NAMES` spares itself the forward.
    """
    return _fused(spec, block_sizes, interpret, inputs, constants)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _fused(spec, block_sizes, interpret, inputs, constants) -> Fused:
    return _run(spec, block_sizes, interpret, inputs, constants, save=False)[0]


def _run(spec, block_sizes, interpret, inputs, constants, *, save) -> tuple[Fused, Arrays]:
    """The results, and the arrays that the backward may need, by name."""
    result = forward(
        _fused_arrays(inputs, constants, spec),
        spec,
        lockstep=block_sizes.forward_group,
        skew=block_sizes.forward_skew,
        save=save,
        interpret=interpret,
    )
    slot_weight = result.get("slot_weight")
    if spec.wide_window:
        part_lse = result["lse"]
        part = {"out": result["out"], "lse": part_lse}
        arrays = _wide_window_arrays(inputs, constants) | part
        result |= wide_window_forward(arrays, spec, interpret=interpret)
        if slot_weight is not None:
            slot_weight = slot_weight * jnp.exp2(part_lse - result["lse"])
    return Fused(result["out"], slot_weight, result.get("end")), result


def _fused_fwd(spec, block_sizes, interpret, inputs, constants):
    fused, result = _run(spec, block_sizes, interpret, inputs, constants, save=True)
    fused = fused._replace(out=checkpoint_name(fused.out, OUT))
    if fused.slot_weight is not None:
        fused = fused._replace(slot_weight=checkpoint_name(fused.slot_weight, SLOT_WEIGHT))
    saved = {
        "lse": checkpoint_name(result["lse"], LSE),
        "starts": checkpoint_name(result["starts"], STARTS),
    }
    if spec.wide_window:
        saved["out"] = fused.out
    if spec.slot_weight and (spec.wide_window or spec.pull_slots_only):
        saved["slot_weight"] = fused.slot_weight
    return fused, (inputs, constants, saved)


def _fused_bwd(spec, block_sizes, interpret, residuals, d_fused: Fused):
    inputs, constants, saved = residuals
    shared = {"d_out": d_fused.out, "lse": saved["lse"]}
    if spec.wide_window:
        shared["delta"] = _delta(saved, d_fused, spec)
    more = {"starts": saved["starts"]}
    if spec.slot_weight:
        more["d_slot_weight"] = d_fused.slot_weight
        if spec.pull_slots_only:
            more["d_slot_weight"] *= 1 - saved["slot_weight"]
    if spec.state:
        more["d_end"] = d_fused.end
    gradients = backward(
        _fused_arrays(inputs, constants, spec) | shared | more,
        spec,
        lockstep=block_sizes.backward_group,
        skew=block_sizes.backward_skew,
        interpret=interpret,
    )
    gradients = _token_gradients(gradients, spec)
    if spec.wide_window:
        arrays = _wide_window_arrays(inputs, constants) | shared
        remainder = wide_window_backward(arrays, spec, interpret=interpret)
        prefix = "rotated_" if spec.rotated else ""
        for name, x in (
            ("value", remainder["d_value"]),
            (prefix + "query", remainder["d_query"]),
            (prefix + "key", remainder["d_key"]),
        ):
            gradients[name] = _sum(gradients[name], x)
    return gradients, jax.tree.map(jnp.zeros_like, constants)


_fused.defvjp(_fused_fwd, _fused_bwd)


def _fused_arrays(inputs: Arrays, constants: Arrays, spec: CallSpec) -> Arrays:
    """The fused kernels' inputs, by their names there.

    Their `token_` arrays hold the rows' own tokens or, with a wide window, those that enter the
    slots at the rows.
    """
    arrays = {name: x for name, x in inputs.items() if name not in _TOKEN_ARRAYS}
    arrays |= {n: x for n, x in constants.items() if n not in ("query_segment", "token_segment")}
    for name, axis in _TOKEN_ARRAYS.items():
        if name in inputs:
            x = inputs[name]
            arrays[f"token_{name}"] = _shift(x, spec, axis=axis) if spec.wide_window else x
    if spec.rope and spec.wide_window:
        arrays["token_rope_table"] = _shift(constants["rope_table"], spec, axis=1)
    return arrays


def _token_gradients(gradients: Arrays, spec: CallSpec) -> Arrays:
    """Turns the fused kernels' gradients into those of `fused_attention`'s inputs, by name."""
    result = {}
    for name, axis in _TOKEN_ARRAYS.items():
        if f"d_token_{name}" in gradients:
            x = gradients.pop(f"d_token_{name}")
            result[name] = _unshift(x, spec, axis=axis) if spec.wide_window else x
    return result | {name.removeprefix("d_"): x for name, x in gradients.items()}


def _wide_window_arrays(inputs: Arrays, constants: Arrays) -> Arrays:
    """The inputs of `wide_window.py`'s kernels: what they rotate, or what is rotated already."""
    prefix = "rotated_" if "rotated_key" in inputs else ""
    arrays = {name: inputs[prefix + name] for name in ("query", "key")}
    arrays["value"] = inputs["value"]
    if "rope_table" in constants:
        table = constants["rope_table"]
        arrays |= {"query_table": table, "key_table": table}
    return arrays | {n: x for n, x in constants.items() if n in ("query_segment", "token_segment")}


def _delta(saved: Arrays, d_fused: Fused, spec: CallSpec) -> jax.Array:
    """The sum of p times its gradient over slots and window, [B, Hkv, G, T] float32."""
    B, Hkv, G, T = saved["lse"].shape
    product = saved["out"].astype(jnp.float32) * d_fused.out.astype(jnp.float32)
    delta = jnp.sum(product.reshape(B, T, Hkv, G, -1), -1).transpose(0, 2, 3, 1)
    if d_fused.slot_weight is not None and not spec.pull_slots_only:
        delta += saved["slot_weight"] * d_fused.slot_weight
    return delta


def _sum(a: jax.Array, b: jax.Array) -> jax.Array:
    return (a.astype(jnp.float32) + b.astype(jnp.float32)).astype(a.dtype)


def _shift(x: jax.Array, spec: CallSpec, *, axis: int) -> jax.Array:
    """Puts what row t - W holds at row t, and zeros where there is none."""
    T = x.shape[axis]
    W = min(spec.window, T)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (W, 0)
    return jnp.pad(jax.lax.slice_in_dim(x, 0, T - W, axis=axis), padding)


def _unshift(x: jax.Array, spec: CallSpec, *, axis: int) -> jax.Array:
    """The transpose of `_shift`."""
    T = x.shape[axis]
    W = min(spec.window, T)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, W)
    return jnp.pad(jax.lax.slice_in_dim(x, W, T, axis=axis), padding)
