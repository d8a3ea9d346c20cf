"""The decode kernel in its interpreter against decode_step in XLA.

NPROC=16 JAX_PLATFORMS=cpu python -m tests.support.gpu.decode_steps INDEX...    # see process.py
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from nha_jax.ops import decode_step
from nha_jax.ops.gpu import decode_gpu
from nha_jax.ops.state import NHAState
from tests.support.gpu.process import HOPPER, report
from tests.support.ops.decode_cases import (
    check_decode_step,
    decode_options,
    make_state,
    make_token,
)

INTERPRETER = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")


class Case(NamedTuple):
    """Some steps in a row, of three rows of different age, one of which is not active in the last.

    room: ring entries without a window.
    """

    window: int | None
    group: int = 1
    dtype: str = "bfloat16"
    empty_slots: str = "attend"
    feature_map: str = "identity"
    slots: int = 16
    key_dim: int = 128
    value_dim: int = 128
    room: int = 48
    steps: int = 2

    def __str__(self) -> str:
        return f"W{self.window}-G{self.group}-{self.dtype}-M{self.slots}-K{self.key_dim}"


CASES = [
    Case(16),
    Case(32, 2, "float32", "mask", "silu", slots=32, steps=3),
    Case(None, 2, "float32", "mask"),
    Case(None, room=1024),  # several blocks share the ring
    Case(20, 4, "float32", feature_map="relu", slots=24, key_dim=64),
    Case(200, 3, "float32", slots=72, value_dim=64),
    Case(8, 8, slots=16, key_dim=256, value_dim=256, steps=9),
    Case(0, 2, "float32"),
]


def check(case: Case) -> None:
    """Lowers the kernel for CUDA, and interprets it."""
    lower_for_cuda(case)
    interpret(case)


def interpret(case: Case) -> None:
    """Raises AssertionError if a step differs."""
    dtype, state = jnp.dtype(case.dtype), start_of(case)
    chosen = decode_options(case.window, case.empty_slots, case.feature_map)
    kernel = jax.jit(
        lambda *arguments, options, interpret: decode_gpu(
            *arguments, options=options, interpret=INTERPRETER
        ),
        static_argnames=("options", "interpret"),
    )
    tolerance = 2e-6 if case.dtype == "float32" else 2e-2
    for step in range(case.steps):
        active = jnp.array([True, step + 1 < case.steps, True])
        arguments = (*make_token(step, case.group, dtype, state), state, active)
        state = check_decode_step(arguments, chosen, tolerance, kernel)


def start_of(case: Case) -> NHAState:
    """The state before the first step: an empty row, one about to be full, and a half full one.

    With a window the last has been full for long.
    """
    R = case.room if case.window is None else case.window
    lengths = [0, max(R - case.steps, 0), R // 2 if case.window is None else 3 * R + 5]
    sizes = {"num_slots": case.slots, "key_dim": case.key_dim, "value_dim": case.value_dim}
    dtype = jnp.dtype(case.dtype)
    return make_state(case.window, dtype, lengths, heads=2, max_length=case.room, **sizes)


def lower_for_cuda(case: Case) -> None:
    """Raises what Mosaic does: the interpreter knows no layouts, and runs what Mosaic refuses."""
    state = start_of(case)
    query, _, new = make_token(0, case.group, jnp.dtype(case.dtype), state)
    step = functools.partial(
        decode_step,
        window_size=case.window,
        slot_feature_map=case.feature_map,
        empty_slots=case.empty_slots,
        implementation="pallas_gpu",
    )
    with jax.sharding.use_abstract_mesh(HOPPER):
        traced = jax.jit(step).trace(query, new.key, new.value, new.log_decay, state)
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


if __name__ == "__main__":
    report(CASES, check)
