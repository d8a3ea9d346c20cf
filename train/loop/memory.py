"""Memory that runs out, as a line with what would need less of it."""

import contextlib
import math
from collections.abc import Iterator

import jax
from jax.sharding import Mesh

from train.config import TrainConfig
from train.devices.chips import GIB
from train.errors import TrainingError, cut, one_line
from train.failures import is_out_of_memory
from train.phases import phases_of
from train.plan.advice import as_arguments, untried_advice
from train.step.phase_functions import functions_of
from train.step.update import TrainingFunctions


@contextlib.contextmanager
def explain_memory(config: TrainConfig, mesh: Mesh) -> Iterator[None]:
    """Turns memory that runs out, a device's or the host's, into a TrainingError of one line.

    Args:
        config: the run's configuration.
        mesh: its devices.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(_describe(error, config, mesh)) from None


def _describe(error: Exception, config: TrainConfig, mesh: Mesh) -> str:
    reason = cut(one_line(str(error)) or "of the host", 200).rstrip(". ")
    phases = phases_of(config)
    state = max(_state_bytes(functions_of(phase, phases, mesh)) for phase in phases) / GIB
    tries = ", ".join(map(as_arguments, untried_advice(config, mesh.shape)))
    less = (
        f"less is needed with {tries}" if tries else "less is needed with a smaller model or batch"
    )
    return (
        f"out of memory: {reason}; parameters and optimizer take {state:.3g} GiB of each device; "
        f"{less}; `nha plan` says what fits"
    )


def _state_bytes(functions: TrainingFunctions) -> int:
    """Bytes of one device's parts of parameters and optimizer."""
    pairs = zip(
        jax.tree.leaves(functions.abstract_state), jax.tree.leaves(functions.shardings), strict=True
    )
    return sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in pairs
    )
