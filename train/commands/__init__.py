"""The commands of `nha`: a module each, with its options and the function that runs it.

Whatever imports jax is imported by the function that needs it, so that help comes at once.
"""

import argparse
from collections.abc import Sequence
from typing import Protocol

from train.commands import (
    data,
    doctor,
    eval_,
    export,
    generate,
    import_,
    inspect,
    plan,
    search,
    status,
    train,
)


class Command(Protocol):
    """The functions that a command's module has."""

    def add_parser(self, commands: "argparse._SubParsersAction") -> None:
        """Adds the command's options to those of `nha`."""

    def run(self, options: argparse.Namespace, rest: Sequence[str]) -> int:
        """Runs the command.

        Args:
            options: what the parser read.
            rest: the arguments it did not know: overrides of the configuration, for `train` and
                `plan`; empty for the others.

        Returns:
            The exit code.

        Raises:
            UserError: something the user can put right.
        """


COMMANDS: dict[str, Command] = {
    "data": data,
    "import": import_,
    "train": train,
    "plan": plan,
    "status": status,
    "doctor": doctor,
    "generate": generate,
    "search": search,
    "inspect": inspect,
    "eval": eval_,
    "export": export,
}
