"""A checkpoint of one mesh on another."""

import os
import subprocess
import sys

import pytest

from tests.support.train.tiny_run import Nha

MESHES = [
    (8, ["mesh.fsdp=2", "mesh.tensor=2"]),
    (4, ["mesh.data=1", "mesh.fsdp=2", "mesh.context=2"]),
    (1, []),
    (8, ["mesh.data=1", "mesh.fsdp=8"]),
]

PROGRAM = "tests.support.train.restored_on_a_mesh"


@pytest.mark.slow
def test_from_8_to_4_to_1_to_8_devices_bit_for_bit(nha: Nha) -> None:
    found = []
    for devices, mesh in MESHES:
        result = subprocess.run(
            [
                sys.executable,
                "-m",
                "tests.support.train.restored_on_a_mesh",
                str(nha.config_file),
                str(nha.run),
                *mesh,
            ],
            env={
                **os.environ,
                "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            },
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        found.append(result.stdout.split())
    assert [(int(devices), int(step)) for devices, step, _ in found] == [
        (8, 0),
        (4, 1),
        (1, 2),
        (8, 3),
    ]
    assert len({digest for *_, digest in found}) == 1
