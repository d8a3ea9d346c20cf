"""A program: the operator or the decode step on eight devices, for test_sharding.py.

`main` takes the name of a check of CHECKS, and the position of its case in CASES or DECODE_WINDOWS.
"""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from nha_jax.ops import NHAState, init_state, rope_tables
from nha_jax.ops.mesh.division import decode_over_mesh, over_mesh, use_mesh_axes
from nha_jax.ops.state import Tokens
from nha_jax.ops.tpu import decode_tpu
from nha_jax.ops.tpu.attention import tpu_attention
from nha_jax.ops.types import Options
from nha_jax.ops.xla.chunked import chunked_attention
from nha_jax.ops.xla.decode import decode_xla

T, K, V, M, W = 12, 4, 4, 2, 4


@dataclasses.dataclass(frozen=True)
class Case:
    mesh: dict[str, int]
    spec: PartitionSpec  # that `out` [B, T, Hq, V] gets
    B: int = 4
    Hkv: int = 2
    rope: str | None = "rows"
    segments: bool = False
    state: bool = False
    window_size: int | None = W
    slot_delay: int | None = None
    empty_slots: str = "attend"
    gate: str = "mild"
    implementation: str = "xla"
    axes: dict[str, list[str]] | None = None

    def __str__(self) -> str:
        names = [f"{name}{size}" for name, size in self.mesh.items()]
        names += [f"B{self.B}", f"Hkv{self.Hkv}", f"W{self.window_size}", f"rope-{self.rope}"]
        names += [self.empty_slots, self.gate, self.implementation]
        names += [] if self.slot_delay is None else [f"delay{self.slot_delay}"]
        return "-".join(names + ["segments"] * self.segments + ["state"] * self.state)


CASES = [
    Case(
        {"data": 2, "fsdp": 2, "tensor": 2},
        PartitionSpec(("data", "fsdp"), None, "tensor"),
        segments=True,
        state=True,
    ),
    # Two devices have the same key/value head, each for one of its two query heads.
    Case({"data": 2, "tensor": 4}, PartitionSpec("data", None, "tensor"), gate="mixed"),
    Case(
        {"replica": 4, "data": 2},
        PartitionSpec("replica", None, "data"),
        axes={"batch": ["replica"], "heads": ["data"]},
    ),
]


def in_context(
    window_size: int | None, segments: bool, empty_slots: str, gate: str, **fields: Any
) -> Case:
    """T = 12 tokens on 4 devices: 3 each; a window reaches back into none, one, two or all."""
    return Case(
        {"data": 2, "context": 4},
        PartitionSpec("data", "context"),
        window_size=window_size,
        segments=segments,
        empty_slots=empty_slots,
        gate=gate,
        **fields,
    )


CASES += [
    in_context(4, True, "mask", "mixed"),
    in_context(None, True, "attend", "mild", rope="tokens"),
]
ORDINARY = len(CASES)  # the first of them; those that follow run with -m slow
CASES += [
    # Neither two rows over eight devices, nor two query heads over four.
    Case({"data": 2, "fsdp": 4}, PartitionSpec("data"), B=2, rope="tokens"),
    Case({"data": 2, "tensor": 4}, PartitionSpec("data"), Hkv=1, rope=None, segments=True),
    in_context(0, True, "attend", "mixed"),
    in_context(0, False, "attend", "mild"),
    in_context(1, True, "mask", "mild"),
    in_context(3, False, "attend", "mixed", rope="tokens"),
    in_context(8, True, "attend", "mild"),
    in_context(8, True, "attend", "mixed", slot_delay=0),
    in_context(5, True, "mask", "mixed", slot_delay=4),
    in_context(T, False, "attend", "mild", slot_delay=2),
    in_context(T, True, "attend", "mild"),
    in_context(None, False, "mask", "mild"),
    in_context(4, True, "attend", "mild", rope=None, implementation="pallas_tpu"),
    Case(
        {"data": 1, "fsdp": 2, "tensor": 2, "context": 2},
        PartitionSpec("fsdp", "context", "tensor"),
        segments=True,
    ),
    # A state is of a whole sequence: it is then not divided.
    Case({"data": 4, "context": 2}, PartitionSpec("data"), segments=True, state=True),
]

DECODE_WINDOWS = [16, None]


def make_inputs(case: Case):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    B, Hkv = case.B, case.Hkv
    arrays = (
        normal(B, T, 2 * Hkv, K),
        normal(B, T, Hkv, K),
        normal(B, T, Hkv, V),
        -jnp.abs(normal(B, T, Hkv, M)),
    )
    if case.gate == "mixed":
        strong = rng.random((B, T, Hkv, M)) < 0.2
        arrays = (*arrays[:3], jnp.where(strong, -jnp.inf, arrays[3]))
    positions = {None: None, "tokens": np.arange(T), "rows": rng.integers(0, 99, (B, T))}[case.rope]
    rope = None if positions is None else rope_tables(jnp.asarray(positions), K)
    segment_ids = jnp.asarray(rng.integers(0, 3, (B, T)), jnp.int32) if case.segments else None
    if segment_ids is not None:  # what stands in padding reaches no other device either
        arrays = tuple(jnp.where((segment_ids != 0)[..., None, None], x, jnp.nan) for x in arrays)
    state = None
    if case.state:
        state = init_state(
            B, num_kv_heads=Hkv, num_slots=M, key_dim=K, value_dim=V, window_size=W,
            dtype=jnp.float32,
        )  # fmt: skip
        floats = {
            name: -jnp.abs(normal(*leaf.shape))
            for name, leaf in state._asdict().items()
            if name in NHAState._fields[:6]
        }
        state = state._replace(**floats, length=jnp.arange(B, dtype=jnp.int32) + W)
    return arrays, rope, segment_ids, state


def results(case: Case, attend):
    """The operator's output and the gradients of the arrays, the rope tables and the state."""
    options = Options(
        window_size=case.window_size,
        scale=0.5,
        slot_feature_map="silu",
        slot_delay=case.slot_delay,
        empty_slots=case.empty_slots,
        return_state=case.state,
        return_slot_weight=True,
    )
    arrays, rope, segment_ids, state = make_inputs(case)

    def loss(arrays, rope, state):
        result = attend(
            *arrays, rope=rope, segment_ids=segment_ids, initial_state=state, options=options
        )
        floats = [x for x in jax.tree.leaves(result) if jnp.issubdtype(x.dtype, jnp.floating)]
        return sum(jnp.sum(jnp.sin(x)) for x in floats), result

    gradients = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True, allow_int=True))
    return gradients(arrays, rope, state)


def check(case: Case) -> None:
    sizes = tuple(case.mesh.values())
    mesh = jax.make_mesh(sizes, tuple(case.mesh), axis_types=(AxisType.Auto,) * len(sizes))
    expected = results(case, over_mesh(chunked_attention))
    kernels = functools.partial(tpu_attention, interpret=True)
    attend = kernels if case.implementation == "pallas_tpu" else chunked_attention
    with jax.set_mesh(mesh), use_mesh_axes(**(case.axes or {})):
        found = results(case, over_mesh(attend))
    assert found[1].out.sharding.spec == case.spec, found[1].out.sharding
    for x, wanted in zip(*map(jax.tree.leaves, jax.device_get((found, expected))), strict=True):
        if x.dtype != jax.dtypes.float0:
            assert np.all(np.isfinite(wanted))
            np.testing.assert_allclose(x, wanted, rtol=1e-4, atol=1e-5, err_msg=str(case))


def check_decode(window_size: int | None) -> None:
    """The kernel, interpreted, on 2 x 2 rows and 2 x 8 heads against XLA's step on all of them."""
    B, H, R = 4, 16, 16
    rng = np.random.default_rng(0)
    fill = lambda x: jnp.asarray(-np.abs(rng.standard_normal(x.shape)), x.dtype)  # noqa: E731
    state = init_state(
        B, num_kv_heads=H, num_slots=M, key_dim=K, value_dim=V, window_size=window_size,
        dtype=jnp.float32, max_length=R,
    )  # fmt: skip
    lengths = jnp.array([0, 5, R - 1, R // 2 if window_size is None else 2 * R + 3], jnp.int32)
    state = NHAState(*map(fill, state[:6]), length=lengths, segment_id=state.segment_id)
    token = [jax.ShapeDtypeStruct((B, 1, H, size), jnp.float32) for size in (K, K, V, M)]
    query = jax.ShapeDtypeStruct((B, 1, 2 * H, K), jnp.float32)
    new = Tokens(*map(fill, token))
    arguments = (fill(query), fill(query), new, state, jnp.array([True, False, True, True]))
    options = Options(window_size, 0.5, "identity", "attend", True, False)
    expected = decode_xla(*arguments, options=options)
    kernel = functools.partial(decode_tpu, options=options, interpret=True)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        found = jax.jit(decode_over_mesh(kernel))(*arguments)
    assert found[0].sharding.spec == PartitionSpec(("data", "fsdp"), None, "tensor")
    for x, wanted in zip(*map(jax.tree.leaves, jax.device_get((found, expected))), strict=True):
        np.testing.assert_allclose(x, wanted, rtol=2e-6, atol=2e-6)


def check_no_communication() -> None:
    """Where the batch is divided, the operator and its gradient exchange nothing."""
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    options = Options(W, 0.5, "identity", "attend", return_state=False, return_slot_weight=False)
    shapes = [
        jax.ShapeDtypeStruct((8, T, heads, size), jnp.float32, sharding=sharding)
        for heads, size in ((4, K), (2, K), (2, V), (2, M), (4, V))
    ]
    rope = rope_tables(jnp.arange(T), K)

    def gradients(*inputs):
        def attend(*arrays):
            return over_mesh(chunked_attention)(
                *arrays, rope=rope, segment_ids=None, initial_state=None, options=options
            ).out

        return jax.vjp(attend, *inputs[:4])[1](inputs[4])

    with jax.set_mesh(mesh):
        program = jax.jit(gradients).lower(*shapes).compile().as_text()
    exchanges = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    assert not re.search(rf" ({exchanges})", program)


def check_more_devices_than_heads() -> None:
    """Two key/value heads on eight devices: each device has one, and two of 16 query heads."""
    shapes = [(16, K), (2, K), (2, V), (2, M)]
    arrays = [jnp.zeros((2, T, *shape)) for shape in shapes]
    options = Options(W, 0.5, "identity", "attend", return_state=False, return_slot_weight=False)
    seen = []

    def attend(*arrays, **rest):
        seen.append([x.shape[2] for x in arrays])
        return chunked_attention(*arrays, **rest)

    with jax.set_mesh(jax.make_mesh((8,), ("tensor",), axis_types=(AxisType.Auto,))):
        result = over_mesh(attend)(
            *arrays, rope=None, segment_ids=None, initial_state=None, options=options
        )
    assert seen == [[2, 1, 1, 1]]
    assert result.out.shape == (2, T, 16, V)
    assert result.out.sharding.spec == PartitionSpec((), None, "tensor")


CHECKS = {
    "case": lambda index: check(CASES[int(index)]),
    "decode": lambda index: check_decode(DECODE_WINDOWS[int(index)]),
    "communication": check_no_communication,
    "more devices than heads": check_more_devices_than_heads,
}


def main(name: str, *index: str) -> None:
    CHECKS[name](*index)
