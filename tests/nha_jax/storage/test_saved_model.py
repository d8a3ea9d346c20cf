"""Saved and loaded models are the same; anything else is refused, by name."""

import json
import re
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
from flax import nnx

from nha_jax import Model, ModelConfig, load, save
from nha_jax.storage import saved_model, weights
from nha_jax.storage.folder import EXTRA_FILES, extra_files_of
from tests.support.paths import FIXTURES


def tiny_model(seed: int = 0, **overrides) -> Model:
    sizes = {"num_layers": 2, "hidden_size": 16, "num_slots": 4, "window_size": (4, None)}
    config = ModelConfig.preset("nha-tiny", **sizes | overrides)
    return Model(config, rngs=nnx.Rngs(seed))


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tie_embeddings", [True, False], ids=["tied", "untied"])
def test_loaded_model_is_bit_equal(tmp_path, param_dtype, tie_embeddings):
    model = tiny_model(param_dtype=param_dtype, tie_embeddings=tie_embeddings)
    save(tmp_path / "runs" / "model", model)
    loaded = load(tmp_path / "runs" / "model")
    assert loaded.config == model.config
    chex.assert_trees_all_equal(nnx.state(loaded), nnx.state(model))
    chex.assert_trees_all_equal_shapes_and_dtypes(nnx.state(loaded), nnx.state(model))
    names = loaded.blocks.attention.q_proj.kernel.get_metadata()["out_sharding"]
    assert names == ("layers", "embed", "heads")


def test_model_saved_before_the_house_was_redesigned_loads():
    folder = FIXTURES / "saved_before"
    with np.load(folder / "expected.npz") as expected:
        logits = load(folder / "model")(jnp.asarray(expected["tokens"]))
        np.testing.assert_allclose(logits, expected["logits"], rtol=1e-5, atol=1e-5)
    assert extra_files_of(folder / "model") == {"generation_config.json": b'{"eos_token_id": 0}\n'}


def test_loaded_model_runs(tmp_path):
    model = tiny_model()
    save(tmp_path / "model", model)
    tokens = jnp.arange(6)[None]
    chex.assert_trees_all_equal(load(tmp_path / "model")(tokens), model(tokens))


def test_files_are_plain(tmp_path):
    save(tmp_path / "model", tiny_model())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model"]
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert json.loads((tmp_path / "model/config.json").read_text())["window_size"] == [4, None]
    tensors = safetensors.flax.load_file(tmp_path / "model/model.safetensors")
    assert tensors["blocks.attention.q_proj.kernel"].shape == (2, 16, 16)
    assert tensors["embed.embedding"].shape == (257, 16)


def test_nothing_is_overwritten_unasked(tmp_path):
    first, second = tiny_model(0), tiny_model(1)
    save(tmp_path / "model", first)
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        save(tmp_path / "model", second)
    chex.assert_trees_all_equal(nnx.state(load(tmp_path / "model")), nnx.state(first))
    save(tmp_path / "model", second, overwrite=True)
    chex.assert_trees_all_equal(nnx.state(load(tmp_path / "model")), nnx.state(second))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model"]


def test_only_models_are_overwritten(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("work of years")
    (tmp_path / "file").write_text("")
    for name in ("thesis", "file"):
        with pytest.raises(FileExistsError, match="is not a folder written by save"):
            save(tmp_path / name, tiny_model(), overwrite=True)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "work of years"


def test_a_failed_save_leaves_everything_as_it_was(tmp_path, monkeypatch):
    model = tiny_model()
    save(tmp_path / "model", model)

    def disk_full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(saved_model, "write_weights", disk_full)
    with pytest.raises(OSError, match="no space left"):
        save(tmp_path / "model", tiny_model(1), overwrite=True)
    with pytest.raises(OSError, match="no space left"):
        save(tmp_path / "other", tiny_model(1))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model"]
    chex.assert_trees_all_equal(nnx.state(load(tmp_path / "model")), nnx.state(model))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "empty: expected a JSON object; copy or download it again"),
        ("{", "damaged: expected a JSON object; copy or download it again"),
        ("null", "damaged: expected a JSON object"),
        ("[" * 100_000, "damaged: expected a JSON object"),
        ("\xff", "damaged: expected a JSON object"),
        ("{}", "ModelConfig: missing vocab_size, num_layers"),
        ('{"vocab_size": NaN', "damaged"),
    ],
    ids=["empty", "cut", "null", "nested", "no-utf-8", "object", "cut-later"],
)
def test_a_config_that_was_cut_is_named_with_the_cure(tmp_path, text, problem):
    shutil.copytree(FIXTURES / "saved_before" / "model", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))}: {problem}") as error:
        load(tmp_path / "model")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("size", "state"), [(0, "empty"), (7, "damaged"), (1000, "damaged")])
def test_weights_that_were_cut_are_named_with_the_cure(tmp_path, size, state):
    shutil.copytree(FIXTURES / "saved_before" / "model", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=rf"model\.safetensors: {state}: .*download it again"):
        load(tmp_path / "model")


def test_every_wrong_tensor_is_named_at_once(tmp_path):
    save(tmp_path / "model", tiny_model())
    file = tmp_path / "model" / "model.safetensors"
    tensors = safetensors.flax.load_file(file)
    del tensors["norm.scale"]
    tensors["head.bias"] = jnp.zeros(3)
    tensors["embed.embedding"] = tensors["embed.embedding"][:9]
    tensors["blocks.mlp.up_proj.kernel"] = tensors["blocks.mlp.up_proj.kernel"].astype(jnp.bfloat16)
    safetensors.flax.save_file(tensors, file)
    with pytest.raises(ValueError, match="does not fit its config") as error:
        load(tmp_path / "model")
    for problem in (
        "norm.scale is missing",
        "head.bias is unknown",
        "embed.embedding is float32[9, 16], not float32[257, 16]",
        "blocks.mlp.up_proj.kernel is bfloat16[2, 16, 64], not float32[2, 16, 64]",
    ):
        assert problem in str(error.value)
    assert str(error.value).count(";") == 3


def test_a_folder_that_is_no_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not a saved model: it has no config\.json"):
        load(tmp_path)
    save(tmp_path / "model", tiny_model())
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        load(tmp_path / "model")


def test_saving_does_not_depend_on_where_the_parameters_lie(tmp_path):
    model = tiny_model()
    on_host = jax.tree.map(jax.device_get, nnx.state(model))
    save(tmp_path / "model", nnx.merge(nnx.graphdef(model), on_host))
    chex.assert_trees_all_equal(nnx.state(load(tmp_path / "model")), nnx.state(model))


def test_extra_files_are_saved_with_the_model_and_replaced_with_it(tmp_path) -> None:
    path = tmp_path / "model"
    files = {name: f"{name}, as it came".encode() for name in EXTRA_FILES}
    save(path, tiny_model(), files=files)
    assert extra_files_of(path) == files
    save(path, tiny_model(1), overwrite=True, files={"tokenizer.json": b"[]"})
    assert extra_files_of(path) == {"tokenizer.json": b"[]"}
    with pytest.raises(ValueError, match=r"other\.txt"):
        save(tmp_path / "new", tiny_model(), files={"other.txt": b""})


def test_pieces_are_small_and_read_alone(tmp_path, monkeypatch):
    model, asked = tiny_model(), []
    source = weights.ModelSource(model)
    read = source.read
    monkeypatch.setattr(weights, "_PIECE_BYTES", 2048)
    monkeypatch.setattr(source, "read", lambda *part: asked.append(read(*part)) or asked[-1])
    weights.write_weights(tmp_path / "file", source)
    assert max(piece.nbytes for piece in asked) <= 2048
    stored = safetensors.flax.load_file(tmp_path / "file")
    for name, like in source.shapes.items():
        whole = read(name, tuple(slice(None) for _ in like.shape))
        chex.assert_trees_all_equal(np.asarray(stored[name]), whole)


def test_a_file_that_is_cut_off_is_named(tmp_path):
    save(tmp_path / "model", tiny_model())
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged: .*"):
        load(tmp_path / "model")
