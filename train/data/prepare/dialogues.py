"""Dialogues: the messages of a record, and what an assistant writes in their text."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from train.data.chat_template import ChatTemplate, MarkedText
from train.data.prepare.documents import BadDocumentError, checked_text
from train.errors import ConfigError

ASSISTANT = "assistant"
ROLES = ("system", "developer", "user", ASSISTANT, "tool")

# The ShareGPT form: {"from": "human", "value": "..."}.
_ROLES_BY_SPEAKER = {
    "system": "system", "human": "user", "user": "user", "gpt": ASSISTANT, ASSISTANT: ASSISTANT,
    "tool": "tool",
}  # fmt: skip

Message = dict[str, Any]


def checked_messages(value: object, field: str) -> list[Message]:
    """Returns the messages of a record's field.

    Each is an object with a "role" and a "content", or with "from" and "value". What else it has,
    such as the calls of tools, is for the template; what is null is as if it were not there.

    Raises:
        BadDocumentError: it is no list of messages, one has no role, an unknown one or no text, or
            the assistant has none.
    """
    if not isinstance(value, list):
        raise BadDocumentError(f"{field!r} is {value!r:.40}, not a list of messages")
    if not value:
        raise BadDocumentError(f"{field!r} has no message")
    messages = [_checked_message(each, f"{field}[{n}]") for n, each in enumerate(value)]
    if not any(message["role"] == ASSISTANT for message in messages):
        raise BadDocumentError(f"{field!r} has no message of the {ASSISTANT}: nothing to learn")
    return messages


def _checked_message(value: object, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise BadDocumentError(f"{where} is {value!r:.40}, not a message")
    message = {name: content for name, content in value.items() if content is not None}
    key, roles = "role", dict(zip(ROLES, ROLES, strict=True))
    if "role" not in message and "from" in message:
        key, roles = "from", _ROLES_BY_SPEAKER
        message = {"content" if name == "value" else name: x for name, x in message.items()}
    if key not in message:
        raise BadDocumentError(f"{where} has no 'role'")
    role = message.pop(key)
    if not isinstance(role, str) or role not in roles:
        known = ", ".join(roles)
        raise BadDocumentError(f"{where}: its {key!r} is {role!r:.40}; expected one of {known}")
    content = message.pop("content", "" if "tool_calls" in message else None)
    content = checked_text(content, f"{where}.{'value' if key == 'from' else 'content'}")
    return {"role": roles[role], "content": content, **message}


def write_out(messages: Sequence[Message]) -> str:
    """Writes messages in one way only, whatever the template: what decides who is held out.

    Raises:
        BadDocumentError: a text holds half a character.
    """
    text = json.dumps(messages, ensure_ascii=False, sort_keys=True, default=str)
    return checked_text(text, "the dialogue")


def mark_answers(template: ChatTemplate, messages: Sequence[Message]) -> MarkedText:
    """Writes a dialogue by a chat template, and marks what the assistant writes of it.

    That is what {% generation %} holds, if the template has it. Else it is, of each of the
    assistant's messages, what follows the generation prompt: its text and the end of its turn.
    White space behind the end of the turn is the template's.

    Raises:
        BadDocumentError: the template refuses the dialogue, shows nothing of it as the assistant's,
            or writes a message otherwise when others follow.
    """
    try:
        marked = template.render_marked(messages)
        if not template.has_marks:
            marked = MarkedText(marked.text, _spans_by_prefixes(template, messages, marked.text))
    except ConfigError as error:
        raise BadDocumentError(str(error)) from None
    if not marked.spans:
        raise BadDocumentError("the chat template shows nothing of it as the assistant's")
    return marked


def _spans_by_prefixes(
    template: ChatTemplate, messages: Sequence[Message], whole: str
) -> tuple[tuple[int, int], ...]:
    """Finds what the assistant writes in the text of a dialogue, from the texts of its beginnings.

    Args:
        template: what the texts are by.
        messages: the dialogue.
        whole: the text of all of it.
    """

    def length(count: int, add_generation_prompt: bool) -> int:
        beginning = template.render_messages(
            messages[:count], add_generation_prompt=add_generation_prompt
        )
        if not whole.startswith(beginning):
            wrong = f"writes messages 0 to {count - 1} otherwise when more follow"
            if add_generation_prompt:
                wrong = f"begins message {count} otherwise than its generation prompt ends"
            raise BadDocumentError(
                f"the chat template {wrong}, so it does not show what the assistant writes; put "
                "{% generation %} and {% endgeneration %} around that (--chat-template)"
            )
        return len(beginning)

    spans = []
    for n, message in enumerate(messages):
        if message["role"] == ASSISTANT:
            start, stop = length(n, True), length(n + 1, False)
            stop = start + len(_without_space_behind(whole[start:stop], message["content"]))
            if start < stop:
                spans.append((start, stop))
    return tuple(spans)


def _without_space_behind(turn: str, content: str) -> str:
    """Cuts white space behind the end of a turn, but not if it is itself all that ends the turn."""
    cut, content = turn.rstrip(), content.rstrip()
    is_the_end = cut.endswith(content) if content else not cut
    return turn if is_the_end else cut
