"""Mosaic TPU kernels of the operator."""

from pallas.tpu.arithmetic import LANES, expand_table
from pallas.tpu.attention import Fused, fused_attention
from pallas.tpu.block_sizes import BlockSizes, default_block_sizes
from pallas.tpu.launch import VMEM_BYTES
from pallas.tpu.segments import pack_chunk_segments, pack_row_segments
from pallas.tpu.spec import LARGEST_HEAD, ROW_TILE, CallSpec
from pallas.tpu.vmem import Sizes, vmem_needed

__all__ = [
    "LANES",
    "LARGEST_HEAD",
    "ROW_TILE",
    "VMEM_BYTES",
    "BlockSizes",
    "CallSpec",
    "Fused",
    "Sizes",
    "default_block_sizes",
    "expand_table",
    "fused_attention",
    "pack_chunk_segments",
    "pack_row_segments",
    "vmem_needed",
]
