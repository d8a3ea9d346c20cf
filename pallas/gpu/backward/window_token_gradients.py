"""The gradients of the window's keys and values.

With the formulas of `window_query_gradients.py` for p and ds, and sums over the rows r that see
token j, of all query heads of its KV head:

    dv_j = sum_r p_rj do_r
    dk_j = scale * sum_r ds_rj q_r

Inputs: those of `window_query_gradients.py`.
Outputs:
  d_key, d_value  [B, Tk, Hkv, D] bfloat16; with cos and sin d_key is rotated back

Warpgroups of a thread block, which has C tokens of one KV head. Both walk the chunks of rows that
see them, of one query head after the other: a chunk of a head is an item. Products have tokens down
and rows across, so that what is in registers needs no transposing, and each warpgroup has two an
item and a sum [C, D] in registers:
  0, value  rotates the keys, once; finds p, which it leaves in shared memory, and dv
  1, key    rotates the queries, ahead of its sum; finds ds and dk, and rotates dk back
Each fetches what its own sum multiplies last, an item's output gradients or queries, which the
other has read some time before.

| barrier                    | arrivals (number)                  | waits | how often              |
| -------------------------- | ---------------------------------- | ----- | ---------------------- |
| key_loaded                 | the copies of the keys and, with   | value | once                   |
|                            | spec.masked, token_segment (1/2)   |       |                        |
| value_loaded               | the copy of the values (1)         | key   | once                   |
| window_query_copied[stage] | the copy of the queries (1)        | key   | once an item, with cos |
| queries_loaded[stage]      | the copies of queries and lse;     | both  | once an item           |
|                            | with cos key, having rotated, for  |       |                        |
|                            | the queries'; with spec.masked of  |       |                        |
|                            | query_segment (2/3)                |       |                        |
| queries_read[stage]        | value, having read them (1)        | key   | once an item           |
| d_outs_loaded[stage]       | the copies of do and delta (2)     | both  | once an item           |
| d_outs_read[stage]         | key, having read them (1)          | value | once an item           |
| p_read                     | key, when p may be written: before | value | once an item, and once |
|                            | the first item and after each (1)  |       | at the end             |
| p_ready                    | value, having written p (1)        | key   | once an item           |
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.gpu.block_sizes import BlockSizes
from pallas.gpu.spec import CHUNK, COLUMN, LOG2E, LOGITS, CallSpec, tile
from pallas.gpu.warpgroup.addresses import ZERO, OpaqueZero
from pallas.gpu.warpgroup.chunk_index import TokenIndex
from pallas.gpu.warpgroup.launch import Refs, check_shared_memory, launch
from pallas.gpu.warpgroup.masks import by_column, in_window, iota, same_segment
from pallas.gpu.warpgroup.matmul import Matmul
from pallas.gpu.warpgroup.rotation import arrival, halves_tile, rotate, rotate_copied


class WindowTokenGradients(NamedTuple):
    """The launch's outputs, as above."""

    key: jax.Array
    value: jax.Array


def window_token_gradients(
    inputs: dict[str, jax.Array],
    *,
    spec: CallSpec,
    block_sizes: BlockSizes,
    interpret: Any = False,
) -> WindowTokenGradients:
    """The gradients of window_key and value, of `inputs` named and shaped as above.

    Raises:
      ValueError: block_sizes.window_stages items of such heads do not fit shared memory.
    """
    Tq, D = inputs["window_query"].shape[1], inputs["window_query"].shape[3]
    B, Tk, Hkv, _ = inputs["value"].shape
    grad = jax.ShapeDtypeStruct((B, Tk, Hkv, D), jnp.bfloat16)
    modes = {"rotates": "cos" in inputs, "interpret": bool(interpret)}
    grads = launch(
        functools.partial(_kernel, spec=spec, chunks=Tq // CHUNK, interpret=bool(interpret)),
        inputs,
        {"d_key": grad, "d_value": grad},
        _scratch(spec, block_sizes.window_stages, D, **modes),
        grid={"block": Tk // CHUNK, "head": Hkv, "batch": B},
        warpgroups=2,
        name="nha_window_tokens",
        interpret=interpret,
    )
    return WindowTokenGradients(*grads)


def _scratch(spec: CallSpec, stages: int, D: int, *, rotates: bool, interpret: bool) -> Refs:
    """Shared memory and barriers; see the table above."""
    narrow, wide = jnp.bfloat16, jnp.float32
    tiles = tile(D)
    rotated = halves_tile(D, _rotated_columns(D)) if rotates else tiles
    scratch = {
        "window_key": plgpu.SMEM((CHUNK, D), narrow, transforms=rotated),
        "value": plgpu.SMEM((1, CHUNK, D), narrow, transforms=tiles),
        "window_query": plgpu.SMEM((stages, CHUNK, D), narrow, transforms=rotated),  # then dk
        "d_out": plgpu.SMEM((stages, CHUNK, D), narrow, transforms=tiles),  # then dv
        "lse": plgpu.SMEM((stages, CHUNK), wide),
        "delta": plgpu.SMEM((stages, CHUNK), wide),
        "p": plgpu.SMEM((CHUNK, CHUNK), wide, transforms=tile(CHUNK, 4)),  # of tokens and rows
        "zero": ZERO,
        "key_loaded": plgpu.Barrier(num_arrivals=1 + spec.masked),
        "value_loaded": plgpu.Barrier(),
        "queries_loaded": plgpu.Barrier(num_arrivals=2 + spec.masked, num_barriers=stages),
        "d_outs_loaded": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "queries_read": plgpu.Barrier(num_barriers=stages),
        "d_outs_read": plgpu.Barrier(num_barriers=stages),
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


def _rotated_columns(D: int) -> int:
    """The columns of half a head that are rotated at a time.

    So few that with the largest heads they fit registers beside the sum, and that with the smallest
    two blocks fit a multiprocessor's registers.
    """
    return min(D // 4, 32)


def _kernel(refs: Refs, shared: Refs, *, spec: CallSpec, chunks: int, interpret: bool) -> None:
    me = lax.axis_index("wg")
    matmul = Matmul(interpret, shared["buffer"].at[me] if interpret else None)
    block = _TokenBlock(refs, shared, TokenIndex(spec, chunks))
    pl.when(me == 0)(_ValueWarpgroup(block, matmul, spec).run)
    pl.when(me == 1)(_KeyWarpgroup(block, matmul, spec).run)


class _TokenBlock:
    """What both warpgroups of a thread block do to its arrays: copies and rotations.

    Attributes:
      refs, shared: arrays and barriers, by name.
      index: the block's tokens, and the items.
      stages: items in flight.
      sum_shape: of dk and dv.
    """

    def __init__(self, refs: Refs, shared: Refs, index: TokenIndex):
        self.refs, self.shared, self.index = refs, shared, index
        self.stages, _, D = shared["window_query"].shape
        self.sum_shape = CHUNK, D
        self._columns = _rotated_columns(D)

    def zeros(self) -> jax.Array:
        return plgpu.layout_cast(jnp.zeros(self.sum_shape, jnp.float32), LOGITS)

    def stage(self, item):
        return lax.rem(item, jnp.int32(self.stages))

    def of_tokens(self, name: str) -> Any:
        """The block's tokens in the named array in the device's memory."""
        return self.refs[name].at[self.index.batch, self.index.tokens, self.index.head]

    def rows_of(self, item) -> tuple[Any, Any]:
        """An item's query head, and its slice of the query rows."""
        head, chunk = self.index.head_and_chunk(item)
        return head, pl.ds(chunk * CHUNK, CHUNK)

    def fetch_first(self, fetch: Callable[[Any, Any], None]) -> None:
        """Calls fetch(item, stage) for the first items."""
        for stage in range(self.stages):
            pl.when(stage < self.index.items)(functools.partial(fetch, jnp.int32(stage), stage))

    def fetch_next(self, fetch: Callable[[Any, Any], None], item, stage, read: str) -> None:
        """Calls fetch for the item that takes an item's place, once both have read that.

        read: the barriers at which the other warpgroup arrives.
        """
        plgpu.barrier_wait(self.shared[read].at[stage])
        plgpu.commit_smem()  # all warps have multiplied, before a copy touches the operand
        more = item + self.stages < self.index.items
        pl.when(more)(lambda: fetch(item + self.stages, stage))

    def rotate_tokens(self, x: Any, *, back: bool = False) -> None:
        """Rotates the block's keys, or their gradient back."""
        index = self.index
        rotate(x, self.refs, index.batch, index.tokens, columns=self._columns, back=back)

    def rotate_queries(self, item) -> None:
        """Rotates an item's queries, if there is such an item, and arrives at queries_loaded."""
        index, shared, stage = self.index, self.shared, self.stage(item)

        @pl.when(item < index.items)
        def _():
            queries = self.refs, shared, "window_query", stage
            where = index.batch, index.positions(item)
            rotate_copied(*queries, *where, shared["queries_loaded"], columns=self._columns)

    def store(self, place: Any, target: Any) -> None:
        """Copies a gradient from its place in shared memory."""
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(place, target)
        plgpu.wait_smem_to_gmem(0)


class _ValueWarpgroup:
    """Finds p, and dv."""

    def __init__(self, block: _TokenBlock, matmul: Matmul, spec: CallSpec):
        self.block, self.matmul, self.spec = block, matmul, spec
        self.refs, self.shared, self.index = block.refs, block.shared, block.index

    def run(self) -> None:
        block, shared = self.block, self.shared
        value = block.of_tokens("value")
        plgpu.copy_gmem_to_smem(value, shared["value"].at[0], shared["value_loaded"])
        block.fetch_first(self._fetch)
        zeros = block.zeros()
        plgpu.barrier_wait(shared["key_loaded"])
        if "cos" in self.refs:
            block.rotate_tokens(shared["window_key"])
            plgpu.commit_smem()
        total = lax.fori_loop(0, self.index.items, self._add_item, zeros)
        plgpu.barrier_wait(shared["p_read"])  # every completion must be waited for
        plgpu.commit_smem()  # all warps have read the last item, whose place dv takes
        d_value = shared["d_out"].at[0]
        d_value[...] = total.astype(jnp.bfloat16)
        block.store(d_value, block.of_tokens("d_value"))

    def _fetch(self, item, stage) -> None:
        """Copies an item's output gradients and deltas."""
        refs, shared, b = self.refs, self.shared, self.index.batch
        head, rows = self.block.rows_of(item)
        sources = {
            "d_out": refs["d_out"].at[b, rows, head],
            "delta": refs["delta"].at[b, head, rows],
        }
        for name, source in sources.items():
            loaded = shared["d_outs_loaded"].at[stage]
            plgpu.copy_gmem_to_smem(source, shared[name].at[stage], loaded)

    def _add_item(self, item, total: jax.Array) -> jax.Array:
        """total, which is dv in the end, with one more item."""
        shared, stage = self.shared, self.block.stage(item)
        plgpu.barrier_wait(shared["queries_loaded"].at[stage])
        b = self.matmul(
            lambda: [(shared["window_key"], shared["window_query"].at[stage].T)], (CHUNK, CHUNK)
        )
        seen = self._seen(item, stage)
        lse = plgpu.load(shared["lse"].at[stage], layout=COLUMN) * LOG2E
        plgpu.barrier_arrive(shared["queries_read"].at[stage])
        exponent = b * (self.spec.scale * LOG2E) - by_column(lse)
        p = jnp.exp2(jnp.where(seen, exponent, -jnp.inf))
        plgpu.barrier_wait(shared["p_read"])  # that of the item before
        shared["p"][...] = p
        plgpu.barrier_arrive(shared["p_ready"])
        plgpu.barrier_wait(shared["d_outs_loaded"].at[stage])
        total = self.matmul(
            lambda: [(p.astype(jnp.bfloat16), shared["d_out"].at[stage])],
            self.block.sum_shape,
            total,
        )
        self.block.fetch_next(self._fetch, item, stage, "d_outs_read")
        return total

    def _seen(self, item, stage) -> jax.Array:
        """[tokens, rows], whether a row sees a token."""
        _, chunk = self.index.head_and_chunk(item)
        row = iota(CHUNK, 1) + chunk * CHUNK
        seen = in_window(self.spec, row, iota(CHUNK, 0) + self.index.first_token)
        if self.spec.masked:
            query_segment = self.shared["query_segment"].at[stage]
            seen &= same_segment(self.shared["token_segment"], query_segment)
        return seen


class _KeyWarpgroup:
    """Finds ds, and dk."""

    def __init__(self, block: _TokenBlock, matmul: Matmul, spec: CallSpec):
        self.block, self.matmul, self.spec = block, matmul, spec
        self.refs, self.shared, self.index = block.refs, block.shared, block.index
        self.zero = OpaqueZero(block.shared["zero"])
        # Items from the sum to what is rotated; the copies of those since may be under way.
        self.lead = max(block.stages - 1, 1)

    def run(self) -> None:
        block, shared = self.block, self.shared
        self._fetch_keys()
        block.fetch_first(self._fetch)
        zeros = block.zeros()
        for item in range(self.lead):
            block.rotate_queries(jnp.int32(item))
        self.zero.store()
        plgpu.barrier_wait(shared["value_loaded"])
        plgpu.barrier_arrive(shared["p_read"])  # the place of p is free
        total = lax.fori_loop(0, self.index.items, self._add_item, zeros)
        plgpu.commit_smem()  # all warps have read the last item, whose place dk takes
        d_key = shared["window_query"].at[0]
        d_key[...] = total.astype(jnp.bfloat16)
        if "cos" in self.refs:
            block.rotate_tokens(d_key, back=True)
        block.store(d_key, block.of_tokens("d_key"))

    def _fetch_keys(self) -> None:
        """Copies the block's keys, which the other warpgroup reads, and their segments."""
        shared, index, loaded = self.shared, self.index, self.shared["key_loaded"]
        key = self.block.of_tokens("window_key")
        plgpu.copy_gmem_to_smem(key, shared["window_key"], loaded)
        if self.spec.masked:
            token_segment = self.refs["token_segment"].at[index.batch, index.tokens]
            plgpu.copy_gmem_to_smem(token_segment, shared["token_segment"], loaded)

    def _fetch(self, item, stage) -> None:
        """Copies an item's queries, lse and segments."""
        refs, shared, b = self.refs, self.shared, self.index.batch
        head, rows = self.block.rows_of(item)
        sources = {
            "window_query": refs["window_query"].at[b, rows, head],
            "lse": refs["lse"].at[b, head, rows],
        }
        if self.spec.masked:
            sources["query_segment"] = refs["query_segment"].at[b, rows]
        for name, source in sources.items():
            loaded = arrival(shared, name, shared["queries_loaded"]).at[stage]
            plgpu.copy_gmem_to_smem(source, shared[name].at[stage], loaded)

    def _add_item(self, item, total: jax.Array) -> jax.Array:
        """total, which is dk in the end, with one more item; rotates queries of a later one."""
        shared, scale, stage = self.shared, self.spec.scale, self.block.stage(item)
        plgpu.barrier_wait(shared["d_outs_loaded"].at[stage])
        zero = self.zero.renew()
        dp = self.matmul(
            lambda: [(shared["value"].at[zero], shared["d_out"].at[stage].T)], (CHUNK, CHUNK)
        )
        delta = plgpu.load(shared["delta"].at[stage], layout=COLUMN)
        plgpu.barrier_arrive(shared["d_outs_read"].at[stage])
        plgpu.barrier_wait(shared["p_ready"])
        p = plgpu.load(shared["p"], layout=LOGITS)
        plgpu.barrier_arrive(shared["p_read"])
        ds = p * (dp * scale - by_column(delta * scale))
        plgpu.barrier_wait(shared["queries_loaded"].at[stage])
        total = self.matmul(
            lambda: [(ds.astype(jnp.bfloat16), shared["window_query"].at[stage])],
            self.block.sum_shape,
            total,
        )
        self.block.fetch_next(self._fetch, item, stage, "queries_read")
        self.block.rotate_queries(item + self.lead)
        return total
