"""The grid of the fused kernels, and the blocks that their arrays are read and written in."""

import dataclasses
import math
from typing import Self

import jax
from jax.experimental import pallas as pl

from pallas.tpu.spec import CallSpec

CARRY_BYTES = 4 << 20  # of VMEM, for what a step leaves to the next


@dataclasses.dataclass(frozen=True)
class Grid:
    """(B, H / heads, steps, heads): within a step of C * N rows, `heads` KV heads take turns.

    So what depends on the rows alone, the rotary table above all, is fetched once for all of them.
    The backward's steps run from the last rows to the first (`reverse`).
    """

    B: int
    H: int
    T: int
    K: int
    V: int
    M: int
    spec: CallSpec
    reverse: bool = False

    @classmethod
    def of(cls, inputs: dict[str, jax.Array], spec: CallSpec, *, reverse: bool = False) -> Self:
        B, H, M, T = inputs["log_decay"].shape
        K, V = (inputs[name].shape[2] // H for name in ("key", "value"))
        return cls(B, H, T, K, V, M, spec, reverse)

    @property
    def heads(self) -> int:
        """KV heads that take turns: as many as VMEM holds the carried state of.

        One, if the slots at the end are asked for: their block must stay while the steps go by.
        """
        if self.spec.state:
            return 1
        each = 4 * (self.M + 2 * self.spec.halo) * (self.K + self.V)
        return max(h for h in range(1, self.H + 1) if self.H % h == 0 and h * each <= max(
            CARRY_BYTES, each
        ))  # fmt: skip

    @property
    def steps(self) -> int:
        return self.T // self.spec.step_rows

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.B, self.H // self.heads, self.steps, self.heads)

    def _step(self, t):
        return self.steps - 1 - t if self.reverse else t

    def _block(self, shape: tuple[int, ...], index) -> pl.BlockSpec:
        """index: of batch, KV head and step."""
        return pl.BlockSpec(shape, lambda b, o, t, h: index(b, o * self.heads + h, self._step(t)))

    def tokens(self, size: int) -> pl.BlockSpec:
        """[B, T, H * size]."""
        return self._block((1, self.spec.step_rows, size), lambda b, h, t: (b, t, h))

    def lanes(self, size: int) -> pl.BlockSpec:
        """[B, H, size, T]."""
        return self._block((1, 1, size, self.spec.step_rows), lambda b, h, t: (b, h, 0, t))

    def table(self, batch: int) -> pl.BlockSpec:
        """[1 or B, T, 2 K]."""
        return self._block(
            (1, self.spec.step_rows, 2 * self.K), lambda b, h, t: (b if batch > 1 else 0, t, 0)
        )

    def chunks(self, size: int) -> pl.BlockSpec:
        """[B, T / C, size]."""
        return self._block((1, self.spec.chunks, size), lambda b, h, t: (b, t, 0))

    def slots(self) -> pl.BlockSpec:
        """[B, H, M, K + V]."""
        return self._block((1, 1, self.M, self.K + self.V), lambda b, h, t: (b, h, 0, 0))

    def starts(self) -> pl.BlockSpec:
        """[B, H, steps, M, K + V]."""
        return self._block((1, 1, 1, self.M, self.K + self.V), lambda b, h, t: (b, h, t, 0, 0))

    def input_specs(self, inputs: dict[str, jax.Array]) -> dict[str, pl.BlockSpec]:
        """The blocks of the inputs that forward and backward share."""
        specs = {
            "query": self.tokens(self.spec.group * self.K),
            "key": self.tokens(self.K),
            "value": self.tokens(self.V),
            "log_decay": self.lanes(self.M),
        }
        if self.spec.rotated:
            specs |= {"rotated_query": specs["query"], "rotated_key": specs["key"]}
        for name in self.spec.rope_tables:
            specs[name] = self.table(inputs[name].shape[0])
        if self.spec.segments:
            specs["row_segments"] = self._block(
                (1, 8, self.spec.step_rows), lambda b, h, t: (b, 0, t)
            )
            specs["chunk_segments"] = self.chunks(256 + self.spec.chunk_tokens)
        if self.spec.state:
            specs["slots"] = self.slots()
        return specs

    def halo_specs(self, inputs: dict[str, jax.Array]) -> dict[str, pl.BlockSpec]:
        """The rows before the step's own, in blocks of `halo_rows`, read from the same arrays."""
        rows, lanes = self.halo_rows, max(self.halo_rows, 128)

        def before(t, size):
            per_step = self.spec.step_rows // size
            return jax.numpy.maximum(t * per_step - 1, 0)

        def token_block(size):
            return self._block((1, rows, size), lambda b, h, t: (b, before(t, rows), h))

        specs = {
            "key": token_block(self.K),
            "value": token_block(self.V),
            "log_decay": self._block(
                (1, 1, self.M, lanes), lambda b, h, t: (b, h, 0, before(t, lanes))
            ),
        }
        if self.spec.rotated:
            specs["rotated_key"] = specs["key"]
        if self.spec.segments:
            specs["row_segments"] = self._block(
                (1, 8, lanes), lambda b, h, t: (b, 0, before(t, lanes))
            )
        if self.spec.rope:
            shared = inputs["rope_table"].shape[0] == 1
            specs["rope_table"] = self._block(
                (1, rows, 2 * self.K), lambda b, h, t: (0 if shared else b, before(t, rows), 0)
            )
        return specs

    @property
    def halo_rows(self) -> int:
        """The halo, rounded up to a power of two: a step's rows are a multiple of it."""
        return 1 << math.ceil(math.log2(max(self.spec.halo, 1)))
