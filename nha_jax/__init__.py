"""Native Hybrid Attention (arXiv 2510.07019) in JAX: the operator, and language models of it."""

from importlib.metadata import version

from nha_jax.config import ModelConfig
from nha_jax.generation.engine import Engine, Event
from nha_jax.generation.generate import Generated, generate
from nha_jax.generation.sampling import SamplingOptions
from nha_jax.hf import from_pretrained, save_pretrained
from nha_jax.layers.diagnostics import Diagnostics
from nha_jax.model import Model, ModelCache
from nha_jax.ops import NHAOutput, NHAState, nha_attention
from nha_jax.storage.saved_model import load, save

__version__ = version("nha_jax")

__all__ = [
    "Diagnostics",
    "Engine",
    "Event",
    "Generated",
    "Model",
    "ModelCache",
    "ModelConfig",
    "NHAOutput",
    "NHAState",
    "SamplingOptions",
    "from_pretrained",
    "generate",
    "load",
    "nha_attention",
    "save",
    "save_pretrained",
]
