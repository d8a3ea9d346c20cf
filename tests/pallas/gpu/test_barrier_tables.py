"""A launch file's docstring has a table of its barriers: it names all there are, and no others."""

import collections
import importlib
import pkgutil
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from nha_jax.ops import nha_attention
from pallas import gpu
from pallas.gpu.warpgroup.launch import launch as real_launch
from tests.support.gpu.process import HOPPER

MODULES = [
    module
    for info in pkgutil.walk_packages(gpu.__path__, "pallas.gpu.")
    if hasattr(module := importlib.import_module(info.name), "launch")
]
# Heads, slots, windows and options for which there are barriers that others do without.
CALLS = [
    {"K": 64, "M": 16, "W": 64},
    {"K": 256, "M": 128, "W": 64, "segments": True},
    {"K": 128, "M": 64, "W": 64, "rope": True, "return_state": True},
    {"K": 64, "M": 0, "W": None, "segments": True},
]


def barriers_by_module(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """The names of the barriers in what each module gives to `launch`, which runs nothing."""
    found: dict[str, set[str]] = collections.defaultdict(set)

    def launch(kernel, inputs, outputs, scratch, *, updated=None, **options):
        module = sys._getframe(1).f_globals["__name__"]
        found[module] |= {name for name, x in scratch.items() if isinstance(x, plgpu.Barrier)}
        return [*(jnp.zeros(x.shape, x.dtype) for x in outputs.values()), *(updated or {}).values()]

    for module in MODULES:
        if module.launch is real_launch:
            monkeypatch.setattr(module, "launch", launch)
    for call in CALLS:
        jax.clear_caches()
        with jax.sharding.use_abstract_mesh(HOPPER):
            trace_gradient(**call)
    return found


def trace_gradient(*, K, M, W, segments=False, rope=False, return_state=False) -> None:
    B, T, H = 1, 128, 1
    token = jax.ShapeDtypeStruct((B, T, H, K), jnp.bfloat16)
    arrays = [token, token, token, jax.ShapeDtypeStruct((B, T, H, M), jnp.float32)]
    rest: dict = {}
    if segments:
        rest["segment_ids"] = jax.ShapeDtypeStruct((B, T), jnp.int32)
    if rope:
        rest["rope"] = (jax.ShapeDtypeStruct((T, K // 2), jnp.float32),) * 2

    def loss(arrays, rest):
        options = {"window_size": W, "return_state": return_state, "implementation": "pallas_gpu"}
        out = nha_attention(*arrays, **options, **rest)
        leaves = [x for x in jax.tree.leaves(out) if jnp.issubdtype(x.dtype, jnp.floating)]
        return sum(jnp.sum(x.astype(jnp.float32)) for x in leaves)

    jax.eval_shape(jax.grad(loss), arrays, rest)


def barriers_in(docstring: str) -> Iterator[str]:
    """The names in the first column of the table, some of which it has as name[stage]."""
    lines = docstring.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| barrier"))
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return
        if name := line.split("|")[1].strip().partition("[")[0]:
            yield name


def test_tables_name_every_barrier(monkeypatch):
    found = barriers_by_module(monkeypatch)
    assert found.keys() >= {"pallas.gpu.forward.output", "pallas.gpu.warpgroup.state_walk"}
    for name, barriers in found.items():
        docstring = sys.modules[name].__doc__ or ""
        assert "| barrier" in docstring, f"{name} has no table of its barriers"
        assert set(barriers_in(docstring)) == barriers, name
