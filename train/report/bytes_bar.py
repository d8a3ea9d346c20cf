"""A progress bar for copying weights."""

import sys

from tqdm import tqdm

# Less than this is copied before anyone looks for a bar.
_FROM_BYTES = 2**28


def bytes_bar(size: int) -> tqdm:
    """Makes a bar of `size` bytes; call its `update` with the bytes of each piece."""
    return tqdm(
        total=size, unit="B", unit_scale=True, dynamic_ncols=True, disable=size < _FROM_BYTES,
        mininterval=0.1 if sys.stderr.isatty() else 10.0,
    )  # fmt: skip
