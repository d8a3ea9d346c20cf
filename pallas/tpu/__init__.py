"""Mosaic TPU kernels of the operator."""

from pallas.tpu.block_sizes import BlockSizes

__all__ = ["BlockSizes"]
