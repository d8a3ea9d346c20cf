"""Losses that jump: noticed and, if asked, undone bit for bit."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

from tests.support.train.tiny_run import Nha, wait_for
from train.config import SpikeConfig
from train.loop.spikes import SpikeFinder

BAD_BATCH = 70

SPIKING = f"""
import sys
from train.cli import main
from train.loop import trainer

batches = trainer.training_batches

def spiking(sequences, size, seed, first, rows):
    for number, batch in enumerate(batches(sequences, size, seed, first, rows), first):
        if number == {BAD_BATCH}:
            batch = {{**batch, "targets": (batch["targets"] * 7 + 90) % 256}}
        yield batch

trainer.training_batches = spiking
sys.exit(main())
"""


def losses(count: int, seed: int = 0) -> list[float]:
    random = np.random.default_rng(seed)
    return (3.0 - np.arange(count) / 500 + random.normal(0, 0.05, count)).tolist()


def test_a_jump_is_found_and_does_not_hide_the_next() -> None:
    finder = SpikeFinder(SpikeConfig())
    for step, loss in enumerate(losses(200), 1):
        assert finder.look(step, loss) is None
    spike = finder.look(201, 6.0)
    assert spike is not None
    assert (spike.step, spike.loss) == (201, 6.0)
    assert 2.4 < spike.median < 2.9
    assert spike.deviations > 20
    assert "step 201: the loss 6 is" in str(spike)
    assert finder.look(202, 5.5) is not None
    assert len(finder.losses) == 128
    assert max(finder.losses) < 4


@pytest.mark.parametrize(
    ("before", "loss"),
    [
        (losses(20), 50.0),  # too few to say
        (losses(200), 2.95),  # within the noise
        ([2.0] * 100, 2.1),  # of losses that do not vary a tenth is nothing
        (losses(200), float("nan")),  # whose update is skipped
    ],
)
def test_what_is_no_spike(before: list[float], loss: float) -> None:
    assert SpikeFinder(SpikeConfig(), before).look(1, loss) is None


def test_null_looks_for_none() -> None:
    assert SpikeFinder(SpikeConfig(deviations=None), losses(200)).look(1, 99.0) is None
    with pytest.raises(ValueError, match="undo = 1"):
        SpikeConfig(deviations=None, undo=1)


def start(nha: Nha, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SPIKING, "train", str(nha.config_file), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
    )


def finish(nha: Nha, *options: str) -> str:
    output, _ = (process := start(nha, *options)).communicate(timeout=240)
    assert process.returncode == 0, output
    return output


UNDO = ("--spike.undo=1", "--spike.window=32")


@pytest.mark.slow
def test_a_spike_is_reported_and_left_alone_unless_asked(nha: Nha) -> None:
    output = finish(nha, "--spike.window=32")
    assert re.search(rf"nha: step {BAD_BATCH + 1}: the loss \S+ is \S+ deviations above", output)
    assert "back to step" not in output


@pytest.mark.slow
def test_a_spike_is_undone_and_kills_do_not_change_that(
    nha: Nha, undisturbed: Nha, tmp_path_factory: pytest.TempPathFactory
) -> None:
    output = finish(nha, *UNDO)
    assert f"back to step 60, and on with batch {BAD_BATCH + 1} (undone 1 of" in output
    found, plain = nha.losses(), undisturbed.losses()
    assert next(step for step in plain if found[step] != plain[step]) == 61
    assert max(loss for step, (loss, _) in found.items() if step > 60) < plain[60][0] + 0.3

    other = Nha(tmp_path_factory.mktemp("killed"), nha.values)
    for logged in (66, 64, 90):  # before it, after it was undone, and later
        process = start(other, *UNDO)
        wait_for(lambda logged=logged: other.logged() >= logged, process)
        process.kill()
        process.communicate()
    finish(other, *UNDO)
    assert other.losses() == found
    assert other.model_bytes() == nha.model_bytes()
