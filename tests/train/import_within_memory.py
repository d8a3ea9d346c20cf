"""A program: `nha import` of a checkpoint of many shards, with much less memory than it takes.

Its argument is a folder to work in. Its last line of output is JSON: MiB of the checkpoint, of the
budget beyond what the process had before, and resident at most before and after.
"""

import json
import math
import resource
import sys
from pathlib import Path

import numpy as np
import safetensors.numpy

from nha_jax.hf.config import from_hf_config
from nha_jax.hf.names import table
from nha_jax.weights import abstract_parameters
from train.cli import main as nha

MIB = 2**20
BUDGET = 200 * MIB
SHARDS = 12

LLAMA = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 2752,
    "num_hidden_layers": SHARDS - 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}


def main(folder: Path) -> None:
    size = write_checkpoint(folder / "large", LLAMA)
    tiny = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 64}
    write_checkpoint(folder / "tiny", LLAMA | tiny | {"num_key_value_heads": 2})
    convert(folder, "tiny")
    baseline = resident()
    limit = data_bytes() + BUDGET
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        np.ones(size, np.uint8)
        raise AssertionError("the limit does not work here")
    except MemoryError:
        pass
    convert(folder, "large")
    sizes = {"checkpoint": size, "budget": BUDGET, "baseline": baseline, "peak": resident()}
    print(json.dumps({name: round(number / MIB) for name, number in sizes.items()}))


def convert(folder: Path, name: str) -> None:
    out = folder / f"{name}-imported"
    code = nha(["import", str(folder / name), str(out), "--num-slots", "32"])
    assert code == 0
    assert (out / "model.safetensors").exists()


def write_checkpoint(folder: Path, fields: dict) -> int:
    """Writes the embeddings, the head and each layer as a shard of its own; returns the bytes."""
    config = from_hf_config(fields, num_slots=32).config
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in table(config):
        ours = abstract_parameters(config)[entry.name].shape
        if entry.averaged == 1:
            shapes |= dict.fromkeys(entry.their_names(ours), entry.their_shape(ours))
    shards: dict[str, list[str]] = {}
    for name in shapes:
        shards.setdefault(".".join(name.split(".")[:3]), []).append(name)
    folder.mkdir()
    weight_map = {}
    for i, names in enumerate(shards.values()):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        random = np.random.default_rng(i)
        tensors = {name: random.random(shapes[name], np.float32) for name in names}
        safetensors.numpy.save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    (folder / "config.json").write_text(json.dumps(fields))
    return 4 * sum(map(math.prod, shapes.values()))


def resident() -> int:
    """Bytes that this process had in memory at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def data_bytes() -> int:
    """What the limit counts."""
    status = Path("/proc/self/status").read_text()
    return next(
        1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData")
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
