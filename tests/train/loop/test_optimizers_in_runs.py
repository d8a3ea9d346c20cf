"""Runs with other optimizers than AdamW: on eight devices as on one, and after a kill."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.eight_devices import run_on_eight_devices
from tests.support.train.tiny_run import Nha, wait_for

CHOICES = [
    {"name": "muon", "ema_decay": 0.9},
    {"name": "adafactor"},
    {"name": "lion", "learning_rate": 3e-4},
    {"name": "schedule_free_adamw"},
]
SHORT = {
    "steps": 8,
    "checkpoint": {"every": 3, "keep": 5},
    "evaluation": {"every": 8, "sequences": 8, "final_sequences": 8},
}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", CHOICES, ids=lambda value: value["name"])
def test_eight_devices_train_as_one_does(
    optimizer: dict[str, Any], tmp_path: Path, tiny_values: dict[str, Any]
) -> None:
    model = tiny_values["model"] | {"hidden_size": 128}  # wide enough for Adafactor's factors
    keys = tiny_values["optimizer"] | optimizer
    nha = Nha(tmp_path / "one", tiny_values | SHORT | {"model": model, "optimizer": keys})
    nha.train()
    alone = nha.losses()
    shutil.copytree(nha.run / "checkpoints" / "3", tmp_path / "checkpoints" / "3")
    done = run_on_eight_devices(
        "tests.support.train.losses_on_a_mesh", str(nha.config_file), str(tmp_path / "checkpoints")
    )
    assert done.returncode == 0, done.stderr
    losses = {int(step): loss for step, loss in json.loads(done.stdout).items()}
    assert sorted(losses) == list(range(1, 9))
    for step, loss in losses.items():
        np.testing.assert_allclose(loss, alone[step][0], rtol=1e-5)


@pytest.mark.slow
def test_muon_and_its_average_go_on_after_a_kill_bit_for_bit(
    tmp_path: Path, tiny_values: dict[str, Any]
) -> None:
    keys = {"optimizer": tiny_values["optimizer"] | CHOICES[0], "steps": 40}
    killed, whole = (Nha(tmp_path / name, tiny_values | keys) for name in ("killed", "whole"))
    process = killed.start()
    wait_for(lambda: (killed.run / "checkpoints" / "15").exists(), process)
    process.kill()
    process.communicate()
    assert "resuming after step" in killed.train()
    whole.train()
    assert killed.losses() == whole.losses()
    for name in ("model", "model_ema"):
        found, expected = (
            (each.run / name / "model.safetensors").read_bytes() for each in (killed, whole)
        )
        assert found == expected
