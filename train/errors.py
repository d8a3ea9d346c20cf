"""Errors that reach the user as one line, each with its exit code."""

import contextlib
import errno
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

MACHINE_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EPIPE, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM
}  # fmt: skip
"""Reasons of an OSError that lie in the machine, and not in what the user wrote."""


class UserError(Exception):
    """Something the user can put right; `nha` prints the message as one line and exits.

    Attributes:
        exit_code: what the process returns to the shell.
    """

    exit_code = 1


class ConfigError(UserError):
    """A configuration, corpus or run folder cannot be used as it is."""

    exit_code = 2


class CheckpointError(UserError):
    """A checkpoint cannot be written, or is damaged."""


class DataError(UserError):
    """A file of a corpus is missing or damaged."""


class TrainingError(UserError):
    """Training cannot go on, e.g. because the loss stays non-finite."""


def require(condition: bool, key: str, value: Any, expected: str) -> None:
    """Raises ValueError `key = value: expected ...` unless `condition` holds."""
    if not condition:
        raise ValueError(f"{key} = {value!r}: expected {expected}")


def require_at_least(section: Any, minimum: int, *keys: str) -> None:
    """Raises ValueError unless each of these keys of a section is at least `minimum`."""
    for key in keys:
        value = getattr(section, key)
        require(value >= minimum, key, value, f"at least {minimum}")


@contextlib.contextmanager
def explain_refusal() -> Iterator[None]:
    """Turns the refusal of an implementation that `model.implementation` names into a ConfigError.

    The operator refuses, with NotImplementedError, what a named implementation cannot serve.
    """
    try:
        yield
    except NotImplementedError as error:
        if not str(error).startswith("implementation="):
            raise
        raise ConfigError(f"model.{error}; null takes the fastest that serves") from None


@contextlib.contextmanager
def do_without(what: str) -> Iterator[None]:
    """Lets what only adds to the work fail without costing it: a line on stderr says what failed.

    Args:
        what: what is done inside the `with`, as the line calls it.
    """
    try:
        yield
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = cut(one_line(first), 200)
        print(f"nha: {what}: {reason}; going on without it", file=sys.stderr)


def one_line(text: str) -> str:
    """Writes what would break a line, or steer a terminal, as escapes such as `\\n`."""
    unseen = "[\x00-\x1f\x7f-\x9f\u2028\u2029]"
    return re.sub(unseen, lambda match: ascii(match[0])[1:-1], text.strip())


def cut(text: str, most: int = 60) -> str:
    """Cuts a value or a message down to what a line has room for."""
    return text if len(text) <= most else text[: most - 3] + "..."


@contextlib.contextmanager
def refusals_are_config_errors() -> Iterator[None]:
    """Turns a ValueError, or an OSError that is about a name or a file, into a ConfigError.

    What the machine cannot do, such as writing to a full disk, stays what it is.
    """
    try:
        yield
    except ValueError as error:
        raise ConfigError(" ".join(str(error).split())) from None
    except OSError as error:
        if error.errno in MACHINE_ERRORS:
            raise
        raise ConfigError(describe_os_error(error)) from None


def describe_os_error(error: OSError) -> str:
    """Words an error of the operating system: the files it is about, and the reason."""
    reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
    names = (error.filename, error.filename2) if error.strerror else ()
    shown = [cut(os.fsdecode(name)) for name in names if isinstance(name, str | bytes)]
    return f"{' -> '.join(shown)}: {reason}" if shown else reason


def describe_differences(
    old: Mapping[str, Any], new: Mapping[str, Any], show: Callable[[Any], str]
) -> list[str]:
    """Words the differences of two mappings for a message.

    Args:
        old: values by name.
        new: likewise; a name that one of the two lacks has the value None there.
        show: how a value is written.

    Returns:
        `name: old -> new` for each name whose values differ.
    """
    return [
        f"{name}: {show(old.get(name))} -> {show(new.get(name))}"
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]
