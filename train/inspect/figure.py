"""Draws an `Inspection`: which heads read the slots, at which positions, and their half-lives."""

import io
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from train.inspect.measure import PERCENTILES, Inspection, LayerSummary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = "viridis"
SHORTEST, LONGEST = 0.1, 1e6
"""Half-lives outside this range, in tokens, are drawn at its ends."""

MAX_CONTEXT_MARKS = 32


def draw(inspection: Inspection, title: str) -> bytes:
    """Draws three panels and returns them as a PNG.

    Above is a heat map of the slot weight, with a row for each head and a column for each bin of
    positions, and to the right of it each row's mean. Below is every slot's half-life, by layer.
    """
    from matplotlib.figure import Figure  # half a second, and only needed here

    num_layers, num_heads, _ = inspection.slot_weight.shape
    heat_height = min(max(0.32 * num_layers * num_heads, 2.8), 10.0)
    figure = Figure(figsize=(13, heat_height + 5.4), layout="constrained")
    # A name of a file is no mathematics.
    figure.suptitle(_printable(title), fontsize=14, fontweight="bold", parse_math=False)
    grid = figure.add_gridspec(
        2, 3, height_ratios=[heat_height, 4.0], width_ratios=[8, 2, 0.15], hspace=0.05
    )
    heat = figure.add_subplot(grid[0, 0])
    image = _draw_heat(heat, inspection)
    _draw_means(figure.add_subplot(grid[0, 1], sharey=heat), inspection)
    figure.colorbar(image, cax=figure.add_subplot(grid[0, 2]), label="slot weight ω")
    _draw_half_lives(figure.add_subplot(grid[1, :]), inspection)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # The font has not all characters that names have; boxes stand for them.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(buffer, dpi=120, format="png")
    return buffer.getvalue()


def _printable(text: str) -> str:
    """Escapes what no font can show: line ends, and bytes that are not UTF-8."""
    return "".join(
        x if x.isprintable() else x.encode("unicode_escape", "surrogatepass").decode() for x in text
    )


def _draw_heat(axes: "Axes", inspection: Inspection) -> Any:
    """Draws the slot weight; rows are the heads, layer by layer, from the top down."""
    num_layers, num_heads, num_bins = inspection.slot_weight.shape
    image = axes.pcolormesh(
        inspection.bin_edges,
        np.arange(num_layers * num_heads + 1),
        inspection.slot_weight.reshape(-1, num_bins),
        cmap=COLOURS,
        vmin=0,
        vmax=1,
    )
    axes.invert_yaxis()
    for edge in range(num_heads, num_layers * num_heads, num_heads):
        axes.axhline(edge, color="white", linewidth=1.5)
    starts = range(inspection.context, inspection.tokens, inspection.context)
    if len(starts) <= MAX_CONTEXT_MARKS:
        for start in starts:
            axes.axvline(start, color="white", linewidth=1, linestyle=(0, (3, 3)))
    axes.set_yticks((np.arange(num_layers) + 0.5) * num_heads, _layer_names(inspection, "  W="))
    axes.tick_params(axis="y", length=0)
    restarts = f"; the model starts afresh every {inspection.context} tokens" if starts else ""
    axes.set(
        xlabel=f"position in the text, tokens{restarts}",
        ylabel=f"layer ({num_heads} heads each)",
    )
    axes.set_title("Slot weight ω: the softmax mass on the slots", loc="left")
    return image


def _draw_means(axes: "Axes", inspection: Inspection) -> None:
    """Draws a bar beside each row of the heat map, and writes each layer's mean."""
    num_heads = inspection.mean_slot_weight.shape[1]
    total = inspection.mean_slot_weight.ravel()
    empty = inspection.mean_empty_slot_weight.ravel()
    centres = np.arange(len(total)) + 0.5
    axes.barh(centres, total - empty, height=0.8, color="C0")
    axes.barh(
        centres, empty, height=0.8, left=total - empty, color="lightgrey", edgecolor="grey",
        hatch="////", linewidth=0,
    )  # fmt: skip
    for summary in inspection.layers():
        middle = (summary.layer + 0.5) * num_heads
        axes.text(1.27, middle, f"{summary.slot_weight:.2f}", ha="right", va="center", fontsize=9)
    for edge in range(num_heads, len(total), num_heads):
        axes.axhline(edge, color="lightgrey", linewidth=0.8)
    axes.set(xlim=(0, 1.3), xlabel="ω; hatched: on empty slots")
    axes.set_title("Mean, by head and layer", loc="left")
    axes.set_xticks([0, 0.5, 1])
    axes.tick_params(axis="y", left=False, labelleft=False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def _draw_half_lives(axes: "Axes", inspection: Inspection) -> None:
    """Draws for each head a dot a slot, their median and middle 80%, and the layer's window."""
    num_layers, num_heads, _ = inspection.half_life.shape
    summaries = inspection.layers()
    for summary, half_life in zip(summaries, inspection.half_life, strict=True):
        _draw_layer(axes, summary, np.clip(half_life, SHORTEST, LONGEST))
    axes.set_yscale("log")
    axes.set_xlim(-0.6, num_layers - 0.4)
    names = _layer_names(inspection, "\nW=" if num_layers <= 12 else "\n")
    axes.set_xticks(range(num_layers), names, fontsize=min(10, 240 / num_layers))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.plot([], [], ".", color="C0", label="a slot")
    if any(summary.beyond_window is None for summary in summaries):
        axes.plot([], [], ".", color="silver", label="a slot that stays empty")
    axes.plot([], [], "o-", color="black", markersize=4, label="a head's median and middle 80%")
    axes.plot(
        [], [], color="C3", linewidth=2, label="the window W, and the share of slots beyond it"
    )
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1.05), ncols=4, fontsize=9, frameon=False)
    beyond = f" (longer ones at {LONGEST:.0e})" if (inspection.half_life > LONGEST).any() else ""
    axes.set(
        xlabel=f"layer and its window W ({num_heads} key/value heads each, from left to right)",
        ylabel=f"half-life, tokens{beyond}",
    )
    axes.set_title("How long slots remember", loc="left", pad=20)


def _draw_layer(axes: "Axes", summary: LayerSummary, half_life: np.ndarray) -> None:
    """Draws a layer's key/value heads side by side; `half_life` is [Hkv, M]."""
    num_heads, num_slots = half_life.shape
    layer, width = summary.layer, 0.7 / num_heads
    colour = "silver" if summary.beyond_window is None else "C0"
    for head, slots in enumerate(np.sort(half_life)):
        x = layer + (head - (num_heads - 1) / 2) * width
        spread = np.linspace(-0.25, 0.25, num_slots) * width
        axes.plot(x + spread, slots, ".", color=colour, markersize=3, alpha=0.5, zorder=2)
        low, middle, high = np.percentile(slots, PERCENTILES)
        axes.plot([x, x], [low, high], color="black", linewidth=1, alpha=0.6, zorder=3)
        axes.plot(x, middle, "o", color="black", markersize=4, zorder=4)
    if summary.window:
        ends = [layer - 0.45, layer + 0.45]
        axes.plot(ends, [summary.window] * 2, color="C3", linewidth=2, zorder=5)
    if summary.beyond_window is not None:
        axes.text(
            layer, 1.01, f"{summary.beyond_window:.0%}", color="C3", fontsize=9,
            ha="center", va="bottom", transform=axes.get_xaxis_transform(),
        )  # fmt: skip


def _layer_names(inspection: Inspection, separator: str) -> list[str]:
    """Names each layer by its index and its window."""
    windows = ("full" if window is None else window for window in inspection.windows)
    return [f"{layer}{separator}{window}" for layer, window in enumerate(windows)]
