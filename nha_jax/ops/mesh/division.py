"""The operator divided over the devices of a mesh.

XLA cannot divide a kernel's call, so every device makes a call of its own, inside `jax.shard_map`.
Rows of the batch, and key/value heads with the query heads they serve, need nothing of each other;
the parts of a sequence do: see `nha_jax.ops.mesh.sequence`. Where there are more devices than
key/value heads, several devices have the same one, each for a part of its query heads.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from nha_jax.ops.mesh.sequence import Devices, attend_in_context
from nha_jax.ops.padding import without_padding
from nha_jax.ops.rope import Rope
from nha_jax.ops.state import NHAState
from nha_jax.ops.types import NHAOutput, Options


@dataclasses.dataclass(frozen=True)
class MeshAxes:
    """Names of the mesh axes that arrays are divided over; names that the mesh lacks are ignored.

    Fields:
      batch: axes that divide B.
      heads: axes that divide Hkv and Hq; in a model also the vocabulary and the SwiGLU.
      sequence: axes that divide T.
    """

    batch: tuple[str, ...] = ("data", "fsdp")
    heads: tuple[str, ...] = ("tensor", "model")
    sequence: tuple[str, ...] = ("context",)


# A part of what `jax.jit` finds a program by.
_mesh_axes = jax.make_user_context(MeshAxes())


@contextlib.contextmanager
def use_mesh_axes(
    *,
    batch: Sequence[str] = MeshAxes.batch,
    heads: Sequence[str] = MeshAxes.heads,
    sequence: Sequence[str] = MeshAxes.sequence,
) -> Iterator[None]:
    """Sets the axes of the mesh over which the calls within divide their arrays.

    What `jax.jit` has compiled for other axes, it compiles anew.

        with jax.set_mesh(mesh), use_mesh_axes(batch=["replica"], heads=["heads"]):
            train_step(...)
    """
    with _mesh_axes(MeshAxes(tuple(batch), tuple(heads), tuple(sequence))):
        yield


@dataclasses.dataclass(frozen=True)
class Division:
    """Which axes of the mesh divide a call's rows, its heads and its tokens.

    `rows` is the spec of arrays [B, ...], `tokens` that of [B, T, heads, ...] and
    [B, T, heads * size], `state` that of an `NHAState`. Each key/value head is on `copies` devices,
    each of which has a part of its query heads.
    """

    sizes: dict[str, int]  # of all axes of `AxisType.Auto`
    batch: tuple[str, ...]
    heads: tuple[str, ...]
    sequence: tuple[str, ...] = ()
    copies: int = 1

    @property
    def rows(self) -> Any:
        return P(self.batch)

    @property
    def positions(self) -> Any:
        """The spec of [B, T, ...] arrays whose further axes are not divided."""
        return P(self.batch, self.sequence)

    @property
    def tokens(self) -> Any:
        return P(self.batch, self.sequence, self.heads)

    @property
    def devices_of_sequence(self) -> Devices:
        return Devices(self.sequence, math.prod(self.sizes[name] for name in self.sequence))

    @property
    def state(self) -> Any:
        slots: Any = P(self.batch, self.heads)
        return NHAState(
            slot_key=slots,
            slot_value=slots,
            window_key=self.tokens,
            window_rotated_key=self.tokens,
            window_value=self.tokens,
            window_log_decay=self.tokens,
            length=self.rows,
            segment_id=self.rows,
        )

    def local_shapes(self, tree: Any, specs: Any) -> Any:
        """The shapes of one device's part of each array."""

        def local(x, spec):
            shape = list(x.shape)
            for axis, names in enumerate(spec):
                names = (names,) if isinstance(names, str) else names or ()
                shape[axis] //= math.prod(self.sizes[name] for name in names)
            return jax.ShapeDtypeStruct(shape, x.dtype)

        return jax.tree.map(local, tree, specs)

    def map(
        self, function: Callable[..., Any], in_specs: Any, out_specs: Any
    ) -> Callable[..., Any]:
        """Runs `function` on each device's part; returns it as it is where there is one device."""
        if math.prod(self.sizes.values()) == 1:
            return function
        return jax.shard_map(
            function,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names=set(self.sizes),
            check_vma=False,  # kernels do not say over which axes their results vary
        )

    def place(self, tree: Any, specs: Any) -> Any:
        """Constrains the arrays to be divided as the specs say."""
        if math.prod(self.sizes.values()) == 1:
            return tree
        return jax.tree.map(jax.lax.with_sharding_constraint, tree, specs)


def divide_over_mesh(
    batch_size: int, num_heads: int, num_tokens: int | None = None, group_size: int = 1
) -> Division:
    """Finds the division of a call of B rows, Hkv heads and T tokens over the mesh in force.

    Only axes of `AxisType.Auto` count: manual ones (inside a `jax.shard_map`) have been divided
    over already, explicit ones are made automatic before (`nha_jax.ops.mesh.explicit`). Along an
    axis whose size divides none of the three, all devices do the same work.

    Args:
      num_tokens: None: a sequence is not divided.
      group_size: query heads of a key/value head that may be on several devices; 1: they stay
        together.
    """
    sizes, axes = _auto_axes(jax.sharding.get_abstract_mesh()), _mesh_axes.value
    heads = _dividing(axes.heads, sizes, num_heads * group_size)
    devices = math.prod(sizes[name] for name in heads)
    return Division(
        sizes,
        _dividing(axes.batch, sizes, batch_size),
        heads,
        () if num_tokens is None else _dividing(axes.sequence, sizes, num_tokens),
        devices // math.gcd(devices, num_heads),
    )


def divide_call(query: jax.Array, key: jax.Array, *, has_state: bool) -> Division:
    """Finds the division of a call of the operator with this query [B, T, Hq, K] and key.

    Args:
      has_state: whether a state is given or asked for, which is of whole sequences and of whole
        groups of query heads.
    """
    B, T, Hkv = key.shape[:3]
    if has_state:
        return divide_over_mesh(B, Hkv)
    return divide_over_mesh(B, Hkv, T, query.shape[2] // Hkv)


def shard_tokens(x: jax.Array, *, heads: int = 1) -> jax.Array:
    """Divides [B, T] or [B, T, features] over the mesh as the operator divides its arrays.

    Args:
      heads: the features are so many equal parts, which stay whole; 1: all of them do.
    """
    division = divide_over_mesh(x.shape[0], heads, x.shape[1])
    return division.place(x, division.tokens if x.ndim == 3 else division.positions)


def tokens_spec(x: jax.Array, *, heads: int = 1) -> Any:
    """Says how [B, features] or [B, T, features, ...] is divided over the mesh.

    Args:
      heads: as for `shard_tokens`.
    """
    if x.ndim < 2:
        return P()
    division = divide_over_mesh(x.shape[0], heads, x.shape[1] if x.ndim > 2 else None)
    return division.tokens if x.ndim > 2 else P(division.batch, division.heads)


def shard_vocabulary(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Divides [vocabulary, features] over the axes of heads, to look up tokens [B, T].

    Only where sequences are divided: were the features divided over an axis that divides the
    tokens too, every device would look up all tokens. Elsewhere XLA finds a way that needs less
    memory by itself.
    """
    division = divide_over_mesh(tokens.shape[0], table.shape[0], tokens.shape[1])
    if division.devices_of_sequence.count == 1:
        return table
    return division.place(table, P(division.heads))


def over_mesh(attend: Callable[..., NHAOutput]) -> Callable[..., NHAOutput]:
    """Runs `attend`, an implementation of the operator, on each device's rows, heads and tokens.

    Of padding it gets zeros, and what it makes of them is cleared again: see `without_padding`.

    `attend` takes what came before as `past`, the result as `initial_state`. With a state, given or
    asked for, sequences stay whole, and so do groups of query heads.
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
        has_state = options.return_state or initial_state is not None
        division = divide_call(query, key, has_state=has_state)
        if division.copies > 1:
            key, value, log_decay = (
                jnp.repeat(x, division.copies, axis=2) for x in (key, value, log_decay)
            )

        def local(arrays, rope, segment_ids, initial_state):
            rest = {"rope": rope, "segment_ids": segment_ids, "options": options}
            devices = division.devices_of_sequence
            here: Callable[..., NHAOutput]
            if devices.count > 1:
                here = functools.partial(attend_in_context, attend, devices)
            else:
                past = None if initial_state is None else initial_state.past(options.slot_delay)
                here = functools.partial(attend, past=past)
            if segment_ids is not None:
                here = without_padding(here)
            return here(*arrays, **rest)

        rope = None if rope is None else (rope[0], rope[1])  # a list is welcome too
        of_every_row = P(division.sequence)
        divided = division.map(
            local,
            in_specs=(
                division.tokens,
                rope and tuple(division.positions if x.ndim == 3 else of_every_row for x in rope),
                division.positions,
                None if initial_state is None else division.state,
            ),
            out_specs=NHAOutput(
                out=division.tokens,
                state=division.state if options.return_state else None,
                slot_weight=division.tokens if options.return_slot_weight else None,
            ),
        )
        return divided((query, key, value, log_decay), rope, segment_ids, initial_state)

    return attend_over_mesh


def decode_over_mesh(
    step: Callable[..., tuple[jax.Array, NHAState]],
) -> Callable[..., tuple[jax.Array, NHAState]]:
    """Runs `step`, a `Backend.decode`, on each device's rows and heads."""

    def step_over_mesh(query, rotated_query, token, state, active):
        division = divide_over_mesh(query.shape[0], token.key.shape[2])
        tokens = division.tokens
        divided = division.map(
            step,
            in_specs=(tokens, tokens, tokens, division.state, division.rows),
            out_specs=(tokens, division.state),
        )
        return divided(query, rotated_query, token, state, active)

    return step_over_mesh


def _auto_axes(mesh: AbstractMesh) -> dict[str, int]:
    """Names and sizes of the axes of `AxisType.Auto`."""
    return {
        name: size
        for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
        if kind is AxisType.Auto
    }


def _dividing(names: tuple[str, ...], sizes: dict[str, int], length: int) -> tuple[str, ...]:
    """Picks axes, in the order given, as long as `length` can be divided over all those picked."""
    chosen: tuple[str, ...] = ()
    for name in names:
        if name in sizes and length % (math.prod(sizes[x] for x in chosen) * sizes[name]) == 0:
            chosen += (name,)
    return chosen
