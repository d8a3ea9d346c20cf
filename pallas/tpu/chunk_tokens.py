"""The rows and tokens of a grid step, read chunk by chunk in the forms that the products need."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from pallas.tpu.arithmetic import LANES, apply_feature_map, join, merge_group, rotate, split_group
from pallas.tpu.decays import floored_decays
from pallas.tpu.segments import Segments, row_columns, where_entering
from pallas.tpu.spec import CallSpec

Refs = Mapping[str, Any]  # references to a kernel's arrays, by name
ReadChunk = Callable[[int], jax.Array]  # from a chunk's number to [C, D]


class StepTokens:
    """The tokens of a grid step behind those of its halo, in each form that chunks read.

    The forms, by name: entering_key [., K], after the feature map; window_key [., K], rotated;
    value [., V]; decay [., M] float32, of `floored_decays`, 0 for tokens that do not enter the
    slots. With spec.segments also, of the step's rows alone, the columns [., 128] of `row_columns`.
    """

    def __init__(self, spec: CallSpec, own: dict[str, ReadChunk], halo: dict[str, jax.Array]):
        """Computes nothing yet: a chunk's form is computed where it is first asked for, and kept.

        own: for each form, what reads the tokens [C, D] of a chunk's own rows. halo: each form's
        [halo, D] before the step; empty if there is no halo.
        """
        self._spec, self._halo = spec, halo
        self._own = {name: functools.cache(read) for name, read in own.items()}

    def own(self, name: str, n: int) -> jax.Array:
        """The tokens of chunk n's own rows, [C, D]."""
        return self._own[name](n)

    def compute_all(self) -> None:
        """Computes every form of every chunk, form by form."""
        for name in self._own:
            for n in range(self._spec.chunks):
                self.own(name, n)

    def of_chunk(self, name: str, n: int, count: int) -> jax.Array:
        """The first `count` tokens that chunk n reads, [count, D]; those of its halo come first.

        n = spec.chunks with count = spec.halo gives the halo of the next grid step.
        """
        C, halo = self._spec.chunk, self._spec.halo
        first, last = n * C - halo, n * C - halo + count  # in rows of the step
        parts = [self._halo[name][first + halo : min(last, 0) + halo]] if first < 0 else []
        for m in range(max(first, 0) // C, -(-last // C)):
            own = self.own(name, m)
            parts.append(own[max(first - m * C, 0) : min(last - m * C, C)])
        return join(parts, 0)


def own_tokens(refs: Refs, spec: CallSpec) -> dict[str, ReadChunk]:
    """The functions that read the step's own rows, for `StepTokens`."""
    dtype = refs["token_key"].dtype

    def entering_keys(n):
        return apply_feature_map(refs["token_key"][0, rows_of(n, spec)], spec.feature_map)

    def decays(lanes):
        return floored_decays(entering_log_decays(refs, lanes, spec), dtype)

    own: dict[str, ReadChunk] = {
        "window_key": lambda n: window_keys(refs, rows_of(n, spec), spec),
        "entering_key": entering_keys,
        "value": lambda n: refs["token_value"][0, rows_of(n, spec)],
        "decay": _rows_from_lanes(decays, spec),
    }
    if not spec.segments:
        return own
    names = _segment_names(spec)
    columns = _rows_from_lanes(
        lambda lanes: row_columns(refs["row_segments"][0, :, lanes], names), spec
    )

    def column(i):
        return lambda n: columns(n)[:, i * LANES : (i + 1) * LANES]

    return own | {name: column(i) for i, name in enumerate(names)}


def _rows_from_lanes(transposed: Callable[[slice], jax.Array], spec: CallSpec) -> ReadChunk:
    """Makes a function that reads a chunk's rows of an array whose rows lie in lanes.

    transposed: from 128 lanes of the array to rows; it is called once for each 128.
    """
    lanes = min(LANES, spec.step_rows)
    tile = functools.cache(lambda i: transposed(slice(i * lanes, (i + 1) * lanes)))

    def read(n):
        i, row = divmod(n * spec.chunk, lanes)
        return tile(i)[row : row + spec.chunk]

    return read


def _segment_names(spec: CallSpec) -> list[str]:
    return ["row_segment", "slot_segment"] + ["slots_filled"] * spec.mask_empty


def segments_of(refs: Refs, tokens: StepTokens, n: int, spec: CallSpec) -> Segments | None:
    """The segments of chunk n; None if the call has none."""
    if not spec.segments:
        return None
    of_rows = {name: tokens.own(name, n) for name in _segment_names(spec)}
    return Segments(of_rows, refs["chunk_segments"][0, n : n + 1], spec)


def rows_of(n: int, spec: CallSpec) -> slice:
    """The rows of chunk n in its grid step."""
    return slice(n * spec.chunk, (n + 1) * spec.chunk)


def entering_log_decays(refs: Refs, lanes: slice, spec: CallSpec) -> jax.Array:
    """The log decays [M, lanes], 0 for tokens that do not enter the slots."""
    log_decay = refs["token_log_decay"][0, 0, :, lanes]
    if not spec.segments:
        return log_decay
    return where_entering(log_decay, refs["row_segments"][0, :, lanes])


def window_keys(refs: Refs, rows: slice, spec: CallSpec) -> jax.Array:
    """Keys [rows, K] as the window's logits read them, rotated if the call rotates."""
    if spec.rotated:
        return refs["token_rotated_key"][0, rows]
    key = refs["token_key"][0, rows]
    if not spec.rope:
        return key
    return rotate(key, refs[spec.rope_tables[-1]][0, rows]).astype(key.dtype)


def window_queries(refs: Refs, rows: slice, spec: CallSpec) -> jax.Array:
    """Queries [G * C, K] as the window's logits read them, rotated if the call rotates."""
    if spec.rotated:
        return read_group(refs["rotated_query"], rows, spec.group)
    query = read_group(refs["query"], rows, spec.group)
    if not spec.rope:
        return query
    rotated = rotate(split_group(query, spec.group), refs["rope_table"][0, rows])
    return merge_group(rotated).astype(query.dtype)


def read_group(ref: Any, rows: slice, group: int) -> jax.Array:
    """Reads the rows of [1, step rows, G * D] as [G * C, D], the heads one below the other."""
    D = ref.shape[2] // group
    return join([ref[0, rows, g * D : (g + 1) * D] for g in range(group)], 0)


def write_group(ref: Any, rows: slice, x: jax.Array) -> None:
    """Writes [G, C, D] to the rows of [1, step rows, G * D]."""
    D = x.shape[2]
    for g in range(x.shape[0]):
        ref[0, rows, g * D : (g + 1) * D] = x[g].astype(ref.dtype)
