"""Which files a folder, a name or a glob stands for."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.train.raw_files import array_record, json_lines, prepare, tar
from train.config import DataConfig
from train.data.corpus import load_corpus
from train.data.input_files import find_files
from train.data.prepared_folder import PreparedFolder
from train.errors import ConfigError


def names(text: object) -> list[str]:
    return [name for name, _ in find_files(str(text), "INPUT")]


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A folder with a file, a link to a folder elsewhere, and links to folders above."""
    folder, store = tmp_path / "data", tmp_path / "store"
    for path in (folder / "sub" / "deep", store):
        path.mkdir(parents=True)
    (folder / "a.txt").write_text("a")
    (folder / "sub" / "deep" / "b.txt").write_text("b")
    (store / "c.txt").write_text("c")
    (store / ".hidden.txt").write_text("hidden")
    (folder / "more").symlink_to(store)
    (folder / "sub" / "deep" / "up").symlink_to(folder)
    (folder / "sub" / "itself").symlink_to(".")
    (folder / "circle").symlink_to("circle2")
    return folder


def test_links_to_folders_are_followed_but_not_in_a_circle(linked: Path) -> None:
    (linked / "circle").unlink()
    expected = ["a.txt", "more/c.txt", "sub/deep/b.txt"]
    assert names(linked) == expected
    assert names(f"{linked}/**/*.txt") == expected
    assert names(f"{linked}/**") == expected
    assert names(f"{linked}/**/deep/*.txt") == ["b.txt"]
    assert names(f"{linked}/*/c.txt") == ["c.txt"]
    (linked / "again").symlink_to("more")
    (linked / "d.txt").symlink_to("a.txt")
    assert names(linked) == ["a.txt", "again/c.txt", "d.txt", "more/c.txt", "sub/deep/b.txt"]


def test_folders_that_hold_each_other_end(tmp_path: Path) -> None:
    for name, other in (("x", "y"), ("y", "x")):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.txt").write_text(name)
        (tmp_path / name / "other").symlink_to(tmp_path / other)
    assert names(tmp_path) == ["x/other/y.txt", "x/x.txt", "y/other/x.txt", "y/y.txt"]
    assert names(tmp_path / "x") == ["other/y.txt", "x.txt"]
    assert len(names(f"{tmp_path}/**/*.txt")) == 4


def test_a_link_to_nothing_is_said(linked: Path) -> None:
    for text in (linked, f"{linked}/**", f"{linked}/circle", f"{linked}/c*"):
        with pytest.raises(ConfigError, match=r"data/circle: a link to what is not there"):
            names(text)


def test_the_documents_of_a_linked_folder_are_prepared_and_trained_on(
    linked: Path, tmp_path: Path
) -> None:
    (linked / "circle").unlink()
    for n in range(20):
        (tmp_path / "store" / f"{n}.txt").write_text(f"text {n}")
    assert prepare(tmp_path / "out", linked, "--workers=1") == 0
    assert PreparedFolder.open(tmp_path / "out").manifest.totals["documents"] == 23
    corpus = load_corpus(DataConfig(corpus=str(linked), sequence_length=8, held_out_fraction=0.3))
    assert corpus.training.num_documents + corpus.held_out.num_documents == 23


def test_a_folder_that_cannot_be_read_is_said(
    linked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def refuse(path: Path) -> object:
        if Path(path).name == "deep":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    (linked / "circle").unlink()
    monkeypatch.setattr(os, "scandir", refuse)
    for text in (linked, f"{linked}/**/*.txt"):
        with pytest.raises(ConfigError, match=r"sub/deep: cannot read this folder: Permission"):
            names(text)


@pytest.mark.parametrize("name", ["[a].txt", "*", "?", "**", "[!x]", "a[", "[a]*.txt"])
def test_a_name_that_exists_is_itself_before_it_is_a_glob(tmp_path: Path, name: str) -> None:
    for other in ("a.txt", "b", name):
        (tmp_path / other).write_text(other)
    assert names(tmp_path / name) == [name]
    folder = tmp_path / "folders" / name
    folder.mkdir(parents=True)
    (folder.parent / "b").mkdir()
    for other in ("a.txt", "b.txt"):
        (folder / other).write_text(other)
        (folder.parent / "b" / f"not-{other}").write_text(other)
    assert names(folder) == names(folder / "*.txt") == names(folder / "**") == ["a.txt", "b.txt"]
    assert names(folder / "[b].txt") == ["b.txt"]


def test_a_glob_whose_beginning_is_a_name_may_still_be_a_glob(tmp_path: Path) -> None:
    for folder in ("[ab]", "a", "b"):
        (tmp_path / folder).mkdir()
    (tmp_path / "a" / "x.txt").write_text("x")
    (tmp_path / "b" / "x.txt").write_text("x")
    assert names(f"{tmp_path}/[ab]/*.txt") == ["a/x.txt", "b/x.txt"]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    name=st.binary(min_size=1, max_size=200)
    .map(lambda x: b"n" + x.replace(b"/", b"]").replace(b"\0", b"?") + b".jsonl")
    .map(os.fsdecode)
)
def test_files_of_any_name_are_found(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "any[n]ame"
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text("{}")
    for text in (path, folder, folder / "*.jsonl", folder / "**", folder / "n*"):
        assert find_files(str(text), "INPUT") == [(name, path)]
    path.unlink()


@pytest.mark.parametrize("kind", [".jsonl", ".txt", ".parquet", ".array_record", ".tar"])
def test_a_name_that_is_not_utf8_is_prepared_and_trained_on(tmp_path: Path, kind: str) -> None:
    import pyarrow
    import pyarrow.parquet

    folder, out = (tmp_path / os.fsdecode(b"caf\xe9 [x] $x^$" + x) for x in (b"", b" out"))
    folder.mkdir()
    for n in range(20):
        path = folder / (os.fsdecode(b"\xff\xfe%d" % n) + kind)
        with path.open("wb") as file:
            if kind == ".parquet":
                pyarrow.parquet.write_table(pyarrow.table({"text": [f"text {n}"]}), file)
            elif kind == ".array_record":
                file.write(array_record([b"text %d" % n]))
            elif kind == ".tar":
                file.write(tar({os.fsdecode(b"\xff.txt"): b"text %d" % n}))
            else:
                file.write(json_lines([f"text {n}"]))
    for text in (folder, f"{folder}/*{kind}"):  # the second time it is there already
        arguments = [text, "--workers=1", "--held-out-fraction=0.3"]
        arguments.append("--record-format=text")
        assert prepare(out, *arguments) == 0
    assert PreparedFolder.open(out).manifest.totals["documents"] == 20
    by_name = load_corpus(DataConfig(corpus=str(out), sequence_length=8))
    assert by_name.training.num_documents + by_name.held_out.num_documents == 20


def test_what_is_neither_a_file_nor_a_folder_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert prepare(tmp_path / "out", tmp_path / "pipe") == 2
    assert "a pipe or a device; expected a file or a folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert prepare(tmp_path / "out", tmp_path / "empty") == 2
    assert "empty: no file in this folder that is not hidden" in capsys.readouterr().err
    assert prepare(tmp_path / "out", tmp_path / "e*") == 2
    assert "matches folders only; /** behind it is their files" in capsys.readouterr().err
