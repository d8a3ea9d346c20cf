"""`Diagnostics`: what every layer of a model did with the tokens of a forward pass."""

from typing import NamedTuple

import jax


class Diagnostics(NamedTuple):
    """What `Model.diagnose` returns.

    Every array is differentiable with respect to the parameters. The entries of padding in `hidden`
    and `log_decay` have no meaning.

    Fields:
        hidden: [B, T, hidden_size] float32, the input of the head: `Model.logits` makes logits of
            it.
        slot_weight: [num_layers, B, T, Hq] float32, the softmax mass on the slots; 0 at padding.
        log_decay: [num_layers, B, T, Hkv, M] float32, the natural logarithm of the gate, below 0.
    """

    hidden: jax.Array
    slot_weight: jax.Array
    log_decay: jax.Array
