"""How much VMEM the kernels of a call need, before they are compiled.

Blocks and scratch memory are counted. What the compiler puts there of a grid step's values, those
that registers do not hold, is bounded by what it was seen to need.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas.tpu.arithmetic import LANES, table_columns
from pallas.tpu.backward import backward_blocks
from pallas.tpu.forward import forward_blocks
from pallas.tpu.launch import Arrays, Blocks
from pallas.tpu.spec import CallSpec
from pallas.tpu.wide_window import wide_window_backward_blocks, wide_window_forward_blocks


class Sizes(NamedTuple):
    """Sizes of a call, as `spec` has them: K, V and M are padded."""

    Hkv: int  # key/value heads
    K: int
    V: int
    M: int
    dtype: Any  # of query, key and value


def vmem_needed(sizes: Sizes, spec: CallSpec) -> int:
    """Returns the bytes of VMEM that the largest kernel of the call may need."""
    fused, saved = _fused_arrays(sizes, spec), _saved_arrays(sizes, spec)
    kernels = [forward_blocks(fused, spec, save=True), backward_blocks(fused | saved, spec)]
    needed = _most(kernels) + _fused_values(sizes, spec)
    if spec.wide_window:
        window = _window_arrays(sizes, spec)
        kernels = [wide_window_forward_blocks(window, spec)]
        kernels += wide_window_backward_blocks(window, spec)
        needed = max(needed, _most(kernels) + _window_values(sizes, spec))
    return needed


def _most(kernels: list[Blocks]) -> int:
    return max(blocks.vmem_bytes for blocks in kernels)


# Of the compiler's values. It was seen to keep 0.65 to 0.81 of what these bound, heads of 512.
_DECAYS = 8  # arrays [C, M] of a chunk
_QUERY_FORMS = 6  # arrays [G * C, K] or [G * C, V] of a chunk that goes back
_CHUNKS_GOING_BACK = 4  # at once, where there are as many
_LOGIT_FORMS = 4  # arrays [rows, rows]
_FLOAT32 = 4  # times as much: products cut an operand in parts of bfloat16, which stay beside it
_FLOAT32_GOING_BACK = 2


def _fused_values(sizes: Sizes, spec: CallSpec) -> int:
    """Bounds the fused backward's values, of which it has more than the forward.

    Each chunk keeps its slots, tokens and decays from the way forth to the way back. A few chunks
    at a time go back, each with several forms and gradients of its queries and outputs.
    """
    _, K, V, M, dtype = sizes
    C, itemsize = spec.chunk, jnp.dtype(dtype).itemsize
    kept = M * (K + V) * (4 + itemsize) + C * K * itemsize + 4 * _DECAYS * C * LANES
    going_back = 4 * _QUERY_FORMS * spec.group * C * max(K, V)
    if itemsize == 4:
        kept, going_back = _FLOAT32 * kept, _FLOAT32_GOING_BACK * going_back
    values = spec.chunks * kept + min(_CHUNKS_GOING_BACK, spec.chunks) * going_back
    return values * 3 // 2


def _window_values(sizes: Sizes, spec: CallSpec) -> int:
    """Bounds the values of the kernels of a wide window: logits and their like."""
    values = 4 * _LOGIT_FORMS * spec.step_rows**2
    return values * (_FLOAT32 if jnp.dtype(sizes.dtype).itemsize == 4 else 1)


def _fused_arrays(sizes: Sizes, spec: CallSpec) -> Arrays:
    """The inputs that the fused kernels share, for one batch row of two grid steps."""
    (Hkv, K, V, M, dtype), G, T = sizes, spec.group, 2 * spec.step_rows
    arrays = {
        "query": _array((1, T, Hkv * G * K), dtype),
        "token_key": _array((1, T, Hkv * K), dtype),
        "token_value": _array((1, T, Hkv * V), dtype),
        "token_log_decay": _array((1, Hkv, M, T)),
    }
    if spec.rotated:
        arrays |= {"rotated_query": arrays["query"], "token_rotated_key": arrays["token_key"]}
    arrays |= {name: _array((1, T, table_columns(K))) for name in spec.rope_tables}
    if spec.segments:
        arrays["row_segments"] = _array((1, 8, T))
        columns = 2 * LANES + spec.chunk_tokens
        arrays["chunk_segments"] = _array((1, T // spec.chunk, columns))
    if spec.state:
        arrays["slots"] = _array((1, Hkv, M, K + V))
    return arrays


def _saved_arrays(sizes: Sizes, spec: CallSpec) -> Arrays:
    """What the backward takes beside them."""
    (Hkv, K, V, M, dtype), G, T = sizes, spec.group, 2 * spec.step_rows
    of_rows = _array((1, Hkv, G, T))
    arrays = {
        "d_out": _array((1, T, Hkv * G * V), dtype),
        "lse": of_rows,
        "starts": _array((1, Hkv, 2, M, K + V)),
    }
    if spec.slot_weight:
        arrays["d_slot_weight"] = of_rows
    if spec.state:
        arrays["d_end"] = _array((1, Hkv, M, K + V))
    if spec.wide_window:
        arrays["delta"] = of_rows
    return arrays


def _window_arrays(sizes: Sizes, spec: CallSpec) -> Arrays:
    """The inputs of the kernels of `wide_window.py`: of the forward and the backward, all."""
    fused, saved = _fused_arrays(sizes, spec), _saved_arrays(sizes, spec)
    prefix = "rotated_" if spec.rotated else ""
    arrays = {
        "query": fused[f"{prefix}query"],
        "key": fused[f"token_{prefix}key"],
        "value": fused["token_value"],
        "out": saved["d_out"],
    }
    arrays |= {name: saved[name] for name in ("d_out", "lse", "delta")}
    if spec.rope:
        arrays |= dict.fromkeys(("query_table", "key_table"), fused["rope_table"])
    if spec.segments:
        segment = _array((1, 1, 2 * spec.step_rows))
        arrays |= {"query_segment": segment, "token_segment": segment}
    return arrays


def _array(shape: tuple[int, ...], dtype: Any = jnp.float32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)
