"""Times the operator's kernels on a GPU against plain XLA, cuDNN and the Triton of others.

python benchmarks/operator_gpu.py --seconds 300 --json operator_gpu.json
python benchmarks/operator_gpu.py --toy     # no GPU: the script itself, at toy size

65536 tokens of random bfloat16 a call, without rotation, M = W = 64. All contenders take turns, in
two processes (JAX's, PyTorch's); a turn queues calls for about 50 ms, on inputs that rotate through
four times the L2 cache; medians of the rounds. JAX's turns are timed by the host's clock around the
whole queue, PyTorch's by CUDA events around it. "bound" is the time in which the device's memory
can read every input and write the output once. Rows are printed as they come.

PyTorch's contenders need torch and flash-linear-attention; without them the rest still runs.
"""

import argparse
import dataclasses
import datetime
import json
import time
from pathlib import Path
from typing import Any, get_args

from contest.worker import Pass, Shape, Worker, medians

TOKENS = 65536
JAX, TORCH = "jax", "torch"
OURS, FULL, PEER = "ours", "full attention, cuDNN", "chunk_gsa + window"
CONTENDERS = {OURS: JAX, "xla": JAX, FULL: JAX, "chunk_gsa": TORCH, PEER: TORCH}

# The most telling first: what the seconds do not reach is left out, by name.
SHAPES = [
    Shape(B=TOKENS // T, T=T, Hq=16, Hkv=Hkv, K=K)
    for K, Hkv in ((128, 16), (64, 16), (128, 4), (64, 4))
    for T in (8192, 2048, 32768)
]
TOY = [Shape(B=1, T=128, Hq=2, Hkv=1, K=64, M=16)]
TOY_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "NPROC": "16"}  # threads of the GPU's interpreter
ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # there are two processes

AT_LEAST = {"forward": 3.0, "forward + backward": 2.0}  # times faster than PEER
SHARE_OF_BOUND = 0.5  # of a forward
BEATS_FULL_FROM = 4096  # tokens, forward and backward


@dataclasses.dataclass
class Row:
    """A shape and pass: seconds by contender, or why there are none."""

    shape: Shape
    direction: Pass
    seconds: dict[str, float | str]
    bound: float | None  # of a forward, seconds
    kernels: list[tuple[str, float]]  # ours, in turn, and their seconds; only if asked for

    def targets(self) -> dict[str, str]:
        """By target, how far it is met, in words."""
        found = {f"{AT_LEAST[self.direction]:g}x {PEER}": self._faster(PEER, self.direction)}
        ours = self.seconds[OURS]
        if self.direction == "forward":
            verdict = "not timed"
            if self.bound is not None and isinstance(ours, float):
                share = self.bound / ours
                verdict = f"{_met(share >= SHARE_OF_BOUND)} ({share:.2f})"
            found[f"{SHARE_OF_BOUND:g} of the bound"] = verdict
        elif self.shape.T >= BEATS_FULL_FROM:
            found["faster than cuDNN"] = self._faster(FULL, None)
        return found

    def _faster(self, other: str, direction: Pass | None) -> str:
        ours, theirs = self.seconds[OURS], self.seconds[other]
        if isinstance(ours, str) or isinstance(theirs, str):
            return "not timed"
        least = 1.0 if direction is None else AT_LEAST[direction]
        return f"{_met(theirs / ours >= least)} ({theirs / ours:.2f}x)"

    def cells(self) -> list[str]:
        milliseconds = [
            "-" if isinstance(x, str) else f"{1e3 * x:.3f}"
            for x in map(self.seconds.get, CONTENDERS)
        ]
        bound = "-" if self.bound is None else f"{1e3 * self.bound:.3f}"
        targets = "; ".join(f"{name}: {verdict}" for name, verdict in self.targets().items())
        return [str(self.shape), self.direction, *milliseconds, bound, targets]


def main() -> None:
    arguments = _arguments()
    begin = time.monotonic()
    toy = ["toy"] if arguments.toy else []
    environment = TOY_ENVIRONMENT if arguments.toy else ENVIRONMENT
    started = {
        JAX: Worker("contest.with_jax", environment, *toy),
        TORCH: Worker("contest.with_torch", environment),
    }
    workers, facts = {}, {"date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")}
    for name, worker in started.items():
        try:
            facts |= worker.ask(do="facts")
            workers[name] = worker
        except RuntimeError as error:
            print(f"without {name}'s contenders: {error}\n")
    if JAX not in workers:
        raise SystemExit("nothing of ours can be timed")
    for name, fact in facts.items():
        print(f"- {name}: {f'{fact / 1e12:.2f} TB/s' if name == 'copy_bandwidth' else fact}")
    headings = ["shape", "pass", *(f"{name}, ms" for name in CONTENDERS), "bound, ms", "targets"]
    print(f"\n| {' | '.join(headings)} |\n|{' --- |' * len(headings)}", flush=True)

    rows: list[Row] = []
    left_out: list[str] = []
    for shape in TOY if arguments.toy else SHAPES:
        if time.monotonic() - begin > arguments.seconds:
            left_out.append(str(shape))
            continue
        for direction in get_args(Pass):
            rows.append(_row(workers, shape, direction, arguments, facts))
            print(f"| {' | '.join(rows[-1].cells())} |", flush=True)
            if arguments.json:
                arguments.json.write_text(_as_json(facts, rows))
    for worker in workers.values():
        worker.close()
    _print_what_is_missing(rows, left_out)
    if isinstance(rows[0].seconds[OURS], str):
        raise SystemExit(1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=1e9, help="after which no shape begins")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    parser.add_argument("--kernels", action="store_true", help="profile ours, for the JSON file")
    parser.add_argument("--toy", action="store_true", help="a small shape, on a CPU")
    return parser.parse_args()


def _row(
    workers: dict[str, Worker],
    shape: Shape,
    direction: Pass,
    arguments: argparse.Namespace,
    facts: dict[str, Any],
) -> Row:
    seconds: dict[str, float | str] = dict.fromkeys(CONTENDERS, "its framework is missing")
    for worker in workers.values():
        request = {"shape": dataclasses.asdict(shape), "pass": direction}
        try:
            seconds |= worker.ask(do="prepare", **request)
        except RuntimeError as error:
            seconds |= {
                name: str(error) for name, of in CONTENDERS.items() if workers.get(of) is worker
            }
    ready = {name: of for name, of in CONTENDERS.items() if seconds[name] == ""}
    seconds |= medians(workers, ready, arguments.rounds)
    kernels = []
    if arguments.kernels and isinstance(seconds[OURS], float):
        kernels = workers[JAX].ask(do="kernels", contender=OURS)["kernels"]
    bandwidth = facts.get("memory_bandwidth")
    bound = shape.minimum_bytes / bandwidth if bandwidth and direction == "forward" else None
    return Row(shape, direction, seconds, bound, kernels)


def _met(met: bool) -> str:
    return "met" if met else "missed"


def _as_json(facts: dict[str, Any], rows: list[Row]) -> str:
    figures = [dataclasses.asdict(row) | {"targets": row.targets()} for row in rows]
    return json.dumps({"facts": facts, "rows": figures}, indent=2)


def _print_what_is_missing(rows: list[Row], left_out: list[str]) -> None:
    whys: dict[str, list[str]] = {}
    for row in rows:
        for name, x in row.seconds.items():
            if isinstance(x, str):
                whys.setdefault(f"{name}: {x}", []).append(f"{row.shape}, {row.direction}")
    print()
    for why, where in whys.items():
        print(f"- {why} ({len(where)} of {len(rows)} rows)")
    if left_out:
        print(f"- out of time before: {'; '.join(left_out)}")


if __name__ == "__main__":
    main()
