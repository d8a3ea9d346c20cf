"""The operator on every device of a mesh: as on one device."""

import os
import subprocess
import sys


def test_eight_devices_agree_with_one():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.sharded_operator"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "18 cases agree\n", done.stderr
