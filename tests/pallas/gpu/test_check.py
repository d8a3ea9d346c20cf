"""`benchmarks/gpu_check.sh` where there is no GPU, at toy size."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"


@pytest.mark.full
def test_the_check_runs_at_toy_size(tmp_path):
    finished = subprocess.run(
        ["bash", str(SCRIPT), "--toy", str(tmp_path)],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert (tmp_path / "numerics.log").read_text().endswith(": ok\n")
    assert "| forward + backward |" in (tmp_path / "speed.md").read_text()
    rows = json.loads((tmp_path / "operator_gpu.json").read_text())["rows"]
    assert [row["direction"] for row in rows] == ["forward", "forward + backward"]
    for row in rows:
        assert all(row["seconds"][name] > 0 for name in ("ours", "xla"))
