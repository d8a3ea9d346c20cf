"""`nha export`: a model becomes a folder for PyTorch."""

import argparse
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from train.errors import ConfigError, refusals_are_config_errors
from train.paths import user_location
from train.storage.run_in_store import local_run

if TYPE_CHECKING:
    from nha_jax import ModelConfig
    from nha_jax.hf.export import Export
    from nha_jax.storage.weights import WeightSource

_DESCRIPTION = """\
Writes a model as a folder for PyTorch: config.json, .safetensors and the files of its tokenizer.

  --format family        for transformers (Llama, Qwen2, ...): a pretrained model with full
                         attention in every layer. Its gates, which play no part in that, are left
                         out.
  --format transformers  for transformers, with code of ours in the folder: any model, windows,
                         slots and all. AutoModelForCausalLM.from_pretrained(HF_DIR,
                         trust_remote_code=True) opens it; the numbers of a finished run go into its
                         model card.
  --format peft          for PEFT: the adapter of a finished run alone, with what was trained whole
                         beside it, to be put on an export of the model that the run began with.
  --format nha           for the code of the authors of Native Hybrid Attention (JusenD/NHA): a
                         pretrained model made hybrid, with its gates, or one of the published
                         architecture.
The default is family where every layer has full attention, else nha. If RUN is a saved model, its
weights are read a piece at a time. All but peft write the model of a run with an adapter merged."""

_EXAMPLES = """\
examples:
  nha export models/llama exported/llama
  nha export runs/quickstart exported/quickstart --format transformers
  nha export runs/hybrid exported/hybrid --shard-size 2GB
  nha export runs/hybrid exported/original-attention --windows none
  nha export runs/lora exported/adapter --format peft"""

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_parser(commands: "argparse._SubParsersAction") -> None:
    parser = commands.add_parser(
        "export",
        help="write a model for PyTorch: transformers, or the paper's code",
        usage="nha export RUN HF_DIR [options]",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run or of a saved model")
    parser.add_argument("out", metavar="HF_DIR", help="folder to make")
    add = parser.add_argument
    add("--format", choices=("family", "transformers", "nha", "peft"), help="see above")
    add(
        "--windows", metavar="WINDOWS",
        help="other windows than the model's: none, a pattern such as 64,64,64,none, or a result "
        "of nha search",
    )  # fmt: skip
    add(
        "--shard-size", default="5GB", metavar="SIZE",
        help="how large a file of weights may be, e.g. 500MB (default: 5GB)",
    )  # fmt: skip
    add("--overwrite", action="store_true", help="replace the export that is at HF_DIR")


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from nha_jax.hf.export import check_exportable, plan_export, write_export
    from nha_jax.storage.folder import extra_files_of
    from nha_jax.storage.stores import local_output
    from nha_jax.storage.weights import weight_bytes
    from train.report.bytes_bar import bytes_bar
    from train.windows import read_windows

    shard_bytes = _read_size(options.shard_size)
    windows = None if options.windows is None else read_windows(options.windows, "--windows")
    location = user_location(options.out, "HF_DIR")
    named = local_run(options.run, "RUN")
    if isinstance(location, Path) and location.exists() and not options.overwrite:
        raise ConfigError(f"{location} exists; choose another folder or pass --overwrite")
    adapter = options.format == "peft"
    last = "adapter_config.json" if adapter else "config.json"
    name = str(location)
    with (
        refusals_are_config_errors(),
        local_output(name, last, overwrite=options.overwrite) as out,
    ):
        if adapter:
            _export_adapter(named, out, options)
            print(f"wrote {name}")
            return 0
        check_exportable(out, overwrite=options.overwrite)
        config, source = _open(named)
        if options.windows is not None:
            config = dataclasses.replace(config, window_size=windows)
        files = extra_files_of(named)
        measured = {} if options.windows else _measured(named)
        export = plan_export(config, files, options.format, measured)
        print(_summary(config, export, files), flush=True)
        with bytes_bar(weight_bytes(source.shapes)) as bar:
            write_export(
                out,
                export,
                source,
                files,
                shard_bytes=shard_bytes,
                overwrite=options.overwrite,
                on_written=bar.update,
            )
    print(f"wrote {name}")
    return 0


def _export_adapter(named: Path, out: Path, options: argparse.Namespace) -> None:
    """Writes the adapter of a finished run, or one that was saved, for PEFT."""
    from nha_jax.hf.peft import save_peft
    from nha_jax.storage.saved_adapter import ADAPTER_FILE
    from train.storage.run_folder import RunFolder

    if options.windows is not None:
        raise ConfigError(f"--windows {options.windows}: an adapter has no windows; leave it out")
    folder = named if (named / ADAPTER_FILE).is_file() else RunFolder(named).adapter
    if not folder.is_dir():
        raise ConfigError(
            f"{named}: no adapter to export; expected a finished run with one, or what "
            "nha_jax.save_adapter wrote"
        )
    save_peft(out, folder, overwrite=options.overwrite)


def _open(path: Path) -> "tuple[ModelConfig, WeightSource]":
    """Opens a saved model on the disk, or loads a run's newest checkpoint."""
    from nha_jax.sizes import abstract_parameters
    from nha_jax.storage.folder import WEIGHTS_FILE
    from nha_jax.storage.saved_model import open_saved
    from nha_jax.storage.weights import ModelSource, check_weights
    from train.text.loading import load_model

    if (path / WEIGHTS_FILE).exists():
        config, source = open_saved(path)
        check_weights(abstract_parameters(config), source)
        return config, source
    model = load_model(path)
    return model.config, ModelSource(model)


def _measured(path: Path) -> dict[str, float | str]:
    """Lists what a finished run reached, for the model card; {} for other folders."""
    from train.storage.result import Result
    from train.storage.run_folder import RunFolder

    folder = RunFolder(path.parent if path.name == "model" else path)
    result = Result.read(folder.result)
    if result is None:
        return {}
    bits = "held-out bits per byte"
    found: dict[str, float | str] = {
        "training steps": str(result.step),
        bits: result.held_out_bits_per_byte,
        "held-out perplexity of a token": result.held_out_perplexity,
    }
    return found | {f"{bits} of {name}": value for name, value in result.references.items()}


def _read_size(text: str) -> int:
    """Reads a size in bytes, e.g. '500MB' -> 500,000,000."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]B)?\s*", text, re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if size < 1:
        raise ConfigError(f"--shard-size = {text!r}: expected a size such as 5GB or 500MB")
    return size


def _summary(config: "ModelConfig", export: "Export", files: dict[str, bytes]) -> str:
    """Describes the folder in a few lines, with what the user should know about it."""
    from nha_jax.storage.folder import ORIGINAL_CONFIG_FILE
    from train.windows import format_windows

    written = {**files, **export.made}
    beside = ", ".join(name for name in written if name != ORIGINAL_CONFIG_FILE)
    lines = [
        f"{export.fields['architectures'][0]}, {config.num_layers} layer"
        f"{'s' * (config.num_layers > 1)}, windows "
        f"{format_windows(config.window_period)}, {config.param_dtype}",
        f"beside it: {beside or 'no tokenizer'}",
    ]
    return "\n".join([*lines, *(f"note: {notice}" for notice in export.notices)])
