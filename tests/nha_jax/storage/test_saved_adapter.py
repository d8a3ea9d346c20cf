"""Adapters in files of their own, and merged wherever a model is written."""

import json

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nha_jax
from nha_jax.adapters import adapter_of, quantize_projections
from nha_jax.layers.projection import projections
from nha_jax.sizes import by_name
from nha_jax.storage import weights
from nha_jax.storage.saved_adapter import FACTORS_FILE, SavedAdapter, open_adapter
from tests.nha_jax.storage.test_saved_model import tiny_model
from tests.nha_jax.test_adapters import EVERYWHERE, adapted_model


@pytest.fixture(scope="module")
def base() -> nha_jax.Model:
    return tiny_model(param_dtype="bfloat16")


GATES = "blocks.attention.f_proj.kernel"
FEW = nha_jax.Adapter(rank=2, targets=("blocks.attention.q_proj", "blocks.mlp.down_proj"))
BESIDE_GATES = nha_jax.Adapter(rank=2, targets=("blocks.attention.[qkvo]_proj", "blocks.mlp.*"))


def test_loaded_adapter_is_bit_equal_and_small(tmp_path, base):
    adapted = adapted_model(base, BESIDE_GATES)
    kernel = adapted.blocks.attention.f_proj.kernel
    kernel[...] = kernel[...] + jnp.ones((), kernel.dtype)
    nha_jax.save_adapter(tmp_path / "runs" / "adapter", adapted, whole=[GATES])
    loaded = nha_jax.load_adapter(tmp_path / "runs" / "adapter", base.with_windows(2))
    assert adapter_of(loaded) == adapter_of(adapted)
    assert loaded.config == base.with_windows(2).config
    chex.assert_trees_all_equal(nnx.state(loaded), nnx.state(adapted))
    chex.assert_trees_all_equal_shapes_and_dtypes(nnx.state(loaded), nnx.state(adapted))
    held = by_name(nnx.state(adapted))
    own = [x.nbytes for name, x in held.items() if "lora" in name or name == GATES]
    size = (tmp_path / "runs" / "adapter" / FACTORS_FILE).stat().st_size
    assert sum(own) < size < sum(own) + 4000


@pytest.mark.slow
@pytest.mark.parametrize("of_8_bits", [False, True], ids=["float32", "int8"])
def test_a_model_is_written_merged(tmp_path, monkeypatch, of_8_bits):
    monkeypatch.setattr(weights, "_PIECE_BYTES", 2000)  # parts of kernels, along two axes
    model = tiny_model()
    if of_8_bits:
        model = quantize_projections(model, [*projections(model)])
    adapted = adapted_model(model, EVERYWHERE if of_8_bits else FEW)
    nha_jax.save(tmp_path / "model", adapted)
    loaded = nha_jax.load(tmp_path / "model")
    expected = nnx.state(nha_jax.merge_adapter(adapted))
    chex.assert_trees_all_close(nnx.state(loaded), expected, rtol=0, atol=1e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(nnx.state(loaded), expected)


def test_what_cannot_be_saved_or_loaded_is_named(tmp_path, base):
    model = base
    adapted = nha_jax.add_adapter(model, BESIDE_GATES, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="has no adapter to save"):
        nha_jax.save_adapter(tmp_path / "a", model)
    with pytest.raises(ValueError, match=r"whole='blocks\.gates' is no parameter"):
        nha_jax.save_adapter(tmp_path / "a", adapted, whole=["blocks.gates"])
    with pytest.raises(FileNotFoundError, match=r"not a saved adapter: it has no adapter\.json"):
        nha_jax.load_adapter(tmp_path, model)
    nha_jax.save_adapter(tmp_path / "a", adapted)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        nha_jax.save_adapter(tmp_path / "a", adapted)
    nha_jax.save_adapter(tmp_path / "a", adapted, overwrite=True)
    file = tmp_path / "a" / "adapter.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps(fields | {"rank": 3}))
    other = r"up_proj\.lora_a is bfloat16\[2, 16, 2\], not bfloat16\[2, 16, 3\]"
    with pytest.raises(ValueError, match=other):
        nha_jax.load_adapter(tmp_path / "a", model)
    file.write_text(json.dumps(fields | {"rank": "two"}))
    with pytest.raises(ValueError, match=r"adapter\.json: no adapter: rank='two' must be"):
        nha_jax.load_adapter(tmp_path / "a", model)
    (tmp_path / "a" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not a folder written by save_adapter"):
        nha_jax.save_adapter(tmp_path / "a", adapted, overwrite=True)


def read(saved: SavedAdapter, name: str) -> np.ndarray:
    shape = saved.source.shapes[name].shape
    return saved.source.read(name, tuple(slice(0, length) for length in shape))


def test_tensors_have_the_parameters_names(tmp_path, base):
    adapted = adapted_model(base, nha_jax.Adapter(rank=2))
    nha_jax.save_adapter(tmp_path / "a", adapted)
    saved = open_adapter(tmp_path / "a")
    kinds = [f"blocks.attention.{x}_proj.lora_{y}" for x in "qkvo" for y in "ab"]
    assert sorted(saved.source.shapes) == sorted(kinds)
    expected = adapted.blocks.attention.v_proj.lora_b[...]
    np.testing.assert_array_equal(read(saved, "blocks.attention.v_proj.lora_b"), expected)
