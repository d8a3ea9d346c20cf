"""The forward of the operator on the kernels' own arrays."""

from typing import Any, NamedTuple

import jax

from pallas.gpu.block_sizes import BlockSizes
from pallas.gpu.gates import chunk_gates
from pallas.gpu.output_pass import Facts, output_pass
from pallas.gpu.spec import Spec
from pallas.gpu.state_pass import state_pass

Arrays = dict[str, jax.Array]


class Fused(NamedTuple):
    """What the kernels return."""

    out: jax.Array  # [B, N, H * G, D] bfloat16
    log_mass: jax.Array  # [B, H * G, N] float32, natural log of the softmax's denominator
    slot_weight: jax.Array  # [B, H * G, N] float32
    end: tuple[jax.Array, jax.Array] | None  # [B, H, D, M] float32 each; with spec.state


def fused_attention(
    inputs: Arrays, *, spec: Spec, block_sizes: BlockSizes, interpret: Any = False
) -> Fused:
    """The operator: a state pass, which finds the slots at the chunks' starts, and an output pass.

    B rows, N query rows, a multiple of C = 64, P token rows, H KV heads, D 64 or 128, M 16, 32, 64
    or 128; symbols as in `spec.py`.

    inputs: rotated_query [B, N, H * G, D], rotated_key and value [B, P, H, D] bfloat16; with
      spec.slots query and key, not rotated, and log_decay [B, N, H, M] float32, of the token that
      enters at each row (0 where none does); with spec.masked query_run and visible, int32
      arrays of `Facts`, and, with slots, reads and the written [B, N] and kept [B, N / C] of
      `chunk_gates`; with spec.state start_key and start_value, the slots at the start,
      [B, H, D, M] float32.
    interpret: `InterpretGPUParams` run the kernels on the CPU.

    There is no gradient yet.
    """
    facts = starts = end = None
    if spec.masked:
        facts = Facts(inputs["query_run"], inputs["visible"], inputs.get("reads"))
    if spec.slots:
        gates = chunk_gates(inputs["log_decay"], inputs.get("written"), inputs.get("kept"))
        start = (inputs["start_key"], inputs["start_value"]) if spec.state else None
        states = state_pass(
            inputs["key"],
            inputs["value"],
            gates,
            start,
            spec=spec,
            block_sizes=block_sizes,
            interpret=interpret,
        )
        starts = states.key, states.value
        if states.end_key is not None and states.end_value is not None:
            end = states.end_key, states.end_value
    result = output_pass(
        inputs.get("query"),
        inputs["rotated_query"],
        inputs.get("key"),
        inputs["rotated_key"],
        inputs["value"],
        inputs.get("log_decay"),
        starts,
        facts,
        spec=spec,
        block_sizes=block_sizes,
        interpret=interpret,
    )
    return Fused(result.out, result.log_mass, result.slot_weight, end)
