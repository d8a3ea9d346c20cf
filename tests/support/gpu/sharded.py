"""Compiles the operator and its gradient for four GPUs that are not there.

python -m tests.support.gpu.sharded WINDOW    # prints the program's kernels and collectives
"""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nha_jax.ops import nha_attention, rope_tables
from train.plan.gpus import GPUS

B, T, H, K, M = 4, 128, 4, 64, 16

CUDNN = {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}
CALLS = {64: {"mosaic_gpu_v2"}, None: CUDNN}
"""The kernels and collectives that are to be in a window's program."""

COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"


def is_kernel(target: str) -> bool:
    return target.startswith(("mosaic_gpu", "__cudnn"))


def gradients(window_size: int | None):
    """Returns a function of query, key, value, log_decay and the output's cotangent."""

    def run(query, key, value, log_decay, cotangent):
        def attend(*arrays):
            return nha_attention(
                *arrays,
                window_size=window_size,
                rope=rope_tables(jnp.arange(T), K),
                implementation="pallas_gpu",
            )

        out, pullback = jax.vjp(attend, query, key, value, log_decay)
        return out, pullback(cotangent)

    return run


def shapes(mesh) -> list[jax.ShapeDtypeStruct]:
    """The function's arguments: rows divided over the mesh's first axis, heads over its second."""
    sharding = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
    wide = jax.ShapeDtypeStruct((B, T, H, K), jnp.bfloat16, sharding=sharding)
    log_decay = jax.ShapeDtypeStruct((B, T, H, M), jnp.float32, sharding=sharding)
    return [wide, wide, wide, log_decay, wide]


def main(window: str) -> None:
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="1x1x4",
        topology="1x1x4",
        target_config=GPUS["H100"].target_config,
    )
    devices = np.array(topology.devices).reshape(2, 2)
    mesh = Mesh(devices, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        jitted = jax.jit(gradients(None if window == "None" else int(window)))
        program = jitted.lower(*shapes(mesh)).compile().as_text()
    targets = re.findall(r'custom_call_target="([^"]+)"', program)
    exchanges = re.findall(rf" ({COLLECTIVES})[\w-]*\(", program)
    print(*sorted({*filter(is_kernel, targets), *exchanges}))


if __name__ == "__main__":
    main(*sys.argv[1:])
