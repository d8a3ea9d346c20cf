"""Packages that only an extra of nha_jax brings, such as `pip install "nha_jax[data]"`."""

import importlib
from typing import Any

EXTRAS = {
    "chex": "notebook",
    "pyarrow": "data",
    "tokenizers": "data",
    "zstandard": "data",
    "jinja2": "chat",
    "lm_eval": "eval",
    "gcsfs": "cloud",
    "s3fs": "cloud",
    "libtpu": "tpu",
}
"""Which extra of nha_jax brings a package."""


def import_extra(name: str) -> Any:
    """Imports a module of a package that is not always installed.

    Args:
        name: the module, e.g. "pyarrow.parquet".

    Raises:
        ImportError: the package is not installed; the line says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError(describe_missing(name), name=name) from None


def describe_missing(name: str) -> str:
    """Says how to install the package of a module that cannot be imported.

    Args:
        name: the module, e.g. "pyarrow.parquet"; if none of `EXTRAS` brings its package, it is one
            that nha_jax itself needs.
    """
    package = name.split(".")[0]
    extra = EXTRAS.get(package)
    what = f"nha_jax[{extra}]" if extra else "nha_jax"
    return f'the package {package} is not installed; `pip install "{what}"` brings it'
