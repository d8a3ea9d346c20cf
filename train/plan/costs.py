"""What a compiled program does: floating-point operations, memory traffic, collectives."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from train.plan.hlo import Array, Computation, Instruction, Program, Step

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# They move nothing: names for what is there already, or the end of what was counted at its start.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "opt-barrier", "add-dependency", "iota", "broadcast",
}  # fmt: skip
_SLICES = {"slice", "dynamic-slice", "slice-start", "gather"}
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # opcode -> the operand that is written


@dataclass(frozen=True)
class KernelCost:
    """What one call of a kernel does that XLA cannot see into."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Collective:
    """The collectives of one kind, of one device and run.

    Attributes:
        kind: one of COLLECTIVES.
        count: how many.
        bytes: that a device sends in all, each collective done as a ring.
    """

    kind: str
    count: int
    bytes: int


@dataclass(frozen=True)
class Costs:
    """Of one device and run of the program.

    Attributes:
        flops: of all matrix products, those of recomputation and of kernels included.
        hbm_bytes: in and out of main memory: every array that an operation reads or writes there.
            An upper estimate, as caches and what the compiler keeps on the chip may spare some.
        collectives: most bytes first.
        kernels: calls by the kernel's name.
    """

    flops: int
    hbm_bytes: int
    collectives: tuple[Collective, ...]
    kernels: Mapping[str, int]

    @property
    def sent_bytes(self) -> int:
        return sum(collective.bytes for collective in self.collectives)


def count_costs(program: Program, kernels: Mapping[str, KernelCost]) -> Costs:
    """Adds up the program's steps.

    Args:
        program: as compiled.
        kernels: of each name, as `kernel_name` has it. Other custom calls count no operations, and
            their arrays once.
    """
    flops, moved = 0, 0
    calls: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    sent: Counter[str] = Counter()
    seen: set[str] = set()
    for step in program.steps():
        kernel = kernels.get(kernel_name(step.instruction))
        if kernel:
            calls[kernel_name(step.instruction)] += step.times
            flops += step.times * kernel.flops
            moved += step.times * kernel.bytes
            continue
        flops += step.times * sum(_flops(step.computation, step.instruction))
        moved += step.times * _hbm_bytes(program, step.computation, step.instruction)
        for inner in program.inside(step.instruction):
            for instruction in inner.instructions.values():
                flops += step.times * sum(_flops(inner, instruction))
        for kind, ring_bytes in _collectives(program, step, seen):
            counts[kind] += step.times
            sent[kind] += step.times * ring_bytes
    found = tuple(Collective(kind, counts[kind], sent[kind]) for kind, _ in sent.most_common())
    return Costs(flops, moved, found, dict(calls))


def kernel_name(instruction: Instruction) -> str:
    """`nha_forward` of `nha_forward.2`, a Pallas kernel's call; empty if it is none."""
    target = re.search(r'custom_call_target="(\w+)"', instruction.attributes)
    if instruction.opcode != "custom-call" or not target or target[1] not in PALLAS_TARGETS:
        return ""
    if found := re.search(r'op_name="[^"]*?(\w+)/mpmd_map"', instruction.attributes):
        return found[1]  # on GPUs
    return re.sub(r"(\.(clone|\d+))*$", "", instruction.name)


PALLAS_TARGETS = ("tpu_custom_call", "mosaic_gpu_v2")


def _flops(computation: Computation, instruction: Instruction) -> Iterator[int]:
    """Of a matrix product, 2 for each pair that is multiplied; nothing else counts."""
    if instruction.opcode == "convolution":
        yield _convolution_flops(computation, instruction)
    elif instruction.opcode == "dot":
        yield _dot_flops(computation, instruction, r"lhs_contracting_dims=\{([\d,]*)\}")
    elif instruction.opcode == "custom-call" and instruction.name.startswith("ragged-dot"):
        yield _ragged_dot_flops(computation, instruction)
    elif instruction.opcode == "custom-call" and "__cublas" in instruction.attributes:
        yield _dot_flops(computation, instruction, r'"lhs_contracting_dimensions":\[([\d",]*)\]')
    elif instruction.opcode == "custom-call" and "__cudnn$fmha" in instruction.attributes:
        yield _attention_flops(computation, instruction)


def _attention_flops(computation: Computation, call: Instruction) -> int:
    """Of cuDNN's causal attention: half of T x T pairs, two products forward and five backward."""
    query, key = computation.arrays(call.operands[:2])  # [B, T, heads, K]
    pairs = query.size * key.shape[1] // 2
    return 2 * pairs * (5 if "Backward" in call.attributes else 2)


def _dot_flops(computation: Computation, dot: Instruction, contracted: str) -> int:
    left = computation.arrays(dot.operands[:1])[0]
    found = re.search(contracted, dot.attributes)
    axes = [int(axis) for axis in re.findall(r"\d+", found[1])] if found else []
    return 2 * dot.results[0].size * math.prod(left.shape[axis] for axis in axes)


def _ragged_dot_flops(computation: Computation, call: Instruction) -> int:
    """Of XLA's own kernels for TPUs: rows [N, D] and a matrix [D, I] for each group of them.

    The three arrays are [N, D], [groups, D, I] and [N, I], whichever of them is the result.
    """
    arrays = [*computation.arrays(call.operands), *call.results]
    rows = [array.shape[0] for array in arrays if len(array.shape) == 2]
    matrices = [array.shape[1:] for array in arrays if len(array.shape) == 3]
    if not rows or not matrices:  # the call that prepares the groups
        return 0
    return 2 * rows[0] * math.prod(matrices[0])


def _convolution_flops(computation: Computation, convolution: Instruction) -> int:
    """TPU programs write matrix products as convolutions, some with windows over padding."""
    left, right = computation.arrays(convolution.operands[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    assert labels is not None, convolution.name
    inputs, kernel, outputs = labels.groups()
    out = convolution.results[0].shape
    pairs = out[outputs.index("b")] * out[outputs.index("f")] * right.shape[kernel.index("i")]
    for axis in range(len(inputs) - 2):
        pairs *= _window_pairs(
            left.shape[inputs.index(str(axis))],
            right.shape[kernel.index(str(axis))],
            out[outputs.index(str(axis))],
            {name: _entry(convolution, name, axis) for name in ("stride", "pad", *_DILATIONS)},
        )
    return 2 * pairs


_DILATIONS = ("lhs_dilate", "rhs_dilate")


def _entry(convolution: Instruction, name: str, axis: int) -> int:
    """Of `window={size=1x4 pad=0_0x3_3}`: of padding, that before the first."""
    window = re.search(r"window=\{([^}]*)\}", convolution.attributes)
    found = re.search(rf"\b{name}=(\S+)", window[1]) if window else None
    if found is None:
        return 0 if name == "pad" else 1
    return int(found[1].split("x")[axis].split("_")[0])


def _window_pairs(inputs: int, taps: int, outputs: int, window: Mapping[str, int]) -> int:
    """How many products of an input and a tap one axis of a convolution has, padding left out."""
    pairs = 0
    for tap in range(taps):
        first = tap * window["rhs_dilate"] - window["pad"]
        for output in range(outputs):
            place = first + output * window["stride"]
            valid = 0 <= place < (inputs - 1) * window["lhs_dilate"] + 1
            pairs += valid and place % window["lhs_dilate"] == 0
    return pairs


def _hbm_bytes(program: Program, computation: Computation, instruction: Instruction) -> int:
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
        return 0
    operands = computation.arrays(instruction.operands)
    if opcode == "fusion":
        return _fusion_bytes(program, computation, instruction)
    if opcode in _SLICES:
        output = instruction.results[1 if opcode == "slice-start" else 0]
        return _in_hbm([output]) + (output.bytes if operands[0].in_hbm else 0)
    if opcode in _UPDATES:
        update = operands[_UPDATES[opcode]]
        return _in_hbm([update]) + (update.bytes if operands[0].in_hbm else 0)
    if opcode.endswith("-start"):  # its results are its operands, and then what it gives
        return _in_hbm(instruction.results)
    return _in_hbm(operands) + _in_hbm(instruction.results)


def _fusion_bytes(program: Program, computation: Computation, fusion: Instruction) -> int:
    """Of each operand what the fusion reads of it: of a layers' stack, one layer."""
    inside = program.computations[fusion.called("calls")[0]]
    moved = 0
    for parameter, name in zip(inside.parameters, fusion.operands, strict=True):
        if computation.instructions[name].results[0].in_hbm:
            moved += _read_bytes(program, inside, parameter)
    results = [inside.root]
    if inside.root.opcode == "tuple":
        results = [inside.instructions[name] for name in inside.root.operands]
    for result, array in zip(results, fusion.results, strict=False):
        if array.in_hbm:
            moved += _written_bytes(program, inside, result)
    return moved


def _read_bytes(program: Program, inside: Computation, source: Instruction) -> int:
    """Slices only, if nothing else is read; nothing of what is updated in place."""
    whole, parts = source.results[0].bytes, 0
    for user in inside.users[source.name]:
        if user.opcode == "bitcast":
            parts += _read_bytes(program, inside, user)
        elif user.opcode == "fusion":
            nested = program.computations[user.called("calls")[0]]
            for parameter, name in zip(nested.parameters, user.operands, strict=True):
                if name == source.name:
                    parts += _read_bytes(program, nested, parameter)
        elif user.opcode in _SLICES and user.operands[0] == source.name:
            parts += user.results[0].bytes
        elif user.opcode not in _UPDATES or user.operands[0] != source.name:
            return whole
    return min(whole, parts)


def _written_bytes(program: Program, inside: Computation, result: Instruction) -> int:
    """What is updated of the array, if it is updated in place; else all of it."""
    if result.opcode == "bitcast":
        return _written_bytes(program, inside, inside.instructions[result.operands[0]])
    if result.opcode == "fusion" and len(result.results) == 1:
        nested = program.computations[result.called("calls")[0]]
        return _written_bytes(program, nested, nested.root)
    if result.opcode in _UPDATES:
        position = _UPDATES[result.opcode]
        return inside.arrays(result.operands[position : position + 1])[0].bytes
    return sum(array.bytes for array in result.results)


def _in_hbm(arrays: Iterable[Array]) -> int:
    return sum(array.bytes for array in arrays if array.in_hbm)


def _collectives(program: Program, step: Step, seen: set[str]) -> Iterator[tuple[str, int]]:
    """Kind and ring bytes of a step's collectives.

    A TPU program may spread one over several fusions, that other work goes on in: they have the
    same chain_id, and `seen` are those found before.
    """
    fused = [(inner, x) for inner in program.inside(step.instruction) for x in
             inner.instructions.values()]  # fmt: skip
    for computation, instruction in [(step.computation, step.instruction), *fused]:
        kind = instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        chain = re.search(r'chain_id="(\d+)"', instruction.attributes)
        if chain:
            if chain[1] in seen:
                continue
            seen.add(chain[1])
        if computation.name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # which is how TPU programs write it
        operands = sum(array.bytes for array in computation.arrays(instruction.operands))
        yield kind, _ring_bytes(kind, operands, _group_size(program, instruction))


def _ring_bytes(kind: str, operands: int, devices: int) -> int:
    """What each device sends for a collective over so many: see `Collective`."""
    match kind:
        case "all-gather":
            return operands * (devices - 1)
        case "all-reduce":
            return 2 * operands * (devices - 1) // devices
        case "reduce-scatter" | "all-to-all" | "ragged-all-to-all":
            return operands * (devices - 1) // devices
    return operands


def _group_size(program: Program, collective: Instruction) -> int:
    """Devices of one group: `{{0,1},{2,3}}`, `[2,2]<=[4]` or `mesh['x'=2,'y'=2] {'x'}`."""
    groups = collective.attributes.partition("replica_groups=")[2]
    if listed := re.match(r"\{\{([\d,]+)\}", groups):
        return len(listed[1].split(","))
    if iota := re.match(r"\[\d+,(\d+)\]", groups):
        return int(iota[1])
    if mesh := re.match(r"mesh\[([^\]]*)\] \{([^}]*)\}", groups):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[name]) for name, part in axes)
    return program.devices
