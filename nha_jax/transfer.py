"""How far each layer's attention is from the original's, in which the layers' inputs arise."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.custom_derivatives import SymbolicZero

from nha_jax.config import shortest_pattern
from nha_jax.layers import Block
from nha_jax.layers.layer_stack import in_layer_order, scan_blocks
from nha_jax.model import Model
from nha_jax.ops import Rope
from nha_jax.ops.padding import zero_unless


class Transfer(NamedTuple):
    """What `attention_transfer` finds.

    Attributes:
        hidden: [B, T, hidden_size] float32, the original's `hidden_states`.
        error: float32 scalar, summed over sequences and over the layers that differ.
        layers: how many layers differ.
    """

    hidden: jax.Array
    error: jax.Array
    layers: int


def attention_transfer(
    model: Model, original: Model, tokens: jax.Array, segment_ids: jax.Array | None = None
) -> Transfer:
    """Compares each layer's attention with the original's, at the original's hidden states.

    With x the input that layer l has in the original, and f(x) = attention(attention_norm(x)) of
    that layer in the model, g(x) in the original, the error of a layer and a sequence is

        sum over tokens of |f(x) - g(x)|^2 / sum over tokens of |g(x)|^2

    (each layer on its own, as in arXiv 2410.10254; padding does not count). Layers whose window is
    the original's have none. A gradient reaches the model's attention and the norm before it, no
    layer's by way of another, and nothing of the original. It is taken layer by layer on the way
    forward, so that no more than one layer's activations are kept.

    Args:
        model: what is to learn, of the original's shape and with other windows.
        original: what is learned from.
        tokens: [B, T] integers in [0, vocab_size).
        segment_ids: [B, T] integers, as for a call of a model.

    Raises:
        ValueError, TypeError: tokens or segment_ids have a wrong shape or dtype.
    """
    tokens, known, segment_ids, positions = original._read(tokens, segment_ids, None)
    windows = tuple(zip(model.config.windows, original.config.windows, strict=True))
    graph, state = nnx.split((model.blocks.attention_norm, model.blocks.attention))
    leaves, structure = jax.tree.flatten(state)
    original_graph, original_state = nnx.split(original.blocks)
    walk = _Walk(graph, structure, original_graph, shortest_pattern(windows))
    given = _Given(original_state, original._embed(tokens), original._rope(positions), segment_ids)
    hidden, error = _run(walk, leaves, given)
    differing = sum(own != other for own, other in windows)
    return Transfer(original._end(hidden, known, segment_ids), error, differing)


class _Given(NamedTuple):
    """The arrays of a walk that get no gradient."""

    original: nnx.State
    hidden: jax.Array
    rope: Rope
    segment_ids: jax.Array | None


@dataclasses.dataclass(frozen=True)
class _Walk:
    """A walk through the original's layers, in each of which the model's attention runs beside it.

    Attributes:
        graph, structure: make the model's norm and attention of a list of arrays.
        original: the graph of the original's blocks.
        windows: those of model and original, of the layers of a period.
    """

    graph: nnx.GraphDef
    structure: Any
    original: nnx.GraphDef[Block]
    windows: tuple[tuple[int | None, int | None], ...]

    def __call__(
        self, leaves: Sequence[jax.Array], moving: Sequence[bool], given: _Given
    ) -> tuple[tuple[jax.Array, jax.Array], list[jax.Array]]:
        """Returns the last layer's output and the error, and its gradient in `moving` leaves."""

        def step(
            block: Block, hidden: jax.Array, own: Any, shared: Any, windows: Any
        ) -> tuple[jax.Array, tuple[jax.Array, list[jax.Array]]]:
            rope, segment_ids = shared
            own_window, window = windows
            attend = {"rope": rope, "segment_ids": segment_ids, "diagnose": None}
            wanted, _ = block.attention.forward(
                block.attention_norm(hidden), window_size=window, **attend
            )
            after = block.after_attention(hidden, wanted)
            moved = [leaf for leaf, moves in zip(own, moving, strict=True) if moves]
            if own_window == window:
                return after, (jnp.float32(0), [jnp.zeros_like(leaf) for leaf in moved])

            def error(moved: list[jax.Array]) -> jax.Array:
                rest = iter(moved)
                arrays = [
                    next(rest) if moves else leaf for leaf, moves in zip(own, moving, strict=True)
                ]
                norm, attention = nnx.merge(self.graph, jax.tree.unflatten(self.structure, arrays))
                found, _ = attention.forward(norm(hidden), window_size=own_window, **attend)
                return _relative_error(found, wanted, segment_ids)

            return after, jax.value_and_grad(error)(moved)

        period = len(self.windows)
        of_layers = tuple(
            [leaf.reshape(-1, period, *leaf.shape[1:])[:, layer] for leaf in leaves]
            for layer in range(period)
        )
        hidden, results = scan_blocks(
            step,
            nnx.merge(self.original, given.original),
            given.hidden,
            self.windows,
            of_layers,
            shared=(given.rope, given.segment_ids),
        )
        errors, slopes = in_layer_order(results)
        return (hidden, errors.sum()), slopes


def _relative_error(
    found: jax.Array, wanted: jax.Array, segment_ids: jax.Array | None
) -> jax.Array:
    """Adds up, over sequences, the squared error of [B, T, D] relative to the square."""

    def squares(x: jax.Array) -> jax.Array:
        if segment_ids is not None:
            x = zero_unless(segment_ids != 0, x)
        return jnp.square(x).sum((1, 2))

    found, wanted = found.astype(jnp.float32), wanted.astype(jnp.float32)
    whole = squares(wanted)
    return (squares(found - wanted) / jnp.where(whole > 0, whole, 1)).sum()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(walk: _Walk, leaves: list[jax.Array], given: _Given) -> tuple[jax.Array, jax.Array]:
    outputs, _ = walk(leaves, [False] * len(leaves), given)
    return outputs


def _run_forward(walk: _Walk, leaves: Any, given: Any) -> tuple[tuple[jax.Array, jax.Array], Any]:
    """Takes the gradient in those leaves that one is wanted of; the others stand for None."""
    moving = [leaf.perturbed for leaf in leaves]
    arrays = [leaf.value for leaf in leaves]
    outputs, slopes = walk(arrays, moving, jax.tree.map(lambda leaf: leaf.value, given))
    rest = iter(slopes)
    return outputs, [next(rest) if moves else None for moves in moving]


def _run_backward(walk: _Walk, slopes: Any, cotangents: Any) -> tuple[Any, None]:
    _, error = cotangents
    if isinstance(error, SymbolicZero):
        error = jnp.float32(0)
    scaled = [None if slope is None else (error * slope).astype(slope.dtype) for slope in slopes]
    return scaled, None


_run.defvjp(_run_forward, _run_backward, symbolic_zeros=True)
