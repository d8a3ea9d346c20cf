"""Writing files so that whoever reads them finds the old content or the whole new one.

The content goes to a temporary file beside its place, is forced to the disk, and is then renamed.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from train.paths import MAX_NAME_BYTES


class Replacement:
    """A file being written that takes the place of another when it is committed.

    Attributes:
        file: where the content goes.
    """

    def __init__(self, path: Path):
        """Opens a temporary file beside `path`, which stays as it is."""
        self._path = path
        # The process's number: one that was killed may not be gone when the next one starts.
        ending = f".{os.getpid()}.tmp"
        name = os.fsencode(f".{path.name}")[: MAX_NAME_BYTES - len(ending)]
        self._temporary = path.with_name(os.fsdecode(name) + ending)
        self.file: BinaryIO = self._temporary.open("wb")

    def commit(self) -> None:
        """Puts the file in its place; when this returns, it is on the disk for good."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self._temporary.replace(self._path)
        _sync_folder(self._path.parent)

    def close(self) -> None:
        """Closes the file, and removes it if it was not committed."""
        self.file.close()
        self._temporary.unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    """Forces a folder's list of names to the disk, where its file system can do that."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # said by some network file systems
            raise
    finally:
        os.close(folder)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Gives a file to write that takes the place of `path` when the block ends.

    Until then, and if the block raises, `path` is as it was.
    """
    with contextlib.closing(Replacement(path)) as replacement:
        yield replacement.file
        replacement.commit()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces the content of `path`, or makes the file; text is written as UTF-8."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_picture(path: Path, figure: Any) -> None:
    """Writes a matplotlib `Figure` as a PNG."""
    with replacing(path) as file:
        figure.savefig(file, dpi=120, format="png")


def write_if_changed(path: Path, content: str | bytes) -> None:
    """Does what `write_atomically` does, unless the file holds that already."""
    content = content.encode() if isinstance(content, str) else content
    try:
        if path.read_bytes() == content:
            return
    except FileNotFoundError:
        pass
    write_atomically(path, content)


def remove_unfinished(folder: Path) -> None:
    """Removes what killed processes left of their temporary files in `folder`.

    No other process may be writing there.
    """
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
