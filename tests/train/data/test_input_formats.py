"""Tables, saved datasets and archives: whole, cut, damaged, and with documents that are bad."""

import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.train.raw_files import (
    DOCUMENTS,
    TEXTS,
    json_lines,
    prepare,
    read_raw,
    tar,
    write_saved_dataset,
    write_tar,
)
from train.config import DataConfig
from train.data.corpus import load_corpus
from train.data.prepared_folder import PreparedFolder
from train.errors import ConfigError, DataError


def arrow_stream(table: pyarrow.Table) -> bytes:
    raw = io.BytesIO()
    with pyarrow.ipc.new_stream(raw, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return raw.getvalue()


def arrow_file(table: pyarrow.Table) -> bytes:
    raw = io.BytesIO()
    with pyarrow.ipc.new_file(raw, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return raw.getvalue()


def parquet(table: pyarrow.Table) -> bytes:
    raw = io.BytesIO()
    pyarrow.parquet.write_table(table, raw, row_group_size=20)
    return raw.getvalue()


TABLES = {"a.arrow": arrow_stream, "file.arrow": arrow_file, "a.parquet": parquet}


def nested_rows(texts: list[str | None]) -> list[dict | None]:
    """Rows of structs two deep: a text, or nothing at each depth in turn."""
    empty = [None, {"id": 1, "raw": None}, {"id": 2, "raw": {"text": None}}]
    return [
        empty[n % 3] if text is None else {"id": n, "raw": {"text": text}}
        for n, text in enumerate(texts)
    ]


@pytest.mark.parametrize("name", TABLES)
def test_a_field_inside_of_structs_is_the_text_and_none_is_named_by_its_row(
    tmp_path: Path, name: str
) -> None:
    texts: list[str | None] = [*DOCUMENTS]
    for row in (0, 34, 50):
        texts[row] = None
    table = pyarrow.table({"id": range(len(texts)), "content": nested_rows(texts)})
    path = tmp_path / name
    path.write_bytes(TABLES[name](table))
    found, bad = read_raw(path, text_key="content.raw.text")
    assert found == [text for text in texts if text]
    assert bad == [
        f"{path}, row {row}: 'content.raw.text' is None, not text" for row in (1, 35, 51)
    ]


@pytest.mark.parametrize("name", TABLES)
def test_a_column_with_a_point_in_its_name_comes_before_a_field(tmp_path: Path, name: str) -> None:
    rows = [{"text": "a field"}] * 3
    path = tmp_path / name
    path.write_bytes(TABLES[name](pyarrow.table({"a": rows, "a.text": ["a column"] * 3})))
    assert read_raw(path, text_key="a.text")[0] == ["a column"] * 3


@pytest.mark.parametrize("key", ["a", "a.b", "a.b.c", "b.a", "a.", ".", ""])
@pytest.mark.parametrize("name", TABLES)
def test_a_column_that_is_not_there_is_said_with_those_that_are(
    tmp_path: Path, name: str, key: str
) -> None:
    path = tmp_path / name
    path.write_bytes(TABLES[name](pyarrow.table({"id": [1], "x": [{"a": "a", "b": "b"}]})))
    with pytest.raises(DataError) as error:
        read_raw(path, text_key=key)
    assert str(error.value) == (f"{path}: no column {key!r} (--text-key names it); it has id, x")


def test_a_key_inside_of_objects_is_the_text_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    records = [
        {"a": {"b": "inside"}},
        {"a.b": "by name", "a": {"b": "inside"}},
        {"a": {"c": "another"}},
        {"a": None},
        {"a": {"b": None}},
        {"a": ["b"]},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    found, bad = read_raw(path, text_key="a.b")
    assert found == ["inside", "by name"]
    missing = "no key 'a.b' (--text-key names it)"
    assert bad == [
        f"{path}, line 3: {missing}",
        f"{path}, line 4: {missing}",
        f"{path}, line 5: 'a.b' is None, not text",
        f"{path}, line 6: {missing}",
    ]
    path.write_text(json.dumps({"a": {"b.c": 1}, "a.b": {"c": 2}, "a.b.d": 3}) + "\n")
    assert read_raw(path, text_key="a.b.c")[1] == [f"{path}, line 1: 'a.b.c' is 2, not text"]


@pytest.mark.parametrize("length", [3_000, 100_000])
def test_documents_longer_than_a_shard_are_whole(tmp_path: Path, length: int) -> None:
    texts = ["short", "x" * length, "", "y" * length + "é", "short again"]
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts))
    (tmp_path / "b.txt").write_text(texts[1])
    inputs = (tmp_path / "a.jsonl", tmp_path / "b.txt")
    arguments = ("--shard-bytes=1000", "--workers=1", "--held-out-fraction=0")
    assert prepare(tmp_path / "out", *inputs, *arguments) == 0
    training = PreparedFolder.open(tmp_path / "out").training
    assert training.num_documents == 5
    assert training.text(10**6).decode() == "".join([*texts, texts[1]])


def test_what_precedes_a_part_is_read_no_further_than_the_part(tmp_path: Path) -> None:
    """A line of a thousand parts would be read a thousand times."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(["x" * 10**7]))
    before = bytes_read()
    assert len(read_raw(path, 10_000)[0]) == 1
    assert bytes_read() - before < 4 * 10**7


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def test_a_saved_dataset_is_its_rows_from_any_of_its_files(tmp_path: Path) -> None:
    splits = tmp_path / "all"
    for split in ("test", "train"):
        (splits / split).mkdir(parents=True)
        write_saved_dataset(splits / split)
    (splits / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    outs = []
    for chosen in (splits, splits / "train", splits / "train" / "state.json"):
        outs.append(tmp_path / f"out{len(outs)}")
        assert prepare(outs[-1], chosen, "--workers=1", "--held-out-fraction=0") == 0
    assert outs[0] != outs[1]
    tokens = [b"".join(path.read_bytes() for path in out.glob("*.tokens")) for out in outs]
    assert tokens[0] == tokens[1] * 2
    assert tokens[1] == tokens[2]
    assert len(tokens[1]) == 2 * sum(len(text.encode()) + 1 for text in DOCUMENTS)


DAMAGES = {
    "a file is missing": (
        lambda folder: (folder / "data-00001-of-00003.arrow").unlink(),
        "state.json: names data-00001-of-00003.arrow, which is missing",
    ),
    "state.json is cut": (
        lambda folder: os.truncate(folder / "state.json", 30),
        "state.json: damaged",
    ),
    "state.json names nothing": (
        lambda folder: (folder / "state.json").write_text('{"_data_files": [3]}'),
        "state.json: damaged",
    ),
    "a split is missing": (
        lambda folder: (folder.parent / "dataset_dict.json").write_text('{"splits": ["test"]}'),
        "../dataset_dict.json: names test/state.json, which is missing",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_dataset_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    folder = tmp_path / "train"
    folder.mkdir()
    write_saved_dataset(folder)
    change, message = DAMAGES[damage]
    change(folder)
    assert prepare(tmp_path / "out", tmp_path, "--skip-bad") == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"nha: {os.path.normpath(folder / message)}")


def test_files_of_those_names_that_are_no_datasets_are_read_as_ever(tmp_path: Path) -> None:
    for name in ("state.json", "dataset_dict.json", "dataset_info.jsonl"):
        (tmp_path / name).write_bytes(json_lines(["text"]))
    assert prepare(tmp_path / "out", tmp_path, "--workers=1") == 0


ARROW = {name: TABLES[name](pyarrow.table({"text": TEXTS})) for name in ("a.arrow", "file.arrow")}
ARCHIVE = tar(
    {f"{n:02}.txt": text.encode() for n, text in enumerate(TEXTS[:20])}
    | {"b.jsonl": json_lines(TEXTS[20:])}
)
WHOLE = ARROW | {"a.tar": ARCHIVE, "b.tar.gz": gzip.compress(ARCHIVE)}


@pytest.mark.parametrize("name", WHOLE)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(share=st.floats(0, 1, exclude_max=True), behind=st.binary(min_size=1, max_size=16))
def test_a_cut_anywhere_or_something_behind_is_said_even_with_skip_bad(
    tmp_path_factory: pytest.TempPathFactory, name: str, share: float, behind: bytes
) -> None:
    whole = WHOLE[name]
    if name == "a.tar":  # zeros fill its last ten thousand bytes; two blocks of them are its end
        whole = whole.rstrip(b"\0")
        whole += bytes(-len(whole) % 512)
        behind = b"x" + behind
    path = tmp_path_factory.getbasetemp() / f"cut-{name}"
    path.write_bytes(WHOLE[name])
    assert read_raw(path) == (DOCUMENTS, [])
    for content in (whole[: int(share * len(whole))], WHOLE[name] + behind):
        path.write_bytes(content)
        with pytest.raises(DataError) as error:
            read_raw(path)
        assert str(error.value).startswith(str(path))
        assert "cannot read it: " in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", WHOLE)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_at_worst_another_text(
    tmp_path_factory: pytest.TempPathFactory, name: str, place: float, bit: int
) -> None:
    """Arrow and tar have no checksums of contents: what is no text any more is named."""
    damaged = bytearray(WHOLE[name])
    damaged[int(place * len(damaged))] ^= 1 << bit
    path = tmp_path_factory.getbasetemp() / f"flipped-{name}"
    path.write_bytes(damaged)
    try:
        read_raw(path)
    except DataError as error:
        assert str(error).startswith(str(path))  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize("name", ARROW)
def test_a_length_that_no_memory_holds_is_said(tmp_path: Path, name: str) -> None:
    """Any byte of the description of a batch may be a length's highest."""
    whole = TABLES[name](pyarrow.table({"text": TEXTS[:3]}))
    path = tmp_path / name
    refused = 0
    for place in range(3, len(whole), 4):  # of little-endian integers of 4 and 8 bytes
        path.write_bytes(whole[:place] + b"\x7f" + whole[place + 1 :])
        try:
            read_raw(path)
        except DataError:
            refused += 1
    assert refused > 5


def member(name: str, kind: bytes, link: str = "") -> bytes:
    """An archive with one member that is no file, and a file."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        odd = tarfile.TarInfo(name)
        odd.type, odd.linkname = kind, link
        archive.addfile(odd)
        good = tarfile.TarInfo("good.txt")
        good.size = 4
        archive.addfile(good, io.BytesIO(b"good"))
    return raw.getvalue()


BAD_MEMBERS = {
    "a link": (member("l.txt", tarfile.SYMTYPE, "/etc/passwd"), "l.txt in it: a link or"),
    "a hard link": (member("l.txt", tarfile.LNKTYPE, "good.txt"), "l.txt in it: a link or"),
    "a device": (member("null", tarfile.CHRTYPE), "null in it: a link or a device"),
    "an absolute name": (member("/tmp/a.txt", tarfile.REGTYPE), "/tmp/a.txt in it: its name leads"),
    "a name above": (member("a/../../b", tarfile.REGTYPE), "a/../../b in it: its name leads"),
    "no UTF-8": (tar({"a/b.txt": b"a\n\xe9", "good.txt": b"good"}), "a/b.txt in it, line 2: not"),
    "no JSON": (
        tar({"a.jsonl": b'{"text": "good"}\n{\n'}),
        "a.jsonl in it, line 2: not JSON",
    ),
}


@pytest.mark.parametrize("kind", BAD_MEMBERS)
def test_a_bad_file_of_an_archive_is_named_or_counted(tmp_path: Path, kind: str) -> None:
    content, message = BAD_MEMBERS[kind]
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    found, (bad,) = read_raw(path)
    assert found == ["good"]
    assert bad.startswith(f"{path}, file {message}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.parquet", ".parquet files cannot be read inside of an archive"),
        ("a.tar.gz", ".tar files cannot be read inside of an archive"),
        ("a.bz2", ".bz2 files cannot be read inside of an archive"),
        ("a.txt.gz", "cannot read it: it is damaged"),
    ],
)
def test_what_cannot_be_read_in_an_archive_is_said(tmp_path: Path, name: str, message: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(tar({f"folder/{name}": b"anything"}))
    with pytest.raises(DataError) as error:
        read_raw(path)
    assert str(error.value).startswith(f"{path}, file folder/{name} in it: {message}")


def test_an_archive_leaves_nothing_on_the_disk(tmp_path: Path) -> None:
    write_tar(tmp_path)
    before = sorted(tmp_path.iterdir())
    for path in before:
        assert read_raw(path)[0]
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["a.tar", "a.arrow", "a.parquet", "a.tar.gz"])
def test_training_directly_refuses_what_is_no_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"text")
    with pytest.raises(ConfigError, match="is no text"):
        load_corpus(DataConfig(corpus=str(tmp_path), sequence_length=8))
