"""`nha data questions`: JSON lines to learn from."""

import json
from pathlib import Path

import pytest

from nha_jax.tokenizer.as_bytes import ByteTokenizer
from train.cli import main
from train.data.questions import Questions
from train.data.recall import EVALUATION, TRAINING

ARGUMENTS = ["--length=300", "--count=5", "--seed=3"]


def test_tasks_take_turns_and_are_not_those_of_evaluations(tmp_path: Path) -> None:
    out = tmp_path / "new" / "questions.jsonl"
    assert main(["data", "questions", str(out), "needle", "keys:2", *ARGUMENTS]) == 0
    lines = out.read_text().splitlines()
    assert len(lines) == 5
    tasks = [Questions.parse(name, ByteTokenizer()) for name in ("needle", "keys:2")]
    for number, line in enumerate(lines):
        task = tasks[number % 2]
        prompt, answer = task.write(300, TRAINING, 3, number).question
        assert json.loads(line) == {"prompt": prompt, "completion": answer}
        assert task.write(300, EVALUATION, number).question.answer != answer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x"], "there is no task 'x'; there are needle, "),
        (["keys:40"], "keys:40: it takes"),
        (["needle", "--seed=-1"], "--seed = -1: must be at least 0"),
        (["needle", "--tokenizer=nowhere"], "--tokenizer = "),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    out = tmp_path / "new" / "questions.jsonl"
    assert main(["data", "questions", str(out), *ARGUMENTS, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
