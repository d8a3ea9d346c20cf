"""Reads JSON lines: a document is an object in a line of its own."""

import codecs
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from train.data.packed_files import is_packed, open_unpacked, reason
from train.data.prepare.documents import (
    BadDocumentError,
    Document,
    FileFormat,
    FilePart,
    Form,
    Reading,
    look_up,
    whole_file,
)
from train.errors import DataError

_ARRAY = "a JSON array; expected JSON lines, which are an object a line"

_SKIPPED_AT_ONCE = 1 << 20


def _divide(path: Path, part_bytes: int) -> list[FilePart]:
    """Divides by bytes; a line belongs to the part in which it begins."""
    if is_packed(path):
        return whole_file(path)
    size = path.stat().st_size
    parts = ((start, min(start + part_bytes, size)) for start in range(0, size, part_bytes))
    return [FilePart(path, stop - start, stop - start, start, stop) for start, stop in parts]


def _read(part: FilePart, reading: Reading) -> Iterator[Document | None]:
    start = part.start or 0

    def where(number: int) -> str:
        first = 1 + _lines_before(part.path, start) if start else 1
        return f"{part.path}, line {first + number}"

    with open_unpacked(part.path) as file:
        lines = file if part.start is None else _lines(file, part, reading.progress)
        yield from _documents(lines, where, reading)
    if part.start is None:
        reading.progress(part.size)


def _read_stream(file: BinaryIO, name: str, reading: Reading) -> Iterator[Document | None]:
    return _documents(file, lambda number: f"{name}, line {1 + number}", reading)


def _lines(file: BinaryIO, part: FilePart, progress: Callable[[int], None]) -> Iterator[bytes]:
    """Gives the lines that begin in a part."""
    start, stop = part.range
    position = reported = start
    if start:
        # The line that byte `start - 1` is in belongs to a part before this one. It may be longer
        # than this part, which then has no line.
        file.seek(start - 1)
        position -= 1
        skipped = b" "
        while position < stop and skipped and not skipped.endswith(b"\n"):
            skipped = file.readline(min(stop - position, _SKIPPED_AT_ONCE))
            position += len(skipped)
    while position < stop and (line := file.readline()):
        position += len(line)
        progress(min(position, stop) - reported)
        reported = min(position, stop)
        yield line
    progress(stop - reported)


def _documents(
    lines: Iterable[bytes], where: Callable[[int], str], reading: Reading
) -> Iterator[Document | None]:
    """Reads the documents of lines; `where(n)` names line n of them, from 0."""
    for number, line in enumerate(lines):
        line = line.removeprefix(codecs.BOM_UTF8)  # joined files may have several
        if not line.strip():
            continue
        try:
            yield _document_of_line(line, reading.form)
        except _ArrayError as error:
            raise DataError(f"{where(number)}: {error}") from None
        except BadDocumentError as error:
            reading.bad(BadDocumentError(f"{where(number)}: {error}"))


class _ArrayError(Exception):
    """Says that a JSON array begins, whose documents are not left out as if they were one."""


def _document_of_line(line: bytes, form: Form) -> Document | None:
    """Returns the document of a line of JSON; BadDocumentError or _ArrayError if it has none."""
    try:
        record = load_json(line)
    except _NotJsonError as error:
        if line.lstrip().startswith(b"["):
            raise _ArrayError(_ARRAY) from None
        cut = "" if line.endswith(b"\n") else " (the file ends in this line)"
        raise BadDocumentError(f"{error}{cut}") from None
    if isinstance(record, list) and any(isinstance(item, dict) for item in record):
        raise _ArrayError(_ARRAY)
    return document_of_object(record, form)


class _NotJsonError(BadDocumentError):
    """Says why a text is no JSON."""


def load_json(content: bytes) -> object:
    """Reads JSON; raises BadDocumentError if it is none.

    An integer of more digits than Python takes is a number, if only inf.
    """
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise BadDocumentError("not UTF-8 text") from None
    try:
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            raise
        except ValueError:
            return json.loads(text, parse_int=float)
    except (ValueError, RecursionError) as error:
        raise _NotJsonError(f"not JSON: {reason(error)}") from None


def document_of_object(record: object, form: Form) -> Document | None:
    """Returns the document of an object that was JSON; raises BadDocumentError if it has none."""
    values = []
    for key, option in form.options.items():
        try:
            if not isinstance(record, dict):
                raise KeyError(key)
            values.append(look_up(record, key))
        except KeyError:
            raise BadDocumentError(f"no key {key!r} ({option} names it)") from None
    return form.document(values)


def _lines_before(path: Path, start: int) -> int:
    """Counts the lines before the first line that begins at or after byte `start`."""
    with path.open("rb") as file:
        count = 0
        while file.tell() < start:
            file.readline()
            count += 1
        return count


JSON_LINES = FileFormat(_divide, _read, _read_stream)
