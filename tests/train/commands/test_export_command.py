"""`nha export`: saved models and runs become folders for PyTorch, whole or not at all."""

import json
import shutil
from pathlib import Path

import chex
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import nha_jax
from nha_jax.storage.folder import extra_files_of
from tests.support.hf.originals import FIXTURES
from tests.support.train.tiny_run import Nha
from train.cli import main


@pytest.fixture
def run_export(capsys: pytest.CaptureFixture[str]):
    """Runs `nha export`; returns the exit code, output and errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["export", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def hybrid(tmp_path: Path) -> Path:
    """A model imported with windows and the files of a tokenizer."""
    original = shutil.copytree(FIXTURES / "llama-2", tmp_path / "original")
    (original / "tokenizer.json").write_text("{}")
    arguments = ["import", str(original), str(tmp_path / "hybrid"), "--num-slots=8"]
    assert main([*arguments, "--windows=4,none"]) == 0
    return tmp_path / "hybrid"


def tensors(folder: Path) -> dict[str, np.ndarray]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: x for file in files for name, x in safetensors.numpy.load_file(file).items()}


def test_with_full_attention_it_is_the_original_again(
    run_export, hybrid: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "out"
    code, output, errors = run_export(hybrid, out, "--windows=none", "--shard-size=0.02MB")
    assert (code, errors) == (0, "")
    assert output.splitlines() == [
        "LlamaForCausalLM, 2 layers, windows none, float32",
        "beside it: tokenizer.json, generation_config.json",
        f"wrote {out}",
    ]
    assert len(list(out.glob("*.safetensors"))) > 1
    chex.assert_trees_all_equal(tensors(out), tensors(FIXTURES / "llama-2"))
    copied = extra_files_of(hybrid)
    del copied["original_config.json"]
    assert extra_files_of(out) == copied


def test_a_hybrid_comes_back_as_it_is(run_export, hybrid: Path, tmp_path: Path, capsys) -> None:
    code, output, _ = run_export(hybrid, tmp_path / "out")
    assert code == 0
    assert output.startswith("LlamaNHAForCausalLM, 2 layers, windows 4,none, float32\n")
    assert "note: the authors' code lets the first tokens attend to empty slots" in output
    assert main(["import", str(tmp_path / "out"), str(tmp_path / "again")]) == 0
    shown = capsys.readouterr().out
    assert "windows 4,none, repeated" in shown
    assert "8 slots a key/value head, gates of its own" in shown
    first, second = nha_jax.load(hybrid), nha_jax.load(tmp_path / "again")
    assert first.config == second.config
    chex.assert_trees_all_equal(nnx.state(first), nnx.state(second))


def test_a_run_is_exported_from_its_newest_checkpoint(
    run_export, undisturbed: Nha, tmp_path: Path
) -> None:
    code, output, _ = run_export(undisturbed.run, tmp_path / "out")
    assert code == 0
    assert output.startswith("NHAForCausalLM, 1 layer, windows 8, float32\n")
    trained = nha_jax.load(undisturbed.run / "model")
    again = nha_jax.from_pretrained(tmp_path / "out", remat=trained.config.remat)
    assert again.config == trained.config
    chex.assert_trees_all_equal(nnx.state(again), nnx.state(trained))


def test_a_run_is_exported_for_transformers_with_its_numbers(
    run_export, undisturbed: Nha, tmp_path: Path
) -> None:
    code, output, _ = run_export(undisturbed.run, tmp_path / "out", "--format=transformers")
    assert code == 0
    assert output.startswith("NHAForCausalLM, 1 layer, windows 8, float32\n")
    assert "modeling_nha.py" in output
    trained = nha_jax.load(undisturbed.run / "model")
    again = nha_jax.from_pretrained(tmp_path / "out", remat=trained.config.remat)
    chex.assert_trees_all_equal(nnx.state(again), nnx.state(trained))
    result = json.loads((undisturbed.run / "result.json").read_text())
    number = f"| held-out bits per byte | {result['held_out_bits_per_byte']:.4g} |"
    assert number in (tmp_path / "out" / "README.md").read_text()

    out = tmp_path / "finished"
    assert run_export(undisturbed.run / "model", out, "--format=transformers")[0] == 0
    assert number in (out / "README.md").read_text()
    other = ["--format=transformers", "--windows=4", "--overwrite"]
    assert run_export(undisturbed.run, out, *other)[0] == 0
    assert "held-out" not in (out / "README.md").read_text()
    assert json.loads((out / "config.json").read_text())["window_sizes"] == [4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--windows=wide"], "--windows = 'wide'"),
        (["--windows=4,none,none"], "is a pattern of 3 layers"),
        (["--windows=4,8"], "choose other windows (--windows)"),
        (["--format=family"], "no model of transformers has windows like these"),
        (["--shard-size=big"], "--shard-size = 'big': expected a size such as 5GB"),
        (["--shard-size=0"], "--shard-size = '0'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    run_export, hybrid: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    code, _, errors = run_export(hybrid, tmp_path / "out", *arguments)
    assert code == 2
    (error,) = errors.splitlines()
    assert message in error
    assert not (tmp_path / "out").exists()


def test_what_is_there_stays(run_export, hybrid: Path, tmp_path: Path) -> None:
    original = FIXTURES / "llama-2"
    before = {file.name: file.read_bytes() for file in original.iterdir()}
    for arguments in ([], ["--overwrite"]):
        code, _, errors = run_export(hybrid, original, *arguments)
        assert code == 2
        assert str(original) in errors
    assert {file.name: file.read_bytes() for file in original.iterdir()} == before
    assert run_export(hybrid, tmp_path / "out")[0] == 0
    assert run_export(hybrid, tmp_path / "out", "--overwrite", "--windows=none")[0] == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llama"


def test_a_damaged_model_is_named(run_export, hybrid: Path, tmp_path: Path) -> None:
    file = hybrid / "model.safetensors"
    safetensors.numpy.save_file({"embed.embedding": np.zeros((48, 32), np.float32)}, file)
    code, _, errors = run_export(hybrid, tmp_path / "out")
    assert code == 2
    assert "norm.scale is missing" in errors
    code, _, errors = run_export(tmp_path / "nowhere", tmp_path / "out")
    assert code == 2
    assert "no such folder" in errors
