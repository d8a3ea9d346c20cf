"""How the GPU kernels cut their work: a validated dataclass, with defaults."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Warpgroups and pipeline depths; a chunk has 64 rows, those of a warpgroup's product.

    Fields:
      warpgroups: query heads of a KV head that a thread block of `forward/output.py` serves, by a
        compute warpgroup each: 1, or 2 where the group is even and D is up to 128. They share the
        keys, the values, the slots and the gates.
      stages: blocks of keys and values in flight in `forward/output.py`, 1 to 4.
      state_stages: items in flight in the walk of the states and of their gradients, 1 to 4.
      window_stages: blocks of rows or tokens in flight in the window's backward, 1 to 4.
      token_stages: heads in flight in the backward of the slots' tokens, 1 to 4; fewer if they do
        not fit.

    Raises:
      ValueError: a field is out of its range; the message names it and its value.
    """

    warpgroups: int = 1
    stages: int = 2
    state_stages: int = 3
    window_stages: int = 2
    token_stages: int = 2

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name, most = field.name, 2 if field.name == "warpgroups" else 4
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(f"BlockSizes: {name} must be an int of 1 to {most}, got {value!r}")


def default_block_sizes(head_dim: int, slots: int) -> BlockSizes:
    """Block sizes that fit a Hopper block's 227 KB of shared memory without spilling registers.

    Chosen by what ptxas says; nothing was measured. Two compute warpgroups would share what they
    read, but have 168 registers a thread and spill: `setmaxnreg`, by which they would take the
    fetch warpgroup's, is ignored (ptxas: C7504) in code to be linked, and jax has nvJitLink compile
    that wherever it finds the library, which CUDA's others need.

    Args:
      head_dim: D.
      slots: M, padded; 0 if none are read.
    """
    return BlockSizes(stages=2 if head_dim <= 128 or not slots else 1)
