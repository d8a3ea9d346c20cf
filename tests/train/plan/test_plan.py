"""`nha plan` without a compiler: its configurations, mistakes, arithmetic and advice."""

import dataclasses
import importlib.util
import re
import shlex
from typing import Any

import jax
import pytest
from jax.errors import JaxRuntimeError

import nha_jax
from tests.support.paths import CONFIGS
from tests.support.train.tiny_run import Nha
from train.cli import main
from train.commands.train import parse_overrides
from train.devices.chips import CHIPS, GIB
from train.devices.mesh import MESH_AXES
from train.errors import ConfigError
from train.load_config import load_config
from train.plan import compiling
from train.plan.advice import MOST_TRIES, Overrides, as_arguments, find_advice
from train.plan.compiling import CompiledStep, Memory, dearest, layer_kinds
from train.plan.costs import Collective, Costs
from train.plan.report import as_json, speed_of, stages_as_json, stages_table, table
from train.plan.topology import Topology, needed_memory

# config -> billions of tokens
TOKENS = {"nha-340m.yaml": 16.1, "nha-1.3b.yaml": 100.0, "nha-1.3b-long.yaml": 100.0}


@pytest.mark.parametrize("name", TOKENS)
def test_published_recipes(name: str) -> None:
    config = load_config(str(CONFIGS / name))
    tokens = config.steps * config.batch_size * config.data.sequence_length
    assert round(tokens / 1e9, 1) == TOKENS[name]
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.warmup_steps) == (3e-4, 1024)
    assert config.model.vocab_size == 32000


def baselines() -> list[tuple[str, str]]:
    """(file, arguments) of every baseline that a file's header names."""
    return [
        (name, line)
        for name in TOKENS
        for line in re.findall(r"^# +(--run=.*)$", (CONFIGS / name).read_text(), re.M)
    ]


@pytest.mark.parametrize(("name", "line"), baselines(), ids=str)
def test_baselines_of_the_same_file(name: str, line: str) -> None:
    base = load_config(str(CONFIGS / name))
    config = load_config(str(CONFIGS / name), parse_overrides(shlex.split(line)))
    assert config.run != base.run
    assert dataclasses.replace(config, run=base.run, model=base.model) == base
    assert config.model != base.model


def test_every_file_has_its_baselines() -> None:
    models = [
        (name, load_config(str(CONFIGS / name), parse_overrides(shlex.split(line))).model)
        for name, line in baselines()
    ]
    windows = {(name, model.window_size) for name, model in models}
    assert {(name, 0) for name in TOKENS} <= windows
    assert {("nha-340m.yaml", None), ("nha-1.3b.yaml", None)} <= windows
    assert {name for name, model in models if model.num_slots == 0} == set(TOKENS)


# (arguments, what the line must contain)
MISTAKES = [
    (["--topology=v9:2x2"], ["--topology v9:2x2", "v5e, v5p, v6e, tpu7x", "cuda:8xH200"]),
    (["--topology=v5p:4"], ["--topology v5p:4", "shape"]),
    (["--topology=2*cuda:8xH200"], ["only TPUs have slices; expected cuda:8xH200"]),
    (["--topology=0*v5e:2x2"], ["--topology 0*v5e:2x2", "v5e, v5p, v6e, tpu7x"]),
    (["--topology=cuda:8xA1"], ["--topology cuda:8xA1", "A100, H100, H200, B200"]),
    (["--topology=v5e:2x2", "--mfu=40"], ["--mfu 40", "at most 1"]),
    (["--topology=v5e:2x2", "--steps=0"], ["steps = 0", "at least 1"]),
    (["--topology=v5e:2x2"], ["--topology v5e:2x2", 'pip install "nha_jax[tpu]"']),
    (["--topology=cuda:8xH100"], ["--topology cuda:8xH100", 'pip install "nha_jax[cuda]"']),
]


@pytest.mark.parametrize(("arguments", "parts"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_is_one_line(
    nha: Nha,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    parts: list[str],
) -> None:
    find = importlib.util.find_spec
    missing = ("libtpu", "jax_cuda13_plugin", "jax_cuda12_plugin")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else find(name)
    )
    for variable in ("JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.setenv(variable, "cpu" if variable == "JAX_PLATFORMS" else "1")
    assert main(["plan", str(nha.config_file), *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("nha: ")
    assert output.err.count("\n") == 1
    for part in parts:
        assert part in output.err


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (37.50G) exceeds available HBM (15.75G). HLO module: jit_f.",
            (int(37.5 * GIB), int(15.75 * GIB)),
        ),
        ("INTERNAL: Mosaic failed to compile", None),
    ],
    ids=["memory", "another"],
)
def test_what_a_refusal_says_of_memory(message: str, expected: tuple[int, int] | None) -> None:
    assert needed_memory(JaxRuntimeError(message)) == expected


def compiled_step(nha: Nha, **overrides: Any) -> CompiledStep:
    """As if compiled for four chips of v5e: 1 GiB of state, 10 of temporaries for each 4 rows."""
    config = nha.config(**overrides)
    topology = Topology("v5e:2x2", "tpu", (None,) * 4, CHIPS["TPU v5e"], 4 * GIB)
    mesh = {axis: getattr(config.mesh, axis) for axis in MESH_AXES}
    mesh["data"] = 4 // (mesh["fsdp"] * mesh["tensor"] * mesh["context"])
    less = 2 if config.model.remat == "full" else 1
    rows = config.batch_size / config.micro_batches / (mesh["data"] * mesh["fsdp"])
    memory = Memory(
        parameters=GIB // 4,
        optimizer=GIB * 3 // 4,
        batch=0,
        temporaries=int(2.5 * rows / less * GIB),
        program=0,
        available=topology.memory,
    )
    costs = Costs(
        flops=int(197e12),
        hbm_bytes=int(819e9 // 2),
        collectives=(Collective("all-reduce", 2, int(200e9 // 4)),),
        kernels={"nha_forward": 3},
    )
    fits = memory.headroom >= 0
    found = costs if fits else None
    trained = nha_jax.num_parameters(config.model)
    return CompiledStep(
        config, topology, mesh, trained, memory, fits, found, 1.0, None, config.steps
    )


def advice(nha: Nha, **overrides: Any) -> tuple[list[str], str | None]:
    """What was tried, and what is advised."""
    tried: list[str] = []

    def compile_with(change: Overrides) -> CompiledStep:
        keys = {key.replace(".", "__"): value for key, value in change.items()}
        return compiled_step(nha, **{**overrides, **keys})

    found = find_advice(compiled_step(nha, **overrides), compile_with, tried.append)
    if found is not None:
        assert found[1].fits
    return [line.split(":")[0] for line in tried], None if found is None else as_arguments(found[0])


def test_recomputation_is_advised_first(nha: Nha) -> None:
    tried, found = advice(nha, batch_size=8, model__remat="none")
    assert found == "--model.remat=full"
    assert tried == ["--model.remat=dots", "--model.remat=operator", "--model.remat=full"]


def test_then_a_batch_in_parts(nha: Nha) -> None:
    # Parts that cannot do, if temporaries only shrink with them, are not tried.
    tried, found = advice(nha, batch_size=32, model__remat="full")
    assert (tried, found) == (["--micro_batches=4"], "--micro_batches=4")


def test_then_both(nha: Nha) -> None:
    tried, found = advice(nha, batch_size=32, model__remat="operator")
    assert found == "--model.remat=full --micro_batches=4"
    assert tried == ["--model.remat=full", found]


def test_nothing_helps_after_some_tries(nha: Nha, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(change: Overrides) -> CompiledStep:
        return compiled_step(nha, batch_size=64)

    tried: list[str] = []
    assert find_advice(compiled_step(nha, batch_size=64), never, tried.append) is None
    assert 0 < len(tried) <= MOST_TRIES


def test_a_change_that_the_sizes_forbid_is_passed_over(nha: Nha) -> None:
    def refuse(change: Overrides) -> CompiledStep:
        raise ConfigError("no")

    tried: list[str] = []
    assert find_advice(compiled_step(nha, batch_size=64), refuse, tried.append) is None
    assert tried == []


def test_bounds_and_days(nha: Nha) -> None:
    compiled = compiled_step(nha, batch_size=4, model__remat="full")
    speed = speed_of(compiled, mfu=0.5)
    assert speed is not None
    assert speed.compute == pytest.approx(1.0)
    assert speed.memory == pytest.approx(0.5)
    assert speed.network == pytest.approx(0.25)
    config = compiled.config
    flops = nha_jax.training_flops_per_token(config.model, 32) * 4 * 32 / 4  # a chip of four
    assert speed.model_flops == pytest.approx(flops)
    assert speed.step == pytest.approx(flops / (0.5 * 197e12))
    assert speed.days == pytest.approx(config.steps * 4 * 32 / speed.tokens_a_day)


def test_the_table_says_whether_it_fits_and_by_how_much(nha: Nha) -> None:
    fits = compiled_step(nha, batch_size=4, model__remat="full")
    assert "fits: 1.75 GiB to spare" in table(fits, 0.4)
    assert re.search(r"all-reduce +46.57 GiB in 2", table(fits, 0.4))
    too_large = compiled_step(nha, batch_size=8, model__remat="none")
    assert "DOES NOT FIT: 2.00 GiB too much" in table(too_large, 0.4)
    assert as_json(too_large, 0.4)["memory"]["headroom"] == -2 * GIB
    assert as_json(too_large, 0.4)["speed"] is None


def test_the_table_says_how_much_is_trained_if_not_all(nha: Nha) -> None:
    whole = compiled_step(nha, batch_size=4)
    assert not re.search(r"^  trained ", table(whole, 0.4), re.M)
    part = dataclasses.replace(whole, trained=4_200_000)
    assert re.search(r"^  trained +4.2M parameters$", table(part, 0.4), re.M)
    assert as_json(part, 0.4)["trained"] == 4_200_000


def test_a_run_in_stages_is_planned_by_all_and_shown_by_the_dearest(nha: Nha) -> None:
    small = dataclasses.replace(compiled_step(nha, batch_size=4), stage="layers", steps=30)
    large = dataclasses.replace(compiled_step(nha, batch_size=8), stage="text", steps=90)
    assert dearest([small, large]) is large
    assert small.fits
    assert not large.fits
    text = stages_table([small, large], 0.4)
    assert re.search(r"the run: 120 steps, \d+\.\d\d days at an MFU of 40%", text)
    assert "  layers, windows 8: 30 steps, 3.50 GiB, " in text
    assert "  text, windows 8: 90 steps, 6.00 GiB, DOES NOT FIT" in text
    figures = stages_as_json([small, large], 0.4)
    assert [(x["stage"], x["steps"], x["windows"]) for x in figures] == [
        ("layers", 30, [8]),
        ("text", 90, [8]),
    ]
    assert figures[0]["memory"]["total"] == small.memory.total


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_state_of_the_optimizer_is_counted(
    optimizer: str, nha: Nha, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "_compile", lambda lowered: (None, (GIB, GIB // 2)))
    topology = Topology("one", "cpu", tuple(jax.devices()[:1]), CHIPS["TPU v5e"], GIB // 2)
    config = nha.config(optimizer__name=optimizer)
    memory = compiling.compile_steps(config, topology)[0].memory
    # q, k, v and o of 32 x 32, f of 32 x 16, and three of 32 x 128, in one layer.
    matrices = 4 * 32 * 32 + 32 * 16 + 3 * 32 * 128
    parameters = nha_jax.num_parameters(config.model)
    assert memory.parameters == 4 * parameters
    moments = 8 * parameters - (4 * matrices if optimizer == "muon" else 0)
    assert 0 < memory.optimizer - moments < 40  # counters, and Muon's three coefficients


def test_what_computes_each_kind_of_layer() -> None:
    published = load_config(
        str(CONFIGS / "nha-1.3b.yaml"), [("model.window_size", "[32, 32, 32, null]")]
    ).model
    assert layer_kinds(published, "TPU v5e") == {
        "window 32: fused TPU kernels": 18,
        "full attention: fused TPU kernels": 6,
    }
    larger = dataclasses.replace(published, window_size=32, key_dim=1024)
    (kind,) = layer_kinds(larger, "TPU v5e")
    assert kind == "window 32: xla: its kernels take heads of up to 512, got key of 1024"
    fused = load_config(str(CONFIGS / "nha-1.3b-long.yaml")).model
    assert layer_kinds(fused, "TPU v5e") == {"window 64: fused TPU kernels": 24}
    (kind,) = layer_kinds(fused, "NVIDIA H200")
    assert kind.startswith("window 64: xla; --model.implementation=pallas_gpu")
    keys = [("model.window_size", "[64, null]"), ("model.implementation", "pallas_gpu")]
    named = load_config(str(CONFIGS / "nha-1.3b-long.yaml"), keys).model
    assert layer_kinds(named, "NVIDIA H200") == {
        "window 64: fused GPU kernels, as the configuration says": 12,
        "full attention: cuDNN, or fused GPU kernels where documents are packed, "
        "as the configuration says": 12,
    }
    refused = "window 64: none: pallas_gpu cannot serve it: its kernels are for Hopper"
    assert any(kind.startswith(refused) for kind in layer_kinds(named, "NVIDIA A100 80GB"))
