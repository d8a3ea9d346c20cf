"""What the compiler makes of the XLA implementation: linear memory, no T x T, T x M x K.

And of a step of generation: the cache stays where it is. The buffers are those of the program
before LLVM's optimizations, which tests/conftest.py turns off.
"""

import math
import re

import jax
import jax.numpy as jnp
import pytest

from nha_jax.ops import decode_step, init_state, nha_attention, rope_tables

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


@pytest.mark.parametrize(
    "window_size",
    [pytest.param(0, marks=pytest.mark.slow), 64, pytest.param(512, marks=pytest.mark.slow)],
    ids="W{}".format,
)
def test_memory_is_linear(window_size):
    at_8192, inputs = temporary_bytes(8192, window_size)
    assert at_8192 <= 5 * inputs
    assert temporary_bytes(32768, window_size)[0] <= 4.1 * at_8192


def test_full_attention_stores_no_square():
    T = 8192
    assert temporary_bytes(T, None)[0] < HEADS * T * T  # a quarter of one float32 copy


def test_without_a_window_nothing_masks_one():
    """XLA computes a mask of nothing, and all that follows from it, while it compiles."""
    shape = jax.ShapeDtypeStruct((1, 64, 2, 4), jnp.float32)

    def products(window_size: int) -> int:
        def attend(*arrays):
            return nha_attention(*arrays, window_size=window_size, implementation="xla")

        return str(jax.make_jaxpr(attend)(*[shape] * 4)).count("dot_general")

    assert products(0) == products(1) - 1  # the window's logits


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("window_size", [4096, None], ids="W{}".format)
def test_decode_copies_no_ring(window_size, dtype):
    """Of a donated state only entries are written, and no temporary has a ring's size."""
    B, R, group = 2, 4096, 2
    state = jax.eval_shape(
        lambda: init_state(
            B, num_kv_heads=HEADS, num_slots=SLOTS, key_dim=DIM, value_dim=DIM,
            window_size=window_size, dtype=dtype, max_length=R,
        )
    )  # fmt: skip

    def decode(query, key, value, log_decay, state):
        rope = rope_tables(state.length[:, None], DIM)
        return decode_step(query, key, value, log_decay, state, window_size=window_size, rope=rope)

    query = jax.ShapeDtypeStruct((B, 1, HEADS * group, DIM), dtype)
    token = jax.ShapeDtypeStruct((B, 1, HEADS, DIM), dtype)
    log_decay = jax.ShapeDtypeStruct((B, 1, HEADS, SLOTS), jnp.float32)
    step = jax.jit(decode, donate_argnums=4).lower(query, token, token, log_decay, state).compile()
    memory = step.memory_analysis()
    assert memory.alias_size_in_bytes == sum(x.size * x.dtype.itemsize for x in state)
    assert memory.temp_size_in_bytes < B * R * HEADS * DIM * jnp.dtype(dtype).itemsize / 2
    assert large_copies(step.as_text(), B * R * HEADS * DIM) == []


def large_copies(program: str, elements: int) -> list[str]:
    """Operations that move at least so many elements."""
    operation = r"= \w+\[([\d,]+)\]\S* (copy|transpose|concatenate|convert|select)\("
    return [
        line.strip()[:200]
        for line in program.splitlines()
        if (match := re.search(operation, line))
        and math.prod(map(int, match[1].split(","))) >= elements
    ]
