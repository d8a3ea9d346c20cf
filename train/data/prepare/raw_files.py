"""Reads documents out of raw files: text, JSON lines and parquet, whole or a part at a time."""

import codecs
import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.data.packed_files import (
    OTHER_PACKINGS,
    is_packed,
    kind_of,
    naming,
    open_unpacked,
    reason,
)
from train.errors import ConfigError, DataError
from train.extras import import_extra

JSON_LINES = {".jsonl", ".json", ".ndjson"}
PARQUET = ".parquet"

# A packed file cannot be divided; it is taken to hold this many times its size of text.
_PACKED_RATIO = 4

_ROWS_AT_ONCE = 256

_ARRAY = "a JSON array; expected JSON lines, which are an object a line"


@dataclass(frozen=True)
class FilePart:
    """A file, or a part of one that can be read by itself.

    Attributes:
        path: the file.
        size: bytes of the part in the file.
        text_bytes: bytes of text that the part is taken to hold.
        start, stop: for JSON lines, the range of bytes in which a line of the part begins; for
            parquet, the range of row groups; None: the whole file.
    """

    path: Path
    size: int
    text_bytes: int
    start: int | None = None
    stop: int | None = None


def may_be_empty(path: Path) -> bool:
    """Says whether a file of no bytes is whole; packed files and tables begin with a header."""
    return not is_packed(path) and kind_of(path) != PARQUET


class BadDocumentError(Exception):
    """Says which document cannot be used, and why."""


def divide_file(path: Path, part_bytes: int) -> list[FilePart]:
    """Divides a file into parts of about `part_bytes` of text each, if its format allows it.

    Raises:
        ConfigError: the file cannot be read or unpacked here, or the package that reads it is not
            installed.
        DataError: the file is named .parquet and is no parquet file.
    """
    with naming(path, ConfigError):
        size = path.stat().st_size
    if kind_of(path) in OTHER_PACKINGS:
        raise ConfigError(
            f"{path}: {kind_of(path)} files cannot be read; expected the files in it, unpacked or "
            "packed as .gz or .zst one by one"
        )
    if kind_of(path) == PARQUET:
        return _divide_parquet(path, part_bytes)
    if is_packed(path):
        if path.suffix.lower() == ".zst":
            import_extra("zstandard")
        return [FilePart(path, size, size * _PACKED_RATIO)]
    if kind_of(path) not in JSON_LINES:
        return [FilePart(path, size, size)]
    parts = ((start, min(start + part_bytes, size)) for start in range(0, size, part_bytes))
    return [FilePart(path, stop - start, stop - start, start, stop) for start, stop in parts]


def read_documents(
    part: FilePart,
    text_key: str,
    bad: Callable[[BadDocumentError], None],
    progress: Callable[[int], None],
) -> Iterator[str]:
    """Reads the documents of a part in order, leaving out those without text.

    Args:
        part: what to read.
        text_key: the text's key in JSON lines, its column in parquet.
        bad: called for each document that cannot be used; it may raise.
        progress: called with the bytes of the file read since the last call.

    Raises:
        DataError: the file cannot be unpacked or read to its end, or is not of its kind at all.
    """
    kind = kind_of(part.path)
    if kind == PARQUET:
        documents = _read_parquet(part, text_key, bad, progress)
    elif kind in JSON_LINES:
        documents = _read_json_lines(part, text_key, bad, progress)
    else:
        documents = _read_text(part, bad, progress)
    try:
        with naming(part.path, DataError):
            yield from filter(None, documents)
    except Exception as error:
        if type(error).__module__.split(".")[0] != "pyarrow":  # its errors have no common type
            raise
        raise DataError(f"{part.path}: cannot read it: {reason(error)}") from None


def _read_text(
    part: FilePart, bad: Callable[[BadDocumentError], None], progress: Callable[[int], None]
) -> Iterator[str]:
    with open_unpacked(part.path) as file:
        content = file.read()
    progress(part.size)
    try:
        yield content.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        bad(BadDocumentError(f"{part.path}, line {line}: not UTF-8 text"))


def _read_json_lines(
    part: FilePart,
    text_key: str,
    bad: Callable[[BadDocumentError], None],
    progress: Callable[[int], None],
) -> Iterator[str]:
    start = part.start or 0
    with open_unpacked(part.path) as file:
        position = 0
        if start:
            # The line that byte `start - 1` is in belongs to the part before this one.
            file.seek(start - 1)
            file.readline()
            position = file.tell()
        reported = start
        for number, line in enumerate(iter(file.readline, b"")):
            if part.stop is not None and position >= part.stop:
                break
            position += len(line)
            if part.start is not None:
                progress(min(position, part.stop or position) - reported)
                reported = min(position, part.stop or position)
            line = line.removeprefix(codecs.BOM_UTF8)  # joined files may have several
            if not line.strip():
                continue
            try:
                yield _text_of_line(line, text_key)
            except (BadDocumentError, _ArrayError) as error:
                first = 1 + _lines_before(part.path, start) if start else 1
                message = f"{part.path}, line {first + number}: {error}"
                if isinstance(error, _ArrayError):
                    raise DataError(message) from None
                bad(BadDocumentError(message))
    if part.start is None:
        progress(part.size)


class _ArrayError(Exception):
    """Says that a JSON array begins, whose documents are not left out as if they were one."""


def _text_of_line(line: bytes, text_key: str) -> str:
    """Returns the text of a line of JSON; raises BadDocumentError or _ArrayError if it has none."""
    try:
        record = _load_json(line.decode())
    except UnicodeDecodeError:
        raise BadDocumentError("not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        if line.lstrip().startswith(b"["):
            raise _ArrayError(_ARRAY) from None
        cut = "" if line.endswith(b"\n") else " (the file ends in this line)"
        raise BadDocumentError(f"not JSON: {reason(error)}{cut}") from None
    if isinstance(record, list) and any(isinstance(item, dict) for item in record):
        raise _ArrayError(_ARRAY)
    if not isinstance(record, dict) or text_key not in record:
        raise BadDocumentError(f"no key {text_key!r} (--text-key names it)")
    return _checked(record[text_key], text_key)


def _load_json(text: str) -> Any:
    """Reads JSON; an integer of more digits than Python takes is a number, if only inf."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:
        return json.loads(text, parse_int=float)


def _checked(text: object, text_key: str) -> str:
    """Returns `text` if it is text, or bytes of it, as UTF-8; raises BadDocumentError if not."""
    if isinstance(text, bytes):
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise BadDocumentError(f"{text_key!r} is not UTF-8 text") from None
    if not isinstance(text, str):
        raise BadDocumentError(f"{text_key!r} is {text!r:.40}, not text")
    try:
        text.encode()
    except UnicodeEncodeError:  # half of an escaped pair, "\ud800"
        raise BadDocumentError(f"{text_key!r} holds half a character (a lone surrogate)") from None
    return text


def _lines_before(path: Path, start: int) -> int:
    """Counts the lines before the first line that begins at or after byte `start`."""
    with path.open("rb") as file:
        count = 0
        while file.tell() < start:
            file.readline()
            count += 1
        return count


def _divide_parquet(path: Path, part_bytes: int) -> list[FilePart]:
    with _open_parquet(path) as file:
        sizes = [
            file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)
        ]
    parts, first, total = [], 0, 0
    for group, size in enumerate(sizes):
        total += size
        if total >= part_bytes or group == len(sizes) - 1:
            parts.append(FilePart(path, total, total, first, group + 1))
            first, total = group + 1, 0
    return parts


def _read_parquet(
    part: FilePart,
    text_key: str,
    bad: Callable[[BadDocumentError], None],
    progress: Callable[[int], None],
) -> Iterator[str]:
    assert part.start is not None
    assert part.stop is not None
    with _open_parquet(part.path) as file:
        if text_key not in file.schema_arrow.names:
            raise DataError(
                f"{part.path}: no column {text_key!r} (--text-key names it); it has "
                f"{', '.join(file.schema_arrow.names)}"
            )
        groups = [file.metadata.row_group(group) for group in range(part.stop)]
        row = sum(group.num_rows for group in groups[: part.start])
        for index in range(part.start, part.stop):
            batches = file.iter_batches(_ROWS_AT_ONCE, row_groups=[index], columns=[text_key])
            for batch in batches:
                for text in map(_value, batch.column(0)):
                    row += 1
                    try:
                        yield _checked(text, text_key)
                    except BadDocumentError as error:
                        bad(BadDocumentError(f"{part.path}, row {row}: {error}"))
            progress(groups[index].total_byte_size)


@contextlib.contextmanager
def _open_parquet(path: Path) -> Iterator[Any]:
    """Opens a parquet file; raises DataError if it cannot be read as one."""
    parquet = import_extra("pyarrow.parquet")
    # Not by its name, which pyarrow takes only as UTF-8.
    with naming(path, DataError), path.open("rb") as file:
        try:
            opened = parquet.ParquetFile(file, page_checksum_verification=True)
        except (OSError, ValueError) as error:  # pyarrow's own errors are subclasses of these
            raise DataError(f"{path}: cannot read it as parquet: {reason(error)}") from None
        with opened:
            yield opened


def _value(scalar: Any) -> object:
    """Returns what a cell holds, and of a text that is not UTF-8 its bytes."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return scalar.as_buffer().to_pybytes()
