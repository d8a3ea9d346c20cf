"""`nha inspect`: what a model's slots do on a text."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.errors import MACHINE_ERRORS, ConfigError, do_without
from train.paths import MAX_NAME_BYTES, user_path
from train.storage.run_in_store import local_run, results_folder

_DESCRIPTION = """\
Reads a text and shows the slot weight omega, which is the softmax's mass on the slots, by layer,
head and position, and how long the slots remember (their half-lives). Prints a table, and writes a
picture and, beside it, a .json with all numbers, whose keys class Inspection in
train/inspect/measure.py explains."""


def add_parser(commands: "argparse._SubParsersAction") -> None:
    parser = commands.add_parser(
        "inspect",
        help="show how much a model reads from its slots, and how long they remember",
        usage="nha inspect RUN --text FILE [options]",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run or of a saved model")
    parser.add_argument("--text", required=True, metavar="FILE", help="the text to read")
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=4096,
        metavar="N",
        help="read N tokens at most (default: 4096)",
    )
    parser.add_argument(
        "--context",
        type=int,
        default=4096,
        metavar="N",
        help="start anew, with empty slots, after every N tokens; memory grows with N, not with "
        "the text (default: 4096)",
    )
    parser.add_argument(
        "--windows",
        metavar="WINDOWS",
        help="other windows than the model's, e.g. 32,32,none, or a result of nha search",
    )
    parser.add_argument(
        "--output",
        metavar="FILE.png",
        help="the picture to write (default: inspect-NAME.png in RUN, after the text's name)",
    )


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    for name in ("max_tokens", "context"):
        value, flag = getattr(options, name), name.replace("_", "-")
        if value < 1:
            raise ConfigError(f"--{flag} = {value}: must be at least 1")
        if value >= 2**31:
            raise ConfigError(f"--{flag} = {value}: must be below 2**31")
    named, text = local_run(options.run, "RUN"), user_path(options.text, "--text")
    picture = _output_path(options, results_folder(options.run, named), text)

    from train.inspect.figure import draw
    from train.inspect.measure import format_table, inspect
    from train.storage.atomic import write_atomically
    from train.text.loading import load_model, load_tokenizer_of
    from train.text.user_texts import read_tokens
    from train.windows import read_windows

    tokens = read_tokens(options.text, load_tokenizer_of(named), options.max_tokens)
    model = load_model(named).with_implementation(None)  # the fastest that serves
    if options.windows is not None:
        windows = read_windows(options.windows, "--windows")
        try:
            model = model.with_windows(windows)
        except ValueError as error:
            raise ConfigError(f"--windows = {options.windows!r}: {error}") from None
    if not model.config.num_slots:
        raise ConfigError(f"{options.run}: a model without slots (num_slots = 0): nothing to show")
    if tokens.max() >= model.config.vocab_size:
        raise ConfigError(
            f"{options.run}: its vocabulary of {model.config.vocab_size} tokens has not all "
            "of the text's"
        )
    inspection = inspect(model, tokens, options.context)
    title = f"{named.resolve().name} reading {text.name}, {inspection.tokens} tokens"
    numbers = picture.with_suffix(".json")
    print(title)
    print(format_table(inspection), flush=True)
    try:
        write_atomically(numbers, inspection.to_json(run=options.run, text=options.text))
    except OSError as error:
        if error.errno in MACHINE_ERRORS:
            raise
        raise ConfigError(
            f"{picture.parent}: cannot write there: {error.strerror}; give --output"
        ) from None
    with do_without(str(picture)):
        write_atomically(picture, draw(inspection, title))
        print(picture)
    print(numbers)
    return 0


def _output_path(options: argparse.Namespace, run: Path, text: Path) -> Path:
    """Decides where the picture goes.

    Raises:
        ConfigError: its name does not end in .png, or its folder does not exist.
    """
    if options.output is None:
        name = os.fsencode(f"inspect-{text.stem}")[: MAX_NAME_BYTES - len(".json")]
        return run / (os.fsdecode(name) + ".png")
    path = user_path(options.output, "--output")
    if path.suffix != ".png":
        raise ConfigError(f"--output = {options.output!r}: must end in .png")
    if not path.parent.is_dir():
        raise ConfigError(f"--output = {options.output!r}: there is no folder {path.parent}")
    numbers = path.with_suffix(".json")
    for file in (path, numbers):
        if file.exists() and not _is_ours(numbers):
            raise ConfigError(f"--output = {options.output!r}: {file} exists, and is no inspection")
    return path


def _is_ours(numbers: Path) -> bool:
    """Whether a file holds the numbers of an inspection, which the next one may replace."""
    from train.storage.small_json import parse

    try:
        return "layers" in parse(numbers.read_bytes(), dict[str, Any])
    except (OSError, ValueError):
        return False
