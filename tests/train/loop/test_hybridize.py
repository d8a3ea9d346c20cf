"""A run that starts from a converted model: what is trained, what is not, and what it learns from.

The original has full attention; the runs give it short windows.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nha_jax
from nha_jax.sizes import abstract_parameters
from nha_jax.storage.weights import Index, SafetensorsSource
from nha_jax.tokenizer.from_file import FileTokenizer
from tests.support.eight_devices import run_on_eight_devices
from tests.support.paths import ROOT
from tests.support.train.tiny_run import Nha
from train.cli import main
from train.config import TrainConfig
from train.data.batches import Batch
from train.devices.mesh import make_mesh
from train.errors import ConfigError
from train.load_config import load_config
from train.loop.extra_files import check_tokenizer, merge_extra_files
from train.step.flops import training_flops_per_token
from train.step.losses import kl_divergence
from train.step.trainable import Trainable
from train.step.update import TrainingFunctions, TrainState
from train.storage.initial_model import InitialModel, teacher_config
from train.text.loading import load_model


@pytest.fixture
def hybrid(tmp_path: Path, tiny_values: dict[str, Any], original: Path) -> Nha:
    """The tiny run, from the original, with windows and without what is not attention."""
    values = tiny_values | {
        "initial_model": str(original),
        "trainable": ["blocks.attention.*"],
        "model": {"window_size": [4, None], "implementation": "reference"},
        "steps": 6,
        "optimizer": {"learning_rate": 3e-3, "schedule": "constant"},
        "evaluation": {"every": 6, "sequences": 8, "final_sequences": 8},
        "checkpoint": {"every": 100},
    }
    return Nha(tmp_path, values)


def make_functions(config: TrainConfig) -> tuple[TrainingFunctions, InitialModel]:
    assert config.initial_model is not None
    initial = InitialModel.open(config.initial_model)
    return TrainingFunctions(config, make_mesh(config), teacher_config(config)), initial


def by_name(state: nnx.State) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(state))
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.array(x) for path, x in leaves
    }


def follow(
    config: TrainConfig, batch: Batch, count: int
) -> tuple[list[dict[str, float]], TrainState]:
    """The metrics of so many updates on one batch, and the state after them."""
    functions, initial = make_functions(config)
    source = initial.source(config.model)
    state = functions.initial_state(source)
    teacher = functions.read_teacher(source) if config.loss.has_teacher else None
    metrics = []
    for _ in range(count):
        state, arrays = functions.update(state, batch, teacher)
        metrics.append({name: float(x) for name, x in arrays.items()})
    return metrics, state


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"optimizer__learning_rate": 1e-2}, marks=pytest.mark.slow),
        {
            "optimizer__learning_rate": 1e-2,
            "frozen_dtype": "bfloat16",
            "loss__distillation": 100.0,  # the targets are noise, which pulls elsewhere
            "loss__temperature": 2.0,
            "micro_batches": 2,
            "optimizer__weight_decay": 0.5,
        },
        pytest.param(
            {
                "optimizer__learning_rate": 1e-2,
                "loss__cross_entropy": 0,
                "loss__attention_transfer": 1,
                "micro_batches": 2,
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=["cross-entropy", "distillation, bfloat16, micro-batches, decay", "layer by layer"],
)
def test_only_what_is_trainable_changes(hybrid: Nha, batch: Batch, changes: dict[str, Any]) -> None:
    config = hybrid.config(**changes)
    metrics, state = follow(config, batch, 12)
    before = by_name(nnx.state(nha_jax.load(config.initial_model or "")))
    after = by_name(state.model)
    for name, array in after.items():
        is_trained = name.startswith("blocks.attention.")
        stored = jnp.dtype(config.frozen_dtype or "float32")
        assert array.dtype == (np.float32 if is_trained else stored), name
        same = np.array_equal(array, before[name].astype(array.dtype))
        assert same != is_trained, name
    moments = [name for name in by_name(state.optimizer) if ".mu." in name or ".nu." in name]
    assert len(moments) == 2 * sum(name.startswith("blocks.attention.") for name in before)
    assert all(".blocks.attention." in name for name in moments)
    terms = ("distillation", "attention_transfer", "loss")
    values = [row[next(name for name in terms if name in row)] for row in metrics]
    assert values[-1] < 0.9 * values[0]
    assert [row["skipped"] for row in metrics] == [0] * 12


def test_frozen_parameters_cost_no_gradient(hybrid: Nha) -> None:
    def flops(**changes: Any) -> float:
        functions, _ = make_functions(hybrid.config(**changes))
        return functions.trace_update().lower().cost_analysis()["flops"]

    config = hybrid.config()
    tokens = config.batch_size * config.data.sequence_length
    # The gradients of the head and, as XLA counts a loop's body once, of two layers' SwiGLUs.
    spared = 2 * 32 * (257 + 2 * 3 * 48)
    assert flops(trainable=["*"]) - flops() > 0.95 * spared * tokens
    model = nha_jax.training_flops_per_token(config.model, 32)
    assert training_flops_per_token(config) == model - spared
    everything = dataclasses.replace(config, trainable=("*",))
    assert training_flops_per_token(everything) == model
    learning = hybrid.config(loss__distillation=1)
    full = nha_jax.flops_per_token(dataclasses.replace(config.model, window_size=None), 32)
    assert training_flops_per_token(learning) == model - spared + full
    # Layer by layer, neither the head nor a SwiGLU of the model itself is run.
    layers = hybrid.config(loss__cross_entropy=0, loss__attention_transfer=1)
    attention = 3 * (nha_jax.flops_per_token(config.model, 32) - spared)
    assert training_flops_per_token(layers) == attention + full


def test_a_token_meets_few_of_the_frozen_experts(hybrid: Nha) -> None:
    config = hybrid.config(
        initial_model=None,
        model={
            "preset": "nha-tiny", "num_layers": 1, "tie_embeddings": False,
            "experts": {"count": 8, "per_token": 2, "size": 16},
        },
    )  # fmt: skip
    spared = 2 * 128 * (257 + 8 + 2 * 3 * 16)
    model = nha_jax.training_flops_per_token(config.model, 32)
    assert training_flops_per_token(config) == model - spared


@pytest.mark.slow
def test_nothing_to_learn_from_the_model_that_it_is(hybrid: Nha, batch: Batch) -> None:
    config = hybrid.config(model__window_size=None, loss__distillation=1.0, trainable=["*"])
    metrics, _ = follow(config, batch, 1)
    assert abs(metrics[0]["distillation"]) < 1e-7
    assert metrics[0]["loss"] > 1


@pytest.mark.slow
def test_an_optimizer_that_averages_begins_at_the_initial_model(hybrid: Nha) -> None:
    config = hybrid.config(optimizer__name="schedule_free_adamw", optimizer__schedule=None)
    functions, initial = make_functions(config)
    state = functions.initial_state(initial.source(config.model))
    parameters, optimizer = by_name(state.model), by_name(state.optimizer)
    averaged = {name: x for name, x in optimizer.items() if ".z." in name}
    assert len(averaged) == sum(name.startswith("blocks.attention.") for name in parameters)
    for name, array in averaged.items():
        np.testing.assert_array_equal(array, parameters[name.partition(".z.")[2]])


def test_divergence_is_that_of_its_definition() -> None:
    original, logits = np.random.default_rng(0).normal(size=(2, 3, 4, 5))
    p, q = (np.exp(x / 2) / np.exp(x / 2).sum(-1, keepdims=True) for x in (original, logits))
    expected = 4 * (p * np.log(p / q)).sum(-1)
    found = kl_divergence(jnp.asarray(original), jnp.asarray(logits), 2.0)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_weights_are_read_in_the_parts_of_the_devices(hybrid: Nha) -> None:
    done = run_on_eight_devices(
        "tests.support.train.hybridize_on_a_mesh", str(hybrid.config_file), "read"
    )
    assert done.returncode == 0, done.stderr
    parts = json.loads(done.stdout.splitlines()[-1])
    assert len(parts) > 10
    for name, (largest, whole) in parts.items():
        divided = 1 if name.endswith("scale") else 8
        assert largest * divided <= whole, name


@pytest.mark.slow
@pytest.mark.parametrize("what", ["train", "slices"])
def test_same_losses_on_eight_devices(hybrid: Nha, batch: Batch, what: str) -> None:
    arguments = [str(hybrid.config_file), what]
    done = run_on_eight_devices("tests.support.train.hybridize_on_a_mesh", *arguments)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    alone, _ = follow(hybrid.config(loss__distillation=1, loss__attention_transfer=1), batch, 3)
    for row, expected in zip(found, alone, strict=True):
        for name in ("loss", "distillation", "attention_transfer", "gradient_norm"):
            np.testing.assert_allclose(row[name], expected[name], rtol=1e-4, err_msg=name)


@pytest.mark.slow
def test_a_run_goes_on_as_if_it_had_not_stopped(
    hybrid: Nha, tmp_path: Path, original: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "original"
    shutil.copytree(original, folder)
    common = ["train", str(hybrid.config_file), f"--initial_model={folder}"]
    common += ["--loss.distillation=1", "--loss.temperature=2"]
    whole = [*common, f"--run={tmp_path / 'whole'}"]
    assert main(whole) == 0
    output = capsys.readouterr().out
    assert "window_size: None -> [4, None]" in output
    assert "empty_slots" not in output
    rows = metrics_of(tmp_path / "whole")
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert all(row["distillation"] > 0 for row in rows)

    assert main([*common, "--steps=3"]) == 0
    assert main(common) == 0
    assert [(row["loss"], row["distillation"]) for row in metrics_of(hybrid.run)] == [
        (row["loss"], row["distillation"]) for row in rows
    ]
    weights = Path("model", "model.safetensors")
    assert (hybrid.run / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    for place in (hybrid.run, hybrid.run / "model"):
        assert json.loads((place / "generation_config.json").read_bytes()) == {"temperature": 0.5}

    # The run's model and its newest checkpoint are the same, and a start for the next run.
    tokens = jnp.arange(12)[None]
    exported, newest = nha_jax.load(hybrid.run / "model"), load_model(str(hybrid.run))
    np.testing.assert_array_equal(exported(tokens), newest(tokens))
    again = hybrid.config(initial_model=str(hybrid.run), model={})
    assert again.model == exported.config

    spoil(folder / "model.safetensors")
    capsys.readouterr()
    assert main([*common, "--steps=7"]) == 2
    assert "is not the one any more that the run in" in capsys.readouterr().err
    shutil.rmtree(folder)
    assert main([*common, "--steps=7"]) == 2
    assert "no model in this folder" in capsys.readouterr().err


@pytest.mark.slow
def test_without_distillation_a_run_needs_the_folder_only_once(
    hybrid: Nha, tmp_path: Path, original: Path
) -> None:
    folder = tmp_path / "original"
    shutil.copytree(original, folder)
    common = ["train", str(hybrid.config_file), f"--initial_model={folder}"]
    common += ["--frozen_dtype=bfloat16"]
    assert main([*common, "--steps=1"]) == 0
    shutil.rmtree(folder)
    assert main([*common, "--steps=2"]) == 0
    before, after = (
        abstract_parameters(nha_jax.load(x).config) for x in (original, hybrid.run / "model")
    )
    assert before == after
    assert (hybrid.run / "model" / "generation_config.json").exists()
    frozen = "blocks.mlp.up_proj.kernel"
    stored, kept = (
        SafetensorsSource(x / "model.safetensors") for x in (original, hybrid.run / "model")
    )
    index: Index = (slice(0, 2),) * 3
    expected = stored.read(frozen, index).astype(jnp.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(kept.read(frozen, index), expected)


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def spoil(weights: Path) -> None:
    """Changes one value in the middle of a file."""
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)


# name -> (arguments, what the line must contain)
MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "no folder": (["--initial_model=/nowhere"], ["initial_model = '/nowhere'", "`nha import`"]),
    "no parameter": (
        ["--trainable=['blocks.attention.*', 'blocks.ffn.*']"],
        ["trainable: 'blocks.ffn.*' matches no parameter", "blocks.attention.f_proj.kernel"],
    ),
    "nothing trained": (["--trainable=[]"], ["trainable = []", "a pattern at least"]),
    "not a list": (["--trainable=blocks.*"], ['trainable = "blocks.*"', "a list"]),
    "other slots": (
        ["--model.num_slots=4"],
        ["its weights do not fit", "f_proj.kernel is float32[2, 32, 8], not float32[2, 32, 4]"],
    ),
    "other norms": (["--model.qk_norm=true"], ["q_norm.scale is missing", "k_norm.scale"]),
    "too few tokens": (["--model.vocab_size=256"], ["model.vocab_size = 256"]),
    "a window for each layer": (["--model.window_size=[1, 2, 3]"], ["model.window_size=(1, 2, 3)"]),
    "no original": (
        ["--initial_model=null", "--model.preset=nha-tiny", "--model.window_size=4",
         "--loss.distillation=1"],
        ["loss.distillation = 1", "0 without an initial_model"],
    ),
    "no temperature": (["--loss.temperature=0"], ["loss.temperature = 0", "above 0"]),
    "no preset": (["--model.preset=llama"], ['model.preset = "llama"', "llama-3-8b"]),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "parts"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(
    hybrid: Nha, capsys: pytest.CaptureFixture[str], arguments: list[str], parts: list[str]
) -> None:
    assert main(["train", str(hybrid.config_file), *arguments]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("nha: ")
    assert output.err.count("\n") == 1
    for part in parts:
        assert part in output.err
    assert not hybrid.run.exists()


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("config.json", '{"model_type": "llama"}', ["another library", "`nha import"]),
        ("config.json", "{", ["config.json is not valid"]),
        ("model.safetensors", "x", ["damaged"]),
        (
            "tokenizer.json",
            "{}",
            ["data.corpus = ", "bytes as tokens", "prepare it with --tokenizer"],
        ),
    ],
    ids=["another library's", "no JSON", "damaged", "another vocabulary"],
)
def test_a_folder_that_does_not_serve_is_refused(
    hybrid: Nha,
    tmp_path: Path,
    original: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: str,
    parts: list[str],
) -> None:
    folder = tmp_path / "original"
    shutil.copytree(original, folder)
    (folder / name).write_text(content)
    assert main(["train", str(hybrid.config_file), f"--initial_model={folder}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for part in parts:
        assert part in error
    assert not hybrid.run.exists()


def test_the_shipped_configuration() -> None:
    """Of Llama-3-8B 1.3B are trained; 256 windows a step, 5.4B tokens."""
    config = load_config(
        str(ROOT / "configs" / "hybridize.yaml"),
        [("model.preset", "llama-3-8b"), ("loss.distillation", "1")],
    )
    assert config.steps * config.batch_size * config.data.sequence_length == 5368709120
    assert config.optimizer.learning_rate == 3e-5
    assert config.model.windows.count(None) == 4
    names = Trainable.of(config).names
    assert {name.split(".")[-2] for name in names} == {f"{x}_proj" for x in "qkvfo"}
    other = teacher_config(config)
    assert other is not None
    assert set(other.windows) == {None}


def test_what_goes_beside_the_model_is_the_originals_and_the_corpus_s(
    tmp_path: Path, original: Path, tokenizer_file: Path
) -> None:
    folder = tmp_path / "original"
    shutil.copytree(original, folder)
    shutil.copy(tokenizer_file, folder / "tokenizer.json")
    settings = {"bos_token": None, "eos_token": "<pad>", "model_max_length": 2048}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    files = {"tokenizer.json": tokenizer_file.read_bytes()}
    tokenizer = FileTokenizer(files, None, "tokenizer.json")
    initial = InitialModel.open(str(folder))
    check_tokenizer(initial, tokenizer, "corpus")
    found = merge_extra_files(initial, tokenizer)
    assert found.keys() == {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    told = json.loads(tokenizer.files["tokenizer_config.json"])
    assert told["eos_token"] != "<pad>"
    assert json.loads(found["tokenizer_config.json"]) == settings | told


def test_a_plan_needs_no_folder(hybrid: Nha) -> None:
    changes = {
        "model": {"preset": "nha-tiny", "window_size": [4, 4, None]},
        "loss__distillation": 1,
    }
    config = hybrid.config(initial_model="/nowhere", **changes)
    other = teacher_config(config)
    assert other == dataclasses.replace(config.model, window_size=None, empty_slots="mask")
    with pytest.raises(ConfigError, match="no model in this folder"):
        hybrid.config(initial_model="/nowhere")
