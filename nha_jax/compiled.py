"""Methods of a model that are one program, which every later call of the same shapes finds."""

import functools
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import jax
from flax import nnx

from nha_jax.layer_config import LayerFields
from nha_jax.ops import backends


class _Configured(Protocol):
    config: LayerFields


Method = TypeVar("Method", bound=Callable[..., Any])


def compiled(*static: str) -> Callable[[Method], Method]:
    """Makes a method of a module with a `config` one compiled program.

    The program is that of the module's graph and of the arguments' shapes: a module with other
    parameters runs the same one. Inlined into the caller's program, if there is one, it leaves no
    trace in it. The method may not change the module.

    Args:
        static: names of keyword arguments that are no arrays, and hashable.
    """

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        # The backend is a part of what the program is found by: its name may get another one.
        @functools.partial(jax.jit, static_argnums=(0, 1), static_argnames=static, inline=True)
        def run(graph, _backend, state, *arrays, **options):
            return method(nnx.merge(graph, state), *arrays, **options)

        @functools.wraps(method)
        def call(self: _Configured, *arrays: Any, **options: Any) -> Any:
            graph, state = nnx.split(self)
            name = self.config.implementation
            backend = None if name is None else backends.get(name)
            return run(graph, backend, state, *arrays, **options)

        return call

    return decorate  # type: ignore[return-value]
