"""The gates that other kernels read: sums of the log decays in chunks, exponentiated.

With x the log decays of a chunk's C rows and of a slot, s = 1 - exp(x), at row r

    c_r = sum_{j <= r} max(x_j, FLOOR)
    to_end_r = s_r exp(sum_{j > r} x_j),  total = exp(sum_j x_j)

Only sums of decays are ever exponentiated, so that none overflows and -inf is exact. But the
kernels need differences of c, between rows up to 8 tokens away from a reference: for c alone a
decay below -8 nats counts as -8, which leaves e^-8 of what the slot held before the token, for the
rest of its chunk. to_end and total know no floor, so nothing of it reaches the next chunk. They do
know VANISHED, for an infinite summand is no product's operand: exp(VANISHED) is 0 in float32, and
so is every sum's that it is part of.

Inputs:
  log_decay          [B, Tq, Hkv, M] float32
  token_reaches_end  [B, Tq] int32, start_reaches_end [B, Tq / C] int32: with segments
Outputs: of `EndGates` for the forward, of `Gates` for the backward. The output's kernel makes its
own c of log_decay.

A thread block has up to 32 slots of a chunk: with more, its registers would let fewer blocks share
a multiprocessor. It reads log_decay once and writes each result once. One warpgroup does all.

| barrier | arrivals (number)                              | waits         | how often |
| ------- | ---------------------------------------------- | ------------- | --------- |
| loaded  | copies of log_decay and, with segments,        | the warpgroup | once      |
|         | token_reaches_end (1 or 2)                     |               |           |
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.gpu.spec import CHUNK, COLUMN, LOG2E, LOGITS, ROW, tile
from pallas.gpu.warpgroup.chunk_index import entering_rows
from pallas.gpu.warpgroup.decays import FLOOR, LEAST_WRITE, write_of
from pallas.gpu.warpgroup.launch import Refs, launch
from pallas.gpu.warpgroup.masks import by_row, iota
from pallas.gpu.warpgroup.matmul import Matmul
from pallas.gpu.warpgroup.row_sums import PARTS, store_parts, store_zeros, sum_rows

VANISHED = -200.0  # nats
BLOCK_SLOTS = 32  # of a thread block, at most


class EndGates(NamedTuple):
    """What the states are made with, of Tq rows in chunks of C."""

    to_end: jax.Array  # [B, Tq, Hkv, M] bfloat16, s times the decay from the row to its chunk's end
    total: jax.Array  # [B, Hkv, Tq / C, M] float32, the decay over a chunk


class Gates(NamedTuple):
    """What the backward reads. In to_end and odds s is at least LEAST_WRITE."""

    cumulative: jax.Array  # [B, Tq, Hkv, M] float32, c, in units of log 2
    write: jax.Array  # [B, Tq, Hkv, M] bfloat16, s
    to_end: jax.Array  # as of EndGates
    total: jax.Array
    odds: jax.Array  # [B, Tq, Hkv, M] bfloat16, exp(log_decay) / s


def end_gates(
    log_decay: jax.Array,
    token_reaches_end: jax.Array | None,
    start_reaches_end: jax.Array | None,
    *,
    ahead: int,
    interpret: Any = False,
) -> EndGates:
    """The forward's gates.

    Args:
      log_decay: [B, Tq, Hkv, M] float32, in [-inf, 0]; C divides Tq.
      token_reaches_end: [B, Tq] bool, the row's token is in the slots at its chunk's end; None:
        all are.
      start_reaches_end: [B, Tq / C] bool, the slots at the chunk's end may hold what they held at
        its start; None: all may.
      ahead: `CallSpec.ahead`. Row r of log_decay is row r + ahead of what is returned; the first
        `ahead` are of log decay 0.
      interpret: as for `launch`.
    """
    outputs = _outputs(log_decay.shape, EndGates._fields)
    reach = token_reaches_end, start_reaches_end
    return EndGates(*_launch(log_decay, *reach, ahead, outputs, interpret))


def chunk_gates(
    log_decay: jax.Array,
    token_reaches_end: jax.Array | None,
    start_reaches_end: jax.Array | None,
    *,
    ahead: int,
    interpret: Any = False,
) -> Gates:
    """The backward's gates; arguments as of `end_gates`."""
    outputs = _outputs(log_decay.shape, Gates._fields)
    reach = token_reaches_end, start_reaches_end
    return Gates(*_launch(log_decay, *reach, ahead, outputs, interpret))


def _outputs(shape: tuple[int, ...], names: tuple[str, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    B, Tq, Hkv, M = shape
    outputs = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name in names}
    outputs["total"] = jax.ShapeDtypeStruct((B, Hkv, Tq // CHUNK, M), jnp.float32)
    if "cumulative" in outputs:
        outputs["cumulative"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return outputs


def _launch(
    log_decay: jax.Array,
    token_reaches_end: jax.Array | None,
    start_reaches_end: jax.Array | None,
    ahead: int,
    outputs: dict[str, jax.ShapeDtypeStruct],
    interpret: Any,
) -> list[jax.Array]:
    B, Tq, Hkv, M = log_decay.shape
    width = min(M, BLOCK_SLOTS)
    inputs = {"log_decay": log_decay}
    wide = plgpu.SMEM((CHUNK, width), jnp.float32, transforms=tile(width, 4))
    narrow = plgpu.SMEM((PARTS, CHUNK, width), jnp.bfloat16, transforms=tile(width))
    scratch = {
        "log_decay": wide,  # then c
        "parts": narrow,  # of the summands, then what goes out
        "total": plgpu.SMEM((width,), jnp.float32),
        "loaded": plgpu.Barrier(num_arrivals=1 if token_reaches_end is None else 2),
    }
    if token_reaches_end is not None and start_reaches_end is not None:
        inputs["token_reaches_end"] = token_reaches_end.astype(jnp.int32)
        inputs["start_reaches_end"] = start_reaches_end.astype(jnp.int32)
        scratch["token_reaches_end"] = plgpu.SMEM((CHUNK,), jnp.int32)
    if interpret:
        scratch["buffer"] = plgpu.SMEM((CHUNK, CHUNK), jnp.bfloat16)
    return launch(
        functools.partial(_kernel, ahead=ahead, interpret=bool(interpret)),
        inputs,
        outputs,
        scratch,
        grid={"panel": M // width, "head": Hkv, "chunk": Tq // CHUNK, "batch": B},
        warpgroups=1,
        name="nha_gates",
        interpret=interpret,
    )


def _kernel(refs: Refs, shared: Refs, *, ahead: int, interpret: bool) -> None:
    b, h, chunk = (lax.axis_index(name) for name in ("batch", "head", "chunk"))
    width = shared["log_decay"].shape[1]
    rows, columns = pl.ds(chunk * CHUNK, CHUNK), pl.ds(lax.axis_index("panel") * width, width)
    own, loaded = (b, rows, h, columns), shared["loaded"]
    log_decay = refs["log_decay"].at[b, entering_rows(chunk * CHUNK, ahead), h, columns]
    plgpu.copy_gmem_to_smem(log_decay, shared["log_decay"], loaded)
    if "token_reaches_end" in refs:
        reaches_end = refs["token_reaches_end"].at[b, rows]
        plgpu.copy_gmem_to_smem(reaches_end, shared["token_reaches_end"], loaded)
    plgpu.barrier_wait(loaded)
    pl.when(chunk * CHUNK < ahead)(lambda: store_zeros(shared["log_decay"]))
    matmul = Matmul(interpret, shared["buffer"] if interpret else None)
    start_reaches_end = refs["start_reaches_end"][b, chunk] if "start_reaches_end" in refs else None
    names = _compute(shared, start_reaches_end, matmul, everything="cumulative" in refs)
    plgpu.commit_smem()
    for i, name in enumerate(names):
        plgpu.copy_smem_to_gmem(shared["parts"].at[i], refs[name].at[own])
    if "cumulative" in refs:
        plgpu.copy_smem_to_gmem(shared["log_decay"], refs["cumulative"].at[own])
    plgpu.copy_smem_to_gmem(shared["total"], refs["total"].at[b, h, chunk, columns])
    plgpu.wait_smem_to_gmem(0)


def _compute(
    shared: Refs, start_reaches_end: jax.Array | None, matmul: Matmul, *, everything: bool
) -> list[str]:
    """Leaves total in its place, and with `everything` c where log_decay was.

    Leaves the other results in the places of the parts, and returns their names in that order.
    """

    def parts(i):
        return shared["parts"].at[i]

    def log_decay():
        return plgpu.load(shared["log_decay"], layout=LOGITS)  # where needed: registers are short

    def sum_over(chosen, x):
        """For each row the sum of x over the chosen rows, in units of log 2."""
        store_parts(x * LOG2E, parts)
        plgpu.commit_smem()
        chosen = jnp.where(chosen, 1.0, 0.0).astype(jnp.bfloat16)
        return sum_rows(lambda: chosen, parts, matmul)

    finite = jnp.maximum(log_decay(), VANISHED)
    total = jnp.exp2(finite.sum(axis=0) * LOG2E)
    to_end = jnp.exp2(sum_over(iota(CHUNK, 1) > iota(CHUNK, 0), finite))
    if start_reaches_end is not None:
        reaches_end = plgpu.load(shared["token_reaches_end"], layout=ROW)
        to_end = jnp.where(by_row(reaches_end, to_end.shape[1]) > 0, to_end, 0.0)
        total *= start_reaches_end.astype(jnp.float32)
    results = {}
    if everything:
        cumulative = sum_over(iota(CHUNK, 1) <= iota(CHUNK, 0), jnp.maximum(log_decay(), FLOOR))
    write = write_of(log_decay())
    if everything:
        results["write"] = write
        write = jnp.maximum(write, LEAST_WRITE)
        results["odds"] = jnp.exp(log_decay()) / write
        shared["log_decay"][...] = cumulative
    results["to_end"] = to_end * write
    for i, result in enumerate(results.values()):
        parts(i)[...] = result.astype(jnp.bfloat16)
    shared["total"][...] = plgpu.layout_cast(total, COLUMN)
    return list(results)
