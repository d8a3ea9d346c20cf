"""Grouped products by blocks against jax's own ragged_dot, which TPUs use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nha_jax.layers.grouped_matmul import MOST_ROWS, grouped_dot_by_blocks


@pytest.mark.parametrize(
    "sizes",
    [(5, 0, 12, 3), (0, 0, 40, 0), (1,), (0, 8, 8, 16), (1, 0, 0, 0), (1200, 3), (1, 1204)],
    ids=str,
)
def test_blocks_are_ragged_dot(sizes: tuple[int, ...]) -> None:
    assert max(sizes) < 100 or max(sizes) > 2 * MOST_ROWS
    draw = np.random.default_rng(0).standard_normal
    rows, matrices, gradient = (
        jnp.asarray(draw(shape), jnp.float32)
        for shape in ((sum(sizes), 6), (len(sizes), 6, 5), (sum(sizes), 5))
    )

    def run(multiply):
        out, pull = jax.vjp(lambda x, y: multiply(x, y, jnp.array(sizes)), rows, matrices)
        return out, *pull(gradient)

    found, wanted = jax.jit(run, static_argnums=0), run(jax.lax.ragged_dot)
    for x, expected in zip(found(grouped_dot_by_blocks), wanted, strict=True):
        np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-4)


def test_bfloat16_is_accumulated_in_float32() -> None:
    rows = jnp.ones((16, 4096), jnp.bfloat16)
    matrices = jnp.full((2, 4096, 1), 1 + 2**-7, jnp.bfloat16)
    out = grouped_dot_by_blocks(rows, matrices, jnp.array([7, 9]))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, jnp.full((16, 1), 4096 + 32, jnp.bfloat16))


def test_the_work_is_that_of_the_rows() -> None:
    """No array has a row for every pair of a row and a group."""
    E, N, D = 64, 256, 32
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((N, D), (E, D, D))]
    sizes = jax.ShapeDtypeStruct((E,), jnp.int32)
    memory = jax.jit(grouped_dot_by_blocks).lower(*shapes, sizes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 8 * 4 * N * D < 4 * N * E * D / 2
