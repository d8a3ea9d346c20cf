"""What the compiler makes of the XLA implementation: linear memory, no T x T, T x M x K."""

import jax
import jax.numpy as jnp
import pytest

from nha_jax.ops import nha_attention, rope_tables

HEADS, DIM, SLOTS = 8, 64, 64


def temporary_bytes(T: int, window_size: int | None) -> tuple[int, int]:
    """Temporary and input bytes of forward and backward, with RoPE, float32."""
    shape = jax.ShapeDtypeStruct((1, T, HEADS, DIM), jnp.float32)

    def run(query, key, value, log_decay, cotangent):
        out, pullback = jax.vjp(
            lambda *x: nha_attention(
                *x, window_size=window_size, rope=rope_tables(jnp.arange(T), DIM),
                implementation="xla",
            ),
            query, key, value, log_decay,
        )  # fmt: skip
        return out, pullback(cotangent)

    analysis = jax.jit(run).lower(*[shape] * 5).compile().memory_analysis()
    return analysis.temp_size_in_bytes, 4 * 4 * T * HEADS * DIM


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("window_size", [0, 64, 512], ids="W{}".format)
def test_memory_is_linear(window_size):
    at_8192, inputs = temporary_bytes(8192, window_size)
    assert at_8192 <= 5 * inputs
    assert temporary_bytes(32768, window_size)[0] <= 4.1 * at_8192


@pytest.mark.usefixtures("optimized")
def test_full_attention_stores_no_square():
    T = 8192
    assert temporary_bytes(T, None)[0] < HEADS * T * T  # a quarter of one float32 copy
