"""A grid step's tokens, chunk by chunk, and the order in which the chunks' work is emitted."""

import functools
from collections.abc import Callable, Iterator

import jax

from pallas.tpu.arithmetic import apply_feature_map, by_head, flat, join, rotate
from pallas.tpu.gates import turned_decays
from pallas.tpu.segments import Segments, row_columns, where_entering
from pallas.tpu.spec import CallSpec

Block = Callable[[int], jax.Array]


class Tokens:
    """A step's tokens behind the halo's: of each array, the halo's rows and the chunks' blocks."""

    def __init__(self, spec: CallSpec, own: dict[str, Block], halo: dict[str, jax.Array]):
        """own: what computes a chunk's [C, D] of each array; halo: [halo, D] of each, or empty.

        A chunk's is computed where it is first asked for.
        """
        self.spec, self.halo = spec, halo
        self._own = {name: functools.cache(block) for name, block in own.items()}

    def block(self, name: str, n: int) -> jax.Array:
        """The rows [C, D] of chunk n."""
        return self._own[name](n)

    def issue(self) -> None:
        """Computes every chunk's, array by array."""
        for name in self._own:
            for n in range(self.spec.chunks):
                self.block(name, n)

    def cat(self, name: str, n: int, rows: int) -> jax.Array:
        """The first `rows` rows of chunk n's cat."""
        C, halo = self.spec.chunk, self.spec.halo
        first, last = n * C - halo, n * C - halo + rows  # in rows of the step
        parts = [self.halo[name][first + halo : min(last, 0) + halo]] if first < 0 else []
        for m in range(max(first, 0) // C, -(-last // C)):
            block = self.block(name, m)
            parts.append(block[max(first - m * C, 0) : min(last - m * C, C)])
        return join(parts, 0)


def column_blocks(turned: Callable[[slice], jax.Array], spec: CallSpec) -> Block:
    """A chunk's rows of what `turned` gives for the tile of 128 lanes that they were."""
    lanes = min(128, spec.step_rows)
    tile = functools.cache(lambda i: turned(slice(i * lanes, (i + 1) * lanes)))

    def block(n):
        i, row = divmod(n * spec.chunk, lanes)
        return tile(i)[row : row + spec.chunk]

    return block


def own_blocks(refs, spec: CallSpec) -> dict[str, Block]:
    """Of the step's own tokens: rotated_key, key (feature-mapped), value, decay, and the facts."""
    dtype = refs["key"].dtype

    def decay(lanes):
        return turned_decays(written_decays(refs, lanes, spec), dtype)

    blocks = {
        "rotated_key": lambda n: rotated_keys(refs, rows_of(n, spec), spec),
        "key": lambda n: apply_feature_map(refs["key"][0, rows_of(n, spec)], spec.feature_map),
        "value": lambda n: refs["value"][0, rows_of(n, spec)],
        "decay": column_blocks(decay, spec),
    }
    if not spec.segments:
        return blocks
    names = _segment_names(spec)
    tiles = column_blocks(lambda lanes: row_columns(refs["row_segments"][0, :, lanes], names), spec)

    def fact(i):
        return lambda n: tiles(n)[:, i * 128 : (i + 1) * 128]

    return blocks | {name: fact(i) for i, name in enumerate(names)}


def _segment_names(spec: CallSpec) -> list[str]:
    return ["row_segment", "slot_segment"] + ["slots_filled"] * spec.mask_empty


def chunk_segments(refs, tokens: Tokens, n: int, spec: CallSpec) -> Segments | None:
    if not spec.segments:
        return None
    of_rows = {name: tokens.block(name, n) for name in _segment_names(spec)}
    return Segments(of_rows, refs["chunk_segments"][0, n : n + 1], spec)


def rows_of(n: int, spec: CallSpec) -> slice:
    """Chunk n's rows of the step."""
    return slice(n * spec.chunk, (n + 1) * spec.chunk)


def written_decays(refs, lanes: slice, spec: CallSpec) -> jax.Array:
    """log_decay [M, lanes], 0 of tokens that do not enter the slots."""
    log_decay = refs["log_decay"][0, 0, :, lanes]
    return (
        where_entering(log_decay, refs["row_segments"][0, :, lanes]) if spec.segments else log_decay
    )


def rotated_keys(refs, rows: slice, spec: CallSpec) -> jax.Array:
    """[rows, K], what the window's logits read."""
    if spec.rotated:
        return refs["rotated_key"][0, rows]
    key = refs["key"][0, rows]
    return rotate(key, refs[spec.rope_tables[-1]][0, rows]).astype(key.dtype) if spec.rope else key


def rotated_queries(refs, rows: slice, spec: CallSpec) -> jax.Array:
    """[G * C, K], what the window's logits read."""
    if spec.rotated:
        return stack_heads(refs["rotated_query"], rows, spec.group)
    query = stack_heads(refs["query"], rows, spec.group)
    if not spec.rope:
        return query
    return flat(rotate(by_head(query, spec.group), refs["rope_table"][0, rows])).astype(query.dtype)


def stack_heads(ref, rows: slice, group: int) -> jax.Array:
    """The rows of [1, rows, G * D], the heads one below the other: [G * C, D]."""
    D = ref.shape[2] // group
    return join([ref[0, rows, g * D : (g + 1) * D] for g in range(group)], 0)


def unstack_heads(ref, rows: slice, x: jax.Array) -> None:
    """Writes [G, C, D] into the columns of [1, rows, G * D]."""
    D = x.shape[2]
    for g in range(x.shape[0]):
        ref[0, rows, g * D : (g + 1) * D] = x[g].astype(ref.dtype)


def emit(units: list[Iterator[None]], group: int, skew: int) -> None:
    """Runs the units' stages (a stage ends at each `yield`): `group` in lockstep, each group
    `skew` stages behind the one before.
    """
    groups = [units[i : i + group] for i in range(0, len(units), group)]
    tick, running = 0, True
    while running:
        running = False
        for i in reversed(range(len(groups))):
            if tick < skew * i:
                running = True
                continue
            for unit in groups[i]:
                running |= next(unit, _DONE) is not _DONE
        tick += 1


_DONE = object()
