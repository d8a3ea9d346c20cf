"""A run in stages: what each of them learns, and a run that goes on wherever it was stopped."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx

import nha_jax
from nha_jax.adapters import adapter_of
from nha_jax.storage.weights import Index, SafetensorsSource
from tests.support.original import original_config
from tests.support.shared import made_once
from tests.support.train.tiny_run import Nha, wait_for
from train.cli import main
from train.data.batches import Batch
from train.devices.mesh import make_mesh
from train.loop.trainer import Trainer
from train.phases import phases_of
from train.step.phase_functions import functions_of
from train.storage.initial_model import InitialModel
from train.text.loading import load_model

GATES, ATTENTION = ["blocks.attention.f_proj.*"], ["blocks.attention.*"]
STAGES = [
    {
        "name": "layers",
        "steps": 4,
        "trainable": GATES,
        "loss": {"cross_entropy": 0, "attention_transfer": 1},
        "optimizer": {"learning_rate": 1e-2},
    },
    {"name": "logits", "steps": 2, "loss": {"cross_entropy": 0, "distillation": 1}},
    {"name": "text", "steps": 2, "optimizer": {"name": "lion", "beta2": 0.98}},
]


def save_original(folder: Path, num_layers: int) -> None:
    """Saves a model with full attention."""
    config = original_config(num_layers=num_layers)
    nha_jax.save(folder, nha_jax.Model(config, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="session")
def original() -> Path:
    return made_once("original_of_stages", lambda folder: save_original(folder / "model", 2))


@pytest.fixture(scope="session")
def staged_values(tiny_values: dict[str, Any], original: Path) -> dict[str, Any]:
    values = tiny_values | {
        "initial_model": str(original / "model"),
        "trainable": ATTENTION,
        "frozen_dtype": "bfloat16",
        "batch_size": 4,
        "model": {
            "window_size": [4, None],
            "implementation": "reference",
            "window_schedule": {0: 16, 2: 4},
        },
        "data": tiny_values["data"] | {"sequence_length": 16},
        "optimizer": {"learning_rate": 3e-3, "schedule": "constant"},
        "evaluation": {"every": 2, "sequences": 4, "final_sequences": 4},
        "checkpoint": {"every": 1, "keep": 20},
        "sample": {"max_new_tokens": 1},
        "stages": STAGES,
    }
    return {key: value for key, value in values.items() if key != "steps"}


@pytest.fixture
def staged(tmp_path: Path, staged_values: dict[str, Any]) -> Nha:
    return Nha(tmp_path, staged_values)


@pytest.fixture(scope="session")
def whole(staged_values: dict[str, Any]) -> Nha:
    """The run in stages, which nothing interrupted. Tests only read it."""

    def make(folder: Path) -> None:
        Nha(folder, staged_values).train()

    return Nha(made_once("whole_of_stages", make), staged_values)


def rows_without_speed(nha: Nha) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in row.items() if not name.startswith("tokens_per")}
        for row in nha.rows()
    ]


@pytest.mark.slow
def test_metrics_name_the_stage_and_what_it_learns_from(whole: Nha) -> None:
    rows = whole.rows()
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["stage"] for row in rows] == ["layers"] * 4 + ["logits"] * 2 + ["text"] * 2
    terms = ("attention_transfer", "distillation", "loss")
    found = [[name for name in terms if name in row] for row in rows]
    assert found == [["attention_transfer"]] * 4 + [["distillation", "loss"]] * 2 + [["loss"]] * 2
    # A window of all 16 tokens is full attention; then it is 4.
    errors = [row["attention_transfer"] for row in rows[:4]]
    assert max(errors[:2]) < 1e-4 < 1e-2 < min(errors[2:])
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-2] * 4 + [3e-3] * 4)
    measured = {row["step"]: row["window_size"] for row in rows if "window_size" in row}
    assert measured == {2: [16, None], 4: [4, None], 6: [4, None], 8: [4, None]}
    model = nha_jax.load(whole.run / "model")
    assert model.config.window_size == (4, None)
    assert "window_schedule" not in json.loads((whole.run / "model/config.json").read_bytes())
    assert load_model(str(whole.run)).config == model.config


@pytest.mark.slow
def test_a_parameter_that_a_later_stage_trains_is_not_rounded_before(
    whole: Nha, original: Path
) -> None:
    """What no stage trains is held in bfloat16; the projections wait in float32."""
    index: Index = (slice(None),) * 3
    before, after = (
        SafetensorsSource(folder / "model" / "model.safetensors")
        for folder in (original, whole.run)
    )
    name = "blocks.mlp.up_proj.kernel"
    assert np.any(before.read(name, index) != after.read(name, index))
    config = whole.config()
    phases = phases_of(config)
    functions = functions_of(phases[0], phases, make_mesh(config))
    model = functions.abstract_state.model
    assert model["blocks"]["attention"]["q_proj"]["kernel"].dtype == np.float32
    assert model["blocks"]["mlp"]["up_proj"]["kernel"].dtype == "bfloat16"


def stop_after(step: int, whole: Nha, run: Path) -> None:
    """Makes a copy of a run that was killed when the checkpoint of a step was its newest."""
    shutil.copytree(whole.run, run)
    (run / "result.json").unlink()
    shutil.rmtree(run / "model")
    for folder in (run / "checkpoints").iterdir():
        if int(folder.name) > step:
            shutil.rmtree(folder)


@pytest.mark.slow
def test_a_run_goes_on_at_a_border(
    tmp_path: Path, staged_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One layer, and no sample: what the slow tests do in full."""
    monkeypatch.setattr(Trainer, "_sample", lambda *_: "")
    save_original(tmp_path / "original", 1)
    stages = [STAGES[0] | {"steps": 2}, STAGES[2] | {"steps": 2}]
    values = staged_values | {
        "initial_model": str(tmp_path / "original"),
        "model": {"window_size": 4, "implementation": "reference"},
        "evaluation": {"every": 4, "sequences": 4, "final_sequences": 4},
        "stages": stages,
    }
    once, again = (Nha(tmp_path / name, values) for name in ("once", "again"))
    once.train()
    assert [row["stage"] for row in once.rows()] == ["layers"] * 2 + ["text"] * 2
    stop_after(2, once, again.run)
    assert "resuming after step 2 of 4" in again.train()
    assert rows_without_speed(again) == rows_without_speed(once)
    assert again.model_bytes() == once.model_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, 9))
def test_a_run_goes_on_in_every_stage_and_at_every_border(
    staged: Nha, whole: Nha, step: int
) -> None:
    stop_after(step, whole, staged.run)
    printed = staged.train()
    assert f"resuming after step {step} of 8" in printed or step == 8
    assert rows_without_speed(staged) == rows_without_speed(whole)
    assert staged.model_bytes() == whole.model_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("rows", [2, 5, 7])
def test_a_killed_process_goes_on(staged: Nha, whole: Nha, rows: int) -> None:
    process = staged.start()
    wait_for(lambda: staged.logged() >= rows, process)
    process.kill()
    process.communicate()
    staged.train()
    assert rows_without_speed(staged) == rows_without_speed(whole)
    assert staged.model_bytes() == whole.model_bytes()


@pytest.mark.slow
def test_a_stage_that_averages_gives_its_average_to_the_next(staged: Nha, whole: Nha) -> None:
    """An optimizer whose state holds another model than the one it takes gradients of."""
    free = {"name": "schedule_free_adamw", "schedule": None}
    stages = [STAGES[2] | {"name": "free", "optimizer": free}, STAGES[2]]
    arguments = [f"--stages={json.dumps(stages)}", "--model.window_schedule={0: 4}"]
    staged.train(*arguments)
    rows, model = rows_without_speed(staged), staged.model_bytes()
    finished = Nha(staged.run.parent / "other", staged.values)
    for step in (1, 2, 3):
        shutil.rmtree(finished.run, ignore_errors=True)
        stop_after(step, staged, finished.run)
        if step < 3:
            assert load_model(str(finished.run)).config.window_size == (4, None)
        finished.train(*arguments)
        assert rows_without_speed(finished) == rows
        assert finished.model_bytes() == model


@pytest.mark.slow
def test_an_adapter_goes_through_all_stages(staged: Nha) -> None:
    """Its factors are trained in each of them, and the gates in those that name them."""
    stages = [STAGES[0] | {"steps": 1}, {"name": "text", "steps": 1, "trainable": []}]
    arguments = ["--adapter.rank=2", f"--stages={json.dumps(stages)}"]
    arguments += ["--model.window_schedule={0: 4}", f"--trainable={json.dumps(GATES)}"]
    staged.train(*arguments)
    rows, model = rows_without_speed(staged), staged.model_bytes()
    factors = nha_jax.load_adapter(staged.run / "adapter", nha_jax.load(staged.run / "model"))
    assert adapter_of(factors) is not None
    again = Nha(staged.run.parent / "again", staged.values)
    stop_after(1, staged, again.run)
    again.train(*arguments)
    assert rows_without_speed(again) == rows
    assert again.model_bytes() == model


@pytest.mark.slow
def test_stages_that_have_begun_stay_as_they_are(
    staged: Nha, whole: Nha, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole.run, staged.run)
    changed = [STAGES[0] | {"steps": 3}, *STAGES[1:]]
    assert main(["train", str(staged.config_file), f"--stages={json.dumps(changed)}"]) == 2
    assert "another configuration: stages" in capsys.readouterr().err


@pytest.mark.slow
def test_micro_batches_make_the_same_transfer(staged: Nha) -> None:
    tokens = np.random.default_rng(0).integers(0, 256, (8, 17), np.int32)
    segment_ids = np.ones((8, 16), np.int32)
    segment_ids[5:] = 0
    segment_ids[2, 9:] = 2
    batch: Batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": segment_ids,
        "loss_mask": segment_ids > 0,
    }
    found = []
    for parts in (1, 4):
        loss = {"attention_transfer": 1.0, "distillation": 0.5}
        config = staged.config(
            stages=[], steps=1, loss=loss, micro_batches=parts, batch_size=8,
            model__window_schedule=None,
        )  # fmt: skip
        phases = phases_of(config)
        functions = functions_of(phases[0], phases, make_mesh(config))
        source = InitialModel.open(config.initial_model or "").source(config.model)
        state = functions.initial_state(source)
        teacher = functions.read_teacher(source)
        _, metrics = functions.update(state, batch, teacher)
        found.append({name: float(value) for name, value in metrics.items()})
    assert found[0].keys() >= {"attention_transfer", "distillation", "loss"}
    for name, value in found[0].items():
        np.testing.assert_allclose(found[1][name], value, rtol=1e-5, err_msg=name)
