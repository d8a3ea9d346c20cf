"""What is static about a call of the fused kernels, and the glossary of their symbols.

A kernel works for one batch row and one key/value head at a time, and for the G query heads that
this head serves. A *row* is a position of the call: it has a query, which is answered, and a token,
whose key and value later rows read. Rows are taken in grid steps of `chunks` chunks of C rows.

    B, T          batch rows; rows of the call, padded to whole grid steps
    Hq, Hkv, G    query heads, key/value heads, G = Hq / Hkv
    K, V          key dim, value dim, multiples of 128
    K2            columns of a rotation table (`table_columns`): K, or 2 K
    M, W          slots, a multiple of 16; window size
    C             rows of a chunk
    g, s          log decay of a token and slot; s = 1 - exp(g), how much of the token is written
    c             inclusive cumulative sum of g over the chunk's tokens (`cumulative`)
    c_ref         c at the middle row of a gate block of rows (`reference`)
    SK0, SV0      slot keys and values at the chunk's start, before its first token enters
    a, b          logits of the slots, of the window
    p, lse        softmax weights, the log-sum-exp of a row's logits
    omega         the slot weight, the sum of p over the slots
    d_x, delta    the gradient of x; the sum of p dp over a row's logits

**The chunk's tokens** are those that its rows read: the `halo` tokens before the chunk (W rounded
up to 16) and the C of its own rows. Counting them from 0, the chunk's row r finds

    in its slots     token i with i <= r + halo_padding, and what the slots held at the start
    in its window    token i with r + halo_padding < i <= r + halo

where halo_padding = halo - W: together all tokens up to the row's own, so that one product of the
queries with the chunk's tokens serves both. The first C of the chunk's tokens are in the slots at
the chunk's end. The rows see up to halo_padding more: `entering_tokens`, C or C + 16, counts all
that may be in the slots of some row.

**A wide window** reaches back further than a grid step may hold. The fused kernels then read the
tokens shifted: the chunk's tokens are the C that enter the slots at its rows, without a halo. Row r
finds token i in its slots for i <= r and in its window for i > r. The remainder of the window,
which ends with the row's own token, is read by the kernels of `wide_window.py`.

Logits, decays and the log-sum-exp are in units of log 2, because exp2 is the hardware's
exponential. Arrays with rows as their last axis keep the rows in lanes: [B, Hkv, G, T].
"""

import dataclasses

from pallas.tpu.arithmetic import LOG2E

ROW_TILE = 16  # rows of a bfloat16 register
LARGEST_HEAD = 512  # K and V that the fused kernels serve


@dataclasses.dataclass(frozen=True)
class CallSpec:
    """What is static about a call of the fused kernels.

    Fields:
      group: G, the query heads of a key/value head.
      slots: M; the arrays' slot axis may be padded beyond it.
      window: W.
      wide_window: the window is wide (see this module's docstring).
      chunk: C.
      chunks: chunks of a grid step.
      scale: of the logits, not negative.
      rope: queries and keys are rotated in the kernel, by a table.
      rotated: rotated queries and keys are given beside the others.
      feature_map, mask_empty: as the operator's options slot_feature_map and empty_slots="mask".
      segments: segment numbers say who sees whom; without them every row sees all tokens before.
      state: the slots at the start are given, and the slots at the end are asked for.
      slot_weight: the slot weight is asked for.
      pull_slots_only: the slot weight's gradient reaches the slots' logits only.
    """

    group: int
    slots: int
    window: int
    wide_window: bool
    chunk: int
    chunks: int
    scale: float
    rope: bool
    rotated: bool
    feature_map: str
    mask_empty: bool
    segments: bool
    state: bool
    slot_weight: bool
    pull_slots_only: bool

    @property
    def step_rows(self) -> int:
        """Rows of a grid step."""
        return self.chunk * self.chunks

    @property
    def halo(self) -> int:
        """Tokens before the chunk's own that it reads."""
        return 0 if self.wide_window else -(-self.window // ROW_TILE) * ROW_TILE

    @property
    def halo_padding(self) -> int:
        """Tokens of the halo that are in the slots of the chunk's first row already."""
        return 0 if self.wide_window else self.halo - self.window

    @property
    def chunk_tokens(self) -> int:
        """How many tokens a chunk reads."""
        return self.halo + self.chunk

    @property
    def entering_tokens(self) -> int:
        """How many of the chunk's tokens, the first ones, may be in the slots of some row."""
        return self.chunk + (ROW_TILE if self.halo_padding else 0)

    @property
    def has_window(self) -> bool:
        """Whether the fused kernels read any token beside the slots."""
        return self.wide_window or self.halo > 0

    @property
    def window_scale(self) -> float:
        """The factor from the window's products to logits in units of log 2.

        With rope it is in the table already: both factors hold the root of scale * log2(e).
        """
        return 1.0 if self.rope else self.scale * LOG2E

    @property
    def window_slope(self) -> float:
        """The derivative of the window's logits, in natural units, in their products."""
        return 1 / LOG2E if self.rope else self.scale

    @property
    def rope_tables(self) -> list[str]:
        """The names of the rotation tables: the queries' first, the tokens' last."""
        if not self.rope:
            return []
        return ["rope_table", "token_rope_table"] if self.wide_window else ["rope_table"]
