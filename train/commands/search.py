"""`nha search`."""

import argparse
import dataclasses
from collections.abc import Sequence

from train.errors import ConfigError

_DESCRIPTION = """\
Finds the layers at which wider windows or full attention pay, with the parameters as they are.

From the base layout on, each round tries every wider window at every layer within the budget, and
keeps what has the lowest held-out loss; it ends when nothing fits or nothing lowers the loss.
Layouts are 32, none (full attention), 32,32,none or a file that this command wrote. Stopped in any
way, the same command goes on: every loss is kept, and serves other budgets too."""


def add_parser(commands: "argparse._SubParsersAction") -> None:
    parser = commands.add_parser(
        "search",
        help="find the layers of a trained model at which wider windows pay",
        usage="nha search RUN (--full-layers K | --cache-bytes N) [options]",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="a run's folder or a saved model's")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument(
        "--full-layers",
        type=int,
        metavar="K",
        help="the layers that may have full attention beyond those of the base",
    )
    budget.add_argument(
        "--cache-bytes",
        type=float,
        metavar="N",
        help="the bytes of cache of all layers per token of context: keys and values, for finite "
        "windows also keys before rotation and decays",
    )
    parser.add_argument(
        "--context",
        type=int,
        metavar="T",
        help="the tokens of context at which --cache-bytes counts (default: --sequence-length)",
    )
    parser.add_argument(
        "--base",
        metavar="LAYOUT",
        help="where to start (default: the narrowest finite window of the model's layout at every "
        "layer that has full attention, the others as they are)",
    )
    parser.add_argument(
        "--candidates",
        metavar="WINDOWS",
        default="none",
        help="windows that a layer may get, e.g. none,256; with --full-layers none only "
        "(default: none)",
    )
    parser.add_argument(
        "--beam", type=int, default=1, metavar="B", help="layouts kept a round (default: 1)"
    )
    parser.add_argument(
        "--corpus", help="text to measure on, its held-out part (default: the run's own)"
    )
    parser.add_argument(
        "--sequence-length",
        type=int,
        metavar="T",
        help="tokens read at once, from an empty state (default: the run's own)",
    )
    parser.add_argument(
        "--sequences",
        type=int,
        metavar="N",
        help="how many of these to measure, evenly spread over the held-out text (default: the "
        "run's evaluation.final_sequences)",
    )
    parser.add_argument(  # what --sequences was called before
        "--windows-count", dest="sequences", type=int, help=argparse.SUPPRESS
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="the result, .json; the losses (.jsonl) and a plot (.png) go beside it (default: "
        "search.json in the run's folder, or beside the saved model's)",
    )


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from train.search.run import SearchOptions, run_search

    fields = [field.name for field in dataclasses.fields(SearchOptions)]
    try:
        return run_search(SearchOptions(**{name: getattr(options, name) for name in fields}))
    except ValueError as error:
        raise ConfigError(" ".join(str(error).split())) from None
