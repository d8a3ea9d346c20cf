"""Reads ArrayRecord files, a range of records at a time."""

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.data.packed_files import naming, reason
from train.data.prepare.documents import (
    PACKED_RATIO,
    BadDocumentError,
    Document,
    FileFormat,
    FilePart,
    Reading,
)
from train.data.prepare.json_lines import document_of_object, load_json
from train.data.prepare.tf_examples import document_of_example
from train.errors import DataError

_RECORDS_AT_ONCE = 256
# Nothing in other threads: processes read in parallel.
_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


def _divide(path: Path, part_bytes: int) -> list[FilePart]:
    """Divides by records, which are taken to be of one size, and packed."""
    with _opened(path) as reader:
        count = reader.num_records()
    size = path.stat().st_size
    step = max(count * part_bytes // (size * PACKED_RATIO), 1)
    parts = []
    for start in range(0, count, step):
        stop = min(start + step, count)
        share = size * stop // count - size * start // count
        parts.append(FilePart(path, share, share * PACKED_RATIO, start, stop))
    return parts


def _read(part: FilePart, reading: Reading) -> Iterator[Document | None]:
    start, stop = part.range
    with _opened(part.path) as reader:
        for first in range(start, stop, _RECORDS_AT_ONCE):
            records = reader.read(first, min(first + _RECORDS_AT_ONCE, stop))
            for number, record in zip(itertools.count(first + 1), records, strict=False):
                try:
                    yield _document(record, reading)
                except BadDocumentError as error:
                    reading.bad(BadDocumentError(f"{part.path}, record {number}: {error}"))
    reading.progress(part.size)


def _document(record: bytes, reading: Reading) -> Document | None:
    """Returns a record's document; raises BadDocumentError if it has none."""
    match reading.record_format:
        case "json":
            return document_of_object(load_json(record), reading.form)
        case "example":
            return document_of_example(record, reading.form)
    try:
        return reading.form.document_of_text(record.decode())
    except UnicodeDecodeError:
        raise BadDocumentError("not UTF-8 text") from None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Opens a file; raises DataError if it, or what is read of it, is damaged."""
    from array_record.python.array_record_module import ArrayRecordReader

    with naming(path, DataError):
        path.open("rb").close()  # the reader takes what it cannot open for damaged
        reader = ArrayRecordReader(os.fsencode(path), _OPTIONS)
        try:
            if not reader.ok():
                raise EOFError("it is damaged, cut, or no ArrayRecord file")
            yield reader
        except RuntimeError as error:  # the reader's own
            raise EOFError(f"it is damaged: {reason(error):.200}") from None
        finally:
            with contextlib.suppress(RuntimeError):
                reader.close()


ARRAY_RECORD = FileFormat(_divide, _read)
