"""Which of several sources each sequence is drawn from, as a function of its number."""

import bisect
import itertools
from collections.abc import Mapping, Sequence
from fractions import Fraction


class Mixture:
    """An endless series of draws from several sources: `mixture[n]` is the n-th.

    After any number of draws each source has had its share of them, give or take fewer draws than
    there are sources. (Grain's own mixture rounds the shares to a hundredth of the smallest.)
    """

    def __init__(self, weights: Sequence[float]):
        exact = [Fraction(weight) for weight in weights]
        # shares[i] is the share of source i among the sources from i on.
        shares = [weight / (sum(exact[i:]) or 1) for i, weight in enumerate(exact)]
        self._shares = [share.as_integer_ratio() for share in shares]

    def __getitem__(self, n: int) -> tuple[int, int]:
        """Returns the source of draw `n`, and how many draws before it were from this source."""
        before, after = n, n + 1  # draws that no source has been given yet, without and with draw n
        for source, (share, whole) in enumerate(self._shares):
            mine, mine_after = (-(-count * share // whole) for count in (before, after))
            if mine_after > mine:
                return source, mine
            before, after = before - mine, after - mine_after
        raise AssertionError("the last source takes what remains")

    def counts(self, n: int) -> list[int]:
        """Returns how many of the first `n` draws are from each source."""
        counts = []
        for share, whole in self._shares:
            counts.append(-(-n * share // whole))
            n -= counts[-1]
        return counts


class MixtureInPhases:
    """A `Mixture` whose weights change at given draws.

    Each source goes on where it was: a change leaves no sequence out, and draws none twice.
    """

    def __init__(self, phases: Mapping[int, Sequence[float]]):
        """Makes the mixture; `phases` has the weights from each draw on, from draw 0."""
        self._firsts = sorted(phases)
        self._mixtures = [Mixture(phases[first]) for first in self._firsts]
        # How many draws from each source lie before each phase.
        self._before = [[0] * len(phases[0])]
        lengths = (after - first for first, after in itertools.pairwise(self._firsts))
        for length, mixture in zip(lengths, self._mixtures, strict=False):
            drawn = zip(self._before[-1], mixture.counts(length), strict=True)
            self._before.append([before + count for before, count in drawn])

    def __getitem__(self, n: int) -> tuple[int, int]:
        """Returns the source of draw `n`, and how many draws before it were from this source."""
        phase = bisect.bisect_right(self._firsts, n) - 1
        source, index = self._mixtures[phase][n - self._firsts[phase]]
        return source, self._before[phase][source] + index
