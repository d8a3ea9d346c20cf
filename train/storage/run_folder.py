"""The folder of one training run: who may write in it, and for which configuration."""

import dataclasses
import fcntl
import functools
import json
import os
import re
import sys
from pathlib import Path
from typing import IO, Any, Self

from etils import epath

from nha_jax.storage.stores import StoreError
from train.config import SpikeConfig, TrainConfig, WatchdogConfig
from train.devices import processes
from train.errors import ConfigError, TrainingError, describe_differences
from train.paths import user_location
from train.renamed_keys import rename_keys
from train.storage.atomic import remove_unfinished, write_atomically, write_if_changed
from train.storage.run_in_store import CHECKPOINTS, RunInStore
from train.storage.small_json import read_whole

CHANGEABLE = (
    "run",
    "steps",
    "micro_batches",
    "head_parts",
    "evaluation",
    "checkpoint",
    "logging",
    "watchdog",
    "spike",
    "mesh",
    "sample",
    "distributed",
    "data.cache_gib",
    "compilation_cache",
    "model.implementation",
    "model.kernel_options",
)
"""The keys, and sections of keys, that may differ when a run is resumed: none of them changes the
updates already made."""

RECORD_FILE = "run.json"

# Keys that are written down only where they are set.
_RARE: dict[str, Any] = {
    "stages": [],
    "window_schedule": None,
    "loss.cross_entropy": 1.0,
    "loss.attention_transfer": 0.0,
    "evaluation.tasks": [],
    "evaluation.task_examples": 64,
    "mesh.slices": None,
    "data.cache_gib": 16.0,
    "watchdog": dataclasses.asdict(WatchdogConfig()),
    "spike": dataclasses.asdict(SpikeConfig()),
}

# What a process killed while it made the folder leaves behind.
_UNFINISHED = re.compile(r"\.lock|\.run\.json\..*tmp")

_CORPUS_KEY = "contents of data.corpus"


class RunFolder:
    """A run's folder, locked against other processes while it is open.

    Attributes:
        location: the folder, as text.
        path: the folder; of a run in a store, its mirror on the disk.
        checkpoints: folder of the saved states, which may be in the store.
        metrics: the metrics, a JSON line per logged step.
        tensorboard: folder of TensorBoard's events.
        curve: the loss over the steps, a PNG.
        slot_weight: the slot weight of every layer over the steps, a PNG.
        profile: folder of the profiler's trace.
        wandb: folder of Weights & Biases, with the identity of its run.
        model: folder of the finished model, for `nha_jax.load`.
        model_ema: likewise of the moving average of the model, if there is one.
        adapter: folder of the finished adapter, for `nha_jax.load_adapter`, if there is one.
        result: what the finished run reached, as JSON.
        sessions: when the run was trained, and where the time went, as JSON.
        record: what run.json holds, in the process that opened the folder.
    """

    def __init__(self, path: str | Path):
        location = user_location(path, "run")
        self._in_store: RunInStore | None = None
        if isinstance(location, Path):
            self.path = location.absolute()
            self.location = str(self.path)
            self.checkpoints: Path | epath.Path = self.path / CHECKPOINTS
        else:
            self._in_store = RunInStore(location)
            self.path, self.location = self._in_store.folder, location.url
            self.checkpoints = self._in_store.checkpoints
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.curve = self.path / "loss.png"
        self.slot_weight = self.path / "slot_weight.png"
        self.profile = self.path / "profile"
        self.wandb = self.path / "wandb"
        self.model = self.path / "model"
        self.model_ema = self.path / "model_ema"
        self.adapter = self.path / "adapter"
        self.result = self.path / "result.json"
        self.sessions = self.path / "sessions.json"
        self._record = self.path / RECORD_FILE
        self.record = ""
        self._lock: IO[str] | None = None

    def check(self, config: TrainConfig, fingerprint: str) -> None:
        """Raises ConfigError if the folder holds something other than this very run.

        Args:
            config: the present configuration.
            fingerprint: the fingerprint of the present corpus.
        """
        name = f"run = {config.run!r}"
        try:
            str(self.path).encode()
        except UnicodeEncodeError:
            raise ConfigError(
                f"{name}: checkpoints cannot be saved below a name that is not UTF-8 "
                f"({str(self.path)!r}); choose another folder"
            ) from None
        if self._in_store is None:
            if not self.path.exists():
                return
            if not self.path.is_dir():
                raise ConfigError(f"{name}: exists and is no folder; choose another")
        stored = self._stored_record()
        if stored is None:
            self._check_not_foreign(name)
            return
        differing = _differences(stored, _record(config, fingerprint))
        if differing:
            raise ConfigError(
                f"{name}: the folder holds a run of another configuration: "
                f"{'; '.join(differing)}; choose another folder, or the old values to resume"
            )

    def _check_not_foreign(self, name: str) -> None:
        """Raises ConfigError if a folder without a readable run.json holds another's files."""
        if self._record.exists() and self.checkpoints.is_dir():
            return  # a run of a version that put no copies beside its checkpoints
        entries = os.listdir(self.path) if self._in_store is None else self._in_store.entries()
        for entry in sorted(entries):
            if not _UNFINISHED.fullmatch(entry) and entry != RECORD_FILE:
                raise ConfigError(
                    f"{name}: the folder exists and holds {entry!r}, but no run; choose another"
                )

    def open(self, config: TrainConfig, fingerprint: str) -> Self:
        """Makes and locks the folder and writes down the configuration; use with `with`.

        If the run has several processes, the first does this, and the others check. An OSError
        inside the `with`, such as a full disk, comes out of it as a TrainingError.

        Args:
            config: the present configuration.
            fingerprint: the fingerprint of the present corpus.

        Raises:
            ConfigError: see `check`; or another process is training in the folder.
        """
        if self._in_store is not None:
            self._in_store.check_processes(config.run)
        processes.on_first(lambda: self._open(config, fingerprint))
        if not processes.is_first():
            if self._in_store is not None:
                self._in_store.pull()
            if not self._record.exists():
                raise ConfigError(
                    f"run = {config.run!r}: what the first process wrote there cannot be seen "
                    "by another; expected a folder on a disk that all of them share"
                )
            self.check(config, fingerprint)
        return self

    def _open(self, config: TrainConfig, fingerprint: str) -> None:
        self.check(config, fingerprint)
        if self._in_store is not None:
            self._in_store.take(config.run)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise ConfigError(
                f"run = {config.run!r}: cannot write there: {error.strerror}"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise ConfigError(
                f"run = {config.run!r}: another process is training in this folder"
            ) from None
        remove_unfinished(self.path)
        if self._record.exists() and read_whole(self._record, dict[str, Any]) is None:
            print(f"nha: {self._record}: damaged; written again", file=sys.stderr)
        self.record = json.dumps(_record(config, fingerprint), indent=2) + "\n"
        write_if_changed(self._record, self.record)
        if self._in_store is not None:
            self._in_store.begin()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if self._lock is not None:
            self._lock.close()
        try:
            if self._in_store is not None:
                self._in_store.end(error)
        except OSError as late:
            raise self._failure(late) from late
        if isinstance(error, OSError):
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> TrainingError:
        what = str(error)  # of a store it names the place
        if not isinstance(error, StoreError):
            what = f"{error.filename or self.location}: {error.strerror or error}"
        return TrainingError(
            f"{what}; the checkpoints are as they were, and the same command resumes"
        )

    def before_save(self) -> None:
        """Brings to a store what a checkpoint is to find there; call it before one is saved.

        Raises:
            TrainingError: another process has taken over the run.
            StoreError: the store stays away.
        """
        if self._in_store is not None:
            self._in_store.before_save()

    def on_saved(self, step: int) -> None:
        """Brings a finished checkpoint to a store, where it is not there yet."""
        if self._in_store is not None:
            self._in_store.on_saved(step)

    def write_now(self, name: str, content: bytes) -> None:
        """Writes a file into the folder, and at once into a store, from any process."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
        if self._in_store is not None:
            self._in_store.write_now(name, content)

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint to resume from, damaged or not."""
        if self._in_store is not None:
            return self._in_store.has_checkpoint
        folder = self.checkpoints
        return folder.is_dir() and any(path.name.isdecimal() for path in folder.iterdir())

    def model_config(self) -> dict[str, Any]:
        """Reads the section `model` of the stored run.

        Raises:
            ConfigError: the folder holds no run.
        """
        config = self.config()
        if config is None:
            raise ConfigError(f"{self.location}: no run and no saved model in this folder")
        return config["model"]

    def config(self) -> dict[str, Any] | None:
        """Reads the stored run's configuration by sections; None if the folder holds no run.

        Raises:
            ConfigError: run.json is damaged, and no checkpoint has a copy of it.
        """
        config = self.known_config()
        if config is None and self._record.exists():
            raise ConfigError(
                f"{self._record}: damaged: empty or cut off; the `nha train` command of this run "
                "writes it again"
            )
        return config

    def known_config(self) -> dict[str, Any] | None:
        """Does what `config` does, but gives None if run.json is damaged."""
        stored = self._stored_record()
        return None if stored is None else stored["config"]

    def _stored_record(self) -> dict[str, Any] | None:
        """Reads what `_record` made, from a checkpoint's copy if run.json is lost.

        Keys of an earlier version get their present names.

        Raises:
            ConfigError: run.json is whole, and something else.
        """
        if self._in_store is not None:
            self._in_store.fetch_record()
        record = read_whole(self._record, dict[str, Any])
        if record is None and self.checkpoints.is_dir():
            copies = self.checkpoints.glob(f"[0-9]*/{RECORD_FILE}")
            newest = sorted(copies, key=lambda path: int(path.parent.name), reverse=True)
            found = (read_whole(path, dict[str, Any]) for path in newest)
            record = next((copy for copy in found if copy is not None), None)
        if record is None:
            return None
        sections, corpus = record.get("config"), record.get("corpus")
        if not isinstance(sections, dict) or "model" not in sections or corpus is None:
            raise ConfigError(f"{self._record}: not what `nha train` writes; choose another folder")
        config, _ = rename_keys(sections)
        return {**record, "config": config}


def config_values(config: TrainConfig) -> dict[str, Any]:
    """The configuration by sections, as JSON gives it back: lists for tuples."""
    # default: the model's kernel options are a mapping, but no dict.
    values = json.loads(json.dumps(dataclasses.asdict(config), default=dict))
    for name, default in _RARE.items():
        *sections, key = name.split(".")
        section = functools.reduce(dict.__getitem__, sections, values)
        if section[key] == default:
            del section[key]
    return values


def _record(config: TrainConfig, fingerprint: str) -> dict[str, Any]:
    return {"config": config_values(config), "corpus": fingerprint}


def _differences(stored: dict[str, Any], present: dict[str, Any]) -> list[str]:
    """Words every difference between two records that keeps a run from being resumed."""

    def fixed(record: dict[str, Any]) -> dict[str, Any]:
        # A key that the run did not know yet had its default.
        values = _defaults() | _flatten(record["config"]) | {_CORPUS_KEY: record["corpus"]}
        return {key: x for key, x in values.items() if not _is_changeable(key)}

    return describe_differences(fixed(stored), fixed(present), json.dumps)


def _defaults() -> dict[str, Any]:
    """The defaults of all keys but those of the sections that must be given."""
    sections = {
        field.name: dataclasses.asdict(field.default_factory())
        for field in dataclasses.fields(TrainConfig)
        if field.default_factory is not dataclasses.MISSING
    }
    return _flatten(sections)


def _is_changeable(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in CHANGEABLE)


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
