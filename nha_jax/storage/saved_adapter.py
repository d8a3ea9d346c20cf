"""Saved adapters: a folder with `adapter.json` and `adapter.safetensors`, without the model."""

import dataclasses
import json
import os
from collections.abc import Iterable, Set
from pathlib import Path
from typing import NamedTuple

import jax
from flax import nnx

from nha_jax.adapters import adapter_of, add_adapter, factor_shapes
from nha_jax.config import ModelConfig
from nha_jax.config_parts import Adapter
from nha_jax.model import Model
from nha_jax.sizes import Shapes, abstract_parameters, by_name
from nha_jax.storage.json_objects import DamagedFileError, parse_object
from nha_jax.storage.saved_model import replacing_folder
from nha_jax.storage.stores import local_input, local_output
from nha_jax.storage.weights import (
    ArraySource,
    SafetensorsSource,
    check_weights,
    nested,
    weight_bytes,
    write_weights,
)

ADAPTER_FILE = "adapter.json"
FACTORS_FILE = "adapter.safetensors"


class SavedAdapter(NamedTuple):
    """What a folder with an adapter holds; the tensors are read when they are asked for.

    Fields:
        adapter: its rank, alpha and targets, which are whole names.
        whole: names of the parameters that were trained whole beside it.
        config: of the model that it was trained with.
        source: the factors and the parameters of `whole`, by dotted name.
    """

    adapter: Adapter
    whole: tuple[str, ...]
    config: ModelConfig
    source: SafetensorsSource


def save_adapter(
    path: str | os.PathLike[str],
    model: Model,
    *,
    whole: Iterable[str] = (),
    overwrite: bool = False,
) -> None:
    """Saves a model's adapter as a folder, without the model: all of it or nothing.

    Tensors have the dotted names of the parameters, `blocks.attention.q_proj.lora_a`, and the
    dtypes that these have.

    Args:
        path: the folder to create; its parents are created too. It may be in an object store.
        model: a model with an adapter, as `add_adapter` makes it.
        whole: names of parameters that were trained whole beside it, and are saved with it.
        overwrite: replace an adapter that is there already.

    Raises:
        ValueError: the model has no adapter, or no parameter of a name in `whole`.
        FileExistsError: `path` exists and overwrite is False, or it is not a saved adapter.
    """
    adapter = adapter_of(model)
    if adapter is None:
        raise ValueError("model has no adapter to save; add_adapter(model, ...) makes one")
    arrays = by_name(nnx.state(model))
    whole = tuple(sorted(whole))
    names = [*factor_shapes(model.config, adapter), *whole]
    unknown = [name for name in names if name not in arrays]
    if unknown:
        raise ValueError(f"whole={unknown[0]!r} is no parameter of the model")
    source = ArraySource("the adapter", {name: arrays[name] for name in names})
    fields = dataclasses.asdict(adapter) | {"whole": whole, "model": model.config.to_dict()}
    with local_output(path, ADAPTER_FILE, overwrite=overwrite) as folder:
        own = {ADAPTER_FILE, FACTORS_FILE}
        check_holds_only(folder, own, "save_adapter", overwrite=overwrite)
        with replacing_folder(folder, weight_bytes(source.shapes)) as new:
            (new / ADAPTER_FILE).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
            write_weights(new / FACTORS_FILE, source)


def load_adapter(path: str | os.PathLike[str], model: Model) -> Model:
    """Puts the adapter that `save_adapter` wrote to `path` beside a model's projections.

    Args:
        path: the folder.
        model: the model that it was trained on, with any windows; its parameters are shared, not
            copied, but those that were trained whole, which take the saved values.

    Returns:
        The adapted model, as `add_adapter` makes it.

    Raises:
        FileNotFoundError: `path` lacks one of the files.
        ValueError: a file is damaged, the model has an adapter, or the saved one is not of a model
            of these sizes; one line names all tensors that differ.
    """
    saved = open_adapter(path)
    adapted = add_adapter(model, saved.adapter, rngs=nnx.Rngs(0))
    expected = _expected(model.config, saved)
    check_weights(expected, saved.source)
    state = nnx.state(adapted)
    places = {name: array.sharding for name, array in by_name(state).items()}
    arrays = {
        name: jax.device_put(saved.source.read(name, (slice(None),) * len(x.shape)), places[name])
        for name, x in expected.items()
    }
    nnx.replace_by_pure_dict(state, nested(arrays))
    nnx.update(adapted, state)
    return adapted


def open_adapter(path: str | os.PathLike[str]) -> SavedAdapter:
    """Opens what `save_adapter` wrote to `path`, without reading tensors.

    Raises:
        FileNotFoundError: `path` lacks one of the files.
        ValueError: a file is damaged, or says what no adapter can be.
    """
    path = local_input(path)
    for name in (ADAPTER_FILE, FACTORS_FILE):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} is not a saved adapter: it has no {name}")
    fields = parse_object((path / ADAPTER_FILE).read_bytes(), path / ADAPTER_FILE)
    try:
        config = ModelConfig.from_dict(fields.pop("model"))
        whole = tuple(map(str, fields.pop("whole")))
        adapter = Adapter(**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(f"{path / ADAPTER_FILE}: no adapter: {error}") from None
    return SavedAdapter(adapter, whole, config, SafetensorsSource(path / FACTORS_FILE))


def check_holds_only(path: Path, own: Set[str], writer: str, *, overwrite: bool) -> None:
    """Raises FileExistsError unless `path` is free, or may be replaced.

    Args:
        path: a folder to write.
        own: the names of the files that `writer` writes into a folder, all of them.
        writer: the name of a function.
        overwrite: whether a folder with these files alone may be replaced.
    """
    if not path.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{path} exists; choose another folder or pass overwrite=True")
    if not path.is_dir() or {file.name for file in path.iterdir()} != own:
        raise FileExistsError(f"{path} is not a folder written by {writer}; it is left as it is")


def _expected(config: ModelConfig, saved: SavedAdapter) -> Shapes:
    """The tensors that an adapter of a model has, in the dtypes that are saved, whichever."""
    parameters = abstract_parameters(config)
    unknown = [name for name in saved.whole if name not in parameters]
    if unknown:
        raise ValueError(f"{saved.source.name}: the model has no parameter {unknown[0]}")
    shapes = {**factor_shapes(config, saved.adapter)}
    shapes |= {name: parameters[name] for name in saved.whole}
    found = saved.source.shapes
    return {
        name: jax.ShapeDtypeStruct(x.shape, found[name].dtype if name in found else x.dtype)
        for name, x in shapes.items()
    }
