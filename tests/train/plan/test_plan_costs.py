"""What a compiled program does, read out of its text, against what is known of the program."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from nha_jax.ops import nha_attention
from tests.support.eight_devices import run_on_eight_devices
from tests.support.gpu.process import HOPPER
from tests.support.train.known_program import ROUNDS
from train.plan.costs import Collective, Costs, KernelCost, count_costs
from train.plan.hlo import Program
from train.plan.kernels import pallas_calls


@pytest.fixture(scope="module")
def known() -> Costs:
    """Of the program in `known_program`, compiled for eight CPU devices."""
    done = run_on_eight_devices("tests.support.train.known_program")
    assert done.returncode == 0, done.stderr
    return count_costs(Program(done.stdout), {})


def test_matrix_products_times_the_loops_trips(known: Costs) -> None:
    assert known.flops == ROUNDS * 2 * (4 * 32) * 64 * 64


def test_collectives_times_the_loops_trips_as_rings(known: Costs) -> None:
    rows = 4 * 32 * 64 * 4  # bytes
    assert set(known.collectives) == {
        Collective("all-reduce", ROUNDS, ROUNDS * 2 * rows * 3 // 4),  # over four
        Collective("collective-permute", ROUNDS, ROUNDS * rows),
        Collective("all-gather", 1, 64 * 32 * 4),  # over two; XLA takes it out of the loop
    }
    assert known.sent_bytes == sum(x.bytes for x in known.collectives)


def test_traffic_is_between_the_arrays_once_and_every_round_ten_times(known: Costs) -> None:
    rows, weights = 4 * 32 * 64 * 4, 64 * 64 * 4
    once = ROUNDS * (rows + weights)
    assert once < known.hbm_bytes < 10 * once


# What TPU programs have and CPU programs have not: a loop unrolled by two, a gather spread over
# fusions, a reduce-scatter written as an all-reduce, arrays in a core's memory (S), a layer taken
# out of a stack, a kernel, heads [2, 16, 64] x [4, 32, 64] as a window of 4 over padding, rows
# [32, 16] in groups with a matrix [16, 8] each, and attributes with line breaks.
TPU_PROGRAM = """\
HloModule step, is_scheduled=true, num_partitions=4

%fused_start (p: bf16[8,64]) -> (bf16[8,64], bf16[16,64]) {
  %p = bf16[8,64]{1,0} parameter(0)
  %g.1 = bf16[16,64]{1,0} all-gather(%p), channel_id=1, replica_groups={{0,1},{2,3}}, \
dimensions={0}, frontend_attributes={chain_id="3"}
  ROOT %s = (bf16[8,64]{1,0}, bf16[16,64]{1,0}) custom-call(%g.1), \
custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion (p.1: bf16[8,64], q: bf16[4,8,64]) -> bf16[8,64] {
  %p.1 = bf16[8,64]{1,0} parameter(0)
  %q = bf16[4,8,64]{2,1,0} parameter(1)
  %g.2 = bf16[16,64]{1,0} all-gather(%p.1), channel_id=1, replica_groups={{0,1},{2,3}}, \
dimensions={0}, frontend_attributes={chain_id="3"}
  %zero = s32[] constant(0)
  %layer = bf16[1,8,64]{2,1,0} dynamic-slice(%q, %zero, %zero, %zero), \
dynamic_slice_sizes={1,8,64}
  ROOT %r = bf16[8,64]{1,0} bitcast(%layer)
}

%all-reduce-scatter.1 (p.2: f32[32,64]) -> f32[16,64] {
  %p.2 = f32[32,64]{1,0} parameter(0)
  %a = f32[32,64]{1,0} all-reduce(%p.2), channel_id=2, \
replica_groups=mesh['x'=2,'y'=2] {'x'}, to_apply=%add
  %zero.1 = s32[] constant(0)
  ROOT %d = f32[16,64]{1,0} dynamic-slice(%a, %zero.1, %zero.1), dynamic_slice_sizes={16,64}
}

%body (t: (s32[], bf16[4,8,64], f32[32,64])) -> (s32[], bf16[4,8,64], f32[32,64]) {
  %t = (s32[], bf16[4,8,64]{2,1,0}, f32[32,64]{1,0}) parameter(0)
  %i = s32[]{:S(6)} get-tuple-element(%t), index=0
  %stack = bf16[4,8,64]{2,1,0} get-tuple-element(%t), index=1
  %sum = f32[32,64]{1,0} get-tuple-element(%t), index=2
  %two = s32[]{:S(6)} constant(2)
  %next = s32[]{:S(6)} add(%i, %two)
  %near = bf16[8,64]{1,0:S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %start = (bf16[8,64]{1,0:S(1)}, bf16[16,64]{1,0:S(1)}) fusion(%near), kind=kCustom, \
calls=%fused_start
  %mid = bf16[8,64]{1,0:S(1)} fusion(%near, %stack), kind=kLoop, calls=%async_collective_fusion
  %scattered = f32[16,64]{1,0:S(1)} fusion(%sum), kind=kCustom, calls=%all-reduce-scatter.1
  %rows = bf16[2,16,64,1]{3,2,1,0:S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %taps = bf16[4,32,64,1]{3,2,1,0:S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %heads = bf16[2,16,4,32]{3,2,1,0:S(1)} convolution(%rows, %taps), \
window={size=1x4 pad=0_0x3_3 rhs_reversal=0x1}, dim_labels=0bf1_1oi0->0b1f
  %sorted = bf16[32,16]{1,0:S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %experts = bf16[4,16,8]{2,1,0:S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %ragged-dot-metadata = s32[5]{0:S(1)} custom-call(), custom_call_target="tpu_custom_call"
  %ragged-dot-none.1 = bf16[32,8]{1,0:S(1)} custom-call(%ragged-dot-metadata, %sorted, %experts), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block\\": 512}"
}}, metadata={op_name="ragged-dot-none"}
  %ragged-dot-none = bf16[4,16,8]{2,1,0:S(1)} custom-call(%sorted, %ragged-dot-none.1), \
custom_call_target="tpu_custom_call"
  %kernel_2.5.clone.1 = f32[4,4]{1,0} custom-call(%sum), custom_call_target="tpu_custom_call"
  ROOT %out = (s32[], bf16[4,8,64]{2,1,0}, f32[32,64]{1,0}) tuple(%next, %stack, %sum)
}

%condition (t.1: (s32[], bf16[4,8,64], f32[32,64])) -> pred[] {
  %t.1 = (s32[], bf16[4,8,64]{2,1,0}, f32[32,64]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%t.1), index=0
  %ten = s32[] constant(10)
  ROOT %less = pred[] compare(%i.1, %ten), direction=LT
}

ENTRY %main (x: bf16[4,8,64], y: f32[32,64]) -> f32[32,64] {
  %x = bf16[4,8,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %y = f32[32,64]{1,0} parameter(1)
  %zero.2 = s32[] constant(0)
  %first = (s32[], bf16[4,8,64]{2,1,0}, f32[32,64]{1,0}) tuple(%zero.2, %x, %y)
  %loop = (s32[], bf16[4,8,64]{2,1,0}, f32[32,64]{1,0}) while(%first), condition=%condition, \
body=%body
  %token = token[] after-all()
  %send = (f32[32,64]{1,0}, u32[]{:S(2)}, token[]) send(%y, %token), channel_id=3, \
is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.1_0",\
_xla_megascale_transfer_type="ALL_REDUCE"}
  %sent = token[] send-done(%send), channel_id=3, is_host_transfer=true
  ROOT %z = f32[32,64]{1,0} get-tuple-element(%loop), index=2
}
"""
TRIPS = 5  # to ten, by twos


@pytest.fixture(scope="module")
def tpu() -> Costs:
    kernels = {"kernel_2": KernelCost(flops=7, bytes=11)}
    return count_costs(Program(TPU_PROGRAM), kernels, num_slices=4)


def test_what_hosts_send_goes_between_slices(tpu: Costs) -> None:
    assert tpu.between_slices == (Collective("all-reduce", 1, 2 * 3 * 4 * 32 * 64 // 4),)
    assert tpu.bytes_between_slices == 12288
    assert "all-reduce" not in {collective.kind for collective in tpu.collectives}


def test_an_unrolled_loop_runs_fewer_times(tpu: Costs) -> None:
    assert tpu.kernels == {"kernel_2": TRIPS}


def test_products_over_padding_do_not_count(tpu: Costs) -> None:
    heads, experts, kernel = 2 * (2 * 16 * 4 * 32) * 64, 2 * (2 * 32 * 16 * 8), 7
    assert tpu.flops == TRIPS * (heads + experts + kernel)


def test_a_spread_collective_counts_once_and_a_reduce_scatter_as_one(tpu: Costs) -> None:
    assert set(tpu.collectives) == {
        Collective("all-gather", TRIPS, TRIPS * 8 * 64 * 2),
        Collective("reduce-scatter", TRIPS, TRIPS * 32 * 64 * 4 // 2),
    }


def test_only_main_memory_counts_and_of_a_stack_one_layer(tpu: Costs) -> None:
    layer, scattered, kernel, sent = 8 * 64 * 2, 32 * 64 * 4, 11, 32 * 64 * 4
    assert tpu.hbm_bytes == TRIPS * (layer + scattered + kernel) + sent


def test_a_text_without_a_program_is_refused() -> None:
    with pytest.raises(ValueError, match="ENTRY"):
        Program("nothing")


def test_kernels_count_their_products_and_blocks() -> None:
    def kernel(x, y, out):
        @pl.when(pl.program_id(0) > 1)  # counts at every step
        def _():
            out[...] = jnp.dot(x[...], y[...])

    call = pl.pallas_call(
        kernel,
        name="known",
        grid=(4,),
        in_specs=[
            pl.BlockSpec((8, 16), lambda i: (i, 0)),
            pl.BlockSpec((16, 32), lambda i: (0, 0)),  # fetched once
        ],
        out_specs=pl.BlockSpec((8, 32), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((32, 32), jnp.float32),
    )
    shapes = (
        jax.ShapeDtypeStruct((32, 16), jnp.float32),
        jax.ShapeDtypeStruct((16, 32), jnp.float32),
    )
    (found,) = pallas_calls(call, *shapes)
    assert (found.name, found.steps, found.exact) == ("known", 4, True)
    assert found.flops == 4 * 2 * 8 * 16 * 32
    assert found.bytes == 4 * (32 * 16 + 16 * 32 + 32 * 32)


# A Mosaic kernel, and cuDNN's causal attention forward and backward: [B, T, H, K] = [2, 64, 4, 16].
GPU_PROGRAM = """\
HloModule step, is_scheduled=true

ENTRY %main (q: bf16[2,64,4,16]) -> bf16[2,4,64,16] {
  %q = bf16[2,64,4,16]{3,2,1,0} parameter(0)
  %mpmd_map.16 = f32[2,4]{1,0} custom-call(%q), custom_call_target="mosaic_gpu_v2", \
metadata={op_name="jit(f)/shard_map/nha_states/mpmd_map"}, backend_config={module = "\\DF{"}
  %f = (bf16[2,4,64,16]{3,2,1,0}, f32[2,4,64]{2,1,0}) custom-call(%q, %q, %q), \
custom_call_target="__cudnn$fmhaSoftmax"
  ROOT %b = bf16[2,4,64,16]{3,2,1,0} custom-call(%q, %q, %q), \
custom_call_target="__cudnn$fmhaSoftmaxBackward"
}
"""


def test_kernels_and_library_calls_of_gpus() -> None:
    costs = count_costs(Program(GPU_PROGRAM), {"nha_states": KernelCost(flops=3, bytes=5)})
    assert costs.kernels == {"nha_states": 1}
    product = 2 * 2 * 4 * 64 * 64 * 16 // 2  # a row sees half of the others
    assert costs.flops == 3 + (2 + 5) * product


def test_gpu_kernels_count_their_products() -> None:
    T, H, D, M = 128, 2, 64, 32
    wide = jax.ShapeDtypeStruct((1, T, H, D), jnp.bfloat16)
    log_decay = jax.ShapeDtypeStruct((1, T, H, M), jnp.float32)

    def forward(*arrays):
        return nha_attention(*arrays, window_size=64, implementation="pallas_gpu")

    with jax.sharding.use_abstract_mesh(HOPPER):
        gates, states, output = pallas_calls(forward, wide, wide, wide, log_decay)
    assert gates.name == "nha_gates"
    assert gates.flops == 3 * (2 * H * T * 64 * M)  # a chunk's sums, of float32 in three parts
    assert states.name == "nha_states"
    assert states.flops == 2 * (2 * H * T * D * M)  # of keys and of values
    assert output.name == "nha_output"
    logits_and_values = 2 * T * D * (2 * 64 + 64 + M)  # of a window's blocks, a chunk and slots
    assert output.flops > H * 2 * logits_and_values  # and what spreads the decays
