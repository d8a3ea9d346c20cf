"""The cases that testers take: what is drawn, and that it is drawn again."""

import dataclasses

import jax
import numpy as np
import pytest

from nha_jax import testing


def test_seeds_draw_every_value_of_every_option_and_the_same_again():
    cases = [testing.random_case(seed) for seed in range(300)]
    assert cases[:9] == [testing.random_case(seed) for seed in range(9)]
    for name, values in testing.OPTIONS.items():
        assert {getattr(case, name) for case in cases} == set(values), name


def test_options_are_all_fields_that_every_backend_serves():
    """But the sizes of the library's own kernels; a slot_delay is what they do not compute."""
    fields = {field.name for field in dataclasses.fields(testing.Case)}
    assert fields - testing.OPTIONS.keys() == {"small_blocks", "slot_delay"}


def test_inputs_follow_from_the_case_or_from_a_seed():
    case = testing.CASES[0]
    drawn, again = testing.make_inputs(case), testing.make_inputs(case)
    jax.tree.map(np.testing.assert_array_equal, drawn, again)
    seeded, other = testing.make_inputs(case, 0), testing.make_inputs(case, 1)
    assert not np.array_equal(seeded.arrays["query"], other.arrays["query"])
    assert jax.tree.map(np.shape, seeded) == jax.tree.map(np.shape, drawn)


def test_rounded_inputs_are_what_the_dtype_holds():
    inputs = testing.make_inputs(testing.CASES[0]).rounded("bfloat16")
    on_device = inputs.on_device("bfloat16")
    assert {str(x.dtype) for x in on_device.arrays.values()} == {"bfloat16", "float32"}
    for name, x in inputs.arrays.items():
        assert x.dtype == np.float32
        np.testing.assert_array_equal(np.asarray(on_device.arrays[name], np.float32), x)


@pytest.mark.parametrize("gate", testing.GATES)
def test_gates_decay(gate):
    rng = np.random.default_rng(0)
    decays = testing.log_decays(gate, rng.standard_normal((9, 30)), rng)
    assert decays.shape == (9, 30)
    assert (decays <= 0).all()
    if gate in ("mixed", "holes"):
        strong = -1000 if gate == "mixed" else -np.inf
        assert 0.05 < np.mean(decays == strong) < 0.15
        assert 0.05 < np.mean(decays == 0) < 0.15
