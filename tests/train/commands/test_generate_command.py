"""`nha generate`: prompts of every kind, stop strings, text as it comes, one-line errors."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest

import nha_jax
from nha_jax.tokenizer.as_bytes import END_OF_DOCUMENT, ByteTokenizer
from tests.support.train.tiny_run import Nha
from train.cli import main
from train.text.continuation import _GrowingText, continue_texts

GREEDY = ["--max-new-tokens", "8", "--temperature", "0"]


@pytest.fixture
def generate(undisturbed: Nha, capsys: pytest.CaptureFixture[str]):
    """Runs `nha generate` on a finished run; returns the exit code, output and errors."""

    def run(*arguments: str, folder: Path = undisturbed.run) -> tuple[int, str, str]:
        code = main(["generate", str(folder), *arguments])
        return code, *capsys.readouterr()

    return run


def test_a_run_and_its_model_write_the_same(generate, undisturbed: Nha) -> None:
    code, first, errors = generate("--prompt", "line 3 of", *GREEDY)
    assert code == 0
    assert first.startswith("line 3 of")
    assert len(first) == len("line 3 of") + 8 + len("\n")
    assert "8 written" in errors
    assert "tokens/s" in errors
    assert generate("--prompt", "line 3 of", *GREEDY, folder=undisturbed.run / "model")[1] == first


def test_prompts_of_every_kind(
    generate, undisturbed: Nha, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("line 5")
    tokens = " ".join(str(byte) for byte in b"line 5")
    arguments = ["--prompt", "line 5", "--prompt-file", str(file), "--prompt-tokens", tokens]
    code, output, _ = generate(*arguments, "--batch-size", "2", "--json", *GREEDY)
    assert code == 0
    records = [json.loads(line) for line in output.splitlines()]
    assert [record["prompt"] for record in records] == ["line 5", str(file), tokens]
    assert [record["from"] for record in records] == arguments[::2]
    model = nha_jax.load(undisturbed.run / "model")
    expected = nha_jax.generate(
        model, list(b"line 5"), max_new_tokens=8, temperature=0, return_log_probabilities=True
    )
    for record in records:
        assert record["tokens"] == expected.tokens.tolist()
        assert record["text"] == bytes(record["tokens"]).decode(errors="replace")
        assert record["finished"] == "length"
        np.testing.assert_allclose(
            record["log_probabilities"], expected.log_probabilities, atol=1e-4
        )

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"line 5")))
    text = records[0]["text"]
    assert generate(*GREEDY)[1] == f"{text}\n"
    both = generate("--prompt", "line 5", "--prompt-file", str(file), *GREEDY)[1]
    assert both == f"=== prompt 1 ===\nline 5{text}\n\n=== prompt 2: {file} ===\n{text}\n"


def test_a_stop_string_ends_the_text(generate) -> None:
    whole = json.loads(generate("--prompt", "line 3 of", "--json", *GREEDY)[1])["text"]
    record = json.loads(
        generate("--prompt", "line 3 of", "--json", "--stop", whole[3:5], *GREEDY)[1]
    )
    assert record["text"] == whole[: whole.index(whole[3:5])]
    assert record["finished"] == "stop"


def test_what_prompts_begin_with_is_read_once(generate) -> None:
    beginning = "".join(f"line {number} of file\n" for number in range(5))
    prompts = [part for end in "abc" for part in ("--prompt", beginning + end)]
    code, output, errors = generate(*prompts, "--json", *GREEDY)
    assert code == 0
    assert "228 tokens to read, 128 of them kept from prompts before (2 of 3 begin so; " in errors
    assert "MiB), the first written after" in errors
    code, without, errors = generate(*prompts, "--json", "--prefix-bytes", "0", *GREEDY)
    assert (code, without) == (0, output)
    assert "228 tokens to read, the first" in errors


def test_other_windows(generate) -> None:
    code, output, _ = generate("--prompt", "line 3 of file", "--windows", "none", *GREEDY)
    assert code == 0
    assert output.startswith("line 3 of file")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "x", "--top-p", "7"], "top_p=7"),
        (["--prompt", ""], "the text is empty"),
        (["--prompt-file", "nowhere.txt"], "nowhere.txt: cannot read"),
        (
            ["--prompt-tokens", "1 900"],
            "--prompt-tokens must have tokens within [0, 257), got 1 to",
        ),
        (["--prompt-tokens", "one"], "--prompt-tokens='one': expected integers"),
        (["--prompt-tokens", ""], "--prompt-tokens='': expected integers"),
        (["--prompt-tokens", "1.5"], "--prompt-tokens='1.5': expected integers"),
        (["--prompt-tokens", "9" * 30], "--prompt-tokens must have tokens of a vocabulary, got"),
        (["--prompt", "x", "--stop", ""], "--stop='': expected at least one character"),
        (["--prompt", "x", "--stop", "a", "--stop", ""], "--stop='': expected at least one"),
        (["--prompt", "x", "--stop-token", "257"], "--stop-token=257: expected a token within"),
        (["--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens=0 must be an integer"),
        (["--prompt", "x", "--temperature", "nan"], "temperature=nan must be finite"),
        (["--prompt", "x", "--top-p", "nan"], "top_p=nan must be within"),
        (["--prompt", "x", "--max-length", "0"], "max_length=0 must be an integer of at least 1"),
        (["--prompt", "x", "--prefill-chunk", "0"], "prefill_chunk=0 must be an integer"),
        (["--prompt", "x", "--prefix-bytes", "-1"], "prefix_bytes=-1 must be an integer of at"),
        (["--prompt", "x", "--batch-size", "-1"], "batch_size=-1 must be an integer"),
        (["--prompt", "x", "--windows", "wide"], "--windows = 'wide'"),
        (["--prompt", "x", "--batch-size", "0"], "batch_size=0 must be an integer of at least 1"),
        (
            ["--prompt", "long", "--windows", "none", "--max-length", "5"],
            "--max-length=5: a prompt of 4 tokens and --max-new-tokens=256 need 260",
        ),
        (
            ["--prompt", "x", "--windows", "none", "--max-length", "1", "--max-new-tokens", "1"],
            "--max-length=1: a prompt of 1 tokens and --max-new-tokens=1 need 2",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(generate, arguments: list[str], message: str) -> None:
    code, output, errors = generate(*arguments)
    assert (code, output) == (2, "")
    assert message in errors
    assert len(errors.splitlines()) == 1


def test_the_smallest_and_largest_options_that_are_right(generate) -> None:
    exact = ["--windows", "none", "--max-length", "2", "--max-new-tokens", "1"]
    seed = ["--seed", str(-(2**40)), "--prefill-chunk", str(10**9), "--batch-size", str(10**9)]
    stops = [part for token in range(100) for part in ("--stop-token", str(token))]
    code, output, errors = generate("--prompt", "x", "--json", *exact, *seed, *stops)
    assert code == 0, errors
    assert len(json.loads(output)["tokens"]) == 1


def test_json_is_json_where_the_terminal_knows_few_characters(
    generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = io.BytesIO()
    stdout = io.TextIOWrapper(content, "ascii", errors="backslashreplace")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        code, *_ = generate("--prompt", "é€😀", "--json", *GREEDY)
    stdout.flush()
    assert code == 0
    assert json.loads(content.getvalue())["prompt"] == "é€😀"


def test_no_stop_string_is_empty() -> None:
    with pytest.raises(ValueError, match="stop_strings: expected at least one character"):
        next(continue_texts(None, ByteTokenizer(), [], None, ["a", ""]))


def written(tokens: list[int], *stop_strings: str) -> tuple[list[str], str | None]:
    """What is shown after each token, and why the text ended."""
    text = _GrowingText(0, ByteTokenizer(), np.array(list(b"x")), stop_strings)
    pieces, finished = [], None
    for i, token in enumerate(tokens):
        event = nha_jax.Event(0, token, 0.0, "length" if i == len(tokens) - 1 else None)
        piece, finished = text.add(event)
        pieces.append(piece)
        if finished:
            break
    return pieces, finished


def test_a_character_is_shown_once_it_is_complete() -> None:
    assert written(list("aé€".encode())) == (["a", "", "é", "", "", "€"], "length")
    assert written(list("€".encode())[:2]) == (["", "\ufffd"], "length")


def test_what_may_be_a_stop_string_is_held_back() -> None:
    assert written(list(b"xaab."), "aac") == (["x", "", "", "aab", "."], "length")
    assert written(list(b"xaac."), "aac", "zz") == (["x", "", "", ""], "stop")
    assert written(list(b"xaa"), "aac") == (["x", "", "aa"], "length")
    assert written([*b"xa", END_OF_DOCUMENT, *b"b"], "ab") == (["x", "", "a"], "stop")
