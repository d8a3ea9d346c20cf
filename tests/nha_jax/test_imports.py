"""Importing the library loads little; its names load what they need when they are first used."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import nha_jax
import nha_jax.hf

REPORT = """
import sys

import nha_jax
print("nha_jax", *sorted(sys.modules))
import nha_jax.config
print("nha_jax.config", *sorted(sys.modules))
config = nha_jax.ModelConfig.preset("nha-tiny")
print("ModelConfig", *sorted(sys.modules))
nha_jax.Model
print("Model", *sorted(sys.modules))
for name in nha_jax.__all__:
    getattr(nha_jax, name)
print("everything", *sorted(sys.modules))
import nha_jax.testing
print("testing", *sorted(sys.modules))
"""

TRAINING = ("train", "grain", "orbax", "pydantic", "tensorboardX", "matplotlib")
KERNELS = ("pallas.tpu", "pallas.gpu", "jax.experimental.pallas")
TESTING = ("nha_jax.testing", "chex", "pytest", "hypothesis")
JOBS = ("nha_jax.hf", "nha_jax.generation", "nha_jax.storage", "safetensors")
MODEL = ("nha_jax.model", "nha_jax.layers")


@pytest.fixture(scope="module")
def loaded() -> dict[str, list[str]]:
    """The modules loaded after each step of REPORT."""
    command = [sys.executable, "-c", REPORT]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = (line.split() for line in finished.stdout.splitlines())
    return {step: modules for step, *modules in lines}


@pytest.mark.parametrize(
    ("step", "absent"),
    [
        ("nha_jax", (*TRAINING, *KERNELS, *JOBS, *MODEL, "nha_jax.config", "jax", "flax")),
        ("nha_jax.config", (*TRAINING, *KERNELS, *JOBS, *MODEL)),
        ("ModelConfig", (*TRAINING, *KERNELS, *JOBS, *MODEL)),
        ("Model", (*TRAINING, *KERNELS, *JOBS)),
        ("everything", (*TRAINING, *KERNELS, *TESTING)),
        ("testing", (*TRAINING, *KERNELS, *TESTING[1:])),
    ],
)
def test_nothing_is_loaded_before_it_is_used(loaded, step, absent):
    found = [x for x in loaded[step] if x in absent or x.startswith(tuple(f"{y}." for y in absent))]
    assert not found


@pytest.mark.parametrize("package", [nha_jax, nha_jax.hf], ids=["nha_jax", "nha_jax.hf"])
def test_every_public_name_is_there_for_people_and_type_checkers(package):
    assert set(package.__all__) <= set(dir(package))
    source = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    (block,) = (
        node
        for node in source.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    declared = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    (loaded,) = (
        ast.literal_eval(node)
        for statement in block.orelse
        for node in ast.walk(statement)
        if isinstance(node, ast.Dict)
    )
    assert declared == loaded
    assert set(declared) == set(package.__all__)
    for name, module in declared.items():
        assert getattr(package, name) is getattr(importlib.import_module(module), name)


def test_modules_are_attributes_and_unknown_names_are_errors():
    assert nha_jax.ops is importlib.import_module("nha_jax.ops")
    assert {"config", "layers", "ops"} <= set(dir(nha_jax))
    with pytest.raises(AttributeError, match="module 'nha_jax' has no attribute 'Modle'"):
        nha_jax.Modle  # noqa: B018
    with pytest.raises(ImportError, match=r"cannot import name .nothing. from .nha_jax\.hf."):
        from nha_jax.hf import nothing  # noqa: F401
