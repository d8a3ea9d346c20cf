"""Raw files by the suffix of their name: which format reads them, whole or a part at a time."""

from collections.abc import Iterator
from pathlib import Path, PurePath

from train.data.packed_files import OTHER_PACKINGS, kind_of, naming, reason
from train.data.prepare.array_records import ARRAY_RECORD
from train.data.prepare.arrow_files import ARROW
from train.data.prepare.documents import Document, FileFormat, FilePart, Reading, ReadStream
from train.data.prepare.json_lines import JSON_LINES
from train.data.prepare.parquet_files import PARQUET
from train.data.prepare.tar_files import tar_format
from train.data.prepare.text_files import TEXT
from train.data.prepare.token_files import INDEX, TOKENS
from train.errors import ConfigError, DataError
from train.extras import import_extra


def format_of(path: PurePath) -> FileFormat:
    """Returns the format of a file by its name; what has no other is text."""
    return _FORMATS.get(kind_of(path), TEXT)


def _read_stream_of(path: PurePath) -> ReadStream | None:
    """Returns what reads a file in an archive; None if nothing can."""
    return None if kind_of(path) in OTHER_PACKINGS else format_of(path).read_stream


_FORMATS: dict[str, FileFormat] = {
    ".array_record": ARRAY_RECORD,
    ".arrayrecord": ARRAY_RECORD,
    ".arrow": ARROW,
    ".bin": TOKENS,
    ".idx": INDEX,
    ".json": JSON_LINES,
    ".jsonl": JSON_LINES,
    ".ndjson": JSON_LINES,
    ".parquet": PARQUET,
    ".tar": tar_format(_read_stream_of),
}


def is_text(path: PurePath) -> bool:
    """Says whether a file, once unpacked, is text: not a table, an archive or tokens."""
    return kind_of(path) not in OTHER_PACKINGS and format_of(path).read_stream is not None


def may_hold_records(path: PurePath) -> bool:
    """Says whether a file is a table, an archive, or of records that may have fields."""
    return format_of(path) not in (TEXT, TOKENS, INDEX)


def holds_records(path: PurePath) -> bool:
    """Says whether a file is one whose records may be of any of several formats."""
    return format_of(path) is ARRAY_RECORD


def divide_file(path: Path, part_bytes: int) -> list[FilePart]:
    """Divides a file into parts of about `part_bytes` of text each, if its format allows it.

    Raises:
        ConfigError: the file cannot be read or unpacked here, or the package that reads it is not
            installed.
        DataError: the file is not of the kind that its name says.
    """
    if kind_of(path) in OTHER_PACKINGS:
        raise ConfigError(
            f"{path}: {kind_of(path)} files cannot be read; expected the files in it, unpacked or "
            "packed as .gz or .zst one by one"
        )
    if path.suffix.lower() == ".zst":
        import_extra("zstandard")
    with naming(path, ConfigError):
        return format_of(path).divide(path, part_bytes)


def read_documents(part: FilePart, reading: Reading) -> Iterator[Document]:
    """Reads the documents of a part in order, leaving out those without text.

    Raises:
        DataError: the file cannot be unpacked or read to its end, or is not of its kind at all.
    """
    try:
        with naming(part.path, DataError):
            yield from filter(None, format_of(part.path).read(part, reading))
    except Exception as error:
        if type(error).__module__.split(".")[0] != "pyarrow":  # its errors have no common type
            raise
        raise DataError(f"{part.path}: cannot read it: {reason(error)}") from None
