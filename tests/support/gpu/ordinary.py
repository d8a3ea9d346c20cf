"""The cases of the GPU kernels that every run of the tests interprets, in one process.

NPROC=16 JAX_PLATFORMS=cpu python -m tests.support.gpu.ordinary INDEX...    # see process.py

Starting a process and lowering a kernel take as long as a case. So all cases share a process, and
two of them, which have every kernel between them, are lowered for CUDA.
"""

from collections.abc import Callable
from typing import Any

from nha_jax.testing import Case
from tests.support.gpu import decode_steps, interpreted
from tests.support.gpu.process import report

Check = tuple[Callable[[Any], None], Any]

CASES: list[Check] = [
    # Whole chunks and an aligned window: nothing is copied, and the kernels rotate.
    (
        interpreted.check,
        Case(T=128, window="64", M=12, K=64, V=64, B=1, gate="mixed"),
    ),
    # A window that is no multiple of a chunk, tokens before the call, segments, padded heads.
    (
        interpreted.interpret,
        Case(
            T=40,
            window="16",
            G=2,
            B=1,
            gate="-inf",
            segments=True,
            state=True,
            slot_feature_map="silu",
            rope="yarn",
        ),
    ),
    # Slots alone.
    (
        interpreted.interpret,
        Case(T=40, window="0", B=1, gate="normaliser-1", slot_weight_gradient="slots"),
    ),
    # A window alone.
    (
        interpreted.check,
        Case(T=64, window="None", G=2, B=1, segments=True, empty_slots="mask", rope="rows"),
    ),
    (decode_steps.interpret, decode_steps.CASES[0]),
]


def check(case: Check) -> None:
    function, argument = case
    function(argument)


if __name__ == "__main__":
    report(CASES, check)
