"""Small files that a crash left empty or cut: named in a line, or made again."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import FIXTURES
from tests.support.train.raw_files import contents
from tests.support.train.tiny_run import Nha
from tests.train.data.test_shards_before import OPTIONS, before
from train.cli import main
from train.errors import ConfigError, DataError
from train.search.loss_log import LossLog
from train.storage.atomic import write_if_changed
from train.storage.checksums import CHECKSUMS_FILE, find_damage, write_checksums
from train.storage.initial_model import InitialModel
from train.storage.result import Result
from train.storage.run_folder import RunFolder
from train.storage.small_json import parse
from train.windows import read_windows

__all__ = ["before"]

DAMAGED = {
    "empty": b"",
    "zeros": b"\0" * 512,
    "cut": b'{"config": {"run": "a", "model"',
    "not UTF-8": b'{"config": "\xff\xfe"}',
    "a list": b"[1, 2]",
    "nested": b"[" * 100_000,
}

RESULT = Result(6, 2.5, 7.0, {"gzip": 3.0}, "def ", "x")


@pytest.fixture(params=DAMAGED.values(), ids=DAMAGED)
def damaged(request: pytest.FixtureRequest) -> bytes:
    return request.param


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b" \n", "it is empty"),
        (b"\0\0\0", "it is empty"),
        (b'{"a": 1', "it is not JSON, or cut off"),
        (b'{"a": "\xff"}', "it is not JSON, or cut off"),
        (b"[" * 100_000, "it is not JSON, or cut off"),
        (b"[]", "it is no JSON object"),
        (b"null", "it is no JSON object"),
    ],
)
def test_what_is_wrong_is_said(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        parse(content, dict[str, Any])


def test_a_result_is_read_as_it_was_written_and_a_damaged_one_is_none(
    tmp_path: Path, damaged: bytes
) -> None:
    path = tmp_path / "result.json"
    assert Result.read(path) is None
    for sample in ("x", None):
        result = Result(6, 2.5, float("inf"), {}, "def ", sample)
        result.write(path)
        assert Result.read(path) == result
    path.write_bytes(damaged)
    assert Result.read(path) is None


@pytest.mark.parametrize(
    "changes", [{"step": None}, {"references": 3}, {"held_out_perplexity": "high"}]
)
def test_a_result_with_another_types_value_is_none(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "result.json"
    RESULT.write(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert Result.read(path) is None


def test_a_damaged_run_json_is_named_by_those_who_read_and_written_again_by_train(
    nha: Nha, damaged: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    record = nha.run / "run.json"
    with RunFolder(str(nha.run)).open(nha.config(), "corpus"):
        whole = record.read_bytes()
    record.write_bytes(damaged)
    assert main(["generate", str(nha.run), "--prompt", "x"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"nha: {record}: damaged: ")
    assert error.count("\n") == 1
    with RunFolder(str(nha.run)).open(nha.config(), "corpus"):
        assert record.read_bytes() == whole
    assert capsys.readouterr().err == f"nha: {record}: damaged; written again\n"


@pytest.mark.parametrize("lost", [b"", None], ids=["empty", "missing"])
def test_a_lost_run_json_is_known_from_a_checkpoint(nha: Nha, lost: bytes | None) -> None:
    record = nha.run / "run.json"
    with RunFolder(str(nha.run)).open(nha.config(), "corpus") as folder:
        for step in (5, 10):
            (folder.checkpoints / str(step)).mkdir(parents=True)
            (folder.checkpoints / str(step) / "run.json").write_text(folder.record)
        (folder.checkpoints / "10" / "run.json").write_bytes(b"")
        (folder.checkpoints / "damaged-15").mkdir()
    stored = folder.config()
    record.unlink()
    if lost is not None:
        record.write_bytes(lost)
    assert RunFolder(str(nha.run)).config() == stored
    with pytest.raises(ConfigError, match="batch_size: 8 -> 16"):
        RunFolder(str(nha.run)).check(nha.config(batch_size=16), "corpus")


def test_a_run_json_of_another_program_is_left_alone(nha: Nha) -> None:
    record = nha.run / "run.json"
    for content in ('{"name": "something"}', '{"config": {}, "corpus": "x"}'):
        nha.run.mkdir(exist_ok=True)
        record.write_text(content)
        with pytest.raises(ConfigError, match=r"run\.json: not what `nha train` writes"):
            RunFolder(str(nha.run)).check(nha.config(), "corpus")
    record.write_text("")
    (nha.run / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        RunFolder(str(nha.run)).check(nha.config(), "corpus")


def test_what_has_not_changed_is_not_written_again(nha: Nha) -> None:
    record, changed = nha.run / "run.json", nha.config(steps=7)
    with RunFolder(str(nha.run)).open(nha.config(), "corpus"):
        first = record.stat().st_ino
    with RunFolder(str(nha.run)).open(nha.config(), "corpus"):
        assert record.stat().st_ino == first
    with RunFolder(str(nha.run)).open(changed, "corpus"):
        assert json.loads(record.read_text())["config"]["steps"] == 7
    write_if_changed(record, "other")
    assert record.read_text() == "other"


def test_a_damaged_note_of_the_initial_model_is_written_again(
    tmp_path: Path, damaged: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    initial = InitialModel.open(str(FIXTURES / "search_before" / "model"))
    initial.remember(tmp_path)
    record = tmp_path / "initial_model.json"
    whole = record.read_bytes()
    record.write_bytes(damaged)
    initial.remember(tmp_path)
    assert record.read_bytes() == whole
    assert capsys.readouterr().err == f"nha: {record}: damaged; written again\n"


def test_damaged_checksums_are_damage(tmp_path: Path, damaged: bytes) -> None:
    (tmp_path / "array").write_bytes(b"123")
    write_checksums(tmp_path)
    assert find_damage(tmp_path) is None
    (tmp_path / CHECKSUMS_FILE).write_bytes(damaged)
    assert find_damage(tmp_path) == f"{CHECKSUMS_FILE} is not readable"


@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"\n"])
def test_an_emptied_log_of_losses_is_begun_anew(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "search.jsonl"
    path.write_bytes(content)
    with LossLog(path, {"model": {}}) as log:
        log.write((4, None), 2.0)
    with path.open("a") as file:
        file.write('{"window_size": 3}\n7\n{"window_size": [8, 8], "bits_')
    with LossLog(path, {"model": {}}) as log:
        assert log.losses == {(4, None): 2.0}
        assert len(path.read_text().splitlines()) == 2


def test_a_damaged_result_of_a_search_is_named(tmp_path: Path, damaged: bytes) -> None:
    path = tmp_path / "search.json"
    path.write_bytes(damaged)
    with pytest.raises(ConfigError, match=r"^--windows = '.*search\.json': the file is damaged: "):
        read_windows(str(path), "--windows")


@pytest.mark.parametrize(
    "name", [".prepare/settings.json", ".prepare/piece-00000.json", "manifest.json"]
)
@pytest.mark.parametrize("kind", ["empty", "cut", "a list"])
def test_what_is_damaged_is_prepared_again(before: Path, name: str, kind: str) -> None:
    stopped = before / "stopped"
    (stopped / name).write_bytes(DAMAGED[kind])
    command = ["data", "prepare", str(stopped), str(before / "raw" / "*.txt"), *OPTIONS]
    assert main(command) == 0
    assert contents(stopped) == contents(before / "bytes")


def test_a_finished_manifest_that_is_damaged_is_named_with_what_to_do(
    before: Path, damaged: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(before / "bytes" / ".prepare", ignore_errors=True)
    (before / "bytes" / "manifest.json").write_bytes(damaged)
    command = ["data", "prepare", str(before / "bytes"), str(before / "raw" / "*.txt"), *OPTIONS]
    assert main(command) == DataError.exit_code
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "manifest.json: damaged: it is" in error
    assert "delete the folder and run `nha data prepare` again" in error
