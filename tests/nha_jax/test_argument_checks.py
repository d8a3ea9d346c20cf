"""Checks of arguments that several parts of the library share."""

import jax.numpy as jnp
import numpy as np
import pytest

from nha_jax.argument_checks import after_unknown, check_tokens

SIGNED = ("int8", "int16", "int32", "int64")


@pytest.mark.parametrize("dtype", [*SIGNED, *(f"u{name}" for name in SIGNED)])
@pytest.mark.parametrize("vocab_size", [20, 300, 70_000])
@pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_tokens_of_every_integer_dtype_are_told_apart(dtype, vocab_size, array):
    of_numpy = array is np.asarray
    width = min(np.dtype(dtype).itemsize, 8 if of_numpy else 4)  # jax cuts 64 bits down itself
    kind = np.iinfo(f"{np.dtype(dtype).kind}{width}")
    values = {-1, -vocab_size, 0, 1, 19, 20, vocab_size - 1, vocab_size, kind.min, kind.max}
    values |= {2**32 + 3, 2**63 + 3, 3 - 2**32}
    held = sorted(x for x in values if kind.min <= x <= kind.max)
    tokens, known = check_tokens("tokens", array(np.array(held, dtype)), vocab_size)
    inside = [0 <= x < vocab_size for x in held]
    assert known.tolist() == inside
    assert tokens.dtype == jnp.int32
    assert tokens.tolist() == [x if known else 0 for x, known in zip(held, inside, strict=True)]


@pytest.mark.parametrize("tokens", [[0.5], [True], [], np.array([2**70]), jnp.zeros(2)])
def test_what_is_no_token_is_refused(tokens):
    with pytest.raises(TypeError, match="tokens must be integers, got dtype"):
        check_tokens("tokens", tokens, 20)


@pytest.mark.parametrize(
    ("segments", "unknown", "after"),
    [
        ("111222", "010000", "011000"),
        ("111222", "000100", "000111"),
        ("110011", "001100", "000000"),
        ("110011", "101000", "110000"),
        ("121212", "010100", "010100"),
        (None, "001000", "001111"),
        (None, "000000", "000000"),
    ],
)
def test_an_unknown_token_harms_what_follows_in_its_segment(segments, unknown, after):
    def row(text):
        return jnp.array([[int(x) for x in text]])

    found = after_unknown(row(unknown) == 0, None if segments is None else row(segments))
    np.testing.assert_array_equal(found, row(after) == 1)
