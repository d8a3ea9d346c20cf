"""Tables and heat maps of shares over lengths and loads."""

from pathlib import Path

from train.text.grid import as_table, draw

FOUND = {8: {1: 0.5}, 16: {1: 1.0, 2: 0.125}}


def test_a_table_has_a_row_a_length() -> None:
    assert as_table(FOUND, "pairs").splitlines() == [
        "| tokens / pairs | 1 | 2 |",
        "| --- | --- | --- |",
        "| 8 | 50.0% |  |",
        "| 16 | 100.0% | 12.5% |",
    ]


def test_a_picture_has_cells_that_are_missing(tmp_path: Path) -> None:
    draw(FOUND, "mqar", "pairs", tmp_path / "found.png")
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
