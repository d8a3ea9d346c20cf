"""Reading pretrained models of transformers, and the paper's authors', as `nha_jax.Model`."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nha_jax.config import DType, ModelConfig
from nha_jax.hf.checkpoint import Checkpoint, ConvertedSource
from nha_jax.hf.config import ImportedConfig, from_hf_config
from nha_jax.hf.families import OWN_CODE_FAMILY, PUBLISHED_FAMILY, find_hybrid
from nha_jax.hf.own_code import read_own_code_config
from nha_jax.hf.published import read_published
from nha_jax.hf.published_hybrid import read_hybrid
from nha_jax.model import Model
from nha_jax.storage.folder import CONFIG_FILE, ORIGINAL_CONFIG_FILE, extra_files_of
from nha_jax.storage.json_objects import parse_object
from nha_jax.storage.weights import Shardings, WeightSource, build_model

WindowSize = int | tuple[int | None, ...] | None
"""As `ModelConfig.window_size`."""


@dataclass(frozen=True)
class Pretrained:
    """A folder in the format of transformers, found to be complete; no weight has been read.

    Fields:
        original: what its config.json says.
        source: the parameters of the converted model.
        files: name and content of the extra files: the tokenizer's and others.
    """

    original: ImportedConfig
    source: WeightSource
    files: dict[str, bytes]

    @property
    def config(self) -> ModelConfig:
        """The config of the converted model."""
        return self.original.config


def open_pretrained(
    path: str | os.PathLike[str],
    *,
    num_slots: int | None = None,
    window_size: WindowSize | Literal["original"] = "original",
    dtype: DType | None = None,
    param_dtype: DType | None = None,
    **overrides: Any,
) -> Pretrained:
    """Does all of `from_pretrained` except reading weights; the same arguments and errors."""
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
    original = import_config(fields, param_dtype=param_dtype, **chosen)
    source = ConvertedSource(original.config, checkpoint, original.table(original.config))
    files = extra_files_of(folder) | {ORIGINAL_CONFIG_FILE: (folder / CONFIG_FILE).read_bytes()}
    return Pretrained(original, source, files)


def import_config(fields: Mapping[str, Any], **options: Any) -> ImportedConfig:
    """Translates the config.json of any supported model; options and errors of `from_hf_config`."""
    if fields.get("model_type") == PUBLISHED_FAMILY.model_type:
        return read_published(fields, **options)
    if fields.get("model_type") == OWN_CODE_FAMILY.model_type:
        return read_own_code_config(fields, **options)
    if find_hybrid(fields):
        return read_hybrid(fields, **options)
    return from_hf_config(fields, **options)


def from_pretrained(
    path: str | os.PathLike[str],
    *,
    num_slots: int | None = None,
    window_size: WindowSize | Literal["original"] = "original",
    dtype: DType | None = None,
    param_dtype: DType | None = None,
    shardings: Shardings | None = None,
    **overrides: Any,
) -> Model:
    """Loads a model of transformers: Llama, Mistral, Qwen2, Qwen3 or Qwen3-MoE.

    The checkpoints of the authors of Native Hybrid Attention are read too: those trained from
    scratch, of both generations of their code (`nha_jax.hf.published_generations`), and those
    hybridised (`nha_jax.hf.published_hybrid`); and what `save_pretrained` writes with
    format="transformers", bit for bit.

    With window None in every layer, the default, the logits are the original's. The gates, which
    the original does not have, start from its key projection: the rows of each head are averaged
    in num_slots groups of neighbours.

    Args:
        path: the folder with config.json and the weights, model.safetensors or shards of it.
        num_slots: slots per key/value head (M); it divides key_dim. None: 64, or as many as the
            checkpoint has gates for.
        window_size: as in `ModelConfig`; "original": the windows of the checkpoint, or None in
            every layer if it is not a model of Native Hybrid Attention.
        dtype: what is computed in; None: bfloat16 if config.json says so, else float32.
        param_dtype: what the parameters are kept in; None: bfloat16 if all weights are, else
            float32.
        shardings: takes the abstract nnx state of the model and returns the same tree with a
            `jax.sharding.Sharding` in place of each variable; each device then reads its own part.
            None: everything goes to the default device.
        overrides: other fields of `ModelConfig` that config.json does not determine, such as
            `implementation` and `remat`.

    Raises:
        FileNotFoundError: there is no such folder, or it lacks config.json or the weights.
        ValueError: the architecture is not supported; config.json asks for what a `Model` does not
            compute; files are damaged; or tensors are missing, unknown, or of another shape or
            dtype. One line names every mismatch, and nothing has been read by then.
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
    return parse_object(file.read_bytes(), file)
