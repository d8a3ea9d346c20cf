"""The pictures of a run: its loss and its slot weights over the steps, as PNGs."""

import math
from pathlib import Path
from typing import Any

from train.report.metrics import Row
from train.storage.atomic import write_picture


def plot_loss_curve(rows: list[Row], references: dict[str, float], path: Path) -> None:
    """Draws training loss (smoothed) and held-out loss, in bits per byte, over the steps.

    Args:
        rows: the rows of the metrics file; without any, nothing is drawn.
        references: label -> bits per byte, drawn as horizontal lines.
        path: the picture to write.
    """
    if not rows:
        return
    figure, axes = _figure("bits per byte", "Native Hybrid Attention: training")
    steps = [row["step"] for row in rows]
    losses = [math.nan if row.get("loss") is None else row["bits_per_byte"] for row in rows]
    axes.plot(steps, losses, color="C0", alpha=0.25, linewidth=0.8)
    axes.plot(steps, _smooth(losses), color="C0", label="training (smoothed)")
    held_out = [row for row in rows if "held_out_bits_per_byte" in row]
    axes.plot(
        [row["step"] for row in held_out],
        [row["held_out_bits_per_byte"] for row in held_out],
        color="C1",
        marker="o",
        label="held out",
    )
    for (label, value), style in zip(references.items(), ("--", ":"), strict=False):
        axes.axhline(value, color="grey", linestyle=style, label=f"{label}: {value:.2f}")
    axes.set_ylim(bottom=0)
    _save(figure, axes, path)


def plot_slot_weight(rows: list[Row], path: Path) -> None:
    """Draws every layer's slot weight, the share of the softmax on its slots, over the evaluations.

    Args:
        rows: the rows of the metrics file; if none has a `slot_weight`, nothing is drawn.
        path: the picture to write.
    """
    rows = [row for row in rows if "slot_weight" in row]
    if not rows:
        return
    from matplotlib import colormaps

    figure, axes = _figure("slots' share of the softmax", "Slot weight of each layer, held out")
    layers = list(zip(*(row["slot_weight"] for row in rows), strict=True))
    for layer, weights in enumerate(layers):
        color = colormaps["viridis"](layer / max(len(layers) - 1, 1))
        values = [math.nan if weight is None else weight for weight in weights]
        steps = [row["step"] for row in rows]
        axes.plot(steps, values, color=color, marker="o", markersize=3, label=f"layer {layer}")
    axes.set_ylim(0, 1)
    _save(figure, axes, path)


def _figure(quantity: str, title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # half a second, and only needed here

    figure = Figure(figsize=(8, 5), layout="constrained")
    return figure, figure.add_subplot(xlabel="step", ylabel=quantity, title=title)


def _save(figure: Any, axes: Any, path: Path) -> None:
    axes.grid(alpha=0.3)
    axes.legend(ncols=1 + len(axes.get_legend_handles_labels()[0]) // 9, fontsize="small")
    write_picture(path, figure)


def _smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Takes an exponential running mean without its bias towards 0 at the start; skips NaN."""
    mean, total, smoothed = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            mean = weight * mean + (1 - weight) * value
            total = weight * total + (1 - weight)
        smoothed.append(mean / total if total else value)
    return smoothed
