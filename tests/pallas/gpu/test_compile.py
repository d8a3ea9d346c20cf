"""Every kernel compiles for Hopper, within its shared memory, and spills no registers.

JAX_PLATFORMS=cpu uv run --isolated --extra cuda pytest -m gpu_aot tests/pallas/gpu  # half an hour
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT

SHARED_MEMORY = 227 * 1024

WINDOW = {"nha_window_queries", "nha_window_tokens"}
SLOTS = {"nha_gates", "nha_states", "nha_slot_queries", "nha_state_grads", "nha_slot_tokens"}

CASES = [
    *({"K": K, "M": M, "G": G} for K, M, G in itertools.product((64, 128), (16, 64, 128), (1, 4))),
    {"K": 128, "M": 64, "G": 4, "segments": True},
    {"K": 128, "M": 64, "W": 0},
    {"K": 128, "M": 64, "W": 1000},
    {"K": 128, "M": 64, "W": None, "segments": True},
    {"K": 192, "M": 64, "W": 32, "segments": True},
    {"K": 256, "M": 16},
    {"K": 256, "M": 64, "W": 32, "segments": True},
    {"K": 256, "M": 128, "G": 4},
    {"K": 256, "M": 64, "W": None, "segments": True},
]


def figures_of(
    fields: dict[str, Any], folder: Path, module: str = "static.ptxas"
) -> dict[str, Any]:
    finished = subprocess.run(
        [sys.executable, "-m", module, json.dumps(fields), str(folder)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        cwd=ROOT / "benchmarks",
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout.splitlines()[-1].partition(": ")[2])


@pytest.mark.gpu_aot
@pytest.mark.parametrize("fields", CASES, ids=lambda x: "-".join(f"{k}{v}" for k, v in x.items()))
def test_compiles_within_the_chips_means(fields, tmp_path):
    pytest.importorskip("jax_plugins.xla_cuda13", reason="needs CUDA: uv run --extra cuda")
    kernels = figures_of({"B": 2, "T": 1024, "H": 2, **fields}, tmp_path)["kernels"]
    W = fields.get("W", 64)
    expected = {"nha_output"}
    expected |= WINDOW if W != 0 else set()
    expected |= SLOTS if W is not None else set()
    assert set(kernels) == expected
    for name, kernel in kernels.items():
        assert kernel["spills"] == 0, (name, kernel)
        assert kernel["shared_memory"] <= SHARED_MEMORY, (name, kernel)
