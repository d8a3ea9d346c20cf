"""What every implementation of the operator takes and gives, and the checks of it.

Each error is one line that names the argument, its value and what is expected.
"""

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from nha_jax.ops.rope import Rope
from nha_jax.ops.state import NHAState, compute_dtype
from nha_jax.scalars import LARGEST_INT32, shown

SlotFeatureMap = Literal["identity", "silu", "relu"]
EmptySlots = Literal["attend", "mask"]
SlotWeightGradient = Literal["all", "slots"]
_CHOICES = {
    "slot_feature_map": get_args(SlotFeatureMap),
    "empty_slots": get_args(EmptySlots),
    "slot_weight_gradient": get_args(SlotWeightGradient),
}
KernelOptions = Mapping[str, Mapping[str, Any]]
"""Options of implementations' own, by the implementation's name: {"pallas_tpu": {"chunk": 128}}."""


class NHAOutput(NamedTuple):
    """The operator's result; a field that was not asked for is None."""

    out: jax.Array  # [B, T, Hq, V], the query's dtype
    state: NHAState | None = None
    slot_weight: jax.Array | None = None  # [B, T, Hq] float32, softmax mass on the slots


@dataclasses.dataclass(frozen=True)
class Options:
    """The operator's static arguments, with every default filled in.

    Fields:
      window_size, scale, slot_feature_map, empty_slots, return_state, return_slot_weight,
        slot_weight_gradient: as for `nha_attention`.
      slot_delay: as for `nha_attention`; None wherever it is the window's size.
      implementation_options: the validated options of the implementation that runs, an object of
        its `Backend.options_type`; None: its defaults.
      read_slots: whether the slots take part in the softmax; if False they are only kept.

    Raises:
      ValueError, TypeError: a field has a wrong value; the message names it.
    """

    window_size: int | None
    scale: float
    slot_feature_map: SlotFeatureMap
    empty_slots: EmptySlots
    return_state: bool
    return_slot_weight: bool
    slot_weight_gradient: SlotWeightGradient = "all"
    implementation_options: Any = None
    read_slots: bool = True
    slot_delay: int | None = None

    def __post_init__(self) -> None:
        check_window_size(self.window_size)
        check_slot_delay(self.slot_delay, self.window_size)
        if self.slot_delay is not None:
            # The window's size is the delay without one: one call, one program.
            delay = None if self.slot_delay == self.window_size else int(self.slot_delay)
            object.__setattr__(self, "slot_delay", delay)
        if not isinstance(self.scale, numbers.Real) or not math.isfinite(self.scale):
            raise ValueError(f"scale must be a finite number, got {self.scale!r}")
        # Equal options make one program: numpy's scalars equal floats, but do not compute as they.
        object.__setattr__(self, "scale", float(self.scale))
        check_choices(
            slot_feature_map=self.slot_feature_map,
            empty_slots=self.empty_slots,
            slot_weight_gradient=self.slot_weight_gradient,
        )

    @property
    def delay(self) -> int | None:
        """How many steps after its own a token enters the slots; None: it never does."""
        return self.window_size if self.slot_delay is None else self.slot_delay

    def feature_map(self, x: jax.Array) -> jax.Array:
        """Maps the slot branch's queries or keys, element by element."""
        match self.slot_feature_map:
            case "identity":
                return x
            case "silu":
                return jax.nn.silu(x)
            case "relu":
                return jax.nn.relu(x)


def check_window_size(window_size: int | None) -> None:
    """Raises TypeError or ValueError unless it is None or an integer in [0, 2**31)."""
    W = window_size
    if W is not None and (isinstance(W, bool) or not isinstance(W, numbers.Integral)):
        raise TypeError(f"window_size must be an int or None (full attention), got {W!r}")
    if W is not None and not 0 <= W <= LARGEST_INT32:
        raise ValueError(f"window_size must be at least 0 and below 2**31, got {shown(W)}")


def check_slot_delay(slot_delay: int | None, window_size: int | None) -> None:
    """Raises TypeError or ValueError unless it is None or an integer in [0, window_size]."""
    if slot_delay is None:
        return
    if isinstance(slot_delay, bool) or not isinstance(slot_delay, numbers.Integral):
        raise TypeError(f"slot_delay must be an int or None (window_size), got {slot_delay!r}")
    if window_size is None:
        raise ValueError(
            f"slot_delay={shown(slot_delay)} needs a window_size that is finite: with None no "
            "token enters the slots; leave slot_delay out"
        )
    if not 0 <= slot_delay <= window_size:
        raise ValueError(
            f"slot_delay must be from 0 to window_size={window_size}, got {shown(slot_delay)}: a "
            "token would be neither in the window nor in the slots"
        )


def check_choices(**chosen: str) -> None:
    """Raises ValueError for the first argument, given by its name, that is none of its choices."""
    for name, choice in chosen.items():
        if choice not in (choices := _CHOICES[name]):
            raise ValueError(f"{name} must be one of {choices}, got {choice!r}")


def validate_rest(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    *,
    rope: Rope | None,
    segment_ids: jax.Array | None,
    initial_state: NHAState | None,
    options: Options,
) -> None:
    """Raises ValueError or TypeError for the first wrong argument beside the four arrays."""
    if log_decay.shape[3] == 0 and options.window_size == 0:
        raise ValueError(
            f"log_decay of shape {log_decay.shape} has no slots, and window_size=0 leaves nothing "
            "else to read: give one of them"
        )
    B, T, _, K = query.shape
    if rope is not None:
        _check_rope(rope, B, T, K)
    if segment_ids is not None:
        _check_shape("segment_ids", segment_ids, (B, T), "[B, T] of the query")
        if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
            raise TypeError(f"segment_ids must have an integer dtype, got {segment_ids.dtype}")
    if initial_state is not None:
        check_state("initial_state", initial_state, key, value, log_decay, options.window_size)


def validate_arrays(
    query: jax.Array, key: jax.Array, value: jax.Array, log_decay: jax.Array
) -> None:
    """Raises ValueError or TypeError for the first of the four that does not fit the others."""
    for name, x in (("query", query), ("key", key), ("value", value), ("log_decay", log_decay)):
        if x.ndim != 4:
            raise ValueError(
                f"{name} must be [B, T, heads, dim], or [T, heads, dim] as all the others; "
                f"got shape {x.shape}"
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} must have a floating dtype, got {x.dtype}")
        if 0 in (x.shape[:3] if name == "log_decay" else x.shape):  # there may be no slots
            raise ValueError(f"{name} must not be empty, got shape {x.shape}")
    B, T, Hq, K = query.shape
    Hkv = key.shape[2]
    _check_shape("key", key, (B, T, Hkv, K), "[B, T, Hkv, K] of the query")
    _check_shape("value", value, (B, T, Hkv, value.shape[3]), "[B, T, Hkv, V] of the key")
    _check_shape(
        "log_decay", log_decay, (B, T, Hkv, log_decay.shape[3]), "[B, T, Hkv, M] of the key"
    )
    if Hq % Hkv:
        raise ValueError(f"query has {Hq} heads, which is not a multiple of the {Hkv} heads of key")
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            raise TypeError(f"{name} must have the query's dtype {query.dtype}, got {x.dtype}")


def check_state(
    argument: str,
    state: NHAState,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    window_size: int | None,
) -> None:
    """Raises ValueError or TypeError naming the state's first field that does not fit the call."""
    if not isinstance(state, NHAState):
        raise TypeError(f"{argument} must be an NHAState, got {type(state).__name__}")
    _check_kind(argument, state, window_size)
    B, _, H, K = key.shape
    V, M = value.shape[3], log_decay.shape[3]
    R = state.capacity if window_size is None else window_size
    entering = 0 if window_size is None else window_size  # ring entries of what the slots will read
    wide = compute_dtype(key)
    expected: dict[str, tuple[tuple[int, ...], jnp.dtype]] = {
        "slot_key": ((B, H, M, K), wide),
        "slot_value": ((B, H, M, V), wide),
        "window_key": ((B, entering, H, K), key.dtype),
        "window_rotated_key": ((B, R, H, K), key.dtype),
        "window_value": ((B, R, H, V), value.dtype),
        "window_log_decay": ((B, entering, H, M), wide),
        "length": ((B,), jnp.dtype(jnp.int32)),
        "segment_id": ((B,), jnp.dtype(jnp.int32)),
    }
    for name, (shape, dtype) in expected.items():
        x = getattr(state, name)
        why = f"window_size={window_size}, key {key.shape}, value {value.shape}, {M} slots"
        _check_shape(f"{argument}.{name}", x, shape, why)
        if x.dtype != dtype:
            raise TypeError(f"{argument}.{name} must have dtype {dtype}, got {x.dtype}")


def _check_kind(argument: str, state: NHAState, window_size: int | None) -> None:
    """A state of the whole past has values and no keys that could enter the slots."""
    R = state.capacity
    keeps_all = R > 0 and state.window_key.shape[1] == 0
    if keeps_all and window_size is not None:
        raise ValueError(
            f"{argument} is of window_size=None (and room for {R} tokens), the call of "
            f"window_size={window_size}: pass window_size=None, or prefill again"
        )
    if not keeps_all and window_size is None:
        raise ValueError(
            f"{argument} is of window_size={R}, the call of window_size=None: pass "
            f"window_size={R}, or prefill again"
        )


def _check_rope(rope: Rope, B: int, T: int, K: int) -> None:
    if not isinstance(rope, tuple | list) or len(rope) != 2:
        raise TypeError(f"rope must be a pair (cos, sin), got {type(rope).__name__}")
    if K % 2:
        raise ValueError(f"rope needs an even key dimension, got query with K={K}")
    for name, table in zip(("cos", "sin"), rope, strict=True):
        if table.shape not in ((T, K // 2), (B, T, K // 2)):
            raise ValueError(
                f"rope's {name} must have shape {(T, K // 2)} or {(B, T, K // 2)} "
                f"([T, K/2] or [B, T, K/2] of the query), got {table.shape}"
            )
        if not jnp.issubdtype(table.dtype, jnp.floating):
            raise TypeError(f"rope's {name} must have a floating dtype, got {table.dtype}")


def _check_shape(name: str, x: jax.Array, shape: tuple[int, ...], why: str) -> None:
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {shape} ({why}), got {x.shape}")
