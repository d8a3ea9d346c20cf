"""Finds the files that a folder, a glob or a name stands for, and opens them unpacked."""

import glob
import gzip
import io
import os
from pathlib import Path
from typing import BinaryIO, cast

from train.extras import import_extra

PACKED_SUFFIXES = (".gz", ".zst")


def find_files(pattern: str) -> list[tuple[str, Path]]:
    """Finds files, leaving out hidden files and folders inside a folder.

    Args:
        pattern: a folder, a file, or a glob (`**` goes through all folders below).

    Returns:
        (name, path) of each file, sorted by name; names are relative to the folder that all files
        have in common. The list is empty if nothing was found.
    """
    path = Path(pattern).expanduser()
    if path.is_dir():
        return walk(path)
    matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
    matches = [match for match in matches if match.is_file()]
    if not matches:
        return []
    root = Path(os.path.commonpath([match.parent for match in matches]))
    return [(match.relative_to(root).as_posix(), match) for match in matches]


def walk(root: Path) -> list[tuple[str, Path]]:
    """Returns (relative name, path) of every file below a folder but the hidden ones, sorted."""
    files = (path for path in root.rglob("*") if path.is_file())
    names = ((path.relative_to(root).as_posix(), path) for path in files)
    return sorted(
        (name, path)
        for name, path in names
        if not any(part.startswith(".") for part in name.split("/"))
    )


def kind_of(path: Path) -> str:
    """Returns a file's suffix in lower case without that of its packing: .jsonl of a.JSONL.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED_SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def is_packed(path: Path) -> bool:
    """Says whether the file is compressed as a whole, and so can only be read from its start."""
    return path.suffix.lower() in PACKED_SUFFIXES


def open_unpacked(path: Path) -> BinaryIO:
    """Opens a file for reading, unpacking it if its name ends in .gz or .zst."""
    match path.suffix.lower():
        case ".gz":
            return cast(BinaryIO, gzip.open(path, "rb"))
        case ".zst":
            zstandard = import_extra("zstandard")
            # Parallel compressors write a file as several frames, one after the other.
            reader = zstandard.ZstdDecompressor().stream_reader(
                path.open("rb"), read_across_frames=True, closefd=True
            )
            return cast(BinaryIO, io.BufferedReader(reader, 1 << 20))
        case _:
            return path.open("rb")
