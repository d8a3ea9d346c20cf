"""Whatever stops a run, the same command goes on as if nothing had happened."""

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.train.raw_files import json_lines, prepare
from tests.support.train.tiny_run import Nha, wait_for
from train.cli import main


def unfinished(checkpoints: Path) -> bool:
    """Whether a save has begun and not ended."""
    return any(checkpoints.glob("*orbax-checkpoint-tmp*"))


def test_losses_after_kill_are_those_of_an_undisturbed_run(nha: Nha, undisturbed: Nha) -> None:
    metrics, checkpoints = nha.run / "metrics.jsonl", nha.run / "checkpoints"
    process = nha.start()
    wait_for(lambda: (checkpoints / "15").exists() and unfinished(checkpoints), process)
    process.kill()
    process.communicate()
    assert unfinished(checkpoints)
    # A kill during a write, as bad as it can be.
    with metrics.open("a") as file:
        file.write('{"step": 9, "lo')

    output = nha.train()
    assert "resuming after step" in output
    assert nha.losses() == undisturbed.losses()
    assert not unfinished(checkpoints)
    stored = [
        (run / "model" / "model.safetensors").read_bytes() for run in (nha.run, undisturbed.run)
    ]
    assert stored[0] == stored[1]


@pytest.mark.slow
def test_a_mixture_whose_weights_change_goes_on_after_a_kill_bit_for_bit(
    tmp_path: Path, tiny_values: dict[str, Any]
) -> None:
    folders = []
    for name in ("words", "numbers"):
        texts = [f"{name} {n} {name[n % 5] * 20}" for n in range(60)]
        (tmp_path / f"{name}.jsonl").write_bytes(json_lines(texts))
        folders.append(str(tmp_path / name))
        assert prepare(tmp_path / name, tmp_path / f"{name}.jsonl", "--held-out-fraction=0.2") == 0
    words, numbers = folders
    # The weights change before the checkpoint that a killed run goes on from, and after it.
    schedule = {0: {words: 1.0}, 10: {words: 0.5, numbers: 0.5}, 20: {numbers: 1.0}}
    data = {"corpus": dict.fromkeys(folders, 0.5), "mixture_schedule": schedule}
    data |= {"sequence_length": 32}
    killed, whole = (
        Nha(tmp_path / name, tiny_values | {"data": data, "steps": 30})
        for name in ("killed", "whole")
    )
    process = killed.start("--checkpoint.keep=5")
    wait_for(lambda: (killed.run / "checkpoints" / "15").exists(), process)
    process.kill()
    process.communicate()
    for later in (killed.run / "checkpoints").glob("30*"):
        shutil.rmtree(later)  # where the kill came late
    assert "resuming after step 15 of 30" in killed.train()
    whole.train()
    assert killed.losses() == whole.losses()
    stored = [(each.run / "model" / "model.safetensors").read_bytes() for each in (killed, whole)]
    assert stored[0] == stored[1]


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, id="SIGINT", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, id="SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_signal_saves_and_resumes(nha: Nha, undisturbed: Nha, number: signal.Signals) -> None:
    process = nha.start("--checkpoint.every=1000")
    metrics = nha.run / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 8, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert f"Stopped by {number.name} at step" in output

    stopped = nha.losses()
    assert 8 <= len(stopped) < 120
    expected = undisturbed.losses()
    assert stopped.items() <= expected.items()

    assert f"resuming after step {len(stopped)} of 120" in nha.train()
    assert nha.losses() == expected


def test_finished_run_does_nothing_and_more_steps_continue_it(
    nha: Nha, undisturbed: Nha, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(undisturbed.run, nha.run)
    before = (nha.run / "metrics.jsonl").read_bytes()
    assert main(["train", str(nha.config_file)]) == 0
    again = capsys.readouterr().out
    assert "This run is finished: 120 of 120 steps" in again
    assert "this model" in again
    assert (nha.run / "metrics.jsonl").read_bytes() == before

    assert "resuming after step 120 of 123" in nha.train("--steps", "123")
    assert len(nha.losses()) == 123
    assert (nha.run / "metrics.jsonl").read_bytes().startswith(before)


def test_run_leaves_all_it_promises(undisturbed: Nha) -> None:
    files = {path.name for path in undisturbed.run.iterdir() if not path.name.startswith(".")}
    assert files == {
        "checkpoints",
        "loss.png",
        "metrics.jsonl",
        "model",
        "result.json",
        "run.json",
        "sessions.json",
        "slot_weight.png",
        "tensorboard",
    }
    assert (undisturbed.run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert any((undisturbed.run / "tensorboard").iterdir())
    assert {path.name for path in (undisturbed.run / "checkpoints").iterdir()} == {"105", "120"}
