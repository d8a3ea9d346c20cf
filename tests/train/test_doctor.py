"""Tests of `nha doctor`."""

import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.stores import connected, serve
from train import doctor
from train.cli import main
from train.doctor import Finding, examine


def by_name(*places: str) -> dict[str, list[Finding]]:
    found: dict[str, list[Finding]] = {}
    for finding in examine(places):
        found.setdefault(finding.name, []).append(finding)
    return found


def test_it_says_what_there_is(tmp_path: Path) -> None:
    found = by_name(str(tmp_path))
    assert {"python", "packages", "devices", "kernels", "extras", "machine", "disk"} < set(found)
    assert "no TPU in /dev" in found["devices"][0].text
    (kernels,) = found["kernels"]
    assert kernels.text.startswith("reference, xla; not here: pallas_tpu is for TPUs")
    states = {finding.state for findings in found.values() for finding in findings}
    assert "wrong" not in states
    assert found["place"][0].text.startswith(str(tmp_path))


def test_a_package_outside_of_its_bounds_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    version = doctor.importlib.metadata.version
    monkeypatch.setattr(
        doctor.importlib.metadata, "version", lambda name: "9.9" if name == "jax" else version(name)
    )
    wrong = [finding for finding in by_name()["packages"] if finding.state == "wrong"]
    assert wrong[0].text.startswith("jax 9.9, but ")


def test_a_check_that_fails_says_so_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("the chip\nis on fire")

    monkeypatch.setattr(doctor, "_devices", fail)
    found = by_name()
    assert str(found["devices"][0]) == "! devices     the chip is on fire"
    assert "disk" in found


def test_places_that_cannot_be_used_are_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "hdfs://host/x", "--json"]) == 1
    values = json.loads(capsys.readouterr().out)
    assert values[-1]["name"] == "place"
    assert values[-1]["state"] == "wrong"
    assert "nothing here serves hdfs://" in values[-1]["text"]
    assert main(["doctor", str(tmp_path / "not" / "there")]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_store_is_written_to_and_its_clock_compared(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(scheme) as server, connected(server, 3.0):
        assert "written, read and removed" in by_name(server.url)["place"][0].text
        assert "cannot write it" in by_name(f"{scheme}://nowhere/x")["place"][0].text
        late = SimpleNamespace(**{**vars(time), "time": lambda: time.time() + 400})
        monkeypatch.setattr(doctor, "time", late)
        assert re.match(r"\+40\d s off", by_name(server.url)["clock"][0].text)
