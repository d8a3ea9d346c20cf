"""The files of a saved model's folder; to know them takes no jax."""

import os
from pathlib import Path

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
ORIGINAL_CONFIG_FILE = "original_config.json"
"""The config.json that an imported model came with, kept beside our own."""

EXTRA_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    ORIGINAL_CONFIG_FILE,
)
"""Names of the extra files: what may lie beside a model's weights, such as its tokenizer.

They travel with the model byte for byte. All but the last are named as Hugging Face names them.
"""


def is_beside_weights(name: str) -> bool:
    """Says whether a file of a model's folder is its configuration, or one of EXTRA_FILES."""
    return name in (CONFIG_FILE, *EXTRA_FILES)


def extra_files_of(folder: str | os.PathLike[str]) -> dict[str, bytes]:
    """Reads those of EXTRA_FILES that lie in a folder: name and content, as `save` takes them."""
    paths = (Path(folder) / name for name in EXTRA_FILES)
    return {path.name: path.read_bytes() for path in paths if path.is_file()}
