"""What only adds to a run cannot cost it; what can be found out before step 1 is."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import pytest
import tokenizers

from tests.support.train.tiny_run import Nha
from train.cli import main
from train.config import DataConfig
from train.data.corpus import load_corpus
from train.errors import ConfigError, do_without
from train.loop.profiling import Profiler, check_profile
from train.loop.train import train
from train.report.metrics import Dispensable, MetricsLog
from train.storage.result import Result


def fail(*arguments: Any, **named: Any) -> Any:
    raise RuntimeError("it broke\nand more")


def warnings(error: str) -> list[str]:
    return [line for line in error.splitlines() if line.startswith("nha: ")]


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A prepared folder whose tokenizer knows two words, and makes nothing of blanks."""
    vocabulary = {"</s>": 0, "document": 1, "other": 2}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="other"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    texts = [json.dumps({"text": f"document {i} document " * 9}) + "\n" for i in range(20)]
    (tmp_path / "texts.jsonl").write_text("".join(texts))
    assert prepare_words(tmp_path, "texts.jsonl", "words") == 0
    return tmp_path / "words"


def prepare_words(folder: Path, texts: str, name: str) -> int:
    options = [f"--tokenizer={folder / 'tokenizer.json'}", "--workers=1"]
    command = ["data", "prepare", str(folder / name), str(folder / texts), *options]
    return main([*command, "--held-out-fraction=0.3"])


def test_a_finished_training_keeps_its_model_whatever_fails_afterwards(
    nha: Nha, undisturbed: Nha, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(undisturbed.run, nha.run)
    shutil.rmtree(nha.run / "model")
    for name in ("result.json", "run.json"):  # by a power cut
        (nha.run / name).write_bytes(b"")
    pictures = [nha.run / "loss.png", nha.run / "slot_weight.png"]
    for name in ("complete", "gzip_references"):
        monkeypatch.setattr(f"train.loop.trainer.{name}", fail)
    for name in ("plot_loss_curve", "plot_slot_weight"):
        monkeypatch.setattr(f"train.report.reporting.{name}", fail)
    monkeypatch.setattr("train.report.metrics.TensorBoard", fail)
    assert train(nha.config()) == 0
    output, error = capsys.readouterr()
    names = ["TensorBoard", "gzip's bits per byte", *map(str, pictures), "sample"]
    assert sorted(warnings(error)) == sorted(
        [f"nha: {nha.run / 'run.json'}: damaged; written again"]
        + [f"nha: {name}: it broke; going on without it" for name in names]
    )
    assert nha.model_bytes() == undisturbed.model_bytes()
    result, whole = Result.read(nha.run / "result.json"), undisturbed.run / "result.json"
    assert result is not None
    assert (result.step, result.references, result.sample) == (120, {}, None)
    assert result.held_out_bits_per_byte == json.loads(whole.read_text())["held_out_bits_per_byte"]
    assert "continues" not in output
    assert nha.losses() == undisturbed.losses()

    # With fewer steps it stays finished, and says what is true.
    assert train(nha.config(steps=60)) == 0
    output = capsys.readouterr().out
    assert "This run is finished: 120 steps are done; steps = 60 takes none back." in output
    assert "Held-out bits per byte after 120 steps" in output


def test_a_prompt_without_a_token_is_found_before_the_first_step(
    nha: Nha, words: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    for blank in ('" "', '"\\n\\t"'):
        arguments = [f"--data.corpus={words}", f"--sample.prompt={blank}"]
        assert main(["train", str(nha.config_file), *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("nha: sample.prompt = ")
        assert "makes no token of it" in error
        assert error.count("\n") == 1
    assert not nha.run.exists()


@pytest.mark.parametrize("text", ["", " ", "\n \n"], ids=repr)
def test_a_corpus_without_a_token_to_predict_is_refused(words: Path, text: str) -> None:
    folder = words.parent
    lines = [json.dumps({"text": f" {text}" + " " * i}) + "\n" for i in range(20)]
    (folder / "blank.jsonl").write_text("".join(lines))
    assert prepare_words(folder, "blank.jsonl", "blank") == 0
    with pytest.raises(ConfigError, match="has no token to predict for training"):
        load_corpus(DataConfig(corpus=str(folder / "blank"), sequence_length=16))


def test_a_profile_that_cannot_be_written_is_found_before_the_first_step(
    nha: Nha, undisturbed: Nha, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(undisturbed.run, nha.run)
    (nha.run / "profile").write_text("in the way")
    command = ["train", str(nha.config_file), "--steps=125", "--logging.profile=[121, 122]"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("nha: logging.profile = [121, 122]: cannot write into ")
    assert error.count("\n") == 1
    check_profile(None, nha.run / "profile")
    check_profile((1, 2), nha.run / "nowhere")


@pytest.mark.parametrize("broken", ["start_trace", "stop_trace"])
def test_a_trace_that_fails_is_a_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    broken: str,
) -> None:
    for name in ("start_trace", "stop_trace"):
        monkeypatch.setattr(jax.profiler, name, fail if name == broken else lambda *_: None)
    with Profiler((1, 3), tmp_path) as profiler:
        for step in range(1, 6):
            profiler.before(step)
            profiler.after(step, ())
    assert capsys.readouterr().err == "nha: logging.profile: it broke; going on without it\n"


class Recorder:
    """A reporter that notes what it gets, and fails at a step or when it is closed."""

    def __init__(self, fails_at: int | None):
        self.steps: list[int] = []
        self._fails_at = fails_at

    def write(self, row: dict[str, Any]) -> None:
        if row["step"] == self._fails_at:
            fail()
        self.steps.append(row["step"])

    def close(self) -> None:
        if self._fails_at is None:
            fail()


@pytest.mark.parametrize(("fails_at", "steps"), [(2, [1]), (None, [1, 2, 3])])
def test_a_reporter_that_fails_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fails_at: int | None, steps: list[int]
) -> None:
    recorder = Recorder(fails_at)
    more = [Dispensable("logging.wandb", lambda: recorder), Dispensable("never", fail)]
    lines, events = tmp_path / "metrics.jsonl", tmp_path / "events"
    with MetricsLog(lines, events, after_step=0, more=more) as log:
        for step in (1, 2, 3):
            log.write({"step": step, "loss": 0.5})
    assert recorder.steps == steps
    assert len(lines.read_text().splitlines()) == 3
    assert sorted(warnings(capsys.readouterr().err)) == [
        "nha: logging.wandb: it broke; going on without it",
        "nha: never: it broke; going on without it",
    ]


def test_an_error_without_words_and_an_interrupt(capsys: pytest.CaptureFixture[str]) -> None:
    with do_without("picture"):
        raise AssertionError
    assert capsys.readouterr().err == "nha: picture: AssertionError; going on without it\n"
    with pytest.raises(KeyboardInterrupt), do_without("picture"):
        raise KeyboardInterrupt
