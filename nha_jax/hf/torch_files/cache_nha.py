"""What is carried from call to call, and which tokens of a call belong together."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from .configuration_nha import NHAConfig


class NHACache(Cache):
    """What a model keeps of the tokens so far: for finite windows its size never grows.

    Attributes:
        layers: for each layer its `State` and the last inputs of its convolutions; None before the
            first token.
        counts: `Segments.counts` after the last token.
        num_tokens: tokens read so far, padding included.
    """

    is_compileable = False
    is_croppable = False
    is_linear = (False,)
    is_sliding = (False,)

    def __init__(self, config: NHAConfig):
        super().__init__(layers=[])
        self.layers: list[Any] = [None] * config.num_hidden_layers
        self.counts: tuple[Tensor, ...] | None = None
        self.num_tokens = 0

    @property
    def is_initialized(self) -> bool:
        return self.counts is not None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.num_tokens

    def reset(self) -> None:
        self.layers = [None] * len(self.layers)
        self.counts, self.num_tokens = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Selects rows of the batch, as beam search does."""
        self.layers = _select(self.layers, beam_idx)
        self.counts = _select(self.counts, beam_idx)

    def crop(self, *_: Any) -> None:
        raise NotImplementedError("tokens that the slots have taken in cannot be taken back")


def _select(tree: Any, rows: Tensor) -> Any:
    """Selects rows of the batch in every tensor of nested tuples and lists."""
    if tree is None:
        return None
    if isinstance(tree, Tensor):
        return tree.index_select(0, rows.to(tree.device))
    parts = [_select(part, rows) for part in tree]
    return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)


class Segments:
    """Which tokens of a call belong together.

    Attributes:
        number: [B, 1, T, 1] integers, which segment a token is of; 0 for padding.
        starts: [B, T] bool, whether a token's segment is another than that of the one before it.
        positions: [B, T] integers, counted from the first token of each segment.
        whole: whether each row of the call is one segment without padding.
        counts: for the next call, the last token's id, segment number and next position, each [B].
    """

    def __init__(self, ids: Tensor, position_ids: Tensor | None, past: NHACache | None):
        """Numbers the segments.

        Args:
            ids: [B, T] integers; a maximal run of equal ones is a segment, and 0 is padding.
            position_ids: [B, T] integers; where they do not grow, another segment begins.
            past: of the tokens before; None: there are none.
        """
        B, T = ids.shape
        index = torch.arange(T, device=ids.device)
        before = (past and past.counts) or (ids[:, 0], ids.new_zeros(B), ids.new_zeros(B))
        last_id, number, position = before
        self.starts = ids != torch.cat([last_id[:, None], ids[:, :-1]], dim=1)
        if position_ids is not None:
            self.starts[:, 1:] |= position_ids[:, 1:] <= position_ids[:, :-1]
        numbers = number[:, None] + self.starts.cumsum(dim=1)
        self.number = (numbers + 1).masked_fill(ids == 0, 0)[:, None, :, None]
        first = torch.where(self.starts, index, -position[:, None]).cummax(dim=1).values
        self.positions = index - first
        self.counts = ids[:, -1].clone(), numbers[:, -1].clone(), self.positions[:, -1] + 1
        self.whole = not bool((self.starts | (ids == 0)).any())
