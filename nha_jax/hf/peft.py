"""Adapters as the library PEFT reads them, beside a model of transformers."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from nha_jax.hf.tensors import Entry, own_code_table
from nha_jax.sizes import Shapes
from nha_jax.storage.saved_adapter import SavedAdapter, check_holds_only, open_adapter
from nha_jax.storage.saved_model import replacing_folder
from nha_jax.storage.weights import Index, weight_bytes, write_weights

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_THEIR_FACTORS = {"lora_a": "lora_A", "lora_b": "lora_B"}


class _Tensor(NamedTuple):
    """One tensor of theirs: a layer's part of one of ours.

    Fields:
        ours: our dotted name.
        layer: the indices of our leading axes.
        shape: of theirs.
        arrange: makes theirs of that part of ours.
    """

    ours: str
    layer: tuple[int, ...]
    shape: tuple[int, ...]
    arrange: Callable[[np.ndarray], np.ndarray]


def save_peft(
    path: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> None:
    """Writes a saved adapter as PEFT reads it: adapter_config.json and adapter_model.safetensors.

        base = AutoModelForCausalLM.from_pretrained(BASE, trust_remote_code=True)
        model = peft.PeftModel.from_pretrained(base, path)

    The names are those of `save_pretrained`'s formats "transformers" and, for pretrained models,
    "family": BASE is such an export of the model that the adapter was trained on. Parameters that
    were trained whole, such as gates, are what PEFT calls modules_to_save; a "family" model has no
    gates, and so no place for theirs.

    Args:
        path: the folder to create, all of it or nothing; its parents are created too.
        adapter: a folder that `save_adapter` wrote.
        overwrite: replace a folder that this function wrote.

    Raises:
        FileNotFoundError, ValueError: `adapter` is no such folder; or a projection has both an
            adapter and a bias that was trained, for which PEFT has no form.
        FileExistsError: `path` exists and overwrite is False, or something else is there.
    """
    path = Path(path)
    own = {CONFIG_FILE, WEIGHTS_FILE}
    check_holds_only(path, own, "save_peft", overwrite=overwrite)
    saved = open_adapter(adapter)
    source = PeftSource(saved)
    with replacing_folder(path, weight_bytes(source.shapes)) as new:
        text = json.dumps(_config(saved), indent=2) + "\n"
        (new / CONFIG_FILE).write_text(text, encoding="utf-8")
        write_weights(new / WEIGHTS_FILE, source, metadata={"format": "pt"})


class PeftSource:
    """The tensors of a saved adapter, under PEFT's names."""

    def __init__(self, saved: SavedAdapter):
        self.name = saved.source.name
        self._source = saved.source
        self._tensors = dict(_tensors(saved))
        self.shapes: Shapes = {
            name: jax.ShapeDtypeStruct(tensor.shape, saved.source.shapes[tensor.ours].dtype)
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str, index: Index) -> np.ndarray:
        tensor = self._tensors[name]
        rank = len(self._source.shapes[tensor.ours].shape) - len(tensor.layer)
        layer = tuple(slice(i, i + 1) for i in tensor.layer)
        part = self._source.read(tensor.ours, (*layer, *(slice(None),) * rank))
        return tensor.arrange(part.reshape(part.shape[len(layer) :]))[index]


def _tensors(saved: SavedAdapter) -> Iterator[tuple[str, _Tensor]]:
    entries, shapes = _entries(saved), saved.source.shapes
    for target in saved.adapter.targets:
        entry = entries[f"{target}.kernel"]
        for factor, theirs in _THEIR_FACTORS.items():
            ours = f"{target}.{factor}"
            *stack, rows, columns = shapes[ours].shape
            for layer in np.ndindex(*stack):
                module = _module(entry.their_name(layer))
                name = f"{_PREFIX}{module}.{theirs}.weight"
                yield name, _Tensor(ours, layer, (columns, rows), np.transpose)
    for ours in saved.whole:
        entry = entries[ours]
        shape = shapes[ours].shape
        for layer in np.ndindex(*shape[: entry.stacked_axes]):
            name = f"{_PREFIX}{entry.their_name(layer)}"
            yield name, _Tensor(ours, layer, entry.their_shape(shape), entry.theirs)


def _config(saved: SavedAdapter) -> dict[str, Any]:
    entries = _entries(saved)
    kernels = [entries[f"{target}.kernel"] for target in saved.adapter.targets]
    targets = {_suffix(entry) for entry in kernels}
    whole = {_suffix(entries[name]) for name in saved.whole}
    if targets & whole:
        raise ValueError(
            f"{saved.source.name}: PEFT cannot hold both an adapter of {min(targets & whole)} and "
            "its bias; leave the bias out of what is trained"
        )
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": saved.adapter.rank,
        "lora_alpha": saved.adapter.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(targets),
        "modules_to_save": sorted(whole) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _entries(saved: SavedAdapter) -> dict[str, Entry]:
    return {entry.name: entry for entry in own_code_table(saved.config)}


def _module(their_name: str) -> str:
    return their_name.rpartition(".")[0]


def _suffix(entry: Entry) -> str:
    """How the names of the modules of an entry end, in every layer: `self_attn.q_proj`."""
    return _module(entry.template).rpartition("{layer}.")[2]
