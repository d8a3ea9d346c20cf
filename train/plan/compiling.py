"""Compiles the training step for devices that are not there, and measures the program."""

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh

from nha_jax import ModelConfig
from nha_jax.ops import backends
from nha_jax.ops.types import Options
from train.config import TrainConfig
from train.devices.mesh import make_mesh, num_slices
from train.phases import Phase, phases_of
from train.plan.costs import Costs, KernelCost, count_costs
from train.plan.hlo import Program
from train.plan.kernels import calls_of_jaxpr
from train.plan.topology import Topology, needed_memory
from train.step.phase_functions import functions_of


@dataclass(frozen=True)
class Memory:
    """What a step needs of one device's memory, in bytes.

    Attributes:
        parameters: the model's, and those that are held of a model to learn from.
        optimizer: moments and counters.
        batch: tokens, targets, segment ids and loss mask.
        temporaries: activations kept for the backward pass, gradients, and everything else that
            lives for a part of the step; if the step does not fit, all that it needs beyond
            parameters and optimizer.
        program: the program's code.
        available: what all of these may need together.
    """

    parameters: int
    optimizer: int
    batch: int
    temporaries: int
    program: int
    available: int

    @property
    def state(self) -> int:
        """Bytes that stay in memory from step to step."""
        return self.parameters + self.optimizer

    @property
    def total(self) -> int:
        return self.state + self.batch + self.temporaries + self.program

    @property
    def headroom(self) -> int:
        """Bytes to spare; negative if the step does not fit."""
        return self.available - self.total


@dataclass(frozen=True)
class CompiledStep:
    """The training step of a configuration on a machine.

    Attributes:
        config: the configuration, of a phase of the run (`train.phases`) if it has several.
        topology: the machine.
        mesh: number of devices along each axis of the mesh.
        trained: how many entries the trained parameters have, an adapter's factors included.
        memory: what it needs of one device's memory.
        fits: whether that is there.
        costs: what one device does; None if the compiler gave no program because of its memory.
        seconds: how long compiling took.
        stage: the name of the stage that it is of; None without stages.
        steps: how many such steps the run makes.
    """

    config: TrainConfig
    topology: Topology
    mesh: Mapping[str, int]
    trained: int
    memory: Memory
    fits: bool
    costs: Costs | None
    seconds: float
    stage: str | None
    steps: int


def compile_steps(config: TrainConfig, topology: Topology) -> tuple[CompiledStep, ...]:
    """Compiles `train.step.update.TrainingFunctions.update`, as `nha train` would run it there.

    Returns:
        The step of each phase of the run; one in a run without stages and schedules.

    Raises:
        ConfigError: the mesh does not fit the machine, or the configuration does not fit the mesh.
        jax.errors.JaxRuntimeError: the step does not compile, and memory is not the reason.
    """
    phases = phases_of(config)
    return tuple(_compile_phase(phase, phases, topology) for phase in phases)


def dearest(steps: Sequence[CompiledStep]) -> CompiledStep:
    """Gives the step that needs the most memory."""
    return max(steps, key=lambda step: step.memory.total - step.memory.available)


def _compile_phase(phase: Phase, phases: Sequence[Phase], topology: Topology) -> CompiledStep:
    config = phase.config
    mesh = make_mesh(config, topology.devices)
    with jax.set_mesh(mesh):
        functions = functions_of(phase, phases, mesh)
        traced = functions.trace_update()
        start = time.perf_counter()
        lowered = traced.lower()
        compiled, refusal = _compile(lowered)
    parameters = _device_bytes(functions.abstract_state.model, functions.shardings.model)
    if functions.abstract_teacher is not None:
        parameters += _device_bytes(functions.abstract_teacher, functions.teacher_shardings)
    state = {
        "parameters": parameters,
        "optimizer": _device_bytes(
            functions.abstract_state.optimizer, functions.shardings.optimizer
        ),
    }
    if compiled is None:
        memory, costs = _memory_of_refusal(*refusal, state), None
    else:
        memory = _memory(compiled.memory_analysis(), state, topology.memory)
        program = Program(compiled.as_text() or "")
        costs = count_costs(program, _kernel_costs(traced.jaxpr.jaxpr), num_slices(config, mesh))
    return CompiledStep(
        config=config,
        topology=topology,
        mesh=dict(mesh.shape),
        trained=functions.num_trained,
        memory=memory,
        fits=memory.headroom >= 0,
        costs=costs,
        seconds=time.perf_counter() - start,
        stage=phase.stage,
        steps=phase.steps,
    )


def layer_kinds(config: ModelConfig, chip: str) -> dict[str, int]:
    """Says what computes the layers' attention on this chip, and how many layers it does.

    The kernels' limits are of heads, slots and dtype, so those of a whole layer tell.
    """
    sizes = (
        (config.num_query_heads, config.key_dim),
        (config.num_kv_heads, config.key_dim),
        (config.num_kv_heads, config.value_dim),
        (config.num_kv_heads, config.num_slots),
    )
    dtype = jnp.dtype(config.dtype)
    arrays: Any = tuple(jax.ShapeDtypeStruct((1, 128, *size), dtype) for size in sizes)
    platform = "tpu" if chip.startswith("TPU") else "gpu"
    device = AbstractDevice(chip, platform=platform, num_cores=None)
    kinds: Counter[str] = Counter()
    for window in config.windows:
        options = Options(
            window_size=window,
            scale=config.attention_scale or config.key_dim**-0.5,
            slot_feature_map=config.slot_feature_map,
            slot_delay=config.slot_delay,
            empty_slots=config.empty_slots,
            return_state=False,
            return_slot_weight=False,
        )
        with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
            how = backends.describe(config.implementation, arrays, options, platform)
        kinds[f"{'full attention' if window is None else f'window {window}'}: {how}"] += 1
    return dict(kinds)


def _memory(analysis: Any, state: dict[str, int], available: int) -> Memory:
    """Puts together what a compiled step needs, from the compiler's analysis."""
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return Memory(
        **state,
        batch=analysis.argument_size_in_bytes - sum(state.values()),
        temporaries=analysis.temp_size_in_bytes + results,
        program=analysis.generated_code_size_in_bytes,
        available=available,
    )


def _compile(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled | None, tuple[int, int]]:
    """Returns the program, or None and the bytes it needs and there are, if these are too few."""
    try:
        return lowered.compile(), (0, 0)
    except jax.errors.JaxRuntimeError as error:
        memory = needed_memory(error)
        if memory is None:
            raise
        return None, memory


def _memory_of_refusal(needed: int, available: int, state: dict[str, int]) -> Memory:
    """Puts together what a step needs that the compiler refused for its memory."""
    rest = needed - sum(state.values())
    return Memory(**state, batch=0, temporaries=rest, program=0, available=available)


def _device_bytes(tree: Any, shardings: Any) -> int:
    """Returns the bytes of one device's parts of the arrays."""
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    return sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in leaves
    )


def _kernel_costs(jaxpr: Any) -> dict[str, KernelCost]:
    """Returns the cost of a call by the kernel's name, that of the largest if calls differ."""
    costs: dict[str, KernelCost] = {}
    for call in calls_of_jaxpr(jaxpr):
        known = costs.get(call.name, KernelCost(0, 0))
        costs[call.name] = KernelCost(max(known.flops, call.flops), max(known.bytes, call.bytes))
    return costs
