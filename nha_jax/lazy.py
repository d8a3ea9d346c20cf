"""Public names of a package that load their module when they are first used (PEP 562)."""

import importlib
import pkgutil
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Makes the `__getattr__` and `__dir__` of a package whose names load on first use.

    The package's own modules are among these names: `nha_jax.ops` needs no import of its own.

    Args:
        package: its `__name__`.
        modules: public name -> the module that defines it.

    Returns:
        `__getattr__`, which raises AttributeError for a name that is neither, and `__dir__`.
    """

    def own_modules() -> set[str]:
        return {module.name for module in pkgutil.iter_modules(sys.modules[package].__path__)}

    def load(name: str) -> Any:
        if name in modules:
            value = getattr(importlib.import_module(modules[name]), name)
            setattr(sys.modules[package], name, value)  # found without this function from now on
            return value
        if name in own_modules():
            return importlib.import_module(f"{package}.{name}")  # sets the attribute itself
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules, *own_modules()})

    return load, names
