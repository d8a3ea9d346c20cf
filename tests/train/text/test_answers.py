"""`nha eval` on questions: how often a model gives the answer."""

import json
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

import nha_jax
from nha_jax.tokenizer.as_bytes import ByteTokenizer
from tests.support.train.tiny_run import Nha
from train.cli import main
from train.data.questions import QUESTION_KINDS, Questions
from train.data.recall import EVALUATION
from train.errors import ConfigError
from train.loop.tasks import task_sequences
from train.text.answers import measure_answers
from train.text.loading import load_model

BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def model() -> nha_jax.Model:
    config = nha_jax.ModelConfig(
        vocab_size=257,
        num_layers=1,
        hidden_size=16,
        num_query_heads=1,
        num_slots=4,
        window_size=4,
        dtype="float32",
        remat="none",
    )
    return nha_jax.Model(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def saved(model: nha_jax.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers") / "model"
    nha_jax.save(folder, model)
    return folder


def test_answers_are_those_of_one_forward(model: nha_jax.Model) -> None:
    kind = QUESTION_KINDS["copy"]
    found = measure_answers(model, BYTES, kind, [16, 64], [1], count=2, batch_size=2)
    right, bits = [], []
    for number in range(2):
        written = Questions(kind, 1, BYTES).write(64, EVALUATION, number)
        padded = np.pad(written.tokens, (0, 64 - len(written.tokens)))
        logits = np.asarray(model(padded[None])[0], np.float64)
        places = np.arange(written.answer_start, len(written.tokens)) - 1
        right.append(logits[places].argmax(-1) == written.answer)
        shifted = logits[places] - logits[places].max(-1, keepdims=True)
        nats = np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(len(places)), written.answer]
        bits.append(nats / np.log(2))
    # Nothing fits 16 tokens.
    assert found.whole == {64: {1: np.mean([x.all() for x in right])}}
    assert found.tokens[64][1] == pytest.approx(np.concatenate(right).mean())
    assert found.bits[64][1] == pytest.approx(np.concatenate(bits).mean(), rel=1e-5)


def test_where_nothing_fits_it_is_one_line(model: nha_jax.Model) -> None:
    with pytest.raises(ConfigError, match=r"^--tasks=keys: keys:4: it takes .* room for 50$"):
        measure_answers(model, BYTES, QUESTION_KINDS["keys"], [50], [2, 4], count=1, batch_size=1)


@pytest.mark.slow
def test_the_command_prints_writes_and_draws(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    haystack = tmp_path / "haystack.txt"
    haystack.write_text("Hay is dry. So is straw!\nGrass is not.")
    options = ["--lengths=160", "--loads=0,100", "--limit=2", f"--haystack={haystack}"]
    output = tmp_path / "found.json"
    arguments = ["eval", str(saved), "--tasks=needle", *options, f"--output={output}"]
    assert main([*arguments, "--read-twice"]) == 0
    assert "| tokens / depth in percent | 0 | 100 |" in capsys.readouterr().out
    found = json.loads(output.read_text())["needle"]
    assert found["read_twice"] is True
    assert found["examples"] == 2
    for name in ("accuracy", "token_accuracy", "bits_per_token"):
        assert list(found[name]["160"]) == ["0", "100"]
    assert (tmp_path / "found_needle.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lengths=x"], "--lengths = 'x': expected numbers, e.g. 64,128"),
        (["--loads=101"], "needle: depth in percent = 101: expected 0 to 100"),
        (["--haystack=nowhere"], "--haystack = 'nowhere': No such file"),
        (["--read-twice", "--chat"], "--read-twice: not with --chat"),
    ],
)
def test_what_cannot_be_asked_is_one_line(
    saved: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["eval", str(saved), "--tasks=needle", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_run_asks_them_in_its_sequences(nha: Nha) -> None:
    config = nha.config(
        data__sequence_length=256,
        evaluation__tasks=["needle", "copy:1"],
        evaluation__task_examples=3,
    )
    made = task_sequences(config, BYTES)
    assert list(made) == ["needle:50", "copy:1"]
    assert [len(sequences) for sequences in made.values()] == [3, 3]
    row = made["copy:1"].sources[0][0]
    written = Questions.parse("copy:1", BYTES).write(256, EVALUATION, 0)
    np.testing.assert_array_equal(row["targets"][row["loss_mask"]], written.answer)
    for task, message in (("keys:99", "keys:99: it takes"), ("x", "there is no task 'x'")):
        with pytest.raises(ConfigError, match=rf"^evaluation\.tasks: {message}"):
            task_sequences(nha.config(evaluation__tasks=[task]), BYTES)


@pytest.mark.slow
def test_a_run_reports_them_at_its_evaluations(nha: Nha) -> None:
    asked = ["--evaluation.tasks=[copy:1]", "--evaluation.task_examples=3"]
    nha.train("--steps=20", "--data.sequence_length=48", *asked)
    (row,) = (row for row in nha.rows() if "held_out_bits_per_byte" in row)
    found = measure_answers(
        load_model(nha.run), BYTES, QUESTION_KINDS["copy"], [48], [1], count=3, batch_size=3
    )
    assert row["answers/copy:1"] == found.whole[48][1]
    assert row["answer_tokens/copy:1"] == pytest.approx(found.tokens[48][1])
    assert 0 < row["held_out_accuracy"] < 1
