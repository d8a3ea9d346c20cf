"""How every kernel of a pass over the rows is launched: arrays by name, in and out."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

VMEM_BYTES = 64 << 20  # that a kernel may use

Arrays = dict[str, jax.Array]


class Output(NamedTuple):
    """An array that a kernel writes, and the block that a grid step writes of it."""

    shape: tuple[int, ...]
    dtype: Any
    block: pl.BlockSpec


def like(x: jax.Array, block: pl.BlockSpec) -> Output:
    """An output of x's shape and dtype."""
    return Output(x.shape, x.dtype, block)


def launch(
    kernel: Callable[..., None],
    *inputs: tuple[Arrays, dict[str, pl.BlockSpec]],
    name: str,
    grid: tuple[int, ...],
    parallel: int,
    outputs: dict[str, Output],
    scratch: dict[str, Any],
    interpret: bool,
) -> Arrays:
    """Calls kernel(*input references, output references, scratch references), dicts by name.

    Args:
      inputs: one or more dicts of arrays, each with a dict of their blocks.
      parallel: how many of the grid's first axes may run in any order; the others run in order.
      interpret: run the kernel on the CPU.

    Returns the outputs by name.
    """
    semantics: list[Literal["parallel", "arbitrary"]] = [
        "parallel" if axis < parallel else "arbitrary" for axis in range(len(grid))
    ]
    call = pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[specs for _, specs in inputs],
        out_specs=[{name: output.block for name, output in outputs.items()}],
        out_shape=[{n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in outputs.items()}],
        scratch_shapes=[scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=semantics, vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        name=name,
    )
    return call(*(arrays for arrays, _ in inputs))[0]
