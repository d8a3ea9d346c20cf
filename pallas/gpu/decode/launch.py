"""One token of generation in one launch: evict, update the slots, read, write the ring's entry.

A thread block serves a batch row's key/value head; of a long ring that nothing leaves, several do,
and a sum of their results follows. The state is updated in place: of the rings only the entry that
the new token replaces is written, and of the keys that are not rotated, and of the decays, only
that entry is read. Of a row that is not active nothing is read or written but its output.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.decode_types import DecodeState, DecodeToken
from pallas.gpu.decode.kernel import DecodeSpec, decode_kernel
from pallas.gpu.decode.sizes import TILE, DecodeSizes, default_decode_sizes

HEAD_DIMS = (64, 128, 256)
MOST_SLOTS = 128

Arrays = dict[str, jax.Array]


def decode_unsupported(state: DecodeState) -> str | None:
    """Why the kernel can't serve this state, in a line; None if it can."""
    (R, _, K), V = state.rotated_key.shape[1:], state.value.shape[3]
    if K not in HEAD_DIMS or V not in HEAD_DIMS:
        return f"its kernel takes heads of 64, 128 or 256, got keys of {K} and values of {V}"
    if R % TILE or 0 < R < 2 * TILE or (R == 0 and state.slots is None):
        return f"its kernel takes rings of a multiple of {TILE} entries from 8 on, or 0, got {R}"
    if state.slots is not None:
        M = state.slots.slot_key.shape[2]
        if M % 8 or not 16 <= M <= MOST_SLOTS:
            return f"its kernel takes 16 to {MOST_SLOTS} slots in multiples of 8, got {M}"
    return None


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
    """out [B, Hq, V] in the query's dtype, and the state after the token.

    Arrays of the tokens and the rings are bfloat16 or float32; sums are float32.

    Args:
      entry: [B] int32, the ring entry that the token replaces; what it held enters the slots. Of
        rings without entries the token itself does.
      length: [B] int32, the tokens before it. The rows' entry holds a token if that is R or more.
      active: [B] int32, 0 or 1: of rows with 0 out is 0, and the state stays.
      num_slots: M, also where the state has none.
      mask_empty: slots that no token has entered are not read.
      feature_map: of keys that enter the slots.
      sizes: None: by `default_decode_sizes`.
      interpret: `InterpretGPUParams` run the kernel on the CPU.

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
    if sizes is None:
        slots = num_slots if spec.reads_slots else None
        sizes = default_decode_sizes(B * Hkv, R, slots, max(K, V))
    _check_sizes(sizes, spec)
    inputs, kept = _by_name(token, state)
    inputs |= {"entry": entry, "length": length, "active": active}
    dtype, splits = token.rotated_query.dtype, sizes.splits
    outputs = {"out": jax.ShapeDtypeStruct((B, Hq, V), dtype)}
    if splits > 1:
        part = jax.ShapeDtypeStruct((B, splits, Hq, V), jnp.float32)
        outputs = {"out": part, "lse": part}
    references = {name: jax.new_ref(x) for name, x in kept.items()}

    def entry_point(*refs, **scratch):
        named = dict(zip([*inputs, *references, *outputs], refs, strict=True))
        decode_kernel(named, scratch, spec, sizes)

    call = plgpu.kernel(
        entry_point,
        out_type=list(outputs.values()),
        grid=(splits, Hkv, B),
        grid_names=("split", "head", "batch"),
        num_threads=sizes.warpgroups,
        thread_name="wg",
        scratch_types=_scratch(inputs, kept, spec.group, V, sizes.warpgroups),
        kernel_name="nha_decode",
        interpret=interpret,
    )
    result = call(*inputs.values(), *references.values())
    after = {name: jax.freeze(reference) for name, reference in references.items()}
    out = result[0] if splits == 1 else _join(*result).astype(dtype)
    return out, _with_arrays(state, after)


def _check_sizes(sizes: DecodeSizes, spec: DecodeSpec) -> None:
    tiles = spec.slots // TILE
    if spec.reads_slots and (tiles % sizes.warpgroups or tiles < 2 * sizes.warpgroups):
        raise ValueError(
            f"DecodeSizes: warpgroups={sizes.warpgroups} cannot share {spec.slots} slots in fours, "
            "two or more each; make it 2"
        )
    if 0 < spec.entries < sizes.rows:
        raise ValueError(
            f"DecodeSizes: rows={sizes.rows} is more than the ring's {spec.entries} entries"
        )
    if sizes.splits > 1 and (spec.reads_slots or spec.entries % sizes.rows):
        raise ValueError(
            f"DecodeSizes: splits={sizes.splits} needs a state without slots and a ring of a "
            f"multiple of rows={sizes.rows} entries; make it 1"
        )


def _scratch(inputs: Arrays, kept: Arrays, group: int, V: int, warpgroups: int) -> dict[str, Any]:
    """Shared memory and barriers: the warps' softmaxes, and the new token's entries."""
    parts, wide = (group, warpgroups, TILE), jnp.float32
    scratch = {
        "top": plgpu.SMEM(parts, wide),
        "mass": plgpu.SMEM(parts, wide),
        "total": plgpu.SMEM((*parts, V), wide),
        "parts_stored": plgpu.Barrier(num_arrivals=warpgroups),
    }
    rings = {name: inputs[f"new_{name}"] for name in kept if not name.startswith("slot_")}
    if rings:
        entries = {name: plgpu.SMEM(x.shape[2:], x.dtype) for name, x in rings.items()}
        scratch |= {"entries": entries, "entries_loaded": plgpu.Barrier(num_arrivals=len(rings))}
    return scratch


def _by_name(token: DecodeToken, state: DecodeState) -> tuple[Arrays, Arrays]:
    """Inputs, and what is updated, rows in tiles of four; rings of no entries are left out."""
    inputs = {"rotated_query": token.rotated_query, "new_value": token.value}
    kept: Arrays = {}
    if state.value.shape[1]:
        inputs["new_rotated_key"] = token.rotated_key
        kept |= {"rotated_key": _tiled(state.rotated_key, 1), "value": _tiled(state.value, 1)}
    if token.slots is not None and state.slots is not None:
        inputs |= {"query": token.slots.query, "new_key": token.slots.key}
        inputs["new_log_decay"] = _tiled(token.slots.log_decay, 2)
        kept["slot_key"] = _tiled(state.slots.slot_key, 2)
        kept["slot_value"] = _tiled(state.slots.slot_value, 2)
        if state.value.shape[1]:
            kept["key"] = _tiled(state.slots.key, 1)
            kept["log_decay"] = _tiled(state.slots.log_decay, 3)
    return inputs, kept


def _tiled(x: jax.Array, axis: int) -> jax.Array:
    return x.reshape(*x.shape[:axis], x.shape[axis] // TILE, TILE, *x.shape[axis + 1 :])


def _with_arrays(state: DecodeState, after: Arrays) -> DecodeState:
    """The state with the arrays of `_by_name`."""

    def updated(part: Any) -> dict[str, jax.Array]:
        arrays = {name: x for name, x in part._asdict().items() if name in after}
        return {name: after[name].reshape(x.shape) for name, x in arrays.items()}

    slots = state.slots
    return DecodeState(
        **({"rotated_key": state.rotated_key, "value": state.value} | updated(state)),
        slots=None if slots is None else slots._replace(**updated(slots)),
    )


def _join(out: jax.Array, lse: jax.Array) -> jax.Array:
    """[B, Hq, V] of the splits' [B, splits, Hq, V]; lse in units of log 2."""
    weight = jnp.exp2(lse - lse.max(axis=1, keepdims=True))
    return jnp.sum(weight * out, axis=1) / jnp.sum(weight, axis=1)
