"""An extension of griffe, which reads the docstrings for the API pages."""

import re
from typing import Any

import griffe

_SECTION = re.compile(r"^(Args|Attributes|Fields):\n((?:(?: .*)?\n)+)", re.MULTILINE)
_SHARED = re.compile(r"^( +)(\w+(?:, \w+)+)(: .*\n(?:\1 +.*\n)*)", re.MULTILINE)


class HouseStyle(griffe.Extension):
    """Reads what the docstrings of this house have and griffe does not know.

    That is the name `Fields:` for the attributes of dataclasses, and a line for several names,
    `slot_key, slot_value: ...`, which becomes one for each.
    """

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _SECTION.sub(_rewrite, obj.docstring.value + "\n").rstrip()


def _rewrite(section: re.Match[str]) -> str:
    title, entries = section.groups()
    return ("Attributes" if title == "Fields" else title) + ":\n" + _SHARED.sub(_repeat, entries)


def _repeat(entry: re.Match[str]) -> str:
    indent, names, text = entry.groups()
    return "".join(f"{indent}{name}{text}" for name in names.split(", "))
