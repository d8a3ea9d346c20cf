"""What a search leaves on disk: every loss at once, the result at the end, and its plot."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from train.config import rename_keys
from train.errors import ConfigError
from train.search.strategies import Budget, Trial
from train.storage.atomic import replacing, write_atomically
from train.windows import WINDOWS_KEY, Windows, format_windows, width

EVENLY_SPACED = "evenly spaced full layers"
"""The name in `SearchResult.comparison` of what the search has to beat."""

_LOSS_KEY = "bits_per_byte"
_RENAMED = {"windows_count": "sequences"}
"""Keys of a log's header as an earlier version wrote them -> as they are now."""


class LossLog:
    """The losses measured so far, as JSON lines: first what they were measured on, then each.

    They hold for any base, candidates, budget or beam. A line is written whole and at once, so a
    kill leaves at most one torn line, the last.

    Attributes:
        losses: bits per byte by layout.
    """

    def __init__(self, path: Path, measured_on: Mapping[str, Any]):
        """Reads what is there and opens the file to go on.

        Args:
            path: the file; made if missing.
            measured_on: what a loss depends on beside the layout, JSON-able.

        Raises:
            ConfigError: the file holds something else, or losses of another model or other data.
        """
        self.losses: dict[Windows, float] = {}
        present = json.loads(json.dumps(measured_on))
        rows = _read_rows(path)
        header = rows[0] if rows else present
        if header != present:
            differing = [key for key in present if header.get(key) != present[key]]
            raise ConfigError(
                f"{path}: its losses were measured with another {', '.join(differing)}; remove it "
                "or choose another --output"
            )
        for row in rows[1:]:
            self.losses[tuple(row[WINDOWS_KEY])] = row[_LOSS_KEY]
        try:
            # Anew, to be rid of a torn line.
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows or [present]))
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path}: cannot write there: {error.strerror}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def write(self, layout: Windows, bits_per_byte: float) -> None:
        """Adds a loss.

        Raises:
            ConfigError: it is not finite.
        """
        if not math.isfinite(bits_per_byte):
            raise ConfigError(
                f"windows {format_windows(layout)}: the held-out loss is {bits_per_byte}; there is "
                "nothing to compare"
            )
        self.losses[layout] = bits_per_byte
        row = {WINDOWS_KEY: list(layout), _LOSS_KEY: bits_per_byte}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search found; `str` of it is what the user reads at the end.

    Attributes:
        found: the best layout.
        history: everything tried, in order; the base is the first.
        comparison: other layouts by name, for which the search did not look.
        budget: what a layout might cost.
        settings: what else the search was told, JSON-able.
        measured_on: the model and the data, JSON-able.
    """

    found: Trial
    history: list[Trial]
    comparison: dict[str, Trial]
    budget: Budget
    settings: Mapping[str, Any]
    measured_on: Mapping[str, Any]

    def write(self, path: Path) -> None:
        """Writes the result as JSON, with the layout under "window_size", and its plot beside it.

        Both files are the old ones or whole new ones, whenever they are read.
        """
        values = {
            **_to_row(self.found),
            "budget": {"limit": self.budget.limit, "unit": self.budget.unit},
            "settings": self.settings,
            "measured_on": self.measured_on,
            "comparison": {name: _to_row(trial) for name, trial in self.comparison.items()},
            "history": [_to_row(trial) for trial in self.history],
        }
        plot_search(self, path.with_suffix(".png"))
        write_atomically(path, json.dumps(values, indent=2) + "\n")

    def __str__(self) -> str:
        rows = [("found by the search", self.found), *self.comparison.items()]
        names = max(len(name) for name, _ in rows)
        layouts = {name: _abbreviate(trial.layout) for name, trial in rows}
        widths = max(map(len, layouts.values()))
        heading = f"{'windows':<{widths}}  bits per byte  cost"
        return "\n".join(
            [
                f"{'':<{names}}  {heading}",
                *(
                    f"{name:<{names}}  {layouts[name]:<{widths}}  {trial.bits_per_byte:>13.4f}  "
                    f"{trial.cost:g}"
                    for name, trial in rows
                ),
                f"\nCost: {self.budget.unit}; at most {self.budget.limit:g}.",
                self._verdict(),
            ]
        )

    def _verdict(self) -> str:
        even = self.comparison.get(EVENLY_SPACED)
        if even is None:
            return "The budget does not allow even one full layer to compare with."
        gain = even.bits_per_byte - self.found.bits_per_byte
        if self.found.layout == even.layout:
            return "The search found the evenly spaced layout itself: nothing was gained."
        if gain <= 0:
            return f"Evenly spaced full layers are better by {-gain:.4f} bits per byte."
        if self.found == self.history[0]:
            return (
                "The search stayed with the base: nothing it tried has a lower loss. Evenly spaced "
                f"full layers are worse by {gain:.4f} bits per byte."
            )
        return (
            f"The search is better than evenly spaced full layers by {gain:.4f} bits per byte, "
            "on the very windows by which it chose."
        )


def plot_search(result: SearchResult, path: Path) -> None:
    """Draws every layout's loss over its cost as a PNG, and the best for each cost as a line."""
    from matplotlib.figure import Figure  # half a second, and only needed here

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(
        xlabel=result.budget.unit,
        ylabel="held-out bits per byte",
        title="Native Hybrid Attention: window layouts",
    )
    tried = sorted(result.history, key=lambda trial: trial.cost)
    axes.plot(*_points(tried), "o", color="C0", alpha=0.3, label="tried")
    frontier: list[Trial] = []
    for trial in sorted(tried, key=lambda trial: (trial.cost, trial.bits_per_byte)):
        if not frontier or trial.bits_per_byte < frontier[-1].bits_per_byte:
            frontier.append(trial)
    axes.plot(*_points(frontier), color="C0", drawstyle="steps-post", label="best within the cost")
    axes.plot(*_points([result.found]), "*", color="C0", markersize=16, label="found")
    for (name, trial), marker in zip(result.comparison.items(), "sDv^", strict=False):
        axes.plot(*_points([trial]), marker, color="C1", label=name)
    axes.axvline(result.budget.limit, color="grey", linestyle=":", label="budget")
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as file:
        figure.savefig(file, dpi=120, format="png")


def _points(trials: list[Trial]) -> tuple[list[float], list[float]]:
    return [trial.cost for trial in trials], [trial.bits_per_byte for trial in trials]


def _to_row(trial: Trial) -> dict[str, Any]:
    row = dataclasses.asdict(trial)
    return {WINDOWS_KEY: list(row.pop("layout")), **row}


def _abbreviate(layout: Windows) -> str:
    """All windows; of many layers the commonest, and which layers, from 1, have others."""
    if len(layout) <= 8:
        return format_windows(layout)
    usual = max(sorted(set(layout), key=width), key=layout.count)
    parts = [format_windows((usual,))]
    for window in sorted(set(layout) - {usual}, key=width):
        layers = [str(layer) for layer, other in enumerate(layout, 1) if other == window]
        parts.append(f"{format_windows((window,))} at {','.join(layers)}")
    return "; ".join(parts)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """All whole rows, the header first; empty if there is no file.

    Raises:
        ConfigError: the first line is no header.
    """
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().split(b"\n"):
        try:
            rows.append(json.loads(line))
        except ValueError:  # the torn last line, or the empty one after the last
            continue
    if not rows or not isinstance(rows[0], dict) or WINDOWS_KEY in rows[0]:
        raise ConfigError(f"{path}: holds no losses of a search; choose another --output")
    header, _ = rename_keys(rows[0])
    return [{_RENAMED.get(key, key): value for key, value in header.items()}, *rows[1:]]
