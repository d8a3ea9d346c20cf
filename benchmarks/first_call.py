"""Times what a first call costs: how long XLA compiles nha-tiny for this CPU.

Forward and gradient of the model, with its windows of 32 and with full attention, at XLA's default
level of optimization and at level 1. CPU seconds, so that other processes disturb them little; the
median of three processes, since a process compiles nothing twice.

    JAX_PLATFORMS=cpu uv run python benchmarks/first_call.py
"""

import argparse
import re
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
from flax import nnx

from nha_jax import Model, ModelConfig

TOKENS = (1, 512)
WINDOWS = {"W=32": 32, "full attention": None}
LEVELS = {"default": {}, "1": {"xla_backend_optimization_level": 1}}


def programs(window_size: int | None) -> dict[str, jax.stages.Lowered]:
    """Traces forward and gradient."""
    config = ModelConfig.preset("nha-tiny")
    model = Model(config, rngs=nnx.Rngs(0)).with_windows(window_size)
    graph, state = nnx.split(model)

    def forward(state: nnx.State, tokens: jax.Array) -> jax.Array:
        return nnx.merge(graph, state)(tokens)

    def loss(state: nnx.State, tokens: jax.Array) -> jax.Array:
        return forward(state, tokens).mean()

    tokens = jax.ShapeDtypeStruct(TOKENS, jnp.int32)
    return {
        "forward": jax.jit(forward).lower(state, tokens),
        "gradient": jax.jit(jax.grad(loss)).lower(state, tokens),
    }


def measure(window: str, level: str) -> None:
    """Prints a line for each program: its name, CPU seconds, instructions, and fusions of them."""
    jax.jit(lambda x: x + 1)(0)  # the compiler is there
    for name, program in programs(WINDOWS[window]).items():
        before = time.process_time()
        compiled = program.compile(compiler_options=LEVELS[level])
        seconds = time.process_time() - before
        text = compiled.as_text()
        fusions = len(re.findall(r" fusion\(", text))
        print(f"{name},{seconds:.3f},{program.as_text().count(' = ')},{fusions}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs=2, metavar=("WINDOW", "LEVEL"), help="in this process")
    options = parser.parse_args()
    if options.only:
        measure(*options.only)
        return
    print("| | level | program | CPU-s | operations | fusions |")
    print("| --- | --- | --- | --- | --- | --- |")
    for window in WINDOWS:
        for level in LEVELS:
            command = [sys.executable, __file__, "--only", window, level]
            runs = [
                [line.split(",") for line in subprocess.check_output(command, text=True).split()]
                for _ in range(options.repeats)
            ]
            for lines in zip(*runs, strict=True):
                name, _, operations, fusions = lines[0]
                seconds = statistics.median(float(line[1]) for line in lines)
                print(
                    f"| {window} | {level} | {name} | {seconds:.1f} | {operations} | {fusions} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
