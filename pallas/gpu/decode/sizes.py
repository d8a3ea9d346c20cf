"""How the decode kernel cuts its work: a validated dataclass, with defaults."""

import dataclasses

TILE = 4
"""Rows of a tile, a warp's each."""

MULTIPROCESSORS = 132
"""Of an H100 and an H200."""

MOST_NUMBERS = 32 * 128
"""Of a panel of keys or values, by default: what registers hold of both beside the rest."""


@dataclasses.dataclass(frozen=True)
class DecodeSizes:
    """Of a batch row's key/value head.

    Fields:
      warpgroups: of a block, 2 or 4; they share its slots and its part of the ring.
      rows: ring entries that a warpgroup reads at once, a multiple of 4 from 8 to 64.
      slot_tiles: fours of slots that a warpgroup updates at once, at most; 4, 8, 12 or 16.
      splits: blocks that share the ring, 1 to 64; more than 1 only of a state without slots, and
        with a ring of a multiple of `rows` entries.

    Raises:
      ValueError: a field is out of its range; the message names it and its value.
    """

    warpgroups: int = 4
    rows: int = 8
    slot_tiles: int = 8
    splits: int = 1

    def __post_init__(self) -> None:
        allowed = {
            "warpgroups": (2, 4),
            "rows": range(2 * TILE, 65, TILE),
            "slot_tiles": range(4, 17, 4),
            "splits": range(1, 65),
        }
        for name, values in allowed.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value not in values:
                one_of = f"{values[0]}, {values[1]} .. {values[-1]}"
                raise ValueError(f"DecodeSizes: {name} must be one of {one_of}, got {value!r}")


def default_decode_sizes(
    blocks: int, entries: int, slots: int | None, head_dim: int
) -> DecodeSizes:
    """By static figures, nothing was measured.

    Args:
      blocks: batch rows times key/value heads.
      entries: R, of the ring; 0: there is none.
      slots: M; None: the state has none.
      head_dim: the larger of K and V.
    """
    # A warpgroup's slots are two tiles at least, and tiles are shared evenly.
    warpgroups = 4 if slots is None or (slots % 16 == 0 and slots >= 32) else 2
    most = MOST_NUMBERS // max(head_dim, 128)
    share = entries // (warpgroups * TILE) * TILE
    rows = min(most, max(2 * TILE, share))
    splits = 1
    if slots is None and entries % rows == 0:
        shares = entries // (4 * warpgroups * rows)  # each has some to do
        splits = max(1, min(-(-MULTIPROCESSORS // blocks), shares, 64))
    return DecodeSizes(warpgroups, rows, most // TILE, splits)
