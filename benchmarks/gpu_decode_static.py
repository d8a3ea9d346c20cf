"""Prints what ptxas makes of the decode kernel for Hopper, with no GPU: nothing is measured.

uv run --extra cuda python benchmarks/gpu_decode_static.py    # about a quarter of a minute a row

Each row is a program of one decode step with its state donated or, as `generate` has it, of a loop
of steps. Its columns, beside registers, spills and shared memory:

  minimum    bytes that a step must move: slots read and written, rotated keys and values read, one
             entry of each ring; also the microseconds that an H100's HBM takes for them. The kernel
             moves no more
  copied     bytes of the state that XLA copies beside the kernel
  temporary  bytes of HBM beyond the arguments
"""

import argparse
import itertools

from static.decoding import DecodeJob
from static.gpu_decoding import compile_in_subprocess

from train.plan.gpus import GPUS

BANDWIDTH = GPUS["H100"].memory_bandwidth
HEADINGS = (
    "B | Hkv | K | M | G | W | program | registers | spills, bytes | shared memory, KB "
    "| minimum, MB | us of HBM | copied, MB | temporary, MB"
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 64], metavar="B")
    parser.add_argument("--windows", nargs="+", type=int, default=[64, 1024], metavar="W")
    parser.add_argument("--groups", nargs="+", type=int, default=[1, 4], metavar="G")
    arguments = parser.parse_args()
    print(f"| {HEADINGS} |")
    print("|" + " --- |" * len(HEADINGS.split(" | ")))
    shapes = [{"H": 4, "K": 256, "W": 32, "B": 64}, {"M": 128, "G": 8, "B": 64}]
    shapes += [
        {"B": B, "G": G, "W": W}
        for B, G, W in itertools.product(arguments.batch_sizes, arguments.groups, arguments.windows)
    ]
    for shape, loop in itertools.product(shapes, (False, True)):
        print(row(DecodeJob("H100", kernel=True, loop=loop, **shape)), flush=True)


def row(job: DecodeJob) -> str:
    figures = compile_in_subprocess(job)
    (kernel,) = figures["kernels"].values()
    cells = [
        *(job.B, job.H, job.K, job.M, job.G, job.W),
        "loop" if job.loop else "one step",
        kernel["registers"],
        kernel["spills"],
        f"{kernel['shared_memory'] / 1024:.0f}",
        f"{figures['minimum_bytes'] / 1e6:.1f}",
        f"{figures['minimum_bytes'] / BANDWIDTH * 1e6:.1f}",
        f"{figures['state_copies'] / 1e6:.1f}",
        f"{figures['temporary_bytes'] / 1e6:.1f}",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    main()
