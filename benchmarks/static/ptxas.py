"""Compiles the operator's GPU kernels for Hopper without a GPU, and reads what ptxas says of them.

`python -m static.ptxas JSON FOLDER`, with JSON for the fields of `Shape`, prints a JSON object in
one line. It needs CUDA's libraries (the extra `cuda`). Each program has a process of its own,
because Mosaic compiles equal kernels of a process once.
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from static.compiling import report, run_worker
from static.hlo import bytes_moved
from static.programs import Shape, minimum_bytes


def compile_in_subprocess(shape: Shape) -> dict[str, Any]:
    """Returns `compile_and_read`'s object from a fresh process, and removes its dumps.

    Raises:
        RuntimeError: it does not compile; the message ends with the compiler's.
    """
    return run_worker("static.ptxas", vars(shape), dump=False)


def compile_and_read(shape: Shape, dumps: Path) -> dict[str, Any]:
    """Compiles the forward, and the forward and backward, of [B, T, heads, size] arrays.

    Returns:
        "kernels": by name "registers" of a thread, "spills" (bytes stored and loaded) and
          "shared_memory" (bytes of a block).
        "forward", and "both" for forward and backward: "bytes", as `bytes_moved` counts them in the
          program, and "minimum_bytes".
    """
    os.environ |= {"MOSAIC_GPU_DUMP_TO": str(dumps), "MOSAIC_GPU_DUMP_PTX": "1"}
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from nha_jax.ops import nha_attention, rope_tables
    from train.plan.gpus import GPUS

    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="1x1x1",
        topology="1x1x1",
        target_config=GPUS["H100"].target_config,
    )
    device = jax.sharding.SingleDeviceSharding(topology.devices[0])
    mesh = jax.sharding.Mesh(topology.devices[:1], ("data",))

    def attend(query, key, value, log_decay, segment_ids):
        return nha_attention(
            query, key, value, log_decay,
            window_size=shape.W,
            rope=rope_tables(jnp.arange(shape.T), shape.K),
            segment_ids=segment_ids,
            implementation="pallas_gpu",
        )  # fmt: skip

    def forward_backward(query, key, value, log_decay, segment_ids, out_grad):
        inputs = query, key, value, log_decay
        out, pullback = jax.vjp(lambda *inputs: attend(*inputs, segment_ids), *inputs)
        return out, pullback(out_grad)

    rows, heads = (shape.B, shape.T), shape.H * shape.G
    query = jax.ShapeDtypeStruct((*rows, heads, shape.K), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((*rows, shape.H, shape.K), jnp.bfloat16)
    log_decay = jax.ShapeDtypeStruct((*rows, shape.H, shape.M), jnp.float32)
    segment_ids = jax.ShapeDtypeStruct(rows, jnp.int32) if shape.segments else None
    inputs = query, key, key, log_decay, segment_ids
    figures: dict[str, Any] = {}
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        for name, function, arguments in (
            ("forward", attend, inputs),
            ("both", forward_backward, (*inputs, query)),
        ):
            jitted = jax.jit(function, in_shardings=device, out_shardings=device)
            text = jitted.lower(*arguments).compile().as_text()
            least = minimum_bytes("pallas", shape, backward=name == "both")
            figures[name] = {"bytes": bytes_moved(text), "minimum_bytes": least}
    return figures | {"kernels": read_dumps(dumps)}


def read_dumps(dumps: Path) -> dict[str, dict[str, int]]:
    """Returns each kernel's figures by its name; of several kernels of one name, the largest.

    Mosaic and XLA number the files that they leave for a kernel each in its own order.
    """
    kernels: dict[str, dict[str, int]] = {}
    for pattern, figures_of in (("*.ptxas", _registers), ("*.resources.txt", _shared_memory)):
        for file in dumps.glob(pattern):
            kernel = kernels.setdefault(file.name.split(".")[0].rsplit("_", 1)[0], {})
            for name, figure in figures_of(file.read_text()).items():
                kernel[name] = max(figure, kernel.get(name, 0))
    return dict(sorted(kernels.items()))


def _registers(ptxas: str) -> dict[str, int]:
    stored, loaded = _find(r"(\d+) bytes spill stores, (\d+) bytes spill loads", ptxas)
    registers = int(_find(r"[Uu]sed (\d+) registers", ptxas)[0])
    return {"registers": registers, "spills": int(stored) + int(loaded)}


def _shared_memory(resources: str) -> dict[str, int]:
    return {"shared_memory": int(_find(r"smem_scratch_bytes=(\d+)", resources)[0])}


def _find(pattern: str, text: str) -> tuple[str, ...]:
    """Returns the pattern's groups. Raises ValueError if the compiler no longer says it so."""
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"no {pattern!r} in {text!r}")
    return match.groups()


if __name__ == "__main__":
    report(compile_and_read(Shape(**json.loads(sys.argv[1])), Path(sys.argv[2])))
