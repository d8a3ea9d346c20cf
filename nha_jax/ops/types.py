"""What every implementation of the operator takes and gives."""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from nha_jax.ops.state import NHAState
from pallas.tpu import BlockSizes

SlotFeatureMap = Literal["identity", "silu", "relu"]
EmptySlots = Literal["attend", "mask"]
SlotWeightGradient = Literal["all", "slots"]


class NHAOutput(NamedTuple):
    """The operator's result; a field that was not asked for is None."""

    out: jax.Array  # [B, T, Hq, V], the query's dtype
    state: NHAState | None = None
    slot_weight: jax.Array | None = None  # [B, T, Hq] float32, softmax mass on the slots


@dataclasses.dataclass(frozen=True)
class Options:
    """The operator's static arguments, already validated and with every default filled in."""

    window_size: int | None
    scale: float
    slot_feature_map: SlotFeatureMap
    empty_slots: EmptySlots
    return_state: bool
    return_slot_weight: bool
    slot_weight_gradient: SlotWeightGradient = "all"
    block_sizes: BlockSizes | None = None  # of the TPU kernels; None: the chip's defaults
    read_slots: bool = True  # False: they are there, but left out of the softmax

    def feature_map(self, x: jax.Array) -> jax.Array:
        """The slot branch's map of queries and keys."""
        match self.slot_feature_map:
            case "identity":
                return x
            case "silu":
                return jax.nn.silu(x)
            case "relu":
                return jax.nn.relu(x)


def compute_dtype(x: jax.Array) -> jnp.dtype:
    """The dtype of states, softmax and sums: float32, or float64 for float64 inputs."""
    return jnp.promote_types(x.dtype, jnp.float32)
