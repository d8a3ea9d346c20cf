"""The operator on the kernels' own arrays: its forward and backward, joined by one custom_vjp."""

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
    """What `fused_attention` returns."""

    out: jax.Array  # [B, Tq, Hq, D] bfloat16
    lse: jax.Array  # [B, Hq, Tq] float32, natural log of the softmax's denominator
    slot_weight: jax.Array  # [B, Hq, Tq] float32; differentiable with spec.weight
    end: tuple[jax.Array, jax.Array] | None  # the slots at the end, as the inputs' start; see there


def fused_attention(
    inputs: Arrays,
    constants: Arrays,
    *,
    spec: CallSpec,
    block_sizes: BlockSizes,
    interpret: Any = False,
) -> Fused:
    """The operator, with its gradient.

    With slots it is three launches: the gates of the chunks, the slots at the chunks' starts, and
    the output; without, it is the last alone. C = 64 divides Tq; D is 64, 128, 192 or 256; M is 16
    (with D up to 192), 32, 64 or 128; the other symbols are those of `spec.py`.

    Args:
      inputs: what is differentiated.
        window_query [B, Tq, Hq, D], window_key and value [B, Tk, Hkv, D], bfloat16. Tk reaches as
          far as whole blocks of C tokens do that the last rows see.
        log_decay, with slots: [B, Tq, Hkv, M] float32. Its row r is of the token that enters at
          row r + spec.ahead, and 0 where none does.
        query, key, with slots that do not read those of the window: shaped as those.
        start_key, start_value, with spec.state: the slots at the start, [B, Hkv, D, M] float32.
      constants: what is not.
        cos, sin, of a `Rotation`, if the kernels are to rotate window_query and window_key.
        query_segment, token_segment and, with slots, slot_access, with spec.masked: of `Segments`.
        token_reaches_end, start_reaches_end, with slots and spec.masked: as for `end_gates`.
      spec: the static facts of the call.
      block_sizes: how the kernels cut their work.
      interpret: `InterpretGPUParams` to run the kernels on the CPU, or False.

    Returns:
      The output and what goes with it. lse has no gradient. The backward needs, beside the inputs,
      the output, lse, the slot weight and the slots at the chunks' starts: a `jax.checkpoint`
      policy that saves `RESIDUAL_NAMES` spares itself the forward.

    Raises:
      ValueError: block_sizes do not fit the shapes; the message names the field.
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
