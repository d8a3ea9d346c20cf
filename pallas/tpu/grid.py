"""The grid of the fused kernels, and the blocks in which their arrays are read and written."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas.tpu.arithmetic import LANES, table_columns
from pallas.tpu.spec import CallSpec

CARRY_BYTES = 4 << 20  # of VMEM, for what a grid step leaves to the next


@dataclasses.dataclass(frozen=True)
class Grid:
    """The grid (B, Hkv / heads, steps, heads): `heads` key/value heads take turns within a step.

    What depends on the rows alone, the rotation table above all, is so fetched once for all of
    them. The axes over batch rows and groups of heads may run in any order; steps and heads run in
    order, the forward's steps from the first rows to the last, the backward's (`reverse`) from the
    last to the first. Scratch memory carries the slots, or their gradients, from step to step.
    """

    B: int
    Hkv: int
    T: int
    K: int
    V: int
    M: int
    spec: CallSpec
    reverse: bool = False

    @classmethod
    def of(cls, inputs: dict[str, jax.Array], spec: CallSpec, *, reverse: bool = False) -> Self:
        B, Hkv, M, T = inputs["token_log_decay"].shape
        K, V = (inputs[name].shape[2] // Hkv for name in ("token_key", "token_value"))
        return cls(B, Hkv, T, K, V, M, spec, reverse)

    @property
    def heads(self) -> int:
        """Key/value heads that take turns: as many as VMEM holds the carried arrays of.

        One, if the slots at the end are asked for: their block must stay while the steps go by.
        """
        if self.spec.state:
            return 1
        bytes_each = 4 * (self.M + 2 * self.spec.halo) * (self.K + self.V)
        most = max(CARRY_BYTES // bytes_each, 1)
        return max(n for n in range(1, min(most, self.Hkv) + 1) if self.Hkv % n == 0)

    @property
    def steps(self) -> int:
        return self.T // self.spec.step_rows

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.B, self.Hkv // self.heads, self.steps, self.heads)

    def _step(self, t):
        return self.steps - 1 - t if self.reverse else t

    def _block(self, shape: tuple[int, ...], index: Callable[..., Any]) -> pl.BlockSpec:
        """index: from batch row, key/value head and step (in order of rows) to the block."""

        def at_grid_point(b, outer_head, t, head):
            return index(b, outer_head * self.heads + head, self._step(t))

        return pl.BlockSpec(shape, at_grid_point)

    def tokens(self, size: int) -> pl.BlockSpec:
        """A step's rows of [B, T, Hkv * size]."""
        return self._block((1, self.spec.step_rows, size), lambda b, h, t: (b, t, h))

    def lanes(self, size: int) -> pl.BlockSpec:
        """A step's rows of [B, Hkv, size, T]."""
        return self._block((1, 1, size, self.spec.step_rows), lambda b, h, t: (b, h, 0, t))

    def table(self, batch: int) -> pl.BlockSpec:
        """A step's rows of a rotation table [1 or B, T, K2]."""
        shape = (1, self.spec.step_rows, table_columns(self.K))
        return self._block(shape, lambda b, h, t: (b if batch > 1 else 0, t, 0))

    def slots(self) -> pl.BlockSpec:
        """A head's slots [B, Hkv, M, K + V]."""
        return self._block((1, 1, self.M, self.K + self.V), lambda b, h, t: (b, h, 0, 0))

    def starts(self) -> pl.BlockSpec:
        """The slots at a step's start, of [B, Hkv, steps, M, K + V]."""
        return self._block((1, 1, 1, self.M, self.K + self.V), lambda b, h, t: (b, h, t, 0, 0))

    def input_specs(self, inputs: dict[str, jax.Array]) -> dict[str, pl.BlockSpec]:
        """The blocks of the inputs that forward and backward share."""
        spec = self.spec
        specs = {
            "query": self.tokens(spec.group * self.K),
            "token_key": self.tokens(self.K),
            "token_value": self.tokens(self.V),
            "token_log_decay": self.lanes(self.M),
        }
        if spec.rotated:
            specs |= {"rotated_query": specs["query"], "token_rotated_key": specs["token_key"]}
        for name in spec.rope_tables:
            specs[name] = self.table(inputs[name].shape[0])
        if spec.segments:
            specs["row_segments"] = self._block((1, 8, spec.step_rows), lambda b, h, t: (b, 0, t))
            specs["chunk_segments"] = self._block(
                (1, spec.chunks, 2 * LANES + spec.chunk_tokens), lambda b, h, t: (b, t, 0)
            )
        if spec.state:
            specs["slots"] = self.slots()
        return specs

    def halo_specs(self, inputs: dict[str, jax.Array]) -> dict[str, pl.BlockSpec]:
        """Blocks of the same arrays that end where the step's own begin, and hold its halo.

        Before the first step there is none: the array's first block stands there, masked.
        """
        spec, rows, lanes = self.spec, self._halo_rows, max(self._halo_rows, LANES)

        def before(t, size):
            per_step = spec.step_rows // size
            return jnp.maximum(t * per_step - 1, 0)

        def tokens(size):
            return self._block((1, rows, size), lambda b, h, t: (b, before(t, rows), h))

        specs = {
            "token_key": tokens(self.K),
            "token_value": tokens(self.V),
            "token_log_decay": self._block(
                (1, 1, self.M, lanes), lambda b, h, t: (b, h, 0, before(t, lanes))
            ),
        }
        if spec.rotated:
            specs["token_rotated_key"] = specs["token_key"]
        if spec.segments:
            specs["row_segments"] = self._block(
                (1, 8, lanes), lambda b, h, t: (b, 0, before(t, lanes))
            )
        if spec.rope:
            shared = inputs["rope_table"].shape[0] == 1
            specs["rope_table"] = self._block(
                (1, rows, table_columns(self.K)),
                lambda b, h, t: (0 if shared else b, before(t, rows), 0),
            )
        return specs

    @property
    def _halo_rows(self) -> int:
        """The halo, rounded up to a power of two: a step's rows are a multiple of it."""
        return 1 << math.ceil(math.log2(max(self.spec.halo, 1)))
