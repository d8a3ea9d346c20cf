"""Packed input: whole, of several members, cut anywhere, or with something behind it."""

import gzip
import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.train.raw_files import json_lines, prepare, read_raw
from train.config import DataConfig
from train.data.corpus import load_corpus
from train.data.packed_files import open_unpacked
from train.data.prepare.documents import Document
from train.errors import ConfigError, DataError
from train.text.user_texts import read_text

TEXTS = [f"document {n} " + "of words " * (n % 7) for n in range(60)]
LINES = json_lines(TEXTS)


def zstandard_with_flushes(content: bytes) -> bytes:
    """A frame of many blocks, one a line: whatever its beginning holds can be read."""
    raw = io.BytesIO()
    with zstandard.ZstdCompressor().stream_writer(raw, closefd=False) as writer:
        for line in content.splitlines(keepends=True):
            writer.write(line)
            writer.flush(zstandard.FLUSH_BLOCK)
    return raw.getvalue()


def skippable(content: bytes) -> bytes:
    """A frame without text, as pzstd writes before each of its own, and one with it."""
    return b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd" + zstandard.compress(content)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    "-flushed.zst": zstandard_with_flushes,
    "-skippable.zst": skippable,
}


def path_of(folder: Path, stem: str, name: str) -> Path:
    """A file of lines that is packed as `PACKERS[name]` packs: cut-flushed.jsonl.zst."""
    kind, _, suffix = name.rpartition(".")
    return folder / f"{stem}{kind}.jsonl.{suffix}"


def unpack(path: Path) -> bytes:
    with open_unpacked(path) as file:
        return file.read()


def documents(path: Path) -> list[Document]:
    """The documents as `--skip-bad` reads them."""
    return read_raw(path)[0]


@pytest.mark.parametrize("name", PACKERS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(cuts=st.lists(st.integers(0, len(LINES)), max_size=3))
def test_any_number_of_members_is_read_whole(
    tmp_path_factory: pytest.TempPathFactory, name: str, cuts: list[int]
) -> None:
    ends = [0, *sorted(cuts), len(LINES)]
    members = [LINES[start:stop] for start, stop in itertools.pairwise(ends)]
    path = path_of(tmp_path_factory.getbasetemp(), "members", name)
    path.write_bytes(b"".join(map(PACKERS[name], members)))
    assert unpack(path) == LINES
    assert documents(path) == TEXTS


@pytest.mark.parametrize("name", PACKERS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_cut_anywhere_is_said_even_with_skip_bad(
    tmp_path_factory: pytest.TempPathFactory, name: str, share: float
) -> None:
    packed = PACKERS[name](LINES)
    if name == "-skippable.zst":
        share = max(share, 13 / len(packed))  # the first frame by itself is whole, and empty
    path = path_of(tmp_path_factory.getbasetemp(), "cut", name)
    path.write_bytes(packed[: int(share * len(packed))])
    with pytest.raises(DataError) as error:
        documents(path)
    assert str(error.value).startswith(f"{path}: cannot read it: it ")
    with pytest.raises((EOFError, OSError)):
        unpack(path)


@pytest.mark.parametrize("name", PACKERS)
@pytest.mark.parametrize("members", [1, 3])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(garbage=st.one_of(st.binary(min_size=1, max_size=40), st.integers(1, 600).map(bytes)))
def test_what_stands_behind_is_said(
    tmp_path_factory: pytest.TempPathFactory, name: str, members: int, garbage: bytes
) -> None:
    path = path_of(tmp_path_factory.getbasetemp(), "behind", name)
    path.write_bytes(PACKERS[name](LINES) * members + garbage)
    with pytest.raises(DataError, match=r"cannot read it: it (ends too early|is damaged)"):
        documents(path)


@pytest.mark.parametrize("name", [".txt.zst", ".jsonl.zst", "-flushed.jsonl.zst", ".txt.gz"])
def test_the_command_writes_nothing_as_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = tmp_path / f"cut{name}"
    packed = PACKERS[name.replace(".jsonl", "").replace(".txt", "")](LINES)
    path.write_bytes(packed[: len(packed) // 2])
    (tmp_path / "good.txt").write_text("a good one")
    arguments = [tmp_path / "good.txt", path, "--workers=1", "--skip-bad"]
    assert prepare(tmp_path / "out", *arguments) == 1
    assert f"nha: {path}: cannot read it: it ends too early" in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(size=st.integers(1, len(LINES)))
def test_lines_that_are_cut_are_whole_but_for_the_last_which_is_named(
    tmp_path_factory: pytest.TempPathFactory, size: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.jsonl"
    path.write_bytes(LINES[:size])
    found, bad = read_raw(path)
    assert found == TEXTS[: len(found)]
    line = LINES[:size].count(b"\n") + 1
    assert all(x.startswith(f"{path}, line {line}: not JSON") for x in bad)
    assert all(x.endswith("(the file ends in this line)") for x in bad)
    # Each document is followed by an empty line.
    assert len(found) + len(bad) == -(-line // 2) - (LINES[:size].endswith(b"\n\n"))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(share=st.floats(0, 1, exclude_max=True), behind=st.binary(min_size=8, max_size=16))
def test_a_cut_table_is_said(
    tmp_path_factory: pytest.TempPathFactory, share: float, behind: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), path, row_group_size=20)
    whole = path.read_bytes()
    assert documents(path) == TEXTS
    for content in (whole[: int(share * len(whole))], whole + behind):
        path.write_bytes(content)
        with pytest.raises(DataError) as error:
            documents(path)
        assert str(error.value).startswith(f"{path}: cannot read it as parquet: ")


@pytest.mark.parametrize("name", [".gz", ".zst"])
def test_training_and_texts_read_packed_files_and_refuse_cut_ones(
    tmp_path: Path, name: str
) -> None:
    for n, text in enumerate(TEXTS):
        (tmp_path / f"{n:02}.txt{name}").write_bytes(PACKERS[name](text.encode()))
    config = DataConfig(corpus=str(tmp_path), sequence_length=8, held_out_fraction=0.3)
    corpus = load_corpus(config)
    assert corpus.training.num_documents + corpus.held_out.num_documents == len(TEXTS)
    assert b"document 1 of words" in corpus.training.text(10**6) + corpus.held_out.text(10**6)
    path = tmp_path / f"07.txt{name}"
    assert read_text(str(path)) == TEXTS[7]
    path.write_bytes(path.read_bytes()[:-1])
    message = f"{path}.*: it ends too early"
    with pytest.raises(ConfigError, match=message):
        load_corpus(config)
    with pytest.raises(ConfigError, match=message):
        read_text(str(path))


@pytest.mark.parametrize("name", ["a.jsonl.bz2", "a.tgz.gz", "a.txt.xz", "a.ZIP"])
def test_another_packing_is_refused_not_taken_for_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / name).write_bytes(b"text")
    assert prepare(tmp_path / "out", tmp_path, "--skip-bad") == 2
    assert f"{tmp_path / name}: {Path(name.removesuffix('.gz')).suffix.lower()} files cannot" in (
        capsys.readouterr().err
    )
    with pytest.raises(ConfigError, match="is no text"):
        load_corpus(DataConfig(corpus=str(tmp_path), sequence_length=8))


def test_of_nothing_but_empty_files_one_line_says_it_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_bytes(b"")
    assert prepare(tmp_path / "out", tmp_path / "a.txt", "--workers=1") == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nha:")]
    assert lines == ["nha: no text in all of the inputs"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.json"])
def test_an_empty_file_is_said_and_holds_no_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / name).write_bytes(b"")
    (tmp_path / "good.jsonl").write_bytes(LINES)
    assert prepare(tmp_path / "out", tmp_path / "*.*", "--workers=1") == 0
    shown = capsys.readouterr()
    assert f"nha: without text, and left out: {tmp_path / name}\n" in shown.err
    assert prepare(tmp_path / "none", tmp_path / name) == 1
    assert "no text in all of the inputs" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.txt.zst", "a.jsonl.zst"])
def test_an_empty_file_that_should_have_a_header_is_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / name).write_bytes(b"")
    (tmp_path / "good.jsonl").write_bytes(LINES)
    assert prepare(tmp_path / "out", tmp_path / "*.*", "--workers=1", "--skip-bad") == 1
    assert f"nha: {tmp_path / name}: cannot read it" in capsys.readouterr().err
    packed_nothing = {".gz": gzip.compress(b""), ".zst": zstandard.compress(b"")}
    if content := packed_nothing.get((tmp_path / name).suffix):
        (tmp_path / name).write_bytes(content)
        assert prepare(tmp_path / "other", tmp_path / "*.*", "--workers=1") == 0


GOOD_LINES = {
    "a byte order mark": b"\xef\xbb\xbf" + LINES + b"\xef\xbb\xbf" + LINES,
    "a huge integer": LINES + b'{"n": ' + b"1" * 5000 + b', "text": "one"}\n' + LINES,
    "no last line end": LINES + LINES.rstrip(),
}


@pytest.mark.parametrize("kind", GOOD_LINES)
def test_good_lines_that_json_alone_would_not_take(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD_LINES[kind])
    found = documents(path)
    assert found[: len(TEXTS)] == found[-len(TEXTS) :] == TEXTS
    assert len(found) == 2 * len(TEXTS) + (kind == "a huge integer")


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbftext")
    assert documents(tmp_path / "a.txt") == ["text"]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf")
    assert documents(tmp_path / "a.txt") == []


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("before", [b"", LINES])
def test_an_array_of_documents_is_refused_not_left_out(
    tmp_path: Path, indent: int | None, before: bytes
) -> None:
    path = tmp_path / "a.json"
    array = json.dumps([{"text": text} for text in TEXTS], indent=indent).encode()
    path.write_bytes(before + array)
    with pytest.raises(DataError) as error:
        documents(path)
    line = 1 + before.count(b"\n")
    assert str(error.value).startswith(f"{path}, line {line}: a JSON array; expected JSON lines")


def test_a_column_of_bytes_is_text_and_what_is_not_utf8_is_named_by_its_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.parquet"
    content = [text.encode() for text in TEXTS]
    pyarrow.parquet.write_table(pyarrow.table({"text": content}), path, row_group_size=20)
    assert documents(path) == TEXTS
    content[33] = b"caf\xe9"
    column = pyarrow.array(content, pyarrow.binary())
    invalid = pyarrow.StringArray.from_buffers(len(column), *column.buffers()[1:])
    for damaged in (column, invalid):
        pyarrow.parquet.write_table(pyarrow.table({"text": damaged}), path, row_group_size=20)
        assert documents(path) == TEXTS[:33] + TEXTS[34:]
        assert prepare(tmp_path / "out", path, "--workers=1") == 1
        assert "a.parquet, row 34: 'text' is not UTF-8 text" in capsys.readouterr().err
        path.unlink()
        (tmp_path / "out" / ".prepare" / "settings.json").unlink()
