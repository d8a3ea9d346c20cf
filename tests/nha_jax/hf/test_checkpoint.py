"""Folders that are incomplete, damaged or of another make are refused, with all that is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from nha_jax.hf.checkpoint import Checkpoint
from nha_jax.hf.pretrained import open_pretrained
from tests.support.hf.originals import FIXTURES, original_tensors

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a checkpoint in two shards."""
    return shutil.copytree(FIXTURES / "llama-2", tmp_path / "original")


def refused(folder: Path, kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as error:
        open_pretrained(folder, num_slots=8)
    return str(error.value)


def one_file(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """The same tensors, changed, in one file."""
    tensors = original_tensors(folder)
    for file in folder.glob("model*"):
        file.unlink()
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def test_everything_that_does_not_fit_is_named_at_once(folder: Path) -> None:
    layer = "model.layers.1."

    def change(tensors: dict[str, np.ndarray]) -> None:
        del tensors["model.norm.weight"]
        del tensors[f"{layer}self_attn.k_proj.weight"]
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:9]
        tensors[f"{layer}self_attn.q_norm.weight"] = np.ones(8, np.float32)
        tensors[f"{layer}mlp.up_proj.weight"] = np.ones((32, 32), np.int8)

    one_file(folder, change)
    message = refused(folder)
    for problem in (
        "model.norm.weight is missing",
        "model.layers.1.self_attn.k_proj.weight is missing",
        "model.embed_tokens.weight is float32[9, 32], not float32[48, 32]",
        "model.layers.1.self_attn.q_norm.weight is unknown",
        "model.layers.1.mlp.up_proj.weight is of a dtype other than float32, bfloat16, float16",
    ):
        assert problem in message
    assert message.count(";") == 4


def test_only_what_holds_nothing_is_ignored(folder: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    one_file(folder, change)
    assert open_pretrained(folder, num_slots=8).config.num_layers == 2


def with_head(folder: Path, change: float) -> Path:
    """A copy of a model with tied embeddings, and them written as its head too, changed."""
    shutil.copytree(FIXTURES / "qwen2", folder)
    table = "model.embed_tokens.weight"
    one_file(folder, lambda tensors: tensors.update({"lm_head.weight": tensors[table] + change}))
    return folder


def test_a_tied_head_may_be_written_too(tmp_path: Path) -> None:
    shapes = open_pretrained(with_head(tmp_path / "original", 0), num_slots=8).source.shapes
    assert "head.kernel" not in shapes


def test_a_tied_head_that_is_another_table_is_refused(tmp_path: Path) -> None:
    message = refused(with_head(tmp_path / "original", 1))
    assert "has lm_head.weight, which differs from model.embed_tokens.weight" in message


@pytest.mark.parametrize(
    ("name", "expected"),
    [("pytorch_model.bin", "pytorch_model.bin"), ("consolidated.00.pth", "consolidated")],
)
def test_pickles_are_refused(folder: Path, name: str, expected: str) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / name).write_bytes(b"\x80\x04N.")
    message = refused(folder, FileNotFoundError)
    assert "pickled weights only" in message
    assert expected in message
    assert "runs code" in message
    assert "save_pretrained" in message


def test_shards_that_are_missing_or_cut_off_are_named(folder: Path) -> None:
    whole = (folder / SECOND).read_bytes()
    (folder / FIRST).unlink()
    (folder / SECOND).write_bytes(whole[:-100])
    message = refused(folder)
    assert f"{FIRST} is missing" in message
    assert f"{SECOND}: damaged" in message


def test_a_pointer_in_place_of_the_weights_is_recognised(folder: Path) -> None:
    (folder / FIRST).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert f"{FIRST} is a pointer of Git LFS" in refused(folder)


def test_a_tensor_in_two_shards_is_named(folder: Path) -> None:
    tensors = safetensors.numpy.load_file(folder / SECOND)
    name = "model.embed_tokens.weight"
    safetensors.numpy.save_file(tensors | {name: original_tensors(folder)[name]}, folder / SECOND)
    assert f"{name} is in {SECOND} and in another shard too" in refused(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("", "empty: expected a JSON object; copy or download it again"),
        ("not JSON", "damaged: expected a JSON object; copy or download it again"),
        ('{"weight_map": {"a": "model', "damaged: expected a JSON object"),
        ("[" * 100_000, "damaged: expected a JSON object"),
        ("[]", "damaged: expected a JSON object"),
        ("{}", "weight_map = None: expected a map from tensors to files beside it"),
        ('{"weight_map": {}}', "weight_map = {}: expected a map"),
        ('{"weight_map": ["a"]}', "weight_map = ['a']: expected a map"),
        ('{"weight_map": {"a": 3}}', "weight_map = {'a': 3}: expected a map"),
        ('{"weight_map": {"a": ["b"]}}', "weight_map = {'a': ['b']}: expected a map"),
        ('{"weight_map": {"a": ""}}', "weight_map = {'a': ''}: expected a map"),
        ('{"weight_map": {"a": ".."}}', "weight_map = {'a': '..'}: expected a map"),
        ('{"weight_map": {"a": "../other.safetensors"}}', "files beside it"),
    ],
)
def test_an_index_that_leads_nowhere_is_refused(folder: Path, index: str, message: str) -> None:
    (folder / "model.safetensors.index.json").write_text(index)
    found = refused(folder)
    assert f"model.safetensors.index.json: {message}" in found or message == "files beside it"
    assert message in found


@pytest.mark.parametrize(("size", "state"), [(0, "empty"), (5, "damaged"), (300, "damaged")])
def test_weights_that_were_cut_are_named_with_the_cure(folder: Path, size: int, state: str) -> None:
    file = folder / FIRST
    file.write_bytes(file.read_bytes()[:size])
    message = refused(folder)
    assert f"{FIRST}: {state}: " in message
    assert "copy or download it again" in message


def test_a_config_of_far_too_many_tensors_is_refused_without_naming_them(folder: Path) -> None:
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"num_hidden_layers": 60_000}))
    message = refused(folder)
    assert "which means 600003 tensors: the files have " in message
    assert len(message) < 300


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("config.json", "has no config.json"),
        (
            "model.safetensors.index.json",
            "has neither model.safetensors nor model.safetensors.index",
        ),
    ],
)
def test_a_folder_that_is_no_model_is_named(folder: Path, remove: str, message: str) -> None:
    (folder / remove).unlink()
    assert message in refused(folder, FileNotFoundError)


def test_names_are_not_downloaded() -> None:
    message = refused(Path("meta-llama/Llama-3-8B"), FileNotFoundError)
    assert message.startswith("meta-llama/Llama-3-8B: expected a folder; nothing is downloaded")


@pytest.mark.parametrize(
    ("text", "state"),
    [("", "empty"), (" \n", "empty"), ("{", "damaged"), ("[1]", "damaged"), ("null", "damaged"),
     ("[" * 100_000, "damaged"), ('{"vocab_size": ' + "9" * 5000 + "}", "damaged")],
    ids=["empty", "blank", "cut", "list", "null", "nested", "huge"],
)  # fmt: skip
def test_a_damaged_config_is_named(folder: Path, text: str, state: str) -> None:
    (folder / "config.json").write_text(text)
    assert f"config.json: {state}: expected a JSON object; copy or" in refused(folder)


def test_only_asked_for_tensors_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    read = Checkpoint.read

    def note(self: Checkpoint, name: str, index: tuple[slice, ...]) -> np.ndarray:
        part = read(self, name, index)
        asked.append((name, part.shape))
        return part

    monkeypatch.setattr(Checkpoint, "read", note)
    source = open_pretrained(folder, num_slots=4).source
    assert asked == []
    source.read("blocks.mlp.up_proj.kernel", (slice(1, 2), slice(0, 3), slice(4, 9)))
    source.read("blocks.attention.f_proj.kernel", (slice(0, 1), slice(0, 32), slice(1, 2)))
    assert asked == [
        ("model.layers.1.mlp.up_proj.weight", (5, 3)),
        ("model.layers.0.self_attn.k_proj.weight", (2, 32)),
    ]


def test_the_index_is_not_needed_beside_one_file(folder: Path) -> None:
    tensors = original_tensors(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors)
    one_file(folder, lambda _: None)
    assert Checkpoint(folder).shapes.keys() == tensors.keys()
