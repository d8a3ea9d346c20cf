"""A model as a folder: `config.json`, `model.safetensors`, and the files that go with it."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from nha_jax.config import ModelConfig
from nha_jax.model import Model
from nha_jax.storage.weights import (
    ModelSource,
    SafetensorsSource,
    Shardings,
    WeightSource,
    build_model,
    weight_bytes,
    write_weights,
)

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
ORIGINAL_CONFIG_FILE = "original_config.json"
"""Of an imported model, the config.json that it came with."""

EXTRA_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    ORIGINAL_CONFIG_FILE,
)
"""What may lie beside a model and travels with it byte for byte; all but the last are named as
Hugging Face names them."""


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
        files: name, one of EXTRA_FILES, and content of what goes beside the model.

    Raises:
        ValueError: `files` has another name.
        FileExistsError: `path` exists and overwrite is False, or it is not a saved model: nothing
            but a model is ever replaced.
    """
    write_folder(path, model.config, ModelSource(model), files=files or {}, overwrite=overwrite)


def write_folder(
    path: str | os.PathLike[str],
    config: ModelConfig,
    source: WeightSource,
    *,
    files: Mapping[str, bytes] = MappingProxyType({}),
    overwrite: bool = False,
    on_written: Callable[[int], object] = lambda count: None,
) -> None:
    """What `save` writes, of parameters that need not be in memory.

    Args:
        path, files, overwrite: as for `save`.
        config: of the model.
        source: its parameters, read a piece at a time.
        on_written: called with the bytes of each piece of the parameters.

    Raises:
        ValueError, FileExistsError: as for `save`.
        OSError: there is too little room on the disk; nothing was written.
    """
    path = Path(path)
    if set(files) - set(EXTRA_FILES):
        raise ValueError(f"files={sorted(files)} must be of {', '.join(EXTRA_FILES)}")
    check_replaceable(path, overwrite=overwrite)
    needed = weight_bytes(source.shapes) + sum(map(len, files.values()))
    with replacing_folder(path, needed) as new:
        text = json.dumps(config.to_dict(), indent=2) + "\n"
        (new / CONFIG_FILE).write_text(text, encoding="utf-8")
        write_weights(new / WEIGHTS_FILE, source, on_written)
        for name, content in files.items():
            (new / name).write_bytes(content)


@contextlib.contextmanager
def replacing_folder(path: Path, needed: int) -> Iterator[Path]:
    """A new folder beside `path`, which it becomes at the end, unless something fails.

    Args:
        path: its parents are created too; what is there is replaced.
        needed: bytes that will be written.

    Raises:
        OSError: there is too little room on the disk; nothing was written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(
            f"{path} needs {needed / 1e9:.3g} GB of disk, and {path.parent} has {free / 1e9:.3g}"
        )
    workplace = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        new = workplace / "new"
        new.mkdir()
        yield new
        _replace(path, new, backup=workplace / "old")
    finally:
        shutil.rmtree(workplace)


def check_replaceable(path: Path, *, overwrite: bool) -> None:
    """Raises FileExistsError if `path` exists, unless it is a saved model to overwrite."""
    if not path.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{path} exists; choose another folder or pass overwrite=True")
    if not _is_saved_model(path):
        raise FileExistsError(f"{path} is not a folder written by save; it is left as it is")


def _is_saved_model(path: Path) -> bool:
    """Whether nothing but what `save` writes is there; other programs use the same file names."""
    own = {CONFIG_FILE, WEIGHTS_FILE, *EXTRA_FILES}
    if not path.is_dir() or {file.name for file in path.iterdir()} - own:
        return False
    try:
        ModelConfig.from_dict(json.loads((path / CONFIG_FILE).read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError):
        return False
    return True


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
    config, source = open_saved(path)
    return build_model(config, source, shardings)


def open_saved(path: str | os.PathLike[str]) -> tuple[ModelConfig, SafetensorsSource]:
    """What `save` wrote to `path`; no parameter has been read, nor compared with the config.

    Raises:
        FileNotFoundError: `path` lacks one of the two files.
        ValueError: a file is damaged, or the config is not valid.
    """
    path = Path(path)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} is not a saved model: it has no {name}")
    config = ModelConfig.from_dict(json.loads((path / CONFIG_FILE).read_text(encoding="utf-8")))
    return config, SafetensorsSource(path / WEIGHTS_FILE)


def extra_files_of(folder: str | os.PathLike[str]) -> dict[str, bytes]:
    """Name and content of those of EXTRA_FILES that lie in a folder: `files` of `save`."""
    paths = (Path(folder) / name for name in EXTRA_FILES)
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
