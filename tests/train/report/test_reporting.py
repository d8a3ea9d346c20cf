"""What a run reports: speed, slot weights, schedules, traces, caches and wandb."""

import json
import math
import os
import sys
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import nha_jax
from tests.support.train.tiny_run import Nha
from train.cli import main
from train.config import OptimizerConfig
from train.devices.chips import CHIPS, chip_of
from train.devices.compilation_cache import use_compilation_cache
from train.devices.mesh import make_mesh
from train.loop.profiling import Profiler
from train.report.metrics import MetricsLog, scalars
from train.report.plots import plot_slot_weight
from train.report.reporting import Reporting
from train.report.wandb_reporter import WeightsAndBiases
from train.step.evaluation import HeldOut
from train.step.optimizer import learning_rate_schedule
from train.storage.run_folder import RunFolder

METRICS = {"loss": 1.5, "gradient_norm": 2.0, "learning_rate": 0.1, "skipped": 0.0}


def reporting(nha: Nha, **overrides: Any) -> Reporting:
    config = nha.config(**overrides)
    nha.run.mkdir()
    mesh = make_mesh(config, jax.devices()[:1])
    return Reporting(config, RunFolder(config.run), mesh, 0, lambda batch: 1.0)


def test_row_of_an_evaluation(nha: Nha) -> None:
    held_out = HeldOut(3.0, bytes_per_target=2.0, accuracy=0.5, whole=0.0, slot_weight=(0.25, 0.5))
    held_out = held_out.with_task(
        "keys:8", HeldOut(1.0, 1.0, accuracy=0.75, whole=0.25, slot_weight=())
    )
    with reporting(nha) as report:
        report.step(1, METRICS | {"slot_loss": 0.7}, 0, None)
        report.step(2, METRICS, 1, held_out)
    first, second = nha.rows()
    assert first["slot_loss"] == 0.7
    assert first["bits_per_byte"] == pytest.approx(1.5 / math.log(2))
    assert "tokens_per_second" not in first  # it compiled
    assert second["skipped_updates"] == 1
    assert second["held_out_bits_per_byte"] == 1.5
    assert second["held_out_perplexity"] == 8.0
    assert second["held_out_accuracy"] == 0.5
    assert second["answers/keys:8"] == 0.25
    assert second["answer_tokens/keys:8"] == 0.75
    assert second["slot_weight"] == [0.25, 0.5]
    assert second["tokens_per_second_per_chip"] == second["tokens_per_second"] > 0
    assert "mfu" not in second  # nobody knows a CPU's peak


def test_model_flops_utilisation(nha: Nha, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.report.reporting.chip_of", lambda kind: CHIPS["TPU v5 lite"])
    with reporting(nha) as report:
        report.step(1, METRICS, 0, None)
        report.step(2, METRICS, 0, None)
    row = nha.rows()[1]
    flops = nha_jax.training_flops_per_token(nha.config().model, 32)
    assert row["mfu"] == pytest.approx(row["tokens_per_second"] * flops / 197e12)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("TPU v5 lite", "TPU v5e"), ("NVIDIA H100 80GB HBM3", "NVIDIA H100"), ("cpu", None)],
)
def test_chips_by_jaxs_name(kind: str, name: str | None) -> None:
    chip = chip_of(kind)
    assert (chip and chip.name) == name


def test_lists_are_scalars_of_layers_elsewhere() -> None:
    row = {"step": 3, "loss": math.nan, "slot_weight": [0.1, math.nan, 0.3]}
    assert scalars(row) == {"slot_weight/layer_0": 0.1, "slot_weight/layer_2": 0.3}


def test_slot_weights_are_drawn(tmp_path: Path) -> None:
    rows = [{"step": step, "slot_weight": [0.1 * step, None]} for step in (1, 2)]
    plot_slot_weight([{"step": 1}], tmp_path / "none.png")
    plot_slot_weight(rows, tmp_path / "slot_weight.png")
    assert [path.name for path in tmp_path.iterdir()] == ["slot_weight.png"]
    assert (tmp_path / "slot_weight.png").read_bytes().startswith(b"\x89PNG")


def test_warmup_stable_decay_by_hand() -> None:
    config = OptimizerConfig(
        learning_rate=2.0,
        warmup_steps=2,
        schedule="warmup_stable_decay",
        decay_fraction=0.4,
        final_fraction=0.25,
    )
    rates = [float(learning_rate_schedule(config, 10)(step)) for step in range(12)]
    expected = [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.625, 1.25, 0.875, 0.5, 0.5]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)
    longer = learning_rate_schedule(config, 20)
    assert [float(longer(step)) for step in range(7)] == rates[:7]


def test_decay_that_takes_everything_begins_after_the_warmup() -> None:
    config = OptimizerConfig(
        learning_rate=1.0,
        warmup_steps=5,
        schedule="warmup_stable_decay",
        decay_fraction=1.0,
        final_fraction=0.0,
    )
    schedule = learning_rate_schedule(config, 10)
    np.testing.assert_allclose([schedule(4), schedule(5), schedule(10)], [1, 1, 0], atol=1e-6)


class FakeRun:
    """What `wandb.init` returns."""

    def __init__(self, **arguments: Any):
        self.arguments = arguments
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.finished = False

    def log(self, row: dict[str, float], step: int) -> None:
        self.rows.append((step, row))

    def finish(self) -> None:
        self.finished = True


def test_wandb_gets_the_rows_and_continues_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[FakeRun] = []
    module = types.ModuleType("wandb")
    module.init = lambda **arguments: runs.append(FakeRun(**arguments)) or runs[-1]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    for step in (1, 2):
        wandb = WeightsAndBiases("project", tmp_path / "wandb", tmp_path, {"steps": 2})
        lines, events = tmp_path / "metrics.jsonl", tmp_path / "events"
        with MetricsLog(lines, events, after_step=step - 1, more=[wandb]) as log:
            log.write({"step": step, "loss": 0.5, "slot_weight": [0.25]})
    assert [run.rows for run in runs] == [
        [(step, {"loss": 0.5, "slot_weight/layer_0": 0.25})] for step in (1, 2)
    ]
    assert all(run.finished for run in runs)
    assert runs[0].arguments == runs[1].arguments
    assert runs[0].arguments["project"] == "project"
    assert runs[0].arguments["resume"] == "allow"
    assert len(lines.read_text().splitlines()) == 2


def test_wandb_that_is_not_installed_is_refused_before_anything_is_written(
    nha: Nha, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(["train", str(nha.config_file), "--logging.wandb=project"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("nha: logging.wandb = 'project': wandb is not installed")
    assert error.count("\n") == 1
    assert not nha.run.exists()


def test_profiler_traces_the_steps_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))

    def run(steps: tuple[int, int] | None, first: int, last: int) -> list[str]:
        calls.clear()
        with Profiler(steps, tmp_path) as profiler:
            for step in range(first, last + 1):
                profiler.before(step)
                calls.append(str(step))
                profiler.after(step, ())
        return calls

    assert run((2, 3), 1, 4) == ["1", "start", "2", "3", "stop", "4"]
    assert run((2, 9), 4, 5) == ["start", "4", "5", "stop"]  # resumed within, ended before
    assert run((2, 3), 4, 5) == run(None, 4, 5) == ["4", "5"]


@pytest.fixture
def cache_settings() -> Any:
    """What jax is told about its cache, put back afterwards."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield before
    for name, value in before.items():
        jax.config.update(name, value)


def test_compilation_cache(
    tmp_path: Path,
    cache_settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = "jax_compilation_cache_dir"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    use_compilation_cache("~/cache")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    use_compilation_cache(None)
    assert getattr(jax.config, name) == cache_settings[name]
    (tmp_path / "file").write_text("")
    use_compilation_cache(str(tmp_path / "file" / "cache"))
    assert getattr(jax.config, name) == cache_settings[name]
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "cannot write there" in error
    use_compilation_cache("~/cache")
    assert getattr(jax.config, name) == os.path.join(tmp_path, "cache")


def test_every_evaluation_has_every_layers_slot_weight(undisturbed: Nha) -> None:
    rows = [row for row in undisturbed.rows() if "slot_weight" in row]
    assert [row["step"] for row in rows] == [20, 40, 60, 80, 100, 120]
    for row in rows:
        assert len(row["slot_weight"]) == 1
        assert 0 < row["slot_weight"][0] < 1
        assert row["held_out_perplexity"] == pytest.approx(2 ** row["held_out_bits_per_byte"])
    result = json.loads((undisturbed.run / "result.json").read_text())
    assert result["held_out_perplexity"] == pytest.approx(2 ** result["held_out_bits_per_byte"])
