"""Shards that an earlier version prepared are read, found finished, and gone on with."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.support.paths import FIXTURES
from tests.support.train.raw_files import contents, prepare
from train.config import DataConfig
from train.data.corpus import load_corpus
from train.data.held_out import is_document_held_out
from train.data.prepared_folder import PreparedFolder

OPTIONS = ("--held-out-fraction=0.3", "--shard-bytes=300", "--workers=1")


@pytest.fixture
def before(tmp_path: Path) -> Path:
    """A copy of the folder, its raw files as old as they were."""
    folder = shutil.copytree(FIXTURES / "shards_before", tmp_path / "before")
    for path in (folder / "raw").iterdir():
        os.utime(path, ns=(10**18, 10**18))
    return folder


def tokenizer_option(folder: Path, name: str) -> list[str]:
    return [f"--tokenizer={folder / 'bpe' / 'tokenizer.json'}"] if name == "bpe" else []


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_every_document_is_read(before: Path, name: str) -> None:
    prepared = PreparedFolder.open(before / name)
    texts = [path.read_text() for path in sorted((before / "raw").iterdir())]
    for split, held_out in ((prepared.training, False), (prepared.held_out, True)):
        expected = [text for text in texts if is_document_held_out(text, 0.3) == held_out]
        assert split.text(10**6).decode() == "".join(expected)
        assert split.num_documents == len(expected)
        tokens, document = split.read(0, len(split)), split.documents(0, len(split))
        last = np.flatnonzero(np.diff(document, append=len(expected)))
        assert set(tokens[last].tolist()) == {prepared.tokenizer.end_token}


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_it_is_found_finished(before: Path, name: str) -> None:
    files = {path: (path.read_bytes(), path.stat()) for path in (before / name).iterdir()}
    option = tokenizer_option(before, name)
    assert prepare(before / name, before / "raw" / "*.txt", *OPTIONS, *option) == 0
    assert set((before / name).iterdir()) == set(files)
    for path, (content, status) in files.items():
        assert path.read_bytes() == content
        assert path.stat().st_mtime_ns == status.st_mtime_ns


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_todays_are_the_same_byte_for_byte(before: Path, name: str) -> None:
    option = tokenizer_option(before, name)
    assert prepare(before / "today", before / "raw" / "*.txt", *OPTIONS, *option) == 0
    assert contents(before / "today") == contents(before / name)


def test_one_that_was_stopped_goes_on(before: Path) -> None:
    first = before / "stopped" / "training-00000.tokens"
    made = first.stat().st_mtime_ns
    assert prepare(before / "stopped", before / "raw" / "*.txt", *OPTIONS) == 0
    assert contents(before / "stopped") == contents(before / "bytes")
    assert first.stat().st_mtime_ns == made


def test_the_corpus_has_the_fingerprint_it_had(before: Path) -> None:
    """Checkpoints and search files of before name it."""
    corpus = load_corpus(DataConfig(corpus=str(before / "bytes"), sequence_length=16))
    assert corpus.fingerprint == "27f3c6cf200d055d"
