"""What a run reports: rows in a file, TensorBoard events, a progress bar, a loss curve."""

import json
import math
import sys
from pathlib import Path
from typing import Any, Self

import tensorboardX
from tqdm import tqdm

Row = dict[str, Any]


class MetricsLog:
    """JSON lines and TensorBoard events, one row per logged step, steps ascending.

    A row is written whole and at once, so a kill leaves at most one torn line, the last.
    """

    def __init__(self, path: Path, events: Path, after_step: int):
        """Opens the log to continue after a step; rows beyond it, and a torn one, are dropped.

        Args:
            path: the JSON lines; made if missing.
            events: TensorBoard's folder.
            after_step: the last step that counts as done; 0 starts afresh.
        """
        kept = [row for row in read_rows(path) if row["step"] <= after_step]
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(map(_to_line, kept)), encoding="utf-8")
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")
        self._events = tensorboardX.SummaryWriter(str(events), purge_step=after_step + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        self._events.close()

    def write(self, row: Row) -> None:
        """Appends a row: `step` and any numbers; one that is not finite is written as null."""
        self._file.write(_to_line(row))
        self._file.flush()
        for name, value in row.items():
            if name != "step" and math.isfinite(value):
                self._events.add_scalar(name, value, row["step"])


def read_rows(path: Path) -> list[Row]:
    """All whole rows of a metrics file; empty if there is no file."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:  # the torn last line, or the empty one after the last
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


class ProgressBar:
    """tqdm on stderr: steps (or whatever `unit` says), time left, and named values beside it."""

    def __init__(self, total: int, initial: int, unit: str = "step", shown: bool = True):
        # Where no one watches it live, a line every ten seconds is enough.
        interval = 0.1 if sys.stderr.isatty() else 10.0
        self._bar = tqdm(
            total=total,
            initial=initial,
            unit=unit,
            mininterval=interval,
            dynamic_ncols=True,
            disable=not shown,
        )
        self._shown: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def expect(self, more: int) -> None:
        """There are so many steps more than was known before."""
        self._bar.total = (self._bar.total or 0) + more
        self._bar.refresh()

    def advance(self, **shown: str) -> None:
        """One step done; `shown` replaces what stands beside the bar under these names."""
        self._shown |= shown
        self._bar.set_postfix(self._shown, refresh=False)
        self._bar.update()


def plot_loss_curve(rows: list[Row], references: dict[str, float], path: Path) -> None:
    """Draws training loss (smoothed) and held-out loss, in bits per byte over steps, as a PNG.

    Args:
        rows: of the metrics file; nothing is drawn if there are none.
        references: label -> bits per byte, drawn as horizontal lines.
        path: where to.
    """
    from matplotlib.figure import Figure  # half a second, and only needed here

    if not rows:
        return
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(
        xlabel="step", ylabel="bits per byte", title="Native Hybrid Attention: training"
    )
    steps = [row["step"] for row in rows]
    losses = [math.nan if row["loss"] is None else row["bits_per_byte"] for row in rows]
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
    axes.grid(alpha=0.3)
    axes.legend()
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=120, format="png")
    temporary.replace(path)


def _smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential running mean, without the bias towards 0 at the start; skips non-numbers."""
    mean, total, smoothed = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            mean = weight * mean + (1 - weight) * value
            total = weight * total + (1 - weight)
        smoothed.append(mean / total if total else value)
    return smoothed


def _to_line(row: Row) -> str:
    # JSON has no NaN: the loss of a skipped update is null.
    numbers = {k: v if math.isfinite(v) else None for k, v in row.items() if v is not None}
    return json.dumps({**row, **numbers}, allow_nan=False) + "\n"
