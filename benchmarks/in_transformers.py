"""Times an exported model in transformers beside the same model here, on the CPU.

    uv run --isolated --group hf python benchmarks/in_transformers.py

The two take turns, in one process: a forward, and a training step (loss, gradients, AdamW) of the
quick start's model with random weights, in float32. It prints medians over the turns of the time
on the clock and of the processors' time, which other programs disturb less, and each beside ours of
the same turn. PyTorch has one thread: several wait for one another wherever a processor is busy.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import transformers
from flax import nnx

import nha_jax
from train.load_config import load_config

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


def ours(model: nha_jax.Model, tokens: np.ndarray) -> dict[str, Callable[[], object]]:
    """Makes what is timed of our model, by name."""
    graph, parameters = nnx.split(model, nnx.Param)
    optimizer = optax.adamw(1e-4)
    state = [parameters, optimizer.init(parameters)]
    batch = jnp.asarray(tokens)

    def loss(parameters: nnx.State) -> jax.Array:
        logits = nnx.merge(graph, parameters)(batch)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    @jax.jit
    def update(parameters: nnx.State, moments: optax.OptState) -> tuple[nnx.State, optax.OptState]:
        updates, moments = optimizer.update(jax.grad(loss)(parameters), moments, parameters)
        return optax.apply_updates(parameters, updates), moments

    def train() -> None:
        state[:] = update(*state)
        jax.block_until_ready(state)

    return {"forward": lambda: jax.block_until_ready(model(batch)), "training step": train}


def theirs(folder: Path, tokens: np.ndarray) -> dict[str, Callable[[], object]]:
    """Makes what is timed of the export, by name."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batch = torch.tensor(tokens)

    def forward() -> None:
        with torch.no_grad():
            model(batch)

    def train() -> None:
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()

    return {"forward": forward, "training step": train}


def seconds(run: Callable[[], object]) -> np.ndarray:
    """Returns [2]: seconds on the clock, and of this process on all processors."""
    start = np.array([time.perf_counter(), time.process_time()])
    run()
    return np.array([time.perf_counter(), time.process_time()]) - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 2048])
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = nha_jax.Model(load_config(str(CONFIG)).model, rngs=nnx.Rngs(0))
    print("| tokens | what | ms here | there | of ours | processors' ms here | there | of ours |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        nha_jax.save_pretrained(f"{folder}/model", model, format="transformers")
        for length in options.lengths:
            tokens = np.random.default_rng(0).integers(0, 256, (2, length))
            contenders = (ours(model, tokens), theirs(Path(folder, "model"), tokens))
            for what in contenders[0]:
                for contender in contenders:
                    contender[what]()
                turns = np.array(
                    [[seconds(x[what]) for x in contenders] for _ in range(options.turns)]
                )  # [turns, 2 contenders, 2 clocks]
                here, there = 1e3 * np.median(turns, axis=0)
                ratios = np.median(turns[:, 1] / turns[:, 0], axis=0)
                times = zip(here, there, ratios, strict=True)
                columns = " | ".join(f"{a:.0f} | {b:.0f} | {ratio:.1f}x" for a, b, ratio in times)
                print(f"| 2 x {length} | {what} | {columns} |")


if __name__ == "__main__":
    main()
