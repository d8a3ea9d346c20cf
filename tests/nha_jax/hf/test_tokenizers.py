"""Prompts and chats become the tokens that transformers makes of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.train.chats import TEMPLATES, dialogue
from tests.support.train.pretrained_tokenizer import CONFIG, END, TEMPLATE, tokenizer_json
from train.data.chat_template import ChatTemplate
from train.data.prepare.documents import MarkedTokens
from train.data.prepare.instructions import Dialogues, Instructions, TooLongCounts
from train.data.tokenizers import load_tokenizer

pytestmark = pytest.mark.hf


@pytest.mark.parametrize("template", [None, "<begin> $A", "<begin> $A <end>", "$A <end>"])
def test_tokens_are_those_of_transformers(tmp_path: Path, template: str | None) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json(template))
    config = CONFIG | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loop = "{% for n in range(3) %}{% if n == 1 %}{% continue %}{% endif %}{{ n }}{% endfor %}"
    rest = "{{ tools is none }}{{ messages | tojson }}{{ strftime_now('%Y') }}"
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE + loop + rest)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    expected = theirs("naïve <b>").input_ids
    if template and template.endswith("<end>"):
        assert expected.pop() == END  # a prompt goes on
    assert ours.encode_prompt("naïve <b>").tolist() == expected

    messages = [{"role": "user", "content": " <turn> é <b> "}]
    chat = {"add_generation_prompt": True, "return_dict": False}
    text = ChatTemplate.of(tmp_path).render(" <turn> é <b> ")
    assert text == theirs.apply_chat_template(messages, tokenize=False, **chat)
    tokens = ours.encode_prompt(text, chat=True).tolist()
    assert tokens == theirs.apply_chat_template(messages, **chat)


TAGGED = """\
{{ bos_token }}{% for message in messages %}
<turn>{{ message['role'] }}: {% if message['role'] == 'assistant' %}
{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}

{% else %}{{ message['content'] | trim }}{{ eos_token }}
{% endif %}{% endfor %}"""


@pytest.mark.parametrize(
    "messages",
    [
        dialogue("Hi", "naïve 😀\n<turn>", "and <b>", "", system="Be."),
        dialogue("Hi", "Hello", "Bye"),
    ],
)
@pytest.mark.parametrize("source", [TAGGED, (TEMPLATES / "marked.jinja").read_text()])
def test_what_is_learned_of_a_dialogue_is_what_transformers_marks(
    tmp_path: Path, source: str, messages: list[dict[str, Any]]
) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json("<begin> $A"))
    config = CONFIG | {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": source}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    rules, counts = Instructions(messages_field="messages"), TooLongCounts()
    form = Dialogues(rules, ChatTemplate.of(tmp_path), load_tokenizer(tmp_path), counts)
    ours = form.document([messages])
    assert isinstance(ours, MarkedTokens)
    length = len(theirs["input_ids"])
    assert ours.tokens[:length].tolist() == theirs["input_ids"]
    assert ours.mask[:length].astype(int).tolist() == theirs["assistant_masks"]
    assert 0 < sum(theirs["assistant_masks"]) < length
    assert ours.tokens[length:].tolist() == ([] if END in ours.tokens[:length] else [END])
