"""Type checkers see the types of the library, as a program that uses it does."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PROGRAM = """
import jax.numpy as jnp
from flax import nnx
import nha_jax

config = nha_jax.ModelConfig.preset("nha-tiny")
model = nha_jax.Model(config, rngs=nnx.Rngs(0))
logits = model(jnp.zeros((1, 4), jnp.int32))
"""


@pytest.mark.parametrize("package", ["nha_jax", "pallas", "train"])
def test_every_package_says_that_its_types_are_to_be_read(package):
    assert (ROOT / package / "py.typed").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("size: int = nha_jax.num_parameters(config)", None),
        ("size: str = nha_jax.num_parameters(config)", 'expression has type "int"'),
        ("nha_jax.Model(config)", 'Missing named argument "rngs"'),
        (
            "size: int = nha_jax.NHAttention(257, 1, key_dim=2, rngs=nnx.Rngs(0))(logits)",
            'expression has type "Array"',
        ),
        ("logits.no_such_method()", '"Array" has no attribute "no_such_method"'),
        ("nha_jax.Modle", 'Module has no attribute "Modle"'),
    ],
)
def test_a_program_passes_strict_checks_and_its_mistakes_are_found(
    tmp_path: Path, tmp_path_factory, line, problem
):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM + line + "\n")
    cache = tmp_path_factory.getbasetemp() / "mypy"
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir", cache]
    finished = subprocess.run([*command, program], capture_output=True, text=True, cwd=tmp_path)
    if problem is None:
        assert finished.returncode == 0, finished.stdout
    else:
        assert finished.returncode == 1
        assert finished.stdout.count("error:") == 1
        assert problem in finished.stdout
