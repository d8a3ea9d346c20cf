"""Budgets of a search: what the windows of all layers may cost together."""

import math
from dataclasses import dataclass
from typing import Protocol

import jax.numpy as jnp

from nha_jax import ModelConfig
from train.errors import require
from train.windows import Window, Windows, format_windows, width


class Budget(Protocol):
    """What windows cost, and how much they may cost."""

    @property
    def limit(self) -> float:
        """The most that the windows of all layers may cost together."""

    @property
    def unit(self) -> str:
        """What is counted, in words, for messages and plots."""

    def cost(self, windows: Windows) -> float:
        """Returns what these windows cost; there is one for each layer."""


@dataclass(frozen=True)
class FullLayers:
    """A budget of layers: counts those with full attention that have a finite window in the base.

    Attributes:
        full_layers: how many of them there may be.
        base: the windows that the search starts from.

    Raises:
        ValueError: `full_layers` is below 1, or above the number of finite windows in the base.
    """

    full_layers: int
    base: Windows

    def __post_init__(self) -> None:
        most = sum(window is not None for window in self.base)
        expected = f"1 to {most}, the layers whose window is finite in {format_windows(self.base)}"
        require(1 <= self.full_layers <= most, "full_layers", self.full_layers, expected)

    @property
    def limit(self) -> float:
        return self.full_layers

    @property
    def unit(self) -> str:
        return "full layers beyond the base's"

    def cost(self, windows: Windows) -> float:
        pairs = zip(windows, self.base, strict=True)
        return sum(window is None and before is not None for window, before in pairs)


@dataclass(frozen=True)
class CacheBytes:
    """A budget of memory: counts the bytes of one row's decode cache per token of its context.

    A layer with window W caches min(W, context) tokens, and one with full attention all of them.
    For a token it caches the rotated key and the value of every key/value head, in the model's
    dtype. With a finite W it also caches what the token needs to enter the slots later: the key
    before rotation, and the log decays in float32. The slots and the inputs of the short
    convolutions are not counted, as they are the same for all windows and any context.

    Attributes:
        cache_bytes: how many bytes there may be per token of context.
        context: number of tokens at which the windows are compared.
        config: the model's configuration; its own windows do not matter.

    Raises:
        ValueError: `cache_bytes` is not a finite number above 0, or `context` is below 1.
    """

    cache_bytes: float
    context: int
    config: ModelConfig

    def __post_init__(self) -> None:
        limit = self.cache_bytes
        require(0 < limit < math.inf, "cache_bytes", limit, "a number above 0")
        require(self.context >= 1, "context", self.context, "at least 1")

    @property
    def limit(self) -> float:
        return self.cache_bytes

    @property
    def unit(self) -> str:
        return f"bytes of cache per token of context at {self.context} tokens"

    def cost(self, windows: Windows) -> float:
        cached = (
            min(width(window), self.context) * self._token_bytes(window) for window in windows
        )
        return sum(cached) / self.context

    def _token_bytes(self, window: Window) -> int:
        """Returns the bytes of one cached token in a layer with this window."""
        config = self.config
        entries = config.key_dim + config.value_dim
        decays = 0
        if window is not None:
            entries += config.key_dim
            decays = 4 * config.num_slots
        return config.num_kv_heads * (entries * jnp.dtype(config.dtype).itemsize + decays)
