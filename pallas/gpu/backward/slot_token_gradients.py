"""The gradients of the tokens that enter the slots, and of their log decays.

Keys and values are two sides of one arithmetic. With symbols as in `spec.py` and `decays.py`, for a
side and a query head of the group:

    side   x_j  y_r   w_r
    key    k_j  q_r   ds_r row_decay_r    (d_logits_to_reference of `slot_query_gradients.py`)
    value  v_j  do_r  p_r row_decay_r     (weights_to_reference)

and S0 the slots at the chunk's start, dS the gradient of those at its end, e_j = exp(log_decay_j),
odds_j = e_j / s_j, to_end_j = s_j exp(c_C - c_j), and f_rj the token_decay of j with the c_ref of
row r's gate block. With sums over the heads of the group, products over features with a dot, and
all else slot by slot, the gradient of x is

    dx_j = sum_{r >= j} L_rj y_r + to_end_j dS          L_rj = sum_m w_rm f_rjm

and that of the log decay of token j, the sum of both sides'

    row_sum_r   = w_r (sum_{j <= r} A_rj f_rj + exp(c_ref) (y_r . S0))        A_rj = y_r . x_j
    token_sum_j = sum_{r >= j} A_rj w_r f_rj                                  E_j  = x_j . dS
    dg_j = sum_{r >= j} (row_sum_r - token_sum_r) - odds_j token_sum_j            inside the chunk
           + total (S0 . dS) + sum_{i < j} to_end_i E_i - odds_j to_end_j E_j       to its end

The first sum of dg nearly cancels where decays are strong, so both its terms are made of the very
operands, rounded, that enter the products. No term of its second line does. Where nothing decays s
is 0, and odds token_sum is needed all the same: LEAST_WRITE stands for s, in f and to_end too, and
is too small to show in any result. The kernel reads odds, and makes s of it.

Inputs:
  query, d_out              [B, Tq, Hq, D] bfloat16; C divides Tq
  d_logits, weights         [B, Tq, Hq, M] bfloat16, w of keys and of values
  key, value                [B, Tk, Hkv, D] bfloat16, the timeline without its first spec.ahead rows
  cumulative, to_end,       of `Gates`
  total, odds
  start_key, start_value    [B, Hkv, Tq / C, D, M] bfloat16, S0
  d_end_key, d_end_value    [B, Hkv, Tq / C, D, M] bfloat16, dS
  query_segment, ..         with spec.masked: of `Segments`
Outputs:
  d_key, d_value            [panels, B, Tq, Hkv, D] bfloat16, a share for each panel of slots; with
                            one panel, and the window's gradients given, those updated instead
  d_log_decay               [B, Tq, Hkv, M] float32, by its rows; 0 for tokens that do not enter

A thread block works on a panel of up to 64 slots of a chunk and KV head. Its items are, for each
side, the rows of each head and, where it is given, the window's gradient. Warpgroups
(`slot_token_compute.py`; what they share is in `slot_token_memory.py`):
  0, token  fetches for both; finds dx, and S0 . dS and to_end E for the other
  1, decay  finds dg
More warpgroups would leave each too few registers. Both in one kernel read the rows once: with
K = V = 128, M = 64 and G = 1 it moves 224 KB a chunk and head, and two kernels would move 360; with
K = V = 256 it moves 384. There the rows of one head are all that fits beside the tokens and the
states, so that no head is fetched while another is worked on. With half of the slots to a block two
would fit, but dx would go out twice, to be summed, with 640 KB in all.

| barrier            | arrivals (number)                            | waits | how often      |
| ------------------ | -------------------------------------------- | ----- | -------------- |
| gates_loaded       | copies of c, to_end, odds, total, four c_ref | both  | once           |
|                    | and, with spec.masked, three of segments     |       |                |
|                    | (8/11)                                       |       |                |
| token_decays_ready | both, each having built those of two gate    | both  | once           |
|                    | blocks (2)                                   |       |                |
| side_loaded        | copies of S0, dS and x (3)                   | both  | once a side    |
| side_read          | decay, having read them (1)                  | token | once a side    |
| item_loaded[stage] | copies of y and w, or of the window's        | both  | once an item   |
|                    | gradient in two halves (2)                   |       |                |
| item_read[stage]   | both, having read it (2)                     | token | once an item   |
| ends_ready         | token, S0 . dS and to_end E being stored (1) | decay | once           |
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas.gpu.backward.slot_token_compute import DecayWarpgroup, TokenWarpgroup
from pallas.gpu.backward.slot_token_memory import SlotTokenMemory, token_scratch
from pallas.gpu.block_sizes import BlockSizes
from pallas.gpu.forward.gates import Gates
from pallas.gpu.spec import CHUNK, SIDES, CallSpec
from pallas.gpu.warpgroup.launch import SHARED_MEMORY, Refs, launch, size_of
from pallas.gpu.warpgroup.matmul import Matmul

BLOCK_SLOTS = 64  # of a thread block, at most

Arrays = dict[str, jax.Array]


class SlotTokenGradients(NamedTuple):
    """The gradients of what enters the slots; those of `window` included."""

    key: jax.Array  # [B, Tk, Hkv, D] bfloat16
    value: jax.Array
    log_decay: jax.Array  # [B, Tq, Hkv, M] float32


def slot_token_gradients(
    inputs: Arrays,
    gates: Gates,
    window: Arrays,
    *,
    spec: CallSpec,
    block_sizes: BlockSizes,
    interpret: Any = False,
) -> SlotTokenGradients:
    """The gradients of key, value and log_decay.

    Args:
      inputs: named and shaped as above, but for those of gates.
      gates: as `chunk_gates` returns them.
      window: the window's gradients of the "key" and of the "value", [B, Tk, Hkv, D] bfloat16, to
        which the slots' are added. Either may be missing.
    """
    B, Tq, _, D = inputs["query"].shape
    Hkv, M = gates.cumulative.shape[2:]
    width, masked, interpreted = min(M, BLOCK_SLOTS), spec.masked, bool(interpret)
    panels = M // width
    updated = {f"d_{side}": x[None] for side, x in window.items() if panels == 1}
    added = tuple(f"d_{side}" in updated for side in SIDES)
    items = 2 * spec.group + sum(added)
    stages = min(block_sizes.token_stages, items, _most_stages(D, width, masked))
    inputs = inputs | {x: getattr(gates, x) for x in ("cumulative", "to_end", "total", "odds")}
    share = jax.ShapeDtypeStruct((panels, B, Tq, Hkv, D), jnp.bfloat16)
    outputs = {x: share for x in ("d_key", "d_value") if x not in updated}
    outputs["d_log_decay"] = jax.ShapeDtypeStruct((B, Tq, Hkv, M), jnp.float32)
    results = launch(
        functools.partial(_kernel, spec=spec, added=added, interpret=interpreted),
        inputs,
        outputs,
        token_scratch(stages, D, width, masked=masked, interpret=interpreted),
        grid={"chunk": Tq // CHUNK, "panel": Hkv * panels, "batch": B},
        warpgroups=2,
        name="nha_slot_tokens",
        one_warpgroup_reduces=True,
        interpret=interpret,
        updated=updated,
    )
    grads = dict(zip([*outputs, *updated], results, strict=True))
    if panels > 1:
        grads |= {f"d_{x}": _sum_shares(grads[f"d_{x}"], window.get(x)) for x in SIDES}
    rows = inputs["key"].shape[1]
    d_key, d_value = (_with_rows(grads[f"d_{x}"][0], rows) for x in SIDES)
    return SlotTokenGradients(d_key, d_value, grads["d_log_decay"])


def _sum_shares(shares: jax.Array, window: jax.Array | None) -> jax.Array:
    """The sum of the panels' shares and of the window's gradient, if there is one.

    [panels, B, Tq, Hkv, D] -> [1, B, Tq or Tk, Hkv, D].
    """
    total = shares.sum(0, dtype=jnp.float32)
    if window is not None:
        total = _with_rows(total, window.shape[1]) + window
    return total.astype(shares.dtype)[None]


def _with_rows(x: jax.Array, rows: int) -> jax.Array:
    """Extends x [B, Tq, Hkv, D] by zeros, for tokens that do not enter the slots."""
    return jnp.pad(x, ((0, 0), (0, rows - x.shape[1]), (0, 0), (0, 0)))


def _most_stages(D: int, width: int, masked: bool) -> int:
    """How many items fit shared memory at a time."""
    one, two = (size_of(token_scratch(x, D, width, masked=masked, interpret=False)) for x in (1, 2))
    return 1 + (SHARED_MEMORY - one) // (two - one)


def _kernel(
    refs: Refs, shared: Refs, *, spec: CallSpec, added: tuple[bool, ...], interpret: bool
) -> None:
    for me, warpgroup in enumerate((TokenWarpgroup, DecayWarpgroup)):

        @pl.when(lax.axis_index("wg") == me)
        def _(me=me, warpgroup=warpgroup):
            memory = SlotTokenMemory(refs, shared, spec, added)
            matmul = Matmul(interpret, shared["buffer"].at[me] if interpret else None)
            warpgroup(memory, matmul, spec).run()
