"""Reads costs out of optimised HLO text."""

import re

from train.plan.hlo import Program

_CYCLES = re.compile(r'estimated_cycles":"(\d+)"')


def estimated_cycles(text: str) -> int:
    """XLA's own estimate of a program's cycles: over all operations, times the loops' trips.

    Pallas kernels have none and count as 0.

    Raises:
        ValueError: a loop's trip count is not in the text.
    """
    total = 0
    for executed in Program(text).executed():
        estimate = _CYCLES.search(executed.instruction.attributes)
        total += executed.times * int(estimate[1]) if estimate else 0
    return total


_FREE = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element")


def bytes_moved(text: str) -> int:
    """What a program's operations read and write: of each, every array that it takes or gives once.

    What several blocks of a kernel read is taken to come from a cache after the first.

    Raises:
        ValueError: a loop's trip count is not in the text.
    """
    total = 0
    for executed in Program(text).executed():
        instruction = executed.instruction
        if instruction.opcode not in _FREE:
            operands = tuple(dict.fromkeys(instruction.operands))
            arrays = *executed.computation.arrays(operands), *instruction.results
            total += executed.times * sum(array.bytes for array in arrays)
    return total
