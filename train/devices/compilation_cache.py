"""The folder of compiled programs, which lets later runs start sooner."""

import os
import sys
import tempfile

import jax

from train.paths import user_path

LEAST_SECONDS = 1.0
"""Programs that compile faster are not worth the file."""


def use_compilation_cache(folder: str | None) -> None:
    """Lets jax keep compiled programs in `folder`, which is made if missing; None: nowhere.

    The variable JAX_COMPILATION_CACHE_DIR goes first. A folder that cannot be written to costs a
    line on stderr, not the run.

    Raises:
        ConfigError: `folder` is no path, see `user_path`.
    """
    if folder is None:
        return
    path = user_path(folder, "compilation_cache")
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        print(
            f"nha: compilation_cache = {folder!r}: cannot write there ({error.strerror}); "
            "every start compiles anew",
            file=sys.stderr,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
