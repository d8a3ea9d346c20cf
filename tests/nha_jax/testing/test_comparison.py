"""What holds an implementation against the definition finds what is wrong with it."""

import sys
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from nha_jax import testing
from nha_jax.ops import backends
from nha_jax.ops.reference import reference_attention

CASE = testing.Case(T=5, window="2", M=3, K=4, V=4, B=1)
CLOSE = testing.Tolerance(1e-3, 1e-2)


class Toy(backends.Backend):
    """The definition, with an output and a gradient that may be wrong."""

    name = "toy"

    def __init__(self, factor: float = 1.0, slope: float = 1.0):
        self.factor, self.slope = factor, slope

    def attend(self, query, key, value, log_decay, **rest):
        still = jax.lax.stop_gradient(query)
        query = still + self.slope * (query - still)
        result = reference_attention(query, key, value, log_decay, **rest)
        return result._replace(out=self.factor * result.out)


@pytest.fixture(autouse=True)
def taken_back() -> Iterator[None]:
    yield
    if "toy" in backends.names():
        backends.unregister("toy")


def test_a_right_implementation_passes_and_a_wrong_one_of_the_same_name_does_not():
    backends.register(Toy())
    testing.assert_matches_reference(CASE, "toy")
    backends.register(Toy(factor=1.001))
    with pytest.raises(AssertionError, match=r"errors above .*'out': '1.0e-03'"):
        testing.assert_matches_reference(CASE, "toy")
    testing.assert_matches_reference(CASE, "toy", tolerance=testing.Tolerance(2e-3, 2e-3))


def test_a_wrong_gradient_is_found_and_named_alone():
    backends.register(Toy(slope=1.01))
    with pytest.raises(AssertionError, match=r": \{'gradient/query': '1.0e-02'\}$"):
        testing.assert_matches_reference(CASE, "toy")


def test_what_an_implementation_cannot_serve_is_said():
    with pytest.raises(ValueError, match=r"implementation must be one of .* got 'toy'"):
        testing.assert_matches_reference(CASE, "toy")


@pytest.mark.slow
@pytest.mark.parametrize("case", testing.CASES, ids=str)
def test_the_oracles_dtype_has_a_tolerance(case):
    testing.assert_matches_reference(case, "xla", "float64")


def arrays(out: float = 1.0, slope: float = 2.0) -> dict:
    return {"out": np.full((2, 3), out), "gradient": {"query": np.full(4, slope)}}


@pytest.mark.parametrize(
    ("results", "message"),
    [
        (arrays(out=1.01), "'out': '1.0e-02'"),
        (arrays(slope=2.1), "'gradient/query': '5.0e-02'"),
        (arrays(out=np.nan, slope=np.nan), "'gradient/query': 'nan', 'out': 'nan'"),
        (arrays(out=np.inf), "'out': 'inf'"),
        ({"out": np.ones((2, 3))}, "gradient"),
        (arrays() | {"out": np.ones((3, 2))}, r"\(3, 2\)"),
    ],
    ids=["output", "gradient", "NaN", "infinite", "an array is missing", "shape"],
)
def test_what_is_not_close_is_refused(results, message):
    with pytest.raises(AssertionError, match=message):
        testing.assert_close(results, arrays(), CLOSE)


def test_what_is_close_passes_and_exceptions_go_before():
    testing.assert_close(arrays(out=1.0005, slope=2.01), arrays(), CLOSE)
    testing.assert_close(arrays(out=1.01), arrays(), CLOSE, {"out": 0.02})
    with pytest.raises(AssertionError, match="'out'"):
        testing.assert_close(arrays(out=1.0005), arrays(), CLOSE, {"out": 1e-4})


def test_without_chex_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "chex", None)
    with pytest.raises(ImportError, match=r"chex is not installed; `pip install \"nha_jax\[note"):
        testing.assert_close(arrays(), arrays(), CLOSE)


def test_infinities_must_be_the_same_and_the_rest_is_measured_without():
    expected = np.array([np.inf, 3.0, 4.0])
    assert testing.relative_error(np.array([np.inf, 3.0, 4.5]), expected) == pytest.approx(0.1)
    assert testing.relative_error(np.array([-np.inf, 3.0, 4.0]), expected) == np.inf
    assert testing.relative_error(np.full(3, 1e-3), np.zeros(3)) == pytest.approx(1e-3)
