"""Sampling: against recomputation, the options' meaning, rows of a batch, compiled functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import nha_jax.generation.generate
from nha_jax import Model, ModelConfig, generate
from nha_jax.generation import sampling
from nha_jax.generation.sampling import RowSampling, SamplingOptions, Stages

VOCAB = 24


@pytest.fixture(scope="module")
def model() -> Model:
    config = ModelConfig(
        vocab_size=VOCAB,
        num_layers=2,
        hidden_size=16,
        num_query_heads=2,
        num_slots=4,
        window_size=(4, None),
        mlp_size=24,
        dtype="float32",
        initializer_range=0.5,
    )
    return Model(config, rngs=nnx.Rngs(3))


PROMPT = np.random.default_rng(0).integers(0, VOCAB, (3, 9))


def test_greedy_equals_recomputation_by_the_full_forward(model):
    lengths = [9, 4, 1]
    found = generate(model, PROMPT, max_new_tokens=6, temperature=0, lengths=lengths)
    assert found.shape == (3, 6)
    forward = jax.jit(Model.__call__)
    for prompt, length, tokens in zip(PROMPT, lengths, np.asarray(found), strict=True):
        text = np.zeros((1, 15), int)
        text[0, :length] = prompt[:length]
        text[0, length : length + 6] = tokens
        logits = np.asarray(forward(model, jnp.asarray(text)))[0]
        np.testing.assert_array_equal(logits[length - 1 : length + 5].argmax(-1), tokens)


def test_a_row_does_not_depend_on_the_batch_around_it(model):
    options = {"max_new_tokens": 8, "temperature": 1.3, "seed": 5}
    batch = generate(model, PROMPT, lengths=[9, 7, 9], **options)
    alone = generate(model, PROMPT[0], **options)
    assert alone.shape == (8,)
    np.testing.assert_array_equal(batch[0], alone)
    other = PROMPT.copy()
    other[0], other[2] = other[2], other[0]
    np.testing.assert_array_equal(generate(model, other, lengths=[9, 7, 9], **options)[1], batch[1])


def test_rows_and_seeds_differ(model):
    same = np.repeat(PROMPT[:1], 3, axis=0)
    first = np.asarray(generate(model, same, max_new_tokens=8, seed=0))
    assert len({tuple(row) for row in first}) == 3
    assert (first != np.asarray(generate(model, same, max_new_tokens=8, seed=1))).any()
    np.testing.assert_array_equal(first, generate(model, same, max_new_tokens=8, seed=0))


def test_a_tiny_temperature_is_greedy(model):
    greedy = generate(model, PROMPT, max_new_tokens=8, temperature=0)
    for temperature in (1e-30, 1e-300, -0.0):
        found = generate(model, PROMPT, max_new_tokens=8, temperature=temperature)
        np.testing.assert_array_equal(found, greedy)


def test_after_the_stop_token_there_is_nothing_else(model):
    free = np.asarray(generate(model, PROMPT, max_new_tokens=8, temperature=0))
    stop = int(free[0, 2])
    stopped = generate(model, PROMPT, max_new_tokens=8, temperature=0, stop_tokens=[stop])
    for row, expected in zip(np.asarray(stopped), free, strict=True):
        ends = np.flatnonzero(expected == stop)
        if ends.size:
            expected = np.where(np.arange(8) > ends[0], stop, expected)
        np.testing.assert_array_equal(row, expected)


def test_the_loop_ends_when_every_row_is_finished(model, monkeypatch):
    steps = []
    decode_step = Model.decode_step

    def counted(self, tokens, cache, **options):
        jax.debug.callback(lambda: steps.append(1))
        return decode_step(self, tokens, cache, **options)

    monkeypatch.setattr(Model, "decode_step", counted)
    jax.clear_caches()
    row = np.asarray(generate(model, PROMPT[0], max_new_tokens=7, temperature=0))
    jax.effects_barrier()
    assert len(steps) == 6  # the first token comes from the prefill
    steps.clear()
    stop = int(row[1])
    generate(model, PROMPT[0], max_new_tokens=7, temperature=0, stop_tokens=[stop])
    jax.effects_barrier()
    assert len(steps) == list(row).index(stop)


def test_compiled_functions_are_kept(model, monkeypatch):
    traces = []
    prefill, decode_step = Model.prefill, Model.decode_step
    monkeypatch.setattr(
        Model, "prefill", lambda self, *a, **k: traces.append("prefill") or prefill(self, *a, **k)
    )
    monkeypatch.setattr(
        Model,
        "decode_step",
        lambda self, *a, **k: traces.append("decode") or decode_step(self, *a, **k),
    )
    jax.clear_caches()
    generate(model, PROMPT, max_new_tokens=3, top_k=5, top_p=0.9, stop_tokens=[1])
    assert {"prefill", "decode"} == set(traces)
    traces.clear()
    options = {"seed": 9, "temperature": 0.7, "top_p": 0.5, "stop_tokens": [2, 3], "min_p": 0.1}
    generate(model, PROMPT[:, :4], max_new_tokens=5, top_k=2, **options)
    for lengths in ([60, 1, 33], [8, 5, 5]):  # ragged ones too
        rows = [[1] * length for length in lengths]
        generate(model, rows, max_new_tokens=3, top_k=5, **options)
    same_config = Model(model.config, rngs=nnx.Rngs(1))
    generate(same_config, PROMPT, max_new_tokens=3, top_k=5, **options)
    assert traces == []


draw = jax.jit(sampling.draw, static_argnames="stages")


def rows_of(count: int, vocab_size: int, prompt=(), **options) -> RowSampling:
    """Rows with these options and a key each."""
    one = RowSampling.of([SamplingOptions(**options)], [np.array(prompt, int)], vocab_size)
    rows = jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), one)
    return rows._replace(key=jax.random.split(jax.random.key(0), count))


def draws(logits, count: int = 400, **options) -> np.ndarray:
    rows = rows_of(count, len(logits), **options)
    logits = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    tokens, log_probabilities, after = draw(logits, rows, Stages(penalty=True, ranking=True))
    expected = jax.nn.log_softmax(logits)[0, tokens]
    np.testing.assert_allclose(log_probabilities, expected, rtol=1e-6)
    assert np.all(np.take_along_axis(np.asarray(after.seen), np.asarray(tokens)[:, None], 1))
    return np.asarray(tokens)


@settings(max_examples=20, deadline=None)
@given(
    probabilities=st.lists(st.integers(1, 20), min_size=5, max_size=5),
    top_k=st.integers(1, 5),
    top_p=st.floats(0.05, 1.0),
)
def test_top_k_and_top_p_keep_the_most_likely_tokens(probabilities, top_k, top_p):
    p = np.asarray(probabilities) / sum(probabilities)
    ranking = np.argsort(-p, kind="stable")[:top_k]
    mass = np.cumsum(p[ranking]) / p[ranking].sum()
    kept = set(ranking[: 1 + np.searchsorted(mass, top_p - 1e-6)].tolist())
    maybe = set(ranking[: 1 + np.searchsorted(mass, top_p + 1e-6)].tolist())
    drawn = set(draws(np.log(p), top_k=top_k, top_p=top_p).tolist())
    assert drawn <= kept | maybe
    frequent = {int(token) for token in kept if p[token] / p[list(kept)].sum() > 0.05}
    assert frequent <= drawn


def test_no_restriction_draws_in_proportion():
    probabilities = np.asarray([0.5, 0.3, 0.15, 0.05])
    counts = np.bincount(draws(np.log(probabilities), count=20_000), minlength=4)
    np.testing.assert_allclose(counts / 20_000, probabilities, atol=0.015)


def test_min_p_is_relative_to_the_likeliest():
    probabilities = np.asarray([0.5, 0.26, 0.24])
    assert set(draws(np.log(probabilities), min_p=0.5).tolist()) == {0, 1}


def test_repetition_penalty_lowers_what_was_there():
    logits = np.asarray([2.0, -1.0, 1.5, -1.5])
    greedy = {"temperature": 0.0, "repetition_penalty": 2.0}
    assert set(draws(logits, **greedy)) == {0}
    assert set(draws(logits, prompt=[0], **greedy)) == {2}  # 1.0 after the penalty
    assert set(draws(logits, prompt=[0, 2], **greedy)) == {0}  # 1.0 and 0.75
    assert set(draws(logits[1::2], prompt=[0], **greedy)) == {1}  # -2.0 and -1.5


def test_stages_that_a_row_does_not_need_change_nothing():
    logits = jax.random.normal(jax.random.key(3), (50, 20)) * 3
    found = [
        draw(logits, rows_of(50, 20, temperature=0.9), Stages(penalty, ranking))[0]
        for penalty in (False, True)
        for ranking in (False, True)
    ]
    for tokens in found[1:]:
        np.testing.assert_array_equal(tokens, found[0])


def test_log_probabilities_are_the_forwards(model):
    found = generate(
        model, PROMPT, max_new_tokens=5, temperature=0.5, return_log_probabilities=True
    )
    text = np.concatenate([PROMPT, found.tokens], axis=1)
    logits = jax.nn.log_softmax(jax.jit(Model.__call__)(model, jnp.asarray(text)))
    expected = np.take_along_axis(np.asarray(logits)[:, 8:-1], found.tokens[..., None], 2)[..., 0]
    np.testing.assert_allclose(found.log_probabilities, expected, atol=1e-5)


def _fields(value: object) -> str:
    """A test id of the arguments: name=value."""
    if isinstance(value, dict):
        return "-".join(f"{name}={entry}" for name, entry in value.items())
    return ""


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompt": [[[1]]]}, ValueError, r"prompt must be \[time\] or \[batch, time\]"),
        ({"prompt": []}, ValueError, "not empty"),
        ({"prompt": [0.5]}, TypeError, "prompt must be integers, got dtype float64"),
        ({"prompt": [3, 24]}, ValueError, r"tokens within \[0, 24\), got 3 to 24"),
        ({"prompt": [3], "lengths": [1]}, ValueError, "lengths belongs to a prompt"),
        ({"prompt": [[3, 4]], "lengths": [3]}, ValueError, r"lengths must be within \[1, 2\]"),
        (
            {"prompt": [[3, 4]], "lengths": [1, 2]},
            ValueError,
            r"lengths must be \[batch\] = \(1,\)",
        ),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens=0 must be an integer of at least 1"),
        ({"temperature": -1.0}, ValueError, "temperature=-1.0 must be finite and at least 0"),
        ({"top_k": 25}, ValueError, r"top_k=25 must be an integer within \[1, 24\]"),
        ({"top_k": 0}, ValueError, "top_k=0 must be an integer of at least 1"),
        ({"min_p": 1.5}, ValueError, r"min_p=1.5 must be within \[0, 1\]"),
        ({"repetition_penalty": 0}, ValueError, "repetition_penalty=0 must be finite and above 0"),
        ({"top_p": 0.0}, ValueError, r"top_p=0.0 must be within \(0, 1\]"),
        ({"seed": 0.5}, TypeError, "seed=0.5 must be an integer"),
        ({"stop_tokens": [24]}, ValueError, r"stop_tokens=\(24,\) must be tokens within \[0, 24\)"),
        ({"stop_tokens": 2}, ValueError, "stop_tokens=2 must be a sequence of tokens"),
        ({"stop_tokens": "ab"}, ValueError, "stop_tokens='ab' must be a sequence of tokens"),
        ({"stop_tokens": [[1], [1, 2]]}, ValueError, r"stop_tokens=\[\[1\], \[1, 2\]\] must be"),
        ({"stop_tokens": [True]}, ValueError, r"stop_tokens=\[True\] must be"),
        ({"max_new_tokens": "3"}, ValueError, "max_new_tokens='3' must be an integer"),
        ({"max_new_tokens": 2**31}, ValueError, "max_new_tokens=2147483648 must be an integer"),
        ({"temperature": "1"}, ValueError, "temperature='1' must be finite"),
        ({"temperature": None}, ValueError, "temperature=None must be finite"),
        ({"temperature": np.inf}, ValueError, "temperature=inf must be finite"),
        ({"temperature": True}, ValueError, "temperature=True must be finite"),
        ({"temperature": 10**400}, ValueError, "temperature=.* must be finite"),
        ({"top_p": "0.5"}, ValueError, r"top_p='0.5' must be within \(0, 1\]"),
        ({"top_p": np.nan}, ValueError, r"top_p=nan must be within \(0, 1\]"),
        ({"top_p": [0.5]}, ValueError, r"top_p=\[0.5\] must be within \(0, 1\]"),
        ({"min_p": "0.5"}, ValueError, r"min_p='0.5' must be within \[0, 1\]"),
        ({"top_k": 2.0}, ValueError, "top_k=2.0 must be an integer"),
        ({"repetition_penalty": "2"}, ValueError, "repetition_penalty='2' must be finite"),
        ({"repetition_penalty": None}, ValueError, "repetition_penalty=None must be finite"),
        ({"seed": True}, TypeError, "seed=True must be an integer"),
        ({"seed": None}, TypeError, "seed=None must be an integer"),
        ({"prompt": "ab"}, TypeError, "prompt is the text 'ab', and the model's 24 tokens are no"),
        ({"prompt": ["ab"]}, TypeError, r"prompt\[0\] is the text 'ab'.* nha_jax.load_tokenizer"),
        ({"prompt": None}, ValueError, "not empty, got None"),
        ({"prompt": [[1], []]}, ValueError, r"prompt\[1\] must be \[time\] and not empty"),
        ({"prompt": [[1], [2, 24]]}, ValueError, r"prompt\[1\] must have tokens within \[0, 24\)"),
        ({"prompt": [[1], "ab"]}, TypeError, r"prompt\[1\] is the text 'ab'"),
        ({"prompt": [[[1], [2, 3]]]}, ValueError, "got lists of several lengths"),
        ({"prompt": [[1], [2, 3]], "lengths": [1, 2]}, ValueError, "lists of several lengths"),
        ({"prompt": [[3, 4]], "lengths": ["a"]}, TypeError, "lengths must be integers"),
        ({"prompt": [[3, 4]], "lengths": [np.nan]}, TypeError, "lengths must be integers"),
        ({"prompt": [[3, 4]], "lengths": [[1], [1, 2]]}, ValueError, r"lengths must be \[batch\]"),
        ({"stop": [2]}, TypeError, "stop"),
    ],
    ids=_fields,
)
def test_a_wrong_argument_is_named(model, arguments, error, message):
    arguments = {"prompt": [1, 2], "max_new_tokens": 2} | arguments
    with pytest.raises(error, match=message):
        nha_jax.generate(model, **arguments)


def test_a_list_of_rows_may_have_several_lengths(model):
    rows = [PROMPT[0].tolist(), PROMPT[1, :4], tuple(PROMPT[2, :1])]
    found = generate(model, rows, max_new_tokens=6, seed=2)
    expected = generate(model, PROMPT, lengths=[9, 4, 1], max_new_tokens=6, seed=2)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("given", "means"),
    [
        ({"temperature": np.float32(0.5)}, {"temperature": 0.5}),
        ({"temperature": jnp.float32(0.5)}, {"temperature": 0.5}),
        ({"top_k": np.int32(3)}, {"top_k": 3}),
        ({"seed": np.uint64(2**63)}, {"seed": 2**63}),
        ({"max_new_tokens": np.array(3)}, {"max_new_tokens": 3}),
        ({"stop_tokens": np.array([2, 3])}, {"stop_tokens": (2, 3)}),
        ({"stop_tokens": {5}}, {"stop_tokens": (5,)}),
        ({"stop_tokens": [1] * 9}, {"stop_tokens": (1,)}),
        ({"stop_tokens": range(12)}, {"stop_tokens": tuple(range(12))}),
    ],
    ids=lambda value: next(iter(value)),
)
def test_options_are_kept_as_python_writes_them(given, means):
    options = SamplingOptions(**given)
    assert options == SamplingOptions(**means)
    assert repr(options) == repr(SamplingOptions(**means))
    hash(options)


def test_any_integer_is_a_seed_of_its_own(model):
    seeds = [0, 1, 2**32, 2**40, 2**63, 2**64, 2**64 + 1, -(2**70), 10**5000]
    rows = RowSampling.of(
        [SamplingOptions(seed=seed) for seed in seeds], [np.zeros(0, int)] * len(seeds), VOCAB
    )
    assert len({tuple(key) for key in np.asarray(jax.random.key_data(rows.key))}) == len(seeds)
    assert rows.key[1] == jax.random.key(1)


def test_many_stop_tokens_end_a_text_each(model):
    free = generate(model, PROMPT, max_new_tokens=8, temperature=0)
    others = [token for token in range(VOCAB) if token not in free[0]]
    assert len(others) > 8
    stop = [*others, int(free[0, 2])]
    found = generate(model, PROMPT, max_new_tokens=8, temperature=0, stop_tokens=stop)
    for row, expected in zip(found, free, strict=True):
        end = min((list(expected).index(token) for token in stop if token in expected), default=8)
        np.testing.assert_array_equal(row[: end + 1], expected[: end + 1])
        assert set(row[end:]) <= {expected[min(end, 7)]}


@pytest.mark.parametrize(
    "options",
    [{"repetition_penalty": 1e-300}, {"repetition_penalty": 1e300}, {"temperature": 1e300},
     {"top_p": 1e-300}, {"min_p": 1e-300}, {"min_p": 1}],
    ids=_fields,
)  # fmt: skip
def test_the_largest_and_smallest_options_give_tokens_with_a_probability(options):
    drawn = set(draws(np.asarray([2.0, -1.0, 1.5, -1.5]), prompt=[0, 2], **options).tolist())
    likeliest = options in ({"repetition_penalty": 1e-300}, {"top_p": 1e-300}, {"min_p": 1})
    assert drawn == ({0} if likeliest else {0, 1, 2, 3})
