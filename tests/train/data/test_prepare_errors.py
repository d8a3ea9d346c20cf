"""`nha data prepare`: what is bad, damaged, wrong or missing is one line that names it."""

import gzip
import os
import sys
from pathlib import Path

import pytest

from tests.support.train.raw_files import (
    TEXTS,
    json_lines,
    prepare,
)
from train.data.prepare import folder
from train.data.prepare.workers import run_jobs
from train.data.prepared_folder import PreparedFolder

BAD_INPUTS = {
    "malformed.jsonl": (b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
    "no_key.jsonl": (b'{"text": "a"}\n\n{"body": "b"}\n', "line 3: no key 'text'"),
    "number.jsonl": (b'{"text": 3}\n', "line 1: 'text' is 3, not text"),
    "list.jsonl": (b"[1]\n", "line 1: no key 'text'"),
    "latin1.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}\n', "line 2: not UTF-8"),
    "half.jsonl": (b'{"text": "\\ud83d"}\n', "line 1: 'text' holds half a character"),
    "latin1.txt": ("a\nb\né".encode("latin1"), "line 3: not UTF-8"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_a_bad_document_is_named_or_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    content, message = BAD_INPUTS[name]
    (tmp_path / name).write_bytes(content)
    (tmp_path / "good.txt").write_text("a good one")
    arguments = [tmp_path / name, tmp_path / "good.txt"]
    assert prepare(tmp_path / "out", *arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"nha: {tmp_path / name}, {message}")
    assert not list((tmp_path / "out").glob("*.tokens"))
    assert prepare(tmp_path / "other", *arguments, "--skip-bad") == 0
    assert "left out 1 documents" in capsys.readouterr().out
    good = PreparedFolder.open(tmp_path / "other").manifest.totals["documents"]
    assert good == 1 + content.count(b'"text": "a"')


def test_the_line_of_a_file_in_many_pieces_is_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [b'{"text": "line"}\n'] * 500
    lines[321] = b'{"text": }\n'
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    assert prepare(tmp_path / "out", tmp_path / "a.jsonl", "--shard-bytes=100") == 1
    assert "a.jsonl, line 322: not JSON" in capsys.readouterr().err


DAMAGED = {
    "cut.jsonl.gz": gzip.compress(json_lines(TEXTS))[:-20],
    "plain.jsonl.gz": json_lines(TEXTS),
    "plain.jsonl.zst": json_lines(TEXTS),
    "plain.parquet": json_lines(TEXTS),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / name).write_bytes(DAMAGED[name])
    assert prepare(tmp_path / "out", tmp_path / name) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nha: ")]
    assert len(errors) == 1
    assert f"{tmp_path / name}: cannot read it" in errors[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere/*.txt"], "/nowhere/*.txt: no such file or folder"),
        ([__file__, "--tokenizer=/nowhere.json"], "cannot read it: No such file"),
        ([__file__, f"--tokenizer={__file__}"], "not a tokenizer.json"),
        ([__file__, "--held-out-fraction=1"], "--held-out-fraction = 1.0: expected"),
        ([__file__, "--workers=0"], "--workers = 0: expected at least 1"),
        ([__file__, "--end-token=</s>"], "--tokenizer with it"),
    ],
)
def test_a_wrong_option_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert prepare(tmp_path / "out", *arguments) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert message in error
    assert not (tmp_path / "out").exists()


def test_more_shards_than_a_folder_may_have_are_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.truncate(10**13)  # a hole, which takes no disk
    assert prepare(tmp_path / "out", path, "--shard-bytes=1") == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "--shard-bytes = 1: expected at least 100000000, as the inputs have" in error
    assert not (tmp_path / "out").exists()


def test_no_more_workers_than_jobs_or_cores_have_use_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []

    def run_here(jobs, folder, tokenizer, rules, workers, progress):
        counts.append(workers)
        return run_jobs(jobs, folder, tokenizer, rules, 1, progress)

    monkeypatch.setattr(folder, "run_jobs", run_here)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    for shard_bytes in (10**6, 500):
        arguments = [tmp_path / "a.jsonl", "--workers=1000000", f"--shard-bytes={shard_bytes}"]
        assert prepare(tmp_path / f"out{shard_bytes}", *arguments) == 0
    assert counts == [1, 8]


def test_an_input_that_changes_while_it_is_read_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(TEXTS))

    def cut_and_run(*arguments):
        os.truncate(path, 500)
        return run_jobs(*arguments)

    monkeypatch.setattr(folder, "run_jobs", cut_and_run)
    assert prepare(tmp_path / "out", path, "--workers=1", "--skip-bad") == 1
    assert "an input changed while it was read" in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("package", "name"),
    [
        ("tokenizers", "a.txt"),
        ("pyarrow.parquet", "a.parquet"),
        ("pyarrow", "a.arrow"),
        ("zstandard", "a.jsonl.zst"),
    ],
)
def test_a_missing_package_is_one_line(
    tmp_path: Path,
    tokenizer_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    package: str,
    name: str,
) -> None:
    (tmp_path / name).write_text("anything")
    monkeypatch.setitem(sys.modules, package, None)
    assert prepare(tmp_path / "out", tmp_path / name, f"--tokenizer={tokenizer_file}") == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error == (
        f"nha: the package {package.split('.')[0]} is not installed; "
        '`pip install "nha_jax[data]"` brings it'
    )
