"""Reads cost estimates out of optimised HLO text."""

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
    for step in Program(text).steps():
        estimate = _CYCLES.search(step.instruction.attributes)
        total += step.times * int(estimate[1]) if estimate else 0
    return total
