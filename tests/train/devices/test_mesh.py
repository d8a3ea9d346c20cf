"""Training on meshes of eight devices: as on one, and nothing is gathered that need not be."""

import json
from typing import Any

import pytest

from tests.support.eight_devices import run_on_eight_devices

ALONE: list[dict[str, int]] = [{"data": 8}, {"fsdp": 8}, {"tensor": 8}, {"context": 8}]
MIXED: list[dict[str, int]] = [
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 2, "fsdp": 2, "context": 2},
    {"data": 2, "tensor": 2, "context": 2},
]


def check(meshes: list[dict[str, int]], kind: str) -> None:
    done = run_on_eight_devices(
        "tests.support.train.gradients_on_meshes", kind, *map(json.dumps, meshes)
    )
    assert done.returncode == 0, done.stderr
    assert "nvoluntary full rematerialization" not in done.stderr
    differences: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert len(differences) == len(meshes)
    for mesh, difference in differences.items():
        assert max(difference.values()) < 1e-5, mesh


KINDS = pytest.mark.parametrize("kind", ["from-scratch", "converted"])


@pytest.mark.slow
@KINDS
def test_all_kinds_of_division_at_once(kind: str) -> None:
    check([{"fsdp": 2, "tensor": 2, "context": 2}], kind)


@pytest.mark.slow
def test_more_devices_than_key_heads() -> None:
    check([{"tensor": 8}, {"tensor": 4, "context": 2}, {"fsdp": 2, "tensor": 4}], "two-key-heads")


@pytest.mark.slow
@KINDS
def test_every_axis_alone(kind: str) -> None:
    check(ALONE, kind)


@pytest.mark.slow
@KINDS
def test_two_by_two_by_two(kind: str) -> None:
    check(MIXED, kind)
