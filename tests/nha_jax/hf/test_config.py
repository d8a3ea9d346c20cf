"""What a config.json says is understood whole, or refused by name."""

import json

import pytest

import nha_jax
from nha_jax import ModelConfig
from nha_jax.hf.config import from_hf_config, to_hf_config
from nha_jax.hf.families import FAMILIES
from nha_jax.hf.tensors import converted_table
from nha_jax.sizes import abstract_parameters
from tests.support.hf.originals import FIXTURES, NAMES

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
LLAMA = {"model_type": "llama", **SIZES}


def fields_of(name: str) -> dict:
    return json.loads((FIXTURES / name / "config.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_lost_in_either_direction(name: str) -> None:
    fields = fields_of(name)
    chosen = {"num_slots": 8, "param_dtype": fields["dtype"]}
    config = from_hf_config(fields, **chosen).config
    assert from_hf_config(to_hf_config(config), **chosen).config == config


@pytest.mark.parametrize("name", NAMES)
def test_what_transformers_writes_is_known(name: str) -> None:
    assert from_hf_config(fields_of(name)).notices == ()


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_in_the_table(name: str) -> None:
    config = from_hf_config(fields_of(name), num_slots=8).config
    assert sorted(entry.name for entry in converted_table(config)) == sorted(
        abstract_parameters(config)
    )


def test_all_that_cannot_be_computed_is_listed_at_once() -> None:
    wrong = {
        "hidden_act": "gelu",
        "mlp_bias": True,
        "pretraining_tp": 2,
        "partial_rotary_factor": 0.5,
        "quantization_config": {"quant_method": "fp8"},
        "layer_types": ["full_attention", "chunked_attention"],
        "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
    }
    with pytest.raises(ValueError, match=r"^config\.json cannot be imported: ") as error:
        from_hf_config(LLAMA | wrong)
    for problem in (
        "hidden_act = 'gelu': expected 'silu'",
        "mlp_bias = True: expected false",
        "pretraining_tp = 2: expected 1",
        "partial_rotary_factor = 0.5: expected 1",
        "quantization_config = {'quant_method': 'fp8'}: expected weights that are not quantized",
        "layer_types = ['full_attention', 'chunked_attention']: expected 'full_attention' or",
        "rope_scaling.rope_type = 'dynamic': expected one of 'default', 'linear', 'llama3', 'yarn'",
    ):
        assert problem in str(error.value)
    assert str(error.value).count("expected") == len(wrong)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": None}, "vocab_size = None: expected a whole number"),
        ({"num_key_value_heads": 3}, "num_kv_heads=3 must divide num_query_heads=4"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters = .* the same for all"),
        ({"rope_scaling": {"type": "linear"}}, r"rope_scaling\.factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor=0.5 must be"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type = 'longrope'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"attention_bias": "yes"}, "attention_bias = 'yes': expected true or false"),
        (
            {"model_type": "qwen3_moe", "mlp_only_layers": [0], "decoder_sparse_step": 2},
            r"mlp_only_layers = \[0\].*decoder_sparse_step = 2",
        ),
        ({"model_type": "qwen3_moe", "num_experts": 0}, "num_experts = 0: expected a whole"),
    ],
)
def test_what_is_wrong_is_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_hf_config(LLAMA | changes)


def test_missing_sizes_are_named_together() -> None:
    with pytest.raises(ValueError, match="hidden_size is missing; num_hidden_layers is missing"):
        from_hf_config(
            {k: v for k, v in LLAMA.items() if k not in ("hidden_size", "num_hidden_layers")}
        )


@pytest.mark.parametrize(
    "named",
    [
        {"model_type": "gemma3"},
        {"architectures": ["BertModel"]},
        {},
        {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
    ],
)
def test_unknown_architectures_are_refused_with_a_list_of_the_known(named: dict) -> None:
    with pytest.raises(ValueError, match="is of no supported model") as error:
        from_hf_config(SIZES | named)
    assert all(family.architecture in str(error.value) for family in FAMILIES.values())


def test_the_preset_is_the_published_model() -> None:
    published = {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    }
    config = from_hf_config(published).config
    assert config == ModelConfig.preset("llama-3-8b")
    gates = 32 * 4096 * 8 * 64
    assert nha_jax.num_parameters(config) == 8_030_261_248 + gates  # as its authors count it


def test_an_architecture_alone_is_enough() -> None:
    original = from_hf_config({**SIZES, "architectures": ["Qwen3ForCausalLM"]})
    assert original.config.qk_norm


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"model_type": "mistral"}, {"num_kv_heads": 8, "key_dim": 4}),
        ({"model_type": "llama"}, {"num_kv_heads": 16, "key_dim": 4}),
        ({"model_type": "qwen2"}, {"num_kv_heads": 16, "attention_bias": "qkv"}),
        ({"model_type": "qwen3"}, {"key_dim": 128, "norm_eps": 1e-6}),
        ({"model_type": "qwen3_moe"}, {"num_kv_heads": 4, "rope_theta": 10000.0}),
    ],
    ids=lambda value: value.get("model_type", ""),
)
def test_absent_keys_are_what_transformers_takes_them_for(fields: dict, expected: dict) -> None:
    sizes = {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "head_dim")}
    sizes |= {"hidden_size": 64, "num_attention_heads": 16}
    if fields["model_type"] in ("qwen2", "qwen3"):  # their default, 32 key heads, would not fit
        sizes["num_key_value_heads"] = None
    config = from_hf_config(sizes | fields).config
    assert {field: getattr(config, field) for field in expected} == expected
    assert not config.tie_embeddings
    assert config.rope_scaling is None


def test_a_converted_model_has_the_attention_of_the_original() -> None:
    config = from_hf_config(LLAMA).config
    assert (config.value_activation, config.output_norm, config.conv_width) == (
        "identity",
        False,
        0,
    )
    assert (config.empty_slots, config.windows, config.num_slots) == ("mask", (None, None), 64)


SLIDES = {"sliding_window": 16, "max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("fields", "layers"),
    [
        ({"model_type": "mistral", **SLIDES}, "2 of 2"),
        ({"model_type": "mistral", **SLIDES, "sliding_window": None}, None),
        ({"model_type": "mistral", **SLIDES, "sliding_window": 64}, None),
        ({"model_type": "qwen2", **SLIDES}, None),
        ({"model_type": "qwen2", **SLIDES, "use_sliding_window": True}, None),
        (
            {"model_type": "qwen2", **SLIDES, "use_sliding_window": True, "max_window_layers": 1},
            "1 of 2",
        ),
        (
            {
                "model_type": "qwen3",
                **SLIDES,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "1 of 2",
        ),
        ({"model_type": "qwen3_moe", **SLIDES, "use_sliding_window": True}, "2 of 2"),
        ({"model_type": "llama", "max_position_embeddings": 64}, None),
    ],
)
def test_a_sliding_window_of_the_original_is_noted(fields: dict, layers: str | None) -> None:
    notices = from_hf_config(SIZES | fields).notices
    assert len(notices) == (layers is not None)
    if layers:
        assert notices[0].startswith(f"{layers} layers of the original see the last 16 tokens")


def test_keys_that_nobody_knows_are_noted() -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "finetuned": True}
    notices = from_hf_config(LLAMA | {"rope_scaling": rope, "novelty": 1}).notices
    assert notices == ("config.json has keys that were ignored: novelty, rope_scaling.finetuned",)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"attention_factor": 1.5}, {"attention_factor": 1.5}),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, {"attention_factor": 1.0}),
        ({"factor": None}, {"factor": 8.0}),
        (
            {"beta_fast": 16, "beta_slow": 2, "truncate": False},
            {"beta_fast": 16, "truncate": False},
        ),
        ({"original_max_position_embeddings": None}, {"original_length": 128}),
    ],
    ids=lambda value: "-".join(value),
)
def test_yarn_in_all_its_spellings(rope: dict, expected: dict) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    scaled = {"rope_scaling": yarn | rope, "max_position_embeddings": 128}
    scaling = from_hf_config(LLAMA | scaled).config.rope_scaling
    assert {field: getattr(scaling, field) for field in expected} == expected


def test_what_the_original_determines_cannot_be_chosen() -> None:
    assert from_hf_config(LLAMA, remat="none").config.remat == "none"
    with pytest.raises(ValueError, match="tie_embeddings, vocab cannot be chosen"):
        from_hf_config(LLAMA, tie_embeddings=True, vocab=3)


def test_models_that_transformers_has_not_are_not_exported() -> None:
    config = ModelConfig.preset("nha-tiny", attention_bias="qkv", qk_norm=True, value_dim=32)
    with pytest.raises(ValueError, match="transformers has no model of this config") as error:
        to_hf_config(config)
    for field in ("value_activation", "output_norm", "conv_width", "value_dim", "attention_bias"):
        assert f"{field} = " in str(error.value)
