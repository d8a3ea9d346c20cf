"""Full attention by JAX's splash kernel for TPUs, where no token leaves the window."""

import functools
import math
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from nha_jax.ops.timeline import NO_TOKEN, PADDING_ROW, Timeline
from nha_jax.ops.types import Options
from pallas.constants import OUT
from pallas.tpu import LANES

BLOCK = 512  # rows of a block of queries or keys, at most
FUSED_BLOCKS = 8  # the fused backward stores the queries' gradient once for each block of keys


def splash_full_attention(
    rotated_query: jax.Array,
    timeline: Timeline,
    *,
    num_slots: int,
    options: Options,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Computes `nha_jax.ops.xla.full.full_attention` on a TPU, for bfloat16 and float32.

    The M empty slots, of logit 0 and value 0, are one attention sink of logit log(M). Rows of
    padding see nothing: what they give is finite, and means nothing.

    Args:
      interpret: run the kernel in its interpreter, on platforms other than TPUs.

    Returns out [B, T, Hq, V] and the slot weight [B, T, Hq], both in float32; the slot weight is 0
    if `options` does not ask for it.
    """
    T, Hq = rotated_query.shape[1:3]
    dtype = rotated_query.dtype
    query = _heads_first((rotated_query.astype(jnp.float32) * options.scale).astype(dtype))
    key, value = map(_heads_first, (timeline.tokens.rotated_key, timeline.tokens.value))
    segment_ids = splash.SegmentIds(
        q=_pad_rows(timeline.row_segment[:, -T:], PADDING_ROW),
        kv=_pad_rows(timeline.token_segment, NO_TOKEN),
    )
    attend_empty = options.empty_slots == "attend" and num_slots > 0
    sinks = jnp.full(Hq, math.log(num_slots), jnp.float32) if attend_empty else None

    def attend(query, key, value, *, save_residuals=False):
        kernel = _kernel(
            (Hq, query.shape[2], key.shape[2]),
            offset=timeline.rows_before,
            save_residuals=save_residuals,
            interpret=interpret,
        )
        return jax.vmap(kernel, (0, 0, 0, 0, None))(query, key, value, segment_ids, sinks)

    def rows_first(x):  # [B, Hq, padded T, ...] -> [B, T, Hq, ...]
        return x.swapaxes(1, 2)[:, :T].astype(jnp.float32)

    if not (attend_empty and options.return_slot_weight):
        out = rows_first(attend(query, key, value))
        return out, jnp.zeros(out.shape[:3], jnp.float32)
    _, (lse,) = attend(*map(lax.stop_gradient, (query, key, value)), save_residuals=True)
    weight = rows_first(jnp.exp(math.log(num_slots) - lse))
    if options.slot_weight_gradient == "slots":  # empty slots are constants
        return rows_first(attend(query, key, value)), weight
    # The output of a column of ones is the weight of all but the slots. It has the gradient, but
    # not the digits, of the slot weight; those are in the softmax's denominator, which has none.
    value = jnp.pad(value, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=1)
    out = rows_first(attend(query, key, value))
    token_weight = out[..., -1]
    return out[..., :-1], weight + lax.stop_gradient(token_weight) - token_weight


def _heads_first(x: jax.Array) -> jax.Array:
    """Transposes [B, rows, heads, D] to [B, heads, rows, D], rows padded to whole blocks."""
    return _pad_rows(x, 0).swapaxes(1, 2)


def _pad_rows(x: jax.Array, value: int) -> jax.Array:
    """Pads [B, rows, ...] to whole blocks."""
    rows = x.shape[1]
    padding = -rows % _block(rows)
    return jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2)), constant_values=value)


def _block(rows: int) -> int:
    """Rows of a block: a multiple of 128."""
    return min(BLOCK, -(-rows // LANES) * LANES)


@functools.lru_cache(maxsize=256)
def _kernel(
    shape: tuple[int, int, int], *, offset: int, save_residuals: bool, interpret: bool
) -> splash.SplashAttentionKernel:
    """The causal kernel of (query heads, queries, keys); query t sees the keys up to t + offset.

    Cached, because splash traces anew for every mask object. Its tables are numpy arrays, so that
    they belong to no trace and no device.
    """
    heads, queries, keys = shape
    block_q, block_kv = _block(queries), _block(keys)
    fused = keys // block_kv <= FUSED_BLOCKS
    block_sizes = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_q_dq=None if fused else block_q,
        block_kv_dq=None if fused else block_kv,
        use_fused_bwd_kernel=fused,
    )
    mask = masks.MultiHeadMask([masks.CausalMask((queries, keys), offset)] * heads)
    # In a thread of its own, which is in no trace and on no mesh: that may be of devices to compile
    # for, which compute nothing.
    with ThreadPoolExecutor(1) as thread:
        kernel = thread.submit(
            splash.make_splash_mha_single_device,
            mask=mask,
            block_sizes=block_sizes,
            save_residuals=save_residuals,
            residual_checkpoint_name=OUT,
            interpret=interpret,
        ).result()
    return jax.tree.map(np.asarray, kernel)
