"""Prompts as tokens, and as texts for a model of bytes."""

import numpy as np
import pytest

from nha_jax.generation.generate import _split
from nha_jax.generation.prompts import read_prompt


@pytest.mark.parametrize("vocab_size", [256, 257])
@pytest.mark.parametrize("prompt", ["aé", "aé".encode(), [97, 195, 169]], ids=repr)
def test_a_model_of_bytes_reads_texts(prompt, vocab_size):
    tokens = read_prompt(prompt, vocab_size)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == [97, 195, 169]


def test_bytes_that_are_no_utf8_are_read_as_they_are():
    assert read_prompt(bytes(range(256)), 256).tolist() == list(range(256))


@pytest.mark.parametrize("vocab_size", [255, 258, 32000])
@pytest.mark.parametrize("prompt", ["ab", b"ab", ""], ids=repr)
def test_others_are_told_which_tokenizer_to_load(prompt, vocab_size):
    message = rf"model's {vocab_size} tokens are no bytes: .* nha_jax\.load_tokenizer\(FOLDER\)"
    with pytest.raises(TypeError, match=message):
        read_prompt(prompt, vocab_size)


@pytest.mark.parametrize("prompt", ["", b"", [], np.zeros(0, np.int32)], ids=repr)
def test_an_empty_prompt_is_refused(prompt):
    with pytest.raises(ValueError, match="prompt must "):
        read_prompt(prompt, 257)


@pytest.mark.parametrize(
    ("prompt", "rows", "single"),
    [
        ("ab", ["ab"], True),
        (b"ab", ["ab"], True),
        (["ab"], ["ab"], False),
        (["ab", b"cd"], ["ab", "cd"], False),
        (("ab", "c", [100, 101]), ["ab", "c", "de"], False),
    ],
    ids=repr,
)
def test_a_list_of_texts_is_a_batch(prompt, rows, single):
    found, is_single = _split(prompt, None, 257)
    assert [bytes(row.tolist()).decode() for row in found] == rows
    assert is_single == single
