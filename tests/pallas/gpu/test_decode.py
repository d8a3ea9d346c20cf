"""The decode kernel for GPUs: its steps interpreted, what it compiles to, and who gets it."""

import functools

import jax
import jax.numpy as jnp
import pytest

from nha_jax import Model
from nha_jax.ops import decode_step, init_state
from pallas.gpu.decode.sizes import DecodeSizes, default_decode_sizes
from tests.nha_jax.ops.test_gpu_sharding import MESH, calls_in
from tests.nha_jax.test_model import tiny_model
from tests.pallas.gpu.test_compile import SHARED_MEMORY, figures_of
from tests.support.gpu.decode_steps import CASES
from tests.support.gpu.process import HOPPER, run_cases

run_steps = functools.partial(run_cases, module="tests.support.gpu.decode_steps")


@pytest.mark.full
@pytest.mark.parametrize("index", range(len(CASES)), ids=map(str, CASES))
def test_steps_match_xla(index):
    assert run_steps([index]) == {index: "ok"}


def arguments(num_slots=16, size=64, dtype=jnp.bfloat16, window_size: int | None = 16):
    token = jax.ShapeDtypeStruct((2, 1, 2, size), dtype)
    log_decay = jax.ShapeDtypeStruct((2, 1, 2, num_slots), jnp.float32)
    state = jax.eval_shape(
        lambda: init_state(
            2, num_kv_heads=2, num_slots=num_slots, key_dim=size, value_dim=size,
            window_size=window_size, dtype=dtype, max_length=64,
        )
    )  # fmt: skip
    return token, token, token, log_decay, state


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"num_slots": 20}, "16 to 128 slots in multiples of 8, got 20"),
        ({"num_slots": 0}, "at least one slot, got none"),
        ({"size": 96}, "heads of 64, 128 or 256, got keys of 96"),
        ({"window_size": 5}, "rings of a multiple of 4 entries from 8 on, or 0, got 5"),
        ({"dtype": jnp.float16}, "bfloat16 and float32, got query of float16"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_a_kernel_that_cannot_serve_says_why(sizes, reason):
    step = functools.partial(decode_step, window_size=sizes.get("window_size", 16))
    with pytest.raises(NotImplementedError, match=f"implementation='pallas_gpu': .*{reason}"):
        jax.eval_shape(functools.partial(step, implementation="pallas_gpu"), *arguments(**sizes))


def test_implementation_of_another_name():
    with pytest.raises(ValueError, match=r"implementation must be one of .* got 'pallas'"):
        jax.eval_shape(
            functools.partial(decode_step, window_size=16, implementation="pallas"), *arguments()
        )


@pytest.mark.parametrize("implementation", [None, "xla", "pallas_gpu"], ids=str)
def test_only_the_model_that_names_it_decodes_by_the_kernel(implementation):
    sizes = {"num_layers": 1, "window_size": 16, "num_slots": 16, "key_dim": 64, "value_dim": 64}
    model = tiny_model(implementation=implementation, **sizes)
    with jax.sharding.use_abstract_mesh(HOPPER):
        cache = model.init_cache(2)
        traced = jax.jit(Model.decode_step).trace(model, jnp.zeros(2, jnp.int32), cache)
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert ("mosaic_gpu" in program) == (implementation == "pallas_gpu")


@pytest.mark.parametrize("window_size", [16, None], ids=str)
def test_every_device_of_a_mesh_calls_the_kernel_on_its_part(window_size):
    step = functools.partial(decode_step, window_size=window_size, implementation="pallas_gpu")
    with jax.sharding.use_abstract_mesh(MESH):
        traced = jax.jit(step).trace(*arguments(window_size=window_size))
    ((divided, call),) = calls_in(traced.jaxpr.jaxpr)
    assert divided
    assert call.outvars[0].aval.shape == (1, 1, 64)


@pytest.mark.gpu_aot
@pytest.mark.parametrize(
    "fields",
    [
        {"H": 4, "K": 256, "W": 32},
        {"M": 128, "G": 8, "loop": True},
        {"B": 1, "W": 1024, "G": 4},
        {"K": 64, "M": 16},
    ],
    ids=lambda x: "-".join(f"{k}{v}" for k, v in x.items()),
)
def test_compiles_without_spills_or_copies_of_the_state(fields, tmp_path):
    pytest.importorskip("jax_plugins.xla_cuda13", reason="needs CUDA: uv run --extra cuda")
    job = {"chip": "H100", "kernel": True, "loop": False} | fields
    figures = figures_of(job, tmp_path, module="static.gpu_decoding")
    assert set(figures["kernels"]) == {"nha_decode"}
    kernel = figures["kernels"]["nha_decode"]
    assert kernel["spills"] == 0
    assert kernel["shared_memory"] <= SHARED_MEMORY
    assert figures["state_copies"] == 0
    assert figures["aliased_bytes"] >= figures["state_bytes"]


def test_default_sizes_fit_every_state():
    for slots in (None, *range(16, 129, 8)):
        for entries in (0, 8, 12, 64, 1000, 131072):
            for head_dim in (64, 128, 256):
                sizes = default_decode_sizes(8, entries, slots, head_dim)
                assert entries == 0 or sizes.rows <= entries
                if slots is not None:
                    assert sizes.splits == 1
                    assert slots // 4 % sizes.warpgroups == 0
                    assert slots // 4 >= 2 * sizes.warpgroups


@pytest.mark.parametrize(
    ("name", "value"), [("warpgroups", 3), ("rows", 6), ("slot_tiles", 2), ("splits", 0)]
)
def test_sizes_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"DecodeSizes: {name} .* got {value}"):
        DecodeSizes(**{name: value})


def test_long_rings_are_split_where_there_are_few_heads():
    assert default_decode_sizes(8, 131072, None, 128).splits == 17
    assert default_decode_sizes(512, 131072, None, 128).splits == 1
    assert default_decode_sizes(8, 131072, 64, 128).splits == 1  # one launch
