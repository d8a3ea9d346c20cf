"""Runs `nha plan`: compiles the step and prints the plan, and advice if it does not fit."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from train.load_config import load_config
from train.plan.advice import Overrides, as_arguments, find_advice
from train.plan.compiling import CompiledStep, compile_steps, dearest
from train.plan.report import as_json, stages_as_json, stages_table, table
from train.plan.topology import find_topology

DOES_NOT_FIT = 1


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The options of `nha plan`.

    Attributes:
        config: path of a YAML file.
        overrides: (dotted key, YAML text) pairs.
        topology: the machine, e.g. `v5p:4x4x4`.
        mfu: share of the chips' peak to assume, above 0.
        json: whether to print JSON instead of a table.
        advice: whether to look for a change that makes the step fit if it does not.
    """

    config: str
    overrides: Sequence[tuple[str, str]]
    topology: str
    mfu: float
    json: bool
    advice: bool


def run_plan(options: PlanOptions) -> int:
    """Prints the plan; returns 0 if the step fits, `DOES_NOT_FIT` if not.

    Of a run with several phases it is the plan of the one that needs the most memory, after a line
    for each.

    Raises:
        ConfigError: there is no such machine, or the configuration is wrong or does not suit it.
    """
    load_config(options.config, options.overrides)  # reports its mistakes before the long wait
    topology = find_topology(options.topology)

    def compile_with(overrides: Overrides) -> CompiledStep:
        return dearest(steps_with(overrides))

    def steps_with(overrides: Overrides) -> tuple[CompiledStep, ...]:
        added = [(key, json.dumps(value)) for key, value in overrides.items()]
        return compile_steps(load_config(options.config, [*options.overrides, *added]), topology)

    _progress(f"compiling for {topology.name}")
    steps = steps_with({})
    compiled = dearest(steps)
    figures = as_json(compiled, options.mfu)
    if len(steps) > 1:
        figures["stages"] = stages_as_json(steps, options.mfu)
        if not options.json:
            print(f"{stages_table(steps, options.mfu)}\n\nthe step that needs the most memory:")
    if not options.json:
        print(table(compiled, options.mfu), flush=True)
    if not compiled.fits and options.advice:
        _progress("it does not fit; trying what would")
        advice = find_advice(compiled, compile_with, _progress)
        arguments = None if advice is None else as_arguments(advice[0])
        figures["advice"] = None if advice is None else {
            "arguments": arguments, "plan": as_json(advice[1], options.mfu)
        }  # fmt: skip
        if not options.json:
            if advice is None:
                print("\nNothing that was tried makes it fit: it needs more or larger chips.")
            else:
                print(f"\nIt fits with {arguments}:\n\n{table(advice[1], options.mfu)}")
    if options.json:
        print(json.dumps(figures, indent=2))
    return 0 if compiled.fits else DOES_NOT_FIT


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
