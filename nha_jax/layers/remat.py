"""What a rematerialised block keeps of its forward: the policies of `ModelConfig.remat`."""

from collections.abc import Callable

import jax

from nha_jax.config import Remat
from pallas.constants import RESIDUAL_NAMES


def remat_policy(remat: Remat) -> Callable[..., bool] | None:
    """The `jax.checkpoint` policy of this name; None keeps nothing.

    The names are those that all implementations of the operator give to what their backward needs
    of their forward. Their products have batch axes, so "dots" keeps the layers' only.
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
