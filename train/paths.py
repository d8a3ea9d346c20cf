"""Paths as users write them, in options of commands and in keys of the configuration."""

import dataclasses
import os
import stat
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nha_jax.storage.stores import SCHEMES, Store, is_in_store, local_copy, scheme_of
from train.errors import ConfigError

MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 4095
"""What file systems and Linux take at most for one name, and for a whole path."""

_HIDDEN = {0xDC00 + byte: 0x10FF00 + byte for byte in range(128, 256)}
_SHOWN = {hidden: shown for shown, hidden in _HIDDEN.items()}

_MEMORY_DEVICES = 1  # Linux's number of /dev/null, zero, full, random and their like


def user_path(text: str | Path, name: str) -> Path:
    """Turns what a user wrote into a path; `~` and `~user` at its start are home folders.

    A name that no user has, but a file, is that file's: `~draft` beside `~draft/notes.txt`.

    Args:
        text: what was written; a `Path` has been through here, and is given back.
        name: the option or the key that it was written for, with which the errors begin.

    Raises:
        ConfigError: it is empty, no file can have it as its name, or it begins with the home of a
            user who is not there.
    """
    if isinstance(text, Path):
        return text
    shown = f"{name} = {shorten(text)}"
    match scheme_of(text):
        case None:
            pass
        case "file":
            return user_path(_path_of_url(text, shown), name)
        case scheme if scheme in SCHEMES:
            raise ConfigError(f"{shown}: in an object store; expected a path on a disk")
        case scheme:
            raise ConfigError(_unknown(shown, scheme))
    if not text:
        raise ConfigError(f"{shown}: the path is empty (is a variable not set?); expected a path")
    if "\0" in text:
        raise ConfigError(f"{shown}: no path holds the character NUL")
    try:
        longest = max(map(len, os.fsencode(text).split(b"/")))
    except UnicodeEncodeError:  # a lone surrogate that stands for no byte
        raise ConfigError(f"{shown}: no path holds half a character") from None
    if longest > MAX_NAME_BYTES or len(os.fsencode(text)) > MAX_PATH_BYTES:
        raise ConfigError(
            f"{shown}: too long; expected at most {MAX_NAME_BYTES} bytes a name, "
            f"{MAX_PATH_BYTES} in all"
        )
    # Of text, as pathlib would take ./~root for the home of root too.
    expanded = os.path.expanduser(text)
    user = text.split("/", 1)[0]
    if text.startswith("~") and expanded == text and not os.path.lexists(user):
        raise ConfigError(f"{shown}: {user} is no user's home; ./{user} is a file of that name")
    return Path(expanded)


def user_location(text: str | Path, name: str) -> Path | Store:
    """Does what `user_path` does, and takes a place in an object store as well.

    Raises:
        ConfigError: like `user_path`; or no bucket is named, or the package that serves the store
            is not installed.
    """
    if not is_in_store(text):
        return user_path(text, name)
    try:
        return Store(str(text))
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{name} = {shorten(str(text))}: {error}") from None


def input_path(text: str | Path, name: str, keep: Callable[[str], bool] = lambda _: True) -> Path:
    """Does what `user_location` does for what is read: what is in a store is downloaded first.

    Args:
        text, name: like `user_path`.
        keep: says of each name below a folder in a store whether it is wanted.

    Raises:
        ConfigError: like `user_location`.
        StoreError: there is nothing, or it cannot be read.
    """
    location = user_location(text, name)
    return location if isinstance(location, Path) else local_copy(location.url, keep)


def _path_of_url(text: str, shown: str) -> str:
    """The path of a URL file:///path; of another machine there is none."""
    host, slash, rest = text.split("://", 1)[1].partition("/")
    if host not in ("", "localhost") or not slash:
        raise ConfigError(f"{shown}: expected file:///path, with three slashes")
    return f"/{urllib.parse.unquote(rest)}"


def _unknown(shown: str, scheme: str) -> str:
    known = ", ".join(f"{known}://" for known in ("file", *SCHEMES))
    return f"{shown}: nothing here serves {scheme}://; expected a path, {known}"


def check_ends(path: Path, name: str) -> None:
    """Raises ConfigError, which begins with `name`, for a device that has no end: /dev/zero.

    Standard input and terminals, which are devices too, end when their writer says so.
    """
    try:
        status = path.stat()
    except OSError:  # whoever opens it says so
        return
    if stat.S_ISCHR(status.st_mode) and os.major(status.st_rdev) == _MEMORY_DEVICES:
        raise ConfigError(f"{name} = {shorten(str(path))}: a device; expected a file")


def shorten(text: str) -> str:
    """Quotes a text in one line, leaving out the middle of a long one."""
    return repr(text if len(text) <= 100 else f"{text[:60]}...{text[-20:]}")


def hide_bytes[T](value: T) -> T:
    """Puts private characters for the bytes of names that are not UTF-8.

    Python has lone surrogates for them, which neither YAML nor JSON takes.

    Args:
        value: text, or a mapping, list, tuple or dataclass that has texts in it at any depth.

    Returns:
        The like with other texts; the value itself if there are no such bytes.
    """
    return _translate(value, _HIDDEN)


def show_bytes[T](value: T) -> T:
    """Puts the bytes back that `hide_bytes` has hidden."""
    return _translate(value, _SHOWN)


def _translate(value: Any, table: Mapping[int, int]) -> Any:
    if isinstance(value, str):
        return value.translate(table)
    if isinstance(value, dict):
        return {_translate(key, table): _translate(x, table) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_translate(x, table) for x in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        old = {x.name: getattr(value, x.name) for x in dataclasses.fields(value) if x.init}
        new = {name: _translate(x, table) for name, x in old.items()}
        return value if new == old else dataclasses.replace(value, **new)
    return value
