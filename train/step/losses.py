"""The loss that a step minimises: cross-entropy, and what the section `loss` adds to it."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nha_jax
from nha_jax.argument_checks import check_tokens, default_positions
from nha_jax.ops.mesh.division import shard_tokens
from nha_jax.ops.padding import zero_unless
from nha_jax.transfer import attention_transfer
from train.config import LossConfig

LEAST_WEIGHT = 1e-30
LARGEST_WEIGHT = 1 - 2.0**-24  # the largest float32 below 1


class LossSum(NamedTuple):
    """A cross-entropy before division, so that batches can be added up.

    Attributes:
        nats: float32 scalar, summed over the targets that count.
        targets: int32 scalar, how many targets those are.
    """

    nats: jax.Array
    targets: jax.Array


class Answers(NamedTuple):
    """How often the likeliest token was the target, int32 scalars; batches can be added up.

    Attributes:
        right: the targets that count and are the likeliest token in their place.
        whole: the rows all of whose targets are.
        rows: the rows that have targets that count.
    """

    right: jax.Array
    whole: jax.Array
    rows: jax.Array


class Teacher(NamedTuple):
    """A model that is learned from, and what it made of the batch.

    Attributes:
        model: the model.
        hidden: its `hidden_states` of the batch, [B, T, hidden_size]; None where its layers are
            learned from too, on whose way they are found.
    """

    model: nha_jax.Model
    hidden: jax.Array | None = None


class Counts(NamedTuple):
    """What the terms of the loss are averaged over, int32 scalars.

    Attributes:
        targets: the targets that `loss_mask` admits.
        slot_weights: the slot weights of tokens that have both slots and a window to read, over
            layers, rows, tokens and query heads.
        sequences: the rows that are not all padding.
    """

    targets: jax.Array
    slot_weights: jax.Array
    sequences: jax.Array


def loss_sum(model: Callable[..., jax.Array], batch: Mapping[str, jax.Array]) -> LossSum:
    """Adds up the cross-entropy, in float32, over the targets that `loss_mask` admits.

    Args:
        model: (tokens, segment_ids=) -> logits [B, T, vocabulary].
        batch: see `train.data.batches.Batch`.
    """
    logits = model(batch["tokens"], segment_ids=batch["segment_ids"])
    return cross_entropy(logits, batch)


def cross_entropy(logits: jax.Array, batch: Mapping[str, jax.Array]) -> LossSum:
    """Does what `loss_sum` does, from logits [B, T, vocabulary].

    What the mask does not admit may hold anything, and has gradients of 0. An admitted target
    outside [0, vocabulary) gives NaN.
    """
    mask = batch["loss_mask"]
    # Before the logarithm as well as after it: the gradient of a weight of 0 would be 0 * NaN.
    targets, known = check_tokens("targets", batch["targets"], logits.shape[-1])
    nats = optax.softmax_cross_entropy_with_integer_labels(
        zero_unless(mask, logits).astype(jnp.float32), targets
    )
    nats = jnp.where(known, nats, jnp.nan)
    return LossSum(zero_unless(mask, nats).sum(), mask.sum(dtype=jnp.int32))


def counts(model: nha_jax.ModelConfig, batch: Mapping[str, jax.Array]) -> Counts:
    """Counts what the losses of the whole batch are divided by; needs no forward pass."""
    return Counts(
        batch["loss_mask"].sum(dtype=jnp.int32),
        _reads_both(model, batch["segment_ids"]).sum(dtype=jnp.int32) * model.num_query_heads,
        (batch["segment_ids"] > 0).any(axis=1).sum(dtype=jnp.int32),
    )


def losses(
    model: nha_jax.Model,
    batch: Mapping[str, jax.Array],
    config: LossConfig,
    total: Counts,
    teacher: Teacher | None = None,
    head_parts: int = 1,
    most_targets: int | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes a batch's part of the loss to minimise, and of each of its terms.

    Args:
        model: the model that is trained.
        batch: one part of the whole batch, or all of it.
        config: the weights of the terms.
        total: the counts of the whole batch; the results of its parts add up to its losses.
        teacher: what is learned from; None if no term compares.
        head_parts: a divisor of T; the logits of this many parts of the tokens are made in turn.
        most_targets: how many targets of a row count at most: no other logits are made. None: any
            number.

    Returns:
        The sum of the terms, each times its weight, and the terms by name, float32 scalars: `loss`,
        the cross-entropy, and those that `LossConfig` names. Of the latter those with a weight of 0
        are neither computed nor named, nor is the former if no other term needs logits either.
    """
    terms: dict[str, jax.Array] = {}
    if config.attention_transfer:
        assert teacher is not None
        found = attention_transfer(model, teacher.model, batch["tokens"], batch["segment_ids"])
        teacher = teacher._replace(hidden=found.hidden)
        count = jnp.maximum(total.sequences, 1) * max(found.layers, 1)
        terms["attention_transfer"] = found.error / count
    if config.reads_outputs:
        parts = head_parts, most_targets
        terms |= _terms_of_outputs(model, batch, config, total, teacher, parts)
    weights = {
        name: config.cross_entropy if name == "loss" else getattr(config, name) for name in terms
    }
    return sum((weights[name] * term for name, term in terms.items()), jnp.float32(0)), terms


def _terms_of_outputs(
    model: nha_jax.Model,
    batch: Mapping[str, jax.Array],
    config: LossConfig,
    total: Counts,
    teacher: Teacher | None,
    parts: tuple[int, int | None],
) -> dict[str, jax.Array]:
    """Computes the terms of `losses` that are of the model's own way through its layers."""
    tokens, segment_ids = batch["tokens"], batch["segment_ids"]
    if config.slot_loss:
        seen = model.diagnose(tokens, segment_ids, slot_weight_gradient="slots")
        hidden = seen.hidden
    else:
        hidden = model.hidden_states(tokens, segment_ids)
    per_token = {name: batch[name] for name in ("targets", "loss_mask")} | {"hidden": hidden}
    if config.distillation:
        assert teacher is not None
        assert teacher.hidden is not None
        per_token["teacher_hidden"] = teacher.hidden
    teacher_model = None if teacher is None else teacher.model
    add_up = functools.partial(_target_sums, model, config, teacher_model)
    targets = jnp.maximum(total.targets, 1)
    terms = {name: nats / targets for name, nats in _in_parts(add_up, per_token, *parts).items()}
    if config.slot_loss:
        reads_both = _reads_both(model.config, segment_ids)[..., None]
        slot_weight = seen.slot_weight[_mixed_layers(model.config)]
        entropy = slot_weight_cross_entropy(slot_weight, config.slot_target)
        count = jnp.maximum(total.slot_weights, 1)
        terms["slot_loss"] = jnp.where(reads_both, entropy, 0.0).sum() / count
    return terms


def measure_hidden(
    model: nha_jax.Model,
    hidden: jax.Array,
    batch: Mapping[str, jax.Array],
    head_parts: int = 1,
    most_targets: int | None = None,
) -> tuple[LossSum, Answers]:
    """Measures hidden states [B, T, hidden_size] of a batch, in parts as `losses` does."""
    mask = batch["loss_mask"]
    per_token = {"targets": batch["targets"], "loss_mask": mask, "hidden": hidden}

    def add_up(per_token: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        logits = _logits(model, per_token["hidden"], per_token["loss_mask"])
        wrong = (logits.argmax(-1) != per_token["targets"]) & per_token["loss_mask"]
        nats = cross_entropy(logits, per_token).nats
        return {"nats": nats, "wrong": wrong.sum(axis=1, dtype=jnp.int32)}

    sums = _in_parts(add_up, per_token, head_parts, most_targets)
    targets, asked = mask.sum(dtype=jnp.int32), mask.any(axis=1)
    whole = asked & (sums["wrong"] == 0)
    answers = Answers(
        targets - sums["wrong"].sum(), whole.sum(dtype=jnp.int32), asked.sum(dtype=jnp.int32)
    )
    return LossSum(sums["nats"], targets), answers


def _logits(model: nha_jax.Model, hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """Makes logits [B, T, vocabulary]; hidden states that do not count may hold anything."""
    hidden = zero_unless(mask, shard_tokens(hidden))
    return shard_tokens(model.logits(hidden), heads=model.config.vocab_size)


def _target_sums(
    model: nha_jax.Model,
    config: LossConfig,
    teacher: nha_jax.Model | None,
    per_token: Mapping[str, jax.Array],
) -> dict[str, jax.Array]:
    """Adds up the terms that are means over targets, from arrays `per_token` of [B, T, ...]."""
    mask = per_token["loss_mask"]
    logits = _logits(model, per_token["hidden"], mask)
    sums = {"loss": cross_entropy(logits, per_token).nats}
    if config.z_loss:
        squares = jax.nn.logsumexp(logits, axis=-1) ** 2
        sums["z_loss"] = zero_unless(mask, squares).sum()
    if config.distillation:
        assert teacher is not None
        teacher_logits = _logits(teacher, per_token["teacher_hidden"], mask)
        divergence = kl_divergence(teacher_logits, logits, config.temperature)
        sums["distillation"] = zero_unless(mask, divergence).sum()
    return sums


def _in_parts(
    add_up: Callable[[Mapping[str, jax.Array]], dict[str, jax.Array]],
    per_token: Mapping[str, jax.Array],
    head_parts: int,
    most_targets: int | None,
) -> dict[str, jax.Array]:
    """Applies `add_up` to arrays [B, T, ...], a part of their tokens after the other.

    The logits are computed again for the gradient. A part has every head_parts-th token, so that
    devices that divide a sequence keep their own. Where few targets count, those alone are one
    part.
    """
    if most_targets is not None and 2 * most_targets <= per_token["loss_mask"].shape[1]:
        return add_up(_first_targets(per_token, most_targets))
    if head_parts == 1:
        return add_up(per_token)

    def cut(x: jax.Array) -> jax.Array:  # -> [parts, B, T / parts, ...]
        return jnp.moveaxis(x.reshape(len(x), -1, head_parts, *x.shape[2:]), 2, 0)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, jax.checkpoint(add_up, prevent_cse=False)(part)), None

    parts = jax.tree.map(cut, dict(per_token))
    one = jax.eval_shape(add_up, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), one)
    return jax.lax.scan(add, zeros, parts)[0]


def _first_targets(per_token: Mapping[str, jax.Array], count: int) -> dict[str, jax.Array]:
    """Takes the first `count` tokens of each row whose targets count, and others if they are fewer.

    Arrays [B, T, ...] -> [B, count, ...].
    """
    places = jnp.argsort(~per_token["loss_mask"], axis=1, stable=True)[:, :count]

    def take(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, places.reshape(*places.shape, *[1] * (x.ndim - 2)), axis=1)

    return {name: take(x) for name, x in per_token.items()}


def kl_divergence(teacher_logits: jax.Array, logits: jax.Array, temperature: float) -> jax.Array:
    """Computes temperature**2 KL(softmax(teacher_logits / temperature) || softmax(logits / ...)).

    Logits [..., vocabulary] -> [...] float32, in nats. With that factor its gradient is about as
    large at any temperature (Hinton, Vinyals and Dean, arXiv 1503.02531).
    """
    wanted, found = (
        jax.nn.log_softmax(x.astype(jnp.float32) / temperature) for x in (teacher_logits, logits)
    )
    return temperature**2 * (jnp.exp(wanted) * (wanted - found)).sum(-1)


def slot_weight_cross_entropy(slot_weight: jax.Array, target: float) -> jax.Array:
    """Computes the binary cross-entropy, in nats, of slot weights in [0, 1] towards a target.

    Finite, with finite gradients, for every slot weight: beyond LEAST_WEIGHT and LARGEST_WEIGHT
    it is constant. Where the slot weight is a sigmoid(x), the gradient in x is its difference from
    the target.
    """
    weight = jnp.clip(slot_weight, LEAST_WEIGHT, LARGEST_WEIGHT)
    return -(target * jnp.log(weight) + (1 - target) * jnp.log1p(-weight))


def _mixed_layers(model: nha_jax.ModelConfig) -> np.ndarray:
    """The layers whose softmax is over both slots and a window."""
    if not model.num_slots:
        return np.zeros(0, int)
    return np.flatnonzero([window is not None and window > 0 for window in model.windows])


def _reads_both(model: nha_jax.ModelConfig, segment_ids: jax.Array) -> jax.Array:
    """[mixed layers, B, T] bool: real tokens whose window a token of their segment has left."""
    windows = np.array([model.windows[layer] for layer in _mixed_layers(model)], np.int32)
    positions = default_positions(segment_ids.shape[1], segment_ids)
    return (positions[None] >= windows[:, None, None]) & (segment_ids > 0)[None]
