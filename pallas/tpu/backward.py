"""The fused backward: every gradient in one pass over the chunks, from the last to the first.

Symbols as in `chunk.py` and `forward.py`; D = d_out value^T, dS the gradient of the slots at the
chunk's end, and, with the forward's weights w_rj = s_j exp(G_r - G_j):

    a = exp(G) (q SK0^T) + sum_j (q k^T)_rj w_rj     da = exp(G) (d_out SV0^T) + sum_j D_rj w_rj
    ds = scale pa (da - delta)                       db = pb (D - delta)
    A_rj = sum_m pa w_rj                             L_rj = sum_m ds w_rj

The same map gives a and da, and its transpose A and L: the pairs are stacked and share the gates.

    dq = (ds exp(G)) SK0 + L k + rotate_back(db rotated_k)
    dk = L^T q + (s exp(G_C - G)) dSK + rotate_back(db^T rotated_q),  dv = P^T d_out + ... dSV
    dg_j = x1 + sum_{r >= j} (R_r - s_r Y_r) - exp(g_j) Y_j

with R_r = sum over the heads of ds a + pa da, Y_j the gradient of s_j, x1 = sum(dS * S_end). dg is
a difference of sums that nearly cancel when decays are strong, so R, Y and x1 are made of the very
operands, rounded, that enter the products: what cancels in exact arithmetic then cancels here.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas.tpu.chunk import (
    LOG2E,
    MASKED,
    Facts,
    Gates,
    Masks,
    Spec,
    Tokens,
    apply_feature_map,
    by_head,
    decay_blocks,
    emit,
    facts_blocks,
    feature_map_pullback,
    flat,
    floor_of,
    join,
    matmul,
    matmul_nt,
    matmul_tn,
    overlay,
    reverse_cumulative_sum,
    rotate,
    rotate_back,
    scaled,
    to_column,
    to_row,
    widen,
)
from pallas.tpu.forward import mask_slots, since_start
from pallas.tpu.grid import Grid

Arrays = dict[str, jax.Array]


def backward(inputs: Arrays, spec: Spec, *, group: int, skew: int, interpret, vmem: int) -> Arrays:
    """The kernel's call.

    inputs: those of `forward`, its lse and starts, and out_cotangent [B, T, H * G * V] of the
    value's dtype; with spec.weight, weight_cotangent [B, H, G, T] float32; with spec.state,
    end_cotangent [B, H, M, K + V] float32; with spec.wide, delta [B, H, G, T] float32, the sum of
    out * out_cotangent (and of slot_weight * weight_cotangent), which the kernel sees only part of.

    Returns the cotangents of query, key, value, log_decay and, with spec.rotated, rotated_query
    and rotated_key; with spec.state, slots.
    """
    grid = Grid.of(inputs, spec, reverse=True)
    K, V, M, heads = grid.K, grid.V, grid.M, grid.heads
    wide = jnp.float32
    in_specs = grid.input_specs(inputs) | {
        "out_cotangent": grid.tokens(spec.group * V),
        "lse": grid.lanes(spec.group),
        "starts": grid.starts(),
    }
    optional = {
        "weight_cotangent": grid.lanes(spec.group),
        "end_cotangent": grid.slots(),
        "delta": grid.lanes(spec.group),
    }
    in_specs |= {name: block for name, block in optional.items() if name in inputs}
    names = ["query", "key", "value", "log_decay"]
    names += ["rotated_query", "rotated_key"] * spec.rotated + ["slots"] * spec.state
    out_specs = {name: in_specs[name] for name in names}
    out_shape = {
        name: jax.ShapeDtypeStruct(inputs[name].shape, inputs[name].dtype) for name in names
    }
    if spec.state:  # the starts stand for it
        inputs = {name: x for name, x in inputs.items() if name != "slots"}
        del in_specs["slots"]
    before = {}
    if spec.halo and grid.steps > 1:
        before = {name: inputs[name] for name in grid.halo_specs(inputs)}
    scratch = {"slots": pltpu.VMEM((heads, M, K + V), wide)}
    if spec.halo:
        scratch |= {
            name: pltpu.VMEM((heads, spec.halo, size), wide)
            for name, size in (("key", K), ("rotated_key", K), ("value", V), ("log_decay", M))
        }
    kernel = functools.partial(_kernel, spec=spec, steps=grid.steps, group=group, skew=skew)
    return pl.pallas_call(
        kernel,
        grid=grid.shape,
        in_specs=[in_specs, grid.halo_specs(inputs) if before else {}],
        out_specs=[out_specs],
        out_shape=[out_shape],
        scratch_shapes=[scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=vmem,
        ),
        interpret=interpret,
        name="nha_backward",
    )(inputs, before)[0]


def _kernel(refs, before, outs, later, *, spec: Spec, steps: int, group: int, skew: int):
    step, head = steps - 1 - pl.program_id(2), pl.program_id(3)
    names = ["slots"] + ["key", "rotated_key", "value", "log_decay"] * bool(spec.halo)

    @pl.when(step == steps - 1)
    def _():
        for ref in (later[name] for name in names):
            ref[head] = jnp.zeros(ref.shape[1:], ref.dtype)
        if spec.state:
            later["slots"][head] = refs["end_cotangent"][0, 0]

    tokens = _load(refs, before, step, spec)
    slots = [refs["starts"][0, 0, 0]]
    recomputed: list[Arrays] = [{} for _ in range(spec.chunks)]
    emit(
        [_recompute(n, refs, tokens, slots, recomputed[n], spec) for n in range(spec.chunks)],
        spec.chunks,
        1,
    )
    carry = {name: later[name][head] for name in names}
    decays: list[jax.Array] = []
    chunks = [
        _chunk(n, refs, outs, tokens, recomputed[n], carry, decays, step, spec)
        for n in reversed(range(spec.chunks))
    ]
    emit(chunks, group, skew)
    for name in names:
        later[name][head] = carry[name]
    if spec.state:
        outs["slots"][0, 0] = carry["slots"]


def _load(refs, before, step, spec: Spec) -> Tokens:
    """rotated_key, raw_key, key (feature-mapped), value, decay; zeros before the first token."""
    C, dtype = spec.chunk, refs["key"].dtype

    def key_of(raw):
        return apply_feature_map(raw, spec.feature_map)

    def rotated_of(arrays, rows):
        if spec.rotated:
            return arrays["rotated_key"][0, rows]
        raw = arrays["key"][0, rows]
        return rotate(raw, arrays[spec.tables[-1]][0, rows]).astype(dtype) if spec.rope else raw

    rows = lambda n: slice(n * C, (n + 1) * C)  # noqa: E731
    own = {
        "rotated_key": lambda n: rotated_of(refs, rows(n)),
        "raw_key": lambda n: refs["key"][0, rows(n)],
        "key": lambda n: key_of(refs["key"][0, rows(n)]),
        "value": lambda n: refs["value"][0, rows(n)],
        "decay": decay_blocks(refs["log_decay"], spec, dtype),
    }
    if spec.segments:
        own |= facts_blocks(refs["facts"], spec)
    if not spec.halo:
        return Tokens(spec, own, {})
    if not before:  # the whole sequence is one step
        sizes = {name: refs[name].shape[2] for name in ("key", "value", "log_decay")}
        zeros = lambda size, dtype: jnp.zeros((spec.halo, size), dtype)  # noqa: E731
        halo = {name: zeros(refs["key"].shape[2], dtype) for name in ("rotated_key", "key")}
        halo["value"] = zeros(sizes["value"], dtype)
        halo["decay"] = zeros(sizes["log_decay"], jnp.float32)
        return Tokens(spec, own, halo)
    last = slice(before["key"].shape[1] - spec.halo, None)
    decay = before["log_decay"][0, 0].T
    decay = jnp.maximum(decay[decay.shape[0] - spec.halo :] * LOG2E, floor_of(dtype))
    halo = {
        "rotated_key": rotated_of(before, last),
        "key": key_of(before["key"][0, last]),
        "value": before["value"][0, last],
        "decay": jnp.where(step > 0, decay, 0.0),
    }
    return Tokens(spec, own, halo)


def _recompute(
    n: int, refs, tokens: Tokens, slots: list[jax.Array], result: dict, spec: Spec
) -> Iterator[None]:
    """A chunk's gates, and the slots at its start and end."""
    C, dtype = spec.chunk, refs["value"].dtype
    gates = Gates(tokens.cat("decay", n, spec.columns), spec, dtype)
    yield

    to_end, keep = gates.to_end, jnp.exp2(gates.end)
    facts = Facts(tokens, refs["visible"][0, n : n + 1], n, spec) if spec.segments else None
    if facts is not None:
        to_end, keep = facts.written(to_end), facts.kept(keep)
    written = (gates.write[:C] * to_end).astype(dtype)
    keep = to_column(keep)
    added = matmul_tn(
        written, jnp.concatenate([tokens.cat(name, n, C) for name in ("key", "value")], 1)
    )
    yield

    K = refs["key"].shape[2]
    start = [x.astype(dtype) for x in (slots[0][:, :K], slots[0][:, K:])]
    slots[0] = keep * slots[0] + added
    result.update(
        gates=gates, facts=facts, to_end=to_end, written=written, keep=keep, start=start,
        end=slots[0],
    )  # fmt: skip
    yield


def _chunk(
    n: int, refs, outs, tokens: Tokens, now: dict, carry: Arrays, decays: list, step,
    spec: Spec,
) -> Iterator[None]:  # fmt: skip
    """One chunk, a stage at a time.

    `carry` holds what the later chunks add to the gradients of this one's tokens (`overlap_add`)
    and of the slots at its end; `decays` collects the decays' gradients.
    """
    C, G, M = spec.chunk, spec.group, now["keep"].shape[0]
    rows = slice(n * C, (n + 1) * C)
    entering = tokens.cat("key", n, spec.columns)
    value = tokens.cat("value", n, spec.width)
    rotated_key = tokens.cat("rotated_key", n, spec.width)
    K, V, dtype = entering.shape[1], value.shape[1], value.dtype
    gates, (start_key, start_value) = now["gates"], now["start"]
    stack = lambda name, size: join([  # noqa: E731
        refs[name][0, rows, g * size : (g + 1) * size] for g in range(G)
    ], 0)  # fmt: skip
    raw, d_out = stack("query", K), stack("out_cotangent", V)
    rotated = stack("rotated_query", K) if spec.rotated else raw
    if spec.rope:
        table = refs["table"][0, rows]
        rotated = flat(rotate(by_head(raw, G), table)).astype(dtype)
    query = apply_feature_map(raw, spec.feature_map)
    scores = by_head(matmul_nt(query, entering), G)  # [G, C, columns]
    products = by_head(matmul_nt(d_out, value), G)  # D, [G, C, width]
    lse = _row_column(refs["lse"], rows)
    yield

    masks = Masks(spec, now["facts"])
    window_mask = masks.window if spec.segments else since_start(masks.window, n, step, spec)
    carried = jnp.exp2(gates.rows)
    if spec.segments:
        carried = now["facts"].carried(carried)
    size = range(len(gates.blocks))
    weights, rises = [gates.weight(i) for i in size], [gates.rise(i) for i in size]
    masked = [jnp.where(masks.causal, x[..., : spec.columns], 0.0) for x in (scores, products)]
    stacked = [
        jnp.concatenate([flat(x[:, block, extent]) for x in masked], 0).astype(dtype)
        for block, extent in zip(gates.blocks, gates.extents, strict=True)
    ]
    carried_a = by_head(matmul_nt(query, start_key), G)  # [G, C, M]
    carried_da = by_head(matmul_nt(d_out, start_value), G)
    spread = [matmul(x, weight) for x, weight in zip(stacked, weights, strict=True)]
    if spec.has_window:
        b = by_head(matmul_nt(rotated, rotated_key), G)  # [G, C, width]
    half = G * (gates.blocks[0].stop)
    a, da = (
        x * carried
        + join([by_head(y[part], G) * rise for y, rise in zip(spread, rises, strict=True)], 1)
        for x, part in ((carried_a, slice(0, half)), (carried_da, slice(half, None)))
    )
    yield

    logits = mask_slots(a * (spec.scale * LOG2E), n, step, now["facts"], spec)
    pa = jnp.exp2(logits - lse)
    d_weight = _row_column(refs["weight_cotangent"], rows) if spec.weight else 0.0
    if spec.has_window:
        pb = jnp.exp2(jnp.where(window_mask, scaled(b, spec.window_scale), MASKED) - lse)
    if spec.wide:
        delta = _row_column(refs["delta"], rows)
    else:
        share = pb * products if spec.has_window else None
        delta = jnp.sum(overlay(jnp.add, pa * (da + d_weight), share, 0.0), -1, keepdims=True)
    ds = pa * ((da + (d_weight - delta)) * spec.scale)
    if spec.has_window:
        db = flat(pb * ((products - delta) * spec.window_slope)).astype(dtype)
    ds_carried, pa_carried = (flat(x * carried).astype(dtype) for x in (ds, pa))
    pairs = [
        jnp.concatenate([flat(x[:, block] * rise) for x in (ds, pa)], 0).astype(dtype)
        for block, rise in zip(gates.blocks, rises, strict=True)
    ]
    yield

    wide = jnp.float32
    into_rows = join([
        jnp.sum((pair.astype(wide) * x).reshape(2 * G, -1, M), 0)
        for pair, x in zip(pairs, spread, strict=True)
    ], 0) + jnp.sum(
        by_head(ds_carried.astype(wide), G) * carried_a
        + by_head(pa_carried.astype(wide), G) * carried_da,
        0,
    )  # R, [C, M]  # fmt: skip
    gathered = [matmul_nt(pair, weight) for pair, weight in zip(pairs, weights, strict=True)]
    d_scores = join([widen(by_head(x[:half], G), spec.columns) for x in gathered], 1)  # L
    d_scores = flat(jnp.where(masks.causal, d_scores, 0.0)).astype(dtype)
    p = join([widen(by_head(x[half:], G), spec.width) for x in gathered], 1)  # A, then P
    p = flat(jnp.where(masks.slots, p, pb if spec.has_window else 0.0)).astype(dtype)
    per_block = [matmul_tn(x, pair) for x, pair in zip(stacked, pairs, strict=True)]
    d_start = jnp.concatenate([matmul_tn(ds_carried, query), matmul_tn(pa_carried, d_out)], 1)
    if spec.has_window:
        d_rotated_query = by_head(matmul(db, rotated_key), G)
        d_rotated_key = matmul_tn(db, rotated)  # [width, K]
    yield

    d_end = carry["slots"]
    d_end_key, d_end_value = (x.astype(dtype) for x in (d_end[:, :K], d_end[:, K:]))
    d_end_narrow = jnp.concatenate([d_end_key, d_end_value], 1)
    into_end = to_row(jnp.sum(d_end_narrow.astype(wide) * now["end"], -1, keepdims=True))  # x1
    carry["slots"] = now["keep"] * d_end + d_start

    d_query = by_head(matmul(ds_carried, start_key) + matmul(d_scores, entering), G)
    written = matmul(now["written"], d_end_narrow)  # [C, K + V]
    d_key = matmul_tn(d_scores, query)  # [columns, K]
    d_value = matmul_tn(p, d_out)  # [width, V]
    d_key, d_value = (
        jnp.concatenate([x[:C] + y, x[C:]], 0) if x.shape[0] > C else x + y
        for x, y in ((d_key, written[:, :K]), (d_value, written[:, K:]))
    )
    ending = matmul_nt(entering[:C], d_end_key)
    ending += matmul_nt(value[:C], d_end_value)  # [C, M]
    yield

    d_write = _sum_blocks(per_block, [gates.fall(i) for i in size], gates, spec)
    rounded = _sum_blocks(per_block, [x.astype(wide) for x in weights], gates, spec)
    d_write, rounded = (
        jnp.concatenate([x[:C] + y, x[C:]], 0) if spec.shift else x + y
        for x, y in (
            (d_write, ending * now["to_end"]),
            (rounded, ending * now["written"].astype(wide)),
        )
    )
    d_decay = reverse_cumulative_sum(_at_tokens(into_rows, spec) - rounded)
    d_decay -= (1.0 - gates.write) * d_write
    d_decay = (
        jnp.concatenate([d_decay[:C] + into_end, d_decay[C:]], 0)
        if spec.shift
        else d_decay + into_end
    )
    d_decay = jnp.where(tokens.cat("decay", n, spec.columns) > floor_of(dtype), d_decay, 0.0)

    d_query = feature_map_pullback(d_query, by_head(raw, G), spec.feature_map)
    d_key = _overlap_add(d_key, carry, "key", spec)
    d_key = feature_map_pullback(d_key, tokens.block("raw_key", n), spec.feature_map)
    if spec.has_window:
        d_rotated_key = _overlap_add(d_rotated_key, carry, "rotated_key", spec)
        if spec.rotated:
            _store_heads(outs["rotated_query"], rows, d_rotated_query)
            outs["rotated_key"][0, rows] = d_rotated_key.astype(dtype)
        elif spec.rope:
            d_query += rotate_back(d_rotated_query, table)
            d_key += rotate_back(d_rotated_key, refs[spec.tables[-1]][0, rows])
        else:
            d_query += d_rotated_query
            d_key += d_rotated_key
    _store_heads(outs["query"], rows, d_query)
    outs["key"][0, rows] = d_key.astype(dtype)
    outs["value"][0, rows] = _overlap_add(d_value, carry, "value", spec).astype(dtype)
    decays.insert(0, _overlap_add(d_decay, carry, "log_decay", spec))
    lanes = min(128, spec.rows)
    if n * C % lanes == 0:
        outs["log_decay"][0, 0, :, n * C : n * C + lanes] = join(decays[: lanes // C], 0).T
    yield


def _row_column(ref, rows: slice) -> jax.Array:
    """[1, 1, G, rows] -> [G, C, 1]."""
    return to_column(ref[0, 0, :, rows][:, None, :])


def _store_heads(ref, rows: slice, x: jax.Array) -> None:
    """[G, C, D] into the columns of [1, rows, G * D]."""
    D = x.shape[2]
    for g in range(x.shape[0]):
        ref[0, rows, g * D : (g + 1) * D] = x[g].astype(ref.dtype)


def _sum_blocks(
    per_block: list[jax.Array], factors: list[jax.Array], gates: Gates, spec: Spec
) -> jax.Array:
    """[columns, M]: the blocks' products, each up to its last column, summed."""
    size, parts = gates.blocks[0].stop, []
    for first in range(0, spec.columns, size):
        rows = slice(first, first + size)
        terms = [
            x[rows] * factor[rows]
            for x, factor, extent in zip(per_block, factors, gates.extents, strict=True)
            if first < extent.stop
        ]
        parts.append(functools.reduce(jnp.add, terms))
    return join(parts, 0)


def _at_tokens(x: jax.Array, spec: Spec) -> jax.Array:
    """Row r of [C, M] to the last token that it finds in the slots, row r + d of [columns, M]."""
    if not spec.shift:
        return x
    padded = jnp.concatenate([x, jnp.zeros((spec.columns - spec.chunk, x.shape[1]), x.dtype)], 0)
    return pltpu.roll(padded, spec.shift, 0)


def _overlap_add(x: jax.Array, carry: Arrays, name: str, spec: Spec) -> jax.Array:
    """The chunk's own [C, D] of the gradients x of cat's first rows, with the later chunks' share.

    carry[name], [halo, D], is what the later chunks have added to the rows of cat from the C-th on;
    it becomes what this chunk and they add to the halo.
    """
    if not spec.halo:
        return x
    C, more = spec.chunk, carry[name]
    parts = [x[:C]]
    if x.shape[0] > C:
        parts.append(x[C:] + more[: x.shape[0] - C])
    if x.shape[0] - C < spec.halo:
        parts.append(more[x.shape[0] - C :])
    total = join(parts, 0)
    carry[name] = total[: spec.halo]
    return total[spec.halo :]
