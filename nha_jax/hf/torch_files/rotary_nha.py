"""The rotary position embedding (Su et al., arXiv 2104.09864), rotate-half as Llama's."""

import math
from typing import Any

import torch
from torch import Tensor

Rope = tuple[Tensor, Tensor]
"""Cosines and sines, each [B, 1, T, K / 2] float32."""


def rotary_tables(
    positions: Tensor, head_dim: int, theta: float, scaling: dict[str, Any] | None
) -> Rope:
    """Makes the tables of positions [B, T]: of the angles position * frequency.

    With "yarn" both are multiplied by its attention factor.
    """
    frequency = _frequencies(head_dim, theta, scaling).to(positions.device)
    angle = positions[:, None, :, None].float() * frequency
    size = 1.0
    if scaling and scaling["kind"] == "yarn":
        size = scaling["attention_factor"] or 0.1 * math.log(scaling["factor"]) + 1
    return size * angle.cos(), size * angle.sin()


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotates x [B, heads, T, K] in float32; the result has its dtype."""
    cos, sin = rope
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def _frequencies(head_dim: int, theta: float, scaling: dict[str, Any] | None) -> Tensor:
    """Computes [K / 2] float32, in radians a token: theta^(-2i / K), changed as `scaling` says."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequency = 1 / theta**exponents
    if scaling is None:
        return frequency
    slowed = frequency / scaling["factor"]
    if scaling["kind"] == "linear":
        return slowed
    if scaling["kind"] == "llama3":
        turns = scaling["original_length"] * frequency / (2 * math.pi)
        low, high = scaling["low_frequency_factor"], scaling["high_frequency_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    else:
        kept = _kept_by_yarn(head_dim, theta, scaling)
    return (1 - kept) * slowed + kept * frequency


def _kept_by_yarn(head_dim: int, theta: float, scaling: dict[str, Any]) -> Tensor:
    """Computes how much of each frequency stays, in [0, 1] (arXiv 2309.00071, section 3.2)."""

    def dimension(turns: float) -> float:  # the i whose frequency turns so often in the old context
        length = scaling["original_length"]
        return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = dimension(scaling["beta_fast"]), dimension(scaling["beta_slow"])
    if scaling["truncate"]:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001
    steps = torch.arange(head_dim // 2, dtype=torch.float32)
    return 1 - ((steps - first) / (last - first)).clamp(0, 1)
