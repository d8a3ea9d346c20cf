"""Mosaic TPU kernels of the operator."""

from pallas.tpu.arithmetic import expand_table
from pallas.tpu.attention import RESIDUAL_NAMES, Fused, fused_attention
from pallas.tpu.block_sizes import BlockSizes, default_block_sizes
from pallas.tpu.segments import pack_facts, pack_visible
from pallas.tpu.spec import Spec

__all__ = [
    "RESIDUAL_NAMES",
    "BlockSizes",
    "Fused",
    "Spec",
    "default_block_sizes",
    "expand_table",
    "fused_attention",
    "pack_facts",
    "pack_visible",
]
