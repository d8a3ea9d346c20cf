"""Training on meshes of eight devices: as on one, and nothing is gathered that need not be."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

ALONE: list[dict[str, int]] = [{"data": 8}, {"fsdp": 8}, {"tensor": 8}, {"context": 8}]
MIXED: list[dict[str, int]] = [
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 2, "fsdp": 2, "context": 2},
    {"data": 2, "tensor": 2, "context": 2},
]


def check(meshes: list[dict[str, int]]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.gradients_on_meshes", *map(json.dumps, meshes)],
        env=os.environ
        | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "nvoluntary full rematerialization" not in done.stderr
    differences: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert len(differences) == len(meshes)
    for mesh, difference in differences.items():
        assert max(difference.values()) < 1e-5, mesh


def test_all_kinds_of_division_at_once() -> None:
    check([{"fsdp": 2, "tensor": 2, "context": 2}])


@pytest.mark.slow
def test_every_axis_alone() -> None:
    check(ALONE)


@pytest.mark.slow
def test_two_by_two_by_two() -> None:
    check(MIXED)
