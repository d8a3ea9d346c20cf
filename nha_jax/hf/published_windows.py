"""Windows in the authors' config.json: one size for all layers, or full attention in some."""

from collections.abc import Mapping, Sequence
from typing import Any

from nha_jax.config import ModelConfig
from nha_jax.scalars import is_count, shown

LARGEST_WINDOW = 64
"""The largest window of the authors' format: beyond it, their code leaves the slots out."""

FULL_WINDOW = 2048
"""Tokens that the authors' layers of full attention see: the context that they trained with."""

Windows = tuple[int | None, ...]
"""One window for each layer; None is full attention."""

KEYS = ("window_size", "block_size", "transformer_idx")


def read_windows(values: Mapping[str, Any], num_layers: int) -> tuple[Windows, list[str]]:
    """Reads the window of every layer; returns it and what is wrong with the keys.

    Layer i sees all tokens if i % block_size == transformer_idx, and window_size tokens otherwise.
    """
    window, block, offset = (values.get(key) for key in KEYS)
    problems = []
    if not is_count(window) or not 1 <= window <= LARGEST_WINDOW:
        problems.append(
            f"window_size = {shown(window)}: expected 1 to {LARGEST_WINDOW}; beyond that the "
            "original has no slots"
        )
    for key, value in (("block_size", block), ("transformer_idx", offset)):
        if value is not None and not is_count(value, 0):
            problems.append(f"{key} = {shown(value)}: expected a whole number or null")
    if block == 0:
        problems.append("block_size = 0: expected at least 1 or null")
    if problems:
        return (None,) * num_layers, problems
    if block is None or offset is None:
        return (window,) * num_layers, []
    return tuple(None if i % block == offset else window for i in range(num_layers)), []


def write_windows(windows: Sequence[int | None]) -> dict[str, int | None]:
    """Writes the keys that mean these windows.

    Args:
        windows: one for each layer.

    Raises:
        ValueError: a window is too large for the format, or they follow no pattern that it has.
    """
    sizes = {window for window in windows if window is not None}
    full = [i for i, window in enumerate(windows) if window is None]
    if sizes and not 1 <= max(sizes) <= LARGEST_WINDOW:
        raise ValueError(
            f"a window of {max(sizes)} tokens: the authors' format has 1 to {LARGEST_WINDOW}; "
            "choose other windows (--windows)"
        )
    # If every layer has full attention, no layer uses the size.
    window = max(sizes, default=LARGEST_WINDOW)
    if not full:
        block, offset = None, None
    else:
        block, offset = next(
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
    return dict(zip(KEYS, (window, block, offset), strict=True))


def full_layers_notice(windows: Sequence[int | None]) -> tuple[str, ...]:
    """Returns the notice about layers of full attention; empty if there are none."""
    if None not in windows:
        return ()
    return (
        f"in layers of full attention the authors' code sees the last {FULL_WINDOW} tokens, and "
        "this model all",
    )


def shortest_window_size(config: ModelConfig) -> int | Windows | None:
    """Returns the shortest `ModelConfig.window_size` that means the config's windows."""
    period = config.window_period
    return period[0] if len(period) == 1 else period
