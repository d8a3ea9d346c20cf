"""The operator on the GPU kernels against the float64 reference, in their interpreter."""

import os
import subprocess
import sys

import pytest

from tests.gpu.interpreted import CASES, ORDINARY, THREADS, run_cases
from tests.ops import test_attention
from tests.ops.cases import Case, make_inputs


@pytest.fixture(scope="module")
def ordinary_results() -> dict[int, str]:
    """One process for all of them: starting it takes as long as a case."""
    return run_cases(list(range(len(ORDINARY))))


@pytest.mark.parametrize("index", range(len(ORDINARY)), ids=map(str, ORDINARY))
def test_matches_float64_reference(index, ordinary_results):
    assert ordinary_results[index] == "ok"


def test_float32_runs_xla_and_says_so():
    case = Case(T=12, window="4", segments=True)
    with pytest.warns(UserWarning, match="multiply in bfloat16, got query of float32"):
        test_attention.check(case, "pallas_gpu", "float32", make_inputs(case))


@pytest.mark.gpu_full
@pytest.mark.parametrize(
    "index", range(len(ORDINARY), len(CASES)), ids=map(str, CASES[len(ORDINARY) :])
)
def test_whole_suite_matches_float64_reference(index):
    assert run_cases([index]) == {index: "ok"}


@pytest.mark.gpu_full
def test_two_warpgroups_and_the_softmax_denominator():
    finished = subprocess.run(
        [sys.executable, "-m", "tests.gpu.warpgroups"],
        env=os.environ | THREADS,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
