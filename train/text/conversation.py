"""A conversation with a model, of which nothing is read twice that the model has read before."""

import dataclasses
import sys
import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

import nha_jax
from nha_jax.prompt_lengths import room_for
from nha_jax.tokenizer.interface import Tokenizer
from train.data.chat_template import ChatTemplate, first_messages
from train.errors import ConfigError
from train.text.continuation import Prompted, WrittenToken, continue_texts

CHUNK = 128
"""Tokens from one snapshot of the cache to the next. Of a turn, what follows the last of the turn
before is read: its answer, the new message, and less than a chunk."""


LEAST_ROOM = 1024
"""Tokens that full attention has room for at first."""


@dataclasses.dataclass
class Reading:
    """What a conversation needed to be read, in tokens.

    Attributes:
        read: read by the model.
        kept: not read, as a turn before had left them in the cache.
    """

    read: int = 0
    kept: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How the engine of a conversation is made, see `nha_jax.Engine`.

    Attributes:
        prefill_chunk, prefix_bytes: as there.
        max_length: as there; None: LEAST_ROOM, and when that is too little twice what is needed.
    """

    prefill_chunk: int = CHUNK
    prefix_bytes: int
    max_length: int | None = None


class Conversation:
    """The messages so far, and an engine that keeps what it has read of them.

    The model reads a turn on from the last snapshot of the cache that the new text begins with. If
    the template writes earlier messages otherwise than before, that is an earlier one, or none.

    Attributes:
        messages: what was said.
        reading: what had to be read for it.
    """

    def __init__(
        self,
        model: nha_jax.Model,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        engine: EngineOptions,
        system: str | None = None,
    ):
        self.messages = first_messages(system)
        self.reading = Reading()
        self._model, self._tokenizer, self._template = model, tokenizer, template
        self._options = engine
        self._engine: nha_jax.Engine | None = None
        self._room = 0
        self._turns = 0

    def answer(
        self, message: str, options: nha_jax.SamplingOptions, stop_strings: Sequence[str]
    ) -> Iterator[WrittenToken]:
        """Writes the answer to a message, token by token; both are then part of the conversation.

        Args:
            message: what the user says.
            options: how tokens are drawn. The first answer has this seed, the others their own
                from it.
            stop_strings: texts that end the answer.

        Raises:
            ConfigError: the template cannot be filled in.
            ValueError: the conversation is longer than the engine has room for.
        """
        self.messages.append({"role": "user", "content": message})
        text = self._template.render_messages(self.messages)
        prompt = self._tokenizer.encode_prompt(text, chat=True)
        engine = self._engine_for(len(prompt) + options.max_new_tokens)
        before = engine.prefix_statistics
        seeded = options.for_row(self._turns) if self._turns else options
        self._turns += 1
        answer = ""
        for token in continue_texts(engine, self._tokenizer, [prompt], seeded, stop_strings):
            answer += token.text
            yield token
        self.messages.append({"role": "assistant", "content": answer})
        after = engine.prefix_statistics
        self.reading.read += after.tokens_read - before.tokens_read
        self.reading.kept += after.tokens_saved - before.tokens_saved

    def _engine_for(self, num_tokens: int) -> nha_jax.Engine:
        """Returns the engine; a new one, which has read nothing, if it has too little room."""
        given, full = self._options.max_length, None in self._model.config.windows
        if self._engine is None or (full and given is None and num_tokens > self._room):
            self._room = LEAST_ROOM if num_tokens <= LEAST_ROOM else room_for(2 * num_tokens)
            self._engine = nha_jax.Engine(
                self._model,
                batch_size=1,
                max_length=self._room if given is None else given,
                prefill_chunk=self._options.prefill_chunk,
                prefix_bytes=self._options.prefix_bytes,
            )
        return self._engine


def converse(
    conversation: Conversation,
    turns: Iterable[str],
    options: nha_jax.SamplingOptions,
    stop_strings: Sequence[str],
    *,
    as_json: bool,
) -> None:
    """Answers each turn and prints it as it is written; then says on stderr what had to be read.

    Args:
        conversation: where turns and answers go.
        turns: what the user says.
        options, stop_strings: see `Conversation.answer`.
        as_json: whether to print each answer as a line of JSON instead.
    """
    count, seconds, answers = 0, 0.0, 0
    for turn in turns:
        start = time.perf_counter()
        answer = Prompted("--chat", turn, np.zeros(0, np.int32), repeated=False)
        for token in conversation.answer(turn, options, stop_strings):
            answer.add(token)
            print("" if as_json else token.text, end="", flush=True)
        print(answer.show(0, as_json=True) if as_json else "", flush=True)
        seconds += time.perf_counter() - start
        count, answers = count + len(answer.written), answers + 1
    reading = conversation.reading
    print(
        f"{answers} answers of {count} tokens in {seconds:.1f} s; {reading.read} tokens to read, "
        f"and {reading.kept} kept from turns before",
        file=sys.stderr,
    )


def ends_of_turn(template: ChatTemplate, tokenizer: Tokenizer) -> tuple[list[int], list[str]]:
    """Finds what a template writes behind an answer, by which the answer ends.

    Returns:
        The special token, or else the text if it is not white space alone, as lists for
        `SamplingOptions.stop_tokens` and stop strings; empty if the template refuses to show it.
    """
    try:
        behind = template.end_of_turn()
    except ConfigError:
        return [], []
    spans = tokenizer.encode_with_spans(behind, chat=True)
    if spans.special.any():
        return [int(spans.tokens[spans.special][0])], []
    return [], [behind.rstrip()] if behind.strip() else []
