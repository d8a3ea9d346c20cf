"""What a step minimises: cross-entropy, and what `loss` of the configuration adds to it."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nha_jax
from nha_jax.argument_checks import default_positions
from nha_jax.ops.mesh.division import shard_tokens
from train.config import LossConfig

LEAST_SHARE = 1e-30
LARGEST_SHARE = 1 - 2.0**-24  # of float32 below 1


class LossSum(NamedTuple):
    """A cross-entropy before division, so that batches can be added up.

    Attributes:
        nats: float32 scalar, summed over the targets that count.
        targets: int32 scalar, how many those are.
    """

    nats: jax.Array
    targets: jax.Array


class Original(NamedTuple):
    """What is learned from besides the text.

    Attributes:
        model: the one whose distribution is to be found again.
        hidden: what it made of the batch: its `hidden_states`, [B, T, hidden_size].
    """

    model: nha_jax.Model
    hidden: jax.Array


class Counts(NamedTuple):
    """What the terms of the loss are averaged over, int32 scalars.

    Attributes:
        targets: those that `loss_mask` admits.
        shares: slot shares with something to choose, over layers, rows, tokens and query heads.
    """

    targets: jax.Array
    shares: jax.Array


def loss_sum(model: Callable[..., jax.Array], batch: Mapping[str, jax.Array]) -> LossSum:
    """Cross-entropy in float32 over the targets that `loss_mask` admits.

    Args:
        model: (tokens, segment_ids=) -> logits [B, T, vocabulary].
        batch: see `train.data.batches.Batch`.
    """
    logits = model(batch["tokens"], segment_ids=batch["segment_ids"])
    return cross_entropy(logits, batch)


def cross_entropy(logits: jax.Array, batch: Mapping[str, jax.Array]) -> LossSum:
    """`loss_sum` of logits [B, T, vocabulary]."""
    nats = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), batch["targets"]
    )
    mask = batch["loss_mask"]
    # where, not a product: a padding row may hold anything, and 0 * inf is not 0.
    return LossSum(jnp.where(mask, nats, 0.0).sum(), mask.sum(dtype=jnp.int32))


def counts(model: nha_jax.ModelConfig, batch: Mapping[str, jax.Array]) -> Counts:
    """What the losses of the whole batch are divided by; needs no forward pass."""
    return Counts(
        batch["loss_mask"].sum(dtype=jnp.int32),
        _can_choose(model, batch["segment_ids"]).sum(dtype=jnp.int32) * model.num_query_heads,
    )


def losses(
    model: nha_jax.Model,
    batch: Mapping[str, jax.Array],
    config: LossConfig,
    total: Counts,
    original: Original | None = None,
    head_parts: int = 1,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """A batch's share of the loss to minimise, and of each of its terms.

    Args:
        model: to call.
        batch: one part of the whole batch, or all of it.
        config: the weights of the terms.
        total: of the whole batch; the shares of its parts add up to the losses.
        original: to learn from; for distillation.
        head_parts: a divisor of T; the logits of so many parts of the tokens are made in turn.

    Returns:
        loss + z_loss weight * z_loss + slot_loss weight * slot_loss + distillation weight *
        distillation, and these terms by name, float32 scalars; those with a weight of 0 are
        neither computed nor named.
    """
    tokens, segment_ids = batch["tokens"], batch["segment_ids"]
    if config.slot_loss:
        seen = model.diagnose(tokens, segment_ids, slot_weight_gradient="slots")
        hidden = seen.hidden
    else:
        hidden = model.hidden_states(tokens, segment_ids)
    per_token = {name: batch[name] for name in ("targets", "loss_mask")} | {"hidden": hidden}
    if original is not None:
        per_token["original"] = original.hidden
    teacher = None if original is None else original.model
    sums = _in_parts(functools.partial(_target_sums, model, config, teacher), per_token, head_parts)
    targets = jnp.maximum(total.targets, 1)
    terms = {name: nats / targets for name, nats in sums.items()}
    if config.slot_loss:
        chosen = _can_choose(model.config, segment_ids)[..., None]
        weight = seen.slot_weight[_mixed_layers(model.config)]
        entropy = share_cross_entropy(weight, config.slot_target)
        terms["slot_loss"] = jnp.where(chosen, entropy, 0.0).sum() / jnp.maximum(total.shares, 1)
    weights = {name: 1.0 if name == "loss" else getattr(config, name) for name in terms}
    return sum((weights[name] * term for name, term in terms.items()), jnp.float32(0)), terms


def cross_entropy_of_hidden(
    model: nha_jax.Model, hidden: jax.Array, batch: Mapping[str, jax.Array], head_parts: int = 1
) -> LossSum:
    """`cross_entropy` of what the head makes of hidden states [B, T, hidden_size], in parts."""
    per_token = {name: batch[name] for name in ("targets", "loss_mask")} | {"hidden": hidden}
    sums = functools.partial(_target_sums, model, LossConfig(), None)
    nats = _in_parts(sums, per_token, head_parts)["loss"]
    return LossSum(nats, batch["loss_mask"].sum(dtype=jnp.int32))


def _target_sums(
    model: nha_jax.Model,
    config: LossConfig,
    teacher: nha_jax.Model | None,
    per_token: Mapping[str, jax.Array],
) -> dict[str, jax.Array]:
    """The terms that are means over targets, summed over those of `per_token`, [B, T, ...]."""
    vocabulary = model.config.vocab_size
    logits = shard_tokens(model.logits(shard_tokens(per_token["hidden"])), heads=vocabulary)
    sums = {"loss": cross_entropy(logits, per_token).nats}
    if config.z_loss:
        squares = jax.nn.logsumexp(logits, axis=-1) ** 2
        sums["z_loss"] = jnp.where(per_token["loss_mask"], squares, 0.0).sum()
    if config.distillation:
        assert teacher is not None
        wanted = shard_tokens(teacher.logits(shard_tokens(per_token["original"])), heads=vocabulary)
        divergence = kl_divergence(wanted, logits, config.temperature)
        sums["distillation"] = jnp.where(per_token["loss_mask"], divergence, 0.0).sum()
    return sums


def _in_parts(
    sums: Callable[[Mapping[str, jax.Array]], dict[str, jax.Array]],
    per_token: Mapping[str, jax.Array],
    head_parts: int,
) -> dict[str, jax.Array]:
    """`sums` of arrays [B, T, ...], so many parts of their tokens one after the other.

    The logits are computed again for the gradient. A part has every head_parts-th token, so that
    devices that divide a sequence keep their own.
    """
    if head_parts == 1:
        return sums(per_token)

    def cut(x: jax.Array) -> jax.Array:  # -> [parts, B, T / parts, ...]
        return jnp.moveaxis(x.reshape(len(x), -1, head_parts, *x.shape[2:]), 2, 0)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, jax.checkpoint(sums, prevent_cse=False)(part)), None

    parts = jax.tree.map(cut, dict(per_token))
    one = jax.eval_shape(sums, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), one)
    return jax.lax.scan(add, zeros, parts)[0]


def kl_divergence(original: jax.Array, logits: jax.Array, temperature: float) -> jax.Array:
    """temperature**2 KL(softmax(original / temperature) || softmax(logits / temperature)).

    Logits [..., vocabulary] -> [...] float32, in nats. With that factor its gradient is about as
    large at any temperature (Hinton, Vinyals and Dean, arXiv 1503.02531).
    """
    wanted, found = (
        jax.nn.log_softmax(x.astype(jnp.float32) / temperature) for x in (original, logits)
    )
    return temperature**2 * (jnp.exp(wanted) * (wanted - found)).sum(-1)


def share_cross_entropy(share: jax.Array, target: float) -> jax.Array:
    """Binary cross-entropy, in nats, of shares in [0, 1] towards a target share.

    Finite, with finite gradients, for every share: beyond LEAST_SHARE and LARGEST_SHARE it is
    constant. Where the share is a sigmoid(x), its gradient in x is share - target.
    """
    share = jnp.clip(share, LEAST_SHARE, LARGEST_SHARE)
    return -(target * jnp.log(share) + (1 - target) * jnp.log1p(-share))


def _mixed_layers(model: nha_jax.ModelConfig) -> np.ndarray:
    """The layers whose softmax is over both slots and a window."""
    if not model.num_slots:
        return np.zeros(0, int)
    return np.flatnonzero([window is not None and window > 0 for window in model.windows])


def _can_choose(model: nha_jax.ModelConfig, segment_ids: jax.Array) -> jax.Array:
    """[mixed layers, B, T] bool: real tokens from whose window one of its segment has left."""
    windows = np.array([model.windows[layer] for layer in _mixed_layers(model)], np.int32)
    positions = default_positions(segment_ids.shape[1], segment_ids)
    return (positions >= windows[:, None, None]) & (segment_ids > 0)
