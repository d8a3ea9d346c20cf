"""Training on meshes of eight devices: as on one, and nothing is gathered that need not be."""

import json
from typing import Any

import pytest

from tests.eight_devices import run_on_eight_devices

ALONE: list[dict[str, int]] = [{"data": 8}, {"fsdp": 8}, {"tensor": 8}, {"context": 8}]
MIXED: list[dict[str, int]] = [
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 2, "fsdp": 2, "context": 2},
    {"data": 2, "tensor": 2, "context": 2},
]


def check(meshes: list[dict[str, int]]) -> None:
    done = run_on_eight_devices("tests.train.gradients_on_meshes", *map(json.dumps, meshes))
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
