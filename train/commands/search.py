"""`nha search`: the layers at which wider windows pay."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from train.errors import ConfigError, explain_refusal

_DESCRIPTION = """\
Finds the layers at which wider windows or full attention lower the loss most, within a budget. The
parameters of the model stay as they are.

The search starts from the base. Each round tries every wider window at every layer that fits the
budget, and keeps the windows with the lowest held-out loss. The search ends when nothing more fits
or nothing lowers the loss. WINDOWS are one number for all layers (32), none for full attention,
several (32,32,none), or a file that this command wrote. If the command is stopped in any way, the
same command goes on: every loss is kept, and serves other budgets too."""


def add_parser(commands: "argparse._SubParsersAction") -> None:
    parser = commands.add_parser(
        "search",
        help="find the layers of a trained model at which wider windows lower the loss most",
        usage="nha search RUN (--full-layers K | --cache-bytes N) [options]",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run or of a saved model")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument(
        "--full-layers",
        type=int,
        metavar="K",
        help="how many more layers than in the base may have full attention",
    )
    budget.add_argument(
        "--cache-bytes",
        type=float,
        metavar="N",
        help="how many bytes of cache all layers may need per token of context: keys and values, "
        "and with finite windows also keys before rotation and decays",
    )
    parser.add_argument(
        "--context",
        type=int,
        metavar="T",
        help="tokens of context for which --cache-bytes counts (default: --sequence-length)",
    )
    parser.add_argument(
        "--base",
        metavar="WINDOWS",
        help="the windows to start from (default: the model's own, but its narrowest finite window "
        "at every layer that has full attention)",
    )
    parser.add_argument(
        "--candidates",
        metavar="WINDOWS",
        default="none",
        help="windows that a layer may get, e.g. none,256; with --full-layers only none "
        "(default: none)",
    )
    parser.add_argument(
        "--beam",
        type=int,
        default=1,
        metavar="B",
        help="how many of the best trials each round goes on from (default: 1)",
    )
    parser.add_argument(
        "--corpus", help="corpus whose held-out text to measure on (default: the run's own)"
    )
    parser.add_argument(
        "--sequence-length",
        type=int,
        metavar="T",
        help="tokens of a sequence, read from an empty state (default: the run's own)",
    )
    parser.add_argument(
        "--sequences",
        type=int,
        metavar="N",
        help="how many sequences to measure on, evenly spread over the held-out text (default: the "
        "run's evaluation.final_sequences)",
    )
    parser.add_argument(
        "--windows-count",
        action=_OldNameOfSequences,
        dest="sequences",
        type=int,
        help=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="the result's file, .json; losses (.jsonl) and a plot (.png) go beside it (default: "
        "search.json in the run's folder, or beside the saved model's)",
    )


class _OldNameOfSequences(argparse.Action):
    """Takes the old name of --sequences, with a warning."""

    def __call__(self, parser, namespace, values, option_string=None):
        print(
            f"nha: {option_string} is now called --sequences; the old name still works",
            file=sys.stderr,
        )
        setattr(namespace, self.dest, values)


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from nha_jax.storage.stores import is_in_store
    from train.search.run import SearchOptions, run_search
    from train.storage.run_in_store import local_run

    named = options.run
    options.run = str(local_run(named, "RUN"))
    if options.output is None and is_in_store(named):
        options.output = "search.json"
    fields = [field.name for field in dataclasses.fields(SearchOptions)]
    try:
        with explain_refusal():
            return run_search(SearchOptions(**{name: getattr(options, name) for name in fields}))
    except ValueError as error:
        line = " ".join(str(error).split())
        named = next((name for name in fields if line.startswith(f"{name} = ")), "")
        option = f"--{named.replace('_', '-')}" if named else ""
        raise ConfigError(option + line.removeprefix(named)) from None
