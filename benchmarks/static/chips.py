"""The TPUs that can be compiled for without one, and the rates that bounds are taken from."""

import dataclasses

CYCLES_PER_MATMUL = 4
"""Cycles of one `vmatmul` instruction (16 rows of bfloat16 times one matrix unit), with all units
busy."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU generation. Rates are of one TensorCore, because a schedule is for one.

    Attributes:
        topology: the smallest one libtpu compiles for.
        cores: TensorCores of a chip.
        flops: bfloat16 operations a second.
        hbm: bytes a second.
        mxu_size: rows and columns of a matrix unit.
    """

    topology: str
    cores: int
    flops: float
    hbm: float
    mxu_size: int

    @property
    def clock(self) -> float:
        """Cycles a second."""
        return self.flops * CYCLES_PER_MATMUL / (2 * 16 * self.mxu_size**2)

    @property
    def hbm_bytes_per_cycle(self) -> float:
        return self.hbm / self.clock


# Peak and HBM: cloud.google.com/tpu/docs/v5e, /v5p, /v6e and /tpu7x, there of a whole chip.
# The clock follows from the peak: v5e and v5p have four units of 128x128 a core, a row a cycle
# each, so 16 rows take 4 cycles: 1.5 and 1.75 GHz. On v6e and tpu7x (two of 256x256) 4 cycles are
# assumed as well: 1.75 and 2.2 GHz. That an instruction holds 16 rows was counted on the bundles of
# a 512x512x512 product: 512 instructions with units of 128x128, 128 with units of 256x256.
CHIPS = {
    "v5e": Chip("v5e:2x2", cores=1, flops=197e12, hbm=819e9, mxu_size=128),
    "v5p": Chip("v5p:2x2x1", cores=2, flops=459e12 / 2, hbm=2765e9 / 2, mxu_size=128),
    "v6e": Chip("v6e:2x2", cores=1, flops=918e12, hbm=1638e9, mxu_size=256),
    "tpu7x": Chip("tpu7x:2x2x1", cores=2, flops=2307e12 / 2, hbm=7380e9 / 2, mxu_size=256),
}
