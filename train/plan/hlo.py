"""Reads the text of a compiled XLA program: what runs, on which arrays, and how often."""

import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_END = re.compile(r"^\}(, .*)?$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_PARTITIONS = re.compile(r"num_partitions=(\d+)")
# Opcodes whose called computations run as they stand there, an instruction at a time.
_CALLERS = {"call": "to_apply", "async-start": "calls", "conditional": "branch_computations"}


@dataclass(frozen=True)
class Array:
    """One array of a program.

    Attributes:
        dtype: as XLA writes it, e.g. `bf16`.
        shape: of one device's part.
        in_hbm: whether it lies in the device's main memory, not in a core's.
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
        results: the arrays that it gives, tuples flattened.
        operands: names of instructions of the same computation.
        attributes: the rest of the line.
    """

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str

    def called(self, attribute: str) -> list[str]:
        """The computations that an attribute names, e.g. `calls=%a` or `branches={%a, %b}`."""
        found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes)
        return _NAME.findall(found[1]) if found else []


@dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order in which they run; the last is the root."""

    name: str
    instructions: Mapping[str, Instruction]
    root: Instruction

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        """In the order of the caller's operands."""
        found = [x for x in self.instructions.values() if x.opcode == "parameter"]
        return sorted(found, key=lambda x: int(x.attributes.split(")")[0]))

    @functools.cached_property
    def users(self) -> Mapping[str, list[Instruction]]:
        """Instructions by the operand that they take."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in set(instruction.operands):
                users[operand].append(instruction)
        return users

    def arrays(self, names: tuple[str, ...]) -> list[Array]:
        """The results of these instructions."""
        return [array for name in names for array in self.instructions[name].results]


@dataclass(frozen=True)
class Step:
    """An instruction that a run of the program comes to.

    Attributes:
        computation: where it stands.
        instruction: never a loop or a call: those are gone into.
        times: how often.
    """

    computation: Computation
    instruction: Instruction
    times: int


class Program:
    """A compiled program, from `jax.stages.Compiled.as_text()`.

    Attributes:
        computations: by name.
        entry: the one that runs.
        devices: how many run it together.
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
                lines[-1] += line  # one of its attributes is a text of several lines
        if not entry:
            raise ValueError("this is no text of an XLA program: it has no ENTRY")
        self.entry = self.computations[entry]

    def steps(self) -> Iterator[Step]:
        """What one run does, in order; of a conditional, every branch.

        Raises:
            ValueError: a loop's trip count is not in the text.
        """
        return self._steps(self.entry, 1)

    def inside(self, instruction: Instruction) -> list[Computation]:
        """The computations that a fusion is made of, those of fusions in it too."""
        found = [self.computations[name] for name in instruction.called("calls")]
        for computation in found:
            for nested in computation.instructions.values():
                if nested.opcode == "fusion":
                    found += [self.computations[name] for name in nested.called("calls")]
        return found

    def _steps(self, computation: Computation, times: int) -> Iterator[Step]:
        for instruction in computation.instructions.values():
            if instruction.opcode == "while":
                body = self.computations[instruction.called("body")[0]]
                yield from self._steps(body, times * self._trips(instruction))
            elif instruction.opcode in _CALLERS:
                for name in instruction.called(_CALLERS[instruction.opcode]):
                    yield from self._steps(self.computations[name], times)
            else:
                yield Step(computation, instruction, times)

    def _trips(self, loop: Instruction) -> int:
        known = _TRIPS.search(loop.attributes)
        if known:
            return int(known[1])
        counter, bound = self._counter(loop)
        body = self.computations[loop.called("body")[0]]
        return -(-bound // _increment(body, counter))

    def _counter(self, loop: Instruction) -> tuple[int, int]:
        """Which of the loop's arrays counts, and where it ends; all count from 0."""
        condition = self.computations[loop.called("condition")[0]]
        constants = [x for x in condition.instructions.values() if x.opcode == "constant"]
        reads = [x for x in condition.instructions.values() if x.opcode == "get-tuple-element"]
        if len(constants) != 1 or len(reads) != 1:
            raise ValueError(f"no trip count for the loop {loop.name}")
        return _index(reads[0]), _constant(constants[0])


def _increment(body: Computation, counter: int) -> int:
    """What is added to the counter each time; 1 if the text does not say."""
    update = body.instructions[body.root.operands[counter]]
    if update.opcode == "add":
        operands = [body.instructions[name] for name in update.operands]
        steps = [_constant(x) for x in operands if x.opcode == "constant"]
        if len(steps) == 1:
            return steps[0]
    return 1


def _index(read: Instruction) -> int:
    """Of a get-tuple-element."""
    found = re.search(r"\bindex=(\d+)", read.attributes)
    assert found is not None, read
    return int(found[1])


def _constant(constant: Instruction) -> int:
    return int(constant.attributes.split(")")[0])


def _computation(name: str, lines: list[str]) -> Computation:
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
    """From `TYPE opcode(operands), attributes`; of a parameter or constant, the attributes begin
    with what stands in the parentheses.
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
    """Where the parenthesis opened at `opening` closes."""
    depth = 0
    for position in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if depth == 0:
            return position
    raise ValueError(f"no closing parenthesis in {text[:200]}")


def _arrays(text: str) -> tuple[Array, ...]:
    return tuple(
        Array(dtype, tuple(int(n) for n in shape.split(",") if n), "S(" not in layout)
        for dtype, shape, layout in _ARRAY.findall(text)
    )
