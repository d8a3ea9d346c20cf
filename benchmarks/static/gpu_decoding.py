"""Compiles a decode step for Hopper without a GPU, in a process of its own.

`python -m static.gpu_decoding JSON FOLDER`, with JSON for the fields of `DecodeJob`, prints a JSON
object in one line. It needs CUDA's libraries (the extra `cuda`).
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
    """Returns `compile_and_read`'s object from a fresh process.

    Raises:
        RuntimeError: it does not compile; the message ends with the compiler's.
    """
    return run_worker("static.gpu_decoding", dataclasses.asdict(job), dump=False)


def compile_and_read(job: DecodeJob, dumps: Path) -> dict[str, Any]:
    """Compiles a step, or a loop of steps, with its state donated.

    Returns:
        "kernels": their figures by name, as `static.ptxas.read_dumps` has them.
        "state_copies": bytes of the state that XLA copies.
        "state_bytes", "aliased_bytes": of the state, and of what is updated in place.
        "temporary_bytes": HBM beyond the arguments.
        "minimum_bytes": what a step must move.
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
    """Counts the bytes of copies of arrays that are as large as one of the state's.

    Arrays of up to 4096 bytes are left out.
    """
    total = 0
    for dtype, shape in re.findall(r"= (\w+)\[([\d,]*)\]\S* copy(?:-start)?\(", hlo):
        count = SIZES.get(dtype, 1)
        for n in filter(None, shape.split(",")):
            count *= int(n)
        total += count if count in sizes and count > 4096 else 0
    return total


if __name__ == "__main__":
    report(compile_and_read(DecodeJob(**json.loads(sys.argv[1])), Path(sys.argv[2])))
