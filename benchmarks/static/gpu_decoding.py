"""Compiles a decode step for Hopper without a GPU, as a worker of `static.compiling`.

As a program: `python -m static.gpu_decoding JSON FOLDER`, with the fields of `DecodeJob`; it prints
a JSON object in one line. Needs CUDA's libraries (the extra `cuda`).
"""

import dataclasses
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from static.compiling import report, run_worker
from static.decoding import DecodeJob, program
from static.ptxas import read_dumps


def compile_in_subprocess(job: DecodeJob) -> dict[str, Any]:
    """`compile_and_read`'s object, from a fresh process. Raises RuntimeError if that fails."""
    return run_worker("static.gpu_decoding", dataclasses.asdict(job), dump=False)


def compile_and_read(job: DecodeJob, dumps: Path) -> dict[str, Any]:
    """A step, or a loop of them, its state donated.

    Returns:
        "kernels", by name, as `static.ptxas.read_dumps` has them; "state_copies", bytes of the
        state that XLA copies; "state_bytes" and "aliased_bytes"; "temporary_bytes", of HBM;
        "minimum_bytes".
    """
    os.environ |= {"MOSAIC_GPU_DUMP_TO": str(dumps), "MOSAIC_GPU_DUMP_PTX": "1"}
    import jax
    from jax.experimental import topologies

    from train.plan.gpus import GPUS

    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="1x1x1",
        topology="1x1x1",
        target_config=GPUS[job.chip].target_config,
    )
    device = jax.sharding.SingleDeviceSharding(topology.devices[0])
    mesh = jax.sharding.Mesh(topology.devices[:1], ("data",))
    function, arguments = program(job, "pallas_gpu" if job.kernel else "xla")
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        jitted = jax.jit(function, in_shardings=device, out_shardings=device, donate_argnums=4)
        compiled = jitted.lower(*arguments).compile()
    memory = compiled.memory_analysis()
    state = [x for x in jax.tree.leaves(arguments[-1]) if x.size]
    return {
        "kernels": read_dumps(dumps),
        "state_copies": _copied(compiled.as_text(), {x.size * x.dtype.itemsize for x in state}),
        "state_bytes": sum(x.size * x.dtype.itemsize for x in state),
        "aliased_bytes": memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "minimum_bytes": job.minimum_bytes,
    }


SIZES = {"bf16": 2, "f32": 4, "s32": 4}


def _copied(hlo: str, sizes: set[int]) -> int:
    """Bytes of the copies that are as large as an array of the state, and larger than a page."""
    total = 0
    for dtype, shape in re.findall(r"= (\w+)\[([\d,]*)\]\S* copy(?:-start)?\(", hlo):
        count = SIZES.get(dtype, 1)
        for n in filter(None, shape.split(",")):
            count *= int(n)
        total += count if count in sizes and count > 4096 else 0
    return total


if __name__ == "__main__":
    report(compile_and_read(DecodeJob(**json.loads(sys.argv[1])), Path(sys.argv[2])))
