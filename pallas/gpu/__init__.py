"""Mosaic GPU kernels of the operator, for Hopper."""

from pallas.gpu.attention import RESIDUAL_NAMES, Fused, fused_attention
from pallas.gpu.block_sizes import BlockSizes, default_block_sizes
from pallas.gpu.spec import CHUNK, Spec

__all__ = [
    "CHUNK",
    "RESIDUAL_NAMES",
    "BlockSizes",
    "Fused",
    "Spec",
    "default_block_sizes",
    "fused_attention",
]
