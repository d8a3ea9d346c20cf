"""Reads cost estimates out of optimised HLO text."""

import re

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CYCLES = re.compile(r'estimated_cycles":"(\d+)"')


def estimated_cycles(text: str) -> int:
    """XLA's own estimate of a program's cycles: over all operations, times the loops' trips.

    Pallas kernels have none and count as 0.

    Raises:
        ValueError: a loop's trip count is not in the text.
    """
    computations: dict[str, list[str]] = {}
    entry = ""
    for line in text.splitlines():
        match = _COMPUTATION.match(line)
        if match:
            name = match[2]
            computations[name] = []
            entry = name if match[1] else entry
        elif line.startswith("  ") and computations:
            computations[name].append(line)

    def total(name: str) -> int:
        cycles = 0
        for line in computations[name]:
            loop, estimate = _WHILE.search(line), _CYCLES.search(line)
            if loop:
                cycles += _trip_count(line, computations[loop[1]]) * total(loop[2])
            elif estimate:
                cycles += int(estimate[1])
        return cycles

    return total(entry)


def _trip_count(line: str, condition: list[str]) -> int:
    known = _TRIPS.search(line)
    if known:
        return int(known[1])
    constants = re.findall(r" constant\((\d+)\)", "\n".join(condition))
    if len(constants) != 1:
        raise ValueError(f"no trip count in {line.strip()[:200]}")
    return int(constants[0])
