"""Reading YAML as YAML 1.2 has it, for keys whose types are known.

PyYAML finds the structure of a text. What its scalars are is decided here, since it follows YAML
1.1, where 0100 is 64, 1:30 is 90, a date is no text and `no` is false.
"""

import dataclasses
import functools
import re
import types
import typing
from collections.abc import Iterator
from typing import Any

import yaml

from train.errors import ConfigError, cut

_TAG = "tag:yaml.org,2002:"
_NULL, _BOOL, _INT, _FLOAT, _STR = (_TAG + x for x in ("null", "bool", "int", "float", "str"))
_MERGE = _TAG + "merge"
_FIRST = list("-+0123456789.")

# Aliases of aliases may stand for more values than any machine can hold.
_MOST_VALUES = 100_000

# Words that people may mean as "none" where a key takes text or null.
_SWITCHES = {"true", "false", "yes", "no", "on", "off"}


class _Resolver(yaml.resolver.BaseResolver):
    """Says what a scalar without quotes is: the core schema of YAML 1.2, and `<<`.

    Beyond it, digits may be grouped (1_000), hexadecimal numbers may have a sign, and 0b101 is a
    number, as they are to PyYAML.
    """


def _resolve(tag: str, pattern: str, first: list[str] | None) -> None:
    _Resolver.add_implicit_resolver(tag, re.compile(f"^(?:{pattern})$", re.ASCII), first)


_DIGITS = "[0-9]+(?:_[0-9]+)*"
_resolve(_MERGE, "<<", ["<"])
_resolve(_NULL, "~|null|Null|NULL|", ["~", "n", "N", ""])
_resolve(_BOOL, "true|True|TRUE|false|False|FALSE", list("tTfF"))
_resolve(_INT, rf"[-+]?{_DIGITS}|[-+]?0x[0-9a-fA-F_]+|[-+]?0o[0-7]+|[-+]?0b[01_]+", _FIRST)
_resolve(
    _FLOAT,
    rf"[-+]?(?:\.{_DIGITS}|{_DIGITS}(?:\.(?:{_DIGITS})?)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    _FIRST,
)


class _Loader(
    yaml.reader.Reader, yaml.scanner.Scanner, yaml.parser.Parser, yaml.composer.Composer, _Resolver
):
    def __init__(self, text: str):
        yaml.reader.Reader.__init__(self, text)
        yaml.scanner.Scanner.__init__(self)
        yaml.parser.Parser.__init__(self)
        yaml.composer.Composer.__init__(self)
        _Resolver.__init__(self)


class _TextError(Exception):
    """What is wrong with a text that has YAML's structure, and the line it is in."""

    def __init__(self, node: yaml.Node, problem: str):
        super().__init__(problem)
        self.line = node.start_mark.line + 1


def read_yaml(text: str, where: str, annotation: Any, name: str = "") -> Any:
    """Reads one YAML document.

    Args:
        text: the document.
        where: what errors begin with: the file, or the option.
        annotation: the type that is wanted, such as a dataclass whose fields are the keys. Where
            it asks for text, a number or a date without quotes is the text as it stands. Nothing
            else of it is checked.
        name: the dotted key that the value is for; empty for a whole file.

    Returns:
        Mappings with keys as they are written, lists, text, numbers, booleans and None.

    Raises:
        ConfigError: the text is not YAML, or repeats a key, or is not meant as it stands.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)  # type: ignore[arg-type]
        return None if node is None else _Construction().value(node, annotation, name)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigError(f"{where}{line}: not valid YAML: {problem}") from None
    except _TextError as error:
        raise ConfigError(f"{where}, line {error.line}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{where}: not valid YAML: nested too deeply") from None


type_hints = functools.cache(typing.get_type_hints)
"""The types of a dataclass's fields, by their names."""


def members(annotation: Any) -> tuple[Any, ...]:
    """The types that a union is made of; of another type, the type alone."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return typing.get_args(annotation)
    return (annotation,)


class _Construction:
    """Turns the nodes of one document into values."""

    def __init__(self) -> None:
        self._open: list[yaml.Node] = []
        self._values = 0

    def value(self, node: yaml.Node, annotation: Any, name: str) -> Any:
        self._count(node)
        if any(node is parent for parent in self._open):
            raise _TextError(
                node, f"{name}: not valid YAML: an alias stands for what it is part of"
            )
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node, annotation, name)
        if node.tag not in (_TAG + "map", _TAG + "seq"):
            raise _TextError(node, f"{name}: the tag {node.tag} has no meaning here")
        self._open.append(node)
        if isinstance(node, yaml.MappingNode):
            result: Any = {
                key: self.value(child, _annotation_of(annotation, key), f"{name}.{key}".lstrip("."))
                for key, child in self._entries(node, name).items()
            }
        else:
            inner = _annotation_of_elements(annotation)
            result = [self.value(child, inner, name) for child in node.value]
        self._open.pop()
        return result

    def _count(self, node: yaml.Node) -> None:
        self._values += 1
        if self._values > _MOST_VALUES:
            raise _TextError(node, "not valid YAML: its aliases stand for too many values")

    def _entries(self, node: yaml.MappingNode, name: str) -> dict[str, yaml.Node]:
        """The nodes of a mapping by their keys, those of `<<` first; its own keys win."""
        merged: dict[str, yaml.Node] = {}
        own: dict[str, yaml.Node] = {}
        for key, child in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _TextError(key, f"{name}: not valid YAML: a key is a mapping or a list")
            text = _text(key, name)
            if key.tag == _MERGE:
                for entries in self._merged(child, name):
                    merged = {**entries, **merged}
            elif text in own:
                raise _TextError(key, f"not valid YAML: the key {text} appears twice")
            else:
                own[text] = child
        return {**merged, **own}

    def _merged(self, node: yaml.Node, name: str) -> Iterator[dict[str, yaml.Node]]:
        nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
        self._open.append(node)
        for child in nodes:
            self._count(child)
            if not isinstance(child, yaml.MappingNode):
                raise _TextError(child, f"{name}: not valid YAML: << takes mappings")
            if any(child is parent for parent in self._open[:-1]):
                raise _TextError(child, f"{name}: not valid YAML: << stands for what it is part of")
            yield self._entries(child, name)
        self._open.pop()


def _scalar(node: yaml.ScalarNode, annotation: Any, name: str) -> Any:
    text, tag = _text(node, name), node.tag
    if tag in (_STR, _MERGE):
        value: Any = text
    elif tag == _NULL:
        return None
    elif tag == _BOOL:
        value = text.lower() == "true"
    elif tag in (_INT, _FLOAT):
        value = _number(node, text, name)
    else:
        raise _TextError(node, f"{name} = {text}: the tag {tag} has no meaning here")
    wanted = members(annotation)
    if node.style is not None or str not in wanted or type(value) in set(wanted) - {str}:
        return value
    if types.NoneType in wanted and text.lower() in _SWITCHES:
        raise _TextError(node, f'{name} = {text}: expected text or null; write null, or "{text}"')
    return text


def _number(node: yaml.ScalarNode, text: str, name: str) -> int | float:
    try:
        if node.tag == _FLOAT:
            return float(re.sub(r"\.(?=inf|nan)", "", text.lower()).replace("_", ""))
        is_decimal = re.fullmatch("[-+]?[0-9_]+", text)
        return int(text, 10 if is_decimal else 0)
    except ValueError:
        raise _TextError(node, f"{name} = {cut(text)}: not a number that can be read") from None


def _text(node: yaml.ScalarNode, name: str) -> str:
    """The text of a scalar, in which two escapes of half a character each are one character."""
    try:
        return node.value.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        shown = cut(ascii(node.value)[1:-1])
        raise _TextError(node, f'{name} = "{shown}": holds half a character') from None


def _annotation_of(annotation: Any, key: str) -> Any:
    """The type of what stands under a key."""
    for member in members(annotation):
        if isinstance(member, type) and dataclasses.is_dataclass(member):
            return type_hints(member).get(key, Any)
        if typing.get_origin(member) is dict:
            return typing.get_args(member)[1]
    return Any


def _annotation_of_elements(annotation: Any) -> Any:
    """The type of what a list holds."""
    for member in members(annotation):
        if typing.get_origin(member) in (tuple, list):
            return typing.get_args(member)[0]
    return Any
