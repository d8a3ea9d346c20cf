"""Writes rope_of_transformers.json: what `transformers` makes of rope scalings.

Usage, where torch and transformers are installed: python tests/support/ops/rope_of_transformers.py
"""

import json
from pathlib import Path

import transformers
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# name -> (head_dim, theta, rope_parameters of transformers)
CASES = {
    "linear-2": (64, 10000.0, {"rope_type": "linear", "factor": 2.0}),
    "linear-2.5": (128, 1000000.0, {"rope_type": "linear", "factor": 2.5}),
    "llama-3.1-8b": (
        128,
        500000.0,
        {"rope_type": "llama3", "original_max_position_embeddings": 8192, **LLAMA3},
    ),
    "llama-3.2-1b": (
        64,
        500000.0,
        {"rope_type": "llama3", "original_max_position_embeddings": 8192, **LLAMA3, "factor": 32.0},
    ),
    "llama3-short": (
        16,
        10000.0,
        {
            "rope_type": "llama3",
            "original_max_position_embeddings": 64,
            "factor": 4.0,
            "low_freq_factor": 0.5,
            "high_freq_factor": 3.0,
        },
    ),
    "yarn-qwen2.5": (
        128,
        1000000.0,
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    ),
    "yarn-untruncated": (
        64,
        150000.0,
        {
            "rope_type": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "truncate": False,
        },
    ),
    "yarn-attention-factor": (
        32,
        10000.0,
        {
            "rope_type": "yarn",
            "factor": 3.0,
            "original_max_position_embeddings": 100,
            "attention_factor": 0.8,
        },
    ),
    # Short enough that even the slowest dimension of the blend is below the first.
    "yarn-no-blend": (
        8,
        10000.0,
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 6},
    ),
}


def main() -> None:
    results = {}
    for name, (head_dim, theta, parameters) in CASES.items():
        config = LlamaConfig(
            hidden_size=2 * head_dim,
            num_attention_heads=2,
            head_dim=head_dim,
            max_position_embeddings=131072,
            rope_parameters={"rope_theta": theta, **parameters},
        )
        function = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
        frequencies, scale = function(config, "cpu")
        results[name] = {
            "head_dim": head_dim,
            "theta": theta,
            "parameters": parameters,
            "frequencies": frequencies.tolist(),
            "attention_scaling": scale,
        }
    written = {"transformers": transformers.__version__, "cases": results}
    Path(__file__).with_suffix(".json").write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
