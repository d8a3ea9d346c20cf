"""`nha inspect`: its numbers against a direct computation, its files, and what it refuses."""

import argparse
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import nha_jax
from nha_jax.tokenizer.as_bytes import ByteTokenizer
from train.cli import main
from train.commands.inspect import _output_path
from train.errors import ConfigError
from train.inspect.figure import draw
from train.inspect.measure import Inspection, format_table, half_life, inspect
from train.storage.atomic import write_atomically
from train.text.user_texts import read_tokens

WINDOWS = (4, 0, None)
CONTEXT = 32
TEXT = bytes(range(97, 123)) * 3 + b"the end\n"  # two whole contexts, and 22 tokens of a third


@pytest.fixture(scope="module")
def model() -> nha_jax.Model:
    config = nha_jax.ModelConfig(
        vocab_size=257,
        num_layers=3,
        hidden_size=16,
        num_query_heads=4,
        num_kv_heads=2,
        num_slots=5,
        window_size=WINDOWS,
        mlp_size=24,
        initializer_range=0.3,
        dtype="float32",
        implementation="reference",
    )
    return nha_jax.Model(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def run(model: nha_jax.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    nha_jax.save(folder, model)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "story.txt"
    path.write_bytes(TEXT)
    return path


def constant_inspection(half_lives: list[float], windows: tuple[int | None, ...]) -> Inspection:
    """One head a layer, whose slots have these half-lives."""
    shape = (len(windows), 1)
    return Inspection(
        tokens=100,
        context=100,
        windows=windows,
        bin_edges=np.array([0, 100]),
        slot_weight=np.full((*shape, 1), 0.25),
        mean_slot_weight=np.full(shape, 0.25),
        mean_empty_slot_weight=np.full(shape, 0.05),
        half_life=np.broadcast_to(half_lives, (*shape, len(half_lives))),
    )


def test_half_life_of_constant_decays() -> None:
    decay = np.array([0.5, 0.5 ** (1 / 40), 1.0, 0.0])
    with np.errstate(divide="ignore"):
        found = half_life(np.log(decay))
    np.testing.assert_allclose(found, [1, 40, np.inf, 0])


def test_numbers_equal_those_of_each_context_read_alone(model: nha_jax.Model) -> None:
    tokens = np.frombuffer(TEXT, np.uint8).astype(np.int32)
    found = inspect(model, tokens, CONTEXT)
    pieces = [tokens[start : start + CONTEXT] for start in range(0, len(tokens), CONTEXT)]
    seen = [jax.jit(nha_jax.Model.diagnose)(model, piece[None]) for piece in pieces]
    slot_weight = np.concatenate([s.slot_weight[:, 0] for s in seen], axis=1)  # [L, T, Hq]
    log_decay = np.concatenate([s.log_decay[:, 0] for s in seen], axis=1)
    assert len(pieces[-1]) == 22
    assert (found.tokens, found.context, found.windows) == (len(TEXT), CONTEXT, WINDOWS)
    np.testing.assert_allclose(found.slot_weight, slot_weight.swapaxes(1, 2), rtol=1e-4)
    np.testing.assert_allclose(found.mean_slot_weight, slot_weight.mean(1), rtol=1e-4)
    np.testing.assert_allclose(found.half_life, np.log(2) / -log_decay.mean(1), rtol=1e-4)
    np.testing.assert_allclose(found.mean_slot_weight[1], 1, rtol=1e-6)  # window 0: slots alone
    position = np.arange(len(TEXT)) % CONTEXT
    early = slot_weight[0, position < WINDOWS[0]].sum(0) / len(TEXT)
    expected = [early, np.zeros(4), found.mean_slot_weight[2]]
    np.testing.assert_allclose(found.mean_empty_slot_weight, expected, rtol=1e-4)


def test_long_texts_are_binned(model: nha_jax.Model) -> None:
    tokens = np.resize(np.frombuffer(TEXT, np.uint8), 300).astype(np.int32)
    fine = inspect(model, tokens[:256], CONTEXT)
    coarse = inspect(model, tokens, CONTEXT)
    np.testing.assert_array_equal(coarse.bin_edges, np.arange(0, 301, 2))
    pairs = fine.slot_weight.reshape(3, 4, 128, 2).mean(-1)
    np.testing.assert_allclose(coarse.slot_weight[..., :128], pairs, rtol=1e-5)


def test_command_writes_picture_and_numbers_and_prints_a_table(
    run: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["inspect", str(run), "--text", str(text), "--max-tokens", "70"]
    assert main([*arguments, "--context", str(CONTEXT)]) == 0
    picture, numbers = run / "inspect-story.png", run / "inspect-story.json"
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(numbers.read_text())
    assert (found["run"], found["text"]) == (str(run), str(text))
    assert (found["tokens"], found["context"]) == (70, CONTEXT)
    assert found["windows"] == list(WINDOWS)
    assert found["bin_edges"] == list(range(71))
    shapes = {name: np.shape(found[name]) for name in found if name.endswith(("weight", "life"))}
    assert shapes == {
        "slot_weight": (3, 4, 70),
        "mean_slot_weight": (3, 4),
        "mean_empty_slot_weight": (3, 4),
        "half_life": (3, 2, 5),
    }
    assert 0 <= np.min(found["slot_weight"]) <= np.max(found["slot_weight"]) <= 1
    for layer, summary in enumerate(found["layers"]):
        assert (summary["layer"], summary["window"]) == (layer, WINDOWS[layer])
        mean = np.mean(found["mean_slot_weight"][layer])
        assert summary["slot_weight"] == pytest.approx(mean, rel=1e-4)
        low, middle, high = (summary[f"half_life_p{p}"] for p in (10, 50, 90))
        assert np.min(found["half_life"][layer]) <= low < middle < high
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "model reading story.txt, 70 tokens"
    assert lines[3].split()[:2] == ["0", "4"]
    assert lines[4].split()[:4] == ["1", "0", "1.000", "0.000"]
    assert lines[5].endswith("the slots stay empty")
    assert lines[6:] == [str(picture), str(numbers)]
    assert not list(run.glob(".*"))


def test_numbers_are_there_though_the_picture_fails(
    run: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object) -> bytes:
        raise RuntimeError("no font")

    monkeypatch.setattr("train.inspect.figure.draw", fail)
    arguments = ["--context", str(CONTEXT), "--output", str(text.with_suffix(".png"))]
    assert main(["inspect", str(run), "--text", str(text), *arguments]) == 0
    output, error = capsys.readouterr()
    numbers, picture = text.with_suffix(".json"), text.with_suffix(".png")
    assert json.loads(numbers.read_text())["tokens"] == len(TEXT)
    assert output.endswith(f"{numbers}\n")
    assert error == f"nha: {picture}: no font; going on without it\n"
    assert not picture.exists()


class NoTokens(ByteTokenizer):
    def encode_prompt(self, text: str, *, chat: bool = False) -> np.ndarray:
        return np.zeros(0, np.int32)


def test_a_text_without_a_token_is_refused(text: Path) -> None:
    with pytest.raises(ConfigError, match="makes no token of this text"):
        read_tokens(str(text), NoTokens())


def test_infinite_half_lives_are_null_in_json_inf_in_the_table_and_can_be_drawn() -> None:
    inspection = constant_inspection([10.0, np.inf, np.inf], windows=(20, 200))
    found = json.loads(inspection.to_json())
    assert found["half_life"][0] == [[10.0, None, None]]
    used, unused = found["layers"]
    assert (used["half_life_p10"], used["half_life_p50"]) == (10.0, None)
    assert used["beyond_window"] == pytest.approx(2 / 3, rel=1e-5)
    assert unused["beyond_window"] is None
    *_, used_line, unused_line = format_table(inspection).splitlines()
    assert used_line.split() == ["0", "20", "0.250", "0.050", "10.0", "inf", "inf", "67%"]
    assert unused_line.endswith("the slots stay empty")
    assert draw(inspection, "title").startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--text": "nowhere.txt"}, "nowhere.txt: cannot read the text: No such file"),
        ({"--text": "empty.txt"}, "empty.txt: the text is empty"),
        ({"run": "nowhere"}, "nowhere: no such folder"),
        ({"--max-tokens": "0"}, "--max-tokens = 0: must be at least 1"),
        ({"--context": "-3"}, "--context = -3: must be at least 1"),
        ({"--output": "picture.jpg"}, "--output = 'picture.jpg': must end in .png"),
        ({"--output": "nowhere/a.png"}, "--output = 'nowhere/a.png': there is no folder nowhere"),
    ],
    ids=lambda value: next(iter(value.values())) if isinstance(value, dict) else "",
)
def test_a_wrong_argument_is_one_line(
    run: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, str],
    message: str,
) -> None:
    monkeypatch.chdir(text.parent)
    Path("empty.txt").touch()
    options = {"--text": text.name} | changes
    folder = options.pop("run", str(run))
    flat = [part for pair in options.items() for part in pair]
    assert main(["inspect", folder, *flat]) == 2
    error = capsys.readouterr().err
    assert error.startswith("nha: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["config.json", "mine.png"])
def test_what_is_no_inspection_is_not_overwritten(
    run: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """The numbers go beside the picture: config.json beside config.png."""
    (tmp_path / name).write_text('{"mine": 1}')
    picture = (tmp_path / name).with_suffix(".png")
    assert main(["inspect", str(run), "--text", str(text), "--output", str(picture)]) == 2
    assert f"{tmp_path / name} exists, and is no inspection" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == '{"mine": 1}'


def test_a_device_without_an_end_is_not_read(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for device in ("/dev/zero", "/dev/full", "/dev/urandom"):
        assert main(["inspect", str(run), "--text", device]) == 2
        assert main(["generate", str(run), "--prompt-file", device]) == 2
        assert main(["data", "prepare", "unused", str(run), "--tokenizer", device]) == 2
        lines = capsys.readouterr().err.splitlines()
        for option, line in zip(("--text", "--prompt-file", "--tokenizer"), lines, strict=True):
            assert line.startswith(f"nha: {option} = '{device}': a device")


def test_a_model_that_reads_no_bytes_is_refused(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = nha_jax.ModelConfig.preset("nha-tiny", vocab_size=40, num_layers=1)
    nha_jax.save(tmp_path / "small", nha_jax.Model(config, rngs=nnx.Rngs(0)))
    assert main(["inspect", str(tmp_path / "small"), "--text", str(text)]) == 2
    assert "vocabulary of 40 tokens" in capsys.readouterr().err


def test_broken_parameters_are_refused(model: nha_jax.Model) -> None:
    broken = nnx.clone(model)
    broken.norm.scale[...] = np.nan
    inspect(broken, [1, 2], CONTEXT)  # what comes after the last block is not looked at
    broken.embed.embedding[...] = np.nan
    with pytest.raises(ConfigError, match="no number"):
        inspect(broken, [1, 2], CONTEXT)


@pytest.mark.parametrize(
    "name",
    ["a$x^$b.txt", "日本語 $\\frac.txt", os.fsdecode(b"caf\xe9\n\t$ _{.txt"), "%s {} ^^.txt"],
)
def test_a_title_is_the_name_as_it_is(name: str, recwarn: pytest.WarningsRecorder) -> None:
    picture = draw(constant_inspection([1.0], (None,)), f"model reading {name}, 20 tokens")
    assert picture.startswith(b"\x89PNG")
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


@pytest.mark.parametrize("stem", ["a" * 251, os.fsdecode(b"\xff" * 240), "[a]$"])
def test_the_picture_of_any_text_has_a_name(tmp_path: Path, stem: str) -> None:
    options = argparse.Namespace(output=None)
    path = _output_path(options, tmp_path, Path(f"{stem}.txt"))
    for written in (path, path.with_suffix(".json")):
        write_atomically(written, "x")
        assert written.name.startswith(f"inspect-{stem}"[:200])
