"""Models on meshes of one's own: how parameters are divided, and axes that are explicit."""

import jax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from nha_jax.layers import LOGICAL_AXES
from nha_jax.model import abstract_model
from nha_jax.sharding import RULES, named_shardings
from tests.nha_jax.test_model import tiny_config
from tests.support.eight_devices import run_on_eight_devices


def test_every_logical_axis_has_a_rule() -> None:
    assert set(RULES) == set(LOGICAL_AXES)


@pytest.mark.parametrize(
    ("sizes", "kernel", "embedding"),
    [
        ({"fsdp": 4, "tensor": 2}, (None, ("fsdp",), ("tensor",)), (("tensor",), ("fsdp",))),
        # The vocabulary of 40 is not divided over 3, and axes that no rule names divide nothing.
        ({"context": 2, "tensor": 3}, (None, ("context",), None), (None, ("context",))),
        ({"rows": 8}, (None, None, None), (None, None)),
    ],
)
def test_rules_divide_what_the_mesh_can(sizes, kernel, embedding) -> None:
    _, state = abstract_model(tiny_config())
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    shardings = named_shardings(state, mesh)
    assert shardings.embed.embedding.spec == PartitionSpec(*embedding)
    assert shardings.blocks.attention.q_proj.kernel.spec == PartitionSpec(*kernel)


def test_modules_and_rules_of_ones_own_divide_too() -> None:
    mesh = jax.make_mesh((1,), ("rows",))
    module = nnx.Linear(
        4,
        4,
        kernel_init=nnx.with_partitioning(
            jax.nn.initializers.zeros, ("embed", "other"), eager_sharding=False
        ),
        rngs=nnx.Rngs(0),
    )
    shardings = named_shardings(module, mesh, {"embed": ("rows",)})
    assert shardings.kernel == NamedSharding(mesh, PartitionSpec(("rows",), None))
    placed = jax.device_put(nnx.state(module), shardings)
    assert placed.kernel[...].sharding == shardings.kernel


@pytest.mark.parametrize(
    ("check", "implementation"),
    [
        ("doors", "None"),
        ("operator", "None"),
        ("model", "reference"),
        *(
            pytest.param(check, implementation, marks=pytest.mark.slow)
            for check in ("operator", "gradient", "layer")
            for implementation in ("reference", "xla")
        ),
    ],
)
def test_explicit_axes_serve_as_automatic_ones_do(check: str, implementation: str) -> None:
    done = run_on_eight_devices("tests.support.explicit_mesh", check, implementation)
    assert done.returncode == 0, done.stderr
