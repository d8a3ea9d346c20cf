"""How the decode kernel cuts its work: a validated dataclass, with defaults."""

import dataclasses

TILE = 4
"""Rows of a tile, a warp's each."""

MULTIPROCESSORS = 132
"""Of an H100 and an H200."""

MOST_ROWS = 32
"""Of a panel, by default: what a warpgroup's registers hold beside the rest."""


@dataclasses.dataclass(frozen=True)
class DecodeSizes:
    """Of a batch row's key/value head.

    Fields:
      warpgroups: of a block, 2 or 4; they share its slots and its part of the ring.
      rows: ring entries that a warpgroup reads at once, a multiple of 4 from 8 to 64.
      splits: blocks that share the ring, 1 to 64; more than 1 only of a state without slots, and
        with a ring of a multiple of `rows` entries.

    Raises:
      ValueError: a field is out of its range; the message names it and its value.
    """

    warpgroups: int
    rows: int
    splits: int = 1

    def __post_init__(self) -> None:
        allowed = {"warpgroups": (2, 4), "rows": range(2 * TILE, 65, TILE), "splits": range(1, 65)}
        for name, values in allowed.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value not in values:
                one_of = ", ".join(map(str, values)) if name != "splits" else "1 to 64"
                raise ValueError(f"DecodeSizes: {name} must be one of {one_of}, got {value!r}")


def default_decode_sizes(
    blocks: int, entries: int, slots: int | None, group: int, head_dim: int
) -> DecodeSizes:
    """By static figures, nothing was measured.

    Args:
      blocks: batch rows times key/value heads.
      entries: R, of the ring; 0: there is none.
      slots: M; None: the state has none.
      group: query heads to a key/value head.
      head_dim: the larger of K and V.
    """
    wanted = 4 if group * head_dim <= 4 * 128 else 2  # so that none of their registers spill
    if slots is not None and (slots % 16 or slots < 32):
        wanted = 2  # each has two tiles at least
    warpgroups = wanted
    share = entries // (warpgroups * TILE) * TILE
    rows = min(MOST_ROWS, max(2 * TILE, share))
    splits = 1
    if slots is None and entries % rows == 0:
        most = entries // (4 * warpgroups * rows)  # each has some to do
        splits = max(1, min(-(-MULTIPROCESSORS // blocks), most, 64))
    return DecodeSizes(warpgroups, rows, splits)
