"""Documents out of raw files: text, JSON lines and parquet, whole or a part at a time."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from train.data.input_files import import_extra, is_packed, kind_of, open_unpacked
from train.errors import ConfigError, DataError

JSON_LINES = {".jsonl", ".json", ".ndjson"}
PARQUET = ".parquet"

# A packed file cannot be divided, and holds about so many times its size of text.
_PACKED_RATIO = 4

_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class RawPart:
    """A file, or a part of it that can be read by itself.

    Attributes:
        path: the file.
        start, stop: of JSON lines the range of bytes in which a line begins; of parquet the range
            of row groups; None: the whole file.
        size: bytes of the file that it stands for.
        weight: about how many bytes of text it gives.
    """

    path: Path
    size: int
    weight: int
    start: int | None = None
    stop: int | None = None


class BadDocumentError(Exception):
    """A document that cannot be used; says which and why."""


def divide(path: Path, part_bytes: int) -> list[RawPart]:
    """Parts of a file of about `part_bytes` of text each, where its format allows it.

    Raises:
        ConfigError: the file cannot be read, or a package is missing for it.
        DataError: it is no parquet file though it is called one.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ConfigError(f"{path}: cannot read it: {error.strerror}") from None
    if kind_of(path) == PARQUET:
        return _divide_parquet(path, part_bytes)
    if is_packed(path):
        if path.suffix.lower() == ".zst":
            import_extra("zstandard")
        return [RawPart(path, size, size * _PACKED_RATIO)]
    if kind_of(path) not in JSON_LINES:
        return [RawPart(path, size, size)]
    starts = range(0, size, part_bytes)
    stops = [*starts[1:], size]
    return [
        RawPart(path, stop - start, stop - start, start, stop)
        for start, stop in zip(starts, stops, strict=True)
    ]


def read_documents(
    part: RawPart,
    text_key: str,
    bad: Callable[[BadDocumentError], None],
    progress: Callable[[int], None],
) -> Iterator[str]:
    """The documents of a part that have any text, in order.

    Args:
        part: what to read.
        text_key: the text's key in JSON lines, its column in parquet.
        bad: called for what is no document; it may raise.
        progress: called with the bytes of the file read since the last call.

    Raises:
        DataError: the file cannot be unpacked or read.
    """
    kind = kind_of(part.path)
    if kind == PARQUET:
        documents = _read_parquet(part, text_key, bad, progress)
    elif kind in JSON_LINES:
        documents = _read_json_lines(part, text_key, bad, progress)
    else:
        documents = _read_text(part, bad, progress)
    try:
        yield from filter(None, documents)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{part.path}: cannot read it: {_reason(error)}") from None
    except Exception as error:
        # What the packages for .zst and parquet raise has no common type of its own.
        if type(error).__module__.split(".")[0] not in ("zlib", "zstd", "zstandard", "pyarrow"):
            raise
        raise DataError(f"{part.path}: cannot read it: {_reason(error)}") from None


def _read_text(
    part: RawPart, bad: Callable[[BadDocumentError], None], progress: Callable[[int], None]
) -> Iterator[str]:
    with open_unpacked(part.path) as file:
        content = file.read()
    progress(part.size)
    try:
        yield content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        bad(BadDocumentError(f"{part.path}, line {line}: not UTF-8 text"))


def _read_json_lines(
    part: RawPart,
    text_key: str,
    bad: Callable[[BadDocumentError], None],
    progress: Callable[[int], None],
) -> Iterator[str]:
    start = part.start or 0
    with open_unpacked(part.path) as file:
        if start:
            # The line that the byte before belongs to is the part's before this one.
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
            if not line.strip():
                continue
            try:
                yield _text_of_line(line, text_key)
            except BadDocumentError as error:
                first = 1 + _lines_before(part.path, start) if start else 1
                bad(BadDocumentError(f"{part.path}, line {first + number}: {error}"))
    if part.start is None:
        progress(part.size)


def _text_of_line(line: bytes, text_key: str) -> str:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError:
        raise BadDocumentError("not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise BadDocumentError(f"not JSON: {_reason(error)}") from None
    if not isinstance(record, dict) or text_key not in record:
        raise BadDocumentError(f"no key {text_key!r} (--text-key names it)")
    return _checked(record[text_key], text_key)


def _checked(text: object, text_key: str) -> str:
    if not isinstance(text, str):
        raise BadDocumentError(f"{text_key!r} is {text!r:.40}, not text")
    try:
        text.encode()
    except UnicodeEncodeError:  # half of an escaped pair, "\ud800"
        raise BadDocumentError(f"{text_key!r} holds half a character (a lone surrogate)") from None
    return text


def _lines_before(path: Path, start: int) -> int:
    """Lines that end before the first that begins at or after byte `start`."""
    with path.open("rb") as file:
        count = 0
        while file.tell() < start:
            file.readline()
            count += 1
        return count


def _divide_parquet(path: Path, part_bytes: int) -> list[RawPart]:
    with _open_parquet(path) as file:
        sizes = [
            file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)
        ]
    parts, first, total = [], 0, 0
    for group, size in enumerate(sizes):
        total += size
        if total >= part_bytes or group == len(sizes) - 1:
            parts.append(RawPart(path, total, total, first, group + 1))
            first, total = group + 1, 0
    return parts


def _read_parquet(
    part: RawPart,
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
                for text in batch.column(0).to_pylist():
                    row += 1
                    try:
                        yield _checked(text, text_key)
                    except BadDocumentError as error:
                        bad(BadDocumentError(f"{part.path}, row {row}: {error}"))
            progress(groups[index].total_byte_size)


def _open_parquet(path: Path):
    parquet = import_extra("pyarrow.parquet")
    try:
        return parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these
        raise DataError(f"{path}: cannot read it as parquet: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())
