"""Settings of every test."""

from collections.abc import Iterator

import jax
import pytest

# The tests compile hundreds of small programs and run each once: less optimised code is soonest
# done. The arithmetic is the same.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def optimized() -> Iterator[None]:
    """For tests of what the compiler makes of a program."""
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()
