"""Native Hybrid Attention (arXiv 2510.07019) in JAX: the operator, and language models of it.

Every public name loads its module when it is first used, so that `import nha_jax` is quick and
loads no kernel, no model and no file format.
"""

from importlib.metadata import version
from typing import TYPE_CHECKING

from nha_jax.lazy import lazy_names

__version__ = version("nha_jax")

if TYPE_CHECKING:
    from nha_jax.adapters import add_adapter, merge_adapter
    from nha_jax.cache import ModelCache
    from nha_jax.config import ModelConfig
    from nha_jax.config_parts import Adapter
    from nha_jax.generation.engine import Engine, Event
    from nha_jax.generation.generate import Generated, generate
    from nha_jax.generation.prefixes import Prefix, PrefixStatistics
    from nha_jax.generation.sampling import SamplingOptions
    from nha_jax.generation.score import Score, score
    from nha_jax.hf.export import save_pretrained
    from nha_jax.hf.pretrained import from_pretrained
    from nha_jax.layers.attention import NHAttention
    from nha_jax.layers.diagnostics import Diagnostics
    from nha_jax.model import Model
    from nha_jax.muon import muon_dimension_numbers
    from nha_jax.mup_steps import scale_by_mup
    from nha_jax.ops.api import nha_attention
    from nha_jax.ops.state import NHAState
    from nha_jax.ops.types import NHAOutput
    from nha_jax.sizes import flops_per_token, num_parameters, training_flops_per_token
    from nha_jax.storage.saved_adapter import load_adapter, save_adapter
    from nha_jax.storage.saved_model import load, save
    from nha_jax.tokenizer.from_file import load_tokenizer
    from nha_jax.tokenizer.interface import Tokenizer
    from nha_jax.unstacked import UnstackedModel, stack, unstack
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "Adapter": "nha_jax.config_parts",
            "Diagnostics": "nha_jax.layers.diagnostics",
            "Engine": "nha_jax.generation.engine",
            "Event": "nha_jax.generation.engine",
            "Generated": "nha_jax.generation.generate",
            "Model": "nha_jax.model",
            "ModelCache": "nha_jax.cache",
            "ModelConfig": "nha_jax.config",
            "NHAOutput": "nha_jax.ops.types",
            "NHAState": "nha_jax.ops.state",
            "NHAttention": "nha_jax.layers.attention",
            "Prefix": "nha_jax.generation.prefixes",
            "PrefixStatistics": "nha_jax.generation.prefixes",
            "SamplingOptions": "nha_jax.generation.sampling",
            "Score": "nha_jax.generation.score",
            "Tokenizer": "nha_jax.tokenizer.interface",
            "UnstackedModel": "nha_jax.unstacked",
            "add_adapter": "nha_jax.adapters",
            "flops_per_token": "nha_jax.sizes",
            "from_pretrained": "nha_jax.hf.pretrained",
            "generate": "nha_jax.generation.generate",
            "load": "nha_jax.storage.saved_model",
            "load_adapter": "nha_jax.storage.saved_adapter",
            "load_tokenizer": "nha_jax.tokenizer.from_file",
            "merge_adapter": "nha_jax.adapters",
            "muon_dimension_numbers": "nha_jax.muon",
            "nha_attention": "nha_jax.ops.api",
            "num_parameters": "nha_jax.sizes",
            "save": "nha_jax.storage.saved_model",
            "save_adapter": "nha_jax.storage.saved_adapter",
            "save_pretrained": "nha_jax.hf.export",
            "scale_by_mup": "nha_jax.mup_steps",
            "score": "nha_jax.generation.score",
            "stack": "nha_jax.unstacked",
            "training_flops_per_token": "nha_jax.sizes",
            "unstack": "nha_jax.unstacked",
        },
    )

__all__ = [
    "Adapter",
    "Diagnostics",
    "Engine",
    "Event",
    "Generated",
    "Model",
    "ModelCache",
    "ModelConfig",
    "NHAOutput",
    "NHAState",
    "NHAttention",
    "Prefix",
    "PrefixStatistics",
    "SamplingOptions",
    "Score",
    "Tokenizer",
    "UnstackedModel",
    "add_adapter",
    "flops_per_token",
    "from_pretrained",
    "generate",
    "load",
    "load_adapter",
    "load_tokenizer",
    "merge_adapter",
    "muon_dimension_numbers",
    "nha_attention",
    "num_parameters",
    "save",
    "save_adapter",
    "save_pretrained",
    "scale_by_mup",
    "score",
    "stack",
    "training_flops_per_token",
    "unstack",
]
