"""The weights of a transformers model, read as they are needed: under their names and ours."""

import itertools
import math
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from nha_jax.config import DType, ModelConfig
from nha_jax.hf.tensors import IGNORED_SUFFIXES, TIED_HEAD, Entry
from nha_jax.scalars import shown
from nha_jax.sizes import Shapes, abstract_parameters
from nha_jax.storage.json_objects import parse_object
from nha_jax.storage.weights import Index, SafetensorsSource, differences

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_PICKLES = ("*.bin", "*.pth", "*.pt", "*.pkl")
_FLOATS = ("float32", "bfloat16", "float16")


class Checkpoint:
    """The tensors of a folder's `.safetensors` files, one or several, under their own names.

    Attributes:
        name: what error messages call it.
        shapes: shape and dtype of every tensor; the dtype is void if numpy cannot compute with it.
    """

    def __init__(self, folder: Path):
        """Reads the index and the headers.

        Raises:
            FileNotFoundError: the folder has no weights, or only pickled ones.
            ValueError: shards are missing or damaged; one line names all of them.
        """
        self.name = str(folder)
        self._sources: dict[str, SafetensorsSource] = {}  # by tensor
        problems = []
        for shard in _shards(folder):
            try:
                source = _open(folder / shard)
            except ValueError as error:
                problems.append(str(error))
                continue
            twice = sorted(self._sources.keys() & source.shapes.keys())
            problems += [f"{name} is in {shard} and in another shard too" for name in twice]
            self._sources |= dict.fromkeys(source.shapes, source)
        if problems:
            raise ValueError(f"{folder} cannot be read: {'; '.join(problems)}")
        self.shapes: Shapes = {name: source.shapes[name] for name, source in self._sources.items()}

    def read(self, name: str, index: Index) -> np.ndarray:
        """Reads a part of a tensor, and nothing else of the file."""
        return self._sources[name].read(name, index)

    def param_dtype(self) -> DType:
        """Picks the smallest dtype of ours that holds every floating-point tensor exactly."""
        learned = {x for name, x in self.shapes.items() if not name.endswith(IGNORED_SUFFIXES)}
        dtypes = {x.dtype.name for x in learned} & set(_FLOATS)
        return "bfloat16" if dtypes == {"bfloat16"} else "float32"


class ConvertedSource:
    """The parameters of a `Model`, read from a checkpoint in another format.

    Attributes:
        name: what error messages call it.
        shapes: shape and dtype of every parameter, as the config has it.
    """

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint, entries: Iterable[Entry]):
        """Compares the tensors that the config needs with those that the checkpoint has.

        No tensor is read, except for the head of a model whose embeddings are tied.

        Args:
            config: of the model.
            checkpoint: the files.
            entries: where each parameter lies in them, as `nha_jax.hf.tensors` lists it.

        Raises:
            ValueError: tensors are missing, unknown, or of another shape or dtype than the config
                says; one line names all of them. Or the config ties the embeddings, and the
                checkpoint has a head that differs from the embedding table.
        """
        self.name = checkpoint.name
        self._checkpoint = checkpoint
        self._entries = {entry.name: entry for entry in entries}
        self.shapes: Shapes = abstract_parameters(config)
        meant = sum(
            math.prod(self.shapes[entry.name].shape[: entry.stacked_axes])
            for entry in self._entries.values()
        )
        if meant > 10 * max(len(checkpoint.shapes), 100):  # too many to name
            raise ValueError(
                f"{self.name} does not fit its config.json, which means {meant} tensors: the files "
                f"have {len(checkpoint.shapes)}"
            )
        problems = _differences(config, self._entries.values(), self.shapes, checkpoint.shapes)
        if problems:
            raise ValueError(f"{self.name} does not fit its config.json: {'; '.join(problems)}")
        table_name = self._entries["embed.embedding"].template
        if config.tie_embeddings and not _same(checkpoint, table_name, TIED_HEAD):
            # Versions 4 and 5 of transformers disagree about which of the two to use.
            raise ValueError(
                f"{self.name} has {TIED_HEAD}, which differs from {table_name}, but its "
                "config.json says that they are one; set tie_word_embeddings to the truth there"
            )

    def read(self, name: str, index: Index) -> np.ndarray:
        """Reads a part of one parameter, in the dtype of `shapes`, a tensor of theirs at a time."""
        entry, wanted = self._entries[name], self.shapes[name]
        bounds = [part.indices(length) for part, length in zip(index, wanted.shape, strict=True)]
        parts = tuple(slice(low, high) for low, high, _ in bounds)
        if entry.constant is not None:
            return np.full([high - low for low, high, _ in bounds], entry.constant, wanted.dtype)
        stacked = parts[: entry.stacked_axes]
        theirs = entry.their_index(parts[entry.stacked_axes :])
        result = np.empty([part.stop - part.start for part in parts], wanted.dtype)
        for indices in itertools.product(*(range(part.start, part.stop) for part in stacked)):
            tensor = self._checkpoint.read(entry.their_name(indices), theirs)
            at = tuple(i - part.start for i, part in zip(indices, stacked, strict=True))
            copy_array(entry.ours(tensor), result[at])
        return result


def copy_array(values: np.ndarray, to: np.ndarray) -> None:
    """Copies: to[...] = values, a transposed matrix about five times as fast as numpy does.

    A few columns at a time, so that they stay in the cache until each cache line of `to` is full.
    """
    if values.ndim != 2 or values.strides[0] >= values.strides[1]:
        to[...] = values
        return
    for start in range(0, values.shape[1], 16):
        to[:, start : start + 16] = values[:, start : start + 16]


def _differences(
    config: ModelConfig, entries: Iterable[Entry], ours: Shapes, found: Shapes
) -> list[str]:
    """Lists what does not fit between the config and the checkpoint, by the checkpoint's names."""
    ignored = {name for name in found if name.endswith(IGNORED_SUFFIXES)}
    if config.tie_embeddings:
        ignored.add(TIED_HEAD)
    expected: dict[str, jax.ShapeDtypeStruct] = {}
    for entry in entries:
        shape = ours[entry.name].shape
        for name in entry.their_names(shape):
            dtype = found[name].dtype if name in found else jnp.dtype("float32")
            expected[name] = jax.ShapeDtypeStruct(entry.their_shape(shape), dtype)
    read = {name: tensor for name, tensor in found.items() if name not in ignored}
    return differences(expected, read) + [
        f"{name} is of a dtype other than {', '.join(_FLOATS)}: quantized weights are not supported"
        for name in sorted(expected.keys() & read.keys())
        if read[name].dtype.name not in _FLOATS
    ]


def _same(checkpoint: Checkpoint, name: str, other: str) -> bool:
    """Whether two tensors are equal, or the checkpoint lacks the other."""
    if other not in checkpoint.shapes:
        return True
    shape, step = checkpoint.shapes[name].shape, 4096
    if checkpoint.shapes[other].shape != shape:
        return False
    starts, width = range(0, shape[0], step), slice(0, shape[1])
    parts = [(slice(i, min(i + step, shape[0])), width) for i in starts]
    read = checkpoint.read
    return all(np.array_equal(read(name, part), read(other, part)) for part in parts)


def _open(path: Path) -> SafetensorsSource:
    """Opens a shard; raises ValueError, naming the file, if it is missing or damaged."""
    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    with path.open("rb") as file:
        if file.read(20).startswith(b"version https://git"):
            raise ValueError(f"{path.name} is a pointer of Git LFS: fetch it with `git lfs pull`")
    return SafetensorsSource(path)


def _shards(folder: Path) -> list[str]:
    """Names the files that hold the weights."""
    if (folder / WEIGHTS_FILE).is_file():
        return [WEIGHTS_FILE]
    index = folder / INDEX_FILE
    if not index.is_file():
        raise FileNotFoundError(_no_weights(folder))
    named = parse_object(index.read_bytes(), index).get("weight_map")
    # A name with a folder in it could lead anywhere.
    if not isinstance(named, dict) or not named or not all(map(_is_file_name, named.values())):
        raise ValueError(
            f"{index}: weight_map = {shown(named)}: expected a map from tensors to files beside it"
        )
    return sorted(set(named.values()))


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and value not in ("", "..") and Path(value).name == value


def _no_weights(folder: Path) -> str:
    pickles = sorted(file.name for kind in _PICKLES for file in folder.glob(kind))
    if not pickles:
        return f"{folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}"
    return (
        f"{folder} has pickled weights only ({', '.join(pickles)}), which are not read: unpickling "
        f"runs code of whoever wrote them. Download the model's .safetensors files, or have "
        f"transformers write them where you trust the source (save_pretrained)"
    )
