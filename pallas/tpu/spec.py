"""The static facts of a call, and the symbols of the fused kernels.

For one KV head: C rows to a chunk, N chunks to a grid step, G query heads to a KV head, M slots, W
window. `cat` is what a chunk reads: the `halo` rows before it (W rounded up to 16) and its own C.
Row r finds the tokens that entered the slots at cat[i], i <= r + d, and its window at
r + d < i <= r + reach, with d = halo - W: complementary, so that one product serves both. The first
`columns` rows of cat, C or C + 16, hold all that enter the slots within the chunk.

Logits and decays are in units of log 2, the hardware's exponential.
"""

import dataclasses

from pallas.tpu.arithmetic import LOG2E

ROW_TILE = 16  # rows of a bfloat16 register


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static facts of a call of the fused kernels.

    Fields:
      group: G, query heads to a KV head.
      slots: M; the arrays' slot axis may be padded beyond it.
      window: W; the tokens that the kernel's window covers.
      wide: the tokens a chunk's rows read besides their slots are the rest of those entering the
        slots during the chunk, and another kernel reads the remainder of the window.
      chunk, chunks: C and N.
      scale: of the logits, not negative.
      rope: queries and keys are rotated in the kernel, by a table.
      rotated: rotated queries and keys are given beside the others.
      feature_map, mask_empty: as the operator's options.
      segments: run numbers say who sees whom; without, every token before sees every other.
      state: the slots at the start are given, and the slots at the end are asked for.
      weight: the slot weight is asked for.
      weight_of_slots: its gradient reaches the slots' logits only.
    """

    group: int
    slots: int
    window: int
    wide: bool
    chunk: int
    chunks: int
    scale: float
    rope: bool
    rotated: bool
    feature_map: str
    mask_empty: bool
    segments: bool
    state: bool
    weight: bool
    weight_of_slots: bool

    @property
    def halo(self) -> int:
        """Rows before the chunk that it reads."""
        return 0 if self.wide else -(-self.window // ROW_TILE) * ROW_TILE

    @property
    def shift(self) -> int:
        """d: how many rows later than cat's own the tokens enter the slots."""
        return 0 if self.wide else self.halo - self.window

    @property
    def reach(self) -> int:
        """The window's last column, relative to the row."""
        return self.chunk if self.wide else self.halo

    @property
    def has_window(self) -> bool:
        return self.reach > 0

    @property
    def window_scale(self) -> float:
        """What makes logits of base 2 of the window's products. With rope both factors hold the
        root of scale * log2(e)."""
        return 1.0 if self.rope else self.scale * LOG2E

    @property
    def window_slope(self) -> float:
        """The derivative of the window's (natural) logits in their products."""
        return 1 / LOG2E if self.rope else self.scale

    @property
    def width(self) -> int:
        """Rows of cat."""
        return self.halo + self.chunk

    @property
    def columns(self) -> int:
        """Rows of cat that enter the slots within the chunk."""
        return self.chunk + (ROW_TILE if self.shift else 0)

    @property
    def tables(self) -> list[str]:
        """The rotary tables: the queries' first, the keys' last."""
        if not self.rope:
            return []
        return ["table", "entering_table"] if self.wide else ["table"]

    @property
    def rows(self) -> int:
        """Rows of a grid step."""
        return self.chunk * self.chunks
