"""Models of every layout that the code for transformers computes, and what is read with them."""

from typing import Any

import jax
import numpy as np
from flax import nnx

import nha_jax

_TINY: dict[str, Any] = {
    "vocab_size": 48, "num_layers": 2, "hidden_size": 32, "num_query_heads": 4, "num_slots": 4,
    "mlp_size": 48, "conv_width": 0, "dtype": "float32", "remat": "none",
}  # fmt: skip

_PRETRAINED = {"value_activation": "identity", "output_norm": False, "empty_slots": "mask"}

LAYOUTS: dict[str, dict[str, Any]] = {
    "slots alone": {"window_size": 0, "conv_width": 4},
    "a window": {"window_size": 5, "tie_embeddings": True},
    "full attention": {"window_size": None, "conv_width": 3, "num_kv_heads": 1},
    "mixed, grouped heads": {"window_size": (20, None), "num_kv_heads": 2, "conv_width": 4},
    "feature map": {
        "window_size": (0, 40), "slot_feature_map": "silu", "empty_slots": "mask", "value_dim": 12,
        "gate_logit_normalizer": 0.5,
    },
    "overlapping windows": {
        "window_size": (7, 9), "slot_delay": 3, "attention_scale": 0.5, "output_norm_eps": 1e-3,
        "slot_feature_map": "relu", "num_kv_heads": 2,
    },
    "no slots": {"window_size": 6, "num_slots": 0, "key_dim": 6},
    "a hybrid Qwen": {
        "window_size": (4, None), "num_kv_heads": 2, "qk_norm": True, "attention_bias": "qkv",
        "tie_embeddings": True, "rope_scaling": {"kind": "yarn", "factor": 4.0,
        "original_length": 16}, **_PRETRAINED,
    },
    "a hybrid with experts": {
        "window_size": (None, 4), "num_kv_heads": 2, "attention_bias": "all",
        "experts": {"count": 4, "per_token": 2, "size": 16, "normalize": False},
        "rope_scaling": {"kind": "llama3", "factor": 8.0, "original_length": 16}, **_PRETRAINED,
    },
}  # fmt: skip
"""Fields of a `ModelConfig` by name: together, every option of it with every value."""


def layout(name: str, **changes: Any) -> nha_jax.ModelConfig:
    """Returns the config of a layout."""
    return nha_jax.ModelConfig(**_TINY | LAYOUTS[name] | changes)


def layout_model(config: nha_jax.ModelConfig) -> nha_jax.Model:
    """Makes a model whose weights, biases and norms are all far from where training starts."""
    model = nha_jax.Model(config, rngs=nnx.Rngs(0))
    random = np.random.default_rng(0)

    def draw(path: Any, x: jax.Array) -> np.ndarray:
        name = jax.tree_util.keystr(path)
        noise = 0.15 * random.standard_normal(x.shape)
        return np.asarray(noise + ("scale" in name), x.dtype)

    nnx.update(model, jax.tree_util.tree_map_with_path(draw, nnx.state(model, nnx.Param)))
    return model


def layout_inputs() -> dict[str, np.ndarray]:
    """Makes tokens [B, T], documents packed into them (0 is padding), prompts padded left."""
    tokens = np.random.default_rng(1).integers(0, 48, (2, 45))
    segments = np.array([[3] * 20 + [1] * 15 + [0] * 3 + [1] * 7, [0] * 7 + [2] + [5] * 37])
    mask = np.ones((2, 12), int)
    mask[0, :5] = 0
    return {"tokens": tokens, "segments": segments, "prompt": tokens[:, :12], "mask": mask}
