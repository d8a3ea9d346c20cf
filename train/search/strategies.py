"""Which layers deserve wider windows: greedy and beam search within a budget.

This is the search of Native Hybrid Attention (arXiv 2510.07019) at inference time: the parameters
stay as they are, and only the windows change. It knows nothing of models: it is given a function
that measures losses. A *proposal* is a window for each layer that has not been measured; a *trial*
is one that has.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from train.errors import require
from train.search.budgets import Budget
from train.windows import Window, Windows, format_windows, width


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """What a search may reach from its base, and how broadly it looks.

    Attributes:
        base: the windows to start from, one for each layer.
        candidates: the windows that a layer may get instead of a narrower one.
        budget: what the windows of all layers may cost together.
        beam: how many trials each round goes on from; with 1 the search is greedy.

    Raises:
        ValueError: a value is out of range, or leaves nothing to search.
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
        expected = f"windows within {limit:g} {self.budget.unit}; these cost {cost:g}"
        require(cost <= limit, "base", base, expected)

    def widen(self, windows: Windows) -> Iterator[Windows]:
        """Proposes all windows within the budget that have one window wider, layer by layer."""
        for layer, window in enumerate(windows):
            for candidate in self.candidates:
                proposal = (*windows[:layer], candidate, *windows[layer + 1 :])
                fits = self.budget.cost(proposal) <= self.budget.limit
                if width(candidate) > width(window) and fits:
                    yield proposal

    def evenly_spaced(self) -> Windows | None:
        """Spaces as many full layers evenly as the budget allows; the others stay as in the base.

        If L layers have a finite window in the base, the k full ones among them are those at
        floor(L i / k) - 1 for i = 1 to k: with L = 24 and k = 6 every fourth, as in the published
        models.

        Returns:
            The windows, or None if the budget does not allow even one full layer.
        """
        finite = [layer for layer, window in enumerate(self.base) if window is not None]
        for count in range(len(finite), 0, -1):
            full = {finite[len(finite) * (nth + 1) // count - 1] for nth in range(count)}
            windows = tuple(
                None if layer in full else window for layer, window in enumerate(self.base)
            )
            if self.budget.cost(windows) <= self.budget.limit:
                return windows
        return None


@dataclass(frozen=True)
class Trial:
    """Windows that were tried, and what came of it.

    Attributes:
        round: the round in which they were tried; the base is round 0.
        windows: one for each layer.
        bits_per_byte: the held-out loss of the model with these windows.
        cost: what they cost, as the budget counts it.
    """

    round: int
    windows: Windows
    bits_per_byte: float
    cost: float


def search(
    space: SearchSpace, losses: Callable[[Sequence[Windows]], Mapping[Windows, float]]
) -> list[Trial]:
    """Searches in rounds, each of which widens one more window of the best trials so far.

    A round tries every wider window at every layer, then keeps the `beam` best of all trials so
    far. The next round goes on from those of them that are new. The search ends when a round brings
    no new trial among the best. With a beam of 1 this is when no wider window fits the budget or
    none lowers the loss, so the search may end below the budget. Of two trials with the same loss
    the cheaper one is better.

    Args:
        space: where to search.
        losses: measures proposals, each a window for every layer, and returns their losses (and
            perhaps those of others).

    Returns:
        All trials in order; `best(trials)` is what the search found.
    """
    trials: list[Trial] = []
    kept: list[Trial] = []
    proposals = [space.base]
    number = 0
    while proposals:
        measured = losses(proposals)
        tried = [
            Trial(number, windows, measured[windows], space.budget.cost(windows))
            for windows in proposals
        ]
        trials += tried
        kept = sorted(kept + tried, key=_rank)[: space.beam]
        number += 1
        seen = {trial.windows for trial in trials}
        to_widen = (trial.windows for trial in kept if trial in tried)
        proposals = list(
            dict.fromkeys(
                wider for windows in to_widen for wider in space.widen(windows) if wider not in seen
            )
        )
    return trials


def best(trials: Sequence[Trial]) -> Trial:
    """Returns the trial with the lowest loss."""
    return min(trials, key=_rank)


def _rank(trial: Trial) -> tuple[float, float, list[float]]:
    return trial.bits_per_byte, trial.cost, [width(window) for window in trial.windows]
