"""The keys of the configuration, as its dataclasses and their docstrings give them."""

import dataclasses
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any

from train.config import TrainConfig
from train.yaml_text import members, type_hints

_ATTRIBUTE_HEADINGS = ("Attributes:", "Fields:")


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of the configuration.

    Attributes:
        name: its dotted name, e.g. `optimizer.learning_rate`
        annotation: its Python type
        default: its default, or dataclasses.MISSING
        help: what its section's docstring says of it, on one line; empty if nothing
    """

    name: str
    annotation: Any
    default: Any
    help: str

    @property
    def is_section(self) -> bool:
        """Whether the key holds further keys."""
        return self.section is not None

    @property
    def section(self) -> type | None:
        """The dataclass of the keys that it holds, for a section; such a key may also be null."""
        is_section = lambda x: isinstance(x, type) and dataclasses.is_dataclass(x)  # noqa: E731
        return next(filter(is_section, members(self.annotation)), None)


def keys(section: type = TrainConfig, prefix: str = "") -> Iterator[Key]:
    """Yields every key below a section: its own in order, then those of the sections it holds."""
    hints = type_hints(section)
    descriptions = _attribute_lines(section.__doc__ or "")
    found = []
    for entry in dataclasses.fields(section):
        if not entry.init:
            continue
        default = entry.default
        if entry.default_factory is not dataclasses.MISSING:
            default = entry.default_factory()
        annotation, help = hints[entry.name], descriptions.get(entry.name, "")
        name = entry.metadata.get("key", prefix + entry.name)
        found.append(Key(name, annotation, default, help))
    yield from (key for key in found if not key.is_section)
    for key in found:
        if key.section:
            yield key
            yield from keys(key.section, f"{key.name}.")


def describe(annotation: Any) -> str:
    """Puts a type in words, e.g. `an integer or null`."""
    words = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
    if annotation in words:
        return words[annotation]
    if annotation in (None, types.NoneType):
        return "null"
    if dataclasses.is_dataclass(annotation):
        return "a section of keys"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if len(members(annotation)) > 1:
        return " or ".join(describe(argument) for argument in members(annotation))
    if origin is typing.Literal:
        return "one of " + ", ".join(str(argument) for argument in arguments)
    if origin is dict:
        return f"a mapping of {describe(arguments[0])} to {describe(arguments[1])}"
    if origin in (tuple, list):
        return f"a list (each {describe(arguments[0])})"
    return str(annotation)


def _attribute_lines(docstring: str) -> dict[str, str]:
    """Reads what a docstring's `Attributes:` or `Fields:` part says of each name, as one line.

    An entry is `name: text` or `name, name: text`; deeper indented lines continue it.
    """
    lines = inspect.cleandoc(docstring).splitlines()
    heading = next((n for n, line in enumerate(lines) if line in _ATTRIBUTE_HEADINGS), None)
    if heading is None:
        return {}
    part = itertools.takewhile(lambda line: line.startswith(" "), lines[heading + 1 :])
    entries: list[tuple[list[str], str]] = []
    for line in textwrap.dedent("\n".join(part)).splitlines():
        names, _, text = line.partition(": ")
        if not line.startswith(" "):
            entries.append((names.split(", "), text))
        else:
            names_before, text_before = entries[-1]
            entries[-1] = (names_before, f"{text_before} {line.strip()}")
    return {name: text for names, text in entries for name in names}
