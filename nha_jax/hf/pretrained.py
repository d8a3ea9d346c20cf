"""Pretrained models of transformers, as models of ours."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nha_jax.config import DType, ModelConfig
from nha_jax.hf.checkpoint import Checkpoint, ConvertedSource
from nha_jax.hf.config import Original, from_hf_config
from nha_jax.model import Model
from nha_jax.serialization import companions_of
from nha_jax.weights import Shardings, WeightSource, build_model

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
    num_slots: int = 64,
    window_size: Windows = None,
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
    chosen = overrides if dtype is None else {"dtype": dtype, **overrides}
    original = from_hf_config(
        fields,
        num_slots=num_slots,
        window_size=window_size,
        param_dtype=checkpoint.param_dtype() if param_dtype is None else param_dtype,
        **chosen,
    )
    source = ConvertedSource(original.config, checkpoint)
    return Pretrained(original, source, companions_of(folder))


def from_pretrained(
    path: str | os.PathLike[str],
    *,
    num_slots: int = 64,
    window_size: Windows = None,
    dtype: DType | None = None,
    param_dtype: DType | None = None,
    shardings: Shardings | None = None,
    **overrides: Any,
) -> Model:
    """A model of transformers (Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE) as one of ours.

    With window None in every layer, as is the default, its logits are the original's. The gates,
    of which the original has none, start from its key projection: the rows of a head's, averaged
    in num_slots groups of neighbours.

    Args:
        path: the folder with config.json and the weights, model.safetensors or shards of it.
        num_slots: slots per key/value head (M); divides the size of a head's key.
        window_size: as in `ModelConfig`.
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
