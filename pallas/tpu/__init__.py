"""Mosaic TPU kernels of the operator."""

from pallas.tpu.attention import Fused, fused_attention
from pallas.tpu.block_sizes import BlockSizes, default_block_sizes
from pallas.tpu.chunk import Spec, expand_table, pack_facts, pack_visible

__all__ = [
    "BlockSizes",
    "Fused",
    "Spec",
    "default_block_sizes",
    "expand_table",
    "fused_attention",
    "pack_facts",
    "pack_visible",
]
