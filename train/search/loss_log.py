"""The losses that a search has measured, kept on disk so that none is measured twice."""

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from nha_jax import ModelConfig
from train.errors import ConfigError
from train.renamed_keys import rename_keys
from train.storage.atomic import write_if_changed
from train.storage.small_json import parse
from train.windows import WINDOWS_KEY, Windows, format_windows

_LOSS_KEY = "bits_per_byte"
_RENAMED = {"windows_count": "sequences"}
"""Keys of the header as an earlier version wrote them -> as they are now."""


class LossLog:
    """A file of the losses measured so far, as JSON lines.

    The first line, the header, says what they were measured on. Every other line has the windows
    of all layers and the loss. A loss holds for any base, candidates, budget and beam. Each line is
    written whole and at once, so a kill leaves at most one torn line, the last.

    Attributes:
        losses: bits per byte by the windows of all layers.
    """

    def __init__(self, path: Path, measured_on: Mapping[str, Any]):
        """Reads the losses in the file and opens it for more.

        Args:
            path: the file, which is made if it is missing.
            measured_on: what a loss depends on besides the windows, as JSON can hold it.

        Raises:
            ConfigError: the file holds something else, or losses of another model or other data,
                or cannot be written.
        """
        present = json.loads(json.dumps(measured_on))
        rows = _read_rows(path)
        header = rows[0] if rows else present
        if header != present:
            differing = [key for key in present if header.get(key) != present[key]]
            raise ConfigError(
                f"{path}: its losses were measured with another {', '.join(differing)}; remove it "
                "or choose another --output"
            )
        self.losses: dict[Windows, float] = {
            tuple(row[WINDOWS_KEY]): row[_LOSS_KEY] for row in rows[1:]
        }
        try:
            # Written anew only to get rid of a torn line.
            write_if_changed(path, "".join(json.dumps(row) + "\n" for row in rows or [present]))
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path}: cannot write there: {error.strerror}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def write(self, windows: Windows, bits_per_byte: float) -> None:
        """Adds the loss of a model with these windows, one for each layer.

        Raises:
            ConfigError: the loss is not finite.
        """
        if not math.isfinite(bits_per_byte):
            raise ConfigError(
                f"windows {format_windows(windows)}: the held-out loss is {bits_per_byte}; there "
                "is nothing to compare"
            )
        self.losses[windows] = bits_per_byte
        row = {WINDOWS_KEY: list(windows), _LOSS_KEY: bits_per_byte}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads the rows of a file, the header first; returns none if it is missing or empty.

    Raises:
        ConfigError: the first line is no header.
    """
    content = path.read_bytes() if path.exists() else b""
    if not content.strip(b"\n\0"):
        return []
    rows = []
    for line in content.split(b"\n"):
        with contextlib.suppress(ValueError):  # a torn last line, or the empty one after the last
            rows.append(parse(line, dict[str, Any]))
    if not rows or WINDOWS_KEY in rows[0]:
        raise ConfigError(f"{path}: holds no losses of a search; choose another --output")
    header, *losses = rows
    return [_update_header(header), *filter(_is_loss, losses)]


def _is_loss(row: dict[str, Any]) -> bool:
    return isinstance(row.get(WINDOWS_KEY), list) and isinstance(row.get(_LOSS_KEY), float)


def _update_header(header: dict[str, Any]) -> dict[str, Any]:
    """Gives a header that an earlier version wrote the keys that it would have today."""
    header, _ = rename_keys(header)
    header = {_RENAMED.get(key, key): value for key, value in header.items()}
    try:
        model = ModelConfig.from_dict(header["model"]).to_dict()
    except (KeyError, TypeError, ValueError):
        return header  # not what any version wrote: it will differ from what is expected
    del model["window_size"]
    return header | {"model": model}
