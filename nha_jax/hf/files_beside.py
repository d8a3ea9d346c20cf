"""What lies beside the weights of a model for transformers: its code, its card, its end token."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nha_jax.config import ModelConfig
from nha_jax.sizes import num_parameters
from nha_jax.storage.json_objects import parse_object
from nha_jax.tokenizer.as_bytes import BYTE_VOCABULARY, END_OF_DOCUMENT
from nha_jax.tokenizer.files import (
    GENERATION_CONFIG_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    read_objects,
    special_token,
)

TORCH_FILES = Path(__file__).parent / "torch_files"

CARD_FILE = "README.md"

_END_OF_BYTES = "<|endoftext|>"


def names_beside() -> set[str]:
    """Names the files that `files_beside` may write."""
    own = {CARD_FILE, GENERATION_CONFIG_FILE, TOKENIZER_FILE, TOKENIZER_CONFIG_FILE}
    return {file.name for file in TORCH_FILES.glob("*.py")} | own


def files_beside(
    config: ModelConfig, files: Mapping[str, bytes], measured: Mapping[str, float | str]
) -> dict[str, bytes]:
    """Makes the files that `AutoModelForCausalLM` and `AutoTokenizer` need beside those given.

    The code is copied as it is. A model of bytes gets a tokenizer.json, which makes of a text what
    `nha_jax.tokenizer` makes of it, and a model whose tokenizer says which token ends a text a
    generation_config.json, if there is none.

    Args:
        config: of the model.
        files: name and content of the extra files that travel with it.
        measured: as for `model_card`.

    Returns:
        Name and content of each file.
    """
    made = {file.name: file.read_bytes() for file in sorted(TORCH_FILES.glob("*.py"))}
    if TOKENIZER_FILE not in files and config.vocab_size == BYTE_VOCABULARY:
        made |= _byte_tokenizer()
    if GENERATION_CONFIG_FILE not in files:
        end = _end_token({**made, **files})
        if end is not None:
            made[GENERATION_CONFIG_FILE] = _json({"eos_token_id": end, "pad_token_id": end})
    made[CARD_FILE] = model_card(config, measured).encode()
    return made


def model_card(config: ModelConfig, measured: Mapping[str, float | str]) -> str:
    """Writes the README.md of a model: what it is, how it is opened, what was measured.

    Args:
        config: of the model.
        measured: what a table says of it, numbers or words by their names; {}: there is no table.
    """
    windows = ", ".join("full" if window is None else str(window) for window in config.windows)
    sizes = {
        "parameters": f"{num_parameters(config):,}",
        "layers": config.num_layers,
        "hidden size": config.hidden_size,
        "query heads, key/value heads": f"{config.num_query_heads}, {config.num_kv_heads}",
        "slots of a key/value head": config.num_slots,
        "windows of the layers, in tokens": windows,
        "vocabulary": config.vocab_size,
        "dtype of the weights": config.param_dtype,
    }
    return _CARD.format(
        sizes=_table(sizes), measured=f"\n## Measured\n\n{_table(measured)}\n" if measured else ""
    )


_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [native-hybrid-attention, custom_code]
---

# A Native Hybrid Attention language model

Each layer reads its last tokens, the window, exactly, and everything older through slots, which a
gated linear recurrence writes, under one softmax
([arXiv 2510.07019](https://arxiv.org/abs/2510.07019)). With finite windows, memory and time per
token do not grow with the context.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

The code is plain PyTorch: `operator_nha.py` says what is computed. The model trains like any other
of transformers; documents packed into one row are told apart by `segment_ids` or `position_ids`.
Where it came from, `nha import` takes it back.

{sizes}
{measured}"""


def _table(rows: Mapping[str, object]) -> str:
    """Lays out names and values as a table of Markdown."""
    shown = ((name, f"{x:.4g}" if isinstance(x, float) else x) for name, x in rows.items())
    return "\n".join(
        ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in shown)]
    )


def _byte_tokenizer() -> dict[str, bytes]:
    """Makes the files of a tokenizer whose tokens are UTF-8 bytes and END_OF_DOCUMENT."""
    end = {
        "id": END_OF_DOCUMENT, "content": _END_OF_BYTES, "special": True, "normalized": False,
        "single_word": False, "lstrip": False, "rstrip": False,
    }  # fmt: skip
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    vocabulary = {letter: byte for byte, letter in enumerate(_letters())}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [end],
        "normalizer": None, "pre_tokenizer": {**level, "use_regex": False}, "post_processor": None,
        "decoder": {**level, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }  # fmt: skip
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": _END_OF_BYTES,
        "pad_token": _END_OF_BYTES,
    }
    return {TOKENIZER_FILE: _json(tokenizer), TOKENIZER_CONFIG_FILE: _json(settings)}


def _letters() -> list[str]:
    """Lists the letter that a byte-level BPE has for each byte, as GPT-2's.

    Bytes that print stand for themselves, and the others, in order, for the letters from 256 on.
    """
    printing = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), 256),
    }
    others = [byte for byte in range(256) if byte not in printing]
    return [chr(byte if byte in printing else 256 + others.index(byte)) for byte in range(256)]


def _end_token(files: Mapping[str, bytes]) -> int | None:
    """Finds the number of the token that ends a text; None if the tokenizer names none."""
    if TOKENIZER_FILE not in files:
        return None
    name = special_token(read_objects(files, Path()), "eos_token")
    tokenizer: dict[str, Any] = parse_object(files[TOKENIZER_FILE], Path(TOKENIZER_FILE))
    added = {each.get("content"): each.get("id") for each in tokenizer.get("added_tokens") or []}
    return added.get(name) if name is not None else None


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
