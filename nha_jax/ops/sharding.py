"""A kernel on every device of the mesh: XLA cannot divide a kernel's call, so the call is divided.

Rows of the batch, and key/value heads with the query heads they serve, need nothing of each other.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from nha_jax.ops.rope import Rope
from nha_jax.ops.state import NHAState
from nha_jax.ops.types import NHAOutput, Options


@dataclasses.dataclass(frozen=True)
class MeshAxes:
    """Names of the mesh axes that batch and heads are divided over; names the mesh lacks count not.

    Fields:
      batch: of B.
      heads: of Hkv, and with it Hq.
    """

    batch: tuple[str, ...] = ("data", "fsdp")
    heads: tuple[str, ...] = ("tensor", "model")


_DEFAULT = MeshAxes()
_mesh_axes = contextvars.ContextVar("mesh_axes", default=_DEFAULT)


@contextlib.contextmanager
def use_mesh_axes(
    *, batch: Sequence[str] = MeshAxes.batch, heads: Sequence[str] = MeshAxes.heads
) -> Iterator[None]:
    """Kernels traced within divide batch and heads over these axes of the mesh (`jax.set_mesh`).

    It is read when a function is traced: what `jax.jit` has compiled before stays as it is.

        with jax.set_mesh(mesh), use_mesh_axes(batch=["replica"], heads=["heads"]):
            train_step(...)
    """
    token = _mesh_axes.set(MeshAxes(tuple(batch), tuple(heads)))
    try:
        yield
    finally:
        _mesh_axes.reset(token)


def over_mesh(attend: Callable[..., NHAOutput]) -> Callable[..., NHAOutput]:
    """`attend`, an implementation of the operator, on each device's rows and heads.

    The mesh is the one of `jax.set_mesh`; without one, or where all its axes are manual already
    (inside a `jax.shard_map`), `attend` is called as it is. Axes whose sizes divide neither B nor
    Hkv do the same work several times over.
    """

    def attend_over_mesh(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        log_decay: jax.Array,
        *,
        rope: Rope | None,
        segment_ids: jax.Array | None,
        initial_state: NHAState | None,
        options: Options,
    ) -> NHAOutput:
        def local(arrays, rope, segment_ids, initial_state):
            rest = {"rope": rope, "segment_ids": segment_ids, "initial_state": initial_state}
            return attend(*arrays, **rest, options=options)

        rope = None if rope is None else (rope[0], rope[1])  # a list is welcome too
        inputs = ((query, key, value, log_decay), rope, segment_ids, initial_state)
        mesh = jax.sharding.get_abstract_mesh()
        sizes = _free_axes(mesh)
        if math.prod(sizes.values()) == 1:
            return local(*inputs)
        axes = _mesh_axes.get()
        batch = _dividing(axes.batch, sizes, query.shape[0])
        heads = _dividing(axes.heads, sizes, key.shape[2])
        tokens: Any = P(batch, None, heads)  # [B, T, heads, ...]
        state = _state_spec(P(batch), P(batch, heads), tokens)
        return jax.shard_map(
            local,
            in_specs=(
                tokens,
                rope and tuple(P(batch) if table.ndim == 3 else P() for table in rope),
                P(batch),
                None if initial_state is None else state,
            ),
            out_specs=NHAOutput(
                out=tokens,
                state=state if options.return_state else None,
                slot_weight=tokens if options.return_slot_weight else None,
            ),
            axis_names=set(sizes),
            check_vma=False,  # kernels do not say over which axes their results vary
        )(*inputs)

    return attend_over_mesh


def _free_axes(mesh: AbstractMesh) -> dict[str, int]:
    """Name and size of the axes that are not manual."""
    return {
        name: size
        for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
        if kind is not AxisType.Manual
    }


def _dividing(names: tuple[str, ...], sizes: dict[str, int], length: int) -> tuple[str, ...]:
    """Those of the axes, taken in turn, over all of which `length` can be divided."""
    chosen: tuple[str, ...] = ()
    for name in names:
        if name in sizes and length % (math.prod(sizes[x] for x in chosen) * sizes[name]) == 0:
            chosen += (name,)
    return chosen


def _state_spec(rows: Any, slots: Any, ring: Any) -> NHAState:
    """A state whose leaves are specs."""
    return NHAState(
        slot_key=slots,
        slot_value=slots,
        window_key=ring,
        window_rotated_key=ring,
        window_value=ring,
        window_log_decay=ring,
        length=rows,
        segment_id=rows,
    )
