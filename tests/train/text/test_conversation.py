"""Conversations: what is read again of a turn, where answers end, turns from standard input."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx

import nha_jax
from nha_jax.tokenizer.as_bytes import ByteTokenizer
from nha_jax.tokenizer.from_file import FileTokenizer
from tests.support.train.chats import template
from tests.support.train.pretrained_tokenizer import END, TEMPLATE, tokenizer_json
from train.cli import main
from train.data.chat_template import ChatTemplate
from train.text import conversation
from train.text.conversation import Conversation, EngineOptions, ends_of_turn

OPTIONS = nha_jax.SamplingOptions(max_new_tokens=6, temperature=0.7, stop_tokens=(256,))
TURNS = ["What is the first of these numbers?", "And the second?", "Thank you."]


@pytest.fixture(
    scope="module",
    params=[pytest.param(4, id="window"), pytest.param(None, id="full", marks=pytest.mark.slow)],
)
def model(request: pytest.FixtureRequest, folder: Path) -> nha_jax.Model:
    model = nha_jax.load(folder).with_windows(request.param)
    return model.with_implementation("reference")  # which is compiled soonest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model of bytes with a chat template."""
    config = nha_jax.ModelConfig.preset(
        "nha-tiny",
        num_layers=1,
        hidden_size=16,
        num_slots=2,
        window_size=4,
        dtype="float32",
    )
    folder = tmp_path_factory.mktemp("chat") / "model"
    files = {"chat_template.jinja": template("qwen2").source.encode()}
    nha_jax.save(folder, nha_jax.Model(config, rngs=nnx.Rngs(0)), files=files)
    return folder


def converse(
    model: nha_jax.Model, chat: ChatTemplate, prefix_bytes: int, **options: Any
) -> tuple[Conversation, list[str]]:
    engine = EngineOptions(prefill_chunk=16, prefix_bytes=prefix_bytes, **options)
    talk = Conversation(model, ByteTokenizer(), chat, engine, system="Be brief.")
    answers = ["".join(x.text for x in talk.answer(turn, OPTIONS, [])) for turn in TURNS]
    return talk, answers


def test_a_turn_reads_what_is_new_and_less_than_a_chunk(model: nha_jax.Model) -> None:
    talk, answers = converse(model, template("qwen2"), 2**24)
    forgetful, without = converse(model, template("qwen2"), 0)
    assert answers == without
    assert [x["role"] for x in talk.messages] == ["system", *["user", "assistant"] * 3]
    assert [x["content"] for x in talk.messages[2::2]] == answers
    assert forgetful.reading.kept == 0
    whole = len(template("qwen2").render_messages(talk.messages[:-1]).encode())
    # The last prompt is read once, but for a chunk at most and the end of each of the answers.
    assert whole <= talk.reading.read < whole + 2 * 16
    assert talk.reading.read + talk.reading.kept == forgetful.reading.read


def test_a_template_that_writes_earlier_messages_otherwise_is_followed(
    model: nha_jax.Model,
) -> None:
    source = "{% for m in messages %}[{{ messages | length }}] {{ m.content }}{% endfor %}"
    changes = ChatTemplate(source, {}, "here")
    talk, answers = converse(model, changes, 2**24)
    assert answers == converse(model, changes, 0)[1]
    assert talk.reading.kept == 0


def test_the_room_of_full_attention_grows(
    model: nha_jax.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = template("qwen2")
    expected = converse(model, chat, 2**24)
    monkeypatch.setattr(conversation, "LEAST_ROOM", 130)
    found = converse(model, chat, 2**24)
    assert found[1] == expected[1]
    if None in model.config.windows:
        assert found[0].reading.kept < expected[0].reading.kept
        with pytest.raises(ValueError, match="which have max_length=64"):
            converse(model, chat, 0, max_length=64)


FILE = FileTokenizer({"tokenizer.json": tokenizer_json("<begin> $A")}, "<end>", "here")
LINES = "{% for m in messages %}{{ m.content }}\n{% endfor %}"


@pytest.mark.parametrize(
    ("source", "tokens", "texts"),
    [
        (template("qwen2").source, [], ["<|im_end|>"]),
        (template("llama-3").source, [], ["<|eot_id|>"]),
        (template("llama-2").source, [END], []),
        (template("mistral").source, [END], []),
        (TEMPLATE, [END], []),
        (LINES, [], []),  # an answer may have several lines
        ("{{ raise_exception('one user') }}", [], []),
        ("{{ messages[0].content }}", [], []),
    ],
)
def test_an_answer_ends_as_its_turn_does(source: str, tokens: list[int], texts: list[str]) -> None:
    chat = ChatTemplate(source, {"bos_token": "<begin>", "eos_token": "<end>"}, "here")
    assert ends_of_turn(chat, FILE) == (tokens, texts)
    if not tokens:
        assert ends_of_turn(chat, ByteTokenizer()) == ([], texts)


@pytest.fixture
def chat(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Runs `nha generate --chat` with a standard input; returns the exit code, output, errors."""

    def run(text: bytes, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
        options = ["--chat", "--max-new-tokens=6", "--temperature=0.7", "--prefill-chunk=16"]
        options.append("--implementation=reference")
        code = main(["generate", str(folder), *options, *arguments])
        return code, *capsys.readouterr()

    return run


def test_each_line_of_standard_input_is_a_turn(chat) -> None:
    code, output, errors = chat(b"Hi\n\n  \nand more", "--json", "--system=Be brief.")
    assert code == 0, errors
    first, second = map(json.loads, output.splitlines())
    assert (first["prompt"], second["prompt"], first["from"]) == ("Hi", "and more", "--chat")
    assert 0 < len(first["tokens"]) <= 6
    summary = errors.splitlines()[-1]
    assert summary.startswith("2 answers of ")
    assert "kept from turns before" in summary


@pytest.mark.slow
def test_a_conversation_is_what_its_prompts_are_one_by_one(chat, folder: Path) -> None:
    greedy = ("--temperature=0", "--system=Be brief.")
    answers = chat(b"Hi\nand more", *greedy, "--json")[1].splitlines()
    first, second = map(json.loads, answers)
    alone = chat(b"", *greedy, "--json", "--prompt=Hi")[1]
    assert json.loads(alone)["tokens"] == first["tokens"]
    said = [("system", "Be brief."), ("user", "Hi"), ("assistant", first["text"])]
    messages = [{"role": x, "content": y} for x, y in [*said, ("user", "and more")]]
    text = ChatTemplate.of(folder).render_messages(messages)
    tokens = nha_jax.generate(
        nha_jax.load(folder),
        text,
        max_new_tokens=6,
        temperature=0,
        stop_tokens=[256],
    )
    np.testing.assert_array_equal(second["tokens"], tokens[: len(second["tokens"])])
    plain = chat(b"Hi\nand more", *greedy)[1]
    assert plain == f"{first['text']}\n{second['text']}\n"


def test_without_a_turn_nothing_is_said_and_a_file_is_one_prompt(chat) -> None:
    assert chat(b"\n")[:2] == (0, "")
    code, _, errors = chat(b"", "--prompt-file=-")
    assert code == 2
    assert "the text is empty" in errors


def test_a_system_needs_a_chat(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(folder), "--prompt=a", "--system=b"]) == 2
    assert "--system='b': expected --chat with it" in capsys.readouterr().err
