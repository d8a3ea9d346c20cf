"""The device mesh, and which mesh axis each named axis of a parameter is divided over."""

from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from train.config import TrainConfig
from train.errors import ConfigError

MESH_AXES = ("data", "fsdp")

# Every matrix of the model has one "embed" axis, so dividing that one divides them all.
_RULES: dict[str, str | None] = {
    "layers": None,
    "vocab": None,
    "embed": "fsdp",
    "heads": None,
    "kv_heads": None,
    "mlp": None,
    "conv": None,
    "norm": None,
}


def make_mesh(config: TrainConfig) -> Mesh:
    """All devices as a mesh with the axes `MESH_AXES`.

    Raises:
        ConfigError: the mesh does not use exactly the devices there are, or the batch or the
            parameters cannot be divided over it.
    """
    devices = jax.device_count()
    sizes = {axis: getattr(config.mesh, axis) for axis in MESH_AXES}
    for axis, size in sizes.items():
        if size == -1:
            others = sizes["fsdp" if axis == "data" else "data"]
            sizes[axis] = max(devices // others, 1)
    if sizes["data"] * sizes["fsdp"] != devices:
        raise ConfigError(
            f"mesh = {{data: {config.mesh.data}, fsdp: {config.mesh.fsdp}}}: expected sizes "
            f"whose product is the number of devices, which is {devices}"
        )
    if config.batch_size % devices:
        raise ConfigError(
            f"batch_size = {config.batch_size}: expected a multiple of the number of devices, "
            f"which is {devices}"
        )
    if config.model.hidden_size % sizes["fsdp"]:
        raise ConfigError(
            f"model.hidden_size = {config.model.hidden_size}: expected a multiple of mesh.fsdp, "
            f"which is {sizes['fsdp']}"
        )
    return jax.make_mesh(
        tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES)
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """[B, ...] arrays: the batch over all devices."""
    return NamedSharding(mesh, PartitionSpec(MESH_AXES))


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """A sharding in place of each nnx variable of `state`, from its logical axis names.

    Variables without names (counters, say) are on every device.
    """
    return jax.tree.map(
        lambda variable: NamedSharding(
            mesh, PartitionSpec(*(name and _RULES[name] for name in logical_axes(variable)))
        ),
        state,
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )


def logical_axes(variable: nnx.Variable) -> tuple[str | None, ...]:
    """The names of a variable's axes, e.g. ("layers", "embed", "mlp"); () if it has none."""
    return tuple(variable.get_metadata().get("out_sharding") or ())
