"""A model's continuations of prompts, token by token and as text."""

import json
import sys
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

import nha_jax
from nha_jax.prompt_lengths import chunk_for, room_for
from nha_jax.tokenizer.interface import Tokenizer

Finish = Literal["stop", "length"]


class WrittenToken(NamedTuple):
    """A token that the model wrote after a prompt.

    Attributes:
        prompt: the prompt's index.
        token: the token.
        log_probability: its natural log-probability; see `nha_jax.Event`.
        text: the text that can be shown now that the token is there. It is empty while a character
            is not complete, or while the text may yet become a stop string.
        finished: why the text ends with this token, or None if it goes on.
    """

    prompt: int
    token: int
    log_probability: float
    text: str
    finished: Finish | None


class Prompted:
    """A prompt and what came after it.

    Attributes:
        tokens: of the prompt.
        shown: what is repeated of it before its text.
        written, log_probabilities, text: what came after it.
        finished: why the text ended; None: it goes on.
    """

    def __init__(self, option: str, value: str, tokens: np.ndarray, *, repeated: bool):
        self.option, self.value, self.tokens = option, value, tokens
        self.shown = value if repeated else ""
        self.written: list[int] = []
        self.log_probabilities: list[float] = []
        self.text = ""
        self.finished: str | None = None

    def add(self, token: WrittenToken) -> None:
        self.written.append(token.token)
        self.log_probabilities.append(round(token.log_probability, 6))
        self.text, self.finished = self.text + token.text, token.finished

    def show(self, index: int, *, as_json: bool) -> str:
        if as_json:
            record = {
                "prompt": self.value,
                "from": self.option,
                "text": self.text,
                "tokens": self.written,
                "log_probabilities": self.log_probabilities,
                "finished": self.finished,
            }
            readable = (sys.stdout.encoding or "utf-8").lower().startswith("utf")
            return json.dumps(record, ensure_ascii=not readable)
        name = "" if self.shown else f": {self.value}"
        return f"{'\n' * (index > 0)}=== prompt {index + 1}{name} ===\n{self.shown}{self.text}"


def continue_texts(
    engine: nha_jax.Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[np.ndarray],
    options: nha_jax.SamplingOptions,
    stop_strings: Sequence[str] = (),
) -> Iterator[WrittenToken]:
    """Continues several prompts at once and gives every token as soon as it is written.

    A text ends with the end of the document, with one of `options.stop_tokens` or with a stop
    string, none of which is part of it, or after `options.max_new_tokens`. Bytes that are no
    character come out as the replacement character.

    Args:
        engine: what runs the model.
        tokenizer: what turns tokens into text.
        prompts: tokens [T] of each prompt.
        options: how tokens are drawn. Each prompt gets a seed of its own from `options.seed`.
        stop_strings: texts that end a text; none is empty.

    Raises:
        ValueError: a stop string is empty, or a prompt does not fit the engine; see
            `nha_jax.Engine.submit`.
    """
    if not all(stop_strings):
        raise ValueError("stop_strings: expected at least one character in each, got ''")
    texts = {
        engine.submit(prompt, options.for_row(i)): _GrowingText(i, tokenizer, prompt, stop_strings)
        for i, prompt in enumerate(prompts)
    }
    for event in engine.run():
        text = texts[event.request]
        shown, finished = text.add(event)
        if finished and not event.finished:
            engine.cancel(event.request)
        yield WrittenToken(text.prompt, event.token, event.log_probability, shown, finished)


def complete(
    model: nha_jax.Model, tokenizer: Tokenizer, prompt: str, options: nha_jax.SamplingOptions
) -> str:
    """Writes what follows `prompt`, up to the end of the document or `options.max_new_tokens`."""
    tokens = tokenizer.encode_prompt(prompt)
    engine = nha_jax.Engine(
        model,
        batch_size=1,
        max_length=room_for(len(tokens) + options.max_new_tokens),
        prefill_chunk=chunk_for(len(tokens)),
    )
    written = continue_texts(engine, tokenizer, [tokens], options)
    return "".join(token.text for token in written)


class _GrowingText:
    """The text after one prompt while its tokens come in."""

    def __init__(
        self, number: int, tokenizer: Tokenizer, prompt: np.ndarray, stop_strings: Sequence[str]
    ):
        self.prompt = number
        self._stop_strings = stop_strings
        self._end_token = tokenizer.end_token
        self._decoder = tokenizer.decoder(prompt)
        self._held_back = ""

    def add(self, event: nha_jax.Event) -> tuple[str, Finish | None]:
        """Takes the next token; returns what can now be shown, and why the text ends or None."""
        finished: Finish | None = event.finished
        if event.token == self._end_token:
            finished = "stop"
        text = self._held_back
        if finished != "stop":
            text += self._decoder.add(event.token)
        if finished:
            text += self._decoder.finish()
        found = [text.find(stop) for stop in self._stop_strings if stop in text]
        if found:
            text, finished = text[: min(found)], "stop"
        keep = 0 if finished else self._length_of_possible_stop(text)
        self._held_back = text[len(text) - keep :]
        return text[: len(text) - keep], finished

    def _length_of_possible_stop(self, text: str) -> int:
        """Counts the characters at the text's end that may begin a stop string."""
        return max(
            (
                length
                for stop in self._stop_strings
                for length in range(1, len(stop))
                if text.endswith(stop[:length])
            ),
            default=0,
        )
