"""The commands of `nha`: a module each, with its parser and what it runs.

Everything that imports jax is imported by the function that needs it: help comes at once.
"""

import argparse
from collections.abc import Sequence
from typing import Protocol

from train.commands import data, export, generate, import_, inspect, plan, search, train


class Command(Protocol):
    """What a command's module offers."""

    def add_parser(self, commands: "argparse._SubParsersAction") -> None:
        """Adds the command's parser."""

    def run(self, options: argparse.Namespace, rest: Sequence[str]) -> int:
        """Runs it; `rest` is what the parser did not know, of `train` and `plan` overrides."""


COMMANDS: dict[str, Command] = {
    "data": data,
    "import": import_,
    "train": train,
    "plan": plan,
    "generate": generate,
    "search": search,
    "inspect": inspect,
    "export": export,
}
