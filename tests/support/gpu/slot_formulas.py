"""The slots' backward by its formulas in float64, and inputs to try them on.

Axes: b row of the batch, n chunk, h KV head, g query head of its group, r row of the chunk, j its
token, k block of rows with a reference of their gates, m slot, d feature. For one query head, with
S0 the slots at the chunk's start, rise and fall as in `pallas/gpu/warpgroup/decays.py`, and
spread(X)_r = sum_j X_rj fall_j, gather(X)_rj = sum_m X_rm fall_jm:

    S = entered * q k^T                       D = entered * do v^T
    a = scale (E0 (q SK0) + rise spread(S))   dp = E0 (do SV0) + rise spread(D)     E0 = exp(G_r)
    p = exp(a - lse)                          ds = p (dp - sum_m p dp - rest) scale
    L = entered * gather(ds rise)             A = entered * gather(p rise)
    dq = (ds E0) SK0^T + L k
    dk = sum_g L^T q + to_end dSK1^T          dv = sum_g A^T do + to_end dSV1^T
    dSK0 = total dSK1 + sum_g q^T (ds E0)     dSV0 = total dSV1 + sum_g do^T (p E0)

dS1 is the gradient of the slots at the chunk's end, the next one's dS0.
"""

import dataclasses
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas.gpu.forward.gates import Gates
from pallas.gpu.spec import CHUNK, GATE_BLOCKS, GATE_ROWS, CallSpec, Segments
from tests.support.gpu.gates import gates_of, rounded
from tests.support.ops.cases import gates as log_decays

Arrays = dict[str, np.ndarray]
Side = tuple[np.ndarray, np.ndarray]  # of keys, of values

NOTHING_SEEN = -1e30  # lse of a row that sees nothing


@dataclasses.dataclass(frozen=True)
class Case:
    """D, M slots of which `slots` are not padding, G and H heads, N rows; gates by their name.

    added: of which arrays the window's gradients are given.
    """

    D: int = 64
    M: int = 64
    slots: int = 64
    G: int = 1
    H: int = 1
    N: int = 128
    B: int = 1
    window: int = 64
    ahead: int = 64
    masked: bool = False
    state: bool = False
    gate: str = "normaliser-8"
    added: tuple[str, ...] = ()

    @property
    def spec(self) -> CallSpec:
        return CallSpec(
            group=self.G,
            slots=self.slots,
            empty_slots=0,
            window=self.window,
            offset=self.window,
            ahead=self.ahead,
            scale=self.D**-0.5,
            masked=self.masked,
            state=self.state,
        )

    def __str__(self) -> str:
        flags = [name for name in ("masked", "state") if getattr(self, name)]
        shape = f"D{self.D}-M{self.M}({self.slots})-G{self.G}-H{self.H}-W{self.window}"
        shape += f"-ahead{self.ahead}"
        return "-".join([shape, f"gate({self.gate})", *flags, *self.added])


class Inputs(NamedTuple):
    """What the kernels of the slots' backward read."""

    query: jax.Array  # [B, N, H * G, D] bfloat16
    d_out: jax.Array
    key: jax.Array  # [B, P, H, D] bfloat16
    value: jax.Array
    lse: jax.Array  # [B, H * G, N] float32
    slot_weight: jax.Array
    rest: jax.Array
    log_decay: jax.Array  # [B, N, H, M] float32
    written: jax.Array | None  # [B, N], as for `chunk_gates`
    gates: Gates
    starts: tuple[jax.Array, jax.Array]  # [B, H, N / C, D, M] bfloat16
    segments: Segments | None
    d_end: tuple[jax.Array, jax.Array] | None  # [B, H, D, M] float32
    window_gradients: dict[str, jax.Array]  # bfloat16, shapes as of the arrays


class Queries(NamedTuple):
    """float64, shapes as of `slot_query_gradients`."""

    query: np.ndarray
    d_logits_to_reference: np.ndarray
    weights_to_reference: np.ndarray
    d_logits_to_start: np.ndarray
    weights_to_start: np.ndarray


class States(NamedTuple):
    """float64 gradients of the slots."""

    ends: Side  # [B, H, N / C, D, M] each, at the chunks' ends
    start: Side  # [B, H, D, M] each


def make_inputs(case: Case) -> Inputs:
    """Random arrays. The lse is that of the slots and, with a window, one more logit, with
    its part of the output's gradient: rest.
    """
    rng = np.random.default_rng(zlib.crc32(repr(case).encode()))
    B, N, D, H, M = case.B, case.N, case.D, case.H, case.M
    heads, rows = H * case.G, (B, N)

    def normal(*shape, dtype=ml_dtypes.bfloat16):
        return rng.standard_normal(shape).astype(dtype)

    query, d_out = normal(*rows, heads, D), normal(*rows, heads, D)
    P = N + 64 - case.ahead
    key, value = normal(B, P, H, D), normal(B, P, H, D)
    pulled = normal(B, heads, N, dtype=np.float32)
    log_decay = log_decays(case.gate, rng.standard_normal((*rows, H, M)), rng)
    log_decay[..., case.slots :] = 0
    log_decay[:, : case.ahead] = 0
    start_key, start_value = normal(2, B, H, N // CHUNK, D, M)
    start_key[..., case.slots :] = 0
    start_value[..., case.slots :] = 0
    end_key, end_value = map(jnp.asarray, normal(2, B, H, D, M, dtype=np.float32))
    segments: Segments | None = None
    written = kept = None
    if case.masked:
        segments, written, kept = _segments(case, rng)
        seen = np.asarray(segments.query) >= 0
        d_out, pulled = d_out * seen[..., None, None], pulled * seen[:, None]
        d_out = d_out.astype(ml_dtypes.bfloat16)
    decays = jnp.asarray(log_decay, jnp.float32)
    inputs = Inputs(
        *map(jnp.asarray, (query, d_out, key, value)),
        lse=jnp.zeros((B, heads, N), jnp.float32),
        slot_weight=jnp.zeros((B, heads, N), jnp.float32),
        rest=jnp.zeros((B, heads, N), jnp.float32),
        log_decay=decays,
        written=written,
        gates=rounded(gates_of(np.asarray(decays), written, kept)),
        starts=(jnp.asarray(start_key), jnp.asarray(start_value)),
        segments=segments,
        d_end=(end_key, end_value) if case.state else None,
        window_gradients={},
    )
    with np.errstate(divide="ignore"):
        slots = np.log(np.sum(np.exp(Chunks(inputs, case.spec).logits()), -1))
    others = rng.standard_normal(slots.shape) if case.window else NOTHING_SEEN
    flat = lambda x: x.transpose(0, 2, 3, 1, 4).reshape(B, heads, N)  # noqa: E731
    lse = np.logaddexp(slots, others)
    slot_weight = flat(np.exp(slots - lse))
    lse = flat(lse)
    if case.masked:
        lse = np.where(seen[:, None], lse, NOTHING_SEEN)
    rest = (1 - slot_weight) * pulled
    wide = (jnp.asarray(x, jnp.float32) for x in (lse, slot_weight, rest))
    return inputs._replace(
        **dict(zip(("lse", "slot_weight", "rest"), wide, strict=True)),
        window_gradients={x: jnp.asarray(normal(*getattr(inputs, x).shape)) for x in case.added},
    )


def _segments(case: Case, rng: np.random.Generator) -> tuple[Segments, jax.Array, jax.Array]:
    """Segments drawn at random, some rows of padding, and what is written and kept."""
    rows = case.B, case.N
    entering = np.cumsum(rng.random(rows) < 3 / case.N, axis=1).astype(np.int32)
    reads = rng.integers(0, 3, rows).astype(np.int32)
    own = np.where(rng.random(rows) < 0.1, -2, entering).astype(np.int32)
    reads[own < 0] = 0
    visible = np.pad(entering, ((0, 0), (0, 64)), constant_values=-1)[:, case.ahead :]
    written = rng.random(rows) < 0.8
    kept = rng.random((case.B, case.N // CHUNK)) < 0.7
    return (
        Segments(*map(jnp.asarray, (own, visible, reads))),
        jnp.asarray(written),
        jnp.asarray(kept),
    )


def _wide(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


class Chunks:
    """The formulas of the module's docstring; arrays are [b, n, h, g, r or j, d or m]."""

    def __init__(self, inputs: Inputs, spec: CallSpec):
        self.spec = spec
        gates, B, N = inputs.gates, *inputs.query.shape[:2]
        H, M = gates.write.shape[2:]
        self.shape = B, N // CHUNK, H, spec.group, CHUNK
        G = self.tokens(gates.cumulative)  # [b, n, h, j, m]
        R = G[..., GATE_ROWS // 2 - 1 :: GATE_ROWS, :]
        self.write, self.to_end = self.tokens(gates.write), self.tokens(gates.to_end)
        self.total = _wide(gates.total)
        self.rise = np.exp2(G - np.repeat(R, GATE_ROWS, axis=-2))[:, :, :, None]
        self.bare_fall = np.exp2(R[..., None, :] - G[..., None, :, :])  # [b, n, h, k, j, m]
        self.fall = self.write[..., None, :, :] * self.bare_fall
        self.from_start = np.exp2(G)[:, :, :, None]
        self.entered = np.tri(CHUNK, dtype=bool)[None, None, None, None]
        reads = np.full((B, 1, 1, 1, N // CHUNK, CHUNK), 2)
        if inputs.segments is not None:
            run, reads = np.asarray(inputs.segments.query), np.asarray(inputs.segments.slot_access)
            visible = np.pad(inputs.segments.token, ((0, 0), (spec.ahead, 0)), constant_values=-1)
            run, visible = (x[:, :N].reshape(B, -1, 1, 1, CHUNK) for x in (run, visible))
            self.entered = self.entered & (run[..., None] == visible[..., None, :])
        reads = reads.reshape(B, -1, 1, 1, CHUNK, 1)
        self.from_start = np.where(reads > 1, self.from_start, 0)
        self.reads = (reads > 0) & (np.arange(M) < spec.slots)
        ahead = ((0, 0), (spec.ahead, 0), (0, 0), (0, 0))
        key, value = (np.pad(x, ahead)[:, :N] for x in (inputs.key, inputs.value))
        starts = (_wide(x).swapaxes(1, 2)[:, :, :, None] for x in inputs.starts)
        self.left = self.rows(inputs.query), self.rows(inputs.d_out)  # q, do
        self.right = self.tokens(key), self.tokens(value)  # k, v
        self.starts = tuple(starts)  # [b, n, h, 1, d, m]
        self.scores = tuple(
            np.where(self.entered, np.einsum("bnhgrd,bnhjd->bnhgrj", x, y), 0)
            for x, y in zip(self.left, self.right, strict=True)
        )  # S, D

    def tokens(self, x: Any) -> np.ndarray:
        """[B, N, H, .] -> [b, n, h, j, .]."""
        B, n, H, _, C = self.shape
        return _wide(x).reshape(B, n, C, H, -1).swapaxes(2, 3)

    def rows(self, x: Any) -> np.ndarray:
        """[B, N, H * G, .] -> [b, n, h, g, r, .]."""
        B, n, H, G, C = self.shape
        return _wide(x).reshape(B, n, C, H, G, -1).transpose(0, 1, 3, 4, 2, 5)

    def back(self, x: np.ndarray) -> np.ndarray:
        """[b, n, h, g, r, .] -> [B, N, H * G, .]."""
        B, n, H, G, C = self.shape
        return x.transpose(0, 1, 4, 2, 3, 5).reshape(B, n * C, H * G, -1)

    def spread(self, x: np.ndarray) -> np.ndarray:
        blocks = x.reshape(*x.shape[:4], GATE_BLOCKS, GATE_ROWS, -1)
        return np.einsum("bnhgkrj,bnhkjm->bnhgkrm", blocks, self.fall).reshape(*x.shape[:5], -1)

    def gather(self, x: np.ndarray) -> np.ndarray:
        blocks = x.reshape(*x.shape[:4], GATE_BLOCKS, GATE_ROWS, -1)
        return np.einsum("bnhgkrm,bnhkjm->bnhgkrj", blocks, self.fall).reshape(*x.shape[:5], -1)

    def _to_slots(self, side: int) -> np.ndarray:
        return self.from_start * (self.left[side] @ self.starts[side]) + self.rise * self.spread(
            self.scores[side]
        )

    def logits(self) -> np.ndarray:
        """a, -inf where there is no slot or the row reads none."""
        return np.where(self.reads, self.spec.scale * self._to_slots(0), -np.inf)

    def queries(self, lse: jax.Array, rest: jax.Array) -> Queries:
        """What `slot_query_gradients` returns."""
        B, n, H, G, C = self.shape
        by_row = lambda x: _wide(x).reshape(B, H, G, n, C, 1).transpose(0, 3, 1, 2, 4, 5)  # noqa: E731
        p = np.exp(self.logits() - by_row(lse))
        dp = self._to_slots(1)
        delta = np.sum(p * dp, -1, keepdims=True) + by_row(rest)
        ds = p * (dp - delta) * self.spec.scale
        into_tokens = np.where(self.entered, self.gather(ds * self.rise), 0)  # L
        dq = (ds * self.from_start) @ self.starts[0].swapaxes(-1, -2)
        dq += into_tokens @ self.right[0][:, :, :, None]
        factors = ((ds, self.rise), (p, self.rise), (ds, self.from_start), (p, self.from_start))
        return Queries(self.back(dq), *(self.back(x * factor) for x, factor in factors))

    def states(self, queries: Queries, d_end: Side | None) -> States:
        """Of the rounded `queries`."""
        pulled = self.rows(queries.d_logits_to_start), self.rows(queries.weights_to_start)
        added = [
            np.einsum("bnhgrd,bnhgrm->nbhdm", x, y) for x, y in zip(self.left, pulled, strict=True)
        ]
        grads = [np.zeros_like(x[0]) for x in added] if d_end is None else list(d_end)
        grads = [_wide(x) for x in grads]
        ends: list[list[np.ndarray]] = [[], []]
        for chunk in reversed(range(self.shape[1])):
            total = self.total[:, :, chunk, None]
            for side in range(2):
                ends[side].insert(0, grads[side])
                grads[side] = total * grads[side] + added[side][chunk]
        key, value = (np.stack(x, axis=2) for x in ends)
        return States((key, value), (grads[0], grads[1]))

    def tokens_of(self, queries: Queries, ends: Side) -> Side:
        """The gradients of the keys and of the values as slots see them, [B, N, H, D]."""
        B, n, H, _, C = self.shape
        results = []
        for side, pulled in enumerate(
            (queries.d_logits_to_reference, queries.weights_to_reference)
        ):
            into_tokens = np.where(self.entered, self.gather(self.rows(pulled)), 0)
            grad = np.einsum("bnhgrj,bnhgrd->bnhjd", into_tokens, self.left[side])
            grad += np.einsum("bnhjm,bhndm->bnhjd", self.to_end, _wide(ends[side]))
            results.append(grad.swapaxes(2, 3).reshape(B, n * C, H, -1))
        return results[0], results[1]
