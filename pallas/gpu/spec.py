"""The static facts of a call, and the symbols of the GPU kernels.

For one KV head: C = 64 rows to a chunk, G query heads, M slots, W window, D the size of a head, of
keys and values alike. Tokens lie on a timeline `offset` rows ahead of the queries: query row t is
token row t + offset. Where there are slots, offset is W, so that token row t enters them at query
row t, and row t reads the token rows t < p <= t + W beside them. Every token row up to t + W is
then read once, through the slots or through the window.

Logits and decays are in units of log 2, the hardware's exponential.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

LOG2E = 1.4426950408889634

CHUNK = 64  # C: the rows of a warpgroup's matrix product
PANEL = 32  # slots that are held in registers at a time
GATE_ROWS = 16  # that share a reference of their gates
GATE_BLOCKS = CHUNK // GATE_ROWS
ALIGNED = 32  # float32 numbers: a tensor copy (TMA) starts at a multiple of 128 bytes

LOGITS = plgpu.Layout.WGMMA  # of [C, n] in registers
ROW = LOGITS.reduce(1)  # of [C], a number for each row of it
COLUMN = LOGITS.reduce(0)  # of [n], a number for each column


@dataclasses.dataclass(frozen=True)
class CallSpec:
    """The static facts of a call.

    Fields:
      group: G, query heads to a KV head.
      slots: M; the arrays' slot axis may be padded beyond it. 0: there are none to read.
      empty_slots: without slots, how many stand in the softmax with logit 0 and value 0.
      window: W; None: every token up to the query's.
      offset: of the queries on the timeline.
      ahead: the token rows that come before the arrays' first; they hold nothing, and what is read
        in their place is masked. A multiple of C.
      scale: of the logits.
      masked: `Segments` say who sees whom; without, every token after the first `offset` sees all
        those before it.
      state: the slots at the start are given, and the slots at the end are asked for.
      weight: what the slot weight's gradient reaches, "all" logits or the "slots" only; None: it
        has none.
    """

    group: int
    slots: int
    empty_slots: int
    window: int | None
    offset: int
    ahead: int
    scale: float
    masked: bool
    state: bool
    weight: Literal["all", "slots"] | None = None

    @property
    def blocks(self) -> int | None:
        """Blocks of C token rows that a chunk's rows read; None: it depends on the chunk."""
        return None if self.window is None else -(-self.window // CHUNK) + 1


def tile(columns: int, itemsize: int = 2) -> tuple[Any, ...]:
    """How [rows, columns] lies in shared memory. The operands of a product must lie alike."""
    swizzle = min(128, columns * itemsize)
    tiling: Any = plgpu.TilingTransform  # abstract to mypy
    swizzling: Any = plgpu.SwizzleTransform
    return tiling((8, swizzle // itemsize)), swizzling(swizzle)


class Segments(NamedTuple):
    """Who sees whom, by the numbers of segments (from 0), int32."""

    query: jax.Array  # [B, Tq], of the row's segment; -2 for padding
    token: jax.Array  # [B, Tk], of the token row's; -1 where there is no token
    slot_access: jax.Array | None  # [B, Tq], 0: no slots; 1: not those at the chunk's start; 2: all

    def arrays(self, *, slots: bool) -> dict[str, jax.Array]:
        """What a kernel reads of them, by its name there; slots: it reads slots."""
        arrays = {"query_segment": self.query, "token_segment": self.token}
        if slots:
            assert self.slot_access is not None
            arrays["slot_access"] = self.slot_access
        return arrays
