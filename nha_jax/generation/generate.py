"""Continuing prompts in one call."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeGuard, overload

import jax
import numpy as np

from nha_jax.argument_checks import check_lengths, token_array
from nha_jax.generation.engine import Engine
from nha_jax.generation.prompts import Prompt, encode_text, read_prompt
from nha_jax.generation.sampling import SamplingOptions
from nha_jax.model import Model
from nha_jax.prompt_lengths import chunk_for, room_for
from nha_jax.scalars import shown

_STEPS_PER_CALL = 16


class Generated(NamedTuple):
    """What `generate` returns with its log-probabilities; without the axis B for a prompt [T].

    Fields:
        tokens: [B, max_new_tokens] int32.
        log_probabilities: [B, max_new_tokens] float32, natural, as the model gives them: before
            repetition penalty, temperature and limits; 0 after a stop token.
    """

    tokens: np.ndarray
    log_probabilities: np.ndarray


@overload
def generate(
    model: Model,
    prompt: Prompt,
    *,
    max_new_tokens: int,
    lengths: jax.typing.ArrayLike | None = None,
    return_log_probabilities: Literal[False] = False,
    **options: Any,
) -> np.ndarray: ...


@overload
def generate(
    model: Model,
    prompt: Prompt,
    *,
    max_new_tokens: int,
    lengths: jax.typing.ArrayLike | None = None,
    return_log_probabilities: Literal[True],
    **options: Any,
) -> Generated: ...


def generate(
    model,
    prompt,
    *,
    max_new_tokens,
    lengths=None,
    return_log_probabilities=False,
    seed=0,
    **options,
):
    """Continues each prompt by sampling from the model.

    The tokens of row b depend on the seed, on b and on its own prompt, not on the other rows.
    Compiled functions are kept for calls with the same model config and batch size and with
    prompts of about the same length: N lengths compile O(log N) of them. For prompts that come and
    go, or to see tokens as they are drawn, use `Engine`.

    Args:
        model: the model.
        prompt: [T] or [B, T] integers in [0, vocab_size), read in chunks of at most 512 tokens; or
            a list of B rows of different lengths. For a model of bytes, whose vocab_size is 257 or
            256, a row may be a str, of which it gets the UTF-8, or bytes.
        max_new_tokens: how many tokens each row gets.
        lengths: [B] integers in [1, T], for prompts of different lengths in one array: row b
            is prompt[b, :lengths[b]], and what follows is not read.
        return_log_probabilities: return `Generated` rather than the tokens alone.
        seed: seed of the random numbers.
        options: temperature, top_k, top_p, min_p, repetition_penalty and stop_tokens, as in
            `SamplingOptions`. After a stop token, the rest of the row is filled with it.

    Returns:
        The new tokens, without the prompt: [B, max_new_tokens] int32, or [max_new_tokens] for a
        prompt [T] or a text; or `Generated`. `load_tokenizer` gives what makes text of them.

    Raises:
        ValueError, TypeError: an argument has a wrong value, shape or dtype; the message names it.
    """
    prompts, single = _split(prompt, lengths, model.config.vocab_size)
    common = SamplingOptions(max_new_tokens=max_new_tokens, seed=seed, **options)
    longest = max(map(len, prompts))
    engine = Engine(
        model,
        batch_size=len(prompts),
        max_length=room_for(longest + common.max_new_tokens),
        prefill_rows=len(prompts),
        prefill_chunk=chunk_for(longest),
        steps_per_call=_STEPS_PER_CALL,
    )
    for row, tokens in enumerate(prompts):
        engine.submit(tokens, common.for_row(row))
    shape = (len(prompts), common.max_new_tokens)
    generated = Generated(np.zeros(shape, np.int32), np.zeros(shape, np.float32))
    position = [0] * len(prompts)
    for event in engine.run():
        row, column = event.request, position[event.request]
        generated.tokens[row, column:] = event.token
        generated.log_probabilities[row, column] = event.log_probability
        position[row] += 1
    if single:
        generated = Generated(*(x[0] for x in generated))
    return generated if return_log_probabilities else generated.tokens


def _split(
    prompt: Prompt,
    lengths: jax.typing.ArrayLike | None,
    vocab_size: int,
) -> tuple[Sequence[np.ndarray], bool]:
    """Cuts the prompt into its rows, each of its own length; says whether it is only one, [T]."""
    if lengths is None and _is_list_of_rows(prompt):
        rows = [read_prompt(row, vocab_size, f"prompt[{i}]") for i, row in enumerate(prompt)]
        return rows, False
    tokens = token_array(encode_text(prompt, vocab_size))
    if tokens.ndim not in (1, 2) or not tokens.size:
        got = shown(prompt) if tokens.ndim == 0 else f"shape {tokens.shape}"
        raise ValueError(f"prompt must be [time] or [batch, time] and not empty, got {got}")
    if lengths is None:
        return list(np.atleast_2d(tokens)), tokens.ndim == 1
    if tokens.ndim == 1:
        raise ValueError("lengths belongs to a prompt [batch, time]; cut the prompt [time] instead")
    batch_size, num_tokens = tokens.shape
    checked = np.asarray(check_lengths(lengths, batch_size, num_tokens, least=1))
    return [row[:length] for row, length in zip(tokens, checked, strict=True)], False


def _is_list_of_rows(prompt: object) -> TypeGuard[Sequence[Any]]:
    """Whether it is a list of texts, or of rows that have different lengths."""
    if not isinstance(prompt, list | tuple):
        return False
    if any(isinstance(row, str | bytes) for row in prompt):
        return True
    try:
        return len({len(row) for row in prompt}) > 1
    except TypeError:  # numbers
        return False
