"""Runs that do not move are ended in time, with what is known, and go on bit for bit."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.train.tiny_run import Nha, wait_for
from train.config import WatchdogConfig
from train.failures import STUCK

pytestmark = pytest.mark.slow

LEAST = 6.0
OPTIONS = (f"--watchdog.least_seconds={LEAST}", "--watchdog.factor=2")

HANGING = """
import itertools, os, sys, time
from train.cli import main
from train.loop import trainer

batches = trainer.training_batches

def hang(*arguments):
    for number, batch in enumerate(batches(*arguments)):
        if number == 30:
            time.sleep(float(os.environ["HANG"]))
        elif number > 30:
            time.sleep(float(os.environ["SLOW"]))
        yield batch

if os.environ.get("JAX_PROCESS_ID", "0") == os.environ["WHO"]:
    trainer.training_batches = hang
sys.exit(main())
"""


def launch(nha: Nha, processes: int, *options: str, **environment: str) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    more = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "HANG": "0", "SLOW": "0", "WHO": "none"}
    if processes > 1:
        more |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
        options = (*options, "--distributed=true")
    return [
        subprocess.Popen(
            [sys.executable, "-c", HANGING, "train", str(nha.config_file), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | more | {"JAX_PROCESS_ID": str(index)} | environment,
        )
        for index in range(processes)
    ]


def reports(nha: Nha) -> list[Path]:
    return sorted((nha.run / "watchdog").glob("*.txt"))


def test_data_that_does_not_come_ends_the_run_which_goes_on(nha: Nha, undisturbed: Nha) -> None:
    (process,) = launch(nha, 1, *OPTIONS, HANG="1000", WHO="0")
    wait_for(lambda: nha.logged() >= 28, process)
    began = time.monotonic()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == STUCK, output
    assert time.monotonic() - began < LEAST + 10
    assert re.search(
        r"nha: watchdog: nothing has come to its end for [\d.]+ s after step \d+", output
    )
    assert "this process is at: data" in output
    (report,) = reports(nha)
    assert "in hang" in report.read_text()  # the stack of the thread that waits
    nha.train()
    assert nha.losses() == undisturbed.losses()
    assert nha.model_bytes() == undisturbed.model_bytes()


def test_a_process_that_is_stopped_is_named_by_the_other(nha: Nha) -> None:
    first, second = launch(nha, 2, *OPTIONS)
    wait_for(lambda: nha.logged() >= 10, first)
    second.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    output, _ = first.communicate(timeout=120)
    seconds = time.monotonic() - began
    second.kill()
    second.communicate()
    assert first.returncode == STUCK, output
    assert "process 1 does not answer; it was last at step" in output
    assert seconds < LEAST + 20
    assert "process 1 does not answer" in reports(nha)[0].read_text()


def test_the_process_that_waits_for_data_is_named_in_the_metrics(nha: Nha) -> None:
    processes = launch(nha, 2, "--steps=60", SLOW="0.3", WHO="1")
    for process in processes:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
    assert nha.rows()[-1]["slowest_process"] == 1
    assert nha.rows()[-1]["slowest_process_data_seconds"] > 3


def test_a_run_that_was_stopped_itself_and_goes_on_is_left_alone(nha: Nha) -> None:
    (process,) = launch(nha, 1, *OPTIONS)
    wait_for(lambda: nha.logged() >= 10, process)
    process.send_signal(signal.SIGSTOP)
    time.sleep(2 * LEAST)
    process.send_signal(signal.SIGCONT)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert not reports(nha)


@pytest.mark.parametrize("values", [{"factor": 1.0}, {"least_seconds": 0.0}, {"other_seconds": -1}])
def test_a_bound_that_makes_no_sense_is_refused(values: dict[str, float]) -> None:
    (key,) = values
    with pytest.raises(ValueError, match=key):
        WatchdogConfig(**values)
