"""Reads tar archives: each file in one by its own suffix, and nothing is written to disk."""

import contextlib
import tarfile
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import BinaryIO, Self, cast

from train.data.packed_files import kind_of, naming, open_unpacked, unpacked
from train.data.prepare.documents import (
    BadDocumentError,
    Document,
    FileFormat,
    FilePart,
    Reading,
    ReadStream,
    whole_file,
)
from train.errors import DataError

_READ_BYTES = 1 << 16


def tar_format(reader_of: Callable[[PurePosixPath], ReadStream | None]) -> FileFormat:
    """Makes the format of archives, whose files are read by what `reader_of` finds by name."""

    def read(part: FilePart, reading: Reading) -> Iterator[Document | None]:
        with naming(part.path, DataError), open_unpacked(part.path) as file:
            for name, content in _files(file, str(part.path), reading):
                where = f"{part.path}, file {name} in it"
                read_stream = reader_of(name)
                if read_stream is None:
                    raise DataError(
                        f"{where}: {kind_of(name)} files cannot be read inside of an archive; "
                        "unpack it"
                    )
                with naming(where, DataError), _one_error(), unpacked(content, name) as stream:
                    yield from read_stream(stream, where, reading)
        reading.progress(part.size)

    return FileFormat(whole_file, read)


class _Header(tarfile.TarInfo):
    """A header that is damaged or missing is an error: tarfile takes it for the archive's end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if buf == bytes(tarfile.BLOCKSIZE):
                raise  # the end as it should be
            raise OSError(f"it is damaged, or cut: {error}") from None


def _files(file: BinaryIO, path: str, reading: Reading) -> Iterator[tuple[PurePosixPath, BinaryIO]]:
    """Gives the files of an archive, by name, to be read before the next one is asked for."""
    with _one_error(), tarfile.open(fileobj=file, mode="r|", tarinfo=_Header) as archive:
        while member := archive.next():
            archive.members.clear()  # type: ignore[attr-defined]  # all would be kept
            name = PurePosixPath(member.name)
            if member.isdir() or any(part.startswith(".") and part != ".." for part in name.parts):
                continue
            if member.isreg() and not name.is_absolute() and ".." not in name.parts:
                yield name, cast(BinaryIO, archive.extractfile(member))
            else:
                what = (
                    "its name leads out of the archive" if member.isreg() else "a link or a device"
                )
                reading.bad(BadDocumentError(f"{path}, file {name} in it: {what}"))
        assert archive.fileobj is not None
        while behind := archive.fileobj.read(_READ_BYTES):
            if behind.strip(b"\0"):
                raise OSError("it has something else behind its end, perhaps another archive")


@contextlib.contextmanager
def _one_error() -> Iterator[None]:
    """Turns what tarfile raises of an archive into OSError."""
    try:
        yield
    except tarfile.TarError as error:
        raise OSError(f"it is damaged, or cut: {error}") from None
