"""The model and the tokenizer of a folder that a user names: a run's, or a saved model's."""

import functools
from pathlib import Path
from typing import Any

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
from train.phases import phase_at, phases_of
from train.step.phase_functions import functions_of
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
    sections = [stored, *stored.get("stages", ())]
    names = {(section.get("optimizer") or {}).get("name", "adamw") for section in sections}
    with refusals_are_config_errors():
        evaluated = any(find_optimizer(name).evaluated for name in names)
    plain = stored.get("adapter") is None and stored.get("frozen_dtype") != "int8"
    if evaluated or not plain:
        return _load_trained(folder)
    graph, state = abstract_model(nha_jax.ModelConfig.from_dict(model_config))
    return nnx.merge(graph, load_model_state(folder.checkpoints, state))


def _load_trained(folder: RunFolder) -> nha_jax.Model:
    """Loads the model that a run makes of what is in its checkpoint, and merges an adapter."""
    phases = phases_of(validate(folder.config() or {}))
    mesh = single_device_mesh(jax.devices()[0])

    @functools.cache
    def functions_at(step: int) -> TrainingFunctions:
        return functions_of(phase_at(phases, step), phases, mesh)

    with jax.set_mesh(mesh):
        parts = load_parts(folder.checkpoints, lambda step: _needed(functions_at(step)))
        functions = functions_at(parts.pop("step"))
        state = TrainState(parts["model"], parts.get("optimizer"))
        return merge_adapter(functions.model(functions.evaluated(state)))


def _needed(functions: TrainingFunctions) -> dict[str, Any]:
    """Describes the parts of a checkpoint that the evaluated model is made of."""
    parts = functions.abstract_state._asdict()
    return parts if functions.evaluates_optimizer else {"model": parts["model"]}


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
