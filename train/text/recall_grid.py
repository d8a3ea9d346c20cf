"""How often a model recalls, over lengths of examples and numbers of pairs."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

import nha_jax
from nha_jax.tokenizer.interface import Tokenizer
from train.data.recall import EVALUATION, DrawnExamples, Mqar, tokenizer_of
from train.errors import ConfigError
from train.text.grid import Grid


def task_of(tokenizer: Tokenizer) -> Mqar:
    """Returns the task that a tokenizer writes; ConfigError if it is not that of `mqar`."""
    size = tokenizer.vocabulary_size
    task = Mqar(1, size) if size % 2 == 0 and size >= 4 else None
    if task is None or tokenizer_of(task).name != tokenizer.name:
        raise ConfigError(
            "--tasks=mqar: the model's tokenizer does not write the task; it is for models that "
            "were trained with data.corpus=mqar"
        )
    return task


def measure_recall(
    model: nha_jax.Model,
    task: Mqar,
    lengths: Sequence[int],
    pairs: Sequence[int],
    count: int,
    batch_size: int,
) -> Grid:
    """Measures the accuracy on examples that no training has seen.

    Args:
        model: the model.
        task: its vocabulary, and how queries are placed.
        lengths: tokens of an example.
        pairs: numbers of pairs; those that do not fit a length are left out there.
        count: how many examples of each kind.
        batch_size: how many are read at once.

    Returns:
        The accuracy of each kind that fits: the likeliest token at a query is the value.
    """

    @jax.jit
    def right(model: nha_jax.Model, tokens: jax.Array, targets: jax.Array) -> jax.Array:
        return model(tokens).argmax(-1) == targets

    found: Grid = {}
    for length in lengths:
        for number in pairs:
            if 4 * number > length or 2 * number >= task.vocabulary:
                continue
            kind = DrawnExamples(Mqar(number, task.vocabulary), length, EVALUATION, count)
            hits = 0
            for first in range(0, count, batch_size):
                # The last batch is filled up, so that it needs no program of its own.
                batch = [kind.example(first + row) for row in range(batch_size)]
                tokens, targets, asked = map(np.stack, zip(*batch, strict=True))
                asked[count - first :] = False
                hit = right(model, jnp.asarray(tokens), jnp.asarray(targets))
                hits += int((np.asarray(hit) & asked).sum())
            found.setdefault(length, {})[number] = hits / (count * number)
    return found
