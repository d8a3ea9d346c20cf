"""Prints what ptxas makes of the operator's kernels for Hopper, with no GPU: nothing is measured.

uv run --extra cuda python benchmarks/gpu_static.py    # a minute a shape

HBM / minimum: the bytes that the operations of the compiled forward (and, second, of forward and
backward) read and write, rotation and gates included and each array counted once for each
operation, over the bytes that they must: query, key, value, log_decay and output once, and backward
also the gradients.
"""

import argparse
import itertools

from static.programs import Shape
from static.ptxas import compile_in_subprocess

HEADINGS = "shape | kernel | registers | spills, bytes | shared memory, KB | HBM / minimum"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--heads", nargs="+", type=int, default=[64, 128, 256], metavar="K", help="K=V"
    )
    parser.add_argument("--slots", nargs="+", type=int, default=[16, 64, 128], metavar="M")
    parser.add_argument("--groups", nargs="+", type=int, default=[1, 4], metavar="G")
    parser.add_argument("--segments", action="store_true", help="packed documents")
    arguments = parser.parse_args()
    print(f"| {HEADINGS} |")
    print("|" + " --- |" * len(HEADINGS.split(" | ")))
    for K, M, G in itertools.product(arguments.heads, arguments.slots, arguments.groups):
        shape = Shape(B=8, T=4096, K=K, M=M, G=G, segments=arguments.segments)
        figures = compile_in_subprocess(shape)
        moved = [
            f"{figures[x]['bytes'] / figures[x]['minimum_bytes']:.2f}" for x in ("forward", "both")
        ]
        for name, kernel in figures["kernels"].items():
            cells = [f"K={K} M={M} G={G}", f"`{name}`", kernel["registers"]]
            cells += [kernel["spills"], f"{kernel['shared_memory'] / 1024:.0f}"]
            cells.append(", ".join(moved))
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
