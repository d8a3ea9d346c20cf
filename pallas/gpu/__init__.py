"""Mosaic GPU kernels of the operator, for Hopper."""

from pallas.gpu.attention import Fused, fused_attention
from pallas.gpu.block_sizes import BlockSizes, default_block_sizes
from pallas.gpu.spec import CHUNK, Spec

__all__ = ["CHUNK", "BlockSizes", "Fused", "Spec", "default_block_sizes", "fused_attention"]
