"""The fused backward kernel: every gradient in one pass over the rows, from the last to the first.

Inputs: those of `forward.py` but the slots (the starts say as much), and

    lse, starts        as the forward returned them
    d_out              [B, T, Hq V], of the value's dtype
    d_slot_weight      [B, Hkv, G, T] float32       with spec.slot_weight; with spec.pull_slots_only
                                                    multiplied by 1 - slot_weight
    d_end              [B, Hkv, M, K + V] float32   with spec.state
    delta              [B, Hkv, G, T] float32       with spec.wide_window, see below

Delta is the sum of out * d_out and, but for spec.pull_slots_only, of slot_weight * d_slot_weight.
Without a wide window the kernel finds it by itself; with one, it does not see all of the row.

A second group of blocks, of the same arrays, holds the halo before the step's rows (`grid.py`).

Outputs, of the shapes and dtypes of what they are the gradients of:

    d_query, d_token_key, d_token_value, d_token_log_decay
    d_rotated_query, d_token_rotated_key            with spec.rotated
    d_slots                                         with spec.state

Scratch, for each of the heads that take turns, float32: d_slots, the gradient of the slots at the
end of the step's rows, and of each form of tokens what the later rows add to the gradients of the
halo's: d_entering_key, d_window_key, d_value and d_decay.

A grid step goes through its chunks twice: from the first to the last, for their slots at start and
end, and then from the last to the first. `backward_chunk.py` has both, and the equations.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas.tpu.arithmetic import apply_feature_map
from pallas.tpu.backward_chunk import GridStep, backward_stages, forward_stages
from pallas.tpu.chunk_tokens import (
    Refs,
    StepTokens,
    entering_log_decays,
    own_tokens,
    window_keys,
)
from pallas.tpu.decays import floored_decays
from pallas.tpu.emission import emit
from pallas.tpu.grid import Grid
from pallas.tpu.launch import Arrays, Blocks, launch, like
from pallas.tpu.spec import CallSpec


def backward(
    inputs: Arrays, spec: CallSpec, *, lockstep: int, skew: int, interpret: bool
) -> Arrays:
    """Launches the kernel; inputs and outputs by name as in this module's docstring.

    lockstep, skew: of `emit`, for the way from the last chunk to the first.
    """
    grid = Grid.of(inputs, spec, reverse=True)
    return launch(
        functools.partial(_kernel, spec=spec, steps=grid.steps, lockstep=lockstep, skew=skew),
        backward_blocks(inputs, spec),
        name="nha_backward",
        grid=grid.shape,
        parallel=2,
        interpret=interpret,
    )


def backward_blocks(inputs: Arrays, spec: CallSpec) -> Blocks:
    """Returns what a grid step has in VMEM; of the inputs, only shapes and dtypes are read."""
    grid = Grid.of(inputs, spec, reverse=True)
    K, V, M, heads = grid.K, grid.V, grid.M, grid.heads
    in_specs = grid.input_specs(inputs) | {
        "d_out": grid.tokens(spec.group * V),
        "lse": grid.lanes(spec.group),
        "starts": grid.starts(),
    }
    optional = {
        "d_slot_weight": grid.lanes(spec.group),
        "d_end": grid.slots(),
        "delta": grid.lanes(spec.group),
    }
    in_specs |= {name: block for name, block in optional.items() if name in inputs}
    names = ["query", "token_key", "token_value", "token_log_decay"]
    names += ["rotated_query", "token_rotated_key"] * spec.rotated + ["slots"] * spec.state
    outputs = {f"d_{name}": like(inputs[name], in_specs[name]) for name in names}
    if spec.state:
        inputs = {name: x for name, x in inputs.items() if name != "slots"}
        del in_specs["slots"]
    halo = {}
    if spec.halo and grid.steps > 1:
        halo = {name: inputs[name] for name in grid.halo_specs(inputs)}
    scratch = {"d_slots": pltpu.VMEM((heads, M, K + V), jnp.float32)}
    if spec.halo:
        sizes = (("d_entering_key", K), ("d_window_key", K), ("d_value", V), ("d_decay", M))
        scratch |= {name: pltpu.VMEM((heads, spec.halo, size), jnp.float32) for name, size in sizes}
    halo_specs = grid.halo_specs(inputs) if halo else {}
    return Blocks(((inputs, in_specs), (halo, halo_specs)), outputs, scratch)


def _kernel(
    refs: Refs, halo: Refs, outs: Refs, carried: Refs,
    *, spec: CallSpec, steps: int, lockstep: int, skew: int,
):  # fmt: skip
    step, head = steps - 1 - pl.program_id(2), pl.program_id(3)
    names = ["d_slots"]
    if spec.halo:
        names += ["d_entering_key", "d_window_key", "d_value", "d_decay"]

    @pl.when(step == steps - 1)
    def _():
        for ref in (carried[name] for name in names):
            ref[head] = jnp.zeros(ref.shape[1:], ref.dtype)
        if spec.state:
            carried["d_slots"][head] = refs["d_end"][0, 0]

    tokens = StepTokens(spec, own_tokens(refs, spec), _halo_tokens(refs, halo, step, spec))
    later = {name: carried[name][head] for name in names}
    shared = GridStep(refs, outs, tokens, spec, step, refs["starts"][0, 0, 0], later)
    order = range(spec.chunks)
    emit([forward_stages(n, shared) for n in order], lockstep=spec.chunks, skew=1)
    emit([backward_stages(n, shared) for n in reversed(order)], lockstep, skew)
    for name in names:
        carried[name][head] = shared.later[name]
    if spec.state:
        outs["d_slots"][0, 0] = shared.later["d_slots"]


def _halo_tokens(refs: Refs, halo: Refs, step: jax.Array, spec: CallSpec) -> dict[str, jax.Array]:
    """The tokens before the step's own in all forms of `StepTokens`, each [halo, .].

    Before the call's first token the decays are 0; keys and values may be any, as no row sees them.
    """
    if not spec.halo:
        return {}
    dtype = refs["token_key"].dtype
    if not halo:  # the whole call is one step
        sizes = {
            name: refs[name].shape[2] for name in ("token_key", "token_value", "token_log_decay")
        }
        key = jnp.zeros((spec.halo, sizes["token_key"]), dtype)
        value = jnp.zeros((spec.halo, sizes["token_value"]), dtype)
        decay = jnp.zeros((spec.halo, sizes["token_log_decay"]), jnp.float32)
        return {"window_key": key, "entering_key": key, "value": value, "decay": decay}
    last = slice(halo["token_key"].shape[1] - spec.halo, None)
    decay = floored_decays(entering_log_decays(halo, slice(None), spec), dtype)
    return {
        "window_key": window_keys(halo, last, spec),
        "entering_key": apply_feature_map(halo["token_key"][0, last], spec.feature_map),
        "value": halo["token_value"][0, last],
        "decay": jnp.where(step > 0, decay[decay.shape[0] - spec.halo :], 0.0),
    }
