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
LARGEST_ROW = 1024  # bytes of a head's row, of which VMEM holds such blocks; of longer, half
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
    attend_empty = options.empty_slots == "attend" and num_slots > 0
    ones = attend_empty and options.return_slot_weight and options.slot_weight_gradient == "all"
    tokens = timeline.tokens
    largest = max(tokens.rotated_key.shape[3], tokens.value.shape[3] + ones)
    most = BLOCK if largest * dtype.itemsize <= LARGEST_ROW else BLOCK // 2
    query = (rotated_query.astype(jnp.float32) * options.scale).astype(dtype)
    query, key, value = (_heads_first(x, most) for x in (query, tokens.rotated_key, tokens.value))
    segment_ids = splash.SegmentIds(
        q=_pad_rows(timeline.row_segment[:, -T:], most, PADDING_ROW),
        kv=_pad_rows(timeline.token_segment, most, NO_TOKEN),
    )
    sinks = jnp.full(Hq, math.log(num_slots), jnp.float32) if attend_empty else None

    def attend(query, key, value, *, save_residuals=False):
        kernel = _kernel(
            (Hq, query.shape[2], key.shape[2]),
            most,
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
    if not ones:  # empty slots are constants
        return rows_first(attend(query, key, value)), weight
    # The output of a column of ones is the weight of all but the slots. It has the gradient, but
    # not the digits, of the slot weight; those are in the softmax's denominator, which has none.
    value = jnp.pad(value, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=1)
    out = rows_first(attend(query, key, value))
    token_weight = out[..., -1]
    return out[..., :-1], weight + lax.stop_gradient(token_weight) - token_weight


def _heads_first(x: jax.Array, most: int) -> jax.Array:
    """Transposes [B, rows, heads, D] to [B, heads, rows, D], rows padded to whole blocks."""
    return _pad_rows(x, most, 0).swapaxes(1, 2)


def _pad_rows(x: jax.Array, most: int, value: int) -> jax.Array:
    """Pads [B, rows, ...] to whole blocks."""
    rows = x.shape[1]
    padding = -rows % _block(rows, most)
    return jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2)), constant_values=value)


def _block(rows: int, most: int) -> int:
    """Rows of a block: a multiple of 128, and at most `most`."""
    return min(most, -(-rows // LANES) * LANES)


@functools.lru_cache(maxsize=256)
def _kernel(
    shape: tuple[int, int, int], most: int, *, offset: int, save_residuals: bool, interpret: bool
) -> splash.SplashAttentionKernel:
    """The causal kernel of (query heads, queries, keys), of blocks of at most `most` rows.

    Query t sees the keys up to t + offset.

    Cached, because splash traces anew for every mask object. Its tables are numpy arrays, so that
    they belong to no trace and no device.
    """
    heads, queries, keys = shape
    block_q, block_kv = _block(queries, most), _block(keys, most)
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
