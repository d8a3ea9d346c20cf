"""How the TPU kernels cut their work: a validated dataclass, with defaults for each chip."""

import dataclasses
from typing import Self

from jax.experimental.pallas import tpu as pltpu

LEAST_STEP_ROWS = 128  # of a grid step: as many as a register has lanes


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """How many rows a grid step takes, and how its chunks' work is interleaved (`emission.emit`).

    Fields:
      chunk: C, the rows of a chunk: 32, 64 or 128.
      chunks_per_step: chunks of a grid step: 1, 2, 4, 8 or 16, so that it has at least 128 rows.
        The slots are saved once a grid step.
      forward_group, backward_group: chunks that go through their stages in lockstep.
      forward_skew, backward_skew: how many stages each such set of chunks is behind the one before.

    Raises:
      ValueError: a field is out of its range; the message names it and its value.
    """

    chunk: int = 64
    chunks_per_step: int = 8
    forward_group: int = 4
    forward_skew: int = 2
    backward_group: int = 2
    backward_skew: int = 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"BlockSizes: {field.name} must be a positive int, got {value!r}")
        if self.chunk not in (32, 64, 128):
            raise ValueError(f"BlockSizes: chunk must be 32, 64 or 128, got {self.chunk}")
        if self.chunks_per_step not in (1, 2, 4, 8, 16):
            raise ValueError(
                f"BlockSizes: chunks_per_step must be 1, 2, 4, 8 or 16, got {self.chunks_per_step}"
            )
        if self.step_rows < LEAST_STEP_ROWS:
            raise ValueError(
                f"BlockSizes: chunk * chunks_per_step must be at least {LEAST_STEP_ROWS}, "
                f"got {self.chunk} * {self.chunks_per_step}"
            )

    def with_half_the_chunks(self) -> Self | None:
        """Halves the chunks of a grid step; None if no step may be shorter."""
        if self.step_rows < 2 * LEAST_STEP_ROWS:
            return None
        return dataclasses.replace(self, chunks_per_step=self.chunks_per_step // 2)

    @property
    def step_rows(self) -> int:
        """Rows of a grid step."""
        return self.chunk * self.chunks_per_step


# By chip, for one query head to a key/value head and for several: chosen by static schedules at
# K = V = 128, M = W = 64 in bfloat16.
_SKEWED = BlockSizes(chunks_per_step=16, forward_group=2, forward_skew=1, backward_group=2)
_DEFAULTS = {
    "v5e": (
        _SKEWED,
        BlockSizes(forward_group=1, forward_skew=1, backward_group=2, backward_skew=2),
    ),
    "v5p": (
        _SKEWED,
        BlockSizes(forward_group=1, forward_skew=1, backward_group=2, backward_skew=2),
    ),
    "v6e": (
        dataclasses.replace(_SKEWED, backward_group=4, backward_skew=2),
        BlockSizes(forward_group=2, forward_skew=1, backward_group=4, backward_skew=2),
    ),
}
_DEFAULTS["7x"] = _DEFAULTS["v6e"]


def default_block_sizes(group: int, segments: bool) -> BlockSizes:
    """The block sizes for the chip that is compiled for.

    That is the ambient mesh's (`jax.set_mesh`), or else the default device's; v5e's sizes serve
    where that is no TPU.

    Args:
      group: query heads to a key/value head.
      segments: whether there are segments: the backward then waits longer for its masks.
    """
    try:
        chip = str(pltpu.get_tpu_info().chip_version)
    except ValueError:
        chip = "v5e"
    sizes = _DEFAULTS.get(chip, _DEFAULTS["v5e"])[group > 1]
    return dataclasses.replace(sizes, backward_skew=2) if segments and group == 1 else sizes
