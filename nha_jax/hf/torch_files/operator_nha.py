"""Native Hybrid Attention (Du, Hu, Zhang, Sun, Cheng, arXiv 2510.07019), in plain PyTorch.

A layer keeps long-term context in M key/value slots per head, which a gated linear recurrence
writes, and the last W tokens exactly; one softmax runs over slots and window together. For each
key/value head, and each query head that shares it, with the gate alpha_j = exp(log_decay_j) [M],
s_j = 1 - alpha_j and j = t - W, the token that leaves the window at step t:

    SK_t = alpha_j SK_{t-1} + s_j key_j^T              the slots' keys    [M, K]
    SV_t = alpha_j SV_{t-1} + s_j value_j^T            the slots' values  [M, V]
    a_t  = scale phi(query_t) . SK_t                   logits of the M slots
    b_ti = scale rot(query_t) . rot(key_i)             logits of the window, t - W < i <= t
    o_t  = softmax([a_t ; b_t]) [SV_t ; value_i]

The slots start at zero, and again at each segment's first token. phi is the slot feature map, which
key_j has gone through too (the identity, in the paper); rot is the rotary embedding. W = 0 is a
gated linear recurrence alone, and an infinite W full attention. With empty_slots = "attend" slots
that hold nothing yet are in the softmax with logit 0 and value 0; with "mask" they are not. With a
slot_delay E, j is t - E: a token enters the slots while the window may still have it.

Slots and softmax are float32. Whole sequences are computed in chunks (`_SlotChunks`) and blocks of
the window, in time and memory that grow with T, not with its square.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

CHUNK = 16  # tokens; pairs of tokens in a chunk have a decay for each slot

LONGEST_BLOCK = 256  # tokens of a window that are computed together

FEATURE_MAPS = {"identity": lambda x: x, "silu": F.silu, "relu": F.relu}


class Rows(NamedTuple):
    """What is kept of tokens: [B, H, tokens, .], segments [B, 1, tokens, 1] (0: padding)."""

    key: Tensor  # as the slots take it
    rotated_key: Tensor
    value: Tensor
    log_decay: Tensor
    segment: Tensor

    def last(self, count: int) -> "Rows":
        """Selects the last tokens, as many as there are up to `count`."""
        return Rows(*(x[..., max(x.shape[-2] - count, 0) :, :] for x in self))

    def followed_by(self, rows: "Rows") -> "Rows":
        """Appends later tokens."""
        return Rows(*(torch.cat(pair, dim=-2) for pair in zip(self, rows, strict=True)))


class State(NamedTuple):
    """What a layer remembers: the slots [B, H, M, K] and [B, H, M, V], and the window's tokens."""

    slot_key: Tensor
    slot_value: Tensor
    rows: Rows

    def copied(self) -> "State":
        """Copies the tokens, so that they keep no memory of the longer array they are part of."""
        return self._replace(rows=Rows(*(x.clone() for x in self.rows)))


class Writes(NamedTuple):
    """What enters the slots at each of T steps: [B, H, T, .] float32, and bools [B, 1, T, 1]."""

    key: Tensor
    value: Tensor
    log_decay: Tensor
    enters: Tensor  # whether a token does, of the segment of the one that is read
    starts: Tensor  # whether that segment is another than at the step before


def nha_attention(
    query: Tensor,
    rotated_query: Tensor,
    rows: Rows,
    starts: Tensor,
    *,
    window_size: int | None,
    slot_delay: int | None,
    scale: float | None,
    empty_slots: str,
    past: State | None = None,
    whole: bool = False,
) -> tuple[Tensor, State]:
    """Computes the attention of T tokens, after those of `past`.

    Args:
        query: [B, Hq, T, K], as the slots take it.
        rotated_query: [B, Hq, T, K].
        rows: of the same tokens, H = Hkv.
        starts: [B, T] bool, whether a token is of another segment than the one before it.
        window_size: W; None for full attention.
        slot_delay: E, at most W; None: W.
        scale: of the logits; None: K**-0.5.
        empty_slots: "attend" or "mask".
        past: the state that an earlier call returned; None: there are no tokens before.
        whole: whether each row of the batch is known to be one segment without padding.

    Returns:
        [B, Hq, T, V] in the query's dtype, 0 at padding, and the state after the last token.
    """
    T, K = query.shape[-2:]
    H, M = rows.key.shape[1], rows.log_decay.shape[-1]
    scale = K**-0.5 if scale is None else scale
    delay = window_size if slot_delay is None else slot_delay
    masks = empty_slots == "mask"
    if past is None:
        past = _empty_state(rows)
    everything = past.rows.followed_by(rows)
    if window_size is None or delay is None or everything.segment.shape[-2] <= delay:
        empty = 0 if masks else M
        out = _attend_to_all(rotated_query, everything, scale, empty, causal=whole)
        slot_key, slot_value = past.slot_key, past.slot_value
    else:
        missing = window_size - past.rows.segment.shape[-2]
        everything = Rows(*(F.pad(x, (0, 0, missing, 0)) for x in everything))  # W + T
        first = window_size - delay
        leaving = Rows(*(x[..., first : first + T, :] for x in everything))
        enters = (leaving.segment == rows.segment) & (rows.segment > 0)
        writes = Writes(
            key=leaving.key.float(),
            value=leaving.value.float(),
            log_decay=leaving.log_decay,
            enters=enters,
            starts=starts[:, None, :, None],
        )
        q, rotated_q = (scale * x.float().unflatten(1, (H, -1)) for x in (query, rotated_query))
        attend = _attend_to_next if T == 1 else _attend_in_chunks
        out, slot_key, slot_value = attend(
            q, rotated_q, everything, writes, past, window_size, masks
        )
        out = out.flatten(1, 2)
    if window_size is None:  # no token ever enters the slots
        nothing = everything.last(0)
        kept = everything._replace(key=nothing.key, log_decay=nothing.log_decay)
    else:
        kept = everything.last(window_size)
    out = out.masked_fill(rows.segment == 0, 0).to(query.dtype)
    return out, State(slot_key, slot_value, kept)


def _empty_state(rows: Rows) -> State:
    """Makes the state before the first token."""
    size = (*rows.key.shape[:2], rows.log_decay.shape[-1])
    slot_key, slot_value = (
        x.new_zeros(*size, x.shape[-1], dtype=torch.float32) for x in (rows.key, rows.value)
    )
    return State(slot_key, slot_value, rows.last(0))


def _attend_to_all(query: Tensor, rows: Rows, scale: float, empty: int, *, causal: bool) -> Tensor:
    """Attends to all rows, as long as nothing has entered the slots, and to `empty` empty ones."""
    T, key, value, count = query.shape[-2], rows.rotated_key, rows.value, rows.segment.shape[-2]
    if causal and not empty and count == T:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        )
    index = torch.arange(count, device=query.device)
    own = rows.segment[..., -T:, :] == rows.segment.mT  # [B, 1, T, count]
    seen = own & (index <= index[-T:, None])
    bias = torch.zeros_like(seen, dtype=query.dtype).masked_fill(~seen, -torch.inf)
    if empty:  # M slots of logit 0 are as one of logit log(M)
        key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
        bias = F.pad(bias, (0, 1), value=math.log(empty))
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, scale=scale, enable_gqa=True
    )


def _attend_to_next(
    query: Tensor,
    rotated_query: Tensor,
    rows: Rows,
    writes: Writes,
    past: State,
    window_size: int,
    masks: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Does one step of the recurrence: rows are the last W tokens and the one that is read.

    Queries are [B, H, G, 1, K], scaled; so is the result, and the slots' keys and values follow.
    """
    query, rotated_query = query[..., 0, :], rotated_query[..., 0, :]  # [B, H, G, K]
    segment, enters = rows.segment[..., -1:, :], writes.enters  # [B, 1, 1, 1]
    log_decay = writes.log_decay.mT  # [B, H, M, 1]
    alpha = log_decay.exp().where(enters, 1.0).masked_fill(writes.starts, 0)
    strength = (-log_decay.expm1()).where(enters, 0.0)
    slot_key = alpha * past.slot_key + strength * writes.key
    slot_value = alpha * past.slot_value + strength * writes.value

    window = rows.last(window_size)
    a = query @ slot_key.mT  # [B, H, G, M]
    if masks:
        a = a.masked_fill(~enters, -torch.inf)
    b = rotated_query @ window.rotated_key.float().mT  # [B, H, G, W]
    b = b.masked_fill(window.segment.mT != segment, -torch.inf)
    p_slots, p_window = _softmax(a, b, segment == 0)
    out = p_slots @ slot_value + p_window @ window.value.float()
    return out[..., None, :], slot_key, slot_value


def _softmax(a: Tensor, b: Tensor, padding: Tensor) -> tuple[Tensor, ...]:
    """Computes one softmax over slots and window; padding sees nothing, and gets finite weights."""
    logits = torch.cat([a, b], dim=-1).masked_fill(padding, 0)
    return logits.softmax(dim=-1).split([a.shape[-1], b.shape[-1]], dim=-1)


def _attend_in_chunks(
    query: Tensor,
    rotated_query: Tensor,
    rows: Rows,
    writes: Writes,
    past: State,
    window_size: int,
    masks: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes T tokens at once: rows are the W tokens before them, and they.

    The slots' logits of all tokens and the window's go through one softmax, whose weights then read
    the slots' and the window's values. Queries and results as for `_attend_to_next`.
    """
    T = query.shape[-2]
    segment = rows.segment[..., -T:, :]  # [B, 1, T, 1]
    chunks, window = _SlotChunks(writes), _WindowBlocks(rows, T, window_size)
    a, slot_key = chunks.read_keys(query, writes.key, past.slot_key)
    if masks:
        a = a.masked_fill(~writes.enters[:, :, None], -torch.inf)
    b = window.logits(rotated_query)
    p_slots, p_window = _softmax(a, b, segment[:, :, None] == 0)
    out, slot_value = chunks.read_values(p_slots, writes.value, past.slot_value)
    return out + window.values(p_window), slot_key, slot_value


class _SlotChunks:
    """The slots of T tokens, in chunks of C: N = ceil(T / C).

    With G_t the sum of the chunk's log decays up to step t, and (SK, SV) the slots before it,

        a_t = exp(G_t) (q_t . SK) + sum_{j<=t} (q_t . k_j) s_j exp(G_t - G_j)
        o_t = (p_t exp(G_t)) SV   + sum_{j<=t} (sum_m p_t s_j exp(G_t - G_j)) v_j

    where k_j, v_j and s_j are of the token that enters at step j. Decays may be as strong as
    log_decay = -inf: exp(-G_j) alone would overflow, and the difference lose the small terms, so
    that G_t - G_j is summed anew for every pair. Segments are reset by a log decay of -inf.
    """

    def __init__(self, writes: Writes):
        """Computes the decays."""
        log_decay, enters = writes.log_decay, writes.enters
        self.num_tokens = log_decay.shape[-2]
        steps = log_decay.masked_fill(~enters, 0).masked_fill(writes.starts, -torch.inf)
        steps = _split(steps, CHUNK)  # [B, H, N, C, M]
        strength = _split((-log_decay.expm1()).masked_fill(~enters, 0), CHUNK)
        self.decay = steps.cumsum(dim=-2).exp()  # exp(G_t)
        reached = steps.new_ones(CHUNK, CHUNK, dtype=torch.bool).tril()[..., None]  # j <= t
        between = steps[..., None, :].expand(*steps.shape[:-1], CHUNK, -1)  # [B, H, N, t, j, M]
        between = between.masked_fill(reached.transpose(0, 1), 0)  # where t <= j
        sums = between.cumsum(dim=-3).masked_fill(~reached, -torch.inf)  # G_t - G_j
        self.pairs = sums.exp() * strength[..., None, :, :]

    def read_keys(self, query: Tensor, key: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the logits a [B, H, G, T, M], and the slots' keys after the last token."""
        query, key = _split(query, CHUNK), _split(key, CHUNK)
        before, after = self._scan(key, slots)
        carried = torch.einsum("bhgntk,bhnmk->bhgntm", query, before) * self.decay[:, :, None]
        dots = torch.einsum("bhgntk,bhnjk->bhgntj", query, key)
        within = torch.einsum("bhgntj,bhntjm->bhgntm", dots, self.pairs)
        return _join(carried + within, self.num_tokens), after

    def read_values(self, p: Tensor, value: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Computes what weights p [B, H, G, T, M] read, and the slots' values after the last."""
        p, value = _split(p, CHUNK), _split(value, CHUNK)
        before, after = self._scan(value, slots)
        carried = torch.einsum("bhgntm,bhnmv->bhgntv", p * self.decay[:, :, None], before)
        weights = torch.einsum("bhgntm,bhntjm->bhgntj", p, self.pairs)
        within = torch.einsum("bhgntj,bhnjv->bhgntv", weights, value)
        return _join(carried + within, self.num_tokens), after

    def _scan(self, x: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the slots before each chunk, [B, H, N, M, .], and after the last."""
        written = torch.einsum("bhnjm,bhnjk->bhnmk", self.pairs[..., -1, :, :], x).unbind(dim=2)
        kept = self.decay[..., -1, :, None].unbind(dim=2)  # N of [B, H, M, 1]
        before = []
        for alpha, new in zip(kept, written, strict=True):
            before.append(slots)
            slots = alpha * slots + new
        return torch.stack(before, dim=2), slots


class _WindowBlocks:
    """The window of T tokens, in N blocks: their tokens see at most W + size - 1 rows."""

    def __init__(self, rows: Rows, num_tokens: int, window_size: int):
        """Cuts the W + T rows."""
        self.num_tokens, self.size = num_tokens, min(max(window_size, CHUNK), LONGEST_BLOCK)
        length = window_size + self.size - 1

        def cut(x: Tensor) -> Tensor:  # [B, H, W + T, K] -> [B, H, N, K, length]
            x = F.pad(x[..., 1:, :], (0, 0, 0, -num_tokens % self.size))
            return x.unfold(-2, length, self.size)

        self.key, self.value = cut(rows.rotated_key.float()), cut(rows.value.float())
        own = _split(rows.segment[..., -num_tokens:, :], self.size)  # [B, 1, N, size, 1]
        index = torch.arange(self.size, device=own.device)[:, None]
        row = torch.arange(length, device=own.device)
        inside = (index <= row) & (row < index + window_size)
        self.seen = inside & (own == cut(rows.segment))  # [B, 1, N, size, length]

    def logits(self, query: Tensor) -> Tensor:
        """Computes b: [B, H, G, T, K] -> [B, H, G, T, length]."""
        b = torch.einsum("bhgnik,bhnkl->bhgnil", _split(query, self.size), self.key)
        return _join(b.masked_fill(~self.seen[:, :, None], -torch.inf), self.num_tokens)

    def values(self, p: Tensor) -> Tensor:
        """Computes what weights read: [B, H, G, T, length] -> [B, H, G, T, V]."""
        out = torch.einsum("bhgnil,bhnvl->bhgniv", _split(p, self.size), self.value)
        return _join(out, self.num_tokens)


def _split(x: Tensor, size: int) -> Tensor:
    """Cuts time into pieces, the last filled up with zeros: [..., T, K] -> [..., N, size, K]."""
    return F.pad(x, (0, 0, 0, -x.shape[-2] % size)).unflatten(-2, (-1, size))


def _join(x: Tensor, num_tokens: int) -> Tensor:
    """Undoes `_split`: [..., N, size, K] -> [..., T, K]."""
    return x.flatten(-3, -2)[..., :num_tokens, :]
