"""Reads the schedule of one Pallas kernel out of libtpu's LLO dumps.

A dump folder holds, per HLO operation, `<stamp>-<name>-<pass>-final_bundles.txt` (one instruction
bundle an address) and `...-final_hlo-static-per-bundle-utilization.txt` (what each address issues).
A loop's body stands there once, so the bundles of the grid loop are the cycles of a grid step, as
far as the scheduler knows: time in the matrix units and HBM has to be bounded apart.
"""

import dataclasses
import re
from pathlib import Path

_FINAL = re.compile(r"^(\d+-(?P<name>.+)-)\d+-final_bundles\.txt$")
_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:[\s>]*\{")
_REGION = re.compile(r"(?:Start region|Start/End empty region) (\d+)")
_BRANCH = re.compile(r"sbr\.rel (?:\([^)]*\) )?target = \$region(\d+)")
_VMEM = re.compile(r"space=vmem, size = (0x[0-9a-f]+|0), offset = (0x[0-9a-f]+|0)")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """One kernel as scheduled; counts are of one pass through the grid loop.

    Attributes:
        bundles: instruction bundles.
        issued: per unit of libtpu's table (VALU, VLOAD ...), the slots used.
        capacity: per unit, the slots a bundle has.
        matmuls: `vmatmul` instructions.
        vmem: bytes, of the whole kernel.
        inner_loops: loops inside the grid loop, whose bodies are counted once.
    """

    bundles: int
    issued: dict[str, int]
    capacity: dict[str, int]
    matmuls: int
    vmem: int
    inner_loops: int

    def bound(self, unit: str) -> float:
        """Cycles a grid step that this unit alone needs."""
        return self.issued[unit] / self.capacity[unit]


def read_schedules(dumps: Path, prefixes: tuple[str, ...]) -> dict[str, Schedule]:
    """The schedules of the operations whose names start with a prefix, by name ("nha_forward.1").

    Raises:
        ValueError: a dump does not read as expected; the message says which file and why.
    """
    schedules = {}
    for bundles in sorted(dumps.iterdir()):
        match = _FINAL.match(bundles.name)
        if match and match["name"].startswith(prefixes) and "schedule-analysis" not in bundles.name:
            passes = sorted(dumps.glob(f"{match[1]}[0-9]*"))
            utilization = _one(passes, "-final_hlo-static-per-bundle-utilization.txt")
            allocations = _one(passes, "-post-delay-converter.txt")
            schedules[match["name"]] = _read(bundles, utilization, allocations)
    return schedules


def _one(files: list[Path], ending: str) -> Path:
    found = [file for file in files if file.name.endswith(ending)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} dumps end in {ending!r} among {[f.name for f in files]}")
    return found[0]


def _read(bundles_file: Path, utilization_file: Path, allocations_file: Path) -> Schedule:
    bundles = _read_bundles(bundles_file)
    capacity, rows = _read_utilization(utilization_file)
    if len(rows) != len(bundles):
        raise ValueError(f"{utilization_file.name}: {len(rows)} rows, {len(bundles)} bundles")
    loops = _loops(bundles)
    # The grid is one loop, however many axes it has; a grid of one step is no loop at all.
    first, last = max(loops, key=lambda loop: loop[1] - loop[0], default=(0, len(bundles) - 1))
    body = rows[first : last + 1]
    vmem = _VMEM.findall(allocations_file.read_text())
    return Schedule(
        bundles=len(body),
        issued={unit: sum(row[i] for row in body) for i, unit in enumerate(capacity)},
        capacity=capacity,
        matmuls=sum(text.count("vmatmul.") for text in bundles[first : last + 1]),
        vmem=max((int(size, 0) + int(offset, 0) for size, offset in vmem), default=0),
        inner_loops=sum(first <= start and end <= last for start, end in loops) - bool(loops),
    )


def _read_bundles(file: Path) -> list[str]:
    """The text of each bundle, by address."""
    bundles: list[str] = []
    for line in file.read_text().splitlines():
        match = _BUNDLE.match(line)
        if match:
            if int(match[1], 16) != len(bundles):
                raise ValueError(f"{file.name}: address {match[1]} follows {len(bundles)} bundles")
            bundles.append(line)
        elif bundles:
            bundles[-1] += line
    return bundles


def _read_utilization(file: Path) -> tuple[dict[str, int], list[list[int]]]:
    """The slots a bundle has per unit, and the slots used, per bundle and unit."""
    lines = file.read_text().splitlines()
    units = next(re.split(r",\s*", line.strip()) for line in lines if "VALU" in line)
    numbers = [[int(x) for x in line.split()] for line in lines if re.fullmatch(r"[\s\d]+", line)]
    capacity, *rows = (row for row in numbers if row)
    if {len(row) for row in (capacity, *rows)} != {len(units)}:
        raise ValueError(f"{file.name}: rows do not have the {len(units)} columns {units}")
    return dict(zip(units, capacity, strict=True)), rows


def _loops(bundles: list[str]) -> list[tuple[int, int]]:
    """First and last address of each loop: a branch back to where a region starts."""
    start: dict[str, int] = {}
    for address, text in enumerate(bundles):
        for region in _REGION.findall(text):
            start.setdefault(region, address)
    return [
        (start[region], address)
        for address, text in enumerate(bundles)
        for region in _BRANCH.findall(text)
        if start.get(region, len(bundles)) <= address
    ]
