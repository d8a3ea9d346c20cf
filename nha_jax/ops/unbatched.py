"""Calls on one sequence, whose arrays have no batch axis."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def with_or_without_batch[**Arguments, Result](
    function: Callable[Arguments, Result],
) -> Callable[Arguments, Result]:
    """Makes a door of the operator take [T, heads, dim] for [B, T, heads, dim] too.

    Query and key say which it is; then all arrays are without the axis B, states too, and so is
    the result. Tables of the rotary embedding need none in either case.
    """

    @functools.wraps(function)
    def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        # By name or by position, as Python's own binding has it.
        given: dict[str, Any] = dict(zip(_POSITIONAL, args, strict=False)) | kwargs
        if any(jnp.ndim(given.get(name, 0)) != 3 for name in ("query", "key")):
            return function(*args, **kwargs)
        for name, axes in _AXES.items():
            if given.get(name) is not None and jnp.ndim(given[name]) != len(axes.split()):
                raise ValueError(
                    f"{name} must be [{axes}], as query and key have no batch axis; "
                    f"got shape {jnp.shape(given[name])}"
                )

        def batched(name: str, argument: Any) -> Any:
            if name not in (*_AXES, *_STATES):
                return argument
            return jax.tree.map(lambda x: jnp.expand_dims(x, 0), argument)

        names = itertools.zip_longest(_POSITIONAL[: len(args)], args)
        result = function(
            *(batched(name, x) for name, x in names),
            **{name: batched(name, x) for name, x in kwargs.items()},
        )
        return jax.tree.map(lambda x: jnp.squeeze(x, 0), result)

    return wrapped


_POSITIONAL = ("query", "key", "value", "log_decay", "state")
_STATES = ("state", "initial_state")
_AXES = {
    "query": "T, heads, dim",
    "key": "T, heads, dim",
    "value": "T, heads, dim",
    "log_decay": "T, heads, slots",
    "segment_ids": "T",
    "active": "",
}
