"""Byte tokens to text and back, and a model continuing texts."""

import codecs
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np
from flax import nnx

import nha_jax
from nha_jax.engine import chunk_for
from train.checkpoint import load_model_state
from train.corpus import END_OF_DOCUMENT
from train.errors import ConfigError
from train.run_folder import RunFolder

Finish = Literal["stop", "length"]


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


def encode(text: str) -> np.ndarray:
    """[bytes] int32, the text's UTF-8. Lone surrogates stand for bytes that are not UTF-8."""
    return np.frombuffer(text.encode(errors="surrogateescape"), np.uint8).astype(np.int32)


def read_tokens(path: str, limit: int | None = None) -> np.ndarray:
    """The first `limit` bytes of a file as tokens, [at most limit] int32; "-": standard input.

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
    return np.frombuffer(content, np.uint8).astype(np.int32)


class Piece(NamedTuple):
    """What came next of a text."""

    prompt: int  # its index
    token: int
    log_probability: float
    text: str  # may be empty: bytes of a character that is not complete, or perhaps a stop string
    finished: Finish | None


def continue_texts(
    engine: nha_jax.Engine,
    prompts: Sequence[np.ndarray],
    options: nha_jax.SamplingOptions,
    stop_strings: Sequence[str] = (),
) -> Iterator[Piece]:
    """Continues prompts [T], each with a seed of its own, and gives what is written as it comes.

    The end of the document ends a text, as do `options.stop_tokens` and the stop strings; neither
    is part of it. Bytes that are not UTF-8 come out as the replacement character.

    Raises:
        ValueError: a prompt does not fit the engine; see `nha_jax.Engine.submit`.
    """
    texts = {
        engine.submit(prompt, options.for_row(i)): _Text(i, stop_strings)
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


def complete(model: nha_jax.Model, prompt: str, options: nha_jax.SamplingOptions) -> str:
    """What the model writes after `prompt`, up to the end of the document."""
    tokens = encode(prompt)
    engine = nha_jax.Engine(
        model,
        batch_size=1,
        max_length=len(tokens) + options.max_new_tokens,
        prefill_chunk=chunk_for(len(tokens)),
    )
    return "".join(piece.text for piece in continue_texts(engine, [tokens], options))


class _Text:
    """The text of one prompt as its bytes come in."""

    def __init__(self, prompt: int, stop_strings: Sequence[str]):
        self.prompt = prompt
        self.finished = False
        self._stop_strings = stop_strings
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held_back = ""

    def add(self, event: nha_jax.Event) -> tuple[str, Finish | None]:
        """What can be shown after this token, and whether the text is finished."""
        finished: Finish | None = event.finished
        if event.token == END_OF_DOCUMENT:
            finished = "stop"
        ends = finished == "stop" or event.token >= END_OF_DOCUMENT
        byte = b"" if ends else bytes([event.token])
        text = self._held_back + self._decoder.decode(byte, final=finished is not None)
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
