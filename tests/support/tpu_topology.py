"""Compiling for TPUs that are not there."""

import functools
import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, SingleDeviceSharding

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
CHIPS = tuple(TOPOLOGIES)

_OPERATION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = \w+\[([\d,]*)\]\S* (copy|transpose)\(")


@functools.cache
def devices(chip: str) -> tuple[Any, ...]:
    """Returns compile-only devices of the smallest topology; skips the test without libtpu."""
    pytest.importorskip("libtpu", reason="needs libtpu: uv run --extra tpu")
    for _ in range(20):
        try:
            name = TOPOLOGIES[chip]
            return tuple(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
        except RuntimeError as error:
            if "lockfile" not in str(error):
                raise
        time.sleep(3)  # another process is loading libtpu
    pytest.fail("libtpu stayed locked by another process for a minute")


def compile_for(
    chip: str, function: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = ()
) -> jax.stages.Compiled:
    """Compiles `function` for one device of the chip; arguments are trees of ShapeDtypeStruct."""
    device = SingleDeviceSharding(devices(chip)[0])
    jitted = jax.jit(function, in_shardings=device, out_shardings=device, donate_argnums=donate)
    mesh = make_mesh(chip, (1,), ("data",))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # the kernels' sizes go by the chip
        return jitted.lower(*arguments).compile()


def make_mesh(chip: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> Mesh:
    """Makes a mesh of the chip's first devices."""
    chosen = np.array(devices(chip)[: math.prod(shape)]).reshape(shape)
    return Mesh(chosen, axes, axis_types=(AxisType.Auto,) * len(axes))


def relayouts(compiled: jax.stages.Compiled, elements: int) -> list[str]:
    """Finds the copies and transpositions of arrays of at least `elements`: lines of HLO."""
    found = []
    for line in compiled.as_text().splitlines():
        match = _OPERATION.match(line)
        if match and math.prod(int(n) for n in match[2].split(",") if n) >= elements:
            found.append(line.strip()[:200])
    return found
