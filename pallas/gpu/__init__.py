"""Mosaic GPU kernels of the operator, for Hopper."""

from pallas.gpu.attention import Fused, fused_attention
from pallas.gpu.block_sizes import BlockSizes, default_block_sizes
from pallas.gpu.spec import CHUNK, LARGEST_HEAD, CallSpec

__all__ = [
    "CHUNK",
    "LARGEST_HEAD",
    "BlockSizes",
    "CallSpec",
    "Fused",
    "default_block_sizes",
    "fused_attention",
]
