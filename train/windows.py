"""Window layouts as text and as files: one window, a pattern of them, or one for each layer."""

import json
import math
from pathlib import Path
from typing import Any

from train.errors import ConfigError

Window = int | None
"""The last tokens that a layer keeps exactly; None: all of them (full attention)."""

Layout = tuple[Window, ...]
"""Several windows: one for each layer, the first layer's first, or a pattern of them."""

LAYOUT_KEY = "window_size"
"""Under which a search's result file holds its layout."""

_EXPECTED = (
    "a window (an integer of at least 0, or none for full attention), several of them such as "
    "32,32,none, or the .json file of an `nha search`"
)


def read_layout(text: str, name: str = "windows") -> Window | Layout:
    """A layout as people write it, ready for `ModelConfig.window_size` or `Model.with_windows`.

    Args:
        text: a window, `32` or `none` (or `null`, case does not matter); several, `32,32,none` or
            `[32, 32, null]`; or the path, ending in .json, of a file that `nha search` wrote.
        name: of the option or key that the text was given for; errors start with it.

    Returns:
        A tuple for several windows, a list or a file. Whether it fits a model is not checked.

    Raises:
        ConfigError: it is none of these; the line names the value.
    """
    words = text.strip()
    if words.lower().endswith(".json"):
        return _read_file(words, name)
    is_list = words.startswith("[") and words.endswith("]")
    try:
        windows = tuple(map(_read_window, (words[1:-1] if is_list else words).split(",")))
    except ValueError:
        raise ConfigError(f"{name} = {text!r}: expected {_EXPECTED}") from None
    return windows if is_list or len(windows) > 1 else windows[0]


def format_layout(layout: Layout) -> str:
    """`32,32,none`, as `read_layout` reads it."""
    return ",".join("none" if window is None else str(window) for window in layout)


def width(window: Window) -> float:
    """A window as a number: full attention is infinitely wide."""
    return math.inf if window is None else window


def _read_window(word: str) -> Window:
    """Raises ValueError if it is none."""
    if word.strip().lower() in ("none", "null"):
        return None
    window = int(word)
    if window < 0:
        raise ValueError
    return window


def _read_file(path: str, name: str) -> Layout:
    try:
        values = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{name} = {path!r}: cannot read the file: {error.strerror}") from None
    except ValueError:
        raise ConfigError(f"{name} = {path!r}: the file is not JSON") from None
    layout = values.get(LAYOUT_KEY) if isinstance(values, dict) else None
    if not isinstance(layout, list) or not layout or not all(map(_is_window, layout)):
        raise ConfigError(
            f"{name} = {path!r}: expected a file that `nha search` wrote, with a list of windows "
            f"under {LAYOUT_KEY!r}"
        )
    return tuple(layout)


def _is_window(value: Any) -> bool:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    return value is None or (is_integer and value >= 0)
