"""Prefixes that callers keep: they stay until they are released, or are refused by name."""

import pytest

from nha_jax import SamplingOptions
from tests.nha_jax.generation.test_engine import VOCAB
from tests.nha_jax.generation.test_prefixes import (
    CHUNK,
    make_engine,
    plain_engine,
    text,
    tokens_of,
    written,
)


def test_a_pinned_prefix_stays_until_it_is_released():
    engine, tokens = make_engine(snapshots=2), tokens_of((0, 11))
    with engine.prefix(tokens) as prefix:
        assert prefix.num_tokens == 8
        again = engine.prefix(tokens)  # is there: nothing is read
        assert engine.prefix_statistics.tokens_read == 8
        text(engine, tokens_of((1, 13)))
        assert engine.prefix_statistics.evicted == 0
        prefix.release()
        prefix.release()  # counts once
        text(engine, tokens_of((1, 13)))
        assert engine.prefix_statistics.evicted == 0
        again.release()
    saved = engine.prefix_statistics.tokens_saved
    assert text(engine, tokens) == text(plain_engine(), tokens)
    assert engine.prefix_statistics.tokens_saved - saved == 8
    text(engine, tokens_of((1, 13)))
    assert engine.prefix_statistics.evicted == 2


def test_a_prefix_is_pinned_while_others_are_read_and_continued():
    engine, prompt = make_engine(snapshots=3), tokens_of((0, 15))
    request = engine.submit(prompt, SamplingOptions(max_new_tokens=3, repetition_penalty=1.7))
    engine.step()
    pinned = tokens_of((1, 12))
    engine.prefix(pinned)
    assert written(list(engine.run()))[request] == text(plain_engine(), prompt)
    assert text(engine, [*pinned, 3]) == text(plain_engine(), [*pinned, 3])
    assert engine.prefix_statistics.tokens_saved == 12


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([], ValueError, "tokens must be .* not empty"),
        ([VOCAB], ValueError, r"tokens must have tokens within \[0, 24\)"),
        ([0.5], TypeError, "got dtype float64"),
        ("hi", TypeError, "tokens is the text 'hi'"),
        ([1, 2, 3], ValueError, "tokens are 3, fewer than prefill_chunk=4: .* a smaller"),
        ([1] * 12, ValueError, "need 3 snapshots of .* has room for 3, of which 1 are pinned"),
    ],
    ids=["empty", "unknown", "no integers", "text", "short", "no room"],
)
def test_a_prefix_that_cannot_be_kept_is_refused(tokens, error, message):
    engine = make_engine(snapshots=3)
    engine.prefix([2] * CHUNK)
    with pytest.raises(error, match=message):
        engine.prefix(tokens)
    assert engine.prefix_statistics.snapshots == 1


def test_a_prefix_longer_than_any_text_is_refused():
    with pytest.raises(ValueError, match=r"tokens are 65, more than .* max_length=64"):
        make_engine("full").prefix([1] * 65)
