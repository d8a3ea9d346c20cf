"""`nha status`: where a run is, on one page."""

import argparse
import time
from collections.abc import Sequence

from train.errors import ConfigError

_EXAMPLES = """\
examples:
  nha status runs/340m
  nha status gs://bucket/runs/340m --watch 60
  nha status runs/340m --json"""


def add_parser(commands: "argparse._SubParsersAction") -> None:
    parser = commands.add_parser(
        "status",
        help="say where a run is: step, loss, rate, time left, last checkpoint, warnings",
        usage="nha status RUN [options]",
        description="Reads a run's folder, on a disk or in an object store, also while it is "
        "trained, and prints one page. It takes no accelerator and disturbs nothing.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")
    parser.add_argument(
        "--watch", type=float, metavar="SECONDS", help="print it again and again, so often"
    )


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from train.report.status import read_status

    if options.watch is not None and not 0 < options.watch < 1e6:
        raise ConfigError(f"--watch = {options.watch}: expected a number of seconds above 0")
    while True:
        status = read_status(options.run)
        print(status.to_json() if options.json else status, flush=True)
        if options.watch is None:
            return 0
        time.sleep(options.watch)
        print()
