"""The compiled functions of each phase of a run."""

from collections.abc import Sequence

from jax.sharding import Mesh

from train.phases import Phase
from train.step.trainable import Trainable
from train.step.update import TrainingFunctions
from train.storage.initial_model import teacher_config


def functions_of(phase: Phase, phases: Sequence[Phase], mesh: Mesh) -> TrainingFunctions:
    """Makes the functions of one phase; nothing is allocated or compiled yet.

    Args:
        phase: the phase.
        phases: all of the run.
        mesh: its devices.

    Raises:
        ConfigError: a pattern of `trainable` matches no parameter, or the configuration of the
            initial model is not valid.
    """
    return TrainingFunctions(phase.config, mesh, teacher_config(phase.config), ever_trained(phases))


def ever_trained(phases: Sequence[Phase]) -> Trainable:
    """Finds the parameters that some phase trains.

    Raises:
        ConfigError: as `Trainable.of`.
    """
    chosen = (Trainable.of(phase.config) for phase in phases)
    return Trainable(frozenset().union(*(each.names for each in chosen)))
