"""Writing models for transformers, with our code or without, or for that of the paper's authors."""

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import safetensors

from nha_jax.config import ModelConfig
from nha_jax.hf.checkpoint import INDEX_FILE, WEIGHTS_FILE, copy_array
from nha_jax.hf.config import FREE_FIELDS, from_hf_config, to_hf_config
from nha_jax.hf.families import PUBLISHED_FAMILY, find_hybrid
from nha_jax.hf.files_beside import files_beside, names_beside
from nha_jax.hf.own_code import write_own_code_config
from nha_jax.hf.published import published_notices, read_published, write_published
from nha_jax.hf.published_hybrid import hybrid_notices, without_gates, write_hybrid
from nha_jax.hf.tensors import Entry, hybrid_table, own_code_table, plain_table, published_table
from nha_jax.model import Model
from nha_jax.sizes import Shapes
from nha_jax.storage.folder import CONFIG_FILE, EXTRA_FILES, ORIGINAL_CONFIG_FILE
from nha_jax.storage.json_objects import parse_object
from nha_jax.storage.saved_model import replacing_folder
from nha_jax.storage.weights import (
    Index,
    ModelSource,
    WeightSource,
    weight_bytes,
    write_weights,
)

Format = Literal["family", "nha", "transformers"]


_METADATA = {"format": "pt", "producer": "nha_jax"}

# Keys that are written under another name, or that other versions of transformers write.
_REWRITTEN = {
    "rope_parameters", "rope_scaling", "layer_types", "dtype", "num_local_experts",
    "transformers_version",
}  # fmt: skip


class Export(NamedTuple):
    """What `plan_export` planned, before any weight is written.

    Fields:
        fields: the content of config.json.
        entries: where each parameter goes; parameters without an entry are left out.
        notices: sentences about where the exported model computes something else than ours.
        made: name and content of files that are written beside those that travel with the model.
    """

    fields: dict[str, Any]
    entries: tuple[Entry, ...]
    notices: tuple[str, ...]
    made: Mapping[str, bytes] = MappingProxyType({})


def save_pretrained(
    path: str | os.PathLike[str],
    model: Model,
    *,
    format: Format | None = None,
    files: Mapping[str, bytes] | None = None,
    measured: Mapping[str, float | str] = MappingProxyType({}),
    shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> tuple[str, ...]:
    """Writes a folder that transformers, or the code of the paper's authors, can load.

    Args:
        path: the folder to create, all of it or nothing; its parents are created too.
        model: the model; `with_windows` gives it other windows.
        format: "family": that of Llama, Qwen2, ..., for a pretrained model with window None in
            every layer, without its gates, which full attention does not use. "nha": that of the
            paper's authors, with the gates; its model type is nha for the published architecture,
            and for pretrained models one such as llama_nha. "transformers": any model, windows,
            gates and all, with code of ours beside it, which transformers runs if it is told to
            (trust_remote_code=True), and a model card. None: "family" where it fits, else "nha".
        files: name and content of extra files (`nha_jax.storage.folder.EXTRA_FILES`). That of
            an imported model, `original_config.json`, decides the family and those keys of
            config.json that the model itself does not.
        measured: what the model card says was measured, by name, such as a held-out loss.
        shard_bytes: the largest size of a file of weights, unless it holds a single tensor.
        overwrite: replace a folder that this function wrote.

    Returns:
        Sentences about where the exported model computes something else than this one.

    Raises:
        ValueError: no format can express the model; one line names every field in the way.
        FileExistsError: `path` exists and overwrite is False, or something else is there.
        OSError: there is too little room on the disk; nothing was written.
    """
    export = plan_export(model.config, files or {}, format, measured)
    write_export(
        path, export, ModelSource(model), files or {}, shard_bytes=shard_bytes, overwrite=overwrite
    )
    return export.notices


def plan_export(
    config: ModelConfig,
    files: Mapping[str, bytes],
    format: Format | None = None,
    measured: Mapping[str, float | str] = MappingProxyType({}),
) -> Export:
    """Plans what `save_pretrained` writes; the same arguments, errors and notices.

    No other format divides logits by a width: the final norm's scale takes over what
    `ModelConfig.mup_base_width` does to them.
    """
    export = _plan(dataclasses.replace(config, mup_base_width=None), files, format, measured)
    entries = (
        dataclasses.replace(entry, factor=1 / config.width_ratio)
        if entry.name == "norm.scale"
        else entry
        for entry in export.entries
    )
    return export._replace(entries=tuple(entries))


def _plan(
    config: ModelConfig,
    files: Mapping[str, bytes],
    format: Format | None,
    measured: Mapping[str, float | str],
) -> Export:
    """Plans an export of a model whose logits are the head's."""
    if format == "transformers":
        made = files_beside(config, files, measured)
        fields = write_own_code_config(config) | _tokens({**made, **files})
        return Export(fields, own_code_table(config), (), made)
    original = _original(files)
    hybrid = set(config.windows) != {None}
    if config.output_norm or config.value_activation != "identity":
        if format == "family":
            raise ValueError(
                "no model of transformers has the published architecture's attention; leave "
                "format='family' out, or take format='transformers', which brings code for it"
            )
        fields = _kept(config, original, published=True) | write_published(config)
        return Export(fields, published_table(config), published_notices(config))
    plain = _plain_fields(config, original, files)
    if format == "nha" or (format is None and hybrid):
        fields = write_hybrid(config, plain)
        notices = hybrid_notices(config, fields["model_type"])
        return Export(fields, hybrid_table(config), notices)
    if hybrid:
        raise ValueError(
            f"window_size = {config.window_size}: no model of transformers has windows like these; "
            "export with full attention (--windows none), with format='transformers', which brings "
            "code for it, or with format='nha' for the code of the paper's authors"
        )
    attends = config.empty_slots == "attend" and config.num_slots > 0
    notice = "this model attends to empty slots (empty_slots='attend'), and transformers has none"
    return Export(plain, plain_table(config), (notice,) if attends else ())


def write_export(
    path: str | os.PathLike[str],
    export: Export,
    source: WeightSource,
    files: Mapping[str, bytes],
    *,
    shard_bytes: int,
    overwrite: bool = False,
    on_written: Callable[[int], object] = lambda count: None,
) -> None:
    """Writes what `plan_export` planned, a piece of a tensor at a time.

    Args:
        path, files, shard_bytes, overwrite: as for `save_pretrained`.
        export: the plan.
        source: the model's parameters.
        on_written: called after each piece of the weights with its number of bytes.

    Raises:
        ValueError, FileExistsError, OSError: as for `save_pretrained`.
    """
    path = Path(path)
    if wrong := sorted(set(files) - set(EXTRA_FILES)):
        raise ValueError(f"files={wrong} must be of {', '.join(EXTRA_FILES)}")
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes={shard_bytes} must be at least 1")
    check_exportable(path, overwrite=overwrite)
    tensors = _exported_tensors(source.shapes, export.entries)
    theirs = ExportedSource(source, tensors).shapes
    shards = _shards(theirs, shard_bytes)
    needed = weight_bytes(theirs) + sum(map(len, files.values()))
    with replacing_folder(path, needed) as new:
        _write_json(new / CONFIG_FILE, export.fields)
        for name, content in {**export.made, **files}.items():
            if name != ORIGINAL_CONFIG_FILE:
                (new / name).write_bytes(content)
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            name = WEIGHTS_FILE
            if len(shards) > 1:
                name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            part = ExportedSource(source, {name: tensors[name] for name in shard})
            write_weights(new / name, part, on_written, _METADATA)
            weight_map |= dict.fromkeys(shard, name)
        if len(shards) > 1:
            total = {"total_size": weight_bytes(theirs)}
            _write_json(new / INDEX_FILE, {"metadata": total, "weight_map": weight_map})


def check_exportable(path: Path, *, overwrite: bool) -> None:
    """Raises FileExistsError if `path` exists, unless it is an export to be overwritten."""
    if not path.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{path} exists; choose another folder or pass overwrite=True")
    if not _is_export(path):
        raise FileExistsError(f"{path} is not a folder written by an export; it is left as it is")


class ExportedSource:
    """Parameters of a model, as tensors under the names of another format.

    Attributes:
        name: what error messages call it.
        shapes: shape and dtype of every tensor.
    """

    def __init__(self, source: WeightSource, tensors: Mapping[str, "_ExportedTensor"]):
        self.name = source.name
        self._source, self._tensors = source, tensors
        self.shapes: Shapes = {
            name: jax.ShapeDtypeStruct(tensor.shape, source.shapes[tensor.entry.name].dtype)
            for name, tensor in tensors.items()
        }

    def read(self, name: str, index: Index) -> np.ndarray:
        """Reads a part of a tensor; the slices have bounds."""
        tensor = self._tensors[name]
        at = tuple(slice(i, i + 1) for i in tensor.indices)
        part = self._source.read(tensor.entry.name, (*at, *tensor.entry.our_index(index)))
        values = tensor.entry.theirs(part.reshape(part.shape[len(at) :]))
        result = np.empty(values.shape, values.dtype)
        copy_array(values, result)
        return result


class _ExportedTensor(NamedTuple):
    """Where a tensor of theirs lies in our parameters."""

    entry: Entry
    indices: tuple[int, ...]  # of our leading axes: layer and expert
    shape: tuple[int, ...]  # the tensor's


def _exported_tensors(ours: Shapes, entries: tuple[Entry, ...]) -> dict[str, _ExportedTensor]:
    """Lists every tensor of theirs, from the embedding through the layers to the head."""
    found = []
    for entry in entries:
        shape = ours[entry.name].shape
        for indices in itertools.product(*map(range, shape[: entry.stacked_axes])):
            layer = indices[0] if indices else (-1 if entry.name.startswith("embed") else math.inf)
            tensor = _ExportedTensor(entry, indices, entry.their_shape(shape))
            found.append((layer, entry.their_name(indices), tensor))
    return {name: tensor for _, name, tensor in sorted(found, key=lambda item: item[:2])}


def _shards(theirs: Shapes, shard_bytes: int) -> list[list[str]]:
    """Divides the names, in order, into one list for each file."""
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, shape in theirs.items():
        size = weight_bytes({name: shape})
        if shards[-1] and size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    return shards


def _plain_fields(
    config: ModelConfig, original: Mapping[str, Any], files: Mapping[str, bytes]
) -> dict[str, Any]:
    """Writes the config.json with which transformers computes the model at window None."""
    kept = _kept(config, original, published=False)
    fields = to_hf_config(config, max_position_embeddings=kept.get("max_position_embeddings"))
    if not kept:
        return fields | _tokens(files)
    own: dict[str, Any] = {key: kept[key] for key in ("architectures", "model_type") if key in kept}
    if "sliding_window" in kept:  # the model sees all tokens, also where its original did not
        own["sliding_window"] = None
    return kept | fields | own


def _kept(config: ModelConfig, original: Mapping[str, Any], *, published: bool) -> dict[str, Any]:
    """Returns the original's config.json, if it still describes the model; else an empty one."""
    model_type = original.get("model_type")
    if find_hybrid(original):
        original = without_gates(original)
    if published != (model_type == PUBLISHED_FAMILY.model_type) or not original:
        return {}
    try:
        read = read_published if published else from_hf_config
        before = read(original, param_dtype=config.param_dtype).config
    except ValueError:
        return {}
    determined = {field.name for field in dataclasses.fields(config)} - set(FREE_FIELDS)
    if any(getattr(before, name) != getattr(config, name) for name in determined):
        return {}
    return {key: value for key, value in original.items() if key not in _REWRITTEN}


def _original(files: Mapping[str, bytes]) -> dict[str, Any]:
    return _read_object(files.get(ORIGINAL_CONFIG_FILE, b"{}"))


def _tokens(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Returns the ids of special tokens; without them transformers would use its family's."""
    given = _read_object(files.get("generation_config.json", b"{}"))
    return {key: given.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _read_object(content: bytes) -> dict[str, Any]:
    try:
        return parse_object(content, "")
    except ValueError:
        return {}


def _is_export(path: Path) -> bool:
    """Whether the folder is an export of ours alone; downloaded models have the same file names."""
    own = {CONFIG_FILE, INDEX_FILE, *EXTRA_FILES, *names_beside()}
    weights = list(path.glob("*.safetensors"))
    if not path.is_dir() or {file.name for file in path.iterdir()} - own - {
        x.name for x in weights
    }:
        return False
    try:
        return bool(weights) and all(_metadata(file) == _METADATA for file in weights)
    except safetensors.SafetensorError:
        return False


def _metadata(path: Path) -> dict[str, str] | None:
    with safetensors.safe_open(path, "numpy") as file:
        return file.metadata()


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
