"""Windows as the authors of Native Hybrid Attention write them: one size, and full layers."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from nha_jax.config import ModelConfig

LARGEST_WINDOW = 64
"""Beyond it the authors' code leaves the slots out, and the layer is none of theirs any more."""

FULL_WINDOW = 2048
"""What the authors' layers of full attention see at most: the context that they trained with."""

Layout = tuple[int | None, ...]

KEYS = ("window_size", "block_size", "transformer_idx")


def read_layout(values: Mapping[str, Any], num_layers: int) -> tuple[Layout, list[str]]:
    """The window of every layer, and what is wrong with the keys.

    Layer i sees everything where i % block_size == transformer_idx, and window_size tokens
    elsewhere.
    """
    window, block, place = (values.get(key) for key in KEYS)
    problems = []
    if not _is_count(window) or not 1 <= window <= LARGEST_WINDOW:
        problems.append(
            f"window_size = {window!r}: expected 1 to {LARGEST_WINDOW}; beyond that the original "
            "has no slots"
        )
    for key, value in (("block_size", block), ("transformer_idx", place)):
        if value is not None and not _is_count(value):
            problems.append(f"{key} = {value!r}: expected a whole number or null")
    if block == 0:
        problems.append("block_size = 0: expected at least 1 or null")
    if problems:
        return (None,) * num_layers, problems
    if block is None or place is None:
        return (window,) * num_layers, []
    return tuple(None if i % block == place else window for i in range(num_layers)), []


def write_layout(windows: Sequence[int | None]) -> dict[str, int | None]:
    """The keys that mean these windows.

    Raises:
        ValueError: none do.
    """
    sizes = {window for window in windows if window is not None}
    full = [i for i, window in enumerate(windows) if window is None]
    if sizes and not 1 <= max(sizes) <= LARGEST_WINDOW:
        raise ValueError(
            f"a window of {max(sizes)} tokens: the authors' format has 1 to {LARGEST_WINDOW}; "
            "choose other windows (--windows)"
        )
    # Where every layer is full, the size is that of none of them.
    window = max(sizes, default=LARGEST_WINDOW)
    if not full:
        block, place = None, None
    else:
        block, place = next(
            (
                (block, full[0])
                for block in range(1, len(windows) + 1)
                if full == list(range(full[0], len(windows), block)) and full[0] < block
            ),
            (0, 0),
        )
    if len(sizes) > 1 or block == 0:
        shown = ", ".join("none" if window is None else str(window) for window in windows)
        raise ValueError(
            f"the windows {shown}: the authors' format has one size, and full attention in every "
            "n-th layer or in none; choose other windows (--windows), e.g. none for full attention"
        )
    return dict(zip(KEYS, (window, block, place), strict=True))


def full_layers_notice(windows: Sequence[int | None]) -> tuple[str, ...]:
    """What to know about layers of full attention, if there are any."""
    if None not in windows:
        return ()
    return (
        f"in layers of full attention the authors' code sees the last {FULL_WINDOW} tokens, and "
        "this model all",
    )


def shortest(config: ModelConfig) -> int | Layout | None:
    """The shortest `window_size` that means the config's windows."""
    period = config.window_period
    return period[0] if len(period) == 1 else period


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
