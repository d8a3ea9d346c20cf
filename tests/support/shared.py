"""What the workers of a test session make once for all of them."""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """Returns a folder that `make` has filled in this session, by the first worker that asks."""
    folder = Path(os.environ["NHA_TESTS_SHARED"]) / name  # of tests/conftest.py
    done = folder.with_suffix(".done")
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder
