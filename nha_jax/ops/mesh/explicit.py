"""Meshes whose axes are explicit, as `jax.make_mesh` makes them, read as automatic ones.

With explicit axes the type of every array says how it is divided, and each operation wants to be
told when that is not clear. The operator and the model have one way to divide a call, that of
automatic axes (`nha_jax.ops.mesh.division`): so within their doors all axes are automatic, and what
leaves has types again.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def with_auto_axes(
    specs: Callable[..., Any],
) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Makes a function of arrays run with automatic axes where those of the mesh are explicit.

    Elsewhere the function is called as it is.

    Args:
      specs: called as the function is, with its result before the arguments, and with automatic
        axes; gives a tree of `PartitionSpec`, or the start of one, for the arrays of the result.
    """

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @functools.wraps(function)
        def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            mesh = _explicit_mesh((args, kwargs))
            if mesh is None:
                return function(*args, **kwargs)
            with auto_axes((args, kwargs)) as (args, kwargs):
                result = function(*args, **kwargs)
                wanted = jax.tree.broadcast(
                    specs(result, *args, **kwargs),
                    result,
                    is_leaf=lambda node: isinstance(node, PartitionSpec),
                )

            def place(x: jax.Array, spec: Any) -> jax.Array:
                return jax.sharding.reshard(x, NamedSharding(mesh, spec))

            return jax.tree.map(place, result, wanted)

        return wrapped

    return decorate


@contextlib.contextmanager
def auto_axes(tree: Any) -> Iterator[Any]:
    """Makes the explicit axes of the mesh automatic, and gives the tree with arrays of such types.

    Where the arrays lie does not change. The mesh is that in force, or else that of the first
    array of the tree that has one; if it has no explicit axes, nothing happens.
    """
    mesh = _explicit_mesh(tree)
    if mesh is None:
        yield tree
        return

    def move(leaf: Any) -> Any:
        return jax.sharding.reshard(leaf, PartitionSpec()) if isinstance(leaf, jax.Array) else leaf

    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    explicit = [name for name, kind in kinds if kind is AxisType.Explicit]
    with jax.sharding.use_abstract_mesh(
        mesh.update_axis_types(dict.fromkeys(explicit, AxisType.Auto))
    ):
        yield jax.tree.map(move, tree)


def _explicit_mesh(tree: Any) -> AbstractMesh | None:
    """Finds the mesh of `auto_axes`; None if it has no explicit axes."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        for leaf in jax.tree.leaves(tree):
            if isinstance(leaf, jax.Array) and not jax.typeof(leaf).sharding.mesh.empty:
                mesh = jax.typeof(leaf).sharding.mesh
                break
    return mesh if AxisType.Explicit in mesh.axis_types else None
