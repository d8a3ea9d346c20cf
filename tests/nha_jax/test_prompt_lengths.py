"""Lengths rounded up: never below, never by much, and few."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nha_jax.prompt_lengths import chunk_for, pad_rows, room_for, rounded_length, to_host


@given(length=st.integers(1, 2**31), multiple=st.sampled_from([1, 16, 64]))
def test_a_length_grows_by_a_quarter_at_most_or_to_a_multiple(length, multiple):
    rounded = rounded_length(length, multiple)
    assert rounded % multiple == 0
    assert length <= rounded <= max(1.25 * length, length + multiple - 1)
    assert rounded_length(rounded, multiple) == rounded


def test_there_are_four_lengths_for_each_doubling():
    assert [rounded_length(n, 16) for n in (1, 16, 17, 64, 65, 81, 129)] == [
        16, 16, 32, 64, 80, 96, 160,
    ]  # fmt: skip
    assert len({rounded_length(n, 16) for n in range(1, 2**14 + 1)}) == 4 * (14 - 5)
    shapes = {(chunk_for(n), room_for(n + 9)) for n in range(1, 2**14)}
    assert len(shapes) <= 4 * (14 - 5)


def test_room_for_the_longest_text_is_still_a_number():
    assert room_for(2**31 - 1) == 2**31 - 1


def test_tokens_come_back_to_the_device_that_was_chosen_for_them():
    device = jax.devices()[0]
    for tokens, place in [
        (np.ones((1, 2), np.int32), None),
        (jnp.ones((1, 2), jnp.int32), None),
        (
            jax.device_put(np.ones((1, 2), np.int32), device),
            jax.sharding.SingleDeviceSharding(device),
        ),
    ]:
        host, found = to_host(tokens)
        assert isinstance(host, np.ndarray)
        assert found == place
        np.testing.assert_array_equal(pad_rows(host, 4), [[1, 1, 0, 0]])


@given(num_shared=st.integers(0, 10000), more=st.integers(1, 5000))
def test_half_of_what_prompts_share_are_whole_chunks(num_shared, more):
    chunk = chunk_for(num_shared + more, num_shared)
    assert chunk in (64, 128, 256, 512)
    if num_shared >= 64:
        assert num_shared // chunk * chunk >= num_shared / 2
    else:
        assert chunk == chunk_for(num_shared + more)
