"""Mixtures whose weights change at given steps: shares, epochs, resuming, and the configuration."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.train.raw_files import json_lines, prepare
from train.config import DataConfig
from train.data.batches import Batch, Sequences, evaluation_batches, training_batches
from train.data.corpus import load_corpus
from train.data.mixture import MixtureInPhases

BATCH_SIZE, STEPS = 8, 40

SCHEDULE = {
    0: {"first": 1.0},
    10: {"first": 0.5, "second": 0.25, "third": 0.25},
    25: {"second": 0.0, "third": 3.0},
    30: {"first": 1.0, "second": 3.0},
}
PER_PHASE = [(80, 0, 0), (60, 30, 30), (0, 0, 40), (20, 60, 0)]
"""How many sequences of the 8 in each step come from each folder in each phase, up to STEPS."""


@st.composite
def phases(draw: st.DrawFn) -> dict[int, list[float]]:
    sources = draw(st.integers(1, 4))
    weight = st.one_of(st.just(0.0), st.floats(0.001, 1))
    weights = st.lists(weight, min_size=sources, max_size=sources).filter(any)
    later = draw(st.lists(st.integers(1, 200), max_size=3, unique=True))
    return {first: draw(weights) for first in [0, *later]}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(phases=phases())
def test_each_phase_has_its_shares_and_each_source_goes_on_where_it_was(
    phases: dict[int, list[float]],
) -> None:
    mixture = MixtureInPhases(phases)
    counts = np.zeros(len(phases[0]), int)
    for first, stop in itertools.pairwise([*sorted(phases), 250]):
        before = counts.copy()
        for n in range(first, stop):
            source, index = mixture[n]
            assert phases[first][source] > 0
            assert index == counts[source]  # no sequence is left out or drawn twice
            counts[source] += 1
        exact = np.array(phases[first]) / sum(phases[first]) * (stop - first)
        assert np.abs(counts - before - exact).max() < len(counts)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Three folders, of 30, 50 and 8 documents or a few less, one a sequence."""
    folder = tmp_path_factory.mktemp("mixture")
    paths = {}
    for name, documents in (("first", 30), ("second", 50), ("third", 8)):
        texts = [f"{name[0]}{n:02}" for n in range(documents)]
        (folder / f"{name}.jsonl").write_bytes(json_lines(texts))
        paths[name] = str(folder / name)
        arguments = ["--held-out-fraction=0.2", "--workers=1"]
        assert prepare(folder / name, folder / f"{name}.jsonl", *arguments) == 0
    schedule = {
        step: {paths[name]: weight for name, weight in weights.items()}
        for step, weights in SCHEDULE.items()
    }
    corpus = {paths["first"]: 2.0, paths["second"]: 1.0, paths["third"]: 1.0}
    return DataConfig(corpus=corpus, sequence_length=4, mixture_schedule=schedule)


def batches(config: DataConfig, first: int, count: int, rows=None) -> list[Batch]:
    sequences = Sequences(load_corpus(config).training, config.sequence_length)
    return list(itertools.islice(training_batches(sequences, BATCH_SIZE, 3, first, rows), count))


@pytest.fixture(scope="module")
def whole(config: DataConfig) -> list[Batch]:
    """What an undisturbed run draws."""
    return batches(config, 0, STEPS)


def test_the_folders_of_a_mixture_are_drawn_from_by_the_weights_of_their_phase(
    whole: list[Batch],
) -> None:
    drawn = np.concatenate([batch["tokens"][:, 0] for batch in whole])
    for (start, stop), expected in zip(
        itertools.pairwise([*SCHEDULE, STEPS]), PER_PHASE, strict=True
    ):
        phase = drawn[start * BATCH_SIZE : stop * BATCH_SIZE]
        assert tuple((phase == ord(letter)).sum() for letter in "fst") == expected


def test_each_folder_has_its_own_epochs_through_all_changes(
    config: DataConfig, whole: list[Batch]
) -> None:
    drawn = np.concatenate([batch["tokens"] for batch in whole])
    training = load_corpus(config).training
    for letter, source in zip("fst", training.sources, strict=True):
        mine = [bytes(row[:3].tolist()) for row in drawn if row[0] == ord(letter)]
        size = source.num_documents
        epochs = [mine[n : n + size] for n in range(0, len(mine), size)]
        assert len(epochs) >= 2
        for epoch in epochs[:-1]:
            assert len(set(epoch)) == size
        assert len(set(epochs[-1])) == len(epochs[-1])
        assert epochs[0] != epochs[1]


@pytest.mark.parametrize("first", [9, 10, 25, 39])
def test_a_resumed_run_draws_what_an_undisturbed_one_does(
    config: DataConfig, whole: list[Batch], first: int
) -> None:
    count = min(4, STEPS - first)
    for resumed, batch in zip(batches(config, first, count), whole[first : first + 4], strict=True):
        for name, array in batch.items():
            np.testing.assert_array_equal(resumed[name], array)


@pytest.mark.parametrize("processes", [2, 8])
def test_each_process_has_its_rows_of_the_batch_in_every_phase(
    config: DataConfig, whole: list[Batch], processes: int
) -> None:
    rows = np.arange(BATCH_SIZE).reshape(processes, -1)
    parts = [batches(config, 8, 25, rows[process]) for process in (0, processes - 1)]
    for n, batch in enumerate(whole[8:33]):
        for name, array in batch.items():
            for part, mine in zip(parts, (rows[0], rows[-1]), strict=True):
                np.testing.assert_array_equal(part[n][name], array[mine])


def test_evaluations_and_what_comes_before_the_schedule_have_the_weights_of_the_corpus(
    config: DataConfig,
) -> None:
    late = dataclasses.replace(config, mixture_schedule={30: {next(iter(config.corpus)): 1.0}})
    none = dataclasses.replace(config, mixture_schedule=None)
    before, after = batches(late, 0, 31), batches(none, 0, 31)
    for one, other in zip(before[:30], after[:30], strict=True):
        np.testing.assert_array_equal(one["tokens"], other["tokens"])
    assert set(before[30]["tokens"][:, 0]) == {ord("f")}
    assert len(set(after[30]["tokens"][:, 0])) == 3
    for chosen in (config, none):
        held_out = Sequences(load_corpus(chosen).held_out, 4)
        assert held_out.weights == (0.5, 0.25, 0.25)
        tokens = np.concatenate([x["tokens"][:, 0] for x in evaluation_batches(held_out, 4, 4)])
        assert sorted(tokens.tolist()) == sorted(map(ord, "ffst"))


def test_bytes_of_a_target_are_those_of_the_phase(config: DataConfig) -> None:
    training = load_corpus(config).training
    one = dataclasses.replace(training, sources=training.sources[:2], weights=(0.5, 0.5))
    two_tokens = dataclasses.replace(one, schedule=((3, (1.0, 0.0)), (5, (0.25, 0.75))))
    each = [
        dataclasses.replace(one, weights=weights).bytes_per_target for weights in ((1, 0), (0, 1))
    ]
    assert [two_tokens.bytes_per_target_at(step) for step in (0, 2, 3, 4, 5, 99)] == pytest.approx(
        [np.dot(shares, each) for shares in [(0.5, 0.5)] * 2 + [(1, 0)] * 2 + [(0.25, 0.75)] * 2]
    )


@pytest.mark.parametrize(
    ("corpus", "schedule", "message"),
    [
        (
            "text",
            {0: {"text": 1.0}},
            "mixture_schedule.0 = {'text': 1.0}: expected weights of fold",
        ),
        (
            {"a": 1.0},
            {5: {"b": 1.0}},
            "mixture_schedule.5 = {'b': 1.0}: expected weights of folders",
        ),
        (
            {"a": 1.0},
            {-1: {"a": 1.0}},
            "mixture_schedule.-1 = {'a': 1.0}: expected a number of step",
        ),
        ({"a": 1.0}, {2**31: {"a": 1.0}}, "expected a number of steps"),
        (
            {"a": 1.0},
            {0: {}},
            "mixture_schedule.0 = {}: expected finite weights of 0 or more, not a",
        ),
        ({"a": 1.0}, {0: {"a": 0.0}}, "not all of them 0"),
        ({"a": 1.0}, {0: {"a": -1.0}}, "expected finite weights"),
        ({"a": 1.0}, {0: {"a": float("nan")}}, "expected finite weights"),
        ({"a": 1.0, "b": 1.0}, {0: {"a": 1e308, "b": 1e308}}, "expected finite weights"),
        ({"a": 1e308, "b": 1e308}, None, "expected a finite weight above 0"),
    ],
)
def test_a_wrong_schedule_is_said(corpus, schedule, message: str) -> None:
    with pytest.raises(ValueError, match="expected") as error:
        DataConfig(corpus=corpus, sequence_length=4, mixture_schedule=schedule)
    assert message in str(error.value)
