"""Paths as users write them, in options of commands and in keys of the configuration."""

import os
from pathlib import Path

from train.errors import ConfigError

MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 4095
"""What file systems and Linux take at most for one name, and for a whole path."""


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


def shorten(text: str) -> str:
    """Quotes a text in one line, leaving out the middle of a long one."""
    return repr(text if len(text) <= 100 else f"{text[:60]}...{text[-20:]}")
