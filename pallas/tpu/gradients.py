"""The end of a chunk's backward: gradients of tokens that chunks share, of decays, and the stores.

A token is read by its own chunk and by later ones, as part of their halo. Chunks go from the last
to the first, and each adds what the later ones left for its tokens, stores the gradients of its own
rows' tokens and leaves those of its halo's: `GridStep.later`.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas.tpu.arithmetic import (
    LANES,
    feature_map_pullback,
    join,
    reverse_cumulative_sum,
    rotate_back,
    split_group,
)
from pallas.tpu.chunk_tokens import Refs, StepTokens, rows_of, write_group
from pallas.tpu.decays import ChunkDecays, decay_floor
from pallas.tpu.segments import Segments, where_entering
from pallas.tpu.spec import CallSpec


class ChunkStates(NamedTuple):
    """A chunk's decays, and the slots at its start and end."""

    decays: ChunkDecays
    segments: Segments | None
    bare_to_end: jax.Array  # exp(c_C - c_j), 0 for tokens that do not reach the end; [C, M]
    to_end: jax.Array  # s_j times that, [C, M] in the operands' dtype
    total: jax.Array  # exp(c_C), 0 if the start does not reach the end; [M, 1]
    start_key: jax.Array  # SK0, [M, K] in the operands' dtype
    start_value: jax.Array  # SV0, [M, V]
    end: jax.Array  # [M, K + V] float32


@dataclasses.dataclass
class GridStep:
    """What the chunks of a grid step share.

    `slots`, `later` and `d_decays` are handed on from chunk to chunk, each in one stage: they are
    right as long as the chunks reach that stage one after the other, as `emit` has them do.

    Fields:
      index: of the step.
      slots: [M, K + V], at the start of the next chunk to go through `forward_stages`.
      later: what the later chunks leave to the chunk whose `backward_stages` come next: d_slots
        [M, K + V], the gradient of the slots at its end, and, of each form of `StepTokens`, [halo,
        .] to be added to the gradients of its last tokens (`_add_later`).
      states: by chunk, of `forward_stages`.
      d_decays: [C, M] of the chunks' own rows' tokens, as far as they are known; first to last.
    """

    refs: Refs
    outs: Refs
    tokens: StepTokens
    spec: CallSpec
    index: jax.Array
    slots: jax.Array
    later: dict[str, jax.Array]
    states: dict[int, ChunkStates] = dataclasses.field(default_factory=dict)
    d_decays: list[jax.Array] = dataclasses.field(default_factory=list)


class ChunkGradients(NamedTuple):
    """A chunk's gradients of its queries and of the tokens that it reads, all float32."""

    query: jax.Array  # [G * C, K], the queries themselves
    d_query: jax.Array  # of the slots' branch, after the feature map; [G, C, K]
    d_entering_key: jax.Array  # after the feature map; [entering_tokens, K]
    d_value: jax.Array  # [chunk_tokens, V]
    d_window_query: jax.Array | None  # [G, C, K]
    d_window_key: jax.Array | None  # [chunk_tokens, K]


class DecayGradients(NamedTuple):
    """What the gradient of a chunk's decays is made of, all but token_decays float32."""

    d_at_rows: jax.Array  # R, of c at the rows; [C, M]
    token_decays: list[jax.Array]  # for each gate block, [its tokens, M] in the operands' dtype
    d_token_decays: list[jax.Array]  # their gradients
    d_to_end: jax.Array  # [C, M]
    d_at_end: jax.Array  # x, of c at the chunk's end; [1, M]


def decay_gradient(
    n: int, step: GridStep, states: ChunkStates, gradients: DecayGradients
) -> jax.Array:
    """The gradient dg of the first tokens that chunk n reads, [entering_tokens, M]."""
    spec, decays = step.spec, states.decays
    bare = [decays.bare_token_decay(i) for i in range(len(decays.gate_blocks))]
    d_write = _sum_blocks(gradients.d_token_decays, bare, decays, spec)  # Y
    token_decays = [x.astype(jnp.float32) for x in gradients.token_decays]
    write_d_write = _sum_blocks(gradients.d_token_decays, token_decays, decays, spec)  # s Y
    d_write = add_to_first(d_write, gradients.d_to_end * states.bare_to_end)
    write_d_write = add_to_first(
        write_d_write, gradients.d_to_end * states.to_end.astype(jnp.float32)
    )
    d_decay = reverse_cumulative_sum(_from_rows(gradients.d_at_rows, spec) - write_d_write)
    d_decay -= (1.0 - decays.write) * d_write
    d_decay = add_to_first(d_decay, gradients.d_at_end, spec.chunk)
    decay = step.tokens.of_chunk("decay", n, spec.entering_tokens)
    floor = decay_floor(step.refs["token_value"].dtype)
    return jnp.where(decay > floor, d_decay, 0.0)


def store_tokens(n: int, step: GridStep, gradients: ChunkGradients) -> None:
    """Stores the gradients of the chunk's queries, and of its own rows' keys and values."""
    spec, rows, refs, outs = step.spec, rows_of(n, step.spec), step.refs, step.outs
    dtype = refs["token_value"].dtype
    query = split_group(gradients.query, spec.group)
    d_query = feature_map_pullback(gradients.d_query, query, spec.feature_map)
    d_key = _add_later(gradients.d_entering_key, step.later, "d_entering_key", spec)
    d_key = feature_map_pullback(d_key, refs["token_key"][0, rows], spec.feature_map)
    d_window_query, d_window_key = gradients.d_window_query, gradients.d_window_key
    if d_window_query is not None and d_window_key is not None:
        d_window_key = _add_later(d_window_key, step.later, "d_window_key", spec)
        if spec.rotated:
            write_group(outs["d_rotated_query"], rows, d_window_query)
            outs["d_token_rotated_key"][0, rows] = d_window_key.astype(dtype)
        elif spec.rope:
            d_query += rotate_back(d_window_query, refs["rope_table"][0, rows])
            d_key += rotate_back(d_window_key, refs[spec.rope_tables[-1]][0, rows])
        else:
            d_query += d_window_query
            d_key += d_window_key
    write_group(outs["d_query"], rows, d_query)
    outs["d_token_key"][0, rows] = d_key.astype(dtype)
    d_value = _add_later(gradients.d_value, step.later, "d_value", spec)
    outs["d_token_value"][0, rows] = d_value.astype(dtype)


def store_decays(n: int, step: GridStep, d_decay: jax.Array) -> None:
    """Stores the decays' gradients, 128 lanes at a time, once all chunks of those are known."""
    spec, d_decays = step.spec, step.d_decays
    d_decays.insert(0, _add_later(d_decay, step.later, "d_decay", spec))
    lanes, first = min(LANES, spec.step_rows), rows_of(n, spec).start
    if first % lanes:
        return
    tile = slice(first, first + lanes)
    transposed = join(d_decays[: lanes // spec.chunk], 0).T
    if spec.segments:
        transposed = where_entering(transposed, step.refs["row_segments"][0, :, tile])
    step.outs["d_token_log_decay"][0, 0, :, tile] = transposed


def add_to_first(x: jax.Array, y: jax.Array, rows: int | None = None) -> jax.Array:
    """Adds y to the first rows of x: as many as y has, or `rows`."""
    rows = y.shape[0] if rows is None else rows
    if x.shape[0] == rows:
        return x + y
    return jnp.concatenate([x[:rows] + y, x[rows:]], 0)


def _sum_blocks(
    d_token_decays: list[jax.Array], factors: list[jax.Array], decays: ChunkDecays, spec: CallSpec
) -> jax.Array:
    """Sums the gate blocks' products, each of the block's tokens: [entering_tokens, M]."""
    size, parts = decays.gate_blocks[0].stop, []
    for first in range(0, spec.entering_tokens, size):
        tokens = slice(first, first + size)
        terms = [
            x[tokens] * factor[tokens]
            for x, factor, seen in zip(d_token_decays, factors, decays.block_tokens, strict=True)
            if first < seen.stop
        ]
        parts.append(functools.reduce(jnp.add, terms))
    return join(parts, 0)


def _from_rows(x: jax.Array, spec: CallSpec) -> jax.Array:
    """Moves rows [C, M] to tokens [entering_tokens, M]: row r to the last token in its slots."""
    if not spec.halo_padding:
        return x
    beyond = jnp.zeros((spec.entering_tokens - spec.chunk, x.shape[1]), x.dtype)
    return pltpu.roll(jnp.concatenate([x, beyond], 0), spec.halo_padding, 0)


def _add_later(x: jax.Array, later: dict[str, jax.Array], name: str, spec: CallSpec) -> jax.Array:
    """Completes the gradients [C, D] of the tokens of the chunk's own rows.

    x: [., D], the chunk's part of the gradients of the first tokens that it reads. later[name],
    [halo, D], is what the later chunks add to the chunk's last tokens, from the C-th on; it becomes
    what this chunk and they add to the tokens of its halo.
    """
    if not spec.halo:
        return x
    C, from_later = spec.chunk, later[name]
    parts = [x[:C]]
    if x.shape[0] > C:
        parts.append(x[C:] + from_later[: x.shape[0] - C])
    if x.shape[0] - C < spec.halo:
        parts.append(from_later[x.shape[0] - C :])
    summed = join(parts, 0)
    later[name] = summed[: spec.halo]
    return summed[spec.halo :]
