"""A model's parameters in `.safetensors` files, read and written in parts.

Each device reads its own part of a parameter, and files are written a piece at a time: neither
needs the whole model in memory.
"""

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import nnx

from nha_jax.config import ModelConfig
from nha_jax.layers.projection import BESIDE_KERNEL, merged_kernel, projections
from nha_jax.model import Model, abstract_model
from nha_jax.sizes import Shapes, by_name

Index = tuple[slice, ...]
"""A slice for every axis of an array."""

Shardings = Callable[[nnx.State[Any, Any]], Any]
"""Takes a model's abstract state; returns it with a `jax.sharding.Sharding` for each variable."""

_PIECE_BYTES = 2**26

# Our name of a dtype -> that of the file format.
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class WeightSource(Protocol):
    """Parameters of a model that are read in parts, when they are asked for.

    Attributes:
        name: what error messages call it.
        shapes: shape and dtype of every parameter that it holds, by dotted name.
    """

    name: str
    shapes: Shapes

    def read(self, name: str, index: Index) -> np.ndarray:
        """Reads a part of a parameter, in the dtype that `shapes` says."""


class SafetensorsSource:
    """The tensors of one `.safetensors` file, under the names that they have there."""

    def __init__(self, path: Path):
        """Reads the header of the file.

        Raises:
            ValueError: the file has another format, or is cut off.
        """
        self.name = str(path)
        self._path = path
        try:
            with safetensors.safe_open(path, "numpy") as file:
                headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        except safetensors.SafetensorError as error:
            state = "damaged" if path.stat().st_size else "empty"
            raise ValueError(f"{path}: {state}: {error}; copy or download it again") from None
        dtypes = {short: jnp.dtype(long) for long, short in _DTYPES.items()}
        self.shapes: Shapes = {
            name: jax.ShapeDtypeStruct(header.get_shape(), dtypes.get(header.get_dtype(), np.void))
            for name, header in headers.items()
        }

    def read(self, name: str, index: Index) -> np.ndarray:
        # Opened for each read: until it is closed, all that was read of it counts as memory in use.
        with safetensors.safe_open(self._path, "numpy") as file:
            return file.get_slice(name)[index]


class ArraySource:
    """Arrays in memory, under the names and in the dtypes that they are given."""

    def __init__(self, name: str, arrays: Mapping[str, jax.Array]):
        self.name = name
        self._arrays = arrays
        self.shapes: Shapes = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()
        }

    def read(self, name: str, index: Index) -> np.ndarray:
        return np.asarray(_slice(self._arrays[name], index))


class ModelSource:
    """The parameters of a model in memory, read in its config's param_dtype.

    A model that is being trained may hold some of them in another dtype. What lies beside the
    kernels of projections, such as an adapter, is merged into each part as it is read.
    """

    def __init__(self, model: Model):
        self.name = "the model"
        held = {name: jnp.asarray(x) for name, x in by_name(nnx.state(model)).items()}
        self._beside = {name: held.pop(name) for name in [*held] if _last(name) in BESIDE_KERNEL}
        self._alphas = {
            f"{name}.kernel": projection.alpha
            for name, projection in projections(model).items()
            if not projection.is_plain
        }
        self._arrays = held
        self._dtype = jnp.dtype(model.config.param_dtype)
        self.shapes: Shapes = {
            name: jax.ShapeDtypeStruct(x.shape, self._dtype) for name, x in self._arrays.items()
        }

    def read(self, name: str, index: Index) -> np.ndarray:
        part = _slice(self._arrays[name], index)
        if name in self._alphas:
            *stack, inputs, outputs = index
            every = slice(None)
            indices = ((*stack, inputs, every), (*stack, every, outputs), (*stack, outputs))
            beside = []
            for other, of_other in zip(BESIDE_KERNEL, indices, strict=True):
                array = self._beside.get(f"{name.removesuffix('kernel')}{other}")
                beside.append(None if array is None else _slice(array, of_other))
            part = merged_kernel(part, *beside, alpha=self._alphas[name])
        return np.asarray(part).astype(self._dtype, copy=False)


def _slice(array: jax.Array, index: Index) -> jax.Array:
    """Cuts a part by a dynamic slice, so that all parts of one size share a compiled program."""
    bounds = [part.indices(length)[:2] for part, length in zip(index, array.shape, strict=True)]
    return jax.lax.dynamic_slice(
        array, [low for low, _ in bounds], [high - low for low, high in bounds]
    )


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def differences(expected: Shapes, found: Shapes) -> list[str]:
    """Describes every parameter that is missing, unknown, or of another shape or dtype."""
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unknown" for name in sorted(found) if name not in expected]
    for name, tensor in found.items():
        wanted = expected.get(name)
        if wanted is not None and (tensor.shape, tensor.dtype) != (wanted.shape, wanted.dtype):
            problems.append(
                f"{name} is {tensor.dtype}{list(tensor.shape)}, "
                f"not {wanted.dtype}{list(wanted.shape)}"
            )
    return problems


def check_weights(expected: Shapes, source: WeightSource) -> None:
    """Raises ValueError, naming all `differences`, if a source does not hold what is expected."""
    problems = differences(expected, source.shapes)
    if problems:
        raise ValueError(f"{source.name} does not fit its config: {'; '.join(problems)}")


def weight_bytes(shapes: Shapes) -> int:
    """Counts the bytes of all parameters together."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in shapes.values())


def build_model(
    config: ModelConfig, source: WeightSource, shardings: Shardings | None = None
) -> Model:
    """Builds a model with the parameters of `source`.

    Args:
        config: of the model.
        source: the parameters; each device reads its own part.
        shardings: where the parameters go; None: to the default device.

    Raises:
        ValueError: the source does not hold what the config says; one line names every parameter
            that differs.
    """
    graph, state = abstract_model(config)
    check_weights(by_name(state), source)
    if shardings is None:
        default = jax.sharding.SingleDeviceSharding(_default_device())
        destinations = jax.tree.map(lambda _: default, state)
    else:
        destinations = shardings(state)
    return nnx.merge(graph, read_state(source, state, destinations))


def read_state(source: WeightSource, abstract: nnx.State, shardings: Any) -> nnx.State:
    """Reads a model's state, or a part of it, from `source`.

    Args:
        source: has a parameter of the same shape for each of the state's variables; each device
            reads its own part.
        abstract: the state with shapes and dtypes in place of arrays; a parameter that `source`
            has in another dtype is cast as it is read.
        shardings: the same tree, a `jax.sharding.Sharding` in place of each variable.
    """
    state, destinations = jax.tree.map(lambda leaf: leaf, abstract), by_name(shardings)
    arrays = {
        name: _read_to_devices(source, name, destinations[name], leaf.dtype)
        for name, leaf in by_name(state).items()
    }
    nnx.replace_by_pure_dict(state, nested(arrays))
    return state


def write_weights(
    path: Path,
    source: WeightSource,
    on_written: Callable[[int], object] = lambda count: None,
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Writes a `.safetensors` file, holding no more than a piece of one parameter in memory.

    Args:
        path: the file.
        source: the parameters to write.
        on_written: called after each piece with its number of bytes.
        metadata: names and texts that the file's header holds beside the tensors.
    """
    # The format allows no gaps: the wider dtypes first keep every tensor aligned.
    names = sorted(source.shapes, key=lambda name: (-source.shapes[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in names:
        shape, dtype = source.shapes[name].shape, source.shapes[name].dtype
        end = offset + math.prod(shape) * dtype.itemsize
        entry = {"dtype": _DTYPES[dtype.name], "shape": shape, "data_offsets": [offset, end]}
        header[name], offset = entry, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            shape, dtype = source.shapes[name].shape, source.shapes[name].dtype
            for index in _pieces(shape, dtype.itemsize):
                piece = np.ascontiguousarray(source.read(name, index)).reshape(-1)
                on_written(file.write(piece.view(np.uint8).data))
                del piece  # before the next one is read


def _pieces(shape: tuple[int, ...], itemsize: int) -> Iterator[Index]:
    """Divides an array into parts of at most _PIECE_BYTES or one row, in their order in memory."""
    if not shape:
        yield ()
        return
    row = itemsize * math.prod(shape[1:])
    if row > _PIECE_BYTES and len(shape) > 1:
        for i in range(shape[0]):
            yield from ((slice(i, i + 1), *rest) for rest in _pieces(shape[1:], itemsize))
        return
    rows = max(_PIECE_BYTES // max(row, 1), 1)
    rest = tuple(slice(0, length) for length in shape[1:])
    for start in range(0, shape[0], rows):
        yield slice(start, min(start + rows, shape[0])), *rest


def _read_to_devices(
    source: WeightSource, name: str, sharding: jax.sharding.Sharding, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Reads a parameter onto the devices of a sharding; devices with the same part share it."""
    parts: dict[Any, np.ndarray] = {}

    def part(index: Index | None) -> np.ndarray:
        assert index is not None
        key = tuple((bound.start, bound.stop) for bound in index)
        if key not in parts:
            parts[key] = source.read(name, index).astype(dtype, copy=False)
        return parts[key]

    return jax.make_array_from_callback(source.shapes[name].shape, sharding, part)


def _default_device() -> jax.Device:
    chosen = jax.config.jax_default_device
    return chosen if isinstance(chosen, jax.Device) else jax.local_devices()[0]


def nested(arrays: Mapping[str, jax.Array]) -> dict[str, Any]:
    """Makes nested dictionaries of dotted names: the inverse of `by_name`."""
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = array
    return tree
