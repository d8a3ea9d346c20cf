"""What went wrong, as one line and an exit code, whatever was raised."""

import errno
import os
import re
import select
import sys
import threading
import traceback
from typing import IO

from nha_jax.extras import describe_missing
from nha_jax.storage.stores import StoreError
from train.errors import UserError, cut, describe_os_error, one_line

FAILED, WRONG_INPUT, STUCK, INTERRUPTED, READER_GONE = 1, 2, 75, 130, 141
"""Exit codes: something failed; wrong input; a run that did not move, to be started again (as
sysexits.h has it, EX_TEMPFAIL); Ctrl-C; nobody reads what is printed (SIGPIPE's)."""

TRACEBACK = "NHA_TRACEBACK"
"""The environment variable that asks for tracebacks."""

LESS_MEMORY = {
    "train": "`nha plan` says what would fit: micro_batches, head_parts, model.remat, batch_size",
    "generate": "a smaller --batch-size, --max-length or --prefill-chunk needs less",
    "inspect": "a smaller --context needs less",
    "search": "a smaller --sequence-length needs less",
}
"""What needs less memory, for each command that can be asked for less."""


def describe_failure(error: BaseException, command: str | None = None) -> tuple[str, int]:
    """Words an exception for the user.

    Args:
        error: what was raised.
        command: the command that raised it, if it is known.

    Returns:
        A line, and the exit code. The line is empty where nobody is there to read it.
    """
    line, code = _describe(error, command)
    return one_line(line), code


def word_background_errors() -> None:
    """Lets what threads raise, which nobody can catch, be one line each until the process ends.

    Left out are the answers that TensorStore has for an event loop which is closed by then, because
    another write of the same checkpoint failed: the failure is reported by itself.
    """

    def show(raised: "threading.ExceptHookArgs | sys.UnraisableHookArgs") -> None:
        kind, error = raised.exc_type, raised.exc_value
        if os.environ.get(TRACEBACK):
            traceback.print_exception(kind, error, raised.exc_traceback)
        elif not (kind is RuntimeError and str(error) == "Event loop is closed"):
            what = _first_words(str(error))
            print(f"nha: in the background: {kind.__name__}: {what}{_where()}", file=sys.stderr)

    threading.excepthook = sys.unraisablehook = show


def _describe(error: BaseException, command: str | None) -> tuple[str, int]:
    if isinstance(error, UserError):
        return str(error), error.exit_code
    if isinstance(error, StoreError):
        return str(error), WRONG_INPUT if error.wrong_input else FAILED
    if isinstance(error, BrokenPipeError) and any(map(_reader_is_gone, (sys.stdout, sys.stderr))):
        return "", READER_GONE
    if isinstance(error, OSError):
        return _describe_os_error(error), FAILED
    if is_out_of_memory(error):
        hint = LESS_MEMORY.get(command or "")
        amount = re.search(r"allocat\w+ (?:of )?([\d.]+ ?[KMGT]?i?B|\d+ bytes)", str(error))
        wanted = f" ({amount[1]} more were asked for)" if amount else ""
        return f"out of memory{wanted}" + (f"; {hint}" if hint else ""), FAILED
    if _is_missing_device(error):
        return _describe_missing_device(error), WRONG_INPUT
    if isinstance(error, ImportError) and error.name and not _is_ours(error.name):
        return describe_missing(error.name), FAILED
    if isinstance(error, RecursionError):
        return f"something is nested too deeply{_where()}", FAILED
    what = _first_words(str(error))
    if type(error).__name__ == "JaxRuntimeError":
        return f"the device or its compiler failed: {what}{_where()}", FAILED
    return f"unexpected {type(error).__name__}: {what}{_where()}", FAILED


def _where() -> str:
    return f"; {TRACEBACK}=1 shows where"


def _first_words(text: str) -> str:
    return cut(" ".join(text.split()), 300)


def _describe_os_error(error: OSError) -> str:
    line = describe_os_error(error)
    if error.filename is not None:
        return line
    if error.errno == errno.ENOSPC:
        return f"{line}: a disk is full, or what standard output goes to"
    return f"{line}{_where()}"


def _is_ours(module: str) -> bool:
    return module.split(".")[0] in ("train", "nha_jax", "pallas")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, a device's or the host's."""
    words = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def _is_missing_device(error: BaseException) -> bool:
    """Whether jax found no device of the kind that JAX_PLATFORMS names."""
    if isinstance(error, RuntimeError):
        return "Unable to initialize backend" in str(error) or "Unknown backend" in str(error)
    # For a kind whose plugin is not installed, such as cuda, jax trips over an assertion.
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, AssertionError) and frames[-1].filename.endswith("xla_bridge.py")


def _describe_missing_device(error: BaseException) -> str:
    import logging

    import jax

    asked = jax.config.jax_platforms
    if asked is None:
        return f"no device: {_first_words(str(error))}"
    logging.disable(logging.CRITICAL)  # what else jax tries and misses is of no interest
    try:
        jax.config.update("jax_platforms", None)
        found = f"; there is {jax.devices()[0].platform}"
    except Exception:
        found = ""
    finally:
        logging.disable(logging.NOTSET)
        jax.config.update("jax_platforms", asked)
    return f"JAX_PLATFORMS = {asked}: jax finds no such device{found}; unset it, or name another"


def _reader_is_gone(stream: IO[str]) -> bool:
    """Whether a stream is a pipe that nobody reads any more."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):
        return False
