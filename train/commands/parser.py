"""Reading a command line: options may stand before, after and between what has no name."""

import argparse
import difflib
import re
from typing import Any, NoReturn

from train.errors import one_line

USAGE_ERROR = 2


class Parser(argparse.ArgumentParser):
    """argparse's parser for `nha` and each of its commands.

    It takes `--key value` wherever it stands, a value that begins with one dash, and `--`, after
    which nothing is an option. Numbers are written in ASCII. Every mistake is one line.
    """

    def __init__(self, *arguments: Any, takes_overrides: bool = False, **options: Any):
        """Makes a parser.

        Args:
            takes_overrides: whether options that nobody added are keys of a configuration, each
                with a value; `parse_known_args` returns them as `--key=value`.
            arguments, options: argparse's.
        """
        super().__init__(*arguments, **(options | {"allow_abbrev": False}))
        self._takes_overrides = takes_overrides
        self.register("type", int, _integer)
        self.register("type", float, _number)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._subparsers is not None:  # the rest is the business of a command
            first = args[0] if args else ""
            if first.startswith("-") and first not in self._option_string_actions:
                self.error(f"{first}: options follow the command, which is missing before it")
            return super().parse_known_args(args, namespace)
        options, others, overrides = self._sort(list(args))
        taken = [override for override in overrides if override not in args]  # --key value
        if taken and not others and not {"-h", "--help"} & {*options}:
            name, _, value = taken[-1].partition("=")
            self.error(f"CONFIG is missing; {name} took {value!r} as its value")
        found, extra = super().parse_known_args([*options, "--", *others], namespace)
        return found, [*overrides, *extra]

    def _sort(self, arguments: list[str]) -> tuple[list[str], list[str], list[str]]:
        """Divides arguments into options, what has no name, and keys of a configuration."""
        options: list[str] = []
        others: list[str] = []
        overrides: list[str] = []
        while arguments:
            argument = arguments.pop(0)
            if argument == "--":
                return options, [*others, *arguments], overrides
            if not argument.startswith("-") or argument == "-":
                others.append(argument)
                continue
            name, equals, value = argument.partition("=")
            action = self._option_string_actions.get(name)
            if action is None and not (self._takes_overrides and name.startswith("--")):
                self.error(f"{argument}: there is no such option{self._suggestion(name)}")
            if action is not None and action.nargs == 0:
                if equals:
                    self.error(f"{argument}: {name} takes no value")
                options.append(name)
                continue
            if not equals:
                if not arguments or self._is_option(arguments[0]):
                    if action is None:
                        overrides.append(name)  # whoever reads the keys says so
                        continue
                    self.error(f"{name}: the value is missing; write {name}=VALUE")
                value = arguments.pop(0)
            (overrides if action is None else options).append(f"{name}={value}")
        return options, others, overrides

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if action.option_strings and arg_strings == ["--"]:  # argparse would drop it: --stop=--
            return self._get_value(action, "--")
        return super()._get_values(action, arg_strings)

    def _is_option(self, argument: str) -> bool:
        return argument.startswith("--") or argument in self._option_string_actions

    def _suggestion(self, name: str) -> str:
        close = difflib.get_close_matches(name, self._option_string_actions, n=1)
        return f"; did you mean {close[0]}?" if close else ""

    def error(self, message: str) -> NoReturn:
        """Prints the mistake as one line, and exits."""
        line = re.sub(r"^argument (?=[-A-Z])", "", message)
        self.exit(USAGE_ERROR, f"nha: {one_line(line)} (see {self.prog} --help)\n")


def _integer(text: str) -> int:
    # int() also takes digits of any script, spaces, and as many digits as there is patience for.
    fits = re.fullmatch("[-+]?[0-9]+(_[0-9]+)*", text) and len(text) <= 40
    if not fits or not -(2**63) <= int(text) < 2**63:
        beyond = " below 2**63" if fits else ""
        raise argparse.ArgumentTypeError(f"expected an integer{beyond}, got {text[:60]!r}")
    return int(text)


def _number(text: str) -> float:
    try:
        if text.isascii() and text == text.strip():
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a number, got {text[:60]!r}")
