"""Cases that hold every pair of option values, instead of every combination of them."""

import itertools
import random
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

import pytest

CANDIDATES = 30  # rows drawn for each that is kept


def pairwise(options: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Chooses a few combinations in which any two values of different options meet.

    Most errors need one value of an option, or two values that meet. Six options of three values
    have 729 combinations, and about fifteen of them hold every pair. The choice is greedy and
    always the same. The whole product belongs behind `-m slow` or `-m full`.

    Args:
      options: name -> values, of at least two options.
    """
    chance = random.Random(0)
    names = list(options)
    missing = {
        ((one, i), (other, j))
        for one, other in itertools.combinations(names, 2)
        for i, j in itertools.product(range(len(options[one])), range(len(options[other])))
    }

    def pairs_of(row: dict[str, int]) -> set:
        return set(itertools.combinations([(name, row[name]) for name in names if name in row], 2))

    def candidate() -> tuple[set, dict[str, int]]:
        """A row with a missing pair, filled up at random, and all missing pairs in it."""
        row = dict(chance.choice(sorted(missing)))
        for name in chance.sample(names, len(names)):
            if name not in row:
                filled = [row | {name: i} for i in range(len(options[name]))]
                chance.shuffle(filled)
                row = max(filled, key=lambda row: len(pairs_of(row) & missing))
        return pairs_of(row) & missing, row

    rows = []
    while missing:
        found, row = max((candidate() for _ in range(CANDIDATES)), key=lambda each: len(each[0]))
        missing -= found
        rows.append({name: options[name][row[name]] for name in names})
    return rows


def every_pair(
    options: Mapping[str, Sequence[Any]], rest: pytest.MarkDecorator | None = None
) -> list:
    """Parameters for pytest: `pairwise(options)`, and the rest of the product behind a marker.

    Each is a dictionary of an option's name to its value.
    """
    chosen = pairwise(options)
    product = [
        dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())
    ]
    return [
        pytest.param(
            row,
            id="-".join(f"{name}={value}" for name, value in row.items()),
            marks=() if row in chosen else rest,
        )
        for row in product
        if row in chosen or rest
    ]


def missing_pairs(
    rows: Sequence[Mapping[str, Hashable]], options: Mapping[str, Collection[Hashable]]
) -> list[str]:
    """The pairs of values, as text, that no row of a written list holds."""
    return [
        f"{one}={x}, {other}={y}"
        for one, other in itertools.combinations(options, 2)
        for x, y in itertools.product(options[one], options[other])
        if not any(row[one] == x and row[other] == y for row in rows)
    ]
