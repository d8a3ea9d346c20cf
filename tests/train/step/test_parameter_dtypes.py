"""A model whose file is bfloat16 is trained in float32, unless the user says otherwise."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nha_jax
from nha_jax.sizes import by_name
from tests.support.train.tiny_run import Nha
from train.config import TrainConfig
from train.devices.mesh import make_mesh
from train.loop.train import _warn_of_lost_updates
from train.step.update import TrainingFunctions
from train.storage.initial_model import InitialModel, teacher_config
from train.storage.run_folder import RunFolder

NARROW, WIDE = jnp.dtype("bfloat16"), jnp.dtype("float32")


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model in bfloat16, as an import of a bfloat16 checkpoint leaves it."""
    folder = tmp_path_factory.mktemp("narrow") / "model"
    config = nha_jax.ModelConfig(
        vocab_size=257,
        num_layers=1,
        hidden_size=16,
        num_query_heads=2,
        num_slots=4,
        window_size=8,
        dtype="float32",
        param_dtype="bfloat16",
        implementation="reference",
        remat="none",
    )
    nha_jax.save(folder, nha_jax.Model(config, rngs=nnx.Rngs(0)))
    return folder


@pytest.fixture
def from_narrow(tmp_path: Path, tiny_values: dict[str, Any], narrow: Path) -> Nha:
    values = tiny_values | {
        "initial_model": str(narrow),
        "model": {"num_layers": 1},
        "optimizer": {"learning_rate": 3e-4, "schedule": "constant"},
    }
    return Nha(tmp_path, values)


def functions_of(config: TrainConfig) -> TrainingFunctions:
    return TrainingFunctions(config, make_mesh(config), teacher_config(config))


def dtypes(tree: Any) -> set[jnp.dtype]:
    return {x.dtype for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)}


@pytest.mark.parametrize(
    ("overrides", "trained", "frozen"),
    [
        ({}, WIDE, NARROW),
        ({"frozen_dtype": "float32"}, WIDE, WIDE),
        pytest.param({"model__param_dtype": "float32"}, WIDE, WIDE, marks=pytest.mark.slow),
        ({"model__param_dtype": "bfloat16"}, NARROW, NARROW),
        pytest.param(
            {"model__param_dtype": "bfloat16", "frozen_dtype": "float32"},
            NARROW,
            WIDE,
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_dtypes_of_parameters_and_moments(
    from_narrow: Nha, overrides: dict[str, Any], trained: jnp.dtype, frozen: jnp.dtype
) -> None:
    config = from_narrow.config(
        trainable=["blocks.attention.*"], loss__distillation=1.0, **overrides
    )
    functions = functions_of(config)
    for name, leaf in by_name(functions.abstract_state.model).items():
        wanted = trained if name.startswith("blocks.attention.") else frozen
        assert leaf.dtype == wanted, name
    assert dtypes(functions.abstract_state.optimizer) == {trained}
    assert dtypes(functions.abstract_teacher) == {frozen}
    assert config.model.param_dtype == trained.name  # what the finished model is saved in


@pytest.mark.slow
def test_every_entry_of_every_norm_moves(from_narrow: Nha, narrow: Path) -> None:
    config = from_narrow.config()
    functions = functions_of(config)
    assert config.initial_model is not None
    source = InitialModel.open(config.initial_model).source(config.model)
    state = functions.initial_state(source)
    before = {name: np.array(x) for name, x in by_name(state.model).items()}
    stored = by_name(nnx.state(nha_jax.load(narrow)))
    for name, array in before.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, np.asarray(stored[name], np.float32))
    tokens = np.random.default_rng(0).integers(0, 256, (8, 33), np.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones((8, 32), np.int32),
        "loss_mask": np.ones((8, 32), bool),
    }
    for _ in range(2):
        state, _ = functions.update(state, batch)
    norms = {name: x for name, x in by_name(state.model).items() if name.endswith("norm.scale")}
    assert len(norms) > 3
    for name, scale in norms.items():
        assert (np.asarray(scale) != before[name]).all(), name


def test_a_run_that_began_in_bfloat16_keeps_it(from_narrow: Nha) -> None:
    # As an earlier version wrote it down: the file's dtype, and none for what is frozen.
    began = from_narrow.config(model__param_dtype="bfloat16")
    assert began.frozen_dtype is None
    with RunFolder(began.run).open(began, "corpus"):
        pass
    again = from_narrow.config()
    assert again == began
    RunFolder(again.run).check(again, "corpus")
    elsewhere = dataclasses.replace(again, run=f"{again.run}-2")
    assert from_narrow.config(run=elsewhere.run).model.param_dtype == "float32"


@pytest.mark.parametrize("gone", [False, True])
def test_a_run_that_began_in_float32_keeps_it(
    tmp_path: Path, from_narrow: Nha, narrow: Path, gone: bool
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(narrow, folder)
    began = from_narrow.config(initial_model=str(folder))
    assert (began.model.param_dtype, began.frozen_dtype) == ("float32", "bfloat16")
    with RunFolder(began.run).open(began, "corpus"):
        pass
    if gone:
        folder.rename(tmp_path / "moved")
    assert from_narrow.config(initial_model=str(folder)) == began


def test_a_file_in_float32_changes_nothing(tmp_path: Path, from_narrow: Nha, narrow: Path) -> None:
    wide = shutil.copytree(narrow, tmp_path / "wide")
    content = (wide / "config.json").read_text()
    (wide / "config.json").write_text(content.replace("bfloat16", "float32"))
    found = from_narrow.config(initial_model=str(wide))
    assert (found.model.param_dtype, found.frozen_dtype) == ("float32", None)


def test_bfloat16_that_is_asked_for_is_warned_of(
    from_narrow: Nha, capsys: pytest.CaptureFixture[str]
) -> None:
    _warn_of_lost_updates(from_narrow.config().model)
    assert capsys.readouterr().err == ""
    _warn_of_lost_updates(from_narrow.config(model__param_dtype="bfloat16").model)
    error = capsys.readouterr().err
    assert error.startswith("nha: model.param_dtype = bfloat16: ")
    assert error.count("\n") == 1
