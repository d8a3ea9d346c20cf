"""Which implementation a program gets: that of the platform it is made for."""

import jax
import jax.numpy as jnp
import pytest

from nha_jax.ops import api, nha_attention
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
    monkeypatch.setattr(api, "can_compile_for_tpus", lambda: True)
    assert KERNEL in program("tpu", window_size=window_size)
    assert KERNEL not in program("cpu", window_size=window_size)


def test_what_kernels_cannot_serve_falls_back(monkeypatch):
    monkeypatch.setattr(api, "can_compile_for_tpus", lambda: True)
    assert KERNEL not in program("tpu", window_size=16, scale=-1.0)


def test_named_implementations():
    assert KERNEL in program("tpu", window_size=16, implementation="pallas_tpu")
    assert KERNEL not in program("tpu", window_size=16, implementation="xla")


def test_kernels_cost_other_machines_no_derivatives(monkeypatch):
    """Kernels have no derivative of their gradient; where there are none, XLA's code has."""
    monkeypatch.setattr(api, "can_compile_for_tpus", lambda: False)
    x = jnp.ones((1, 4, 1, 2))

    def loss(query):
        return jnp.sum(jnp.sin(nha_attention(query, x, x, -x, window_size=None)))

    curvature = jax.jit(jax.hessian(loss))(x)
    assert curvature.shape == (*x.shape, *x.shape)


def test_on_gpus_plain_xla_until_someone_has_measured():
    assert "mosaic_gpu" not in program("cuda", window_size=16)


def test_gpu_kernels_refuse_other_gpus(monkeypatch):
    class Ampere:
        device_kind, compute_capability = "NVIDIA A100-SXM4-80GB", "8.0"

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Ampere()])
    x = jnp.ones((1, 4, 1, 2), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=r"Hopper.*A100.*8\.0"):
        nha_attention(x, x, x, -x, window_size=2, implementation="pallas_gpu")
