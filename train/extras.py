"""Packages that only an extra of nha_jax brings, for commands."""

from typing import Any

from nha_jax import extras
from train.errors import ConfigError


def import_extra(name: str) -> Any:
    """Imports a module of a package that is not always installed.

    Args:
        name: the module, e.g. "pyarrow.parquet".

    Raises:
        ConfigError: the package is not installed; the line says how to install it.
    """
    try:
        return extras.import_extra(name)
    except ImportError as error:
        raise ConfigError(str(error)) from None
