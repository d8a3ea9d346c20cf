"""Shares of right answers over lengths of texts and loads: tables, and heat maps."""

from pathlib import Path

import numpy as np

from train.storage.atomic import write_picture

Grid = dict[int, dict[int, float]]
"""Tokens of a text -> load -> share of the answers that are right."""


def as_table(found: Grid, load: str) -> str:
    """Writes shares in percent as a Markdown table: a row a length, a column a load.

    `load` says what a load is, such as "pairs".
    """
    columns = _loads(found)
    lines = [f"| tokens / {load} | " + " | ".join(map(str, columns)) + " |"]
    lines.append("| --- " * (1 + len(columns)) + "|")
    for length, row in found.items():
        cells = (f"{row[n]:.1%}" if n in row else "" for n in columns)
        lines.append(f"| {length} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(found: Grid, task: str, load: str, path: Path) -> None:
    """Draws the shares as a heat map, a PNG."""
    from matplotlib.figure import Figure

    lengths, columns = list(found), _loads(found)
    values = np.array([[found[x].get(n, np.nan) for n in columns] for x in lengths])
    figure = Figure(figsize=(2 + 0.8 * len(columns), 2 + 0.5 * len(lengths)), layout="constrained")
    axes = figure.add_subplot(xlabel=load, ylabel="tokens", title=f"{task}: share answered right")
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(columns)), [str(number) for number in columns])
    axes.set_yticks(range(len(lengths)), [str(length) for length in lengths])
    for row, column in np.argwhere(np.isfinite(values)):
        value = values[row, column]
        color = "black" if value > 0.6 else "white"
        axes.text(column, row, f"{value:.0%}", ha="center", va="center", color=color)
    figure.colorbar(image)
    write_picture(path, figure)


def _loads(found: Grid) -> list[int]:
    return sorted({number for row in found.values() for number in row})
