"""The launch that finds the chunks' gates, against its formulas in float64.

NPROC=16 JAX_PLATFORMS=cpu python -m tests.support.gpu.gates INDEX...    # see process.py
"""

import dataclasses
import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nha_jax.testing import log_decays
from pallas.gpu.forward.gates import Gates, chunk_gates, end_gates
from pallas.gpu.spec import CHUNK, LOG2E
from pallas.gpu.warpgroup.decays import FLOOR, LEAST_WRITE
from tests.support.gpu.process import HOPPER, report
from tests.support.ops.interpreters import GPU_INTERPRETER

# Relative errors: of a sum of C float32 numbers, and of an exponential.
TOLERANCES = {"cumulative": CHUNK * 2.0**-24, "total": 2e-5}
NARROW = 2.0**-8 + 2e-5  # of an exponential that is rounded to bfloat16
TINY = 1e-30  # absolute: smaller numbers may be 0


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes and options of a call: N query rows, Tq of the kernel, and H KV heads.

    gate: the kind of log decays, one of `GATES`. ahead, masked: as for `CallSpec`.
    """

    gate: str
    M: int = 16
    H: int = 1
    B: int = 1
    N: int = 128
    ahead: int = 0
    masked: bool = False

    def __str__(self) -> str:
        shape = f"M{self.M}-H{self.H}-B{self.B}-N{self.N}-ahead{self.ahead}"
        return f"{shape}-gate({self.gate})" + "-masked" * self.masked


CASES = [
    Case("mixed", M=64, H=2, B=2, ahead=64, masked=True),
    Case("-inf", ahead=64, masked=True),
    Case("holes", M=32),
    Case("-1000"),
    Case("normaliser-0.1", M=128),
    Case("normaliser-8", N=192, ahead=128),
    Case("0"),
]


def gates_of(
    log_decay: np.ndarray,
    token_reaches_end: Any,
    start_reaches_end: Any,
    least: float = LEAST_WRITE,
) -> Gates:
    """What `chunk_gates` returns, in float64. least: the least s that to_end is made of."""
    B, Tq, H, M = log_decay.shape
    decay = log_decay.astype(np.float64).reshape(B, -1, CHUNK, H, M)
    from_row = np.flip(np.cumsum(np.flip(decay, 2), 2), 2)
    after = np.pad(from_row[:, :, 1:], ((0, 0), (0, 0), (0, 1), (0, 0), (0, 0)))
    write = -np.expm1(decay)
    to_end, total = np.maximum(write, least) * np.exp(after), np.exp(from_row[:, :, 0])
    if token_reaches_end is not None:
        to_end = np.where(np.reshape(token_reaches_end, (B, -1, CHUNK, 1, 1)), to_end, 0)
        total = np.where(np.asarray(start_reaches_end)[..., None, None], total, 0)
    cumulative = np.cumsum(np.maximum(decay, FLOOR) * LOG2E, 2)
    odds = np.exp(decay) / np.maximum(write, LEAST_WRITE)
    cumulative, write, to_end, odds = (
        x.reshape(B, Tq, H, M) for x in (cumulative, write, to_end, odds)
    )
    return Gates(cumulative, write, to_end, total.swapaxes(1, 2), odds)


def rounded(gates: Gates) -> Gates:
    """The gates in the dtypes that the kernel returns."""
    return Gates(
        *(
            jnp.asarray(x, jnp.float32 if name in TOLERANCES else jnp.bfloat16)
            for name, x in gates._asdict().items()
        )
    )


def check(case: Case) -> None:
    """Lowers the kernel for CUDA, and raises AssertionError if a gate is too far off."""
    rng = np.random.default_rng(zlib.crc32(repr(case).encode()))
    shape = case.B, case.N, case.H, case.M
    log_decay = log_decays(case.gate, rng.standard_normal(shape), rng).astype(np.float32)
    ahead = ((0, 0), (case.ahead, 0), (0, 0), (0, 0))
    entering = np.pad(log_decay, ahead)[:, : case.N]
    reaches_end: tuple[Any, Any] = (None, None)  # tokens, and what the slots held at the start
    if case.masked:
        tokens = rng.random((case.B, case.N)) < 0.8
        reaches_end = tokens, rng.random((case.B, case.N // CHUNK)) < 0.5
    arguments = jax.tree.map(jnp.asarray, (log_decay, *reaches_end))
    for gates, least in ((chunk_gates, LEAST_WRITE), (end_gates, 0.0)):
        kernel = functools.partial(gates, ahead=case.ahead)
        with jax.sharding.use_abstract_mesh(HOPPER):
            lowered = jax.jit(kernel).trace(*arguments).lower(lowering_platforms=("cuda",))
        assert "nha_gates_mosaic_gpu" in lowered.as_text()
        actual = jax.jit(functools.partial(kernel, interpret=GPU_INTERPRETER))(*arguments)
        expected = gates_of(entering, *reaches_end, least)
        for name, x in actual._asdict().items():
            y = getattr(expected, name)
            assert x.dtype == getattr(rounded(expected), name).dtype, name
            relative = TOLERANCES.get(name, NARROW)
            np.testing.assert_allclose(
                np.asarray(x, np.float64), y, relative, TINY, strict=True, err_msg=name
            )


if __name__ == "__main__":
    report(CASES, check)
