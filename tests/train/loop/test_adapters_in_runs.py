"""Runs that train an adapter: what learns, what it takes, what is left behind."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nha_jax
from nha_jax.adapters import adapter_of
from nha_jax.sizes import multiplied_weights
from tests.support.eight_devices import run_on_eight_devices
from tests.support.train.tiny_run import Nha, wait_for
from tests.train.loop.test_hybridize import by_name, follow, make_functions
from train.cli import main
from train.config import TrainConfig
from train.data.batches import Batch
from train.devices.mesh import make_mesh
from train.step.flops import training_flops_per_token
from train.step.update import TrainingFunctions
from train.text.loading import load_model

GATES = "blocks.attention.f_proj.kernel"


@pytest.fixture
def lora(tmp_path: Path, tiny_values: dict[str, Any], original: Path) -> Nha:
    """A run from a model of full attention: windows, new gates whole, updates of the rest."""
    values = tiny_values | {
        "initial_model": str(original),
        "adapter": {"rank": 2},
        "trainable": ["blocks.attention.*"],
        "model": {"window_size": [4, None], "implementation": "reference"},
        "steps": 6,
        "optimizer": {"learning_rate": 3e-2, "schedule": "constant"},
        "evaluation": {"every": 6, "sequences": 8, "final_sequences": 8},
        "checkpoint": {"every": 100},
    }
    return Nha(tmp_path, values)


def num_bytes(state: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))


def abstract(config: TrainConfig) -> TrainingFunctions:
    return TrainingFunctions(config, make_mesh(config))


def test_the_optimizer_takes_memory_in_proportion_to_the_rank(lora: Nha) -> None:
    """Of each kernel [in, out] it holds two moments of rank (in + out) numbers."""
    alone = {"trainable": [], "initial_model": None, "model": {"preset": "nha-340m"}}
    sizes = {}
    for rank in (1, 8, 64):
        functions = abstract(lora.config(**alone, adapter={"rank": rank}))
        sizes[rank] = num_bytes(functions.abstract_state.optimizer)
        model = lora.config(**alone).model
        values = model.num_query_heads * model.value_dim
        each = (model.num_query_heads * model.key_dim + 2 * model.num_kv_heads * model.key_dim,)
        rows = 4 * model.hidden_size + sum(each) + values
        assert functions.num_trained == model.num_layers * rank * rows
        counters = 3 * 4
        assert abs(sizes[rank] - 2 * 4 * functions.num_trained) <= counters
    everything = abstract(lora.config(**alone | {"trainable": ["*"]}, adapter=None))
    assert sizes[8] < num_bytes(everything.abstract_state.optimizer) / 100


def test_arithmetic_without_gradients_of_frozen_kernels(lora: Nha) -> None:
    config = lora.config(trainable=[])
    frozen = sum(2 * count for count in multiplied_weights(config.model).values())
    factors = 2 * 2 * ((32 + 32) + 2 * (32 + 16) + (32 + 32))  # layers, rank, q, k and v, o
    model = nha_jax.training_flops_per_token(config.model, 32)
    assert training_flops_per_token(config) == model - frozen + 3 * 2 * factors


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"frozen_dtype": "bfloat16", "micro_batches": 2, "optimizer__name": "muon"},
        {"frozen_dtype": "int8", "loss__distillation": 1.0, "optimizer__weight_decay": 0.5},
        {"optimizer__name": "schedule_free_adamw", "optimizer__schedule": None},
    ],
    ids=["float32", "bfloat16 and Muon", "int8, distillation, decay", "schedule-free"],
)
def test_only_factors_and_what_is_trained_whole_change(
    lora: Nha, batch: Batch, changes: dict[str, Any]
) -> None:
    config = lora.config(**changes)
    metrics, state = follow(config, batch, 12)
    functions, initial = make_functions(config)
    before = by_name(functions.initial_state(initial.source(config.model)).model)
    after = by_name(state.model)
    assert after.keys() == before.keys()
    for name, array in after.items():
        is_trained = name == GATES or ".lora_" in name
        assert array.dtype == before[name].dtype
        assert np.array_equal(array, before[name]) != is_trained, name
    frozen = {"int8": "int8"}.get(config.frozen_dtype or "", config.frozen_dtype or "float32")
    assert after["blocks.attention.q_proj.kernel"].dtype == jnp.dtype(frozen)
    assert after["blocks.mlp.up_proj.kernel"].dtype == jnp.dtype(frozen)
    assert after[GATES].dtype == np.float32
    assert metrics[-1]["loss"] < 0.9 * metrics[0]["loss"]


@pytest.mark.slow
def test_a_run_goes_on_and_leaves_an_adapter(
    lora: Nha, tmp_path: Path, original: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["train", str(lora.config_file), "--frozen_dtype=int8"]
    assert main([*common, f"--run={tmp_path / 'whole'}"]) == 0
    printed = capsys.readouterr().out
    trained = 2 * 2 * ((32 + 32) + 2 * (32 + 16) + (32 + 32)) + 2 * 32 * 8
    assert f"trained  {trained:,} parameters" in printed
    assert main([*common, "--steps=3"]) == 0
    assert main(common) == 0
    for file in ("model/model.safetensors", "adapter/adapter.safetensors"):
        assert (lora.run / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()

    # The model is merged, and plain; the adapter is small, and makes the same model again.
    finished, newest = nha_jax.load(lora.run / "model"), load_model(str(lora.run))
    size = (lora.run / "adapter" / "adapter.safetensors").stat().st_size
    assert 4 * trained < size < 4 * trained + 4000
    tokens = jnp.arange(12)[None]
    assert adapter_of(newest) is None
    np.testing.assert_allclose(newest(tokens), finished(tokens), rtol=0, atol=1e-5)
    base = nha_jax.load(original).with_windows((4, None))
    adapted = nha_jax.load_adapter(lora.run / "adapter", base)
    near = np.abs(adapted(tokens) - finished(tokens)).max()  # but for the rounding to 8 bits
    assert near < np.abs(base(tokens) - finished(tokens)).max() / 3

    capsys.readouterr()
    assert main(["generate", str(lora.run), "--prompt", "def", "--max-new-tokens", "3"]) == 0
    assert main(["export", str(lora.run), str(tmp_path / "peft"), "--format", "peft"]) == 0
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["self_attn.f_proj"]
    arguments = [str(lora.run / "model"), str(tmp_path / "exported"), "--format", "transformers"]
    assert main(["export", *arguments]) == 0
    assert main(["export", str(original), str(tmp_path / "none"), "--format", "peft"]) == 2
    assert "no adapter to export" in capsys.readouterr().err


@pytest.mark.slow
def test_losses_after_kill_are_those_of_an_undisturbed_run(lora: Nha, tmp_path: Path) -> None:
    values = lora.values | {"steps": 60, "checkpoint": {"every": 10}}
    whole, killed = (Nha(tmp_path / name, values) for name in ("whole", "killed"))
    whole.train()
    process = killed.start()
    wait_for(lambda: killed.logged() > 15, process)
    process.kill()
    process.communicate()
    killed.train()
    assert killed.losses() == whole.losses()
    assert killed.model_bytes() == whole.model_bytes()
    adapter = Path("adapter", "adapter.safetensors")
    assert (killed.run / adapter).read_bytes() == (whole.run / adapter).read_bytes()


@pytest.mark.parametrize("frozen_dtype", [None, pytest.param("int8", marks=pytest.mark.slow)])
def test_the_teacher_shares_all_but_what_is_trained_whole(
    lora: Nha, frozen_dtype: str | None
) -> None:
    config = lora.config(loss__distillation=1.0, frozen_dtype=frozen_dtype)
    functions, _ = make_functions(config)
    assert functions.abstract_teacher is not None
    assert [*by_shape(functions.abstract_teacher)] == [GATES]
    functions, _ = make_functions(lora.config(loss__distillation=1.0, trainable=[]))
    assert by_shape(functions.abstract_teacher) == {}


def by_shape(state: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(state))
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


@pytest.mark.slow
@pytest.mark.parametrize("frozen_dtype", [None, "int8"])
def test_nothing_to_learn_from_the_base_at_first(
    lora: Nha, batch: Batch, frozen_dtype: str | None
) -> None:
    changes = {"model__window_size": None, "trainable": [], "frozen_dtype": frozen_dtype}
    metrics, _ = follow(lora.config(loss__distillation=1.0, **changes), batch, 2)
    assert abs(metrics[0]["distillation"]) < 1e-7
    assert metrics[1]["distillation"] > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("frozen_dtype", [None, "int8"])
def test_same_losses_on_eight_devices(
    lora: Nha, tmp_path: Path, batch: Batch, frozen_dtype: str | None
) -> None:
    nha = Nha(tmp_path, lora.values | {"frozen_dtype": frozen_dtype})
    arguments = [str(nha.config_file), "train"]
    done = run_on_eight_devices("tests.support.train.hybridize_on_a_mesh", *arguments)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    alone, _ = follow(nha.config(loss__distillation=1.0), batch, 3)
    for row, expected in zip(found, alone, strict=True):
        for name in ("loss", "distillation", "gradient_norm"):
            np.testing.assert_allclose(row[name], expected[name], rtol=1e-4, err_msg=name)


MISTAKES: dict[str, tuple[list[str], str]] = {
    "rank": (["--adapter.rank=0"], "adapter.rank=0 must be an integer of at least 1"),
    "no rank": (["--adapter={alpha: 2}"], "adapter.rank: missing"),
    "alpha": (["--adapter.alpha=-1"], "adapter.alpha=-1.0 must be a finite number above 0"),
    "large rank": (["--adapter.rank=17"], "adapter.rank=17 is above the smaller size of blocks"),
    "no projection": (
        ["--adapter.targets=[blocks.attention.query]"],
        "adapter.targets='blocks.attention.query' matches no projection; there are blocks.",
    ),
    "dtype": (["--frozen_dtype=int4"], 'frozen_dtype = "int4": expected one of'),
}


@pytest.mark.parametrize(("arguments", "part"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_line(
    lora: Nha, capsys: pytest.CaptureFixture[str], arguments: list[str], part: str
) -> None:
    assert main(["train", str(lora.config_file), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert part in error
    assert not lora.run.exists()
