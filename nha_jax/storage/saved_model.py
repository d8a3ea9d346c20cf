"""Saved models: a folder with `config.json`, `model.safetensors` and extra files."""

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
from nha_jax.storage.folder import CONFIG_FILE, EXTRA_FILES, WEIGHTS_FILE
from nha_jax.storage.json_objects import parse_object
from nha_jax.storage.stores import local_input, local_output
from nha_jax.storage.weights import (
    ModelSource,
    SafetensorsSource,
    Shardings,
    WeightSource,
    build_model,
    weight_bytes,
    write_weights,
)


def save(
    path: str | os.PathLike[str],
    model: Model,
    *,
    overwrite: bool = False,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Saves a model as a folder, all of it or nothing.

    The files are written next to `path` and then renamed, so that a reader never sees half a
    model. Tensors have the dotted names of the parameters: `blocks.attention.q_proj.kernel`, whose
    leading axis is the layer.

    Args:
        path: the folder to create; its parents are created too. It may be in an object store, such
            as "gs://bucket/model", where config.json comes last.
        model: the model; its parameters are written in its config's param_dtype, and an adapter as
            a part of its kernels (`save_adapter` writes it alone).
        overwrite: replace a saved model that is there already.
        files: name and content of extra files; the names are among EXTRA_FILES.

    Raises:
        ValueError: `files` has another name.
        FileExistsError: `path` exists and overwrite is False, or it is not a saved model, which is
            never replaced.
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
    """Writes what `save` writes, with parameters that need not be in memory.

    Args:
        path, files, overwrite: as for `save`.
        config: of the model.
        source: its parameters, read a piece at a time.
        on_written: called after each piece of the parameters with its number of bytes.

    Raises:
        ValueError, FileExistsError: as for `save`.
        OSError: there is too little room on the disk; nothing was written.
    """
    if set(files) - set(EXTRA_FILES):
        raise ValueError(f"files={sorted(files)} must be of {', '.join(EXTRA_FILES)}")
    needed = weight_bytes(source.shapes) + sum(map(len, files.values()))
    with local_output(path, CONFIG_FILE, overwrite=overwrite) as folder:
        check_replaceable(folder, overwrite=overwrite)
        _write(folder, config, source, files, needed, on_written)


def _write(
    folder: Path,
    config: ModelConfig,
    source: WeightSource,
    files: Mapping[str, bytes],
    needed: int,
    on_written: Callable[[int], object],
) -> None:
    with replacing_folder(folder, needed) as new:
        text = json.dumps(config.to_dict(), indent=2) + "\n"
        (new / CONFIG_FILE).write_text(text, encoding="utf-8")
        write_weights(new / WEIGHTS_FILE, source, on_written)
        for name, content in files.items():
            (new / name).write_bytes(content)


@contextlib.contextmanager
def replacing_folder(path: Path, needed: int) -> Iterator[Path]:
    """Yields a new empty folder that takes the place of `path` at the end, unless something fails.

    Args:
        path: the folder to write; its parents are created too, and what is there is replaced.
        needed: how many bytes will be written.

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
    """Whether the folder holds only what `save` writes; other programs use the same file names."""
    own = {CONFIG_FILE, WEIGHTS_FILE, *EXTRA_FILES}
    if not path.is_dir() or {file.name for file in path.iterdir()} - own:
        return False
    try:
        read_saved_config(path / CONFIG_FILE)
    except (OSError, ValueError):
        return False
    return True


def load(path: str | os.PathLike[str], *, shardings: Shardings | None = None) -> Model:
    """Loads the model that `save` wrote to `path`.

    Args:
        path: the folder; of one in an object store a copy is made first, which lives as long as the
            process.
        shardings: takes the abstract nnx state of the model and returns the same tree with a
            `jax.sharding.Sharding` in place of each variable; each device then reads its own part.
            None: everything goes to the default device.

    Raises:
        FileNotFoundError: `path` lacks config.json or model.safetensors.
        nha_jax.storage.stores.StoreError: a store stays away, or does not let us read.
        ValueError: a file is damaged, the config is not valid, or tensors are missing, unknown, or
            of another shape or dtype than the config says; one line names all of them.
    """
    config, source = open_saved(path)
    return build_model(config, source, shardings)


def open_saved(path: str | os.PathLike[str]) -> tuple[ModelConfig, SafetensorsSource]:
    """Opens what `save` wrote to `path`, without reading parameters or checking them.

    Raises:
        FileNotFoundError: `path` lacks config.json or model.safetensors.
        ValueError: a file is damaged, or the config is not valid.
    """
    path = local_input(path)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} is not a saved model: it has no {name}")
    return read_saved_config(path / CONFIG_FILE), SafetensorsSource(path / WEIGHTS_FILE)


def read_saved_config(file: Path) -> ModelConfig:
    """Reads a config.json that `save` wrote; ValueError if it is damaged, or not valid."""
    fields = parse_object(file.read_bytes(), file)
    try:
        return ModelConfig.from_dict(fields)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


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
