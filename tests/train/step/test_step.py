"""The loss, one update, and what is refused to be an update."""

import json
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.support.eight_devices import run_on_eight_devices
from tests.support.train.tiny_run import Nha
from train.cli import main
from train.config import OptimizerConfig, TrainConfig
from train.data.batches import Batch
from train.devices.mesh import make_mesh
from train.load_config import load_config
from train.step.losses import loss_sum
from train.step.optimizer import learning_rate_schedule, make_optimizer
from train.step.update import TrainingFunctions, TrainState


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_values: dict[str, Any]) -> TrainConfig:
    nha = Nha(tmp_path_factory.mktemp("step"), tiny_values)
    overrides = [("batch_size", "2"), ("optimizer.learning_rate", "1e-2"), ("steps", "300")]
    return load_config(str(nha.config_file), [*overrides, ("optimizer.weight_decay", "0")])


@pytest.fixture(scope="module")
def functions(config: TrainConfig) -> TrainingFunctions:
    return TrainingFunctions(config, make_mesh(config))


@pytest.fixture
def batch() -> Batch:
    tokens = np.random.default_rng(0).integers(0, 256, (2, 33), np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones((2, 32), np.int32),
        "loss_mask": np.ones((2, 32), bool),
    }


def test_loss_counts_only_what_the_mask_admits() -> None:
    logits = jax.random.normal(jax.random.key(0), (1, 4, 5))
    # A padding row may come out as anything.
    logits = logits.at[0, 3].set(jnp.nan)
    batch = {
        "tokens": jnp.array([[1, 2, 3, 0]]),
        "targets": jnp.array([[2, 3, 4, 0]]),
        "segment_ids": jnp.array([[1, 1, 2, 0]]),
        "loss_mask": jnp.array([[True, False, True, False]]),
    }
    total = loss_sum(lambda tokens, segment_ids: logits, batch)
    probability = jax.nn.softmax(logits, axis=-1)
    expected = -jnp.log(probability[0, 0, 2]) - jnp.log(probability[0, 2, 4])
    np.testing.assert_allclose(total.nats, expected, rtol=1e-6)
    assert total.targets == 2


def test_overfits_one_batch(functions: TrainingFunctions, batch: Batch) -> None:
    state = functions.initial_state()
    for _ in range(150):
        state, metrics = functions.update(state, batch)
    assert metrics["loss"] < 0.1
    total = functions.evaluate(state.model, batch).loss
    assert total.nats / total.targets < 0.1


def test_an_update_that_is_not_finite_is_skipped(
    functions: TrainingFunctions, batch: Batch
) -> None:
    state = functions.initial_state()
    poisoned = jax.tree.map(lambda leaf: leaf * 1e38 if leaf.ndim >= 2 else leaf, state.model)
    expected = jax.tree.map(np.array, TrainState(poisoned, state.optimizer))
    state, metrics = functions.update(TrainState(poisoned, state.optimizer), batch)
    assert metrics["skipped"] == 1
    assert not jnp.isfinite(metrics["loss"]) or not jnp.isfinite(metrics["gradient_norm"])
    jax.tree.map(np.testing.assert_array_equal, state, expected)


@pytest.mark.slow
def test_too_many_skipped_updates_stop_the_run(
    nha: Nha, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--optimizer.learning_rate=1e30", "--optimizer.max_skipped_updates=3"]
    assert main(["train", str(nha.config_file), *arguments, "--optimizer.warmup_steps=0"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("nha: stopped at step ")
    assert "the last 3 updates were not finite" in error
    assert "optimizer.learning_rate" in error
    assert nha.rows()[-1]["gradient_norm"] is None


def test_only_matrices_decay(functions: TrainingFunctions) -> None:
    parameters = nnx.state(functions.model(functions.initial_state().model), nnx.Param)
    transform = make_optimizer(
        OptimizerConfig(weight_decay=0.5, clip_norm=None), optax.constant_schedule(1.0), parameters
    )
    bare = nnx.to_pure_dict(parameters)
    zeros = jax.tree.map(jnp.zeros_like, bare)
    updates, _ = transform.update(zeros, transform.init(bare), bare)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        name = jax.tree_util.keystr(path)
        is_scale = name.endswith("['scale']")
        assert bool(jnp.any(update != 0)) == (not is_scale), name


@pytest.mark.parametrize(
    ("schedule", "last"), [("cosine", 0.2), ("linear", 0.2), ("constant", 2.0)]
)
def test_learning_rate(schedule: Any, last: float) -> None:
    config = OptimizerConfig(
        learning_rate=2.0, warmup_steps=4, schedule=schedule, final_fraction=0.1
    )
    rates = [float(learning_rate_schedule(config, 20)(step)) for step in range(21)]
    np.testing.assert_allclose(rates[:4], [0.5, 1.0, 1.5, 2.0])
    assert rates == sorted(rates[:4]) + sorted(rates[4:], reverse=True)
    np.testing.assert_allclose(rates[20], last, rtol=1e-6)


def test_learning_rate_without_warmup() -> None:
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=2.0), 10)
    assert float(schedule(0)) == 2.0


def test_same_loss_on_one_and_on_eight_devices(nha: Nha, undisturbed: Nha) -> None:
    # The undisturbed run, on one device, from its start and from a checkpoint of it.
    checkpoints = nha.run / "checkpoints"
    shutil.copytree(undisturbed.run / "checkpoints" / "105", checkpoints / "105")
    done = run_on_eight_devices(
        "tests.support.train.losses_on_a_mesh", str(nha.config_file), str(checkpoints)
    )
    assert done.returncode == 0, done.stderr
    losses = {int(step): loss for step, loss in json.loads(done.stdout).items()}
    assert sorted(losses) == [1, 2, 3, 106, 107, 108, 109, 110]
    alone = undisturbed.losses()
    for step, loss in losses.items():
        np.testing.assert_allclose(loss, alone[step][0], rtol=1e-5)
