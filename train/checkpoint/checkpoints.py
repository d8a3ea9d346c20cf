"""Saving and restoring, with Orbax, all that a run needs to go on."""

import contextlib
import functools
import itertools
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from etils import epath
from flax import nnx
from orbax.checkpoint import v1 as ocp

from nha_jax.storage.stores import Store
from train.config import CheckpointConfig
from train.devices import processes
from train.errors import CheckpointError, ConfigError, describe_differences
from train.step.update import TrainState
from train.storage.atomic import write_atomically
from train.storage.checksums import find_damage, has_checksums, write_checksums
from train.storage.run_in_store import COMMIT_FILE

_METRIC = "held_out_loss"


class Progress(NamedTuple):
    """How far a run has come.

    Attributes:
        step: updates done, skipped ones included.
        next_batch: index of the batch to draw next.
        skipped: updates skipped so far because a number was not finite.
        undone: spikes of the loss that were undone so far.
        losses: those of the last steps, which the next loss is compared with.
    """

    step: int = 0
    next_batch: int = 0
    skipped: int = 0
    undone: int = 0
    losses: tuple[float, ...] = ()


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last save.

    Each has four parts, which can be loaded one by one: `model`, `optimizer`, `data` (the
    position) and `step`. A save that was cut off is ignored, and removed when the folder is next
    opened. A finished one gets checksums, in the background; when it is restored they are compared,
    and a damaged checkpoint gives way to the one before it.
    """

    def __init__(
        self,
        folder: Path | epath.Path,
        config: CheckpointConfig,
        files: Mapping[str, str] = MappingProxyType({}),
        before_save: Callable[[], None] = lambda: None,
        on_saved: Callable[[int], None] = lambda step: None,
    ):
        """Opens the folder, or makes it.

        Args:
            folder: the folder of this run's checkpoints; in a store Orbax serves `gs://`.
            config: when to save, and how many checkpoints to keep.
            files: name and content of small files to put into each checkpoint.
            before_save: called in the first process before each save; what it raises prevents it.
            on_saved: called there, in the background, with the step of each finished checkpoint.
        """
        policies = ocp.training.save_decision_policies
        logging.getLogger("absl").addFilter(_raises_nothing)
        self._folder = folder
        self._files = files
        self._before_save, self._on_saved = before_save, on_saved
        self._checkpointer = ocp.training.Checkpointer(
            folder,
            save_decision_policy=policies.FixedIntervalPolicy(config.every),
            preservation_policy=_preservation_policy(config),
            cleanup_tmp_directories=True,
        )
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            self.wait()
        except CheckpointError:
            if error is None:  # otherwise `error` says more
                raise
        finally:
            self._background.shutdown()
            with contextlib.suppress(Exception):  # wait has raised what went wrong
                self._checkpointer.close()

    @property
    def latest_step(self) -> int | None:
        """The step of the newest finished checkpoint; None if there is none."""
        latest = self._checkpointer.latest
        return latest.step if latest else None

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is to be saved after `step` updates.

        Raises:
            CheckpointError: the last save has failed in the meantime.
        """
        if self._saving and self._saving.done():
            self.wait()
        return self._checkpointer.should_save(step)

    def save(self, state: TrainState, progress: Progress, held_out: float | None = None) -> None:
        """Starts a save; returns once `state` may be donated. Waits for the save before it.

        An existing checkpoint of the same step is left as it is.

        Args:
            state: what to save.
            progress: how far the run has come.
            held_out: the held-out loss of this very state if it was measured: only checkpoints
                that have one compete for `keep_best`.

        Raises:
            CheckpointError: this save or the one before cannot be written, e.g. on a full disk.
        """
        self.wait()
        if self.latest_step == progress.step:
            return
        processes.on_first(self._before_save)
        measured = held_out is not None and math.isfinite(held_out)
        with self._one_line_errors():
            response = self._checkpointer.save_checkpointables_async(
                progress.step,
                {
                    "model": nnx.to_pure_dict(state.model),
                    "optimizer": nnx.to_pure_dict(state.optimizer),
                    "data": {"next_batch": progress.next_batch},
                    "step": {
                        "step": progress.step,
                        "skipped": progress.skipped,
                        "undone": progress.undone,
                        "losses": np.array(progress.losses or [np.nan]),  # Orbax takes no empty one
                    },
                },
                metrics={_METRIC: held_out} if measured else None,
                force=True,
            )
        self._saving = self._background.submit(self._finish, response, progress.step)

    def wait(self) -> None:
        """Waits until every save that was started is on disk, with its checksums.

        Raises:
            CheckpointError: one cannot be written.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            with self._one_line_errors():
                saving.result()

    def restore(
        self, abstract: TrainState, shardings: TrainState
    ) -> tuple[TrainState, Progress] | None:
        """Does what `restore_stage` does, where all steps have the same state.

        Args:
            abstract: shapes and dtypes of the state.
            shardings: a sharding for each variable, in the same structure.
        """
        return self.restore_stage(lambda _: (abstract, shardings))

    def restore_stage(
        self, placed: Callable[[int], tuple[TrainState, TrainState]]
    ) -> tuple[TrainState, Progress] | None:
        """Loads the newest undamaged checkpoint onto the devices.

        Damaged ones that are newer are set aside as `damaged-STEP`, so that their steps can be
        saved again, and reported on stderr.

        Args:
            placed: number of a step -> shapes and dtypes of the state after it, and a sharding for
                each variable in the same structure.

        Returns:
            The state and the progress; None if there is no checkpoint.

        Raises:
            ConfigError: the stored parts have other names or shapes; all of them are named.
            CheckpointError: there are checkpoints, and all are damaged; nothing is changed.
        """

        def load(step: int) -> dict[str, Any]:
            targets = {
                part: _abstract_arrays(abstract, shardings)
                for part, abstract, shardings in zip(TrainState._fields, *placed(step), strict=True)
            }
            stored = self._checkpointer.checkpointables_metadata(step).metadata
            for part, target in targets.items():
                _check_shapes(part, stored[part], target)
            return self._checkpointer.load_checkpointables(
                step, {**targets, "data": None, "step": None}
            )

        loaded, damaged = _newest_undamaged(self._folder, load)
        if loaded is None:
            return None
        processes.on_first(lambda: self._set_aside(damaged))
        if damaged:
            self._checkpointer.reload()
        step, skipped = int(loaded["step"]["step"]), int(loaded["step"]["skipped"])
        abstract, _ = placed(step)
        state = TrainState(
            *(_fill(getattr(abstract, part), loaded[part]) for part in TrainState._fields)
        )
        # A checkpoint of an earlier version knows neither.
        undone = int(loaded["step"].get("undone", 0))
        losses = np.asarray(loaded["step"].get("losses", ()), np.float64)
        known = tuple(losses[np.isfinite(losses)].tolist())
        return state, Progress(step, int(loaded["data"]["next_batch"]), skipped, undone, known)

    def _finish(self, response: Any, step: int) -> None:
        """Waits for a save, adds the small files and checksums; runs in the background."""
        response.result()
        if processes.is_first():
            saved = self._folder / str(step)
            for name, content in self._files.items():
                if isinstance(saved, Path):
                    write_atomically(saved / name, content)
                else:
                    Store(str(saved)).write(name, content.encode())
            write_checksums(saved)
            self._on_saved(step)

    def _set_aside(self, damaged: dict[int, str]) -> None:
        for step, damage in damaged.items():
            new = self._folder / f"damaged-{step}"
            copies = itertools.count(2)
            while new.exists():
                new = self._folder / f"damaged-{step}-{next(copies)}"
            if isinstance(self._folder, Path):
                (self._folder / str(step)).rename(new)
            else:
                Store(str(self._folder)).move(str(step), new.name)
            print(f"nha: {damage}; set aside as {new.name}", file=sys.stderr)

    @contextlib.contextmanager
    def _one_line_errors(self) -> Iterator[None]:
        """Turns whatever Orbax or its threads raise into a CheckpointError of one line."""
        try:
            yield
        except Exception as error:
            raise CheckpointError(
                f"{self._folder}: cannot save a checkpoint: {_reason(error)}; those before it are "
                "as they were, and the same command resumes"
            ) from error


def load_model_state(folder: Path, abstract: Any) -> Any:
    """Loads the model's state as `load_parts` does, and without the optimizer's.

    Args:
        folder: the folder of the run's checkpoints.
        abstract: the state's shapes and dtypes.
    """
    return load_parts(folder, lambda _: {"model": abstract})["model"]


def load_parts(folder: Path, abstract: Callable[[int], Mapping[str, Any]]) -> dict[str, Any]:
    """Loads `model`, `optimizer` or both from a run's newest undamaged checkpoint.

    They come onto the default device. Damaged checkpoints that are newer are reported on stderr and
    left as they are.

    Args:
        folder: the folder of the run's checkpoints.
        abstract: number of a step -> the states' shapes and dtypes after it, by the names of the
            parts.

    Returns:
        The states, by the same names, and the `step` that they are after.

    Raises:
        ConfigError: there is no finished checkpoint.
        CheckpointError: all are damaged.
    """
    if not folder.is_dir():  # which a Checkpointer would create
        raise ConfigError(f"{folder.parent}: the run has no checkpoint yet")
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def load(step: int) -> dict[str, Any]:
        targets = {
            part: _abstract_arrays(state, jax.tree.map(lambda _: device, state))
            for part, state in abstract(step).items()
        }
        return {**checkpointer.load_checkpointables(step, targets), "step": step}

    with ocp.training.Checkpointer(folder) as checkpointer:
        loaded, damaged = _newest_undamaged(folder, load)
    if loaded is None:
        raise ConfigError(f"{folder.parent}: the run has no finished checkpoint yet")
    for damage in damaged.values():
        print(f"nha: {damage}; reading the one before it", file=sys.stderr)
    step = loaded["step"]
    return {part: _fill(x, loaded[part]) for part, x in abstract(step).items()} | {"step": step}


def _raises_nothing(record: logging.LogRecord) -> bool:
    """Drops what Orbax logs with a traceback: a moment later it raises that as well."""
    return not record.exc_info


def _preservation_policy(config: CheckpointConfig) -> Any:
    policies = ocp.training.preservation_policies
    kept: list[Any] = [policies.LatestN(config.keep)]
    if config.keep_every is not None:
        kept.append(policies.EveryNSteps(config.keep_every))
    if config.keep_best:
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics[_METRIC],
            reverse=True,  # it keeps the last of those it has sorted
            n=config.keep_best,
            keep_checkpoints_without_metrics=False,
        )
        kept.append(best)
    return policies.AnyPreservationPolicy(kept)


def _newest_undamaged(
    folder: Path | epath.Path, load: Callable[[int], dict[str, Any]]
) -> tuple[dict[str, Any] | None, dict[int, str]]:
    """Loads the newest step that is not damaged.

    Returns:
        What `load` returned, and step -> damage of each newer one; (None, {}) without checkpoints.

    Raises:
        CheckpointError: all of them are damaged.
    """
    damaged: dict[int, str] = {}
    for step in _stored_steps(folder):
        path = folder / str(step)
        damage = processes.on_first(functools.partial(find_damage, path))
        if damage is None:
            loaded, damage = _try_to_load(load, step, has_checksums(path))
            if loaded is not None:
                return loaded, damaged
        damaged[step] = f"{path}: damaged: {damage}"
    if damaged:
        raise CheckpointError(f"no checkpoint is whole: {'; '.join(damaged.values())}")
    return None, {}


def _stored_steps(folder: Path | epath.Path) -> list[int]:
    """Lists the steps, newest first; by their names, as Orbax skips one without its metadata."""

    def names() -> list[str]:
        if not folder.is_dir():  # in a store, before the first checkpoint
            return []
        return [path.name for path in folder.iterdir() if _is_whole(path)]

    return sorted(
        (int(name) for name in processes.on_first(names) if name.isdecimal()), reverse=True
    )


def _is_whole(path: Path | epath.Path) -> bool:
    """Whether a checkpoint has been finished; in a store no other name tells it from one begun."""
    return isinstance(path, Path) or (path / COMMIT_FILE).exists()


def _try_to_load(
    load: Callable[[int], dict[str, Any]], step: int, checked: bool
) -> tuple[dict[str, Any] | None, str | None]:
    """Loads a step, or says why it cannot be; of files known to be right, errors are raised."""
    loaded, damage = None, None
    try:
        loaded = load(step)
    except Exception as error:  # Orbax finds arrays missing, truncated, of other shapes, ...
        if checked:
            raise
        damage = _reason(error)
    if processes.any_process(damage is not None):
        return None, damage or "another process cannot load it"
    return loaded, None


def _reason(error: BaseException) -> str:
    """What the operating system said, if the error has that; otherwise its first line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    message = str(error).strip() or type(error).__name__
    code = re.search(r"\[os_error_code='?(\d+)", message)  # as TensorStore writes it
    return os.strerror(int(code[1])) if code else message.splitlines()[0][:300]


def _abstract_arrays(abstract: Any, shardings: Any) -> dict[str, Any]:
    """The state as a pure dict of ShapeDtypeStructs with their shardings."""
    return jax.tree.map(
        lambda array, sharding: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding),
        nnx.to_pure_dict(abstract),
        nnx.to_pure_dict(shardings),
    )


def _fill(abstract: Any, arrays: dict[str, Any]) -> Any:
    """Makes an nnx state like `abstract` that holds `arrays`."""
    state = jax.tree.map(lambda leaf: leaf, abstract)
    nnx.replace_by_pure_dict(state, arrays)
    return state


def _check_shapes(part: str, stored: Any, target: Any) -> None:
    """Raises ConfigError, naming all differences, if the stored arrays have other shapes."""
    old, new = (
        {
            jax.tree_util.keystr(path, simple=True, separator="."): array.shape
            for path, array in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (stored, target)
    )
    differing = describe_differences(
        old, new, lambda shape: "absent" if shape is None else str(shape)
    )
    if differing:
        raise ConfigError(
            f"the checkpoint's {part} does not fit this program's: {'; '.join(differing)}"
        )
