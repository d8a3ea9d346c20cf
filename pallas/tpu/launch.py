"""How every kernel of a pass over the rows is launched: arrays by name, in and out."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas.tpu.arithmetic import LANES

VMEM_BYTES = 64 << 20  # that a kernel may use
SUBLANES = 8  # rows of a register of 32 bits; of narrower ones there are more, and fewer fit

Arrays = dict[str, jax.Array]

ARGUMENT_ORDER = (
    "delta", "end", "row_segments", "key", "segment", "key_table", "log_decay", "lse", "out",
    "query", "query_segment", "query_table", "rotated_key", "rotated_query", "slots", "starts",
    "rope_table", "value", "chunk_segments", "slot_weight",
)  # fmt: skip
"""The order in which kernels take their inputs and outputs, by name without `d_` and `token_`.

Any order is right, but each gives a schedule that differs by some bundles. Left to itself JAX would
sort a dict by its names, and a kernel would change when an array is renamed.
"""


class Output(NamedTuple):
    """An array that a kernel writes, and the block that a grid step writes of it."""

    shape: tuple[int, ...]
    dtype: Any
    block: pl.BlockSpec


def like(x: jax.Array, block: pl.BlockSpec) -> Output:
    """An output of x's shape and dtype."""
    return Output(x.shape, x.dtype, block)


class Blocks(NamedTuple):
    """What a grid step of a kernel has in VMEM, by name."""

    inputs: tuple[tuple[Arrays, dict[str, pl.BlockSpec]], ...]  # arrays, and the blocks of each
    outputs: dict[str, Output]
    scratch: dict[str, Any]

    @property
    def vmem_bytes(self) -> int:
        """The bytes of all blocks, twice: one is copied as another is used; and of the scratch."""
        blocks = [
            (specs[name].block_shape, x.dtype)
            for arrays, specs in self.inputs
            for name, x in arrays.items()
        ]
        blocks += [(x.block.block_shape, x.dtype) for x in self.outputs.values()]
        scratch = [(x.shape, x.dtype) for x in self.scratch.values()]
        total = 0
        for copies, shapes in ((2, blocks), (1, scratch)):
            total += copies * sum(tiled_bytes(shape, dtype) for shape, dtype in shapes)
        return total


def tiled_bytes(shape: Any, dtype: Any) -> int:
    """The bytes of an array in VMEM, whose last two axes are whole registers."""
    *outer, rows, lanes = shape
    rows, lanes = -(-rows // SUBLANES) * SUBLANES, -(-lanes // LANES) * LANES
    return math.prod((*outer, rows, lanes)) * jnp.dtype(dtype).itemsize


def launch(
    kernel: Callable[..., None],
    blocks: Blocks,
    *,
    name: str,
    grid: tuple[int, ...],
    parallel: int,
    interpret: bool,
) -> Arrays:
    """Calls kernel(*input references, output references, scratch references), dicts by name.

    Args:
      parallel: how many of the grid's first axes may run in any order; the others run in order.
      interpret: run the kernel on the CPU.

    Returns the outputs by name.
    """
    semantics: list[Literal["parallel", "arbitrary"]] = [
        "parallel" if axis < parallel else "arbitrary" for axis in range(len(grid))
    ]
    inputs, outputs, scratch = blocks
    in_names = [_in_order(arrays) for arrays, _ in inputs]
    out_names = _in_order(outputs)
    operands = [
        (arrays[name], specs[name])
        for (arrays, specs), names in zip(inputs, in_names, strict=True)
        for name in names
    ]

    def kernel_by_name(*refs):
        remaining = iter(refs)
        by_name = [{n: next(remaining) for n in names} for names in (*in_names, out_names)]
        kernel(*by_name, next(remaining))  # the scratch comes last, a dict already

    call = pl.pallas_call(
        kernel_by_name,
        grid=grid,
        in_specs=[spec for _, spec in operands],
        out_specs=[outputs[n].block for n in out_names],
        out_shape=[jax.ShapeDtypeStruct(outputs[n].shape, outputs[n].dtype) for n in out_names],
        scratch_shapes=[scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=semantics, vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        name=name,
    )
    return dict(zip(out_names, call(*(x for x, _ in operands)), strict=True))


def in_place_semantics(rows: int) -> tuple[Literal["parallel", "arbitrary"], ...]:
    """Says how a grid (rows, steps) runs whose kernel changes arrays where they lie.

    Chips of two cores cut a parallel axis in halves. Where it is odd, the second core's last row is
    one that there is not, and it gets another row's blocks: what is changed in place would be
    changed twice.
    """
    return "parallel" if rows % 2 == 0 else "arbitrary", "arbitrary"


def _in_order(arrays: Iterable[str]) -> list[str]:
    """The arrays' names in `ARGUMENT_ORDER`."""

    def position(name: str) -> int:
        return ARGUMENT_ORDER.index(name.removeprefix("d_").removeprefix("token_"))

    return sorted(arrays, key=position)
