"""Finds the text in batches of rows: a column, or a field inside of a column of structs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.data.prepare.documents import BadDocumentError, Reading, checked_text
from train.errors import DataError
from train.extras import import_extra


def check_column(path: Path, schema: Any, text_key: str) -> None:
    """Raises DataError if a table of this pyarrow schema has no column of the text."""
    if not _field_path(schema, text_key):
        raise DataError(
            f"{path}: no column {text_key!r} (--text-key names it); it has "
            f"{', '.join(schema.names)}"
        )


def texts_of_rows(batch: Any, path: Path, rows_before: int, reading: Reading) -> Iterator[str]:
    """Reads the texts of a pyarrow batch, whose first row is row `rows_before` + 1 of the file."""
    for row, text in enumerate(_values(batch, reading.text_key), rows_before + 1):
        try:
            yield checked_text(text, reading.text_key)
        except BadDocumentError as error:
            reading.bad(BadDocumentError(f"{path}, row {row}: {error}"))


def _values(batch: Any, text_key: str) -> list[object]:
    """Returns what the cells of the text's column hold; of text, its bytes."""
    pyarrow, compute = import_extra("pyarrow"), import_extra("pyarrow.compute")
    first, *inner = _field_path(batch.schema, text_key)
    batch.validate()
    column = batch.column(first)
    for field in inner:
        column = compute.struct_field(column, [field])
    # As bytes, for a row that is not UTF-8 to be known by itself.
    if pyarrow.types.is_string(column.type):
        column = column.view(pyarrow.binary())
    elif pyarrow.types.is_large_string(column.type):
        column = column.view(pyarrow.large_binary())
    column.validate(full=True)
    return column.to_pylist()


def _field_path(fields: Any, text_key: str) -> list[int]:
    """Finds a field of a pyarrow schema or struct by name; of a.b, field b of the struct a.

    Returns:
        Its number, after those of the structs it is in; nothing if there is no such field.
    """
    pyarrow = import_extra("pyarrow")
    number = fields.get_field_index(text_key)
    if number >= 0:
        return [number]
    for dot in reversed([n for n, letter in enumerate(text_key) if letter == "."]):
        number = fields.get_field_index(text_key[:dot])
        if number >= 0 and pyarrow.types.is_struct(fields.field(number).type):
            inner = _field_path(fields.field(number).type, text_key[dot + 1 :])
            if inner:
                return [number, *inner]
    return []
