"""Continuous batching: every text as if it were alone, whatever comes, goes and waits around it."""

import collections
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from nha_jax import Engine, Model, ModelConfig, SamplingOptions
from tests.support.eight_devices import run_on_eight_devices

VOCAB = 24


def tiny_model(window_size=(4, None), **overrides) -> Model:
    sizes = {
        "vocab_size": VOCAB,
        "num_layers": 2,
        "hidden_size": 16,
        "num_query_heads": 2,
        "num_slots": 4,
        "mlp_size": 24,
        "dtype": "float32",
        "initializer_range": 0.5,
    }
    return Model(ModelConfig(window_size=window_size, **(sizes | overrides)), rngs=nnx.Rngs(3))


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model()


def texts(engine: Engine, requests: list[int]) -> dict[int, list[int]]:
    found = collections.defaultdict(list)
    for event in engine.run():
        found[event.request].append(event.token)
    return {request: found[request] for request in requests}


@pytest.mark.parametrize(
    "window_size",
    [
        pytest.param(4, id="window", marks=pytest.mark.slow),
        pytest.param(0, id="slots", marks=pytest.mark.slow),
        pytest.param(None, id="full", marks=pytest.mark.slow),
        pytest.param((4, None), id="mixed", marks=pytest.mark.slow),
    ],
)
def test_greedy_equals_recomputation_for_512_tokens(window_size):
    """Each token is the likeliest of the full forward over all tokens before it."""
    model = tiny_model(window_size)
    prompt = np.random.default_rng(1).integers(0, VOCAB, 11)
    engine = Engine(model, batch_size=2, max_length=600, prefill_chunk=4)
    request = engine.submit(prompt, SamplingOptions(max_new_tokens=512, temperature=0))
    found = texts(engine, [request])[request]
    text = jnp.asarray([*prompt, *found])[None]
    logits = jax.jit(Model.__call__)(model, text)[0, len(prompt) - 1 : -1]
    np.testing.assert_array_equal(logits.argmax(axis=-1), found)


# One shape for all examples: what is compiled for the first serves the others.
SHAPE = {"batch_size": 3, "max_length": 64, "prefill_rows": 2, "prefill_chunk": 4}

some_requests = st.lists(
    st.tuples(
        st.integers(1, 20),  # tokens of the prompt
        st.integers(1, 12),  # new tokens
        st.sampled_from([0.0, 0.8]),  # temperature
        st.sampled_from([None, 3]),  # top_k
        st.integers(0, 4),  # steps of the engine before it comes
        st.booleans(),  # whether it is cancelled two steps later
    ),
    min_size=1,
    max_size=7,
)


@pytest.mark.slow
@settings(max_examples=12, deadline=None, derandomize=True)
@given(requests=some_requests, seed=st.integers(0, 99))
def test_a_text_does_not_depend_on_the_others(model, requests, seed):
    rng = np.random.default_rng(seed)
    engine, alone, found, cancelled = Engine(model, **SHAPE), {}, collections.defaultdict(list), []

    def steps(count):
        for event in (event for _ in range(count) for event in engine.step()):
            found[event.request].append(event.token)

    for length, count, temperature, top_k, wait, cancels in requests:
        steps(wait)
        options = SamplingOptions(
            max_new_tokens=count, temperature=temperature, top_k=top_k, seed=length + 100 * count
        )
        prompt = rng.integers(0, VOCAB, length)
        alone[engine.submit(prompt, options)] = prompt, options
        if cancels:
            steps(2)
            engine.cancel(max(alone))
            cancelled.append(max(alone))
    while engine.busy:
        steps(1)
    for request, (prompt, options) in alone.items():
        single = Engine(model, **SHAPE)
        expected = texts(single, [single.submit(prompt, options)])[0]
        if request in cancelled:
            expected = expected[: len(found[request])]
        assert found[request] == expected, (request, prompt, options)


def test_nothing_is_compiled_anew_when_prompts_come_and_go(monkeypatch):
    model, traces = tiny_model(num_slots=5), []
    for name in ("prefill", "decode_step", "init_cache"):
        method = getattr(Model, name)

        def traced(self, *arguments, _method=method, _name=name, **options):
            traces.append(_name)
            return _method(self, *arguments, **options)

        monkeypatch.setattr(Model, name, traced)
    engine = Engine(model, **SHAPE)
    texts(engine, [engine.submit([1, 2, 3], SamplingOptions(max_new_tokens=3))])
    assert set(traces) == {"prefill", "decode_step", "init_cache"}
    traces.clear()
    requests = [
        engine.submit(np.arange(1, 2 + i) % VOCAB, SamplingOptions(max_new_tokens=2 + i, seed=i))
        for i in range(9)
    ]
    assert [len(text) for text in texts(engine, requests).values()] == list(range(2, 11))
    assert traces == []


def test_a_finished_text_says_why(model):
    engine = Engine(model, **SHAPE)
    options = SamplingOptions(max_new_tokens=6, temperature=0)
    tokens = texts(engine, [engine.submit([1, 2], options)])[0]
    request = engine.submit(
        [1, 2], SamplingOptions(max_new_tokens=6, temperature=0, stop_tokens=[tokens[3]])
    )
    events = list(engine.run())
    assert {event.request for event in events} == {request}
    place = tokens.index(tokens[3])
    assert [event.token for event in events] == tokens[: place + 1]
    assert [event.finished for event in events] == [None] * place + ["stop"]
    engine.submit([1, 2], options)
    assert [event.finished for event in engine.run()] == [None] * 5 + ["length"]


def submitted(model, prompts=([1, 2], [3] * 9, [4], [5, 6])) -> tuple[Engine, list[int]]:
    """An engine with more requests than rows."""
    engine = Engine(model, **SHAPE)
    options = SamplingOptions(max_new_tokens=6, temperature=0)
    return engine, [engine.submit(prompt, options) for prompt in prompts]


@pytest.mark.parametrize("seen_before", [1, 2, 5, 9, 13, 20, 24])
def test_no_event_follows_a_cancellation_in_the_loop(model, seen_before):
    for chosen in range(4):  # whatever state it is in by then
        engine, requests = submitted(model)
        found, cancelled = collections.Counter(), None
        for count, event in enumerate(engine.run(), 1):
            assert event.request != cancelled
            found[event.request] += 1
            if count == seen_before:
                cancelled = requests[chosen]
                engine.cancel(cancelled)
        assert not engine.busy
        others = [request for request in requests if request != cancelled]
        assert [found[request] for request in others] == [6] * 3


def test_no_event_follows_a_cancellation_between_steps(model):
    for steps in range(10):  # queued, read in chunks, decoding, finished
        engine, (first, second, *_) = submitted(model)
        before = [event for _ in range(steps) for event in engine.step()]
        engine.cancel(first)
        engine.cancel(second)
        after = list(engine.run())
        assert {first, second}.isdisjoint(event.request for event in after)
        found = collections.Counter(event.request for event in before + after)
        assert found[second + 1] == found[second + 2] == 6


def test_a_last_token_that_was_drawn_is_not_given_after_a_cancellation(model):
    engine, (first, second) = submitted(model, ([1, 2], [3, 4]))
    given = [event.request for event in itertools.islice(engine.run(), 3)]
    assert given == [first, second, first]
    assert engine.busy  # all others are drawn, and no row is taken
    engine.cancel(first)
    assert [event.request for event in engine.run()] == [second] * 5
    assert not engine.busy


def test_a_loop_that_ended_early_loses_no_event(model):
    engine, requests = submitted(model, ([1, 2], [3, 4]))
    first = next(iter(engine.run()))
    rest = engine.step()
    assert [event.request for event in (first, *rest)] == requests  # one each, of one step
    assert len([*rest, *engine.run()]) == 11


@pytest.mark.parametrize("unknown", [99, -1, None, "0", np.int64(7), [0]])
def test_cancelling_what_is_unknown_does_nothing(model, unknown):
    engine, requests = submitted(model, ([1, 2],))
    engine.step()
    engine.cancel(unknown)
    assert len(texts(engine, requests)[0]) == 5


def test_a_prompt_that_is_not_wanted_any_more_is_not_read_on(model):
    engine, (long,) = submitted(model, ([3] * 20,))
    assert engine.step() == []
    engine.cancel(np.int64(long))
    assert not engine.busy


def test_the_cache_is_updated_in_place(model):
    engine = Engine(model, **SHAPE)
    engine.submit([1, 2], SamplingOptions(max_new_tokens=20))
    while not engine.step():
        pass
    before = engine._state.cache
    engine.step()
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))


def test_the_models_later_changes_do_not_count():
    model = tiny_model()
    engine, options = Engine(model, **SHAPE), SamplingOptions(max_new_tokens=8, temperature=0)
    before = texts(engine, [engine.submit([1, 2, 3], options)])[0]
    model.embed.embedding[...] = model.embed.embedding[...][::-1]
    assert texts(engine, [engine.submit([1, 2, 3], options)])[1] == before
    changed = Engine(model, **SHAPE)
    assert texts(changed, [changed.submit([1, 2, 3], options)])[0] != before


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda engine: engine.submit([]), ValueError, "prompt must be .* not empty"),
        (lambda engine: engine.submit([[1]]), ValueError, r"got shape \(1, 1\)"),
        (lambda engine: engine.submit([0.5]), TypeError, "got dtype float64"),
        (lambda engine: engine.submit("hi"), TypeError, "the text 'hi', .* encode it by"),
        (lambda engine: engine.submit(["h"]), TypeError, "got the text .* encode it first"),
        (lambda engine: engine.submit(None), ValueError, "not empty, got None"),
        (lambda engine: engine.submit([2**70]), ValueError, "tokens of a vocabulary, got"),
        (lambda engine: engine.submit([-1, 2**63]), ValueError, "tokens of a vocabulary, got"),
        (lambda engine: engine.submit([[1], [2, 3]]), ValueError, "lists of several lengths"),
        (
            lambda engine: engine.submit([1], {"top_k": 3}),
            TypeError,
            "options must be SamplingOptions or None, got {'top_k': 3}",
        ),
        (lambda engine: engine.submit([3, 24]), ValueError, r"within \[0, 24\), got 3 to 24"),
        (lambda engine: engine.submit([3, -1, 99]), ValueError, "got -1 to 99"),
        (
            lambda engine: engine.submit(np.array([2**32 + 3])),
            ValueError,
            r"within \[0, 24\), got 4294967299 to 4294967299",
        ),
        (
            lambda engine: engine.submit(np.array([2**64 - 1], np.uint64)),
            ValueError,
            "got 18446744073709551615 to",
        ),
        (
            lambda engine: engine.submit([1] * 60, SamplingOptions(max_new_tokens=5)),
            ValueError,
            "60 tokens and max_new_tokens=5 need 65 entries .* max_length=64",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_request_is_refused(model, call, error, message):
    with pytest.raises(error, match=message):
        call(Engine(model, **SHAPE))


def test_full_attention_needs_max_length(model):
    with pytest.raises(ValueError, match="max_length=None: layers with full attention"):
        Engine(model, batch_size=1)
    with pytest.raises(ValueError, match="prefill_chunk=0 must be an integer of at least 1"):
        Engine(model, batch_size=1, max_length=4, prefill_chunk=0)


@pytest.mark.parametrize(
    "value", [0, -1, 2.5, True, "x", float("nan"), 2**31, 10**5000, [1]], ids=type
)
@pytest.mark.parametrize(
    "name", ["batch_size", "max_length", "prefill_rows", "prefill_chunk", "steps_per_call"]
)
def test_a_size_that_is_no_count_is_named(model, name, value):
    with pytest.raises(ValueError, match=rf"^{name}=.* must be an integer of at least 1"):
        Engine(model, **SHAPE | {name: value})


def test_numpy_integers_are_sizes(model):
    engine = Engine(model, **{name: np.int64(size) for name, size in SHAPE.items()})
    assert len(texts(engine, [engine.submit([1], SamplingOptions(max_new_tokens=2))])[0]) == 2


@pytest.mark.slow
def test_a_batch_divided_over_eight_devices_gives_the_same_texts_and_scores():
    done = run_on_eight_devices("tests.support.generation_on_a_mesh")
    assert done.returncode == 0, done.stderr
