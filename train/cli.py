"""The `nha` command: its options, its commands and its exit codes."""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

from train.commands import COMMANDS
from train.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments; None: those of the process.

    Returns:
        The exit code: 0 done, 1 something failed, 2 wrong input, 130 and 143 stopped by Ctrl-C and
        SIGTERM.
    """
    parser = argparse.ArgumentParser(
        prog="nha",
        description="Train and run language models with Native Hybrid Attention.",
        epilog="exit codes: 0 done, 1 something failed (one line says what), 2 wrong input, 130 "
        "stopped by Ctrl-C, 143 by SIGTERM (a preemption notice); a stopped run is saved first",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"nha {version('nha_jax')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS.values():
        command.add_parser(commands)
    options, rest = parser.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    if rest and options.command not in ("train", "plan"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return COMMANDS[options.command].run(options, rest)
    except UserError as error:
        print(f"nha: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("nha: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
