"""Corpora, sequences and batches."""

import itertools
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nha_jax.tokenizer.as_bytes import END_OF_DOCUMENT
from train.config import DataConfig
from train.data.batches import Batch, Sequences, evaluation_batches, training_batches
from train.data.corpus import load_corpus
from train.data.held_out import is_file_held_out
from train.data.mixture import Mixture
from train.data.token_source import Split, TokensInMemory


def stream(lengths: list[int], first: int = 0) -> TokensInMemory:
    """Documents of these lengths, end tokens included, of tokens first, first + 1, ..."""
    return TokensInMemory(
        names=tuple(f"{number}" for number in range(len(lengths))),
        tokens=np.arange(first, first + sum(lengths), dtype=np.uint16),
        ends=np.cumsum(lengths),
    )


def documents(*lengths: int) -> Split:
    """A split of one such stream, from token 0 on."""
    return Split((stream(list(lengths)),))


def test_sequences_know_their_documents() -> None:
    sequences = Sequences(documents(3, 2, 4), sequence_length=4).sources[0]
    assert len(sequences) == 2
    first, last = sequences[0], sequences[1]
    assert first["tokens"].tolist() == [0, 1, 2, 3]
    assert first["targets"].tolist() == [1, 2, 3, 4]
    assert first["segment_ids"].tolist() == [1, 1, 1, 2]
    assert first["loss_mask"].tolist() == [True, True, False, True]
    # The last token of a sequence is the first of the next.
    assert last["tokens"].tolist() == [4, 5, 6, 7]
    assert last["segment_ids"].tolist() == [1, 2, 2, 2]
    assert last["loss_mask"].tolist() == [False, True, True, True]


def test_the_last_sequence_is_padded() -> None:
    last = Sequences(documents(6), sequence_length=4).sources[0][1]
    assert last["tokens"].tolist() == [4, 5, 0, 0]
    assert last["segment_ids"].tolist() == [1, 1, 0, 0]
    assert last["loss_mask"].tolist() == [True, False, False, False]


@pytest.mark.parametrize("length", [2, 3, 5, 8, 64])
def test_every_token_but_a_documents_first_is_a_target_once(length: int) -> None:
    lengths = [5, 1, 9, 2, 14]
    (sequences,) = Sequences(documents(*lengths), length).sources
    targets = np.concatenate(
        [sequences[n]["targets"][sequences[n]["loss_mask"]] for n in range(len(sequences))]
    )
    first = {0, *np.cumsum(lengths).tolist()}
    assert sorted(targets.tolist()) == [token for token in range(31) if token not in first]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=12), length=st.integers(2, 9))
def test_sequences_are_what_their_definition_says(lengths: list[int], length: int) -> None:
    total = sum(lengths)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    (sequences,) = Sequences(documents(*lengths), length).sources
    assert len(sequences) == -(-(total - 1) // length)
    for n in range(len(sequences)):
        sequence = sequences[n]
        for i, position in enumerate(range(n * length, (n + 1) * length)):
            inside, has_target = position < total, position + 1 < total
            assert sequence["tokens"][i] == (position if inside else 0)
            assert sequence["targets"][i] == (position + 1 if has_target else 0)
            segment = owner[position] - owner[n * length] + 1 if inside else 0
            assert sequence["segment_ids"][i] == segment
            same = has_target and owner[position] == owner[position + 1]
            assert sequence["loss_mask"][i] == same


def test_batch_is_a_function_of_its_index() -> None:
    sequences = Sequences(documents(100), 4)
    stream = training_batches(sequences, batch_size=3, seed=7, first=0)
    batches = [next(stream) for _ in range(40)]
    for first in (0, 1, 17, 39):
        resumed = next(training_batches(sequences, batch_size=3, seed=7, first=first))
        for name, array in resumed.items():
            np.testing.assert_array_equal(array, batches[first][name])
    other = next(training_batches(sequences, batch_size=3, seed=8, first=0))
    assert (other["tokens"] != batches[0]["tokens"]).any()


def test_each_epoch_covers_everything_in_another_order() -> None:
    sequences = Sequences(documents(101), 4)  # 25 sequences, five batches of five
    stream = training_batches(sequences, batch_size=5, seed=0, first=0)
    epochs = [np.concatenate([next(stream)["tokens"][:, 0] for _ in range(5)]) for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(0, 100, 4))
    assert (epochs[0] != epochs[1]).any()
    assert (epochs[1] != epochs[2]).any()


def test_an_epoch_ends_inside_of_a_batch_and_a_resumed_run_sees_the_same() -> None:
    sequences = Sequences(documents(101), 4)  # 25 sequences
    batches = training_batches(sequences, batch_size=4, seed=0, first=0)
    whole = [next(batches)["tokens"][:, 0] for _ in range(20)]  # 80: three epochs, and five more
    starts = np.concatenate(whole)
    epochs = [starts[first : first + 25].tolist() for first in (0, 25, 50)]
    assert all(sorted(epoch) == list(range(0, 100, 4)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    for first in (5, 6, 7, 12, 13, 18, 19):
        resumed = training_batches(sequences, batch_size=4, seed=0, first=first)
        np.testing.assert_array_equal(next(resumed)["tokens"][:, 0], whole[first])


def test_a_batch_may_be_larger_than_the_corpus() -> None:
    sequences = Sequences(documents(13), 4)  # 3 sequences
    batches = training_batches(sequences, batch_size=8, seed=0, first=0)
    starts = np.concatenate([next(batches)["tokens"][:, 0] for _ in range(3)])
    for first in range(0, 24, 3):
        assert sorted(starts[first : first + 3].tolist()) == [0, 4, 8]


def test_evaluation_sequences_are_spread_and_padded() -> None:
    sequences = Sequences(documents(101), 4)
    batches = list(evaluation_batches(sequences, batch_size=4, count=6))
    assert [batch["tokens"].shape for batch in batches] == [(4, 4), (4, 4)]
    starts = np.concatenate([batch["tokens"][:, 0] for batch in batches])
    assert starts[:6].tolist() == [0, 20, 40, 56, 76, 96]
    assert not batches[1]["loss_mask"][2:].any()
    everything = list(evaluation_batches(sequences, batch_size=4, count=1000))
    assert sum(int(batch["loss_mask"].sum()) for batch in everything) == 100


@pytest.fixture
def mixed() -> Sequences:
    """Three sources of 30, 50 and 8 sequences of 4 tokens, told apart by their thousands."""
    counts = (30, 50, 8)
    sources = tuple(stream([4 * n + 1], 1000 * i) for i, n in enumerate(counts))
    return Sequences(Split(sources, (0.5, 0.3, 0.2)), 4)


def test_a_mixture_gives_each_source_its_share_and_its_own_epochs(mixed: Sequences) -> None:
    batches = training_batches(mixed, batch_size=10, seed=3, first=0)
    tokens = np.concatenate([next(batches)["tokens"][:, 0] for _ in range(40)])
    for source, (count, sequences) in enumerate([(200, 30), (120, 50), (80, 8)]):
        starts = tokens[tokens // 1000 == source] % 1000 // 4
        assert len(starts) == count
        epochs = [starts[n : n + sequences] for n in range(0, count, sequences)]
        for epoch in epochs[: count // sequences]:
            assert sorted(epoch) == list(range(sequences))
        assert (epochs[0] != epochs[1]).any()


@settings(max_examples=50, deadline=None, derandomize=True)
@given(weights=st.lists(st.floats(0.001, 1), min_size=1, max_size=6), start=st.integers(0, 10**12))
def test_shares_of_a_mixture_are_exact(weights: list[float], start: int) -> None:
    mixture = Mixture(weights)
    counts = np.zeros(len(weights), int)
    for n in range(300):
        source, index = mixture[n]
        assert index == counts[source]  # no sequence is left out or drawn twice
        counts[source] += 1
        exact = np.array(weights) / sum(weights) * (n + 1)
        assert np.abs(counts - exact).max() <= len(weights)
    # Far into a run the same holds: draws of one source follow each other.
    indices: dict[int, list[int]] = {}
    for n in range(start, start + 100):
        source, index = mixture[n]
        indices.setdefault(source, []).append(index)
    for drawn in indices.values():
        assert drawn == list(range(drawn[0], drawn[0] + len(drawn)))


@pytest.mark.parametrize("processes", [1, 2, 8])
@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_processes_together_have_the_batch(mixed: Sequences, kind: str, processes: int) -> None:
    def batches(**options: Any) -> list[Batch]:
        if kind == "evaluation":
            return list(evaluation_batches(mixed, 16, 41, **options))
        return list(itertools.islice(training_batches(mixed, 16, 5, 7, **options), 3))

    whole = batches()
    parts = [
        batches(rows=np.arange(16).reshape(processes, -1)[process]) for process in range(processes)
    ]
    assert len(whole) == 3
    for n, batch in enumerate(whole):
        for name, array in batch.items():
            joined = np.concatenate([part[n][name] for part in parts])
            np.testing.assert_array_equal(joined, array)


def test_evaluation_of_a_mixture_takes_each_by_its_weight(mixed: Sequences) -> None:
    batches = list(evaluation_batches(mixed, batch_size=5, count=20))
    tokens = np.concatenate([batch["tokens"][:, 0] for batch in batches])
    assert np.bincount(tokens // 1000).tolist() == [10, 6, 4]
    assert len(np.unique(tokens)) == 20


@settings(max_examples=50, deadline=None, derandomize=True)
@given(weights=st.lists(st.floats(0.001, 1), min_size=1, max_size=6), count=st.integers(0, 300))
def test_counts_of_a_mixture_are_those_of_its_draws(weights: list[float], count: int) -> None:
    mixture = Mixture(weights)
    drawn = np.bincount([mixture[n][0] for n in range(count)], minlength=len(weights))
    assert mixture.counts(count) == drawn.tolist()


@pytest.mark.parametrize("count", [10**6, 10**12, 2**63, 10**30])
def test_an_evaluation_costs_what_there_is_not_what_is_asked_for(
    mixed: Sequences, count: int
) -> None:
    tracemalloc.start()
    batches = list(evaluation_batches(mixed, batch_size=8, count=count))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    assert len(batches) == len(mixed) / 8
    starts = np.concatenate([batch["tokens"][:, 0] for batch in batches])
    assert len(np.unique(starts)) == len(mixed)


def test_bytes_per_target_of_bytes_is_one() -> None:
    assert documents(3, 2, 4).bytes_per_target == 1
    assert Split((stream([3]), stream([9, 4])), (0.25, 0.75)).bytes_per_target == 1


def test_corpus_is_split_by_file(corpus: Path) -> None:
    config = DataConfig(corpus=str(corpus), sequence_length=8, held_out_fraction=0.2)
    loaded = load_corpus(config)
    (held_out_documents,) = loaded.held_out.sources
    training, held_out = (
        {name for source in split.sources for name in source.names}
        for split in (loaded.training, loaded.held_out)
    )
    assert training | held_out == {path.name for path in corpus.iterdir()}
    assert not training & held_out
    assert held_out == {name for name in training | held_out if is_file_held_out(name, 0.2)}
    name = held_out_documents.names[0]
    content = (corpus / name).read_bytes()
    tokens = held_out_documents.read(0, held_out_documents.ends[0])
    assert bytes(tokens[:-1].tolist()) == content
    assert tokens[-1] == END_OF_DOCUMENT
    assert loaded.held_out.text(10**6).startswith(content)


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
    training, held_out = (split.sources[0].names for split in (loaded.training, loaded.held_out))
    assert "argparse.py" in training + held_out
    assert not any(name.startswith(("site-packages/", "encodings/")) for name in training)
    assert 0.01 < loaded.held_out.num_tokens / loaded.training.num_tokens < 0.2
