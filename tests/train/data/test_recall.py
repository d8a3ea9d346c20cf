"""Multi-query associative recall: how examples are drawn, and a corpus of them."""

import numpy as np
import pytest

from tests.support.train.tiny_run import Nha
from train.cli import main
from train.config import DataConfig
from train.data.batches import Sequences, training_batches
from train.data.corpus import load_corpus
from train.data.recall import Mqar
from train.errors import ConfigError


def test_an_example_is_pairs_and_then_each_key_once() -> None:
    task = Mqar(pairs=8, vocabulary=64)
    for number in range(50):
        tokens, targets, asked = task.draw(64, number)
        keys, values = tokens[:16:2], tokens[1:16:2]
        assert len(set(keys.tolist())) == len(set(values.tolist())) == 8
        assert keys.min() >= 1
        assert keys.max() < 32 <= values.min()
        assert values.max() < 64
        places = np.flatnonzero(asked)
        assert len(places) == 8
        assert places.min() >= 16
        assert not (places % 2).any()
        value_of = dict(zip(keys.tolist(), values.tolist(), strict=True))
        assert sorted(tokens[places].tolist()) == sorted(keys.tolist())
        assert [value_of[key] for key in tokens[places].tolist()] == targets[places].tolist()
        assert not targets[~asked].any()


def test_queries_stand_where_the_power_law_says() -> None:
    """The first of two queries: P(distance) is proportional to (i + 1) ** (a - 1)."""
    task, count = Mqar(pairs=1, vocabulary=64, power=0.01), 4000
    places = [int(np.flatnonzero(task.draw(12, n).asked)[0]) for n in range(count)]
    found = np.bincount((np.array(places) - 2) // 2, minlength=5) / count
    wanted = np.arange(1, 6) ** -0.99
    np.testing.assert_allclose(found, wanted / wanted.sum(), atol=0.03)


def test_what_is_between_is_drawn_from_the_whole_vocabulary() -> None:
    task = Mqar(pairs=2, vocabulary=16)
    draws = [task.draw(64, n) for n in range(100)]
    between = np.concatenate([x.tokens[4:][~x.asked[4:]] for x in draws])
    assert (np.bincount(between, minlength=16) > 0.03 * len(between)).all()


def test_examples_depend_on_their_number_and_purpose_alone() -> None:
    corpus = load_corpus(DataConfig(corpus="mqar:pairs=4,vocabulary=64", sequence_length=32))
    training, held_out = (Sequences(split, 32) for split in (corpus.training, corpus.held_out))
    again = Sequences(corpus.training, 32).sources[0][7]
    first = training.sources[0][7]
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name])
    assert (first["tokens"] != held_out.sources[0][7]["tokens"]).any()
    assert (first["tokens"] != training.sources[0][8]["tokens"]).any()
    assert len(training) == 100_000
    batch = next(training_batches(training, 4, seed=0, first=5))
    assert batch["loss_mask"].sum(axis=1).tolist() == [4] * 4
    assert corpus.held_out.bytes_per_target == 1  # bits per byte are bits an answer


@pytest.mark.parametrize(
    ("corpus", "length", "message"),
    [
        ("mqar:pears=4", 32, "'pears' is unknown; there are pairs, vocabulary, examples, power"),
        ("mqar:pairs=four", 32, "pairs = 'four': expected a number"),
        ("mqar:pairs=0", 32, "pairs = 0: expected at least 1"),
        ("mqar:vocabulary=65", 32, "vocabulary = 65: expected an even number above 16"),
        ("mqar:power=2", 32, "power = 2.0: expected above 0, at most 1"),
        ("mqar:pairs=9", 34, "data.sequence_length = 34: expected an even number of at least 36"),
        ("mqar", 33, "data.sequence_length = 33: expected an even number of at least 32"),
    ],
)
def test_a_task_that_cannot_be_drawn_is_named(corpus: str, length: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_corpus(DataConfig(corpus=corpus, sequence_length=length))


@pytest.mark.slow
def test_a_model_learns_what_values_are(nha: Nha) -> None:
    """In 120 steps of tiny batches it learns that values are of the vocabulary's upper half."""
    corpus = "mqar:pairs=1,vocabulary=16,examples=512"
    nha.train(f"--data.corpus={corpus}", "--data.sequence_length=8", "--sample.prompt=3 9 3")
    rows = nha.rows()
    assert rows[-1]["held_out_bits_per_byte"] < 3.3 < rows[0]["loss"] / np.log(2)
    assert main(["eval", str(nha.run), "--tasks=mqar", "--lengths=4", "--pairs=1"]) == 0
