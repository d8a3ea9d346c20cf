"""The result of a search: a JSON file that models take their windows from, a table, and a plot."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.errors import do_without
from train.search.budgets import Budget
from train.search.strategies import Trial
from train.storage.atomic import write_atomically, write_picture
from train.windows import WINDOWS_KEY, Windows, format_windows, width

EVENLY_SPACED = "evenly spaced full layers"
"""The name in `SearchResult.comparison` of what the search has to beat."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search found; `str` of it is what the user reads at the end.

    Attributes:
        found: the best trial.
        history: all trials in order; the first one is the base.
        comparison: trials, by name, that the search's own are compared with.
        budget: what the windows of all layers were allowed to cost.
        settings: the search's other settings, as JSON can hold them.
        measured_on: the model and the data, as JSON can hold them.
    """

    found: Trial
    history: list[Trial]
    comparison: dict[str, Trial]
    budget: Budget
    settings: Mapping[str, Any]
    measured_on: Mapping[str, Any]

    def write(self, path: Path) -> None:
        """Writes the result as JSON, with the best windows under "window_size", and its plot.

        The plot goes beside it, under the same name with .png; if it cannot be drawn, a line says
        so. Whoever reads the files meanwhile finds the old ones or whole new ones.
        """
        values = {
            **_to_row(self.found),
            "budget": {"limit": self.budget.limit, "unit": self.budget.unit},
            "settings": self.settings,
            "measured_on": self.measured_on,
            "comparison": {name: _to_row(trial) for name, trial in self.comparison.items()},
            "history": [_to_row(trial) for trial in self.history],
        }
        write_atomically(path, json.dumps(values, indent=2) + "\n")
        picture = path.with_suffix(".png")
        with do_without(str(picture)):
            plot_search(self, picture)

    def __str__(self) -> str:
        rows = [("found by the search", self.found), *self.comparison.items()]
        names = max(len(name) for name, _ in rows)
        windows = {name: _abbreviate(trial.windows) for name, trial in rows}
        column = max(map(len, windows.values()))
        heading = f"{'windows':<{column}}  bits per byte  cost"
        return "\n".join(
            [
                f"{'':<{names}}  {heading}",
                *(
                    f"{name:<{names}}  {windows[name]:<{column}}  {trial.bits_per_byte:>13.4f}  "
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
        if self.found.windows == even.windows:
            return "The search found evenly spaced full layers itself: nothing was gained."
        if gain <= 0:
            return f"Evenly spaced full layers are better by {-gain:.4f} bits per byte."
        if self.found == self.history[0]:
            return (
                "The search stayed with the base: nothing it tried has a lower loss. Evenly spaced "
                f"full layers are worse by {gain:.4f} bits per byte."
            )
        return (
            f"The search is better than evenly spaced full layers by {gain:.4f} bits per byte, "
            "on the very sequences by which it chose."
        )


def plot_search(result: SearchResult, path: Path) -> None:
    """Draws every trial's loss over its cost as a PNG, and the best within each cost as a line."""
    from matplotlib.figure import Figure  # half a second, and only needed here

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(
        xlabel=result.budget.unit,
        ylabel="held-out bits per byte",
        title="Native Hybrid Attention: windows of the layers",
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
    write_picture(path, figure)


def _points(trials: list[Trial]) -> tuple[list[float], list[float]]:
    """Returns the costs and the losses of trials, to be drawn."""
    return [trial.cost for trial in trials], [trial.bits_per_byte for trial in trials]


def _to_row(trial: Trial) -> dict[str, Any]:
    """Writes a trial as JSON can hold it."""
    row = dataclasses.asdict(trial)
    return {WINDOWS_KEY: list(row.pop("windows")), **row}


def _abbreviate(windows: Windows) -> str:
    """Formats windows; above 8 layers, as the commonest one and the layers (from 1) with others."""
    if len(windows) <= 8:
        return format_windows(windows)
    usual = max(sorted(set(windows), key=width), key=windows.count)
    parts = [format_windows((usual,))]
    for window in sorted(set(windows) - {usual}, key=width):
        layers = [str(layer) for layer, other in enumerate(windows, 1) if other == window]
        parts.append(f"{format_windows((window,))} at {','.join(layers)}")
    return "; ".join(parts)
