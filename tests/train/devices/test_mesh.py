"""Training on meshes of eight devices: as on one, and nothing is gathered that need not be."""

import dataclasses
import itertools
import json
import re
from typing import Any

import numpy as np
import pytest

from tests.support.eight_devices import run_on_eight_devices
from tests.support.train.gradients_on_meshes import make_config
from train.devices.mesh import make_mesh, num_slices
from train.errors import ConfigError

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


@dataclasses.dataclass(frozen=True)
class Chip:
    """What is read of a chip."""

    id: int
    slice_index: int
    platform: str = "stub"
    device_kind: str = "stub"
    process_index: int = 0


def chips(*slices: int) -> list[Chip]:
    """Two chips of each slice that is named."""
    numbers = itertools.count()
    return [Chip(next(numbers), index) for index in slices for _ in range(2)]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 0, 2, 1)], ids=str)
@pytest.mark.parametrize(
    "sizes", [{"data": 4, "fsdp": 2}, {"data": 8}, {"data": 4, "tensor": 2}], ids=str
)
def test_only_the_data_axis_goes_over_slices(sizes: dict[str, int], order: tuple[int, ...]) -> None:
    config = make_config("from-scratch", sizes)
    mesh = make_mesh(config, chips(*order))
    assert num_slices(config, mesh) == 4
    found = np.array([chip.slice_index for chip in mesh.devices.flat]).reshape(mesh.devices.shape)
    per_slice = sizes["data"] // 4
    assert (found == np.arange(4).repeat(per_slice)[:, None, None, None]).all()


def test_gpus_of_several_hosts_are_one_slice() -> None:
    config = make_config("from-scratch", {"data": 1, "fsdp": 8})
    gpus = [dataclasses.replace(chip, platform="gpu") for chip in chips(0, 1, 2, 3)]
    mesh = make_mesh(config, gpus)
    assert num_slices(config, mesh) == 1
    assert set(mesh.devices.flat) == set(gpus)


@pytest.mark.parametrize(
    ("sizes", "devices", "line"),
    [
        ({"data": 2, "fsdp": 4}, chips(0, 1, 2, 3), "mesh.data = 2: expected a multiple of the"),
        ({"data": 8, "slices": 2}, chips(0, 1, 2, 3), "mesh.slices = 2: expected 4, the slices"),
        ({"data": 8}, chips(0, 0, 0, 1), "the machine's slices have [6, 2] devices: expected equa"),
        ({"data": 8, "slices": 2}, chips(0, 0, 0, 0), "mesh.slices = 2: expected 1, the slices"),
    ],
    ids=["across", "number", "unequal", "one"],
)
def test_what_does_not_fit_the_slices_is_refused(
    sizes: dict[str, int], devices: list[Chip], line: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(line)):
        make_mesh(make_config("from-scratch", sizes), devices)


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
