"""New random models, made, run and compared in one process: needs torch and transformers."""

from pathlib import Path

import numpy as np
import pytest

import nha_jax
from nha_jax.hf import open_pretrained
from nha_jax.storage.weights import build_model
from tests.support.hf.originals import EXACT, NAMES

pytestmark = pytest.mark.hf

SEED = 1234


@pytest.mark.parametrize("name", NAMES)
def test_new_models_compute_the_same(name: str, tmp_path: Path) -> None:
    make_fixtures = pytest.importorskip("tests.support.hf.make_fixtures", exc_type=ImportError)
    make_fixtures.random_model(name, SEED).save_pretrained(tmp_path)
    tokens = np.random.default_rng(SEED).integers(0, 48, (2, 70))
    expected = make_fixtures.what_it_computes(tmp_path, tokens)
    model = nha_jax.from_pretrained(tmp_path, num_slots=8, **EXACT)
    logits = np.asarray(model(tokens))
    print(f"{name}: largest error {np.abs(logits - expected['logits']).max():.1e}")
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4, rtol=0)
    written = nha_jax.generate(
        model, list(tokens[:, : make_fixtures.PROMPT]), max_new_tokens=make_fixtures.NEW_TOKENS,
        temperature=0,
    )  # fmt: skip
    assert [row.tolist() for row in written] == expected["greedy"].tolist()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mistral", {"sliding_window": 16}),
        ("qwen3", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}),
    ],
    ids=["mistral", "qwen3"],
)
def test_a_sliding_window_shows_only_beyond_it(name: str, changes: dict, tmp_path: Path) -> None:
    make_fixtures = pytest.importorskip("tests.support.hf.make_fixtures", exc_type=ImportError)
    make_fixtures.random_model(name, SEED, **changes).save_pretrained(tmp_path)
    tokens = np.random.default_rng(SEED).integers(0, 48, (1, 70))
    expected = make_fixtures.what_it_computes(tmp_path, tokens)["logits"]
    pretrained = open_pretrained(tmp_path, num_slots=8, **EXACT)
    assert "up to 16 tokens" in pretrained.original.notices[0]
    logits = np.asarray(build_model(pretrained.config, pretrained.source)(tokens))
    np.testing.assert_allclose(logits[:, :16], expected[:, :16], atol=1e-4, rtol=0)
    assert np.abs(logits - expected)[:, 16].max() > 1e-2


def test_the_experts_weights_may_add_up_to_less_than_one(tmp_path: Path) -> None:
    make_fixtures = pytest.importorskip("tests.support.hf.make_fixtures", exc_type=ImportError)
    model = make_fixtures.random_model("qwen3-moe", SEED, norm_topk_prob=False)
    model.save_pretrained(tmp_path)
    tokens = np.random.default_rng(SEED).integers(0, 48, (1, 40))
    expected = make_fixtures.what_it_computes(tmp_path, tokens)["logits"]
    logits = nha_jax.from_pretrained(tmp_path, num_slots=8, **EXACT)(tokens)
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


def test_every_family_is_made() -> None:
    make_fixtures = pytest.importorskip("tests.support.hf.make_fixtures", exc_type=ImportError)
    assert set(make_fixtures.MODELS) == set(NAMES)
