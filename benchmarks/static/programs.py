"""The functions whose schedules are compared, as functions of abstract arrays."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from nha_jax.ops import nha_attention, rope_tables

Program = Literal["pallas", "xla", "splash"]
# None is the kernels where the program is for a TPU, whatever machine compiles it.
_IMPLEMENTATIONS: dict[Program, str | None] = {"pallas": None, "xla": "xla"}


@dataclasses.dataclass(frozen=True)
class Shape:
    """B batch, T tokens, H key/value heads, G query heads each, K = V head dims, M slots, W window.

    `segments` packs documents: one more argument, [B, T] int32.
    """

    B: int = 16
    T: int = 4096
    H: int = 8
    G: int = 1
    K: int = 128
    M: int = 64
    W: int = 64
    segments: bool = False

    @property
    def query_tokens(self) -> int:
        """Query tokens times query heads: what costs are divided by."""
        return self.B * self.T * self.H * self.G


def build(program: Program, shape: Shape, backward: bool) -> tuple[Callable[..., Any], list]:
    """Returns the function of one contender, forward or forward and backward, and its arguments.

    The arguments are abstract. query, key, value, output and its gradient are [B, T, heads * K],
    and log_decay [B, H, M, T], so that the arguments' layout forces no copy. Splash attention gets
    and gives its own [B, heads, T, K], so that no copy is counted against it.
    """
    if program == "splash":
        return _with_backward(_splash(shape), backward), _splash_arguments(shape, backward)
    return _with_backward(_nha(program, shape), backward), _arguments(shape, backward)


def minimum_bytes(program: Program, shape: Shape, backward: bool) -> int:
    """Bytes moved if each array is read or written once in each pass; the passes are added up.

    Forward: query, key, value, log_decay, output. Backward: the first four, their gradients, and
    the output's gradient. Splash attention has no log_decay.
    """
    rows = shape.B * shape.T * shape.H
    query, key = 2 * rows * shape.G * shape.K, 2 * rows * shape.K
    log_decay = 0 if program == "splash" else 4 * rows * shape.M
    passes = 3 if backward else 1  # of key, value and log_decay
    return (5 if backward else 2) * query + passes * (2 * key + log_decay)


def _with_backward(attention, backward: bool):
    """The attention alone, or one that also takes d_out, last, and returns all gradients."""
    if not backward:
        return attention

    def forward_backward(query, key, value, *rest):
        *rest, d_out = rest
        out, pullback = jax.vjp(lambda *x: attention(*x, *rest[1:]), query, key, value, *rest[:1])
        return out, pullback(d_out)

    return forward_backward


def _nha(program: Program, shape: Shape):
    B, T, H, K = shape.B, shape.T, shape.H, shape.K

    def attention(query, key, value, log_decay, segment_ids=None):
        out = nha_attention(
            query.reshape(B, T, H * shape.G, K),
            key.reshape(B, T, H, K),
            value.reshape(B, T, H, K),
            log_decay.transpose(0, 3, 1, 2),
            window_size=shape.W,
            rope=rope_tables(jnp.arange(T), K),
            segment_ids=segment_ids,
            implementation=_IMPLEMENTATIONS[program],
        )
        return out.reshape(B, T, H * shape.G * K)

    return attention


def _arguments(shape: Shape, backward: bool) -> list[jax.ShapeDtypeStruct]:
    B, T, H, K = shape.B, shape.T, shape.H, shape.K
    query = jax.ShapeDtypeStruct((B, T, H * shape.G * K), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((B, T, H * K), jnp.bfloat16)
    arguments = [query, key, key, jax.ShapeDtypeStruct((B, H, shape.M, T), jnp.float32)]
    if shape.segments:
        arguments.append(jax.ShapeDtypeStruct((B, T), jnp.int32))
    return [*arguments, query] if backward else arguments


def _splash(shape: Shape):
    """JAX's splash attention with the window alone: no slots, no rotation."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    window = masks.LocalMask((shape.T, shape.T), (max(shape.W - 1, 0), 0), 0)
    block = min(512, shape.T)  # the best of 128 to 1024 at W=64, over both passes and chips
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([window] * (shape.H * shape.G)),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
    )

    def attention(query, key, value, segment_ids=None):
        ids = None if segment_ids is None else splash.SegmentIds(segment_ids, segment_ids)
        return jax.vmap(kernel)(query, key, value, ids)

    return attention


def _splash_arguments(shape: Shape, backward: bool) -> list[jax.ShapeDtypeStruct]:
    B, T, H, K = shape.B, shape.T, shape.H, shape.K
    query = jax.ShapeDtypeStruct((B, H * shape.G, T, K), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((B, H, T, K), jnp.bfloat16)
    arguments = [query, key, key]
    if shape.segments:
        arguments.append(jax.ShapeDtypeStruct((B, T), jnp.int32))
    return [*arguments, query] if backward else arguments
