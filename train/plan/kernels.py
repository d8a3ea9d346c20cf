"""Counts what the Pallas kernels of a function do: XLA cannot see into them."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

GPU_CALL = "mpmd_map"
"""The name of jax's operation for a `mosaic_gpu.kernel`."""


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """One call of a Pallas kernel.

    Attributes:
        name: the kernel's name.
        steps: number of steps of the grid.
        flops: operations of the matrix products over the whole grid. Of the branches of a
            conditional the costlier counts at every step; a loop whose length is only known when
            the kernel runs counts once.
        bytes: bytes of the blocks that are fetched and written over the whole grid; a block is
            fetched whenever its index changes.
        exact: whether `bytes` was counted so for all blocks. If not, those whose index is only
            known when the kernel runs (scalar prefetch), and those that the kernel copies itself,
            count as their whole array once.
        times: how often the call is repeated, as by a scan around it.
    """

    name: str
    steps: int
    flops: int
    bytes: int
    exact: bool
    times: int


def pallas_calls(function, *arguments) -> list[KernelCall]:
    """Returns the kernel calls of `function` with these abstract arguments, in program order."""
    return calls_of_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def calls_of_jaxpr(jaxpr: core.Jaxpr) -> list[KernelCall]:
    """Returns the kernel calls of a traced function, in program order."""
    return list(_walk(jaxpr, 1))


def _walk(jaxpr, times: int) -> Iterator[KernelCall]:
    """Finds kernel calls in a function that is called `times` times."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield _tpu_call(equation.params, times)
            continue
        if equation.primitive.name == GPU_CALL:
            yield _gpu_call(equation, times)
            continue
        inside = times * (equation.params["length"] if equation.primitive.name == "scan" else 1)
        for inner in _inner(equation):
            yield from _walk(inner, inside)


def _inner(equation) -> Iterator[core.Jaxpr]:
    """Gives the functions that an operation calls."""
    for value in equation.params.values():
        for inner in value if isinstance(value, tuple | list) else (value,):
            if isinstance(inner, core.ClosedJaxpr):
                yield inner.jaxpr
            elif isinstance(inner, core.Jaxpr):
                yield inner


def _flops(jaxpr: Any) -> int:
    """Counts 2 operations for each pair that a matrix product multiplies."""
    flops = 0
    for equation in jaxpr.eqns:
        inner = [_flops(function) for function in _inner(equation)]
        match equation.primitive.name:
            case "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                left, out = equation.invars[0].aval, equation.outvars[0].aval
                flops += 2 * out.size * math.prod(left.shape[axis] for axis in contracted)
            case "wgmma_ref":
                out, left = (x.aval for x in equation.invars[:2])
                # In shared memory a matrix lies in tiles, [rows / 8, ., 8, .], behind
                # axes of pipeline stages.
                shape = left.shape[-4:] if len(left.shape) > 2 else left.shape
                flops += 2 * out.shape[1] * math.prod(shape)
            case "cond":
                flops += max(inner)
            case "scan":
                flops += equation.params["length"] * sum(inner)
            case _:
                flops += sum(inner)
    return flops


def _tpu_call(parameters, times: int) -> KernelCall:
    """Counts a `pallas_call`, whose blocks the compiler copies."""
    mapping = parameters["grid_mapping"]
    moved, exact = 0, True
    for block in mapping.block_mappings:
        fetches = _fetches(block, mapping)
        if fetches is None:
            exact = False
            moved += _bytes(block.array_aval)
        else:
            moved += fetches * _bytes(block.transformed_block_aval)
    name, steps = parameters["name"] or "pallas_call", math.prod(mapping.grid)
    return KernelCall(name, steps, steps * _flops(parameters["jaxpr"]), moved, exact, times)


def _gpu_call(equation, times: int) -> KernelCall:
    """Counts a Mosaic GPU kernel, which copies its blocks itself."""
    meshes, jaxprs = equation.params["meshes"], equation.params["jaxprs"]
    steps = math.prod(meshes[0].grid)
    moved = sum(_bytes(x.aval) for x in (*equation.invars, *equation.outvars))
    name, flops = equation.params["name"], sum(_flops(jaxpr) for jaxpr in jaxprs)
    return KernelCall(name, steps, steps * flops, moved, False, times)


def _fetches(block, mapping) -> int | None:
    """Counts how often a block is fetched over the grid; None if only the run can tell."""
    space = str(block.transformed_block_aval.memory_space)
    if mapping.num_index_operands or "any" in space or "hbm" in space:
        return None
    grid = np.indices(mapping.grid, np.int32).reshape(len(mapping.grid), -1)
    index_map = core.jaxpr_as_fun(block.index_map_jaxpr)
    indices = np.stack(jax.vmap(index_map)(*map(jnp.asarray, grid)))
    return 1 + int(np.any(indices[:, 1:] != indices[:, :-1], axis=0).sum())


def _bytes(array) -> int:
    return math.prod(array.shape) * array.dtype.itemsize
