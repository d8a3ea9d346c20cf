"""A program: `nha import` of a checkpoint of many shards, and its export, with little memory.

Its argument is a folder with two checkpoints, `write_checkpoint`'s `tiny` and `large`. Its last
line of output is JSON: MiB of the large one, of the budget beyond what the process needs for the
tiny one, and resident at most in importing and exporting the tiny and the large.
"""

import json
import resource
import sys
from pathlib import Path

import numpy as np
import safetensors.numpy

from nha_jax.hf.config import from_hf_config
from nha_jax.hf.tensors import converted_table
from nha_jax.sizes import abstract_parameters
from train.cli import main as nha

MIB = 2**20
BUDGET = 110 * MIB
SHARDS = 12

LLAMA = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": SHARDS - 2,
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
}
TINY = LLAMA | {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def main(folder: Path) -> None:
    convert(folder, "tiny")
    baseline = status("VmHWM")  # getrusage would count what the parent had before exec
    size = sum(file.stat().st_size for file in (folder / "large").glob("*.safetensors"))
    limit = status("VmData") + BUDGET
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        np.ones(size, np.uint8)
        raise AssertionError("the limit does not work here")
    except MemoryError:
        pass
    convert(folder, "large")
    sizes = {"checkpoint": size, "budget": BUDGET, "baseline": baseline, "peak": status("VmHWM")}
    print(json.dumps({name: round(number / MIB) for name, number in sizes.items()}))


def convert(folder: Path, name: str) -> None:
    out = folder / f"{name}-imported"
    code = nha(["import", str(folder / name), str(out), "--num-slots", "32"])
    assert code == 0
    assert (out / "model.safetensors").exists()
    code = nha(["export", str(out), str(folder / f"{name}-exported"), "--shard-size", "40MB"])
    assert code == 0


def write_checkpoint(folder: Path, fields: dict) -> None:
    """Writes a folder with the embeddings, the head and each layer as a shard of its own."""
    config = from_hf_config(fields, num_slots=32).config
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in converted_table(config):
        ours = abstract_parameters(config)[entry.name].shape
        if entry.averaged == 1:  # not made from tensors that are there already
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


def status(field: str) -> int:
    """Bytes of memory of this process, as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
