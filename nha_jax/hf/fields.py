"""What the keys of a config.json may hold, and what is said of those that hold something else."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from nha_jax.config import MOST_LAYERS
from nha_jax.scalars import is_count, is_number, is_positive, shown

Kind = tuple[Callable[[Any], bool], str]
"""A test that a value is one we can compute with, and such values in words."""

Required = Mapping[str, Kind]

COUNT: Kind = (is_count, "a whole number of at least 1")
COUNT_OR_NULL: Kind = (lambda value: value is None or is_count(value), f"{COUNT[1]}, or null")
INDEX_OR_NULL: Kind = (
    lambda value: value is None or is_count(value, 0),
    "a whole number of at least 0, or null",
)
LAYERS: Kind = (
    lambda value: is_count(value) and value <= MOST_LAYERS,
    f"a whole number from 1 to {MOST_LAYERS}",
)
FLAG: Kind = (lambda value: isinstance(value, bool | None), "true or false")
POSITIVE: Kind = (is_positive, "a finite number above 0")
POSITIVE_OR_NULL: Kind = (
    lambda value: value is None or is_positive(value),
    f"{POSITIVE[1]}, or null",
)
NUMBER_OR_NULL: Kind = (
    lambda value: value is None or is_number(value),
    "a finite number, or null",
)
DTYPE: Kind = (lambda value: isinstance(value, str | None), "the name of a dtype")


def is_empty(value: Any) -> bool:
    """Whether a key of config.json has an empty value: null, false, 0, [] or {}."""
    return not value


def layer_count(values: Mapping[str, Any]) -> int:
    """Returns num_hidden_layers, or 1 where it holds something else."""
    layers = values.get("num_hidden_layers")
    return layers if is_count(layers) and layers <= MOST_LAYERS else 1


def refused(values: Mapping[str, Any], required: Required, prefix: str = "") -> list[str]:
    """Describes the problem of each key whose value we cannot compute with."""
    return [
        f"{prefix}{key} = {shown(values[key])}: expected {expected}"
        for key, (fits, expected) in required.items()
        if key in values and not fits(values[key])
    ]


def wrong_architecture(values: Mapping[str, Any], architecture: str) -> list[str]:
    """Describes the problem of `architectures`, which may be left out."""
    found = values.get("architectures") or []
    if found in ([], [architecture]):
        return []
    return [f"architectures = {shown(found)}: expected {architecture!r}"]


def listed(problems: Iterable[str]) -> str:
    """Formats the error about everything in a config.json that stands in the way of its import."""
    return f"config.json cannot be imported: {'; '.join(problems)}"
