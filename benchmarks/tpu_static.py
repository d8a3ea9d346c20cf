"""What the TPU kernels cost by their compiled schedules: it needs no TPU and measures nothing.

Compiles for compile-only topologies, forward and forward+backward: `nha_attention` as its Pallas
kernels and as plain XLA, and JAX's splash attention with the window alone (no slots, no rotation).

    uv run --extra tpu python benchmarks/tpu_static.py     # the table of benchmarks/README.md
    uv run --extra tpu python benchmarks/tpu_static.py --kernel-only --chips v5e --shapes G=4
    uv run --extra tpu python benchmarks/tpu_static.py --shapes G=1,W=1024 G=4,K=64 --json out.json

A shape names what differs from B=16,T=4096,H=8,G=1,K=128,M=64,W=64: B batch, T tokens, H key/value
heads, G query heads each, K head dims, M slots, W window. bfloat16, RoPE.

Columns are cycles of one core, for a query token and query head: `cycles` is the largest of
`bundles` (instruction bundles of the grid loop), `MXU` (4 cycles a matmul instruction) and `HBM`
(bytes moved, over the core's share of the bandwidth); VALU, load and store are those units' own
needs. For XLA's operations `cycles` is the compiler's `estimated_cycles`. `HBM / minimum` is the
traffic over that of each array read or written once; `>=` where not every block's traffic is known
before the run.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from static.chips import CHIPS
from static.compiling import Job, compile_in_subprocess
from static.programs import Program, Shape

NAMES = {"pallas": "nha (Pallas)", "xla": "nha (XLA)", "splash": "splash, window only"}
HEADINGS = (
    "chip | shape | program | pass | kernel | cycles | bundles | MXU | HBM | VALU | load | store "
    "| spills / fills | VMEM, MiB | HBM / minimum | compile, s"
)


def parse_shape(text: str) -> Shape:
    """`G=4,W=1024` -> Shape(G=4, W=1024)."""
    try:
        fields = dict(field.split("=") for field in text.split(",") if field)
        return Shape(**{name: int(value) for name, value in fields.items()})
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=["v5e", "v6e"])
    parser.add_argument(
        "--shapes", nargs="+", type=parse_shape, default=[Shape(G=1), Shape(G=4)], metavar="G=1,..."
    )
    parser.add_argument("--segments", action="store_true", help="packed documents, in every shape")
    parser.add_argument("--key-dim", type=int, metavar="K", help="K and V of every shape")
    parser.add_argument("--slots", type=int, metavar="M", help="of every shape")
    parser.add_argument("--window", type=int, metavar="W", help="of every shape")
    parser.add_argument(
        "--passes", nargs="+", choices=("forward", "both"), default=["forward", "both"]
    )
    parser.add_argument("--kernel-only", action="store_true", help="no plain XLA, no splash")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    arguments = parser.parse_args()
    given = {"K": arguments.key_dim, "M": arguments.slots, "W": arguments.window}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if arguments.segments:
        changes["segments"] = True
    arguments.shapes = [dataclasses.replace(shape, **changes) for shape in arguments.shapes]
    return arguments


def shape_name(shape: Shape) -> str:
    """The fields that differ from the default's, and G."""
    changed = {
        field.name: getattr(shape, field.name)
        for field in dataclasses.fields(Shape)
        if field.name == "G" or getattr(shape, field.name) != field.default
    }
    return " ".join(f"{name}={value:d}" for name, value in changed.items())


def table_rows(job: Job, figures: dict[str, Any]) -> list[str]:
    """A row for each kernel, and one for the whole program."""
    head = [job.chip, shape_name(job.shape), NAMES[job.program]]
    head.append("forward+backward" if job.backward else "forward")
    kernels, rest = figures["kernels"], figures["xla_cycles"]
    rows = []
    for kernel in kernels:
        looped = "+" if kernel["inner_loops"] else ""  # an inner loop's body is counted once
        names = ("cycles", "bundles", "mxu", "hbm", "valu", "load", "store")
        cells = [f"{kernel[name]:.2f}" for name in names]
        cells[1] += looped
        spills = f"{kernel['spills']}/{kernel['fills']}"
        rows.append(
            [*head, f"`{kernel['name']}`", *cells, spills, f"{kernel['vmem'] / 2**20:.1f}", "", ""]
        )
    total = sum(kernel["cycles"] for kernel in kernels) + rest
    moved = sum(kernel["bytes"] for kernel in kernels) / figures["minimum_bytes"]
    exact = "" if all(kernel["bytes_exact"] for kernel in kernels) else ">= "
    traffic = f"{exact}{moved:.2f}x" if kernels else "-"
    label = f"all ({rest:.2f} outside the kernels)" if kernels else "all"
    seconds = f"{figures['compile_seconds']:.0f}"
    rows.append([*head, label, f"**{total:.2f}**", *["-"] * 8, traffic, seconds])
    return ["| " + " | ".join(row) + " |" for row in rows]


def main() -> None:
    arguments = parse_arguments()
    programs: list[Program] = ["pallas"] if arguments.kernel_only else ["pallas", "xla", "splash"]
    jobs = [
        Job(chip, program, shape, backward=direction == "both")
        for chip in arguments.chips
        for shape in arguments.shapes
        for program in programs
        for direction in arguments.passes
    ]
    defaults = " ".join(f"{f.name}={f.default:d}" for f in dataclasses.fields(Shape)[:-1])
    print(f"### Static schedule, not measured ({defaults}, bfloat16)\n")
    print(f"| {HEADINGS} |")
    print("|" + " --- |" * len(HEADINGS.split(" | ")))
    results, failed = [], False
    for job in jobs:
        try:
            figures = compile_in_subprocess(job)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            failed = True
            continue
        print("\n".join(table_rows(job, figures)), flush=True)
        results.append(dataclasses.asdict(job) | figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
