"""`nha import`: a pretrained model becomes a folder of ours, whole or not at all."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import chex
import pytest
from flax import nnx

import nha_jax
from nha_jax.storage import saved_model as serialization
from nha_jax.storage.stores import Store
from tests.support.hf.originals import FIXTURES
from tests.support.stores import connected, serve
from tests.support.train.import_within_memory import LLAMA as LLAMA_LIKE
from tests.support.train.import_within_memory import TINY, write_checkpoint
from train.cli import main

LLAMA = FIXTURES / "llama-2"


@pytest.fixture
def run_import(capsys: pytest.CaptureFixture[str]):
    """Runs `nha import` with 8 slots; returns the exit code, output and errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main(["import", *map(str, arguments), "--num-slots", "8"])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """A copy of a checkpoint, with the files of a tokenizer."""
    folder = shutil.copytree(LLAMA, tmp_path / "original")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize("name", ["llama-2", "mistral", "qwen3-moe"])
def test_the_folder_holds_the_model_that_from_pretrained_gives(
    run_import, tmp_path: Path, name: str
) -> None:
    code, _, errors = run_import(FIXTURES / name, tmp_path / "new" / "model")
    assert (code, errors) == (0, "")
    model = nha_jax.load(tmp_path / "new" / "model")
    expected = nha_jax.from_pretrained(FIXTURES / name, num_slots=8)
    assert model.config == expected.config
    chex.assert_trees_all_equal(nnx.state(model), nnx.state(expected))
    assert names(tmp_path / "new") == ["model"]


def test_what_lies_beside_the_original_goes_with_it(
    run_import, original: Path, tmp_path: Path
) -> None:
    (original / "README.md").write_text("no part of the model")
    assert run_import(original, tmp_path / "model")[0] == 0
    assert names(tmp_path / "model") == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "original_config.json",
        "tokenizer.json",
    ]
    config = (original / "config.json").read_bytes()
    assert (tmp_path / "model" / "original_config.json").read_bytes() == config
    assert (tmp_path / "model" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_the_summary_says_what_was_made(run_import, original: Path, tmp_path: Path) -> None:
    config = json.loads((original / "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    (original / "config.json").write_text(json.dumps(config | {"sliding_window": 16}))
    out = tmp_path / "model"
    code, output, _ = run_import(original, out, "--windows", "4,none", "--param-dtype", "bfloat16")
    assert code == 0
    config = nha_jax.load(out).config
    assert config.windows == (4, None)
    for line in (
        f"MistralForCausalLM: {nha_jax.num_parameters(config):,} parameters, 2 layers",
        "windows 4,none, repeated",
        "8 slots a key/value head",
        "bfloat16 parameters",
        "tokenizer.json",
        "note: 2 of 2 layers of the original see the last 16 tokens only",
        f"next: nha generate {out}",
    ):
        assert line in output


def test_texts_need_the_originals_tokenizer(run_import, tmp_path: Path, capsys) -> None:
    out = tmp_path / "model"
    assert f"tokenizer.json into it, then nha generate {out}" in run_import(LLAMA, out)[1]
    assert main(["generate", str(out), "--prompt", "a"]) == 2
    assert "was imported without its tokenizer" in capsys.readouterr().err


def test_a_damaged_model_is_one_line(run_import, tmp_path: Path, capsys) -> None:
    out = tmp_path / "model"
    assert run_import(LLAMA, out)[0] == 0
    (out / "model.safetensors").write_bytes(b"not tensors")
    assert main(["generate", str(out), "--prompt", "a"]) == 2
    error = capsys.readouterr().err
    assert "model.safetensors: damaged" in error
    assert error.count("\n") == 1


def test_a_model_is_replaced_only_if_asked(run_import, original: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    assert run_import(original, out)[0] == 0
    before = (out / "config.json").read_bytes()
    code, _, errors = run_import(original, out, "--windows", "8")
    assert (code, errors) == (2, f"nha: {out} exists; choose another folder or pass --overwrite\n")
    assert (out / "config.json").read_bytes() == before
    assert run_import(original, out, "--windows", "8", "--overwrite")[0] == 0
    assert nha_jax.load(out).config.windows == (8, 8)


def test_the_original_is_never_replaced(run_import, original: Path) -> None:
    folder = FIXTURES / "qwen2"
    for path in original.glob("model*"):
        path.unlink()
    shutil.copy(folder / "model.safetensors", original)
    shutil.copy(folder / "config.json", original)
    before = {file.name: file.read_bytes() for file in original.iterdir()}
    code, _, errors = run_import(original, original, "--overwrite")
    assert code == 2
    assert "is not a folder written by save; it is left as it is" in errors
    assert {file.name: file.read_bytes() for file in original.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: expected a folder; nothing is downloaded here"),
        ([LLAMA, "--windows", "wide"], "--windows = 'wide'"),
        ([LLAMA, "--windows", "4,none,4"], "window_size=(4, None, 4) is a pattern of 3 layers"),
        ([LLAMA.parent], "has no config.json"),
    ],
    ids=["no folder", "no windows", "wrong windows", "no model"],
)
def test_what_is_wrong_is_said_in_one_line(
    run_import, tmp_path: Path, arguments: list, message: str
) -> None:
    source, *options = arguments
    code, output, errors = run_import(source, tmp_path / "model", *options)
    assert (code, output) == (2, "")
    assert message in errors
    assert len(errors.splitlines()) == 1
    assert names(tmp_path) == []


def test_a_full_disk_is_found_before_anything_is_written(
    run_import, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(serialization.shutil, "disk_usage", lambda _: usage._replace(free=100))
    code, _, errors = run_import(LLAMA, tmp_path / "model")
    assert code == 2
    assert f"GB of disk, and {tmp_path} has 1e-07" in errors
    assert names(tmp_path) == []


def test_a_failure_leaves_nothing_behind(
    run_import, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError("input/output error")

    monkeypatch.setattr(serialization, "write_weights", fails)
    code, _, errors = run_import(original, tmp_path / "model")
    assert (code, errors) == (2, "nha: input/output error\n")
    assert names(tmp_path) == ["original"]


def test_a_checkpoint_larger_than_the_memory_is_imported_and_exported(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "tiny", TINY)
    write_checkpoint(tmp_path / "large", LLAMA_LIKE)
    finished = subprocess.run(
        [sys.executable, "-m", "tests.support.train.import_within_memory", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    print(finished.stdout)
    assert finished.returncode == 0, finished.stderr
    sizes = json.loads(finished.stdout.splitlines()[-1])
    assert sizes["budget"] < sizes["checkpoint"] / 2
    assert sizes["peak"] - sizes["baseline"] < sizes["checkpoint"] / 2
    shards = [file.stat().st_size for file in (tmp_path / "large-exported").glob("*.safetensors")]
    assert sum(shards) == pytest.approx(sizes["checkpoint"] * 2**20, rel=0.01)
    assert max(shards) < 41e6


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_import_and_export_from_and_to_a_store(
    run_import, tmp_path: Path, original: Path, scheme: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve(scheme) as server, connected(server):
        source, model = Store(f"{server.url}/original"), Store(f"{server.url}/model")
        (original / "tokenizer.json").unlink()
        source.upload((path, path.name) for path in original.iterdir())
        source.write("original/consolidated.pth", b"the weights once more")
        assert run_import(original, tmp_path / "model")[0] == 0
        code, output, errors = run_import(source, model)
        assert (code, f"wrote {model}" in output) == (0, True), errors
        assert not [1 for x, path, _ in server.requests if x == "GET" and "consolidated" in path]
        assert {x: model.read(x) for x in model.files()} == {
            path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()
        }
        for place in (model.url, tmp_path / "model"):
            with pytest.raises(ValueError, match="imported without its tokenizer"):
                nha_jax.load_tokenizer(place)
        code, _, errors = run_import(source, model)
        assert code == 2
        assert "exists; choose another folder" in errors
        assert run_import(source, model, "--overwrite")[0] == 0
        for place in (tmp_path / "exported", Store(f"{server.url}/exported")):
            assert main(["export", str(model), str(place)]) == 0
        assert {x: place.read(x) for x in place.files()} == {
            path.name: path.read_bytes() for path in (tmp_path / "exported").iterdir()
        }
