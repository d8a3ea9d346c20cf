"""Tiny random models of every family, made by transformers, and what they compute.

Run by hand, where torch and transformers are installed: `python -m tests.support.hf.make_fixtures`
writes tests/support/hf/fixtures/. The ordinary tests read what lies there and need neither package.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

FIXTURES = Path(__file__).parent / "fixtures"

PROMPT, NEW_TOKENS = 8, 12

_TINY: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
}


def _rope(kind: str, theta: float = 10000.0, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **parameters}}


_LLAMA_3 = _rope(
    "llama3",
    theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

# Model type, and the fields that differ from _TINY. Contexts are stretched from a length below that
# of the tokens read, so that the stretching shows.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2": ("llama", {"hidden_size": 32, "num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama-3.1": ("llama", {"head_dim": 8, **_LLAMA_3}),
    "llama-linear": ("llama", {"head_dim": 8, "attention_bias": True, **_rope("linear", factor=4)}),
    "mistral": ("mistral", {"head_dim": 8, "sliding_window": None}),
    "qwen2": ("qwen2", {"hidden_size": 32, "tie_word_embeddings": True}),
    "qwen2-yarn": (
        "qwen2",
        {"hidden_size": 32, **_rope("yarn", factor=4.0, original_max_position_embeddings=16)},
    ),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-moe": ("qwen3_moe", {"head_dim": 8, "norm_topk_prob": True, **_EXPERTS}),
}

BFLOAT16, SHARDED = "mistral", "llama-2"


def random_model(name: str, seed: int, **changes: Any) -> Any:
    """Makes a model of `MODELS` whose weights, biases and norms are all far from their defaults."""
    model_type, differences = MODELS[name]
    config = transformers.AutoConfig.for_model(model_type, **_TINY | differences | changes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 * noise + (1.0 if "norm" in parameter_name else 0.0))
    return model.to(torch.bfloat16 if name == BFLOAT16 else torch.float32).eval()


def what_it_computes(folder: Path, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Computes float32 logits of tokens [B, T], and greedy tokens after the first PROMPT."""
    # Loaded again: turning the model into bfloat16 has rounded the frequencies of its rotations.
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = torch.tensor(tokens)[:, :PROMPT]
    with torch.no_grad():
        logits = model(torch.tensor(tokens)).logits.numpy()
        greedy = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=0,
        ).numpy()
    return {"tokens": tokens, "logits": logits, "greedy": greedy[:, PROMPT:]}


def main() -> int:
    for seed, name in enumerate(MODELS):
        folder = FIXTURES / name
        shutil.rmtree(folder, ignore_errors=True)
        model = random_model(name, seed)
        model.save_pretrained(folder, max_shard_size="40KB" if name == SHARDED else "1GB")
        tokens = np.random.default_rng(seed).integers(0, _TINY["vocab_size"], (1, 40))
        np.savez_compressed(folder / "expected.npz", **what_it_computes(folder, tokens))
        logits = np.load(folder / "expected.npz")["logits"]
        print(f"{name}: logits up to {np.abs(logits).max():.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
