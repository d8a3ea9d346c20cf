"""How the TPU kernels cut their work: a validated dataclass, with defaults for each chip."""

import dataclasses

from jax.experimental.pallas import tpu as pltpu


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Rows, chunks and emission order of the fused kernels.

    A grid step takes `chunks_per_step` chunks of `chunk` rows. The compiler keeps close to program
    order, so the chunks' stages are emitted side by side: `group` chunks in lockstep, each group
    `skew` stages behind the one before.

    Fields:
      chunk: rows of a chunk (C), 32, 64 or 128.
      chunks_per_step: chunks of a grid step (N), 1, 2, 4, 8 or 16, so that it has at least 128
        rows; the slots are saved once a grid step.
      forward_group, forward_skew: emission order of the forward.
      backward_group, backward_skew: emission order of the backward.

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
        if self.chunk * self.chunks_per_step < 128:
            raise ValueError(
                "BlockSizes: chunk * chunks_per_step must be at least 128, "
                f"got {self.chunk} * {self.chunks_per_step}"
            )


# Chosen by static schedules at K = V = 128, M = W = 64 in bfloat16: for one query head to a KV
# head, and for several.
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
    """Those of the chip that is compiled for.

    The chip is the ambient mesh's (`jax.set_mesh`), or else the default device; v5e's sizes serve
    where that is no TPU.

    Args:
      group: query heads to a KV head.
      segments: whether there are segments: the backward then waits longer for its masks.
    """
    try:
        chip = str(pltpu.get_tpu_info().chip_version)
    except ValueError:
        chip = "v5e"
    sizes = _DEFAULTS.get(chip, _DEFAULTS["v5e"])[group > 1]
    return dataclasses.replace(sizes, backward_skew=2) if segments and group == 1 else sizes
