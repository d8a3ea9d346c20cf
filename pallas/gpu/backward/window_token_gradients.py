"""The gradients of the window's keys and values.

With the symbols of `window_query_gradients.py`, and sums over the rows, of all G query heads, that
see token j:

    dv_j = sum_r p_rj do_r
    dk_j = scale * sum_r ds_rj q_r

A thread block has 64 tokens of one KV head: two warpgroups walk the chunks of rows that see them,
with tokens down and rows across, so that what they have in registers needs no transposing. One
finds p and dv, and leaves p in shared memory for the other, which finds ds and dk: two products
each, none of them twice, and a sum of 64 rows of D in registers. Each fetches what its own sum
reads last, a chunk's output gradients or queries, which the other has read some time before.

If the kernel rotates, dv's warpgroup rotates the keys, which only it reads, once. The other has
no exponentials to find, and rotates the queries, ahead of its sum, and dk back.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.gpu.backward.window_query_gradients import window_inputs
from pallas.gpu.block_sizes import BlockSizes
from pallas.gpu.spec import CHUNK, COLUMN, LOG2E, LOGITS, CallSpec, Segments, tile
from pallas.gpu.warpgroup.addresses import ZERO, OpaqueZero
from pallas.gpu.warpgroup.chunk_index import TokenIndex
from pallas.gpu.warpgroup.launch import Refs, check_shared_memory, launch
from pallas.gpu.warpgroup.masks import by_column, in_window, iota, same_segment
from pallas.gpu.warpgroup.matmul import Matmul
from pallas.gpu.warpgroup.rotation import Rotation, arrival, halves_tile, rotate, rotate_copied


class WindowTokenGradients(NamedTuple):
    """Gradients, [B, Tk, Hkv, D] bfloat16."""

    window_key: jax.Array
    value: jax.Array


def window_token_gradients(
    window_query: jax.Array,
    window_key: jax.Array,
    value: jax.Array,
    d_out: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    segments: Segments | None,
    rotation: Rotation | None,
    *,
    spec: CallSpec,
    block_sizes: BlockSizes,
    interpret: Any = False,
) -> WindowTokenGradients:
    """The kernel's call; arguments as for `window_query_gradients`."""
    Tq, D = window_query.shape[1], window_query.shape[3]
    B, Tk, Hkv, _ = value.shape
    grad = jax.ShapeDtypeStruct((B, Tk, Hkv, D), jnp.bfloat16)
    modes = {"rotates": rotation is not None, "interpret": bool(interpret)}
    grads = launch(
        functools.partial(_kernel, spec=spec, chunks=Tq // CHUNK, interpret=bool(interpret)),
        window_inputs(window_query, window_key, value, d_out, lse, delta, segments, rotation),
        {"d_key": grad, "d_value": grad},
        _scratch(spec, block_sizes.window_stages, D, **modes),
        grid={"block": Tk // CHUNK, "head": Hkv, "batch": B},
        warpgroups=2,
        name="nha_window_tokens",
        interpret=interpret,
    )
    return WindowTokenGradients(*grads)


def _scratch(spec: CallSpec, stages: int, D: int, *, rotates: bool, interpret: bool) -> Refs:
    narrow, wide = jnp.bfloat16, jnp.float32
    tiles = tile(D)
    turned = halves_tile(D, _columns(D)) if rotates else tiles
    scratch = {
        "window_key": plgpu.SMEM((CHUNK, D), narrow, transforms=turned),
        "value": plgpu.SMEM((1, CHUNK, D), narrow, transforms=tiles),
        "window_query": plgpu.SMEM((stages, CHUNK, D), narrow, transforms=turned),  # then dk
        "d_out": plgpu.SMEM((stages, CHUNK, D), narrow, transforms=tiles),  # then dv
        "lse": plgpu.SMEM((stages, CHUNK), wide),
        "delta": plgpu.SMEM((stages, CHUNK), wide),
        "p": plgpu.SMEM((CHUNK, CHUNK), wide, transforms=tile(CHUNK, 4)),  # of tokens and rows
        "zero": ZERO,
        "key_loaded": plgpu.Barrier(num_arrivals=1 + spec.masked),
        "value_loaded": plgpu.Barrier(),
        "queries_loaded": plgpu.Barrier(num_arrivals=2 + spec.masked, num_barriers=stages),
        "d_outs_loaded": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "queries_read": plgpu.Barrier(num_barriers=stages),  # by dv's warpgroup
        "d_outs_read": plgpu.Barrier(num_barriers=stages),  # by dk's
        "p_ready": plgpu.Barrier(),
        "p_read": plgpu.Barrier(),
    }
    if rotates:
        scratch["window_query_copied"] = plgpu.Barrier(num_barriers=stages)
    if spec.masked:
        scratch["query_segment"] = plgpu.SMEM((stages, CHUNK), jnp.int32)
        scratch["token_segment"] = plgpu.SMEM((CHUNK,), jnp.int32)
    check_shared_memory(scratch, "window_stages", stages)
    if interpret:
        scratch["buffer"] = plgpu.SMEM((2, CHUNK, CHUNK), narrow)
    return scratch


def _columns(D: int) -> int:
    """Of half a head, rotated at a time: so few that the largest heads' sums fit registers beside
    them, and the smallest heads' registers a multiprocessor twice.
    """
    return min(D // 4, 32)


def _kernel(refs: Refs, shared: Refs, *, spec: CallSpec, chunks: int, interpret: bool) -> None:
    me = lax.axis_index("wg")
    matmul = Matmul(interpret, shared["buffer"].at[me] if interpret else None)
    index = TokenIndex(spec, chunks)
    for i, worker in enumerate((_ValueGrad, _KeyGrad)):
        pl.when(me == i)(worker(refs, shared, index, spec, matmul).run)


class _Worker:
    """A warpgroup, with a sum [C, D] over the items in registers.

    Attributes:
      ROWS: whose barriers say that what it fetches of an item's rows is loaded, and that the other
        warpgroup has read it.
      PLACE: the largest of that, whose place its sum takes when all items are read.
      GRAD: the sum, among the outputs.
    """

    ROWS: str
    PLACE: str
    GRAD: str

    def __init__(self, refs: Refs, shared: Refs, index: TokenIndex, spec: CallSpec, matmul: Matmul):
        self.refs, self.shared, self.index, self.spec = refs, shared, index, spec
        self.matmul = matmul
        self.stages, _, D = shared["window_query"].shape
        self.columns = _columns(D)
        self.zero = OpaqueZero(shared["zero"])
        self.square, self.sum_shape = (CHUNK, CHUNK), (CHUNK, D)  # [tokens, rows], [tokens, D]

    def run(self) -> None:
        self._fetch_tokens()
        for stage in range(self.stages):
            fetch = functools.partial(self._fetch, jnp.int32(stage), stage)
            pl.when(stage < self.index.items)(fetch)
        zeros = plgpu.layout_cast(jnp.zeros(self.sum_shape, jnp.float32), LOGITS)
        total = self._walk(zeros)
        result, target = self.shared[self.PLACE].at[0], self._of_tokens(self.GRAD)
        plgpu.commit_smem()  # all warps have read the last item
        result[...] = total.astype(jnp.bfloat16)
        if self.PLACE + "_copied" in self.shared:  # a sum of rotated rows
            self._rotate_tokens(result, back=True)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(result, target)
        plgpu.wait_smem_to_gmem(0)

    def _fetch_tokens(self) -> None:
        raise NotImplementedError

    def _rows(self, head, rows) -> Refs:
        """What it fetches of an item, by name."""
        raise NotImplementedError

    def _walk(self, total: jax.Array) -> jax.Array:
        return lax.fori_loop(0, self.index.items, self._step, total)

    def _add(self, item, stage, total: jax.Array) -> jax.Array:
        """The sum with one more item."""
        raise NotImplementedError

    def _step(self, item, total: jax.Array) -> jax.Array:
        stage = lax.rem(item, jnp.int32(self.stages))
        total = self._add(item, stage, total)
        plgpu.barrier_wait(self.shared[self.ROWS + "_read"].at[stage])
        plgpu.commit_smem()  # all warps have multiplied, before a copy touches the operand
        more = item + self.stages < self.index.items
        pl.when(more)(lambda: self._fetch(item + self.stages, stage))
        return total

    def _fetch(self, item, stage) -> None:
        head, chunk = self.index.head_and_chunk(item)
        loaded = self.shared[self.ROWS + "_loaded"]
        for name, source in self._rows(head, pl.ds(chunk * CHUNK, CHUNK)).items():
            copied = arrival(self.shared, name, loaded).at[stage]
            plgpu.copy_gmem_to_smem(source, self.shared[name].at[stage], copied)

    def _rotate_tokens(self, x: Any, *, back: bool = False) -> None:
        where = self.index.batch, self.index.tokens
        rotate(x, self.refs, *where, columns=self.columns, back=back)

    def _of_tokens(self, name: str):
        return self.refs[name].at[self.index.batch, self.index.tokens, self.index.head]


class _ValueGrad(_Worker):
    """Finds p, and dv."""

    ROWS = "d_outs"
    PLACE, GRAD = "d_out", "d_value"

    def _fetch_tokens(self) -> None:
        loaded = self.shared["value_loaded"]
        plgpu.copy_gmem_to_smem(self._of_tokens("value"), self.shared["value"].at[0], loaded)

    def _rows(self, head, rows) -> Refs:
        refs, b = self.refs, self.index.batch
        return {
            "d_out": refs["d_out"].at[b, rows, head],
            "delta": refs["delta"].at[b, head, rows],
        }

    def _walk(self, total: jax.Array) -> jax.Array:
        plgpu.barrier_wait(self.shared["key_loaded"])
        if "cos" in self.refs:
            self._rotate_tokens(self.shared["window_key"])
            plgpu.commit_smem()
        total = super()._walk(total)
        plgpu.barrier_wait(self.shared["p_read"])  # every completion must be waited for
        return total

    def _add(self, item, stage, total: jax.Array) -> jax.Array:
        shared = self.shared
        plgpu.barrier_wait(shared["queries_loaded"].at[stage])
        b = self.matmul(
            lambda: [(shared["window_key"], shared["window_query"].at[stage].T)], self.square
        )
        seen = self._seen(item, stage)
        lse = plgpu.load(shared["lse"].at[stage], layout=COLUMN) * LOG2E
        plgpu.barrier_arrive(shared["queries_read"].at[stage])
        exponent = b * (self.spec.scale * LOG2E) - by_column(lse)
        p = jnp.exp2(jnp.where(seen, exponent, -jnp.inf))
        plgpu.barrier_wait(shared["p_read"])  # the item before
        shared["p"][...] = p
        plgpu.barrier_arrive(shared["p_ready"])
        plgpu.barrier_wait(shared["d_outs_loaded"].at[stage])
        return self.matmul(
            lambda: [(p.astype(jnp.bfloat16), shared["d_out"].at[stage])], self.sum_shape, total
        )

    def _seen(self, item, stage) -> jax.Array:
        """[tokens, rows]."""
        _, chunk = self.index.head_and_chunk(item)
        row = iota(CHUNK, 1) + chunk * CHUNK
        seen = in_window(self.spec, row, iota(CHUNK, 0) + self.index.first_token)
        if self.spec.masked:
            query_segment = self.shared["query_segment"].at[stage]
            seen &= same_segment(self.shared["token_segment"], query_segment)
        return seen


class _KeyGrad(_Worker):
    """Finds ds, and dk."""

    ROWS = "queries"
    PLACE, GRAD = "window_query", "d_key"

    def _fetch_tokens(self) -> None:
        shared, index = self.shared, self.index
        loaded = shared["key_loaded"]
        plgpu.copy_gmem_to_smem(self._of_tokens("window_key"), shared["window_key"], loaded)
        if self.spec.masked:
            token_segment = self.refs["token_segment"].at[index.batch, index.tokens]
            plgpu.copy_gmem_to_smem(token_segment, shared["token_segment"], loaded)

    def _rows(self, head, rows) -> Refs:
        refs, b = self.refs, self.index.batch
        sources = {"window_query": refs["window_query"].at[b, rows, head]}
        sources |= {"lse": refs["lse"].at[b, head, rows]}
        if self.spec.masked:
            sources["query_segment"] = refs["query_segment"].at[b, rows]
        return sources

    def _walk(self, total: jax.Array) -> jax.Array:
        for item in range(self.lead):
            self._rotate_queries(jnp.int32(item))
        self.zero.store()
        plgpu.barrier_wait(self.shared["value_loaded"])
        plgpu.barrier_arrive(self.shared["p_read"])  # its place is free
        return super()._walk(total)

    def _add(self, item, stage, total: jax.Array) -> jax.Array:
        shared, scale = self.shared, self.spec.scale
        plgpu.barrier_wait(shared["d_outs_loaded"].at[stage])
        zero = self.zero.renew()
        dp = self.matmul(
            lambda: [(shared["value"].at[zero], shared["d_out"].at[stage].T)], self.square
        )
        delta = plgpu.load(shared["delta"].at[stage], layout=COLUMN)
        plgpu.barrier_arrive(shared["d_outs_read"].at[stage])
        plgpu.barrier_wait(shared["p_ready"])
        p = plgpu.load(shared["p"], layout=LOGITS)
        plgpu.barrier_arrive(shared["p_read"])
        ds = p * (dp * scale - by_column(delta * scale))
        plgpu.barrier_wait(shared["queries_loaded"].at[stage])
        return self.matmul(
            lambda: [(ds.astype(jnp.bfloat16), shared["window_query"].at[stage])],
            self.sum_shape,
            total,
        )

    def _step(self, item, total: jax.Array) -> jax.Array:
        total = super()._step(item, total)
        self._rotate_queries(item + self.lead)
        return total

    @property
    def lead(self) -> int:
        """Items from the sum to what is rotated; the copies since may still be under way."""
        return max(self.stages - 1, 1)

    def _rotate_queries(self, item) -> None:
        stage = lax.rem(item, jnp.int32(self.stages))

        @pl.when(item < self.index.items)
        def _():
            x = self.refs, self.shared, "window_query", stage
            where, loaded = self.index.positions(item), self.shared["queries_loaded"]
            rotate_copied(*x, self.index.batch, where, loaded, columns=self.columns)
