"""What a run meets in weeks: it goes on as if nothing had happened, or stops with one line."""

import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import nha_jax
from tests.support.train.tiny_run import Nha, wait_for
from train.checkpoint.checkpoints import load_model_state
from train.cli import main
from train.data.corpus import load_corpus
from train.storage.run_folder import RunFolder


@pytest.mark.slow
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(nha: Nha, undisturbed: Nha) -> None:
    shutil.copytree(undisturbed.run, nha.run)
    (nha.run / "result.json").unlink()
    newest = nha.run / "checkpoints" / "120"
    array = max(newest.glob("model/**/d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(array.read_bytes())
    content[1000] ^= 0x10
    array.write_bytes(content)

    output = nha.train()
    reports = [line for line in output.splitlines() if line.startswith("nha: ")]
    assert len(reports) == 1
    assert array.name in reports[0]
    assert "resuming after step 105 of 120" in output
    assert nha.losses() == undisturbed.losses()
    assert nha.model_bytes() == undisturbed.model_bytes()
    assert (nha.run / "checkpoints" / "damaged-120").is_dir()


def test_updates_that_are_not_finite_stop_the_run_and_are_never_saved(
    nha: Nha, capsys: pytest.CaptureFixture[str]
) -> None:
    # Parameters of 1e37 are finite; what is computed from them is not.
    values = ["--optimizer.learning_rate=1e38", "--optimizer.max_skipped_updates=4"]
    values += ["--checkpoint.every=2"]
    assert main(["train", str(nha.config_file), *values]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nha: ")]
    assert len(errors) == 1
    assert "the last 4 updates were not finite and were skipped" in errors[0]
    rows = nha.rows()
    assert rows[-1]["skipped_updates"] >= 3

    config = nha_jax.ModelConfig.from_dict(RunFolder(str(nha.run)).model_config())
    abstract = jax.eval_shape(lambda: nnx.state(nha_jax.Model(config, rngs=nnx.Rngs(0))))
    saved = load_model_state(nha.run / "checkpoints", abstract)
    assert all(np.isfinite(array).all() for array in jax.tree.leaves(saved))


def test_a_text_that_is_gone_is_noticed_at_the_next_start(
    nha: Nha, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "corpus"
    shutil.copytree(corpus, copy)
    config = nha.config(data__corpus=str(copy))
    with RunFolder(str(nha.run)).open(config, load_corpus(config.data).fingerprint):
        pass
    (copy / "file_07.txt").unlink()
    assert main(["train", str(nha.config_file), f"--data.corpus={copy}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "contents of data.corpus" in error


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_leave_no_trace(nha: Nha, undisturbed: Nha) -> None:
    # Steps at which to kill, ascending; some kills come at any time of the start instead.
    chance = random.Random(20)
    steps = sorted(chance.sample(range(2, 119), 20))
    for kill, step in enumerate(steps):
        process = nha.start()
        if kill % 4 == 3:
            time.sleep(chance.uniform(0, 8))
        else:
            wait_for(lambda at=step: nha.logged() >= at, process)
            time.sleep(chance.uniform(0, 0.02))
        assert process.poll() is None, "the run ended before it was killed"
        process.kill()
        process.communicate()
    nha.train()
    assert nha.losses() == undisturbed.losses()
    assert nha.model_bytes() == undisturbed.model_bytes()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_full_disk_stops_the_run_which_goes_on_when_there_is_room(
    tiny_values: dict[str, Any], small_disk: Path, undisturbed: Nha
) -> None:
    nha = Nha(small_disk, tiny_values)
    hog = small_disk / "hog"
    process = nha.start()
    wait_for(lambda: nha.logged() >= 20, process)
    with pytest.raises(OSError, match="No space left"):
        hog.write_bytes(b"x" * (4 << 20))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert "Traceback" not in output
    reports = [
        line
        for line in output.splitlines()
        if line.startswith("nha: ") and not line.endswith("going on without it")
    ]
    assert len(reports) == 1
    assert str(nha.run) in reports[0]
    assert "No space left on device" in reports[0]

    hog.unlink()
    subprocess.run(["mount", "-o", "remount,size=30m", str(small_disk)], check=True)
    assert "resuming after step" in nha.train()
    assert nha.losses() == undisturbed.losses()
    assert nha.model_bytes() == undisturbed.model_bytes()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_shard_that_goes_away_is_named_and_the_run_goes_on_with_it_back(
    nha: Nha, corpus: Path, tmp_path: Path
) -> None:
    prepared = tmp_path / "prepared"
    assert main(["data", "prepare", str(prepared), str(corpus), "--held-out-fraction=0.3"]) == 0
    shard = max(prepared.rglob("*.tokens"), key=lambda path: path.stat().st_size)
    content = shard.read_bytes()
    arguments = ["--steps=400", f"--data.corpus={prepared}"]

    process = nha.start(*arguments)
    wait_for(lambda: nha.logged() >= 12, process)
    with shard.open("r+b") as file:
        file.truncate(0)
    shard.unlink()
    stopped, _ = process.communicate(timeout=240)
    again = nha.start(*arguments)
    refused, _ = again.communicate(timeout=240)
    for code, output in ((process.returncode, stopped), (again.returncode, refused)):
        assert code == 1, output
        assert "Traceback" not in output
        reports = [line for line in output.splitlines() if line.startswith("nha: ")]
        assert len(reports) == 1
        assert shard.name in reports[0]

    shard.write_bytes(content)
    assert "resuming after step" in nha.train(*arguments)
    assert len(nha.losses()) == 400


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_processes_stop_together_and_go_on_as_two_or_one(nha: Nha, undisturbed: Nha) -> None:
    for number, receiver, rows in ((signal.SIGTERM, 1, 8), (signal.SIGINT, 0, 40)):
        both = nha.start_both()
        wait_for(lambda at=rows: nha.logged() >= at, both[0])
        both[receiver].send_signal(number)
        outputs = [process.communicate(timeout=240)[0] for process in both]
        assert [process.returncode for process in both] == [128 + number] * 2, outputs
        stopped = len(nha.losses())
        assert f"Stopped by {number.name} at step {stopped}." in outputs[0]
        assert (nha.run / "checkpoints" / str(stopped)).is_dir()

    both = nha.start_both()
    wait_for(lambda: nha.logged() >= stopped + 8, both[0])
    both[1].kill()
    outputs = [process.communicate(timeout=240)[0] for process in both]
    assert both[0].returncode not in (0, None)

    assert "resuming after step" in nha.train()
    alone = undisturbed.losses()
    together = nha.losses()
    assert together.keys() == alone.keys()
    for step, (loss, held_out) in together.items():
        assert loss == pytest.approx(alone[step][0], rel=1e-6), step
        if step % 20 == 0:
            assert held_out == pytest.approx(alone[step][1], rel=1e-6), step


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_finish_a_run(nha: Nha, undisturbed: Nha) -> None:
    both = nha.start_both("--mesh.data=1", "--mesh.fsdp=-1")
    outputs = [process.communicate(timeout=600)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert "Held-out bits per byte after 120 steps" in outputs[0]
    assert "Held-out" not in outputs[1]
    result = json.loads((nha.run / "result.json").read_text())
    alone = json.loads((undisturbed.run / "result.json").read_text())
    assert result["held_out_bits_per_byte"] == pytest.approx(
        alone["held_out_bits_per_byte"], rel=1e-5
    )
    assert nha_jax.load(nha.run / "model").config == nha_jax.load(undisturbed.run / "model").config
