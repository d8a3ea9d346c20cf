"""Which layers deserve wider windows: greedy and beam search over layouts within a budget.

The search of Native Hybrid Attention (arXiv 2510.07019) at inference time: the parameters stay as
they are, only the windows change. Nothing here knows of models: a layout's loss is given.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import jax.numpy as jnp

from nha_jax import ModelConfig
from train.config import require
from train.windows import Window, Windows, format_windows, width


class Budget(Protocol):
    """What a layout may cost."""

    @property
    def limit(self) -> float:
        """The most that a layout may cost."""

    @property
    def unit(self) -> str:
        """What is counted, in words."""

    def cost(self, layout: Windows) -> float:
        """What this layout costs."""


@dataclass(frozen=True)
class FullLayers:
    """Counts the layers with full attention that do not have it in the base.

    Attributes:
        full_layers: how many there may be.
        base: the layout to start from.
    """

    full_layers: int
    base: Windows

    def __post_init__(self) -> None:
        most = sum(window is not None for window in self.base)
        expected = f"1 to {most}, the layers whose window is finite in {format_windows(self.base)}"
        require(1 <= self.full_layers <= most, "full_layers", self.full_layers, expected)

    @property
    def limit(self) -> float:
        return self.full_layers

    @property
    def unit(self) -> str:
        return "full layers beyond the base's"

    def cost(self, layout: Windows) -> float:
        pairs = zip(layout, self.base, strict=True)
        return sum(window is None and before is not None for window, before in pairs)


@dataclass(frozen=True)
class CacheBytes:
    """Counts the bytes of cache that one row needs, divided by the tokens of its context.

    A layer with window W holds min(W, context) tokens, one with full attention all of them. A
    cached token is its rotated key and its value, in the model's dtype, over all key/value heads;
    with a finite W also its key before rotation and, in float32, its decays, with which it enters
    the slots later. Not counted, being the same for every layout and any context: the slots and
    the inputs of the short convolutions.

    Attributes:
        cache_bytes: how many there may be, per token of context.
        context: tokens of context, the length at which windows are weighed against each other.
        config: of the model; its windows do not matter.
    """

    cache_bytes: float
    context: int
    config: ModelConfig

    def __post_init__(self) -> None:
        limit = self.cache_bytes
        require(0 < limit < math.inf, "cache_bytes", limit, "a number above 0")
        require(self.context >= 1, "context", self.context, "at least 1")

    @property
    def limit(self) -> float:
        return self.cache_bytes

    @property
    def unit(self) -> str:
        return f"bytes of cache per token of context at {self.context} tokens"

    def cost(self, layout: Windows) -> float:
        cached = (min(width(window), self.context) * self._token_bytes(window) for window in layout)
        return sum(cached) / self.context

    def _token_bytes(self, window: Window) -> int:
        config = self.config
        entries = config.key_dim + config.value_dim
        decays = 0
        if window is not None:
            entries += config.key_dim
            decays = 4 * config.num_slots
        return config.num_kv_heads * (entries * jnp.dtype(config.dtype).itemsize + decays)


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """The layouts that a search may reach, and how broadly it looks.

    Attributes:
        base: the layout to start from.
        candidates: windows that a layer may get instead of a narrower one.
        budget: what a layout may cost.
        beam: how many layouts are pursued at a time; 1 is greedy.

    Raises:
        ValueError: a value makes no sense, or leaves nothing to search.
    """

    base: Windows
    candidates: tuple[Window, ...]
    budget: Budget
    beam: int = 1

    def __post_init__(self) -> None:
        require(self.beam >= 1, "beam", self.beam, "at least 1")
        narrowest = min(map(width, self.base))
        wider = any(width(candidate) > narrowest for candidate in self.candidates)
        candidates = format_windows(self.candidates)
        base = format_windows(self.base)
        require(wider, "candidates", candidates, f"a window wider than some layer's of {base}")
        cost, limit = self.budget.cost(self.base), self.budget.limit
        expected = f"a layout within {limit:g} {self.budget.unit}; this one costs {cost:g}"
        require(cost <= limit, "base", base, expected)

    def wider(self, layout: Windows) -> Iterator[Windows]:
        """The layouts within the budget with one wider window, by the layer that has it."""
        for layer, window in enumerate(layout):
            for candidate in self.candidates:
                changed = (*layout[:layer], candidate, *layout[layer + 1 :])
                fits = self.budget.cost(changed) <= self.budget.limit
                if width(candidate) > width(window) and fits:
                    yield changed

    def evenly_spaced(self) -> Windows | None:
        """As many full layers, evenly spaced, as the budget allows, the others as in the base.

        Of L layers that are not full in the base, k are at (L k' / k) - 1 for k' = 1 to k, rounded
        down: with L = 24 and k = 6 every fourth, as in the published models.

        Returns:
            None if the budget does not allow even one.
        """
        finite = [layer for layer, window in enumerate(self.base) if window is not None]
        for count in range(len(finite), 0, -1):
            full = {finite[len(finite) * (nth + 1) // count - 1] for nth in range(count)}
            layout = tuple(
                None if layer in full else window for layer, window in enumerate(self.base)
            )
            if self.budget.cost(layout) <= self.budget.limit:
                return layout
        return None


@dataclass(frozen=True)
class Trial:
    """A layout that was tried.

    Attributes:
        round: in which it was first; the base is round 0.
        layout: a window for each layer.
        bits_per_byte: its held-out loss.
        cost: as the budget counts it.
    """

    round: int
    layout: Windows
    bits_per_byte: float
    cost: float


def search(
    space: SearchSpace, losses: Callable[[Sequence[Windows]], Mapping[Windows, float]]
) -> list[Trial]:
    """Tries in rounds every layout with one window more widened, and goes on from the best.

    The `beam` best layouts of all so far are kept; those that came new into them are widened in
    the next round. The search ends when a round brings nothing new among the best: with a beam of
    1, when no wider window fits the budget or none lowers the loss. So it may well stay below
    the budget. Of equal losses the cheaper layout counts as better.

    Args:
        space: where to search.
        losses: the loss of each of the layouts that it is given.

    Returns:
        Everything tried, in order; the best of it is `best(trials)`.
    """
    trials: list[Trial] = []
    kept: list[Trial] = []
    fresh = [space.base]
    number = 0
    while fresh:
        measured = losses(fresh)
        tried = [
            Trial(number, layout, measured[layout], space.budget.cost(layout)) for layout in fresh
        ]
        trials += tried
        kept = sorted(kept + tried, key=_rank)[: space.beam]
        number += 1
        seen = {trial.layout for trial in trials}
        expanded = (trial.layout for trial in kept if trial in tried)
        fresh = list(
            dict.fromkeys(
                layout
                for parent in expanded
                for layout in space.wider(parent)
                if layout not in seen
            )
        )
    return trials


def best(trials: Sequence[Trial]) -> Trial:
    """The one with the lowest loss."""
    return min(trials, key=_rank)


def _rank(trial: Trial) -> tuple[float, float, list[float]]:
    return trial.bits_per_byte, trial.cost, [width(window) for window in trial.layout]
