"""The result and the losses of a search that an earlier version made are read."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import nha_jax
from tests.support.paths import FIXTURES
from train.cli import main
from train.search.layerwise import LayerwiseLoss
from train.search.loss_log import LossLog
from train.windows import read_windows


@pytest.fixture
def before(tmp_path: Path) -> Path:
    return shutil.copytree(FIXTURES / "search_before", tmp_path / "before")


def test_the_result_is_windows_for_a_model(before: Path) -> None:
    assert read_windows(str(before / "search.json")) == (4, None, None)


def test_the_losses_are_not_measured_again(before: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    original = LayerwiseLoss.bits_per_byte

    def bits_per_byte(self: LayerwiseLoss, candidates: Any) -> Any:
        measured.extend(candidates)
        yield from original(self, candidates)

    monkeypatch.setattr(LayerwiseLoss, "bits_per_byte", bits_per_byte)
    old = json.loads((before / "search.json").read_text())
    corpus = FIXTURES / "shards_before" / "bytes"
    command = ["search", str(before / "model"), f"--corpus={corpus}", "--sequence-length=16"]
    assert main([*command, "--windows-count=4", "--full-layers=2"]) == 0
    assert measured == []
    new = json.loads((before / "search.json").read_text())
    for key in ("window_size", "bits_per_byte", "budget", "settings", "comparison", "history"):
        assert new[key] == old[key]
    assert main([*command, "--windows-count=4", "--full-layers=3"]) == 0
    assert measured == []  # every choice of three layers was among them


def test_the_result_is_there_though_the_plot_fails(
    before: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr("train.search.result.plot_search", fail)
    result = before / "search.json"
    wanted = json.loads(result.read_text())["window_size"]
    result.write_bytes(b"")  # by a power cut
    corpus = FIXTURES / "shards_before" / "bytes"
    command = ["search", str(before / "model"), f"--corpus={corpus}", "--sequence-length=16"]
    assert main([*command, "--sequences=4", "--full-layers=2", f"--output={result}"]) == 0
    assert json.loads(result.read_text())["window_size"] == wanted
    picture = result.with_suffix(".png")
    assert f"nha: {picture}: no font; going on without it" in capsys.readouterr().err


def test_a_model_option_that_is_new_and_unused_does_not_matter(before: Path) -> None:
    path = before / "search.jsonl"
    header, *losses = path.read_text().splitlines(keepends=True)
    measured_on = json.loads(header)
    assert measured_on["model"].pop("qk_norm") is False  # as if the option had come later
    path.write_text(json.dumps(measured_on) + "\n" + "".join(losses))
    model = nha_jax.load(before / "model").config.to_dict()
    del model["window_size"]
    present = json.loads(header) | {"model": model}
    present["sequences"] = present.pop("windows_count")
    with LossLog(path, present) as log:
        assert len(log.losses) == len(losses) == 7
