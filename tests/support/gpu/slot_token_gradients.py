"""The launches that find the gradients of states and of entering tokens, against their formulas.

NPROC=16 JAX_PLATFORMS=cpu python -m tests.support.gpu.slot_token_gradients INDEX...

See process.py. The formulas are computed in float64.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nha_jax.testing import relative_error
from pallas.gpu import default_block_sizes
from pallas.gpu.backward.slot_token_gradients import SlotTokenGradients, slot_token_gradients
from pallas.gpu.backward.state_gradients import state_gradients
from pallas.gpu.spec import GATE_BLOCKS, GATE_ROWS
from pallas.gpu.warpgroup.decays import FLOOR
from pallas.gpu.warpgroup.state_walk import States
from tests.support.gpu.process import report
from tests.support.gpu.slot_formulas import Case, Chunks, Inputs, Queries, Side, make_inputs
from tests.support.ops.interpreters import GPU_INTERPRETER

TOLERANCE = 5e-3  # of relative Frobenius errors; the operands are rounded to 2^-9

ORDINARY = [
    Case(M=16, slots=12, G=2, ahead=0, masked=True, state=True, gate="mixed"),
    Case(D=128, gate="normaliser-0.1"),
]
SIZES = [
    Case(M=128, slots=128, G=4, gate="-1000"),
    Case(D=128, M=128, slots=100, G=2, masked=True, gate="-inf"),
    Case(D=128, M=32, slots=32, state=True, gate="0", ahead=0),
    Case(H=2, G=2, B=2, gate="holes", ahead=0),
    Case(G=2, N=192, masked=True, state=True, gate="normaliser-1"),
    Case(M=16, slots=16, gate="normaliser-0.1", state=True),
]
WIDE = [
    Case(D=256, G=2, masked=True, state=True, gate="-inf"),
    Case(D=192, M=128, slots=100, G=2, masked=True, ahead=0, gate="-1000"),
    Case(D=256, M=128, slots=128, gate="normaliser-0.1", state=True),
    Case(D=192, G=2, gate="mixed"),
    Case(D=256, M=16, slots=16, masked=True, gate="normaliser-1"),
]
ADDED = [
    Case(G=2, N=192, masked=True, added=("key", "value")),
    Case(M=16, slots=16, H=2, ahead=0, gate="-inf", added=("key", "value")),
    Case(D=128, M=128, slots=128, B=2, gate="-1000", added=("key", "value")),
    Case(D=128, H=2, G=2, B=2, gate="mixed", added=("value",)),
    Case(D=256, G=2, masked=True, ahead=0, state=True, added=("key", "value")),
]
CASES = ORDINARY + SIZES + WIDE + ADDED


def decays_of(chunks: Chunks, inputs: Inputs, queries: Queries, ends: Side) -> np.ndarray:
    """dg of the formulas of `pallas.gpu.backward.slot_token_gradients`, [B, Tq, Hkv, M].

    With the arrays that those call w (by side: queries' weights) and dS (ends).
    """
    decay = chunks.tokens(inputs.log_decay)
    to_end = np.flip(np.cumsum(np.flip(decay, -2), -2), -2)  # the row's own too
    after = np.pad(to_end[..., 1:, :], ((0, 0),) * 3 + ((0, 1), (0, 0)))
    reaches = inputs.token_reaches_end
    reaches = 1.0 if reaches is None else chunks.tokens(reaches[..., None, None])
    row_sum, by_token, at_end, to_slots = (np.zeros(decay.shape) for _ in range(4))
    by_token = by_token[:, :, :, None]  # and by the rows' gate blocks
    weights = (
        (queries.d_logits_to_reference, queries.d_logits_to_start),
        (queries.weights_to_reference, queries.weights_to_start),
    )
    for side in range(2):
        w, w_start = (chunks.rows(x) for x in weights[side])
        rows, scores, slots = chunks.left[side], chunks.scores[side], chunks.starts[side]
        row_sum = row_sum + np.sum(w * chunks.spread(scores) + w_start * (rows @ slots), axis=3)
        split = (*w.shape[:4], GATE_BLOCKS, GATE_ROWS, -1)
        by_token = by_token + np.einsum(
            "bnhgkrj,bnhgkrm->bnhkjm", scores.reshape(split), w.reshape(split)
        )
        end = np.asarray(ends[side], np.float64).swapaxes(1, 2)
        at_end = at_end + chunks.right[side] @ end
        total = chunks.total.swapaxes(1, 2)[..., None, :]
        to_slots += total * np.sum(slots[:, :, :, 0] * end, axis=-2, keepdims=True)
    token_sum = np.sum(chunks.token_decay * by_token, axis=3)
    to_slots += np.cumsum(chunks.to_end * at_end, -2) - chunks.to_end * at_end
    to_slots -= np.exp(decay + after) * reaches * at_end
    inside = np.flip(np.cumsum(np.flip(row_sum - token_sum, -2), -2), -2)
    reached = np.where(by_token == 0, 0, chunks.bare_token_decay)  # infinite for later tokens
    inside = inside - np.exp(decay) * np.sum(reached * by_token, axis=3)
    grad = np.where(decay > FLOOR, inside, 0) + to_slots
    B, n, H, _, C = chunks.shape
    return grad.swapaxes(2, 3).reshape(B, n * C, H, -1)


def run(case: Case, interpret: Any, inputs: Inputs, queries: Any, ends: Any):
    """Both launches, each on what the formulas give the launch before it, rounded.

    queries, ends: what `slot_query_gradients` and `state_gradients` would return.
    """
    sizes = default_block_sizes(case.D, case.M)
    options: dict[str, Any] = {"spec": case.spec, "block_sizes": sizes, "interpret": interpret}
    states = state_gradients(
        inputs.query, inputs.d_out, queries.d_logits_to_start, queries.weights_to_start,
        inputs.gates, inputs.d_end, **options,
    )  # fmt: skip
    arrays = inputs.arrays("query", "d_out", "key", "value")
    arrays |= {"d_logits": queries.d_logits_to_reference, "weights": queries.weights_to_reference}
    arrays |= {"d_end_key": ends[0], "d_end_value": ends[1]}
    window = {x: y for x, y in inputs.window_gradients.items() if x != "query"}
    tokens = slot_token_gradients(arrays, inputs.gates, window, **options)
    return states, tokens


def _with_windows(case: Case, inputs: Inputs, of_slots: Side) -> Side:
    """The gradients by the rows of the arrays, with the window's where they are given.

    [B, Tq, Hkv, D] -> [B, Tk, Hkv, D].
    """
    Tk = inputs.key.shape[1]
    sums = []
    for name, grad in zip(("key", "value"), of_slots, strict=True):
        total = np.zeros((grad.shape[0], Tk, *grad.shape[2:]))
        total[:, : case.N - case.ahead] = grad[:, case.ahead :]  # rows before hold nothing
        if name in case.added:
            total += np.asarray(inputs.window_gradients[name], np.float64)
        sums.append(total)
    return sums[0], sums[1]


def check(case: Case) -> None:
    """Lowers the kernels for CUDA, and raises AssertionError if a result is too far off."""
    inputs = make_inputs(case)
    d_end: Any = inputs.d_end
    chunks = Chunks(inputs, case.spec)
    narrow: Any = lambda x: jnp.asarray(x, jnp.bfloat16)  # noqa: E731
    queries = Queries(*map(narrow, chunks.queries(inputs.lse, inputs.delta_beside_slots)))
    expected = chunks.states(queries, d_end)
    ends = narrow(expected.ends[0]), narrow(expected.ends[1])
    arguments = inputs, queries, ends

    def kernels(interpret):
        return jax.jit(lambda *x: run(case, interpret, *x))

    text = kernels(False).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert all(f"nha_{name}_mosaic_gpu" in text for name in ("state_grads", "slot_tokens"))
    results = jax.tree.map(np.asarray, kernels(GPU_INTERPRETER)(*arguments))
    states, tokens = States(*results[0]), SlotTokenGradients(*results[1])
    key, value = _with_windows(case, inputs, chunks.tokens_of(queries, ends))
    decays = decays_of(chunks, inputs, queries, ends)
    entering = slice(case.ahead, None)  # rows before hold nothing
    pairs: dict[str, Any] = {
        "end_key": (states.key, expected.ends[0]),
        "end_value": (states.value, expected.ends[1]),
        "key": (tokens.key, key),
        "value": (tokens.value, value),
        "log_decay": (tokens.log_decay[:, : case.N - case.ahead], decays[:, entering]),
    }
    if case.state:
        pairs["start_key"] = states.last[0], expected.start[0]
        pairs["start_value"] = states.last[1], expected.start[1]
    errors = {name: relative_error(np.asarray(x, np.float64), y) for name, (x, y) in pairs.items()}
    assert not np.any(tokens.log_decay[:, case.N - case.ahead :])
    for name in ("key", "value"):
        grad, of_window = getattr(tokens, name), inputs.window_gradients.get(name, 0.0 * inputs.key)
        unread = slice(case.N - case.ahead, None)
        assert np.array_equal(grad[:, unread], of_window[:, unread]), name
    for name, error in errors.items():
        assert error <= TOLERANCE, (name, errors)


if __name__ == "__main__":
    report(CASES, check)
