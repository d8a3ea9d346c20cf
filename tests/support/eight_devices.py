"""A module of the tests as a process of its own, with eight devices."""

import os
import subprocess
import sys


def run_on_eight_devices(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What `python -m module` printed, and how it ended, on eight fake CPU devices."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=os.environ | flags,
        capture_output=True,
        text=True,
    )
