"""One token of generation in one launch: add to the slots, attend, write the ring's entry.

A thread block serves one key/value head of a batch row. Where the state is a long ring that nothing
leaves, several blocks (splits) share the ring, and their results are joined by a few operations
after the launch. The state is updated in place, and little of it is touched: the rings get one new
entry, and those of unrotated keys and of decays are read at that entry only. For a row that is not
active nothing is read, and only its output is written.

Inputs (names in the kernel; shapes in `decode_types.py`):
  rotated_query, new_value         of the new token
  new_rotated_key                  of it, where the state has a ring
  query, new_key, new_log_decay    of it, where the state has slots
  entry, length, active            [B] int32, as for `decode_attention`
Updated, rows in tiles of four:
  rotated_key, value               the ring; key, log_decay: what of it only the slots read
  slot_key, slot_value             the slots
Outputs:
  out                              [B, Hq, V], or with splits [B, splits, Hq, V] float32
  lse                              with splits, shaped alike, log-sum-exp in units of log 2
Shared memory:
  top, mass, total                 each warp's softmax, [G, warpgroups, 4] and [.., V] float32
  entries                          the new token's ring entries, on their way there

Warpgroups: 2 or 4, all alike. Each updates and reads its share of the slots, reads its share of the
ring, and at the end writes the output of every 2nd or 4th query head.

| barrier        | arrivals (number)                     | waits           | how often       |
| -------------- | ------------------------------------- | --------------- | --------------- |
| parts_stored   | every warpgroup, its softmaxes stored | all warpgroups  | once            |
| entries_loaded | the copies of the new token (2 or 4)  | the warpgroup   | once, where     |
|                |                                       | that asked      | there is a ring |
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.decode_types import DecodeState, DecodeToken
from pallas.gpu.decode.kernel import DecodeSpec, decode_kernel
from pallas.gpu.decode.sizes import TILE, DecodeSizes, default_decode_sizes, why_unsupported
from pallas.gpu.warpgroup.launch import Refs, launch

Arrays = dict[str, jax.Array]


def decode_unsupported(state: DecodeState) -> str | None:
    """Why the kernel can't serve this state, in a line; None if it can."""
    slots = None if state.slots is None else state.slots.slot_key.shape[2]
    (R, _, K), V = state.rotated_key.shape[1:], state.value.shape[3]
    return why_unsupported(R, slots, K, V)


def decode_attention(
    token: DecodeToken,
    state: DecodeState,
    entry: jax.Array,
    length: jax.Array,
    active: jax.Array,
    *,
    scale: float,
    num_slots: int,
    mask_empty: bool,
    feature_map: str,
    sizes: DecodeSizes | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, DecodeState]:
    """The output [B, Hq, V] in the query's dtype, and the state after the token.

    Arrays of the tokens and the rings are bfloat16 or float32; sums are float32.

    Args:
      entry: [B] int32, the ring entry that the token replaces; what it held enters the slots. With
        a ring of no entries, the new token itself does.
      length: [B] int32, the tokens before this one. With R or more, the entry holds a token.
      active: [B] int32, 0 or 1. A row with 0 gives an output of 0 and keeps its state.
      num_slots: M, also where the state has no slots.
      mask_empty: whether slots that no token has entered are left out of the softmax.
      feature_map: "identity", "silu" or "relu", applied to keys that enter the slots.
      sizes: how the work is cut; None: as `default_decode_sizes` has it.
      interpret: `InterpretGPUParams` to run the kernel on the CPU, or False.

    Raises:
      ValueError: sizes do not fit the state; the message names the field.
    """
    B, Hkv, V = token.value.shape
    Hq = token.rotated_query.shape[1]
    K, R = token.rotated_key.shape[2], state.value.shape[1]
    spec = DecodeSpec(
        group=Hq // Hkv,
        slots=num_slots,
        reads_slots=state.slots is not None,
        entries=R,
        scale=float(scale),
        mask_empty=mask_empty,
        feature_map=feature_map,
    )
    slots = num_slots if spec.reads_slots else None
    if sizes is None:
        sizes = default_decode_sizes(B * Hkv, R, slots, max(K, V))
    sizes.check(R, slots)
    inputs, updated = _arrays_by_name(token, state)
    inputs |= {"entry": entry, "length": length, "active": active}
    dtype, splits = token.rotated_query.dtype, sizes.splits
    outputs = {"out": jax.ShapeDtypeStruct((B, Hq, V), dtype)}
    if splits > 1:
        part = jax.ShapeDtypeStruct((B, splits, Hq, V), jnp.float32)
        outputs = {"out": part, "lse": part}
    results = launch(
        functools.partial(decode_kernel, spec=spec, sizes=sizes),
        inputs,
        outputs,
        _scratch(inputs, updated, spec.group, V, sizes.warpgroups),
        grid={"split": splits, "head": Hkv, "batch": B},
        warpgroups=sizes.warpgroups,
        name="nha_decode",
        interpret=interpret,
        updated=updated,
        approx_math=False,
    )
    parts, after = results[: len(outputs)], results[len(outputs) :]
    out = parts[0] if splits == 1 else _join_splits(*parts).astype(dtype)
    return out, _state_with(state, dict(zip(updated, after, strict=True)))


def _scratch(inputs: Arrays, updated: Arrays, group: int, V: int, warpgroups: int) -> Refs:
    """Shared memory and barriers; see the table above."""
    parts, wide = (group, warpgroups, TILE), jnp.float32
    scratch = {
        "top": plgpu.SMEM(parts, wide),
        "mass": plgpu.SMEM(parts, wide),
        "total": plgpu.SMEM((*parts, V), wide),
        "parts_stored": plgpu.Barrier(num_arrivals=warpgroups),
    }
    rings = {name: inputs[f"new_{name}"] for name in updated if not name.startswith("slot_")}
    if rings:
        entries = {name: plgpu.SMEM(x.shape[2:], x.dtype) for name, x in rings.items()}
        scratch |= {"entries": entries, "entries_loaded": plgpu.Barrier(num_arrivals=len(rings))}
    return scratch


def _arrays_by_name(token: DecodeToken, state: DecodeState) -> tuple[Arrays, Arrays]:
    """The inputs, and the arrays that are updated. Rings of no entries are left out."""
    inputs = {"rotated_query": token.rotated_query, "new_value": token.value}
    updated: Arrays = {}
    if state.value.shape[1]:
        inputs["new_rotated_key"] = token.rotated_key
        updated |= {"rotated_key": _in_tiles(state.rotated_key, 1)}
        updated |= {"value": _in_tiles(state.value, 1)}
    if token.slots is not None and state.slots is not None:
        inputs |= {"query": token.slots.query, "new_key": token.slots.key}
        inputs["new_log_decay"] = _in_tiles(token.slots.log_decay, 2)
        updated["slot_key"] = _in_tiles(state.slots.slot_key, 2)
        updated["slot_value"] = _in_tiles(state.slots.slot_value, 2)
        if state.value.shape[1]:
            updated["key"] = _in_tiles(state.slots.key, 1)
            updated["log_decay"] = _in_tiles(state.slots.log_decay, 3)
    return inputs, updated


def _in_tiles(x: jax.Array, axis: int) -> jax.Array:
    """Splits an axis of slots or ring entries into tiles of four."""
    return x.reshape(*x.shape[:axis], x.shape[axis] // TILE, TILE, *x.shape[axis + 1 :])


def _state_with(state: DecodeState, after: Arrays) -> DecodeState:
    """The state with the updated arrays, named as in `_arrays_by_name`, in their places."""

    def updated(part: Any) -> Arrays:
        arrays = {name: x for name, x in part._asdict().items() if name in after}
        return {name: after[name].reshape(x.shape) for name, x in arrays.items()}

    slots = state.slots
    return DecodeState(
        **({"rotated_key": state.rotated_key, "value": state.value} | updated(state)),
        slots=None if slots is None else slots._replace(**updated(slots)),
    )


def _join_splits(out: jax.Array, lse: jax.Array) -> jax.Array:
    """[B, Hq, V] of the splits' out and lse, [B, splits, Hq, V] each, lse in units of log 2."""
    weight = jnp.exp2(lse - lse.max(axis=1, keepdims=True))
    return jnp.sum(weight * out, axis=1) / jnp.sum(weight, axis=1)
