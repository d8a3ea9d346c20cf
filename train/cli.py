"""The `nha` command: its options, its commands and its exit codes."""

import sys
from collections.abc import Sequence

# All else is imported by functions: Ctrl-C may come while it is.

RESUMED = ("train", "data", "search")
"""Commands that go on where they stopped."""

_EPILOG = """\
exit codes:
  0    done
  1    something failed (one line says what), or what nha plan compiled does not fit
  2    wrong input: an option, a configuration, a file, a device that is not there
  130  stopped by Ctrl-C
  141  whoever read the output has gone (nha ... | head)
  143  stopped by SIGTERM (a preemption notice)
A run of nha train that is stopped is saved first. With NHA_TRACEBACK=1 in the environment an error
also shows where in the code it came up."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; whatever goes wrong is one line on standard error.

    Args:
        argv: the arguments; None: those of the process.

    Returns:
        The exit code: 0 done, 1 something failed, 2 wrong input, 130 and 143 stopped by Ctrl-C and
        SIGTERM, 141 the reader of the output is gone.

    Raises:
        SystemExit: help was asked for (0), or the command line is wrong (2).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else None
    try:
        _prepare_streams()
        if argv is None:  # the process is ours
            from train.failures import word_background_errors

            word_background_errors()
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        resumes = "; the same command goes on where it stopped" if command in RESUMED else ""
        _print_error(f"interrupted{resumes}")
        return 130
    except Exception as error:
        return _report(error, command)
    except SystemExit:
        try:
            sys.stdout.flush()
        except OSError as error:
            return _report(error, command)
        raise


def _run(arguments: list[str]) -> int:
    import argparse

    from train.commands import COMMANDS
    from train.commands.parser import Parser

    parser = Parser(
        prog="nha",
        description="Train and run language models with Native Hybrid Attention.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = _version() if "--version" in arguments else ""  # git is not asked for nothing
    parser.add_argument("--version", action="version", version=f"nha {version}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS.values():
        command.add_parser(commands)
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command not in ("train", "plan"):
        commands.choices[options.command].error(f"{' '.join(rest)}: more than it takes")
    return COMMANDS[options.command].run(options, rest)


def _version() -> str:
    """The version, of which the last part names the commit: in a clone, the one checked out."""
    import subprocess
    from importlib.metadata import version
    from pathlib import Path

    installed, clone = version("nha_jax"), Path(__file__).parent.parent
    if not (clone / ".git").exists():
        return installed
    command = ["git", "-C", str(clone), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or it refuses the folder's owner
        return installed
    return f"{installed.partition('+')[0]}+g{commit}"


def _prepare_streams() -> None:
    """Lets printing never fail over a character, nor over a stream that was closed from the start.

    A closed one becomes /dev/null: otherwise the next file that is opened would take its number,
    and what libraries print would end up there.
    """
    import io
    import os

    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            exact = stream.errors != "strict" and stream.encoding.lower().startswith("utf")
            stream.reconfigure(errors=stream.errors if exact else "backslashreplace")


def _report(error: Exception, command: str | None) -> int:
    """Prints what went wrong, and returns the exit code."""
    import os

    from train.failures import TRACEBACK, describe_failure

    line, code = describe_failure(error, command)
    if os.environ.get(TRACEBACK):
        import traceback

        traceback.print_exception(error)
    if line:
        _print_error(line)
    _flush_or_discard()
    return code


def _print_error(line: str) -> None:
    import contextlib

    with contextlib.suppress(OSError):
        print(f"nha: {line}", file=sys.stderr, flush=True)


def _flush_or_discard() -> None:
    """Prints what is left, or lets go of it: the interpreter would fail over it when it ends."""
    import contextlib
    import os

    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
