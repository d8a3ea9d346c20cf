"""Packages that only an extra of nha_jax brings, such as `pip install "nha_jax[data]"`."""

import importlib
from typing import Any

from train.errors import ConfigError


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
        package = name.split(".")[0]
        raise ConfigError(
            f'the package {package} is not installed; `pip install "nha_jax[{extra}]"` brings it'
        ) from None
