"""Times generation: a decode step's cost against the context, the batch, and reading prompts.

One model (4 layers, hidden size 256, 4 query and 2 key/value heads of 64, 64 slots, bytes) under
three choices of windows that share its parameters: W=64 everywhere ("nha"), full attention in one
layer of four ("1 in 4 full") and in all ("full": the usual cache of keys and values). Contenders
take turns, so that a change of the machine's speed meets them all; medians are printed, and ratios
of medians. Contexts are not read: a cache of their size is made, whose contents change no step's
cost.

    uv run python benchmarks/decode.py --seconds 5           # the tables of benchmarks/README.md
    uv run python benchmarks/decode.py --contexts 1024 4096  # short

It runs on whatever device JAX finds; on an accelerator try --dtype bfloat16 --batch-sizes 1 64 256,
and on Hopper, for the kernels of prefill and decode steps, --implementation pallas_gpu with it.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nha_jax import Model, ModelCache, ModelConfig, generate

LAYOUTS = {"nha": 64, "1 in 4 full": (64, 64, 64, None), "full": None}
PREFILL_CHUNK, TRAINING_LENGTH = 512, 2048


def make_model(dtype: str, implementation: str | None) -> Model:
    config = ModelConfig(
        vocab_size=257, num_layers=4, hidden_size=256, num_query_heads=4, num_kv_heads=2,
        num_slots=64, window_size=64, dtype=dtype, tie_embeddings=True, remat="none",
        implementation=implementation,
    )  # fmt: skip
    return Model(config, rngs=nnx.Rngs(0))


class Decoder:
    """A compiled decode step of one layout, and a cache of `context` tokens a row."""

    def __init__(self, model: Model, context: int, batch_size: int):
        graph, self._parameters = nnx.split(model)
        self._tokens = jnp.zeros(batch_size, jnp.int32)
        length = jnp.full(batch_size, context - 1, jnp.int32)
        self.cache = with_length(model.init_cache(batch_size, max_length=context), length)

        def step(parameters: nnx.State, tokens: jax.Array, cache: ModelCache):
            return nnx.merge(graph, parameters).decode_step(tokens, cache)

        self._step = (
            jax.jit(step, donate_argnums=2)
            .lower(self._parameters, self._tokens, self.cache)
            .compile()
        )

    @property
    def cache_bytes(self) -> int:
        """Of a row."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.cache)) // len(self._tokens)

    def __call__(self) -> None:
        """A step; beyond the room of a cache the oldest entry is overwritten."""
        logits, self.cache = self._step(self._parameters, self._tokens, self.cache)
        jax.block_until_ready((logits, self.cache))


def with_length(cache: ModelCache, length: jax.Array) -> ModelCache:
    """The cache, as if its rows had so many tokens."""
    layers = tuple(
        layer._replace(attention=layer.attention._replace(length=jnp.copy(length)))
        for layer in cache.layers
    )
    return ModelCache(layers, length)


def medians(functions: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median seconds of each function, in turns, for about `seconds` and at least five rounds."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    begin, rounds = time.perf_counter(), 0
    while rounds < 6 or time.perf_counter() - begin < seconds:
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
        rounds += 1
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def context_table(model: Model, contexts: list[int], seconds: float) -> None:
    print("| context | " + " | ".join(f"{name}, ms" for name in LAYOUTS), end=" | ")
    print(" | ".join(f"{name}, cache a row" for name in LAYOUTS), end=" | ")
    print("1 in 4 full / nha | full / nha |")
    print("|" + " --- |" * (2 * len(LAYOUTS) + 3))
    for context in contexts:
        decoders = {
            name: Decoder(model.with_windows(layout), context, 1)
            for name, layout in LAYOUTS.items()
        }
        median = medians(dict(decoders), seconds)
        cells = [f"{median[name] * 1e3:.2f}" for name in LAYOUTS]
        cells += [f"{decoder.cache_bytes / 2**20:.2f} MiB" for decoder in decoders.values()]
        cells += [f"{median[name] / median['nha']:.1f}x" for name in list(LAYOUTS)[1:]]
        print(f"| {context} | " + " | ".join(cells) + " |", flush=True)


def flatness_table(model: Model, contexts: list[int], seconds: float) -> None:
    """ "nha" alone, at every context in turns: full attention would leave it a cold processor."""
    decoders = {str(context): Decoder(model, context, 1) for context in contexts}
    median = medians(dict(decoders), seconds * len(contexts))
    print("\n| nha alone, context | " + " | ".join(median) + " |")
    print("|" + " --- |" * (len(median) + 1))
    print("| ms | " + " | ".join(f"{x * 1e3:.3f}" for x in median.values()) + " |", flush=True)


def batch_table(model: Model, batch_sizes: list[int], context: int, seconds: float) -> None:
    print(f"\n| batch, context {context} | " + " | ".join(f"{n}, tokens/s" for n in LAYOUTS) + " |")
    print("|" + " --- |" * (len(LAYOUTS) + 1))
    for batch_size in batch_sizes:
        decoders = {
            name: Decoder(model.with_windows(layout), context, batch_size)
            for name, layout in LAYOUTS.items()
        }
        median = medians(dict(decoders), seconds)
        cells = [f"{batch_size / median[name]:.0f}" for name in LAYOUTS]
        print(f"| {batch_size} | " + " | ".join(cells) + " |", flush=True)


def prefill_table(model: Model, seconds: float) -> None:
    """Of "nha": a chunk behind others, against the forward of training."""
    graph, parameters = nnx.split(model)
    cache = model.init_cache(1)
    chunk = jnp.zeros((1, PREFILL_CHUNK), jnp.int32)
    tokens = jnp.zeros((1, TRAINING_LENGTH), jnp.int32)

    @jax.jit
    def prefill(parameters, tokens, cache):
        return nnx.merge(graph, parameters).prefill(tokens, cache=cache)

    @jax.jit
    def forward(parameters, tokens):
        return nnx.merge(graph, parameters)(tokens)

    runs = {
        f"prefill, {PREFILL_CHUNK} tokens a chunk": functools.partial(
            prefill, parameters, chunk, cache
        ),
        f"training's forward, {TRAINING_LENGTH} tokens": functools.partial(
            forward, parameters, tokens
        ),
    }
    sizes = dict(zip(runs, (PREFILL_CHUNK, TRAINING_LENGTH), strict=True))
    median = medians(
        {name: lambda run=run: jax.block_until_ready(run()) for name, run in runs.items()}, seconds
    )
    print("\n| nha, batch 1 | tokens/s |\n| --- | --- |")
    for name, seconds_each in median.items():
        print(f"| {name} | {sizes[name] / seconds_each:.0f} |")


def agreement_table(model: Model, num_tokens: int = 512) -> None:
    """Greedy generation against the full forward over all tokens before: where they disagree.

    The weights are random, so the likeliest tokens are nearly ties: a hard case.
    """
    print(f"\n| {model.config.dtype}, {num_tokens} tokens, greedy | not the forward's likeliest |")
    print("| --- | --- |")
    prompt = list(b"def main(")
    for name, layout in LAYOUTS.items():
        chosen = model.with_windows(layout)
        found = generate(chosen, prompt, max_new_tokens=num_tokens, temperature=0)
        text = jnp.asarray([*prompt, *found])[None]
        logits = jax.jit(Model.__call__)(chosen, text)[0, len(prompt) - 1 : -1]
        print(f"| {name} | {int((logits.argmax(-1) != found).sum())} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    contexts = [2**10, 2**12, 2**14, 2**16, 2**18, 2**20]
    parser.add_argument("--contexts", type=int, nargs="+", default=contexts, metavar="T")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16, 64], metavar="B")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--implementation", choices=("xla", "pallas_gpu"), help="of the model")
    parser.add_argument("--seconds", type=float, default=5.0, help="of measuring, per row")
    arguments = parser.parse_args()
    model = make_model(arguments.dtype, arguments.implementation)
    print(f"{jax.devices()[0].device_kind}, {arguments.dtype}, jax {jax.__version__}\n")
    context_table(model, arguments.contexts, arguments.seconds)
    flatness_table(model, arguments.contexts, arguments.seconds)
    batch_table(model, arguments.batch_sizes, 4096, arguments.seconds)
    prefill_table(model, arguments.seconds)
    for dtype in ("float32", "bfloat16"):
        agreement_table(make_model(dtype, arguments.implementation))


if __name__ == "__main__":
    main()
