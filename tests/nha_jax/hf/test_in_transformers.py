"""Exports with code for transformers compute there what they compute here, and come back."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import nha_jax
from nha_jax.hf.export import plan_export, write_export
from nha_jax.hf.pretrained import open_pretrained
from nha_jax.hf.tensors import own_code_table
from nha_jax.sizes import by_name
from tests.support.hf import layouts
from tests.support.hf.originals import FIXTURES, NAMES
from tests.support.paths import ROOT

pytestmark = pytest.mark.hf

PROMPT = 8  # as tests/support/hf/make_fixtures.py has it, which needs torch

SCRIPT = ROOT / "tests" / "support" / "hf" / "open_in_transformers.py"

Results = dict[str, np.ndarray]


@functools.cache
def model_of(name: str) -> nha_jax.Model:
    return layouts.layout_model(layouts.layout(name))


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders by layout, in which a process that knows nothing of ours has opened the exports.

    Those of imported families have the tokens that these were made with.
    """
    folder = tmp_path_factory.mktemp("opened")
    names = (*layouts.LAYOUTS, *NAMES)
    folders = {name: folder / str(number) for number, name in enumerate(names)}
    for name in layouts.LAYOUTS:
        nha_jax.save_pretrained(folders[name] / "model", model_of(name), format="transformers")
        np.savez(folders[name] / "inputs.npz", **layouts.layout_inputs())
    for name in NAMES:
        original = open_pretrained(FIXTURES / name, num_slots=8)
        plan = plan_export(original.config, original.files, "transformers")
        out = folders[name] / "model"
        write_export(out, plan, original.source, original.files, shard_bytes=10**9)
        tokens = np.load(FIXTURES / name / "expected.npz")["tokens"]
        prompt = tokens[:, :PROMPT]
        ones = {"segments": np.ones_like(tokens), "mask": np.ones_like(prompt)}
        np.savez(folders[name] / "inputs.npz", tokens=tokens, prompt=prompt, **ones)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    command = [sys.executable, "-I", SCRIPT, *folders.values()]
    finished = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return folders


@pytest.fixture(params=layouts.LAYOUTS)
def found(request: pytest.FixtureRequest, opened: dict[str, Path]) -> tuple[str, Results]:
    return request.param, dict(np.load(opened[request.param] / "outputs.npz"))


def test_logits_are_ours(found: tuple[str, Results]) -> None:
    name, results = found
    inputs = layouts.layout_inputs()
    expected = np.asarray(model_of(name)(inputs["tokens"]))
    print(f"{name}: largest error {np.abs(results['logits'] - expected).max():.1e}")
    np.testing.assert_allclose(results["logits"], expected, atol=1e-5, rtol=0)
    np.testing.assert_allclose(results["in_pieces"], expected, atol=1e-5, rtol=0)
    for kind in ("bfloat16", "autocast"):
        # Of a token: rounding may send a few to other experts.
        off = np.linalg.norm(results[kind] - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
        print(f"{name}: in {kind} {np.median(off):.1e} off, at most {off.max():.1e}")
        assert np.median(off) < 0.02
        assert model_of(name).config.experts or off.max() < 0.05


def test_logits_of_packed_documents_are_ours(found: tuple[str, Results]) -> None:
    name, results = found
    inputs = layouts.layout_inputs()
    segments = inputs["segments"]
    expected = np.asarray(model_of(name)(inputs["tokens"], jnp.asarray(segments)))
    real = segments != 0
    np.testing.assert_allclose(results["packed"][real], expected[real], atol=1e-5, rtol=0)
    by_positions = results["by_positions"][real[:1]]
    np.testing.assert_allclose(by_positions, expected[:1][real[:1]], atol=1e-5, rtol=0)


def test_gradients_are_ours(found: tuple[str, Results]) -> None:
    name, results = found
    model, tokens = model_of(name), jnp.asarray(layouts.layout_inputs()["tokens"])
    graph, parameters = nnx.split(model, nnx.Param)

    def loss(parameters: nnx.State) -> jax.Array:
        logits = nnx.merge(graph, parameters)(tokens)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
        return losses.mean()

    value, gradients = jax.value_and_grad(loss)(parameters)
    assert results["loss"] == pytest.approx(float(value), abs=1e-5)
    ours = {key: np.asarray(x) for key, x in by_name(gradients).items()}
    worst = 0.0
    for entry in own_code_table(model.config):
        whole = ours[entry.name]
        for indices in np.ndindex(*whole.shape[: entry.stacked_axes]):
            expected = entry.theirs(whole[indices])
            gradient = results.get(f"gradient of {entry.their_name(indices)}")
            if gradient is None:  # gates of full attention
                assert not expected.any()
                continue
            off = np.linalg.norm(gradient - expected)
            worst = max(worst, off / (np.linalg.norm(expected) + 1e-4))
    print(f"{name}: gradients {worst:.1e} off")
    assert worst < 1e-4
    assert results["gradients with checkpoints are off by"] < 1e-6


def test_texts_are_ours(found: tuple[str, Results]) -> None:
    name, results = found
    inputs = layouts.layout_inputs()
    prompts = [row[keep != 0] for row, keep in zip(inputs["prompt"], inputs["mask"], strict=True)]
    expected = nha_jax.generate(model_of(name), prompts, max_new_tokens=20, temperature=0)
    np.testing.assert_array_equal(results["greedy"], np.stack(expected))
    np.testing.assert_array_equal(results["greedy without a cache"], np.stack(expected))
    np.testing.assert_array_equal(results["beams"], results["beams without a cache"])


@pytest.mark.parametrize("name", NAMES)
def test_imported_families_compute_what_they_did(name: str, opened: dict[str, Path]) -> None:
    results = np.load(opened[name] / "outputs.npz")
    expected = np.load(FIXTURES / name / "expected.npz")
    print(f"{name}: largest error {np.abs(results['logits'] - expected['logits']).max():.1e}")
    np.testing.assert_allclose(results["logits"], expected["logits"], atol=1e-5, rtol=1e-6)
    greedy = expected["greedy"]
    np.testing.assert_array_equal(results["greedy"][:, : greedy.shape[1]], greedy)


@pytest.mark.parametrize("name", ["slots alone", "a window", "no slots"])
def test_memory_grows_with_the_tokens_and_the_cache_does_not(
    name: str, opened: dict[str, Path]
) -> None:
    results = np.load(opened[name] / "outputs.npz")
    short, long = results["saved_bytes"]
    print(f"{name}: {long / short:.2f} times the memory for four times the tokens")
    assert long < 4.1 * short
    short, long = results["cache_bytes"]
    assert long == short


@pytest.mark.parametrize("name", layouts.LAYOUTS)
def test_what_transformers_saved_comes_back(name: str, opened: dict[str, Path]) -> None:
    model = model_of(name)
    for folder in ("model", "saved"):
        assert open_pretrained(opened[name] / folder).original.notices == ()
        again = nha_jax.from_pretrained(opened[name] / folder, remat="none")
        assert again.config == model.config
        chex.assert_trees_all_equal(nnx.state(again), nnx.state(model))


def test_what_lies_beside_the_weights_is_read(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = layouts.layout_model(layouts.layout("a window", vocab_size=257))
    template = b"{% for message in messages %}<{{ message.content }}>{% endfor %}"
    files = {"chat_template.jinja": template}
    nha_jax.save_pretrained(tmp_path / "out", model, format="transformers", files=files)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    for text in ("naïve <b>\n\n x", "  'tis €1\t\r\n\U0001f600"):
        assert tokenizer(text).input_ids == list(text.encode())
        assert tokenizer.decode(list(text.encode())) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 256)
    chat = [{"role": "user", "content": "é"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<é>"
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == 256
