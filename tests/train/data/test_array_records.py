"""ArrayRecord: records of each format, damaged files, bad records, and an option that is needed."""

from pathlib import Path

import pytest
from google.protobuf import text_format
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.train.raw_files import DOCUMENTS, TEXTS, array_record, prepare, read_raw
from train.data.prepare.tf_examples import _example_type
from train.data.prepared_folder import Manifest
from train.errors import DataError

WHOLE = array_record([text.encode() for text in TEXTS])


def length_and(content: bytes) -> bytes:
    """What protocol buffers write before bytes: their length, 7 bits at a time."""
    length, written = len(content), b""
    while length > 127:
        written, length = written + bytes([length & 127 | 128]), length >> 7
    return written + bytes([length]) + content


def example(**features: bytes) -> bytes:
    """A tf.train.Example by the wire format: fields 1 and 2 of bytes have the tags 10 and 18."""
    content = b""
    for name, value in features.items():
        feature = b"\n" + length_and(b"\n" + length_and(value))
        entry = b"\n" + length_and(name.encode()) + b"\x12" + length_and(feature)
        content += b"\n" + length_and(entry)
    return b"\n" + length_and(content)


RECORDS = {
    "text": [text.encode() for text in TEXTS],
    "json": [b'{"id": 1, "text": "%s"}' % text.replace("\n", "\\n").encode() for text in TEXTS],
    "example": [example(id=b"1", text=text.encode()) for text in TEXTS],
}


@pytest.mark.parametrize("record_format", RECORDS)
@pytest.mark.parametrize("options", ["group_size:1", "group_size:50", "group_size:9,uncompressed"])
def test_records_of_each_format_are_documents(
    tmp_path: Path, record_format: str, options: str
) -> None:
    path = tmp_path / "a.array_record"
    path.write_bytes(array_record(RECORDS[record_format], options))
    for part_bytes in (1000, 10**6, 10**9):
        assert read_raw(path, part_bytes, record_format=record_format) == (DOCUMENTS, [])


def test_the_format_must_be_said_and_is_kept_with_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.arrayrecord"
    path.write_bytes(WHOLE)
    assert prepare(tmp_path / "out", path) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error == f"nha: {path}: --record-format is needed: text, json, example"
    assert not (tmp_path / "out").exists()
    assert prepare(tmp_path / "out", path, "--record-format=text", "--workers=1") == 0
    assert Manifest.read(tmp_path / "out").settings["record_format"] == "text"
    capsys.readouterr()
    assert prepare(tmp_path / "out", path, "--record-format=json") == 2
    assert 'record_format: "text" -> "json"' in capsys.readouterr().err


def floats() -> bytes:
    """An Example whose feature holds a number, as protobuf itself writes it."""
    message = _example_type()()
    text_format.Parse('features { feature { key: "text" value {} } }', message)
    return message.SerializeToString()


BAD = {
    ("text", b"caf\xe9"): "not UTF-8 text",
    ("json", b"{"): "not JSON",
    ("json", b'{"body": "a"}'): "no key 'text'",
    ("json", b'["a"]'): "no key 'text'",
    ("example", b"\n\xff"): "no tf.train.Example",
    ("example", b""): "no feature 'text' (--text-key names it); it has none",
    ("example", example(body=b"a", id=b"")): "no feature 'text' (--text-key names it); it has body",
    ("example", floats()): "'text' holds 0 texts; expected one",
    ("example", example(text=b"caf\xe9")): "'text' is not UTF-8 text",
}


@pytest.mark.parametrize("kind", BAD, ids=lambda kind: f"{kind[0]}-{kind[1]!r:.12}")
def test_a_bad_record_is_named(tmp_path: Path, kind: tuple[str, bytes]) -> None:
    record_format, record = kind
    records = RECORDS[record_format]
    path = tmp_path / "a.array_record"
    path.write_bytes(array_record([*records[:30], record, *records[30:]]))
    found, (bad,) = read_raw(path, record_format=record_format)
    assert found == DOCUMENTS
    assert bad.startswith(f"{path}, record 31: {BAD[kind]}")


@settings(max_examples=25, deadline=None, derandomize=True)
@given(share=st.floats(0, 1, exclude_max=True), behind=st.binary(min_size=1, max_size=16))
def test_a_cut_anywhere_or_something_behind_is_said(
    tmp_path_factory: pytest.TempPathFactory, share: float, behind: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.array_record"
    for content in (WHOLE[: int(share * len(WHOLE))], WHOLE + behind):
        path.write_bytes(content)
        with pytest.raises(DataError) as error:
            read_raw(path, record_format="text")
        message = f"{path}: cannot read it: it is damaged, cut, or no ArrayRecord file"
        assert str(error.value) == message


@settings(max_examples=30, deadline=None, derandomize=True)
@given(place=st.integers(0, len(WHOLE.rstrip(b"\0")) - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_is_said_or_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, place: int, bit: int
) -> None:
    damaged = bytearray(WHOLE)
    damaged[place] ^= 1 << bit
    path = tmp_path_factory.getbasetemp() / "flipped.array_record"
    path.write_bytes(damaged)
    try:
        found = read_raw(path, record_format="text")
    except DataError as error:
        assert str(error).startswith(f"{path}: cannot read it: it is damaged")  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert found == (DOCUMENTS, [])
