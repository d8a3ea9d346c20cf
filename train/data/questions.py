"""Questions about texts that are made up: needles, chains of variables, copies, phone books.

A question is written at whatever length is asked for, needs no file, and has one right answer. Its
load is how much a model has to keep, or where it stands. The kinds are in the style of the passkey
(arXiv 2305.16300), of RULER (arXiv 2404.06654), and of the copies and phone books of Jelassi et al.
(arXiv 2402.01032); the words are our own.
"""

import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np

from nha_jax.tokenizer.interface import Tokenizer
from train.data.recall import Example
from train.errors import ConfigError

NOISE = (
    "The river is wide and slow.",
    "A lamp burns in the hall.",
    "Rain falls on the roof.",
    "Nobody is at the door.",
    "The bread is still warm.",
)
"""Sentences that say nothing of what is asked, which a text is filled up with."""

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


class Question(NamedTuple):
    """What a model reads, and what it is to go on with.

    Attributes:
        prompt: the text and the beginning of a sentence; it does not end with a space.
        answer: the rest of the sentence, behind a space.
    """

    prompt: str
    answer: str


Write = Callable[[np.random.Generator, int, int, Sequence[str]], Question]
"""(random numbers, load, size, noise) -> question. The larger the size, the longer the text; what
is asked does not depend on it, unless the text is nothing else."""


@dataclass(frozen=True)
class QuestionKind:
    """A kind of question.

    Attributes:
        name: what `nha eval --tasks` calls it.
        about: what is asked, in a few words.
        load: what the load is, such as "keys".
        loads: those that are asked by default.
        least, most: the bounds of a load.
        write: writes one.
    """

    name: str
    about: str
    load: str
    loads: tuple[int, ...]
    least: int
    most: int
    write: Write


@dataclass(frozen=True)
class Questions:
    """Questions of one kind and load, in the words of a tokenizer.

    Attributes:
        kind, load: what is asked.
        tokenizer: the model's.
        noise: the sentences that fill a text up.
        twice: whether the model reads the prompt a second time before it answers.
    """

    kind: QuestionKind
    load: int
    tokenizer: Tokenizer
    noise: Sequence[str] = NOISE
    twice: bool = False

    num_answers = 1  # of an example

    def __post_init__(self) -> None:
        kind = self.kind
        if not kind.least <= self.load <= kind.most:
            raise ConfigError(
                f"{kind.name}: {kind.load} = {self.load}: expected {kind.least} to {kind.most}"
            )

    @classmethod
    def parse(cls, text: str, tokenizer: Tokenizer) -> Self:
        """Reads `keys`, or `keys:8` with a load; without one it is the middle one of its kind.

        Raises:
            ConfigError: the kind is unknown, or the load is no number or out of bounds.
        """
        name, _, load = map(str.strip, text.partition(":"))
        kind = QUESTION_KINDS.get(name)
        if kind is None:
            raise ConfigError(f"there is no task {name!r}; there are {', '.join(QUESTION_KINDS)}")
        if load and not load.isdecimal():
            raise ConfigError(f"{text!r}: {kind.load} = {load!r}: expected a number")
        return cls(kind, int(load) if load else kind.loads[len(kind.loads) // 2], tokenizer)

    def __str__(self) -> str:
        return f"{self.kind.name}:{self.load}"

    def write(self, length: int, *seed: int) -> "Encoded":
        """Writes the longest question that has at most `length` tokens, its answer included.

        Args:
            length: how many tokens.
            seed: names the question; one of another kind or load has nothing in common with it.

        Raises:
            ConfigError: there is no room for it, or the tokenizer does not write such a text.
        """
        whole_seed = (zlib.crc32(self.kind.name.encode()), self.load, *seed)

        def encoded(size: int) -> Encoded:
            rng = np.random.default_rng(whole_seed)
            first = int(rng.integers(len(self.noise)))
            noise = [*self.noise[first:], *self.noise[:first]]
            prompt, answer = self.kind.write(rng, self.load, size, noise)
            asked = Question(read_twice(prompt) if self.twice else prompt, answer)
            return encode(self.tokenizer, asked)

        shortest = encoded(1)
        if len(shortest.tokens) > length:
            raise ConfigError(
                f"{self}: it takes {len(shortest.tokens)} tokens at least, and there is room for "
                f"{length}"
            )
        if self.tokenizer.decode(shortest.tokens) != "".join(shortest.question):
            raise ConfigError(
                f"{self}: the tokenizer does not write {shortest.question.answer!r}; expected one "
                "of text, or bytes"
            )
        return _largest(encoded, shortest, length)

    def draw(self, length: int, *seed: int) -> Example:
        """Draws an example of `length` tokens, which asks for the answer alone; see `write`."""
        return self.write(length, *seed).example(length)


class Encoded(NamedTuple):
    """A question in tokens.

    Attributes:
        question: as text.
        tokens: [N] int32, of the prompt and the answer, with what begins documents before them.
        answer_start: where the answer's first token is; one that has a character of the answer
            is the answer's.
    """

    question: Question
    tokens: np.ndarray
    answer_start: int

    @property
    def prompt(self) -> np.ndarray:
        """The tokens that the model is given."""
        return self.tokens[: self.answer_start]

    @property
    def answer(self) -> np.ndarray:
        """The tokens that it is to say."""
        return self.tokens[self.answer_start :]

    def example(self, length: int) -> Example:
        """Returns it as an example of `length` tokens, which asks for the answer alone."""
        padding = (0, length - len(self.tokens) + 1)
        asked = np.arange(length) >= self.answer_start - 1
        asked[len(self.tokens) - 1 :] = False
        inputs, targets = np.pad(self.tokens[:-1], padding), np.pad(self.tokens[1:], padding)
        return Example(inputs, np.where(asked, targets, 0).astype(np.int32), asked)


def read_twice(prompt: str) -> str:
    """Repeats a prompt, so that what it asks is known when its text is read (arXiv 2407.05483)."""
    return f"{prompt}\n{prompt}"


def encode(tokenizer: Tokenizer, question: Question) -> Encoded:
    """Encodes a question as `nha data prepare --prompt-field` does: in one text."""
    spans = tokenizer.encode_with_spans("".join(question))
    begin = tokenizer.begin_tokens
    before = int((spans.stops <= len(question.prompt)).sum())
    tokens = np.concatenate([begin, spans.tokens]).astype(np.int32)
    return Encoded(question, tokens, len(begin) + before)


def _largest(encoded: Callable[[int], Encoded], shortest: Encoded, length: int) -> Encoded:
    """Finds the largest size whose question has at most `length` tokens, from that of size 1."""
    best, low, high = shortest, 1, 2
    while len((longer := encoded(high)).tokens) <= length:
        best, low, high = longer, high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if len((longer := encoded(middle)).tokens) <= length:
            best, low = longer, middle
        else:
            high = middle
    return best


def _words(rng: np.random.Generator, count: int, syllables: int = 3) -> list[str]:
    """Draws distinct words such as `tamiko`."""
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        parts = rng.integers([len(_CONSONANTS), len(_VOWELS)], size=(syllables, 2))
        drawn["".join(_CONSONANTS[a] + _VOWELS[b] for a, b in parts)] = None
    return list(drawn)


def _numbers(rng: np.random.Generator, count: int) -> list[str]:
    """Draws distinct numbers of five digits."""
    return [str(number) for number in rng.choice(np.arange(10_000, 100_000), count, replace=False)]


def _hide(facts: Sequence[str], places: Sequence[float], size: int, noise: Sequence[str]) -> str:
    """Writes `size` sentences of noise with the facts among them, in their order.

    The places are shares of the text, ascending.
    """
    sentences: Iterator[str] = itertools.islice(itertools.cycle(noise), size)
    parts, written = [], 0
    for fact, place in zip(facts, places, strict=True):
        until = round(place * size)
        parts += [*itertools.islice(sentences, until - written), fact]
        written = until
    return " ".join([*parts, *sentences])


def _needle(rng: np.random.Generator, load: int, size: int, noise: Sequence[str]) -> Question:
    (key,), (number,) = _words(rng, 1), _numbers(rng, 1)
    text = _hide([f"The number of {key} is {number}."], [load / 100], size, noise)
    return Question(f"{text} The number of {key} is", f" {number}")


def _keys(rng: np.random.Generator, load: int, size: int, noise: Sequence[str]) -> Question:
    keys, numbers = _words(rng, load), _numbers(rng, load)
    facts = [f"The number of {x} is {n}." for x, n in zip(keys, numbers, strict=True)]
    asked = rng.integers(load)
    text = _hide(facts, np.sort(rng.random(load)).tolist(), size, noise)
    return Question(f"{text} The number of {keys[asked]} is", f" {numbers[asked]}")


def _values(rng: np.random.Generator, load: int, size: int, noise: Sequence[str]) -> Question:
    (key,), numbers = _words(rng, 1), _numbers(rng, load)
    facts = [f"A number of {key} is {number}." for number in numbers]
    text = _hide(facts, np.sort(rng.random(load)).tolist(), size, noise)
    return Question(f"{text} The numbers of {key} are", f" {', '.join(numbers)}")


def _variables(rng: np.random.Generator, load: int, size: int, noise: Sequence[str]) -> Question:
    names, (number, other) = [word.upper() for word in _words(rng, 2 * load + 2)], _numbers(rng, 2)
    # The second chain is the one that is not asked for.
    chains = names[: load + 1], names[load + 1 :]
    facts = [f"VAR {a[0]} = {b}." for a, b in zip(chains, (number, other), strict=True)]
    for step in range(load):
        facts += [f"VAR {chain[step + 1]} = VAR {chain[step]}." for chain in chains]
    text = _hide(facts, np.sort(rng.random(len(facts))).tolist(), size, noise)
    return Question(f"{text} The variables that are {number}:", f" {', '.join(chains[0])}")


def _common(rng: np.random.Generator, load: int, size: int, noise: Sequence[str]) -> Question:
    times = size + 1  # of each common word, as against once
    words = _words(rng, load + load * times)
    common, listed = words[:load], words[:load] * times + words[load:]
    text = " ".join(listed[place] for place in rng.permutation(len(listed)))
    asked = f"The {load} most common words, from A to Z:"
    return Question(f"Words: {text}. {asked}", f" {' '.join(sorted(common))}")


def _copy(rng: np.random.Generator, load: int, size: int, noise: Sequence[str]) -> Question:
    text = " ".join(word for _ in range(size) for word in _words(rng, 1, syllables=load))
    return Question(f"Words: {text}. Again:", f" {text}")


def _phonebook(rng: np.random.Generator, load: int, size: int, noise: Sequence[str]) -> Question:
    names = [word.capitalize() for word in _words(rng, size + 1)]
    numbers = ["".join(map(str, digits)) for digits in rng.integers(10, size=(size + 1, load))]
    lines = [f"{name}: {number}" for name, number in zip(names, numbers, strict=True)]
    asked = rng.integers(len(names))
    book = "\n".join(lines)
    return Question(f"{book}\n\n{names[asked]}:", f" {numbers[asked]}")


_ALL = (
    QuestionKind(
        "needle", "a number that was said once", "depth in percent", (0, 25, 50, 75, 100), 0, 100,
        _needle,
    ),
    QuestionKind("keys", "one of many such numbers", "keys", (2, 4, 8, 16), 1, 1000, _keys),
    QuestionKind("values", "all numbers of one name", "values", (2, 4, 8), 1, 1000, _values),
    QuestionKind("variables", "which variables were set to it", "steps", (1, 2, 4), 1, 1000,
        _variables),
    QuestionKind("common", "the words that come often", "words", (2, 4, 8), 1, 1000, _common),
    QuestionKind("copy", "the whole text again", "syllables of a word", (1, 3), 1, 100, _copy),
    QuestionKind("phonebook", "a name's number, of a list", "digits", (4, 7), 1, 100, _phonebook),
)  # fmt: skip

QUESTION_KINDS = {kind.name: kind for kind in _ALL}


def describe_kinds() -> str:
    """Lists the kinds for a help text, a line each."""
    return "\n".join(
        f"  {kind.name:<10} {kind.about}, by {kind.load}" for kind in QUESTION_KINDS.values()
    )
