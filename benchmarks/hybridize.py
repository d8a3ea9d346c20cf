"""A small language model with full attention becomes a hybrid, and gets its quality back.

    uv run python benchmarks/hybridize.py

It trains the original on the quick start's corpus, exports it in the Hugging Face format, and
imports it again, so that its gates start from its keys. Then it gives three layers in four a short
window, or all of them, and fine-tunes the attention alone for a tenth of the steps, at once or in
stages. It prints held-out bits per byte as Markdown tables, with what each fine-tune took: CPU
seconds of all cores, start and evaluation included (of the last start, if it was stopped), and the
memory of its dearest step, by the compiler. If it is stopped in any way, the same command goes on:
everything is in --folder.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

import nha_jax
from nha_jax.storage.folder import WEIGHTS_FILE
from nha_jax.storage.weights import Index, SafetensorsSource, WeightSource, build_model
from train.cli import main as nha
from train.config import TrainConfig
from train.data.batches import Sequences
from train.data.corpus import load_corpus
from train.devices.mesh import make_mesh
from train.load_config import load_config
from train.phases import phases_of
from train.step.evaluation import measure_held_out
from train.step.phase_functions import functions_of
from train.step.update import TrainingFunctions
from train.storage.initial_model import InitialModel
from train.storage.result import Result

QUICK_START = str(Path(__file__).parents[1] / "configs" / "quickstart.yaml")
HYBRID = "[16, 16, 16, null]"
NONE_FULL = "16"
FULL = "null"

# What an import would make: the attention of a Llama, and gates.
ORIGINAL = {
    "model.num_layers": "4",
    "model.num_query_heads": "4",
    "model.num_kv_heads": "2",
    "model.window_size": FULL,
    "model.conv_width": "0",
    "model.value_activation": "identity",
    "model.output_norm": "false",
    "model.empty_slots": "mask",
    "data.sequence_length": "512",
    "evaluation.final_sequences": "512",
}
FINE_TUNE = {
    "trainable": "[blocks.attention.*]",
    "data.sequence_length": "512",
    "optimizer.learning_rate": "2e-3",
    "optimizer.weight_decay": "0",
    "evaluation.final_sequences": "512",
}

RATE = 5e-3  # of both stages

Overrides = dict[str, str]
MUON: Overrides = {"optimizer.name": "muon"}
SLOWER: Overrides = {"optimizer.learning_rate": "1e-3"}
EVERYTHING: Overrides = {"trainable": '["*"]'}
DISTILLED: Overrides = {"loss.distillation": "1.0"}
ADAPTED: Overrides = {"adapter.rank": "16", "trainable": "[blocks.attention.f_proj.*]"}


class Tuned(NamedTuple):
    """What a fine-tune reached, in held-out bits per byte, and what it took."""

    bits_per_byte: float
    seconds: float
    mebibytes: float


def in_stages(steps: int, **of_second: object) -> Overrides:
    """The transfer: layer by layer for a fifth of the steps, then logits and text together.

    `of_second` replaces keys of the second stage.
    """
    first = max(steps // 5, 1)
    layers = {
        "name": "layers",
        "steps": first,
        "loss": {"cross_entropy": 0, "attention_transfer": 1},
        "optimizer": {"learning_rate": RATE, "warmup_steps": first // 12},
    }
    rest = steps - first
    whole = {
        "name": "logits and text",
        "steps": rest,
        "loss": {"distillation": 1},
        "optimizer": {"name": "muon", "learning_rate": RATE, "warmup_steps": rest // 24},
    }
    return {"stages": json.dumps([layers, whole | of_second])}


def shrinking(steps: int) -> str:
    """Windows that are halved four times within the first stage, from 256 to 16 tokens."""
    first = max(steps // 5, 1)
    return json.dumps({first * part // 5: 256 >> part for part in range(5)})


def train(run: Path, steps: int, overrides: Overrides) -> float:
    """Runs `nha train`, or the rest of it; returns the finished model's held-out bits per byte."""
    arguments = [f"--{key}={value}" for key, value in _run(run, steps, overrides).items()]
    if nha(["train", QUICK_START, *arguments]):
        sys.exit(1)
    result = Result.read(run / "result.json")
    assert result is not None
    return result.held_out_bits_per_byte


def measure(model: Path, overrides: Overrides) -> float:
    """Returns the held-out bits per byte of a saved model as it is."""
    values = _run(Path("unused"), 1, FINE_TUNE | overrides | {"initial_model": str(model)})
    return _held_out(load_config(QUICK_START, list(values.items())))


def dearest_step(run: Path, steps: int, overrides: Overrides) -> float:
    """Gives the MiB that the dearest step of a run takes, by the compiler: arrays and all else."""
    config = load_config(QUICK_START, list(_run(run, steps, overrides).items()))
    mesh, phases = make_mesh(config), phases_of(config)
    needed = []
    for phase in phases:
        with jax.set_mesh(mesh):
            compiled = functions_of(phase, phases, mesh).trace_update().lower().compile()
        found = compiled.memory_analysis()
        results = found.output_size_in_bytes - found.alias_size_in_bytes
        needed.append(found.argument_size_in_bytes + found.temp_size_in_bytes + results)
    return max(needed) / 2**20


def _run(run: Path, steps: int, overrides: Overrides) -> Overrides:
    base = {"run": str(run), "steps": str(steps), "optimizer.warmup_steps": str(steps // 20)}
    return base | overrides


def _held_out(config: TrainConfig) -> float:
    corpus, mesh = load_corpus(config.data), make_mesh(config)
    sequences = Sequences(corpus.held_out, config.data.sequence_length)
    with jax.set_mesh(mesh):
        functions = TrainingFunctions(config, mesh)
        state = functions.initial_state(
            InitialModel.open(config.initial_model or "").source(config.model)
        )
        count = config.evaluation.final_sequences
        found = measure_held_out(functions, state.model, sequences, config.batch_size, count)
    return found.bits_per_byte


def through_hugging_face(model: Path, folder: Path) -> Path:
    """Exports a model and imports it again, whose gates then start from its keys."""
    exported, imported = folder / "hugging-face", folder / "imported"
    if not exported.exists() and nha(["export", str(model), str(exported)]):
        sys.exit(1)
    options = ["--num-slots=32", "--param-dtype=float32"]
    if not imported.exists() and nha(["import", str(exported), str(imported), *options]):
        sys.exit(1)
    return imported


class WithoutGates:
    """The weights of a model without those of its gates."""

    def __init__(self, source: WeightSource):
        self.name = source.name
        self.shapes = {name: x for name, x in source.shapes.items() if ".f_proj." not in name}
        self._source = source

    def read(self, name: str, index: Index) -> np.ndarray:
        return self._source.read(name, index)


def without_slots(model: Path, folder: Path) -> Path:
    """Saves the same model without slots, which forgets what has left its windows."""
    path = folder / "without-slots"
    if not path.exists():
        config = dataclasses.replace(InitialModel.open(str(model)).config, num_slots=0)
        source = WithoutGates(SafetensorsSource(model / WEIGHTS_FILE))
        nha_jax.save(path, build_model(config, source))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/hybridize"))
    parser.add_argument("--steps", type=int, default=3000, help="of the original (default: 3000)")
    options = parser.parse_args()
    folder, tenth = options.folder, max(options.steps // 10, 1)

    original = train(folder / "original", options.steps, ORIGINAL)
    imported = through_hugging_face(folder / "original" / "model", folder)
    window_only = without_slots(imported, folder)
    # These replace the quick start's whole section `model`: all else is the initial model's.
    full, hybrid, none_full = (
        {"model": f"{{window_size: {x}}}"} for x in (FULL, HYBRID, NONE_FULL)
    )
    staged = in_stages(tenth)
    adamw = {"learning_rate": 2e-3, "warmup_steps": (tenth - max(tenth // 5, 1)) // 24}
    by_adamw = in_stages(tenth, optimizer=adamw)
    then_all = in_stages(tenth, trainable=["*"], optimizer=adamw | {"name": "muon"})
    schedule = {"model.window_schedule": shrinking(tenth)}

    def tuned(name: str, start: Path, overrides: Overrides) -> Tuned:
        values = FINE_TUNE | overrides | {"initial_model": str(start)}
        began = time.process_time()
        bits = train(folder / name, tenth, values)
        cost = folder / f"{name}.json"
        if not cost.exists():
            seconds = time.process_time() - began
            found = {"seconds": seconds, "mebibytes": dearest_step(folder / name, tenth, values)}
            cost.write_text(json.dumps(found))
        return Tuned(bits, **json.loads(cost.read_text()))

    as_long = tuned("full", imported, full)
    text = tuned("hybrid", imported, hybrid)
    distilled = tuned("distilled", imported, hybrid | DISTILLED)
    rows = [
        ("original, full attention", original, as_long, None),
        ("exported, imported again", measure(imported, full), None, None),
        (f"hybrid {HYBRID}", measure(imported, hybrid), text, distilled),
        (
            "the same without slots",
            measure(window_only, hybrid),
            tuned("window-only", window_only, hybrid),
            None,
        ),
    ]
    print(f"\nHeld-out bits per byte; {options.steps} steps, fine-tunes of {tenth}\n")
    print("| model | as it is | attention fine-tuned | and distilled |")
    print("| --- | --- | --- | --- |")
    for name, before, *tunes in rows:
        cells = (
            f"{before:.3f}",
            *("" if tune is None else f"{tune.bits_per_byte:.3f}" for tune in tunes),
        )
        print(f"| {name} | {' | '.join(cells)} |")

    recipes = [
        ("original, text", as_long),
        ("original, text, at half the rate", tuned("full-slower", imported, full | SLOWER)),
        ("original, text, by Muon", tuned("full-muon", imported, full | MUON)),
        ("original, text, all of it, by Muon", tuned("all", imported, full | MUON | EVERYTHING)),
        ("1 full layer in 4, text", text),
        ("1 in 4, text and logits", distilled),
        ("1 in 4, in stages, by AdamW", tuned("staged-adamw", imported, hybrid | by_adamw)),
        ("1 in 4, in stages", tuned("staged", imported, hybrid | staged)),
        ("1 in 4, in stages, then all of it", tuned("then-all", imported, hybrid | then_all)),
        ("1 in 4, in stages, shrinking", tuned("shrinking", imported, hybrid | schedule | staged)),
        ("1 in 4, in stages, adapters", tuned("adapted", imported, hybrid | ADAPTED | staged)),
        ("none, text and logits", tuned("none-full", imported, none_full | DISTILLED)),
        ("none, in stages", tuned("none-full-staged", imported, none_full | staged)),
    ]
    print("\n| recipe | bits per byte | to the original | CPU seconds | MiB of a step |")
    print("| --- | --- | --- | --- | --- |")
    for name, tune in recipes:
        behind = tune.bits_per_byte - as_long.bits_per_byte
        took = f"{tune.seconds:.0f} | {tune.mebibytes:.0f}"
        print(f"| {name} | {tune.bits_per_byte:.3f} | {behind:+.3f} | {took} |")


if __name__ == "__main__":
    main()
