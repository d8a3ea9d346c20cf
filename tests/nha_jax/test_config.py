"""ModelConfig: what it accepts, what it derives, and what it counts."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

import nha_jax
from nha_jax import ModelConfig
from nha_jax.config_parts import Experts, RopeScaling

SMALL = {"vocab_size": 50, "num_layers": 4, "hidden_size": 96, "num_query_heads": 6}


def small(**overrides) -> ModelConfig:
    return ModelConfig.from_dict(SMALL | overrides)


def tpu_options(**options) -> dict:
    return {"kernel_options": {"pallas_tpu": options}}


def test_sizes_left_out_follow_from_the_others():
    config = small()
    assert (config.num_kv_heads, config.key_dim, config.value_dim) == (6, 16, 16)
    assert config.mlp_size == 256  # 8/3 x 96, already a multiple of 64
    assert small(hidden_size=108).mlp_size == 320  # 288, rounded up
    assert small(key_dim=8).value_dim == 8


@pytest.mark.parametrize(
    ("window_size", "windows", "period"),
    [
        pytest.param(16, (16, 16, 16, 16), (16,), id="one-int"),
        pytest.param(None, (None,) * 4, (None,), id="full"),
        pytest.param((8, None), (8, None, 8, None), (8, None), id="pattern"),
        pytest.param([8, 0], (8, 0, 8, 0), (8, 0), id="list"),
        pytest.param((8, 8, 8, 8), (8, 8, 8, 8), (8,), id="longer-than-its-period"),
        pytest.param((8, 8, 8, 4), (8, 8, 8, 4), (8, 8, 8, 4), id="no-repetition"),
    ],
)
def test_windows(window_size, windows, period):
    config = small(window_size=window_size)
    assert config.windows == windows
    assert config.window_period == period


def _fields(value: object) -> str:
    """A test id of the arguments: name=value."""
    if isinstance(value, dict):
        return "-".join(f"{name}={entry}" for name, entry in value.items())
    return ""


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"vocab_size": 0}, "vocab_size=0 must be an integer of at least 1"),
        ({"num_layers": 2.0}, "num_layers=2.0 must be an integer"),
        ({"num_slots": True}, "num_slots=True must be an integer"),
        ({"hidden_size": 97}, "hidden_size=97 is not a multiple of num_query_heads=6"),
        ({"num_kv_heads": 4}, "num_kv_heads=4 must divide num_query_heads=6"),
        ({"num_kv_heads": 0}, "num_kv_heads=0 must be an integer of at least 1"),
        ({"key_dim": 15}, "key_dim=15 must be even"),
        ({"window_size": -1}, "window_size=-1 must be an integer of at least 0, None"),
        ({"window_size": "8"}, "window_size='8' must be an integer"),
        ({"window_size": ()}, r"window_size=\(\) must be"),
        ({"window_size": (8, 8, 0)}, "a pattern of 3 layers, which does not divide num_layers=4"),
        ({"num_slots": 0, "window_size": 0}, "window_size=0 has a layer without a window"),
        ({"num_slots": -1}, "num_slots=-1 must be an integer of at least 0"),
        ({"conv_width": -1}, "conv_width=-1 must be an integer of at least 0"),
        ({"conv_width": 1}, "conv_width=1 has no past tap"),
        ({"gate_logit_normalizer": 0.0}, "gate_logit_normalizer=0.0 must be a finite number"),
        ({"norm_eps": float("nan")}, "norm_eps=nan must be a finite number"),
        ({"rope_theta": "1e4"}, "rope_theta='1e4' must be a finite number"),
        ({"remat": True}, "remat=True must be one of 'none', 'full', 'operator', 'dots'"),
        ({"dtype": "float8"}, "dtype='float8' must be one of 'bfloat16', 'float32'"),
        ({"empty_slots": "drop"}, "empty_slots='drop' must be one of 'attend', 'mask'"),
        ({"slot_feature_map": "elu"}, "slot_feature_map='elu' must be one of 'identity'"),
        ({"slot_delay": -1}, "slot_delay=-1 must be None, or an integer from 0"),
        ({"slot_delay": 0.5, "window_size": 8}, "slot_delay=0.5 must be None, or an integer"),
        ({"slot_delay": 9, "window_size": (8, 16)}, "slot_delay=9 .* the windows are 8, 16"),
        ({"slot_delay": 0, "window_size": (8, None)}, "slot_delay=0 .* windows are 8, None"),
        ({"attention_scale": 0.0}, "attention_scale=0.0 must be a finite number above 0"),
        ({"output_norm_eps": -1e-5}, "output_norm_eps=-1e-05 must be a finite number above 0"),
        ({"implementation": "cuda"}, "implementation='cuda' must be one of 'reference', 'xla'"),
        (tpu_options(chunk=7), r"kernel_options\['pallas_tpu'\].*32, 64 or 128, got 7"),
        (tpu_options(chunks=7), r"kernel_options\['pallas_tpu'\] has no 'chunks'; there are chunk"),
        ({"kernel_options": {"xla": {}}}, "kernel_options: implementation 'xla' has no options"),
        ({"kernel_options": {"pallas": {}}}, "a key of kernel_options must be one of .*'pallas'"),
        ({"kernel_options": {"pallas_tpu": 7}}, r"\['pallas_tpu'\] must be a mapping, got 7"),
        ({"kernel_options": 64}, "kernel_options must be a mapping of implementations .* got 64"),
        ({"value_activation": "gelu"}, "value_activation='gelu' must be one of 'silu', 'identity'"),
        ({"attention_bias": True}, "attention_bias=True must be one of 'none', 'qkv', 'all'"),
        ({"output_norm": 1}, "output_norm=1 must be true or false"),
        ({"qk_norm": None}, "qk_norm=None must be true or false"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear' must be a RopeScaling, a mapping"),
        ({"rope_scaling": {"kind": "linear"}}, "rope_scaling=.* does not fit: .*'factor'"),
        ({"rope_scaling": {"kind": "linear", "by": 2}}, "rope_scaling=.* does not fit: .*'by'"),
        ({"experts": 8}, "experts=8 must be an Experts, a mapping of its fields, or None"),
        (
            {"experts": {"count": 8, "per_token": 9, "size": 16}},
            "experts=.* does not fit: per_token=9 must be at most count=8",
        ),
        ({"num_slot": 3}, "unknown field 'num_slot'; did you mean 'num_slots'?"),
        ({"qwertz": 3}, "unknown field 'qwertz'$"),
        ({"vocab_size": 2**31}, "vocab_size=2147483648 must be .* at most 2147483647"),
        ({"vocab_size": 10**400}, "vocab_size=<an integer of 1329 bits> must be"),
        ({"hidden_size": np.float32(96)}, "hidden_size=96.0 must be an integer"),
        ({"num_layers": 2**17}, "num_layers=131072 must be at most 65536"),
        ({"num_slots": np.nan}, "num_slots=nan must be an integer"),
        ({"mup_base_width": 0}, "mup_base_width=0 must be an integer of at least 1"),
        ({"mup_base_width": 48.0}, "mup_base_width=48.0 must be an integer"),
        ({"mlp_size": np.int64(2**40)}, "mlp_size=1099511627776 must be"),
        ({"key_dim": np.bool_(True)}, "key_dim=True must be an integer"),
        ({"window_size": 2**64}, "window_size=18446744073709551616 must be .* at most 2147483647"),
        ({"window_size": [8, np.inf]}, r"window_size=\(8, inf\) must be"),
        ({"window_size": np.ones((2, 2), int)}, "window_size=.* must be an integer"),
        ({"rope_theta": 10**400}, "rope_theta=<an integer of 1329 bits> must be a finite number"),
        ({"rope_theta": 1e300}, "rope_theta=1e.300 must be a finite number above 0, in float32"),
        ({"norm_eps": -0.0}, "norm_eps=-0.0 must be a finite number above 0"),
        ({"norm_eps": 1e-60}, "norm_eps=1e-60 must be a finite number above 0, in float32 too"),
        ({"gate_logit_normalizer": np.float32("inf")}, "gate_logit_normalizer=inf must be"),
        ({"dtype": ["float32"]}, r"dtype=\['float32'\] must be one of"),
        ({"remat": np.zeros(3)}, r"remat=array\(.*\) must be one of"),
        ({"tie_embeddings": np.int64(1)}, "tie_embeddings=1 must be true or false"),
        (tpu_options(chunk=[64]), r"kernel_options\['pallas_tpu'\].*got \[64\]"),
        ({"experts": {"count": 8, "per_token": 2, "size": 2**31}}, "size=2147483648 must be"),
        ({"experts": {1: 2}}, "experts={1: 2} does not fit"),
    ],
    ids=_fields,
)
def test_a_wrong_value_is_one_line_that_names_it(overrides, message):
    with pytest.raises(ValueError, match=message) as error:
        small(**overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "ntk"}, "kind='ntk' must be one of 'linear', 'llama3', 'yarn'"),
        ({"factor": 0.5}, "factor=0.5 must be a finite number of at least 1"),
        ({"factor": True}, "factor=True must be a finite number"),
        ({"kind": "llama3"}, "original_length=None must be at least 1: kind='llama3' needs it"),
        ({"kind": "yarn", "original_length": 0}, "original_length=0 must be at least 1"),
        ({"low_frequency_factor": 0}, "low_frequency_factor=0 must be a finite number above 0"),
        (
            {"low_frequency_factor": 4},
            "high_frequency_factor=4.0 must be .* low_frequency_factor=4",
        ),
        ({"beta_slow": 40.0}, "beta_fast=32.0 must be a finite number above beta_slow=40.0"),
        (
            {"attention_factor": 0.0},
            "attention_factor=0.0 must be a finite number above 0, or None",
        ),
        ({"truncate": 1}, "truncate=1 must be true or false"),
        ({"kind": ["yarn"]}, r"kind=\['yarn'\] must be one of"),
        ({"factor": 10**400}, "factor=<an integer of 1329 bits> must be a finite number"),
        ({"factor": np.nan}, "factor=nan must be a finite number"),
        ({"factor": "2"}, "factor='2' must be a finite number"),
        ({"original_length": "16"}, "original_length='16' must be at least 1"),
        ({"kind": "yarn", "original_length": True}, "original_length=True must be at least 1"),
        ({"kind": "yarn", "original_length": 2**40}, "original_length=1099511627776 must be"),
    ],
    ids=_fields,
)
def test_a_wrong_scaling_is_one_line_that_names_it(fields, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        RopeScaling(**{"kind": "linear", "factor": 2.0} | fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"count": 0}, "count=0 must be an integer of at least 1"),
        ({"per_token": 2.0}, "per_token=2.0 must be an integer of at least 1"),
        ({"size": True}, "size=True must be an integer of at least 1"),
        ({"count": 3, "per_token": 4}, "per_token=4 must be at most count=3"),
        ({"normalize": "yes"}, "normalize='yes' must be true or false"),
    ],
    ids=_fields,
)
def test_a_wrong_mixture_is_one_line_that_names_it(fields, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Experts(**{"count": 4, "per_token": 2, "size": 8} | fields)


def test_block_sizes_of_before_are_options_of_the_tpu_kernels():
    assert small(block_sizes=None) == small()
    assert small(block_sizes={"chunk": 128}) == small(**tpu_options(chunk=128))


def test_missing_fields_are_named():
    with pytest.raises(ValueError, match="missing num_layers, num_query_heads"):
        ModelConfig.from_dict({"vocab_size": 5, "hidden_size": 8})


@pytest.mark.parametrize("fields", [None, [], "nha-tiny", 3, [["vocab_size", 3]]], ids=repr)
def test_fields_that_are_no_mapping_are_shown(fields):
    with pytest.raises(ValueError, match="ModelConfig: expected a mapping of its fields, got "):
        ModelConfig.from_dict(fields)


ANYTHING = [
    None, True, "x", "", [], [[]], {}, {"a": [None]}, {"": 1}, 0, -1, 3, 0.5, -0.0, 1e300,
    float("nan"), float("inf"), 2**31, -(2**70), 10**400,
]  # fmt: skip


@pytest.mark.parametrize("key", [*small().to_dict(), "block_sizes", "novelty"])
def test_a_field_may_hold_anything_and_is_named(key):
    for value in ANYTHING:
        fields = small().to_dict() | {key: value}
        try:
            ModelConfig.from_dict(json.loads(json.dumps(fields)))
        except ValueError as error:
            message = str(error)
            assert message.startswith("ModelConfig: ")
            assert key in message or key == "block_sizes", message
            assert "\n" not in message
            assert len(message) < 1000


def test_a_key_that_is_no_text_is_shown():
    with pytest.raises(ValueError, match=r"unknown field 7$"):
        ModelConfig.from_dict(SMALL | {7: 3})


@pytest.mark.parametrize("name", [None, ["nha-tiny"], 3], ids=repr)
def test_a_preset_is_a_name(name):
    with pytest.raises(ValueError, match=r"no preset .*; there are 'nha-tiny'"):
        ModelConfig.preset(name)


def test_numpys_numbers_are_kept_as_pythons():
    numbers = {name: np.int64(value) for name, value in SMALL.items()}
    config = ModelConfig(
        **numbers,
        num_kv_heads=jnp.int32(2),
        num_slots=np.uint8(16),
        window_size=np.array([8, 0]),
        tie_embeddings=np.bool_(True),
        rope_theta=np.float32(10000),
        norm_eps=np.float64(1e-5),
        dtype=np.str_("float32"),
        kernel_options={"pallas_tpu": {"chunk": np.int16(128)}},
        rope_scaling=RopeScaling(kind="yarn", factor=np.float32(4), original_length=np.int64(32)),
        experts={"count": np.int64(8), "per_token": np.int32(2), "size": np.array(32)},
    )
    written = json.dumps(config.to_dict())
    assert ModelConfig.from_dict(json.loads(written)) == config
    assert "np." not in repr(config)
    assert config.windows == (8, 0, 8, 0)
    assert hash(config) == hash(ModelConfig.from_dict(config.to_dict()))
    widened = dataclasses.replace(config, window_size=(None, np.int64(4)))
    assert json.loads(json.dumps(widened.to_dict()))["window_size"] == [None, 4]


def test_a_preset_takes_numpys_numbers():
    config = ModelConfig.preset("nha-tiny", num_slots=np.int64(8), window_size=[np.int32(4)])
    assert config == ModelConfig.preset("nha-tiny", num_slots=8, window_size=(4,))
    json.dumps(config.to_dict())


def test_the_widest_window_is_accepted():
    assert small(window_size=2**31 - 1).windows == (2**31 - 1,) * 4


def test_dictionary_survives_json():
    config = small(
        window_size=(8, None),
        num_kv_heads=2,
        implementation="xla",
        kernel_options={"pallas_tpu": {"chunk": 128}},
        rope_scaling={"kind": "yarn", "factor": 4, "original_length": 32, "truncate": False},
        experts={"count": 8, "per_token": 2, "size": 32, "normalize": False},
    )
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.to_dict()["window_size"] == [8, None]
    assert config.kernel_options == {"pallas_tpu": {"chunk": 128}}
    assert config.rope_scaling == RopeScaling(
        kind="yarn", factor=4, original_length=32, truncate=False
    )
    assert config.experts == Experts(count=8, per_token=2, size=32, normalize=False)
    assert hash(config) == hash(dataclasses.replace(config))


@pytest.mark.parametrize(
    ("name", "millions", "untied"),
    [("nha-340m", 347.4, 380.2), ("nha-1.3b", 1311.4, 1376.9), ("nha-tiny", 0.702, 0.735)],
)
def test_presets_have_the_sizes_in_their_names(name, millions, untied):
    assert nha_jax.num_parameters(ModelConfig.preset(name)) / 1e6 == pytest.approx(
        millions, rel=1e-3
    )
    config = ModelConfig.preset(name, tie_embeddings=False)
    assert nha_jax.num_parameters(config) / 1e6 == pytest.approx(untied, rel=1e-3)


def test_llama_preset_is_llama_and_its_gates():
    published, gates = 8_030_261_248, 32 * 4096 * 8 * 64
    assert nha_jax.num_parameters(ModelConfig.preset("llama-3-8b")) == published + gates


@pytest.mark.parametrize(
    ("name", "overrides", "parameters", "flops"),
    [
        ("nha-tiny", {}, 702_336, 1_571_852.0),
        ("nha-20m", {}, 19_325_952, 41_976_816.0),
        ("nha-340m", {}, 347_415_552, 713_286_400.0),
        ("nha-1.3b", {}, 1_311_393_792, 2_659_698_176.0),
        ("llama-3-8b", {}, 8_097_370_112, 15_680_667_648.0),
        ("nha-tiny", {"experts": {"count": 8, "per_token": 2, "size": 64}}, 852_864, 988_172.0),
        (
            "nha-tiny",
            {"attention_bias": "qkv", "qk_norm": True, "num_kv_heads": 1, "value_dim": 32}
            | {"tie_embeddings": False},
            635_872,
            1_301_753.0,
        ),
        ("nha-tiny", {"num_slots": 0}, 677_760, 1_401_740.0),
    ],
    ids=["tiny", "20m", "340m", "1.3b", "llama", "experts", "biases-and-norms", "no-slots"],
)
def test_counts_are_those_of_the_formula_that_was_written_out(name, overrides, parameters, flops):
    """Figures of the commit that still added the counts up by hand, at 2048 tokens."""
    config = ModelConfig.preset(name, **overrides)
    assert nha_jax.num_parameters(config) == parameters
    assert nha_jax.flops_per_token(config, 2048) == flops


def test_preset_overrides_reach_derived_sizes():
    config = ModelConfig.preset("nha-tiny", num_query_heads=4)
    assert (config.num_kv_heads, config.key_dim) == (4, 32)
    with pytest.raises(ValueError, match="no preset 'nha-2b'; there are 'nha-tiny', 'nha-20m'"):
        ModelConfig.preset("nha-2b")


def test_flops_of_one_layer_counted_by_hand():
    config = ModelConfig(
        vocab_size=10,
        num_layers=1,
        hidden_size=4,
        num_query_heads=2,
        num_kv_heads=1,
        key_dim=2,
        value_dim=4,
        num_slots=3,
        window_size=2,
        mlp_size=5,
        conv_width=4,
    )
    # q 2x2, k 2, v 4, f 3, o 2x4 columns or rows of 4; SwiGLU three times 4 x 5; head 4 x 10.
    matrices = 4 * (4 + 2 + 4 + 3 + 8) + 3 * 4 * 5 + 4 * 10
    convolution = 4 * (4 + 2 + 4)
    # T=4, W=2: tokens see 1, 2, 2, 2 keys; the last two find something in the slots.
    window = 2 * 2 * (2 + 4) * 7 / 4
    slots = (2 * 2 + 3 * 1) * (2 + 4) * 3 * 2 / 4
    expected = 2 * (matrices + convolution) + window + slots
    assert nha_jax.flops_per_token(config, 4) == pytest.approx(expected)
    assert nha_jax.training_flops_per_token(config, 4) == pytest.approx(3 * expected)


def test_of_experts_those_that_a_token_goes_through_are_counted():
    one = small(mlp_size=32)
    several = small(experts={"count": 8, "per_token": 3, "size": 32})
    swiglu, router = 3 * 96 * 32, 96 * 8
    growth = nha_jax.flops_per_token(several, 64) - nha_jax.flops_per_token(one, 64)
    assert growth == pytest.approx(4 * 2 * (2 * swiglu + router))  # layers, multiply and add
    assert nha_jax.num_parameters(several) - nha_jax.num_parameters(one) == 4 * (
        7 * swiglu + router
    )


def test_flops_are_flat_for_windows_and_grow_for_full_attention():
    window, full = small(window_size=16), small(window_size=None)
    assert nha_jax.flops_per_token(window, 2**16) == pytest.approx(
        nha_jax.flops_per_token(window, 2**13), rel=0.01
    )
    per_key = 4 * 2 * 6 * 32  # layers, multiply and add, heads, K + V
    growth = nha_jax.flops_per_token(full, 2048) - nha_jax.flops_per_token(full, 1024)
    assert growth == pytest.approx(per_key * 512)
    assert nha_jax.flops_per_token(small(window_size=100), 64) == nha_jax.flops_per_token(full, 64)
    with pytest.raises(ValueError, match="sequence_length=0 must be"):
        nha_jax.flops_per_token(full, 0)
