"""Measures how a model reads a text: how much from its slots, and how long they remember.

The slot weight omega is the softmax mass that a query head puts on its slots. A slot's half-life
is the number of tokens after which half of what it held is forgotten.
"""

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
    """A layer in a few numbers.

    Attributes:
        layer: its index, from 0.
        window: tokens that it reads exactly; None: the whole past.
        slot_weight: the softmax mass on the slots, a mean over heads and tokens.
        empty_slot_weight: the part of `slot_weight` on slots that still held nothing.
        half_life_p10, half_life_p50, half_life_p90: percentiles of the half-life over the layer's
            slots, in tokens; None where the half-life is infinite.
        beyond_window: the share of the layer's slots whose half-life exceeds the window; None if
            no token ever left the window.
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
    """What `inspect` measured of a model of L layers, Hq query and Hkv key/value heads, M slots.

    The JSON file of `nha inspect` has these keys, with arrays as nested lists, numbers rounded to
    6 digits and infinite half-lives as null. It also has `run`, `text` and `layers`, which lists
    the `LayerSummary` of every layer.

    Attributes:
        tokens: how many were read.
        context: the number of tokens after which the model started again from an empty state.
        windows: [L] tokens that each layer reads exactly; None: the whole past.
        bin_edges: [bins + 1] positions in the text; bin i holds the positions from edge i up to,
            but without, edge i + 1.
        slot_weight: [L, Hq, bins] the softmax mass on the slots, a mean over the bin's tokens.
        mean_slot_weight: [L, Hq] the same as a mean over all tokens.
        mean_empty_slot_weight: [L, Hq] the part of `mean_slot_weight` on slots that still held
            nothing. Slots are empty for the first `window` tokens of a context, and for all tokens
            where the window is the whole past.
        half_life: [L, Hkv, M] half-lives in tokens: ln 2 / -(mean log decay over the tokens);
            `inf` for a slot that forgets nothing.
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
        """Summarises every layer, from the first on."""
        return [self._summary(layer, window) for layer, window in enumerate(self.windows)]

    def _summary(self, layer: int, window: int | None) -> LayerSummary:
        half_life = self.half_life[layer]
        used = _slots_hold_tokens(window, self.context).any()
        # No interpolation between slots: it would turn infinite half-lives into NaN.
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
        """Writes the keys named above as JSON, after those of `more`."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        layers = [dataclasses.asdict(summary) for summary in self.layers()]
        return json.dumps(_to_plain({**more, "layers": layers, **fields}), allow_nan=False) + "\n"


def inspect(model: nha_jax.Model, tokens: Sequence[int] | np.ndarray, context: int) -> Inspection:
    """Measures a model on a text, which it reads `context` tokens at a time from an empty state.

    Memory grows with `context` and does not depend on the length of the text.

    Args:
        model: the model, which must have slots.
        tokens: [T] integers, at least one of them, each below the model's vocabulary size.
        context: tokens to read before starting again, at least 1.

    Raises:
        ConfigError: a slot weight or a log decay is not a number.
    """
    tokens = np.asarray(tokens, np.int32)
    context = min(context, len(tokens))
    windows = model.config.windows
    bin_size = -(-len(tokens) // MAX_BINS)
    bins = np.arange(len(tokens)) // bin_size
    in_use = np.stack([_slots_hold_tokens(window, context) for window in windows], axis=1)  # [T, L]
    weight_sums = np.zeros((bins[-1] + 1, len(windows), model.config.num_query_heads))
    empty_sum = np.zeros(weight_sums.shape[1:])
    decay_sum: Any = 0.0

    @jax.jit
    def diagnose(model: nha_jax.Model, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        seen = model.diagnose(tokens[None])
        return seen.slot_weight[:, 0].swapaxes(0, 1), seen.log_decay[:, 0].swapaxes(0, 1)

    for start in range(0, len(tokens), context):
        part = tokens[start : start + context]
        count = len(part)
        # All parts have one shape, for one compilation; no token sees the padding after it.
        padded = np.pad(part, (0, context - count))
        slot_weight, log_decay = (np.asarray(x)[:count] for x in diagnose(model, padded))
        # slot_weight [T, L, Hq], log_decay [T, L, Hkv, M]
        if np.isnan(slot_weight).any() or np.isnan(log_decay).any():
            raise ConfigError("the model gives something that is no number (NaN) for this text")
        np.add.at(weight_sums, bins[start : start + count], slot_weight)
        empty_sum += np.where(in_use[:count, :, None], 0, slot_weight).sum(axis=0)
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
    """Computes ln 2 / -mean_log_decay, in tokens: inf for a decay of 0, and 0 for one of -inf."""
    with np.errstate(divide="ignore"):
        return math.log(2) / np.abs(mean_log_decay)


def format_table(inspection: Inspection) -> str:
    """Formats the summaries as a table of one line a layer."""
    lines = [
        "               slot weight omega   half-life of the slots, tokens",
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


def _slots_hold_tokens(window: int | None, context: int) -> np.ndarray:
    """Says of each token of a context whether the slots it reads hold any token: [context] bool.

    At position t the token at t - window has entered them, if there is one.
    """
    position = np.arange(context)
    return np.zeros(context, bool) if window is None else position >= window


def _format_tokens(count: float | None) -> str:
    """Formats a number of tokens; None stands for infinity."""
    if count is None:
        return "inf"
    return f"{count:.1f}" if count < 100 else f"{count:.0f}" if count < 1e6 else f"{count:.0e}"


def _to_plain(value: Any) -> Any:
    """Turns arrays into lists, rounds numbers to 6 digits, and writes infinities as None."""
    if isinstance(value, dict):
        return {key: _to_plain(x) for key, x in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [_to_plain(x) for x in value]
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
