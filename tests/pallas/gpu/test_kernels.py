"""The GPU kernels in their interpreter, against float64, and when a program launches which."""

import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from nha_jax.layers.remat import remat_policy
from nha_jax.ops import nha_attention
from tests.support.gpu import (
    gates,
    ordinary,
    slot_query_gradients,
    slot_token_gradients,
    window_gradients,
)
from tests.support.gpu.interpreted import CASES
from tests.support.gpu.process import HOPPER, THREADS, run_cases

run_suite = functools.partial(run_cases, module="tests.support.gpu.interpreted")


def test_ordinary_cases_match_float64_and_xla():
    """The operator and its gradients against float64, a decode step against XLA."""
    indices = range(len(ordinary.CASES))
    results = run_cases(indices, "tests.support.gpu.ordinary")
    wrong = {str(ordinary.CASES[i][1]): results[i] for i in indices if results[i] != "ok"}
    assert not wrong


@pytest.mark.full
@pytest.mark.parametrize("index", range(len(CASES)), ids=map(str, CASES))
def test_whole_suite_matches_float64_reference(index):
    assert run_suite([index]) == {index: "ok"}


@pytest.mark.full
@pytest.mark.parametrize(
    ("module", "index"),
    [
        pytest.param(module.__name__, index, id=f"{module.__name__}-{index}")
        for module in (gates, slot_query_gradients, slot_token_gradients, window_gradients)
        for index in range(len(module.CASES))
    ],
)
def test_launches_match_their_formulas_in_float64(module, index):
    assert run_cases([index], module.__name__) == {index: "ok"}


@pytest.mark.full
def test_saved_names_spare_a_rematerialised_layer_the_forward():
    @functools.partial(jax.checkpoint, policy=remat_policy("operator"))
    def layer(query, key, log_decay):
        arrays = query, key, key, log_decay
        return query + nha_attention(*arrays, window_size=16, implementation="pallas_gpu")

    def loss(*inputs):
        return jnp.sum(layer(*inputs).astype(jnp.float32))

    wide = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
    log_decay = jax.ShapeDtypeStruct((1, 128, 2, 16), jnp.float32)
    with jax.sharding.use_abstract_mesh(HOPPER):
        traced = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).trace(wide, wide, log_decay)
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"nha_(\w+)_mosaic_gpu", program)
    forward = ["gates", "states", "output"]  # once each
    backward = ["gates", "window_queries", "window_tokens"]
    backward += ["slot_queries", "state_grads", "slot_tokens"]
    assert sorted(calls) == sorted(forward + backward)


@pytest.mark.full
def test_two_warpgroups_and_the_log_sum_exp():
    finished = subprocess.run(
        [sys.executable, "-m", "tests.support.gpu.two_warpgroups"],
        env=os.environ | THREADS,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
