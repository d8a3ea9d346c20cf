"""The folder of the model that a run starts from, and may learn from."""

import dataclasses
import functools
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from nha_jax import ModelConfig
from nha_jax.sizes import abstract_parameters
from nha_jax.storage.folder import CONFIG_FILE, EXTRA_FILES, WEIGHTS_FILE
from nha_jax.storage.weights import SafetensorsSource, differences
from train.config import TrainConfig
from train.errors import ConfigError
from train.paths import input_path
from train.storage.atomic import write_atomically
from train.storage.small_json import parse, read_whole

_RECORD = "initial_model.json"

# How a model is computed, rather than what it computes.
_HOW_COMPUTED = ("dtype", "param_dtype", "remat", "implementation", "kernel_options")

_SAMPLES, _SAMPLE_BYTES = 256, 4096


@dataclass(frozen=True)
class InitialModel:
    """The model in the folder that the key `initial_model` names.

    Attributes:
        name: the name of the folder as it was given.
        folder: the folder that holds config.json and model.safetensors.
        config: the model's configuration.
    """

    name: str
    folder: Path
    config: ModelConfig

    @classmethod
    def open(cls, name: str) -> Self:
        """Finds the folder and reads the configuration, not the weights.

        Raises:
            ConfigError: there is no model in the folder, or its configuration is not valid.
        """
        folder = _find(name)
        return cls(name, folder, read_config(name))

    def source(self, model: ModelConfig) -> SafetensorsSource:
        """Opens the weights for a model that may be computed otherwise, e.g. with other windows.

        Raises:
            ConfigError: the parameters are not the same; the line names every one that differs.
        """
        try:
            source = SafetensorsSource(self.folder / WEIGHTS_FILE)
        except (OSError, ValueError) as error:
            raise ConfigError(f"initial_model = {self.name!r}: {error}") from None
        stored = dataclasses.replace(model, param_dtype=self.config.param_dtype)
        problems = differences(abstract_parameters(stored), source.shapes)
        if problems:
            raise ConfigError(
                f"initial_model = {self.name!r}: its weights do not fit the keys of model: "
                f"{'; '.join(problems)}"
            )
        return source

    def remember(self, run: Path) -> None:
        """Writes into a run's folder which model it began with, the first time.

        Raises:
            ConfigError: the run began with another model.
        """
        fingerprint = self.fingerprint()
        record = run / _RECORD
        stored = read_whole(record, dict[str, str])
        if stored is None:
            if record.exists():
                print(f"nha: {record}: damaged; written again", file=sys.stderr)
            content = {"initial_model": self.name, "fingerprint": fingerprint}
            write_atomically(record, json.dumps(content, indent=2) + "\n")
        elif stored.get("fingerprint") != fingerprint:
            raise ConfigError(
                f"initial_model = {self.name!r}: it is not the one any more that the run in {run} "
                "began with; put that one back, or choose another run"
            )

    def fingerprint(self) -> str:
        """Hashes the configuration, the size and header of the weights, and samples of them.

        No more than a megabyte of the weights is read.
        """
        digest = hashlib.sha256((self.folder / CONFIG_FILE).read_bytes())
        with (self.folder / WEIGHTS_FILE).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(str(size).encode())
            file.seek(0)
            header = int.from_bytes(file.read(8), "little")
            digest.update(file.read(header))
            for sample in range(_SAMPLES):
                file.seek(8 + header + sample * (size - 8 - header) // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
        return digest.hexdigest()[:16]

    def changes(self, model: ModelConfig) -> list[str]:
        """Lists `key: initial -> present` for each key in which a model differs from this one."""
        old, new = self.config.to_dict(), model.to_dict()
        return [f"{key}: {old[key]} -> {new[key]}" for key in old if old[key] != new[key]]


def teacher_config(config: TrainConfig) -> ModelConfig | None:
    """Gives the configuration of the model that a run, or a phase, learns from; None without one.

    It is the initial model's, computed as the run's model is. For a plan the folder need not be
    there: it is then the run's model with full attention.

    Raises:
        ConfigError: the folder's configuration is not valid.
    """
    name, model = config.initial_model, config.model
    if name is None or not config.loss.has_teacher:
        return None
    if not has_config(name):
        return dataclasses.replace(model, window_size=None, empty_slots="mask")
    same = {field: getattr(model, field) for field in _HOW_COMPUTED}
    return dataclasses.replace(read_config(name), **same)


def has_config(name: str) -> bool:
    """Whether the folder that `initial_model` names is there."""
    return (_find(name) / CONFIG_FILE).is_file()


def read_config(name: str) -> ModelConfig:
    """Reads the configuration of the model in the folder that `initial_model` names.

    Raises:
        ConfigError: there is no model, or its configuration is not valid.
    """
    folder = _find(name)
    try:
        values = parse((folder / CONFIG_FILE).read_bytes(), dict[str, Any])
        if "model_type" in values:  # as other libraries write it
            raise ConfigError(
                f"initial_model = {name!r}: a model of another library; `nha import {name} FOLDER` "
                "first, and give that folder"
            )
        return ModelConfig.from_dict(values)
    except OSError:
        raise ConfigError(
            f"initial_model = {name!r}: no model in this folder; expected one that `nha import` "
            "or `nha_jax.save` wrote, or a finished run"
        ) from None
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"initial_model = {name!r}: {CONFIG_FILE} is not valid: {reason}"
        ) from None


def _find(name: str) -> Path:
    """The folder with the model: the one named, or `model` inside it if it is a run's."""
    folder = _located(name)
    model_of_run = folder / "model"
    return folder if (folder / CONFIG_FILE).exists() or not model_of_run.is_dir() else model_of_run


@functools.cache
def _located(name: str) -> Path:
    """The folder on the disk; what is in a store is downloaded once."""
    return input_path(name, "initial_model", keep=_is_of_model)


def _is_of_model(name: str) -> bool:
    """Whether a file of a run's or a model's folder belongs to the model."""
    return name.removeprefix("model/") in (CONFIG_FILE, WEIGHTS_FILE, *EXTRA_FILES)
