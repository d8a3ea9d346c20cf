"""The operator on the kernels' own arrays: forward and backward joined by one custom_vjp."""

import functools
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name

from pallas.constants import LSE, OUT, SLOT_WEIGHT, STARTS
from pallas.gpu.backward.backward import Saved, backward, slots_input
from pallas.gpu.block_sizes import BlockSizes
from pallas.gpu.forward.gates import end_gates
from pallas.gpu.forward.output import chunk_outputs
from pallas.gpu.forward.states import chunk_states
from pallas.gpu.spec import CallSpec

Arrays = dict[str, jax.Array]


class Fused(NamedTuple):
    """What the kernels return."""

    out: jax.Array  # [B, Tq, Hq, D] bfloat16
    lse: jax.Array  # [B, Hq, Tq] float32, natural log of the softmax's denominator
    slot_weight: jax.Array  # [B, Hq, Tq] float32; differentiable with spec.weight
    end: tuple[jax.Array, jax.Array] | None  # [B, Hkv, D, M] float32 each; with spec.state


def fused_attention(
    inputs: Arrays,
    constants: Arrays,
    *,
    spec: CallSpec,
    block_sizes: BlockSizes,
    interpret: Any = False,
) -> Fused:
    """The operator: a state pass, which finds the slots at the chunks' starts, and an output pass.

    B rows, Tq query rows, a multiple of C = 64, Tk token rows, Hq query heads, Hkv KV heads, D 64,
    128, 192 or 256, M 16 (D up to 192), 32, 64 or 128; symbols as in `spec.py`. The inputs are
    differentiated, the constants are not, and lse has no gradient.

    inputs: window_query [B, Tq, Hq, D], window_key and value [B, Tk, Hkv, D] bfloat16; with
      spec.slots log_decay [B, Tq, Hkv, M] float32, whose row r is of the token that enters at row
      r + spec.ahead (0 where none does), and query and key, where the slots do not read those of
      the window; with spec.state start_key and start_value, the slots at the start, [B, Hkv, D, M]
      float32.
    constants: cos and sin of a `Rotation`, if the kernels are to rotate window_query and
      window_key; with spec.masked query_segment and token_segment, int32 arrays of `Segments`,
      and, with slots, slot_access and the token_reaches_end [B, Tq] and start_reaches_end
      [B, Tq / C] of `end_gates`.
    interpret: `InterpretGPUParams` run the kernels on the CPU.

    Saved for the backward, beside the inputs: the output, lse, the slot weight and the slots
    at the chunks' starts. A `jax.checkpoint` policy that saves `RESIDUAL_NAMES` spares itself the
    forward.
    """
    return _fused(spec, block_sizes, interpret, inputs, constants)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _fused(spec, block_sizes, interpret, inputs, constants) -> Fused:
    return _forward(spec, block_sizes, interpret, inputs, constants)[0]


def _forward(spec, block_sizes, interpret, inputs, constants):
    options = {"spec": spec, "block_sizes": block_sizes, "interpret": interpret}
    window = ("window_query", "window_key", "value")
    arrays = {name: inputs[name] for name in window}
    starts = end = None
    if spec.slots:
        query, key = (slots_input(inputs, name) for name in ("query", "key"))
        reach = constants.get("token_reaches_end"), constants.get("start_reaches_end")
        gates = end_gates(inputs["log_decay"], *reach, ahead=spec.ahead, interpret=interpret)
        initial = (inputs["start_key"], inputs["start_value"]) if spec.state else None
        states = chunk_states(key, inputs["value"], gates, initial, **options)
        starts = states.key, states.value
        end = states.last
        arrays |= {"query": query, "key": key, "log_decay": inputs["log_decay"]}
        arrays |= {"start_key": states.key, "start_value": states.value}
    read = ("query_segment", "token_segment", "slot_access", "cos", "sin")
    arrays |= {name: constants[name] for name in read if name in constants}
    result = chunk_outputs(arrays, **options)
    return Fused(result.out, result.lse, result.slot_weight, end), starts


def _fused_fwd(spec, block_sizes, interpret, inputs, constants):
    fused, starts = _forward(spec, block_sizes, interpret, inputs, constants)
    fused = fused._replace(
        out=checkpoint_name(fused.out, OUT),
        lse=checkpoint_name(fused.lse, LSE),
        slot_weight=checkpoint_name(fused.slot_weight, SLOT_WEIGHT),
    )
    saved = Saved(
        out=fused.out,
        lse=fused.lse,
        slot_weight=fused.slot_weight,
        starts=jax.tree.map(lambda x: checkpoint_name(x, STARTS), starts),
    )
    return fused, (inputs, constants, saved)


def _fused_bwd(spec, block_sizes, interpret, residuals, cotangents: Fused):
    inputs, constants, saved = residuals
    grads = backward(
        inputs,
        constants,
        saved,
        cotangents.out,
        cotangents.slot_weight if spec.weight else None,
        cotangents.end,
        spec=spec,
        block_sizes=block_sizes,
        interpret=interpret,
    )
    return grads, None


_fused.defvjp(_fused_fwd, _fused_bwd)
