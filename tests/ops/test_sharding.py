"""The operator on every device of a mesh: as on one device."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("arguments", "cases"),
    [([], 7), pytest.param(["more"], 9, marks=pytest.mark.slow)],
    ids=["some", "more"],
)
def test_eight_devices_agree_with_one(arguments: list[str], cases: int) -> None:
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.sharded_operator", *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"{cases} cases agree\n", done.stderr
