"""The layers of the model as flax.nnx modules, whose parameters name their axes."""

from nha_jax.layers.attention import NHAttention
from nha_jax.layers.attention_core import ConvolutionState, LayerCache, LayerDiagnostics
from nha_jax.layers.block import Block
from nha_jax.layers.convolution import ShortConvolution
from nha_jax.layers.experts import MixtureOfExperts
from nha_jax.layers.mlp import SwiGLU
from nha_jax.layers.parameters import LOGICAL_AXES

__all__ = [
    "LOGICAL_AXES",
    "Block",
    "ConvolutionState",
    "LayerCache",
    "LayerDiagnostics",
    "MixtureOfExperts",
    "NHAttention",
    "ShortConvolution",
    "SwiGLU",
]
