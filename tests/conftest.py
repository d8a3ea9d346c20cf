"""Settings of every test, and of every process that a test starts."""

import atexit
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

SHARED = "NHA_TESTS_SHARED"


def share_what_is_compiled() -> None:
    """Gives the processes of one session a folder for bytecode and compiled programs.

    Some twenty of them import what training needs, 3 CPU-seconds less with bytecode, which an
    environment may have turned off, and many compile the same programs. jax finds a program by a
    hash of it, its options and its devices. The workers of xdist and all other processes inherit
    what is set here.
    """
    if SHARED in os.environ:
        return
    folder = tempfile.mkdtemp(prefix="nha-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    sys.dont_write_bytecode, sys.pycache_prefix = False, os.path.join(folder, "bytecode")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ |= {
        SHARED: folder,
        "PYTHONPYCACHEPREFIX": sys.pycache_prefix,
        "JAX_COMPILATION_CACHE_DIR": os.path.join(folder, "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


share_what_is_compiled()

# Arrays of different ranks do not meet unless the code says how, in the processes of tests too.
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# A shell starts what it runs in the background deaf to Ctrl-C, and so would be all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

import jax  # noqa: E402

# The tests compile hundreds of small programs and run each once: less optimised code is soonest
# done. The arithmetic is the same.
jax.config.update("jax_disable_most_optimizations", True)


# A process may have 65,530 mappings of memory by default, every compiled program takes some, and
# the compiler crashes when there are no more.
MOST_MAPPINGS = 25_000
MAPPINGS = Path("/proc/self/maps")


@pytest.fixture(autouse=True)
def few_programs_alive() -> Iterator[None]:
    """Lets go of what was compiled before it is too much. Counting takes milliseconds."""
    before = time.process_time()
    yield
    compiled = time.process_time() - before > 0.2
    if compiled and MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()


@pytest.fixture
def optimized() -> Iterator[None]:
    """For tests of what the compiler makes of a program."""
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()
