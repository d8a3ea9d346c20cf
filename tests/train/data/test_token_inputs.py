"""Files of tokens, llm.c's and Megatron's: every document once, damage and foreign tokens said."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from nha_jax.tokenizer.as_bytes import END_OF_DOCUMENT, ByteTokenizer
from tests.support.train.raw_files import (
    DOCUMENTS,
    MEGATRON_TYPES,
    TEXTS,
    json_lines,
    llmc,
    prepare,
    read_raw,
    write_llmc,
    write_megatron,
    write_megatron_files,
)
from train.data.prepared_folder import PreparedFolder
from train.errors import ConfigError, DataError

END = END_OF_DOCUMENT


class WithBegin(ByteTokenizer):
    """Bytes, of which 1 stands before each document."""

    begin_tokens = (1,)


def texts_and_tokens(found: list) -> list[tuple[str, list[int]]]:
    return [(document.text, document.tokens.tolist()) for document in found]


TOKENS = st.lists(st.sampled_from([1, 65, 66, 67, END]), max_size=60)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(tokens=TOKENS, part_bytes=st.integers(1, 300), begins=st.booleans())
def test_llmc_documents_are_what_stands_between_end_tokens(
    tmp_path_factory: pytest.TempPathFactory, tokens: list[int], part_bytes: int, begins: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "a.bin"
    path.write_bytes(llmc(tokens))
    content = bytes(255 if token == END else token for token in tokens)
    pieces = (content.replace(b"\1", b"\xff\1") if begins else content).split(b"\xff")
    tokenizer = WithBegin() if begins else ByteTokenizer()
    found, _ = read_raw(path, part_bytes, tokenizer=tokenizer)
    assert texts_and_tokens(found) == [(piece.decode(), list(piece)) for piece in pieces if piece]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    documents=st.lists(st.lists(TOKENS, max_size=3), max_size=8),
    part_bytes=st.integers(1, 300),
    dtype=st.sampled_from(["<i2", "<i4", "<i8", "<u2"]),
)
def test_megatron_documents_are_those_of_the_index(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[list[list[int]]],
    part_bytes: int,
    dtype: str,
) -> None:
    folder = tmp_path_factory.mktemp("megatron")
    write_megatron_files(folder, documents, dtype)
    found, _ = read_raw(folder / "a.bin", part_bytes)
    joined = [[*itertools.chain(*sequences)] for sequences in documents]
    pieces = [
        piece
        for tokens in joined
        for piece in bytes(255 if token == END else token for token in tokens).split(b"\xff")
    ]
    assert texts_and_tokens(found) == [(piece.decode(), list(piece)) for piece in pieces if piece]


def test_tokens_of_many_blocks_are_documents_over_their_bounds(tmp_path: Path) -> None:
    tokens = np.full(700_000, 65)
    tokens[[5, 300_000, 699_999]] = END
    for name, dtype in (("two.bin", "<u2"), ("four.bin", "<u4")):
        (tmp_path / name).write_bytes(llmc(tokens, dtype))
        for part_bytes in (10**4, 10**6, 10**8):
            found, _ = read_raw(tmp_path / name, part_bytes)
            assert [len(document.tokens) for document in found] == [5, 299_994, 399_998]


@pytest.mark.parametrize("kind", ["llmc", "megatron"])
def test_tokens_become_the_shards_that_their_text_becomes(
    tmp_path: Path, tokenizer_file: Path, kind: str
) -> None:
    reference = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    reference.no_truncation()
    reference.encode_special_tokens = True
    end = reference.token_to_id("</s>")
    tokens = [reference.encode(text).ids for text in TEXTS]
    (tmp_path / "raw").mkdir()
    if kind == "llmc":
        (tmp_path / "raw" / "a.bin").write_bytes(
            llmc(np.concatenate([[end, *each] for each in tokens]))
        )
    else:
        write_megatron_files(tmp_path / "raw", [[[*each, end]] for each in tokens])
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    arguments = [f"--tokenizer={tokenizer_file}", "--held-out-fraction=0.2", "--workers=1"]
    assert prepare(tmp_path / "tokens", tmp_path / "raw", *arguments) == 0
    assert prepare(tmp_path / "text", tmp_path / "a.jsonl", *arguments) == 0
    one, other = (PreparedFolder.open(tmp_path / name) for name in ("tokens", "text"))
    assert one.manifest.shards == other.manifest.shards  # their checksums, too
    assert one.training.read(0, 500).tolist() == other.training.read(0, 500).tolist()
    assert one.training.num_documents + one.held_out.num_documents == len(DOCUMENTS)


@pytest.mark.parametrize("given", ["a.bin", "a.idx", "*", ""])
def test_tokens_and_index_are_read_together_whichever_is_named(tmp_path: Path, given: str) -> None:
    (tmp_path / "raw").mkdir()
    write_megatron(tmp_path / "raw")
    assert prepare(tmp_path / "out", tmp_path / "raw" / given, "--workers=1") == 0
    totals = PreparedFolder.open(tmp_path / "out").manifest
    assert totals.totals["documents"] == len(DOCUMENTS)
    assert totals.settings["inputs"].startswith("2 files")


@pytest.mark.parametrize(
    ("write", "token"), [(write_llmc, 1024 + 2 * 40), (write_megatron, 2 * 40)]
)
def test_a_token_beyond_the_vocabulary_is_said_even_with_skip_bad(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], write, token: int
) -> None:
    (tmp_path / "raw").mkdir()
    write(tmp_path / "raw")
    path = tmp_path / "raw" / "a.bin"
    content = bytearray(path.read_bytes())
    content[token : token + 2] = (257).to_bytes(2, "little")
    path.write_bytes(content)
    assert prepare(tmp_path / "out", path, "--skip-bad", "--workers=1") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == (
        f"nha: {path}, token 40: 257, which is not in the vocabulary of 257; --tokenizer is whose "
        "tokens these are"
    )


def test_a_negative_token_is_said(tmp_path: Path) -> None:
    write_megatron_files(tmp_path, [[[65, 66]], [[65, -1]]], "<i4")
    with pytest.raises(DataError, match=r"a\.bin, token 3: -1, which is not in the vocabulary"):
        read_raw(tmp_path / "a.bin")


@pytest.mark.parametrize("content", [b"", b"text", bytes(2000), llmc([65])[:900]])
def test_another_file_of_that_name_is_said(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(DataError) as error:
        read_raw(tmp_path / "a.bin")
    assert str(error.value).startswith(f"{tmp_path / 'a.bin'}: ")
    assert "\n" not in str(error.value)
    (tmp_path / "a.idx").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.idx: no index of Megatron's"):
        read_raw(tmp_path / "a.bin")


def test_an_index_without_its_tokens_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "raw").mkdir()
    write_megatron(tmp_path / "raw")
    (tmp_path / "raw" / "a.bin").unlink()
    assert prepare(tmp_path / "out", tmp_path / "raw") == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.endswith("a.idx: the tokens that it is the index of are missing: a.bin")


@settings(max_examples=25, deadline=None, derandomize=True)
@given(share=st.floats(0, 1, exclude_max=True), behind=st.binary(min_size=1, max_size=4))
@pytest.mark.parametrize("name", ["llmc a.bin", "megatron a.bin", "megatron a.idx"])
def test_a_cut_anywhere_or_something_behind_is_said(
    tmp_path_factory: pytest.TempPathFactory, name: str, share: float, behind: bytes
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    kind, _, file = name.partition(" ")
    (write_llmc if kind == "llmc" else write_megatron)(folder)
    whole = (folder / file).read_bytes()
    for content in (whole[: int(share * len(whole))], whole + behind):
        (folder / file).write_bytes(content)
        with pytest.raises(DataError) as error:
            read_raw(folder / "a.bin")
        assert str(error.value).startswith(f"{folder}/a.")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("place", range(0, 34 + 40, 3))
def test_a_damaged_index_is_said_or_of_no_matter(tmp_path: Path, place: int) -> None:
    """Its header, and the lengths of its first sequences."""
    write_megatron(tmp_path)
    before = texts_and_tokens(read_raw(tmp_path / "a.bin")[0])
    index = bytearray((tmp_path / "a.idx").read_bytes())
    index[place] ^= 2
    (tmp_path / "a.idx").write_bytes(index)
    with pytest.raises(DataError) as error:
        read_raw(tmp_path / "a.bin")
    assert str(error.value).startswith(f"{tmp_path}/a.")
    assert before


def test_fractions_are_no_tokens(tmp_path: Path) -> None:
    write_megatron(tmp_path)
    index = bytearray((tmp_path / "a.idx").read_bytes())
    for code in {*range(256)} - {*MEGATRON_TYPES.values()}:
        index[17] = code
        (tmp_path / "a.idx").write_bytes(index)
        with pytest.raises(DataError, match=rf"a\.idx: version 1, tokens of type {code}; expected"):
            read_raw(tmp_path / "a.bin")


def test_a_token_file_that_is_gone_is_said(tmp_path: Path) -> None:
    write_megatron(tmp_path)
    os.unlink(tmp_path / "a.bin")
    with pytest.raises(ConfigError, match=r"a\.bin: cannot read it: No such file"):
        read_raw(tmp_path / "a.bin")
