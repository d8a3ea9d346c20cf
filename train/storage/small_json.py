"""Reading small JSON files, which a crash or a bad disk may have spoiled."""

import json
from pathlib import Path

import pydantic


def parse[T](content: bytes, kind: type[T]) -> T:
    """Parses JSON as a type.

    Args:
        content: the file's content.
        kind: what it has to be: a dictionary, or a dataclass, every field of which must be there.

    Raises:
        ValueError: the content is something else; the message says briefly what.
    """
    if not content.strip(b" \r\n\0"):
        raise ValueError("it is empty")
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON, or cut off") from None
    try:
        return pydantic.TypeAdapter(kind).validate_python(values)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        if not first["loc"]:
            raise ValueError("it is no JSON object") from None
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {first['msg']}") from None


def read_whole[T](path: Path, kind: type[T]) -> T | None:
    """Reads a JSON file as a type, as `parse` does; None if it is missing, empty, cut or foreign.

    Raises:
        OSError: the file is there and cannot be read.
    """
    try:
        return parse(path.read_bytes(), kind)
    except (FileNotFoundError, ValueError):
        return None
