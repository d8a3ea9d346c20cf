"""`nha plan`: what a training step takes on a machine that is not there."""

import argparse
import os
from collections.abc import Sequence

from train.commands.train import parse_overrides
from train.errors import ConfigError, explain_refusal

_DESCRIPTION = """\
Compiles the training step of a configuration for a machine that is not there, and says what the
step takes: memory, arithmetic, memory traffic, collectives, and the least time that each of them
needs. If the step does not fit, tries what would make it fit. Nothing is trained, and the corpus is
not read.

A machine is TPUs by their kind and shape (v5e:4x4, v5p:2x2x2, v6e:4x4, tpu7x:2x2x1, several slices
as 2*v5e:16x16; this needs the extra `tpu`) or the GPUs of one host (cuda:8xH200; A100, H100, H200
or B200; the extra `cuda`)."""


def add_parser(commands: "argparse._SubParsersAction") -> None:
    parser = commands.add_parser(
        "plan",
        help="what a training step takes on a machine, before renting it",
        usage="nha plan CONFIG --topology TOPOLOGY [options] [--key=value ...]",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        takes_overrides=True,
    )
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="a YAML file, or the name of one that comes with it, e.g. nha-340m",
    )
    parser.add_argument(
        "--topology", required=True, metavar="TOPOLOGY", help="the machine, e.g. v5p:4x4x4"
    )
    parser.add_argument(
        "--mfu",
        type=float,
        default=0.4,
        metavar="SHARE",
        help="share of the chips' peak to assume when estimating tokens a day (default: 0.4)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--no-advice",
        action="store_true",
        help="do not try what would make the step fit (each try compiles it once)",
    )


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    if not 0 < options.mfu <= 1:
        raise ConfigError(f"--mfu {options.mfu}: expected a share above 0, at most 1")
    overrides = parse_overrides(rest)
    _set_environment()

    from train.plan.command import PlanOptions, run_plan

    chosen = PlanOptions(
        config=options.config,
        overrides=overrides,
        topology=options.topology,
        mfu=options.mfu,
        json=options.json,
        advice=not options.no_advice,
    )
    with explain_refusal():
        return run_plan(chosen)


def _set_environment() -> None:
    """Sets what jax and libtpu must find when they are loaded; libtpu's variables only if unset.

    jax itself is to use the CPU. libtpu must not ask the cloud which TPU this machine has, must not
    complain that it does not know, and must not keep other processes out.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
