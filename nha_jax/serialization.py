"""A model as a folder: `config.json`, `model.safetensors`, and the files that go with it."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from nha_jax.config import ModelConfig
from nha_jax.model import Model
from nha_jax.weights import ModelSource, SafetensorsSource, Shardings, build_model, write_weights

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
COMPANION_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)
"""What may lie beside a model, as Hugging Face names it, and travels with it byte for byte."""


def save(
    path: str | os.PathLike[str],
    model: Model,
    *,
    overwrite: bool = False,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Writes a folder with the model's config and parameters, all of it or nothing.

    The files are written next to `path` and then renamed, so that a reader never sees half a
    model. Tensors are named by their place in the model: `blocks.attention.q_proj.kernel`, whose
    leading axis is the layer.

    Args:
        path: the folder to create; its parents are created too.
        model: the model.
        overwrite: replace a model that is there already.
        files: name, one of COMPANION_FILES, and content of what goes beside the model.

    Raises:
        ValueError: `files` has another name.
        FileExistsError: `path` exists and overwrite is False, or it is not a saved model: nothing
            but a model is ever replaced.
    """
    path = Path(path)
    if set(files or ()) - set(COMPANION_FILES):
        raise ValueError(f"files={sorted(files or ())} must be of {', '.join(COMPANION_FILES)}")
    if path.exists():
        if not overwrite:
            raise FileExistsError(f"{path} exists; choose another folder or pass overwrite=True")
        own = {CONFIG_FILE, WEIGHTS_FILE, *COMPANION_FILES}
        if not path.is_dir() or {file.name for file in path.iterdir()} - own:
            raise FileExistsError(f"{path} is not a folder written by save; it is left as it is")
    path.parent.mkdir(parents=True, exist_ok=True)
    workplace = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        new = workplace / "new"
        new.mkdir()
        config = json.dumps(model.config.to_dict(), indent=2) + "\n"
        (new / CONFIG_FILE).write_text(config, encoding="utf-8")
        write_weights(new / WEIGHTS_FILE, ModelSource(model))
        for name, content in (files or {}).items():
            (new / name).write_bytes(content)
        _replace(path, new, backup=workplace / "old")
    finally:
        shutil.rmtree(workplace)


def load(path: str | os.PathLike[str], *, shardings: Shardings | None = None) -> Model:
    """The model that `save` wrote to `path`.

    Args:
        path: the folder.
        shardings: from the abstract nnx state of the model to a `jax.sharding.Sharding` in place
            of each variable: every device then gets its part alone. None: all go to the default
            device.

    Raises:
        FileNotFoundError: `path` lacks one of the two files.
        ValueError: a file is damaged, the config is not valid, or tensors are missing, unknown, or
            of another shape or dtype than the config says; the message names every one of them.
    """
    path = Path(path)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} is not a saved model: it has no {name}")
    config = ModelConfig.from_dict(json.loads((path / CONFIG_FILE).read_text(encoding="utf-8")))
    return build_model(config, SafetensorsSource(path / WEIGHTS_FILE), shardings)


def companions_of(folder: str | os.PathLike[str]) -> dict[str, bytes]:
    """Name and content of those of COMPANION_FILES that lie in a folder: `files` of `save`."""
    paths = (Path(folder) / name for name in COMPANION_FILES)
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def _replace(path: Path, new: Path, *, backup: Path) -> None:
    """Moves `new` to `path`; what was there goes to `backup`, and back if the move fails."""
    replaces = path.exists()
    if replaces:
        path.rename(backup)
    try:
        new.rename(path)
    except OSError:
        if replaces:
            backup.rename(path)
        raise
