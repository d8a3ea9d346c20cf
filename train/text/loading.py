"""The model and the tokenizer of a folder that a user names: a run's, or a saved model's."""

from pathlib import Path

import jax
from flax import nnx

import nha_jax
from nha_jax.adapters import merge_adapter
from nha_jax.model import abstract_model
from nha_jax.storage.folder import WEIGHTS_FILE
from nha_jax.tokenizer.interface import Tokenizer
from train.checkpoint.checkpoints import load_model_state, load_parts
from train.data.tokenizers import load_tokenizer
from train.devices.mesh import single_device_mesh
from train.errors import ConfigError, refusals_are_config_errors
from train.load_config import validate
from train.optimizers import find_optimizer
from train.paths import user_path
from train.step.update import TrainingFunctions, TrainState
from train.storage.run_folder import RunFolder


def load_model(path: str | Path) -> nha_jax.Model:
    """Loads a model that `nha_jax.save` wrote, or the newest undamaged checkpoint of a run.

    Raises:
        ConfigError: the folder is missing or holds neither, or the saved model is damaged.
        CheckpointError: all of the run's checkpoints are damaged.
    """
    named = _folder(path)
    if (named / WEIGHTS_FILE).exists():
        with refusals_are_config_errors():
            return nha_jax.load(named)
    folder = RunFolder(named)
    model_config = folder.model_config()
    stored = folder.config() or {}
    optimizer = stored.get("optimizer", {}).get("name", "adamw")
    with refusals_are_config_errors():
        evaluated = find_optimizer(optimizer).evaluated
    plain = stored.get("adapter") is None and stored.get("frozen_dtype") != "int8"
    if evaluated is not None or not plain:
        return _load_trained(folder)
    graph, state = abstract_model(nha_jax.ModelConfig.from_dict(model_config))
    return nnx.merge(graph, load_model_state(folder.checkpoints, state))


def _load_trained(folder: RunFolder) -> nha_jax.Model:
    """Loads the model that a run makes of what is in its checkpoint, and merges an adapter."""
    config = validate(folder.config() or {})
    mesh = single_device_mesh(jax.devices()[0])
    with jax.set_mesh(mesh):
        functions = TrainingFunctions(config, mesh)
        if find_optimizer(config.optimizer.name).evaluated is None:
            state = functions.abstract_state.model
            return merge_adapter(functions.model(load_model_state(folder.checkpoints, state)))
        parts = load_parts(folder.checkpoints, functions.abstract_state._asdict())
        return merge_adapter(functions.model(functions.evaluated(TrainState(**parts))))


def load_tokenizer_of(path: str | Path) -> Tokenizer:
    """Loads the tokenizer that a folder's model was trained with; that of bytes if it has no files.

    Raises:
        ConfigError: the folder is missing, the package tokenizers is not installed, or the model
            was imported without its tokenizer.
        DataError: the tokenizer's files are damaged.
    """
    return load_tokenizer(_folder(path))


def _folder(path: str | Path) -> Path:
    folder = user_path(path, "RUN")
    if not folder.is_dir():
        raise ConfigError(f"{path}: no such folder; expected a run or a saved model")
    return folder
