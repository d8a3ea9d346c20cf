"""Paths as users write them: any name that a file may have, and one line for any other."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.train.tiny_run import Nha
from train.cli import main
from train.errors import ConfigError
from train.load_config import load_config
from train.paths import hide_bytes, show_bytes, user_path
from train.storage.atomic import remove_unfinished, write_atomically
from train.storage.run_folder import RunFolder
from train.text.user_texts import read_text

# Any byte but those of "/" and NUL; as Python shows those that are not UTF-8.
NAMES = (
    st.binary(min_size=1, max_size=255)
    .map(lambda x: x.replace(b"/", b"[").replace(b"\0", b"*"))
    .filter(lambda x: x not in (b".", b".."))
    .map(os.fsdecode)
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(name=NAMES)
def test_a_name_that_a_file_may_have_is_that_file(
    tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    folder = tmp_path_factory.getbasetemp() / "names"
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_bytes(b"x")
    assert user_path(str(path), "--text") == path
    assert user_path(str(path), "--text").read_bytes() == b"x"
    path.unlink()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=st.one_of(st.text(max_size=300), NAMES.map(lambda name: name + "/x")))
def test_any_text_is_a_path_or_one_line(text: str) -> None:
    try:
        assert isinstance(user_path(text, "--text"), Path)
    except ConfigError as error:
        (line,) = str(error).splitlines()
        assert line.startswith("--text = ")
        assert len(line) < 700


def test_homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert user_path("~/x", "run") == tmp_path / "x"
    assert user_path("~", "run") == tmp_path
    assert user_path("a/~", "run") == Path("a/~")
    assert user_path("./~root/x", "run") == Path("~root/x")
    with pytest.raises(ConfigError, match=r"~nobody-here is no user's home; \./~nobody-here is"):
        user_path("~nobody-here/x", "run")
    (tmp_path / "~nobody-here").mkdir()
    assert user_path("~nobody-here/x", "run") == Path("~nobody-here/x")
    assert user_path("./~nobody-here", "run") == Path("~nobody-here")


WRONG = {
    "": "the path is empty",
    "a\0b": "no path holds the character NUL",
    "a" * 256: "too long",
    "a/" * 2048 + "a": "too long",
    "\ud800": "no path holds half a character",
    "~nobody-here/a": "~nobody-here is no user's home",
}


@pytest.mark.parametrize("text", WRONG, ids=WRONG.get)
@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("OUT", "data prepare {} x"),
        ("INPUT", "data prepare out {}"),
        ("--tokenizer", "data prepare out {} --tokenizer {}"),
        ("RUN", "inspect {} --text x"),
        ("--text", "inspect . --text {}"),
        ("--output", "inspect . --text x --output {}"),
        ("RUN", "generate {} --prompt x"),
        ("--prompt-file", "generate . --prompt-file {}"),
        ("HF_DIR", "export . {}"),
        ("RUN", "export {} out"),
        ("HF_DIR", "import {} out"),
        ("RUN", "import . {}"),
        ("RUN", "search {} --full-layers 1"),
        ("CONFIG", "train {}"),
        ("CONFIG", "plan {} --topology v5e:1"),
    ],
)
def test_what_is_no_path_is_one_line_in_every_command(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    command: str,
    text: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([text if part == "{}" else part for part in command.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"nha: {name} = ")
    assert WRONG[text] in line
    assert not list(tmp_path.iterdir())


BYTES = os.fsdecode(b"caf\xe9 \xff")


@pytest.mark.parametrize(
    "value", [f"{BYTES}/*.txt", f"'{BYTES}'", f"{{'{BYTES}': 0.5, b: 0.5}}", f'"{BYTES}"']
)
def test_a_name_that_is_not_utf8_is_configured_and_comes_back_from_the_runs_file(
    nha: Nha, value: str
) -> None:
    config = load_config(str(nha.config_file), [("data.corpus", value)])
    corpus = config.data.corpus
    assert any(name.startswith(BYTES) for name in ([corpus] if isinstance(corpus, str) else corpus))
    with RunFolder(str(nha.run)).open(config, "corpus"):
        pass
    stored = RunFolder(str(nha.run)).config()
    assert stored is not None
    assert stored["data"]["corpus"] == corpus
    RunFolder(str(nha.run)).check(config, "corpus")


def test_what_checkpoints_cannot_be_saved_below_is_one_line(
    nha: Nha, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(nha.config_file), f"--run={tmp_path / BYTES}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "checkpoints cannot be saved below a name that is not UTF-8" in line
    assert not (tmp_path / BYTES).exists()


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("data.corpus", {"data": {"corpus": "~nobody-here/a", "sequence_length": 8}}),
        ("data.corpus.", {"data": {"corpus": {"": 1.0}, "sequence_length": 8}}),
        ("run", {"run": "~nobody-here/a"}),
        ("run", {"run": "a" * 256}),
        ("initial_model", {"initial_model": ""}),
        ("initial_model", {"initial_model": "a\0b"}),
        ("compilation_cache", {"compilation_cache": ""}),
        ("compilation_cache", {"compilation_cache": "~nobody-here/a"}),
        ("model.window_size", {"model": {"window_size": "~nobody-here/a.json"}}),
    ],
)
def test_what_is_no_path_is_one_line_for_every_key(
    tmp_path: Path,
    tiny_values: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    key: str,
    change: dict[str, Any],
) -> None:
    file = tmp_path / "config.yaml"
    values = {**tiny_values, "run": str(tmp_path / "run")}
    for name, value in change.items():
        values[name] = {**values[name], **value} if isinstance(value, dict) else value
    file.write_text(yaml.safe_dump(values))
    assert main(["train", str(file)]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"nha: {key} = ")
    assert list(tmp_path.iterdir()) == [file]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(name=NAMES)
def test_hidden_bytes_come_back(name: str) -> None:
    value = {name: [name, (name, 3)], "b": None}
    hide_bytes(name).encode()
    assert show_bytes(hide_bytes(value)) == value


@pytest.mark.parametrize("name", ["a" * 255, "é" * 127, os.fsdecode(b"\xff" * 255), "[a] $x^$"])
def test_a_name_as_long_as_may_be_is_written(tmp_path: Path, name: str) -> None:
    write_atomically(tmp_path / name, "x")
    write_atomically(tmp_path / name, "y")
    remove_unfinished(tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "y")]


@pytest.mark.parametrize("limit", [5, 2**31, 10**14, 2**63, 10**30])
def test_reading_takes_memory_for_what_is_there_not_for_what_is_asked_for(
    tmp_path: Path, limit: int
) -> None:
    (tmp_path / "a.txt").write_text("some text")
    assert read_text(str(tmp_path / "a.txt"), limit) == "some text"[:limit]
