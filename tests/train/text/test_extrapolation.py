"""`nha eval --tasks extrapolate`: held-out bits by position, beyond the length of training."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import nha_jax
from tests.support.train.tiny_run import Nha
from train.cli import main
from train.data.corpus import Corpus, load_corpus
from train.errors import ConfigError
from train.step.losses import loss_sum
from train.text.extrapolation import find_long_texts, measure_by_position
from train.text.loading import load_model


@pytest.fixture
def its_corpus(undisturbed: Nha) -> Corpus:
    return load_corpus(undisturbed.config().data)


def test_texts_are_the_beginnings_of_documents_that_are_long_enough(
    undisturbed: Nha, its_corpus: Corpus
) -> None:
    data = dataclasses.replace(undisturbed.config().data, sequence_length=32)
    texts = find_long_texts(its_corpus, data, count=3)
    (source,) = its_corpus.held_out.sources
    starts = [0, *source.document_ends()[:-1]]
    lengths = np.diff([0, *source.document_ends()])
    assert texts.rows.shape == (3, 257)  # documents have about 300 bytes: no room for 512
    long = [start for start, length in zip(starts, lengths, strict=True) if length > 256]
    for row, start in zip(texts.rows, long, strict=False):
        np.testing.assert_array_equal(row, source.read(start, start + 257))


@pytest.mark.slow
def test_bits_are_those_of_one_forward(undisturbed: Nha, its_corpus: Corpus) -> None:
    config = undisturbed.config()
    texts = find_long_texts(its_corpus, config.data, count=2)
    model: nha_jax.Model = load_model(undisturbed.run)
    parts = measure_by_position(model, texts, bytes_per_target=2.0, batch_size=2)
    assert [part[:2] for part in parts] == [(0, 32), (32, 64), (64, 128), (128, 256)]
    for start, stop, bits in parts:
        batch = {
            "tokens": texts.rows[:, :-1],
            "targets": texts.rows[:, 1:],
            "segment_ids": np.ones((2, 256), np.int32),
            "loss_mask": np.tile((start <= np.arange(256)) & (np.arange(256) < stop), (2, 1)),
        }
        total = loss_sum(model, batch)
        wanted = float(total.nats) / int(total.targets) / np.log(2) / 2
        assert bits == pytest.approx(wanted, rel=1e-5)


def test_the_command_prints_writes_and_draws(
    undisturbed: Nha, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "found.json"
    options = ["--tasks=extrapolate", "--limit=2", f"--output={output}"]
    assert main(["eval", str(undisturbed.run), *options]) == 0
    assert "| 128 to 255 | " in capsys.readouterr().out
    found = json.loads(output.read_text())["extrapolate"]
    assert found["documents"] == 2
    assert found["trained_length"] == 32
    assert len(found["by_position"]) == 4
    assert (tmp_path / "found_extrapolate.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_measured_is_one_line(
    undisturbed: Nha, its_corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    data = dataclasses.replace(undisturbed.config().data, sequence_length=200)
    with pytest.raises(ConfigError, match=r"expected more than twice .*, which is 200"):
        find_long_texts(its_corpus, data, count=3)
    assert main(["eval", str(undisturbed.run / "model"), "--tasks=extrapolate"]) == 2
    assert "is no run, which would say the corpus" in capsys.readouterr().err
