"""The keys of the configuration that were called otherwise."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

RENAMED_KEYS = {
    "evaluation.windows": "evaluation.sequences",
    "evaluation.final_windows": "evaluation.final_sequences",
    "model.block_sizes": "model.kernel_options.pallas_tpu",
}
"""Old dotted keys -> what they are called now. Files and options with the old names still work."""


def rename_key(name: str) -> str:
    """Gives the present name of a dotted key that was renamed, or lies below one that was."""
    for old, new in RENAMED_KEYS.items():
        if name == old or name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    return name


def rename_keys(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Gives the keys of a nested configuration their present names.

    Args:
        values: a whole configuration as YAML or JSON gives it; it is not changed.

    Returns:
        The renamed configuration, and the old dotted keys that were in it.

    Raises:
        ValueError: a key is there under both of its names.
    """
    renamed = copy.deepcopy(dict(values))
    found = []
    for old, new in RENAMED_KEYS.items():
        *sections, key = old.split(".")
        section = _section(renamed, sections)
        if section is None or key not in section:
            continue
        value = section.pop(key)
        found.append(old)
        *sections, key = new.split(".")
        parent = _section(renamed, sections[:-1])
        if value is None and parent is not None and parent.get(sections[-1]) is None:
            parent[sections[-1]] = None  # no section, rather than one with a null in it
            continue
        section = _section(renamed, sections, make=True)
        if section is None:
            raise ValueError(f"{old} is now called {new}, which has no place beside the other keys")
        if key in section:
            raise ValueError(f"{old} is the old name of {new}, and both are given; remove {old}")
        section[key] = value
    return renamed, found


def _section(
    values: dict[str, Any], names: Sequence[str], make: bool = False
) -> dict[str, Any] | None:
    """The mapping under nested keys; where it is missing or null: None, or made if `make` says."""
    section: Any = values
    for name in names:
        if make and section.get(name) is None:
            section[name] = {}
        section = section.get(name)
        if not isinstance(section, dict):
            return None
    return section
