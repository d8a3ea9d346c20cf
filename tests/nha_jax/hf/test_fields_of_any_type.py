"""Whatever a field of a config.json holds, the model is imported or the field is named."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nha_jax.hf.families import HYBRIDS, PUBLISHED_FAMILY
from nha_jax.hf.own_code import write_own_code_config
from nha_jax.hf.pretrained import import_config
from tests.support.hf.layouts import layout
from tests.support.hf.originals import FIXTURES, NAMES


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


NO_NUMBERS: list[Any] = ["x", "", [], ["x"], [[]], [None, 3], {}, {"a": {"b": [1]}}, nested(300)]
"""Values that only a list, a mapping or a name could be."""

NUMBERS: list[Any] = [
    None, False, True, 0, 1, -1, 3, 0.5, -0.0, 2.0, 1e-60, 1e300, float("nan"), float("inf"),
    2**31, 2**40, -(2**70), 10**400,
]  # fmt: skip

PUBLISHED = dict(PUBLISHED_FAMILY.defaults) | {
    "model_type": "nha", "architectures": ["NHAForCausalLM"], "expand_k": 0.5, "expand_v": 1,
    "block_size": 2, "transformer_idx": 1, "feature_map": "swish", "hidden_act": "swish",
    "torch_dtype": "float32", "empty_slots": "mask", "rope_scaling": None, "use_norm": True,
}  # fmt: skip

# A key that these read without computing with it.
UNREAD = {
    "architectures", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id",
    "output_router_logits", "router_aux_loss_coef", "transformers_version", "use_cache",
}  # fmt: skip


def configs() -> dict[str, dict[str, Any]]:
    """A config.json of every family, with its rotary embedding in both places."""
    found = {name: json.loads((FIXTURES / name / "config.json").read_text()) for name in NAMES}
    for family in HYBRIDS.values():
        name = family.model_type.removesuffix("_nha").replace("_", "-").replace("llama", "llama-2")
        own = {"num_slots": 4, "window_size": 8, "block_size": 2, "transformer_idx": 1}
        found[family.model_type] = found[name] | own | {
            "model_type": family.model_type, "architectures": [family.architecture],
        }  # fmt: skip
    found["nha"] = PUBLISHED
    for name in ("a hybrid Qwen", "a hybrid with experts"):
        found[name] = json.loads(json.dumps(write_own_code_config(layout(name))))
    slides = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    found["sliding"] = found["qwen3"] | slides
    return found


CONFIGS = configs()


def refusal(fields: dict[str, Any]) -> str:
    """The error of an import, which must be one line about config.json; "" if there is none."""
    try:
        import_config(fields)
    except ValueError as error:
        message = str(error)
        assert message.startswith("config.json")
        assert "\n" not in message
        assert len(message) < 2000
        return message
    return ""


@pytest.mark.parametrize("name", CONFIGS)
def test_each_field_may_hold_anything(name: str) -> None:
    fields = CONFIGS[name]
    assert not refusal(fields)
    for key in fields:
        for value in [*NO_NUMBERS, *NUMBERS]:
            message = refusal(fields | {key: value})
            number = isinstance(fields[key], int | float) and not isinstance(fields[key], bool)
            # null and empty values may mean that a key was left out.
            if number and value in NO_NUMBERS and key not in UNREAD:
                assert f"{key} = " in message, (key, value)


@pytest.mark.parametrize("name", [name for name, x in CONFIGS.items() if "rope_parameters" in x])
def test_each_field_of_the_rotary_embedding_may_hold_anything(name: str) -> None:
    fields = CONFIGS[name]
    rope = fields["rope_parameters"]
    for key in {*rope, "original_max_position_embeddings", "mscale", "attention_factor"}:
        for value in [*NO_NUMBERS, *NUMBERS]:
            message = refusal(fields | {"rope_parameters": rope | {key: value}})
            if key in rope and value in NO_NUMBERS:
                assert "rope_parameters" in message, (key, value)
            refusal(fields | {"rope_scaling": rope | {key: value, "mscale_all_dim": value}})
    for value in [*NO_NUMBERS, *NUMBERS]:
        refusal(fields | {"original_max_position_embeddings": value})
        refusal(fields | {"rope_parameters": rope | {"factor": None}, "rope_theta": value})


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data(), name=st.sampled_from(sorted(CONFIGS)))
def test_several_fields_may_hold_anything(data: st.DataObject, name: str) -> None:
    fields = CONFIGS[name]
    keys = data.draw(st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=4))
    changed = {key: data.draw(anything) for key in keys}
    rope = fields.get("rope_parameters")
    if rope and data.draw(st.booleans()):
        changed["rope_parameters"] = rope | {
            data.draw(st.sampled_from(sorted(rope))): data.draw(anything)
        }
    refusal(fields | changed)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(fields=st.dictionaries(st.text() | st.sampled_from(sorted(CONFIGS["nha"])), anything))
def test_an_object_of_anything_is_refused(fields: dict[str, Any]) -> None:
    for model_type in ({}, {"model_type": "nha"}, {"model_type": "qwen3_moe_nha"}):
        assert refusal(fields | model_type) or model_type


def test_every_wrong_field_is_listed_at_once() -> None:
    wrong = {"hidden_size": "x", "head_dim": [], "rms_norm_eps": None, "tie_word_embeddings": 2}
    for name in ("llama-2", "llama_nha"):
        message = refusal(CONFIGS[name] | wrong)
        assert [f"{key} = {value!r}: expected" in message for key, value in wrong.items()] == [
            True
        ] * 4
    wrong = {"hidden_size": "x", "num_heads": {}, "norm_eps": None, "num_slots": 0.5}
    message = refusal(PUBLISHED | wrong)
    assert [f"{key} = {value!r}: expected" in message for key, value in wrong.items()] == [True] * 4
