"""The launches that find the window's gradients, against their formulas in float64.

NPROC=16 JAX_PLATFORMS=cpu python -m tests.support.gpu.window_gradients INDEX...    # see process.py
"""

import dataclasses
import functools
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from nha_jax.testing import relative_error
from pallas.gpu import CHUNK, BlockSizes, CallSpec
from pallas.gpu.backward.window_query_gradients import window_query_gradients
from pallas.gpu.backward.window_token_gradients import window_token_gradients
from pallas.gpu.spec import Segments
from pallas.gpu.warpgroup.rotation import Rotation
from tests.support.gpu.process import HOPPER, report
from tests.support.ops.interpreters import GPU_INTERPRETER

TOLERANCE = 4e-3  # of relative Frobenius errors; the operands are rounded to 2^-9
WIDE_TOLERANCE = 1e-5  # of what is never rounded to bfloat16
NOTHING_SEEN = -1e30  # lse of a row that sees nothing


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes and options of a call of the kernels.

    G query heads for each of H KV heads; N query rows, Tq of the kernels; window W.

    ahead, masked: as for `CallSpec`.
    past: without a window, the tokens before the queries.
    stages: `BlockSizes.window_stages`.
    tables: batch rows of the tables of rotation, 1 or B; 0: queries and keys come rotated.
    """

    D: int = 64
    W: int | None = 64
    ahead: int = 0
    past: int = 0
    G: int = 1
    H: int = 1
    N: int = 128
    B: int = 1
    masked: bool = False
    stages: int = 2
    tables: int = 0

    @property
    def spec(self) -> CallSpec:
        return CallSpec(
            group=self.G,
            slots=0,
            empty_slots=0,
            window=self.W,
            offset=self.past if self.W is None else self.W,
            ahead=self.ahead,
            scale=self.D**-0.5,
            masked=self.masked,
            state=False,
        )

    @property
    def tokens(self) -> int:
        """Token rows, Tk of the kernels."""
        if self.spec.blocks is None:
            return self.N + self.past
        return self.N + (self.spec.blocks - 1) * CHUNK - self.ahead

    def __str__(self) -> str:
        fields = (("D", self.D), ("W", self.W), ("ahead", self.ahead), ("G", self.G))
        flags = "-masked" * self.masked + "-rotates" * bool(self.tables)
        return "-".join(f"{name}{value}" for name, value in fields) + flags


class Inputs(NamedTuple):
    """What the launches of the window's backward read."""

    window_query: jax.Array  # [B, Tq, Hq, D] bfloat16
    window_key: jax.Array  # [B, Tk, Hkv, D] bfloat16
    value: jax.Array
    d_out: jax.Array
    lse: jax.Array  # [B, Hq, Tq] float32
    delta: jax.Array
    segments: Segments | None
    rotation: Rotation | None

    def arrays(self) -> dict[str, jax.Array]:
        """All of them, as the kernels know them."""
        arrays = self._asdict()
        segments, rotation = arrays.pop("segments"), arrays.pop("rotation")
        arrays |= {} if segments is None else segments.arrays(slots=False)
        return arrays | ({} if rotation is None else rotation._asdict())


CASES = [
    Case(D=256, W=64, ahead=64, G=2),
    Case(D=256, W=100, G=2, masked=True),
    Case(D=256, W=None, past=64, masked=True, stages=1),
    Case(D=192, W=16, H=2, G=2, B=2),
    Case(D=192, W=64, ahead=64, masked=True),
    Case(D=128, W=None, G=2),
    Case(D=128, W=64, G=2, masked=True, N=192),
    Case(D=128, W=1),
    Case(D=64, W=1, masked=True, stages=4),
    Case(D=64, W=100, G=2, H=2),
    Case(D=64, W=128, ahead=128, N=64),
    Case(D=64, W=64, ahead=64, G=4, masked=True, N=192, stages=3),
    Case(D=256, W=64, ahead=64, G=2, masked=True, tables=1),
    Case(D=256, W=100, stages=1, tables=1),
    Case(D=192, W=100, G=2, B=2, N=64, tables=1),
    Case(D=128, W=100, H=2, masked=True, stages=3, tables=1),
    Case(D=128, W=128, ahead=128, G=2, N=64, stages=1, tables=1),
    Case(D=64, W=16, H=2, B=2, masked=True, tables=2),
    Case(D=64, W=64, ahead=64, G=2, N=192, stages=4, tables=1),
]


def make_inputs(case: Case) -> Inputs:
    """Random arrays, and the lse of the window and of one more logit."""
    rng = np.random.default_rng(zlib.crc32(repr(case).encode()))
    B, N, P, D, H = case.B, case.N, case.tokens, case.D, case.H
    heads = H * case.G

    def normal(*shape, dtype=ml_dtypes.bfloat16):
        return jnp.asarray(rng.standard_normal(shape).astype(dtype))

    inputs = Inputs(
        window_query=normal(B, N, heads, D),
        window_key=normal(B, P, H, D),
        value=normal(B, P, H, D),
        d_out=normal(B, N, heads, D),
        lse=jnp.zeros((B, heads, N), jnp.float32),
        delta=normal(B, heads, N, dtype=np.float32),
        segments=_segments(case, rng) if case.masked else None,
        rotation=_tables(case, rng) if case.tables else None,
    )
    logits, seen = _logits(_rotated(inputs, case), case)
    lse = np.logaddexp.reduce(logits, axis=-1)
    lse = np.logaddexp(lse, rng.standard_normal(lse.shape))
    if case.masked:
        lse = np.where(np.any(seen, -1), lse, NOTHING_SEEN)
    return inputs._replace(lse=jnp.asarray(lse.reshape(B, heads, N), jnp.float32))


def _segments(case: Case, rng: np.random.Generator) -> Segments:
    """Segments drawn at random; some rows are padding, and some tokens are none."""
    timeline = case.B, case.ahead + case.tokens
    segment = np.cumsum(rng.random(timeline) < 4 / case.N, axis=1).astype(np.int32)
    absent = rng.random(timeline) < 0.1
    own = slice(case.spec.offset, case.spec.offset + case.N)
    query = np.where(absent, -2, segment)[:, own]
    token = np.where(absent, -1, segment)[:, case.ahead :]
    return Segments(jnp.asarray(query), jnp.asarray(token), None)


def _tables(case: Case, rng: np.random.Generator) -> Rotation:
    """Tables of no angles, so that rotating back and undoing the rotation are not the same.

    Their few bits make what is rotated exact in float32, so that it is rounded to bfloat16 as the
    expected values are.
    """
    shape = case.tables, case.tokens, case.D // 2
    return Rotation(*(jnp.asarray(rng.integers(-8, 9, shape) / 8, jnp.float32) for _ in range(2)))


def _rotated(inputs: Inputs, case: Case) -> Inputs:
    """Queries and keys as the kernels multiply them: rotated, and rounded to bfloat16 again."""
    query, key = (
        _rotate(x, inputs.rotation, first).astype(ml_dtypes.bfloat16)
        for x, first in ((inputs.window_query, _before(case)), (inputs.window_key, 0))
    )
    return inputs._replace(window_query=query, window_key=key)


def _before(case: Case) -> int:
    """How many token rows of the arrays come before the first query's."""
    return case.spec.offset - case.spec.ahead


def _rotate(x: Any, tables: Rotation | None, first: int, *, back: bool = False) -> np.ndarray:
    """x [B, rows, heads, D], whose first row is the tables' row `first`, in float64."""
    x = np.asarray(x, np.float64)
    if tables is None:
        return x
    rows = slice(first, first + x.shape[1])
    cos, sin = (np.asarray(table, np.float64)[:, rows, None] for table in tables)
    sin = -sin if back else sin
    x1, x2 = np.split(x, 2, axis=-1)
    return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


def _by_head(x: Any, case: Case) -> np.ndarray:
    """[B, Tq, Hq, D] -> [B, Hkv, G, Tq, D] float64."""
    x = np.asarray(x, np.float64)
    return x.reshape(*x.shape[:2], case.H, -1, x.shape[3]).transpose(0, 2, 3, 1, 4)


def _logits(inputs: Inputs, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Logits, -inf where a row does not see a token, and whether it does: [B, Hkv, G, Tq, Tk]."""
    spec = case.spec
    now = (np.arange(case.N) + spec.offset)[:, None]
    token = (np.arange(case.tokens) + case.ahead)[None]
    seen = token <= now
    if case.W is not None:
        seen &= token > now - case.W
    seen = seen[None, None, None]
    if inputs.segments is None:
        seen = seen & (token >= spec.offset)
    else:
        query, of_token = np.asarray(inputs.segments.query), np.asarray(inputs.segments.token)
        seen = seen & (query[:, :, None] == of_token[:, None])[:, None, None]
    query, key = _by_head(inputs.window_query, case), _by_head(inputs.window_key, case)
    logits = spec.scale * np.einsum("bhgrd,bhxjd->bhgrj", query, key)
    return np.where(seen, logits, -np.inf), seen


def expected_grads(inputs: Inputs, case: Case) -> dict[str, np.ndarray]:
    """What the launches return, by the formulas of their docstrings."""
    by_row = lambda x: np.asarray(x, np.float64).reshape(case.B, case.H, case.G, case.N, 1)  # noqa: E731
    inputs = _rotated(inputs, case)
    query, key, value, d_out = (_by_head(x, case) for x in inputs[:4])
    logits, _ = _logits(inputs, case)
    p = np.exp(logits - by_row(inputs.lse))
    dp = np.einsum("bhgrd,bhxjd->bhgrj", d_out, value)
    ds = case.spec.scale * p * (dp - by_row(inputs.delta))
    grads = {
        "query": np.einsum("bhgrj,bhxjd->brhgd", ds, key),
        "key": np.einsum("bhgrj,bhgrd->bjhd", ds, query),
        "value": np.einsum("bhgrj,bhgrd->bjhd", p, d_out),
    }
    d_query = grads["query"].reshape(inputs.window_query.shape)
    return grads | {
        "query": _rotate(d_query, inputs.rotation, _before(case), back=True),
        "key": _rotate(grads["key"], inputs.rotation, 0, back=True),
        "window_delta": np.sum(p * dp, -1).reshape(inputs.delta.shape),
    }


def run(case: Case, interpret: Any, inputs: Inputs) -> dict[str, jax.Array]:
    sizes = BlockSizes(window_stages=case.stages)
    options: dict[str, Any] = {"spec": case.spec, "block_sizes": sizes, "interpret": interpret}
    tokens = window_token_gradients(inputs.arrays(), **options)
    queries = window_query_gradients(inputs.arrays(), **options)
    return queries._asdict() | tokens._asdict()


def check(case: Case) -> None:
    """Lowers the kernels for CUDA, and raises AssertionError if a result is too far off."""
    inputs = make_inputs(case)
    with jax.sharding.use_abstract_mesh(HOPPER):
        traced = jax.jit(functools.partial(run, case, False)).trace(inputs)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert all(f"nha_window_{name}_mosaic_gpu" in text for name in ("queries", "tokens"))
    actual = jax.jit(functools.partial(run, case, GPU_INTERPRETER))(inputs)
    expected = expected_grads(inputs, case)
    errors = {
        name: relative_error(np.asarray(x, np.float64), expected[name])
        for name, x in actual.items()
    }
    for name, error in errors.items():
        assert error <= (WIDE_TOLERANCE if name == "window_delta" else TOLERANCE), errors


if __name__ == "__main__":
    report(CASES, check)
