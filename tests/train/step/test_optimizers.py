"""The optimizers that a configuration may name: their keys, steps, states and averages."""

import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from nha_jax import ModelConfig
from nha_jax.model import abstract_model
from nha_jax.sharding import named_shardings
from tests.support.train.tiny_run import Nha
from train.checkpoint.checkpoints import Checkpoints, Progress
from train.commands.train import parse_overrides
from train.config import CheckpointConfig, OptimizerConfig
from train.errors import ConfigError
from train.load_config import load_config
from train.optimizers import ENTRY_POINTS, OPTIMIZERS
from train.step.average import average_of, average_parameters
from train.step.optimizer import NamedOptimizer, make_optimizer
from train.step.trainable import Trainable
from train.step.update import TrainState

TINY = ModelConfig(
    vocab_size=257, num_layers=2, hidden_size=128, num_query_heads=2, num_slots=8, window_size=8
)


SOME = Trainable(
    frozenset(
        {
            "embed.embedding",
            "blocks.attention.q_proj.kernel",
            "blocks.attention.q_conv.kernel",
            "blocks.attention_norm.scale",
        }
    )
)


def abstract_optimizer(config: OptimizerConfig) -> nnx.State:
    """The shapes and axes of an optimizer's state."""

    def make() -> tuple[Any, Any]:
        structure, state = abstract_model(TINY)
        model = nnx.merge(structure, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state))
        transformation = make_optimizer(
            config, optax.constant_schedule(1.0), nnx.state(model, nnx.Param)
        )
        return nnx.split(NamedOptimizer(model, transformation, nnx.Param))

    return jax.eval_shape(make)[1]


@functools.cache
def parameters() -> nnx.State:
    return nnx.state(nnx.merge(*abstract_model(TINY)), nnx.Param)


def some(state: nnx.State) -> nnx.State:
    """A parameter of each kind; the others count as frozen."""
    return nnx.filter_state(state, SOME)


def random_arrays(seed: int) -> nnx.State:
    """Bare arrays of the shapes of some parameters."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: random.standard_normal(x.shape).astype(np.float32),
        nnx.as_pure(some(parameters())),
    )


def steps(transformation: optax.GradientTransformation, count: int = 3) -> list[Any]:
    """The parameters after each of some updates, and the last state."""
    update = jax.jit(transformation.update)
    present = random_arrays(0)
    state = transformation.init(present)
    found = []
    for seed in range(1, count + 1):
        updates, state = update(random_arrays(seed), state, present)
        present = jax.tree.map(np.add, present, updates)
        found.append(present)
    return [*found, state]


@functools.cache
def first_updates(name: str, width_ratio: float = 1.0) -> tuple[nnx.State, nnx.State]:
    """How far the first step moves parameters that are 0, which cannot decay, and others."""
    config = OptimizerConfig(name=name, weight_decay=0.5, clip_norm=None)
    transformation = make_optimizer(
        config, optax.constant_schedule(1.0), some(parameters()), width_ratio
    )
    gradients = random_arrays(1)
    update = jax.jit(lambda x: transformation.update(gradients, transformation.init(x), x)[0])
    return update(jax.tree.map(np.zeros_like, gradients)), update(random_arrays(0))


def test_adamw_is_what_it_was() -> None:
    config = OptimizerConfig(weight_decay=0.3, beta2=0.9)
    ours = make_optimizer(config, optax.constant_schedule(0.1), some(parameters()))
    decayed = {"q_conv": True, "q_proj": True, "attention_norm": False, "embed": True}
    mask = [decayed[path[-2]] for path, _ in nnx.to_flat_state(some(parameters()))]
    theirs = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            optax.constant_schedule(0.1),
            b2=0.9,
            weight_decay=0.3,
            mask=lambda tree: jax.tree.unflatten(jax.tree.structure(tree), mask),
        ),
    )
    found, expected = steps(ours), steps(theirs)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_moves_every_parameter_and_decays_matrices_alone(name: str) -> None:
    plain, decayed = first_updates(name)
    for path, moved in nnx.to_flat_state(plain):
        assert np.abs(moved).max() > 1e-3, path
    expected = jax.tree.map(lambda x: -0.5 * x, random_arrays(0))
    expected["blocks"]["attention_norm"]["scale"] = np.zeros((2, 128))
    difference = jax.tree.map(np.subtract, decayed, plain)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), difference, expected)


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("adamw", 1 / 16),
        pytest.param("muon", 1 / 4, marks=pytest.mark.slow),
        *(
            pytest.param(name, 1 / 16, marks=pytest.mark.slow)
            for name in ("adafactor", "lion", "schedule_free_adamw")
        ),
    ],
)
def test_matrices_of_a_wider_model_step_less_and_decay_as_much(name: str, factor: float) -> None:
    expected, whole = (jax.tree.map(np.array, each) for each in first_updates(name))
    decay = jax.tree.map(np.subtract, whole, expected)
    expected["blocks"]["attention"]["q_proj"]["kernel"] *= factor
    plain, decayed = first_updates(name, 16.0)
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)  # noqa: E731
    jax.tree.map(close, plain, expected)
    jax.tree.map(close, jax.tree.map(np.subtract, decayed, plain), decay)


def test_a_step_of_muon_is_orthogonal_and_as_large_as_one_of_adamw_mostly_is() -> None:
    for layer in first_updates("muon")[0]["blocks"]["attention"]["q_proj"]["kernel"]:
        # 1 each if it were orthogonal; five steps of Newton and Schulz give 0.7 to 1.2.
        singular = np.linalg.svd(layer, compute_uv=False) / (0.2 * 128**0.5)
        assert 0.6 < np.quantile(singular, 0.02) < singular.max() < 1.3
        np.testing.assert_allclose(np.sqrt(np.mean(layer**2)), 0.2, rtol=0.2)


def test_a_step_of_adafactor_is_clipped_in_each_layer_by_itself() -> None:
    config = OptimizerConfig(name="adafactor", weight_decay=0.0, clip_norm=None)
    stack = nnx.filter_state(parameters(), lambda path, _: "kernel" in path and "q_proj" in path)
    transformation = make_optimizer(config, optax.constant_schedule(-1.0), stack)
    alone = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    random = np.random.default_rng(0)
    first = random.standard_normal((2, 128, 128)).astype(np.float32)
    second = (
        first * np.array([9, 1], np.float32)[:, None, None]
    )  # one layer's grows, and is clipped

    def second_step(optimizer: optax.GradientTransformation, *gradients: Any) -> Any:
        update = jax.jit(optimizer.update)
        state = optimizer.init(gradients[0])
        for gradient in gradients:
            step, state = update(gradient, state, gradients[0])
        return step

    like = lambda array: jax.tree.map(lambda _: array, nnx.as_pure(stack))  # noqa: E731
    (found,) = jax.tree.leaves(second_step(transformation, like(first), like(second)))
    expected = np.stack([second_step(alone, *layers) for layers in zip(first, second, strict=True)])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    size = np.sqrt(np.square(found).mean((1, 2)))
    np.testing.assert_allclose(size, [1, 1], rtol=0.02)


def test_schedule_free_is_judged_by_the_mean_of_its_steps() -> None:
    config = OptimizerConfig(name="schedule_free_adamw", beta1=0.7, clip_norm=None)
    transformation = make_optimizer(config, optax.constant_schedule(0.1), some(parameters()))
    update = jax.jit(transformation.update)
    present = random_arrays(0)
    state = transformation.init(present)
    seen = []
    for seed in (1, 2, 3):
        updates, state = update(random_arrays(seed), state, present)
        present = jax.tree.map(np.add, present, updates)
        seen.append(state.z)
    evaluated = OPTIMIZERS["schedule_free_adamw"].evaluated
    assert evaluated is not None
    mean = jax.tree.map(lambda *each: np.mean(each, axis=0), *seen)
    close = lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5)  # noqa: E731
    jax.tree.map(close, evaluated((optax.EmptyState(), state), present), mean)
    jax.tree.map(close, present, jax.tree.map(lambda x, z: 0.7 * x + 0.3 * z, mean, seen[-1]))


# Two layers: q, k, v and o of 128 x 128, f of 128 x 16, and three of 128 x 384.
MATRICES = 2 * (4 * 128 * 128 + 128 * 16 + 3 * 128 * 384)
# The rows and columns of all matrices, embedding and head, except f, which is too narrow.
FACTORS = 2 * (4 * 2 * 128 + 3 * (128 + 384)) + 2 * (257 + 128)
# f, three convolutions of four taps, and the norms.
WHOLE = 2 * (128 * 16 + 3 * 4 * 128 + 3 * 128) + 128


def num_parameters() -> int:
    return sum(x.size for x in jax.tree.leaves(parameters()))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"name": "adamw"}, 8 * num_parameters()),
        ({"name": "adamw", "moment_dtype": "bfloat16"}, 6 * num_parameters()),
        ({"name": "adamw", "ema_decay": 0.9}, 12 * num_parameters()),
        ({"name": "lion"}, 4 * num_parameters()),
        ({"name": "lion", "moment_dtype": "bfloat16"}, 2 * num_parameters()),
        ({"name": "schedule_free_adamw"}, 8 * num_parameters()),
        ({"name": "muon"}, 8 * num_parameters() - 4 * MATRICES),
        ({"name": "muon", "moment_dtype": "bfloat16"}, 6 * num_parameters() - 4 * MATRICES),
        ({"name": "adafactor"}, 4 * (FACTORS + WHOLE)),
    ],
    ids=str,
)
def test_bytes_of_state(keys: dict[str, Any], expected: int) -> None:
    leaves = jax.tree.leaves(abstract_optimizer(OptimizerConfig(**keys)))
    # Without counters, Muon's three coefficients, and what Adafactor has in place of nothing.
    assert sum(x.size * x.dtype.itemsize for x in leaves if x.size > 3) == expected


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_divided_as_its_parameters_are(name: str) -> None:
    config = OptimizerConfig(name=name, ema_decay=None if name.startswith("sch") else 0.9)
    mesh = AbstractMesh((2, 2, 2), ("fsdp", "tensor", "context"))
    of_parameters = {
        path: (variable.shape, named_shardings(variable, mesh).spec)
        for path, variable in nnx.to_flat_state(parameters())
    }
    found = 0
    for path, variable in nnx.to_flat_state(abstract_optimizer(config)):
        spec = named_shardings(variable, mesh).spec
        shape, whole = next(
            (of_parameters[path[n:]] for n in range(len(path)) if path[n:] in of_parameters),
            ((), ()),
        )
        if variable.shape == shape:
            assert tuple(spec) == tuple(whole), path
            found += bool(shape)
        elif variable.size > 3:  # a factor
            one_less = [whole[:n] + whole[n + 1 :] for n in range(len(whole))]
            assert tuple(spec) in map(tuple, one_less), path
            found += 1
    assert found >= len(of_parameters)


@pytest.mark.parametrize(
    "name",
    [
        "muon",
        "adafactor",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("lion", "schedule_free_adamw")),
    ],
)
def test_a_restored_state_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    config = OptimizerConfig(name=name)
    structure = abstract_model(TINY)[0]
    full = jax.tree.map(lambda x: jnp.ones(x.shape) / 8, parameters())
    transformation = make_optimizer(config, optax.constant_schedule(0.1), some(full))
    graph, empty = nnx.split(NamedOptimizer(nnx.merge(structure, full), transformation, SOME))

    @jax.jit
    def update(state: TrainState) -> TrainState:
        model = nnx.merge(structure, state.model)
        optimizer = nnx.merge(graph, state.optimizer)
        gradients = jax.tree.map(jnp.sin, some(nnx.state(model)))
        optimizer.update(model, gradients)
        return TrainState(nnx.state(model), nnx.state(optimizer))

    first = update(TrainState(full, empty))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(first, Progress(1, 1, 0))
        checkpoints.wait()
        restored = checkpoints.restore(
            jax.eval_shape(lambda: first), jax.tree.map(lambda _: here, first)
        )
    assert restored is not None
    jax.tree.map(np.testing.assert_array_equal, update(restored[0]), update(first))


def test_average_is_the_mean_and_then_exponential() -> None:
    average = average_parameters(0.75)
    state = average.init({"x": jnp.zeros(2)})
    present, seen, expected = np.zeros(2, np.float32), [], None
    for step in range(1, 8):
        change = np.array([step, -2.0], np.float32)
        updates, state = average.update({"x": change}, state, {"x": present})
        np.testing.assert_array_equal(updates["x"], change)
        present = present + change
        seen.append(present)
        expected = np.mean(seen, 0) if step <= 4 else 0.75 * expected + 0.25 * present
        np.testing.assert_allclose(state.average["x"], expected, rtol=1e-6)


def test_an_average_of_bfloat16_keeps_small_updates() -> None:
    config = OptimizerConfig(ema_decay=0.999, clip_norm=None)
    state = abstract_optimizer(config)
    averages = [x for path, x in nnx.to_flat_state(state) if "average" in path]
    assert len(averages) == len(jax.tree.leaves(parameters()))
    average = average_parameters(0.999)
    like = {"x": jnp.ones(1, jnp.bfloat16)}
    state = average.init(like)
    assert state.average["x"].dtype == jnp.float32
    assert average_of((state,), like)["x"].dtype == jnp.bfloat16


MISTAKES = [
    (["--optimizer.name=sgd"], "optimizer.name = 'sgd': expected one of adamw, muon, adafactor"),
    (
        ["--optimizer.name=lion", "--optimizer.epsilon=1e-6"],
        "optimizer.epsilon = 1e-06: expected null, as the optimizer lion takes no such key",
    ),
    (
        ["--optimizer.momentum=0.9"],
        "optimizer.momentum = 0.9: expected null, as the optimizer adamw takes no such key",
    ),
    (
        ["--optimizer.name=adafactor", "--optimizer.moment_dtype=bfloat16"],
        "optimizer.moment_dtype = 'bfloat16': expected null, as the optimizer adafactor takes no",
    ),
    (
        ["--optimizer.name=schedule_free_adamw", "--optimizer.schedule=cosine"],
        "optimizer.schedule = 'cosine': expected null, as the optimizer schedule_free_adamw takes",
    ),
    (
        ["--optimizer.name=schedule_free_adamw", "--optimizer.beta1=0"],
        "optimizer.beta1 = 0.0: expected above 0 for the optimizer schedule_free_adamw",
    ),
    (
        ["--optimizer.name=schedule_free_adamw", "--optimizer.ema_decay=0.9"],
        "optimizer.ema_decay = 0.9: expected null, as the optimizer schedule_free_adamw averages",
    ),
    (["--optimizer.ema_decay=1"], "optimizer.ema_decay = 1.0: expected 0 or more, below 1"),
    (["--optimizer.moment_dtype=int8"], 'optimizer.moment_dtype = "int8": expected one of'),
]


@pytest.mark.parametrize(("arguments", "line"), MISTAKES, ids=lambda value: str(value)[:60])
def test_a_key_that_an_optimizer_does_not_take(arguments: list[str], line: str, nha: Nha) -> None:
    with pytest.raises(ConfigError, match=re.escape(line)):
        load_config(str(nha.config_file), parse_overrides(arguments))


def test_keys_that_are_not_given_have_the_optimizers_defaults() -> None:
    adamw, lion = OptimizerConfig(), OptimizerConfig(name="lion", beta1=0.8)
    assert (adamw.beta1, adamw.beta2, adamw.epsilon, adamw.momentum) == (0.9, 0.95, 1e-8, None)
    assert (lion.beta1, lion.beta2, lion.epsilon) == (0.8, 0.99, None)
    assert (lion.schedule, OptimizerConfig(name="schedule_free_adamw").schedule) == ("cosine", None)


ELSEWHERE = """
import optax
from train.optimizers import Optimizer

def build(job, *, momentum=0.5):
    return job.follow(optax.trace(momentum))

mine, wrong = Optimizer(build), 3
"""


def test_an_installed_package_adds_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "elsewhere_optimizers.py").write_text(ELSEWHERE)
    package = tmp_path / "elsewhere-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
    names = "".join(f"{name} = elsewhere_optimizers:{name}\n" for name in ("mine", "wrong"))
    (package / "entry_points.txt").write_text(f"[{ENTRY_POINTS}]\n{names}")
    monkeypatch.syspath_prepend(tmp_path)

    config = OptimizerConfig(name="mine", weight_decay=0.0, clip_norm=None)
    assert (config.momentum, config.schedule, config.beta1) == (0.5, "cosine", None)
    transformation = make_optimizer(config, optax.constant_schedule(0.1), some(parameters()))
    after, _ = steps(transformation, 1)
    expected = jax.tree.map(lambda x, y: x - 0.1 * y, random_arrays(0), random_arrays(1))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), after, expected)
    with pytest.raises(ValueError, match=r"beta1 = 0.9: expected null, as the optimizer mine"):
        OptimizerConfig(name="mine", beta1=0.9)
    with pytest.raises(ValueError, match=r"elsewhere_optimizers:wrong.*is no .*Optimizer"):
        OptimizerConfig(name="wrong")
    with pytest.raises(ValueError, match="schedule_free_adamw, mine, wrong"):
        OptimizerConfig(name="absent")
