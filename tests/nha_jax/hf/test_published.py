"""The checkpoints published with the paper compute here what they compute there."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import nha_jax
from nha_jax.hf.pretrained import from_pretrained, open_pretrained
from nha_jax.hf.published_windows import read_windows, write_windows
from tests.support.hf import published
from tests.support.hf.originals import EXACT

TOKENS = np.random.default_rng(1).integers(0, 48, 14)

PUBLISHED_CASES: dict[str, dict[str, Any]] = {
    "convolution": {},
    "plain": {
        "num_hidden_layers": 2,
        "use_short_conv": False,
        "block_size": None,
        "num_kv_heads": 2,
        "expand_k": 1,
        "gate_logit_normalizer": 8,
    },
}


@pytest.mark.parametrize("name", PUBLISHED_CASES)
def test_a_model_trained_from_scratch(tmp_path: Path, name: str) -> None:
    fields, tensors = published.write_published(tmp_path, **PUBLISHED_CASES[name])
    model = from_pretrained(tmp_path, **EXACT)
    expected = published.published_logits(fields, tensors, TOKENS)
    logits = np.asarray(model(jnp.asarray(TOKENS)[None]))[0]
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize("full", [None, 1], ids=["hybrid everywhere", "a full layer"])
def test_a_hybridised_llama(tmp_path: Path, full: int | None) -> None:
    windows = {"block_size": None if full is None else 2, "transformer_idx": full}
    fields, tensors = published.write_hybrid(tmp_path, "llama-2", **windows)
    model = from_pretrained(tmp_path, **EXACT)
    assert model.config.windows == (4, 4 if full is None else None)
    expected = published.llama_logits(fields, tensors, TOKENS)
    logits = np.asarray(model(jnp.asarray(TOKENS)[None]))[0]
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize("fixture", ["qwen2", "qwen3", "qwen3-moe"])
def test_the_gates_of_every_family_are_read(tmp_path: Path, fixture: str) -> None:
    _, tensors = published.write_hybrid(tmp_path, fixture)
    source = open_pretrained(tmp_path).source
    shape = source.shapes["blocks.attention.f_proj.kernel"].shape
    kernel = source.read("blocks.attention.f_proj.kernel", tuple(slice(0, n) for n in shape))
    expected = tensors["model.layers.1.self_attn.g_proj.weight"].T
    np.testing.assert_array_equal(kernel[1], expected.astype(kernel.dtype))


def test_other_windows_can_be_chosen_and_other_slots_cannot(tmp_path: Path) -> None:
    published.write_hybrid(tmp_path, "llama-2")
    assert open_pretrained(tmp_path).config.window_size == 4
    assert open_pretrained(tmp_path, window_size=None).config.window_size is None
    with pytest.raises(ValueError, match="num_slots = 8 was chosen, and the gates are of 3"):
        open_pretrained(tmp_path, num_slots=8)


def test_slots_as_many_as_a_key_is_wide(tmp_path: Path) -> None:
    fields, tensors = published.write_published(tmp_path, num_slots=4)
    published.write(tmp_path, fields | {"num_slots": None}, tensors)
    assert open_pretrained(tmp_path).config.num_slots == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature_map": "t2r"}, "feature_map = 't2r': expected 'swish'"),
        ({"conv_bias": True}, "conv_bias = True: expected false"),
        ({"attn": {"layers": [1], "num_heads": 2}}, "its layers have no gates"),
        ({"gsa_kv_shift": 0}, "later code computes something else"),
        ({"elementwise_affine": False}, "elementwise_affine = False: expected true"),
        ({"window_size": 128}, "window_size = 128: expected 1 to 64"),
        ({"block_size": 0}, "block_size = 0: expected at least 1"),
        ({"expand_v": 0.5}, "expand_v = 0.5: expected 1"),
        ({"architectures": ["GSAForCausalLM"]}, "expected 'NHAForCausalLM'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_computed_is_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    fields, tensors = published.write_published(tmp_path)
    published.write(tmp_path, fields | changes | {"rope_scaling": {"factor": 2}}, tensors)
    with pytest.raises(ValueError, match=message) as error:
        open_pretrained(tmp_path)
    assert "rope_scaling = {'factor': 2}: expected null" in str(error.value)


def test_every_missing_tensor_is_named(tmp_path: Path) -> None:
    fields, tensors = published.write_published(tmp_path)
    del (names := dict(tensors))["model.layers.2.attn.f_proj.weight"]
    names["model.layers.0.attn.g_norm.bias"] = np.zeros(32, np.float32)
    published.write(tmp_path, fields, names)
    with pytest.raises(ValueError, match="does not fit") as error:
        open_pretrained(tmp_path)
    assert "model.layers.2.attn.f_proj.weight is missing" in str(error.value)
    assert "model.layers.0.attn.g_norm.bias is unknown" in str(error.value)


@pytest.mark.parametrize(
    "windows",
    [
        (8,),
        (8, 8, 8),
        (None, 8),
        (8, None, 8, None, 8),
        (8, 8, 8, None),
        (8, None, 8),
        (None, None),
    ],
    ids=str,
)
def test_windows_come_back(windows: tuple[int | None, ...]) -> None:
    assert read_windows(write_windows(windows), len(windows)) == (windows, [])


@pytest.mark.parametrize(
    "windows",
    [(8, 16), (None, None, 8), (8, None, None, 8), (128, None), (0, None)],
    ids=str,
)
def test_windows_that_cannot_be_written_are_shown(windows: tuple[int | None, ...]) -> None:
    with pytest.raises(ValueError, match="--windows"):
        write_windows(windows)


def test_later_keys_are_named_and_the_model_is_an_ordinary_one(tmp_path: Path) -> None:
    published.write_published(tmp_path, **PUBLISHED_CASES["plain"], surprise=1)
    pretrained = open_pretrained(tmp_path, **EXACT)
    assert pretrained.original.notices == ("config.json has keys that were ignored: surprise",)
    assert isinstance(pretrained.config, nha_jax.ModelConfig)
    assert pretrained.config.empty_slots == "attend"
