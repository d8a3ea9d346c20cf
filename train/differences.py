"""Two sets of named values beside each other, for messages."""

from collections.abc import Callable, Mapping
from typing import Any


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], show: Callable[[Any], str]
) -> list[str]:
    """`name: old -> new` of every name whose values differ; one that is missing counts as None."""
    return [
        f"{name}: {show(old.get(name))} -> {show(new.get(name))}"
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]
