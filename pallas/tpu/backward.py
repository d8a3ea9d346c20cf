"""The fused backward: every gradient in one pass over the chunks, from the last to the first.

What a chunk does, and the equations, are in `backward_chunk.py`.
"""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas.tpu.arithmetic import apply_feature_map
from pallas.tpu.backward_chunk import Chunk, Step
from pallas.tpu.chunk_tokens import Tokens, emit, own_blocks, rotated_keys, written_decays
from pallas.tpu.gates import turned_decays
from pallas.tpu.grid import Grid
from pallas.tpu.launch import Arrays, launch, like
from pallas.tpu.spec import CallSpec


def backward(inputs: Arrays, spec: CallSpec, *, group: int, skew: int, interpret: bool) -> Arrays:
    """The kernel's call.

    inputs: those of `forward`, its lse and starts, and out_cotangent [B, T, H * G * V] of the
    value's dtype; with spec.slot_weight, weight_cotangent [B, H, G, T] float32, and with
    spec.pull_slots_only that times 1 - slot_weight; with spec.state, end_cotangent
    [B, H, M, K + V] float32; with spec.wide_window, delta [B, H, G, T] float32, the sum of
    out * out_cotangent (and, but for spec.pull_slots_only, of slot_weight * weight_cotangent),
    which the kernel sees only part of.

    Returns the cotangents of query, key, value, log_decay and, with spec.rotated, rotated_query
    and rotated_key; with spec.state, slots.
    """
    grid = Grid.of(inputs, spec, reverse=True)
    K, V, M, heads = grid.K, grid.V, grid.M, grid.heads
    wide = jnp.float32
    in_specs = grid.input_specs(inputs) | {
        "out_cotangent": grid.tokens(spec.group * V),
        "lse": grid.lanes(spec.group),
        "starts": grid.starts(),
    }
    optional = {
        "weight_cotangent": grid.lanes(spec.group),
        "end_cotangent": grid.slots(),
        "delta": grid.lanes(spec.group),
    }
    in_specs |= {name: block for name, block in optional.items() if name in inputs}
    names = ["query", "key", "value", "log_decay"]
    names += ["rotated_query", "rotated_key"] * spec.rotated + ["slots"] * spec.state
    outputs = {name: like(inputs[name], in_specs[name]) for name in names}
    if spec.state:  # the starts stand for it
        inputs = {name: x for name, x in inputs.items() if name != "slots"}
        del in_specs["slots"]
    before = {}
    if spec.halo and grid.steps > 1:
        before = {name: inputs[name] for name in grid.halo_specs(inputs)}
    scratch = {"slots": pltpu.VMEM((heads, M, K + V), wide)}
    if spec.halo:
        scratch |= {
            name: pltpu.VMEM((heads, spec.halo, size), wide)
            for name, size in (("key", K), ("rotated_key", K), ("value", V), ("log_decay", M))
        }
    return launch(
        functools.partial(_kernel, spec=spec, steps=grid.steps, group=group, skew=skew),
        (inputs, in_specs),
        (before, grid.halo_specs(inputs) if before else {}),
        name="nha_backward",
        grid=grid.shape,
        parallel=2,
        outputs=outputs,
        scratch=scratch,
        interpret=interpret,
    )


def _kernel(refs, before, outs, later, *, spec: CallSpec, steps: int, group: int, skew: int):
    step, head = steps - 1 - pl.program_id(2), pl.program_id(3)
    names = ["slots"] + ["key", "rotated_key", "value", "log_decay"] * bool(spec.halo)

    @pl.when(step == steps - 1)
    def _():
        for ref in (later[name] for name in names):
            ref[head] = jnp.zeros(ref.shape[1:], ref.dtype)
        if spec.state:
            later["slots"][head] = refs["end_cotangent"][0, 0]

    tokens = Tokens(spec, own_blocks(refs, spec), _halo(refs, before, step, spec))
    carry = {name: later[name][head] for name in names}
    shared = Step(refs, outs, tokens, spec, step, refs["starts"][0, 0, 0], carry)
    chunks = [Chunk(n, shared) for n in range(spec.chunks)]
    emit([chunk.forward_stages() for chunk in chunks], spec.chunks, 1)
    emit([chunk.backward_stages() for chunk in reversed(chunks)], group, skew)
    for name in names:
        later[name][head] = carry[name]
    if spec.state:
        outs["slots"][0, 0] = carry["slots"]


def _halo(refs, before, step, spec: CallSpec) -> Arrays:
    """The tokens before the step's own; before the first token, keys and values of any kind."""
    if not spec.halo:
        return {}
    dtype = refs["key"].dtype
    if not before:  # the whole sequence is one step
        sizes = {name: refs[name].shape[2] for name in ("key", "value", "log_decay")}
        key = jnp.zeros((spec.halo, sizes["key"]), dtype)
        value = jnp.zeros((spec.halo, sizes["value"]), dtype)
        decay = jnp.zeros((spec.halo, sizes["log_decay"]), jnp.float32)
        return {"rotated_key": key, "key": key, "value": value, "decay": decay}
    last = slice(before["key"].shape[1] - spec.halo, None)
    decay = turned_decays(written_decays(before, slice(None), spec), dtype)
    return {
        "rotated_key": rotated_keys(before, last, spec),
        "key": apply_feature_map(before["key"][0, last], spec.feature_map),
        "value": before["value"][0, last],
        "decay": jnp.where(step > 0, decay[decay.shape[0] - spec.halo :], 0.0),
    }
