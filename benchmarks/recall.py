"""Recall with equally many entries: NHA against slots alone, a window alone, and full attention.

    uv run python benchmarks/recall.py

Each row is a small model trained by `nha train` on multi-query associative recall (`data.corpus:
mqar`) and measured on examples that no training saw. In every comparison the layers keep as many
key/value entries a head: slots, tokens of a window, or both; full attention keeps all tokens. Bytes
are not equal: a window also keeps its keys rotated, and decays where there are slots. Rows
are in an order that makes the table useful wherever it is stopped, and a row that
benchmarks/recall.json has is not run again; --folder has the runs, which go on if they are stopped.
It prints Markdown tables and draws docs/figures/recall.svg from the file.

These are smaller than the published experiments (arXiv 2312.04927: 64 to 512 tokens, vocabulary
8192, widths to 512): a vocabulary of 512, two layers of width 64 with two heads.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

import nha_jax
from train.cli import main as nha
from train.data.recall import Mqar
from train.storage.atomic import write_atomically
from train.text.loading import load_model
from train.text.recall_grid import measure_recall

ROOT = Path(__file__).parents[1]
CONFIG, RESULTS = ROOT / "configs" / "mqar.yaml", ROOT / "benchmarks" / "recall.json"
FIGURE = ROOT / "docs" / "figures" / "recall.svg"

VOCABULARY = 512
EXAMPLES = 1024  # that a model is measured on
WIDTH, HEADS = 64, 2


@dataclasses.dataclass(frozen=True)
class Row:
    """One model, and what it is trained on.

    Attributes:
        kind: full, window, slots or nha.
        slots, window: of every layer; null is full attention.
        tokens, pairs: of an example.
        rate, seed, steps: of its training.
    """

    kind: str
    slots: int
    window: int | None
    tokens: int
    pairs: int
    rate: float = 1e-2
    seed: int = 0
    steps: int = 800

    @property
    def entries(self) -> int | None:
        """Key/value entries that a head keeps; None: all tokens."""
        return None if self.window is None else self.slots + self.window

    @property
    def name(self) -> str:
        parts = [self.kind, f"S{self.entries}", f"T{self.tokens}", f"P{self.pairs}"]
        parts += [f"lr{self.rate:g}", f"seed{self.seed}", f"steps{self.steps}"]
        return "-".join(parts)


def of_state(entries: int, tokens: int, pairs: int, **fields: float) -> list[Row]:
    """Makes the three models that keep so many entries a head."""
    half = entries // 2
    shapes = (("nha", half, half), ("slots", entries, 0), ("window", 0, entries))
    return [Row(*shape, tokens, pairs, **fields) for shape in shapes]  # type: ignore[arg-type]


def full(tokens: int, pairs: int, **fields: float) -> Row:
    return Row("full", 0, None, tokens, pairs, **fields)  # type: ignore[arg-type]


def rows() -> list[Row]:
    """Lists all rows, what is most worth knowing first."""
    found = [*of_state(32, 64, 8), full(64, 8), *of_state(16, 64, 8)]
    found += [*of_state(32, 128, 16), full(128, 16)]
    found += [*of_state(32, 64, 8, seed=1), *of_state(16, 64, 8, seed=1)]
    for rate in (5e-3, 2e-2):
        found += of_state(32, 64, 8, rate=rate)
    return found


def train(row: Row, folder: Path) -> Path:
    """Runs `nha train`, or the rest of it; returns the run's folder."""
    model = {
        "vocab_size": VOCABULARY,
        "num_layers": 2,
        "hidden_size": WIDTH,
        "num_query_heads": HEADS,
        "num_slots": row.slots,
        "window_size": row.window,
        "conv_width": 4,
        "dtype": "float32",
        "remat": "none",
    }
    run = folder / row.name
    values = {
        "run": str(run),
        "model": json.dumps(model),
        "data.corpus": f"mqar:pairs={row.pairs},vocabulary={VOCABULARY}",
        "data.sequence_length": str(row.tokens),
        "steps": str(row.steps),
        "seed": str(row.seed),
        "optimizer.name": "muon",
        "optimizer.learning_rate": str(row.rate),
        "optimizer.warmup_steps": str(row.steps // 16),
        "evaluation.every": str(row.steps // 8),
        "sample.max_new_tokens": "1",
    }
    arguments = [f"--{key}={value}" for key, value in values.items()]
    if nha(["train", str(CONFIG), *arguments]):
        sys.exit(1)
    return run


def measure(row: Row, folder: Path) -> dict[str, object]:
    """Trains a row's model and measures it; seconds are of the last start, if it was stopped."""
    began, seconds = time.time(), time.process_time()
    model = load_model(train(row, folder)).with_implementation(None)
    task = Mqar(row.pairs, VOCABULARY)
    found = measure_recall(model, task, [row.tokens], [row.pairs], EXAMPLES, 64)
    return dataclasses.asdict(row) | {
        "accuracy": found[row.tokens][row.pairs],
        "state_bytes": state_bytes(row, model),
        "seconds": round(time.time() - began),
        "cpu_seconds": round(time.process_time() - seconds),
        "commit": commit(),
        "jax": jax.__version__,
    }


def state_bytes(row: Row, model: nha_jax.Model) -> int:
    """Counts the bytes that a sequence's cache takes after the example, in float32."""
    cache = model.init_cache(1, max_length=row.tokens)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(cache))


def commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def read() -> dict[str, dict]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


KINDS = {
    "nha": "slots and window",
    "slots": "slots alone",
    "window": "window alone",
    "full": "full attention",
}


class Compared(NamedTuple):
    """What the kinds reach in one comparison: the mean over seeds, of each the best rate."""

    tokens: int
    pairs: int
    entries: int
    accuracy: dict[str, float]
    seeds: dict[str, int]
    state_bytes: dict[str, int]


def compare(found: dict[str, dict]) -> list[Compared]:
    """Groups the rows by task and by entries a head; full attention is beside all of a task."""
    kept = list(found.values())
    compared = []
    for tokens, pairs in sorted({(row["tokens"], row["pairs"]) for row in kept}):
        here = [row for row in kept if (row["tokens"], row["pairs"]) == (tokens, pairs)]
        limited = [row for row in here if row["window"] is not None]
        for entries in sorted({row["slots"] + row["window"] for row in limited}):
            same = [row for row in limited if row["slots"] + row["window"] == entries]
            same += [row for row in here if row["window"] is None]
            best = {kind: best_by_seed([x for x in same if x["kind"] == kind]) for kind in KINDS}
            compared.append(
                Compared(
                    tokens,
                    pairs,
                    entries,
                    {
                        kind: float(np.mean(list(each.values())))
                        for kind, each in best.items()
                        if each
                    },
                    {kind: len(each) for kind, each in best.items() if each},
                    {row["kind"]: row["state_bytes"] for row in same},
                )
            )
    return compared


def show(found: dict[str, dict]) -> None:
    """Prints the comparisons as a table."""
    print("| tokens | pairs | entries a head | " + " | ".join(KINDS.values()) + " |")
    print("| --- " * (len(KINDS) + 3) + "|")
    for row in compare(found):
        cells = [
            f"{row.accuracy[kind]:.1%} ({row.seeds[kind]}), {row.state_bytes[kind] / 1000:.0f} kB"
            if kind in row.accuracy
            else ""
            for kind in KINDS
        ]
        print(f"| {row.tokens} | {row.pairs} | {row.entries} | {' | '.join(cells)} |")


def draw(found: dict[str, dict]) -> None:
    """Draws the comparisons as bars."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "recall"  # the same file each time
    rows = compare(found)
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot(ylabel="queries answered right", ylim=(0, 1))
    for number, (kind, label) in enumerate(KINDS.items()):
        places = np.arange(len(rows)) + 0.2 * (number - 1.5)
        axes.bar(places, [row.accuracy.get(kind, np.nan) for row in rows], 0.18, label=label)
    names = [f"{x.tokens} tokens, {x.pairs} pairs,\n{x.entries} entries a head" for x in rows]
    axes.set_xticks(range(len(rows)), names)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(FIGURE, metadata={"Date": None})


def best_by_seed(rows: list[dict]) -> dict[int, float]:
    """Gives the accuracy of each seed's best learning rate."""
    best: dict[int, float] = {}
    for row in rows:
        best[row["seed"]] = max(best.get(row["seed"], 0), row["accuracy"])
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/recall"))
    parser.add_argument("--only-show", action="store_true", help="train nothing")
    options = parser.parse_args()
    for row in [] if options.only_show else rows():
        if row.name not in read():
            found = measure(row, options.folder)
            write_atomically(RESULTS, json.dumps(read() | {row.name: found}, indent=1) + "\n")
            print(f"{row.name}: {found['accuracy']:.1%}", flush=True)
    show(read())
    draw(read())


if __name__ == "__main__":
    main()
