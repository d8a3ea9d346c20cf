"""`nha doctor`: what this machine has for training, and why what it lacks is missing."""

import argparse
import json
from collections.abc import Sequence

_EXAMPLES = """\
examples:
  nha doctor
  nha doctor gs://bucket/runs
  nha doctor --json"""


def add_parser(commands: "argparse._SubParsersAction") -> None:
    parser = commands.add_parser(
        "doctor",
        help="say what this machine has for training: devices, versions, kernels, disk, stores",
        usage="nha doctor [PLACE ...] [options]",
        description="Looks at versions, devices, kernels, extras, disk and clock, and tries to "
        "write to each PLACE, a folder on a disk or in an object store. A line that begins with ! "
        "says what keeps training from running, and the exit code is then 1; * marks what is worth "
        "knowing.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("places", metavar="PLACE", nargs="*", help="a folder to try to write to")
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from train.doctor import as_values, examine

    findings = []
    for finding in examine(options.places):
        findings.append(finding)
        if not options.json:
            print(finding, flush=True)
    if options.json:
        print(json.dumps(as_values(findings), indent=2))
    return int(any(finding.state == "wrong" for finding in findings))
