"""Opens exported models as a user of transformers does, and writes down what they compute.

Run in a process of its own, without network: `python open_in_transformers.py FOLDER...`. Each
folder holds `model/` and `inputs.npz`; results go to `outputs.npz` and `saved/` beside them.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_outputs import CausalLMOutputWithPast

NEW_TOKENS = 20

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What this version of transformers calls it."""


def main(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model", trust_remote_code=True, dtype=torch.float32
    )
    inputs = {name: torch.tensor(x) for name, x in np.load(folder / "inputs.npz").items()}
    tokens, segments, prompt = inputs["tokens"], inputs["segments"], inputs["prompt"]
    found = {}
    with torch.no_grad():
        found["logits"] = model(tokens).logits
        found["packed"] = model(tokens, segment_ids=segments).logits
        found["by_positions"] = model(tokens[:1], position_ids=_positions(segments[:1])).logits
        found["cache_bytes"] = torch.tensor([_cache_bytes(model, tokens, n) for n in (64, 256)])
        found["bfloat16"] = _in_bfloat16(folder, tokens)
        found["autocast"] = _in_autocast(model, tokens)
        found["in_pieces"] = _in_pieces(model, tokens)
    found["saved_bytes"] = torch.tensor([_saved_bytes(model, tokens, n) for n in (64, 256)])
    found["loss"], gradients = _gradients(model, tokens)
    found |= {f"gradient of {name}": gradient for name, gradient in gradients.items()}
    model.gradient_checkpointing_enable()
    _, again = _gradients(model.train(), tokens)
    worst = max((again[name] - gradient).abs().max() for name, gradient in gradients.items())
    found["gradients with checkpoints are off by"] = worst
    model.eval()

    def generate(**options: Any) -> torch.Tensor:
        written = model.generate(
            prompt,
            attention_mask=inputs["mask"],
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
            **options,
        )
        return written[:, prompt.shape[1] :]

    found["greedy"] = generate()
    found["greedy without a cache"] = generate(use_cache=False)
    found["beams"] = generate(num_beams=3)
    found["beams without a cache"] = generate(num_beams=3, use_cache=False)
    np.savez(folder / "outputs.npz", **{name: x.numpy() for name, x in found.items()})
    model.save_pretrained(folder / "saved")


def _gradients(
    model: torch.nn.Module, tokens: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Computes the loss, and its gradient with respect to each parameter that it depends on."""
    model.zero_grad()
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss.detach(), {name: x.clone() for name, x in found.items() if x is not None}


def _cache_bytes(model: torch.nn.Module, tokens: torch.Tensor, length: int) -> int:
    """Counts what the cache of so many tokens holds in memory."""
    outputs = model(_of_length(tokens, length), use_cache=True)
    cache = getattr(outputs, CACHE)
    tensors = torch.utils._pytree.tree_leaves([cache.layers, cache.counts])
    return sum(x.untyped_storage().nbytes() for x in tensors if x is not None)


def _saved_bytes(model: torch.nn.Module, tokens: torch.Tensor, length: int) -> int:
    """Counts what the forward over so many tokens keeps for the backward."""
    storages = {}

    def save(x: torch.Tensor) -> torch.Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        outputs = model(_of_length(tokens, length))
    assert outputs.logits.requires_grad
    weights = {x.untyped_storage().data_ptr() for x in model.parameters()}
    return sum(size for pointer, size in storages.items() if pointer not in weights)


def _of_length(tokens: torch.Tensor, length: int) -> torch.Tensor:
    return tokens.tile(1, 1 + length // tokens.shape[1])[:, :length]


def _positions(segments: torch.Tensor) -> torch.Tensor:
    """Counts each token's place in its document, as collators that pack rows do."""
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    index = torch.arange(segments.shape[1])
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def _in_bfloat16(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model", trust_remote_code=True, dtype=torch.bfloat16
    )
    return model(tokens).logits


class _Products(TorchDispatchMode):
    """Notes the dtypes of batched products, of which the operator consists but no projection."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.bmm.default:
            self.dtypes.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


def _in_autocast(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Computes the logits in mixed precision, which must leave the slots in float32."""
    with torch.autocast("cpu", torch.bfloat16), _Products() as products:
        logits = model(tokens).logits
    windows = model.config.window_sizes
    assert products.dtypes == ({torch.float32} if set(windows) != {None} else set())
    return logits


def _in_pieces(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Reads pieces of many lengths, each with the cache of those before."""
    cache, logits = None, []
    for piece in tokens.split([1, 2, 7, 1, 1, 17, 3, tokens.shape[1] - 32], dim=1):
        outputs = model(piece, **{CACHE: cache}, use_cache=True)
        cache = getattr(outputs, CACHE)
        logits.append(outputs.logits)
    return torch.cat(logits, dim=1)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        main(Path(name))
    assert not {"jax", "nha_jax"} & set(sys.modules)
