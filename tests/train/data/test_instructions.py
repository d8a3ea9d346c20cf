"""`nha data prepare` of dialogues and completions: which tokens are marked, what is too long."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
from tokenizers import models

from nha_jax.tokenizer.as_bytes import END_OF_DOCUMENT, ByteTokenizer
from nha_jax.tokenizer.from_file import FileTokenizer
from nha_jax.tokenizer.interface import Tokenizer
from tests.support.train.chats import TEMPLATES, dialogue, template, write_chats
from tests.support.train.pretrained_tokenizer import CONFIG, END, TURN, tokenizer_json
from tests.support.train.raw_files import contents, prepare
from train.data.prepare import workers
from train.data.prepare.documents import MarkedTokens
from train.data.prepare.instructions import (
    Completions,
    Dialogues,
    Instructions,
    TooLongCounts,
)
from train.data.prepare.shard_jobs import write_shards
from train.data.prepared_folder import Manifest, PreparedFolder, ShardedTokens

CHATML = f"--chat-template={TEMPLATES / 'marked.jinja'}"
DIALOGUES = [
    dialogue(
        *(f"question {turn} of {n}" if turn % 2 == 0 else "é" * n for turn in range(2 + n % 3))
    )
    for n in range(40)
]


def said(tokens: np.ndarray) -> str:
    """A text of bytes; € stands for the end token."""
    end = "€" * int((tokens == END_OF_DOCUMENT).sum())
    return tokens[tokens < END_OF_DOCUMENT].astype(np.uint8).tobytes().decode() + end


def marked_text(source: ShardedTokens) -> list[str]:
    """What is marked of each document of bytes."""
    tokens, marks = source.read(0, len(source)), source.marks(0, len(source))
    owner = source.documents(0, len(source))
    return [said(tokens[(owner == n) & marks]) for n in range(source.num_documents)]


def answers(messages: list[dict[str, str]]) -> str:
    turns = [f"{x['content']}<|im_end|>" for x in messages if x["role"] == "assistant"]
    return "".join(turns) + "€" * (messages[-1]["role"] == "assistant")


def write_parquet(path: Path, dialogues: list[Any]) -> Path:
    table = pyarrow.table({"id": range(len(dialogues)), "messages": dialogues})
    pyarrow.parquet.write_table(table, path, row_group_size=7)
    return path


@pytest.mark.parametrize("write", [write_chats, write_parquet])
def test_answers_and_the_ends_of_their_turns_are_marked(
    tmp_path: Path, write: Callable[[Path, list[Any]], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    suffix = "jsonl" if write is write_chats else "parquet"
    raw = write(tmp_path / f"a.{suffix}", DIALOGUES)
    options = ("--chat", CHATML, "--held-out-fraction=0.2", "--workers=1", "--shard-bytes=2000")
    assert prepare(tmp_path / "out", raw, *options) == 0
    prepared = PreparedFolder.open(tmp_path / "out")
    found = marked_text(prepared.training) + marked_text(prepared.held_out)
    assert sorted(found) == sorted(map(answers, DIALOGUES))
    assert prepared.held_out.num_documents >= 2
    assert len(prepared.manifest.shards["training"]) > 2
    for source in (prepared.training, prepared.held_out):
        text = "".join(marked_text(source))
        assert source.text(10**6).decode() == text.replace("€", "")
        assert source.target_bytes == len(text.replace("€", "").encode())
        assert source.num_targets == source.marks(0, len(source)).sum()
    totals = prepared.manifest.totals
    assert f"targets  {totals['targets']:,} tokens, which are learned" in capsys.readouterr().out
    assert prepared.chat_template == (TEMPLATES / "marked.jinja").read_bytes()


def test_a_dialogue_is_written_by_the_template_of_the_tokenizers_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(tokenizer_json("<begin> $A"))
    turns = "{% for m in messages %}<turn>{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    prompt = "{% if add_generation_prompt %}<turn>assistant: {% endif %}"
    settings = CONFIG | {"chat_template": "{{ bos_token }}" + turns + prompt}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    raw = write_chats(tmp_path / "a.jsonl", [dialogue("a", "b<turn>é", "c")], "talk")
    options = ("--chat", "--messages-field=talk", f"--tokenizer={folder}", "--workers=1")
    assert prepare(tmp_path / "out", raw, *options, "--held-out-fraction=0") == 0
    prepared = PreparedFolder.open(tmp_path / "out")
    tokenizer, source = prepared.tokenizer, prepared.training
    tokens, marks = source.read(0, len(source)), source.marks(0, len(source))
    rendered = "<begin><turn>user: a<end><turn>assistant: b<turn>é<end><turn>user: c<end>"
    # The template writes the end token itself, so no other follows.
    assert tokens.tolist() == tokenizer.encode_prompt(rendered, chat=True).tolist()
    expected = [*tokenizer.encode("b"), TURN, *tokenizer.encode("é"), END]
    assert tokens[marks].tolist() == expected
    assert source.num_targets == len(expected)
    assert source.target_bytes == len("bé".encode())  # special tokens stand for no text


def joined(*pieces: str) -> FileTokenizer:
    """A tokenizer of single characters and these longer tokens."""
    letters = sorted({*"".join(pieces), *"Qabc </s>|:"})
    merges, vocabulary = [], {x: n for n, x in enumerate(letters)}
    for piece in pieces:
        for end in range(2, len(piece) + 1):
            merges.append((piece[: end - 1], piece[end - 1]))
            vocabulary.setdefault(piece[:end], len(vocabulary))
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.add_special_tokens(["</s>"])
    return FileTokenizer({"tokenizer.json": tokenizer.to_str().encode()}, "</s>", "here")


def completion(tokenizer: Tokenizer, prompt: str, answer: str) -> MarkedTokens:
    rules = Instructions(prompt_field="p", completion_field="c")
    found = Completions(rules, tokenizer, TooLongCounts()).document([prompt, answer])
    assert isinstance(found, MarkedTokens)
    return found


@pytest.mark.parametrize(
    ("pieces", "expected", "target_bytes"),
    [
        ((), ["a", "b", "c"], 3),
        ((" ab",), [" ab", "c"], 4),  # begins in the prompt, ends in the answer: learned whole
        (("Q ",), ["a", "b", "c"], 3),
        (("abc",), ["abc"], 3),
    ],
)
def test_a_token_with_a_character_of_the_answer_is_marked(
    pieces: tuple[str, ...], expected: list[str], target_bytes: int
) -> None:
    tokenizer = joined(*pieces)
    document = completion(tokenizer, "Q ", "abc")
    assert document.tokens.tolist() == [*tokenizer.encode("Q abc"), tokenizer.end_token]
    marked = document.tokens[document.mask].tolist()
    assert marked == [*(tokenizer.encode(text)[0] for text in expected), tokenizer.end_token]
    assert (document.text_bytes, document.target_bytes) == (5, target_bytes)


def test_a_character_of_several_tokens_is_counted_once() -> None:
    file = FileTokenizer({"tokenizer.json": tokenizer_json("<begin> $A")}, "</s>", "here")
    for tokenizer in (ByteTokenizer(), file):
        document = completion(tokenizer, "é", "é😀")
        assert document.mask.sum() == 2 + 4 + 1
        assert (document.text_bytes, document.target_bytes) == (8, 6)
        assert document.tokens[: len(tokenizer.begin_tokens)].tolist() == [*tokenizer.begin_tokens]


def test_the_first_token_of_a_document_is_no_target() -> None:
    assert completion(ByteTokenizer(), "", "abc").target_bytes == 2


def test_spaces_that_offsets_leave_out_belong_to_the_token_behind(tmp_path: Path) -> None:
    trimmed = tokenizers.Tokenizer.from_str(tokenizer_json("<begin> $A").decode())
    trimmed.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    files = {"tokenizer.json": trimmed.to_str().encode()}
    document = completion(FileTokenizer(files, "</s>", "here"), "a", " b c")
    assert document.target_bytes == 4


def test_completions_are_read_of_two_fields(tmp_path: Path) -> None:
    rows = [{"q": {"text": f"{n}?"}, "a": f"={n}"} for n in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet")
    options = ("--prompt-field=q.text", "--completion-field=a", "--workers=1")
    assert prepare(tmp_path / "out", tmp_path / "[ab].*", *options, "--held-out-fraction=0") == 0
    prepared = PreparedFolder.open(tmp_path / "out")
    assert marked_text(prepared.training) == [f"={n}€" for n in range(3)] * 2
    assert prepared.chat_template is None


LONG = dialogue("a" * 10, "b" * 10, "c" * 10, "d" * 10, "e" * 10)


@pytest.mark.parametrize(
    ("max_tokens", "too_long", "expected", "counts"),
    [
        (1000, "cut", "bd", (0, 0)),
        (201, "cut", "bd", (0, 0)),
        (200, "cut", "bd", (1, 0)),  # without the question at its end
        (163, "cut", "bd", (1, 0)),
        (162, "cut", "b", (1, 0)),
        (82, "cut", "b", (1, 0)),
        (81, "cut", None, (0, 1)),
        (200, "drop", None, (0, 1)),
        (201, "drop", "bd", (0, 0)),
    ],
)
def test_a_dialogue_that_is_too_long_is_cut_behind_an_answer_or_dropped(
    max_tokens: int, too_long: Any, expected: str | None, counts: tuple[int, int]
) -> None:
    rules = Instructions(messages_field="x", max_tokens=max_tokens, too_long=too_long)
    counted = TooLongCounts()
    form = Dialogues(rules, template("marked"), ByteTokenizer(), counted)
    document = form.document([LONG])
    assert (counted.cut, counted.dropped) == counts
    if expected is None:
        assert document is None
        return
    assert isinstance(document, MarkedTokens)
    assert len(document.tokens) <= max_tokens
    marked = said(document.tokens[document.mask]).replace("€", "")
    assert marked == "".join(letter * 10 + "<|im_end|>" for letter in expected)


def test_what_is_too_long_is_counted_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = write_chats(tmp_path / "a.jsonl", [LONG, LONG[:2], dialogue("q" * 99, "a")])
    options = ("--chat", CHATML, "--max-tokens=100", "--workers=1", "--held-out-fraction=0")
    assert prepare(tmp_path / "out", raw, *options) == 0
    totals = Manifest.read(tmp_path / "out").totals
    assert (totals["documents"], totals["cut_documents"], totals["dropped_documents"]) == (2, 1, 1)
    printed = capsys.readouterr().out
    assert "cut      1 documents longer than --max-tokens" in printed
    assert "left out 1 documents longer than --max-tokens" in printed


def test_a_bad_dialogue_is_named_by_file_and_row_or_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = dialogue("a", "b")
    cases = {
        "role.jsonl": ([good, [{"content": "a"}]], "line 2: messages[0] has no 'role'"),
        "empty.jsonl": ([[]], "line 1: 'messages' has no message"),
        "speaker.jsonl": ([[{"from": "it", "value": "a"}]], "line 1: messages[0]: its 'from'"),
        "refused.jsonl": ([dialogue("a", "b", system="c")], "line 1: 'messages': "),
    }
    good_file = write_chats(tmp_path / "good.jsonl", [good])
    mistral = f"--chat-template={TEMPLATES / 'mistral.jinja'}"
    options = ("--chat", mistral, "--workers=1", "--held-out-fraction=0")
    for name, (dialogues, message) in cases.items():
        raw = write_chats(tmp_path / name, dialogues)
        assert prepare(tmp_path / f"{name} out", raw, *options) == 1
        assert f"nha: {raw}, {message}" in capsys.readouterr().err.splitlines()[-1]
    write_parquet(tmp_path / "b.parquet", [good, [{"role": "user", "content": None}]])
    assert prepare(tmp_path / "out2", tmp_path / "b.parquet", *options) == 1
    assert "b.parquet, row 2: 'messages[0].content' is None, not text" in capsys.readouterr().err
    inputs = (*(tmp_path / name for name in cases), good_file, tmp_path / "b.parquet")
    assert prepare(tmp_path / "out3", *inputs, *options, "--skip-bad") == 0
    totals = Manifest.read(tmp_path / "out3").totals
    assert (totals["documents"], totals["bad_documents"]) == (3, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--messages-field=x"], "--messages-field = 'x': expected --chat with it"),
        ([CHATML], "expected --chat with it"),
        (["--prompt-field=x"], "--prompt-field = 'x': expected --completion-field with it"),
        (["--completion-field=x"], "--completion-field = 'x': expected --prompt-field with it"),
        (["--chat", "--prompt-field=x", "--completion-field=y"], "expected no --chat"),
        (["--prompt-field=x", "--completion-field=x"], "expected another than the prompt's"),
        (["--max-tokens=9"], "--max-tokens = 9: expected --chat or --prompt-field with it"),
        (["--chat", CHATML, "--too-long=drop"], "--too-long = 'drop': expected --max-tokens with"),
        (["--chat", CHATML, "--max-tokens=1"], "--max-tokens = 1: expected at least 2"),
        (["--chat"], "--chat: no chat template; expected --chat-template FILE, or a folder"),
        (["--chat", "--chat-template=/nowhere"], "--chat-template: cannot read it: No such file"),
        (["--chat", "--chat-template=BAD"], "bad.jinja: cannot use the chat template"),
        (["--chat", CHATML], "it has no fields; --chat and --prompt-field read JSON lines"),
    ],
)
def test_a_wrong_option_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    (tmp_path / "bad.jinja").write_text("{% if %}")
    options = [option.replace("BAD", str(tmp_path / "bad.jinja")) for option in options]
    raw = __file__ if "no fields" in message else write_chats(tmp_path / "a.jsonl", DIALOGUES)
    assert prepare(tmp_path / "out", raw, *options) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert message in error
    assert not (tmp_path / "out").exists()


OPTIONS = ("--chat", CHATML, "--shard-bytes=1500", "--held-out-fraction=0.2")


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    """The files of an undisturbed run."""
    write_chats(tmp_path / "a.jsonl", DIALOGUES)
    assert prepare(tmp_path / "whole", tmp_path / "a.jsonl", *OPTIONS, "--workers=1") == 0
    return contents(tmp_path / "whole")


def test_stopped_anywhere_and_run_again_it_is_the_same(
    tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [3]

    def write_some(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return write_shards(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(workers, "write_shards", write_some)
        assert prepare(tmp_path / "out", tmp_path / "a.jsonl", *OPTIONS, "--workers=1") == 130
    assert not (tmp_path / "out" / "manifest.json").exists()
    made = sorted((tmp_path / "out").glob("*.mask"))
    os.truncate(made[0], 5)  # a shard that is damaged is made again
    assert len(made) > 2
    assert prepare(tmp_path / "out", tmp_path / "a.jsonl", *OPTIONS, "--workers=1") == 0
    assert contents(tmp_path / "out") == whole


@pytest.mark.slow
def test_the_number_of_workers_does_not_matter(tmp_path: Path, whole: dict[str, bytes]) -> None:
    assert prepare(tmp_path / "out", tmp_path / "a.jsonl", *OPTIONS, "--workers=2") == 0
    assert contents(tmp_path / "out") == whole


def test_another_template_is_another_folder(
    tmp_path: Path, whole: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--chat", f"--chat-template={TEMPLATES / 'qwen2.jinja'}", *OPTIONS[2:])
    assert prepare(tmp_path / "whole", tmp_path / "a.jsonl", *options) == 2
    assert "the folder was prepared otherwise: instructions: {" in capsys.readouterr().err


def test_masks_are_as_long_as_the_tokens(whole: dict[str, bytes]) -> None:
    masks = [name for name in whole if name.endswith(".mask")]
    assert masks
    for name in masks:
        values = np.frombuffer(whole[name], np.uint8)
        assert len(values) == len(whole[name.replace(".mask", ".tokens")]) // 2
        assert set(values.tolist()) == {0, 1}
