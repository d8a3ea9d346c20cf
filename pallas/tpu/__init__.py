"""Mosaic TPU kernels of the operator."""

from pallas.tpu.arithmetic import expand_table
from pallas.tpu.attention import Fused, fused_attention
from pallas.tpu.block_sizes import BlockSizes, default_block_sizes
from pallas.tpu.segments import pack_chunk_segments, pack_row_segments
from pallas.tpu.spec import LANES, ROW_TILE, CallSpec

__all__ = [
    "LANES",
    "ROW_TILE",
    "BlockSizes",
    "CallSpec",
    "Fused",
    "default_block_sizes",
    "expand_table",
    "fused_attention",
    "pack_chunk_segments",
    "pack_row_segments",
]
