"""The decode kernel in its interpreter against a decode step in XLA, with rows of every age."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import pytest

from nha_jax.ops.kernels import kernel_state
from nha_jax.ops.tpu import decode_tpu
from pallas.tpu.decode import decode_unsupported
from tests.support.ops.decode_cases import (
    check_decode_step,
    decode_options,
    make_state,
    make_token,
)

decode_in_kernel = jax.jit(decode_tpu, static_argnames=("options", "interpret"))

ROOM = 64  # ring entries without a window


@dataclasses.dataclass(frozen=True)
class Case:
    """Two steps of three batch rows, one of which is not active in the second."""

    window: int | None
    heads: int  # key/value heads; the interpreter's time goes by them
    group: int
    dtype: str
    empty_slots: str
    feature_map: str = "identity"

    def __str__(self) -> str:
        flags = f"{self.dtype}-{self.empty_slots}-{self.feature_map}"
        return f"W{self.window}-H{self.heads}-G{self.group}-{flags}"


# Each value of each field with several of the others'.
CASES = [
    Case(64, heads=2, group=1, dtype="float32", empty_slots="attend"),
    Case(64, heads=2, group=2, dtype="bfloat16", empty_slots="mask", feature_map="silu"),
    Case(32, heads=4, group=1, dtype="bfloat16", empty_slots="attend", feature_map="relu"),
    Case(None, heads=2, group=2, dtype="float32", empty_slots="mask"),
    Case(None, heads=2, group=1, dtype="bfloat16", empty_slots="attend"),
]
GRID = [
    Case(window, heads, group, dtype, empty_slots, feature_map)
    for (window, heads), group, dtype, empty_slots, feature_map in itertools.product(
        ((64, 2), (32, 4), (16, 8), (32, 8), (None, 2), (None, 8)),
        (1, 2),
        ("float32", "bfloat16"),
        ("attend", "mask"),
        ("identity", "silu", "relu"),
    )
]


def run(case: Case) -> None:
    dtype, R = jnp.dtype(case.dtype), case.window or ROOM
    # Rows of different age: empty, about to be full, and (with a window) long full.
    lengths = [0, R - 1, 3 * R + 5 if case.window else R // 2]
    state = make_state(case.window, dtype, lengths, case.heads, max_length=ROOM)
    options = decode_options(case.window, case.empty_slots, case.feature_map)
    tolerance = 2e-6 if case.dtype == "float32" else 2e-2
    for step, active in enumerate([[True, True, True], [True, False, True]]):
        token = make_token(step, case.group, dtype, state)
        arguments = (*token, state, jnp.array(active))
        state = check_decode_step(arguments, options, tolerance, decode_in_kernel)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_matches_xla(case: Case) -> None:
    run(case)


@pytest.mark.full
@pytest.mark.parametrize("case", [case for case in GRID if case not in CASES], ids=str)
def test_kernel_matches_xla_with_all_options(case: Case) -> None:
    run(case)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_heads_of_512(dtype: str) -> None:
    """The published 1.3B model's four."""
    state = make_state(
        32, jnp.dtype(dtype), [0, 31, 101], heads=4, key_dim=512, value_dim=512, num_slots=64
    )
    arguments = (*make_token(0, 1, jnp.dtype(dtype), state), state, jnp.ones(3, bool))
    options = dataclasses.replace(decode_options(32, "attend", "silu"), scale=512**-0.5)
    tolerance = 2e-6 if dtype == "float32" else 2e-2
    check_decode_step(arguments, options, tolerance, decode_in_kernel)


def test_ring_of_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks, read from the one with the entry on, and decays with entries innermost."""
    monkeypatch.setattr("pallas.tpu.decode.BLOCK_BYTES", 2**16)
    state = make_state(128, jnp.float32, [200, 128, 40], heads=2)
    arguments = (*make_token(0, 2, jnp.float32, state), state, jnp.array([True, False, True]))
    options = decode_options(128, "attend", "identity")
    # Not `decode_in_kernel`, which may have been traced with other blocks.
    kernel = jax.jit(
        lambda *arguments, **static: decode_tpu(*arguments, **static),
        static_argnames=("options", "interpret"),
    )
    check_decode_step(arguments, options, 2e-6, kernel)


@pytest.mark.parametrize(("rows", "order"), [(4, "parallel"), (3, "arbitrary")], ids=str)
def test_two_cores_never_update_a_row_twice(rows: int, order: str) -> None:
    state = make_state(64, jnp.float32, [0] * rows, heads=2)
    arguments = (*make_token(0, 1, jnp.float32, state), state, jnp.ones(rows, bool))
    options = decode_options(64, "attend", "identity")
    program = str(jax.make_jaxpr(lambda *x: decode_tpu(*x, options=options))(*arguments))
    assert f"dimension_semantics=('{order}', 'arbitrary')" in program


def test_a_state_too_large_for_vmem_is_refused() -> None:
    state = jax.eval_shape(lambda: make_state(64, jnp.bfloat16, [0], heads=1024))
    reason = decode_unsupported(kernel_state(state))
    assert reason is not None
    assert re.search(r"would need \d+ MiB of VMEM, over 48, .* 1024 heads of 128 and 128", reason)
