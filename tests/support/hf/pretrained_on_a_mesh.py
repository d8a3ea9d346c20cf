"""A program that checks that each of eight devices reads only its part of a pretrained model.

It prints nothing if that is so.
"""

from unittest import mock

import chex
import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from nha_jax.hf.checkpoint import Checkpoint
from nha_jax.hf.pretrained import from_pretrained
from tests.support.hf.originals import EXACT, FIXTURES

RULES = {"embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"}


def main() -> None:
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def sharding(variable: nnx.Variable) -> NamedSharding:
        names = variable.get_metadata()["out_sharding"]
        return NamedSharding(mesh, PartitionSpec(*(RULES.get(name) for name in names)))

    def shardings(state: nnx.State) -> nnx.State:
        return jax.tree.map(sharding, state, is_leaf=lambda node: isinstance(node, nnx.Variable))

    largest = 0
    read = Checkpoint.read

    def measured(self: Checkpoint, name: str, index: tuple[slice, ...]) -> np.ndarray:
        nonlocal largest
        part = read(self, name, index)
        if name.endswith("proj.weight"):
            largest = max(largest, part.size)
        return part

    with mock.patch.object(Checkpoint, "read", measured):
        model = from_pretrained(FIXTURES / "llama-2", num_slots=8, shardings=shardings, **EXACT)
    kernel = model.blocks.attention.q_proj.kernel[...]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 8, 16)}
    assert largest == 32 * 32 // 8, largest
    whole = from_pretrained(FIXTURES / "llama-2", num_slots=8, **EXACT)
    chex.assert_trees_all_equal(jax.device_get(nnx.state(model)), jax.device_get(nnx.state(whole)))
