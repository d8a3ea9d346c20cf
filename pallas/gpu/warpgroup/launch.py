"""How every kernel is launched, and the room that it has."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

Refs = dict[str, Any]

SHARED_MEMORY = 227 * 1024  # bytes, of a block on Hopper
ALIGNMENT = 1024  # bytes, of an array in it
REDUCTION = 2048  # bytes, the compiler's own, for maxima and sums across warps


def size_of(scratch: Refs) -> int:
    """The bytes of shared memory that a block needs for what scratch describes."""
    arrays = [x for x in scratch.values() if not isinstance(x, plgpu.Barrier)]
    sizes = (math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in arrays)
    return REDUCTION + sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def check_shared_memory(scratch: Refs, field: str, value: int) -> None:
    """Raises ValueError if scratch does not fit, naming the field of `BlockSizes` and its value."""
    total = size_of(scratch)
    if total > SHARED_MEMORY:
        raise ValueError(
            f"BlockSizes: {field} of {value} takes {total >> 10} KB of shared memory with heads "
            f"of this size, and a block has {SHARED_MEMORY >> 10}: use a smaller {field}"
        )


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
    updated: dict[str, jax.Array] | None = None,
    approx_math: bool = True,
    one_warpgroup_reduces: bool = False,
) -> list[jax.Array]:
    """Runs kernel(refs, shared) for every thread block of the grid, in each of its warpgroups.

    Inside, `lax.axis_index` gives a block's place on the grid's axes, and "wg" the warpgroup.

    No two warpgroups of a block may reduce across warps at the same time. A sum or maximum over an
    axis that the layout divides among warps, such as the rows of [C, n] in LOGITS, passes through
    one scratch area that the compiler gives a block, and is synchronised within a warpgroup only:
    two at once read each other's numbers. The interpreter has no such area and shows nothing. So
    a kernel of several warpgroups has no such area, and the compiler refuses it if it needs one,
    unless it says `one_warpgroup_reduces`. Sums along a row, which a warp holds whole, are free.

    Args:
      kernel: takes refs, the inputs, updated arrays and outputs by name, in the device's memory,
        and shared, what scratch describes, one for all warpgroups of a block.
      inputs, outputs: by name; the kernel reads the ones and writes the others.
      scratch: shared memory and barriers, by name.
      grid: the axes' names and sizes.
      warpgroups: of a block; a barrier's arrivals are counted by warpgroups and copies.
      name: the kernel's, in profiles and dumps.
      interpret: `InterpretGPUParams` to run on the CPU, or False.
      updated: arrays that the kernel changes where they lie. XLA copies those that are read later
        as they were.
      approx_math: whether exponentials, divisions and the like may be the hardware's approximate
        ones.
      one_warpgroup_reduces: whether one of several warpgroups, always the same, reduces across
        warps.

    Returns:
      The outputs, then the updated arrays.
    """
    references = {name: jax.new_ref(x) for name, x in (updated or {}).items()}

    def entry(*refs):
        named = dict(zip([*inputs, *references, *outputs], refs, strict=True))
        pl.run_scoped(lambda shared: kernel(named, shared), scratch, collective_axes="wg")

    call = plgpu.kernel(
        entry,
        out_type=list(outputs.values()),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=warpgroups,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=approx_math,
            reduction_scratch_bytes=REDUCTION if warpgroups == 1 or one_warpgroup_reduces else 0,
        ),
        kernel_name=name,
        interpret=interpret,
    )
    results = call(*inputs.values(), *references.values())
    return [*results, *map(jax.freeze, references.values())]
