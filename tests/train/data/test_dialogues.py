"""Dialogues: which characters are the assistant's by the template of each family, and bad ones."""

from typing import Any

import pytest

from tests.support.train.chats import dialogue, shown, template
from train.data.chat_template import ChatTemplate
from train.data.prepare.dialogues import checked_messages, mark_answers, write_out
from train.data.prepare.documents import BadDocumentError

TWO_TURNS = dialogue("Hi", "Hello.", "Bye", "So long\n", system="Be kind.")
ONE_TURN = dialogue("Hi", "Hello.")
TOOLS = [
    {"role": "user", "content": "Sum?"},
    {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "3."},
]


def chatml(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


@pytest.mark.parametrize(
    ("name", "messages", "expected"),
    [
        (
            "llama-2", TWO_TURNS,
            "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST]« Hello. </s>»"
            "<s>[INST] Bye [/INST]« So long </s>»",
        ),
        (
            "llama-3", TWO_TURNS,
            "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n«Hello.<|eot_id|>»"
            "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n«So long<|eot_id|>»",
        ),
        (
            "mistral", TWO_TURNS[1:],
            "<s>[INST] Hi [/INST]« Hello.</s>»[INST] Bye [/INST]« So long\n</s>»",
        ),
        (
            "qwen2", TWO_TURNS,
            chatml("system", "Be kind.") + chatml("user", "Hi")
            + "<|im_start|>assistant\n«Hello.<|im_end|>»\n" + chatml("user", "Bye")
            + "<|im_start|>assistant\n«So long\n<|im_end|>»\n",
        ),
        (
            "qwen2", ONE_TURN,
            chatml("system", "You help.") + chatml("user", "Hi")
            + "<|im_start|>assistant\n«Hello.<|im_end|>»\n",
        ),
        (
            "qwen2", TOOLS,
            chatml("system", "You help.") + chatml("user", "Sum?")
            + "<|im_start|>assistant\n«<|im_end|>»\n" + chatml("tool", "3")
            + "<|im_start|>assistant\n«3.<|im_end|>»\n",
        ),
        (
            "qwen3", ONE_TURN,
            chatml("user", "Hi")
            + "<|im_start|>assistant\n«<think>\n\n</think>\n\nHello.<|im_end|>»\n",
        ),
        (
            "marked", TWO_TURNS,
            chatml("system", "Be kind.") + chatml("user", "Hi")
            + "<|im_start|>assistant\n«Hello.<|im_end|>»\n" + chatml("user", "Bye")
            + "<|im_start|>assistant\n«So long\n<|im_end|>»\n",
        ),
    ],
)  # fmt: skip
def test_the_assistants_text_and_the_ends_of_its_turns_are_marked(
    name: str, messages: list[dict[str, Any]], expected: str
) -> None:
    assert shown(mark_answers(template(name), messages)) == expected


def test_white_space_is_marked_where_it_ends_the_turn_itself() -> None:
    lines = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    lines += "{% if add_generation_prompt %}assistant: {% endif %}"
    marked = mark_answers(ChatTemplate(lines, {}, "here"), dialogue("a", "b", "c", "d"))
    assert shown(marked) == "user: a\nassistant: «b\n»user: c\nassistant: «d\n»"


def test_what_a_dialogue_ends_with_that_is_no_answer_is_not_marked() -> None:
    marked = mark_answers(template("mistral"), dialogue("a", "b", "c"))
    assert shown(marked) == "<s>[INST] a [/INST]« b</s>»[INST] c [/INST]"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a{% generation %}b{{ x }}{% endgeneration %}c", "a«b»c"),
        ("a{%- generation -%} b {%- endgeneration -%} c", "a«b»c"),
        ("{% generation %}{% endgeneration %}a{% generation %}b{% endgeneration %}", "a«b»"),
        ("{% macro f(x) %}<{% generation %}{{ x }}{% endgeneration %}>{% endmacro %}a{{ f('b') }}",
         "a<«b»>"),
        ("{% set y %}{% generation %}b{% endgeneration %}{% endset %}a{{ y }}{{ y }}", "a«b»«b»"),
        ("{% generation %}a{% generation %}b{% endgeneration %}c{% endgeneration %}d", "«abc»d"),
        ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %},{% endfor %}",
         "«Hi»,«Hello.»,"),
        ("{% generation %}{% set x = 1 %}{{ x }}{% endgeneration %}{{ x }}", "«1»"),
        ("a\n{% generation %}\nb\n{% endgeneration %}\nc", "a\n«b\n»c"),
    ],
)  # fmt: skip
def test_what_the_tag_holds_is_marked(source: str, expected: str) -> None:
    marked = ChatTemplate(source, {}, "here").render_marked(ONE_TURN)
    assert shown(marked) == expected


def test_the_tag_leaves_the_text_of_a_prompt_as_it_is() -> None:
    assert template("marked").render("Hi") == chatml("user", "Hi") + "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("name", "messages", "message"),
    [
        ("qwen3", TWO_TURNS, "writes messages 0 to 2 otherwise when more follow"),
        ("mistral", TWO_TURNS, "mistral.jinja: cannot use the chat template: only user and assist"),
        ("llama-2", TWO_TURNS[2:], "user and assistant must take turns"),
    ],
)
def test_a_template_that_does_not_serve_says_why(
    name: str, messages: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(BadDocumentError, match=message):
        mark_answers(template(name), messages)


def test_a_generation_prompt_that_is_no_beginning_of_an_answer_is_said() -> None:
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    source += "{% if add_generation_prompt %}you: {% endif %}"
    with pytest.raises(BadDocumentError, match="begins message 1 otherwise than its generation"):
        mark_answers(ChatTemplate(source, {}, "here"), ONE_TURN)


def test_a_template_whose_tags_leave_all_out_says_so() -> None:
    source = "{{ messages }}{% if x %}{% generation %}{% endgeneration %}{% endif %}"
    with pytest.raises(BadDocumentError, match="shows nothing of it as the assistant's"):
        mark_answers(ChatTemplate(source, {}, "here"), ONE_TURN)


def test_the_form_of_sharegpt_is_the_same_dialogue() -> None:
    speakers = {"system": "system", "user": "human", "assistant": "gpt"}
    theirs = [{"from": speakers[x["role"]], "value": x["content"]} for x in TWO_TURNS]
    assert checked_messages(theirs, "conversations") == TWO_TURNS


def test_null_is_as_if_it_were_not_there_and_the_rest_is_kept() -> None:
    rows = [{**x, "name": None, "weight": 1} for x in ONE_TURN]
    assert checked_messages(rows, "x") == [{**x, "weight": 1} for x in ONE_TURN]
    without = [{"role": "assistant", "content": None, "tool_calls": [1]}]
    assert checked_messages(without, "x")[0]["content"] == ""


def test_the_order_of_keys_does_not_decide_who_is_held_out() -> None:
    other = [dict(reversed(list(x.items()))) for x in ONE_TURN]
    assert write_out(other) == write_out(ONE_TURN)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "'chat' is None, not a list of messages"),
        ("hi", "'chat' is 'hi', not a list of messages"),
        ([], "'chat' has no message"),
        (["hi"], r"chat\[0\] is 'hi', not a message"),
        ([{"content": "a"}], r"chat\[0\] has no 'role'"),
        ([{"role": None, "content": "a"}], r"chat\[0\] has no 'role'"),
        (
            [*ONE_TURN, {"role": "bot", "content": "a"}],
            r"chat\[2\]: its 'role' is 'bot'; expected one of system, developer, user, assistant",
        ),
        ([{"role": ["user"], "content": "a"}], r"its 'role' is \['user'\]; expected"),
        ([{"from": "bot", "value": "a"}], r"chat\[0\]: its 'from' is 'bot'; expected one of sys"),
        ([{"role": "user"}], r"'chat\[0\].content' is None, not text"),
        ([{"from": "human", "value": 3}], r"'chat\[0\].value' is 3, not text"),
        ([{"role": "user", "content": "\ud800"}], r"'chat\[0\].content' holds half a character"),
        ([{"role": "user", "content": "a"}], "'chat' has no message of the assistant"),
    ],
)
def test_what_is_no_dialogue_is_named(value: object, message: str) -> None:
    with pytest.raises(BadDocumentError, match=message):
        checked_messages(value, "chat")
