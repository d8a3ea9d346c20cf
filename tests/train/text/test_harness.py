"""Models under lm-evaluation-harness, on local tasks of each of its kinds of request."""

import json
import math
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

import nha_jax
from nha_jax.tokenizer.as_bytes import END_OF_DOCUMENT
from tests.support.paths import ROOT
from train.cli import main

pytestmark = pytest.mark.slow

TASKS = ("nha_choice", "nha_last_word", "nha_rolling", "nha_contains")

DATA = {
    "choice": [
        {"query": "the sky is", "choices": ["blue", "a fish", "7"], "gold": 0},
        {"query": "two and two are", "choices": ["five", "four"], "gold": 1},
        {"query": "x", "choices": ["y", "zz zz"], "gold": 1},
    ],
    "last_word": [
        {"text": "she opened the door with a", "word": " key"},
        {"text": "def", "word": " f"},
    ],
    "rolling": [{"text": "a text that is read whole. " * 40}, {"text": "short"}],
    "contains": [{"text": "say b:", "value": "b"}, {"text": "name:", "value": "Ada"}],
}


@pytest.fixture(scope="module")
def model() -> nha_jax.Model:
    pytest.importorskip("lm_eval")
    config = nha_jax.ModelConfig(
        vocab_size=257, hidden_size=32, num_layers=2, num_query_heads=2, num_slots=8,
        window_size=(8, None), mlp_size=64, initializer_range=0.3, dtype="float32",
    )  # fmt: skip
    return nha_jax.Model(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def found(model: nha_jax.Model, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What `nha eval` writes, with the folders of the model and of the tasks."""
    folder = tmp_path_factory.mktemp("eval")
    nha_jax.save(folder / "model", model)
    tasks = folder / "tasks"
    shutil.copytree(ROOT / "tests" / "support" / "eval_tasks", tasks)
    for name, rows in DATA.items():
        (tasks / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for file in tasks.glob("*.yaml"):
        file.write_text(file.read_text().replace("DATA", str(tasks)))
    command = ["eval", str(folder / "model"), f"--tasks={','.join(TASKS)}"]
    assert main([*command, f"--include-path={tasks}"]) == 0
    written = json.loads((folder / "model" / "eval.json").read_text())
    return {"model": folder / "model", "tasks": tasks, "results": written["results"]}


def log_probabilities(model: nha_jax.Model, context: list[int], text: str) -> np.ndarray:
    """By one forward over all of it."""
    tokens = np.array([*context, *text.encode()])
    logits = np.asarray(jax.jit(nha_jax.Model.__call__)(model, tokens[None])[0])
    every = np.asarray(jax.nn.log_softmax(logits))[len(context) - 1 : -1]
    return every[np.arange(len(text.encode())), tokens[len(context) :]]


def test_choices_are_those_of_a_forward(model: nha_jax.Model, found: dict) -> None:
    right = right_by_byte = 0
    for row in DATA["choice"]:
        query = list(row["query"].encode())
        sums = np.array([log_probabilities(model, query, f" {x}").sum() for x in row["choices"]])
        right += sums.argmax() == row["gold"]
        right_by_byte += (sums / [len(x) for x in row["choices"]]).argmax() == row["gold"]
    result = found["results"]["nha_choice"]
    assert result["acc,none"] == pytest.approx(right / 3)
    assert result["acc_norm,none"] == pytest.approx(right_by_byte / 3)


def test_last_words_are_those_of_a_forward(model: nha_jax.Model, found: dict) -> None:
    sums = [
        log_probabilities(model, list(row["text"].encode()), row["word"]).sum()
        for row in DATA["last_word"]
    ]
    perplexity = found["results"]["nha_last_word"]["perplexity,none"]
    assert math.log(perplexity) == pytest.approx(-np.mean(sums), abs=1e-5)


def test_texts_are_read_whole(model: nha_jax.Model, found: dict) -> None:
    texts = [row["text"] for row in DATA["rolling"]]
    total = sum(log_probabilities(model, [END_OF_DOCUMENT], text).sum() for text in texts)
    count = sum(len(text.encode()) for text in texts)
    bits = found["results"]["nha_rolling"]["bits_per_byte,none"]
    assert bits == pytest.approx(-total / count / math.log(2), abs=1e-5)


def test_what_is_written_is_what_generate_writes(model: nha_jax.Model, found: dict) -> None:
    contained = []
    for row in DATA["contains"]:
        tokens = nha_jax.generate(model, row["text"], max_new_tokens=12, temperature=0)
        text = bytes(token for token in tokens if token < 256).decode(errors="replace")
        contained.append(row["value"].lower() in text.split("\n")[0].lower())
    assert found["results"]["nha_contains"]["contains,none"] == np.mean(contained)


def test_contexts_may_be_read_twice(model: nha_jax.Model, found: dict) -> None:
    output = found["tasks"] / "twice.json"
    command = ["eval", str(found["model"]), "--tasks=nha_last_word", "--read-twice"]
    assert main([*command, f"--include-path={found['tasks']}", f"--output={output}"]) == 0
    results = json.loads(output.read_text())["results"]
    sums = []
    for row in DATA["last_word"]:
        context = list(f"{row['text']}\n{row['text']}".encode())
        sums.append(log_probabilities(model, context, row["word"]).sum())
    perplexity = math.exp(-np.mean(sums))
    assert results["nha_last_word"]["perplexity,none"] == pytest.approx(perplexity, rel=1e-5)
    once = found["results"]["nha_last_word"]["perplexity,none"]
    assert once != pytest.approx(perplexity, rel=1e-3)


def test_the_harness_itself_says_the_same(found: dict) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    import train.text.harness  # noqa: F401, which the harness finds the model in

    again = lm_eval.simple_evaluate(
        model="nha",
        model_args=f"path={found['model']},batch_size=2",
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(found["tasks"]), include_defaults=False),
    )
    for task, numbers in found["results"].items():
        for name, number in numbers.items():
            if isinstance(number, float):
                assert again["results"][task][name] == pytest.approx(number, rel=1e-5), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks=no_such_task"], "there is no task 'no_such_task'"),
        (["--tasks=,"], "--tasks = ','"),
        (["--tasks=nha_choice", "--limit=0"], "--limit = 0"),
        (["--tasks=nha_choice", "--chat"], "no chat template; expected chat_template.jinja"),
        (["--tasks=nha_choice", "--windows=3,3,3"], "pattern"),
    ],
)
def test_what_is_wrong_is_one_line(
    found: dict, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    path = f"--include-path={found['tasks']}"
    assert main(["eval", str(found["model"]), path, *arguments]) == 2
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("nha: ")
    assert message in error
