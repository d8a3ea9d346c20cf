"""Times generation: decode steps against the context and the batch, and reading prompts.

One model (4 layers, hidden size 256, 4 query and 2 key/value heads of 64, 64 slots, bytes) under
three choices of windows that share its parameters: W=64 everywhere ("nha"), full attention in one
layer of four ("1 in 4 full"), and full attention in all ("full", the usual cache of keys and
values). They take turns, so that a change of the machine's speed meets them all; medians are
printed, and ratios of medians. No context is read: an empty cache of its size costs a step the
same.

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

WINDOWS = {"nha": 64, "1 in 4 full": (64, 64, 64, None), "full": None}
PREFILL_CHUNK, TRAINING_LENGTH = 512, 2048


def make_model(dtype: str, implementation: str | None) -> Model:
    config = ModelConfig(
        vocab_size=257, num_layers=4, hidden_size=256, num_query_heads=4, num_kv_heads=2,
        num_slots=64, window_size=64, dtype=dtype, tie_embeddings=True, remat="none",
        implementation=implementation,
    )  # fmt: skip
    return Model(config, rngs=nnx.Rngs(0))


class Decoder:
    """A compiled decode step of a model, and a cache of `context` tokens a row."""

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
        """Bytes of one row's cache."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.cache)) // len(self._tokens)

    def __call__(self) -> None:
        """Takes a step; in a cache that is full the oldest entry is overwritten."""
        logits, self.cache = self._step(self._parameters, self._tokens, self.cache)
        jax.block_until_ready((logits, self.cache))


def with_length(cache: ModelCache, length: jax.Array) -> ModelCache:
    """Returns the cache as if its rows held `length` tokens."""
    layers = tuple(
        layer._replace(attention=layer.attention._replace(length=jnp.copy(length)))
        for layer in cache.layers
    )
    return ModelCache(layers, length)


def medians(functions: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Returns the median seconds of each function, which take turns for about `seconds`.

    There are at least five rounds, and a first one that does not count.
    """
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
    """Prints a step's time, and a row's cache, for every context and choice of windows."""
    print("| context | " + " | ".join(f"{name}, ms" for name in WINDOWS), end=" | ")
    print(" | ".join(f"{name}, cache a row" for name in WINDOWS), end=" | ")
    print("1 in 4 full / nha | full / nha |")
    print("|" + " --- |" * (2 * len(WINDOWS) + 3))
    for context in contexts:
        decoders = {
            name: Decoder(model.with_windows(windows), context, 1)
            for name, windows in WINDOWS.items()
        }
        median = medians(dict(decoders), seconds)
        cells = [f"{median[name] * 1e3:.2f}" for name in WINDOWS]
        cells += [f"{decoder.cache_bytes / 2**20:.2f} MiB" for decoder in decoders.values()]
        cells += [f"{median[name] / median['nha']:.1f}x" for name in list(WINDOWS)[1:]]
        print(f"| {context} | " + " | ".join(cells) + " |", flush=True)


def flatness_table(model: Model, contexts: list[int], seconds: float) -> None:
    """Prints the times of "nha" alone at all contexts, which take turns.

    A step of full attention before would leave it a cold processor cache.
    """
    decoders = {str(context): Decoder(model, context, 1) for context in contexts}
    median = medians(dict(decoders), seconds * len(contexts))
    print("\n| nha alone, context | " + " | ".join(median) + " |")
    print("|" + " --- |" * (len(median) + 1))
    print("| ms | " + " | ".join(f"{x * 1e3:.3f}" for x in median.values()) + " |", flush=True)


def batch_table(model: Model, batch_sizes: list[int], context: int, seconds: float) -> None:
    """Prints tokens a second for every batch size and choice of windows."""
    print(f"\n| batch, context {context} | " + " | ".join(f"{n}, tokens/s" for n in WINDOWS) + " |")
    print("|" + " --- |" * (len(WINDOWS) + 1))
    for batch_size in batch_sizes:
        decoders = {
            name: Decoder(model.with_windows(windows), context, batch_size)
            for name, windows in WINDOWS.items()
        }
        median = medians(dict(decoders), seconds)
        cells = [f"{batch_size / median[name]:.0f}" for name in WINDOWS]
        print(f"| {batch_size} | " + " | ".join(cells) + " |", flush=True)


def prefill_table(model: Model, seconds: float) -> None:
    """Prints how fast "nha" reads a chunk of a prompt, and how fast training's forward is."""
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
    """Prints how many greedy tokens are not the likeliest by the forward over all tokens before.

    The weights are random, so the likeliest tokens are nearly tied, which makes this a hard case.
    """
    print(f"\n| {model.config.dtype}, {num_tokens} tokens, greedy | not the forward's likeliest |")
    print("| --- | --- |")
    prompt = list(b"def main(")
    for name, windows in WINDOWS.items():
        chosen = model.with_windows(windows)
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
