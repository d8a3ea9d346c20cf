"""What a model did with its tokens, layer by layer: `Diagnostics`."""

from typing import NamedTuple

import jax


class Diagnostics(NamedTuple):
    """What `Model.diagnose` returns: L layers, B rows, T tokens, Hq and Hkv heads, M slots.

    Every array is differentiable with respect to the parameters. What padding has in `hidden` and
    `log_decay` means nothing.
    """

    hidden: jax.Array  # [B, T, hidden_size] float32; `Model.logits` makes them the model's logits
    slot_weight: jax.Array  # [L, B, T, Hq] float32, the softmax mass on the slots; 0 at padding
    log_decay: jax.Array  # [L, B, T, Hkv, M] float32, natural log of the gate, below 0
