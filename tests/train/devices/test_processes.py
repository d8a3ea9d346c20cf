"""Joining the other processes of a run: what is said when it cannot be done."""

import pytest

from tests.support.train.tiny_run import Nha
from train.cli import main


def test_a_variable_that_is_no_number_is_named(
    nha: Nha, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    assert main(["train", str(nha.config_file), "--distributed=true"]) == 2
    assert "JAX_NUM_PROCESSES = 'two': expected a whole number" in capsys.readouterr().err


def test_without_the_others_addresses_the_variables_are_named(
    nha: Nha, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(nha.config_file), "--distributed=true"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "distributed = true: cannot join the other processes" in error
    assert "JAX_COORDINATOR_ADDRESS" in error
    assert not nha.run.exists()
