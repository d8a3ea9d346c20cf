"""Chat templates of families, dialogues, and files of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT
from train.data.chat_template import ChatTemplate, MarkedText

TEMPLATES = ROOT / "tests" / "support" / "chat_templates"
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def template(name: str) -> ChatTemplate:
    path = TEMPLATES / f"{name}.jinja"
    return ChatTemplate.decode(path.read_bytes(), SPECIAL_TOKENS, path)


def dialogue(*texts: str, system: str | None = None) -> list[dict[str, Any]]:
    """A dialogue of a user and an assistant, who take turns."""
    first = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return first + [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


def shown(marked: MarkedText) -> str:
    """A marked text with its spans in « and »."""
    text = marked.text
    for start, stop in reversed(marked.spans):
        text = f"{text[:start]}«{text[start:stop]}»{text[stop:]}"
    return text


def write_chats(path: Path, dialogues: Sequence[object], field: str = "messages") -> Path:
    """Writes JSON lines of dialogues."""
    path.write_text("".join(json.dumps({field: each}) + "\n" for each in dialogues))
    return path
