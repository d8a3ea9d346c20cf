"""Multi-query associative recall (MQAR): examples that are drawn, and a corpus of them.

The task of Arora et al. (arXiv 2312.04927), as the library zoology draws it. An example begins with
pairs of a key and a value; later each key stands once more, and there the model is to say its
value. Only these places count.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self

import numpy as np

from nha_jax.tokenizer.files import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from nha_jax.tokenizer.from_file import FileTokenizer
from nha_jax.tokenizer.interface import Tokenizer
from train.data.tokenizers import tokenizer_errors
from train.errors import ConfigError, require

MQAR = "mqar"

TRAINING, HELD_OUT, EVALUATION = range(3)
"""What examples are drawn for; those of one are not those of another."""

_HELD_OUT_EXAMPLES = 3000  # as many as zoology tests with
_VERSION = 1  # of how examples are drawn; a part of the corpus's fingerprint


class Example(NamedTuple):
    """What a model reads and is to say.

    Attributes:
        tokens: [T] int32.
        targets: [T] int32; 0 where nothing is asked.
        asked: [T] bool, where the target counts.
    """

    tokens: np.ndarray
    targets: np.ndarray
    asked: np.ndarray


class Task(Protocol):
    """What examples are drawn of.

    Attributes:
        num_answers: how many answers an example asks for.
    """

    @property
    def num_answers(self) -> int: ...

    def draw(self, length: int, *seed: int) -> Example:
        """Draws the example of `length` tokens that the seed names."""


@dataclass(frozen=True)
class Mqar:
    """How examples are drawn.

    Keys are distinct, out of 1 to vocabulary / 2 - 1, and values out of the upper half of the
    vocabulary. All pairs come first. Behind them, query i stands an even distance g behind the last
    value, with g / 2 drawn without repetition and in proportion to a (g / 2 + 1)^(a - 1): many
    queries come soon. All other places hold tokens drawn from the whole vocabulary.

    Attributes:
        pairs: how many pairs there are.
        vocabulary: how many tokens there are.
        examples: how many examples training goes through, again and again.
        power: a, of the distances.
    """

    pairs: int = 8
    vocabulary: int = 8192
    examples: int = 100_000
    power: float = 0.01

    def __post_init__(self) -> None:
        require(self.pairs >= 1, "pairs", self.pairs, "at least 1")
        good = self.vocabulary % 2 == 0 and self.vocabulary > 2 * self.pairs
        require(good, "vocabulary", self.vocabulary, f"an even number above {2 * self.pairs}")
        require(self.vocabulary <= 1 << 20, "vocabulary", self.vocabulary, f"at most {1 << 20}")
        require(1 <= self.examples < 2**31, "examples", self.examples, "at least 1, below 2**31")
        require(0 < self.power <= 1, "power", self.power, "above 0, at most 1")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads `mqar`, or `mqar:pairs=16,vocabulary=512`; any of the attributes may follow.

        Raises:
            ConfigError: an attribute is unknown, or its value is not possible.
        """
        kinds = {field.name: field.type for field in dataclasses.fields(cls)}
        values: dict[str, float] = {}
        for part in filter(None, text.partition(":")[2].split(",")):
            name, _, value = map(str.strip, part.partition("="))
            if name not in kinds:
                raise ConfigError(f"{text!r}: {name!r} is unknown; there are {', '.join(kinds)}")
            try:
                values[name] = (float if kinds[name] is float else int)(value)
            except ValueError:
                raise ConfigError(f"{text!r}: {name} = {value!r}: expected a number") from None
        try:
            return cls(**values)  # type: ignore[arg-type]
        except ValueError as error:
            raise ConfigError(f"{text!r}: {error}") from None

    @property
    def num_answers(self) -> int:
        return self.pairs

    def check_length(self, length: int) -> None:
        """Raises ValueError if an example of `length` tokens has no room for its queries."""
        good = length % 2 == 0 and length >= 4 * self.pairs
        require(good, "length", length, f"an even number of at least {4 * self.pairs}, 4 a pair")

    def draw(self, length: int, *seed: int) -> Example:
        """Draws the example of `length` tokens that the seed names."""
        rng = np.random.default_rng(seed)
        half, context = self.vocabulary // 2, 2 * self.pairs
        keys = rng.choice(np.arange(1, half), self.pairs, replace=False)
        values = rng.choice(np.arange(half, self.vocabulary), self.pairs, replace=False)
        room = (length - context) // 2
        chances = self.power * np.arange(1, room + 1) ** (self.power - 1)
        distances = rng.choice(room, self.pairs, replace=False, p=chances / chances.sum())
        places = context + 2 * distances
        tokens = rng.integers(self.vocabulary, size=length, dtype=np.int32)
        tokens[:context:2], tokens[1:context:2], tokens[places] = keys, values, keys
        targets, asked = np.zeros(length, np.int32), np.zeros(length, bool)
        targets[places], asked[places] = values, True
        return Example(tokens, targets, asked)


@dataclass(frozen=True)
class DrawnExamples:
    """Examples of one length, numbered: a source of a corpus that no file holds.

    It has what `train.data.token_source.Source` says.

    Attributes:
        task: how they are drawn.
        length: their tokens.
        purpose: TRAINING, HELD_OUT or EVALUATION.
        count: how many there are.
    """

    task: Task
    length: int
    purpose: int
    count: int

    text_bytes = 0
    has_mask = True

    def __len__(self) -> int:
        return self.count * self.length

    @property
    def num_documents(self) -> int:
        return self.count

    @property
    def num_targets(self) -> int:
        return self.count * self.task.num_answers

    @property
    def target_bytes(self) -> int:
        return self.num_targets  # an answer counts as a byte: bits per byte are bits an answer

    def text(self, limit: int) -> bytes:
        return b""

    def example(self, number: int) -> Example:
        """Draws example `number`."""
        return self.task.draw(self.length, self.purpose, number)


def is_drawn(corpus: str) -> bool:
    """Says whether `data.corpus` names a task, not files."""
    return corpus.partition(":")[0] == MQAR


def most_targets(corpus: str | Mapping[str, float]) -> int | None:
    """Says how many targets of a sequence of `data.corpus` count at most; None: any number."""
    return Mqar.parse(corpus).pairs if isinstance(corpus, str) and is_drawn(corpus) else None


def splits(task: Mqar, length: int) -> tuple[DrawnExamples, DrawnExamples]:
    """Makes the examples to train with, and those that are held out.

    Raises:
        ConfigError: they do not fit `length` tokens.
    """
    try:
        task.check_length(length)
    except ValueError as error:
        raise ConfigError(f"data.sequence_{error}, with {task.pairs} pairs") from None
    counts = {TRAINING: task.examples, HELD_OUT: _HELD_OUT_EXAMPLES}
    training, held_out = (DrawnExamples(task, length, *each) for each in counts.items())
    return training, held_out


def fingerprint(task: Mqar, length: int) -> str:
    """Hashes what the examples depend on."""
    content = json.dumps([_VERSION, length, dataclasses.asdict(task)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def tokenizer_of(task: Mqar) -> Tokenizer:
    """Makes the tokenizer of texts such as "17 4100 23 5001 17": each number is a token.

    Token 0, which is neither key nor value, ends a text.

    Raises:
        ConfigError: the package tokenizers is not installed.
    """
    names = {str(number): number for number in range(task.vocabulary)}
    content = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": names, "unk_token": "0"},
    }
    files = {
        TOKENIZER_FILE: json.dumps(content).encode(),
        TOKENIZER_CONFIG_FILE: json.dumps({"eos_token": "0"}).encode(),
    }
    with tokenizer_errors():
        return FileTokenizer(files, None, TOKENIZER_FILE)
