"""A run that has to stop: by a signal in the middle of an evaluation, or without memory."""

import shutil
import signal
from typing import Any

import jax
import pytest

from tests.support.train.tiny_run import Nha
from train.devices.mesh import make_mesh
from train.errors import TrainingError
from train.loop.memory import explain_memory
from train.loop.train import train
from train.plan.advice import untried_advice
from train.step.evaluation import measure_held_out
from train.step.update import TrainingFunctions

ALLOCATION = "RESOURCE_EXHAUSTED: Out of memory allocating 16000000000000 bytes."


@pytest.mark.slow
@pytest.mark.parametrize("signals", [1, 2])
def test_a_signal_stops_an_evaluation_which_the_next_start_makes(
    nha: Nha,
    undisturbed: Nha,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    signals: int,
) -> None:
    shutil.copytree(undisturbed.run, nha.run)
    (nha.run / "result.json").unlink()
    shutil.rmtree(nha.run / "checkpoints" / "120")
    measured: list[int] = []
    evaluate = TrainingFunctions.evaluate

    def evaluate_and_signal(self: TrainingFunctions, *arguments: Any) -> Any:
        measured.append(1)
        signal.raise_signal(signal.SIGTERM)
        return evaluate(self, *arguments)

    for start in ("resuming after step 105 of 120", "trained  120 steps")[:signals]:
        with monkeypatch.context() as patched:
            patched.setattr(TrainingFunctions, "evaluate", evaluate_and_signal)
            assert train(nha.config(logging__every=7)) == 128 + signal.SIGTERM
        assert len(measured) == 1  # of two batches
        measured.clear()
        output = capsys.readouterr().out
        assert start in output
        assert "Stopped by SIGTERM at step 120." in output
        assert (nha.run / "checkpoints" / "120").is_dir()
        row = nha.rows()[-1]
        assert row["step"] == 120
        assert "held_out_bits_per_byte" not in row

    assert train(nha.config()) == 0
    assert nha.rows()[-1]["held_out_bits_per_byte"] == undisturbed.losses()[120][1]
    assert nha.model_bytes() == undisturbed.model_bytes()
    assert [row["step"] for row in nha.rows()] == [*range(1, 106), 112, 119, 120]


def test_an_evaluation_that_is_given_up_reads_no_further() -> None:
    class Untouched:
        def evaluate(self, *arguments: Any) -> Any:
            raise AssertionError("it was to be given up")

    class One:
        def parts(self, count: int) -> list:
            return [(self, count)]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("train.step.evaluation.evaluation_batches", lambda *_: iter([{}, {}]))
        found = measure_held_out(Untouched(), None, One(), 1, 2, stopped=lambda: True)  # type: ignore[arg-type]
    assert found is None


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (jax.errors.JaxRuntimeError(ALLOCATION), "Out of memory allocating 16000000000000 bytes"),
        (
            jax.errors.JaxRuntimeError("INTERNAL: Error dispatching: Out of memory x.\n"),
            "Error dispatching: Out of memory x",
        ),
        (MemoryError("Unable to allocate 1. TiB"), "Unable to allocate 1. TiB"),
        (MemoryError(), "of the host"),
    ],
    ids=["resource", "dispatch", "numpy", "host"],
)
def test_memory_that_runs_out_is_a_line_with_what_needs_less(
    nha: Nha, error: Exception, reason: str
) -> None:
    config = nha.config(model__remat="dots")
    mesh = make_mesh(config)
    with pytest.raises(TrainingError) as raised, explain_memory(config, mesh):
        raise error
    line = str(raised.value)
    assert "\n" not in line
    assert line.startswith("out of memory: ")
    assert reason in line
    assert "GiB of each device" in line
    assert "--micro_batches=2, --model.remat=full, --head_parts=2; `nha plan` says" in line
    for change in untried_advice(config, mesh.shape):
        nha.config(**{key.replace(".", "__"): value for key, value in change.items()})


def test_what_needs_less_on_several_devices(nha: Nha) -> None:
    config = nha.config(batch_size=8, micro_batches=1, model__remat="full", head_parts=32)
    mesh = {"data": 4, "fsdp": 2, "tensor": 1, "context": 1}
    assert untried_advice(config, mesh) == [{"mesh.data": 1, "mesh.fsdp": 8}]
    assert untried_advice(config, mesh | {"data": 1}) == [{"micro_batches": 2}]


@pytest.mark.parametrize(
    "error", [jax.errors.JaxRuntimeError("INTERNAL: something"), ValueError("out of memory")]
)
def test_other_errors_are_not_about_memory(nha: Nha, error: Exception) -> None:
    config = nha.config()
    with pytest.raises(type(error)), explain_memory(config, make_mesh(config)):
        raise error
