"""The fused operator on the kernels' own arrays: forward and backward joined by one custom_vjp."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas.tpu.backward import backward
from pallas.tpu.block_sizes import BlockSizes
from pallas.tpu.forward import forward
from pallas.tpu.launch import Arrays
from pallas.tpu.spec import Spec
from pallas.tpu.wide_window import band_backward, band_forward

RESIDUAL_NAMES = ("nha_out", "nha_lse", "nha_starts", "nha_slot_weight")
"""`jax.ad_checkpoint.checkpoint_name`s of what the backward needs of the forward."""

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
    spec: Spec,
    block_sizes: BlockSizes,
    interpret: bool = False,
) -> Fused:
    """The operator; `inputs` are differentiated, `constants` are not.

    inputs: query [B, T, H * G * K], key [B, T, H * K], value [B, T, H * V], of one dtype, bfloat16
      or float32; with spec.rotated, rotated_query and rotated_key; log_decay [B, H, M, T] float32;
      with spec.state, slots [B, H, M, K + V] float32. T is a multiple of spec.rows, K and V of
      128, M of 16.
    constants: with spec.rope, table [1 or B, T, 2 K] float32, `expand_table` of the rotation times
      the root of scale * log2(e); with spec.segments, facts (`pack_facts`) and visible
      (`pack_visible`) and, if spec.wide, query_run and key_run [B, 1, T], the numbers of the
      segments of all rows and tokens.
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
    if spec.wide:
        part_lse = result["lse"]
        part = {"out": result["out"], "lse": part_lse}
        result |= band_forward(_of_band(inputs, constants) | part, spec, interpret=interpret)
        if weight is not None:
            weight = weight * jnp.exp2(part_lse - result["lse"])
    return Fused(result["out"], weight, result.get("end")), result


def _fused_fwd(spec, block_sizes, interpret, inputs, constants):
    fused, result = _run(spec, block_sizes, interpret, inputs, constants, save=True)
    fused = fused._replace(out=checkpoint_name(fused.out, "nha_out"))
    if fused.slot_weight is not None:
        weight = checkpoint_name(fused.slot_weight, "nha_slot_weight")
        fused = fused._replace(slot_weight=weight)
    saved = {name: checkpoint_name(result[name], f"nha_{name}") for name in ("lse", "starts")}
    if spec.wide:
        saved["out"] = fused.out
    if spec.weight and (spec.wide or spec.weight_of_slots):
        saved["slot_weight"] = fused.slot_weight
    return fused, (inputs, constants, saved)


def _fused_bwd(spec, block_sizes, interpret, residuals, cotangents: Fused):
    inputs, constants, saved = residuals
    given = {"out_cotangent": cotangents.out, "lse": saved["lse"]}
    if spec.wide:
        given["delta"] = _delta(saved, cotangents, spec)
    more = {"starts": saved["starts"]}
    if spec.weight:
        more["weight_cotangent"] = cotangents.slot_weight
        if spec.weight_of_slots:
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
    if spec.wide:
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


def _of_fused(inputs: Arrays, constants: Arrays, spec: Spec) -> Arrays:
    """The fused kernel's inputs. Of a wide window it reads the tokens as they enter the slots."""
    constants = {n: x for n, x in constants.items() if n not in ("query_run", "key_run")}
    if not spec.wide:
        return inputs | constants
    entering = {
        name: _shift(inputs[name], spec, axis=axis)
        for name, axis in _TIME_AXIS.items()
        if name in inputs
    }
    if spec.rope:
        constants["entering_table"] = _shift(constants["table"], spec, axis=1)
    return inputs | entering | constants


def _of_band(inputs: Arrays, constants: Arrays) -> Arrays:
    prefix = "rotated_" if "rotated_key" in inputs else ""
    arrays = {name: inputs[prefix + name] for name in ("query", "key")}
    arrays["value"] = inputs["value"]
    if "table" in constants:
        arrays |= {"query_table": constants["table"], "key_table": constants["table"]}
    return arrays | {n: x for n, x in constants.items() if n in ("query_run", "key_run")}


def _delta(saved: Arrays, cotangents: Fused, spec: Spec) -> jax.Array:
    """[B, H, G, T]: the sum of p times its gradient, of slots and window."""
    B, H, G, T = saved["lse"].shape
    product = saved["out"].astype(jnp.float32) * cotangents.out.astype(jnp.float32)
    delta = jnp.sum(product.reshape(B, T, H, G, -1), -1).transpose(0, 2, 3, 1)
    if cotangents.slot_weight is not None and not spec.weight_of_slots:
        delta += saved["slot_weight"] * cotangents.slot_weight
    return delta


def _sum(a: jax.Array, b: jax.Array) -> jax.Array:
    return (a.astype(jnp.float32) + b.astype(jnp.float32)).astype(a.dtype)


def _shift(x: jax.Array, spec: Spec, *, axis: int) -> jax.Array:
    """Token t - W at t, zeros before."""
    T = x.shape[axis]
    W = min(spec.window, T)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (W, 0)
    return jnp.pad(jax.lax.slice_in_dim(x, 0, T - W, axis=axis), padding)


def _unshift(x: jax.Array, spec: Spec, *, axis: int) -> jax.Array:
    """The transpose of `_shift`."""
    T = x.shape[axis]
    W = min(spec.window, T)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, W)
    return jnp.pad(jax.lax.slice_in_dim(x, W, T, axis=axis), padding)
