"""How the kernels of several warpgroups are called."""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

Refs = dict[str, Any]


def launch(
    kernel: Callable[[Refs, Refs], None],
    inputs: dict[str, jax.Array],
    outputs: dict[str, jax.ShapeDtypeStruct],
    scratch: Refs,
    *,
    grid: dict[str, int],
    warpgroups: int,
    name: str,
    interpret: Any,
) -> list[jax.Array]:
    """kernel(refs, shared) of every block of the grid, in each of its warpgroups (axis "wg").

    refs are inputs and outputs by name, in the device's memory; shared is what scratch describes,
    one for all warpgroups of a block.
    interpret: as for `fused_attention`.
    """

    def entry(*refs):
        named = dict(zip([*inputs, *outputs], refs, strict=True))
        pl.run_scoped(lambda shared: kernel(named, shared), scratch, collective_axes="wg")

    call = plgpu.kernel(
        entry,
        out_type=list(outputs.values()),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=warpgroups,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=name,
        interpret=interpret,
    )
    return call(*inputs.values())
