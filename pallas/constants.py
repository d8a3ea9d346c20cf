"""What every kernel and every implementation of the operator has in common."""

MASKED_LOGIT = -1e30
"""Stands for a logit of -inf: below every logit, and finite, so that a row that sees nothing gives
no NaN."""

MOST_SLOTS = 128
"""The most slots a head that the kernels of any chip serve."""

OUT, LSE, STARTS, SLOT_WEIGHT = RESIDUAL_NAMES = (
    "nha_out",
    "nha_lse",
    "nha_starts",
    "nha_slot_weight",
)
"""The `jax.ad_checkpoint.checkpoint_name`s of what a backward pass needs of its forward.

They are the output, the log-sum-exp of each row's logits, the slots at the start of each chunk or
grid step, and the slot weight. A `jax.checkpoint` policy that saves them spares a rematerialised
layer its forward.
"""
