"""JAX's contenders: our kernels, our plain XLA, and cuDNN's full attention.

python -m contest.with_jax [toy]    started by operator_gpu.py; `toy` is for a CPU
"""

import functools
import itertools
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from contest.worker import Pass, Shape, serve
from nha_jax.ops import nha_attention
from train.devices.chips import chip_of

L2_CACHE = 50 * 2**20  # inputs are rotated through four times as much


class Jax:
    """A `Framework`."""

    def __init__(self, toy: bool):
        self._full = "xla" if toy else "cudnn"
        self._prepared: dict[str, tuple[Any, Any]] = {}

    def facts(self) -> dict[str, Any]:
        device = jax.devices()[0]
        chip = chip_of(device.device_kind)
        return {
            "device": device.device_kind,
            "jax": jax.__version__,
            "memory_bandwidth": None if chip is None else chip.memory_bandwidth,
            "backend": device.client.platform_version.splitlines()[0],
            "copy_bandwidth": _copy_bandwidth(2**20 if device.platform == "cpu" else 2**30),
        }

    def prepare(self, shape: Shape, direction: Pass) -> dict[str, Callable[[int], float] | str]:
        self._prepared.clear()
        contenders = {
            "ours": functools.partial(_nha, shape.W, "pallas_gpu"),
            "xla": functools.partial(_nha, shape.W, "xla"),
            "full attention, cuDNN": functools.partial(_full_attention, self._full),
        }
        count = max(2, math.ceil(4 * L2_CACHE / shape.input_bytes))
        sets = [_inputs(shape, seed) for seed in range(min(count, 8))]
        prepared: dict[str, Callable[[int], float] | str] = {}
        for name, attention in contenders.items():
            run = _with_backward(attention) if direction == "forward + backward" else attention
            arguments = [x if direction == "forward + backward" else x[:4] for x in sets]
            try:
                compiled = jax.jit(run).lower(*arguments[0]).compile()
                prepared[name] = functools.partial(_time, compiled, itertools.cycle(arguments))
                self._prepared[name] = compiled, arguments[0]
            except Exception as error:  # the others still count
                prepared[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
        return prepared

    def kernels(self, contender: str) -> list[tuple[str, float]]:
        from jax.experimental.mosaic.gpu import profiler  # there is one for GPUs only

        compiled, arguments = self._prepared[contender]
        _, milliseconds = profiler.measure(compiled, aggregate=False)(*arguments)
        return [(name, each / 1e3) for name, each in milliseconds or ()]


def _inputs(shape: Shape, seed: int) -> tuple[jax.Array, ...]:
    """query, key, value, log_decay, the output's cotangent."""
    keys = jax.random.split(jax.random.key(seed), 5)
    rows = (shape.B, shape.T)
    wide, narrow = (*rows, shape.Hq, shape.K), (*rows, shape.Hkv, shape.K)
    query, key, value, cotangent = (
        jax.random.normal(k, size, jnp.bfloat16)
        for k, size in zip(keys[:4], (wide, narrow, narrow, wide), strict=True)
    )
    log_decay = jax.nn.log_sigmoid(jax.random.normal(keys[4], (*narrow[:3], shape.M))) / 8
    return query, key, value, log_decay, cotangent


def _nha(window_size: int, implementation: str, query, key, value, log_decay):
    return nha_attention(
        query, key, value, log_decay, window_size=window_size, implementation=implementation
    )


def _full_attention(implementation: str, query, key, value, log_decay):
    return jax.nn.dot_product_attention(
        query, key, value, is_causal=True, implementation=implementation
    )


def _with_backward(attention):
    def run(query, key, value, log_decay, cotangent):
        out, pullback = jax.vjp(attention, query, key, value, log_decay)
        return out, pullback(cotangent)

    return run


def _time(compiled, inputs, calls: int) -> float:
    """Seconds of the whole queue; the device works while the host queues."""
    arguments = [next(inputs) for _ in range(calls)]
    start = time.perf_counter()
    for each in arguments:
        result = compiled(*each)
    jax.block_until_ready(result)  # the last: the device takes them in turn
    return time.perf_counter() - start


def _copy_bandwidth(size: int) -> float:
    """Bytes a second that a copy of `size` bytes reads and writes."""
    x = jnp.zeros(size // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1).lower(x).compile()
    cycle = itertools.cycle([(x,)])
    _time(copy, cycle, 2)
    return 2 * size * 20 / _time(copy, cycle, 20)


if __name__ == "__main__":
    serve(Jax(toy="toy" in sys.argv[1:]))
