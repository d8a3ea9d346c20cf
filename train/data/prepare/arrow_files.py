"""Reads Arrow's files and streams, as `datasets` of Hugging Face saves them."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from train.data.packed_files import naming
from train.data.prepare.columns import check_columns, documents_of_rows
from train.data.prepare.documents import Document, FileFormat, FilePart, Reading, whole_file
from train.errors import DataError
from train.extras import import_extra

_FILE_MAGIC = b"ARROW1"
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def _divide(path: Path, part_bytes: int) -> list[FilePart]:
    """Divides nothing, but finds out whether the file can be read."""
    with _opened(path):
        return whole_file(path)


def _read(part: FilePart, reading: Reading) -> Iterator[Document | None]:
    rows = 0
    with _opened(part.path) as (schema, batches):
        check_columns(part.path, schema, reading.form)
        for batch in batches:
            yield from documents_of_rows(batch, part.path, rows, reading)
            rows += batch.num_rows
    reading.progress(part.size)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Iterator[Any]]]:
    """Opens an Arrow file or stream: its schema and its batches; DataError if it is none."""
    pyarrow = import_extra("pyarrow")
    # Not by its name, which pyarrow takes only as UTF-8.
    with naming(path, DataError), path.open("rb") as file:
        is_stream = file.read(len(_FILE_MAGIC)) != _FILE_MAGIC
        file.seek(0)
        try:
            if is_stream:
                _check_end(file)
                reader = pyarrow.ipc.open_stream(file)
                yield reader.schema, _to_the_end(reader, file)
            else:
                reader = pyarrow.ipc.open_file(file)
                yield reader.schema, map(reader.get_batch, range(reader.num_record_batches))
        except pyarrow.ArrowException as error:
            raise EOFError(f"it is damaged, or no Arrow file: {error}") from None
        except MemoryError:
            raise EOFError("it is damaged, or has a batch too large for this machine") from None


def _check_end(file: BinaryIO) -> None:
    """Raises EOFError unless a stream has its end: without, batches may be missing."""
    size = os.fstat(file.fileno()).st_size
    file.seek(max(size - len(_END_OF_STREAM), 0))
    if file.read() != _END_OF_STREAM:
        raise EOFError("it is damaged, cut, or no Arrow stream: it does not end as one does")
    file.seek(0)


def _to_the_end(batches: Any, file: BinaryIO) -> Iterator[Any]:
    yield from batches
    if file.read(1):
        raise EOFError("it has something else behind its end")


ARROW = FileFormat(_divide, _read)
