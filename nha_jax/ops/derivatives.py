"""Which derivatives a kernel has: what it lacks is refused in words, not by JAX's own assertions.

A kernel with a backward pass has first derivatives by reverse mode. There a tangent is never
computed, only transposed; forward mode computes it, and a second derivative differentiates the
kernels themselves. Both are told apart by an identity around the kernel, whose tangents can only be
transposed, and once.
"""

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_WAY_OUT = 'implementation="xla" has every derivative'


def reverse_mode_only(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a function of arrays refuse what is not a first derivative by reverse mode.

    Args:
      name: of the implementation, for the message.
      function: takes and gives trees of arrays; it has a gradient of its own.

    Returns:
      The function; forward mode through it, and derivatives of its derivatives, raise
      NotImplementedError.
    """
    message = (
        f"implementation={name!r} has first derivatives by reverse mode only (jax.grad, jax.vjp, "
        "jax.jacrev), neither forward mode (jax.jvp, jax.jacfwd) nor derivatives of derivatives: "
        f"{_WAY_OUT}"
    )
    return _around(function, functools.partial(_identity.bind, message=message, moves=True))


def without_derivative(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a function of arrays, a kernel without a backward pass, refuse to be differentiated.

    Takes, gives and raises what `reverse_mode_only` does.
    """
    message = f"implementation={name!r} has no derivative of a decode step: {_WAY_OUT}"
    return _around(function, functools.partial(_identity.bind, message=message, moves=False))


def _around(
    function: Callable[..., Any], identity: Callable[[jax.Array], jax.Array]
) -> Callable[..., Any]:
    """Lays the identity around the function's floating arrays.

    On those that go in it sees their tangents, on those that come out the cotangents.
    """

    def put(tree: Any) -> Any:
        return jax.tree.map(
            lambda x: identity(x) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
        )

    return lambda *arguments: put(function(*put(arguments)))


# Primitives of our own, since of a `jax.custom_jvp` one cannot say that its tangents are transposed
# but never computed. `moves`: it may be differentiated.
_identity = Primitive("kernel_array")
_identity.def_impl(lambda x, **_: x)
_identity.def_abstract_eval(lambda x, **_: x)
mlir.register_lowering(_identity, lambda _, x, **__: [x])
batching.defvectorized(_identity)


def _identity_jvp(primals, tangents, *, message: str, moves: bool):
    if not moves:
        raise NotImplementedError(message)
    (x,), (d_x,) = primals, tangents
    return _identity.bind(x, message=message, moves=False), _tangent.bind(d_x, message=message)


ad.primitive_jvps[_identity] = _identity_jvp


# A vmap within a derivative meets the identity; one that meets a tangent computes it.
_tangent = Primitive("kernel_tangent")
_tangent.def_abstract_eval(lambda d_x, **_: d_x)


@_tangent.def_impl
def _refuse(*_: Any, message: str, **__: Any) -> NoReturn:
    raise NotImplementedError(message)


def _transpose(cotangent, d_x, *, message: str):
    if isinstance(cotangent, ad.Zero):
        return [cotangent]
    return [_identity.bind(cotangent, message=message, moves=False)]


mlir.register_lowering(_tangent, _refuse)
ad.primitive_jvps[_tangent] = _refuse
ad.primitive_transposes[_tangent] = _transpose
batching.primitive_batchers[_tangent] = _refuse
