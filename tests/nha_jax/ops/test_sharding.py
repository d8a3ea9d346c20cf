"""The operator on every device of a mesh: as on one device."""

import pytest

from tests.support.eight_devices import run_on_eight_devices
from tests.support.ops.sharded_operator import CASES, DECODE_WINDOWS, ORDINARY


def check(*arguments: str) -> None:
    done = run_on_eight_devices("tests.support.ops.sharded_operator", *arguments)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "index",
    [
        pytest.param(index, id=str(case), marks=pytest.mark.slow if index >= ORDINARY else ())
        for index, case in enumerate(CASES)
    ],
)
def test_eight_devices_agree_with_one(index: int) -> None:
    check("case", str(index))


@pytest.mark.parametrize("index", range(len(DECODE_WINDOWS)), ids=map(str, DECODE_WINDOWS))
def test_decoding_on_eight_devices_agrees_with_one(index: int) -> None:
    check("decode", str(index))


def test_a_divided_batch_exchanges_nothing() -> None:
    check("communication")


@pytest.mark.slow
def test_query_heads_are_divided_where_key_heads_are_fewer_than_devices() -> None:
    check("more devices than heads")
