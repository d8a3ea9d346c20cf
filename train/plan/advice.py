"""Looks for a change that makes a step fit, by compiling it with each, the cheapest first."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from train.config import TrainConfig
from train.errors import ConfigError
from train.plan.compiling import CompiledStep

Overrides = dict[str, Any]

MOST_TRIES = 8
# From left to right a policy keeps less for the backward pass and computes more of it again.
REMAT = ("none", "dots", "operator", "full")


def find_advice(
    compiled: CompiledStep,
    compile_with: Callable[[Overrides], CompiledStep],
    report: Callable[[str], None],
) -> tuple[Overrides, CompiledStep] | None:
    """Finds the first change that makes a step fit.

    Args:
        compiled: the step that does not fit.
        compile_with: compiles the step with these keys of the configuration replaced.
        report: called with a line about each change that was tried and what came of it.

    Returns:
        The change and the step with it; None if the first `MOST_TRIES` changes do not fit.
    """
    tries = 0
    temporaries: dict[str, int] = {compiled.config.model.remat: compiled.memory.temporaries}
    for overrides in _candidates(compiled, temporaries):
        if tries == MOST_TRIES:
            break
        try:
            attempt = compile_with(overrides)
        except ConfigError:
            continue  # the sizes of the configuration do not allow it
        tries += 1
        memory = attempt.memory
        if list(overrides) == ["model.remat"]:
            temporaries[overrides["model.remat"]] = memory.temporaries
        report(f"{as_arguments(overrides)}: {memory.total / memory.available:.2f}x the memory")
        if attempt.fits:
            return overrides, attempt
    return None


def untried_advice(config: TrainConfig, mesh: Mapping[str, int]) -> list[Overrides]:
    """Lists changes that each need less memory, without trying whether that is enough.

    Args:
        config: what does not fit.
        mesh: number of devices along each axis.
    """
    changes: list[Overrides] = []
    rows = config.batch_size // (mesh["data"] * mesh["fsdp"])
    parts = [n for n in _doublings(config.micro_batches, rows) if rows % n == 0]
    changes += [{"micro_batches": parts[0]}] if parts else []
    more_remat = REMAT[REMAT.index(config.model.remat) + 1 :]
    changes += [{"model.remat": more_remat[-1]}] if more_remat else []
    if config.data.sequence_length % (2 * config.head_parts) == 0:
        changes.append({"head_parts": 2 * config.head_parts})
    if mesh["data"] > 1:
        changes.append({"mesh.data": 1, "mesh.fsdp": mesh["data"] * mesh["fsdp"]})
    return changes


def as_arguments(overrides: Overrides) -> str:
    """Writes overrides as the command line takes them."""
    return " ".join(f"--{key}={value}" for key, value in overrides.items())


def _candidates(compiled: CompiledStep, temporaries: Mapping[str, int]) -> Iterator[Overrides]:
    """Proposes changes: recomputation, then more micro-batches, then a mesh that divides more.

    Args:
        compiled: the step that does not fit.
        temporaries: bytes of temporaries by each remat policy tried so far, which the caller adds
            to; the configuration's own policy is among them.
    """
    config, mesh, memory = compiled.config, dict(compiled.mesh), compiled.memory
    more_remat = REMAT[REMAT.index(config.model.remat) + 1 :]
    for policy in more_remat:
        yield {"model.remat": policy}
    full: Overrides = {"model.remat": "full"} if more_remat else {}
    rows = config.batch_size // (mesh["data"] * mesh["fsdp"])
    parts = [n for n in _doublings(config.micro_batches, rows) if rows % n == 0]
    for count in parts:
        for change in ({}, full) if full else ({},):
            known = temporaries.get(change.get("model.remat", config.model.remat), 0)
            # Temporaries shrink by that factor at best: gradients stay as large as they are.
            if memory.state + known * config.micro_batches // count <= memory.available:
                yield change | {"micro_batches": count}
    smallest: Overrides = full | ({"micro_batches": parts[-1]} if parts else {})
    if mesh["data"] > 1:
        divided = {"mesh.data": 1, "mesh.fsdp": mesh["data"] * mesh["fsdp"]}
        yield divided
        yield divided | smallest
    devices = math.prod(mesh.values())
    for axis, other in (("context", "tensor"), ("tensor", "context")):
        for size in _doublings(mesh[axis], 8):
            fsdp = devices // (size * mesh[other])
            yield full | {"mesh.data": 1, "mesh.fsdp": fsdp, f"mesh.{axis}": size}


def _doublings(above: int, most: int) -> Iterator[int]:
    """Gives 2 x `above`, 4 x `above` ... up to `most`."""
    size = 2 * above
    while size <= most:
        yield size
        size *= 2
