"""A process that times one framework's contenders, and the other end of its pipe.

JAX and PyTorch each bring their own allocator and libraries: in one process they would fight over
memory, and a crash of one would take the other's results along. A line of JSON asks, a line
answers; what else a worker prints goes to stderr.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

Pass = Literal["forward", "forward + backward"]
QUEUE = 0.05  # seconds of work that a turn queues, so that launches do not count


@dataclasses.dataclass(frozen=True)
class Shape:
    """B batch, T tokens, Hq query and Hkv key/value heads, K = V head dims, M slots, W window."""

    B: int
    T: int
    Hq: int
    Hkv: int
    K: int
    M: int = 64
    W: int = 64

    @property
    def input_bytes(self) -> int:
        """Of bfloat16 query, key and value, and float32 log decays."""
        return self.B * self.T * (2 * self.K * (self.Hq + 2 * self.Hkv) + 4 * self.M * self.Hkv)

    @property
    def minimum_bytes(self) -> int:
        """Of a forward: every input read once, the output written once."""
        return self.input_bytes + 2 * self.B * self.T * self.Hq * self.K

    def __str__(self) -> str:
        return f"{self.Hq}/{self.Hkv} heads of {self.K}, T={self.T}"


class Framework(Protocol):
    """What a worker is made of."""

    def facts(self) -> dict[str, Any]:
        """Versions, the device's name, and its measured copy bandwidth in bytes a second."""

    def prepare(self, shape: Shape, direction: Pass) -> dict[str, Callable[[int], float] | str]:
        """By contender: a function that makes so many calls, each of the next inputs, and returns
        their seconds; or why there is none, in a line.
        """

    def kernels(self, contender: str) -> list[tuple[str, float]]:
        """Of one call of what was prepared, in turn: each kernel's name and its seconds."""


def serve(framework: Framework) -> None:
    """Answers until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    ready: dict[str, Callable[[int], float]] = {}
    calls: dict[str, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        match request["do"]:
            case "facts":
                answer = framework.facts()
            case "prepare":
                ready.clear()  # frees what the last ones held
                found = framework.prepare(Shape(**request["shape"]), request["pass"])
                ready |= {name: x for name, x in found.items() if not isinstance(x, str)}
                calls |= {name: _calls_of_a_turn(x) for name, x in ready.items()}
                answer = {name: x if isinstance(x, str) else "" for name, x in found.items()}
            case "time":
                name = request["contender"]
                answer = {"seconds": ready[name](calls[name]) / calls[name]}
            case "kernels":
                try:
                    answer = {"kernels": framework.kernels(request["contender"])}
                except Exception as error:  # the times are worth having without
                    answer = {"kernels": [(f"{type(error).__name__}: {error}", None)]}
            case unknown:
                raise ValueError(f"no request {unknown!r}")
        print(json.dumps(answer), file=answers, flush=True)


def _calls_of_a_turn(timed: Callable[[int], float]) -> int:
    timed(1)  # warm: what is compiled or tuned at the first call
    return max(1, min(200, round(QUEUE / max(timed(2) / 2, 1e-6))))


class Worker:
    """A process of `python -m MODULE`, asked for its contenders' times."""

    def __init__(self, module: str, environment: dict[str, str], *arguments: str):
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env=os.environ | environment,
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Raises RuntimeError, with the end of its stderr, if the process is gone."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._process.wait()
            self._errors.seek(0)
            lines = self._errors.read().strip().splitlines()
            raise RuntimeError(lines[-1][:300] if lines else "it ended without a word")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def medians(
    workers: dict[str, Worker], contenders: dict[str, str], rounds: int
) -> dict[str, float | str]:
    """Median seconds of a call by contender, in turns; or why there are none, in a line.

    contenders: name -> its worker's.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    failed: dict[str, float | str] = {}
    for _ in range(rounds):
        for name, worker in contenders.items():
            if name in failed:
                continue
            try:
                times[name].append(workers[worker].ask(do="time", contender=name)["seconds"])
            except RuntimeError as error:
                failed[name] = str(error)
    return {name: statistics.median(x) for name, x in times.items() if name not in failed} | failed
