"""How often a model recalls, over lengths of examples and numbers of pairs."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import nha_jax
from nha_jax.tokenizer.interface import Tokenizer
from train.data.recall import EVALUATION, DrawnExamples, Mqar, tokenizer_of
from train.errors import ConfigError
from train.storage.atomic import write_picture

Accuracies = dict[int, dict[int, float]]
"""Length -> number of pairs -> share of the queries that are answered right."""


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
) -> Accuracies:
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

    found: Accuracies = {}
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


def as_table(found: Accuracies) -> str:
    """Writes accuracies in percent as a Markdown table: a row a length, a column a load."""
    columns = sorted({number for row in found.values() for number in row})
    lines = ["| tokens | " + " | ".join(f"{n} pairs" for n in columns) + " |"]
    lines.append("| --- " * (1 + len(columns)) + "|")
    for length, row in found.items():
        cells = (f"{row[n]:.1%}" if n in row else "" for n in columns)
        lines.append(f"| {length} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(found: Accuracies, path: Path) -> None:
    """Draws the accuracies as a heat map, a PNG."""
    from matplotlib.figure import Figure

    lengths, columns = list(found), sorted({n for row in found.values() for n in row})
    values = np.array([[found[x].get(n, np.nan) for n in columns] for x in lengths])
    figure = Figure(figsize=(2 + 0.8 * len(columns), 2 + 0.5 * len(lengths)), layout="constrained")
    axes = figure.add_subplot(xlabel="pairs", ylabel="tokens", title="Recall: share answered right")
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(columns)), [str(number) for number in columns])
    axes.set_yticks(range(len(lengths)), [str(length) for length in lengths])
    for row, column in np.argwhere(np.isfinite(values)):
        value = values[row, column]
        color = "black" if value > 0.6 else "white"
        axes.text(column, row, f"{value:.0%}", ha="center", va="center", color=color)
    figure.colorbar(image)
    write_picture(path, figure)
