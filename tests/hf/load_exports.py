"""Run by `test_export` where torch and transformers are: loads exports, and writes what they give.

    python tests/hf/load_exports.py OUT.json FOLDER EXPECTED.npz [FOLDER EXPECTED.npz ...]

For every folder: what transformers found missing, unexpected or of another shape, its warnings,
and how far the logits are from those that `make_fixtures` stored.
"""

import json
import logging
import sys
import warnings
from typing import Any

import numpy as np
import torch
import transformers


class _Collected(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def load(folder: str, expected: str) -> dict[str, Any]:
    collected = _Collected()
    logger = logging.getLogger("transformers")
    logger.addHandler(collected)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
        )
    logger.removeHandler(collected)
    stored = np.load(expected)
    with torch.no_grad():
        logits = model(torch.tensor(stored["tokens"])).logits.numpy()
    return {
        "class": type(model).__name__,
        "problems": {key: sorted(map(str, value)) for key, value in info.items() if value},
        "warnings": collected.lines + [str(warning.message) for warning in caught],
        "error": float(np.abs(logits - stored["logits"]).max()),
    }


if __name__ == "__main__":
    out, *pairs = sys.argv[1:]
    found = {folder: load(folder, file) for folder, file in zip(pairs[::2], pairs[1::2])}
    with open(out, "w") as file:
        json.dump({"transformers": transformers.__version__, "loaded": found}, file, indent=1)
