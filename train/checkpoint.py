"""Saving and restoring everything a run needs to go on, with Orbax."""

from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
from flax import nnx
from orbax.checkpoint import v1 as ocp

from train.errors import ConfigError
from train.sections import CheckpointConfig
from train.step import TrainState


class Progress(NamedTuple):
    """Where a run stands.

    Attributes:
        step: updates done, skipped ones included.
        next_batch: index of the batch to draw next.
        skipped: updates skipped so far because something was not finite.
    """

    step: int = 0
    next_batch: int = 0
    skipped: int = 0


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last save.

    Each holds four parts, which can be loaded one by one: `model`, `optimizer`, `data` (the
    position) and `step`. A save that was cut off counts for nothing and is removed when the
    folder is opened next.
    """

    def __init__(self, folder: Path, config: CheckpointConfig):
        policies = ocp.training.save_decision_policies
        self._checkpointer = ocp.training.Checkpointer(
            folder,
            save_decision_policy=policies.FixedIntervalPolicy(config.every),
            preservation_policy=ocp.training.preservation_policies.LatestN(config.keep),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._checkpointer.close()

    @property
    def latest_step(self) -> int | None:
        """Step of the newest finished checkpoint, None if there is none."""
        latest = self._checkpointer.latest
        return latest.step if latest else None

    def is_due(self, step: int) -> bool:
        """Whether the save policy asks for a checkpoint after `step` updates."""
        return self._checkpointer.should_save(step)

    def save(self, state: TrainState, progress: Progress) -> None:
        """Starts a save; returns once `state` may be donated. Waits for the save before it.

        An existing checkpoint of the same step is left as it is.
        """
        if self.latest_step == progress.step:
            return
        self._checkpointer.save_checkpointables_async(
            progress.step,
            {
                "model": nnx.to_pure_dict(state.model),
                "optimizer": nnx.to_pure_dict(state.optimizer),
                "data": {"next_batch": progress.next_batch},
                "step": {"step": progress.step, "skipped": progress.skipped},
            },
            force=True,
        )

    def wait(self) -> None:
        """Returns when every save that was started is on disk."""
        self._checkpointer.wait()

    def restore(
        self, abstract: TrainState, shardings: TrainState
    ) -> tuple[TrainState, Progress] | None:
        """The newest finished checkpoint on the devices `shardings` says; None if there is none.

        Args:
            abstract: shapes and dtypes of the state.
            shardings: of the same structure, a sharding per variable.

        Raises:
            ConfigError: the stored parts have other names or shapes; all of them are named.
        """
        if self.latest_step is None:
            return None
        targets = {
            part: _abstract_arrays(getattr(abstract, part), getattr(shardings, part))
            for part in TrainState._fields
        }
        stored = self._checkpointer.checkpointables_metadata(self.latest_step).metadata
        for part, target in targets.items():
            _check_shapes(part, stored[part], target)
        loaded = self._checkpointer.load_checkpointables(
            self.latest_step, {**targets, "data": None, "step": None}
        )
        state = TrainState(
            *(_fill(getattr(abstract, part), loaded[part]) for part in TrainState._fields)
        )
        step, skipped = int(loaded["step"]["step"]), int(loaded["step"]["skipped"])
        return state, Progress(step, int(loaded["data"]["next_batch"]), skipped)


def load_model_state(folder: Path, abstract: Any) -> Any:
    """The model's state from the newest checkpoint in `folder`, on the default device.

    Raises:
        ConfigError: there is no finished checkpoint.
    """
    if not folder.is_dir():  # which a Checkpointer would create
        raise ConfigError(f"{folder.parent}: the run has no checkpoint yet")
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = _abstract_arrays(abstract, jax.tree.map(lambda _: device, abstract))
    with ocp.training.Checkpointer(folder) as checkpointer:
        if checkpointer.latest is None:
            raise ConfigError(f"{folder.parent}: the run has no finished checkpoint yet")
        return _fill(abstract, checkpointer.load_checkpointables(None, {"model": target})["model"])


def _abstract_arrays(abstract: Any, shardings: Any) -> dict[str, Any]:
    """A pure dict of ShapeDtypeStructs with shardings."""
    return jax.tree.map(
        lambda array, sharding: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding),
        nnx.to_pure_dict(abstract),
        nnx.to_pure_dict(shardings),
    )


def _fill(abstract: Any, arrays: dict[str, Any]) -> Any:
    """An nnx state like `abstract` that holds `arrays`."""
    state = jax.tree.map(lambda leaf: leaf, abstract)
    nnx.replace_by_pure_dict(state, arrays)
    return state


def _check_shapes(part: str, stored: Any, target: Any) -> None:
    old, new = (
        {
            jax.tree_util.keystr(path, simple=True, separator="."): array.shape
            for path, array in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (stored, target)
    )
    differing = [
        f"{name}: {old.get(name, 'absent')} -> {new.get(name, 'absent')}"
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]
    if differing:
        raise ConfigError(
            f"the checkpoint's {part} does not fit this program's: {'; '.join(differing)}"
        )
