"""`nha eval --tasks mqar`: how often a model recalls."""

import json
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

import nha_jax
from train.cli import main
from train.data.recall import EVALUATION, Mqar, tokenizer_of
from train.text.recall_grid import measure_recall

TASK = Mqar(1, 16)


@pytest.fixture(scope="module")
def model() -> nha_jax.Model:
    config = nha_jax.ModelConfig(
        vocab_size=16, num_layers=1, hidden_size=16, num_query_heads=1, num_slots=4, window_size=2
    )
    return nha_jax.Model(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def saved(model: nha_jax.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recall") / "model"
    nha_jax.save(folder, model, files=tokenizer_of(TASK).files)
    return folder


def test_the_accuracy_is_that_of_the_places_that_are_asked(model: nha_jax.Model) -> None:
    found = measure_recall(model, TASK, [8], [1, 2, 3], count=7, batch_size=3)
    assert {length: list(row) for length, row in found.items()} == {8: [1, 2]}
    hits = []
    for number in range(7):
        tokens, targets, asked = Mqar(2, 16).draw(8, EVALUATION, number)
        hits += (np.asarray(model(tokens[None])[0]).argmax(-1) == targets)[asked].tolist()
    assert found[8][2] == np.mean(hits)


def test_the_command_prints_writes_and_draws(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "found.json"
    options = ["--lengths=8", "--loads=1,2", "--limit=3", f"--output={output}"]
    assert main(["eval", str(saved), "--tasks=mqar", *options]) == 0
    assert "| tokens / pairs | 1 | 2 |" in capsys.readouterr().out
    found = json.loads(output.read_text())["mqar"]
    assert found["vocabulary"] == 16
    assert found["examples"] == 3
    assert list(found["accuracy"]["8"]) == ["1", "2"]
    assert (tmp_path / "found_mqar.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--lengths=4", "--loads=2,3"],
            "--lengths = '4': expected one of at least 8, 4 tokens",
        ),
        (["--loads=200"], "--lengths = '64,128,256,512': expected one of at least 800"),
        (["--lengths=7"], "--lengths = '7': expected even numbers, e.g. 64,128"),
        (["--loads=0"], "--loads = '0': expected numbers, e.g. 64,128"),
        (["--windows=1,2"], "window_size"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    saved: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["eval", str(saved), "--tasks=mqar", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_model_of_text_cannot_write_the_task(
    model: nha_jax.Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nha_jax.save(tmp_path / "model", model)
    assert main(["eval", str(tmp_path / "model"), "--tasks=mqar"]) == 2
    assert "the model's tokenizer does not write the task" in capsys.readouterr().err
