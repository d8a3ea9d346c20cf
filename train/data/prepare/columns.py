"""Finds documents in batches of rows: in columns, or fields inside of columns of structs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.data.prepare.documents import BadDocumentError, Document, Form, Reading
from train.errors import DataError
from train.extras import import_extra


def check_columns(path: Path, schema: Any, form: Form) -> None:
    """Raises DataError if a table of this pyarrow schema lacks a column that the form reads."""
    for name, option in form.options.items():
        if not _field_path(schema, name):
            raise DataError(
                f"{path}: no column {name!r} ({option} names it); it has {', '.join(schema.names)}"
            )


def documents_of_rows(
    batch: Any, path: Path, rows_before: int, reading: Reading
) -> Iterator[Document | None]:
    """Reads the documents of a pyarrow batch, whose first row is row `rows_before` + 1."""
    columns = [_values(batch, name) for name in reading.form.options]
    for row, values in enumerate(zip(*columns, strict=True), rows_before + 1):
        try:
            yield reading.form.document(values)
        except BadDocumentError as error:
            reading.bad(BadDocumentError(f"{path}, row {row}: {error}"))


def _values(batch: Any, name: str) -> list[object]:
    """Returns what the cells of a column hold; of text, its bytes."""
    pyarrow, compute = import_extra("pyarrow"), import_extra("pyarrow.compute")
    first, *inner = _field_path(batch.schema, name)
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


def _field_path(fields: Any, name: str) -> list[int]:
    """Finds a field of a pyarrow schema or struct by name; of a.b, field b of the struct a.

    Returns:
        Its number, after those of the structs it is in; nothing if there is no such field.
    """
    pyarrow = import_extra("pyarrow")
    number = fields.get_field_index(name)
    if number >= 0:
        return [number]
    for dot in reversed([n for n, letter in enumerate(name) if letter == "."]):
        number = fields.get_field_index(name[:dot])
        if number >= 0 and pyarrow.types.is_struct(fields.field(number).type):
            inner = _field_path(fields.field(number).type, name[dot + 1 :])
            if inner:
                return [number, *inner]
    return []
