"""Every kernel compiles to machine code for every TPU, as do decoding and a training step.

uv run --isolated --extra tpu pytest -n 2 -m tpu_aot tests/pallas/tpu     # a few minutes
uv run --isolated --extra tpu pytest -n 2 -m full tests/pallas/tpu        # all combinations, hours
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from nha_jax import ModelConfig
from nha_jax.ops import NHAState, decode_step, init_state, nha_attention, rope_tables
from nha_jax.ops.kernels import kernel_state
from nha_jax.ops.mesh.division import divide_over_mesh
from pallas.constants import RESIDUAL_NAMES
from pallas.tpu.decode import decode_unsupported
from tests.support.tpu_topology import CHIPS, compile_for, devices, make_mesh, relayouts
from train.config import DataConfig, MeshConfig, TrainConfig
from train.devices.mesh import make_mesh as make_training_mesh
from train.step.update import TrainingFunctions

HEADS, GROUP = 4, 2
# So large that XLA does not bring whole arrays into VMEM ahead of a kernel: that would hide copies.
BATCH, TOKENS = 16, 4096


@dataclasses.dataclass(frozen=True)
class Case:
    """K = V head dim, M slots, W window; G query heads to a key/value head."""

    chip: str
    K: int
    M: int
    W: int
    segments: bool
    G: int = GROUP
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        flags = f"-G{self.G}" * (self.G != GROUP) + f"-{self.dtype}" * (self.dtype != "bfloat16")
        return f"{self.chip}-K{self.K}-M{self.M}-W{self.W}{flags}" + "-segments" * self.segments


# Each value of each field with several of the others'.
SMALL = [
    Case("v5e", K=128, M=64, W=64, segments=False),
    Case("v5e", K=64, M=32, W=0, segments=True),
    Case("v5e", K=256, M=128, W=1024, segments=False),
    Case("v5p", K=128, M=64, W=100, segments=True),
    Case("v5p", K=256, M=32, W=64, segments=False),
    Case("v5p", K=64, M=128, W=1024, segments=True),
    Case("v6e", K=128, M=64, W=64, segments=True),
    Case("v6e", K=64, M=64, W=100, segments=False),
    Case("v6e", K=128, M=128, W=0, segments=False),
    Case("tpu7x", K=128, M=64, W=64, segments=False),
    Case("tpu7x", K=256, M=64, W=0, segments=True),
    Case("tpu7x", K=128, M=32, W=1024, segments=True),
]
PRODUCT = list(
    itertools.product(CHIPS, (64, 128, 256), (32, 64, 128), (0, 64, 100, 1024), (False, True))
)


# Heads of 512: the published 1.3B model's, and those whose steps VMEM cuts short.
LARGE = [
    Case("v5e", K=512, M=64, W=32, segments=False, G=1),
    Case("v5p", K=512, M=64, W=64, segments=True, G=4),
    Case("v5e", K=512, M=64, W=64, segments=False, G=1, dtype="float32"),
]
LARGE_PRODUCT = [
    Case(chip, 512, M, W, segments, G, dtype)
    for chip, (M, W), segments, G, dtype in itertools.product(
        CHIPS, ((64, 32), (128, 64), (64, 1024)), (False, True), (1, 4, 8), ("bfloat16", "float32")
    )
    if (G, dtype) != (8, "float32")
]


def parameters(small: list[Case]) -> list:
    """All cases, in the small run or only in the full one."""
    cases = [*(Case(*values) for values in PRODUCT), *LARGE]
    cases += [case for case in LARGE_PRODUCT if case not in LARGE]
    mark = lambda case: pytest.mark.tpu_aot if case in small else pytest.mark.full  # noqa: E731
    return [pytest.param(case, marks=mark(case), id=str(case)) for case in cases]


@pytest.fixture(scope="module", autouse=True)
def _optimisations() -> Iterator[None]:
    """Switches the compiler's optimisations on, and jax's own search for a TPU off."""
    platforms = jax.config.jax_platforms
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    yield
    jax.config.update("jax_platforms", platforms)
    jax.config.update("jax_disable_most_optimizations", True)  # as tests/conftest.py has it
    jax.clear_caches()


def attention(case: Case):
    """The operator on arrays as a layer has them; log_decay [B, Hkv, M, T], as the kernel reads it.

    Then no copy that is found is the test's own.
    """

    def run(query, key, value, log_decay, segment_ids):
        out = nha_attention(
            query.reshape(BATCH, TOKENS, HEADS * case.G, case.K),
            key.reshape(BATCH, TOKENS, HEADS, case.K),
            value.reshape(BATCH, TOKENS, HEADS, case.K),
            log_decay.transpose(0, 3, 1, 2),
            window_size=case.W,
            rope=rope_tables(jnp.arange(TOKENS), case.K),
            segment_ids=segment_ids,
        )
        return out.reshape(query.shape)

    return run


def arguments(case: Case) -> tuple[jax.ShapeDtypeStruct | None, ...]:
    """Abstract query, key, value, log_decay and segment_ids of `attention(case)`."""
    query = jax.ShapeDtypeStruct((BATCH, TOKENS, HEADS * case.G * case.K), case.dtype)
    key = jax.ShapeDtypeStruct((BATCH, TOKENS, HEADS * case.K), case.dtype)
    log_decay = jax.ShapeDtypeStruct((BATCH, HEADS, case.M, TOKENS), jnp.float32)
    segment_ids = jax.ShapeDtypeStruct((BATCH, TOKENS), jnp.int32) if case.segments else None
    return query, key, key, log_decay, segment_ids


def check(case: Case, compiled: jax.stages.Compiled) -> None:
    """There is a kernel, and heads of 128 go to it and come from it without a copy."""
    assert "tpu_custom_call" in compiled.as_text()
    if case.K == 128:
        assert relayouts(compiled, BATCH * TOKENS * HEADS * case.K) == []


@pytest.mark.parametrize(
    "case", parameters([case for case in SMALL if (case.K, case.M) == (128, 64)])
)
def test_forward(case: Case) -> None:
    check(case, compile_for(case.chip, attention(case), *arguments(case)))


@pytest.mark.parametrize("case", parameters(SMALL + LARGE))
def test_gradients(case: Case) -> None:
    def gradients(query, key, value, log_decay, segment_ids, d_out):
        run = lambda *inputs: attention(case)(*inputs, segment_ids)  # noqa: E731
        return jax.vjp(run, query, key, value, log_decay)[1](d_out)

    query, *rest = arguments(case)
    check(case, compile_for(case.chip, gradients, query, *rest, query))


@pytest.mark.tpu_aot
def test_full_attention_with_large_heads() -> None:
    """By the library's kernel, in float32, which needs the most of VMEM."""
    case = Case("v5e", K=512, M=64, W=TOKENS // 2, segments=False, G=1, dtype="float32")
    query, key, value, log_decay = (
        jax.ShapeDtypeStruct((2, TOKENS // 2, HEADS, size), case.dtype)
        for size in (case.K, case.K, case.K, case.M)
    )

    def loss(*arrays):
        return jnp.sum(nha_attention(*arrays, window_size=case.W))

    gradients = jax.grad(loss, argnums=(0, 1, 2))
    compiled = compile_for(case.chip, gradients, query, key, value, log_decay)
    assert "splash_mha" in compiled.as_text()


@pytest.mark.tpu_aot
@pytest.mark.parametrize(("saved", "forwards"), [((), 2), (RESIDUAL_NAMES, 1)], ids=str)
def test_saved_names_spare_a_rematerialised_layer_the_forward(saved, forwards) -> None:
    case = Case("v5e", K=128, M=64, W=64, segments=False)
    policy = jax.checkpoint_policies.save_only_these_names(*saved)

    def loss(query, key, value, log_decay):
        @functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)
        def layer(hidden, _):
            return jnp.tanh(hidden + attention(case)(hidden, key, value, log_decay, None)), None

        return jnp.sum(jax.lax.scan(layer, query, length=2)[0].astype(jnp.float32))

    *inputs, _ = arguments(case)
    compiled = compile_for(case.chip, jax.grad(loss, argnums=(0, 1, 2, 3)), *inputs)
    calls = re.findall(r"%nha_(forward|backward)[.\d]* = .* custom-call\(", compiled.as_text())
    assert sorted(calls) == ["backward"] + ["forward"] * forwards


def decode_program(
    B: int, H: int, window_size: int | None, K: int = 128, dtype=jnp.bfloat16, M: int = 64
):
    """A decode step and its abstract arguments, the state the last one.

    window_size None: full attention, with room for 1024 tokens.
    """

    def decode(query, key, value, log_decay, state: NHAState):
        rope = rope_tables(state.length[:, None], K)
        return decode_step(query, key, value, log_decay, state, window_size=window_size, rope=rope)

    state = jax.eval_shape(
        lambda: init_state(
            B, num_kv_heads=H, num_slots=M, key_dim=K, value_dim=K,
            window_size=window_size, dtype=dtype, max_length=1024,
        )
    )  # fmt: skip
    query = jax.ShapeDtypeStruct((B, 1, H * GROUP, K), dtype)
    token = jax.ShapeDtypeStruct((B, 1, H, K), dtype)
    log_decay = jax.ShapeDtypeStruct((B, 1, H, M), jnp.float32)
    return decode, (query, token, token, log_decay, state)


def check_decode(compiled: jax.stages.Compiled, state: NHAState, devices: int) -> None:
    """The kernel, and each device's part of the state updated in place: no ring is copied."""
    assert "nha_decode" in compiled.as_text()
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in state)
    assert compiled.memory_analysis().alias_size_in_bytes >= state_bytes // devices
    ring = state.window_log_decay if state.window_log_decay.size else state.window_value
    assert relayouts(compiled, ring.size // devices) == []


@pytest.mark.tpu_aot
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("window_size", [64, 1024, None], ids="W{}".format)
def test_decode(chip: str, window_size: int | None) -> None:
    decode, arguments = decode_program(64, 8, window_size)
    compiled = compile_for(chip, decode, *arguments, donate=(4,))
    check_decode(compiled, arguments[-1], devices=1)


@pytest.mark.tpu_aot
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("heads", "window_size", "K"), [(4, 32, 256), (4, None, 256), (2, 128, 256), (4, 32, 512)]
)
def test_decode_with_few_heads(
    chip: str, dtype, heads: int, window_size: int | None, K: int
) -> None:
    """Four heads of 256 and W=32 are the published 340M model's; of 512, the 1.3B model's."""
    decode, arguments = decode_program(64, heads, window_size, K=K, dtype=dtype)
    compiled = compile_for(chip, decode, *arguments, donate=(4,))
    check_decode(compiled, arguments[-1], devices=1)


@pytest.mark.tpu_aot
@pytest.mark.parametrize(
    ("chip", "K", "M", "W", "dtype"),
    [
        ("v5e", 128, 64, 1024, jnp.bfloat16),
        ("v5p", 256, 128, 64, jnp.float32),
        ("tpu7x", 128, 128, 1024, jnp.float32),
        ("v5e", 512, 64, 32, jnp.bfloat16),
    ],
)
def test_decode_of_the_largest_state_that_is_served(chip, K, M, W, dtype) -> None:
    """More than the compiler's own limit of VMEM, and as much as the check lets pass."""

    def served(H: int) -> bool:
        state = decode_program(2, H, W, K, dtype, M)[1][-1]
        return decode_unsupported(kernel_state(state)) is None

    H = next(H for H in range(256, 0, -8) if served(H))
    assert H > 8
    decode, arguments = decode_program(2, H, W, K, dtype, M)
    compiled = compile_for(chip, decode, *arguments, donate=(4,))
    assert "nha_decode" in compiled.as_text()


@pytest.mark.tpu_aot
@pytest.mark.parametrize("window_size", [64, None], ids="W{}".format)
def test_decode_over_a_mesh(window_size: int | None) -> None:
    """Two halves of the batch by two of the heads; nothing is exchanged."""
    decode, arguments = decode_program(128, 16, window_size)
    mesh = make_mesh("v5e", (2, 2), ("data", "tensor"))
    with jax.set_mesh(mesh):
        division = divide_over_mesh(128, 16)
        specs = (*(division.tokens,) * 4, division.state)
        arguments = jax.tree.map(
            lambda spec, leaf: with_sharding(leaf, NamedSharding(mesh, spec)), specs, arguments
        )
        compiled = jax.jit(decode, donate_argnums=4).lower(*arguments).compile()
    check_decode(compiled, arguments[-1], devices=4)
    exchanges = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    assert not re.search(rf" ({exchanges})", compiled.as_text())


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(MeshConfig(), marks=pytest.mark.full, id="one device"),
        pytest.param(MeshConfig(data=2, fsdp=2), marks=pytest.mark.tpu_aot, id="data 2, fsdp 2"),
        pytest.param(
            MeshConfig(fsdp=2, context=2), marks=pytest.mark.tpu_aot, id="fsdp 2, context 2"
        ),
    ],
)
def test_training_step(mesh: MeshConfig) -> None:
    """An update of the published 340M model at its context length, in one chip's memory."""
    config = TrainConfig(
        run="unused",
        steps=10,
        batch_size=8,
        model=ModelConfig.preset("nha-340m"),
        data=DataConfig(corpus="unused", sequence_length=2048),
        mesh=mesh,
    )
    count = max(mesh.data, 1) * mesh.fsdp * mesh.context
    placed = make_training_mesh(config, devices("v5e")[:count])
    with jax.set_mesh(placed):
        compiled = TrainingFunctions(config, placed).trace_update().lower().compile()
    assert "nha_backward" in compiled.as_text()
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < 16e9


def with_sharding(tree, sharding: NamedSharding):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )
