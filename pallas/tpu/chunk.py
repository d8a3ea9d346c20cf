"""What the forward and the backward kernel share: products, gates, masks, and the emission order.

Symbols, for one KV head. C rows to a chunk, N chunks to a grid step, G query heads to a KV head,
M slots, W window. `cat` is what a chunk reads: the `halo` rows before it (W rounded up to 16) and
its own C. Row r finds the tokens that entered the slots at cat[i], i <= r + d, and its window at
r + d < i <= r + reach, with d = halo - W: complementary, so that one product serves both. The first
`columns` rows of cat, C or C + 16, hold all that enter the slots within the chunk.

Logits and decays are in units of log 2, the hardware's exponential.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

Block = Callable[[int], jax.Array]

LOG2E = math.log2(math.e)
MASKED = -1e30  # a masked logit; finite, so that rows that see nothing stay finite
ROW_TILE = 16  # rows of a bfloat16 register
MAX_EXPONENT = 100.0  # of 2, in factors that a mask removes


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static facts of a call of the fused kernels.

    Fields:
      group: G, query heads to a KV head.
      slots: M; the arrays' slot axis may be padded beyond it.
      window: W; the tokens that the kernel's window covers.
      wide: the tokens a chunk's rows read besides their slots are the rest of those entering the
        slots during the chunk, and another kernel reads the remainder of the window.
      chunk, chunks: C and N.
      scale: of the logits, not negative.
      rope: queries and keys are rotated in the kernel, by a table.
      rotated: rotated queries and keys are given beside the others.
      feature_map, mask_empty: as the operator's options.
      segments: run numbers say who sees whom; without, every token before sees every other.
      state: the slots at the start are given, and the slots at the end are asked for.
      weight: the slot weight is asked for.
    """

    group: int
    slots: int
    window: int
    wide: bool
    chunk: int
    chunks: int
    scale: float
    rope: bool
    rotated: bool
    feature_map: str
    mask_empty: bool
    segments: bool
    state: bool
    weight: bool

    @property
    def halo(self) -> int:
        """Rows before the chunk that it reads."""
        return 0 if self.wide else -(-self.window // ROW_TILE) * ROW_TILE

    @property
    def shift(self) -> int:
        """d: how many rows later than cat's own the tokens enter the slots."""
        return 0 if self.wide else self.halo - self.window

    @property
    def reach(self) -> int:
        """The window's last column, relative to the row."""
        return self.chunk if self.wide else self.halo

    @property
    def has_window(self) -> bool:
        return self.reach > 0

    @property
    def window_scale(self) -> float:
        """What makes logits of base 2 of the window's products. With rope both factors hold the
        root of scale * log2(e)."""
        return 1.0 if self.rope else self.scale * LOG2E

    @property
    def window_slope(self) -> float:
        """The derivative of the window's (natural) logits in their products."""
        return 1 / LOG2E if self.rope else self.scale

    @property
    def width(self) -> int:
        """Rows of cat."""
        return self.halo + self.chunk

    @property
    def columns(self) -> int:
        """Rows of cat that enter the slots within the chunk."""
        return self.chunk + (ROW_TILE if self.shift else 0)

    @property
    def tables(self) -> list[str]:
        """The rotary tables: the queries' first, the keys' last."""
        if not self.rope:
            return []
        return ["table", "entering_table"] if self.wide else ["table"]

    @property
    def rows(self) -> int:
        """Rows of a grid step."""
        return self.chunk * self.chunks


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b, accumulated in float32."""
    return _dot(a, b, 1, 0)


def matmul_nt(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b.T, accumulated in float32."""
    return _dot(a, b, 1, 1)


def matmul_tn(a: jax.Array, b: jax.Array) -> jax.Array:
    """a.T @ b, accumulated in float32."""
    return _dot(a, b, 0, 0)


def _dot(a, b, contract_a, contract_b):
    exact = a.dtype == jnp.float32
    return lax.dot_general(
        a,
        b,
        (((contract_a,), (contract_b,)), ((), ())),
        precision=lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
    )


def flat(x: jax.Array) -> jax.Array:
    """[G, rows, D] -> [G * rows, D]."""
    return x.reshape(x.shape[0] * x.shape[1], x.shape[2])


def by_head(x: jax.Array, group: int) -> jax.Array:
    """[G * rows, D] -> [G, rows, D]."""
    return x.reshape(group, x.shape[0] // group, x.shape[1])


def scaled(x: jax.Array, factor: float) -> jax.Array:
    return x if factor == 1.0 else x * factor


def join(parts: list[jax.Array], axis: int) -> jax.Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)


def widen(x: jax.Array, width: int, fill: float = 0.0) -> jax.Array:
    """Columns of `fill` up to `width`."""
    missing = width - x.shape[-1]
    if not missing:
        return x
    return jnp.concatenate([x, jnp.full((*x.shape[:-1], missing), fill, x.dtype)], -1)


def overlay(
    op: Callable[..., jax.Array], a: jax.Array, b: jax.Array | None, neutral: float
) -> jax.Array:
    """op(a, b), the narrower one widened by op's neutral element, for one reduction of both."""
    if b is None:
        return a
    width = max(a.shape[-1], b.shape[-1])
    return op(widen(a, width, neutral), widen(b, width, neutral))


def apply_feature_map(x: jax.Array, name: str) -> jax.Array:
    """The slot branch's map of queries and keys, in their dtype."""
    if name == "identity":
        return x
    wide = x.astype(jnp.float32)
    mapped = jnp.maximum(wide, 0.0) if name == "relu" else wide * _sigmoid(wide)
    return mapped.astype(x.dtype)


def feature_map_pullback(gradient: jax.Array, x: jax.Array, name: str) -> jax.Array:
    """The float32 gradient at x, of the same shape, of what the feature map made of it."""
    if name == "identity":
        return gradient
    wide = x.astype(jnp.float32)
    if name == "relu":
        return jnp.where(wide > 0.0, gradient, 0.0)
    sigmoid = _sigmoid(wide)
    return gradient * (sigmoid * (1.0 + wide * (1.0 - sigmoid)))


def _sigmoid(x):
    return 1.0 / (1.0 + jnp.exp2(-x * LOG2E))


def rotate(x: jax.Array, table: jax.Array) -> jax.Array:
    """Rotate-half by a table [rows, 2 K] (`expand_table`); float32."""
    cos, sin = jnp.split(table, 2, axis=1)
    turned = pltpu.roll(x, x.shape[-1] // 2, x.ndim - 1).astype(jnp.float32)
    return x.astype(jnp.float32) * cos + turned * sin


def rotate_back(x: jax.Array, table: jax.Array) -> jax.Array:
    """The transpose of `rotate`, of float32 x."""
    cos, sin = jnp.split(table, 2, axis=1)
    return x * cos - pltpu.roll(x, x.shape[-1] // 2, x.ndim - 1) * sin


def expand_table(cos: jax.Array, sin: jax.Array) -> jax.Array:
    """[..., K / 2] each -> [..., 2 K]: for both halves, the sign of the first's sine folded in."""
    return jnp.concatenate([cos, cos, -sin, sin], axis=-1)


def cumulative_sum(x: jax.Array) -> jax.Array:
    """Inclusive, along the rows of [rows, M] float32; in log steps, as Mosaic has no cumsum."""
    rows, columns = x.shape
    step = 1
    while step < rows:
        shifted = jnp.concatenate([jnp.zeros((step, columns), x.dtype), x[:-step]], 0)
        x, step = x + shifted, 2 * step
    return x


def reverse_cumulative_sum(x: jax.Array) -> jax.Array:
    """Of each row of [rows, M] and all below it."""
    rows, columns = x.shape
    step = 1
    while step < rows:
        shifted = jnp.concatenate([x[step:], jnp.zeros((step, columns), x.dtype)], 0)
        x, step = x + shifted, 2 * step
    return x


def identity_mask(size: int) -> jax.Array:
    shape = (size, size)
    return lax.broadcasted_iota(jnp.int32, shape, 0) == lax.broadcasted_iota(jnp.int32, shape, 1)


def to_column(row: jax.Array) -> jax.Array:
    """[..., 1, n] -> [..., n, 1]."""
    eye = identity_mask(row.shape[-1])
    return jnp.sum(jnp.where(eye, row, 0.0), axis=-1, keepdims=True)


def to_row(column: jax.Array) -> jax.Array:
    """[..., n, 1] -> [..., n]."""
    return jnp.sum(jnp.where(identity_mask(column.shape[-2]), column, 0.0), axis=-2)


class Tokens:
    """A step's tokens behind the halo's: of each array, the halo's rows and the chunks' blocks."""

    def __init__(self, spec: Spec, own: dict[str, Block], halo: dict[str, jax.Array]):
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


class Gates:
    """The decays of a chunk, of tokens j to rows r, without overflow for any decay.

    A decay below the floor (8 nats a token; 16 in float32) counts as the floor: that leaves e^-8
    (e^-16) of what the slot held before. Then no sum over half a block of rows, 8 (4) tokens,
    exceeds 2^93, so that a block's weights may be taken relative to its middle:
    exp(G_r - G_j) = rise[block][r] * fall[block][j], with j up to the block's last column.
    """

    def __init__(self, decay: jax.Array, spec: Spec, dtype: jnp.dtype):
        """decay: [columns, M] float32, floored (`floor_of`)."""
        C, block = spec.chunk, block_rows(dtype)
        total = cumulative_sum(decay)  # G
        self.dtype = dtype
        self.total = total
        self.rows = total[spec.shift : spec.shift + C]  # at the rows: of the tokens up to r + d
        self.write = 1.0 - jnp.exp2(decay)  # s
        self.end = total[C - 1 : C]
        self.to_end = jnp.exp2(self.end - total[:C])
        self.blocks = [slice(r, r + block) for r in range(0, C, block)]
        extra = spec.columns - C
        self.extents = [slice(0, b.stop + extra) for b in self.blocks]
        self.middles = [self.rows[b.start + block // 2 - 1 :][:1] for b in self.blocks]
        self.clamp = extra > 0

    def rise(self, block: int) -> jax.Array:
        """[block rows, M]: exp(G_r - G_middle)."""
        return jnp.exp2(self.rows[self.blocks[block]] - self.middles[block])

    def fall(self, block: int) -> jax.Array:
        """[block columns, M]: exp(G_middle - G_j). Beyond the row's own token, finite."""
        exponent = self.middles[block] - self.total[self.extents[block]]
        return jnp.exp2(jnp.minimum(exponent, MAX_EXPONENT) if self.clamp else exponent)

    def weight(self, block: int) -> jax.Array:
        """[block columns, M], in the operands' dtype: s_j exp(G_middle - G_j)."""
        return (self.write[self.extents[block]] * self.fall(block)).astype(self.dtype)


def decay_blocks(ref, spec: Spec, dtype: jnp.dtype) -> Block:
    """Of log_decay [1, 1, M, rows]: the chunks' [C, M], floored, in units of log 2."""
    return column_blocks(
        lambda lanes: jnp.maximum(ref[0, 0, :, lanes].T * LOG2E, floor_of(dtype)), spec
    )


def column_blocks(turned: Callable[[slice], jax.Array], spec: Spec) -> Block:
    """A chunk's rows of what `turned` gives for the tile of 128 lanes that they were."""
    lanes = min(128, spec.rows)
    tile = functools.cache(lambda i: turned(slice(i * lanes, (i + 1) * lanes)))

    def block(n):
        i, row = divmod(n * spec.chunk, lanes)
        return tile(i)[row : row + spec.chunk]

    return block


def block_rows(dtype: jnp.dtype) -> int:
    """Rows whose gates share a reference."""
    return 8 if dtype == jnp.float32 else 16


def floor_of(dtype: jnp.dtype) -> float:
    """The least decay of a token, in units of log 2: its error is below the operands' own."""
    return (-16.0 if dtype == jnp.float32 else -8.0) * LOG2E


class Masks:
    """Who sees whom in a chunk; bool [C, columns or width], or None where everyone does."""

    def __init__(self, spec: Spec, facts: "Facts | None"):
        shape = (spec.chunk, spec.width)
        row, column = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        self.slots = column <= row + spec.shift
        self.window = ~self.slots
        if not spec.wide:
            self.window &= column <= row + spec.reach
        if facts is not None:
            same = facts.same()
            self.slots &= same
            self.window &= same
        self.causal = self.slots[:, : spec.columns]


class Facts:
    """What a chunk must know of segments, from `pack_facts` and `pack_visible`."""

    def __init__(self, tokens: Tokens, visible: jax.Array, n: int, spec: Spec):
        """visible: [1, 256 + width] of the chunk."""
        self.spec = spec
        self.run, self.entering = tokens.block("run", n), tokens.block("entering", n)
        self.carried_run, self.end_run = visible[:, :128], visible[:, 128:256]  # all lanes alike
        self.visible = visible[:, 256:]
        if spec.mask_empty:
            self.enters = tokens.block("enters", n) > 0.0  # [C, 128]

    def same(self) -> jax.Array:
        """[C, width]: cat's tokens of the row's segment."""
        return spread(self.run, self.spec.width) == self.visible

    def carried(self, x: jax.Array) -> jax.Array:
        """x [C, M] in the rows that are of the segment of the slots at the chunk's start."""
        return jnp.where((self.run == self.carried_run)[:, : x.shape[1]], x, 0.0)

    def written(self, x: jax.Array) -> jax.Array:
        """x [C, M] in the rows of cat whose segment the slots are of at the chunk's end."""
        return jnp.where((self.entering == self.end_run)[:, : x.shape[1]], x, 0.0)

    def kept(self, x: jax.Array) -> jax.Array:
        """x [1, M] if the slots at the chunk's start are of the segment of those at its end."""
        return jnp.where((self.carried_run == self.end_run)[:, : x.shape[1]], x, 0.0)


def spread(x: jax.Array, width: int) -> jax.Array:
    """[C, 128], all lanes alike, -> [C, width]."""
    return join([x] * -(-width // x.shape[1]), 1)[:, :width]


def pack_facts(*, run: jax.Array, entering: jax.Array, enters: jax.Array) -> jax.Array:
    """What is known of each row, [B, T] each -> [B, 8, T] float32, in digits of base 256.

    run: the number, from 0 to 2^24, of the row's own segment. entering: of what is in the slots
    once row r of cat has entered. enters: the slots hold a token of the row's segment.
    """
    digits = [(x >> shift) & 255 for x in (run, entering) for shift in (0, 8, 16)]
    facts = jnp.stack([*digits, enters, jnp.zeros_like(run)], axis=1)
    return facts.astype(jnp.float32)


def pack_visible(visible: jax.Array, carried: jax.Array, end: jax.Array) -> jax.Array:
    """What is known of each chunk, [B, T / C, width] and twice [B, T / C], -> [., 256 + width].

    visible: the numbers of the segments of cat's tokens. carried, end: of the slots at the chunk's
    start and end; the kernel wants them in every lane.
    """
    spread = [jnp.repeat(x[..., None], 128, axis=-1) for x in (carried, end)]
    return jnp.concatenate([*spread, visible], axis=-1).astype(jnp.float32)


def facts_blocks(ref, spec: Spec) -> dict[str, Block]:
    """Of facts [1, 8, rows]: for each, the chunks' [C, 128], all lanes alike.

    The matrix unit turns the digits' rows to columns, spreads them over the lanes and adds them up,
    exactly; it has the time, and lanes are slow to talk to each other.
    """
    names = ["run", "entering"] + ["enters"] * spec.mask_empty
    weights = join([_digit_weights(i) for i in range(len(names))], 1)
    tiles = column_blocks(
        lambda lanes: matmul_tn(ref[0, :, lanes].astype(jnp.bfloat16), weights), spec
    )

    def fact(i):
        return lambda n: tiles(n)[:, i * 128 : (i + 1) * 128]

    return {name: fact(i) for i, name in enumerate(names)}


def _digit_weights(fact: int) -> jax.Array:
    """[8, 128]: what the rows of `pack_facts` count for its fact 0, 1 or 2."""
    row = lax.broadcasted_iota(jnp.int32, (8, 128), 0)
    digits = {0: (0, 1, 2), 1: (3, 4, 5), 2: (6,)}[fact]
    weights = jnp.zeros((8, 128), jnp.float32)
    for power, digit in enumerate(digits):
        weights = jnp.where(row == digit, 256.0**power, weights)
    return weights.astype(jnp.bfloat16)


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
