"""The operator: `nha_attention`, its implementations, and the state of generation."""

from nha_jax.ops.api import decode_step, nha_attention
from nha_jax.ops.mesh.division import use_mesh_axes
from nha_jax.ops.rope import Rope, apply_rope, rope_tables
from nha_jax.ops.state import NHAState, init_state, resize_state
from nha_jax.ops.types import KernelOptions, NHAOutput, SlotWeightGradient
from nha_jax.shadowing import check_own_packages

check_own_packages("pallas")  # what imports it, the implementations and the layers, comes later

__all__ = [
    "KernelOptions",
    "NHAOutput",
    "NHAState",
    "Rope",
    "SlotWeightGradient",
    "apply_rope",
    "decode_step",
    "init_state",
    "nha_attention",
    "resize_state",
    "rope_tables",
    "use_mesh_axes",
]
