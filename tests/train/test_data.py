"""Corpora, windows and batches."""

from pathlib import Path

import numpy as np
import pytest

from train.corpus import END_OF_DOCUMENT, Documents, is_held_out, load_corpus
from train.data import Windows, evaluation_batches, training_batches
from train.sections import DataConfig


def documents(*lengths: int) -> Part:
    """Documents of these lengths, end tokens included, of tokens 0, 1, 2, ..."""
    return Documents(
        names=tuple(f"{number}" for number in range(len(lengths))),
        tokens=np.arange(sum(lengths), dtype=np.uint16),
        ends=np.cumsum(lengths),
    )


def test_windows_know_their_documents() -> None:
    windows = Windows(documents(3, 2, 4), sequence_length=4)
    assert len(windows) == 2
    first, last = windows[0], windows[1]
    assert first["tokens"].tolist() == [0, 1, 2, 3]
    assert first["targets"].tolist() == [1, 2, 3, 4]
    assert first["segment_ids"].tolist() == [1, 1, 1, 2]
    assert first["loss_mask"].tolist() == [True, True, False, True]
    # The last token of a window is the first of the next.
    assert last["tokens"].tolist() == [4, 5, 6, 7]
    assert last["segment_ids"].tolist() == [1, 2, 2, 2]
    assert last["loss_mask"].tolist() == [False, True, True, True]


def test_the_last_window_is_padded() -> None:
    last = Windows(documents(6), sequence_length=4)[1]
    assert last["tokens"].tolist() == [4, 5, 0, 0]
    assert last["segment_ids"].tolist() == [1, 1, 0, 0]
    assert last["loss_mask"].tolist() == [True, False, False, False]


@pytest.mark.parametrize("length", [2, 3, 5, 8, 64])
def test_every_token_but_a_documents_first_is_a_target_once(length: int) -> None:
    stream = documents(5, 1, 9, 2, 14)
    windows = Windows(stream, length)
    targets = np.concatenate(
        [windows[n]["targets"][windows[n]["loss_mask"]] for n in range(len(windows))]
    )
    first = {0, *stream.ends.tolist()}
    assert sorted(targets.tolist()) == [token for token in range(31) if token not in first]


def test_batch_is_a_function_of_its_index() -> None:
    windows = Windows(documents(100), 4)
    stream = training_batches(windows, batch_size=3, seed=7, first=0)
    batches = [next(stream) for _ in range(40)]
    for first in (0, 1, 17, 39):
        resumed = next(training_batches(windows, batch_size=3, seed=7, first=first))
        for name, array in resumed.items():
            np.testing.assert_array_equal(array, batches[first][name])
    other = next(training_batches(windows, batch_size=3, seed=8, first=0))
    assert (other["tokens"] != batches[0]["tokens"]).any()


def test_each_epoch_covers_everything_in_another_order() -> None:
    windows = Windows(documents(101), 4)  # 25 windows, five batches of five
    stream = training_batches(windows, batch_size=5, seed=0, first=0)
    epochs = [np.concatenate([next(stream)["tokens"][:, 0] for _ in range(5)]) for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(0, 100, 4))
    assert (epochs[0] != epochs[1]).any()
    assert (epochs[1] != epochs[2]).any()


def test_evaluation_windows_are_spread_and_padded() -> None:
    windows = Windows(documents(101), 4)
    batches = list(evaluation_batches(windows, batch_size=4, count=6))
    assert [batch["tokens"].shape for batch in batches] == [(4, 4), (4, 4)]
    starts = np.concatenate([batch["tokens"][:, 0] for batch in batches])
    assert starts[:6].tolist() == [0, 20, 40, 56, 76, 96]
    assert not batches[1]["loss_mask"][2:].any()
    everything = list(evaluation_batches(windows, batch_size=4, count=1000))
    assert sum(int(batch["loss_mask"].sum()) for batch in everything) == 100


def test_corpus_is_split_by_file(corpus: Path) -> None:
    config = DataConfig(corpus=str(corpus), sequence_length=8, held_out_fraction=0.2)
    loaded = load_corpus(config)
    training, held_out = set(loaded.training.names), set(loaded.held_out.names)
    assert training | held_out == {path.name for path in corpus.iterdir()}
    assert not training & held_out
    assert held_out == {name for name in training | held_out if is_held_out(name, 0.2)}
    name = loaded.held_out.names[0]
    content = (corpus / name).read_bytes()
    tokens = loaded.held_out.tokens[: loaded.held_out.ends[0]]
    assert bytes(tokens[:-1].tolist()) == content
    assert tokens[-1] == END_OF_DOCUMENT
    assert loaded.held_out.text.startswith(content)


def test_glob_and_folder_are_the_same_corpus(corpus: Path) -> None:
    by_folder = load_corpus(DataConfig(corpus=str(corpus), sequence_length=8))
    by_glob = load_corpus(DataConfig(corpus=f"{corpus}/*.txt", sequence_length=8))
    assert by_folder.fingerprint == by_glob.fingerprint


def test_fingerprint_follows_the_content(corpus: Path, tmp_path: Path) -> None:
    for path in corpus.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = DataConfig(corpus=str(tmp_path), sequence_length=8)
    before = load_corpus(config).fingerprint
    (tmp_path / "file_03.txt").write_text("changed")
    assert load_corpus(config).fingerprint != before


def test_standard_library() -> None:
    loaded = load_corpus(DataConfig(corpus="stdlib", sequence_length=8))
    assert "argparse.py" in loaded.training.names + loaded.held_out.names
    assert not any(
        name.startswith(("site-packages/", "encodings/")) for name in loaded.training.names
    )
    assert 0.01 < len(loaded.held_out.tokens) / len(loaded.training.tokens) < 0.2
