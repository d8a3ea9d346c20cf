"""What an earlier version left on disk still works: a run, its tokens, its saved model, its search.

The run was made before `evaluation.windows` became `evaluation.sequences` and `slot_share` became
`slot_weight`. `resumed.jsonl` holds the steps that the same version then made of it.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import nha_jax
from tests.support.paths import ROOT
from train.cli import main
from train.data.prepared_folder import PreparedFolder
from train.storage.run_folder import RunFolder
from train.text.loading import load_model

BEFORE = ROOT / "tests" / "support" / "fixtures" / "run_before"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the earlier version's files, as the working directory."""
    copy = shutil.copytree(BEFORE, tmp_path / "before")
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
    stored = RunFolder("run").config()
    assert stored is not None
    assert stored["evaluation"] == {"every": 3, "sequences": 8, "final_sequences": 16}
    written = json.loads((folder / "run" / "run.json").read_text())["config"]
    assert written["evaluation"] == stored["evaluation"]


def test_models_of_before_are_read(folder: Path) -> None:
    tokens = np.arange(12)[None]
    saved, newest = nha_jax.load("run/model"), load_model("run")
    np.testing.assert_array_equal(saved(tokens), newest(tokens))


def test_tokens_of_before_are_read(folder: Path) -> None:
    prepared = PreparedFolder.open(Path("corpus"))
    text = prepared.training.text(1000)
    assert len(prepared.training) == prepared.manifest.totals["tokens"] - len(prepared.held_out)
    assert text.startswith(b"line 0 of file ")


def test_a_search_of_before_goes_on(folder: Path) -> None:
    losses = (folder / "run" / "search.jsonl").read_text().splitlines()
    before = json.loads((folder / "run" / "search.json").read_text())
    assert main(["search", "run", "--base=8", "--full-layers=2", "--windows-count=16"]) == 0
    # Nothing was measured again.
    assert (folder / "run" / "search.jsonl").read_text().splitlines()[1:] == losses[1:]
    found = json.loads((folder / "run" / "search.json").read_text())
    assert found["window_size"] == before["window_size"]
    assert found["measured_on"]["sequences"] == before["measured_on"]["windows_count"]
