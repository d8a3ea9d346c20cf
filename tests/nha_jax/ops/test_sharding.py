"""The operator on every device of a mesh: as on one device."""

import pytest

from tests.support.eight_devices import run_on_eight_devices


@pytest.mark.parametrize(
    ("arguments", "cases"),
    [([], 7), pytest.param(["more"], 9, marks=pytest.mark.slow)],
    ids=["some", "more"],
)
def test_eight_devices_agree_with_one(arguments: list[str], cases: int) -> None:
    done = run_on_eight_devices("tests.support.ops.sharded_operator", *arguments)
    assert done.stdout == f"{cases} cases agree\n", done.stderr
