"""The phases of a run: its stages, and the parts of them that have other windows.

What a run does in a step follows from its configuration and the number of the step alone. A phase
is a run of steps that one program makes.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from train.config import TrainConfig
from train.windows import Window, Windows, width


@dataclass(frozen=True)
class Phase:
    """Steps that follow each other, and the configuration of a run that would do nothing else.

    Attributes:
        stage: the name of the stage that they are part of; None in a run without stages.
        after: how many steps come before them.
        last: the last of them, counted from 1.
        config: without stages and schedules; its `steps` are the whole stage's, as its learning
            rate follows them.
    """

    stage: str | None
    after: int
    last: int
    config: TrainConfig

    @property
    def steps(self) -> int:
        """How many they are."""
        return self.last - self.after


def phases_of(config: TrainConfig) -> tuple[Phase, ...]:
    """Divides a run into phases; one without stages and schedules is one, of that very config."""
    phases = []
    after = 0
    for name, stage in _stages_of(config):
        last = after + stage.steps
        starts = [step for step in config.window_schedule or {} if after < step < last]
        borders = [after, *sorted(starts), last]
        for start, end in itertools.pairwise(borders):
            phases.append(Phase(name, start, end, _with_windows_at(stage, config, start)))
        after = last
    return tuple(phases)


def phase_at(phases: Sequence[Phase], step: int) -> Phase:
    """Finds the phase that makes a step, counted from 1; the first and the last reach beyond."""
    return next((phase for phase in phases if step <= phase.last), phases[-1])


def windows_at(config: TrainConfig, steps: int) -> Windows:
    """Gives the window of every layer in the update that this many others went before."""
    schedule = config.window_schedule or {}
    begun = [step for step in schedule if step <= steps]
    if not begun:
        return config.model.windows
    least = schedule[max(begun)]
    return tuple(_wider(window, least) for window in config.model.windows)


def _stages_of(config: TrainConfig) -> list[tuple[str | None, TrainConfig]]:
    """The stages by name, each as the configuration of a run of its own."""
    if not config.stages:
        return [(None, config)]
    return [
        (
            stage.name,
            dataclasses.replace(
                config,
                steps=stage.steps,
                trainable=config.trainable if stage.trainable is None else stage.trainable,
                optimizer=stage.optimizer or config.optimizer,
                loss=stage.loss or config.loss,
                stages=(),
                window_schedule=None,
            ),
        )
        for stage in config.stages
    ]


def _with_windows_at(stage: TrainConfig, config: TrainConfig, steps: int) -> TrainConfig:
    """Gives a stage the windows that a run has after so many steps."""
    if config.window_schedule is None:
        return stage
    model = dataclasses.replace(config.model, window_size=windows_at(config, steps))
    # Without a window that ends there are no slots to weigh, and nothing to transfer.
    loss = stage.loss
    if not any(model.windows):
        loss = dataclasses.replace(loss, slot_loss=0.0)
    if all(window is None for window in model.windows):
        loss = dataclasses.replace(loss, attention_transfer=0.0)
    return dataclasses.replace(stage, model=model, loss=loss, window_schedule=None)


def _wider(window: Window, other: Window) -> Window:
    return max(window, other, key=width)
