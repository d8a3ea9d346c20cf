"""Whose packages Python finds: ours, or those of a project that has the same names."""

import importlib.util
import os


def check_own_packages(*names: str) -> None:
    """Checks that top-level packages which nha_jax brings are those that Python finds.

    Raises:
        ImportError: another module of that name comes first on Python's path, as a file or folder
            of the working directory does; the message names it.
    """
    root = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    for name in names:
        spec = importlib.util.find_spec(name)
        found = None if spec is None or spec.origin is None else os.path.realpath(spec.origin)
        if found != os.path.join(root, name, "__init__.py"):
            other = found or (list(spec.submodule_search_locations or ()) if spec else "nothing")
            raise ImportError(
                f"nha_jax needs its own package {name!r}, but Python finds {other} in its place: "
                "rename that, take its folder off PYTHONPATH, or start from another folder"
            )
