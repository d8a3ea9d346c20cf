"""What it saves to read once what prompts begin with: time to the first token, and tokens read.

64 prompts share 4,000 tokens and have 32 of their own. The model is that of decode.py, under W=64
everywhere ("nha") and with full attention in one layer of four. An engine that keeps nothing and
one that keeps prefixes get the same prompts, each twice: all at once, where the first token of a
prompt waits for those before it too; and some of them one by one, each to an idle engine. The
tokens that they write, 8 after each prompt, must be the same.

    uv run python benchmarks/prefixes.py              # the table of benchmarks/README.md
    uv run python benchmarks/prefixes.py --prompts 4  # short
"""

import argparse
import statistics
import time
from typing import NamedTuple

import jax
import numpy as np
from decode import WINDOWS, make_model

from nha_jax import Engine, Model, PrefixStatistics, SamplingOptions

OWN_TOKENS, NEW_TOKENS, ALONE = 32, 8, 8


class Measured(NamedTuple):
    together: list[float]  # seconds to each prompt's first token, all submitted at once
    alone: list[float]  # the same of some, one by one
    kept: PrefixStatistics  # after those that came at once
    texts: dict[int, list[int]]


def first_tokens(engine: Engine, prompts: list[np.ndarray]) -> tuple[list[float], dict]:
    """Submits prompts at once; returns the seconds to the first token of each, and the texts."""
    start = time.perf_counter()
    options = SamplingOptions(max_new_tokens=NEW_TOKENS, temperature=0)
    numbers = [engine.submit(prompt, options) for prompt in prompts]
    texts: dict[int, list[int]] = {number: [] for number in numbers}
    seconds = []
    for event in engine.run():
        if not texts[event.request]:
            seconds.append(time.perf_counter() - start)
        texts[event.request].append(event.token)
    return seconds, texts


def measure(model: Model, prompts: list[np.ndarray], chunk: int, prefix_bytes: int) -> Measured:
    longest = len(prompts[0]) + NEW_TOKENS
    sizes = {"batch_size": 8, "max_length": longest, "prefill_chunk": chunk}
    # Engines of the same sizes share their programs, which this compiles.
    first_tokens(Engine(model, **sizes, prefix_bytes=prefix_bytes), prompts[:1])
    engine = Engine(model, **sizes, prefix_bytes=prefix_bytes)
    together, texts = first_tokens(engine, prompts)
    kept = engine.prefix_statistics
    alone = [first_tokens(engine, [prompt])[0][0] for prompt in prompts[:ALONE]]
    return Measured(together, alone, kept, texts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=64, metavar="N")
    parser.add_argument("--shared", type=int, default=4000, metavar="T", help="tokens")
    parser.add_argument("--chunks", type=int, nargs="+", default=[512, 128], metavar="C")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    beginning = rng.integers(0, 256, arguments.shared)
    prompts = [
        np.concatenate([beginning, rng.integers(0, 256, OWN_TOKENS)])
        for _ in range(arguments.prompts)
    ]
    print(f"{jax.devices()[0].device_kind}, float32, jax {jax.__version__}\n")
    print(
        "| windows | prefill_chunk | prefixes | tokens read | snapshots | first token alone, "
        "median | of all at once, median | the last | texts |"
    )
    print("|" + " --- |" * 9)
    model = make_model("float32", None)
    for name in ("nha", "1 in 4 full"):
        for chunk in arguments.chunks:
            texts = None
            for prefix_bytes in (0, 2**30):
                found = measure(model.with_windows(WINDOWS[name]), prompts, chunk, prefix_bytes)
                same = "" if texts is None else "the same" if texts == found.texts else "DIFFERENT"
                texts = found.texts
                print(
                    f"| {name} | {chunk} | {'read once' if prefix_bytes else 'read anew'} "
                    f"| {found.kept.tokens_read:,} | {found.kept.bytes / 2**20:.1f} MiB "
                    f"| {statistics.median(found.alone):.3f} s "
                    f"| {statistics.median(found.together):.2f} s "
                    f"| {found.together[-1]:.2f} s | {same} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
