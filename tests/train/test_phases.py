"""A run in stages, and windows that shrink: what each step does, and what is no recipe."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import CONFIGS
from tests.support.train.tiny_run import Nha
from train.cli import main
from train.load_config import load_config, validate
from train.phases import phase_at, phases_of, windows_at
from train.stage_config import LossConfig, StageConfig
from train.storage.run_folder import config_values

STAGES = [
    {"name": "layers", "steps": 4, "loss": {"cross_entropy": 0, "z_loss": 0.5}},
    {"name": "text", "steps": 6, "optimizer": {"learning_rate": 0.25}, "trainable": ["head*"]},
]
SCHEDULE = {0: None, 2: 16, 7: 4}


@pytest.fixture
def staged(tmp_path: Path, tiny_values: dict[str, Any]) -> Nha:
    model = tiny_values["model"] | {"window_size": [4, None], "num_layers": 2}
    values = tiny_values | {"stages": STAGES, "model": model | {"window_schedule": SCHEDULE}}
    values = {key: value for key, value in values.items() if key != "steps"}
    return Nha(tmp_path, values | {"optimizer": {"learning_rate": 0.5, "weight_decay": 0}})


def test_a_run_without_stages_is_one_phase_of_its_very_configuration(nha: Nha) -> None:
    config = nha.config()
    (phase,) = phases_of(config)
    assert phase.config is config
    assert (phase.stage, phase.after, phase.last) == (None, 0, config.steps)
    written = config_values(config)
    assert not {"stages", "window_schedule"} & written.keys()
    assert not {"cross_entropy", "attention_transfer"} & written["loss"].keys()


def test_where_all_attention_is_full_there_is_nothing_to_transfer(staged: Nha) -> None:
    config = dataclasses.replace(staged.config(), initial_model="original", stages=())
    both = LossConfig(attention_transfer=1, slot_loss=1)
    phases = phases_of(dataclasses.replace(config, loss=both))
    losses = [(x.config.loss.attention_transfer, x.config.loss.slot_loss) for x in phases]
    assert losses == [(0, 0), (1, 1), (1, 1)]
    alone = LossConfig(attention_transfer=1, cross_entropy=0)
    with pytest.raises(ValueError, match=r"a window from step 0 on, as loss\.attention_transfer"):
        dataclasses.replace(config, loss=alone)
    text, layers = StageConfig(name="a", steps=2), StageConfig(name="b", steps=8, loss=alone)
    assert len(phases_of(dataclasses.replace(config, stages=(text, layers)))) == 3


def test_what_a_step_does_follows_from_the_configuration_and_its_number(staged: Nha) -> None:
    config = staged.config()
    assert config.steps == 10
    phases = phases_of(config)
    assert [(x.stage, x.after, x.last, x.steps, x.config.model.windows[0]) for x in phases] == [
        ("layers", 0, 2, 2, None),
        ("layers", 2, 4, 2, 16),
        ("text", 4, 7, 3, 16),
        ("text", 7, 10, 3, 4),
    ]
    for step in range(1, 11):
        phase = phase_at(phases, step)
        assert phase.after < step <= phase.last
        assert phase.config.model.windows == windows_at(config, step - 1)
        assert phase.config.model.windows[1] is None
    assert phase_at(phases, 11) is phases[-1]
    assert phases[-1].config.model.windows == config.model.windows
    # What a stage does not say is the run's; the learning rate follows the stage.
    layers, text = phases[0].config, phases[-1].config
    assert (layers.loss.cross_entropy, layers.loss.z_loss) == (0, 0.5)
    assert (text.loss.cross_entropy, text.loss.z_loss) == (1, 0)
    assert (layers.optimizer.learning_rate, text.optimizer.learning_rate) == (0.5, 0.25)
    assert text.optimizer.weight_decay == 0
    assert (layers.trainable, text.trainable) == (("*",), ("head*",))
    assert (layers.steps, text.steps) == (4, 6)


def test_a_configuration_in_stages_is_read_as_it_was_written(staged: Nha) -> None:
    config = staged.config()
    assert validate(json.loads(json.dumps(config_values(config)))) == config


def test_the_shipped_stages_take_the_steps_of_the_published_fine_tune() -> None:
    preset = [("model.preset", "llama-3-8b")]
    config = load_config(str(CONFIGS / "hybridize-staged.yaml"), preset)
    published = load_config(str(CONFIGS / "hybridize.yaml"), preset)
    assert config.steps == published.steps
    assert (config.model, config.data) == (published.model, published.data)
    layers, whole = phases_of(config)
    assert not layers.config.loss.reads_outputs
    assert whole.config.loss.distillation
    for phase in (layers, whole):
        ratio = phase.config.optimizer.learning_rate / published.optimizer.learning_rate
        assert ratio == pytest.approx(2.5)


# name -> (arguments, what the line must contain)
MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "another sum": (["--steps=11"], ["steps = 11: expected the sum of the stages' steps", "10"]),
    "no list": (["--stages=3"], ["stages = 3: expected a list"]),
    "no mapping": (["--stages=[3]"], ["stages.0 = 3: expected keys, a name among them"]),
    "no name": (["--stages=[{steps: 3}]"], ["stages.0 = ", "a name among them"]),
    "no steps": (["--stages=[{name: a}]"], ["stages.a: steps: missing; expected an integer"]),
    "steps of none": (["--stages=[{name: a, steps: 0}]"], ["stages.a: steps = 0", "at least 1"]),
    "too many steps": (
        ["--stages=[{name: a, steps: 4294967296}]"],
        ["stages.a: steps = 4294967296", "below 2**31"],
    ),
    "twice a name": (
        ["--stages=[{name: a, steps: 5}, {name: a, steps: 5}]"],
        ["stages = ['a', 'a']: expected a name of its own for each"],
    ),
    "an unknown key": (
        ["--stages=[{name: a, steps: 8, optimiser: {}}]"],
        ["stages.a.optimiser = {}: there is no such key", "did you mean stages.a.optimizer?"],
    ),
    "an unknown key inside": (
        ["--stages=[{name: a, steps: 8, loss: {destillation: 1}}]"],
        [
            "stages.a.loss.destillation = 1: there is no such key",
            "did you mean stages.a.loss.distillation?",
        ],
    ),
    "a key of the run": (
        ["--stages=[{name: a, steps: 8, batch_size: 2}]"],
        ["stages.a.batch_size = 2: there is no such key"],
    ),
    "a warm-up beyond the stage": (
        ["--stages=[{name: a, steps: 8, optimizer: {warmup_steps: 9}}]"],
        ["stages.a: optimizer.warmup_steps = 9: expected at most steps, which is 8"],
    ),
    "nothing to learn from": (
        ["--stages=[{name: a, steps: 8, loss: {attention_transfer: 1}}]"],
        ["stages.a: loss.attention_transfer = 1", "0 without an initial_model"],
    ),
    "nothing to learn": (
        ["--stages=[{name: a, steps: 8, loss: {cross_entropy: 0}}]"],
        ["stages.a: loss", "cross_entropy = 0: expected more than 0, as no other term"],
    ),
    "a schedule at the top": (
        ["--window_schedule={0: null}"],
        ["window_schedule = ", "did you mean model.window_schedule?"],
    ),
    "no mapping of windows": (["--model.window_schedule=[4]"], ["model.window_schedule = [4]"]),
    "text for a window": (
        ["--model.window_schedule={0: full, 7: 4}"],
        ["model.window_schedule = ", "a mapping of an integer to an integer or null"],
    ),
    "a late beginning": (
        ["--model.window_schedule={2: 16, 7: 4}"],
        ["model.window_schedule = {2: 16, 7: 4}", "the window from step 0 on among them"],
    ),
    "a wider window later": (
        ["--model.window_schedule={0: 8, 2: 16, 7: 4}"],
        ["model.window_schedule = ", "windows that get no wider"],
    ),
    "not down to the model's": (
        ["--model.window_schedule={0: 8, 2: 5}"],
        ["model.window_schedule = ", "4 or less at last, the narrowest window"],
    ),
    "beyond the end": (
        ["--model.window_schedule={0: 8, 10: 4}"],
        ["model.window_schedule.10 = 4", "below steps, which is 10"],
    ),
    "a negative window": (
        ["--model.window_schedule={0: 8, 2: -1}"],
        ["model.window_schedule.2 = -1", "at least 0, or null"],
    ),
    "nothing to shrink": (
        ["--model.window_size=null"],
        ["model.window_schedule = ", "null, as all layers have full attention"],
    ),
}


@pytest.mark.parametrize(("arguments", "parts"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(
    staged: Nha, capsys: pytest.CaptureFixture[str], arguments: list[str], parts: list[str]
) -> None:
    assert main(["train", str(staged.config_file), *arguments]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("nha: ")
    assert output.err.count("\n") == 1
    for part in parts:
        assert part in output.err
    assert not staged.run.exists()
