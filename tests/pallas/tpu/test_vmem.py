"""What fits VMEM is cut so that it does, and what never fits is refused by name."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from nha_jax import nha_attention
from nha_jax.ops.tpu.plan import CallShape, beyond_vmem, plan
from nha_jax.ops.types import Options
from pallas.tpu import VMEM_BYTES, BlockSizes, Sizes, default_block_sizes, vmem_needed

OPTIONS = Options(
    window_size=64,
    scale=1.0,
    slot_feature_map="identity",
    empty_slots="attend",
    return_state=False,
    return_slot_weight=False,
)


def shape(dtype: str = "bfloat16", **sizes: int) -> CallShape:
    defaults = {"rows": 4096, "group": 1, "Hkv": 4, "K": 512, "V": 512, "M": 64}
    flags = {"rope": True, "segments": False, "past": False}
    return CallShape(**(defaults | sizes), **flags, dtype=jnp.dtype(dtype))


def call(G: int, dtype: str, **options):
    """Traces the kernels' call, of heads of 512."""
    query, key, log_decay = (
        jax.ShapeDtypeStruct((1, 512, heads, size), kind)
        for heads, size, kind in ((G, 512, dtype), (1, 512, dtype), (1, 64, "float32"))
    )

    def attend(query, key, log_decay):
        return nha_attention(query, key, key, log_decay, window_size=64, **options)

    return jax.eval_shape(attend, query, key, log_decay)


@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("K", [64, 128, 256])
def test_smaller_heads_keep_the_steps_that_were_chosen_for_them(group: int, K: int) -> None:
    _, sizes = plan(shape(group=group, K=K, V=K, Hkv=8), OPTIONS)
    assert sizes == default_block_sizes(group, segments=False)


@pytest.mark.parametrize(
    ("group", "dtype", "chunks"),
    [(1, "bfloat16", 16), (4, "bfloat16", 8), (1, "float32", 4), (4, "float32", 2)],
)
def test_a_step_has_as_many_chunks_as_vmem_holds(group: int, dtype: str, chunks: int) -> None:
    """Compiled, each needs less than the check says; float32 with 16 and 8 needs over 64 MiB."""
    spec, _ = plan(shape(dtype, group=group), OPTIONS)
    assert spec.chunks == chunks


@given(
    group=st.sampled_from([1, 2, 4, 7, 8, 16, 64]),
    Hkv=st.sampled_from([1, 2, 4, 8]),
    K=st.sampled_from([60, 128, 256, 512]),
    V=st.sampled_from([60, 128, 256, 512]),
    M=st.sampled_from([1, 64, 128]),
    window=st.sampled_from([0, 1, 32, 100, 256, 1024]),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    past=st.booleans(),
)
def test_a_call_fits_or_is_refused_and_longer_steps_need_more(window, past, **sizes) -> None:
    options = dataclasses.replace(OPTIONS, window_size=window, return_state=past)
    call = shape(**sizes)._replace(past=past, rope=not past)
    spec, blocks = plan(call, options)
    padded = Sizes(
        call.Hkv, *(-(-n // 128) * 128 for n in (call.K, call.V)), -(-call.M // 16) * 16, call.dtype
    )
    fits = vmem_needed(padded, spec) <= VMEM_BYTES
    assert fits == (beyond_vmem(call, options) is None)
    assert fits or blocks.with_half_the_chunks() is None
    assume(spec.chunks > 1 and not spec.wide_window and spec.window <= spec.step_rows // 2)
    shorter = dataclasses.replace(spec, chunks=spec.chunks // 2)
    assert vmem_needed(padded, shorter) < vmem_needed(padded, spec)


def test_what_no_step_holds_is_refused_by_name_and_computed_otherwise() -> None:
    why = r"would need \d+ MiB of VMEM, over 64, for 64 query heads of 512 and 512 .* float32"
    with pytest.raises(NotImplementedError, match=f"implementation='pallas_tpu': .*{why}"):
        call(64, "float32", implementation="pallas_tpu")
    assert call(64, "float32").shape == (1, 512, 64, 512)


def test_block_sizes_that_do_not_fit_are_refused_by_name() -> None:
    options = {"implementation": "pallas_tpu", "kernel_options": {"pallas_tpu": {}}}
    assert call(4, "float32", implementation="pallas_tpu").shape == (1, 512, 4, 512)
    with pytest.raises(
        ValueError, match=r"chunk=64 and chunks_per_step=8 would need .* take fewer"
    ):
        call(4, "float32", **options)


def test_steps_are_halved_down_to_a_register_of_rows() -> None:
    sizes: BlockSizes | None = BlockSizes(chunk=32, chunks_per_step=16)
    rows = []
    while sizes is not None:
        rows.append(sizes.step_rows)
        sizes = sizes.with_half_the_chunks()
    assert rows == [512, 256, 128]
