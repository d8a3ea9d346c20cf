"""Configurations: what is accepted, and the one line that each mistake gets."""

import re
from pathlib import Path
from typing import Any

import jax
import pytest

import nha_jax
from tests.support.paths import ROOT
from tests.support.train.tiny_run import Nha
from train.cli import main
from train.commands.train import parse_overrides
from train.config import EvaluationConfig, TrainConfig
from train.config_keys import keys
from train.devices.mesh import make_mesh
from train.errors import ConfigError
from train.load_config import load_config
from train.renamed_keys import RENAMED_KEYS

# (arguments, what the line must contain)
MISTAKES = [
    (
        ["--optimizer.learning_rat=1e-3"],
        ["optimizer.learning_rat = 0.001", "optimizer.learning_rate?"],
    ),
    (["--learning_rate=1"], ["learning_rate = 1", "did you mean optimizer.learning_rate?"]),
    (["--model.windowsize=3"], ["model.windowsize = 3", "did you mean model.window_size?"]),
    (["--optimizer.lr=1"], ["optimizer.lr = 1", "learning_rate, warmup_steps"]),
    (["--steps.more=1"], ["steps.more = 1", "no such key"]),
    (["--steps=1e3"], ["steps = 1000.0", "an integer"]),
    (["--steps=true"], ["steps = true", "an integer"]),
    (["--steps=0"], ["steps = 0", "at least 1"]),
    (["--optimizer.learning_rate=fast"], ['optimizer.learning_rate = "fast"', "a number"]),
    (["--optimizer.learning_rate=.nan"], ["optimizer.learning_rate = nan", "finite"]),
    (["--optimizer.schedule=cos"], ['optimizer.schedule = "cos"', "cosine, linear, constant"]),
    (["--optimizer.warmup_steps=500"], ["optimizer.warmup_steps = 500", "at most steps"]),
    (["--model.num_query_heads=3"], ["model.", "num_query_heads=3", "32"]),
    (["--model.num_kv_heads=4"], ["model.num_kv_heads=4", "num_query_heads=2"]),
    (["--model.window_size=-1"], ["model.window_size=-1", "at least 0"]),
    (["--model.window_size=[16, wide]"], ['model.window_size = [16, "wide"]', "null"]),
    (["--model.vocab_size=256"], ["model.vocab_size = 256", "257"]),
    (["--model.mup_base_width=0"], ["model.mup_base_width=0", "at least 1"]),
    (["--model.mup_base_width=wide"], ['model.mup_base_width = "wide"', "an integer or null"]),
    (["--model.dtype=float16"], ['model.dtype = "float16"', "bfloat16, float32"]),
    (["--model={preset: nha-9b}"], ['model.preset = "nha-9b"', "nha-340m"]),
    (["--model.kernel_options.pallas_tpu.chunks=8"], ["'pallas_tpu'] has no 'chunks'", "chunk"]),
    (["--model.kernel_options.pallas_tpu.chunk=7"], ["'pallas_tpu']", "chunk must be", "got 7"]),
    (["--model.kernel_options=7"], ["model.kernel_options = 7", "a mapping of text to"]),
    (["--model.implementation=pallas"], ["model.implementation", "'pallas_tpu'", "'pallas'"]),
    (["--model.rope_scaling.kind=llama3"], ["model.rope_scaling.factor: missing", "a number"]),
    (["--model.rope_scaling={kind: ntk, factor: 2}"], ['model.rope_scaling.kind = "ntk"', "yarn"]),
    (
        ["--model.rope_scaling={kind: linear, factor: 0.5}"],
        ["model.rope_scaling.factor=0.5", "at least 1"],
    ),
    (["--model.experts.count=8"], ["model.experts.per_token: missing", "an integer"]),
    (["--model.experts.number=8"], ["model.experts.number = 8", "count, per_token, size"]),
    (
        ["--model.experts={count: 8, per_token: 9, size: 16}"],
        ["model.experts.per_token=9", "at most count=8"],
    ),
    (["--model.experts=8"], ["model.experts = 8", "a section of keys or null"]),
    (["--model.implementation=pallas_gpu"], ["model.implementation='pallas_gpu': ", "float32"]),
    (["--model.attention_bias=true"], ["model.attention_bias = true", "none, qkv, all"]),
    (["--data=words"], ['data = "words"', "a section"]),
    (["--data.sequence_length=1"], ["data.sequence_length = 1", "at least 2"]),
    (["--data.corpus=null"], ["data.corpus = null", "text"]),
    (["--data.corpus=/nowhere/at/all"], ["data.corpus = '/nowhere/at/all'", "no such folder"]),
    (["--data.held_out_fraction=1e-9"], ["data.held_out_fraction = 1e-09", "evaluation"]),
    (["--batch_size=7", "--mesh.data=7"], ["mesh = {data: 7, fsdp: 1, ", "number of devices"]),
    (["--mesh.data=-1", "--mesh.fsdp=-1"], ["mesh.fsdp = -1", "one axis"]),
    (["--seed=[1"], ["--seed=[1", "not valid YAML"]),
    (["--seed"], ["--seed", "value is missing"]),
    (["seed=1"], ["seed=1", "expected --key=value"]),
]


@pytest.mark.parametrize(("arguments", "parts"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_is_one_line_and_nothing_is_written(
    nha: Nha, capsys: pytest.CaptureFixture[str], arguments: list[str], parts: list[str]
) -> None:
    assert main(["train", str(nha.config_file), *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("nha: ")
    assert output.err.count("\n") == 1
    for part in parts:
        assert part in output.err
    assert not nha.run.exists()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("steps: [1", ["line 2", "not valid YAML"]),
        ("steps: 1\nsteps: 2", ["steps", "twice", "line 2"]),
        ("- steps", ["key: value"]),
        ("steps: 1", ["run: missing", "text"]),
    ],
    ids=["syntax", "twice", "list", "missing"],
)
def test_a_bad_file_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, parts: list[str]
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text + "\n")
    assert main(["train", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for part in parts:
        assert part in error


def test_missing_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "nowhere.yaml"]) == 2
    assert "nowhere.yaml: cannot read the configuration" in capsys.readouterr().err


def test_a_corpus_without_text_is_named(
    nha: Nha, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "nothing.txt").touch()
    assert main(["train", str(nha.config_file), f"--data.corpus={tmp_path / 'empty'}"]) == 2
    assert f"{tmp_path / 'empty'}': found no text" in capsys.readouterr().err
    assert not nha.run.exists()


def test_overrides_are_yaml(nha: Nha) -> None:
    config = nha.config(
        optimizer__learning_rate=1,
        model__window_size=[4],
        optimizer__clip_norm=None,
    )
    assert config.optimizer.learning_rate == 1
    assert config.model.window_size == (4,)
    assert config.optimizer.clip_norm is None
    assert parse_overrides(["--a.b=c=d", "--e", "-1"]) == [("a.b", "c=d"), ("e", "-1")]


def test_old_names_of_keys_still_work(nha: Nha, capsys: pytest.CaptureFixture[str]) -> None:
    text = nha.config_file.read_text()
    for old, new in RENAMED_KEYS.items():
        text = text.replace(f"{new.split('.')[-1]}:", f"{old.split('.')[-1]}:")
    nha.config_file.write_text(text)
    assert nha.config().evaluation == EvaluationConfig(every=20, sequences=16, final_sequences=32)
    warnings = capsys.readouterr().err.splitlines()
    assert (
        "nha: evaluation.windows is now called evaluation.sequences; the old name still works"
        in warnings
    )
    # The name in the file decides nothing about an override.
    for name in ("windows", "sequences"):
        assert nha.config(**{f"evaluation__{name}": 3}).evaluation.sequences == 3
    section = nha.config(evaluation={"windows": 5}).evaluation
    assert (section.every, section.sequences) == (250, 5)


def test_a_key_under_both_names_is_refused(nha: Nha) -> None:
    message = "evaluation.windows is the old name of evaluation.sequences, and both are given"
    with pytest.raises(ConfigError, match=message):
        nha.config(evaluation={"windows": 5, "sequences": 6})


def test_numbers_with_an_exponent_are_numbers(nha: Nha) -> None:
    nha.config_file.write_text(nha.config_file.read_text().replace("0.003", "3e-3"))
    assert nha.config().optimizer.learning_rate == 3e-3


def test_preset_with_overrides(nha: Nha) -> None:
    overrides = {"num_layers": 2, "kernel_options": {"pallas_tpu": {"chunk": 128}}}
    model = nha.config(model={"preset": "nha-340m", **overrides}).model
    assert (model.hidden_size, model.num_layers, model.mlp_size) == (1024, 2, 2816)
    assert model.kernel_options == {"pallas_tpu": {"chunk": 128}}


def test_block_sizes_are_now_options_of_the_tpu_kernels(nha: Nha) -> None:
    wanted = {"pallas_tpu": {"chunk": 128}}
    assert nha.config(model__block_sizes__chunk=128).model.kernel_options == wanted
    model = nha.config().model.to_dict()
    del model["kernel_options"]
    assert nha.config(model=model | {"block_sizes": None}).model.kernel_options is None
    assert nha.config(model=model | {"block_sizes": {"chunk": 128}}).model.kernel_options == wanted


def test_every_key_has_help() -> None:
    assert [key.name for key in keys() if not key.help] == []
    assert "model.num_slots" in {key.name for key in keys()}


def test_sections_check_themselves_without_a_file(nha: Nha) -> None:
    config = nha.config()
    values = {name: getattr(config, name) for name in ("run", "batch_size", "model", "data")}
    with pytest.raises(ValueError, match="steps = 0: expected at least 1"):
        TrainConfig(steps=0, **values)


def test_quickstart_is_valid() -> None:
    root = ROOT
    config = load_config(str(root / "configs" / "quickstart.yaml"))
    assert config.data.corpus == "stdlib"
    assert 0.5e6 < nha_jax.num_parameters(config.model) < 1e6


def test_fine_tuning_on_dialogues_is_valid() -> None:
    """All parameters are trained, in float32; a sequence has room for the longest dialogue."""
    path = str(ROOT / "configs" / "sft.yaml")
    config = load_config(path, [("model.preset", "llama-3-8b")])
    assert (config.trainable, config.model.param_dtype) == (("*",), "float32")
    assert f"--max-tokens {config.data.sequence_length}" in Path(path).read_text()
    assert config.optimizer.warmup_steps == 0.03 * config.steps


def test_help_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    assert stopped.value.code == 0
    output = capsys.readouterr().out
    for key in keys():
        assert (f"{key.name}:" if key.is_section else f"--{key.name} ") in output


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["--version"]])
def test_help_exits_well(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 0
    assert "nha" in capsys.readouterr().out


def test_generate_names_a_folder_without_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(tmp_path), "--prompt", "x"]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert main(["generate", str(tmp_path / "none"), "--prompt", "x"]) == 2
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            {"batch_size": 12},
            "batch_size = 12: expected a multiple of mesh.data x mesh.fsdp, which is 8",
        ),
        ({"mesh__data": 3}, "mesh = {data: 3, fsdp: 1, tensor: 1, context: 1}: expected sizes"),
        ({"mesh__fsdp": 3}, "mesh = {data: -1, fsdp: 3, tensor: 1, context: 1}: expected sizes"),
        (
            {"mesh__fsdp": 8, "model__hidden_size": 36},
            "model.hidden_size = 36: expected a multiple of mesh.fsdp",
        ),
        ({"mesh__tensor": 4}, "model.num_query_heads = 2: expected a multiple of mesh.tensor"),
        (
            {"mesh__context": 8, "data__sequence_length": 20},
            "data.sequence_length = 20: expected a multiple of mesh.context, which is 8",
        ),
        (
            {"mesh__fsdp": 4, "batch_size": 8, "micro_batches": 2},
            "batch_size / micro_batches = 4: expected a multiple of mesh.data x mesh.fsdp",
        ),
        (
            {"mesh__tensor": 2, "model__mlp_size": 63},
            "model.mlp_size = 63: expected a multiple of mesh.tensor, which is 2",
        ),
        (
            {"mesh__tensor": 2, "model__experts": {"count": 4, "per_token": 2, "size": 9}},
            "model.experts.size = 9: expected a multiple of mesh.tensor, which is 2",
        ),
    ],
    ids=[
        "batch",
        "data",
        "fsdp",
        "hidden_size",
        "tensor",
        "context",
        "micro_batches",
        "mlp_size",
        "experts",
    ],
)
def test_what_does_not_fit_eight_devices_is_refused(
    nha: Nha, overrides: dict[str, Any], line: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(line)):
        make_mesh(nha.config(**overrides), jax.devices()[:1] * 8)
