"""Opens files unpacked, and lets none pass for whole that is cut or has something behind it."""

import contextlib
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any, BinaryIO, cast

from train.extras import import_extra

PACKED_SUFFIXES = (".gz", ".zst")

OTHER_PACKINGS = (
    ".7z", ".bz2", ".gzip", ".lz4", ".lzma", ".rar", ".tbz2", ".tgz", ".txz", ".xz", ".zip",
    ".zstd",
)  # fmt: skip
"""Suffixes of what is packed otherwise, or of several files in one: no text as it is."""

# Little enough that a frame of the same byte over and over does not fill the memory.
_READ_BYTES = 1 << 14
_BUFFER_BYTES = 1 << 20


def kind_of(path: PurePath) -> str:
    """Returns a file's suffix in lower case without that of its packing: .jsonl of a.JSONL.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED_SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def is_packed(path: PurePath) -> bool:
    """Says whether the file is compressed as a whole, and so can only be read from its start."""
    return path.suffix.lower() in PACKED_SUFFIXES


def open_unpacked(path: Path) -> BinaryIO:
    """Opens a file for reading, unpacking it if its name ends in .gz or .zst; see `unpacked`."""
    return unpacked(path.open("rb"), path)


def unpacked(file: BinaryIO, name: PurePath) -> BinaryIO:
    """Unpacks an open file if its name ends in .gz or .zst; closing what is returned closes it.

    Whoever reads it to its end has read all of it: EOFError says that a packed file is cut, OSError
    that it is damaged or has something else behind it. Several members (gzip) or frames (zstd) one
    after the other, as parallel compressors write them, are read as one.
    """
    match name.suffix.lower():
        case ".gz":
            new_member = lambda: zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)  # noqa: E731
            damage = zlib.error
        case ".zst":
            zstandard = import_extra("zstandard")
            new_member = zstandard.ZstdDecompressor().decompressobj
            damage = zstandard.ZstdError
        case _:
            return file
    reader = _Unpacked(file, new_member, damage)
    return cast(BinaryIO, io.BufferedReader(reader, _BUFFER_BYTES))


class _Unpacked(io.RawIOBase):
    """What members, one after the other, hold; each must be whole, and nothing else be there.

    The readers of `gzip` and `zstandard` take zeros behind a member, or a frame without its end,
    for the end of the file.
    """

    def __init__(self, file: BinaryIO, new_member: Callable[[], Any], damage: type[Exception]):
        """Reads from `file`; `new_member()` unpacks a member, and raises `damage` if it cannot."""
        self._file = file
        self._new_member, self._damage = new_member, damage
        self._member = new_member()
        self._began = False  # a file without any member is cut too
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            left = self._member.unused_data if self._member.eof else b""
            packed = left or self._file.read(_READ_BYTES)
            if not packed:
                if self._member.eof:
                    return 0
                raise EOFError("it ends too early" + ("" if self._began else ": it is empty"))
            if self._member.eof:
                self._member = self._new_member()
            self._began = True
            self._ready = memoryview(self._unpack(packed))
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _unpack(self, packed: bytes) -> bytes:
        try:
            return self._member.decompress(packed)
        except self._damage as error:
            raise OSError(f"it is damaged: {error}") from None

    def close(self) -> None:
        self._file.close()
        super().close()


@contextlib.contextmanager
def naming(
    path: Path | str, error_type: type[Exception], what: str = "cannot read it"
) -> Iterator[None]:
    """Turns what opening and reading a file raises into one line that names it."""
    try:
        yield
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise error_type(f"{path}: {what}: {reason(error)}") from None


def reason(error: BaseException) -> str:
    """Returns an error's message in one line."""
    return " ".join(str(getattr(error, "strerror", None) or error).split())
