"""Continuous batching: requests come and go while one batch of a fixed size is continued."""

import collections
from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nha_jax.argument_checks import check_count
from nha_jax.cache import ModelCache
from nha_jax.generation import programs
from nha_jax.generation.prefixes import Node, Prefix, Prefixes, PrefixStatistics
from nha_jax.generation.prompts import Prompt, PromptBatch, Request, read_prompt
from nha_jax.generation.sampling import RowSampling, SamplingOptions, Stages
from nha_jax.generation.turns import Turns
from nha_jax.model import Model
from nha_jax.ops.mesh.explicit import auto_axes
from nha_jax.prompt_lengths import LONGEST_CHUNK
from nha_jax.scalars import is_integer, plain, shown


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

    With prefix_bytes, what prompts begin with is read once: at the end of each chunk the engine
    keeps a snapshot of the row's cache, and a later prompt is read on from the last one whose
    tokens are its own, at least one token of it. Its text and log-probabilities are those of an
    engine that keeps nothing. Prompts that wait together are read one after the other where the
    second can have the first one's snapshots.

    Methods may be called from several threads; they wait for each other: for a step at most, or
    for a prefix.

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
        prefix_bytes: int = 0,
        prefixes_on_host: bool = False,
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
          prefix_bytes: what the snapshots of prompts' beginnings may take together; those used
            longest ago go first. A layer with a finite window needs the bytes of one row's cache
            in each, one with full attention those of prefill_chunk entries. 0, or less than one
            takes: nothing is kept.
          prefixes_on_host: keep them in the host's memory rather than the device's.

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
        prefix_bytes = plain(prefix_bytes)
        if not is_integer(prefix_bytes) or prefix_bytes < 0:
            raise ValueError(f"prefix_bytes={shown(prefix_bytes)} must be an integer of at least 0")
        self._turns = Turns()
        self._waiting: collections.deque[Request] = collections.deque()
        self._running: list[Request | None] = [None] * batch_size
        self._reading: PromptBatch | None = None
        self._unseen: collections.deque[Event] = collections.deque()  # drawn, not handed out yet
        self._next_id = 0
        with auto_axes(parameters) as self._parameters:
            self._state = programs.idle_batch(
                self._graph, self._parameters, batch_size, self._max_length
            )
            self._prefixes = Prefixes(
                model.config,
                self._unread()[1],
                chunk=self._prefill_chunk,
                max_bytes=prefix_bytes,
                on_host=prefixes_on_host,
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
        with self._turns:
            request = Request(self._next_id, tokens, options)
            self._next_id += 1
            self._waiting.append(request)
        return request.number

    def prefix(self, tokens: Prompt) -> Prefix:
        """Reads what prompts are going to begin with, unless it is kept already, and pins it.

        It is read at once, between two steps of the batch. Of the tokens, whole chunks are kept;
        a prompt reads the rest with its own.

        Args:
          tokens: [T] integers in [0, vocab_size), or a text for a model of bytes.

        Returns:
          A handle: the prefix stays until it is released.

        Raises:
          ValueError, TypeError: the tokens are no prompt, are fewer than prefill_chunk or more than
            max_length, or do not fit into prefix_bytes beside what is pinned.
        """
        read = read_prompt(tokens, self._config.vocab_size, "tokens")
        if self._max_length is not None and len(read) > self._max_length:
            raise ValueError(
                f"tokens are {len(read)}, more than the caches of the full-attention layers hold: "
                f"max_length={self._max_length}"
            )
        whole = read[: len(read) // self._prefill_chunk * self._prefill_chunk]
        with self._turns, auto_axes(()):
            self._prefixes.check_pinnable(read)
            reading = self._new_reading([whole], [self._prefixes.find(whole)])
            while not reading.done:
                self._read_chunk(reading)
            node = reading.nodes[0]
            assert node is not None
            unpin = self._prefixes.pin(node)

        def release() -> None:
            with self._turns:
                unpin()

        return Prefix(len(whole), release)

    @property
    def prefix_statistics(self) -> PrefixStatistics:
        """What was read so far, and what needed no reading because a prefix of it was kept."""
        with self._turns:
            return self._prefixes.statistics

    def cancel(self, request: int) -> None:
        """Ends a request: `run` and `step` give no event of it any more, drawn before or not.

        Does nothing if it is unknown, or if all of its events were given.
        """
        with self._turns:
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
        with self._turns:
            return self._busy()

    def step(self) -> list[Event]:
        """Reads a chunk of the prompts whose turn it is; unless that was their last, draws tokens.

        Returns:
          The tokens drawn, in order for each request: the first ones of prompts that were read to
          their end, or else up to steps_per_call for each row of the batch; possibly none. If a
          loop over `run` ended early: only the events that it has not come to.
        """
        with self._turns:
            if not self._unseen:
                return self._advance()
            events = list(self._unseen)
            self._unseen.clear()
            return events

    def run(self) -> Iterator[Event]:
        """Yields the tokens of all requests as they are drawn, until all requests are finished."""
        while True:
            with self._turns:
                if not self._busy():
                    return
                if not self._unseen:
                    self._unseen.extend(self._advance())
                event = self._unseen.popleft() if self._unseen else None
            if event is not None:
                yield event

    def _busy(self) -> bool:
        working = self._reading is not None or any(self._running)
        return bool(self._waiting or self._unseen) or working

    def _advance(self) -> list[Event]:
        """Reads a chunk, or draws tokens, as `step` says."""
        with auto_axes(()):  # as the parameters have them
            if first_tokens := self._read():
                return first_tokens
            return self._draw() if any(self._running) else []

    def _unread(self) -> tuple[jax.Array, ModelCache]:
        return programs.unread(self._graph, self._parameters, self._prefill_rows, self._max_length)

    def _read(self) -> list[Event]:
        if self._reading is None:
            self._reading = self._begin_reading()
        reading = self._reading
        if reading is None:
            return []
        self._read_chunk(reading)
        if not reading.done:
            return []
        self._reading = None
        return self._start(reading)

    def _read_chunk(self, reading: PromptBatch) -> None:
        """Reads one chunk of each prompt, and keeps what it can of each."""
        chunk, lengths = reading.next_chunk(self._prefill_chunk)
        reading.logits, reading.cache = programs.prefill(
            self._graph, self._parameters, chunk, lengths, reading.logits, reading.cache
        )
        self._prefixes.tokens_read += int(lengths.sum())
        for row, (node, prompt) in enumerate(zip(reading.nodes, reading.prompts, strict=True)):
            reading.nodes[row] = self._prefixes.save(node, prompt, reading.cache, row)

    def _begin_reading(self) -> PromptBatch | None:
        free = [row for row, request in enumerate(self._running) if request is None]
        requests: list[Request] = []
        while self._waiting and len(requests) < min(len(free), self._prefill_rows):
            prompts = [request.prompt for request in requests]
            if self._prefixes.grows_by_reading(self._waiting[0].prompt, prompts):
                break  # it waits, and then reads less
            requests.append(self._waiting.popleft())
        if not requests:
            return None
        prompts = [request.prompt for request in requests]
        reading = self._new_reading(prompts, list(map(self._prefixes.find_before_last, prompts)))
        reading.requests, reading.rows = dict(enumerate(requests)), free[: len(requests)]
        return reading

    def _new_reading(self, prompts: list[np.ndarray], nodes: list[Node]) -> PromptBatch:
        """Makes the batch of prompts that are read on from prefixes that are kept."""
        size = self._prefill_rows
        logits, cache = self._unread()
        for row, node in enumerate(nodes):
            cache = self._prefixes.restore(node, cache, row)
        idle = size - len(prompts)
        return PromptBatch(
            prompts=prompts + [np.zeros(0, np.int32)] * idle,
            nodes=[*nodes, *[None] * idle],
            positions=[node.depth * self._prefill_chunk for node in nodes] + [0] * idle,
            cache=cache,
            logits=logits,
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
        self._state, tokens, log_probabilities = programs.start(
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
        self._state, drawn = programs.decode(
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
