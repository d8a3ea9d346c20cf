"""A model as a folder: `config.json`, `model.safetensors`, and the files of a tokenizer."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import safetensors.flax
from flax import nnx

from nha_jax.config import ModelConfig
from nha_jax.model import Model

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def save(
    path: str | os.PathLike[str],
    model: Model,
    *,
    overwrite: bool = False,
    tokenizer: Mapping[str, bytes] | None = None,
) -> None:
    """Writes a folder with the model's config and parameters, all of it or nothing.

    The files are written next to `path` and then renamed, so that a reader never sees half a
    model. Tensors are named by their place in the model: `blocks.attention.q_proj.kernel`, whose
    leading axis is the layer.

    Args:
        path: the folder to create; its parents are created too.
        model: the model.
        overwrite: replace a model that is there already.
        tokenizer: name, one of TOKENIZER_FILES, and content of what goes beside the model.

    Raises:
        ValueError: `tokenizer` has another name.
        FileExistsError: `path` exists and overwrite is False, or it is not a saved model: nothing
            but a model is ever replaced.
    """
    path = Path(path)
    if set(tokenizer or ()) - set(TOKENIZER_FILES):
        raise ValueError(f"tokenizer={sorted(tokenizer or ())} must be of {TOKENIZER_FILES}")
    if path.exists():
        if not overwrite:
            raise FileExistsError(f"{path} exists; choose another folder or pass overwrite=True")
        own = {CONFIG_FILE, WEIGHTS_FILE, *TOKENIZER_FILES}
        if not path.is_dir() or {file.name for file in path.iterdir()} - own:
            raise FileExistsError(f"{path} is not a folder written by save; it is left as it is")
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: jnp.asarray(array) for name, array in _tensors(nnx.state(model)).items()}
    workplace = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        new = workplace / "new"
        new.mkdir()
        config = json.dumps(model.config.to_dict(), indent=2) + "\n"
        (new / CONFIG_FILE).write_text(config, encoding="utf-8")
        safetensors.flax.save_file(tensors, new / WEIGHTS_FILE)
        for name, content in (tokenizer or {}).items():
            (new / name).write_bytes(content)
        _replace(path, new, backup=workplace / "old")
    finally:
        shutil.rmtree(workplace)


def load(path: str | os.PathLike[str]) -> Model:
    """The model that `save` wrote to `path`.

    Raises:
        FileNotFoundError: `path` lacks one of the two files.
        ValueError: the config is not valid, or tensors are missing, unknown, or of another shape
            or dtype than the config says; the message names every one of them.
    """
    path = Path(path)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} is not a saved model: it has no {name}")
    config = ModelConfig.from_dict(json.loads((path / CONFIG_FILE).read_text(encoding="utf-8")))
    # jax's eval_shape: under a mesh, nnx's would look for the logical axes among the mesh's.
    graph, state = jax.eval_shape(lambda: nnx.split(Model(config, rngs=nnx.Rngs(0))))
    expected = _tensors(state)
    tensors = safetensors.flax.load_file(path / WEIGHTS_FILE)
    problems = _differences(expected, tensors)
    if problems:
        raise ValueError(f"{path / WEIGHTS_FILE} does not fit its config: {'; '.join(problems)}")
    nnx.replace_by_pure_dict(state, _nested(tensors))
    return nnx.merge(graph, state)


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


def _tensors(state: nnx.State) -> dict[str, jax.Array]:
    """The parameters by dotted name."""
    leaves, _ = jax.tree.flatten_with_path(nnx.to_pure_dict(state))
    return {".".join(str(entry.key) for entry in keys): leaf for keys, leaf in leaves}


def _nested(tensors: dict[str, jax.Array]) -> dict[str, Any]:
    """The inverse of `_tensors`: a dictionary for each dot."""
    tree: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = tensor
    return tree


def _differences(expected: dict[str, jax.Array], found: dict[str, jax.Array]) -> list[str]:
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unknown" for name in sorted(found) if name not in expected]
    for name, tensor in found.items():
        wanted = expected.get(name)
        if wanted is not None and (tensor.shape, tensor.dtype) != (wanted.shape, wanted.dtype):
            problems.append(
                f"{name} is {tensor.dtype}{list(tensor.shape)}, "
                f"not {wanted.dtype}{list(wanted.shape)}"
            )
    return problems
