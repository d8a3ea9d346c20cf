"""Whole runs in object stores, killed and cut off, against one on the disk."""

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nha_jax.storage.stores import Store
from tests.support.stores import FaultyStore, connected, environment_of, serve
from tests.support.train.tiny_run import Nha, wait_for
from train.cli import main

pytestmark = pytest.mark.slow

PATIENCE = 4.0


@pytest.fixture(params=["gs", "s3"])
def server(request: pytest.FixtureRequest) -> Iterator[FaultyStore]:
    with serve(request.param) as server, connected(server, PATIENCE):
        yield server


@pytest.fixture
def store(server: FaultyStore) -> Store:
    return Store(f"{server.url}/run")


def start(nha: Nha, server: FaultyStore, store: Store, *more: str) -> subprocess.Popen[str]:
    options = (f"--run={store}", "--checkpoint.every=20", *more)
    return nha.start(*options, **environment_of(server, PATIENCE))


def steps(store: Store) -> set[int]:
    """The steps of the checkpoints in the store that are finished, checksums and all."""
    names = (name.split("/") for name in store.files("checkpoints"))
    ends = ("objects.json", "checksums.json")
    return {int(name[1]) for name in names if name[1].isdecimal() and name[2] in ends}


def losses(store: Store) -> dict[int, tuple[float, float | None]]:
    rows = [json.loads(line) for line in store.read("metrics.jsonl").splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return {row["step"]: (row["loss"], row.get("held_out_bits_per_byte")) for row in rows}


def test_kills_and_an_outage_leave_no_trace(
    nha: Nha, undisturbed: Nha, server: FaultyStore, store: Store
) -> None:
    for kill in range(3):
        process = start(nha, server, store)
        before = max(steps(store), default=0)
        wait_for(lambda before=before: max(steps(store), default=0) > before, process)
        time.sleep(0.05 * kill)
        process.kill()
        process.communicate()
    process = start(nha, server, store)
    before = max(steps(store))
    wait_for(lambda: max(steps(store)) > before, process)
    with server.outage():
        output, _ = process.communicate(timeout=240)
    assert process.returncode == 1, output
    last = output.strip().splitlines()[-1]
    assert str(store) in last
    assert "the same command resumes" in last
    assert "Traceback" not in output
    process = start(nha, server, store)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert losses(store) == undisturbed.losses()
    assert store.read("model/model.safetensors") == undisturbed.model_bytes()
    result = json.loads((undisturbed.run / "result.json").read_text())
    assert json.loads(store.read("result.json")) == result


def test_a_short_outage_costs_no_more_than_time(
    nha: Nha, undisturbed: Nha, server: FaultyStore, store: Store
) -> None:
    process = start(nha, server, store)
    wait_for(lambda: bool(steps(store)), process)
    with server.outage():
        time.sleep(1.0)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert losses(store) == undisturbed.losses()
    assert store.read("model/model.safetensors") == undisturbed.model_bytes()


def test_two_processes_do_not_train_in_one_folder(
    nha: Nha, server: FaultyStore, store: Store
) -> None:
    first = start(nha, server, store, "--steps=100000")
    wait_for(lambda: bool(steps(store)), first)
    second = start(nha, server, store, "--steps=100000")
    output, _ = second.communicate(timeout=240)
    assert second.returncode == 2, output
    assert "another process is training in this folder" in output.strip().splitlines()[-1]
    first.terminate()
    output, _ = first.communicate(timeout=240)
    assert first.returncode == 143, output


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    nha: Nha, undisturbed: Nha, server: FaultyStore, store: Store
) -> None:
    process = start(nha, server, store)
    wait_for(lambda: max(steps(store), default=0) >= 40, process)
    process.kill()
    process.communicate()
    newest = max(steps(store))
    victim = next(
        name for name in store.files(f"checkpoints/{newest}/model") if "ocdbt.process_0/d/" in name
    )
    content = bytearray(store.read(victim))
    content[len(content) // 2] ^= 1
    store.write(victim, bytes(content))
    process = start(nha, server, store)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert f"set aside as damaged-{newest}" in output
    assert store.files(f"checkpoints/damaged-{newest}")
    assert losses(store) == undisturbed.losses()
    assert store.read("model/model.safetensors") == undisturbed.model_bytes()


def test_a_run_in_a_store_is_read_and_started_from(
    nha: Nha,
    server: FaultyStore,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    nha.train(f"--run={store}", "--steps=20")
    for name in (str(store), f"{store}/model"):
        assert main(["generate", name, "--prompt", "line", "--max-new-tokens", "3"]) == 0
    code = main(["eval", str(store), "--tasks=copy", "--lengths=64", "--limit=2"])
    assert code == 0
    assert json.loads(Path("eval.json").read_text())["model"] == str(store)
    printed = nha.train(f"--run={store}-2", f"--initial_model={store}", "--steps=5")
    assert "from     " in printed


@pytest.mark.parametrize(
    ("run", "line"),
    [
        ("memory://run", "nothing here serves memory://"),
        ("hdfs://host/run", "nothing here serves hdfs://"),
        ("gs://", "expected a bucket"),
    ],
)
def test_a_place_that_nothing_serves_is_refused_when_it_is_read(
    nha: Nha, run: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(nha.config_file), f"--run={run}"]) == 2
    message = capsys.readouterr().err.strip()
    assert line in message
    assert f"run = {run!r}" in message
    assert "\n" not in message


def test_a_bucket_that_is_not_there_is_one_line_before_anything_compiles(
    nha: Nha, server: FaultyStore, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    assert main(["train", str(nha.config_file), f"--run={server.scheme}://nowhere/run"]) == 2
    assert time.monotonic() - began < 5
    assert "no such bucket" in capsys.readouterr().err.strip().splitlines()[-1]


def test_two_processes_of_one_run_are_killed_and_finish(
    nha: Nha, undisturbed: Nha, server: FaultyStore, store: Store
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment_of(server, PATIENCE).items():
            patch.setenv(name, value)
        options = (f"--run={store}", "--checkpoint.every=20")
        if server.scheme == "s3":  # Orbax serves none
            both = nha.start_both(*options)
            outputs = [process.communicate(timeout=240)[0] for process in both]
            assert [process.returncode for process in both] == [2, 2], outputs
            assert "a run of 2 processes cannot save checkpoints there" in outputs[0]
            return
        both = nha.start_both(*options)
        wait_for(lambda: max(steps(store), default=0) >= 40, both[0])
        for process in both:
            process.kill()
            process.communicate()
        both = nha.start_both(*options)
        outputs = [process.communicate(timeout=240)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert "resuming after step" in outputs[0]
    found, expected = losses(store), undisturbed.losses()
    assert found.keys() == expected.keys()
    for step, (loss, _) in expected.items():
        assert found[step][0] == pytest.approx(loss, rel=1e-4), step
    assert "model/model.safetensors" in store.files("model")
