"""The published models, computed in float64 token by token from their tensors, and such tensors.

Written after the authors' code (JusenD/NHA) and not after ours, so that the two can be compared.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from tests.support.hf.originals import FIXTURES, original_tensors

Tensors = Mapping[str, np.ndarray]

PUBLISHED_FIELDS: dict[str, Any] = {
    "architectures": ["NHAForCausalLM"],
    "model_type": "nha",
    "vocab_size": 48,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 4,
    "expand_k": 0.5,
    "exapnd_k": 1,
    "expand_v": 1,
    "num_slots": 3,
    "gate_logit_normalizer": 4,
    "feature_map": "swish",
    "use_short_conv": True,
    "conv_size": 4,
    "intermediate_size": None,
    "hidden_ratio": 4,
    "norm_eps": 1e-3,
    "rope_theta": 500.0,
    "window_size": 4,
    "block_size": 2,
    "transformer_idx": 1,
    "fuse_norm": True,
}

LATER_FIELDS: dict[str, Any] = {
    key: value
    for key, value in PUBLISHED_FIELDS.items()
    if key not in ("block_size", "transformer_idx")
} | {"gsa_kv_shift": 0, "gsa_aux_loss_enable": True}

OUTPUT_NORM_EPS = 1e-5
"""Of rms_norm_linear, which the authors' layers call without an eps."""

HYBRID = {"num_slots": 3, "window_size": 4, "block_size": None, "transformer_idx": None}


def write_published(
    folder: Path, *, base: Mapping[str, Any] = PUBLISHED_FIELDS, **changes: Any
) -> tuple[dict[str, Any], Tensors]:
    """Writes a model trained from scratch, with random weights; returns its config and tensors."""
    fields = {**base, **changes}
    width, heads, layers = (
        fields[key] for key in ("hidden_size", "num_heads", "num_hidden_layers")
    )
    keys, groups = int(width * fields["expand_k"]), heads // fields["num_kv_heads"]
    shapes = {"model.embeddings.weight": (fields["vocab_size"], width)}
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (fields["vocab_size"], width)}
    sizes = {"q": keys, "k": keys // groups, "v": width // groups}
    for layer in (f"model.layers.{i}." for i in range(layers)):
        shapes |= {f"{layer}{norm}.weight": (width,) for norm in ("attn_norm", "mlp_norm")}
        for part, size in sizes.items():
            shapes[f"{layer}attn.{part}_proj.weight"] = (size, width)
            if fields["use_short_conv"]:
                shapes[f"{layer}attn.{part}_conv1d.weight"] = (size, 1, fields["conv_size"])
        shapes[f"{layer}attn.f_proj.weight"] = (fields["num_kv_heads"] * fields["num_slots"], width)
        if fields.get("elementwise_affine", True):
            shapes[f"{layer}attn.g_norm.weight"] = (width,)
        shapes[f"{layer}attn.o_proj.weight"] = (width, width)
        for part in ("gate", "up"):
            shapes[f"{layer}mlp.{part}_proj.weight"] = (256, width)
        shapes[f"{layer}mlp.down_proj.weight"] = (width, 256)
    return write(folder, fields, random_tensors(shapes))


def write_hybrid(folder: Path, fixture: str, **changes: Any) -> tuple[dict[str, Any], Tensors]:
    """Writes a fixture's model with a random gate projection in every layer."""
    fields = json.loads((FIXTURES / fixture / "config.json").read_text())
    name = fields["model_type"]
    architecture = fields["architectures"][0].replace("For", "NHAFor")
    fields |= {"model_type": f"{name}_nha", "architectures": [architecture], **HYBRID, **changes}
    rows = fields["num_key_value_heads"] * fields["num_slots"]
    shapes = {
        f"model.layers.{i}.self_attn.g_proj.weight": (rows, fields["hidden_size"])
        for i in range(fields["num_hidden_layers"])
    }
    return write(folder, fields, original_tensors(FIXTURES / fixture) | random_tensors(shapes))


def random_tensors(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        name: generator.normal(float("norm" in name), 0.3, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def write(folder: Path, fields: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    safetensors.numpy.save_file(dict(tensors), folder / "model.safetensors")
    return fields, tensors


def published_logits(fields: Mapping[str, Any], tensors: Tensors, tokens: np.ndarray) -> np.ndarray:
    """Tokens [T] -> logits [T, vocabulary] of a model trained from scratch."""
    weights = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    eps, slots = fields["norm_eps"], fields["num_slots"]
    hidden = weights["model.embeddings.weight"][tokens]
    for i in range(fields["num_hidden_layers"]):
        layer = {
            name.removeprefix(f"model.layers.{i}.").removesuffix(".weight"): tensor
            for name, tensor in weights.items()
            if name.startswith(f"model.layers.{i}.")
        }
        x = rms_norm(hidden, layer["attn_norm"], eps)
        parts = {part: x @ layer[f"attn.{part}_proj"].T for part in "qkvf"}
        if fields["use_short_conv"]:
            for part in "qkv":
                parts[part] = convolve(parts[part], layer[f"attn.{part}_conv1d"])
        heads, kv_heads = fields["num_heads"], fields["num_kv_heads"]
        query = parts["q"].reshape(len(tokens), heads, -1)
        key, value, gate = (parts[part].reshape(len(tokens), kv_heads, -1) for part in "kvf")
        log_decay = log_sigmoid(gate) / fields["gate_logit_normalizer"]
        arrays = query, key, silu(value), log_decay
        if "gsa_kv_shift" in fields:
            feature_map = {"swish": silu, "relu": lambda x: np.maximum(x, 0)}[fields["feature_map"]]
            out = attend_later(
                *arrays, fields["rope_theta"], fields["window_size"], fields["gsa_kv_shift"],
                feature_map,
            )  # fmt: skip
        else:
            out = attend(*arrays, fields["rope_theta"], window(fields, i))
        out = rms_norm(silu(out), layer.get("attn.g_norm", np.ones(out.shape[-1])), OUTPUT_NORM_EPS)
        hidden = hidden + out @ layer["attn.o_proj"].T
        x = rms_norm(hidden, layer["mlp_norm"], eps)
        gated = silu(x @ layer["mlp.gate_proj"].T) * (x @ layer["mlp.up_proj"].T)
        hidden = hidden + gated @ layer["mlp.down_proj"].T
        assert log_decay.shape[-1] == slots
    return rms_norm(hidden, weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T


def llama_logits(fields: Mapping[str, Any], tensors: Tensors, tokens: np.ndarray) -> np.ndarray:
    """Tokens [T] -> logits [T, vocabulary] of a hybridised Llama."""
    weights = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    eps, heads = fields["rms_norm_eps"], fields["num_attention_heads"]
    rope = fields.get("rope_parameters") or fields
    assert rope.get("rope_type", "default") == "default"
    hidden = weights["model.embed_tokens.weight"][tokens]
    for i in range(fields["num_hidden_layers"]):
        start = f"model.layers.{i}."
        x = rms_norm(hidden, weights[f"{start}input_layernorm.weight"], eps)
        parts = {part: x @ weights[f"{start}self_attn.{part}_proj.weight"].T for part in "qkvg"}
        query = parts["q"].reshape(len(tokens), heads, -1)
        key, value, gate = (
            parts[part].reshape(len(tokens), fields["num_key_value_heads"], -1) for part in "kvg"
        )
        log_decay = log_sigmoid(gate) / 8
        out = attend(query, key, value, log_decay, rope["rope_theta"], window(fields, i))
        hidden = hidden + out @ weights[f"{start}self_attn.o_proj.weight"].T
        x = rms_norm(hidden, weights[f"{start}post_attention_layernorm.weight"], eps)
        gate, up, down = (
            weights[f"{start}mlp.{part}_proj.weight"] for part in ("gate", "up", "down")
        )
        hidden = hidden + (silu(x @ gate.T) * (x @ up.T)) @ down.T
    hidden = rms_norm(hidden, weights["model.norm.weight"], eps)
    return hidden @ weights["lm_head.weight"].T


def window(fields: Mapping[str, Any], layer: int) -> int:
    """The window of a layer; one of full attention sees the last 2048 tokens in their code."""
    block, offset = fields["block_size"], fields["transformer_idx"]
    full = block is not None and offset is not None and layer % block == offset
    return 2048 if full else fields["window_size"]


def attend(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, log_decay: np.ndarray,
    theta: float, window: int,
) -> np.ndarray:  # fmt: skip
    """[T, Hq, K], [T, Hkv, K], [T, Hkv, V], [T, Hkv, M] -> [T, Hq * V]: one softmax over all."""
    length, heads, size = query.shape
    group = heads // key.shape[1]
    turned_query, turned_key = turn(query, theta), turn(key, theta)
    out = np.zeros((length, heads, value.shape[-1]))
    for head in range(heads):
        own = head // group
        slot_key = np.zeros((log_decay.shape[-1], size))
        slot_value = np.zeros((log_decay.shape[-1], value.shape[-1]))
        for t in range(length):
            if t >= window:
                decay = np.exp(log_decay[t - window, own])[:, None]
                slot_key = decay * slot_key + (1 - decay) * key[t - window, own]
                slot_value = decay * slot_value + (1 - decay) * value[t - window, own]
            seen = slice(max(t - window + 1, 0), t + 1)
            logits = np.concatenate(
                [slot_key @ query[t, head], turned_key[seen, own] @ turned_query[t, head]]
            ) / np.sqrt(size)
            weights = np.exp(logits - logits.max())
            values = np.concatenate([slot_value, value[seen, own]])
            out[t, head] = weights @ values / weights.sum()
    return out.reshape(length, -1)


def attend_later(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, log_decay: np.ndarray,
    theta: float, window_left: int, shift: int, feature_map: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:  # fmt: skip
    """Computes what the authors' later code does, for the shapes of `attend`.

    A sliding window of a token and the window_left before it, and gated slots of the features of
    all tokens up to shift before it, each with a softmax of its own at scale 1; the two are merged
    by their log-sum-exps.
    """
    length, heads, _ = query.shape
    group = heads // key.shape[1]
    key, value, log_decay = (np.repeat(x, group, axis=1) for x in (key, value, log_decay))
    turned_query, turned_key = turn(query, theta), turn(key, theta)
    slot_query, slot_key = feature_map(query), feature_map(key)
    gate = np.exp(log_decay)
    kept = np.zeros((length, heads, log_decay.shape[-1]))  # each token's share of each slot
    out = np.zeros((length, heads, value.shape[-1]))
    for t in range(length):
        if t >= shift:
            kept *= gate[t - shift]
            kept[t - shift] = 1 - gate[t - shift]
        for head in range(heads):
            slots = kept[:, head].T
            slot_logits = slots @ slot_key[:, head] @ slot_query[t, head]
            seen = slice(max(t - window_left, 0), t + 1)
            window_logits = turned_key[seen, head] @ turned_query[t, head]
            slot_mass, window_mass = (np.exp(x) for x in (slot_logits, window_logits))
            slot_out = slot_mass / slot_mass.sum() @ (slots @ value[:, head])
            window_out = window_mass / window_mass.sum() @ value[seen, head]
            slot_lse, window_lse = (np.log(x.sum()) for x in (slot_mass, window_mass))
            share = 1 / (1 + np.exp(window_lse - slot_lse))
            out[t, head] = share * slot_out + (1 - share) * window_out
    return out.reshape(length, -1)


def turn(x: np.ndarray, theta: float) -> np.ndarray:
    """Applies the rotary embedding to [T, heads, K], turning pairs of the two halves of K."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def convolve(x: np.ndarray, filters: np.ndarray) -> np.ndarray:
    """Convolves [T, channels] with [channels, 1, width] as torch, padded on the left; then silu."""
    padded = np.concatenate([np.zeros((filters.shape[-1] - 1, x.shape[1])), x])
    taps = [padded[i : i + len(x)] * filters[:, 0, i] for i in range(filters.shape[-1])]
    return silu(sum(taps))


def rms_norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0, -x)
