"""The static facts of a call, and the symbols of the GPU kernels.

  C = 64   rows of a chunk                      D    the one size of heads, of keys and of values
  Hq, Hkv  query heads, key/value (KV) heads    M    slots, padded
  G        Hq / Hkv                             W    window
  Tq, Tk   query rows and token rows, padded    B    batch rows
  c        cumulative sum of the log decays inside a chunk; c_ref: c at the middle of a gate block
  s        1 - exp(log_decay), how much of a token is written

Tokens lie on a timeline `offset` rows ahead of the queries: query row t is token row t + offset.
Where there are slots, offset is W, so that token row t enters them at query row t, and row t reads
the token rows t < p <= t + W beside them. Every token row up to t + W is then read once, through
the slots or through the window.

Logits and decays are in units of log 2 inside the kernels, for the hardware's exponential. exp in a
formula stands for the same number.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

LOG2E = 1.4426950408889634

CHUNK = 64  # C: the rows of a warpgroup's matrix product
LARGEST_HEAD = 256  # D that the kernels serve
PANEL = 32  # slots that are held in registers at a time
GATE_ROWS = 16  # rows of a gate block, which share a c_ref
GATE_BLOCKS = CHUNK // GATE_ROWS
SIDES = ("key", "value")  # of the slots, which one arithmetic serves
ALIGNED = 32  # float32 numbers: a tensor copy (TMA) starts at a multiple of 128 bytes

LOGITS = plgpu.Layout.WGMMA  # how [C, n] lies in registers
ROW = LOGITS.reduce(1)  # how [C] does, a number for each row of it
COLUMN = LOGITS.reduce(0)  # how [n] does, a number for each column


@dataclasses.dataclass(frozen=True)
class CallSpec:
    """The static facts of a call.

    Fields:
      group: G.
      slots: the slots that are read, before padding; 0: there are none to read.
      empty_slots: without slots, how many stand in the softmax with logit 0 and value 0.
      window: W; None: every token up to the query's.
      offset: of the queries on the timeline.
      ahead: the token rows that come before the arrays' first. They hold nothing, and what is read
        in their place is masked. A multiple of C.
      scale: of the logits.
      masked: whether `Segments` say who sees whom. Without them, every token after the first
        `offset` sees all those before it.
      state: whether the slots at the start are given, and the slots at the end are asked for.
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
        """How many blocks of C token rows a chunk's rows read; None: it depends on the chunk."""
        return None if self.window is None else -(-self.window // CHUNK) + 1


def tile(columns: int, itemsize: int = 2) -> tuple[Any, ...]:
    """The transforms by which [rows, columns] lies in shared memory, as matrix products need it.

    columns: of a row, or fewer for narrower tiles. All operands of a product must lie alike.
    """
    swizzle = min(128, columns * itemsize)
    tiling: Any = plgpu.TilingTransform  # abstract to mypy
    swizzling: Any = plgpu.SwizzleTransform
    return tiling((8, swizzle // itemsize)), swizzling(swizzle)


class Segments(NamedTuple):
    """Who sees whom: the numbers of segments, from 0, and what rows read of the slots; int32."""

    query: jax.Array  # [B, Tq], the row's segment; -2 for padding
    token: jax.Array  # [B, Tk], the token row's; -1 where there is no token
    # [B, Tq]. 0: the row reads no slots; 1: only what has entered in its chunk; 2: also what the
    # slots held at the chunk's start. None: there are no slots.
    slot_access: jax.Array | None

    def arrays(self, *, slots: bool) -> dict[str, jax.Array]:
        """What a kernel reads of them, by name; slots: whether it reads slots."""
        arrays = {"query_segment": self.query, "token_segment": self.token}
        if slots:
            assert self.slot_access is not None
            arrays["slot_access"] = self.slot_access
        return arrays
