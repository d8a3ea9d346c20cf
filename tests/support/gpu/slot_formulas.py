"""The formulas of the slots' backward in float64, and inputs to try the kernels on.

For one query head, with S0 the slots at the chunk's start (SK0 keys, SV0 values), `entered` the
tokens that a row finds in its slots, row_decay and token_decay as in
`pallas/gpu/warpgroup/decays.py`, and

    spread(X)_r = sum_j X_rj token_decay_j        gather(X)_rj = sum_m X_rm token_decay_jm

they are

    A = entered * q k^T                                  B = entered * do v^T
    a = scale (exp(c) (q SK0) + row_decay spread(A))     dp = exp(c) (do SV0) + row_decay spread(B)
    p = exp(a - lse)
    ds = scale p (dp - sum_m p dp - delta_beside_slots)
    L = entered * gather(ds row_decay)                   dq = (ds exp(c)) SK0^T + L k
    P = entered * gather(p row_decay)
    dk = sum_g L^T q + to_end dSK1^T                     dv = sum_g P^T do + to_end dSV1^T
    dSK0 = total dSK1 + sum_g q^T (ds exp(c))            dSV0 = total dSV1 + sum_g do^T (p exp(c))

dS1 is the gradient of the slots at the chunk's end, the next chunk's dS0.

Axes of arrays: b batch row, n chunk, h KV head, g query head of its group, r row of the chunk, j
token of the chunk, k gate block, m slot, d feature.
"""

import dataclasses
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from nha_jax.testing import log_decays
from pallas.gpu.forward.gates import Gates
from pallas.gpu.spec import CHUNK, GATE_BLOCKS, GATE_ROWS, CallSpec, Segments
from tests.support.gpu.gates import gates_of, rounded

Arrays = dict[str, np.ndarray]
Side = tuple[np.ndarray, np.ndarray]  # of keys, of values

NOTHING_SEEN = -1e30  # lse of a row that sees nothing


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes and options of a call of the kernels.

    M slots, of which `slots` are not padding; G query heads for each of H KV heads; N query rows,
    Tq of the kernels.

    window, ahead, masked, state: as for `CallSpec`.
    gate: the kind of log decays, one of `GATES`.
    added: the arrays whose window's gradients are given, to be added to.
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
    """What the launches of the slots' backward read."""

    query: jax.Array  # [B, Tq, Hq, D] bfloat16
    d_out: jax.Array
    key: jax.Array  # [B, Tk, Hkv, D] bfloat16
    value: jax.Array
    lse: jax.Array  # [B, Hq, Tq] float32
    slot_weight: jax.Array
    delta_beside_slots: jax.Array
    log_decay: jax.Array  # [B, Tq, Hkv, M] float32
    token_reaches_end: jax.Array | None  # [B, Tq], as for `chunk_gates`
    gates: Gates
    starts: tuple[jax.Array, jax.Array]  # [B, Hkv, Tq / C, D, M] bfloat16, of keys and values
    segments: Segments | None
    d_end: tuple[jax.Array, jax.Array] | None  # [B, Hkv, D, M] float32
    window_gradients: dict[str, jax.Array]  # bfloat16, shaped as the arrays

    def arrays(self, *names: str) -> dict[str, jax.Array]:
        """The named arrays, the slots at the chunks' starts and the segments, by kernels' names."""
        arrays = {name: getattr(self, name) for name in names}
        arrays |= {"start_key": self.starts[0], "start_value": self.starts[1]}
        return arrays if self.segments is None else arrays | self.segments.arrays(slots=True)


class Queries(NamedTuple):
    """What `slot_query_gradients` returns, in float64."""

    query: np.ndarray
    d_logits_to_reference: np.ndarray
    weights_to_reference: np.ndarray
    d_logits_to_start: np.ndarray
    weights_to_start: np.ndarray


class States(NamedTuple):
    """The gradients of the slots, in float64."""

    ends: Side  # [B, Hkv, Tq / C, D, M] each, at the chunks' ends
    start: Side  # [B, Hkv, D, M] each, before the first chunk


def make_inputs(case: Case) -> Inputs:
    """Random arrays, and an lse, slot weight and delta_beside_slots that fit them.

    lse is that of the slots and, with a window, of one more logit, whose dp is random too.
    """
    rng = np.random.default_rng(zlib.crc32(repr(case).encode()))
    B, N, D, H, M = case.B, case.N, case.D, case.H, case.M
    heads, rows = H * case.G, (B, N)

    def normal(*shape, dtype=ml_dtypes.bfloat16):
        return rng.standard_normal(shape).astype(dtype)

    query, d_out = normal(*rows, heads, D), normal(*rows, heads, D)
    P = N + 64 - case.ahead
    key, value = normal(B, P, H, D), normal(B, P, H, D)
    others_dp = normal(B, heads, N, dtype=np.float32)
    log_decay = log_decays(case.gate, rng.standard_normal((*rows, H, M)), rng)
    log_decay[..., case.slots :] = 0
    log_decay[:, : case.ahead] = 0
    start_key, start_value = normal(2, B, H, N // CHUNK, D, M)
    start_key[..., case.slots :] = 0
    start_value[..., case.slots :] = 0
    end_key, end_value = map(jnp.asarray, normal(2, B, H, D, M, dtype=np.float32))
    segments: Segments | None = None
    token_reaches_end = start_reaches_end = None
    if case.masked:
        segments, token_reaches_end, start_reaches_end = _segments(case, rng)
        seen = np.asarray(segments.query) >= 0
        d_out, others_dp = d_out * seen[..., None, None], others_dp * seen[:, None]
        d_out = d_out.astype(ml_dtypes.bfloat16)
    decays = jnp.asarray(log_decay, jnp.float32)
    inputs = Inputs(
        *map(jnp.asarray, (query, d_out, key, value)),
        lse=jnp.zeros((B, heads, N), jnp.float32),
        slot_weight=jnp.zeros((B, heads, N), jnp.float32),
        delta_beside_slots=jnp.zeros((B, heads, N), jnp.float32),
        log_decay=decays,
        token_reaches_end=token_reaches_end,
        gates=rounded(gates_of(np.asarray(decays), token_reaches_end, start_reaches_end)),
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
    by_row = {
        "lse": lse,
        "slot_weight": slot_weight,
        "delta_beside_slots": (1 - slot_weight) * others_dp,
    }
    return inputs._replace(
        **{name: jnp.asarray(x, jnp.float32) for name, x in by_row.items()},
        window_gradients={x: jnp.asarray(normal(*getattr(inputs, x).shape)) for x in case.added},
    )


def _segments(case: Case, rng: np.random.Generator) -> tuple[Segments, jax.Array, jax.Array]:
    """Segments drawn at random, with rows of padding; token_reaches_end and start_reaches_end."""
    rows = case.B, case.N
    entering = np.cumsum(rng.random(rows) < 3 / case.N, axis=1).astype(np.int32)
    slot_access = rng.integers(0, 3, rows).astype(np.int32)
    query = np.where(rng.random(rows) < 0.1, -2, entering).astype(np.int32)
    slot_access[query < 0] = 0
    token = np.pad(entering, ((0, 0), (0, 64)), constant_values=-1)[:, case.ahead :]
    token_reaches_end = rng.random(rows) < 0.8
    start_reaches_end = rng.random((case.B, case.N // CHUNK)) < 0.7
    return (
        Segments(*map(jnp.asarray, (query, token, slot_access))),
        jnp.asarray(token_reaches_end),
        jnp.asarray(start_reaches_end),
    )


def _wide(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


class Chunks:
    """The formulas of the module's docstring.

    Attributes, all float64 or bool, of axes [b, n, h, g, r or j, d or m] unless said otherwise:
      row_decay, start_decay: exp(c - c_ref), and exp(c), 0 in rows that do not read the start.
      token_decay, bare_token_decay: [b, n, h, k, j, m], the latter without s.
      write, to_end, total: of `Gates`; write and to_end [b, n, h, j, m].
      entered: [b, n, h, g, r, j]. reads: whether a row reads a slot.
      left: q and do. right: k and v, [b, n, h, j, d]. scores: A and B.
      starts: SK0 and SV0, [b, n, h, 1, d, m].
    """

    def __init__(self, inputs: Inputs, spec: CallSpec):
        self.spec = spec
        gates, B, N = inputs.gates, *inputs.query.shape[:2]
        H, M = gates.write.shape[2:]
        self.shape = B, N // CHUNK, H, spec.group, CHUNK
        c = self.tokens(gates.cumulative)
        c_ref = c[..., GATE_ROWS // 2 - 1 :: GATE_ROWS, :]
        self.write, self.to_end = self.tokens(gates.write), self.tokens(gates.to_end)
        self.total = _wide(gates.total)
        self.row_decay = np.exp2(c - np.repeat(c_ref, GATE_ROWS, axis=-2))[:, :, :, None]
        self.bare_token_decay = np.exp2(c_ref[..., None, :] - c[..., None, :, :])
        self.token_decay = self.write[..., None, :, :] * self.bare_token_decay
        self.start_decay = np.exp2(c)[:, :, :, None]
        self.entered = np.tri(CHUNK, dtype=bool)[None, None, None, None]
        access = np.full((B, 1, 1, 1, N // CHUNK, CHUNK), 2)
        if inputs.segments is not None:
            query, token, access = (np.asarray(x) for x in inputs.segments)
            token = np.pad(token, ((0, 0), (spec.ahead, 0)), constant_values=-1)
            query, token = (x[:, :N].reshape(B, -1, 1, 1, CHUNK) for x in (query, token))
            self.entered = self.entered & (query[..., None] == token[..., None, :])
        access = access.reshape(B, -1, 1, 1, CHUNK, 1)
        self.start_decay = np.where(access > 1, self.start_decay, 0)
        self.reads = (access > 0) & (np.arange(M) < spec.slots)
        ahead = ((0, 0), (spec.ahead, 0), (0, 0), (0, 0))
        key, value = (np.pad(x, ahead)[:, :N] for x in (inputs.key, inputs.value))
        starts = (_wide(x).swapaxes(1, 2)[:, :, :, None] for x in inputs.starts)
        self.left = self.rows(inputs.query), self.rows(inputs.d_out)
        self.right = self.tokens(key), self.tokens(value)
        self.starts = tuple(starts)
        self.scores = tuple(
            np.where(self.entered, np.einsum("bnhgrd,bnhjd->bnhgrj", x, y), 0)
            for x, y in zip(self.left, self.right, strict=True)
        )

    def tokens(self, x: Any) -> np.ndarray:
        """[B, Tq, Hkv, .] -> [b, n, h, j, .]."""
        B, n, H, _, C = self.shape
        return _wide(x).reshape(B, n, C, H, -1).swapaxes(2, 3)

    def rows(self, x: Any) -> np.ndarray:
        """[B, Tq, Hq, .] -> [b, n, h, g, r, .]."""
        B, n, H, G, C = self.shape
        return _wide(x).reshape(B, n, C, H, G, -1).transpose(0, 1, 3, 4, 2, 5)

    def back(self, x: np.ndarray) -> np.ndarray:
        """[b, n, h, g, r, .] -> [B, Tq, Hq, .]."""
        B, n, H, G, C = self.shape
        return x.transpose(0, 1, 4, 2, 3, 5).reshape(B, n * C, H * G, -1)

    def spread(self, x: np.ndarray) -> np.ndarray:
        blocks = x.reshape(*x.shape[:4], GATE_BLOCKS, GATE_ROWS, -1)
        return np.einsum("bnhgkrj,bnhkjm->bnhgkrm", blocks, self.token_decay).reshape(
            *x.shape[:5], -1
        )

    def gather(self, x: np.ndarray) -> np.ndarray:
        blocks = x.reshape(*x.shape[:4], GATE_BLOCKS, GATE_ROWS, -1)
        return np.einsum("bnhgkrm,bnhkjm->bnhgkrj", blocks, self.token_decay).reshape(
            *x.shape[:5], -1
        )

    def _products(self, side: int) -> np.ndarray:
        """Rows times the slots that each finds: the sums of which a and dp are made."""
        return self.start_decay * (
            self.left[side] @ self.starts[side]
        ) + self.row_decay * self.spread(self.scores[side])

    def logits(self) -> np.ndarray:
        """a, -inf where there is no slot or the row reads none."""
        return np.where(self.reads, self.spec.scale * self._products(0), -np.inf)

    def queries(self, lse: jax.Array, delta_beside_slots: jax.Array) -> Queries:
        """What `slot_query_gradients` returns."""
        B, n, H, G, C = self.shape
        by_row = lambda x: _wide(x).reshape(B, H, G, n, C, 1).transpose(0, 3, 1, 2, 4, 5)  # noqa: E731
        p = np.exp(self.logits() - by_row(lse))
        dp = self._products(1)
        delta = np.sum(p * dp, -1, keepdims=True) + by_row(delta_beside_slots)
        ds = p * (dp - delta) * self.spec.scale
        L = np.where(self.entered, self.gather(ds * self.row_decay), 0)
        dq = (ds * self.start_decay) @ self.starts[0].swapaxes(-1, -2)
        dq += L @ self.right[0][:, :, :, None]
        decays = self.row_decay, self.start_decay
        return Queries(self.back(dq), *(self.back(x * decay) for decay in decays for x in (ds, p)))

    def states(self, queries: Queries, d_end: Side | None) -> States:
        """What `state_gradients` returns, given these queries' weights."""
        weights = self.rows(queries.d_logits_to_start), self.rows(queries.weights_to_start)
        added = [
            np.einsum("bnhgrd,bnhgrm->nbhdm", x, y) for x, y in zip(self.left, weights, strict=True)
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
        """The gradients of the keys and values by the rows at which they enter, [B, Tq, Hkv, D].

        ends: the gradients of the slots at the chunks' ends.
        """
        B, n, H, _, C = self.shape
        results = []
        weights = queries.d_logits_to_reference, queries.weights_to_reference
        for side in range(2):
            L = np.where(self.entered, self.gather(self.rows(weights[side])), 0)
            grad = np.einsum("bnhgrj,bnhgrd->bnhjd", L, self.left[side])
            grad += np.einsum("bnhjm,bhndm->bnhjd", self.to_end, _wide(ends[side]))
            results.append(grad.swapaxes(2, 3).reshape(B, n * C, H, -1))
        return results[0], results[1]
