"""Finds the files that a folder, a glob or a name stands for."""

import glob
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from nha_jax.storage.stores import Store, is_in_store, local_files
from train.errors import ConfigError
from train.paths import user_location, user_path

_WILD = frozenset("*?[")
_PARTS_TO_BUCKET = 3  # of "gs://bucket", between slashes


def find_files(
    text: str, name: str, companions: Callable[[str], Iterable[str]] = lambda file: ()
) -> list[tuple[str, Path]]:
    """Finds files, leaving out hidden files and folders inside a folder.

    Those in a store are downloaded, and live as long as the process. What exists is itself: in
    `[a]/*.txt`, `[a]` is the folder of that name if there is one.

    Args:
        text: a folder, a file, or a glob (`**` goes through all folders below).
        name: the option or the key that it was written for, with which the errors begin.
        companions: gives the names of what comes along from a store, if it is beside a file.

    Returns:
        (name, path) of each file, sorted by name; names are relative to the folder that all files
        have in common. The list is empty if nothing was found.

    Raises:
        ConfigError: the text is no path, a folder cannot be read, or what was found is no file.
    """
    if is_in_store(text):
        return _find_in_store(text, name, companions)
    path = user_path(text, name)
    if path.is_dir():
        return [(name, file) for name, file in walk(path) if _is_file(file)]
    if os.path.lexists(path):
        if not _is_file(path):
            raise ConfigError(f"{name} = {text!r}: a pipe or a device; expected a file or a folder")
        return [(path.name, path)]
    found = sorted(_matches(path))
    matches = [match for match in found if _is_file(match)]
    if found and not matches:
        raise ConfigError(f"{name} = {text!r}: matches folders only; /** behind it is their files")
    if not matches:
        return []
    root = Path(os.path.commonpath([match.parent for match in matches]))
    return [(match.relative_to(root).as_posix(), match) for match in matches]


def exists_as_folder(text: str, name: str) -> bool:
    """Whether a text names a folder of the disk; in a store there are none but of objects."""
    return not is_in_store(text) and user_path(text, name).is_dir()


def _find_in_store(
    text: str, name: str, companions: Callable[[str], Iterable[str]]
) -> list[tuple[str, Path]]:
    """Does what `find_files` does in a store, where a glob matches names below its first part."""
    from fsspec.utils import glob_translate

    parts = text.split("/")
    first = next((n for n, part in enumerate(parts) if _WILD.intersection(part)), len(parts))
    if first < _PARTS_TO_BUCKET:
        raise ConfigError(f"{name} = {text!r}: a glob over buckets; expected one bucket's name")
    store = user_location("/".join(parts[:first]), name)
    assert isinstance(store, Store)
    matches = re.compile(glob_translate("/".join(parts[first:]) or "**")).fullmatch
    there = store.files()
    found = [x for x in there if not re.search(r"(^|/)\.", x) and matches(x)]
    if found:
        digests = store.digests("")
    elif first == len(parts) and not there and store.parent.exists(store.name):
        store, found = store.parent, [store.name]
        beside = [x for x in companions(*found) if store.exists(x)]
        digests = {x: store.digests(x)[x] for x in (*found, *beside)}
    else:
        return []
    names = sorted({x for y in found for x in (y, *companions(y)) if x in digests})
    size = sum(int(digests[x].split()[0]) for x in names)
    print(f"nha: downloading {size:,} bytes of {text}", file=sys.stderr, flush=True)
    root = local_files(store, names)
    for x in names:
        # What is made of a file remembers its time, which here stands for its content.
        seconds = zlib.crc32(digests[x].encode())
        os.utime(root / x, (seconds, seconds))
    return [(x, root / x) for x in found]


def walk(root: Path) -> list[tuple[str, Path]]:
    """Lists what is below a folder and is no folder, but for what is hidden.

    Links to folders are followed, but not to a folder that holds the link.

    Returns:
        (name relative to the folder, path) of each, sorted.

    Raises:
        ConfigError: a folder cannot be read.
    """
    files = (file for _, files in _folders(root) for file in files)
    return sorted((file.relative_to(root).as_posix(), file) for file in files)


def _folders(root: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Gives a folder and all below it, each with what it holds besides folders, hidden ones not."""
    waiting: list[tuple[Path, frozenset[tuple[int, int]]]] = [(root, frozenset())]
    while waiting:
        folder, above = waiting.pop()
        try:
            status = folder.stat()
            identity = status.st_dev, status.st_ino
            if identity in above:
                continue
            with os.scandir(folder) as entries:
                visible = [entry for entry in entries if not entry.name.startswith(".")]
            # Of a link in a circle only Path.is_dir says no, and does not raise.
            folders = {
                folder / entry.name
                for entry in visible
                if (Path(entry).is_dir() if entry.is_symlink() else entry.is_dir())
            }
        except OSError as error:
            raise ConfigError(f"{folder}: cannot read this folder: {error.strerror}") from None
        paths = [folder / entry.name for entry in visible]
        yield folder, [path for path in paths if path not in folders]
        waiting += [(path, above | {identity}) for path in folders]


def _is_file(path: Path) -> bool:
    """Says whether a path is a file; raises ConfigError if it is a link to what is not there."""
    if path.is_symlink() and not path.exists():
        raise ConfigError(f"{path}: a link to what is not there, {os.readlink(path)!r}")
    return path.is_file()


def _matches(path: Path) -> set[Path]:
    """Finds what a glob stands for; as much of its beginning as exists is taken as it is."""
    parts = path.parts
    there = next(n for n in range(len(parts), -1, -1) if os.path.lexists(Path(*parts[:n])))
    return set(_glob(Path(*parts[:there]), parts[there:])) or set(_glob(Path(), parts))


def _glob(root: Path, parts: Sequence[str]) -> Iterator[Path]:
    """Finds what a glob below a folder stands for; `**` goes no folder through itself."""
    if "**" not in parts:
        yield from (root / match for match in glob.glob(str(Path(*parts)), root_dir=root))
        return
    # glob's own ** would follow a link to a folder above over and over.
    before, after = parts[: parts.index("**")], parts[parts.index("**") + 1 :]
    for head in _glob(root, before) if before else [root]:
        for folder, _ in _folders(head) if head.is_dir() else ():
            yield from _glob(folder, after or ["*"])
