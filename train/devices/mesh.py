"""The device mesh of a run, and how batches are divided over it."""

import math
from collections.abc import Mapping, Sequence
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

DATA_AXIS = "data"
"""The mesh axis of copies of the model, which alone goes over several slices."""

BATCH_AXES = (DATA_AXIS, "fsdp")
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
    found = jax.devices() if devices is None else list(devices)
    sizes = _sizes(config, len(found))
    _check_divisions(config, sizes)
    slices = _slices(config, sizes["data"], found)
    within = (sizes["data"] // len(slices), *list(sizes.values())[1:])
    # jax.make_mesh would refuse an axis of 8 on 4x4x4 chips.
    placed = [
        mesh_utils.create_device_mesh(within, each, allow_split_physical_axes=True)
        for each in slices
    ]
    return Mesh(np.concatenate(placed), MESH_AXES, axis_types=_AXIS_TYPES)


def num_slices(config: TrainConfig, mesh: Mesh) -> int:
    """Says over how many slices the data axis of a mesh that `make_mesh` made goes."""
    return config.mesh.slices or len({_slice_of(device) for device in mesh.devices.flat})


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


def constrain(tree: Any, mesh: Mesh, specs: Any) -> Any:
    """Constrains how arrays are divided over the mesh, inside of a `jax.shard_map` too.

    `specs` is a tree that the arrays' begins with.
    """
    here = jax.sharding.get_abstract_mesh()
    shardings = jax.tree.map(lambda x: NamedSharding(mesh if here.empty else here, x), specs)
    return jax.lax.with_sharding_constraint(tree, shardings)


def cut_rows(mesh: Mesh, batch: Any, parts: int) -> Any:
    """Cuts arrays [B, T], divided by `batch_sharding`, into [parts, B / parts, T]; for `jax.jit`.

    Every device cuts its own rows, so that none of them moves. Manual axes of the mesh (inside of a
    `jax.shard_map`) have divided the rows already.
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes
    axes = tuple(axis for axis in BATCH_AXES if axis not in manual)
    devices = math.prod(mesh.shape[axis] for axis in axes)

    def cut(x: jax.Array) -> jax.Array:
        own = x.reshape(devices, parts, -1, x.shape[1]).swapaxes(0, 1)
        spec = PartitionSpec(None, axes, SEQUENCE_AXIS)
        return constrain(own.reshape(parts, -1, x.shape[1]), mesh, spec)

    return jax.tree.map(cut, batch)


def _slices(config: TrainConfig, data: int, devices: Sequence[Any]) -> list[list[Any]]:
    """Divides devices by their slices, each of which has an equal part of the data axis."""
    by_slice: dict[int, list[Any]] = {}
    for device in devices:
        by_slice.setdefault(_slice_of(device), []).append(device)
    found, asked = [by_slice[number] for number in sorted(by_slice)], config.mesh.slices
    if asked is not None and asked != len(found):
        if not all(device.platform == "cpu" for device in devices) or len(devices) % asked:
            raise ConfigError(
                f"mesh.slices = {asked}: expected {len(found)}, the slices of these "
                f"{len(devices)} devices, or null"
            )
        size = len(devices) // asked
        found = [list(devices[start : start + size]) for start in range(0, len(devices), size)]
    if data % len(found):
        raise ConfigError(
            f"mesh.data = {data}: expected a multiple of the machine's slices, which are "
            f"{len(found)}; the other axes lie within a slice of {len(found[0])} devices"
        )
    if len({len(each) for each in found}) > 1:
        raise ConfigError(
            f"the machine's slices have {[len(each) for each in found]} devices: expected equally "
            "many in each"
        )
    return found


def _slice_of(device: Any) -> int:
    """Returns the number of a device's slice; 0 where there are none.

    GPUs number the hosts that NVLink does not join so, over which every axis may go.
    """
    number = None if device.platform == "gpu" else getattr(device, "slice_index", None)
    return 0 if number is None else number


def _sizes(config: TrainConfig, devices: int) -> dict[str, int]:
    """How many devices there are along each axis, in the order of MESH_AXES."""
    asked = {axis: getattr(config.mesh, axis) for axis in MESH_AXES}
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
