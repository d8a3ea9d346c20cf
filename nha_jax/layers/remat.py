"""What the backward pass keeps of each block's forward: the policies of `ModelConfig.remat`."""

from collections.abc import Callable

import jax

from nha_jax.config import Remat
from pallas.constants import RESIDUAL_NAMES


def remat_policy(remat: Remat) -> Callable[..., bool] | None:
    """Returns the `jax.checkpoint` policy for a value of `ModelConfig.remat`; None keeps nothing.

    RESIDUAL_NAMES are what all implementations of the operator call the arrays that their backward
    needs. "dots" keeps the products of the layers but not those inside the operator, which have
    batch axes.
    """
    policies = jax.checkpoint_policies
    operator = policies.save_only_these_names(*RESIDUAL_NAMES)
    dots = policies.dots_with_no_batch_dims_saveable
    match remat:
        case "full":
            return None
        case "operator":
            return operator
        case "dots":
            return policies.save_from_both_policies(operator, dots)
    raise ValueError(f"remat={remat!r} has no policy")
