"""The files beside a model's weights, whatever their fields hold: read, or named in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nha_jax import SamplingOptions
from tests.support.train.pretrained_tokenizer import tokenizer_json
from tests.train.storage.test_extra_files import write
from train.data.chat_template import ChatTemplate
from train.data.tokenizers import load_tokenizer
from train.errors import ConfigError, DataError, UserError
from train.text.generation_defaults import GenerationDefaults

OF_ANY_TYPE = [
    None, True, "x", "", [], [[]], [None], {}, {"a": [1]}, -1, 0, 3, 0.5, 1e300, float("nan"),
    2**40, -(2**70), 10**400,
]  # fmt: skip


def refusal(call: Callable[[], object]) -> str:
    """The error that a user would see, which must be one line; "" if there is none."""
    try:
        call()
        message = ""
    except UserError as error:
        message = str(error)
    assert "\n" not in message
    return message


def sampling_of(folder: Path) -> None:
    defaults = GenerationDefaults.of(folder, 64)
    options = SamplingOptions(**defaults.sampling, stop_tokens=defaults.stop_tokens)
    options.check_vocabulary(64)


def test_each_field_of_generation_config_may_hold_anything(tmp_path: Path) -> None:
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "eos_token_id")
    for name in names:
        for value in OF_ANY_TYPE:
            for do_sample in (None, False):
                write(tmp_path, generation_config={"do_sample": do_sample, name: value})
                message = refusal(lambda: sampling_of(tmp_path))
                assert not message or f"generation_config.json: {name} = " in message
    for value in OF_ANY_TYPE:
        write(tmp_path, generation_config={"do_sample": value})
        message = refusal(lambda: sampling_of(tmp_path))
        assert not message or "generation_config.json: do_sample = " in message


@pytest.mark.parametrize(
    ("defaults", "sampling", "stop"),
    [
        ({"top_k": 65}, {}, ()),
        ({"top_k": 2**20, "top_p": 1.5}, {}, ()),
        ({"top_p": 0}, {"top_k": 1}, ()),
        ({"temperature": 0, "do_sample": False}, {"temperature": 0}, ()),
        ({"temperature": None, "top_k": "x", "do_sample": False}, {"temperature": 0}, ()),
        ({"pad_token_id": -1, "eos_token_id": -1}, {}, ()),
        ({"eos_token_id": [64, 5, -1, 2**40]}, {}, (5,)),
        ({"eos_token_id": list(range(20))}, {}, tuple(range(20))),
    ],
)
def test_what_transformers_ignores_stops_nothing(
    tmp_path: Path, defaults: dict[str, Any], sampling: dict[str, Any], stop: tuple[int, ...]
) -> None:
    write(tmp_path, generation_config=defaults)
    found = GenerationDefaults.of(tmp_path, 64)
    assert (found.sampling, found.stop_tokens) == (sampling, stop)
    SamplingOptions(**found.sampling, stop_tokens=found.stop_tokens).check_vocabulary(64)


@pytest.mark.parametrize("kind", ["eos_token", "bos_token", "add_bos_token", "chat_template"])
@pytest.mark.parametrize("name", ["tokenizer_config", "special_tokens_map"])
def test_each_field_of_a_tokenizer_may_hold_anything(tmp_path: Path, name: str, kind: str) -> None:
    content = tokenizer_json(None)
    for value in (
        *OF_ANY_TYPE,
        {"content": 3},
        {"content": "<end>"},
        [{"name": [], "template": 1}],
    ):
        folder = write(
            tmp_path, tokenizer=content, **{name: {"eos_token": "<end>"} | {kind: value}}
        )
        message = refusal(lambda folder=folder: load_tokenizer(folder))
        if name == "tokenizer_config":
            message = message or refusal(lambda folder=folder: ChatTemplate.of(folder))
        assert not message or f"{kind} = " in message or "no chat template" in message, value


def test_a_wrong_field_of_each_file_is_named_at_once(tmp_path: Path) -> None:
    wrong = {"bos_token": 3, "add_bos_token": "yes"}
    folder = write(
        tmp_path,
        tokenizer=tokenizer_json(None),
        tokenizer_config=wrong,
        special_tokens_map={"eos_token": {"content": None}},
    )
    with pytest.raises(DataError) as error:
        load_tokenizer(folder)
    for problem in (
        "tokenizer_config.json: bos_token = 3: expected the token's text",
        "tokenizer_config.json: add_bos_token = 'yes': expected true or false",
        "special_tokens_map.json: eos_token = {'content': None}: expected the token's text",
    ):
        assert problem in str(error.value)


def without(*path: str, value: object = None) -> bytes:
    """A tokenizer.json with another value at this path."""
    content = json.loads(tokenizer_json(None))
    at = content
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return json.dumps(content).encode()


def test_each_field_of_tokenizer_json_may_hold_anything(tmp_path: Path) -> None:
    model = [("model", part) for part in ("type", "vocab", "merges", "unk_token")]
    for path in [("version",), ("added_tokens",), ("model",), ("decoder",), *model]:
        for value in OF_ANY_TYPE[:-2]:
            folder = write(tmp_path, tokenizer=without(*path, value=value))
            message = refusal(lambda folder=folder: load_tokenizer(folder))
            assert not message or "tokenizer.json: " in message


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"\xff\xfe", b"[" * 10_000])
def test_a_tokenizer_that_was_cut_is_named(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json: not a tokenizer\.json: "):
        load_tokenizer(write(tmp_path, tokenizer=content))


def test_a_template_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff{{ messages }}")
    with pytest.raises(ConfigError, match="cannot use the chat template: no UTF-8"):
        ChatTemplate.of(tmp_path)


def test_of_several_templates_the_default_is_taken(tmp_path: Path) -> None:
    for templates in (
        [{"name": "tools", "template": "x"}, {"name": "default", "template": "hello"}],
        {"tools": "x", "default": "hello"},
    ):
        folder = write(tmp_path, tokenizer_config={"chat_template": templates})
        assert ChatTemplate.of(folder).render("hi") == "hello"
