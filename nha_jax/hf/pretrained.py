"""Pretrained models of transformers, as models of ours."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nha_jax.config import DType, ModelConfig
from nha_jax.hf.checkpoint import Checkpoint, ConvertedSource
from nha_jax.hf.config import Original, from_hf_config
from nha_jax.hf.families import HYBRIDS, NATIVE
from nha_jax.hf.published import read_native
from nha_jax.hf.published_hybrid import read_hybrid
from nha_jax.model import Model
from nha_jax.storage.saved_model import ORIGINAL_CONFIG_FILE, extra_files_of
from nha_jax.storage.weights import Shardings, WeightSource, build_model

Windows = int | tuple[int | None, ...] | None

CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class Pretrained:
    """A folder of transformers, opened and found to be complete; no tensor has been read."""

    original: Original
    source: WeightSource
    files: dict[str, bytes]  # the tokenizer's and others that go with the model

    @property
    def config(self) -> ModelConfig:
        """Of the converted model."""
        return self.original.config


def open_pretrained(
    path: str | os.PathLike[str],
    *,
    num_slots: int | None = None,
    window_size: Windows | Literal["original"] = "original",
    dtype: DType | None = None,
    param_dtype: DType | None = None,
    **overrides: Any,
) -> Pretrained:
    """All of `from_pretrained` but the reading of the weights; the same arguments and errors."""
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{path}: expected a folder; nothing is downloaded here: get the model first, with its "
            "config.json, .safetensors and tokenizer files, and name the folder that they are in"
        )
    fields = _read_config(folder)
    checkpoint = Checkpoint(folder)
    chosen: dict[str, Any] = {"num_slots": num_slots, "dtype": dtype}
    chosen = overrides | {name: value for name, value in chosen.items() if value is not None}
    if window_size != "original":
        chosen["window_size"] = window_size
    if param_dtype is None:
        param_dtype = checkpoint.param_dtype()
    original = understand(fields, param_dtype=param_dtype, **chosen)
    source = ConvertedSource(original.config, checkpoint, original.table(original.config))
    files = extra_files_of(folder) | {ORIGINAL_CONFIG_FILE: (folder / CONFIG_FILE).read_bytes()}
    return Pretrained(original, source, files)


def understand(fields: Mapping[str, Any], **options: Any) -> Original:
    """What a config.json says, of whichever model; options and errors of `from_hf_config`."""
    model_type = fields.get("model_type")
    if model_type == NATIVE.model_type:
        return read_native(fields, **options)
    if model_type in HYBRIDS:
        return read_hybrid(fields, **options)
    return from_hf_config(fields, **options)


def from_pretrained(
    path: str | os.PathLike[str],
    *,
    num_slots: int | None = None,
    window_size: Windows | Literal["original"] = "original",
    dtype: DType | None = None,
    param_dtype: DType | None = None,
    shardings: Shardings | None = None,
    **overrides: Any,
) -> Model:
    """A model of transformers (Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE) as one of ours.

    The checkpoints published with Native Hybrid Attention are read too: what was trained from
    scratch (`nha_jax.hf.published`), and what was hybridised (`nha_jax.hf.published_hybrid`).

    With window None in every layer, as is the default, its logits are the original's. The gates,
    of which the original has none, start from its key projection: the rows of a head's, averaged
    in num_slots groups of neighbours.

    Args:
        path: the folder with config.json and the weights, model.safetensors or shards of it.
        num_slots: slots per key/value head (M); divides the size of a head's key. None: 64, or
            as many as the checkpoint has gates for.
        window_size: as in `ModelConfig`; "original": as in the checkpoint, None everywhere if it
            is none of Native Hybrid Attention.
        dtype: of the computation; None: bfloat16 if config.json says so, else float32.
        param_dtype: of the parameters; None: bfloat16 if all weights are, else float32.
        shardings: from the abstract nnx state of the model to a `jax.sharding.Sharding` in place
            of each variable: every device's part is then read by itself. None: all go to the
            default device.
        overrides: other fields of `ModelConfig` that the original does not determine, e.g.
            `implementation` or `remat`.

    Raises:
        FileNotFoundError: there is no such folder, or it lacks config.json or the weights.
        ValueError: the architecture is not supported; config.json says what cannot be computed;
            files are damaged; or tensors are missing, unknown, or of another shape or dtype. One
            line names every mismatch, and nothing has been read by then.
    """
    pretrained = open_pretrained(
        path,
        num_slots=num_slots,
        window_size=window_size,
        dtype=dtype,
        param_dtype=param_dtype,
        **overrides,
    )
    return build_model(pretrained.config, pretrained.source, shardings)


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG_FILE}")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise ValueError(f"{file}: expected a JSON object")
    return fields
