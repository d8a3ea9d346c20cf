"""What the engine runs: each a program that all engines of a model and of these sizes share."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from nha_jax.cache import ModelCache, cache_specs
from nha_jax.config import ModelConfig
from nha_jax.generation.sampling import RowSampling, Stages, draw, is_stop
from nha_jax.layers.attention_core import LayerCache
from nha_jax.model import Model
from nha_jax.ops.mesh.division import divide_over_mesh


class BatchState(NamedTuple):
    """The arrays of the batch that is continued."""

    cache: ModelCache
    last: jax.Array  # [B] int32, the token drawn last, which the model has not read yet
    remaining: jax.Array  # [B] int32, how many tokens may still be drawn; 0: the row is free
    sampling: RowSampling


class DrawnTokens(NamedTuple):
    """What one call drew, [steps, B] each."""

    tokens: jax.Array  # int32
    log_probabilities: jax.Array  # float32
    active: jax.Array  # bool: whether the row drew a token in this step


# What these two make lies where the parameters are, as what the other programs return does: else
# those would be compiled for each of the two.
_beside_parameters = functools.partial(jax.jit, static_argnums=(0, 2, 3), keep_unused=True)


@_beside_parameters
def idle_batch(
    graph: nnx.GraphDef[Model], parameters: nnx.State, rows: int, max_length: int | None
) -> BatchState:
    """Makes a batch of free rows."""
    model = nnx.merge(graph, parameters)
    return BatchState(
        cache=model.init_cache(rows, max_length=max_length),
        last=jnp.zeros(rows, jnp.int32),
        remaining=jnp.zeros(rows, jnp.int32),
        sampling=RowSampling.idle(rows, model.config.vocab_size),
    )


@_beside_parameters
def unread(
    graph: nnx.GraphDef[Model], parameters: nnx.State, rows: int, max_length: int | None
) -> tuple[jax.Array, ModelCache]:
    """Makes logits and cache for `prefill`, of rows without a token."""
    model = nnx.merge(graph, parameters)
    logits = jnp.zeros((rows, model.config.vocab_size), jnp.float32)
    return logits, model.init_cache(rows, max_length=max_length)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(4, 5))
def prefill(
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
def start(
    rows: BatchState,
    cache: ModelCache,
    logits: jax.Array,
    sampling: RowSampling,
    max_new_tokens: jax.Array,
    target: jax.Array,
    *,
    stages: Stages,
) -> tuple[BatchState, jax.Array, jax.Array]:
    """Draws the first token of each row that was read, and moves them to rows `target`."""
    tokens, log_probabilities, sampling = draw(logits, sampling, stages)
    remaining = jnp.where(is_stop(tokens, sampling), 0, max_new_tokens - 1)
    new = BatchState(cache, tokens, remaining, sampling)

    rows = jax.tree.map(lambda old, x: old.at[target].set(x, mode="drop"), rows, new)
    return rows, tokens, log_probabilities


@functools.partial(
    jax.jit, static_argnums=0, static_argnames=("num_steps", "stages"), donate_argnums=2
)
def decode(
    graph: nnx.GraphDef[Model],
    parameters: nnx.State,
    rows: BatchState,
    *,
    num_steps: int,
    stages: Stages,
) -> tuple[BatchState, DrawnTokens]:
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
        new = DrawnTokens(tokens, log_probabilities, active)
        drawn = jax.tree.map(lambda array, x: array.at[step].set(x), drawn, new)
        return step + 1, BatchState(cache, tokens, remaining, sampling), drawn

    shape = (num_steps, batch_size)
    empty = DrawnTokens(*(jnp.zeros(shape, dtype) for dtype in (jnp.int32, jnp.float32, bool)))
    _, rows, drawn = jax.lax.while_loop(goes_on, body, (jnp.int32(0), rows, empty))
    return rows, drawn


@functools.partial(jax.jit, static_argnames=("config", "chunk"))
def take_row(
    cache: ModelCache, row: jax.Array, start: jax.Array, *, config: ModelConfig, chunk: int
) -> ModelCache:
    """Copies one row of a cache, whose last `chunk` tokens begin at `start`.

    Layers with full attention give their entries of these tokens alone, and no slots: theirs stay
    empty.
    """

    def of_layer(layer: LayerCache, window_size: int | None) -> LayerCache:
        layer = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1), layer)
        if window_size is not None:
            return layer
        state = layer.attention

        def part(ring: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(ring, start, min(chunk, state.capacity), axis=1)

        state = state._replace(
            slot_key=state.slot_key[:, :, :0],
            slot_value=state.slot_value[:, :, :0],
            window_rotated_key=part(state.window_rotated_key),
            window_value=part(state.window_value),
        )
        return layer._replace(attention=state)

    layers = tuple(map(of_layer, cache.layers, config.windows))
    snapshot = ModelCache(layers, jax.lax.dynamic_slice_in_dim(cache.length, row, 1))
    return _divided(snapshot, config)


@functools.partial(jax.jit, static_argnames="config", donate_argnums=0)
def put_row(
    cache: ModelCache,
    row: jax.Array,
    start: jax.Array,
    snapshot: ModelCache,
    *,
    config: ModelConfig,
) -> ModelCache:
    """Puts what `take_row` took into a row, which has the tokens before `start`."""

    first = jnp.zeros((), jnp.int32)

    def put(x: jax.Array, new: jax.Array, entry: jax.Array = first) -> jax.Array:
        return jax.lax.dynamic_update_slice(x, new, (row, entry, first, first)[: x.ndim])

    def into_layer(layer: LayerCache, new: LayerCache, window_size: int | None) -> LayerCache:
        put_entries = functools.partial(put, entry=start if window_size is None else first)
        return LayerCache(
            jax.tree.map(put_entries, layer.attention, new.attention),
            jax.tree.map(put, layer.convolution, new.convolution),
        )

    layers = tuple(map(into_layer, cache.layers, snapshot.layers, config.windows))
    return _divided(ModelCache(layers, put(cache.length, snapshot.length)), config)


def _divided(cache: ModelCache, config: ModelConfig) -> ModelCache:
    """Divides rows and heads over the mesh in force as those of the model's caches are."""
    division = divide_over_mesh(cache.length.shape[0], config.num_kv_heads)
    return division.place(cache, cache_specs(cache, config.num_kv_heads))
