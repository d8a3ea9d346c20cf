"""The device mesh of a run, and how batches are divided over it."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nha_jax.sharding import RULES
from train.config import TrainConfig
from train.errors import ConfigError

MESH_AXES = ("data", "fsdp", "tensor", "context")
_AXIS_TYPES = (AxisType.Auto,) * len(MESH_AXES)

BATCH_AXES = ("data", "fsdp")
"""The mesh axes that divide the rows of a batch."""

SEQUENCE_AXIS = "context"
"""The mesh axis that divides the tokens of every sequence."""


def make_mesh(config: TrainConfig, devices: Any = None) -> Mesh:
    """Makes a mesh with the axes `MESH_AXES` of all devices, or of those given.

    Args:
        config: the run's configuration; its section `mesh` gives the sizes.
        devices: the devices to use; None: all there are.

    Raises:
        ConfigError: the mesh does not use exactly the devices there are, or the batch, the
            sequence or the parameters cannot be divided over it.
    """
    count = jax.device_count() if devices is None else len(devices)
    sizes = _sizes(config, count)
    _check_divisions(config, sizes)
    # jax.make_mesh would refuse an axis of 8 on 4x4x4 chips.
    placed = mesh_utils.create_device_mesh(
        tuple(sizes.values()), devices, allow_split_physical_axes=True
    )
    return Mesh(placed, MESH_AXES, axis_types=_AXIS_TYPES)


def single_device_mesh(device: jax.Device) -> Mesh:
    """Makes a mesh with the axes `MESH_AXES` of one device."""
    sizes = (1,) * len(MESH_AXES)
    return jax.make_mesh(sizes, MESH_AXES, axis_types=_AXIS_TYPES, devices=[device])


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of [B, T] arrays: rows over data and fsdp, tokens over context."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES, SEQUENCE_AXIS))


def rows_of_process(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which rows of a batch the devices of this process hold: [rows] int64, ascending."""
    shape = (batch_size, mesh.shape[SEQUENCE_AXIS])
    indices = batch_sharding(mesh).addressable_devices_indices_map(shape)
    rows = [np.arange(batch_size)[index[0]] for index in indices.values() if index]
    return np.unique(np.concatenate(rows))


def to_devices(
    mesh: Mesh, batch: Mapping[str, np.ndarray], batch_size: int
) -> dict[str, jax.Array]:
    """Makes global arrays [batch_size, T] of a batch of which each process has its own rows.

    Args:
        mesh: the run's devices.
        batch: arrays [rows, T], the rows that `rows_of_process` names, in order.
        batch_size: rows of the whole batch.
    """
    sharding, rows = batch_sharding(mesh), rows_of_process(mesh, batch_size)

    def place(local: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            wanted = np.arange(batch_size)[index[0]]
            return local[np.searchsorted(rows, wanted), index[1]]

        return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, part)

    return {name: place(array) for name, array in batch.items()}


def cut_rows(mesh: Mesh, batch: Any, parts: int) -> Any:
    """Cuts arrays [B, T], divided by `batch_sharding`, into [parts, B / parts, T]; for `jax.jit`.

    Every device cuts its own rows, so that none of them moves.
    """
    devices = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    sharding = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES, SEQUENCE_AXIS))

    def cut(x: jax.Array) -> jax.Array:
        own = x.reshape(devices, parts, -1, x.shape[1]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(own.reshape(parts, -1, x.shape[1]), sharding)

    return jax.tree.map(cut, batch)


def _sizes(config: TrainConfig, devices: int) -> dict[str, int]:
    """How many devices there are along each axis, in the order of MESH_AXES."""
    asked = dataclasses.asdict(config.mesh)
    given = math.prod(size for size in asked.values() if size != -1)
    rest = max(devices // given, 1)
    sizes = {axis: rest if asked[axis] == -1 else asked[axis] for axis in MESH_AXES}
    if math.prod(sizes.values()) != devices:
        mesh = ", ".join(f"{axis}: {size}" for axis, size in asked.items())
        raise ConfigError(
            f"mesh = {{{mesh}}}: expected sizes whose product is the number of devices, "
            f"which is {devices}"
        )
    return sizes


def _check_divisions(config: TrainConfig, sizes: Mapping[str, int]) -> None:
    """Raises ConfigError if the batch, the sequence or a parameter cannot be divided evenly."""
    model = config.model
    rows = config.batch_size // config.micro_batches
    per_row = "batch_size" if config.micro_batches == 1 else "batch_size / micro_batches"
    whole = config.head_parts == 1
    per_part = "data.sequence_length" if whole else "data.sequence_length / head_parts"
    mlp = ("mlp_size", model.mlp_size)
    if model.experts:
        mlp = ("experts.size", model.experts.size)
    divided = [
        (per_row, rows, BATCH_AXES),
        (per_part, config.data.sequence_length // config.head_parts, (SEQUENCE_AXIS,)),
        ("model.hidden_size", model.hidden_size, RULES["embed"]),
        ("model.num_query_heads", model.num_query_heads, RULES["heads"]),
        (f"model.{mlp[0]}", mlp[1], RULES["mlp"]),
    ]
    for name, length, axes in divided:
        ways = math.prod(sizes[axis] for axis in axes)
        if length % ways:
            raise ConfigError(
                f"{name} = {length}: expected a multiple of "
                f"{' x '.join(f'mesh.{axis}' for axis in axes)}, which is {ways}"
            )
