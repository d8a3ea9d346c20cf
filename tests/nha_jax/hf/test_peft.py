"""Adapters in PEFT's names are the updates of the exported models' weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import nha_jax
from nha_jax.hf.peft import save_peft
from tests.nha_jax.test_adapters import adapted_model
from tests.nha_jax.test_model import random_tokens, tiny_model

LINEAR = nha_jax.Adapter(
    rank=2, alpha=3.0, targets=("blocks.attention.[qkvo]_proj", "blocks.mlp.*", "head")
)
# What a model converted from a pretrained one is.
CONVERTED = {
    "conv_width": 0, "value_activation": "identity", "output_norm": False,
    "empty_slots": "mask", "window_size": None, "value_dim": 8,
}  # fmt: skip
WHOLE = ("blocks.attention.f_proj.kernel", "blocks.attention_norm.scale", "norm.scale")


def tensors(folder: Path, name: str = "model.safetensors") -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / name)


@pytest.mark.parametrize(
    "published",
    [pytest.param(False, id="a family's", marks=pytest.mark.slow), pytest.param(True, id="any's")],
)
def test_updates_are_those_of_the_exports_weights(tmp_path, published):
    base = tiny_model(num_layers=2, **({} if published else CONVERTED))
    format = "transformers" if published else "family"
    adapted = adapted_model(base, LINEAR)
    nha_jax.save_adapter(tmp_path / "adapter", adapted, whole=WHOLE)
    save_peft(tmp_path / "peft", tmp_path / "adapter")
    for name, model in (("base", base), ("merged", adapted)):
        nha_jax.save_pretrained(tmp_path / name, model, format=format)
    before, after = tensors(tmp_path / "base"), tensors(tmp_path / "merged")

    found = tensors(tmp_path / "peft", "adapter_model.safetensors")
    assert "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight" in found
    prefix, factors = "base_model.model.", ("lora_A.weight", "lora_B.weight")
    modules = {name.rpartition(".lora_")[0] for name in found if ".lora_" in name}
    assert len(modules) == 2 * 7 + 1
    for module in modules:
        a, b = (found.pop(f"{module}.{factor}") for factor in factors)
        weight = f"{module.removeprefix(prefix)}.weight"
        assert a.shape == (2, before[weight].shape[1])
        update = after.pop(weight) - before[weight]
        np.testing.assert_allclose(3.0 / 2 * b @ a, update, rtol=0, atol=1e-6)
    gates = [name for name in found if name.endswith("self_attn.f_proj.weight")]
    assert len(gates) == 2
    whole = {name.removeprefix(prefix): array for name, array in found.items()}
    for name, array in whole.items():
        if name in after:
            np.testing.assert_array_equal(array, after[name])
    assert (whole.keys() <= after.keys()) == published  # a family has no gates

    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 3.0)
    targets = [f"self_attn.{x}_proj" for x in "qkvo"] + [
        f"mlp.{x}_proj" for x in ("gate", "up", "down")
    ]
    assert config["target_modules"] == sorted([*targets, "lm_head"])
    assert config["modules_to_save"] == ["input_layernorm", "model.norm", "self_attn.f_proj"]


@pytest.mark.slow
def test_a_bias_beside_an_adapter_has_no_place(tmp_path):
    base = tiny_model(attention_bias="qkv")
    adapted = adapted_model(base, nha_jax.Adapter(rank=2))
    nha_jax.save_adapter(tmp_path / "a", adapted, whole=["blocks.attention.q_proj.bias"])
    with pytest.raises(ValueError, match=r"both an adapter of self_attn\.q_proj and its bias"):
        save_peft(tmp_path / "peft", tmp_path / "a")
    assert not (tmp_path / "peft").exists()


@pytest.mark.hf
@pytest.mark.parametrize("format", ["family", "transformers"])
def test_peft_puts_it_on_the_export_of_the_base(tmp_path: Path, format: str) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    base = tiny_model(num_layers=2, **(CONVERTED if format == "family" else {}))
    adapted = adapted_model(base, LINEAR)
    attention, whole = adapted.blocks.attention, WHOLE[1:]
    if format == "transformers":  # a family has no gates
        attention.f_proj.kernel[...] = 1.5 * attention.f_proj.kernel[...]
        whole = WHOLE
    for norm in (adapted.norm, adapted.blocks.attention_norm):
        norm.scale[...] = 1.5 * norm.scale[...]
    nha_jax.save_adapter(tmp_path / "adapter", adapted, whole=whole)
    save_peft(tmp_path / "peft", tmp_path / "adapter")
    nha_jax.save_pretrained(tmp_path / "base", base, format=format)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", trust_remote_code=True, dtype=torch.float32
    )
    tokens = random_tokens(2, 20)
    with torch.no_grad():
        model = peft.PeftModel.from_pretrained(theirs, tmp_path / "peft")
        found = model(torch.tensor(np.asarray(tokens)).long()).logits.numpy()
    expected = np.asarray(adapted(tokens))
    assert np.abs(base(tokens) - expected).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
