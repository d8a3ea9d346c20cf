"""The two doors to every implementation of the operator: `nha_attention` and `decode_step`."""

import dataclasses
import functools
import numbers
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp

from nha_jax.ops import backends
from nha_jax.ops.derivatives import reverse_mode_only, without_derivative
from nha_jax.ops.mesh.division import decode_over_mesh, divide_call, divide_over_mesh, over_mesh
from nha_jax.ops.mesh.explicit import with_auto_axes
from nha_jax.ops.rope import Rope, apply_rope
from nha_jax.ops.state import NHAState, Tokens, compute_dtype
from nha_jax.ops.types import (
    EmptySlots,
    KernelOptions,
    NHAOutput,
    Options,
    SlotFeatureMap,
    SlotWeightGradient,
    check_state,
    validate_arrays,
    validate_rest,
)
from nha_jax.ops.unbatched import with_or_without_batch


def _result_specs(
    result: Any,
    query: jax.Array,
    key: jax.Array,
    *_: Any,
    initial_state: NHAState | None = None,
    return_state: bool = False,
    **__: Any,
) -> Any:
    """Says how the result of `nha_attention`, called with these arguments, is divided."""
    has_state = return_state or initial_state is not None
    division = divide_call(query, key, has_state=has_state)
    if not isinstance(result, NHAOutput):
        return division.tokens
    state = None if result.state is None else division.state
    slot_weight = None if result.slot_weight is None else division.tokens
    return NHAOutput(division.tokens, state, slot_weight)


@overload
def nha_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    *,
    window_size: int | None,
    rope: Rope | None = None,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
    slot_feature_map: SlotFeatureMap = "identity",
    slot_delay: int | None = None,
    empty_slots: EmptySlots = "attend",
    initial_state: NHAState | None = None,
    return_state: Literal[False] = False,
    return_slot_weight: Literal[False] = False,
    slot_weight_gradient: SlotWeightGradient = "all",
    implementation: str | None = None,
    kernel_options: KernelOptions | None = None,
) -> jax.Array: ...


@overload
def nha_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    *,
    window_size: int | None,
    rope: Rope | None = None,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
    slot_feature_map: SlotFeatureMap = "identity",
    slot_delay: int | None = None,
    empty_slots: EmptySlots = "attend",
    initial_state: NHAState | None = None,
    return_state: bool = False,
    return_slot_weight: bool = False,
    slot_weight_gradient: SlotWeightGradient = "all",
    implementation: str | None = None,
    kernel_options: KernelOptions | None = None,
) -> jax.Array | NHAOutput: ...


@with_or_without_batch
@with_auto_axes(_result_specs)
def nha_attention(
    query,
    key,
    value,
    log_decay,
    *,
    window_size,
    rope=None,
    scale=None,
    segment_ids=None,
    slot_feature_map="identity",
    slot_delay=None,
    empty_slots="attend",
    initial_state=None,
    return_state=False,
    return_slot_weight=False,
    slot_weight_gradient="all",
    implementation=None,
    kernel_options=None,
):
    """Native Hybrid Attention (arXiv 2510.07019): gated slots and a window under one softmax.

    B batch, T tokens, Hq query heads, Hkv key/value heads (each serves Hq / Hkv query heads),
    K key dim, V value dim, M slots, W window. Within a segment, at step t, the token j = t - W
    enters the slots, with s = 1 - exp(log_decay_j):

        SK_t = exp(log_decay_j) SK_{t-1} + s key_j        (M x K; SV the same with value_j)
        a_t = scale query_t . SK_t                        M slot logits, not rotated
        b_t = scale rot(query_t) . rot(key_i)             t - W < i <= t
        out_t = softmax([a_t ; b_t]) [SV_t ; value_i]

    One sequence may do without B: query [T, Hq, K], and then all other arrays, states and results
    have no batch axis either.

    Args:
      query: [B, T, Hq, K], not rotated.
      key: [B, T, Hkv, K], not rotated, of the query's dtype.
      value: [B, T, Hkv, V], of the query's dtype.
      log_decay: [B, T, Hkv, M], natural log of the gate, in [-inf, 0]; computed in float32. M may
        be 0: sliding-window attention.
      window_size: W, the tokens read exactly: 0 reads slots only, None the whole past.
      rope: (cos, sin), each [T, K/2] or [B, T, K/2]; rotates the window's logits only.
      scale: of all logits; K ** -0.5 by default.
      segment_ids: [B, T] integers. A segment is a maximal run of equal ids; tokens see, and slots
        hold, their own segment only. 0 is padding: whatever it holds, NaN too, it gives 0, writes
        nothing, and has gradients of 0. What is real must be finite: NaN in one segment may reach
        the others of its row.
      slot_feature_map: "identity", "silu" or "relu", of queries and keys in the slot branch.
      slot_delay: how many steps after its own a token enters the slots: j = t - slot_delay above,
        from 0 to window_size. Below window_size it is then read through both, slots and window;
        the kernels do not serve that. None: window_size.
      empty_slots: before the first token entered the slots, "attend" reads them as zeros (as
        published), "mask" leaves them out of the softmax.
      initial_state: the `NHAState` an earlier call returned. Its segment goes on if the call's
        first id is the state's, or if segment_ids is None.
      return_state: return the state after each row's last real token: padding at the end of a row
        leaves no trace. With window_size=None the state grows by T tokens.
      return_slot_weight: return the softmax mass on the slots, [B, T, Hq] float32; differentiable.
      slot_weight_gradient: what the slot weight's gradient reaches. It is sigmoid(A - B), A and B
        the logs of the sums of exp(a_t) and exp(b_t): "all" is its gradient as it stands, "slots"
        that of sigmoid(A - stop_gradient(B)), so that the window's logits are not pulled.
      implementation: "reference", "xla", "pallas_tpu", "pallas_gpu", or a name given to
        `nha_jax.ops.backends.register`; None picks the fastest that serves this call on the
        platform it is compiled for (on GPUs "xla", until someone has measured). Kernels run
        interpreted, and slowly, on other platforms than their own, and need `jax.set_mesh` where a
        mesh divides the arrays: see `nha_jax.ops.mesh.division`. "pallas_gpu" is for Hopper and
        bfloat16.
      kernel_options: options that implementations have of their own, such as block sizes, by the
        implementation's name: `{"pallas_tpu": {"chunk": 128}}`, the fields of
        `pallas.tpu.BlockSizes`. None: as suits the chip.

    Returns:
      out [B, T, Hq, V] in the query's dtype, or, if a state or the slot weight was asked for,
      `NHAOutput(out, state, slot_weight)` with None for what was not.

    Raises:
      ValueError, TypeError: an argument has a wrong value, shape or dtype; the message names it.
      NotImplementedError: the implementation named cannot serve; the message says why. So do
        forward mode and second derivatives of the kernels', which have neither.
    """
    query, key, value, log_decay = map(jnp.asarray, (query, key, value, log_decay))
    validate_arrays(query, key, value, log_decay)
    options = Options(
        window_size=int(window_size) if _is_integer(window_size) else window_size,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        slot_feature_map=slot_feature_map,
        slot_delay=slot_delay,
        empty_slots=empty_slots,
        return_state=return_state,
        return_slot_weight=return_slot_weight,
        slot_weight_gradient=slot_weight_gradient,
    )
    arrays = (query, key, value, log_decay)
    rest = {"rope": rope, "segment_ids": segment_ids, "initial_state": initial_state}
    validate_rest(*arrays, **rest, options=options)

    def unsupported(backend: backends.Backend) -> str | None:
        return backend.delay_unsupported(options) or backend.attend_unsupported(
            arrays,
            has_segments=segment_ids is not None,
            has_past=initial_state is not None,
            options=options,
        )

    chosen = _choose(implementation, unsupported, options, kernel_options)
    result = _attend(arrays, rest, chosen)
    return result if return_state or return_slot_weight else result.out


def _is_integer(x) -> bool:
    return isinstance(x, numbers.Integral) and not isinstance(x, bool)


class _Chosen(NamedTuple):
    """What computes a call, and its options: with the arrays' shapes, all that the program is of.

    It is hashable, and a backend equals itself alone, so `jax.jit` finds the program of an earlier
    call, and never that of another backend that had the name before.
    """

    backend: backends.Backend
    options: Options
    on_platform: backends.Backend | None  # what the automatic choice takes on its platform
    options_on_platform: Options | None

    def run(self, compute: Callable[..., Any], *arguments: Any) -> Any:
        """Runs what `compute(backend, options)` makes of the one chosen.

        For a backend that is made for a platform, `compute` takes `interpret` too.
        """
        if self.on_platform is not None:
            there = compute(self.on_platform, self.options_on_platform, interpret=False)
            elsewhere = compute(self.backend, self.options)
            chosen = backends.by_platform(self.on_platform.platform, there, elsewhere)
        elif self.backend.platform is None:
            chosen = compute(self.backend, self.options)
        else:
            chosen = self.backend.compiled_or_interpreted(
                compute(self.backend, self.options, interpret=False),
                compute(self.backend, self.options, interpret=True),
            )
        return chosen(*arguments)


def _choose(
    name: str | None,
    unsupported: Callable[[backends.Backend], str | None],
    options: Options,
    kernel_options: KernelOptions | None = None,
) -> _Chosen:
    """Chooses by name, or for the platform that the program is made for; raises as the doors do."""

    def own(backend: backends.Backend) -> Options:
        given = backends.options_for(backend, kernel_options)
        return dataclasses.replace(options, implementation_options=given)

    backend, there = backends.choose(name, unsupported)
    return _Chosen(backend, own(backend), there, None if there is None else own(there))


# Inlined into the caller's program, if there is one, these leave no trace in it.
@functools.partial(jax.jit, static_argnames="chosen", inline=True)
def _attend(arrays: backends.Arrays, rest: dict[str, Any], chosen: _Chosen) -> NHAOutput:
    """Computes `nha_attention`, of checked arguments."""

    def over_devices(backend: backends.Backend, options: Options, **how: Any):
        attend = over_mesh(functools.partial(backend.attend, **how))

        def call(arrays: backends.Arrays, rest: dict[str, Any]) -> NHAOutput:
            return attend(*arrays, **rest, options=options)

        return reverse_mode_only(backend.name, call) if backend.reverse_mode_only else call

    return chosen.run(over_devices, arrays, rest)


@functools.partial(jax.jit, static_argnames="chosen", inline=True)
def _decode(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    state: NHAState,
    rope: Rope | None,
    active: jax.Array | None,
    chosen: _Chosen,
) -> tuple[jax.Array, NHAState]:
    """Computes `decode_step`, of checked arguments."""
    active = jnp.ones(query.shape[0], bool) if active is None else active
    token = Tokens(key, apply_rope(key, rope), value, log_decay.astype(compute_dtype(query)))

    def over_devices(backend: backends.Backend, options: Options, **how: Any):
        decode = functools.partial(backend.decode, options=options, **how)
        # Plain XLA is divided by the compiler; a kernel's call has to be divided.
        step = decode if backend.platform is None else decode_over_mesh(decode)
        return without_derivative(backend.name, step) if backend.reverse_mode_only else step

    return chosen.run(over_devices, query, apply_rope(query, rope), token, state, active)


def _decoded_specs(result: Any, query: jax.Array, key: jax.Array, *_: Any, **__: Any) -> Any:
    """Says how the results of `decode_step` are divided: its out, and its state."""
    division = divide_over_mesh(query.shape[0], key.shape[2])
    return division.tokens, division.state


@with_or_without_batch
@with_auto_axes(_decoded_specs)
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
    slot_delay: int | None = None,
    empty_slots: EmptySlots = "attend",
    active: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, NHAState]:
    """Reads one more token of every row's segment, which replaces one entry of the state's ring.

    As with `nha_attention`, all arrays may be without the batch axis.

    Args:
      query, key, value, log_decay, rope, window_size, scale, slot_feature_map, slot_delay,
        empty_slots: as for `nha_attention`, with T = 1.
      state: of the tokens before. With window_size=None a row's `length` must be below the state's
        capacity (make room with `resize_state`); at capacity the oldest token is overwritten.
      active: [B] bool; a row that is False gives 0 and keeps its state, whatever it holds.
      implementation: as for `nha_attention`. None takes one kernel on TPUs, for the shapes that it
        serves, and "xla" elsewhere; "pallas_gpu" is one kernel for Hopper, which nobody has
        measured.

    Returns:
      out [B, 1, Hq, V] in the query's dtype, and the state after the token.

    Raises:
      ValueError, TypeError: as `nha_attention`; and ValueError if T is not 1.
      NotImplementedError: the implementation named cannot serve; the message says why.

    The kernels have no gradient, update a donated state in place, and need `jax.set_mesh` where a
    mesh divides the arrays.
    """
    backends.check_name(implementation)
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
        slot_delay=slot_delay,
        empty_slots=empty_slots,
        return_state=True,
        return_slot_weight=False,
    )
    validate_rest(
        query, key, value, log_decay,
        rope=rope, segment_ids=None, initial_state=None, options=options,
    )  # fmt: skip
    check_state("state", state, key, value, log_decay, window_size)
    division = divide_over_mesh(B, key.shape[2])
    local_state = division.local_shapes(state, division.state)

    def unsupported(backend: backends.Backend) -> str | None:
        return backend.delay_unsupported(options) or backend.decode_unsupported(
            query, local_state, options
        )

    chosen = _choose(implementation, unsupported, options)
    return _decode(query, key, value, log_decay, state, rope, active, chosen)
