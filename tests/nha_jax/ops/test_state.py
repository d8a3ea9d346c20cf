"""Any way of cutting a sequence into calls gives what one call gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nha_jax import ops
from nha_jax.ops import init_state, resize_state
from nha_jax.testing import Case, make_inputs
from tests.support.ops.decode_cases import make_state
from tests.support.pairs import every_pair

STATIC = ("window_size", "empty_slots", "return_state", "implementation")
nha_attention = jax.jit(ops.nha_attention, static_argnames=STATIC)
decode_step = jax.jit(ops.decode_step, static_argnames=("window_size", "empty_slots"))

T, NAMES = 75, ("query", "key", "value", "log_decay")
WINDOWS = ["0", "1", "16", "64", "100", "None"]


EMPTY_SLOTS = ("attend", "mask")


def tokens_of(case: Case):
    """Functions of a range of tokens: the four arrays, and the keyword arguments."""
    inputs = make_inputs(case)

    def arrays(start, stop):
        return [jnp.asarray(inputs.arrays[name][:, start:stop]) for name in NAMES]

    def keywords(start, stop):
        return {
            "window_size": case.window_size,
            "rope": tuple(jnp.asarray(table[start:stop]) for table in inputs.rest["rope"]),
            "empty_slots": case.empty_slots,
        }

    return arrays, keywords


def assert_same(x, expected):
    np.testing.assert_allclose(x, expected, rtol=0, atol=2e-6)


PREFILL_OPTIONS = {
    "window": WINDOWS,
    "implementation": ("reference", "xla"),
    "empty_slots": EMPTY_SLOTS,
}


@pytest.mark.parametrize("options", every_pair(PREFILL_OPTIONS, rest=pytest.mark.slow))
def test_prefill_then_decode(options):
    window, implementation, empty_slots = options.values()
    arrays, keywords = tokens_of(Case(T=T, window=window, G=2, H=2, empty_slots=empty_slots))
    whole = nha_attention(*arrays(0, T), **keywords(0, T), return_state=True)
    first = nha_attention(
        *arrays(0, 60), **keywords(0, 60), return_state=True, implementation=implementation
    )
    outs, state = [first.out], first.state
    if window == "None":
        state = resize_state(state, T)
    for t in range(60, T):
        out, state = decode_step(*arrays(t, t + 1), state, **keywords(t, t + 1))
        outs.append(out)
    assert_same(np.concatenate(outs, axis=1), whole.out)
    jax.tree.map(assert_same, state, whole.state)


def check_chunks(window: str, stops: list[int]) -> None:
    """Calls that end at `stops`, each going on from the one before, are one call."""
    arrays, keywords = tokens_of(Case(T=T, window=window, empty_slots="mask"))
    whole = nha_attention(*arrays(0, T), **keywords(0, T), return_state=True)
    outs, state, start = [], None, 0
    for stop in stops:
        part = nha_attention(
            *arrays(start, stop), **keywords(start, stop), initial_state=state, return_state=True,
        )  # fmt: skip
        outs.append(part.out)
        state, start = part.state, stop
    assert start == T
    assert_same(np.concatenate(outs, axis=1), whole.out)
    jax.tree.map(assert_same, state, whole.state)


SIZES = [1, 24, 1, 24, 1, 24]  # few sizes: a call of each is compiled once


@pytest.mark.parametrize(
    "window", ["16", *(pytest.param(x, marks=pytest.mark.slow) for x in ("0", "None"))]
)
@given(sizes=st.permutations(SIZES))
@settings(max_examples=4, deadline=None, derandomize=True)
def test_chunks_in_any_order(window, sizes):
    check_chunks(window, np.cumsum(sizes).tolist())


@pytest.mark.slow
@pytest.mark.parametrize("window", WINDOWS)
@given(cuts=st.lists(st.integers(1, T - 1), max_size=4, unique=True))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_chunks_of_any_size(window, cuts):
    check_chunks(window, [*sorted(cuts), T])


ROWS_OPTIONS = {
    "window": ("0", "16", "None"),
    "padding": ("right", "left"),
    "empty_slots": EMPTY_SLOTS,
}


@pytest.mark.parametrize("options", every_pair(ROWS_OPTIONS, rest=pytest.mark.slow))
def test_rows_of_different_lengths(options):
    """Each row of a padded batch, then five more tokens, equals the row without padding."""
    window, padding, empty_slots = options.values()
    case = Case(T=T, window=window, G=2, B=3, rope="rows", empty_slots=empty_slots)
    lengths, more = (70, 3, 31), 5
    inputs = make_inputs(case)
    ids = np.arange(70) < np.array(lengths)[:, None]
    ids = ids if padding == "right" else ids[:, ::-1]
    place = lambda row: np.flatnonzero(ids[row])  # noqa: E731

    def padded(x):
        result = np.zeros((3, 70, *x.shape[2:]), x.dtype)
        for row, length in enumerate(lengths):
            result[row, place(row)] = x[row, :length]
        return result

    rope = inputs.rest["rope"]
    keywords = {"window_size": case.window_size, "empty_slots": empty_slots}
    batch = nha_attention(
        *(padded(inputs.arrays[name]) for name in NAMES), **keywords,
        rope=tuple(map(padded, rope)), segment_ids=ids.astype(np.int32), return_state=True,
    )  # fmt: skip
    state = resize_state(batch.state, T) if window == "None" else batch.state
    after = []
    for step in range(more):
        index = np.array(lengths)[:, None] + step
        now = [np.take_along_axis(x, index.reshape(3, 1, *(1,) * (x.ndim - 2)), 1)
               for x in (*(inputs.arrays[name] for name in NAMES), *rope)]  # fmt: skip
        out, state = decode_step(*now[:4], state, rope=tuple(now[4:]), **keywords)
        after.append(out)
    after, before = np.concatenate(after, axis=1), np.asarray(batch.out)
    # What follows a row's last token there, none of its tokens sees.
    alone = np.asarray(
        nha_attention(*(inputs.arrays[name] for name in NAMES), **keywords, rope=rope)
    )
    for row, length in enumerate(lengths):
        assert_same(before[row, place(row)], alone[row, :length])
        assert_same(after[row], alone[row, length : length + more])


def test_inactive_rows_keep_their_state():
    arrays, keywords = tokens_of(Case(T=T, window="16"))
    state = nha_attention(*arrays(0, 20), **keywords(0, 20), return_state=True).state
    active = jnp.array([True, False])
    token = [jnp.where(active[:, None, None, None], x, jnp.nan) for x in arrays(20, 21)]
    out, after = decode_step(*token, state, **keywords(20, 21), active=active)
    assert np.all(np.isfinite(out[0]))
    assert np.any(out[0])
    assert not np.any(out[1])
    for before, now in zip(state, after, strict=True):
        np.testing.assert_array_equal(now[1], before[1])
    assert after.length.tolist() == [21, 20]


@pytest.mark.parametrize(
    ("window", "implementation"),
    [
        (4, "reference"),
        (4, "xla"),
        (None, "xla"),
        (0, "xla"),
        *(pytest.param(x, "reference", marks=pytest.mark.slow) for x in (None, 0)),
    ],
)
def test_what_no_token_has_written_may_hold_anything(window, implementation):
    lengths = [0, 3, 4, 9 if window is not None else 5]
    sizes = {"num_slots": 3, "key_dim": 4, "value_dim": 4, "max_length": 8}
    holes = make_state(window, jnp.float32, lengths, heads=1, **sizes)
    zeros = jax.tree.map(lambda x: jnp.where(jnp.isnan(x), 0, x), holes)
    tokens = make_inputs(Case(B=4, T=3, window="4", H=1, K=4, V=4, M=3, rope=None)).arrays
    arrays = [tokens[name] for name in ("query", "key", "value", "log_decay")]

    @jax.jit
    def results(state):
        options = {"window_size": window, "implementation": implementation}

        def attend(state):
            call = ops.nha_attention(*arrays, initial_state=state, return_state=True, **options)
            return jnp.sum(call.out**2), call

        pull, call = jax.grad(attend, has_aux=True, allow_int=True)(state)
        step, after = ops.decode_step(*(jnp.asarray(x[:, :1]) for x in arrays), state, **options)
        read = (pull.slot_key, pull.slot_value, pull.window_rotated_key, pull.window_value)
        return call, step, read, None if window is None else (after.slot_key, after.slot_value)

    for found, wanted in zip(*map(jax.tree.leaves, map(results, (holes, zeros))), strict=True):
        assert np.all(np.isfinite(wanted))
        np.testing.assert_array_equal(found, wanted)


def test_a_segment_goes_on_only_under_its_own_id():
    arrays, keywords = tokens_of(Case(T=T, window="16"))
    ids = lambda row0, row1, n: jnp.repeat(jnp.array([[row0], [row1]]), n, axis=1)  # noqa: E731
    state = nha_attention(
        *arrays(0, 40), **keywords(0, 40), segment_ids=ids(3, 4, 40), return_state=True
    ).state
    assert state.segment_id.tolist() == [3, 4]
    out = nha_attention(
        *arrays(40, T), **keywords(40, T), segment_ids=ids(3, 5, T - 40), initial_state=state
    )
    goes_on = nha_attention(*arrays(40, T), **keywords(40, T), initial_state=state)
    starts = nha_attention(*arrays(40, T), **keywords(40, T))
    assert_same(out[0], goes_on[0])
    assert_same(out[1], starts[1])
    assert not np.allclose(goes_on[1], starts[1], atol=1e-3)


@pytest.mark.parametrize("window_size", [0, 7])
def test_memory_does_not_grow_with_context(window_size):
    sizes = set()
    for length in (10, 50):
        case = Case(T=length, window=str(window_size))
        arrays, keywords = tokens_of(case)
        state = nha_attention(*arrays(0, length), **keywords(0, length), return_state=True).state
        sizes.add(sum(x.nbytes for x in state))
    empty = init_state(
        2, num_kv_heads=1, num_slots=16, key_dim=8, value_dim=8, window_size=window_size,
        dtype=jnp.float32,
    )  # fmt: skip
    assert sizes == {sum(x.nbytes for x in empty)}


def test_full_attention_keeps_rotated_keys_and_values_only():
    """The ordinary cache: nothing else grows with context."""
    sizes = {}
    for length in (10, 50):
        arrays, keywords = tokens_of(Case(T=length, window="None"))
        state = nha_attention(*arrays(0, length), **keywords(0, length), return_state=True).state
        sizes[length] = {name: x.nbytes for name, x in state._asdict().items()}
    token = 2 * 8 * 4  # rows, K = V, bytes
    grown = {name: sizes[50][name] - sizes[10][name] for name in state._fields}
    assert {name: size for name, size in grown.items() if size} == {
        "window_rotated_key": 40 * token,
        "window_value": 40 * token,
    }


def test_decode_compiles_once():
    arrays, keywords = tokens_of(Case(T=T, window="16"))
    state = nha_attention(*arrays(0, 5), **keywords(0, 5), return_state=True).state
    jax.clear_caches()
    for t in range(5, 30):
        _, state = decode_step(*arrays(t, t + 1), state, **keywords(t, t + 1))
    assert decode_step._cache_size() == 1
