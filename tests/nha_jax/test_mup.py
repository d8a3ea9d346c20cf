"""muP: what a model wider than `mup_base_width` starts with, how it steps, and its logits."""

import dataclasses
from fractions import Fraction

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nha_jax
from nha_jax import ModelConfig
from nha_jax.layers import Block
from nha_jax.model import abstract_model
from nha_jax.mup import step_factor
from nha_jax.sizes import by_name

WIDTH_RATIO = 4  # a power of two whose root is one too, so that nothing is rounded

# Every parameter that a model can have.
EVERYTHING = ModelConfig.from_dict(
    {
        "vocab_size": 40,
        "num_layers": 2,
        "hidden_size": 16,
        "num_query_heads": 4,
        "num_kv_heads": 2,
        "num_slots": 4,
        "qk_norm": True,
        "attention_bias": "all",
        "experts": {"count": 3, "per_token": 1, "size": 24},
        "dtype": "float32",
    }
)
WIDER = dataclasses.replace(EVERYTHING, mup_base_width=16 // WIDTH_RATIO)

PROJECTIONS = tuple(f"blocks.attention.{name}_proj.kernel" for name in "qkvfo")
EXPERTS = tuple(f"blocks.mlp.{name}_proj.kernel" for name in ("gate", "up", "down"))
ROUTER = "blocks.mlp.router.kernel"


def factors(hidden: Fraction, router: Fraction) -> dict[str, Fraction]:
    """Factors by name; those of all that is not named are 1."""
    names = by_name(abstract_model(EVERYTHING)[1])
    assert {*PROJECTIONS, *EXPERTS, ROUTER} < names.keys()
    named = dict.fromkeys((*PROJECTIONS, *EXPERTS), hidden) | {ROUTER: router}
    return {name: named.get(name, Fraction(1)) for name in names}


def of_one_layer(config: ModelConfig) -> dict[str, np.ndarray]:
    block = nnx.state(Block(config, rngs=nnx.Rngs(0)))
    return {f"blocks.{name}": np.asarray(x) for name, x in by_name(block).items()}


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "experts"])
def test_a_wider_model_starts_with_smaller_matrices(dense: bool) -> None:
    expected = factors(hidden=Fraction(1, 2), router=Fraction(1, 4))
    plain, wider = (
        of_one_layer(dataclasses.replace(each, experts=None if dense else each.experts))
        for each in (EVERYTHING, WIDER)
    )
    assert (ROUTER in plain) != dense
    for name, start in wider.items():
        np.testing.assert_array_equal(start, plain[name] * float(expected[name]), err_msg=name)


@pytest.mark.parametrize(
    ("orthogonal", "hidden"),
    [(False, Fraction(1, 4)), (True, Fraction(1, 2))],
    ids=["adam", "muon"],
)
def test_its_matrices_make_smaller_steps(orthogonal: bool, hidden: Fraction) -> None:
    expected = factors(hidden, router=Fraction(1, 4))
    state = nnx.state(nnx.merge(*abstract_model(WIDER)), nnx.Param)
    scale = nha_jax.scale_by_mup(state, WIDER.width_ratio, orthogonal=orthogonal)
    ones = jax.tree.map(lambda x: np.ones(x.shape), nnx.as_pure(state))
    scaled, _ = scale.update(ones, scale.init(ones), ones)
    for name, step in by_name(scaled).items():
        np.testing.assert_array_equal(step, np.full(step.shape, float(expected[name])), name)


@pytest.mark.parametrize(("orthogonal", "first"), [(False, 1 / 4), (True, 1 / 2)])
def test_of_an_adapter_the_first_factor_reads_the_width(orthogonal: bool, first: float) -> None:
    for axes, expected in (
        (("layers", "embed", "rank"), first),
        (("layers", "rank", "heads"), 1.0),
        (("layers", "mlp", "rank"), first),
    ):
        assert step_factor(WIDTH_RATIO, axes, orthogonal=orthogonal) == expected


def test_its_ends_start_as_they_would() -> None:
    for axes in (("vocab", "embed"), ("embed", "vocab")):
        assert WIDER.initializer_range_of(*axes) == EVERYTHING.initializer_range


@pytest.mark.parametrize("tie_embeddings", [True, False], ids=["tied", "untied"])
def test_its_logits_are_a_part_of_the_heads(tie_embeddings: bool) -> None:
    def logits(config: ModelConfig) -> jax.Array:
        graph, state = abstract_model(dataclasses.replace(config, tie_embeddings=tie_embeddings))
        random = np.random.default_rng(0)
        draw = lambda x: jnp.asarray(random.standard_normal(x.shape), x.dtype)  # noqa: E731
        model = nnx.merge(graph, jax.tree.map(draw, state))
        return model.logits(jnp.linspace(-1, 1, 48).reshape(1, 3, 16))

    chex.assert_trees_all_equal(logits(WIDER), logits(EVERYTHING) / WIDTH_RATIO)


def test_at_the_width_itself_nothing_changes() -> None:
    same = dataclasses.replace(EVERYTHING, mup_base_width=16)
    assert same.width_ratio == EVERYTHING.width_ratio == 1
    assert same.layer == EVERYTHING.layer
    assert WIDER.layer != EVERYTHING.layer
