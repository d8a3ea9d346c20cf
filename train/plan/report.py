"""Shows a plan as a table and as JSON."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import nha_jax
from train.devices.chips import GIB
from train.plan.compiling import CompiledStep, layer_kinds
from train.step.flops import training_flops_per_token
from train.windows import format_windows

SECONDS_A_DAY = 86400


@dataclasses.dataclass(frozen=True)
class Speed:
    """How fast a step can be, by the chips' peaks.

    Each of the three bounds takes one part of the step to run alone.

    Attributes:
        model_flops: operations for a device and step by the model's definition, without
            recomputation.
        compute: seconds that the program's matrix products take at the peak.
        memory: seconds that its HBM traffic, an upper estimate, takes at the peak.
        network: seconds that its collectives within a slice take with every link busy.
        between_slices: seconds that those between slices take; 0 with one slice, and if the
            network's peak is not known.
        mfu: the share of the peak that is assumed for the rest.
        step: seconds a step takes at that share.
        tokens_a_day: tokens that all devices train on in a day at that share.
        days: days that so many steps as the run makes take at that share.
    """

    model_flops: float
    compute: float
    memory: float
    network: float
    between_slices: float
    mfu: float
    step: float
    tokens_a_day: float
    days: float


def speed_of(compiled: CompiledStep, mfu: float) -> Speed | None:
    """Computes the speed; None if the compiler gave no program."""
    if compiled.costs is None:
        return None
    config, chip = compiled.config, compiled.topology.chip
    length, devices = config.data.sequence_length, len(compiled.topology.devices)
    tokens = config.batch_size * length
    model_flops = training_flops_per_token(config) * tokens / devices
    step = model_flops / (mfu * chip.flops)
    return Speed(
        model_flops=model_flops,
        compute=compiled.costs.flops / chip.flops,
        memory=compiled.costs.hbm_bytes / chip.memory_bandwidth,
        network=compiled.costs.sent_bytes / chip.interconnect,
        between_slices=compiled.costs.bytes_between_slices / (chip.data_center or math.inf),
        mfu=mfu,
        step=step,
        tokens_a_day=SECONDS_A_DAY / step * tokens,
        days=compiled.steps * step / SECONDS_A_DAY,
    )


def as_json(compiled: CompiledStep, mfu: float) -> dict[str, Any]:
    """Returns all figures: bytes, seconds and operations of one device, unless a name says more."""
    memory, costs, speed = compiled.memory, compiled.costs, speed_of(compiled, mfu)
    return {
        "topology": compiled.topology.name,
        "chip": compiled.topology.chip.name,
        "devices": len(compiled.topology.devices),
        "mesh": dict(compiled.mesh),
        "trained": compiled.trained,
        "layers": layer_kinds(compiled.config.model, compiled.topology.chip.name),
        "fits": compiled.fits,
        "memory": dataclasses.asdict(memory) | {"total": memory.total, "headroom": memory.headroom},
        "costs": None if costs is None else dataclasses.asdict(costs),
        "speed": None if speed is None else dataclasses.asdict(speed),
        "compile_seconds": compiled.seconds,
    }


def table(compiled: CompiledStep, mfu: float) -> str:
    """Writes a line for each figure, for people."""
    config, topology = compiled.config, compiled.topology
    model, length = config.model, config.data.sequence_length
    mesh = ", ".join(f"{axis} {size}" for axis, size in compiled.mesh.items())
    parts = "" if config.micro_batches == 1 else f" in {config.micro_batches} micro-batches"
    rows = [
        ("machine", f"{topology.name}: {len(topology.devices)} x {topology.chip.name}"),
        ("mesh", mesh),
        (
            "model",
            f"{nha_jax.num_parameters(model) / 1e6:,.0f}M parameters, {model.num_layers} layers",
        ),
    ]
    if compiled.trained != nha_jax.num_parameters(model):
        rows += [("  trained", f"{compiled.trained / 1e6:,.1f}M parameters")]
    kinds = layer_kinds(model, topology.chip.name)
    rows += [(f"  {count} layers", kind) for kind, count in kinds.items()]
    rows += [("  remat", model.remat)]
    tokens = config.batch_size * length
    rows += [("batch", f"{config.batch_size} x {length} = {tokens:,} tokens{parts}")]
    rows += _memory_rows(compiled)
    speed = speed_of(compiled, mfu)
    if speed is not None:
        rows += _work_rows(compiled, speed)
        rows += _speed_rows(compiled.steps, tokens, speed)
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {text}".rstrip() for label, text in rows)


def stages_as_json(steps: Sequence[CompiledStep], mfu: float) -> list[dict[str, Any]]:
    """Returns the figures of every phase of a run in stages, or whose windows shrink."""
    return [
        {
            "stage": step.stage,
            "steps": step.steps,
            "windows": list(step.config.model.window_period),
            **as_json(step, mfu),
        }
        for step in steps
    ]


def stages_table(steps: Sequence[CompiledStep], mfu: float) -> str:
    """Writes a line for each phase of a run: its steps, memory, time a step and days."""
    lines, days = [], 0.0
    for step in steps:
        windows = format_windows(step.config.model.window_period)
        verdict = "" if step.fits else ", DOES NOT FIT"
        speed = speed_of(step, mfu)
        pace = "" if speed is None else f", {speed.step:.3f} s a step, {speed.days:.2f} days"
        days += 0.0 if speed is None else speed.days
        name = "" if step.stage is None else f"{step.stage}, "
        lines.append(
            f"  {name}windows {windows}: {step.steps:,} steps, "
            f"{_gib(step.memory.total)}{verdict}{pace}"
        )
    total = sum(step.steps for step in steps)
    return "\n".join([f"the run: {total:,} steps, {days:.2f} days at an MFU of {mfu:.0%}", *lines])


def _memory_rows(compiled: CompiledStep) -> list[tuple[str, str]]:
    memory = compiled.memory
    verdict = "fits" if compiled.fits else "DOES NOT FIT"
    missing = "to spare" if compiled.fits else "too much"
    figures = {
        "parameters": memory.parameters,
        "optimizer": memory.optimizer,
        "batch": memory.batch,
        "activations and temporaries": memory.temporaries,
        "program": memory.program,
        "total": memory.total,
        "available": memory.available,
    }
    return [
        ("memory of a chip", f"{verdict}: {_gib(abs(memory.headroom))} {missing}"),
        *((f"  {name}", f"{_gib(size):>12}") for name, size in figures.items()),
    ]


def _work_rows(compiled: CompiledStep, speed: Speed) -> list[tuple[str, str]]:
    costs = compiled.costs
    assert costs is not None
    rows = [
        ("work of a chip and step", ""),
        ("  model", _tera(speed.model_flops)),
        ("  program", f"{_tera(costs.flops)}, {costs.flops / speed.model_flops:.2f}x the model's"),
        ("  HBM traffic", f"{_gib(costs.hbm_bytes):>12} at most"),
        ("  sent", f"{_gib(costs.sent_bytes):>12}"),
    ]
    rows += [(f"    {x.kind}", f"{_gib(x.bytes):>12} in {x.count}") for x in costs.collectives]
    if costs.between_slices:
        rows += [("  sent to other slices", f"{_gib(costs.bytes_between_slices):>12}")]
        rows += [
            (f"    {x.kind}", f"{_gib(x.bytes):>12} in {x.count}") for x in costs.between_slices
        ]
    rows += [(f"  {name}", f"{calls:>12} calls") for name, calls in costs.kernels.items()]
    return rows


def _speed_rows(steps: int, tokens: int, speed: Speed) -> list[tuple[str, str]]:
    bounds = {"compute": speed.compute, "HBM": speed.memory, "network": speed.network}
    if speed.between_slices:
        bounds["between slices"] = speed.between_slices
    longest = max(bounds.values())
    return [
        ("step time, at least", f"{longest:>12.3f} s"),
        *((f"  {name} bound", f"{seconds:>12.3f} s") for name, seconds in bounds.items()),
        (f"at an MFU of {speed.mfu:.0%}", f"{speed.step:>12.3f} s a step"),
        ("  tokens a day", f"{speed.tokens_a_day / 1e9:>12.2f} billion"),
        (f"  {steps:,} steps", f"{speed.days:>12.2f} days for {steps * tokens / 1e9:.1f} billion"),
    ]


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f} GiB"


def _tera(flops: float) -> str:
    return f"{flops / 1e12:>12,.2f} TFLOP"
