"""A bar for weights that are copied."""

import sys

from tqdm import tqdm

# Less is copied before anyone looks for a bar.
_FROM_BYTES = 2**28


def bytes_bar(size: int) -> tqdm:
    """Of so many bytes; its `update` takes those of each piece."""
    return tqdm(
        total=size, unit="B", unit_scale=True, dynamic_ncols=True, disable=size < _FROM_BYTES,
        mininterval=0.1 if sys.stderr.isatty() else 10.0,
    )  # fmt: skip
