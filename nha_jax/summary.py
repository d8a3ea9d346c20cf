"""What a model is, in the few lines that it prints as."""

from collections.abc import Iterable

import jax

from nha_jax.config import ModelConfig


def summary(name: str, config: ModelConfig, parameters: Iterable[jax.Array]) -> str:
    """Describes a model for people: sizes, windows, implementation, and parameters as they are.

    Args:
        name: of the model's class.
        config: of the model.
        parameters: the arrays that it holds, or their shapes and dtypes; none is read.

    Returns:
        Some lines, without an end of line after the last.
    """
    arrays = list(parameters)
    count = sum(array.size for array in arrays)
    dtypes = " and ".join(sorted({str(array.dtype) for array in arrays}))
    head = "tied to the embedding" if config.tie_embeddings else "of its own"
    taps = config.conv_width
    return "\n  ".join(
        [
            f"{name}: {count:,} parameters in {dtypes}, computed in {config.dtype}",
            f"layers: {config.num_layers} of hidden size {config.hidden_size}, {_mlp(config)}",
            f"vocabulary: {config.vocab_size:,}, head {head}",
            f"attention: {config.num_query_heads} query heads, {config.num_kv_heads} key/value "
            f"heads, key size {config.key_dim}, value size {config.value_dim}, "
            + (f"convolution of {taps} taps" if taps else "no convolution"),
            f"memory: {config.num_slots} slots a key/value head, {_windows(config)}",
            f"implementation: {config.implementation or 'None, the fastest that serves'}",
        ]
    )


def _mlp(config: ModelConfig) -> str:
    experts = config.experts
    if experts is None:
        return f"MLP size {config.mlp_size}"
    return f"{experts.count} experts of size {experts.size}, {experts.per_token} for each token"


def _windows(config: ModelConfig) -> str:
    """Writes the windows of one period: `window_size 32,32,None, 8 times over`."""
    period = config.window_period
    pattern = ",".join(map(str, period))
    times = config.num_layers // len(period)
    return f"window_size {pattern}" + (f", {times} times over" if times > 1 < len(period) else "")
