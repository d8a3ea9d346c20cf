"""The machine of a plan: devices to compile for, which need not be there."""

import importlib.util
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from train.devices.chips import GIB, Chip, chip_of
from train.errors import ConfigError
from train.plan.gpus import GPUS

TPUS = ("v5e", "v5p", "v6e", "tpu7x")
GPU_MEMORY_VARIABLE, GPU_MEMORY_SHARE = "XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75
_NEEDED = re.compile(r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)")
_UNITS = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}


@dataclass(frozen=True)
class Topology:
    """A machine to compile for.

    Attributes:
        name: its name as the user gave it, e.g. `v5p:4x4x4`.
        platform: "tpu" or "cuda".
        devices: its devices, as jax counts them; programs can only be compiled for them.
        chip: peaks of a device.
        memory: bytes of a device's memory that a program may use.
    """

    name: str
    platform: str
    devices: tuple[Any, ...]
    chip: Chip
    memory: int


def find_topology(name: str) -> Topology:
    """Finds the devices of a machine such as `v5p:4x4x4`, `2*v5e:16x16` or `cuda:8xH200`.

    Raises:
        ConfigError: there is no such machine, or the package that compiles for it is missing.
    """
    slices, one = 1, name
    if many := re.fullmatch(r"([1-9]\d*)\*(.+)", name):
        slices, one = int(many[1]), many[2]
    kind, _, shape = one.partition(":")
    if kind == "cuda" and slices > 1:
        raise ConfigError(f"--topology {name}: only TPUs have slices; expected {one}")
    if kind == "cuda":
        return _gpus(name, shape)
    if kind in TPUS and re.fullmatch(r"\d+(x\d+){1,2}", shape):
        return _tpus(name, one, slices)
    raise _unknown(name, f"one of {', '.join(TPUS)} and a shape, or cuda:8xH200")


def needed_memory(error: Exception) -> tuple[int, int] | None:
    """Reads from an error how many bytes a program needs, and how many a device has.

    What it needs are its arguments, results and temporaries together.

    Returns:
        Both numbers, or None if the error is about something else.
    """
    found = _NEEDED.search(str(error))
    if found is None:
        return None
    return int(float(found[1]) * _UNITS[found[2]]), int(float(found[3]) * _UNITS[found[4]])


def _tpus(name: str, one: str, slices: int) -> Topology:
    """Describes so many slices of the machine `one`."""
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f'--topology {name}: needs libtpu to compile for TPUs: pip install "nha_jax[tpu]"'
        )
    options = {"num_slices": slices} if slices > 1 else {}
    devices = _retry(
        lambda: topologies.get_topology_desc(platform="tpu", topology_name=one, **options), name
    )
    chip = chip_of(devices[0].device_kind)
    assert chip is not None, f"no peaks of {devices[0].device_kind}"
    return Topology(name, "tpu", devices, chip, _available_memory(devices[0]))


def _retry(describe: Callable[[], Any], name: str) -> tuple[Any, ...]:
    """Calls `describe`, waiting up to a minute for another process that is loading libtpu."""
    for _ in range(20):
        try:
            return tuple(describe().devices)
        except jax.errors.JaxRuntimeError as error:
            if "lockfile" not in str(error):
                raise _unknown(name, f"a shape that libtpu knows ({error})") from None
        time.sleep(3)
    raise ConfigError(f"--topology {name}: libtpu stayed locked by another process for a minute")


def _available_memory(device: Any) -> int:
    """Finds how many bytes of HBM the compiler lets a program use, which is less than the chip has.

    The compiler only says so when it refuses a program that needs more.
    """
    sharding = SingleDeviceSharding(device)
    double = jax.jit(lambda x: 2 * x, in_shardings=sharding, out_shardings=sharding)
    try:
        double.lower(jax.ShapeDtypeStruct((2**40,), jnp.float32)).compile()
    except jax.errors.JaxRuntimeError as error:
        if memory := needed_memory(error):
            return memory[1]
        raise
    raise AssertionError("a program of 8 TiB was compiled")


def _gpus(name: str, shape: str) -> Topology:
    match = re.fullmatch(r"(\d+)x(\w+)", shape)
    if not match or match[2] not in GPUS or not int(match[1]):
        raise _unknown(name, f"cuda:Nx and one of {', '.join(GPUS)}")
    if not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (13, 12)):
        raise ConfigError(
            f"--topology {name}: needs jax's CUDA plugin to compile for GPUs: "
            'pip install "nha_jax[cuda]"'
        )
    count, gpu = int(match[1]), GPUS[match[2]]
    description = topologies.get_topology_desc(
        platform="cuda",
        topology_name=name,
        topology=f"1x1x{count}",  # partitions x hosts in each x devices in each
        target_config=gpu.target_config,
    )
    chip = chip_of(gpu.device_kind)
    assert chip is not None, f"no peaks of {gpu.device_kind}"
    share = float(os.environ.get(GPU_MEMORY_VARIABLE, GPU_MEMORY_SHARE))
    return Topology(name, "cuda", tuple(description.devices), chip, int(share * gpu.memory))


def _unknown(name: str, expected: str) -> ConfigError:
    return ConfigError(f"--topology {name}: expected {' '.join(expected.split())}")
