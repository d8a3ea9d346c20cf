"""Questions about made-up texts: each has the answer that reading the text gives, and fits."""

import collections
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nha_jax.tokenizer.as_bytes import ByteTokenizer
from train.data.questions import NOISE, QUESTION_KINDS, Questions, read_twice
from train.data.recall import Mqar, tokenizer_of
from train.data.tokenizers import tokenizer_of_file
from train.errors import ConfigError

BYTES = ByteTokenizer()


def solve(name: str, prompt: str) -> str:
    """Answers by reading the text as a person would."""
    numbers = dict(re.findall(r"[Nn]umber of (\w+) is (\d+)\.", prompt))
    last = prompt.split()[-2]
    if name in ("needle", "keys"):
        return numbers[last]
    if name == "values":
        return ", ".join(re.findall(rf"A number of {last} is (\d+)\.", prompt))
    if name == "variables":
        value = prompt.split()[-1].rstrip(":")
        found = {value}
        for variable, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", prompt):
            found |= {variable} if source in found else set()
        order = re.findall(r"VAR (\w+) =", prompt)
        return ", ".join(x for x in order if x in found)
    words = prompt.removeprefix("Words: ").split(". ")[0]
    if name == "copy":
        return words
    if name == "common":
        count = int(re.findall(r"The (\d+) most", prompt)[0])
        common = collections.Counter(words.split()).most_common(count)
        assert min(times for _, times in common) > 1
        return " ".join(sorted(word for word, _ in common))
    assert name == "phonebook"
    return dict(line.split(": ") for line in prompt.splitlines() if ": " in line)[
        prompt.split()[-1][:-1]
    ]


@given(
    name=st.sampled_from(sorted(QUESTION_KINDS)),
    data=st.data(),
    length=st.integers(400, 1500),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_answer_is_in_the_text_which_fills_its_length(name, data, length, seed) -> None:
    kind = QUESTION_KINDS[name]
    load = data.draw(st.sampled_from(kind.loads[:3]))
    found = Questions(kind, load, BYTES).write(length, seed)
    prompt, answer = found.question
    assert answer == f" {solve(name, prompt)}"
    assert BYTES.decode(found.prompt) == prompt
    assert BYTES.decode(found.answer) == answer
    assert length - 60 - 20 * load < len(found.tokens) <= length


@pytest.mark.parametrize("name", sorted(QUESTION_KINDS))
def test_a_seed_names_a_question(name: str) -> None:
    kind = QUESTION_KINDS[name]
    questions = Questions(kind, kind.loads[0], BYTES)
    first, again, other = (questions.write(400, 0, seed).question for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_what_is_asked_does_not_depend_on_the_length() -> None:
    questions = Questions(QUESTION_KINDS["keys"], 4, BYTES)
    short, long = (questions.write(length, 3).question for length in (400, 2000))
    assert short.answer == long.answer
    assert short.prompt.split()[-5:] == long.prompt.split()[-5:]


@pytest.mark.parametrize("depth", [0, 50, 100])
def test_a_needle_lies_at_its_depth(depth: int) -> None:
    prompt = Questions(QUESTION_KINDS["needle"], depth, BYTES).write(4000, 1).question.prompt
    text = prompt[: prompt.rindex(" The number of ")]
    place = text.index("The number of ")
    rest = len(text) - len("The number of bababa is 12345.")
    assert abs(place / rest - depth / 100) < 0.01


def test_an_example_asks_for_the_answer_alone() -> None:
    questions = Questions(QUESTION_KINDS["needle"], 50, BYTES)
    written, example = questions.write(300, 7), questions.draw(300, 7)
    assert all(array.shape == (300,) for array in example)
    np.testing.assert_array_equal(example.targets[example.asked], written.answer)
    np.testing.assert_array_equal(example.tokens[: len(written.tokens) - 1], written.tokens[:-1])
    assert not example.targets[~example.asked].any()
    np.testing.assert_array_equal(
        np.flatnonzero(example.asked), np.arange(len(written.answer)) + written.answer_start - 1
    )


def test_a_prompt_may_be_read_twice() -> None:
    kind = QUESTION_KINDS["needle"]
    prompt = Questions(kind, 50, BYTES, twice=True).write(600, 1).question.prompt
    half = prompt[: len(prompt) // 2]
    assert prompt == read_twice(half)
    assert prompt.count("The number of") == 4


def test_other_tokenizers_write_them_too(tokenizer_file: Path) -> None:
    tokenizer = tokenizer_of_file(tokenizer_file, None)
    found = Questions(QUESTION_KINDS["keys"], 2, tokenizer, noise=["Yes.", "No."]).write(200, 1)
    assert tokenizer.decode(found.tokens) == "".join(found.question)
    assert 180 < len(found.tokens) <= 200
    assert found.question.answer in tokenizer.decode(found.answer)


def test_noise_may_be_anyones() -> None:
    noise = ["One.", "Two.", "Three."]
    prompt = Questions(QUESTION_KINDS["needle"], 100, BYTES, noise).write(300, 1).question.prompt
    assert "One. Two. Three. One." in prompt
    assert not any(sentence in prompt for sentence in NOISE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mqar", "there is no task 'mqar'; there are needle, keys, "),
        ("keys:x", "'keys:x': keys = 'x': expected a number"),
        ("needle:101", "needle: depth in percent = 101: expected 0 to 100"),
        ("keys:0", "keys: keys = 0: expected 1 to 1000"),
    ],
)
def test_what_cannot_be_asked_is_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        Questions.parse(text, BYTES)


def test_a_name_alone_has_a_middle_load() -> None:
    assert [str(Questions.parse(x, BYTES)) for x in ("needle", "keys: 3")] == [
        "needle:50",
        "keys:3",
    ]


def test_no_room_and_no_words_are_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^keys:8: it takes \d+ tokens at least, and .* for 64$"):
        Questions.parse("keys:8", BYTES).write(64, 0)
    with pytest.raises(ConfigError, match=r"^needle:50: the tokenizer does not write ' \d+'"):
        Questions.parse("needle", tokenizer_of(Mqar(1, 16))).write(400, 0)
