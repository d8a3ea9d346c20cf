"""`nha generate`."""

import argparse
from collections.abc import Sequence

from train.errors import ConfigError


def add_parser(commands: "argparse._SubParsersAction") -> None:
    parser = commands.add_parser(
        "generate",
        help="let a trained model continue a text",
        description="Prints the prompt and what the model writes after it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="a run's folder or a saved model's")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="bytes to write at most")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0: always the likeliest byte"
    )
    parser.add_argument("--top-k", type=int, help="draw from the k likeliest bytes only")
    parser.add_argument("--top-p", type=float, help="draw from the likeliest of this total")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers")


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
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
