"""Cases of the operator, and their inputs."""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nha_jax.config_parts import RopeScaling
from nha_jax.ops import KernelOptions, rope_tables
from nha_jax.ops.types import EmptySlots, SlotFeatureMap, SlotWeightGradient

GATES = ("normaliser-0.1", "normaliser-1", "normaliser-8", "-1000", "-inf", "0", "mixed", "holes")
"""Names of gates: log sigmoid / 0.1, / 1 and / 8; three constants; and strong decays among mild."""

ROPES = (None, "tokens", "rows", "yarn")
"""Names of rotary tables: none, [T, K/2], [B, T, K/2], and [T, K/2] scaled as in YaRN."""

_YARN = RopeScaling(kind="yarn", factor=4.0, original_length=64, attention_factor=1.4)

# Two chunks a grid step: the interpreter's time is compilation, which goes by the chunks.
SMALL_BLOCKS = {"pallas_tpu": {"chunks_per_step": 2, "forward_group": 2, "backward_group": 1}}
"""`kernel_options` with which the library's kernels for TPUs are soonest interpreted."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of `nha_attention`: sizes, as docs/notation.md names them, and options.

    Attributes:
        T, G, M, K, V, B, H: sizes; the query has H G heads.
        window: a number, "T", "T+5" or "None", the whole past.
        gate: one of `GATES`.
        rope: one of `ROPES`.
        segments: whether documents are packed, with padding between and after them.
        state: whether the call goes on from a state.
        scale: of the logits; None: K^-1/2.
        slot_delay: as in `nha_attention`; no case of `CASES` has one, which a backend must serve
            only if it `takes_slot_delay`.
        small_blocks: whether the library's own kernels get `SMALL_BLOCKS`.
        empty_slots, slot_feature_map, slot_weight_gradient, return_state: as in `nha_attention`.
    """

    T: int
    window: str
    G: int = 1
    M: int = 16
    K: int = 8
    V: int = 8
    B: int = 2
    H: int = 1
    gate: str = "normaliser-8"
    rope: str | None = "tokens"
    segments: bool = False
    state: bool = False
    empty_slots: EmptySlots = "attend"
    slot_feature_map: SlotFeatureMap = "identity"
    small_blocks: bool = True
    # Not in the repr, from which the inputs are drawn: either way they are the same.
    scale: float | None = dataclasses.field(default=None, repr=False)
    slot_delay: int | None = dataclasses.field(default=None, repr=False)
    slot_weight_gradient: SlotWeightGradient = dataclasses.field(default="all", repr=False)
    return_state: bool = dataclasses.field(default=True, repr=False)

    @property
    def window_size(self) -> int | None:
        names = {"None": None, "T": self.T, "T+5": self.T + 5}
        return names[self.window] if self.window in names else int(self.window)

    @property
    def kernel_options(self) -> KernelOptions | None:
        return SMALL_BLOCKS if self.small_blocks else None

    def __str__(self) -> str:
        flags = [name for name in ("segments", "state") if getattr(self, name)]
        flags += [
            x for x in (self.empty_slots, self.slot_feature_map) if x in ("mask", "silu", "relu")
        ]
        flags += [f"rope-{self.rope}"]
        flags += [f"scale{self.scale}"] * (self.scale is not None)
        flags += [f"delay{self.slot_delay}"] * (self.slot_delay is not None)
        flags += ["weight-of-slots"] * (self.slot_weight_gradient == "slots")
        shape = f"T{self.T}-W{self.window}-G{self.G}-M{self.M}-K{self.K}-V{self.V}"
        return "-".join([shape, f"gate({self.gate})", *flags])


# fmt: off
CASES = (
    Case(T=1, window="0", K=64, V=128, rope="rows", state=True, slot_feature_map="silu"),
    Case(
        T=200, window="0", M=48, H=2, gate="normaliser-0.1", segments=True, empty_slots="mask",
        slot_weight_gradient="slots",
    ),
    Case(
        T=65, window="0", G=8, gate="holes", rope=None, state=True, empty_slots="mask", scale=0.05,
    ),
    Case(
        T=63, window="1", K=60, V=64, gate="-inf", rope="rows", state=True, empty_slots="mask",
        slot_feature_map="relu", scale=0.05,
    ),
    Case(
        T=200, window="16", G=4, M=64, K=64, V=60, H=2, gate="normaliser-1", rope=None,
        slot_weight_gradient="slots",
    ),
    Case(T=200, window="16", G=4, M=80, gate="mixed", segments=True, slot_feature_map="silu"),
    Case(
        T=2, window="64", gate="holes", rope="rows", segments=True, state=True,
        slot_weight_gradient="slots",
    ),
    Case(T=200, window="64", G=8, H=2, gate="0", slot_feature_map="relu", scale=0.05),
    Case(
        T=65, window="100", M=48, K=60, V=64, gate="-1000", rope=None, segments=True, state=True,
        empty_slots="mask", slot_feature_map="silu",
    ),
    Case(T=65, window="T+5", G=4, K=128, V=64, gate="-1000", rope="rows", slot_feature_map="silu"),
    Case(
        T=64, window="None", rope=None, segments=True, empty_slots="mask", slot_feature_map="relu",
        slot_weight_gradient="slots", scale=0.05,
    ),
    Case(
        T=65, window="T", G=4, K=64, V=60, gate="mixed", segments=True, state=True,
        empty_slots="mask",
    ),
)
"""Any two kinds of options meet in one of them: windows, gates, rope, segments, state and so on."""

OPTIONS: Mapping[str, Sequence[Any]] = {
    "T": range(1, 41),
    "window": ("0", "1", "3", "7", "16", "T", "T+5", "None"),
    "B": (1, 2), "H": (1, 2), "G": (1, 2, 3), "M": range(1, 10),
    "K": range(2, 11, 2), "V": range(1, 10),
    "gate": GATES,
    "rope": ROPES,
    "segments": (False, True),
    "state": (False, True),
    "empty_slots": ("attend", "mask"),
    "slot_feature_map": ("identity", "silu", "relu"),
    "scale": (None, 0.05),  # flat: steeper ones are cases that float32 itself cannot hold
    "slot_weight_gradient": ("all", "slots"),
    "return_state": (True, False),
}
"""Values of each field of a small `Case`."""
# fmt: on


def random_case(seed: int) -> Case:
    """Draws a value of each of `OPTIONS`; small sizes, which hold most errors."""
    rng = np.random.default_rng(seed)
    return Case(
        **{name: values[int(rng.integers(len(values)))] for name, values in OPTIONS.items()}
    )


class Inputs(NamedTuple):
    """The arrays of a case.

    Fields:
        arrays: by name, what gradients are taken of: query [B, T, H G, K], key [B, T, H, K], value
            [B, T, H, V], log_decay [B, T, H, M], and the arrays of the state if there is one.
        rest: rope, a pair of tables; segment_ids [B, T] int32; length [B] int32, of the state. None
            where the case has none.
        cotangents: out [B, T, H G, V] and slot_weight [B, T, H G], which the loss weighs them by.
    """

    arrays: dict[str, Any]
    rest: dict[str, Any]
    cotangents: dict[str, Any]

    def rounded(self, dtype: str) -> "Inputs":
        """Rounds to what `dtype` holds, so that the definition sees the same numbers."""
        arrays = {
            name: x if name in _WIDE else x.astype(jnp.dtype(dtype)).astype(np.float32)
            for name, x in self.arrays.items()
        }
        return self._replace(arrays=arrays)

    def on_device(self, dtype: str) -> "Inputs":
        """Makes jax arrays in `dtype`; log decays and slots in no less than float32, as in calls.

        float64 takes `jax.enable_x64`.
        """
        wide = jnp.promote_types(dtype, jnp.float32)
        return Inputs(
            {k: jnp.asarray(x, wide if k in _WIDE else dtype) for k, x in self.arrays.items()},
            jax.tree.map(jnp.asarray, self.rest),
            {name: jnp.asarray(x, wide) for name, x in self.cotangents.items()},
        )


_WIDE = {"log_decay", "window_log_decay", "slot_key", "slot_value"}


def log_decays(gate: str, pre: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Makes log decays of pre-activations.

    Args:
        gate: one of `GATES`; "mixed" and "holes" have a tenth each of -1000 or -inf, and of 0.
        pre: [...] the pre-activations.
        rng: draws where the strong ones are.

    Returns:
        [...] float64, from -inf to 0.
    """
    log_sigmoid = -np.logaddexp(0, -pre)
    if gate.startswith("normaliser-"):
        return log_sigmoid / float(gate.removeprefix("normaliser-"))
    if gate in ("mixed", "holes"):
        strong = {"mixed": -1000.0, "holes": -np.inf}[gate]
        draw = rng.random(pre.shape)
        return np.where(draw < 0.1, strong, np.where(draw < 0.2, 0.0, log_sigmoid / 8))
    return np.full(pre.shape, float(gate))


def _segment_ids(case: Case, rng: np.random.Generator) -> np.ndarray:
    """[B, T] ids: about four documents a row (ids recur), padding between and at the ends."""
    change = rng.random((case.B, case.T)) < 4 / case.T
    ids = 1 + np.cumsum(change, axis=1) % 3
    padding = np.cumsum(rng.random(ids.shape) < 4 / case.T, axis=1) % 4 == 3
    return np.where(padding, 0, ids).astype(np.int32)


def make_inputs(case: Case, seed: int | None = None) -> Inputs:
    """Draws a case's inputs, numpy float32; the same for the same case and seed.

    Args:
        case: the sizes and options.
        seed: of the random numbers; None: one that follows from the case.
    """
    rng = np.random.default_rng(zlib.crc32(repr(case).encode()) if seed is None else seed)
    normal = lambda *shape: np.asarray(rng.standard_normal(shape), np.float32)  # noqa: E731
    B, T, H, G, M, K, V = (getattr(case, name) for name in "BTHGMKV")
    pre = rng.standard_normal((B, T, H, M))
    arrays = {
        "query": normal(B, T, H * G, K),
        "key": normal(B, T, H, K),
        "value": normal(B, T, H, V),
        "log_decay": log_decays(case.gate, pre, rng).astype(np.float32),
    }
    rest: dict[str, Any] = {"rope": None, "segment_ids": None, "length": None}
    if case.rope:
        positions = rng.integers(0, 500, (B, T)) if case.rope == "rows" else np.arange(T)
        scaling = _YARN if case.rope == "yarn" else None
        tables = rope_tables(jnp.asarray(positions), K, scaling=scaling)
        rest["rope"] = tuple(map(np.asarray, tables))
    if case.segments:
        rest["segment_ids"] = _segment_ids(case, rng)
    if case.state:
        W = case.window_size
        R = 20 if W is None else W
        slots = 0.0 if W is None else 1.0  # what never left the window is not in the slots
        entering = 0 if W is None else W  # ring entries of what only the slots will read
        pre = rng.standard_normal((B, entering, H, M))
        arrays |= {
            "slot_key": slots * normal(B, H, M, K),
            "slot_value": slots * normal(B, H, M, V),
            "window_key": normal(B, entering, H, K),
            "window_rotated_key": normal(B, R, H, K),
            "window_value": normal(B, R, H, V),
            "window_log_decay": log_decays(case.gate, pre, rng).astype(np.float32),
        }
        # The slots hold something once more than W tokens were seen: R + 3, and another remainder.
        rest["length"] = np.array(
            [R - 7 if W is None else R + 3 + 5 * b for b in range(B)], np.int32
        )
    cotangents = {"out": normal(B, T, H * G, V), "slot_weight": normal(B, T, H * G)}
    return Inputs(arrays, rest, cotangents)
