"""How often a model answers questions about texts, over their lengths and loads."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

import nha_jax
from nha_jax.tokenizer.interface import Tokenizer
from train.data.questions import NOISE, QuestionKind, Questions
from train.data.recall import EVALUATION
from train.errors import ConfigError
from train.text.grid import Grid


class Answered(NamedTuple):
    """What was found.

    Attributes:
        whole: the share of answers all of whose tokens are the likeliest after those before: what
            greedy decoding would write.
        tokens: the share of such tokens.
        bits: mean bits of a token of an answer.
    """

    whole: Grid
    tokens: Grid
    bits: Grid


def measure_answers(
    model: nha_jax.Model,
    tokenizer: Tokenizer,
    kind: QuestionKind,
    lengths: Sequence[int],
    loads: Sequence[int],
    count: int,
    batch_size: int,
    noise: Sequence[str] = NOISE,
    twice: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Answered:
    """Asks `count` questions of each length and load that has room.

    Args:
        model: the model; it reads each text in chunks from an empty state.
        tokenizer: its own.
        kind: what is asked.
        lengths: tokens of a text with its question and answer, at most.
        loads: see the kind.
        count: how many questions of each.
        batch_size: texts at once.
        noise, twice: see `Questions`.
        progress: is called with the number of questions answered, whenever some were.

    Raises:
        ConfigError: a load is out of bounds, none fits any length, or the tokenizer does not
            write the texts.
    """
    whole: Grid = {}
    tokens: Grid = {}
    bits: Grid = {}
    why = None
    for load in loads:
        questions = Questions(kind, load, tokenizer, noise, twice)
        for length in lengths:
            try:
                drawn = [questions.write(length, EVALUATION, number) for number in range(count)]
            except ConfigError as error:
                why = error
                continue
            scores = nha_jax.score(
                model, [x.prompt for x in drawn], [x.answer for x in drawn], batch_size=batch_size
            )
            right = np.concatenate([score.greedy for score in scores])
            nats = -np.concatenate([score.log_probabilities for score in scores])
            share = np.mean([score.is_greedy for score in scores])
            whole.setdefault(length, {})[load] = float(share)
            tokens.setdefault(length, {})[load] = float(right.mean())
            bits.setdefault(length, {})[load] = float(nats.mean(dtype=np.float64) / np.log(2))
            if progress is not None:
                progress(count)
    if why is not None and not whole:
        raise ConfigError(f"--tasks={kind.name}: {why}")
    return Answered(whole, tokens, bits)
