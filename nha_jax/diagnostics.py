"""What a model did with its tokens, layer by layer: `Diagnostics`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Diagnostics(NamedTuple):
    """What `Model.diagnose` returns: L layers, B rows, T tokens, Hq and Hkv heads, M slots.

    Every array is differentiable with respect to the parameters. What padding has in `hidden` and
    `log_decay` means nothing.
    """

    hidden: jax.Array  # [B, T, hidden_size] float32; `Model.logits` makes them the model's logits
    slot_weight: jax.Array  # [L, B, T, Hq] float32, the softmax mass on the slots; 0 at padding
    log_decay: jax.Array  # [L, B, T, Hkv, M] float32, natural log of the gate, below 0


def stack_layers(period: tuple[Any, ...]) -> Any:
    """P trees with leaves [L/P, ...], as a scan over groups of P layers gives them -> [L, ...]."""

    def stack(*leaves: jax.Array) -> jax.Array:
        return jnp.stack(leaves, axis=1).reshape(-1, *leaves[0].shape[1:])

    return jax.tree.map(stack, *period)
