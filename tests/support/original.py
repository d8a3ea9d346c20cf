"""A small model with full attention, as an import leaves it: what hybrids are made of."""

from typing import Any

import nha_jax


def original_config(**sizes: Any) -> nha_jax.ModelConfig:
    """Its configuration, of bytes and in float32.

    Args:
        sizes: `num_layers`, and whatever else is to be otherwise.
    """
    values: dict[str, Any] = {
        "vocab_size": 257,
        "hidden_size": 16,
        "num_query_heads": 2,
        "num_kv_heads": 1,
        "num_slots": 4,
        "window_size": None,
        "mlp_size": 24,
        "conv_width": 0,
        "value_activation": "identity",
        "output_norm": False,
        "empty_slots": "mask",
        "initializer_range": 0.3,
        "dtype": "float32",
        "remat": "none",
    }
    return nha_jax.ModelConfig(**values | sizes)
