"""What a kernel's derivatives refuse, and that what they have is left as it was."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nha_jax.ops import decode_step, init_state
from nha_jax.ops.derivatives import reverse_mode_only
from tests.support.ops import transforms


@jax.custom_vjp
def sine(x: jax.Array) -> jax.Array:
    """Stands for a kernel: its gradient is its own, and twice as large as it should be."""
    return jnp.sin(x)


sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, cotangent: (2 * jnp.cos(x) * cotangent,))


def kernel(x: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    return sine(x), count + 1


guarded = reverse_mode_only("mine", kernel)
COUNT = jnp.zeros(3, jnp.int32)
X = jnp.array([0.1, 0.7, 2.0])
DERIVATIVE = 2 * np.cos(X)


def call(x: jax.Array) -> jax.Array:
    return guarded(x, COUNT)[0]


def total(x: jax.Array) -> jax.Array:
    return call(x).sum()


REVERSE: dict[str, Callable[[], Any]] = {
    "grad": lambda: jax.grad(total)(X),
    "of jit": lambda: jax.grad(jax.jit(total))(X),
    "of checkpoint": lambda: jax.grad(jax.checkpoint(total))(X),
    "of vmap": lambda: jax.grad(lambda x: jax.vmap(total)(x).sum())(X[None])[0],
    "of an unmapped argument": lambda: jax.grad(
        lambda x: jax.vmap(lambda y: call(x) * y)(jnp.ones(1)).sum()
    )(X),
    "of checkpoint of jit of vmap twice": lambda: jax.grad(
        lambda x: jax.checkpoint(jax.jit(jax.vmap(jax.vmap(total))))(x).sum()
    )(X[None, None])[0, 0],
    "of scan": lambda: jax.grad(
        lambda x: jax.lax.scan(lambda carry, _: (carry + total(x), None), 0.0, None, length=1)[0]
    )(X),
    "vmap": lambda: jax.vmap(jax.grad(total))(X[None])[0],
    "jacrev": lambda: jax.jacrev(call)(X).sum(0),
}


@pytest.mark.parametrize("name", REVERSE)
def test_reverse_mode_is_the_kernels_own(name):
    np.testing.assert_allclose(REVERSE[name](), DERIVATIVE, rtol=1e-6)


def test_integers_pass():
    (_, count), pullback = jax.vjp(guarded, X, COUNT)
    np.testing.assert_array_equal(count, COUNT + 1)
    d_x, d_count = pullback((X, np.zeros(3, jax.dtypes.float0)))
    np.testing.assert_allclose(d_x, DERIVATIVE * X, rtol=1e-6)
    assert d_count.dtype == jax.dtypes.float0


REFUSED: dict[str, Callable[[Callable], Any]] = {
    "jvp": lambda f: jax.jvp(f, (X,), (X,)),
    "jvp in jit": lambda f: jax.jit(lambda x: jax.jvp(f, (x,), (x,)))(X),
    "linearize": lambda f: jax.linearize(f, X)[1](X),
    "jacfwd": lambda f: jax.jacfwd(f)(X),
    "vmap of jvp": lambda f: jax.vmap(lambda x: jax.jvp(f, (x,), (x,)))(X[None]),
    "forward over reverse": lambda f: jax.jvp(jax.grad(lambda x: f(x).sum()), (X,), (X,)),
    "reverse over reverse": lambda f: jax.grad(lambda x: jax.grad(lambda y: f(y).sum())(x).sum())(
        X
    ),
    "reverse over forward": lambda f: jax.grad(lambda x: jax.jvp(f, (x,), (x,))[1].sum())(X),
    "of the cotangent": lambda f: jax.grad(lambda y: jax.vjp(f, X)[1](y)[0].sum())(X),
}


@pytest.mark.parametrize(
    "around", [lambda f: f, jax.jit, jax.checkpoint], ids=["alone", "jit", "checkpoint"]
)
@pytest.mark.parametrize("name", REFUSED)
def test_all_else_is_one_error_that_says_so(name, around):
    with pytest.raises(NotImplementedError, match=r"'mine' has .* reverse mode only.*xla.* has"):
        REFUSED[name](around(call))


def test_a_kernel_refuses_forward_mode():
    """As the table of docs/operator.md has it, with -m slow all of it."""
    assert transforms.outcome("jvp", "pallas_tpu") == "refused"


def test_a_kernels_decode_step_has_no_derivative():
    query = jnp.ones((1, 1, 8, 128))
    log_decay = -jnp.ones((1, 1, 8, 16))
    state = init_state(
        1, num_kv_heads=8, num_slots=16, key_dim=128, value_dim=128, window_size=16,
        dtype=jnp.float32,
    )  # fmt: skip

    def loss(query: jax.Array) -> jax.Array:
        out, _ = decode_step(
            query, query, query, log_decay, state, window_size=16, implementation="pallas_tpu"
        )
        return out.sum()

    with pytest.raises(NotImplementedError, match="'pallas_tpu' has no derivative of a decode"):
        jax.grad(loss)(query)
