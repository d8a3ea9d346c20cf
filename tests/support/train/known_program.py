"""Compiles a small program of known work for eight CPU devices; prints its text.

A loop of three rounds over x [16, 32, 64], rows over `a` (4) and w's columns over `b` (2): each
round gathers w [64, 64] over b, multiplies, adds the product up over a, and sends it on around a.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

ROUNDS = 3


def main() -> None:
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def local(x: jax.Array, w: jax.Array) -> jax.Array:
        def body(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            whole = jax.lax.all_gather(w, "b", axis=1, tiled=True)
            product = jnp.einsum("rtk,kn->rtn", x, whole)
            total = jax.lax.psum(product, "a")
            return jax.lax.ppermute(total, "a", [(i, (i + 1) % 4) for i in range(4)]), None

        return jax.lax.scan(body, x, length=ROUNDS)[0]

    specs = (P("a"), P(None, "b"))
    divided = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("a"), check_vma=False)
    shapes = (
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.NamedSharding(mesh, spec))
        for shape, spec in zip(((16, 32, 64), (64, 64)), specs, strict=True)
    )
    print(jax.jit(divided).lower(*shapes).compile().as_text())
