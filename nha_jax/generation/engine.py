"""Continuous batching: requests come and go while one batch of a fixed size is continued."""

import collections
import functools
from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nha_jax.argument_checks import check_count
from nha_jax.cache import ModelCache
from nha_jax.generation.prompts import Prompt, PromptBatch, Request, read_prompt
from nha_jax.generation.sampling import RowSampling, SamplingOptions, Stages, draw, is_stop
from nha_jax.model import Model
from nha_jax.ops.mesh.explicit import auto_axes
from nha_jax.prompt_lengths import rounded_length
from nha_jax.scalars import LARGEST_INT32, shown

SHORTEST_CHUNK, LONGEST_CHUNK = 64, 512


def chunk_for(num_tokens: int) -> int:
    """Chooses prefill_chunk for prompts of this length, among few sizes: each is compiled."""
    return min(max(1 << (num_tokens - 1).bit_length(), SHORTEST_CHUNK), LONGEST_CHUNK)


def room_for(num_tokens: int) -> int:
    """Chooses max_length for texts of this length, among few sizes: each is compiled."""
    return max(num_tokens, min(rounded_length(num_tokens, multiple=64), LARGEST_INT32))


class Event(NamedTuple):
    """One token that was drawn for a request.

    Fields:
      request: the request's number, as `Engine.submit` returned it.
      token: in [0, vocab_size).
      log_probability: its natural logarithm, as the model gives it: before repetition penalty,
        temperature and limits.
      finished: why this token is the last of the request: "stop", it is one of its stop tokens;
        "length", it is the max_new_tokens-th. None: more tokens follow.
    """

    request: int
    token: int
    log_probability: float
    finished: Literal["stop", "length"] | None


class Engine:
    """Continues many prompts at once with one compiled step, whatever their lengths.

    A request waits for a free row of the batch, its prompt is read in chunks of a fixed size, and
    its row is free again once it is finished. No request compiles anything anew, except for the
    first one with a top_k or top_p, and the first with a repetition_penalty. Memory is that of the
    batch's cache; for finite windows it does not depend on the lengths of prompts and texts. What
    is drawn for a request depends only on its prompt and options.

        engine = Engine(model, batch_size=8)
        request = engine.submit(prompt, SamplingOptions(max_new_tokens=100))
        for event in engine.run():
            print(event.request, event.token)
    """

    def __init__(
        self,
        model: Model,
        *,
        batch_size: int,
        max_length: int | None = None,
        prefill_rows: int = 1,
        prefill_chunk: int = LONGEST_CHUNK,
        steps_per_call: int = 8,
    ):
        """Makes room for the batch.

        Args:
          model: the model; later changes to its parameters have no effect here.
          batch_size: how many requests are continued at once (B).
          max_length: the most tokens that a prompt and its continuation may have together. Only
            models with full attention in a layer (window None) need and use it: their caches have
            this many entries.
          prefill_rows: how many prompts are read at once.
          prefill_chunk: how many tokens of a prompt are read at once; in between, the other rows
            are continued.
          steps_per_call: how many tokens of each row are drawn before the caller sees them.

        Raises:
          ValueError: an argument is out of its range, or max_length is missing.
        """
        batch_size = check_count("batch_size", batch_size)
        if max_length is not None:
            max_length = check_count("max_length", max_length)
        self._config = model.config
        self._graph, parameters = nnx.split(model)
        # New variables with the same arrays: the model's may get other arrays later.
        parameters = jax.tree.map(lambda array: array, parameters)
        self._max_length = max_length if None in model.config.windows else None
        self._prefill_rows = min(check_count("prefill_rows", prefill_rows), batch_size)
        self._prefill_chunk = check_count("prefill_chunk", prefill_chunk)
        self._steps_per_call = check_count("steps_per_call", steps_per_call)
        self._waiting: collections.deque[Request] = collections.deque()
        self._running: list[Request | None] = [None] * batch_size
        self._reading: PromptBatch | None = None
        self._unseen: collections.deque[Event] = collections.deque()  # drawn, not handed out yet
        self._next_id = 0
        with auto_axes(parameters) as self._parameters:
            self._state = _BatchState(
                cache=self._init_cache(batch_size),
                last=jnp.zeros(batch_size, jnp.int32),
                remaining=jnp.zeros(batch_size, jnp.int32),
                sampling=RowSampling.idle(batch_size, model.config.vocab_size),
            )

    def submit(self, prompt: Prompt, options: SamplingOptions | None = None) -> int:
        """Queues a request.

        Args:
          prompt: [T] integers in [0, vocab_size), or a text for a model of bytes.
          options: how it is continued; None: `SamplingOptions()`.

        Returns:
          The request's number, which its events carry.

        Raises:
          ValueError, TypeError: the prompt is empty, has another shape or dtype or unknown tokens,
            or needs more than max_length tokens; or an option does not fit the vocabulary.
        """
        options = SamplingOptions() if options is None else options
        if not isinstance(options, SamplingOptions):
            raise TypeError(f"options must be SamplingOptions or None, got {shown(options)}")
        options.check_vocabulary(self._config.vocab_size)
        tokens = read_prompt(prompt, self._config.vocab_size)
        longest = len(tokens) + options.max_new_tokens
        if self._max_length is not None and longest > self._max_length:
            raise ValueError(
                f"a prompt of {len(tokens)} tokens and max_new_tokens={options.max_new_tokens} "
                f"need {longest} entries in the caches of the full-attention layers, which have "
                f"max_length={self._max_length}"
            )
        request = Request(self._next_id, tokens, options)
        self._next_id += 1
        self._waiting.append(request)
        return request.number

    def cancel(self, request: int) -> None:
        """Ends a request: `run` and `step` give no event of it any more, drawn before or not.

        Does nothing if it is unknown, or if all of its events were given.
        """
        self._waiting = collections.deque(x for x in self._waiting if x.number != request)
        self._unseen = collections.deque(x for x in self._unseen if x.request != request)
        if self._reading is not None:
            for row, one in list(self._reading.requests.items()):
                if one.number == request:
                    del self._reading.requests[row]
            if not self._reading.requests:
                self._reading = None
        for row, running in enumerate(self._running):
            if running is not None and running.number == request:
                self._running[row] = None
                with auto_axes(()):
                    remaining = self._state.remaining.at[row].set(0)
                self._state = self._state._replace(remaining=remaining)

    @property
    def busy(self) -> bool:
        """Whether a request is waiting, being read, or being continued, or events are left."""
        working = self._reading is not None or any(self._running)
        return bool(self._waiting or self._unseen) or working

    def step(self) -> list[Event]:
        """Reads a chunk of the prompts whose turn it is; unless that was their last, draws tokens.

        Returns:
          The tokens drawn, in order for each request: the first ones of prompts that were read to
          their end, or else up to steps_per_call for each row of the batch; possibly none. If a
          loop over `run` ended early: only the events that it has not come to.
        """
        if not self._unseen:
            return self._advance()
        events = list(self._unseen)
        self._unseen.clear()
        return events

    def run(self) -> Iterator[Event]:
        """Yields the tokens of all requests as they are drawn, until all requests are finished."""
        while self.busy:
            if not self._unseen:
                self._unseen.extend(self._advance())
            if self._unseen:
                yield self._unseen.popleft()

    def _advance(self) -> list[Event]:
        """Reads a chunk, or draws tokens, as `step` says."""
        with auto_axes(()):  # as the parameters have them
            if first_tokens := self._read():
                return first_tokens
            return self._draw() if any(self._running) else []

    def _init_cache(self, rows: int) -> ModelCache:
        return _init_cache(self._graph, self._parameters, rows, self._max_length)

    def _read(self) -> list[Event]:
        if self._reading is None:
            self._reading = self._begin_reading()
        reading = self._reading
        if reading is None:
            return []
        chunk, lengths = reading.next_chunk(self._prefill_chunk)
        reading.logits, reading.cache = _prefill(
            self._graph, self._parameters, chunk, lengths, reading.logits, reading.cache
        )
        if not reading.done:
            return []
        self._reading = None
        return self._start(reading)

    def _begin_reading(self) -> PromptBatch | None:
        free = [row for row, request in enumerate(self._running) if request is None]
        count = min(len(free), len(self._waiting), self._prefill_rows)
        if not count:
            return None
        requests = [self._waiting.popleft() for _ in range(count)]
        size = self._prefill_rows
        return PromptBatch(
            prompts=[r.prompt for r in requests] + [np.zeros(0, np.int32)] * (size - count),
            requests=dict(enumerate(requests)),
            rows=free[:count],
            cache=self._init_cache(size),
            logits=jnp.zeros((size, self._config.vocab_size), jnp.float32),
        )

    def _start(self, reading: PromptBatch) -> list[Event]:
        """Moves prompts that were read into the batch, and draws a first token for each."""
        size, batch_size = self._prefill_rows, len(self._running)
        options = [
            reading.requests[i].options if i in reading.requests else SamplingOptions()
            for i in range(size)
        ]
        target = np.full(size, batch_size, np.int32)  # a row beyond the batch is dropped
        for i in reading.requests:
            target[i] = reading.rows[i]
        self._state, tokens, log_probabilities = _start(
            self._state,
            reading.cache,
            reading.logits,
            RowSampling.of(options, reading.prompts, self._config.vocab_size),
            jnp.asarray([o.max_new_tokens for o in options], jnp.int32),
            target,
            stages=Stages.needed(options),
        )
        events = []
        drawn = zip(np.asarray(tokens), np.asarray(log_probabilities), strict=True)
        for i, (token, log_probability) in enumerate(drawn):
            if i in reading.requests:
                self._running[target[i]] = reading.requests[i]
                events.append(self._event(int(target[i]), token, log_probability))
        return events

    def _draw(self) -> list[Event]:
        stages = Stages.needed([r.options for r in self._running if r is not None])
        self._state, drawn = _decode(
            self._graph, self._parameters, self._state,
            num_steps=self._steps_per_call, stages=stages,
        )  # fmt: skip
        tokens, log_probabilities, active = map(np.asarray, drawn)
        return [
            self._event(int(row), tokens[step, row], log_probabilities[step, row])
            for step, row in zip(*np.nonzero(active), strict=True)
        ]

    def _event(self, row: int, token: np.integer, log_probability: np.floating) -> Event:
        """Counts a token of a row, and frees the row if it was the request's last."""
        request = self._running[row]
        assert request is not None
        request.num_drawn += 1
        finished: Literal["stop", "length"] | None = None
        if int(token) in request.options.stop_tokens:
            finished = "stop"
        elif request.num_drawn == request.options.max_new_tokens:
            finished = "length"
        if finished:
            self._running[row] = None
        return Event(request.number, int(token), float(log_probability), finished)


class _BatchState(NamedTuple):
    """The arrays of the batch that is continued."""

    cache: ModelCache
    last: jax.Array  # [B] int32, the token drawn last, which the model has not read yet
    remaining: jax.Array  # [B] int32, how many tokens may still be drawn; 0: the row is free
    sampling: RowSampling


class _DrawnTokens(NamedTuple):
    """What one call drew, [steps, B] each."""

    tokens: jax.Array  # int32
    log_probabilities: jax.Array  # float32
    active: jax.Array  # bool: whether the row drew a token in this step


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _init_cache(
    graph: nnx.GraphDef[Model], parameters: nnx.State, rows: int, max_length: int | None
) -> ModelCache:
    return nnx.merge(graph, parameters).init_cache(rows, max_length=max_length)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(4, 5))
def _prefill(
    graph: nnx.GraphDef[Model],
    parameters: nnx.State,
    tokens: jax.Array,
    lengths: jax.Array,
    logits: jax.Array,
    cache: ModelCache,
) -> tuple[jax.Array, ModelCache]:
    """Reads one chunk [rows, C]: the logits after each row's last token so far, and the cache."""
    new, cache = nnx.merge(graph, parameters).prefill(tokens, lengths=lengths, cache=cache)
    return jnp.where((lengths > 0)[:, None], new, logits), cache


@functools.partial(jax.jit, static_argnames="stages", donate_argnums=0)
def _start(
    rows: _BatchState,
    cache: ModelCache,
    logits: jax.Array,
    sampling: RowSampling,
    max_new_tokens: jax.Array,
    target: jax.Array,
    *,
    stages: Stages,
) -> tuple[_BatchState, jax.Array, jax.Array]:
    """Draws the first token of each row that was read, and moves them to rows `target`."""
    tokens, log_probabilities, sampling = draw(logits, sampling, stages)
    remaining = jnp.where(is_stop(tokens, sampling), 0, max_new_tokens - 1)
    new = _BatchState(cache, tokens, remaining, sampling)

    rows = jax.tree.map(lambda old, x: old.at[target].set(x, mode="drop"), rows, new)
    return rows, tokens, log_probabilities


@functools.partial(
    jax.jit, static_argnums=0, static_argnames=("num_steps", "stages"), donate_argnums=2
)
def _decode(
    graph: nnx.GraphDef[Model],
    parameters: nnx.State,
    rows: _BatchState,
    *,
    num_steps: int,
    stages: Stages,
) -> tuple[_BatchState, _DrawnTokens]:
    """Draws up to num_steps tokens for each row; stops as soon as no row goes on."""
    model = nnx.merge(graph, parameters)
    batch_size = rows.last.shape[0]

    def goes_on(carry):
        step, rows, _ = carry
        return (step < num_steps) & (rows.remaining > 0).any()

    def body(carry):
        step, rows, drawn = carry
        active = rows.remaining > 0
        logits, cache = model.decode_step(rows.last, rows.cache, active=active)
        tokens, log_probabilities, sampling = draw(logits, rows.sampling, stages)
        remaining = jnp.where(active & ~is_stop(tokens, sampling), rows.remaining - 1, 0)
        new = _DrawnTokens(tokens, log_probabilities, active)
        drawn = jax.tree.map(lambda array, x: array.at[step].set(x), drawn, new)
        return step + 1, _BatchState(cache, tokens, remaining, sampling), drawn

    shape = (num_steps, batch_size)
    empty = _DrawnTokens(*(jnp.zeros(shape, dtype) for dtype in (jnp.int32, jnp.float32, bool)))
    _, rows, drawn = jax.lax.while_loop(goes_on, body, (jnp.int32(0), rows, empty))
    return rows, drawn
