"""Windows as text and as files: one window, a pattern of them, or one for each layer."""

import math
from typing import Any

from train.errors import ConfigError
from train.paths import user_path
from train.storage.small_json import parse

Window = int | None
"""How many of the last tokens a layer keeps exactly; None: all of them (full attention)."""

Windows = tuple[Window, ...]
"""One window for each layer, the first layer's first; or a pattern that repeats over the layers."""

WINDOWS_KEY = "window_size"
"""The key of the windows in the result file of a search, as in a model's configuration."""

_EXPECTED = (
    "a window (an integer of at least 0, or none for full attention), several of them such as "
    "32,32,none, or the .json file of an `nha search`"
)


def read_windows(text: str, name: str = "windows") -> Window | Windows:
    """Reads windows as people write them, for `ModelConfig.window_size` or `Model.with_windows`.

    Args:
        text: a window, `32` or `none` (or `null`, case does not matter); several, `32,32,none` or
            `[32, 32, null]`; or the path, ending in .json, of a file that `nha search` wrote.
        name: the option or key that the text was given for; errors start with it.

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


def format_windows(windows: Windows) -> str:
    """Writes windows as `read_windows` reads them, e.g. `32,32,none`."""
    return ",".join("none" if window is None else str(window) for window in windows)


def width(window: Window) -> float:
    """A window as a number: full attention is infinitely wide."""
    return math.inf if window is None else window


def _read_window(word: str) -> Window:
    """Reads one window; raises ValueError if the word is none."""
    if word.strip().lower() in ("none", "null"):
        return None
    window = int(word)
    if window < 0:
        raise ValueError
    return window


def _read_file(path: str, name: str) -> Windows:
    file = user_path(path, name)
    try:
        values = parse(file.read_bytes(), dict[str, Any])
    except OSError as error:
        raise ConfigError(f"{name} = {path!r}: cannot read the file: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(
            f"{name} = {path!r}: the file is damaged: {error}; expected one that `nha search` wrote"
        ) from None
    windows = values.get(WINDOWS_KEY)
    if not isinstance(windows, list) or not windows or not all(map(_is_window, windows)):
        raise ConfigError(
            f"{name} = {path!r}: expected a file that `nha search` wrote, with a list of windows "
            f"under {WINDOWS_KEY!r}"
        )
    return tuple(windows)


def _is_window(value: Any) -> bool:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    return value is None or (is_integer and value >= 0)
