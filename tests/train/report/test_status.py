"""Tests of `nha status`."""

import fcntl
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from train.cli import main
from train.report.status import read_status

RECORD = {
    "config": {"steps": 1000, "batch_size": 4, "data": {"sequence_length": 100}},
    "corpus": "x",
}


def make_run(folder: Path, rows: int = 60, **last: Any) -> Path:
    (folder / "checkpoints" / "50").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(RECORD))
    lines = [
        {"step": step, "loss": 5.0 - step / 100, "tokens_per_second": 2000.0, "skipped_updates": 0}
        for step in range(1, rows + 1)
    ]
    lines[39]["held_out_bits_per_byte"] = 1.5
    lines[-1] |= last
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sessions = [
        {"began": 0, "ended": 200, "first_step": 0, "last_step": 60, "seconds": {"steps": 150}}
    ]
    (folder / "sessions.json").write_text(json.dumps(sessions))
    return folder


def page(run: Path) -> dict[str, str]:
    lines = str(read_status(str(run))).splitlines()
    return {line[:9].strip(): line[9:] for line in lines}


def test_a_run_that_was_stopped(tmp_path: Path) -> None:
    found = page(make_run(tmp_path))
    assert found["state"] == "stopped"
    assert found["step"] == "60 of 1,000 (6.0%)"
    assert found["loss"] == "4.4000, -0.2000 over 20 rows"
    assert found["held out"] == "1.5000 bits a byte at step 40"
    assert found["rate"] == "2,000 tokens/s"
    assert found["saved"].startswith("step 50, ")
    assert found["goodput"].startswith("75.0% of 3 min 20 s in steps")
    assert "warning" not in found


def test_a_run_that_is_trained_has_time_left(tmp_path: Path) -> None:
    make_run(tmp_path)
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert page(tmp_path)["state"] == "training, 3 min 8 s left"  # 940 * 400 / 2000
    assert page(tmp_path)["state"] == "stopped"


def test_a_finished_run(tmp_path: Path) -> None:
    make_run(tmp_path, step=1000)
    result = {
        "step": 1000, "held_out_bits_per_byte": 1.25, "held_out_perplexity": 2.0, "references": {},
        "prompt": "", "sample": None, "held_out_ema_bits_per_byte": None,
    }  # fmt: skip
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert page(tmp_path)["state"] == "finished: 1.2500 bits a byte held out"


@pytest.mark.parametrize(
    ("make", "warning"),
    [
        (lambda run: (run / "run.json").write_bytes(b""), "run.json is missing or damaged"),
        (lambda run: make_file(run / "watchdog" / "20260101.txt"), "the watchdog ended it 1 times"),
        (lambda run: (run / "checkpoints" / "damaged-40").mkdir(), "damaged-40"),
    ],
)
def test_what_someone_should_look_at(tmp_path: Path, make: Any, warning: str) -> None:
    make(make_run(tmp_path))
    assert warning in page(tmp_path)["warning"]


def make_file(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("")


def test_updates_that_were_skipped_are_a_warning(tmp_path: Path) -> None:
    run = make_run(tmp_path, loss=None, skipped_updates=3)
    text = str(read_status(str(run)))
    assert "3 updates skipped" in text
    assert "the loss of step 60 is not finite" in text
    assert "loss     4.4100" not in text.split("held out")[0].splitlines()[-1]


def test_json_and_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run")
    assert main(["status", str(tmp_path / "run"), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["step"], values["goodput"]) == (60, 0.75)
    (tmp_path / "empty").mkdir()
    for name in ("nothing", "empty"):
        assert main(["status", str(tmp_path / name)]) == 2
        assert f"RUN = {str(tmp_path / name)!r}: no " in capsys.readouterr().err


def test_a_long_log_is_read_from_its_end(tmp_path: Path) -> None:
    run = make_run(tmp_path, rows=50_000)
    began = time.perf_counter()
    assert read_status(str(run)).step == 50_000
    assert time.perf_counter() - began < 1.0


def test_it_takes_no_jax(tmp_path: Path) -> None:
    make_run(tmp_path)
    code = (
        "import sys; from train.cli import main; main(sys.argv[1:]); sys.exit('jax' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, "status", str(tmp_path)], check=True)
