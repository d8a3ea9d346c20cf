"""`nha plan` for machines that are not there.

JAX_PLATFORMS=cpu uv run --isolated --extra tpu pytest -m tpu_aot tests/train/plan
JAX_PLATFORMS=cpu uv run --isolated --extra tpu pytest -m full tests/train/plan
"""

import json
from typing import Any

import pytest

from tests.support.paths import CONFIGS
from train.cli import main
from train.devices.chips import GIB

SIXTEEN_HEADS = "--model.num_query_heads=16"  # of 128: the fused kernels serve


def plan(
    capsys: pytest.CaptureFixture[str], config: str, topology: str, *arguments: str
) -> tuple[int, dict[str, Any]]:
    """The exit code and the figures."""
    pytest.importorskip("libtpu", reason="needs libtpu: uv run --extra tpu")
    file = str(CONFIGS / config)
    code = main(["plan", file, f"--topology={topology}", "--json", *arguments])
    return code, json.loads(capsys.readouterr().out)


def check(figures: dict[str, Any], devices: int) -> None:
    """What holds of every plan that fits."""
    assert figures["fits"]
    assert figures["devices"] == devices
    memory = figures["memory"]
    parts = ("parameters", "optimizer", "batch", "temporaries", "program")
    assert memory["total"] == sum(memory[part] for part in parts)
    assert memory["total"] + memory["headroom"] == memory["available"]
    assert 1.9 * memory["parameters"] < memory["optimizer"] < 2.1 * memory["parameters"]
    # Recomputation does at most the forward once more, and what windows take in whole blocks.
    assert 1 < figures["costs"]["flops"] / figures["speed"]["model_flops"] < 1.6
    assert all(figures["speed"][bound] > 0 for bound in ("compute", "memory", "network"))


@pytest.mark.tpu_aot
def test_what_does_not_fit_and_what_makes_it_fit(capsys: pytest.CaptureFixture[str]) -> None:
    """A batch that four v5e have no room for, unless it goes through the model in parts.

    One layer of the 340M model, to be soon done.
    """
    arguments = [
        "--model.num_layers=1", "--model.vocab_size=4096", "--batch_size=4096",
        "--mesh.data=1", "--mesh.fsdp=-1",
    ]  # fmt: skip
    code, figures = plan(capsys, "nha-340m.yaml", "v5e:2x2", *arguments)
    assert code == 1
    assert not figures["fits"]
    assert figures["costs"] is None
    assert figures["memory"]["headroom"] < 0
    # What XLA leaves of v5e's 16 GiB.
    assert figures["memory"]["available"] == pytest.approx(15.75 * GIB)
    advice = figures["advice"]
    assert advice["arguments"].startswith("--micro_batches=")
    fitting = advice["plan"]
    check(fitting, devices=4)
    assert fitting["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1, "context": 1}
    assert fitting["layers"] == {"window 32: fused TPU kernels": 1}
    parts = int(advice["arguments"].partition("=")[2])
    assert fitting["costs"]["kernels"] == {"nha_forward": 2 * parts, "nha_backward": parts}


@pytest.mark.tpu_aot
def test_between_slices_only_the_gradient_is_summed_and_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whatever the number of micro-batches; the counts of targets are a few numbers more."""
    overrides = {
        "num_layers": 2, "hidden_size": 256, "num_query_heads": 2, "num_slots": 64,
        "window_size": 64, "vocab_size": 1024,
    }  # fmt: skip
    arguments = [f"--model.{name}={value}" for name, value in overrides.items()]
    arguments += ["--batch_size=32", "--data.sequence_length=512", "--mesh.data=2", "--mesh.fsdp=4"]
    arguments += ["--micro_batches=2", "--head_parts=1"]
    code, figures = plan(capsys, "nha-340m.yaml", "2*v5e:2x2", *arguments)
    assert code == 0
    (sums,) = figures["costs"]["between_slices"]
    assert sums["kind"] == "all-reduce"
    gradient = figures["memory"]["parameters"]  # float32, a device's part of it
    assert gradient < sums["bytes"] < 1.1 * gradient
    assert figures["speed"]["between_slices"] == pytest.approx(sums["bytes"] / (25e9 / 8))


@pytest.mark.tpu_aot
def test_a_converted_mixture_of_experts(capsys: pytest.CaptureFixture[str]) -> None:
    """Full attention, and grouped matrix products, which XLA has kernels of its own for."""
    overrides = {
        "num_layers": 4, "hidden_size": 512, "num_query_heads": 4, "num_kv_heads": 2,
        "key_dim": 128, "vocab_size": 1024, "window_size": "[64, null]", "conv_width": 0,
        "value_activation": "identity", "output_norm": "false", "qk_norm": "true",
        "attention_bias": "qkv", "empty_slots": "mask",
        "experts": "{count: 16, per_token: 4, size: 512}",
    }  # fmt: skip
    arguments = [f"--model.{name}={value}" for name, value in overrides.items()]
    arguments += ["--batch_size=8", "--mesh.data=1", "--mesh.fsdp=2", "--mesh.tensor=2"]
    code, figures = plan(capsys, "nha-340m.yaml", "v5p:2x2x1", *arguments)
    assert code == 0
    check(figures, devices=4)
    full = "full attention: fused TPU kernels"
    assert figures["layers"] == {"window 64: fused TPU kernels": 2, full: 2}


@pytest.mark.full
@pytest.mark.parametrize(
    ("config", "topology", "arguments", "devices"),
    [
        ("nha-340m.yaml", "v5e:4x4", [], 16),
        ("nha-1.3b.yaml", "v5e:4x4", [SIXTEEN_HEADS], 16),
        ("nha-1.3b.yaml", "v5p:2x2x2", [SIXTEEN_HEADS], 8),
        ("nha-1.3b-long.yaml", "v5p:4x4x4", [], 64),
    ],
    ids=str,
)
def test_configurations_fit(
    capsys: pytest.CaptureFixture[str],
    config: str,
    topology: str,
    arguments: list[str],
    devices: int,
) -> None:
    code, figures = plan(capsys, config, topology, *arguments)
    assert code == 0
    check(figures, devices)
    assert figures["costs"]["kernels"]["nha_backward"] >= 24
