"""A run that an earlier version made goes on, with its configuration, tokens and checkpoint.

It was made before `evaluation.windows` became `evaluation.sequences` and `slot_share` became
`slot_weight`. `resumed.jsonl` has the next steps, as that version made them.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import nha_jax
from tests.support.paths import FIXTURES
from train.cli import main
from train.storage.run_folder import RunFolder
from train.text.loading import load_model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the earlier version's files, as the working directory."""
    copy = shutil.copytree(FIXTURES / "run_before", tmp_path / "before")
    monkeypatch.chdir(copy)
    return copy


def test_a_run_of_before_resumes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert main(["train", "config.yaml", "--steps=9"]) == 0
    output = capsys.readouterr()
    assert "resuming after step 6 of 9" in output.out
    assert "evaluation.windows is now called evaluation.sequences" in output.err
    present = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(present) == 9
    expected = (folder / "resumed.jsonl").read_text().splitlines()
    for line, before in zip(present, rows + expected, strict=True):
        found, wanted = json.loads(line), json.loads(before)
        for name in ("step", "loss", "gradient_norm"):
            np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5)
        assert ("slot_weight" in found) == ("slot_share" in wanted)
        assert "slot_share" not in found
    stored = RunFolder("run").config()
    assert stored is not None
    assert stored["evaluation"] == {"every": 3, "sequences": 8, "final_sequences": 16}
    written = json.loads((folder / "run" / "run.json").read_text())["config"]
    assert written["evaluation"] == stored["evaluation"]


def test_models_of_before_are_read(folder: Path) -> None:
    tokens = np.arange(12)[None]
    saved, newest = nha_jax.load("run/model"), load_model("run")
    np.testing.assert_array_equal(saved(tokens), newest(tokens))
