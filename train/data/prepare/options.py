"""The options of `nha data prepare`, and what they say of marked text."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from train.data.prepare.documents import RecordFormat
from train.data.prepare.instructions import Instructions
from train.errors import require

MESSAGES_FIELD = "messages"


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """The options of `nha data prepare`; its help describes them."""

    out: str
    inputs: Sequence[str]
    tokenizer: str | None = None
    end_token: str | None = None
    text_key: str = "text"
    record_format: RecordFormat | None = None
    chat: bool = False
    messages_field: str | None = None
    chat_template: str | None = None
    prompt_field: str | None = None
    completion_field: str | None = None
    max_tokens: int | None = None
    too_long: Literal["cut", "drop"] | None = None
    held_out_fraction: float = 0.005
    shard_bytes: int = 64 << 20
    skip_bad: bool = False
    workers: int | None = None

    def __post_init__(self) -> None:
        fraction = self.held_out_fraction
        require(0 <= fraction < 1, "--held-out-fraction", fraction, "0 or more, below 1")
        require(self.shard_bytes >= 1, "--shard-bytes", self.shard_bytes, "at least 1")
        require(self.workers is None or self.workers >= 1, "--workers", self.workers, "at least 1")
        most = self.max_tokens
        require(most is None or most >= 2, "--max-tokens", most, "at least 2")
        for name, needed, there in (
            ("end_token", "--tokenizer with it; of bytes it is fixed", self.tokenizer is not None),
            ("messages_field", "--chat with it", self.chat),
            ("chat_template", "--chat with it", self.chat),
            ("prompt_field", "--completion-field with it", self.completion_field is not None),
            ("completion_field", "--prompt-field with it", self.prompt_field is not None),
            ("prompt_field", "no --chat: a record is one or the other", not self.chat),
            ("max_tokens", "--chat or --prompt-field with it", self.has_marks),
            ("too_long", "--max-tokens with it", self.max_tokens is not None),
        ):
            value = getattr(self, name)
            require(value is None or there, f"--{name.replace('_', '-')}", value, needed)
        same = self.prompt_field is not None and self.prompt_field == self.completion_field
        require(not same, "--completion-field", self.completion_field, "another than the prompt's")

    @property
    def has_marks(self) -> bool:
        """Whether only some of the tokens are to be learned."""
        return self.chat or self.prompt_field is not None

    def instructions(self, template: bytes | None) -> Instructions | None:
        """Returns the rules of marked text; None if there is none.

        Args:
            template: the chat template of dialogues.
        """
        if not self.has_marks:
            return None
        return Instructions(
            messages_field=(self.messages_field or MESSAGES_FIELD) if self.chat else None,
            prompt_field=self.prompt_field,
            completion_field=self.completion_field,
            chat_template=None if template is None else hashlib.sha256(template).hexdigest(),
            max_tokens=self.max_tokens,
            too_long=self.too_long or "cut",
        )
