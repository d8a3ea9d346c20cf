"""What would make a step fit that does not: really tried, the cheapest change first."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from train.errors import ConfigError
from train.plan.compiling import CompiledStep

Overrides = dict[str, Any]

MOST_TRIES = 8
# What each policy keeps for the backward pass: less and less, for more and more recomputation.
REMAT = ("none", "dots", "operator", "full")


def find_advice(
    compiled: CompiledStep,
    compile_with: Callable[[Overrides], CompiledStep],
    report: Callable[[str], None],
) -> tuple[Overrides, CompiledStep] | None:
    """The first change that makes the step fit.

    Args:
        compiled: the step that does not.
        compile_with: compiles it with these keys of the configuration replaced.
        report: is told, in a line, what is tried and what came of it.

    Returns:
        The change and the step with it; None if none of `MOST_TRIES` fits.
    """
    tries = 0
    temporaries: dict[str, int] = {compiled.config.model.remat: compiled.memory.temporaries}
    for overrides in _candidates(compiled, temporaries):
        if tries == MOST_TRIES:
            break
        try:
            attempt = compile_with(overrides)
        except ConfigError:
            continue  # not possible with these sizes
        tries += 1
        memory = attempt.memory
        if list(overrides) == ["model.remat"]:
            temporaries[overrides["model.remat"]] = memory.temporaries
        report(f"{as_arguments(overrides)}: {memory.total / memory.available:.2f}x the memory")
        if attempt.fits:
            return overrides, attempt
    return None


def as_arguments(overrides: Overrides) -> str:
    """As the command line takes them."""
    return " ".join(f"--{key}={value}" for key, value in overrides.items())


def _candidates(compiled: CompiledStep, temporaries: Mapping[str, int]) -> Iterator[Overrides]:
    """Recomputation; smaller parts of the batch, if need be with it; a mesh that divides more.

    `temporaries` are the bytes of each policy that was tried, the configuration's own included.
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
            # They shrink by as many times at best: gradients do not.
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
    """2 x `above`, 4 x `above` ... up to `most`."""
    size = 2 * above
    while size <= most:
        yield size
        size *= 2
