"""Byte tokens to text and back, and a model continuing a text."""

from pathlib import Path

import jax
import numpy as np
from flax import nnx

import nha_jax
from train.checkpoint import load_model_state
from train.corpus import END_OF_DOCUMENT
from train.errors import ConfigError
from train.run_folder import RunFolder


def load_model(path: str) -> nha_jax.Model:
    """The model of a folder: one that `nha_jax.save` wrote, or a run's newest checkpoint.

    Raises:
        ConfigError: there is neither.
    """
    if not Path(path).is_dir():
        raise ConfigError(f"{path}: no such folder; expected a run or a saved model")
    if (Path(path) / "model.safetensors").exists():
        return nha_jax.load(path)
    folder = RunFolder(path)
    config = nha_jax.ModelConfig.from_dict(folder.model_config())
    graph, state = jax.eval_shape(lambda: nnx.split(nha_jax.Model(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graph, load_model_state(folder.checkpoints, state))


def read_tokens(path: str, limit: int) -> np.ndarray:
    """The first `limit` bytes of a file as tokens, [at most limit] int32.

    Raises:
        ConfigError: it cannot be read, or is empty.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(limit)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the text: {error.strerror}") from None
    if not content:
        raise ConfigError(f"{path}: the text is empty")
    return np.frombuffer(content, np.uint8).astype(np.int32)


def complete(
    model: nha_jax.Model,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> str:
    """What the model writes after `prompt`, up to the end of the document.

    Bytes that are not UTF-8 come out as the replacement character.
    """
    tokens = nha_jax.generate(
        model,
        np.frombuffer(prompt.encode(), np.uint8).astype(np.int32),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop_token=END_OF_DOCUMENT,
    )
    written = [token for token in np.asarray(tokens).tolist() if token < END_OF_DOCUMENT]
    return bytes(written).decode(errors="replace")
