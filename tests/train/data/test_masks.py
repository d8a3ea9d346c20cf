"""Marked tokens: in shards, in sequences of whole documents, and in mixtures with other text."""

import itertools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nha_jax.tokenizer.as_bytes import ByteTokenizer
from tests.support.train.chats import TEMPLATES, dialogue, write_chats
from tests.support.train.raw_files import contents, json_lines, prepare
from train.config import DataConfig
from train.data.batches import Sequences, evaluation_batches
from train.data.corpus import load_corpus
from train.data.prepared_folder import ShardedTokens
from train.data.token_shards import Marks, ShardWriter
from train.data.token_source import Split
from train.errors import ConfigError, DataError

DTYPE = np.dtype("uint16")


def write_stream(folder: Path, shards: list[list[list[bool]]]) -> ShardedTokens:
    """Shards of documents, each of so many tokens 0, 1, ... of the stream, marked as said."""
    records, first = [], 0
    for number, documents in enumerate(shards):
        with ShardWriter(folder, f"s-{number}", DTYPE, with_mask=True) as writer:
            for marks in documents:
                tokens = np.arange(first, first + len(marks))
                first += len(marks)
                mask = np.array(marks)
                writer.add(tokens, np.array([len(marks)]), len(marks), Marks(mask, sum(marks[1:])))
            record = writer.close()
        records += [record] if record else []
    return ShardedTokens(folder, records, DTYPE, ByteTokenizer())


DOCUMENTS = st.lists(st.lists(st.booleans(), min_size=1, max_size=9), max_size=4)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(shards=st.lists(DOCUMENTS, min_size=1, max_size=4), data=st.data())
def test_the_masks_of_shards_are_one_stream(
    tmp_path_factory: pytest.TempPathFactory, shards: list[list[list[bool]]], data: st.DataObject
) -> None:
    source = write_stream(tmp_path_factory.mktemp("shards"), shards)
    documents = list(itertools.chain(*shards))
    flat = list(itertools.chain(*documents))
    start = data.draw(st.integers(0, len(flat)))
    stop = data.draw(st.integers(start, len(flat)))
    assert source.marks(start, stop).tolist() == flat[start:stop]
    assert source.document_ends().tolist() == np.cumsum([len(x) for x in documents]).tolist()
    assert source.num_targets == source.target_bytes == sum(sum(x[1:]) for x in documents)
    assert source.has_mask == bool(documents)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(documents=DOCUMENTS.filter(bool), length=st.integers(2, 12))
def test_sequences_hold_whole_documents_and_every_marked_token_once(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[bool]], length: int
) -> None:
    source = write_stream(tmp_path_factory.mktemp("shards"), [documents])
    (sequences,) = Sequences(Split((source,)), length).sources
    rows = [sequences[n] for n in range(len(sequences))]
    targets = np.concatenate([row["targets"][row["loss_mask"]] for row in rows])
    ends = np.cumsum([len(x) for x in documents])
    first = {0, *ends.tolist()}
    flat = list(itertools.chain(*documents))
    expected = [n for n, marked in enumerate(flat) if marked and n not in first]
    assert sorted(targets.tolist()) == expected
    starts = {int(row["tokens"][0]) for row in rows}
    for end, document in zip(ends, documents, strict=True):
        inside = set(range(int(end) - len(document) + 1, int(end)))
        if len(document) <= length + 1:
            assert not starts & inside  # begins in one sequence, and goes on in no other
    # No sequence has room for the document behind it.
    for row, after in itertools.pairwise(rows):
        used, begins = int((row["segment_ids"] > 0).sum()), int(after["tokens"][0])
        if begins in first:
            size = next(len(x) for x, end in zip(documents, ends, strict=True) if end > begins)
            assert begins - int(row["tokens"][0]) + size > length + 1
        else:
            assert used == length


def test_the_last_token_of_a_full_sequence_is_a_target(tmp_path: Path) -> None:
    source = write_stream(tmp_path, [[[False, True, True], [False, False, True], [False, True]]])
    (sequences,) = Sequences(Split((source,)), 5).sources
    assert len(sequences) == 2
    first, last = sequences[0], sequences[1]
    assert first["tokens"].tolist() == [0, 1, 2, 3, 4]
    assert first["targets"].tolist() == [1, 2, 3, 4, 5]
    assert first["segment_ids"].tolist() == [1, 1, 1, 2, 2]
    assert first["loss_mask"].tolist() == [True, True, False, False, True]
    assert last["tokens"].tolist() == [6, 7, 0, 0, 0]
    assert last["segment_ids"].tolist() == [1, 1, 0, 0, 0]
    assert last["loss_mask"].tolist() == [True, False, False, False, False]


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of dialogues."""
    folder = tmp_path_factory.mktemp("chats")
    raw = [dialogue(f"what is {n}?", f"a number: {n}. " * (n % 9)) for n in range(200)]
    write_chats(folder / "a.jsonl", raw)
    chatml = f"--chat-template={TEMPLATES / 'qwen2.jinja'}"
    options = ("--chat", chatml, "--workers=1", "--held-out-fraction=0.2", "--shard-bytes=8000")
    assert prepare(folder / "out", folder / "a.jsonl", *options) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of plain text."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.jsonl").write_bytes(json_lines([f"text {n} " * (n % 30) for n in range(100)]))
    options = ("--workers=1", "--held-out-fraction=0.2")
    assert prepare(folder / "out", folder / "a.jsonl", *options) == 0
    return folder / "out"


def test_bits_per_byte_of_a_mixture_are_of_what_is_marked(chats: Path, texts: Path) -> None:
    """Tokens are bytes, so targets but the ends of documents stand for one byte each."""
    weights = {str(chats): 0.5, str(texts): 0.5}
    corpus = load_corpus(DataConfig(corpus=weights, sequence_length=64))
    assert corpus.training.has_mask
    alone = [load_corpus(DataConfig(corpus=x, sequence_length=64)) for x in weights]
    shares = [x.training.num_targets / x.training.num_tokens for x in alone]
    assert shares[0] < 0.6 < 0.9 < shares[1]
    mean = np.average([x.training.bytes_per_target for x in alone], weights=shares)
    assert corpus.training.bytes_per_target == pytest.approx(mean, rel=0.01)
    assert alone[0].training.bytes_per_target < 1  # the end tokens stand for none
    assert alone[1].training.bytes_per_target == 1
    assert corpus.chat_template == (TEMPLATES / "qwen2.jinja").read_bytes()


def test_an_evaluation_counts_what_is_marked_of_every_source(chats: Path, texts: Path) -> None:
    corpus = load_corpus(DataConfig(corpus={str(chats): 1, str(texts): 1}, sequence_length=512))
    sequences = Sequences(corpus.held_out, 512)
    counted = [batch["loss_mask"].sum() for batch in evaluation_batches(sequences, 4, 10**6)]
    assert sum(counted) == corpus.held_out.num_targets


def test_dialogues_of_one_model_have_one_template(chats: Path, tmp_path: Path) -> None:
    write_chats(tmp_path / "a.jsonl", [dialogue(f"{n}?", "yes") for n in range(30)])
    options = ("--chat", f"--chat-template={TEMPLATES / 'marked.jinja'}", "--workers=1")
    raw = tmp_path / "a.jsonl"
    assert prepare(tmp_path / "out", raw, *options, "--held-out-fraction=0.3") == 0
    both = {str(chats): 1, str(tmp_path / "out"): 1}
    with pytest.raises(ConfigError, match="its dialogues are written by 2 chat templates"):
        load_corpus(DataConfig(corpus=both, sequence_length=64))


def test_a_folder_that_holds_out_nothing_to_learn_is_refused(tmp_path: Path) -> None:
    write_chats(tmp_path / "a.jsonl", [dialogue("a", "b")])
    options = ("--chat", f"--chat-template={TEMPLATES / 'marked.jinja'}", "--workers=1")
    assert prepare(tmp_path / "out", tmp_path / "a.jsonl", *options) == 0
    with pytest.raises(ConfigError, match="has no token to predict for evaluation"):
        load_corpus(DataConfig(corpus=str(tmp_path / "out"), sequence_length=64))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FAULTS = {
    "missing mask": ("training-00001.mask", Path.unlink, "cannot read it: No such file"),
    "cut mask": ("training-00001.mask", lambda x: os.truncate(x, 9), "9 bytes instead of"),
    "flipped bit of the mask": ("training-00001.mask", flip, "the checksum of bytes 0 to"),
    "flipped bit of the index": ("training-00001.index", flip, "its checksum is another"),
    "missing template": ("chat_template.jinja", Path.unlink, "cannot read it: No such file"),
    "changed template": ("chat_template.jinja", flip, "damaged: its checksum is another"),
}


def read_everything(folder: Path) -> None:
    corpus = load_corpus(DataConfig(corpus=str(folder), sequence_length=64))
    (sequences,) = Sequences(corpus.training, 64).sources
    for n in range(len(sequences)):
        sequences[n]


@pytest.mark.parametrize("fault", FAULTS)
def test_damage_is_one_line_that_names_the_file(chats: Path, tmp_path: Path, fault: str) -> None:
    damage: Callable[[Path], None]
    name, damage, message = FAULTS[fault]
    for file, content in contents(chats).items():
        (tmp_path / file).write_bytes(content)
    damage(tmp_path / name)
    with pytest.raises(DataError, match=message) as error:
        read_everything(tmp_path)
    assert str(tmp_path / name) in str(error.value)
