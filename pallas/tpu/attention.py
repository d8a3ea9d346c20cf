"""The fused operator on the kernels' own arrays: forward and backward joined by one custom_vjp."""

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
from pallas.tpu.wide_window import band_backward, band_forward

# Of what enters the slots.
_TIME_AXIS = {"key": 1, "rotated_key": 1, "value": 1, "log_decay": 3}


class Fused(NamedTuple):
    """What the kernels return; None for what was not asked for."""

    out: jax.Array  # [B, T, H * G * V]
    slot_weight: jax.Array | None  # [B, H, G, T] float32
    end: jax.Array | None  # [B, H, M, K + V] float32, the slots after the last token that entered


def fused_attention(
    inputs: Arrays,
    constants: Arrays,
    *,
    spec: CallSpec,
    block_sizes: BlockSizes,
    interpret: bool = False,
) -> Fused:
    """The operator; `inputs` are differentiated, `constants` are not.

    inputs: query [B, T, H * G * K], key [B, T, H * K], value [B, T, H * V], of one dtype, bfloat16
      or float32; with spec.rotated, rotated_query and rotated_key; log_decay [B, H, M, T] float32;
      with spec.state, slots [B, H, M, K + V] float32. T is a multiple of spec.step_rows, K and V of
      128, M of 16.
    constants: with spec.rope, rope_table [1 or B, T, 2 K] float32, `expand_table` of the rotation
      times the root of scale * log2(e); with spec.segments, row_segments (`pack_row_segments`) and
      chunk_segments (`pack_chunk_segments`) and, if spec.wide_window, query_segment and
      token_segment [B, 1, T], the numbers of the segments of all rows and tokens.
    interpret: as for `pallas_call`: True runs the kernels on the CPU.

    Saved for the backward, beside the inputs: the log-sum-exp, the slots at each grid step's start,
    of wide windows the output, and the slot weight if the backward reads it. A `jax.checkpoint`
    policy that saves `RESIDUAL_NAMES` spares itself the forward.
    """
    return _fused(spec, block_sizes, interpret, inputs, constants)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _fused(spec, block_sizes, interpret, inputs, constants) -> Fused:
    return _run(spec, block_sizes, interpret, inputs, constants, save=False)[0]


def _run(spec, block_sizes, interpret, inputs, constants, *, save) -> tuple[Fused, Arrays]:
    result = forward(
        _of_fused(inputs, constants, spec),
        spec,
        group=block_sizes.forward_group,
        skew=block_sizes.forward_skew,
        save=save,
        interpret=interpret,
    )
    weight = result.get("slot_weight")
    if spec.wide_window:
        part_lse = result["lse"]
        part = {"out": result["out"], "lse": part_lse}
        result |= band_forward(_of_band(inputs, constants) | part, spec, interpret=interpret)
        if weight is not None:
            weight = weight * jnp.exp2(part_lse - result["lse"])
    return Fused(result["out"], weight, result.get("end")), result


def _fused_fwd(spec, block_sizes, interpret, inputs, constants):
    fused, result = _run(spec, block_sizes, interpret, inputs, constants, save=True)
    fused = fused._replace(out=checkpoint_name(fused.out, OUT))
    if fused.slot_weight is not None:
        weight = checkpoint_name(fused.slot_weight, SLOT_WEIGHT)
        fused = fused._replace(slot_weight=weight)
    saved = {
        "lse": checkpoint_name(result["lse"], LSE),
        "starts": checkpoint_name(result["starts"], STARTS),
    }
    if spec.wide_window:
        saved["out"] = fused.out
    if spec.slot_weight and (spec.wide_window or spec.pull_slots_only):
        saved["slot_weight"] = fused.slot_weight
    return fused, (inputs, constants, saved)


def _fused_bwd(spec, block_sizes, interpret, residuals, cotangents: Fused):
    inputs, constants, saved = residuals
    given = {"out_cotangent": cotangents.out, "lse": saved["lse"]}
    if spec.wide_window:
        given["delta"] = _delta(saved, cotangents, spec)
    more = {"starts": saved["starts"]}
    if spec.slot_weight:
        more["weight_cotangent"] = cotangents.slot_weight
        if spec.pull_slots_only:
            more["weight_cotangent"] *= 1 - saved["slot_weight"]
    if spec.state:
        more["end_cotangent"] = cotangents.end
    result = backward(
        _of_fused(inputs, constants, spec) | given | more,
        spec,
        group=block_sizes.backward_group,
        skew=block_sizes.backward_skew,
        interpret=interpret,
    )
    if spec.wide_window:
        band = band_backward(_of_band(inputs, constants) | given, spec, interpret=interpret)
        for name, axis in _TIME_AXIS.items():
            if name in result:
                result[name] = _unshift(result[name], spec, axis=axis)
        prefix = "rotated_" if spec.rotated else ""
        for name, x in band.items():
            name = name if name == "value" else prefix + name
            result[name] = _sum(result[name], x)
    return result, jax.tree.map(jnp.zeros_like, constants)


_fused.defvjp(_fused_fwd, _fused_bwd)


def _of_fused(inputs: Arrays, constants: Arrays, spec: CallSpec) -> Arrays:
    """The fused kernel's inputs. Of a wide window it reads the tokens as they enter the slots."""
    constants = {n: x for n, x in constants.items() if n not in ("query_segment", "token_segment")}
    if not spec.wide_window:
        return inputs | constants
    entering = {
        name: _shift(inputs[name], spec, axis=axis)
        for name, axis in _TIME_AXIS.items()
        if name in inputs
    }
    if spec.rope:
        constants["token_rope_table"] = _shift(constants["rope_table"], spec, axis=1)
    return inputs | entering | constants


def _of_band(inputs: Arrays, constants: Arrays) -> Arrays:
    prefix = "rotated_" if "rotated_key" in inputs else ""
    arrays = {name: inputs[prefix + name] for name in ("query", "key")}
    arrays["value"] = inputs["value"]
    if "rope_table" in constants:
        arrays |= {"query_table": constants["rope_table"], "key_table": constants["rope_table"]}
    return arrays | {n: x for n, x in constants.items() if n in ("query_segment", "token_segment")}


def _delta(saved: Arrays, cotangents: Fused, spec: CallSpec) -> jax.Array:
    """[B, H, G, T]: the sum of p times its gradient, of slots and window."""
    B, H, G, T = saved["lse"].shape
    product = saved["out"].astype(jnp.float32) * cotangents.out.astype(jnp.float32)
    delta = jnp.sum(product.reshape(B, T, H, G, -1), -1).transpose(0, 2, 3, 1)
    if cotangents.slot_weight is not None and not spec.pull_slots_only:
        delta += saved["slot_weight"] * cotangents.slot_weight
    return delta


def _sum(a: jax.Array, b: jax.Array) -> jax.Array:
    return (a.astype(jnp.float32) + b.astype(jnp.float32)).astype(a.dtype)


def _shift(x: jax.Array, spec: CallSpec, *, axis: int) -> jax.Array:
    """Token t - W at t, zeros before."""
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
