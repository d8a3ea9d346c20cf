"""What is made of the sums that a model leaves on held-out text."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from train.data.batches import Batch, Sequences
from train.data.token_source import Split, TokensInMemory
from train.step.evaluation import measure_held_out
from train.step.losses import Answers, LossSum
from train.step.update import EvaluationSums

LENGTH = 8


class TargetsAreNats:
    """In place of a model: a target costs as many nats as its number, and an even one is right."""

    def evaluate(self, state: Any, batch: Batch) -> EvaluationSums:
        mask, targets = batch["loss_mask"], batch["targets"]
        right = (targets % 2 == 0) & mask
        rows = mask.any(axis=1)
        whole = rows & (right == mask).all(axis=1)
        counts = Answers(*(jnp.int32(x.sum()) for x in (right, whole, rows)))
        loss = LossSum(jnp.float32(targets[mask].sum()), jnp.int32(mask.sum()))
        return EvaluationSums(loss, counts, jnp.ones(1), jnp.int32(1))


def source(token: int, sequences: int) -> TokensInMemory:
    tokens = np.full(sequences * LENGTH + 1, token, np.uint16)
    return TokensInMemory(("a",), tokens, np.array([len(tokens)]))


def measure(sources: tuple[TokensInMemory, ...], weights: tuple[float, ...], count: int) -> Any:
    sequences = Sequences(Split(sources, weights), LENGTH)
    return measure_held_out(TargetsAreNats(), None, sequences, 3, count)  # type: ignore[arg-type]


def test_a_mixture_is_measured_corpus_by_corpus() -> None:
    odd, even = source(3, 20), source(4, 20)
    found = measure((odd, even), (0.75, 0.25), 8)
    assert found.corpora == pytest.approx((3 / math.log(2), 4 / math.log(2)), rel=1e-2)
    assert found.bits_per_target == pytest.approx((6 * 3 + 2 * 4) / 8 / math.log(2))
    assert found.accuracy == found.whole == 0.25
    alone = measure((odd,), (1.0,), 6)
    assert alone.bits_per_byte == pytest.approx(found.corpora[0])
    assert alone.corpora == pytest.approx((alone.bits_per_byte,))


def test_a_corpus_with_less_than_a_sequence_has_no_number() -> None:
    found = measure((source(3, 20), source(4, 20)), (0.99, 0.01), 4)
    assert math.isnan(found.corpora[1])
    assert found.bits_per_target == pytest.approx(3 / math.log(2))
