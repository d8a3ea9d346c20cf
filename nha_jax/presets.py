"""The named model configurations of `ModelConfig.preset`."""

from typing import Any

_PUBLISHED: dict[str, Any] = {
    "vocab_size": 32000,
    "num_layers": 24,
    "num_query_heads": 4,
    "num_slots": 64,
    "window_size": 32,
    "conv_width": 0,
    "tie_embeddings": True,
}

_BYTE_LEVEL: dict[str, Any] = {"vocab_size": 257, "tie_embeddings": True}

PRESETS: dict[str, dict[str, Any]] = {
    "nha-tiny": {
        **_BYTE_LEVEL,
        "num_layers": 3,
        "hidden_size": 128,
        "num_query_heads": 2,
        "num_slots": 32,
        "window_size": 32,
    },
    "nha-20m": {
        **_BYTE_LEVEL,
        "num_layers": 10,
        "hidden_size": 384,
        "num_query_heads": 6,
        "num_slots": 64,
        "window_size": 64,
    },
    "nha-340m": {**_PUBLISHED, "hidden_size": 1024, "mlp_size": 2816},
    "nha-1.3b": {**_PUBLISHED, "hidden_size": 2048, "mlp_size": 5632},
    "llama-3-8b": {
        "vocab_size": 128256,
        "num_layers": 32,
        "hidden_size": 4096,
        "num_query_heads": 32,
        "num_kv_heads": 8,
        "num_slots": 64,
        "window_size": None,
        "mlp_size": 14336,
        "conv_width": 0,
        "value_activation": "identity",
        "output_norm": False,
        "empty_slots": "mask",
        "rope_theta": 500000.0,
        "norm_eps": 1e-5,
    },
}
"""Fields of a `ModelConfig`, by the name of the preset."""
