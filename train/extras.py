"""Packages that only an extra of nha_jax brings, such as `pip install "nha_jax[data]"`."""

import importlib
from typing import Any

from train.errors import ConfigError

EXTRAS = {
    "pyarrow": "data",
    "tokenizers": "data",
    "zstandard": "data",
    "jinja2": "chat",
    "libtpu": "tpu",
}
"""Which extra of nha_jax brings a package."""


def import_extra(name: str, extra: str = "data") -> Any:
    """Imports a module of a package that is not always installed.

    Args:
        name: the module, e.g. "pyarrow.parquet".
        extra: the extra of nha_jax that brings its package.

    Raises:
        ConfigError: the package is not installed; the line says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(describe_missing(name, extra)) from None


def describe_missing(name: str, extra: str | None = None) -> str:
    """Says how to install the package of a module that cannot be imported.

    Args:
        name: the module, e.g. "pyarrow.parquet".
        extra: the extra of nha_jax that brings its package; None: that of `EXTRAS`, or else the
            package is one that nha_jax itself needs.
    """
    package = name.split(".")[0]
    extra = extra or EXTRAS.get(package)
    what = f"nha_jax[{extra}]" if extra else "nha_jax"
    return f'the package {package} is not installed; `pip install "{what}"` brings it'
