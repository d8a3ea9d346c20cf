"""The choice of cases: every pair, and not many more cases than that takes."""

import pytest

from tests.support.pairs import missing_pairs, pairwise


@pytest.mark.parametrize(
    ("sizes", "most"), [((6, 2, 2), 12), ((3, 2, 2), 6), ((4, 3, 3, 2, 2, 2, 2), 16)], ids=str
)
def test_every_pair_is_held_by_few_rows(sizes: tuple[int, ...], most: int) -> None:
    options = {f"option {i}": range(size) for i, size in enumerate(sizes)}
    rows = pairwise(options)
    assert missing_pairs(rows, options) == []
    assert len(rows) <= most
    assert rows == pairwise(options)


def test_what_is_missing_is_named() -> None:
    options = {"window": [0, None], "packed": [False, True]}
    rows = [{"window": 0, "packed": True}, {"window": None, "packed": False}]
    assert missing_pairs(rows, options) == ["window=0, packed=False", "window=None, packed=True"]
