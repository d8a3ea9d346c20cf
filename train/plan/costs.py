"""Counts what a compiled program does: matrix products, memory traffic and collectives."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from train.plan.hlo import Array, Computation, ExecutedInstruction, Instruction, Program

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# These move nothing: they name arrays that are there already, or make constants on the chip.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "opt-barrier", "add-dependency", "iota", "broadcast",
}  # fmt: skip
_SLICES = {"slice", "dynamic-slice", "slice-start", "gather"}
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # opcode -> the operand that is written


@dataclass(frozen=True)
class KernelCost:
    """What one call of a Pallas kernel does: XLA cannot see into it.

    Attributes:
        flops: floating-point operations of its matrix products.
        bytes: bytes that it moves in and out of main memory.
    """

    flops: int
    bytes: int


@dataclass(frozen=True)
class Collective:
    """The collectives of one kind, for one device and one run of the program.

    Attributes:
        kind: one of COLLECTIVES.
        count: number of collectives.
        bytes: bytes that the device sends in all, if each collective is done as a ring.
    """

    kind: str
    count: int
    bytes: int


@dataclass(frozen=True)
class Costs:
    """What one device does in one run of the program.

    Attributes:
        flops: operations of all matrix products, with recomputation and kernels.
        hbm_bytes: bytes of every array that an operation reads from or writes to main memory. It is
            an upper estimate, as caches and what the compiler keeps on the chip may save some.
        collectives: by kind, most bytes first; within a slice.
        kernels: number of calls by the kernel's name.
        between_slices: likewise over the network that joins slices.
    """

    flops: int
    hbm_bytes: int
    collectives: tuple[Collective, ...]
    kernels: Mapping[str, int]
    between_slices: tuple[Collective, ...] = ()

    @property
    def sent_bytes(self) -> int:
        return sum(collective.bytes for collective in self.collectives)

    @property
    def bytes_between_slices(self) -> int:
        return sum(collective.bytes for collective in self.between_slices)


def count_costs(program: Program, kernels: Mapping[str, KernelCost], num_slices: int = 1) -> Costs:
    """Adds up what the program executes.

    Args:
        program: the compiled program.
        num_slices: of the machine that it is for; each has an equal part of the devices.
        kernels: the cost of a kernel's call, by its name as `kernel_name` returns it. Other custom
            calls count as no operations, and their arrays once.
    """
    flops, moved = 0, 0
    calls: Counter[str] = Counter()
    within, between = _Sent(), _Sent()
    seen: set[str] = set()
    for executed in program.executed():
        computation, instruction, times = executed
        kernel = kernels.get(kernel_name(instruction))
        if kernel:
            calls[kernel_name(instruction)] += times
            flops += times * kernel.flops
            moved += times * kernel.bytes
            continue
        flops += times * sum(_flops(computation, instruction))
        moved += times * _hbm_bytes(program, computation, instruction)
        for fused in program.inside(instruction):
            flops += times * sum(sum(_flops(fused, x)) for x in fused.instructions.values())
        for kind, ring_bytes in _collectives(program, executed, seen):
            within.add(kind, times, ring_bytes)
        if kind := _kind_between_slices(instruction):
            operand = computation.arrays(instruction.operands[:1])[0].bytes
            between.add(kind, times, _ring_bytes(kind, operand, num_slices))
    return Costs(flops, moved, within.collectives(), dict(calls), between.collectives())


class _Sent:
    """What is sent, by kind of collective."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()

    def add(self, kind: str, times: int, ring_bytes: int) -> None:
        self._counts[kind] += times
        self._bytes[kind] += times * ring_bytes

    def collectives(self) -> tuple[Collective, ...]:
        order = self._bytes.most_common()
        return tuple(Collective(kind, self._counts[kind], total) for kind, total in order)


def kernel_name(instruction: Instruction) -> str:
    """Returns the name of the Pallas kernel that an instruction calls, or "" if it calls none.

    The name is `nha_forward` for the instruction `nha_forward.2`.
    """
    target = re.search(r'custom_call_target="(\w+)"', instruction.attributes)
    if instruction.opcode != "custom-call" or not target or target[1] not in PALLAS_TARGETS:
        return ""
    if found := re.search(r'op_name="[^"]*?(\w+)/mpmd_map"', instruction.attributes):
        return found[1]  # programs for GPUs name it here
    return re.sub(r"(\.(clone|\d+))*$", "", instruction.name)


PALLAS_TARGETS = ("tpu_custom_call", "mosaic_gpu_v2")


def _flops(computation: Computation, instruction: Instruction) -> Iterator[int]:
    """Counts a matrix product as 2 operations for each pair that is multiplied, all else as 0."""
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
    """Counts cuDNN's causal attention: T x T / 2 pairs; 2 products forward and 5 backward."""
    query, key = computation.arrays(call.operands[:2])  # [B, T, heads, K]
    pairs = query.size * key.shape[1] // 2
    return 2 * pairs * (5 if "Backward" in call.attributes else 2)


def _dot_flops(computation: Computation, dot: Instruction, contracted: str) -> int:
    left = computation.arrays(dot.operands[:1])[0]
    found = re.search(contracted, dot.attributes)
    axes = [int(axis) for axis in re.findall(r"\d+", found[1])] if found else []
    return 2 * dot.results[0].size * math.prod(left.shape[axis] for axis in axes)


def _ragged_dot_flops(computation: Computation, call: Instruction) -> int:
    """Counts XLA's own TPU kernels that multiply groups of rows, each by a matrix of its own.

    The three arrays are rows [N, D], matrices [groups, D, I] and rows [N, I], and any of the three
    may be the result.
    """
    arrays = [*computation.arrays(call.operands), *call.results]
    rows = [array.shape[0] for array in arrays if len(array.shape) == 2]
    matrices = [array.shape[1:] for array in arrays if len(array.shape) == 3]
    if not rows or not matrices:  # the call that only prepares the groups
        return 0
    return 2 * rows[0] * math.prod(matrices[0])


def _convolution_flops(computation: Computation, convolution: Instruction) -> int:
    """Counts a convolution, as which TPU programs write matrix products, without its padding."""
    left, right = computation.arrays(convolution.operands[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    assert labels is not None, convolution.name
    inputs, kernel, outputs = labels.groups()
    out = convolution.results[0].shape
    pairs = out[outputs.index("b")] * out[outputs.index("f")] * right.shape[kernel.index("i")]
    for axis in range(len(inputs) - 2):
        pairs *= _tap_pairs(
            left.shape[inputs.index(str(axis))],
            right.shape[kernel.index(str(axis))],
            out[outputs.index(str(axis))],
            {name: _entry(convolution, name, axis) for name in ("stride", "pad", *_DILATIONS)},
        )
    return 2 * pairs


_DILATIONS = ("lhs_dilate", "rhs_dilate")


def _entry(convolution: Instruction, name: str, axis: int) -> int:
    """Reads one axis of an option of `window={size=1x4 pad=0_0x3_3}`; of pad, the first number."""
    window = re.search(r"window=\{([^}]*)\}", convolution.attributes)
    found = re.search(rf"\b{name}=(\S+)", window[1]) if window else None
    if found is None:
        return 0 if name == "pad" else 1
    return int(found[1].split("x")[axis].split("_")[0])


def _tap_pairs(inputs: int, taps: int, outputs: int, options: Mapping[str, int]) -> int:
    """Counts the products of an input and a tap along one axis of a convolution."""
    pairs = 0
    for tap in range(taps):
        first = tap * options["rhs_dilate"] - options["pad"]
        for output in range(outputs):
            position = first + output * options["stride"]
            inside = 0 <= position < (inputs - 1) * options["lhs_dilate"] + 1
            pairs += inside and position % options["lhs_dilate"] == 0
    return pairs


def _hbm_bytes(program: Program, computation: Computation, instruction: Instruction) -> int:
    """Counts the bytes that an instruction reads from and writes to main memory."""
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
    if opcode in ("send", "recv"):  # the first result is what is sent or received
        return _in_hbm(instruction.results[:1])
    if opcode.endswith("-start"):  # its results list its operands again, then what it returns
        return _in_hbm(instruction.results)
    return _in_hbm(operands) + _in_hbm(instruction.results)


def _fusion_bytes(program: Program, computation: Computation, fusion: Instruction) -> int:
    """Counts of each operand only what the fusion reads of it: one layer of a stack of layers."""
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
    """Counts the slices if only slices are read, and nothing of an array updated in place."""
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
    """Counts what is updated of an array if that happens in place, or else all of it."""
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


def _collectives(
    program: Program, executed: ExecutedInstruction, seen: set[str]
) -> Iterator[tuple[str, int]]:
    """Gives the kind and the ring bytes of the collectives that an instruction does.

    A TPU program may spread a collective over several fusions, which do other work meanwhile. They
    have the same chain_id; `seen` holds those found so far, and new ones are added to it.
    """
    fused = [(inner, x) for inner in program.inside(executed.instruction) for x in
             inner.instructions.values()]  # fmt: skip
    for computation, instruction in [(executed.computation, executed.instruction), *fused]:
        kind = instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        chain = re.search(r'chain_id="(\d+)"', instruction.attributes)
        if chain:
            if chain[1] in seen:
                continue
            seen.add(chain[1])
        if computation.name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # TPU programs write it as an all-reduce and a slice
        operands = sum(array.bytes for array in computation.arrays(instruction.operands))
        yield kind, _ring_bytes(kind, operands, _group_size(program, instruction))


def _kind_between_slices(instruction: Instruction) -> str:
    """Returns the kind of collective between slices that an instruction sends for, or "".

    TPU programs leave them to the hosts: each is a send and a receive, which say what they are of.
    """
    found = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
    if instruction.opcode != "send" or found is None:
        return ""
    return found[1].lower().replace("_", "-")


def _ring_bytes(kind: str, operands: int, devices: int) -> int:
    """Returns the bytes that each device sends for a collective over `devices`, done as a ring."""
    match kind:
        case "all-gather":
            return operands * (devices - 1)
        case "all-reduce":
            return 2 * operands * (devices - 1) // devices
        case "reduce-scatter" | "all-to-all" | "ragged-all-to-all":
            return operands * (devices - 1) // devices
    return operands


def _group_size(program: Program, collective: Instruction) -> int:
    """Reads how many devices a group has.

    Programs write groups as `{{0,1},{2,3}}`, `[2,2]<=[4]` or `mesh['x'=2,'y'=2] {'x'}`.
    """
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
