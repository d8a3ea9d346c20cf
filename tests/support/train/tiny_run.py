"""`nha train` on a tiny configuration, as a process of its own or in that of the tests."""

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from train.cli import main
from train.config import TrainConfig
from train.load_config import load_config
from train.storage.atomic import write_if_changed

LAUNCH = "import sys; from train.cli import main; sys.exit(main())"


class Nha:
    """Runs `nha` on a tiny configuration; `folder` is the run's."""

    def __init__(self, folder: Path, values: dict[str, Any]):
        folder.mkdir(exist_ok=True)
        self.run = folder / "run"
        self.config_file = folder / "config.yaml"
        self.values = {**values, "run": str(self.run)}
        # Two workers share the folder of a run that both read.
        write_if_changed(self.config_file, yaml.safe_dump(self.values))

    def config(self, **overrides: Any) -> TrainConfig:
        """The configuration, checked."""
        pairs = [(key.replace("__", "."), json.dumps(value)) for key, value in overrides.items()]
        return load_config(str(self.config_file), pairs)

    def start(self, *arguments: str, devices: int = 1, **environment: str) -> subprocess.Popen[str]:
        """`nha train` in the background."""
        # As in the tests' own process: compiled sooner, for the same arithmetic in all of them.
        environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        if devices > 1:
            environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
        return subprocess.Popen(
            [sys.executable, "-c", LAUNCH, "train", str(self.config_file), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | environment,
        )

    def start_both(self, *arguments: str) -> list[subprocess.Popen[str]]:
        """`nha train` as two processes of two devices each."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        return [
            self.start(
                "--distributed=true",
                *arguments,
                devices=2,
                JAX_COORDINATOR_ADDRESS=address,
                JAX_NUM_PROCESSES="2",
                JAX_PROCESS_ID=str(index),
            )
            for index in range(2)
        ]

    def train(self, *arguments: str) -> str:
        """`nha train` to its end, in this process; returns what it printed."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            code = main(["train", str(self.config_file), *arguments])
        assert code == 0, printed.getvalue()
        return printed.getvalue()

    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl; a torn last line is an error unless the run is going on."""
        return [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]

    def logged(self) -> int:
        """How many rows metrics.jsonl has by now."""
        metrics = self.run / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def model_bytes(self) -> bytes:
        """The finished model's parameters, as written."""
        return (self.run / "model" / "model.safetensors").read_bytes()

    def losses(self) -> dict[int, tuple[float, float | None]]:
        """step -> (loss, held-out bits per byte), exactly as written."""
        rows = self.rows()
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
        return {row["step"]: (row["loss"], row.get("held_out_bits_per_byte")) for row in rows}


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Returns as soon as `condition` holds; fails if the process ends before."""
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)
