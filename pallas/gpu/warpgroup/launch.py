"""How the kernels of several warpgroups are called."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

Refs = dict[str, Any]

SHARED_MEMORY = 227 * 1024  # bytes, of a block on Hopper
ALIGNMENT = 1024  # of an array in it
REDUCTION = 2048  # bytes, the compiler's own, for maxima and sums


def size_of(scratch: Refs) -> int:
    """Bytes of shared memory of a block whose arrays scratch describes."""
    arrays = [x for x in scratch.values() if not isinstance(x, plgpu.Barrier)]
    sizes = (math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in arrays)
    return REDUCTION + sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def check_shared_memory(scratch: Refs, field: str, value: int) -> None:
    """Raises ValueError if the arrays in scratch do not fit; `field` of `BlockSizes` is value."""
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
) -> list[jax.Array]:
    """kernel(refs, shared) of every block of the grid, in each of its warpgroups (axis "wg").

    refs are inputs, what is updated and outputs by name, in the device's memory; shared is what
    scratch describes, one for all warpgroups of a block.
    updated: arrays that the kernel changes where they lie, returned after the outputs; XLA copies
      those that are read later as they were.
    interpret: as for `fused_attention`.
    approx_math: exponentials and the like by the hardware's approximations.
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
        compiler_params=plgpu.CompilerParams(approx_math=approx_math),
        kernel_name=name,
        interpret=interpret,
    )
    results = call(*inputs.values(), *references.values())
    return [*results, *map(jax.freeze, references.values())]
