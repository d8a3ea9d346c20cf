"""A model's chat template, which writes a user's message as the model saw messages in training."""

import contextlib
import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from reprlib import repr as shown
from typing import Any, NoReturn, Self

from nha_jax.storage.folder import extra_files_of
from nha_jax.tokenizer.files import TOKENIZER_CONFIG_FILE, read_objects, special_token
from train.data.tokenizers import tokenizer_errors
from train.errors import ConfigError, DataError
from train.extras import import_extra

TEMPLATE_FILE = "chat_template.jinja"


class ChatTemplate:
    """A Jinja template as Hugging Face's tokenizers carry it; it is run in a sandbox."""

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
        self._where = where
        self.source = source
        # Templates are written for these settings: a line that only holds a statement leaves no
        # empty line behind.
        environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= special_tokens
        environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
        with self._errors():
            self._template = environment.from_string(source)

    @classmethod
    def of(cls, folder: Path) -> Self:
        """Reads a folder's template, from chat_template.jinja or else tokenizer_config.json.

        Raises:
            ConfigError: the folder has no template, or what it has is none.
            DataError: a file of the tokenizer is damaged.
        """
        files = extra_files_of(folder)
        with tokenizer_errors():
            settings = read_objects(files, folder)
        where, source = folder / TEMPLATE_FILE, ""
        if TEMPLATE_FILE in files:
            try:
                source = files[TEMPLATE_FILE].decode()
            except UnicodeDecodeError:
                raise ConfigError(f"{where}: cannot use the chat template: no UTF-8") from None
        else:
            where = folder / TOKENIZER_CONFIG_FILE
            source = _named_template(settings.get(TOKENIZER_CONFIG_FILE, {}), where)
        names = ("bos_token", "eos_token")
        tokens = {kind: name for kind in names if (name := special_token(settings, kind))}
        return cls(source, tokens, str(where))

    def render(self, message: str) -> str:
        """Writes a conversation of one user message, up to where the model's answer begins.

        Raises:
            ConfigError: the template cannot be filled in.
        """
        return self.render_messages([{"role": "user", "content": message}])

    def render_messages(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """Writes a conversation.

        Args:
            messages: each with its "role" ("system", "user", "assistant") and its "content".
            add_generation_prompt: whether it ends where the model's answer begins.

        Raises:
            ConfigError: the template cannot be filled in.
        """
        with self._errors():
            return self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
            )

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a template is a program, and may raise anything
            reason = " ".join(str(error).split())
            raise ConfigError(f"{self._where}: cannot use the chat template: {reason}") from None


def _named_template(settings: Mapping[str, Any], where: Path) -> str:
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
            f"{TOKENIZER_CONFIG_FILE}. Leave --chat out for a model that was not trained to chat"
        )
    return template


def _to_json(value: object, **options: Any) -> str:
    # Jinja's own filter escapes < and >, for web pages.
    return json.dumps(value, **{"ensure_ascii": False} | options)


def _raise(message: str) -> NoReturn:
    raise ValueError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
