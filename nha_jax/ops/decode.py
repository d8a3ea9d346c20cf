"""One token of generation: constant time and memory for a finite window."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from nha_jax.ops.gpu.support import compiling_for_gpus, not_hopper
from nha_jax.ops.mesh.division import divide_over_mesh
from nha_jax.ops.rope import Rope, apply_rope
from nha_jax.ops.state import NHAState, Tokens
from nha_jax.ops.tpu.attention import can_compile_for_tpus
from nha_jax.ops.types import EmptySlots, Options, SlotFeatureMap, compute_dtype
from nha_jax.ops.validation import check_state, validate_arrays, validate_rest
from pallas.decode_types import DecodeState, DecodeToken, SlotState, SlotToken
from pallas.gpu.decode import launch as gpu_decode
from pallas.tpu import decode as tpu_decode

DecodeImplementation = Literal["xla", "pallas_gpu"]


def decode_step(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    state: NHAState,
    *,
    window_size: int | None,
    rope: Rope | None = None,
    scale: float | None = None,
    slot_feature_map: SlotFeatureMap = "identity",
    empty_slots: EmptySlots = "attend",
    active: jax.Array | None = None,
    implementation: DecodeImplementation | None = None,
) -> tuple[jax.Array, NHAState]:
    """One more token of every row's segment, in place of one entry of the state's ring.

    Args:
      query, key, value, log_decay, rope, window_size, scale, slot_feature_map, empty_slots: as for
        `nha_attention`, with T = 1.
      state: of the tokens before. With window_size=None a row's `length` must be below the state's
        capacity (make room with `resize_state`); at capacity the oldest token is overwritten.
      active: [B] bool; a row that is False gives 0 and keeps its state.
      implementation: "xla"; "pallas_gpu", one kernel for Hopper, interpreted off GPUs, which nobody
        has measured: what it does not serve runs as "xla", with a warning that says why; None: on
        TPUs one kernel, for the shapes that `tpu_decode_unsupported` lets pass, elsewhere "xla".

    Returns:
      out [B, 1, Hq, V] in the query's dtype, and the state after the token.

    Raises:
      ValueError, TypeError: as `nha_attention`; and ValueError if T is not 1.

    The kernels have no gradient, update a donated state in place, and need `jax.set_mesh` where a
    mesh divides the arrays.
    """
    if implementation not in (None, *get_args(DecodeImplementation)):
        raise ValueError(
            "implementation of decode_step must be one of "
            f"{(None, *get_args(DecodeImplementation))}, got {implementation!r}"
        )
    validate_arrays(query, key, value, log_decay)
    B, T, _, K = query.shape
    if T != 1:
        raise ValueError(
            f"decode_step takes one token at a time, got query with shape {query.shape}"
        )
    options = Options(
        window_size=window_size,
        scale=K**-0.5 if scale is None else scale,
        slot_feature_map=slot_feature_map,
        empty_slots=empty_slots,
        return_state=True,
        return_slot_weight=False,
    )
    validate_rest(
        query, key, value, log_decay,
        rope=rope, segment_ids=None, initial_state=None, options=options,
    )  # fmt: skip
    check_state("state", state, key, value, log_decay, window_size)
    active = jnp.ones(B, bool) if active is None else active
    new = Tokens(key, apply_rope(key, rope), value, log_decay.astype(compute_dtype(query)))
    arguments = (query, apply_rope(query, rope), new, state, active)
    step = functools.partial(decode_xla, options=options)
    if implementation == "pallas_gpu":
        if reason := gpu_decode_unsupported(query, state):
            warnings.warn(
                f"decode_step: implementation={implementation!r}: {reason}: running 'xla'",
                stacklevel=2,
            )
            return step(*arguments)
        interpret = not compiling_for_gpus()
        on_gpu = functools.partial(decode_gpu, options=options, interpret=interpret)
        return decode_over_mesh(on_gpu)(*arguments)
    if (
        implementation == "xla"
        or not can_compile_for_tpus()
        or tpu_decode_unsupported(query, state)
    ):
        return step(*arguments)
    kernel = decode_over_mesh(functools.partial(decode_tpu, options=options))
    return lax.platform_dependent(*arguments, tpu=kernel, default=step)


def tpu_decode_unsupported(query: jax.Array, state: NHAState) -> str | None:
    """Why the TPU kernel can't serve a device's part of this state, in a line; None if it can."""
    return _unsupported(tpu_decode.decode_unsupported, query, state)


def gpu_decode_unsupported(query: jax.Array, state: NHAState) -> str | None:
    """Why the GPU kernel can't serve a device's part of this state, in a line; None if it can."""
    reason = _unsupported(gpu_decode.decode_unsupported, query, state)
    return reason or not_hopper()


def _unsupported(
    refuse: Callable[[DecodeState], str | None], query: jax.Array, state: NHAState
) -> str | None:
    if state.slot_key.shape[2] == 0:
        return "its kernel takes at least one slot, got none"
    if query.dtype not in (jnp.bfloat16, jnp.float32):
        return f"its kernel takes bfloat16 and float32, got query of {query.dtype}"
    division = divide_over_mesh(query.shape[0], state.slot_key.shape[1])
    return refuse(_kernel_state(division.local_shapes(state, division.state)))


def decode_over_mesh(
    step: Callable[..., tuple[jax.Array, NHAState]],
) -> Callable[..., tuple[jax.Array, NHAState]]:
    """`step`, with the arrays of `decode_xla`, on each device's rows and heads."""

    def step_over_mesh(query, rotated_query, new, state, active):
        division = divide_over_mesh(query.shape[0], new.key.shape[2])
        tokens = division.tokens
        divided = division.map(
            step,
            in_specs=(tokens, tokens, tokens, division.state, division.rows),
            out_specs=(tokens, division.state),
        )
        return divided(query, rotated_query, new, state, active)

    return step_over_mesh


def decode_tpu(
    query: jax.Array,
    rotated_query: jax.Array,
    new: Tokens,
    state: NHAState,
    active: jax.Array,
    *,
    options: Options,
    interpret: bool = False,
) -> tuple[jax.Array, NHAState]:
    """`decode_xla` in one TPU kernel, in place if the state is donated. interpret: on the CPU."""
    attend = functools.partial(
        tpu_decode.decode_attention, interpret=pltpu.InterpretParams() if interpret else False
    )
    return _in_kernel(attend, query, rotated_query, new, state, active, options)


def decode_gpu(
    query: jax.Array,
    rotated_query: jax.Array,
    new: Tokens,
    state: NHAState,
    active: jax.Array,
    *,
    options: Options,
    interpret: bool | plgpu.InterpretGPUParams = False,
) -> tuple[jax.Array, NHAState]:
    """`decode_xla` in one GPU kernel, in place if the state is donated. interpret: on the CPU.

    A long ring of window_size=None takes a second, small step: see `pallas.gpu.decode.launch`.
    """
    if interpret is True:
        interpret = plgpu.InterpretGPUParams()
    attend = functools.partial(gpu_decode.decode_attention, interpret=interpret)
    return _in_kernel(attend, query, rotated_query, new, state, active, options)


def _in_kernel(
    attend: Callable[..., Any],
    query: jax.Array,
    rotated_query: jax.Array,
    new: Tokens,
    state: NHAState,
    active: jax.Array,
    options: Options,
) -> tuple[jax.Array, NHAState]:
    key, rotated_key, value, log_decay = new.map(lambda x: x[:, 0])
    entering = None
    if options.window_size is not None:
        entering = SlotToken(options.feature_map(query[:, 0]), key, log_decay)
    out, after = attend(
        DecodeToken(rotated_query[:, 0], rotated_key, value, entering),
        _kernel_state(state),
        state.length % max(state.capacity, 1),
        state.length,
        active.astype(jnp.int32),
        scale=options.scale,
        num_slots=log_decay.shape[2],
        mask_empty=options.empty_slots == "mask",
        feature_map=options.slot_feature_map,
    )
    length = state.length + active.astype(jnp.int32)
    state = state._replace(
        window_rotated_key=after.rotated_key, window_value=after.value, length=length
    )
    if after.slots is not None:
        state = state._replace(
            slot_key=after.slots.slot_key,
            slot_value=after.slots.slot_value,
            window_key=after.slots.key,
            window_log_decay=after.slots.log_decay,
        )
    return out[:, None], state


def _kernel_state(state: NHAState) -> DecodeState:
    slots = None
    if state.window_key.shape[1] or not state.capacity:
        slots = SlotState(
            state.slot_key, state.slot_value, state.window_key, state.window_log_decay
        )
    return DecodeState(state.window_rotated_key, state.window_value, slots)


def decode_xla(
    query: jax.Array,
    rotated_query: jax.Array,
    new: Tokens,
    state: NHAState,
    active: jax.Array,
    *,
    options: Options,
) -> tuple[jax.Array, NHAState]:
    """out [B, 1, Hq, V] and the state after the token, of tokens [B, 1, Hkv, .] and queries."""
    B, _, Hq, K = query.shape
    Hkv, M, W, R = new.key.shape[2], new.log_decay.shape[3], options.window_size, state.capacity
    dtype = new.log_decay.dtype
    batch, entry = jnp.arange(B), state.length % max(R, 1)
    length = state.length + active.astype(jnp.int32)
    now = new.map(lambda x: x[:, 0])  # [B, Hkv, .]
    # Read before the rings are written, or XLA would keep a copy of them for it.
    replaced, ring = lax.optimization_barrier(
        (state.tokens.map(lambda x: x[batch, entry] if x.shape[1] else None), state.tokens)
    )
    slot_key, slot_value = state.slot_key, state.slot_value
    if W is not None:
        # The token W back enters the slots: the ring entry that the new token replaces.
        leaves = active & (state.length >= W)
        slot_key, slot_value = _write_slots(state, replaced if W else now, leaves, options)

    def write(ring, x, old):
        if old is None:
            return ring
        x = jnp.where(active[:, None, None], x, old)
        return ring.at[batch, entry].set(x, unique_indices=True)

    ring = Tokens(*map(write, ring, now, replaced))

    rotated_query = rotated_query.reshape(B, Hkv, Hq // Hkv, K)
    if W is None:
        a = jnp.zeros((B, Hkv, Hq // Hkv, M), dtype)
    else:
        slot_query = options.feature_map(query.reshape(B, Hkv, Hq // Hkv, K).astype(dtype))
        a = options.scale * jnp.einsum("bhgk,bhmk->bhgm", slot_query, slot_key)
    b = options.scale * _window_logits(rotated_query, ring.rotated_key, dtype)
    if options.empty_slots == "mask":
        filled = (length > R) & (W is not None)
        a = jnp.where(filled[:, None, None, None], a, -jnp.inf)
    seen = jnp.arange(R) < length[:, None]
    b = jnp.where(seen[:, None, None], b, -jnp.inf)
    p = jax.nn.softmax(jnp.concatenate([a, b], axis=-1), axis=-1)
    out = _window_sum(p[..., M:], ring.value, dtype)
    if W is not None:
        out += jnp.einsum("bhgm,bhmv->bhgv", p[..., :M], slot_value)
    out = jnp.where(active[:, None, None, None], out, 0.0).astype(query.dtype)
    after = NHAState(slot_key, slot_value, *ring, length=length, segment_id=state.segment_id)
    return out.reshape(B, 1, Hq, new.value.shape[3]), after


def _window_logits(query: jax.Array, keys: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """[B, H, G, R], of queries [B, H, G, K] and a ring [B, R, H, K].

    A product per head would first copy the ring, heads outermost. So the queries meet all heads'
    keys at once, each with zeros for the heads that are not its own.
    """
    B, H, G, K = query.shape
    own = jnp.eye(H, dtype=bool)[:, None, :, None]
    spread = jnp.where(own, query[:, :, :, None], 0).reshape(B, H * G, H * K)
    keys = keys.reshape(B, keys.shape[1], H * K)
    logits = jnp.einsum("bqk,brk->bqr", spread, keys, preferred_element_type=dtype)
    return logits.reshape(B, H, G, keys.shape[1])


def _window_sum(weights: jax.Array, values: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """[B, H, G, V], of weights [B, H, G, R] and a ring [B, R, H, V]; as in `_window_logits`."""
    B, H, G, R = weights.shape
    V = values.shape[3]
    weights = weights.reshape(B, H * G, R).astype(values.dtype)
    values = values.reshape(B, R, H * V)
    sums = jnp.einsum("bqr,brv->bqv", weights, values, preferred_element_type=dtype)
    own = jnp.eye(H, dtype=bool)[:, None, :, None]
    return jnp.sum(jnp.where(own, sums.reshape(B, H, G, H, V), 0), axis=3)


def _write_slots(
    state: NHAState, token: Tokens, writes: jax.Array, options: Options
) -> tuple[jax.Array, jax.Array]:
    """The slots [B, Hkv, M, .] after the token [B, Hkv, .] entered, in the rows that write."""
    decay = jnp.exp(token.log_decay)[..., None]
    write = -jnp.expm1(token.log_decay)[..., None]
    feature = options.feature_map(token.key.astype(decay.dtype))[:, :, None]
    writes = writes[:, None, None, None]
    return (
        jnp.where(writes, decay * state.slot_key + write * feature, state.slot_key),
        jnp.where(
            writes, decay * state.slot_value + write * token.value[:, :, None], state.slot_value
        ),
    )
