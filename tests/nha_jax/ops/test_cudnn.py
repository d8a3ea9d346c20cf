"""What is added to cuDNN's full attention, with its two calls written out: values and gradients.

There is no GPU to run cuDNN on: what it computes is taken from its documentation.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nha_jax.layers.remat import remat_policy
from nha_jax.ops import nha_attention
from nha_jax.ops.gpu import cudnn
from nha_jax.ops.rope import rope_tables
from nha_jax.testing import relative_error
from tests.support.gpu.process import HOPPER

B, T, SLOTS = 2, 72, 5


def probabilities(scale, query, key, lse=None):
    """Of the causal logits, [B, Hkv, G, T, T] in float32, and their log-sum-exp [B, Hq, T]."""
    groups = query.astype(jnp.float32).reshape(*query.shape[:2], key.shape[2], -1, query.shape[3])
    logits = scale * jnp.einsum("bthgk,bnhk->bhgtn", groups, key.astype(jnp.float32))
    logits = jnp.where(jnp.tri(query.shape[1], dtype=bool), logits, -jnp.inf)
    if lse is None:
        lse = jax.nn.logsumexp(logits, -1).reshape(query.shape[0], -1, query.shape[1])
    return jnp.exp(logits - lse.reshape(logits.shape[:-1])[..., None]), lse


def forward(scale, query, key, value):
    p, lse = probabilities(scale, query, key)
    out = jnp.einsum("bhgtn,bnhv->bthgv", p, value.astype(jnp.float32))
    return out.reshape(*query.shape[:3], -1).astype(query.dtype), lse


def backward(scale, query, key, value, out, lse, cotangent):
    p, _ = probabilities(scale, query, key, lse)
    heads = (*query.shape[:2], key.shape[2], -1, query.shape[3])
    q, o, do = (x.astype(jnp.float32).reshape(heads) for x in (query, out, cotangent))
    k, v = key.astype(jnp.float32), value.astype(jnp.float32)
    delta = jnp.einsum("bthgv,bthgv->bhgt", o, do)[..., None]
    ds = scale * p * (jnp.einsum("bthgv,bnhv->bhgtn", do, v) - delta)
    gradients = (
        jnp.einsum("bhgtn,bnhk->bthgk", ds, k).reshape(query.shape),
        jnp.einsum("bhgtn,bthgk->bnhk", ds, q),
        jnp.einsum("bhgtn,bthgv->bnhv", p, do),
    )
    return tuple(x.astype(query.dtype) for x in gradients)


def results(dtype, implementation, K, V, window_size, options):
    rng = np.random.default_rng(0)
    shapes = ((B, T, 4, K), (B, T, 2, K), (B, T, 2, V))
    wide = [jnp.asarray(rng.standard_normal(x), jnp.bfloat16) for x in shapes]
    cotangents = [rng.standard_normal((B, T, 4, *size)) for size in ((V,), ())]
    arrays = [x.astype(dtype) for x in wide]
    log_decay = -jnp.ones((B, T, 2, SLOTS))

    def loss(*arrays):
        out, _, weight = nha_attention(
            *arrays,
            log_decay,
            window_size=window_size,
            rope=rope_tables(jnp.arange(T), K),
            return_slot_weight=True,
            implementation=implementation,
            **options,
        )
        total = jnp.vdot(out.astype(jnp.float32), cotangents[0]) + jnp.vdot(weight, cotangents[1])
        return total, (out, weight)

    gradients, (out, weight) = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*arrays)
    return {"out": out, "weight": weight, **dict(zip("qkv", gradients, strict=True))}


@pytest.mark.parametrize("gradient", ["all", "slots"])
@pytest.mark.parametrize(
    ("empty_slots", "K", "V", "window_size"),
    [("attend", 16, 16, None), ("attend", 20, 40, T + 5), ("mask", 24, 16, None)],
)
def test_closed_form_matches_xla(monkeypatch, gradient, empty_slots, K, V, window_size):
    monkeypatch.setattr(cudnn, "_forward", forward)
    monkeypatch.setattr(cudnn, "_backward", backward)
    options = {"empty_slots": empty_slots, "slot_weight_gradient": gradient}
    expected = results(jnp.float32, "xla", K, V, window_size, options)
    with jax.sharding.use_abstract_mesh(HOPPER):
        found = results(jnp.bfloat16, "pallas_gpu", K, V, window_size, options)
    for name, x in found.items():
        tolerance = 5e-3 if name in ("out", "weight") else 2e-2
        error = relative_error(np.float64(x), np.float64(expected[name]))
        assert error <= tolerance, (name, error)


@pytest.mark.parametrize(("remat", "forwards"), [("operator", 1), ("full", 2)])
def test_a_rematerialised_layer_need_not_run_it_again(remat, forwards):
    x = jax.ShapeDtypeStruct((B, T, 2, 64), jnp.bfloat16)
    log_decay = jax.ShapeDtypeStruct((B, T, 2, SLOTS), jnp.float32)

    def layer(*arrays):
        doubled = (2 * x for x in arrays)
        return nha_attention(*doubled, window_size=None, implementation="pallas_gpu")

    def loss(*arrays):
        attend = jax.checkpoint(layer, policy=remat_policy(remat))
        return jnp.sum(jnp.sin(attend(*arrays).astype(jnp.float32)))

    with jax.sharding.use_abstract_mesh(HOPPER):
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(x, x, x, log_decay)
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("@__cudnn$fmhaSoftmax(") == forwards
    assert program.count("@__cudnn$fmhaSoftmaxBackward(") == 1
