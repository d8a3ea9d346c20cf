"""Which implementation a program gets: that of the platform it is made for."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from nha_jax.ops import backends, nha_attention
from nha_jax.ops.rope import rope_tables

T, K, M = 64, 128, 16
KERNEL = "tpu_custom_call"


def program(platform: str, **options) -> str:
    """The gradient's program before compilation, for a platform this machine need not have."""
    shape = jax.ShapeDtypeStruct((1, T, 2, K), jnp.bfloat16)
    log_decay = jax.ShapeDtypeStruct((1, T, 2, M), jnp.float32)

    def loss(*arrays):
        out = nha_attention(*arrays, rope=rope_tables(jnp.arange(T), K), **options)
        return jnp.sum(out.astype(jnp.float32))

    traced = jax.jit(jax.grad(loss, (0, 1, 2, 3))).trace(shape, shape, shape, log_decay)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("window_size", [16, None], ids="W{}".format)
def test_the_fastest_for_the_platform_compiled_for(window_size, monkeypatch):
    monkeypatch.setattr(backends, "can_compile_for", lambda platform: True)
    assert KERNEL in program("tpu", window_size=window_size)
    assert KERNEL not in program("cpu", window_size=window_size)


@pytest.mark.parametrize("option", [{"scale": -1.0}, {"slot_delay": 0}], ids=str)
def test_what_kernels_cannot_serve_falls_back(monkeypatch, option):
    monkeypatch.setattr(backends, "can_compile_for", lambda platform: True)
    assert KERNEL not in program("tpu", window_size=16, **option)


def test_named_implementations():
    assert KERNEL in program("tpu", window_size=16, implementation="pallas_tpu")
    assert KERNEL not in program("tpu", window_size=16, implementation="xla")


def test_kernels_cost_other_machines_no_derivatives(monkeypatch):
    """Kernels have no derivative of their gradient; where there are none, XLA's code has."""
    monkeypatch.setattr(backends, "can_compile_for", lambda platform: False)
    x = jnp.ones((1, 4, 1, 2))

    def loss(query):
        return jnp.sum(jnp.sin(nha_attention(query, x, x, -x, window_size=None)))

    curvature = jax.jit(jax.hessian(loss))(x)
    assert curvature.shape == (*x.shape, *x.shape)


def test_on_gpus_plain_xla_until_someone_has_measured():
    assert "mosaic_gpu" not in program("cuda", window_size=16)


KERNELS, LIBRARY = "mosaic_gpu", "__cudnn$fmha"


def gpu_program(kind: str = "NVIDIA H200", dtype=jnp.bfloat16, K: int = 64, **options) -> str:
    """The forward's program for GPUs of this kind, which need not be here."""
    shape = jax.ShapeDtypeStruct((1, T, 2, K), dtype)
    log_decay = jax.ShapeDtypeStruct((1, T, 2, M), jnp.float32)
    attend = functools.partial(nha_attention, implementation="pallas_gpu", **options)
    device = AbstractDevice(kind, platform="gpu", num_cores=132)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        traced = jax.jit(attend).trace(shape, shape, shape, log_decay)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"window_size": 16}, KERNELS),
        ({"window_size": None}, LIBRARY),
        ({"window_size": T}, LIBRARY),
        ({"window_size": None, "K": 256}, LIBRARY),
        ({"window_size": None, "kind": "NVIDIA A100-SXM4-80GB"}, LIBRARY),
        # cuDNN would need a [T, T] bias.
        ({"window_size": None, "segment_ids": jnp.ones((1, T), jnp.int32)}, KERNELS),
    ],
    ids=["window", "full", "window-of-all", "full-head-256", "full-on-A100", "full-packed"],
)
def test_on_gpus_the_kernels_or_cudnn(options, name):
    text = gpu_program(**options)
    assert [x for x in (KERNELS, LIBRARY) if x in text] == [name]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"kind": "NVIDIA A100-SXM4-80GB"}, "for Hopper .* got NVIDIA A100-SXM4-80GB"),
        ({"kind": "NVIDIA B200"}, "for Hopper .* got NVIDIA B200"),
        ({"kind": "AMD Instinct MI300X", "window_size": None}, "for Hopper .* got AMD Instinct"),
        ({"dtype": jnp.float32}, "multiply in bfloat16, got query of float32"),
        ({"dtype": jnp.float32, "window_size": None}, "multiply in bfloat16"),
        ({"K": 320}, "heads of up to 256, got key of 320"),
    ],
    ids=["A100", "B200", "AMD", "float32", "float32-full", "head-320"],
)
def test_gpu_kernels_that_cannot_serve_say_why(options, why):
    with pytest.raises(NotImplementedError, match=f"implementation='pallas_gpu': .*{why}"):
        gpu_program(**({"window_size": 16} | options))


def test_tpu_kernels_that_cannot_serve_say_why():
    q = jax.ShapeDtypeStruct((1, T, 2, 520), jnp.bfloat16)
    attend = functools.partial(nha_attention, window_size=16, implementation="pallas_tpu")
    why = "implementation='pallas_tpu': its kernels take heads of up to 512, got key of 520"
    with pytest.raises(NotImplementedError, match=why):
        jax.eval_shape(attend, q, q, q, jax.ShapeDtypeStruct((1, T, 2, M), jnp.float32))


def test_the_gpu_interpreter_warns_of_too_few_threads(monkeypatch, recwarn):
    choose = functools.partial(backends.get("pallas_gpu").compiled_or_interpreted, "there", "here")
    monkeypatch.setenv("NPROC", "16")
    assert choose() == "here"
    assert not recwarn.list
    monkeypatch.setenv("NPROC", "2")
    with pytest.warns(RuntimeWarning, match="with XLA's 2 it may hang. Set NPROC=16 before jax"):
        assert choose() == "here"


TWO_CALLS = """
import jax.numpy as jnp
from nha_jax import nha_attention
x = jnp.ones((1, 16, 1, 16), jnp.bfloat16)
for _ in range(2):
    out = nha_attention(
        x, x, x, -x.astype("float32"), window_size=4, implementation="pallas_gpu"
    )
    print(float(out[0, -1, 0, 0]))
"""


@pytest.mark.slow
def test_interpreted_gpu_kernels_run_twice_in_a_process():
    environment = os.environ | {
        "NPROC": "16", "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"
    }  # fmt: skip
    command = [sys.executable, "-W", "error", "-c", TWO_CALLS]
    printed = subprocess.check_output(command, env=environment, text=True, timeout=600)
    first, second = printed.split()
    assert first == second


@pytest.mark.parametrize("capability", ["7.5", "10.0", "gfx942"])
def test_gpu_kernels_do_not_serve_every_gpu(capability, monkeypatch):
    class Other:
        device_kind, compute_capability = "another GPU", capability

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Other()])
    x = jnp.ones((1, 4, 1, 2), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=r"for Hopper .* got another GPU"):
        nha_attention(x, x, x, -x, window_size=2, implementation="pallas_gpu")
