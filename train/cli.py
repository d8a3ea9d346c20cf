"""The `nha` command."""

import argparse
import dataclasses
import json
import sys
import textwrap
from collections.abc import Sequence
from importlib.metadata import version

from train.errors import ConfigError, UserError

# Everything that imports jax is imported by the command that needs it: help comes at once.


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code.

    0 done, 1 training failed, 2 wrong input, 130 and 143 stopped by Ctrl-C and SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser, train_parser = _parsers()
    if arguments[:1] == ["train"] and {"-h", "--help"} & set(arguments):
        train_parser.epilog = _config_help()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command != "train":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return _train(options, rest) if options.command == "train" else _generate(options)
    except UserError as error:
        print(f"nha: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("nha: interrupted; the same command starts again where it was", file=sys.stderr)
        return 130


def _train(options: argparse.Namespace, rest: Sequence[str]) -> int:
    overrides = parse_overrides(rest)

    from train.config_loader import load_config

    config = load_config(options.config, overrides)

    from train.loop import train

    return train(config)


def _generate(options: argparse.Namespace) -> int:
    from train.text import complete, load_model

    try:
        text = complete(
            load_model(options.run),
            options.prompt,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    print(options.prompt + text)
    return 0


def parse_overrides(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """`--a.b=v` and `--a.b v` as (`a.b`, `v`) pairs.

    Raises:
        ConfigError: something is no `--key`, or has no value.
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


def _parsers() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """The whole parser, and that of `nha train`."""
    parser = argparse.ArgumentParser(
        prog="nha",
        description="Train and run language models with Native Hybrid Attention.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"nha {version('nha_jax')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train a model as a YAML file says; the same command resumes",
        usage="nha train CONFIG [--key=value ...]",
        description="Trains a model. Stopped in any way, the same command resumes the run.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    train.add_argument("config", metavar="CONFIG", help="a YAML file, e.g. configs/quickstart.yaml")

    generate = commands.add_parser(
        "generate",
        help="let a trained model continue a text",
        description="Prints the prompt and what the model writes after it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    generate.add_argument("run", metavar="RUN", help="a run's folder or a saved model's")
    generate.add_argument("--prompt", required=True, help="text to continue")
    generate.add_argument("--max-new-tokens", type=int, default=256, help="bytes to write at most")
    generate.add_argument(
        "--temperature", type=float, default=0.8, help="0: always the likeliest byte"
    )
    generate.add_argument("--top-k", type=int, help="draw from the k likeliest bytes only")
    generate.add_argument("--top-p", type=float, help="draw from the likeliest of this total")
    generate.add_argument("--seed", type=int, default=0, help="of the random numbers")
    return parser, train


def _config_help() -> str:
    """Every configuration key with its type, default and meaning."""
    from train.config_loader import describe, keys

    lines = ["Keys of CONFIG, and --key=value to replace them (the value is read as YAML):"]
    for key in keys():
        if key.is_section:
            lines += ["", f"{key.name}:"]
            continue
        required = key.default is dataclasses.MISSING
        default = "required" if required else f"default {json.dumps(key.default)}"
        lines.append(f"  --{key.name}  ({describe(key.annotation)}; {default})")
        lines.append(textwrap.fill(key.help, 96, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return "\n".join(lines)
