"""Compiles `decode_step` for one chip, and counts what it must move."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from static.chips import CHIPS, CYCLES_PER_MATMUL
from static.compiling import report, run_worker

STEPS = 64  # of the loop


@dataclasses.dataclass(frozen=True)
class DecodeJob:
    """B rows, H key/value heads, G query heads each, K = V head dims, M slots, W window.

    `kernel`: as dispatched for a TPU, or in XLA. `loop`: STEPS steps in one program, in which the
    compiler chooses the state's layout, or one step, which takes and gives the default layouts.
    """

    chip: str
    kernel: bool
    loop: bool
    G: int = 1
    W: int = 64
    B: int = 64
    H: int = 8
    K: int = 128
    M: int = 64

    @property
    def minimum_bytes(self) -> int:
        """What a step must move.

        Slots are read and written, rotated keys and values are read, and of each ring one entry is
        read and written.
        """
        rows = self.B * self.H
        slots = 2 * 2 * 4 * rows * self.M * self.K
        rings = 2 * 2 * rows * self.W * self.K
        entries = rows * (2 * (1 + 3) * self.K + 4 * (1 + 1) * self.M)
        tokens = 2 * rows * (2 * self.G + 2) * self.K + 4 * rows * self.M
        return slots + rings + entries + tokens

    @property
    def kernel_bytes(self) -> int:
        """What the kernel moves.

        Where the ring of decays has its entries innermost, it reads and writes the 128 entries
        around the one that is replaced: see `pallas.tpu.decode`.
        """
        innermost = self.M % 128 and self.W % 128 == 0
        return self.minimum_bytes + 2 * 4 * self.B * self.H * self.M * 127 * bool(innermost)


def compile_decode(job: DecodeJob) -> dict[str, float]:
    """Returns `compile_and_read`'s object, from a fresh process.

    Raises RuntimeError if it does not compile.
    """
    return run_worker("static.decoding", dataclasses.asdict(job), dump=job.kernel)


def compile_and_read(job: DecodeJob, dumps: Path) -> dict[str, Any]:
    """Compiles the job's program.

    Returns, in cycles a step, "cycles", "bound" and, for a kernel, its "bundles"; and
    "temporary_bytes", of HBM.
    """
    import jax
    from jax.experimental import topologies

    from static import hlo, llo
    from train.plan.kernels import pallas_calls

    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[job.chip].topology)
    device = jax.sharding.SingleDeviceSharding(topology.devices[0])
    function, arguments = program(job, None if job.kernel else "xla")
    jitted = jax.jit(function, in_shardings=device, out_shardings=device, donate_argnums=4)
    compiled = jitted.lower(*arguments).compile()
    chip, steps = CHIPS[job.chip], STEPS if job.loop else 1
    figures = {
        "cycles": hlo.estimated_cycles(compiled.as_text()) / steps,
        "bound": job.minimum_bytes / chip.hbm_bytes_per_cycle,
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }
    for schedule in llo.read_schedules(dumps, ("nha_decode",)).values():
        (call,) = (c for c in pallas_calls(function, *arguments) if c.name == "nha_decode")
        figures["bundles"] = schedule.bundles * call.steps
        figures["cycles"] += max(
            figures["bundles"],
            schedule.matmuls * CYCLES_PER_MATMUL * call.steps,
            job.kernel_bytes / chip.hbm_bytes_per_cycle,
        )
    return figures


def program(job: DecodeJob, implementation: str | None) -> tuple[Callable[..., Any], list[Any]]:
    """A step, or a loop of them, and its arguments' shapes; the state is the last."""
    import functools

    import jax
    import jax.numpy as jnp

    from nha_jax.ops import decode_step, init_state, rope_tables

    B, H, K, M = job.B, job.H, job.K, job.M

    def step(query, key, value, log_decay, state):
        out, state = decode_step(
            query.reshape(B, 1, H * job.G, K),
            key.reshape(B, 1, H, K),
            value.reshape(B, 1, H, K),
            log_decay.reshape(B, 1, H, M),
            state,
            window_size=job.W,
            rope=rope_tables(state.length[:, None], K),
            implementation=implementation,
        )
        return out.reshape(query.shape), state

    def steps(query, key, value, log_decay, state):
        def body(_, carry):  # the next token depends on the last one's output
            query, state = carry
            return step(query, key, value, log_decay, state)

        return jax.lax.fori_loop(0, STEPS, body, (query, state))

    query = jax.ShapeDtypeStruct((B, H * job.G * K), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((B, H * K), jnp.bfloat16)
    log_decay = jax.ShapeDtypeStruct((B, H * M), jnp.float32)
    create = functools.partial(
        init_state,
        B,
        num_kv_heads=H,
        num_slots=M,
        key_dim=K,
        value_dim=K,
        window_size=job.W,
        dtype=jnp.bfloat16,
    )
    arguments = [query, key, key, log_decay, jax.eval_shape(create)]
    return (steps if job.loop else step), arguments


if __name__ == "__main__":
    report(compile_and_read(DecodeJob(**json.loads(sys.argv[1])), Path(sys.argv[2])))
