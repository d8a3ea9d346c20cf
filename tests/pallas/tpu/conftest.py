"""Settings of the tests that compile for TPUs without one."""

import os
from collections.abc import Iterator

import jax
import pytest

# Read when libtpu is loaded: it must not ask the cloud which TPU this machine has, nor lock out
# other processes that compile.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


@pytest.fixture(scope="package", autouse=True)
def _compiler() -> Iterator[None]:
    """Optimisations on, and no search for a TPU by jax itself now that libtpu is installed."""
    platforms = jax.config.jax_platforms
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    yield
    jax.config.update("jax_platforms", platforms)
    jax.config.update("jax_disable_most_optimizations", True)  # as tests/conftest.py has it
    jax.clear_caches()
