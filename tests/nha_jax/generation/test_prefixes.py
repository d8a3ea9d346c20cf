"""Prefixes that are read once: every text as it would be without, whatever is kept or forgotten."""

import collections
import functools
import threading
from collections.abc import Sequence

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from nha_jax import Engine, Event, Model, SamplingOptions
from nha_jax.generation import programs
from nha_jax.generation.prefixes import shared_length
from tests.nha_jax.generation.test_engine import VOCAB, tiny_model
from tests.support.eight_devices import run_on_eight_devices

CHUNK = 4
SHAPE = {"batch_size": 3, "max_length": 64, "prefill_rows": 2, "prefill_chunk": CHUNK}
LAYOUTS = {"window": 3, "full": None, "mixed": (3, None)}
EVERY_LAYOUT = pytest.mark.parametrize(
    "layout",
    ["window", *(pytest.param(name, marks=pytest.mark.slow) for name in ("full", "mixed"))],
)


@functools.cache
def model_of(layout: str = "window") -> Model:
    """The same parameters under two windows; of two layers, others."""
    if layout == "full":
        return model_of().with_windows(None)
    return new_model(LAYOUTS[layout])


def new_model(window_size) -> Model:
    num_layers = len(window_size) if isinstance(window_size, tuple) else 1
    options = {"num_layers": num_layers, "conv_width": 3, "implementation": "reference"}
    return tiny_model(window_size, **options)


@functools.cache
def plain_engine(layout: str = "window") -> Engine:
    return Engine(model_of(layout), **SHAPE)


def make_engine(layout: str = "window", snapshots: int = 100, **options) -> Engine:
    """An engine with room for so many snapshots."""
    engine = functools.partial(Engine, model_of(layout), **SHAPE)
    return engine(prefix_bytes=snapshots * snapshot_bytes(layout), **options)


@functools.cache
def snapshot_bytes(layout: str) -> int:
    engine = Engine(model_of(layout), **SHAPE, prefix_bytes=2**30)
    engine.prefix([1] * CHUNK)
    return engine.prefix_statistics.bytes


def tokens_of(*parts: tuple[int, int]) -> list[int]:
    """A prompt of parts that are made of a seed and a length: equal pairs are equal tokens."""
    draw = [np.random.default_rng(seed).integers(0, VOCAB, length) for seed, length in parts]
    return [int(token) for part in draw for token in part]


def written(events: Sequence[Event]) -> dict[int, list[tuple[int, float]]]:
    found = collections.defaultdict(list)
    for event in events:
        found[event.request].append((event.token, event.log_probability))
    return found


def text(engine: Engine, prompt: list[int], **options) -> list[tuple[int, float]]:
    """What an engine that has nothing else to do writes: tokens and log-probabilities."""
    options = {"max_new_tokens": 3, "repetition_penalty": 1.7} | options
    request = engine.submit(prompt, SamplingOptions(**options))
    return written(list(engine.run()))[request]


some_arrivals = st.lists(
    st.tuples(
        st.lists(  # the prompt: of parts of which others are made too
            st.tuples(st.integers(0, 1), st.sampled_from([3, 4, 5, 8])), min_size=1, max_size=3
        ),
        st.integers(1, 6),  # new tokens
        st.sampled_from([0.0, 0.8]),  # temperature
        st.sampled_from([1.3, 2.5]),  # repetition penalty
        st.integers(0, 3),  # steps of the engine before it comes
        st.sampled_from(["stays", "stays", "cancelled", "pins"]),
    ),
    min_size=2,
    max_size=8,
)


@EVERY_LAYOUT
@settings(max_examples=15, deadline=None, derandomize=True)
@given(arrivals=some_arrivals, snapshots=st.sampled_from([1, 3, 100]), on_host=st.booleans())
def test_texts_are_those_without_prefixes(layout, arrivals, snapshots, on_host):
    engine = make_engine(layout, snapshots=snapshots, prefixes_on_host=on_host)
    alone, events, cancelled, pinned = {}, [], [], []

    def steps(count):
        for _ in range(count):
            events.extend(engine.step())
            kept = engine.prefix_statistics
            assert kept.snapshots <= snapshots
            assert kept.bytes == kept.snapshots * snapshot_bytes(layout)

    for number, (parts, count, temperature, penalty, wait, what) in enumerate(arrivals):
        steps(wait)
        prompt = tokens_of(*parts)
        options = SamplingOptions(
            max_new_tokens=count, temperature=temperature, repetition_penalty=penalty, seed=number
        )
        if what == "pins" and 1 <= len(prompt) // CHUNK <= snapshots and not pinned:
            pinned.append(engine.prefix(prompt))
        alone[engine.submit(prompt, options)] = prompt, options
        if what == "cancelled":
            steps(1)
            engine.cancel(max(alone))
            cancelled.append(max(alone))
            if pinned:
                pinned.pop().release()
    while engine.busy:
        steps(1)
    found = written(events)
    for request, (prompt, options) in alone.items():
        single = plain_engine(layout)
        wanted = single.submit(prompt, options)
        expected = written(list(single.run()))[wanted]
        if request in cancelled:
            expected = expected[: len(found[request])]
        assert found[request] == expected, (request, prompt, options)


@EVERY_LAYOUT
def test_whole_chunks_are_kept_and_at_least_one_token_is_read(layout):
    engine, prompt = make_engine(layout), tokens_of((0, 13))
    text(engine, prompt)
    for length in range(1, 14):
        before = engine.prefix_statistics
        assert text(engine, prompt[:length]) == text(plain_engine(layout), prompt[:length])
        after = engine.prefix_statistics
        saved = (length - 1) // CHUNK * CHUNK
        assert after.tokens_saved - before.tokens_saved == saved
        assert after.tokens_read - before.tokens_read == length - saved
        assert (after.hits - before.hits, after.misses - before.misses) == (
            (1, 0) if saved else (0, 1)
        )
    assert after.snapshots == 3
    longer = prompt + tokens_of((1, 9))
    assert text(engine, longer) == text(plain_engine(layout), longer)


def test_a_snapshot_outlives_the_caches_that_were_given_away():
    """Programs take over the memory of the caches; a snapshot has its own."""
    engine, prompt = make_engine(), tokens_of((0, 9))
    text(engine, prompt)
    before = arrays_of(engine)
    values = jax.device_get(before)
    for seed in range(3):
        text(engine, prompt + tokens_of((seed, 5)))
    assert not any(array.is_deleted() for array in before)
    for array, value in zip(before, values, strict=True):
        np.testing.assert_array_equal(array, value)


def arrays_of(engine: Engine) -> list[jax.Array]:
    return [x for node in engine._prefixes._nodes for x in jax.tree.leaves(node.snapshot)]


def test_on_the_host_they_are_no_arrays_of_the_device():
    engine, prompt = make_engine(prefixes_on_host=True), tokens_of((0, 9))
    text(engine, prompt)
    assert {type(array) for array in arrays_of(engine)} == {np.ndarray}
    assert text(engine, prompt) == text(plain_engine(), prompt)
    assert engine.prefix_statistics.hits == 1


def test_what_is_counted_is_what_the_arrays_take():
    engine = make_engine()
    text(engine, tokens_of((0, 9)))
    kept = engine.prefix_statistics
    tokens = 2 * CHUNK * 4
    assert kept.bytes == sum(array.nbytes for array in arrays_of(engine)) + tokens
    assert kept.snapshots == 2


def test_of_full_attention_a_snapshot_has_the_entries_of_its_chunk_alone():
    engine = make_engine("full")
    text(engine, tokens_of((0, 9)))
    assert len(engine._prefixes._nodes) == 2
    for node in engine._prefixes._nodes:
        state = node.snapshot.layers[0].attention
        assert state.capacity == CHUNK
        assert state.slot_key.size == state.slot_value.size == 0


def test_engines_of_other_weights_or_windows_share_nothing():
    other_windows, other_weights = model_of("full"), new_model(LAYOUTS["window"])
    other_weights.embed.embedding[...] = -other_weights.embed.embedding[...]
    prompt, engine = tokens_of((0, 11)), make_engine()
    expected = text(engine, prompt)
    for model in (other_windows, other_weights):
        wanted = text(Engine(model, **SHAPE), prompt)
        assert wanted != expected
        other = Engine(model, **SHAPE, prefix_bytes=2**30)
        assert [text(other, prompt), text(other, prompt)] == [wanted, wanted]
        assert (other.prefix_statistics.hits, other.prefix_statistics.misses) == (1, 1)
    assert text(engine, prompt) == expected == text(plain_engine(), prompt)


def test_prompts_that_wait_together_read_a_beginning_once():
    engine, options = make_engine(), SamplingOptions(max_new_tokens=2, repetition_penalty=1.7)
    prompts = [tokens_of((0, 12), (seed, 3)) for seed in range(4)]
    requests = [engine.submit(prompt, options) for prompt in prompts]
    found = written(list(engine.run()))
    kept = engine.prefix_statistics
    assert (kept.hits, kept.misses) == (3, 1)
    assert (kept.tokens_read, kept.tokens_saved) == (15 + 3 * 3, 3 * 12)
    for request, prompt in zip(requests, prompts, strict=True):
        assert found[request] == text(plain_engine(), prompt, max_new_tokens=2)


def test_the_longest_unused_goes_first_and_the_longer_before_what_it_begins_with():
    engine = make_engine(snapshots=3)
    first, second = tokens_of((0, 9)), tokens_of((1, 5))
    text(engine, second)  # one snapshot
    text(engine, first)  # two
    text(engine, second)  # uses the first of all
    text(engine, tokens_of((2, 5)))  # the longer of the two makes room
    assert engine.prefix_statistics.evicted == 1
    saved = []
    for prompt in (second, first):
        before = engine.prefix_statistics.tokens_saved
        assert text(engine, prompt) == text(plain_engine(), prompt)
        saved.append(engine.prefix_statistics.tokens_saved - before)
    assert saved == [4, 4]


def test_a_prompt_longer_than_the_room_keeps_its_beginning():
    engine, prompt = make_engine(snapshots=2), tokens_of((0, 21))
    for _ in range(2):
        assert text(engine, prompt) == text(plain_engine(), prompt)
    kept = engine.prefix_statistics
    assert (kept.snapshots, kept.evicted, kept.tokens_saved) == (2, 0, 8)


def test_a_row_whose_beginning_is_forgotten_while_it_is_read_keeps_no_more():
    engine = make_engine(snapshots=1)
    prompts = [tokens_of((seed, 13)) for seed in range(2)]
    requests = [
        engine.submit(prompt, SamplingOptions(max_new_tokens=3, repetition_penalty=1.7))
        for prompt in prompts
    ]
    found = written(list(engine.run()))
    for request, prompt in zip(requests, prompts, strict=True):
        assert found[request] == text(plain_engine(), prompt)
        assert text(engine, prompt) == text(plain_engine(), prompt)
    assert engine.prefix_statistics.snapshots == 1


def test_a_cancelled_row_leaves_what_it_read():
    engine, prompt = make_engine(), tokens_of((0, 15))
    request = engine.submit(prompt, SamplingOptions(max_new_tokens=3, repetition_penalty=1.7))
    assert engine.step() == []
    engine.cancel(request)
    assert not engine.busy
    assert text(engine, prompt) == text(plain_engine(), prompt)
    assert engine.prefix_statistics.tokens_saved == CHUNK


def test_a_row_cancelled_beside_another_leaves_what_it_read():
    engine, options = make_engine(), SamplingOptions(max_new_tokens=3, repetition_penalty=1.7)
    gone, stays = tokens_of((0, 15)), tokens_of((1, 15))
    cancelled, request = engine.submit(gone, options), engine.submit(stays, options)
    engine.step()
    engine.cancel(cancelled)
    assert written(list(engine.run())) == {request: text(plain_engine(), stays)}
    assert text(engine, gone) == text(plain_engine(), gone)
    assert engine.prefix_statistics.hits == 1


def test_nothing_of_a_texts_sampling_stays_behind():
    engine, prompt = make_engine(), tokens_of((0, 9))
    hot = {"temperature": 1.5, "repetition_penalty": 3.0, "seed": 7}
    for options in (hot, {"temperature": 0.0}, hot | {"seed": 8}, hot):
        assert text(engine, prompt, **options) == text(plain_engine(), prompt, **options)
    assert engine.prefix_statistics.hits == 3


def test_no_length_of_a_prefix_is_compiled_anew():
    engine = make_engine()
    before = programs.take_row._cache_size(), programs.put_row._cache_size()
    for length in range(1, 30, 3):
        text(engine, tokens_of((0, length), (length, 6)))
    assert engine.prefix_statistics.hits > 5
    assert before == (programs.take_row._cache_size(), programs.put_row._cache_size())


def test_what_is_compiled_for_a_first_prompt_serves_all_on_the_device_of_the_parameters():
    """Those of a model that was loaded are tied to a device, and so is what is computed of them."""
    model = new_model(LAYOUTS["window"])
    nnx.update(model, jax.device_put(nnx.state(model), jax.devices()[0]))
    engine = Engine(model, **SHAPE, prefix_bytes=2**20)
    text(engine, [1, 2])
    names = ("prefill", "start", "decode", "take_row", "put_row")
    before = [getattr(programs, name)._cache_size() for name in names]
    for length in (9, 12, 5):
        text(engine, tokens_of((0, length)))
    assert engine.prefix_statistics.hits == 2
    assert before == [getattr(programs, name)._cache_size() for name in names]


def test_without_room_nothing_is_kept_and_no_prefix_taken():
    too_little = Engine(model_of(), **SHAPE, prefix_bytes=snapshot_bytes("window") - 1)
    for engine in (Engine(model_of(), **SHAPE), too_little):
        with pytest.raises(ValueError, match="prefix_bytes has room for 0"):
            engine.prefix([1] * CHUNK)
        text(engine, tokens_of((0, 9)))
        kept = engine.prefix_statistics
        assert (kept.hits, kept.snapshots, kept.bytes, kept.tokens_saved) == (0, 0, 0, 0)


@pytest.mark.parametrize("value", [-1, 2.5, True, None, "1", float("nan")], ids=repr)
def test_bytes_that_are_no_number_of_bytes_are_named(value):
    with pytest.raises(ValueError, match=r"^prefix_bytes=.* must be an integer of at least 0"):
        Engine(model_of(), **SHAPE, prefix_bytes=value)


def test_threads_get_their_own_texts():
    engine, options = (
        make_engine(snapshots=4),
        SamplingOptions(max_new_tokens=4, repetition_penalty=1.7),
    )
    begun, events, wanted, cancelled, failures = threading.Event(), [], {}, [], []
    lock = threading.Lock()

    def arrive(seed):
        try:
            for number in range(4):
                prompt = tokens_of((seed % 2, 8), (10 * seed + number, 3))
                with engine.prefix(prompt[:CHUNK]):
                    request = engine.submit(prompt, options)
                with lock:
                    wanted[request] = prompt
                if number == 2:
                    engine.cancel(request)
                    cancelled.append(request)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=arrive, args=(seed,)) for seed in range(4)]

    def serve():
        begun.set()
        while any(thread.is_alive() for thread in threads) or engine.busy:
            events.extend(engine.step())

    for thread in threads:
        thread.start()
    server = threading.Thread(target=serve)
    server.start()
    for thread in (*threads, server):
        thread.join(timeout=120)
    assert not failures
    assert len(wanted) == 16
    found = written(events)
    for request, prompt in wanted.items():
        expected = text(plain_engine(), prompt, max_new_tokens=4)
        if request in cancelled:
            expected = expected[: len(found[request])]
        assert found[request] == expected


@pytest.mark.slow
def test_snapshots_are_divided_over_eight_devices_and_give_the_same_texts():
    done = run_on_eight_devices("tests.support.prefixes_on_a_mesh")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("prompts", "length"),
    [
        ([[1, 2]], 2),
        ([[1, 2], [1, 2]], 2),
        ([[1, 2, 3], [1, 2]], 2),
        ([[1, 2, 3], [1, 4, 3], [1, 2, 3]], 1),
        ([[1], [2]], 0),
        ([[], [2]], 0),
    ],
    ids=str,
)
def test_the_tokens_that_prompts_begin_with_are_counted(prompts, length):
    assert shared_length([np.array(prompt, np.int32) for prompt in prompts]) == length
