"""Scores are those of a forward over the whole, whatever the batches and chunks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nha_jax
from nha_jax import Model
from tests.nha_jax.test_compilations import count
from tests.nha_jax.test_model import tiny_model

VOCAB = 40
SHAPE = {"batch_size": 3, "chunk": 16}  # one for all tests, which then share programs


def rows(lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, length).astype(np.int32) for length in lengths]


@functools.cache
def model_of(window_size: int | tuple[int | None, ...] | None) -> Model:
    layers = len(window_size) if isinstance(window_size, tuple) else 1
    return tiny_model(num_layers=layers, window_size=window_size, implementation="xla")


def by_forward(model: Model, context: np.ndarray, continuation: np.ndarray) -> np.ndarray:
    """[n, vocab_size], the log-probabilities in the continuation's places, by one forward."""
    text = np.concatenate([context, continuation])
    padded = np.zeros(64, np.int32)  # causal: what follows changes nothing
    padded[: len(text)] = text
    logits = jax.jit(Model.__call__)(model, jnp.asarray(padded)[None])[0]
    return np.asarray(jax.nn.log_softmax(logits))[len(context) - 1 : len(text) - 1]


some_lengths = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), max_size=5)


@pytest.mark.parametrize(
    "window_size",
    [
        pytest.param(0, id="slots"),
        pytest.param(None, id="full", marks=pytest.mark.slow),
        pytest.param((4, None), id="mixed", marks=pytest.mark.slow),
    ],
)
@given(lengths=some_lengths, repeat=st.integers(1, 3))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_scores_are_those_of_one_forward(window_size, lengths, repeat):
    model = model_of(window_size)
    lengths = [(20, 20), *lengths]  # so that there are few programs
    contexts = [x for x in rows([x for x, _ in lengths]) for _ in range(repeat)]
    continuations = rows([n for _, n in lengths for _ in range(repeat)], seed=1)
    found = nha_jax.score(model, contexts, continuations, **SHAPE)
    for context, continuation, one in zip(contexts, continuations, found, strict=True):
        wanted = by_forward(model, context, continuation)
        each = wanted[np.arange(len(continuation)), continuation]
        np.testing.assert_allclose(one.log_probabilities, each, atol=1e-5)
        np.testing.assert_allclose(one.log_probability, each.sum(dtype=np.float64), atol=1e-4)
        np.testing.assert_array_equal(one.greedy, wanted.argmax(axis=-1) == continuation)


def test_a_shared_context_is_read_once(monkeypatch):
    model, read = model_of(0), []
    original = Model.prefill

    def prefill(self, tokens, **options):
        read.append(int(options["lengths"].sum()))
        return original(self, tokens, **options)

    monkeypatch.setattr(Model, "prefill", prefill)
    (context,) = rows([21])
    done: list[int] = []
    choices = rows([3, 1, 7, 2], seed=1)
    found = nha_jax.score(model, [context] * 4, choices, progress=done.append, **SHAPE)
    assert read == [16, 4]
    assert done == [1, 2, 3, 4]
    assert [len(one.greedy) for one in found] == [3, 1, 7, 2]


def test_what_greedy_decoding_writes_is_greedy():
    model = model_of(0)
    (context,) = rows([5])
    text = np.zeros(0, np.int32)
    for _ in range(9):  # the token after the last is the likeliest one in the place of a 0
        after = by_forward(model, context, np.append(text, 0))
        text = np.append(text, after[-1].argmax()).astype(np.int32)
    changed = text.copy()
    changed[4] = (text[4] + 1) % VOCAB
    one, other = nha_jax.score(model, [context] * 2, [text, changed], **SHAPE)
    assert one.is_greedy
    assert not other.is_greedy
    assert other.log_probability < one.log_probability


def test_lengths_share_programs():
    model = model_of(0)
    nha_jax.score(model, rows([9]), rows([9], seed=1), **SHAPE)
    with count() as compiled:
        for length in range(2, 16):
            nha_jax.score(model, rows([length]), rows([17 - length], seed=2), **SHAPE)
    assert not compiled


@pytest.mark.parametrize(
    ("tokens", "targets", "lengths", "message"),
    [
        ([[1, 2]], [[1]], [2], r"of one shape; got shapes \(1, 2\) and \(1, 1\)"),
        ([1], [1], [1], r"\[batch, time\]"),
        ([[1, 2]], [[1, 2]], [3], r"lengths must be within \[0, 2\], got \[3\]"),
        ([[1, 2]], [[1, 2]], [1, 1], r"lengths must be \[batch\]"),
    ],
)
def test_what_is_wrong_with_a_chunk_is_named(tokens, targets, lengths, message):
    model = model_of(0)
    with pytest.raises(ValueError, match=message):
        model.score_tokens(tokens, targets, model.init_cache(1), lengths=lengths)


@pytest.mark.parametrize(
    ("contexts", "continuations", "options", "message"),
    [
        ([[1]], [[1], [2]], {}, "equally many, got 1 and 2"),
        ([[1], []], [[1], [2]], {}, r"contexts\[1\]"),
        ([[1]], [[VOCAB]], {}, r"continuations\[0\]"),
        (["a"], [[1]], {}, r"contexts\[0\] is the text 'a'"),
        ([[1]], [[1]], {"batch_size": 0}, "batch_size=0"),
        ([[1]], [[1]], {"chunk": 1.5}, "chunk=1.5"),
    ],
)
def test_what_is_wrong_is_named(contexts, continuations, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        nha_jax.score(model_of(0), contexts, continuations, **options)
