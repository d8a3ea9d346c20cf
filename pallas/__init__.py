"""Kernels of Native Hybrid Attention: they know arrays, not models, meshes or configurations."""
