"""How a model reads a text: its slots' share of the softmax, and how long its slots remember."""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import nha_jax
from train.errors import ConfigError

MAX_BINS = 256
PERCENTILES = (10, 50, 90)


@dataclasses.dataclass(frozen=True)
class LayerSummary:
    """One layer in a few numbers; `half_life` and its like are None where that is infinite.

    Attributes:
        layer: its index, from 0.
        window: tokens it reads exactly; None: the whole past.
        slot_weight: the slots' share of the softmax, mean over the heads and tokens.
        empty_slot_weight: the part of it that fell on slots which still held nothing.
        half_life_p10, half_life_p50, half_life_p90: percentiles over its slots, in tokens.
        beyond_window: share of its slots whose half-life exceeds the window; None if nothing ever
            left the window.
    """

    layer: int
    window: int | None
    slot_weight: float
    empty_slot_weight: float
    half_life_p10: float | None
    half_life_p50: float | None
    half_life_p90: float | None
    beyond_window: float | None


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What `inspect` measured: L layers, Hq query heads, Hkv key/value heads, M slots.

    The JSON of `nha inspect` has these keys, arrays as nested lists (numbers to 6 digits, an
    infinite half-life as null), and beside them `run`, `text` and `layers`, a list of the
    `LayerSummary`s.

    Attributes:
        tokens: how many were read.
        context: after so many the model started again from nothing.
        windows: [L] tokens that each layer reads exactly; None: the whole past.
        bin_edges: [bins + 1] positions in the text; bin i holds those from edge i on, and before
            edge i + 1.
        slot_weight: [L, Hq, bins] the slots' share of the softmax, mean over the bin's tokens.
        mean_slot_weight: [L, Hq] the same, mean over all tokens.
        mean_empty_slot_weight: [L, Hq] the part of `mean_slot_weight` that fell on slots which
            still held nothing: those of the first `window` tokens of a context, and all of them
            where the window is the whole past.
        half_life: [L, Hkv, M] tokens after which half of what a slot held is forgotten:
            ln 2 / -(mean log decay over the tokens); `inf`: it forgets nothing.
    """

    tokens: int
    context: int
    windows: tuple[int | None, ...]
    bin_edges: np.ndarray
    slot_weight: np.ndarray
    mean_slot_weight: np.ndarray
    mean_empty_slot_weight: np.ndarray
    half_life: np.ndarray

    def layers(self) -> list[LayerSummary]:
        """One summary a layer, from the first on."""
        return [self._summary(layer, window) for layer, window in enumerate(self.windows)]

    def _summary(self, layer: int, window: int | None) -> LayerSummary:
        half_life = self.half_life[layer]
        used = _is_written(window, self.context).any()
        # The nearest slot's own: interpolation would make NaN of infinite ones.
        percentiles = np.percentile(half_life, PERCENTILES, method="nearest")
        low, middle, high = (float(x) if math.isfinite(x) else None for x in percentiles)
        return LayerSummary(
            layer=layer,
            window=window,
            slot_weight=float(self.mean_slot_weight[layer].mean()),
            empty_slot_weight=float(self.mean_empty_slot_weight[layer].mean()),
            half_life_p10=low,
            half_life_p50=middle,
            half_life_p90=high,
            beyond_window=float((half_life > window).mean()) if used else None,
        )

    def to_json(self, **more: Any) -> str:
        """The keys named above, after those of `more`."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        layers = [dataclasses.asdict(summary) for summary in self.layers()]
        return json.dumps(_to_plain({**more, "layers": layers, **fields}), allow_nan=False) + "\n"


def inspect(model: nha_jax.Model, tokens: Sequence[int] | np.ndarray, context: int) -> Inspection:
    """Reads `tokens`, `context` at a time and each time from nothing: memory has a bound.

    Args:
        model: any.
        tokens: at least one, each below the model's vocabulary size.
        context: at least 1.

    Raises:
        ConfigError: the model gives something that is no number.
    """
    tokens = np.asarray(tokens, np.int32)
    context = min(context, len(tokens))
    windows = model.config.windows
    bin_size = -(-len(tokens) // MAX_BINS)
    bins = np.arange(len(tokens)) // bin_size
    written = np.stack([_is_written(window, context) for window in windows], axis=1)  # [T, L]
    weight_sums = np.zeros((bins[-1] + 1, len(windows), model.config.num_query_heads))
    empty_sum = np.zeros(weight_sums.shape[1:])
    decay_sum: Any = 0.0

    @jax.jit
    def diagnose(model: nha_jax.Model, piece: jax.Array) -> tuple[jax.Array, jax.Array]:
        seen = model.diagnose(piece[None])
        return seen.slot_weight[:, 0].swapaxes(0, 1), seen.log_decay[:, 0].swapaxes(0, 1)

    for start in range(0, len(tokens), context):
        piece = tokens[start : start + context]
        count = len(piece)
        padded = np.pad(piece, (0, context - count))  # one shape; nothing looks ahead
        slot_weight, log_decay = (np.asarray(x)[:count] for x in diagnose(model, padded))
        # slot_weight [T, L, Hq], log_decay [T, L, Hkv, M]
        if np.isnan(slot_weight).any() or np.isnan(log_decay).any():
            raise ConfigError("the model gives something that is no number (NaN) for this text")
        np.add.at(weight_sums, bins[start : start + count], slot_weight)
        empty_sum += np.where(written[:count, :, None], 0, slot_weight).sum(axis=0)
        decay_sum += log_decay.sum(axis=0, dtype=np.float64)
    bin_sizes = np.bincount(bins)
    return Inspection(
        tokens=len(tokens),
        context=context,
        windows=windows,
        bin_edges=np.append(0, np.cumsum(bin_sizes)),
        slot_weight=(weight_sums / bin_sizes[:, None, None]).transpose(1, 2, 0),
        mean_slot_weight=weight_sums.sum(axis=0) / len(tokens),
        mean_empty_slot_weight=empty_sum / len(tokens),
        half_life=half_life(decay_sum / len(tokens)),
    )


def half_life(mean_log_decay: np.ndarray) -> np.ndarray:
    """Tokens after which half is forgotten: ln 2 / -mean_log_decay; inf for 0, and 0 for -inf."""
    with np.errstate(divide="ignore"):
        return math.log(2) / np.abs(mean_log_decay)


def format_table(inspection: Inspection) -> str:
    """One line a layer."""
    lines = [
        "                slot share omega   half-life of the slots, tokens",
        "layer  window    mean  on empty       10%    median       90%  beyond the window",
    ]
    for summary in inspection.layers():
        window = "full" if summary.window is None else str(summary.window)
        slots = "  the slots stay empty"
        if summary.beyond_window is not None:
            half_lives = (summary.half_life_p10, summary.half_life_p50, summary.half_life_p90)
            slots = "".join(f"{_format_tokens(x):>10}" for x in half_lives)
            slots += f"{summary.beyond_window:>19.0%}"
        lines.append(
            f"{summary.layer:>5}{window:>8}{summary.slot_weight:>8.3f}"
            f"{summary.empty_slot_weight:>10.3f}{slots}"
        )
    return "\n".join(lines)


def _is_written(window: int | None, context: int) -> np.ndarray:
    """[context] bool: the token finds something in the slots; the one `window` back is there."""
    position = np.arange(context)
    return np.zeros(context, bool) if window is None else position >= window


def _format_tokens(count: float | None) -> str:
    if count is None:
        return "inf"
    return f"{count:.1f}" if count < 100 else f"{count:.0f}" if count < 1e6 else f"{count:.0e}"


def _to_plain(value: Any) -> Any:
    """What JSON can hold: lists for arrays, 6 digits, null for infinities."""
    if isinstance(value, dict):
        return {key: _to_plain(x) for key, x in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [_to_plain(x) for x in value]
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
