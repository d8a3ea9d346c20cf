"""Reading the fixtures that `make_fixtures` wrote, without torch."""

from pathlib import Path

import numpy as np
import safetensors.numpy

import nha_jax

FIXTURES = Path(__file__).parent / "fixtures"

NAMES = tuple(sorted(file.parent.name for file in FIXTURES.glob("*/expected.npz")))

EXACT = {"dtype": "float32", "param_dtype": "float32", "remat": "none"}


def load_fixture(name: str, num_slots: int = 8) -> nha_jax.Model:
    """Loads a fixture's model, which computes in float32 whatever the dtype of its weights."""
    return nha_jax.from_pretrained(FIXTURES / name, num_slots=num_slots, **EXACT)


def original_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Reads all tensors of a checkpoint in float32, by their own names."""
    tensors: dict[str, np.ndarray] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= safetensors.numpy.load_file(file)
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
