"""Sampling text from a model: one compiled prefill, one compiled loop of decode steps."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nha_jax.model import Model, ModelCache

# Prompts are padded to a multiple of this, so that not every length is compiled anew.
_PROMPT_MULTIPLE = 64


class _Sampling(NamedTuple):
    """How a token is drawn; None in the last two leaves that step out."""

    temperature: jax.Array  # [] float32; not read when greedy
    top_p: jax.Array | None  # [] float32
    stop_token: jax.Array | None  # [] int32


def generate(
    model: Model,
    prompt: jax.typing.ArrayLike,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_token: int | None = None,
    lengths: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """Continues each prompt by sampling from the model.

    Row b's tokens depend on the seed, on b and on its own prompt, not on the rows around it. The
    compiled functions are kept for calls with the same model config, batch size, number of new
    tokens and top_k, and a prompt that is as long up to a multiple of 64.

    Args:
        model: the model.
        prompt: [T] or [B, T] integers in [0, vocab_size).
        max_new_tokens: how many tokens each row gets.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: draw from the k most likely tokens only (of equal ones, the lower token first).
        top_p: draw from the fewest most likely tokens whose probabilities, after temperature and
            top_k, add up to at least top_p (nucleus sampling, arXiv 1904.09751).
        seed: of the random numbers.
        stop_token: a row that draws it is finished; the rest of the row is filled with it, and the
            loop ends when all rows are finished.
        lengths: [B] integers in [1, T], for prompts of different lengths: row b is
            prompt[b, :lengths[b]], and what follows is not read.

    Returns:
        [B, max_new_tokens] int32, or [max_new_tokens] for a prompt [T]; without the prompt.

    Raises:
        ValueError, TypeError: an argument has a wrong value, shape or dtype; the message names it.
    """
    vocab_size = model.config.vocab_size
    tokens, lengths = _check_prompt(prompt, lengths, vocab_size)
    _check_options(max_new_tokens, temperature, top_k, top_p, seed, stop_token, vocab_size)
    num_tokens = -(-tokens.shape[1] // _PROMPT_MULTIPLE) * _PROMPT_MULTIPLE
    tokens = np.pad(tokens, ((0, 0), (0, num_tokens - tokens.shape[1])))
    graph, state = nnx.split(model)
    logits, cache = _prefill(graph, state, tokens, lengths, max_length=num_tokens + max_new_tokens)
    generated = _decode(
        graph,
        state,
        logits,
        cache,
        jax.random.key(seed),
        _Sampling(
            temperature=jnp.float32(temperature),
            top_p=None if top_p is None else jnp.float32(top_p),
            stop_token=None if stop_token is None else jnp.int32(stop_token),
        ),
        max_new_tokens=max_new_tokens,
        greedy=bool(np.float32(temperature) == 0),
        top_k=top_k,
    )
    return generated[0] if np.ndim(prompt) == 1 else generated


@functools.partial(jax.jit, static_argnums=0, static_argnames="max_length")
def _prefill(
    graph: nnx.GraphDef[Model],
    state: nnx.State,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    max_length: int,
) -> tuple[jax.Array, ModelCache]:
    return nnx.merge(graph, state).prefill(tokens, lengths=lengths, max_length=max_length)


@functools.partial(
    jax.jit,
    static_argnums=0,
    static_argnames=("max_new_tokens", "greedy", "top_k"),
)
def _decode(
    graph: nnx.GraphDef[Model],
    state: nnx.State,
    logits: jax.Array,
    cache: ModelCache,
    key: jax.Array,
    sampling: _Sampling,
    *,
    max_new_tokens: int,
    greedy: bool,
    top_k: int | None,
) -> jax.Array:
    """logits [B, vocab_size] and cache of the prompts -> tokens [B, max_new_tokens]."""
    model = nnx.merge(graph, state)
    batch_size = logits.shape[0]
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch_size))
    stop_token = sampling.stop_token

    def draw(logits: jax.Array, step: jax.Array | int) -> jax.Array:
        if greedy:
            return logits.argmax(axis=-1).astype(jnp.int32)
        keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, step)
        # From the largest logit down: a small temperature then only gives -inf, never inf - inf.
        logits = (logits - logits.max(axis=-1, keepdims=True)) / sampling.temperature
        return _sample(logits, keys, top_k=top_k, top_p=sampling.top_p)

    def is_stop(tokens: jax.Array) -> jax.Array:
        return jnp.zeros(batch_size, bool) if stop_token is None else tokens == stop_token

    def unfinished(carry: tuple) -> jax.Array:
        step, _, _, _, done = carry
        return (step < max_new_tokens) & ~done.all()

    def decode(carry: tuple) -> tuple:
        step, generated, last, cache, done = carry
        logits, cache = model.decode_step(last, cache)
        drawn = draw(logits, step)
        if stop_token is not None:
            drawn = jnp.where(done, stop_token, drawn)
        generated = generated.at[:, step].set(drawn)
        return step + 1, generated, drawn, cache, done | is_stop(drawn)

    first = draw(logits, 0)
    fill = 0 if stop_token is None else stop_token
    generated = jnp.full((batch_size, max_new_tokens), fill, jnp.int32).at[:, 0].set(first)
    carry = (jnp.int32(1), generated, first, cache, is_stop(first))
    return jax.lax.while_loop(unfinished, decode, carry)[1]


def _sample(
    logits: jax.Array, keys: jax.Array, *, top_k: int | None, top_p: jax.Array | None
) -> jax.Array:
    """One token a row: logits [B, vocab_size], keys [B] -> [B] int32."""
    categorical = jax.vmap(jax.random.categorical)
    if top_k is None and top_p is None:
        return categorical(keys, logits).astype(jnp.int32)
    # Most likely first, [B, k]; of equal logits the lower token first.
    ranked, candidates = jax.lax.top_k(logits, top_k or logits.shape[-1])
    if top_p is not None:
        probability = jax.nn.softmax(ranked, axis=-1)
        likelier = probability.cumsum(axis=-1) - probability
        # The most likely token stays even if rounding leaves nothing below top_p.
        keep = (likelier < top_p).at[:, 0].set(True)
        ranked = jnp.where(keep, ranked, -jnp.inf)
    rank = categorical(keys, ranked)
    return jnp.take_along_axis(candidates, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)


def _check_prompt(
    prompt: jax.typing.ArrayLike, lengths: jax.typing.ArrayLike | None, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The prompt as [B, T] and its rows' lengths [B], both int32."""
    tokens = np.asarray(prompt)
    if tokens.ndim not in (1, 2) or not tokens.size:
        raise ValueError(
            f"prompt must be [time] or [batch, time] and not empty, got shape {tokens.shape}"
        )
    _check_integers("prompt", tokens)
    if lengths is not None and tokens.ndim == 1:
        raise ValueError("lengths belongs to a prompt [batch, time]; cut the prompt [time] instead")
    tokens = np.atleast_2d(tokens)
    batch_size, num_tokens = tokens.shape
    checked = np.full(batch_size, num_tokens) if lengths is None else np.asarray(lengths)
    _check_integers("lengths", checked)
    if checked.shape != (batch_size,):
        raise ValueError(f"lengths must be [batch] = ({batch_size},), got shape {checked.shape}")
    if checked.min() < 1 or checked.max() > num_tokens:
        raise ValueError(f"lengths must be within [1, {num_tokens}], got {checked.tolist()}")
    tokens = np.where(np.arange(num_tokens) < checked[:, None], tokens, 0)
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise ValueError(
            f"prompt must have tokens within [0, {vocab_size}), "
            f"got {tokens.min()} to {tokens.max()}"
        )
    return tokens.astype(np.int32), checked.astype(np.int32)


def _check_integers(name: str, array: np.ndarray) -> None:
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{name} must be integers, got dtype {array.dtype}")


def _check_options(
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    stop_token: int | None,
    vocab_size: int,
) -> None:
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens!r} must be an integer of at least 1")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature={temperature!r} must be finite and at least 0 (0: greedy)")
    if top_k is not None and not (isinstance(top_k, int) and 1 <= top_k <= vocab_size):
        raise ValueError(f"top_k={top_k!r} must be an integer within [1, {vocab_size}], or None")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p!r} must be within (0, 1], or None")
    if not isinstance(seed, int):
        raise TypeError(f"seed={seed!r} must be an integer")
    if stop_token is not None and not (
        isinstance(stop_token, int) and 0 <= stop_token < vocab_size
    ):
        raise ValueError(f"stop_token={stop_token!r} must be a token within [0, {vocab_size})")
