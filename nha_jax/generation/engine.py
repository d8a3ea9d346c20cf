"""Continuous batching: prompts come and go, a batch of rows of a fixed size goes on."""

import collections
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nha_jax.argument_checks import check_prompt
from nha_jax.generation.sampling import RowSampling, SamplingOptions, Stages, draw, is_stop
from nha_jax.model import Model, ModelCache

SHORTEST_CHUNK, LONGEST_CHUNK = 64, 512


def chunk_for(num_tokens: int) -> int:
    """A good size of chunks for prompts of so many tokens; one of few, as each is compiled."""
    return min(max(1 << (num_tokens - 1).bit_length(), SHORTEST_CHUNK), LONGEST_CHUNK)


class Event(NamedTuple):
    """A token of a request's text."""

    request: int  # as `Engine.submit` returned it
    token: int
    log_probability: float  # natural, the model's own: before penalty, temperature and limits
    finished: Literal["stop", "length"] | None  # None: more is to come; a stop token counts


class Engine:
    """Continues many prompts at once with one compiled step, whatever their lengths.

    A request waits for a free row of the batch, its prompt is read in chunks of a fixed size, and
    its row is free again once it is finished. Nothing is compiled anew for it, but for the first
    with a top_k or top_p, and with a repetition_penalty. Memory is that of the batch's cache, for
    finite windows independent of prompts and texts. A request's text depends on its prompt and
    options only.

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
          model: the model; changes made to its parameters later do not count.
          batch_size: rows that are continued at once.
          max_length: the longest a prompt with its text may be. Needed for, and used by, models
            with full attention in a layer only: it is the room that their caches have.
          prefill_rows: prompts that are read at once.
          prefill_chunk: tokens of a prompt that are read at once; between two chunks the other
            rows go on.
          steps_per_call: tokens a row that are drawn before the caller sees them.

        Raises:
          ValueError: an argument is out of its range, or max_length is missing.
        """
        for name, value in (
            ("batch_size", batch_size), ("prefill_rows", prefill_rows),
            ("prefill_chunk", prefill_chunk), ("steps_per_call", steps_per_call),
        ):  # fmt: skip
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self._config = model.config
        self._graph, parameters = nnx.split(model)
        self._parameters = jax.tree.map(lambda array: array, parameters)  # Variables of our own
        self._max_length = max_length if None in model.config.windows else None
        self._prefill_rows = min(prefill_rows, batch_size)
        self._prefill_chunk, self._steps_per_call = prefill_chunk, steps_per_call
        self._waiting: collections.deque[_Request] = collections.deque()
        self._running: list[_Request | None] = [None] * batch_size
        self._reading: _Reading | None = None
        self._next_id = 0
        self._rows = _Rows(
            cache=self._init_cache(batch_size),
            last=jnp.zeros(batch_size, jnp.int32),
            remaining=jnp.zeros(batch_size, jnp.int32),
            sampling=RowSampling.idle(batch_size, model.config.vocab_size),
        )

    def submit(
        self, prompt: jax.typing.ArrayLike | Sequence[int], options: SamplingOptions | None = None
    ) -> int:
        """Queues a prompt [T] of integers in [0, vocab_size); returns the request's number.

        Raises:
          ValueError, TypeError: the prompt is empty, of another shape or dtype, has unknown tokens,
            or is, with its text, longer than max_length; or an option does not fit the vocabulary.
        """
        options = SamplingOptions() if options is None else options
        options.check_vocabulary(self._config.vocab_size)
        tokens = check_prompt(prompt, self._config.vocab_size)
        longest = len(tokens) + options.max_new_tokens
        if self._max_length is not None and longest > self._max_length:
            raise ValueError(
                f"a prompt of {len(tokens)} tokens and max_new_tokens={options.max_new_tokens} "
                f"need {longest} entries in the caches of the full-attention layers, which have "
                f"max_length={self._max_length}"
            )
        request = _Request(self._next_id, tokens, options)
        self._next_id += 1
        self._waiting.append(request)
        return request.number

    def cancel(self, request: int) -> None:
        """Ends a request; of an unknown or finished one, does nothing."""
        self._waiting = collections.deque(x for x in self._waiting if x.number != request)
        if self._reading is not None:
            for row, one in list(self._reading.requests.items()):
                if one.number == request:
                    del self._reading.requests[row]
        for row, running in enumerate(self._running):
            if running is not None and running.number == request:
                self._running[row] = None
                self._rows = self._rows._replace(remaining=self._rows.remaining.at[row].set(0))

    @property
    def busy(self) -> bool:
        """Whether a request waits, is read or goes on."""
        return bool(self._waiting) or self._reading is not None or any(self._running)

    def step(self) -> list[Event]:
        """Reads a chunk of the prompts whose turn it is, and draws tokens for the rows that go on.

        Returns the tokens drawn, in order for each request; none while prompts are only read.
        """
        if first_tokens := self._read():
            return first_tokens
        return self._draw() if any(self._running) else []

    def run(self) -> Iterator[Event]:
        """The tokens of all requests, as they come, until all are finished."""
        while self.busy:
            yield from self.step()

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

    def _begin_reading(self) -> "_Reading | None":
        free = [row for row, request in enumerate(self._running) if request is None]
        count = min(len(free), len(self._waiting), self._prefill_rows)
        if not count:
            return None
        requests = [self._waiting.popleft() for _ in range(count)]
        P = self._prefill_rows
        return _Reading(
            prompts=[r.prompt for r in requests] + [np.zeros(0, np.int32)] * (P - count),
            requests=dict(enumerate(requests)),
            rows=free[:count],
            cache=self._init_cache(P),
            logits=jnp.zeros((P, self._config.vocab_size), jnp.float32),
        )

    def _start(self, reading: "_Reading") -> list[Event]:
        """Puts the rows that were read into the batch, with a first token each."""
        P, batch_size = self._prefill_rows, len(self._running)
        options = [
            reading.requests[i].options if i in reading.requests else SamplingOptions()
            for i in range(P)
        ]
        target = np.full(P, batch_size, np.int32)  # beyond the batch: of no request
        for i in reading.requests:
            target[i] = reading.rows[i]
        self._rows, tokens, log_probabilities = _start(
            self._rows,
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
        self._rows, drawn = _decode(
            self._graph, self._parameters, self._rows,
            num_steps=self._steps_per_call, stages=stages,
        )  # fmt: skip
        tokens, log_probabilities, active = map(np.asarray, drawn)
        return [
            self._event(int(row), tokens[step, row], log_probabilities[step, row])
            for step, row in zip(*np.nonzero(active), strict=True)
        ]

    def _event(self, row: int, token: np.integer, log_probability: np.floating) -> Event:
        """Notes a token of a row; frees the row if it was the last."""
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


@dataclasses.dataclass
class _Request:
    number: int
    prompt: np.ndarray  # [T] int32
    options: SamplingOptions
    num_drawn: int = 0


@dataclasses.dataclass
class _Reading:
    """Prompts that are being read, P rows; some may have none, or a request that was cancelled."""

    prompts: list[np.ndarray]
    requests: dict[int, _Request]  # by row of the P
    rows: list[int]  # of the batch, where they will go
    cache: ModelCache
    logits: jax.Array  # [P, vocab_size], after each prompt's last token
    position: int = 0

    @property
    def done(self) -> bool:
        return self.position >= max(map(len, self.prompts))

    def next_chunk(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [P, size] and how many there are of each row."""
        tokens = np.zeros((len(self.prompts), size), np.int32)
        lengths = np.zeros(len(self.prompts), np.int32)
        for row, prompt in enumerate(self.prompts):
            part = prompt[self.position : self.position + size]
            tokens[row, : len(part)], lengths[row] = part, len(part)
        self.position += size
        return tokens, lengths


class _Rows(NamedTuple):
    """What the device holds of the batch."""

    cache: ModelCache
    last: jax.Array  # [B] int32, drawn and not yet read
    remaining: jax.Array  # [B] int32, tokens that may still be drawn; 0: the row is free
    sampling: RowSampling


class _Drawn(NamedTuple):
    """[steps, B] each."""

    tokens: jax.Array
    log_probabilities: jax.Array
    active: jax.Array  # whether the row drew in this step


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
    """One chunk [P, C]: the logits after each row's last token so far, and the cache."""
    new, cache = nnx.merge(graph, parameters).prefill(tokens, lengths=lengths, cache=cache)
    return jnp.where((lengths > 0)[:, None], new, logits), cache


@functools.partial(jax.jit, static_argnames="stages", donate_argnums=0)
def _start(
    rows: _Rows,
    cache: ModelCache,
    logits: jax.Array,
    sampling: RowSampling,
    max_new_tokens: jax.Array,
    target: jax.Array,
    *,
    stages: Stages,
) -> tuple[_Rows, jax.Array, jax.Array]:
    """Draws the first token of P rows, and writes them over the rows `target` of the batch."""
    tokens, log_probabilities, sampling = draw(logits, sampling, stages)
    remaining = jnp.where(is_stop(tokens, sampling), 0, max_new_tokens - 1)
    new = _Rows(cache, tokens, remaining, sampling)

    rows = jax.tree.map(lambda old, x: old.at[target].set(x, mode="drop"), rows, new)
    return rows, tokens, log_probabilities


@functools.partial(
    jax.jit, static_argnums=0, static_argnames=("num_steps", "stages"), donate_argnums=2
)
def _decode(
    graph: nnx.GraphDef[Model],
    parameters: nnx.State,
    rows: _Rows,
    *,
    num_steps: int,
    stages: Stages,
) -> tuple[_Rows, _Drawn]:
    """Up to num_steps tokens a row; ends as soon as no row goes on."""
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
        new = _Drawn(tokens, log_probabilities, active)
        drawn = jax.tree.map(lambda array, x: array.at[step].set(x), drawn, new)
        return step + 1, _Rows(cache, tokens, remaining, sampling), drawn

    shape = (num_steps, batch_size)
    empty = _Drawn(*(jnp.zeros(shape, dtype) for dtype in (jnp.int32, jnp.float32, bool)))
    _, rows, drawn = jax.lax.while_loop(goes_on, body, (jnp.int32(0), rows, empty))
    return rows, drawn
