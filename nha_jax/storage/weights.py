"""A model's parameters in files: read a slice at a time, straight to where they belong, and
written a piece at a time, so that neither needs the model in memory."""

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
from nha_jax.model import Model, abstract_model
from nha_jax.parameter_shapes import Shapes, by_name

Index = tuple[slice, ...]
"""A slice for every axis of an array."""

Shardings = Callable[[nnx.State], Any]
"""From the abstract state of a model to a `jax.sharding.Sharding` in place of each variable."""

_PIECE_BYTES = 2**26

# Named as the file format names them.
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class WeightSource(Protocol):
    """Parameters of a model, read as far as they are asked for.

    Attributes:
        name: what errors call it.
        shapes: what it holds.
    """

    name: str
    shapes: Shapes

    def read(self, name: str, index: Index) -> np.ndarray:
        """A part of a parameter, in the dtype that `shapes` says."""


class SafetensorsSource:
    """The tensors of one `.safetensors` file under the names that they have there."""

    def __init__(self, path: Path):
        """Reads the header.

        Raises:
            ValueError: it is no such file, or cut off.
        """
        self.name = str(path)
        self._path = path
        try:
            with safetensors.safe_open(path, "numpy") as file:
                headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path}: damaged: {error}") from None
        by_name = {short: jnp.dtype(long) for long, short in _DTYPES.items()}
        self.shapes: Shapes = {
            name: jax.ShapeDtypeStruct(header.get_shape(), by_name.get(header.get_dtype(), np.void))
            for name, header in headers.items()
        }

    def read(self, name: str, index: Index) -> np.ndarray:
        # Opened for each read: what a mapping has touched counts as resident until it is closed.
        with safetensors.safe_open(self._path, "numpy") as file:
            return file.get_slice(name)[index]


class ModelSource:
    """The parameters of a model in memory, in its config's param_dtype.

    While it is trained, a model may hold some of them in another.
    """

    def __init__(self, model: Model):
        self.name = "the model"
        self._arrays = {name: jnp.asarray(x) for name, x in by_name(nnx.state(model)).items()}
        self._dtype = jnp.dtype(model.config.param_dtype)
        self.shapes: Shapes = {
            name: jax.ShapeDtypeStruct(x.shape, self._dtype) for name, x in self._arrays.items()
        }

    def read(self, name: str, index: Index) -> np.ndarray:
        array = self._arrays[name]
        bounds = [part.indices(length)[:2] for part, length in zip(index, array.shape, strict=True)]
        # Dynamic, so that the parts of an array share one compiled program.
        starts, sizes = [low for low, _ in bounds], [high - low for low, high in bounds]
        part = np.asarray(jax.lax.dynamic_slice(array, starts, sizes))
        return part.astype(self._dtype, copy=False)


def differences(expected: Shapes, found: Shapes) -> list[str]:
    """A few words for every parameter that is missing, unknown, or of another shape or dtype."""
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
    """Of all of them together."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in shapes.values())


def build_model(
    config: ModelConfig, source: WeightSource, shardings: Shardings | None = None
) -> Model:
    """The model with the parameters of `source`.

    Args:
        config: of the model.
        source: of which each device's part is read by itself.
        shardings: where the parameters go; None: to the default device.

    Raises:
        ValueError: the source does not hold what the config says; the message names every
            parameter that differs.
    """
    graph, state = abstract_model(config)
    expected = by_name(state)
    check_weights(expected, source)
    default = jax.sharding.SingleDeviceSharding(_default_device())
    places = jax.tree.map(lambda _: default, state) if shardings is None else shardings(state)
    return nnx.merge(graph, read_state(source, state, places))


def read_state(source: WeightSource, abstract: nnx.State, shardings: Any) -> nnx.State:
    """A model's state, or a part of it, with the parameters of `source`.

    Args:
        source: has a parameter of the same shape for each of the state's variables; each device's
            part is read by itself.
        abstract: shapes and dtypes; a parameter that has another dtype is cast as it is read.
        shardings: the same tree, a `jax.sharding.Sharding` in place of each variable.
    """
    state, places = jax.tree.map(lambda leaf: leaf, abstract), by_name(shardings)
    arrays = {
        name: _place(source, name, places[name], leaf.dtype)
        for name, leaf in by_name(state).items()
    }
    nnx.replace_by_pure_dict(state, _nested(arrays))
    return state


def write_weights(
    path: Path,
    source: WeightSource,
    on_written: Callable[[int], object] = lambda count: None,
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Writes a `.safetensors` file, never holding more than a piece of one parameter.

    Args:
        path: the file.
        source: what to write.
        on_written: called with the bytes of each piece.
        metadata: texts that the file's header holds beside the tensors.
    """
    # The format wants no gaps; larger entries first keep every tensor aligned.
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
    """Parts of an array, of a bearable size, in the order in which they lie in memory."""
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


def _place(
    source: WeightSource, name: str, sharding: jax.sharding.Sharding, dtype: jax.typing.DTypeLike
) -> jax.Array:
    parts: dict[Any, np.ndarray] = {}  # devices with the same part share the reading of it

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


def _nested(arrays: Mapping[str, jax.Array]) -> dict[str, Any]:
    """The inverse of `by_name`: a dictionary for each dot."""
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = array
    return tree
