"""A model's chat template, which writes messages as the model saw them in training."""

import contextlib
import datetime
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from reprlib import repr as shown
from typing import Any, NamedTuple, NoReturn, Self

from nha_jax.storage.folder import extra_files_of
from nha_jax.tokenizer.files import TOKENIZER_CONFIG_FILE, read_objects, special_token
from train.data.tokenizers import tokenizer_errors
from train.errors import ConfigError, DataError
from train.extras import import_extra

TEMPLATE_FILE = "chat_template.jinja"

NO_CHAT = "Leave --chat out for a model that was not trained to chat"

Messages = Sequence[Mapping[str, Any]]
"""A conversation: each message has its "role" ("system", "user", "assistant", ...), its "content",
a text, and what else the template reads of it."""


class MarkedText(NamedTuple):
    """A text of which parts are marked.

    Attributes:
        text: the text.
        spans: ranges of its characters, ascending, none of them empty.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


def first_messages(system: str | None) -> list[dict[str, Any]]:
    """Returns what a conversation begins with: the system's message, if there is one."""
    return [] if system is None else [{"role": "system", "content": system}]


class ChatTemplate:
    """A Jinja template as Hugging Face's tokenizers carry it; it is run in a sandbox.

    Attributes:
        source: the template's text.
        has_marks: whether it says what an assistant writes, by {% generation %}.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], where: str):
        """Compiles the template.

        Args:
            source: the template's text.
            special_tokens: the texts of "bos_token" and "eos_token", which templates refer to.
            where: the file that errors name.

        Raises:
            ConfigError: the text is no template, or the package jinja2 is not installed.
        """
        sandbox = import_extra("jinja2.sandbox")
        from train.data.generation_tag import GenerationTag, has_tag

        self._where = where
        self.source = source
        # Templates are written for these settings: a line that only holds a statement leaves no
        # empty line behind.
        environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", GenerationTag],
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= special_tokens
        environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
        with self._errors():
            self._template = environment.from_string(source)
            self.has_marks = has_tag(environment, source)

    @classmethod
    def decode(cls, content: bytes, special_tokens: Mapping[str, str], where: Path) -> Self:
        """Does what the constructor does, of a file's content; ConfigError if it is no UTF-8."""
        try:
            source = content.decode()
        except UnicodeDecodeError:
            raise ConfigError(f"{where}: cannot use the chat template: no UTF-8") from None
        return cls(source, special_tokens, str(where))

    @classmethod
    def of(cls, folder: Path, instead: str = NO_CHAT) -> Self:
        """Reads a folder's template, from chat_template.jinja or else tokenizer_config.json.

        Args:
            folder: of a run, a model, or prepared dialogues.
            instead: what an error says to do if the folder has none.

        Raises:
            ConfigError: the folder has no template, or what it has is none.
            DataError: a file of the tokenizer is damaged.
        """
        files = extra_files_of(folder)
        with tokenizer_errors():
            settings = read_objects(files, folder)
        names = ("bos_token", "eos_token")
        tokens = {kind: name for kind in names if (name := special_token(settings, kind))}
        if TEMPLATE_FILE in files:
            return cls.decode(files[TEMPLATE_FILE], tokens, folder / TEMPLATE_FILE)
        where = folder / TOKENIZER_CONFIG_FILE
        source = _named_template(settings.get(TOKENIZER_CONFIG_FILE, {}), where, instead)
        return cls(source, tokens, str(where))

    def render(self, message: str, system: str | None = None) -> str:
        """Writes a conversation of one user message, up to where the model's answer begins.

        Args:
            message: what the user says.
            system: what the system says before.

        Raises:
            ConfigError: the template cannot be filled in.
        """
        return self.render_messages([*first_messages(system), {"role": "user", "content": message}])

    def end_of_turn(self) -> str:
        """Writes what follows an answer; ConfigError if the template cannot be filled in."""
        answer = "ANSWER"
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]
        text = self.render_messages(messages, add_generation_prompt=False)
        return text.rpartition(answer)[2] if answer in text else ""

    def render_messages(self, messages: Messages, *, add_generation_prompt: bool = True) -> str:
        """Writes a conversation.

        Args:
            messages: its messages.
            add_generation_prompt: whether it ends where the model's answer begins.

        Raises:
            ConfigError: the template cannot be filled in.
        """
        return self._render(messages, add_generation_prompt).text

    def render_marked(self, messages: Messages) -> MarkedText:
        """Writes a conversation without a generation prompt, and marks what {% generation %} holds.

        Raises:
            ConfigError: the template cannot be filled in.
        """
        return self._render(messages, add_generation_prompt=False)

    def _render(self, messages: Messages, add_generation_prompt: bool) -> MarkedText:
        with self._errors():
            rendered = self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
            )
        return _take_marks(rendered)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a template is a program, and may raise anything
            reason = " ".join(str(error).split())
            raise ConfigError(f"{self._where}: cannot use the chat template: {reason}") from None


def _take_marks(rendered: str) -> MarkedText:
    """Takes the marks of the tag out of a rendered text; a span in another is a part of it."""
    from train.data.generation_tag import CLOSING, OPENING

    parts = re.split(f"([{OPENING}{CLOSING}])", rendered)
    spans: list[tuple[int, int]] = []
    position = depth = start = 0
    for part in parts:
        if part == OPENING:
            start = start if depth else position
            depth += 1
        elif part == CLOSING:
            depth -= 1
            if not depth and position > start:
                spans.append((start, position))
        else:
            position += len(part)
    return MarkedText("".join(parts[::2]), tuple(spans))


def _named_template(settings: Mapping[str, Any], where: Path, instead: str) -> str:
    """Finds the template in tokenizer_config.json: a text, or of several that named "default"."""
    template = settings.get("chat_template")
    try:
        if isinstance(template, list):
            template = {each["name"]: each["template"] for each in template}
        if isinstance(template, dict):
            template = template.get("default")
        if not isinstance(template, str | None):
            raise TypeError
    except (KeyError, TypeError):
        raise DataError(
            f"{where}: damaged: chat_template = {shown(settings['chat_template'])}: expected a "
            "text, or a list of templates"
        ) from None
    if template is None:
        raise ConfigError(
            f"{where.parent}: no chat template; expected {TEMPLATE_FILE}, or chat_template in "
            f"{TOKENIZER_CONFIG_FILE}. {instead}"
        )
    return template


def _to_json(value: object, **options: Any) -> str:
    # Jinja's own filter escapes < and >, for web pages.
    return json.dumps(value, **{"ensure_ascii": False} | options)


def _raise(message: str) -> NoReturn:
    raise ValueError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
