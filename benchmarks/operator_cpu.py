"""Times nha_attention (implementation "xla") against full and local attention, side by side.

Forward and backward at B=1, K=V=64, M=64 slots. The contenders of one length take turns, so that
a change of the machine's speed meets them all; medians are printed, and ratios of medians.

    uv run python benchmarks/operator_cpu.py --seconds 5  # about 20 minutes
    uv run python benchmarks/operator_cpu.py --quick      # short lengths only
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp

import nha_jax
from nha_jax.ops import rope_tables

HEADS, DIM, SLOTS, WINDOW = 8, 64, 64, 64


def make_inputs(T: int, dtype, kv_heads: int) -> tuple[jax.Array, ...]:
    """query, key, value, log_decay, cotangent of the output."""
    keys = jax.random.split(jax.random.key(0), 5)
    heads = (HEADS, kv_heads, kv_heads)
    query, key, value = (
        jax.random.normal(k, (1, T, h, DIM), dtype) for k, h in zip(keys, heads, strict=False)
    )
    log_decay = jax.nn.log_sigmoid(jax.random.normal(keys[3], (1, T, kv_heads, SLOTS))) / 8
    return query, key, value, log_decay, jax.random.normal(keys[4], query.shape, dtype)


def nha(query, key, value, log_decay, *, window_size=WINDOW, rope=None):
    return nha_jax.nha_attention(
        query, key, value, log_decay, window_size=window_size, rope=rope, implementation="xla"
    )


def softmax_attention(query, key, value, log_decay, *, window=None):
    return jax.nn.dot_product_attention(
        query, key, value, is_causal=True, local_window_size=None if window is None else (window, 0)
    )


def forward_backward(attention, inputs):
    """A compiled function of the inputs: output and gradients of query, key, value, log_decay."""

    def run(query, key, value, log_decay, cotangent):
        out, pullback = jax.vjp(attention, query, key, value, log_decay)
        return out, pullback(cotangent)

    return jax.jit(run).lower(*inputs).compile()


def medians(functions: dict, inputs: tuple, seconds: float) -> dict[str, float]:
    """Median seconds of each function, in turns, for about `seconds` and at least three rounds."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    begin, rounds = time.perf_counter(), 0
    while rounds < 4 or time.perf_counter() - begin < seconds:
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*inputs))
            times[name].append(time.perf_counter() - start)
        rounds += 1
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def row(T: int, dtype, kv_heads: int, window: int, softmax: bool, seconds: float) -> str:
    inputs = make_inputs(T, dtype, kv_heads)
    rope = rope_tables(jnp.arange(T), DIM)
    contenders = {"nha": functools.partial(nha, window_size=window, rope=rope)}
    if softmax:
        contenders |= {
            "full": softmax_attention,
            "local": functools.partial(softmax_attention, window=window),
        }
    compiled = {name: forward_backward(f, inputs) for name, f in contenders.items()}
    input_bytes = sum(x.nbytes for x in inputs[:4])
    memory = compiled["nha"].memory_analysis().temp_size_in_bytes / input_bytes
    median = medians(compiled, inputs, seconds)
    ratios = (
        "| - | - "
        if not softmax
        else "".join(f"| {median[name] / median['nha']:.1f}x " for name in ("full", "local"))
    )
    return (
        f"| {jnp.dtype(dtype).name} | {HEADS}/{kv_heads} | {window} | {T} "
        f"| {median['nha'] * 1e3:.0f} | {median['nha'] * 1e6 / T:.1f} {ratios}| {memory:.1f}x |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="lengths up to 2048 only")
    parser.add_argument("--seconds", type=float, default=15.0, help="of measuring, per row")
    arguments = parser.parse_args()
    print(
        "| dtype | heads q/kv | W | T | ms | us a token "
        "| full / ours | local / ours | temporary / inputs |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    lengths = (1024, 2048) if arguments.quick else (1024, 2048, 4096, 8192, 16384, 32768)
    for dtype in (jnp.float32, jnp.bfloat16):
        for kv_heads, window in ((HEADS, WINDOW), (HEADS // 4, WINDOW), (HEADS, 512)):
            for T in lengths:
                # Full attention stores T x T logits: 8 GiB a copy in float32 at 16384.
                print(row(T, dtype, kv_heads, window, T <= 8192, arguments.seconds), flush=True)


if __name__ == "__main__":
    main()
