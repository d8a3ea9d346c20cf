"""The files that a folder, a glob or a name stands for, and opening them whatever packs them."""

import glob
import gzip
import importlib
import io
import os
from pathlib import Path
from typing import Any, BinaryIO, cast

from train.errors import ConfigError

PACKED_SUFFIXES = (".gz", ".zst")


def find_files(pattern: str) -> list[tuple[str, Path]]:
    """(name relative to what they have in common, path) of each file, sorted by name.

    Hidden files and folders inside a folder are left out. Nothing found: an empty list.

    Args:
        pattern: a folder, a file, or a glob (`**` goes through all folders below).
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
    """The same of every file below a folder, hidden ones left out."""
    files = (path for path in root.rglob("*") if path.is_file())
    names = ((path.relative_to(root).as_posix(), path) for path in files)
    return sorted(
        (name, path)
        for name, path in names
        if not any(part.startswith(".") for part in name.split("/"))
    )


def kind_of(path: Path) -> str:
    """A file's suffix in lower case, that of its packing left out: `.jsonl` of `a.JSONL.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED_SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def is_packed(path: Path) -> bool:
    """Whether the file is compressed as a whole, so that it can only be read from its start."""
    return path.suffix.lower() in PACKED_SUFFIXES


def open_unpacked(path: Path) -> BinaryIO:
    """The file's bytes, unpacked where its name ends in `.gz` or `.zst`."""
    match path.suffix.lower():
        case ".gz":
            return cast(BinaryIO, gzip.open(path, "rb"))
        case ".zst":
            zstandard = import_extra("zstandard")
            # A file may be several frames one after the other, as parallel compressors write it.
            reader = zstandard.ZstdDecompressor().stream_reader(
                path.open("rb"), read_across_frames=True, closefd=True
            )
            return cast(BinaryIO, io.BufferedReader(reader, 1 << 20))
        case _:
            return path.open("rb")


def import_extra(name: str, extra: str = "data") -> Any:
    """A module of a package that an extra brings.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.split(".")[0]
        raise ConfigError(
            f'the package {package} is not installed; `pip install "nha_jax[{extra}]"` brings it'
        ) from None
