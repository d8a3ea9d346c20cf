"""What a step of generation costs on TPUs by its compiled schedule: nothing is measured.

Compares `decode_step` as one Pallas kernel and in XLA, with its state donated, with the time that
the bytes take which it must move: slots read and written, rotated keys and values read, and one
entry of each ring read and written.

    uv run --extra tpu python benchmarks/tpu_decode_static.py
    uv run --extra tpu python benchmarks/tpu_decode_static.py --chips v5e --windows 64 --groups 1

B=64, M=64, bfloat16. Layouts are 8 key/value heads of K=V=128, and first, with W=32, the published
340M model's 4 heads of 256. `one step` is a program of its own, which takes and gives the state in
XLA's default layouts; `loop` is many steps in one program, as `generate` has them. `cycles` are of
one core: XLA's estimates and, for the kernel, the largest of its bundles, its matrix units' time
and its HBM traffic. That a kernel's transfers and XLA's may overlap is not counted.
"""

import argparse
import itertools

from static.chips import CHIPS
from static.decoding import DecodeJob, compile_decode


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=["v5e", "v6e"])
    parser.add_argument("--windows", nargs="+", type=int, default=[64, 1024], metavar="W")
    parser.add_argument("--groups", nargs="+", type=int, default=[1, 4], metavar="G")
    arguments = parser.parse_args()
    print("### Decode step: static schedule, not measured\n")
    print(
        "| chip | Hkv | K | G | W | program | decode_step | cycles | bound | cycles / bound "
        "| kernel bundles | temporary, MB |"
    )
    print("|" + " --- |" * 12)
    layouts = [{"H": 4, "K": 256, "W": 32}]
    layouts += [{"G": G, "W": W} for G in arguments.groups for W in arguments.windows]
    for chip, layout in itertools.product(arguments.chips, layouts):
        for loop, kernel in itertools.product((False, True), repeat=2):
            print(row(DecodeJob(chip, kernel, loop, **layout)), flush=True)


def row(job: DecodeJob) -> str:
    """The table's row of one program."""
    figures = compile_decode(job)
    cycles, bound, bundles = figures["cycles"], figures["bound"], figures.get("bundles")
    cells = [
        job.chip,
        *map(str, (job.H, job.K, job.G, job.W)),
        "loop" if job.loop else "one step",
        "Pallas" if job.kernel else "XLA",
        f"{cycles:,.0f}",
        f"{bound:,.0f}",
        f"**{cycles / bound:.2f}**",
        "-" if bundles is None else f"{bundles:,.0f}",
        f"{figures['temporary_bytes'] / 1e6:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
