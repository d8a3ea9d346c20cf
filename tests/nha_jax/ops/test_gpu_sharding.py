"""The operator on the GPUs of a mesh: every device runs the kernels on its rows and heads."""

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from jax.extend import core
from jax.sharding import AbstractMesh, AxisType

from tests.support.gpu import sharded
from tests.support.gpu.process import HOPPER

AUTO = (AxisType.Auto, AxisType.Auto)
MESH = AbstractMesh(
    (2, 2), ("data", "tensor"), axis_types=AUTO, abstract_device=HOPPER.abstract_device
)


def calls_in(jaxpr: core.Jaxpr, divided: bool = False) -> Iterator[tuple[bool, Any]]:
    """The kernels' calls, and whether each stands in a `shard_map`."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "mpmd_map" or name.startswith("dot_product_attention"):
            yield divided, equation
            continue
        for value in equation.params.values():
            inner = value.jaxpr if isinstance(value, core.ClosedJaxpr) else value
            if isinstance(inner, core.Jaxpr):
                yield from calls_in(inner, divided or name == "shard_map")


@pytest.mark.parametrize("window_size", [64, None], ids=str)
def test_every_device_calls_the_kernels_on_its_part(window_size):
    """On a mesh that is not there kernels cannot be lowered, but traced."""
    with jax.sharding.use_abstract_mesh(MESH):
        traced = jax.jit(sharded.gradients(window_size)).trace(*sharded.shapes(MESH))
    calls = list(calls_in(traced.jaxpr.jaxpr))
    assert len(calls) >= 2
    part = (sharded.B // 2, sharded.T, sharded.H // 2)
    for divided, call in calls:
        assert divided
        assert part in [x.aval.shape[:3] for x in call.invars]


@pytest.mark.gpu_aot
@pytest.mark.parametrize(("window_size", "calls"), sharded.CALLS.items(), ids=str)
def test_four_gpus_exchange_nothing(window_size, calls):
    pytest.importorskip("jax_plugins.xla_cuda13", reason="needs CUDA: uv run --extra cuda")
    finished = subprocess.run(
        [sys.executable, "-m", "tests.support.gpu.sharded", str(window_size)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert set(finished.stdout.split()) == calls
