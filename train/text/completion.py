"""Texts of the user as tokens, and a model continuing them."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np
from flax import nnx

import nha_jax
from nha_jax.generation.engine import chunk_for
from nha_jax.storage.saved_model import ORIGINAL_CONFIG_FILE, WEIGHTS_FILE, open_saved
from train.checkpoint.checkpoints import load_model_state
from train.data.tokenizer.tokenizer import (
    BYTE_VOCABULARY,
    TOKENIZER_FILE,
    Tokenizer,
    load_tokenizer,
)
from train.errors import ConfigError
from train.storage.run_folder import RunFolder

Finish = Literal["stop", "length"]

# Bytes: tokens are shorter in the mean.
_LONGEST_TOKEN = 16


def load_model(path: str) -> nha_jax.Model:
    """The model of a folder: one that `nha_jax.save` wrote, or a run's newest checkpoint.

    Raises:
        ConfigError: there is neither, or it is damaged.
    """
    _check_folder(path)
    if (Path(path) / "model.safetensors").exists():
        with _as_config_error():
            return nha_jax.load(path)
    folder = RunFolder(path)
    config = nha_jax.ModelConfig.from_dict(folder.model_config())
    graph, state = jax.eval_shape(lambda: nnx.split(nha_jax.Model(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graph, load_model_state(folder.checkpoints, state))


def load_tokenizer_of(path: str) -> Tokenizer:
    """What the tokens of a folder's model mean, a run's or a saved one's.

    Raises:
        ConfigError: there is no such folder, the package tokenizers is missing, or the model was
            imported without its tokenizer.
        DataError: the tokenizer's files are damaged.
    """
    _check_folder(path)
    folder = Path(path)
    tokenizer = load_tokenizer(folder)
    imported = (folder / WEIGHTS_FILE).exists() and (folder / ORIGINAL_CONFIG_FILE).exists()
    if tokenizer.name == "bytes" and imported:
        with _as_config_error():
            size = open_saved(path)[0].vocab_size
        if size != BYTE_VOCABULARY:
            raise ConfigError(
                f"{path}: it was imported without its tokenizer, and its {size} tokens are no "
                f"bytes; put the original's {TOKENIZER_FILE} into this folder"
            )
    return tokenizer


@contextlib.contextmanager
def _as_config_error() -> Iterator[None]:
    """What is wrong with a saved model, in a line."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ConfigError(" ".join(str(error).split())) from None


def _check_folder(path: str) -> None:
    if not Path(path).is_dir():
        raise ConfigError(f"{path}: no such folder; expected a run or a saved model")


def read_tokens(path: str, tokenizer: Tokenizer, limit: int | None = None) -> np.ndarray:
    """The first `limit` tokens of a file, [at most limit] int32; "-": standard input.

    They begin as `Tokenizer.encode_prompt` says; errors as of `read_text`.
    """
    text = read_text(path, None if limit is None else limit * _LONGEST_TOKEN)
    return tokenizer.encode_prompt(text)[:limit]


def read_text(path: str, limit: int | None = None) -> str:
    """The first `limit` bytes of a file; "-": standard input. Surrogates stand for what is no text.

    Raises:
        ConfigError: it cannot be read, or is empty.
    """
    try:
        with sys.stdin.buffer if path == "-" else Path(path).open("rb") as file:
            content = file.read(-1 if limit is None else limit)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the text: {error.strerror}") from None
    if not content:
        raise ConfigError(f"{path}: the text is empty")
    return content.decode(errors="surrogateescape")


class Piece(NamedTuple):
    """What came next of a text."""

    prompt: int  # its index
    token: int
    log_probability: float
    text: str  # may be empty: a part of a character that is not complete, or perhaps a stop string
    finished: Finish | None


def continue_texts(
    engine: nha_jax.Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[np.ndarray],
    options: nha_jax.SamplingOptions,
    stop_strings: Sequence[str] = (),
) -> Iterator[Piece]:
    """Continues prompts [T], each with a seed of its own, and gives what is written as it comes.

    The end of the document ends a text, as do `options.stop_tokens` and the stop strings; neither
    is part of it. Bytes that are no character come out as the replacement character.

    Raises:
        ValueError: a prompt does not fit the engine; see `nha_jax.Engine.submit`.
    """
    texts = {
        engine.submit(prompt, options.for_row(i)): _Text(i, tokenizer, prompt, stop_strings)
        for i, prompt in enumerate(prompts)
    }
    for event in engine.run():
        text = texts[event.request]
        if text.finished:
            continue
        written, finished = text.add(event)
        if finished and not event.finished:
            engine.cancel(event.request)
        yield Piece(text.prompt, event.token, event.log_probability, written, finished)


def complete(
    model: nha_jax.Model, tokenizer: Tokenizer, prompt: str, options: nha_jax.SamplingOptions
) -> str:
    """What the model writes after `prompt`, up to the end of the document."""
    tokens = tokenizer.encode_prompt(prompt)
    engine = nha_jax.Engine(
        model,
        batch_size=1,
        max_length=len(tokens) + options.max_new_tokens,
        prefill_chunk=chunk_for(len(tokens)),
    )
    return "".join(piece.text for piece in continue_texts(engine, tokenizer, [tokens], options))


class _Text:
    """The text after one prompt as its tokens come in."""

    def __init__(
        self, number: int, tokenizer: Tokenizer, prompt: np.ndarray, stop_strings: Sequence[str]
    ):
        self.prompt = number
        self.finished = False
        self._stop_strings = stop_strings
        self._end_token = tokenizer.end_token
        self._decoder = tokenizer.decoder(prompt)
        self._held_back = ""

    def add(self, event: nha_jax.Event) -> tuple[str, Finish | None]:
        """What can be shown after this token, and whether the text is finished."""
        finished: Finish | None = event.finished
        if event.token == self._end_token:
            finished = "stop"
        text = self._held_back
        if finished != "stop":
            text += self._decoder.add(event.token)
        if finished:
            text += self._decoder.finish()
        places = [text.find(stop) for stop in self._stop_strings if stop in text]
        if places:
            text, finished = text[: min(places)], "stop"
        keep = 0 if finished else self._possible_stop(text)
        self._held_back = text[len(text) - keep :]
        self.finished = finished is not None
        return text[: len(text) - keep], finished

    def _possible_stop(self, text: str) -> int:
        """How many characters at the text's end may be the beginning of a stop string."""
        return max(
            (
                length
                for stop in self._stop_strings
                for length in range(1, len(stop))
                if text.endswith(stop[:length])
            ),
            default=0,
        )
