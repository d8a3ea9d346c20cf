"""How likely a model finds given continuations: `score`."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nha_jax.argument_checks import check_count
from nha_jax.cache import ModelCache
from nha_jax.generation.prompts import Prompt, read_prompt
from nha_jax.model import Model
from nha_jax.prompt_lengths import rounded_length

_MULTIPLE = 16  # what lengths are rounded up to, so that few programs serve all of them


class Score(NamedTuple):
    """What `score` returns for one continuation of n tokens.

    Fields:
        log_probability: of the whole continuation, natural; the sum, in float64, of
        log_probabilities: [n] float32, of each token after all before it.
        greedy: [n] bool, whether each token is the likeliest one in its place.
    """

    log_probability: float
    log_probabilities: np.ndarray
    greedy: np.ndarray

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding would have written the continuation."""
        return bool(self.greedy.all())


def score(
    model: Model,
    contexts: Sequence[Prompt],
    continuations: Sequence[Prompt],
    *,
    batch_size: int = 8,
    chunk: int = 512,
    progress: Callable[[int], object] | None = None,
) -> list[Score]:
    """Computes the probability of each continuation after its context.

    Equal contexts are read once for all of their continuations, whatever their order. Texts of any
    length are read in chunks, each of which starts from the state after the one before, so the
    result is that of one forward over the whole: with layers of finite windows, in memory that
    does not grow. The log-probability of a text, document by document, is its score after the
    token that begins documents. Lengths are rounded up to few: N of them compile O(log N)
    programs.

        choices = nha_jax.score(model, ["2 + 2 ="] * 2, [" 4", " 5"])
        max(choices, key=lambda choice: choice.log_probability)

    Args:
        model: the model. On a mesh (`jax.set_mesh`), rows and heads are divided as in prefill.
        contexts: N rows of at least one token each, as prompts of `generate`: integers [T] in
            [0, vocab_size), or a str or bytes for a model of bytes.
        continuations: N rows of at least one token each, likewise.
        batch_size: rows that are read at once, of contexts or of continuations.
        chunk: the most tokens of a row that are read at once.
        progress: is called with the number of continuations done so far, whenever it grows.

    Returns:
        The scores, in the order of the continuations.

    Raises:
        ValueError, TypeError: an argument has a wrong value, shape or dtype, or the two have
            different lengths; the message names it.
    """
    size, most = check_count("batch_size", batch_size), check_count("chunk", chunk)
    if len(contexts) != len(continuations):
        raise ValueError(
            f"contexts and continuations must be equally many, got {len(contexts)} and "
            f"{len(continuations)}"
        )
    vocab_size = model.config.vocab_size
    tasks = [
        _Task(
            number,
            read_prompt(context, vocab_size, f"contexts[{number}]"),
            read_prompt(continuation, vocab_size, f"continuations[{number}]"),
        )
        for number, (context, continuation) in enumerate(zip(contexts, continuations, strict=True))
    ]
    scores: list[Score | None] = [None] * len(tasks)
    done = 0
    for group in _groups(tasks, size):
        for task, found in _score_group(model, group, size, most):
            scores[task.number] = found
            done += 1
            if progress is not None:
                progress(done)
    return [found for found in scores if found is not None]


@dataclasses.dataclass(frozen=True)
class _Task:
    number: int
    context: np.ndarray  # [T] int32
    continuation: np.ndarray  # [n] int32

    @property
    def before(self) -> np.ndarray:
        """What is read before the first prediction."""
        return self.context[:-1]

    @property
    def inputs(self) -> np.ndarray:
        """[n], what is read to predict each token of the continuation."""
        return np.concatenate([self.context[-1:], self.continuation[:-1]])

    @property
    def length(self) -> int:
        return len(self.context) + len(self.continuation)


def _groups(tasks: list[_Task], size: int) -> Iterator[list[list[_Task]]]:
    """Groups the tasks by context: `size` contexts of about one length at a time."""
    by_context: dict[bytes, list[_Task]] = {}
    for task in tasks:
        by_context.setdefault(task.context.tobytes(), []).append(task)
    ordered = sorted(by_context.values(), key=lambda same: -max(task.length for task in same))
    for first in range(0, len(ordered), size):
        yield ordered[first : first + size]


def _score_group(
    model: Model, group: list[list[_Task]], size: int, chunk: int
) -> Iterator[tuple[_Task, Score]]:
    """Reads up to `size` contexts, then all of their continuations, `size` at a time."""
    longest = max(task.length for task in itertools.chain(*group))
    cache = model.init_cache(size, max_length=rounded_length(longest, _MULTIPLE))
    for tokens, lengths in _chunks([same[0].before for same in group], size, chunk):
        _, cache = model.prefill(jnp.asarray(tokens), lengths=lengths, cache=cache)
    rows = [(row, task) for row, same in enumerate(group) for task in same]
    rows.sort(key=lambda x: -len(x[1].continuation))
    for first in range(0, len(rows), size):
        part = rows[first : first + size]
        tasks = [task for _, task in part]
        numbers = np.zeros(size, np.int32)
        numbers[: len(part)] = [row for row, _ in part]
        after = _take_rows(cache, jnp.asarray(numbers))
        yield from zip(tasks, _score_rows(model, tasks, after, chunk), strict=True)


@jax.jit
def _take_rows(cache: ModelCache, rows: jax.Array) -> ModelCache:
    return jax.tree.map(lambda x: jnp.take(x, rows, axis=0), cache)


def _score_rows(model: Model, tasks: list[_Task], cache: ModelCache, chunk: int) -> Iterator[Score]:
    """Scores the continuations of one batch, whose contexts the cache has read."""
    size = len(cache.length)
    inputs = _chunks([task.inputs for task in tasks], size, chunk)
    targets = _chunks([task.continuation for task in tasks], size, chunk)
    parts = []
    for (tokens, lengths), (wanted, _) in zip(inputs, targets, strict=True):
        *scored, cache = model.score_tokens(tokens, wanted, cache, lengths=lengths)
        parts.append(jax.device_get(scored))
    # Only a row's last chunk has places past its end, so the first n are those of its n tokens.
    log_probability, greedy = (np.concatenate(x, axis=1) for x in zip(*parts, strict=True))
    for row, task in enumerate(tasks):
        each = log_probability[row, : len(task.continuation)]
        total = float(each.sum(dtype=np.float64))
        yield Score(total, each, greedy[row, : len(task.continuation)])


def _chunks(
    rows: list[np.ndarray], size: int, chunk: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cuts rows [T] into chunks: tokens [size, C] and how many of them each row has, [size].

    The last chunk's C is rounded up, and rows that are missing or at their end have no tokens.
    """
    longest = max(map(len, rows))
    for start in range(0, longest, chunk):
        width = min(chunk, rounded_length(longest - start, _MULTIPLE))
        tokens, lengths = np.zeros((size, width), np.int32), np.zeros(size, np.int32)
        for row, whole in enumerate(rows):
            part = whole[start : start + width]
            tokens[row, : len(part)], lengths[row] = part, len(part)
        yield tokens, lengths
