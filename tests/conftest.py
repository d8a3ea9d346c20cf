"""Settings of every test."""

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

# The tests compile hundreds of small programs and run each once: less optimised code is soonest
# done. The arithmetic is the same.
jax.config.update("jax_disable_most_optimizations", True)


# A process may have 65,530 mappings of memory by default, every compiled program takes some, and
# the compiler crashes when there are no more.
MOST_MAPPINGS = 25_000
MAPPINGS = Path("/proc/self/maps")


@pytest.fixture(autouse=True)
def few_programs_alive() -> Iterator[None]:
    """Lets go of what was compiled before it is too much."""
    yield
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()


@pytest.fixture
def optimized() -> Iterator[None]:
    """For tests of what the compiler makes of a program."""
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()
