"""The rotary tables: what `transformers` makes of the same scalings, and the plain formula."""

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from nha_jax.config_parts import RopeScaling
from nha_jax.ops import rope_tables
from nha_jax.ops.rope import rope_frequencies
from tests.support.paths import ROOT

# Written by rope_of_transformers.py.
STORED = json.loads((ROOT / "tests/support/ops/rope_of_transformers.json").read_text())["cases"]
FIELDS = {
    "rope_type": "kind",
    "original_max_position_embeddings": "original_length",
    "low_freq_factor": "low_frequency_factor",
    "high_freq_factor": "high_frequency_factor",
}


@pytest.mark.parametrize("case", STORED.values(), ids=STORED.keys())
def test_scaled_tables_are_those_of_transformers(case: dict[str, Any]) -> None:
    fields = {FIELDS.get(name, name): value for name, value in case["parameters"].items()}
    head_dim, theta, scaling = case["head_dim"], case["theta"], RopeScaling(**fields)
    wanted = np.asarray(case["frequencies"], np.float32)
    found = rope_frequencies(head_dim, theta, scaling)
    assert found.dtype == np.float32
    np.testing.assert_array_max_ulp(found, wanted, maxulp=2)
    positions = jnp.array([[0, 1, 2], [100, 4095, 4096]])
    angle = np.asarray(positions, np.float64)[..., None] * found
    cos, sin = rope_tables(positions, head_dim, theta, scaling)
    scale = case["attention_scaling"]
    np.testing.assert_allclose(cos, scale * np.cos(angle), atol=5e-4 * scale)
    np.testing.assert_allclose(sin, scale * np.sin(angle), atol=5e-4 * scale)


@pytest.mark.parametrize("shape", [(5,), (2, 5)], ids=["tokens", "rows"])
def test_unscaled_tables_are_the_formula(shape: tuple[int, ...]) -> None:
    positions = np.random.default_rng(0).integers(0, 1000, shape)
    angle = positions[..., None] * 500.0 ** -(np.arange(0, 12, 2) / 12)
    cos, sin = rope_tables(jnp.asarray(positions), 12, 500.0)
    assert (cos.dtype, sin.dtype) == (jnp.float32, jnp.float32)
    np.testing.assert_allclose(cos, np.cos(angle), atol=2e-4)
    np.testing.assert_allclose(sin, np.sin(angle), atol=2e-4)


def test_an_odd_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match="head_dim must be even, got 7"):
        rope_tables(jnp.arange(3), 7)
