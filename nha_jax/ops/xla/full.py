"""Full attention in plain XLA, where no token leaves the window."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from nha_jax.ops.state import compute_dtype
from nha_jax.ops.timeline import Timeline
from nha_jax.ops.types import Options
from pallas.constants import OUT

ROWS = 128  # queries a step


def full_attention(
    rotated_query: jax.Array, timeline: Timeline, *, num_slots: int, options: Options
) -> tuple[jax.Array, jax.Array]:
    """Computes causal softmax attention of T queries to R + T rows, with the slots still empty.

    Empty slots that are attended to have logit 0 and value 0: they add `num_slots * exp(0)` to the
    softmax's denominator and nothing to its numerator. Queries go through in blocks, computed
    again for the gradient, so that no T x T matrix is ever stored.

    Returns out [B, T, Hq, V] and the slot weight [B, T, Hq], both in the compute dtype.
    """
    B, T, Hq, K = rotated_query.shape
    wide = compute_dtype(rotated_query)
    rotated_key, value = (
        timeline.tokens.rotated_key.astype(wide),
        timeline.tokens.value.astype(wide),
    )
    Hkv = rotated_key.shape[2]
    num_rows = rotated_key.shape[1]
    rows = min(ROWS, T)
    steps = -(-T // rows)

    def cut(x):  # [B, T, ...] -> [steps, B, rows, ...]
        x = jnp.pad(x, ((0, 0), (0, steps * rows - T), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(B, steps, rows, *x.shape[2:]).swapaxes(0, 1)

    # What all steps read is handed to them: `jax.checkpoint` keeps what its function closes over.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def attend(read, x):
        (rotated_key, value, token_segment), (index, query, segment) = read, x
        now = index * rows + jnp.arange(rows, dtype=jnp.int32)[:, None] + num_rows - T
        inside = jnp.arange(num_rows, dtype=jnp.int32)[None] <= now  # [rows, R + T]
        mask = inside[None] & (token_segment == segment[..., None])
        logits = options.scale * jnp.einsum("bthgk,bnhk->bhgtn", query.astype(wide), rotated_key)
        logits = jnp.where(mask[:, None, None], logits, -jnp.inf)
        top = lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
        empty = jnp.zeros_like(top)
        if options.empty_slots == "attend":
            top = jnp.maximum(top, 0)
            empty = num_slots * jnp.exp(-top)
        top = jnp.where(jnp.isfinite(top), top, 0)  # rows of padding see nothing
        p = jnp.exp(logits - top)
        mass = jnp.sum(p, axis=-1, keepdims=True) + empty
        mass = jnp.where(mass > 0, mass, 1)
        out = jnp.einsum("bhgtn,bnhv->bhgtv", p, value)
        weight = (empty / mass)[..., 0]
        if options.slot_weight_gradient == "slots":
            weight = lax.stop_gradient(weight)  # empty slots are constants
        return out / mass, weight

    queries = cut(rotated_query.reshape(B, T, Hkv, Hq // Hkv, K))
    segment = cut(timeline.row_segment[:, -T:])
    read = rotated_key, value, timeline.token_segment[:, None]  # the last [B, 1, R + T]
    index = jnp.arange(steps, dtype=jnp.int32)
    out, weight = lax.map(lambda x: attend(read, x), (index, queries, segment))
    # [steps, B, H, G, rows, ...] -> [B, T, Hq, ...]
    out = out.transpose(1, 0, 4, 2, 3, 5).reshape(B, steps * rows, Hq, -1)[:, :T]
    out = checkpoint_name(out, OUT)
    return out, weight.transpose(1, 0, 4, 2, 3).reshape(B, steps * rows, Hq)[:, :T]
