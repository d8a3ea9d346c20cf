"""Reads the text of a compiled XLA program (HLO): what runs, on which arrays, and how often."""

import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_END = re.compile(r"^\}(, .*)?$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_PARTITIONS = re.compile(r"num_partitions=(\d+)")
# Opcodes whose called computations run instruction by instruction -> the attribute that names them.
_CALLERS = {"call": "to_apply", "async-start": "calls", "conditional": "branch_computations"}


@dataclass(frozen=True)
class Array:
    """One array of a program.

    Attributes:
        dtype: as XLA writes it, e.g. `bf16`.
        shape: shape of one device's part.
        in_hbm: whether it lies in the device's main memory and not in a core's.
    """

    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)
        return self.size * (8 if self.dtype == "pred" else int(bits[0]) if bits else 0) // 8


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: unique in its computation.
        opcode: e.g. `fusion`.
        results: the arrays that it returns; tuples are flattened.
        operands: names of instructions of the same computation.
        attributes: the rest of the line.
    """

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str

    def called(self, attribute: str) -> list[str]:
        """Returns the computations that an attribute names: `calls=%a` or `branches={%a, %b}`."""
        found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes)
        return _NAME.findall(found[1]) if found else []


@dataclass(frozen=True)
class Computation:
    """A function of the program.

    Attributes:
        name: unique in the program.
        instructions: by name, in the order in which they run.
        root: the instruction whose result the computation returns.
    """

    name: str
    instructions: Mapping[str, Instruction]
    root: Instruction

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        """The parameters, in the order of the caller's operands."""
        found = [x for x in self.instructions.values() if x.opcode == "parameter"]
        return sorted(found, key=lambda x: int(x.attributes.split(")")[0]))

    @functools.cached_property
    def users(self) -> Mapping[str, list[Instruction]]:
        """The instructions that take a result, by the name of the instruction that made it."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in set(instruction.operands):
                users[operand].append(instruction)
        return users

    def arrays(self, names: tuple[str, ...]) -> list[Array]:
        """Returns the results of these instructions."""
        return [array for name in names for array in self.instructions[name].results]


class ExecutedInstruction(NamedTuple):
    """An instruction that runs when the program does.

    Attributes:
        computation: the computation that it is in.
        instruction: neither a loop nor a call, as what they run is listed instead.
        times: how often it runs.
    """

    computation: Computation
    instruction: Instruction
    times: int


class Program:
    """A compiled program, read from `jax.stages.Compiled.as_text()`.

    Attributes:
        computations: all computations by name.
        entry: the computation that a run starts with.
        devices: how many devices run the program together.
    """

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        lines: list[str] | None = None
        header, partitions = "", _PARTITIONS.search(text.partition("\n")[0])
        self.devices = int(partitions[1]) if partitions else 1
        entry = ""
        for line in text.splitlines():
            match = _COMPUTATION.match(line)
            if match and " = " not in line.split("{")[0].split("(")[0]:
                header, lines = match[2], []
                entry = header if match[1] else entry
            elif lines is None:
                continue
            elif _END.match(line):
                self.computations[header] = _computation(header, lines)
                lines = None
            elif line.startswith("  ") or not lines:
                lines.append(line)
            else:
                lines[-1] += line  # an attribute of the instruction goes on over several lines
        if not entry:
            raise ValueError("this is no text of an XLA program: it has no ENTRY")
        self.entry = self.computations[entry]

    def executed(self) -> Iterator[ExecutedInstruction]:
        """Lists what one run executes, in order, with all branches of a conditional.

        Raises:
            ValueError: the text does not say how often a loop runs.
        """
        return self._executed(self.entry, 1)

    def inside(self, instruction: Instruction) -> list[Computation]:
        """Returns the computations that a fusion is made of, with those of fusions inside it."""
        found = [self.computations[name] for name in instruction.called("calls")]
        for computation in found:
            for nested in computation.instructions.values():
                if nested.opcode == "fusion":
                    found += [self.computations[name] for name in nested.called("calls")]
        return found

    def _executed(self, computation: Computation, times: int) -> Iterator[ExecutedInstruction]:
        for instruction in computation.instructions.values():
            if instruction.opcode == "while":
                body = self.computations[instruction.called("body")[0]]
                yield from self._executed(body, times * self._trips(instruction))
            elif instruction.opcode in _CALLERS:
                for name in instruction.called(_CALLERS[instruction.opcode]):
                    yield from self._executed(self.computations[name], times)
            else:
                yield ExecutedInstruction(computation, instruction, times)

    def _trips(self, loop: Instruction) -> int:
        """Returns how often a loop runs."""
        known = _TRIPS.search(loop.attributes)
        if known:
            return int(known[1])
        counter, bound = self._counter(loop)
        body = self.computations[loop.called("body")[0]]
        return -(-bound // _increment(body, counter))

    def _counter(self, loop: Instruction) -> tuple[int, int]:
        """Finds which of a loop's arrays counts its rounds from 0, and where the count ends."""
        condition = self.computations[loop.called("condition")[0]]
        constants = [x for x in condition.instructions.values() if x.opcode == "constant"]
        reads = [x for x in condition.instructions.values() if x.opcode == "get-tuple-element"]
        if len(constants) != 1 or len(reads) != 1:
            raise ValueError(f"no trip count for the loop {loop.name}")
        return _index(reads[0]), _constant(constants[0])


def _increment(body: Computation, counter: int) -> int:
    """Returns what is added to the counter in each round; 1 if the text does not say."""
    update = body.instructions[body.root.operands[counter]]
    if update.opcode == "add":
        operands = [body.instructions[name] for name in update.operands]
        added = [_constant(x) for x in operands if x.opcode == "constant"]
        if len(added) == 1:
            return added[0]
    return 1


def _index(read: Instruction) -> int:
    """Returns which element a get-tuple-element reads."""
    found = re.search(r"\bindex=(\d+)", read.attributes)
    assert found is not None, read
    return int(found[1])


def _constant(constant: Instruction) -> int:
    """Returns the value of an integer constant."""
    return int(constant.attributes.split(")")[0])


def _computation(name: str, lines: list[str]) -> Computation:
    """Reads a computation from its lines."""
    instructions, root = {}, None
    for line in lines:
        match = _INSTRUCTION.match(line)
        if match:
            instruction = _instruction(match[2], match[3])
            instructions[instruction.name] = instruction
            root = instruction if match[1] or root is None else root
    assert root is not None, f"computation {name} is empty"
    return Computation(name, instructions, root)


def _instruction(name: str, text: str) -> Instruction:
    """Reads an instruction from `TYPE opcode(operands), attributes`.

    For a parameter or a constant, the attributes begin with what is in the parentheses.
    """
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    results, rest = _arrays(text[:end]), text[end:].lstrip()
    opening = rest.index("(")
    opcode, closing = rest[:opening], _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    if opcode in ("parameter", "constant"):
        return Instruction(name, opcode, results, (), rest[opening + 1 :])
    return Instruction(name, opcode, results, tuple(_NAME.findall(inside)), rest[closing + 1 :])


def _closing(text: str, opening: int) -> int:
    """Finds where the parenthesis that opens at `opening` closes."""
    depth = 0
    for position in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if depth == 0:
            return position
    raise ValueError(f"no closing parenthesis in {text[:200]}")


def _arrays(text: str) -> tuple[Array, ...]:
    """Reads all arrays that a type names."""
    return tuple(
        Array(dtype, tuple(int(n) for n in shape.split(",") if n), "S(" not in placement)
        for dtype, shape, placement in _ARRAY.findall(text)
    )
