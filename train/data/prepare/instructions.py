"""What a record becomes: a text, or tokens of which those that answer are marked.

A token is marked if one of its characters is. So a token that begins in a question and ends in the
answer is learned, and no character of an answer is left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from nha_jax.tokenizer.interface import TokenizedSpans, Tokenizer
from train.data.chat_template import ChatTemplate, MarkedText
from train.data.prepare.dialogues import (
    ASSISTANT,
    Message,
    checked_messages,
    mark_answers,
    write_out,
)
from train.data.prepare.documents import (
    BadDocumentError,
    Document,
    Form,
    MarkedTokens,
    PlainText,
    checked_text,
)
from train.errors import ConfigError

TooLong = Literal["cut", "drop"]


@dataclass(frozen=True)
class Instructions:
    """Which fields of a record are marked text, and how long it may be.

    Attributes:
        messages_field: the dialogue; None: a record is a prompt and its completion.
        prompt_field, completion_field: these two; None: it is a dialogue.
        chat_template: SHA-256 of the template that dialogues are written by.
        max_tokens: most tokens of a document; None: any number.
        too_long: "cut" longer dialogues behind one of the assistant's messages, or "drop" them.
    """

    messages_field: str | None = None
    prompt_field: str | None = None
    completion_field: str | None = None
    chat_template: str | None = None
    max_tokens: int | None = None
    too_long: TooLong = "cut"


@dataclass
class TooLongCounts:
    """How many documents were too long, and cut or dropped."""

    cut: int = 0
    dropped: int = 0


class Dialogues:
    """Records of which one field is a list of messages."""

    def __init__(
        self,
        rules: Instructions,
        template: ChatTemplate,
        tokenizer: Tokenizer,
        counts: TooLongCounts,
    ):
        assert rules.messages_field is not None
        self._field = rules.messages_field
        self._rules, self._template, self._tokenizer = rules, template, tokenizer
        self._counts = counts
        self.options: Mapping[str, str] = {self._field: "--messages-field"}

    def document(self, values: Sequence[object]) -> Document | None:
        messages = checked_messages(values[0], self._field)
        identity = write_out(messages)
        try:
            return self._fitting(messages, identity)
        except (BadDocumentError, ConfigError) as error:
            raise BadDocumentError(f"{self._field!r}: {error}") from None

    def document_of_text(self, text: str) -> Document:
        raise BadDocumentError("text, which has no messages; --chat reads JSON lines and tables")

    def _fitting(self, messages: list[Message], identity: str) -> MarkedTokens | None:
        """Makes the document of as many messages as --max-tokens has room for."""
        document = self._encode(messages, identity)
        if _fits(document, self._rules):
            return document
        if self._rules.too_long == "cut":
            answers = [n for n, x in enumerate(messages) if x["role"] == ASSISTANT]
            for last in reversed(answers):
                shorter = messages[: last + 1]
                if len(shorter) < len(messages) and self._may_fit(shorter):
                    document = self._encode(shorter, identity)
                    if _fits(document, self._rules):
                        self._counts.cut += 1
                        return document
        self._counts.dropped += 1
        return None

    def _may_fit(self, messages: list[Message]) -> bool:
        """Says whether a dialogue may be short enough; costs less than to find its answers."""
        most = self._rules.max_tokens
        text = self._template.render_messages(messages, add_generation_prompt=False)
        return most is None or len(self._tokenizer.encode_prompt(text, chat=True)) <= most

    def _encode(self, messages: list[Message], identity: str) -> MarkedTokens:
        marked = mark_answers(self._template, messages)
        spans = self._tokenizer.encode_with_spans(marked.text, chat=True)
        end: tuple[int, ...] = ()
        if self._tokenizer.end_token not in spans.tokens:
            end = (self._tokenizer.end_token,)
        ends_with_answer = messages[-1]["role"] == ASSISTANT
        return _mark_tokens(spans, marked, (), end, ends_with_answer, identity)


class Completions:
    """Records of which one field is a prompt and another what follows it."""

    def __init__(self, rules: Instructions, tokenizer: Tokenizer, counts: TooLongCounts):
        assert rules.prompt_field is not None
        assert rules.completion_field is not None
        self._rules, self._tokenizer, self._counts = rules, tokenizer, counts
        self._fields = rules.prompt_field, rules.completion_field
        names = ("--prompt-field", "--completion-field")
        self.options: Mapping[str, str] = dict(zip(self._fields, names, strict=True))

    def document(self, values: Sequence[object]) -> Document | None:
        prompt, completion = map(checked_text, values, self._fields)
        if not completion:
            raise BadDocumentError(f"{self._fields[1]!r} is empty: nothing to learn")
        text = prompt + completion
        marked = MarkedText(text, ((len(prompt), len(text)),))
        spans = self._tokenizer.encode_with_spans(text)
        begin, end = self._tokenizer.begin_tokens, (self._tokenizer.end_token,)
        document = _mark_tokens(spans, marked, begin, end, True, f"{prompt}\0{completion}")
        if _fits(document, self._rules):
            return document
        self._counts.dropped += 1
        return None

    def document_of_text(self, text: str) -> Document:
        raise BadDocumentError("text, which has no fields; --prompt-field reads JSON lines, tables")


def make_form(
    text_key: str,
    rules: Instructions | None,
    tokenizer: Tokenizer,
    folder: Path,
    counts: TooLongCounts,
) -> Form:
    """Makes what turns records into documents.

    Args:
        text_key: the field of a text.
        rules: of marked text; None: it is plain.
        tokenizer: what turns marked text into tokens.
        folder: where the chat template of dialogues lies.
        counts: where documents that are too long are counted.

    Raises:
        ConfigError, DataError: the template cannot be used.
    """
    if rules is None:
        return PlainText(text_key)
    if rules.messages_field is None:
        return Completions(rules, tokenizer, counts)
    return Dialogues(rules, ChatTemplate.of(folder), tokenizer, counts)


def _fits(document: MarkedTokens, rules: Instructions) -> bool:
    return rules.max_tokens is None or len(document.tokens) <= rules.max_tokens


def _mark_tokens(
    spans: TokenizedSpans,
    marked: MarkedText,
    begin: Sequence[int],
    end: Sequence[int],
    end_is_marked: bool,
    identity: str,
) -> MarkedTokens:
    """Makes the tokens of a document, and marks those that have a marked character.

    Args:
        spans: the tokens of the text.
        marked: the text.
        begin, end: tokens before and behind them.
        end_is_marked: whether the latter are marked.
        identity: see `MarkedTokens`.
    """
    inside = np.zeros(len(spans.tokens), bool)
    for start, stop in marked.spans:
        inside |= (spans.starts < stop) & (spans.stops > start)
    counted = inside & ~spans.special
    if not begin:
        counted[:1] = False  # the document's first token is no target
    return MarkedTokens(
        identity,
        np.concatenate([begin, spans.tokens, end]).astype(np.int32),
        np.concatenate([np.zeros(len(begin)), inside, np.full(len(end), end_is_marked)]) > 0,
        text_bytes=len(marked.text.encode()),
        target_bytes=_covered_bytes(marked.text, spans.starts[counted], spans.stops[counted]),
    )


def _covered_bytes(text: str, starts: np.ndarray, stops: np.ndarray) -> int:
    """Counts the UTF-8 bytes of the characters of a text that are in one of the ranges, once."""
    steps = np.zeros(len(text) + 1, np.int64)
    np.add.at(steps, starts, 1)
    np.add.at(steps, stops, -1)
    code_points = np.frombuffer(text.encode("utf-32-le"), "<u4")
    size = 1 + np.searchsorted([0x80, 0x800, 0x10000], code_points, side="right")
    return int(size[np.cumsum(steps)[:-1] > 0].sum())
