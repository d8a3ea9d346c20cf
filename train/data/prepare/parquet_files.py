"""Reads parquet files, a range of row groups at a time."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.data.packed_files import naming, reason
from train.data.prepare.columns import check_columns, documents_of_rows
from train.data.prepare.documents import Document, FileFormat, FilePart, Reading
from train.errors import DataError
from train.extras import import_extra

_ROWS_AT_ONCE = 256


def _divide(path: Path, part_bytes: int) -> list[FilePart]:
    with _opened(path) as file:
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


def _read(part: FilePart, reading: Reading) -> Iterator[Document | None]:
    start, stop = part.range
    with _opened(part.path) as file:
        check_columns(part.path, file.schema_arrow, reading.form)
        groups = [file.metadata.row_group(group) for group in range(stop)]
        rows = sum(group.num_rows for group in groups[:start])
        for index in range(start, stop):
            # The name of a field inside of a struct is one of parquet's columns, too.
            columns = list(reading.form.options)
            for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[index], columns=columns):
                yield from documents_of_rows(batch, part.path, rows, reading)
                rows += batch.num_rows
            reading.progress(groups[index].total_byte_size)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
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


PARQUET = FileFormat(_divide, _read)
