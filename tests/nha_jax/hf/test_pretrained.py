"""Models of transformers compute here what they compute there."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import nha_jax
from nha_jax.hf.config import from_hf_config
from nha_jax.hf.pretrained import from_pretrained, open_pretrained
from nha_jax.storage.weights import build_model
from tests.support.eight_devices import run_on_eight_devices
from tests.support.hf.originals import EXACT, FIXTURES, NAMES, load_fixture, original_tensors


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_originals(name: str, record_property) -> None:
    expected = np.load(FIXTURES / name / "expected.npz")
    logits = load_fixture(name)(jnp.asarray(expected["tokens"]))
    error = float(np.abs(np.asarray(logits) - expected["logits"]).max())
    record_property("largest_error", error)
    print(f"{name}: largest error {error:.1e}")
    assert error < 1e-4


@pytest.mark.parametrize("name", [pytest.param("llama-3.1", marks=pytest.mark.slow), "qwen3"])
def test_greedy_texts_are_the_originals(name: str) -> None:
    expected = np.load(FIXTURES / name / "expected.npz")
    greedy = expected["greedy"]
    prompt = expected["tokens"][0, :8].tolist()
    written = nha_jax.generate(
        load_fixture(name), prompt, max_new_tokens=greedy.shape[1], temperature=0
    )
    assert written.tolist() == greedy[0].tolist()


@pytest.mark.parametrize("name", ["llama-3.1", "llama-linear", "qwen2-yarn"])
def test_the_fixture_shows_that_rope_was_scaled(name: str) -> None:
    expected = np.load(FIXTURES / name / "expected.npz")
    pretrained = open_pretrained(FIXTURES / name, num_slots=8, **EXACT)
    unscaled = dataclasses.replace(pretrained.config, rope_scaling=None)
    logits = np.asarray(build_model(unscaled, pretrained.source)(jnp.asarray(expected["tokens"])))
    assert np.abs(logits - expected["logits"]).max() > 0.1


@pytest.mark.parametrize("num_slots", [8, 4], ids=["one row a slot", "two rows a slot"])
def test_gates_start_from_the_keys(num_slots: int) -> None:
    name = "llama-3.1"
    model = load_fixture(name, num_slots=num_slots)
    tensors = original_tensors(FIXTURES / name)
    for layer in range(2):
        key = tensors[f"model.layers.{layer}.self_attn.k_proj.weight"]  # [Hkv * K, D]
        means = key.reshape(2, num_slots, 8 // num_slots, 24).mean(2)  # [Hkv, M, D]
        kernel = model.blocks.attention.f_proj.kernel[layer]
        np.testing.assert_allclose(kernel, means.reshape(-1, 24).T, rtol=1e-6)


def test_slots_that_do_not_divide_the_key_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_slots=3 must divide the key size 8: .*1, 2, 4, 8"):
        from_pretrained(FIXTURES / "llama-2", num_slots=3)


def test_a_part_is_read_as_the_whole_is() -> None:
    source = open_pretrained(FIXTURES / "llama-2", num_slots=4).source
    for name, wanted in source.shapes.items():
        whole = source.read(name, tuple(slice(None) for _ in wanted.shape))
        assert (whole.shape, whole.dtype) == (wanted.shape, wanted.dtype)
        part = tuple(slice(length // 4, length // 2 + 1) for length in wanted.shape)
        np.testing.assert_array_equal(source.read(name, part), whole[part])


def test_dtypes_follow_the_files() -> None:
    bfloat16 = open_pretrained(FIXTURES / "mistral", num_slots=8).config
    assert (bfloat16.param_dtype, bfloat16.dtype) == ("bfloat16", "bfloat16")
    float32 = open_pretrained(FIXTURES / "llama-2", num_slots=8).config
    assert (float32.param_dtype, float32.dtype) == ("float32", "float32")


def test_half_precision_is_read_exactly(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "mistral", tmp_path, dirs_exist_ok=True)
    tensors = original_tensors(tmp_path)
    half = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    safetensors.numpy.save_file(half, tmp_path / "model.safetensors")
    model = from_pretrained(tmp_path, num_slots=8)
    assert model.config.param_dtype == "float32"
    np.testing.assert_array_equal(
        model.embed.embedding[...], half["model.embed_tokens.weight"].astype(np.float32)
    )


def test_a_model_is_read_onto_a_mesh() -> None:
    finished = run_on_eight_devices("tests.support.hf.pretrained_on_a_mesh")
    assert finished.returncode == 0, finished.stderr


def test_older_spellings_mean_the_same() -> None:
    fields = json.loads((FIXTURES / "llama-3.1" / "config.json").read_text())
    newer = from_hf_config(fields).config
    rope = fields.pop("rope_parameters")
    fields["rope_theta"] = rope.pop("rope_theta")
    fields["torch_dtype"] = fields.pop("dtype")
    for key in ("rope_type", "type"):
        spelled = {key: rope["rope_type"], **{k: v for k, v in rope.items() if k != "rope_type"}}
        assert from_hf_config({**fields, "rope_scaling": spelled}).config == newer


def test_windows_are_chosen_at_import() -> None:
    model = from_pretrained(FIXTURES / "llama-2", num_slots=8, window_size=(4, None), **EXACT)
    assert model.config.windows == (4, None)
    expected = np.load(FIXTURES / "llama-2" / "expected.npz")
    logits = np.asarray(model(jnp.asarray(expected["tokens"])))
    np.testing.assert_allclose(logits[:, :4], expected["logits"][:, :4], atol=1e-4)
    assert np.abs(logits - expected["logits"]).max() > 0.1
