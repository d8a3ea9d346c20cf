"""Measures how activations and their updates change with a model's width, with muP and without.

    uv run python benchmarks/coordinate_check.py

The quick start's model at several widths, with as many heads of its size as fit, makes some steps
of training: in the standard parametrisation, and with the quick start's own width as
`mup_base_width`. After every step the first batch is read again: of each kind of activation the
mean |x| over its entries, and the mean |x - x at the start|. It prints the slopes of their
logarithms in the logarithm of the width, and writes all numbers, and a picture of AdamW's.
"""

import argparse
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nha_jax import Model
from nha_jax.layers.layer_stack import block_of_layer
from nha_jax.ops import rope_tables
from nha_jax.storage.weights import ModelSource
from train.config import DataConfig, TrainConfig
from train.data.batches import Sequences, training_batches
from train.data.corpus import load_corpus
from train.devices.mesh import make_mesh
from train.load_config import load_config
from train.step.update import TrainingFunctions

ROOT = Path(__file__).parents[1]
BASE_WIDTH = 128  # of the quick start
KINDS = ("queries", "gates", "attention", "MLP", "stream", "logits")
"""Means over all layers, but for the stream that the last one leaves, and the logits."""
QUANTITIES = ("activation", "update")
STANDARD, MUP = "standard", "muP"

Row = dict[str, Any]
"""One kind of activation in one run: what was run, kind, and means by step from 0 on."""


def activations(model: Model, tokens: jax.Array) -> dict[str, jax.Array]:
    """Computes one forward pass: kind -> [layers, B, T, size], or [B, T, size]."""
    config, hidden = model.config, model.embed_tokens(tokens)
    positions = jnp.arange(tokens.shape[1])
    rope = rope_tables(positions, config.key_dim, config.rope_theta, config.rope_scaling)
    layers = []
    for layer, window in enumerate(config.windows):
        block = block_of_layer(model.blocks, layer)
        inputs, attention = block.attention_norm(hidden), block.attention
        attended, _ = attention.forward(
            inputs, window_size=window, rope=rope, segment_ids=None, diagnose=None
        )
        hidden = hidden + attended
        mlp = block.mlp(block.mlp_norm(hidden))
        hidden = hidden + mlp
        layers.append((attention.q_proj(inputs), attention.f_proj(inputs), attended, mlp))
    ends = hidden, model.logits(model.norm(hidden))
    return dict(zip(KINDS, [*map(jnp.stack, zip(*layers, strict=True)), *ends], strict=True))


def check(config: TrainConfig, steps: int, seeds: int) -> list[Row]:
    """Trains from each seed; returns a row for each kind, of means over the seeds too."""
    functions = TrainingFunctions(config, make_mesh(config))
    sequences = _sequences(config.data)
    read = jax.jit(lambda state, tokens: activations(functions.model(state), tokens))
    found = []
    for seed in range(seeds):
        batches = training_batches(sequences, config.batch_size, seed, 0)
        batch = next(batches)
        tokens = jnp.asarray(batch["tokens"])
        state = functions.initial_state(ModelSource(Model(config.model, rngs=nnx.Rngs(seed))))
        first = jax.device_get(read(state.model, tokens))
        found.append([_means(first, first)])
        for _ in range(steps):
            state, _ = functions.update(state, batch)
            found[-1].append(_means(jax.device_get(read(state.model, tokens)), first))
            batch = next(batches)
    means = np.array(found).mean(0).transpose(1, 2, 0)  # [quantity, kind, step]
    by_kind = zip(KINDS, *np.vectorize(lambda x: float(f"{x:.4g}"))(means).tolist(), strict=True)
    return [dict(zip(("kind", *QUANTITIES), each, strict=True)) for each in by_kind]


def _means(present: dict[str, np.ndarray], first: dict[str, np.ndarray]) -> list[list[float]]:
    changes = [present[kind] - first[kind] for kind in KINDS]
    values = [present[kind] for kind in KINDS]
    return [[float(np.abs(x).mean()) for x in each] for each in (values, changes)]


@functools.cache
def _sequences(data: DataConfig) -> Sequences:
    return Sequences(load_corpus(data).training, data.sequence_length)


def quick_start(width: int, parametrisation: str, optimizer: str) -> TrainConfig:
    """The quick start at a width, with a constant learning rate and without warm-up."""
    keys = {
        "model.hidden_size": width,
        "model.num_query_heads": width // load_config("quickstart").model.key_dim,
        "model.mup_base_width": BASE_WIDTH if parametrisation == MUP else None,
        "optimizer.name": optimizer,
        "optimizer.warmup_steps": 0,
        "optimizer.schedule": "constant",
    }
    return load_config("quickstart", [(key, json.dumps(value)) for key, value in keys.items()])


def by_width(rows: Sequence[Row], quantity: str, step: int, **like: Any) -> dict[int, float]:
    """Width -> a quantity after a step, of the rows that agree with `like`."""
    return {row["width"]: row[quantity][step] for row in rows if like.items() <= row.items()}


def slope(rows: Sequence[Row], quantity: str, step: int, **like: Any) -> float:
    """Slope of the logarithm of a quantity in the logarithm of the width, by least squares."""
    means = by_width(rows, quantity, step, **like)
    return float(np.polyfit(np.log(list(means)), np.log(list(means.values())), 1)[0])


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draws AdamW's rows: a column for each kind, a line for each step, width along the axis."""
    from matplotlib import colormaps, rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "coordinate check"  # the same file each time
    rcParams["svg.fonttype"] = "none"  # text, not outlines
    steps = range(len(rows[0]["activation"]))
    figure = Figure(figsize=(14, 9.5), layout="constrained")
    axes = figure.subplots(4, len(KINDS), sharex=True)
    lines = [(quantity, name) for quantity in QUANTITIES for name in (STANDARD, MUP)]
    for (quantity, name), line in zip(lines, axes, strict=True):
        label = "mean |x|" if quantity == "activation" else "mean |x − x at the start|"  # noqa: RUF001
        line[0].set_ylabel(f"{name}\n{label}")
        for kind, panel in zip(KINDS, line, strict=True):
            for step in steps[quantity == "update" :]:
                like = {"optimizer": "adamw", "parametrisation": name, "kind": kind}
                means = by_width(rows, quantity, step, **like)
                color = colormaps["viridis"](step / max(steps))
                panel.plot(list(means), list(means.values()), color=color)
            panel.set_xscale("log", base=2)
            panel.set_xticks(list(means), map(str, means))
            panel.set_yscale("log")
            panel.grid(alpha=0.3)
    for column, kind in enumerate(KINDS):
        axes[0, column].set_title(kind)
        axes[-1, column].set_xlabel("width")
        for top in (0, 2):  # a quantity has one scale, with muP and without
            limits = [axes[row, column].get_ylim() for row in (top, top + 1)]
            for row in (top, top + 1):
                axes[row, column].set_ylim(min(min(limits)), max(map(max, limits)))
    figure.suptitle(f"After 0 (dark) to {max(steps)} steps (light) of AdamW, by the model's width")
    figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--numbers", type=Path, default=ROOT / "benchmarks/coordinate_check.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/figures/coordinate_check.svg")
    options = parser.parse_args()
    rows: list[Row] = []
    for optimizer in ("adamw", "muon"):
        for name in (STANDARD, MUP):
            for width in options.widths:
                keys = {"optimizer": optimizer, "parametrisation": name, "width": width}
                config = quick_start(width, name, optimizer)
                rows += [keys | row for row in check(config, options.steps, options.seeds)]
                print(keys, flush=True)
    options.numbers.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    draw(rows, options.picture)
    print(f"| optimizer | parametrisation | {' | '.join(KINDS)} |")
    print("| --- " * (2 + len(KINDS)) + "|")
    for optimizer in ("adamw", "muon"):
        for name in (STANDARD, MUP):
            like = {"optimizer": optimizer, "parametrisation": name}
            slopes = [f"{slope(rows, 'update', -1, kind=kind, **like):.2f}" for kind in KINDS]
            print(f"| {optimizer} | {name} | {' | '.join(slopes)} |")


if __name__ == "__main__":
    main()
