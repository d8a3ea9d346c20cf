"""The model and the tokenizer of a folder that a user names: a run's, or a saved model's."""

from pathlib import Path

from flax import nnx

import nha_jax
from nha_jax.model import abstract_model
from nha_jax.storage.saved_model import ORIGINAL_CONFIG_FILE, WEIGHTS_FILE, open_saved
from train.checkpoint.checkpoints import load_model_state
from train.data.tokenizer.as_bytes import BYTE_VOCABULARY
from train.data.tokenizer.files import TOKENIZER_FILE
from train.data.tokenizer.from_file import load_tokenizer
from train.data.tokenizer.interface import Tokenizer
from train.errors import ConfigError, refusals_are_config_errors
from train.paths import user_path
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
    config = nha_jax.ModelConfig.from_dict(folder.model_config())
    graph, state = abstract_model(config)
    return nnx.merge(graph, load_model_state(folder.checkpoints, state))


def load_tokenizer_of(path: str | Path) -> Tokenizer:
    """Loads the tokenizer that a folder's model was trained with; that of bytes if it has no files.

    Raises:
        ConfigError: the folder is missing, the package tokenizers is not installed, or the model
            was imported without its tokenizer.
        DataError: the tokenizer's files are damaged.
    """
    folder = _folder(path)
    tokenizer = load_tokenizer(folder)
    imported = (folder / WEIGHTS_FILE).exists() and (folder / ORIGINAL_CONFIG_FILE).exists()
    if tokenizer.name == "bytes" and imported:
        with refusals_are_config_errors():
            size = open_saved(folder)[0].vocab_size
        if size != BYTE_VOCABULARY:
            raise ConfigError(
                f"{path}: it was imported without its tokenizer, and its {size} tokens are no "
                f"bytes; put the original's {TOKENIZER_FILE} into this folder"
            )
    return tokenizer


def _folder(path: str | Path) -> Path:
    folder = user_path(path, "RUN")
    if not folder.is_dir():
        raise ConfigError(f"{path}: no such folder; expected a run or a saved model")
    return folder
