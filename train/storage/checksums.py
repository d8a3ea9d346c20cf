"""Sizes and checksums of a folder's files, to tell later whether they are as they were written.

In an object store they are the store's own, which it made of what it was sent: nothing is read.
"""

import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from etils import epath

from nha_jax.storage.stores import Store
from train.storage.atomic import write_atomically
from train.storage.small_json import parse

CHECKSUMS_FILE = "checksums.json"

_OBJECTS_FILE = "objects.json"
"""In a store: the digest of every object by name, in place of CHECKSUMS_FILE."""

_READ_BYTES = 1 << 20
_THREADS = 4


def write_checksums(folder: Path | epath.Path) -> None:
    """Writes the size and CRC-32 of every file below `folder` into its CHECKSUMS_FILE.

    Raises:
        OSError: a file cannot be read, or the list cannot be written.
    """
    if not isinstance(folder, Path):
        store = Store(str(folder))
        store.write(_OBJECTS_FILE, (json.dumps(store.digests(""), indent=1) + "\n").encode())
        return
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(_THREADS) as pool:
        entries = pool.map(lambda path: [path.stat().st_size, _crc32(path)], files)
        names = (path.relative_to(folder).as_posix() for path in files)
        record = dict(zip(names, entries, strict=True))
    write_atomically(folder / CHECKSUMS_FILE, json.dumps(record, indent=1) + "\n")


def has_checksums(folder: Path | epath.Path) -> bool:
    """Whether the checksums of `folder` have been written."""
    if not isinstance(folder, Path):
        return Store(str(folder)).exists(_OBJECTS_FILE)
    return (folder / CHECKSUMS_FILE).exists()


def find_damage(folder: Path | epath.Path) -> str | None:
    """Finds the first file of `folder` that is not as it was written.

    Returns:
        The file and what is wrong with it; None if nothing is. A folder without checksums passes:
        its writer was killed just before it wrote them.
    """
    if not has_checksums(folder):
        return None
    if not isinstance(folder, Path):
        return _find_damage_in_store(Store(str(folder)))
    try:
        content = (folder / CHECKSUMS_FILE).read_bytes()
        expected = parse(content, dict[str, tuple[int, int]])
    except (OSError, ValueError):
        return f"{CHECKSUMS_FILE} is not readable"
    with ThreadPoolExecutor(_THREADS) as pool:
        faults = list(pool.map(lambda name: _fault(folder / name, *expected[name]), expected))
    found = (f"{name} {fault}" for name, fault in zip(expected, faults, strict=True) if fault)
    return next(found, None)


def _find_damage_in_store(store: Store) -> str | None:
    try:
        expected = parse(store.read(_OBJECTS_FILE), dict[str, str])
    except ValueError:
        return f"{_OBJECTS_FILE} is not readable"
    present = store.digests("")
    for name, digest in expected.items():
        if name not in present:
            return f"{name} is missing"
        if present[name] != digest:
            return f"{name} has changed (its size or checksum differs)"
    return None


def _fault(path: Path, size: int, crc: int) -> str | None:
    try:
        if path.stat().st_size != size:
            return f"has {path.stat().st_size:,} bytes instead of {size:,}"
        return None if _crc32(path) == crc else "has changed (its checksum differs)"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            checksum = zlib.crc32(piece, checksum)  # lets other threads run meanwhile
    return checksum
