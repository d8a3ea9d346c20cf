"""Checks what the operator's suite does not reach: two compute warpgroups, and lse.

NPROC=16 JAX_PLATFORMS=cpu python -m tests.support.gpu.two_warpgroups    # silent if all is well
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.gpu import BlockSizes, CallSpec, Fused, fused_attention

ROWS, D, M, SCALE, EMPTY = 128, 64, 64, 0.125, 5
INTERPRETER = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")


def attend(spec: CallSpec, inputs: dict[str, jax.Array], warpgroups: int) -> Fused:
    sizes = BlockSizes(warpgroups=warpgroups, stages=1)
    run = lambda x: fused_attention(x, {}, spec=spec, block_sizes=sizes, interpret=INTERPRETER)  # noqa: E731
    return jax.tree.map(np.asarray, jax.jit(run)(inputs))


def main() -> None:
    """Holds two query heads' warpgroups against one, and lse against its formula."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)  # noqa: E731
    query, key, value = normal(1, ROWS, 2, D), normal(1, ROWS, 1, D), normal(1, ROWS, 1, D)
    common = {"group": 2, "scale": SCALE, "masked": False, "state": False}
    tokens = {"window_query": query, "window_key": key, "value": value}

    spec = CallSpec(slots=M, empty_slots=0, window=64, offset=64, ahead=64, **common)
    log_decay = -jnp.abs(normal(1, ROWS, 1, M)).astype(jnp.float32)
    slots = {"query": query, "key": key, "log_decay": log_decay}
    one, two = (attend(spec, tokens | slots, warpgroups) for warpgroups in (1, 2))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert np.all(np.isfinite(one.out))
    assert np.any(one.slot_weight > 0.1)

    spec = CallSpec(slots=0, empty_slots=EMPTY, window=None, offset=0, ahead=0, **common)
    logits = SCALE * np.einsum("nhd,md->hnm", *(np.float64(x) for x in (query[0], key[0, :, 0])))
    logits = np.where(np.tri(ROWS, dtype=bool), logits, -np.inf)
    expected = np.log(EMPTY + np.exp(logits).sum(-1))
    np.testing.assert_allclose(attend(spec, tokens, 2).lse[0], expected, atol=1e-4)


if __name__ == "__main__":
    main()
