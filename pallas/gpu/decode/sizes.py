"""Which states the decode kernel serves, and how it cuts its work: a validated dataclass."""

import dataclasses

from pallas.constants import MOST_SLOTS

HEAD_SIZES = (64, 128, 256)
"""The sizes of keys and of values that the kernel serves."""

LEAST_SLOTS, SLOTS_MULTIPLE = 16, 8
"""The kernel serves a multiple of 8 slots, from 16 to `MOST_SLOTS`."""

TILE = 4
"""Rows of a tile: each of a warpgroup's four warps has one."""

MULTIPROCESSORS = 132
"""Multiprocessors of an H100 and of an H200."""

MOST_NUMBERS = 32 * 128
"""By default, the numbers of keys (or of values) that a warpgroup reads at once: as many as its
registers hold of both, beside the rest."""


def why_unsupported(entries: int, slots: int | None, key_size: int, value_size: int) -> str | None:
    """Why the kernel cannot serve a state of these sizes, in a line; None if it can.

    Args:
      entries: R, entries of the ring; 0: the state has none.
      slots: M; None: the state has none.
      key_size, value_size: K and V.
    """
    if key_size not in HEAD_SIZES or value_size not in HEAD_SIZES:
        return (
            f"its kernel takes heads of {', '.join(map(str, HEAD_SIZES[:-1]))} or {HEAD_SIZES[-1]},"
            f" got keys of {key_size} and values of {value_size}"
        )
    if entries % TILE or 0 < entries < 2 * TILE or (entries == 0 and slots is None):
        return (
            f"its kernel takes rings of a multiple of {TILE} entries from {2 * TILE} on, or 0,"
            f" got {entries}"
        )
    if slots is not None and (slots % SLOTS_MULTIPLE or not LEAST_SLOTS <= slots <= MOST_SLOTS):
        return (
            f"its kernel takes {LEAST_SLOTS} to {MOST_SLOTS} slots in multiples of"
            f" {SLOTS_MULTIPLE}, got {slots}"
        )
    return None


@dataclasses.dataclass(frozen=True)
class DecodeSizes:
    """How the work on one batch row's key/value head is shared.

    Fields:
      warpgroups: warpgroups of a thread block, 2 or 4; they share its slots and its part of the
        ring.
      rows: ring entries that a warpgroup reads at once, a multiple of 4 from 8 to 64.
      slot_tiles: the most tiles (of four slots) that a warpgroup updates at once; 4, 8, 12 or 16.
      splits: thread blocks that share the ring, 1 to 64. More than 1 needs a state without slots,
        and a ring of a multiple of `rows` entries.

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

    def check(self, entries: int, slots: int | None) -> None:
        """Raises ValueError if a state of R entries and M (or no) slots cannot be cut like this."""
        tiles = (slots or 0) // TILE
        if slots is not None and (tiles % self.warpgroups or tiles < 2 * self.warpgroups):
            raise ValueError(
                f"DecodeSizes: warpgroups={self.warpgroups} cannot share {slots} slots in fours, "
                "two or more each; make it 2"
            )
        if 0 < entries < self.rows:
            raise ValueError(
                f"DecodeSizes: rows={self.rows} is more than the ring's {entries} entries"
            )
        if self.splits > 1 and (slots is not None or entries % self.rows):
            raise ValueError(
                f"DecodeSizes: splits={self.splits} needs a state without slots and a ring of a "
                f"multiple of rows={self.rows} entries; make it 1"
            )


def default_decode_sizes(
    blocks: int, entries: int, slots: int | None, head_size: int
) -> DecodeSizes:
    """Sizes chosen by static figures: nothing was measured.

    Args:
      blocks: batch rows times key/value heads.
      entries: R, entries of the ring; 0: the state has none.
      slots: M; None: the state has none.
      head_size: the larger of K and V.
    """
    # A warpgroup has two tiles of slots or more, and all have equally many.
    warpgroups = 4 if slots is None or (slots % 16 == 0 and slots >= 32) else 2
    most = MOST_NUMBERS // max(head_size, 128)
    share = entries // (warpgroups * TILE) * TILE
    rows = min(most, max(2 * TILE, share))
    splits = 1
    if slots is None and entries % rows == 0:
        shares = entries // (4 * warpgroups * rows)  # more would leave a block too little to read
        splits = max(1, min(-(-MULTIPROCESSORS // blocks), shares, 64))
    return DecodeSizes(warpgroups, rows, most // TILE, splits)
