"""`nha import`: a pretrained model becomes one of ours."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.errors import ConfigError, refusals_are_config_errors
from train.paths import input_path, user_location

if TYPE_CHECKING:
    from nha_jax.hf import Pretrained
    from nha_jax.storage.stores import Store

_DESCRIPTION = """\
Turns a pretrained model in the format of Hugging Face's transformers (Llama, Mistral, Qwen2, Qwen3,
Qwen3-MoE), or of the authors of Native Hybrid Attention (JusenD/NHA), into a folder that nha
generate, nha train and nha_jax.load take.

The weights are read from .safetensors files, a piece at a time; nothing is downloaded. By default
every layer keeps full attention, and the model computes what the original computes. With other
--windows it is a hybrid with slots, which need a fine-tune to be of use."""

_EXAMPLES = """\
examples:
  nha import downloads/Llama-3-8B models/llama
  nha import downloads/Llama-3-8B models/hybrid --windows 64,64,64,none
then
  nha generate models/llama --prompt 'Once upon a time'
  nha train configs/hybridize.yaml --initial_model=models/hybrid"""


def add_parser(commands: "argparse._SubParsersAction") -> None:
    parser = commands.add_parser(
        "import",
        help="turn a pretrained model of transformers into one of ours",
        usage="nha import HF_DIR RUN [options]",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="HF_DIR", help="folder of the pretrained model")
    parser.add_argument("run", metavar="RUN", help="folder to make")
    add = parser.add_argument
    add(
        "--num-slots", type=int, metavar="M",
        help="slots per key/value head, a divisor of the size of a head's key (default: 64, or "
        "what the model has if it is a hybrid already)",
    )  # fmt: skip
    add(
        "--windows", metavar="WINDOWS",
        help="windows of the layers: a pattern such as 64,64,64,none, or a result of nha search "
        "(default: none, which is full attention, or what the model has if it is a hybrid already)",
    )  # fmt: skip
    dtypes = ("float32", "bfloat16")
    add(
        "--param-dtype", choices=dtypes,
        help="dtype of the parameters (default: bfloat16 if all weights are, else float32)",
    )  # fmt: skip
    add(
        "--dtype", choices=dtypes,
        help="dtype of the computation (default: bfloat16 if the model's config says so, else "
        "float32)",
    )  # fmt: skip
    add("--overwrite", action="store_true", help="replace the model that is at RUN")


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from nha_jax.hf import open_pretrained
    from nha_jax.storage.folder import CONFIG_FILE
    from nha_jax.storage.saved_model import check_replaceable
    from nha_jax.storage.stores import check_output
    from train.windows import read_windows

    windows: Any = "original"
    if options.windows is not None:
        windows = read_windows(options.windows, "--windows")
    out = user_location(options.run, "RUN")
    # Folders below hold the same weights in other formats.
    source = input_path(options.source, "HF_DIR", lambda name: "/" not in name)
    if isinstance(out, Path) and out.exists() and not options.overwrite:
        raise ConfigError(f"{out} exists; choose another folder or pass --overwrite")
    with refusals_are_config_errors():
        if isinstance(out, Path):
            check_replaceable(out, overwrite=options.overwrite)
        else:
            check_output(out.url, CONFIG_FILE, overwrite=options.overwrite)
        pretrained = open_pretrained(
            source,
            num_slots=options.num_slots,
            window_size=windows,
            dtype=options.dtype,
            param_dtype=options.param_dtype,
        )
        print(_summary(pretrained), flush=True)
        _write(out, pretrained, overwrite=options.overwrite)
    print(f"wrote {out}; next: {_next(pretrained, out)}")
    return 0


def _write(out: "Path | Store", pretrained: "Pretrained", *, overwrite: bool) -> None:
    """Writes all of the folder or nothing, and shows a bar if it takes a while."""
    from nha_jax.storage.saved_model import write_folder
    from nha_jax.storage.weights import weight_bytes
    from train.report.bytes_bar import bytes_bar

    with bytes_bar(weight_bytes(pretrained.source.shapes)) as bar:
        write_folder(
            out if isinstance(out, Path) else out.url,
            pretrained.config,
            pretrained.source,
            files=pretrained.files,
            overwrite=overwrite,
            on_written=bar.update,
        )


def _next(pretrained: "Pretrained", out: "Path | Store") -> str:
    if "tokenizer.json" in pretrained.files:
        return f"nha generate {out} --prompt 'Once upon a time'"
    return f"put the original's tokenizer.json into it, then nha generate {out}"


def _summary(pretrained: "Pretrained") -> str:
    """Describes the model in a few lines, with what the user should know about it."""
    from nha_jax.hf.families import FAMILIES
    from nha_jax.sizes import num_parameters
    from nha_jax.storage.folder import ORIGINAL_CONFIG_FILE
    from nha_jax.storage.weights import weight_bytes
    from train.windows import format_windows

    config, family = pretrained.config, pretrained.original.family
    period = config.window_period
    windows = "full attention" if period == (None,) else f"windows {format_windows(period)}"
    size = weight_bytes(pretrained.source.shapes) / 1e9
    beside = ", ".join(name for name in pretrained.files if name != ORIGINAL_CONFIG_FILE)
    gates = "from the key projection" if family.model_type in FAMILIES else "of its own"
    lines = [
        f"{family.architecture}: {num_parameters(config):,} parameters, {config.num_layers} layers",
        f"{windows} in every layer" if len(period) == 1 else f"{windows}, repeated",
        f"{config.num_slots} slots a key/value head, gates {gates}",
        f"{config.param_dtype} parameters ({size:.3g} GB), computing in {config.dtype}",
        f"beside it: {beside or 'no tokenizer'}",
    ]
    return "\n".join([*lines, *(f"note: {notice}" for notice in pretrained.original.notices)])
