"""`nha train`: a run of training, and the reading of its options."""

import argparse
import dataclasses
import json
import re
import textwrap
from collections.abc import Sequence

from train.errors import ConfigError


def add_parser(commands: "argparse._SubParsersAction") -> None:
    parser = commands.add_parser(
        "train",
        help="train a model as a YAML file says; the same command resumes",
        usage="nha train CONFIG [--key=value ...]",
        description="Trains a model. If the command is stopped in any way, the same command "
        "resumes the run.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        takes_overrides=True,
        add_help=False,
    )
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="a YAML file, or the name of one that comes with it, e.g. quickstart",
    )
    parser.add_argument("-h", "--help", action=_ConfigHelp, help="show this help and exit")


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    overrides = parse_overrides(rest)

    from train.load_config import load_config

    config = load_config(options.config, overrides)

    from train.loop.train import train

    return train(config)


class _ConfigHelp(argparse.Action):
    """Prints the help with every configuration key; only then is it looked up."""

    def __init__(self, option_strings, dest, help):
        super().__init__(option_strings, dest=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        parser.epilog = _config_help()
        parser.print_help()
        parser.exit()


def parse_overrides(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Reads `--a.b=v` and `--a.b v` as pairs (`a.b`, `v`).

    Raises:
        ConfigError: an argument is no `--key`, or has no value.
    """
    pairs = []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if not argument.startswith("--"):
            raise ConfigError(f"{argument}: expected --key=value or --key value")
        name, equals, value = argument[2:].partition("=")
        if not equals:
            if not remaining or remaining[0].startswith("--"):
                raise ConfigError(f"--{name}: the value is missing; write --{name}=value")
            value = remaining.pop(0)
        pairs.append((name, value))
    return pairs


def _config_help() -> str:
    """Lists every key of the configuration with its type, default and meaning."""
    from train.config_keys import describe, keys

    lines = [
        "Keys of CONFIG. --key=value replaces the one in the file; the value is read as YAML.",
        "model.window_size may also name a .json file that `nha search` wrote.",
        "",
    ]
    for key in keys():
        help_text = re.sub(r"\bNone\b", "null", key.help)  # docstrings speak Python, files YAML
        if key.is_section:
            lines += ["", *textwrap.wrap(f"{key.name}: {help_text}", 96)]
            continue
        required = key.default is dataclasses.MISSING
        default = "required" if required else f"default {json.dumps(key.default)}"
        lines.append(f"  --{key.name}  ({describe(key.annotation)}; {default})")
        lines.append(
            textwrap.fill(help_text, 96, initial_indent=" " * 6, subsequent_indent=" " * 6)
        )
    return "\n".join(lines)
