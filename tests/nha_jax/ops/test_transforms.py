"""Every transformation of JAX on every implementation: right, or refused, as docs/operator.md says.

The gradients of the operator's cases are in test_attention.py; here one case goes through all.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from nha_jax.layers.remat import remat_policy
from nha_jax.ops import decode_step, init_state, nha_attention
from nha_jax.testing import relative_error
from tests.support.ops import transforms
from tests.support.paths import ROOT


def documented() -> dict[tuple[str, str], str]:
    """The table of docs/operator.md: {(transformation, implementation): entry}."""
    lines = (ROOT / "docs" / "operator.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| transformation |"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([entry.strip() for entry in line.strip("|").split("|")])
    names = [name.strip("`") for name in rows[0][1:]]
    return {
        (row[0], name): entry
        for row in rows[2:]
        for name, entry in zip(names, row[1:], strict=True)
    }


CELLS = [(x, y) for x in transforms.TRANSFORMATIONS for y in transforms.IMPLEMENTATIONS]


def test_the_documented_table_has_every_transformation():
    assert list(documented()) == CELLS


@pytest.mark.slow
@pytest.mark.parametrize(("name", "implementation"), CELLS)
def test_works_or_is_refused_as_documented(name, implementation):
    assert transforms.outcome(name, implementation) == documented()[name, implementation]


def test_forward_mode():
    """Of every run; the other transformations, with -m slow, are those of the table."""
    assert transforms.error("jvp", "xla", 2) < transforms.TOLERANCE["xla"]


@pytest.mark.slow
@pytest.mark.parametrize("window_size", transforms.WINDOWS)
def test_derivatives_are_those_of_differences(window_size):
    with jax.enable_x64(True):
        inputs = transforms.make_inputs(window_size, "float64")
        attend = transforms.operator("xla", window_size)
        moved = ("query", "key", "value", "log_decay", "slot_key", "window_value")

        def of_some(some):
            return attend(inputs.arrays | some)

        some = {name: inputs.arrays[name] for name in moved}
        check_grads(jax.jit(of_some), (some,), order=2, modes=("fwd", "rev"), rtol=1e-5)


@dataclasses.dataclass(frozen=True)
class Steps:
    """T tokens that `xla` reads in several steps, each of which reads W rows of those before."""

    T: int
    window_size: int

    def loss(self, implementation: str, arrays: tuple[jax.Array, ...]) -> jax.Array:
        result = nha_attention(
            *arrays,
            window_size=self.window_size,
            segment_ids=1 + (jnp.arange(self.T)[None] > self.T // 3).astype(jnp.int32),
            return_state=True,
            return_slot_weight=True,
            implementation=implementation,
        )
        total = jnp.sum(jnp.sin(result.out)) + jnp.sum(result.slot_weight**2)
        return total + jnp.sum(jnp.sin(result.state.slot_key))

    def run(self, derivative, implementation: str, dtype: str) -> list[np.ndarray]:
        rng = np.random.default_rng(0)
        shapes = [(1, self.T, 1, size) for size in (4, 4, 2, 3)]
        with jax.enable_x64(dtype == "float64"):
            draw = lambda shape: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
            *arrays, log_decay = map(draw, shapes)
            tangents = tuple(map(draw, shapes))
            primals = (*arrays, -jnp.abs(log_decay) / 8)
            loss = functools.partial(self.loss, implementation)
            found = jax.jit(functools.partial(derivative, loss))(primals, tangents)
            return [np.asarray(x, np.float64) for x in jax.tree.leaves(found)]


DERIVATIVES = {
    "jvp": lambda loss, x, d: jax.jvp(loss, (x,), (d,)),
    "forward over reverse": lambda loss, x, d: jax.jvp(jax.grad(loss), (x,), (d,)),
    "reverse over reverse": lambda loss, x, d: jax.grad(
        lambda x: sum(map(jnp.vdot, jax.grad(loss)(x), d))
    )(x),
    "reverse over reverse, rematerialised": lambda loss, x, d: jax.grad(
        lambda x: sum(
            map(jnp.vdot, jax.grad(jax.checkpoint(loss, policy=remat_policy("operator")))(x), d)
        )
    )(x),
}


@pytest.mark.slow
@pytest.mark.parametrize("steps", [Steps(600, 3), Steps(600, 40), Steps(400, 300)], ids=str)
@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives_across_steps(name, steps):
    """Cotangents of cotangents go from step to step as cotangents do."""
    found = steps.run(DERIVATIVES[name], "xla", "float32")
    wanted = steps.run(DERIVATIVES[name], "reference", "float64")
    assert max(map(relative_error, found, wanted)) < 5e-6


@pytest.mark.slow
@pytest.mark.parametrize("window_size", [4, None])
def test_a_decode_step_has_every_derivative(window_size):
    def results(implementation: str, dtype: str) -> list[np.ndarray]:
        rng = np.random.default_rng(0)
        with jax.enable_x64(dtype == "float64"):
            draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
            state = init_state(
                2, num_kv_heads=2, num_slots=3, key_dim=4, value_dim=4, window_size=window_size,
                dtype=dtype, max_length=4,
            )  # fmt: skip
            floats = {x: draw(*getattr(state, x).shape) for x in state._fields[:6]}
            floats["window_log_decay"] = -jnp.abs(floats["window_log_decay"])
            token = (draw(2, 1, 4, 4), draw(2, 1, 2, 4), draw(2, 1, 2, 4), -abs(draw(2, 1, 2, 3)))
            x = (token, floats)
            d = jax.tree.map(lambda x: draw(*x.shape), x)

            def loss(x):
                token, floats = x
                before = state._replace(**floats, length=jnp.array([2, 3], jnp.int32))
                out, after = decode_step(
                    *token, before, window_size=window_size, implementation=implementation
                )
                loss = jnp.sum(jnp.sin(out))
                if window_size is None:  # no token enters the slots: what they hold means nothing
                    return loss
                return loss + jnp.sum(jnp.cos(after.slot_key))

            found = (
                jax.jvp(loss, (x,), (d,)),
                jax.jvp(jax.grad(loss), (x,), (d,)),
                jax.vmap(jax.grad(loss))(transforms.two(x)),
            )
            return [np.asarray(y, np.float64) for y in jax.tree.leaves(found)]

    pairs = zip(results("xla", "float32"), results("reference", "float64"), strict=True)
    assert max(relative_error(x, wanted) for x, wanted in pairs) < 5e-6
