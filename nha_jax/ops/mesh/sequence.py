"""One sequence over several devices, each of which holds T consecutive tokens of it.

A device needs of those before it the last W tokens, and the slots as they left them. What a
device's tokens do to the slots is linear, S -> decay S + added, so all devices work out their own
(decay, added) at once, and a scan over the devices, in log2(P) exchanges of M + M (K + V) numbers a
head, tells each the slots it starts from (the idea of recurrentgemma's sequence-parallel scan).
Everything here runs on a device's part, inside `jax.shard_map`; gradients follow by transposition.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from nha_jax.ops.rope import Rope, apply_rope
from nha_jax.ops.state import Past, Slots, Tokens, compute_dtype, empty_slots
from nha_jax.ops.timeline import nothing_leaves
from nha_jax.ops.types import NHAOutput, Options


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices that share a sequence, in its order.

    Fields:
      axes: the mesh axes along which they lie.
      count: how many there are.
    """

    axes: tuple[str, ...]
    count: int

    def from_before(self, x: jax.Array, distance: int = 1) -> jax.Array:
        """Fetches x from the device `distance` places before; zeros where there is none."""
        pairs = [(i, i + distance) for i in range(self.count - distance)]
        return lax.ppermute(x, self.axes, pairs) if pairs else jnp.zeros_like(x)

    def tokens_before(self, x: jax.Array, count: int) -> jax.Array:
        """Fetches the last `count` tokens before this device's: [B, T, ...] -> [B, count, ...].

        Zeros stand where there are none.
        """
        T = x.shape[1]
        pieces = [
            self.from_before(x[:, -min(T, count - start) :], distance)
            for distance, start in enumerate(range(0, count, T), 1)
        ]
        return jnp.concatenate([x[:, :0], *reversed(pieces)], axis=1)

    def all_before(self, x: jax.Array) -> jax.Array:
        """Gathers all tokens before this device's: [B, T, ...] -> [B, (count - 1) T, ...].

        They end with the token just before; zeros come first where there are fewer.
        """
        parts = lax.all_gather(x, self.axes)  # [P, B, T, ...]
        place = lax.axis_index(self.axes)
        # In the order that ends with this device's part; those that come after it go first.
        parts = jnp.roll(parts, self.count - 1 - place, axis=0)[:-1]
        exists = jnp.arange(self.count - 1, dtype=jnp.int32) >= self.count - 1 - place
        parts = jnp.where(exists.reshape(-1, *(1,) * x.ndim), parts, 0)
        return jnp.moveaxis(parts, 0, 1).reshape(x.shape[0], -1, *x.shape[2:])


def attend_in_context(
    attend: Callable[..., NHAOutput],
    devices: Devices,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    *,
    rope: Rope | None,
    segment_ids: jax.Array | None,
    options: Options,
) -> NHAOutput:
    """Runs `attend`, a `Backend.attend`, on this device's T tokens of a longer sequence.

    Where tokens leave the window, each device gets the W tokens before its own (from as many
    devices as they span); full attention gathers the keys and values of all.
    """
    B, T = query.shape[:2]
    W = options.window_size
    if nothing_leaves(options.delay, devices.count * T, False):
        W = None
    ids = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
    tokens = Tokens(key, apply_rope(key, rope), value, log_decay.astype(compute_dtype(query)))
    if W is None:
        past = _whole_past(devices, tokens, ids)
        options = dataclasses.replace(options, window_size=None, slot_delay=None)
    else:
        past = _window_and_slots(devices, tokens, ids, options)
    return attend(
        query, key, value, log_decay,
        rope=rope, segment_ids=segment_ids, past=past, options=options,
    )  # fmt: skip


def _whole_past(devices: Devices, tokens: Tokens, ids: jax.Array) -> Past:
    """Gathers the past of full attention: the rotated keys and the values of all tokens before."""
    past = Tokens(
        tokens.key[:, :0],
        devices.all_before(tokens.rotated_key),
        devices.all_before(tokens.value),
        tokens.log_decay[:, :0],
    )
    slots = empty_slots(tokens.key, tokens.value, tokens.log_decay.shape[3])
    return _build_past(slots, past, devices.all_before(ids))


def _window_and_slots(devices: Devices, tokens: Tokens, ids: jax.Array, options: Options) -> Past:
    """Finds the past of a finite window: the W tokens before this device's, and the slots."""
    T, W, delay = ids.shape[1], options.window_size, options.delay
    assert W is not None
    assert delay is not None
    rotated = tokens.rotated_key is not tokens.key
    key, value, log_decay = (
        devices.tokens_before(x, W) for x in (tokens.key, tokens.value, tokens.log_decay)
    )
    rotated_key = devices.tokens_before(tokens.rotated_key, W) if rotated else key
    past = Tokens(key, rotated_key, value, log_decay)
    ids_before = devices.tokens_before(ids, max(W, 1))
    goes_on = _of_last_segment(jnp.concatenate([ids_before, ids], axis=1))
    # While this device's tokens are read, each lets the one enter that came `delay` before it.
    entering = Tokens(
        *(
            jnp.concatenate(pair, axis=1)[:, W - delay :][:, :T]
            for pair in zip(past, tokens, strict=True)
        )
    )
    kept, added = _effect(entering, goes_on[:, -T - delay :][:, :T], options)
    kept = jnp.where(goes_on[:, -T - 1][:, None, None], kept, 0)
    return _build_past(_slots_before(devices, kept, added), past, ids_before)


def _build_past(slots: Slots, past: Tokens, ids: jax.Array) -> Past:
    """Joins slots and tokens into a `Past`.

    Args:
      ids: [B, N] segment ids of at least as many tokens before; 0 where there is none.
    """
    real = _of_last_segment(ids)
    return Past(
        slots=slots,
        tokens=past,
        real=real[:, real.shape[1] - past.value.shape[1] :],
        length=jnp.sum(real, axis=1, dtype=jnp.int32),  # not read: no state is asked for
        segment_id=ids[:, -1].astype(jnp.int32),
    )


def _of_last_segment(ids: jax.Array) -> jax.Array:
    """[B, N] bool, which tokens are of the segment that the last is of; none if that is padding."""
    changes = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (0, 1)))
    later = lax.cumsum(changes.astype(jnp.int32), axis=1, reverse=True)
    return (later == 0) & (ids != 0)


def _effect(entering: Tokens, writes: jax.Array, options: Options) -> tuple[jax.Array, Slots]:
    """Sums up what entering tokens [B, T, H, .] do to slots: S -> decay S + added.

    Returns decay [B, H, M] and added, keys [B, H, M, K] and values [B, H, M, V]: with the decay
    from the entry of token j on, added = sum_j (1 - exp(g_j)) exp(sum_{i>j} g_i) [key_j ; value_j].
    """
    writes = writes[..., None, None]
    log_decay = jnp.where(writes, entering.log_decay, 0)  # [B, T, H, M]
    # Sums of decays only, never differences: see the stability of the chunked form.
    from_here = lax.cumsum(log_decay, axis=1, reverse=True)
    later = jnp.pad(from_here[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0)))
    weight = jnp.where(writes, -jnp.expm1(log_decay) * jnp.exp(later), 0)

    def add(x: jax.Array) -> jax.Array:
        return jnp.einsum(
            "bjhm,bjhd->bhmd",
            weight.astype(x.dtype),
            x,
            precision="highest",  # of float32; bfloat16 has but one
            preferred_element_type=weight.dtype,
        )

    added = add(options.feature_map(entering.key)), add(entering.value)
    return jnp.exp(from_here[:, 0]), added


def _slots_before(devices: Devices, decay: jax.Array, added: Slots) -> Slots:
    """Finds the slots at each device's start, by a scan that doubles its reach at every step.

    The scan is that of Hillis and Steele, over the pairs (decay, added).
    """
    key, value = added
    for step in range(math.ceil(math.log2(devices.count))):
        distance = 1 << step
        key = key + decay[..., None] * devices.from_before(key, distance)
        value = value + decay[..., None] * devices.from_before(value, distance)
        # 0 where there is no device before: nothing is left that it would be multiplied by.
        decay = decay * devices.from_before(decay, distance)
    return devices.from_before(key), devices.from_before(value)
