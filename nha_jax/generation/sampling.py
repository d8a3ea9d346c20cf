"""Drawing the next token: the options of a prompt, and their arrays for a batch of prompts."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from nha_jax.scalars import is_count, is_integer, is_number, plain, shown

_HOTTEST = 1e30  # all tokens are equally likely, as at any temperature above
_STRONGEST_PENALTY = 1e30  # logits stay finite in float32 when divided or multiplied by it


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How one prompt is continued.

    The logits go through repetition_penalty, temperature, top_k, top_p and min_p, in this order. Of
    equal logits, that of the lower token counts as larger.

    Fields:
      max_new_tokens: how many tokens are drawn at most.
      temperature: divides the logits; 0 takes the most likely token.
      top_k: draw from the k most likely tokens only; None: from all.
      top_p: draw from the smallest set of most likely tokens whose probabilities add up to at least
        top_p (nucleus sampling, arXiv 1904.09751); None: from all.
      min_p: draw from the tokens that are at least min_p times as likely as the likeliest (arXiv
        2407.01082); None: from all.
      repetition_penalty: the logits of tokens that are in the prompt or were drawn are divided by
        it where they are positive and multiplied where not (arXiv 1909.05858); 1: unchanged.
      seed: seed of the random numbers, any integer. The n-th token depends on the seed, on n and on
        the tokens before it, not on what else is in the batch.
      stop_tokens: tokens, each of which ends the text.

    Raises:
      ValueError, TypeError: a field has a wrong value; the message names both.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_tokens: Sequence[int] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name != "stop_tokens":
                object.__setattr__(self, field.name, plain(getattr(self, field.name)))
        self._check_stop_tokens()
        if not is_count(self.max_new_tokens):
            self._reject("max_new_tokens", "must be an integer of at least 1 and below 2**31")
        if not is_number(self.temperature) or self.temperature < 0:
            self._reject("temperature", "must be finite and at least 0 (0: greedy)")
        if self.top_k is not None and not (is_integer(self.top_k) and self.top_k >= 1):
            self._reject("top_k", "must be an integer of at least 1, or None")
        if self.top_p is not None and not (is_number(self.top_p) and 0 < self.top_p <= 1):
            self._reject("top_p", "must be within (0, 1], or None")
        if self.min_p is not None and not (is_number(self.min_p) and 0 <= self.min_p <= 1):
            self._reject("min_p", "must be within [0, 1], or None")
        if not is_number(self.repetition_penalty) or self.repetition_penalty <= 0:
            self._reject("repetition_penalty", "must be finite and above 0 (1: none)")
        if not is_integer(self.seed):
            raise TypeError(f"seed={shown(self.seed)} must be an integer")

    def _check_stop_tokens(self) -> None:
        given = self.stop_tokens
        kinds = Sequence | set | frozenset | np.ndarray | jax.Array
        listed = isinstance(given, kinds) and not isinstance(given, str | bytes)
        listed = listed and getattr(given, "ndim", 1) == 1
        stop = tuple(map(plain, given)) if listed else (None,)
        if not all(map(is_integer, stop)):
            self._reject("stop_tokens", "must be a sequence of tokens")
        object.__setattr__(self, "stop_tokens", tuple(dict.fromkeys(stop)))

    def for_row(self, row: int) -> "SamplingOptions":
        """Returns the options for one row of a batch, with a seed made of this one and the row."""
        seed = np.random.SeedSequence([abs(self.seed), int(self.seed < 0), row])
        return dataclasses.replace(self, seed=int(seed.generate_state(1)[0]))

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ValueError if top_k or stop_tokens do not fit a vocabulary of this size."""
        if self.top_k is not None and self.top_k > vocab_size:
            self._reject("top_k", f"must be an integer within [1, {vocab_size}], or None")
        if not all(0 <= token < vocab_size for token in self.stop_tokens):
            self._reject("stop_tokens", f"must be tokens within [0, {vocab_size})")

    def _reject(self, field: str, reason: str) -> NoReturn:
        raise ValueError(f"{field}={shown(getattr(self, field))} {reason}")


class RowSampling(NamedTuple):
    """The options of each row of a batch as arrays, and what was drawn so far."""

    temperature: jax.Array  # [B] float32
    top_k: jax.Array  # [B] int32; the vocabulary's size where there is no limit
    top_p: jax.Array  # [B] float32; 1: no limit
    min_p: jax.Array  # [B] float32; 0: no limit
    repetition_penalty: jax.Array  # [B] float32
    stops: jax.Array  # [B, vocab_size] bool, whether a token ends the text
    key: jax.Array  # [B] random keys
    drawn: jax.Array  # [B] int32, how many tokens were drawn so far
    seen: jax.Array  # [B, vocab_size] bool, whether a token is in the prompt or was drawn

    @classmethod
    def of(
        cls, options: Sequence[SamplingOptions], prompts: Sequence[np.ndarray], vocab_size: int
    ) -> "RowSampling":
        """Makes a row for each of the options and its prompt."""
        seen = np.zeros((len(prompts), vocab_size), bool)
        for row, prompt in zip(seen, prompts, strict=True):
            row[prompt] = True
        stops = np.zeros((len(options), vocab_size), bool)
        for row, one in zip(stops, options, strict=True):
            row[list(one.stop_tokens)] = True
        floats = lambda values: jnp.asarray(list(values), jnp.float32)  # noqa: E731
        return cls(
            temperature=floats(min(o.temperature, _HOTTEST) for o in options),
            top_k=jnp.asarray([o.top_k or vocab_size for o in options], jnp.int32),
            top_p=floats(1.0 if o.top_p is None else o.top_p for o in options),
            min_p=floats(o.min_p or 0.0 for o in options),
            repetition_penalty=floats(
                np.clip(o.repetition_penalty, 1 / _STRONGEST_PENALTY, _STRONGEST_PENALTY)
                for o in options
            ),
            stops=jnp.asarray(stops),
            key=jnp.stack([_key(o.seed) for o in options]),
            drawn=jnp.zeros(len(options), jnp.int32),
            seen=jnp.asarray(seen),
        )

    @classmethod
    def idle(cls, batch_size: int, vocab_size: int) -> "RowSampling":
        """Makes rows without a request, whose tokens are not used."""
        empty = np.zeros(0, np.int32)
        return cls.of([SamplingOptions()] * batch_size, [empty] * batch_size, vocab_size)


class Stages(NamedTuple):
    """Which costly parts of drawing a batch needs; without them no row that needs none changes.

    Fields:
      penalty: the repetition penalty.
      ranking: the sorting of the vocabulary, for top_k and top_p.
    """

    penalty: bool
    ranking: bool

    @classmethod
    def needed(cls, options: Sequence[SamplingOptions]) -> "Stages":
        """Finds the stages that at least one of the options needs."""
        return cls(
            penalty=any(o.repetition_penalty != 1 for o in options),
            ranking=any(o.top_k is not None or o.top_p not in (None, 1) for o in options),
        )


def draw(
    logits: jax.Array, rows: RowSampling, stages: Stages
) -> tuple[jax.Array, jax.Array, RowSampling]:
    """Draws one token for each row.

    Args:
      logits: [B, vocab_size] float32.
      rows: the options, and what was drawn so far.
      stages: what the rows need.

    Returns:
      tokens [B] int32; their natural log-probabilities [B] float32 under the logits as they came;
      and the rows, to which the tokens are added.
    """
    log_probability = jax.nn.log_softmax(logits, axis=-1)
    adjusted = _penalised(logits, rows) if stages.penalty else logits
    greedy = adjusted.argmax(axis=-1)
    # Subtracting the largest logit, a small temperature gives -inf at most, and never inf - inf.
    adjusted = adjusted - adjusted.max(axis=-1, keepdims=True)
    adjusted = adjusted / jnp.maximum(rows.temperature, 1e-30)[:, None]
    noise = jax.vmap(_noise, (0, 0, None))(rows.key, rows.drawn, logits.shape[-1])
    # The likeliest token has the logit 0 now.
    likely = adjusted >= jnp.log(rows.min_p)[:, None]
    scores = jnp.where(likely, adjusted + noise, -jnp.inf)
    if stages.ranking:
        scores = _ranked(adjusted, scores, rows)
    tokens = jnp.where(rows.temperature == 0, greedy, scores.argmax(axis=-1)).astype(jnp.int32)
    batch = jnp.arange(logits.shape[0], dtype=jnp.int32)
    rows = rows._replace(drawn=rows.drawn + 1, seen=rows.seen.at[batch, tokens].set(True))
    return tokens, log_probability[batch, tokens], rows


def is_stop(tokens: jax.Array, rows: RowSampling) -> jax.Array:
    """Whether the tokens [B] are stop tokens of their rows: [B] bool."""
    return rows.stops[jnp.arange(tokens.shape[0], dtype=jnp.int32), tokens]


def _key(seed: int) -> jax.Array:
    """Makes the random key of a seed; jax would cut one of more than 32 bits."""
    if not -(2**31) <= seed < 2**32:
        seed = int(np.random.SeedSequence([abs(seed), int(seed < 0)]).generate_state(1)[0])
    return jax.random.key(seed)


def _noise(key: jax.Array, drawn: jax.Array, vocab_size: int) -> jax.Array:
    """Makes Gumbel noise: the token of the largest logit + noise is a draw from the softmax."""
    return jax.random.gumbel(jax.random.fold_in(key, drawn), (vocab_size,), jnp.float32)


def _penalised(logits: jax.Array, rows: RowSampling) -> jax.Array:
    """Applies the repetition penalty to logits [B, vocab_size]."""
    penalty = rows.repetition_penalty[:, None]
    lowered = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(rows.seen, lowered, logits)


def _ranked(logits: jax.Array, scores: jax.Array, rows: RowSampling) -> jax.Array:
    """Keeps the scores [B, vocab_size] of tokens within top_k and top_p; others get -inf."""
    ranked, candidates = jax.lax.top_k(logits, logits.shape[-1])
    rank = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None]
    ranked = jnp.where(rank < rows.top_k[:, None], ranked, -jnp.inf)
    probability = jax.nn.softmax(ranked, axis=-1)
    likelier = probability.cumsum(axis=-1) - probability  # the mass of more likely tokens
    # The most likely token stays even if rounding leaves none below top_p; with 1, all stay.
    top_p = jnp.where(rows.top_p < 1, rows.top_p, jnp.inf)
    keep = ((likelier < top_p[:, None]) | (rank == 0)) & jnp.isfinite(ranked)
    batch = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    kept = jnp.zeros(logits.shape, bool).at[batch, candidates].set(keep)
    return jnp.where(kept, scores, -jnp.inf)
