"""What was imported is written back as it came, and what was trained here travels too."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import chex
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import nha_jax
from nha_jax.hf.export import plan_export, write_export
from nha_jax.hf.pretrained import Pretrained, from_pretrained, open_pretrained
from nha_jax.storage.folder import ORIGINAL_CONFIG_FILE, extra_files_of
from tests.support.hf import published
from tests.support.hf.originals import FIXTURES, NAMES

# Spelt otherwise for versions of transformers before 5, or a matter of this one alone.
RESPELT = {"rope_parameters", "rope_scaling", "rope_theta", "dtype", "torch_dtype",
           "transformers_version", "num_local_experts", "num_experts", "layer_types"}  # fmt: skip


def export(
    source: Pretrained, out: Path, files: dict[str, bytes] | None = None, **options: Any
) -> tuple[str, ...]:
    """Writes what was opened without loading it."""
    files = source.files if files is None else files
    plan = plan_export(source.config, files, options.pop("format", None))
    write_export(out, plan, source.source, files, **{"shard_bytes": 10**9} | options)
    return plan.notices


def tensors(folder: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for file in folder.glob("*.safetensors"):
        found |= safetensors.numpy.load_file(file)
    return found


def assert_same_weights(first: Pretrained, second: Pretrained) -> None:
    assert first.source.shapes == second.source.shapes
    for name, shape in first.source.shapes.items():
        index = tuple(slice(0, length) for length in shape.shape)
        chex.assert_trees_all_equal(first.source.read(name, index), second.source.read(name, index))


@pytest.mark.parametrize("name", NAMES)
def test_an_imported_model_goes_back_as_it_came(tmp_path: Path, name: str) -> None:
    original = open_pretrained(FIXTURES / name, num_slots=8)
    assert export(original, tmp_path / "out") == ()
    expected, found = tensors(FIXTURES / name), tensors(tmp_path / "out")
    if original.config.tie_embeddings:
        expected.pop("lm_head.weight", None)
    chex.assert_trees_all_equal(found, expected)
    before = json.loads((FIXTURES / name / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    for fields in (before, after):
        for key in RESPELT:
            fields.pop(key, None)
    assert before.items() <= after.items()
    generation = (FIXTURES / name / "generation_config.json").read_bytes()
    assert extra_files_of(tmp_path / "out") == {"generation_config.json": generation}

    again = open_pretrained(tmp_path / "out", num_slots=8)
    assert again.config == original.config
    assert_same_weights(again, original)


@pytest.mark.parametrize("name", NAMES)
def test_the_family_follows_from_the_config_alone(tmp_path: Path, name: str) -> None:
    original = open_pretrained(FIXTURES / name, num_slots=8)
    export(original, tmp_path / "out", files={})
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = "llama" if name == "mistral" else original.original.family.model_type
    assert fields["model_type"] == expected
    assert open_pretrained(tmp_path / "out", num_slots=8).config == original.config


def test_numbers_of_special_tokens_come_from_the_generation_config(tmp_path: Path) -> None:
    original = open_pretrained(FIXTURES / "llama-2", num_slots=8)
    files = {"generation_config.json": json.dumps({"eos_token_id": [5, 6]}).encode()}
    fields = plan_export(original.config, files).fields
    assert (fields["eos_token_id"], fields["bos_token_id"]) == ([5, 6], None)


def test_an_original_that_is_another_model_decides_nothing(tmp_path: Path) -> None:
    original = open_pretrained(FIXTURES / "llama-2", num_slots=8)
    files = {ORIGINAL_CONFIG_FILE: (FIXTURES / "qwen3" / "config.json").read_bytes()}
    assert plan_export(original.config, files) == plan_export(original.config, {})
    files = {ORIGINAL_CONFIG_FILE: b"damaged"}
    assert plan_export(original.config, files) == plan_export(original.config, {})


def test_a_sliding_window_of_the_original_is_not_that_of_the_model(tmp_path: Path) -> None:
    folder = shutil.copytree(FIXTURES / "mistral", tmp_path / "original")
    fields = json.loads((folder / "config.json").read_text()) | {"sliding_window": 16}
    (folder / "config.json").write_text(json.dumps(fields))
    original = open_pretrained(folder, num_slots=8)
    written = plan_export(original.config, original.files).fields
    assert (written["model_type"], written["sliding_window"]) == ("mistral", None)


@pytest.mark.parametrize("full", [None, 1], ids=["hybrid everywhere", "a full layer"])
@pytest.mark.parametrize("name", ["llama-2", "qwen2", "qwen3", "qwen3-moe"])
def test_a_hybridised_model_goes_back_as_it_came(
    tmp_path: Path, name: str, full: int | None
) -> None:
    windows = {"block_size": None if full is None else 2, "transformer_idx": full}
    fields, expected = published.write_hybrid(tmp_path / "original", name, **windows)
    original = open_pretrained(tmp_path / "original")
    notices = export(original, tmp_path / "out")
    assert ("the last 2048 tokens" in " ".join(notices)) == (full is not None)
    assert ("of a Qwen2" in " ".join(notices)) == (full is not None and name == "qwen2")
    assert original.original.notices[-len(notices) :] == notices or not notices
    chex.assert_trees_all_equal(tensors(tmp_path / "out"), tensors(tmp_path / "original"))
    assert expected.keys() == tensors(tmp_path / "out").keys()
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: after[key] for key in fields.keys() - RESPELT} == {
        key: fields[key] for key in fields.keys() - RESPELT
    }
    again = open_pretrained(tmp_path / "out")
    assert again.config == original.config
    assert_same_weights(again, original)


@pytest.mark.parametrize("windows", [(16, None), (16,), (None, 16)], ids=str)
def test_what_was_hybridised_here_travels_with_its_gates(
    tmp_path: Path, windows: tuple[int | None, ...]
) -> None:
    original = open_pretrained(FIXTURES / "llama-3.1", num_slots=4, window_size=windows)
    *full, notice = export(original, tmp_path / "out")
    assert "empty slots" in notice
    assert len(full) == (None in windows)
    again = open_pretrained(tmp_path / "out")
    assert again.original.family.architecture == "LlamaNHAForCausalLM"
    assert again.config.empty_slots == "mask"
    assert again.config.windows == original.config.windows
    assert dataclasses.replace(again.config, window_size=windows) == original.config
    assert_same_weights(again, original)


def test_empty_slots_that_the_family_has_not_are_told(tmp_path: Path) -> None:
    original = open_pretrained(FIXTURES / "qwen3", num_slots=4, empty_slots="attend")
    (notice,) = export(original, tmp_path / "out")
    assert "empty_slots='attend'" in notice


def test_gates_can_be_kept_at_full_attention(tmp_path: Path) -> None:
    original = open_pretrained(FIXTURES / "mistral", num_slots=4)
    export(original, tmp_path / "out", format="nha")
    again = open_pretrained(tmp_path / "out")
    assert again.original.family.model_type == "llama_nha"
    assert again.config == original.config
    assert_same_weights(again, original)


PUBLISHED_CASES = {
    "convolution": {},
    "plain": {"use_short_conv": False, "block_size": None, "transformer_idx": None},
    "grouped": {"num_kv_heads": 2, "expand_k": 1, "num_hidden_layers": 2},
    "later": {"base": published.LATER_FIELDS},
    "later, shifted by the window": {"base": published.LATER_FIELDS, "gsa_kv_shift": 5},
}


@pytest.mark.parametrize("name", PUBLISHED_CASES)
def test_a_published_model_goes_back_as_it_came(tmp_path: Path, name: str) -> None:
    fields, expected = published.write_published(tmp_path / "original", **PUBLISHED_CASES[name])
    original = open_pretrained(tmp_path / "original")
    *notices, last = export(original, tmp_path / "out")
    if original.config.slot_delay is None:
        assert "their later code reads the same files and computes something else" in last
    else:
        notices.append(last)
    assert tuple(notices) == original.original.notices
    chex.assert_trees_all_equal(tensors(tmp_path / "out"), dict(expected))
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    derived = {"intermediate_size", "exapnd_k"}
    assert {key: after[key] for key in fields.keys() - derived} == {
        key: fields[key] for key in fields.keys() - derived
    }
    again = open_pretrained(tmp_path / "out")
    assert again.config == original.config
    assert_same_weights(again, original)


@pytest.mark.parametrize(
    "overrides",
    [{}, {"tie_embeddings": False, "conv_width": 3, "num_kv_heads": 1, "param_dtype": "bfloat16"}],
    ids=["tiny", "with everything"],
)
def test_a_model_trained_here_travels(tmp_path: Path, overrides: dict[str, Any]) -> None:
    config = nha_jax.ModelConfig.preset(
        "nha-tiny", num_layers=2, hidden_size=32, num_slots=4, window_size=(8, None), **overrides
    )
    model = nha_jax.Model(config, rngs=nnx.Rngs(0))
    full, eps, _ = nha_jax.save_pretrained(tmp_path / "out", model, shard_bytes=10_000)
    assert "the last 2048 tokens" in full
    assert "the authors' code adds 1e-05, whatever norm_eps is, and this model 1e-06" in eps
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (fields["model_type"], fields["architectures"]) == ("nha", ["NHAForCausalLM"])
    again = from_pretrained(tmp_path / "out", dtype=config.dtype)
    assert again.config == config
    chex.assert_trees_all_equal(nnx.state(again), nnx.state(model))


def test_logits_of_a_wider_model_travel_in_the_last_norm(tmp_path: Path) -> None:
    config = nha_jax.ModelConfig.preset(
        "nha-tiny",
        num_layers=1,
        hidden_size=24,
        conv_width=0,
        window_size=8,
        mup_base_width=8,
        dtype="float32",
    )
    model = nha_jax.Model(config, rngs=nnx.Rngs(0))
    nha_jax.save_pretrained(tmp_path / "out", model)
    again = from_pretrained(tmp_path / "out", dtype="float32")
    assert again.config == dataclasses.replace(config, mup_base_width=None)
    stream = np.linspace(-1, 1, 48, dtype=np.float32).reshape(1, 2, 24)
    expected, found = (each.logits(each.norm(stream)) for each in (model, again))
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    again.norm.scale[...] = model.norm.scale[...]
    chex.assert_trees_all_equal(nnx.state(again), nnx.state(model))


def test_a_scale_that_the_original_lacks_is_written(tmp_path: Path) -> None:
    published.write_published(tmp_path / "original", elementwise_affine=False)
    original = open_pretrained(tmp_path / "original")
    export(original, tmp_path / "out")
    assert np.all(tensors(tmp_path / "out")["model.layers.1.attn.g_norm.weight"] == 1)
    again = open_pretrained(tmp_path / "out")
    assert again.config == original.config
    assert_same_weights(again, original)


def test_shards_are_as_large_as_they_may_be(tmp_path: Path) -> None:
    original = open_pretrained(FIXTURES / "llama-2", num_slots=8)
    export(original, tmp_path / "out", shard_bytes=20_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    count = len(files)
    assert [file.name for file in files] == [
        f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)
    ]
    total, before = 0, 20_000
    for file in files:
        shard = safetensors.numpy.load_file(file)
        sizes = [tensor.nbytes for tensor in shard.values()]
        assert sum(sizes) <= 20_000 < before + max(sizes)
        before, total = sum(sizes), total + sum(sizes)
        assert {index["weight_map"][name] for name in shard} == {file.name}
        with safetensors.safe_open(file, "numpy") as opened:
            assert opened.metadata()["format"] == "pt"
    assert index["metadata"]["total_size"] == total
    assert len(index["weight_map"]) == len(tensors(tmp_path / "out"))
    export(original, tmp_path / "each", shard_bytes=1)
    assert len(list((tmp_path / "each").glob("*.safetensors"))) == len(index["weight_map"])


PLAIN = {"value_activation": "identity", "output_norm": False, "conv_width": 0}
LATER = {"slot_feature_map": "relu", "attention_scale": 1.0}


@pytest.mark.parametrize(
    ("overrides", "format", "message"),
    [
        (PLAIN | {"window_size": 8}, "family", r"window_size = 8: .*--windows none.*'nha'"),
        (PLAIN | {"window_size": (8, 4)}, None, "the windows 8, 4, 8, 4: .*one size"),
        (PLAIN | {"window_size": (8, None, None, 8)}, None, "every n-th layer"),
        (PLAIN | {"window_size": 65}, None, "a window of 65 tokens"),
        (PLAIN | {"slot_feature_map": "silu", "window_size": 8}, None, "slot_feature_map = 'silu'"),
        (PLAIN | {"slot_delay": 2, "window_size": 8}, None, "slot_delay = 2: expected None"),
        (PLAIN | {"attention_scale": 1.0, "window_size": None}, None, "attention_scale = 1.0"),
        (PLAIN | {"gate_logit_normalizer": 4, "window_size": 8}, None, "gate_logit_normalizer = 4"),
        (PLAIN | {"attention_bias": "all", "window_size": 8}, None, "attention_bias = 'all'"),
        (PLAIN | {"conv_width": 4}, None, "conv_width = 4: expected 0"),
        (PLAIN | {"value_dim": 4, "window_size": None}, None, "value_dim = 4: expected key_dim"),
        (PLAIN | {"num_slots": 0, "window_size": 8}, None, "num_slots = 0: expected at least 1"),
        ({"slot_feature_map": "silu"}, None, "attention_scale = None: expected 1"),
        ({"attention_scale": 1.0}, None, "slot_feature_map = 'identity': expected 'silu'"),
        (LATER | {"window_size": (8, 9)}, None, "expected one of at least 2 for all layers"),
        (LATER | {"window_size": 1}, None, "window_size = 1: expected one of at least 2"),
        (LATER | {"window_size": None}, None, "window_size = None: expected one of at least 2"),
        ({"output_norm": False}, None, "output_norm = False: expected True"),
        ({"qk_norm": True}, None, "qk_norm = True: expected False"),
        ({"value_dim": 4}, None, "value_dim = 4: expected hidden_size / num_query_heads"),
        ({}, "family", "no model of transformers has the published architecture"),
    ],
)
def test_what_no_format_has_is_named(overrides: dict[str, Any], format: Any, message: str) -> None:
    sizes = {"num_layers": 4, "hidden_size": 16, "num_slots": 4}
    config = nha_jax.ModelConfig.preset("nha-tiny", **sizes | overrides)
    with pytest.raises(ValueError, match=message):
        plan_export(config, {}, format)


def test_only_exports_are_overwritten(tmp_path: Path) -> None:
    original = open_pretrained(FIXTURES / "qwen2", num_slots=8)
    export(original, tmp_path / "out", shard_bytes=20_000)
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        export(original, tmp_path / "out")
    export(original, tmp_path / "out", overwrite=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out"]
    assert [file.name for file in (tmp_path / "out").glob("model*")] == ["model.safetensors"]
    download = shutil.copytree(FIXTURES / "qwen3", tmp_path / "download")
    (download / "expected.npz").unlink()
    with pytest.raises(FileExistsError, match="not a folder written by an export"):
        export(original, download, overwrite=True)


@pytest.mark.hf
@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_an_export_without_a_word(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    transformers.logging.enable_propagation()
    expected = np.load(FIXTURES / name / "expected.npz")
    original = open_pretrained(FIXTURES / name, num_slots=8)
    for files in ({}, original.files):
        out = tmp_path / str(len(files))
        export(original, out, files, shard_bytes=20_000)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            out, dtype=torch.float32, output_loading_info=True
        )
        assert not any(info.values()), info
        with torch.no_grad():
            logits = model(torch.tensor(expected["tokens"])).logits.numpy()
        error = np.abs(logits - expected["logits"]).max()
        print(f"{name}: {type(model).__name__}, largest error {error:.1e}")
        assert error < 1e-4
    told = [record.getMessage() for record in caplog.records if "yarn" not in name]
    assert not told
