"""Compiles one function for one chip in a process of its own, and reads what libtpu leaves.

libtpu takes its dump flags from the environment when it is loaded: hence the process. As a program:
`python -m static.compiling JSON`, with the fields of `Job`; it prints a JSON object in one line.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from static.chips import CHIPS, CYCLES_PER_MATMUL, Chip
from static.programs import Program, Shape

PREFIXES = ("nha_", "splash_")
_MARK = "static schedule: "


@dataclasses.dataclass(frozen=True)
class Job:
    """What to compile."""

    chip: str
    program: Program
    shape: Shape
    backward: bool


def compile_in_subprocess(job: Job) -> dict[str, Any]:
    """`compile_and_read`'s object, from a fresh process; the dumps are removed.

    Raises:
        RuntimeError: it does not compile; the message ends with the compiler's.
    """
    # XLA's estimates stand in the HLO, and dumping all its operations would take minutes.
    return run_worker("static.compiling", dataclasses.asdict(job), dump=job.program != "xla")


def run_worker(module: str, fields: dict[str, Any], *, dump: bool) -> dict[str, Any]:
    """What `python -m module JSON FOLDER` reports, libtpu dumping its schedules to the folder.

    Raises:
        RuntimeError: it fails; the message ends with its last lines.
    """
    with tempfile.TemporaryDirectory() as dumps:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # other processes may be compiling
        }
        if dump:
            flags = f"--xla_jf_dump_to={dumps} --xla_jf_dump_llo_text=true"
            environment["LIBTPU_INIT_ARGS"] = flags
        finished = subprocess.run(
            [sys.executable, "-m", module, json.dumps(fields), dumps],
            env=environment,
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
        )
    for line in finished.stdout.splitlines():
        if line.startswith(_MARK):
            return json.loads(line.removeprefix(_MARK))
    raise RuntimeError(f"{fields}: {finished.stderr[-3000:]}")


def report(figures: dict[str, Any]) -> None:
    """Prints a worker's figures, where `run_worker` finds them."""
    print(_MARK + json.dumps(figures))


def compile_and_read(job: Job, dumps: Path) -> dict[str, Any]:
    """Compiles the job's program; cycles are of one core, for a query token and query head.

    Returns:
        "kernels", a row for each Pallas kernel; "xla_cycles", XLA's estimate for the rest;
        "minimum_bytes"; "temporary_bytes", of HBM; "compile_seconds".
    """
    import jax
    from jax.experimental import topologies

    from static import hlo, llo, programs
    from train.plan.kernels import pallas_calls

    chip = CHIPS[job.chip]
    topology = topologies.get_topology_desc(platform="tpu", topology_name=chip.topology)
    device = jax.sharding.SingleDeviceSharding(topology.devices[0])
    function, arguments = programs.build(job.program, job.shape, job.backward)
    mesh = jax.sharding.Mesh(topology.devices[:1], ("data",))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # the kernels' sizes go by the chip
        calls = pallas_calls(function, *arguments)
        jitted = jax.jit(function, in_shardings=device, out_shardings=device)
        lowered = jitted.lower(*arguments)
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    schedules = llo.read_schedules(dumps, PREFIXES)
    return {
        "kernels": [
            _kernel_row(call, schedule, chip, job.shape.query_tokens)
            for call, schedule in _pair(calls, schedules)
        ],
        "xla_cycles": hlo.estimated_cycles(compiled.as_text()) / job.shape.query_tokens,
        "minimum_bytes": programs.minimum_bytes(job.program, job.shape, job.backward),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "compile_seconds": seconds,
    }


def _pair(calls: list, schedules: dict) -> list[tuple]:
    """Pairs each kernel call with its schedule.

    Calls of equal names are paired in program order; XLA may have merged equal calls.

    Raises ValueError if a call left no dump.
    """
    pairs = []
    for name in dict.fromkeys(call.name for call in calls):
        same_name = [call for call in calls if call.name == name]
        dumped = [
            schedule
            for operation, schedule in sorted(schedules.items())
            if operation.rsplit(".", 1)[0] == name
        ]
        if not dumped:
            raise ValueError(f"no dump of kernel {name!r} among {sorted(schedules)}")
        padded = dumped + dumped[-1:] * (len(same_name) - len(dumped))
        pairs += list(zip(same_name, padded, strict=False))
    return pairs


def _kernel_row(call, schedule, chip: Chip, query_tokens: int) -> dict[str, Any]:
    steps = call.steps * call.times / query_tokens  # grid steps a query token and head
    bytes_moved = call.bytes * call.times
    bounds = {
        "bundles": schedule.bundles * steps,
        "mxu": schedule.matmuls * CYCLES_PER_MATMUL * steps,
        "hbm": bytes_moved / query_tokens / chip.hbm_bytes_per_cycle,
    }
    return {
        "name": call.name,
        "cycles": max(bounds.values()),
        **bounds,
        "valu": schedule.bound("VALU") * steps,
        "xlu": schedule.bound("XLU") * steps,
        "load": schedule.bound("VLOAD") * steps,
        "store": schedule.bound("VSTORE") * steps,
        "spills": schedule.issued["VSTORE:SPILL"],
        "fills": schedule.issued["VLOAD:FILL"],
        "vmem": schedule.vmem,
        "bytes": bytes_moved,
        "bytes_exact": call.exact,
        "inner_loops": schedule.inner_loops,
        "steps": call.steps * call.times,
        "step_bundles": schedule.bundles,
    }


def main(text: str, dumps: str) -> None:
    fields = json.loads(text)
    job = Job(**(fields | {"shape": Shape(**fields["shape"])}))
    report(compile_and_read(job, Path(dumps)))


if __name__ == "__main__":
    main(*sys.argv[1:])
