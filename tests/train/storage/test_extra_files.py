"""The files of a pretrained model beside its weights: what they say of tokens, prompts, drawing."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx

import nha_jax
from nha_jax.tokenizer.from_file import FileTokenizer
from tests.support.train.pretrained_tokenizer import (
    BEGIN,
    CONFIG,
    END,
    OTHER_END,
    TEMPLATE,
    TURN,
    tokenizer_json,
)
from tests.support.train.raw_files import json_lines, prepare
from train.cli import main
from train.data.chat_template import ChatTemplate
from train.data.prepared_folder import PreparedFolder
from train.data.tokenizers import load_tokenizer
from train.errors import ConfigError, DataError


def write(folder: Path, **files: Any) -> Path:
    """tokenizer_config=... becomes tokenizer_config.json, and so on; bytes stay as they are."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        as_bytes = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / f"{name}.json").write_bytes(as_bytes)
    return folder


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config": {"eos_token": "<end>"}}, END),
        ({"tokenizer_config": {"eos_token": {"content": "<end>", "lstrip": False}}}, END),
        ({"tokenizer_config": {}, "special_tokens_map": {"eos_token": "<end>"}}, END),
        ({"special_tokens_map": {"eos_token": {"content": "<end>"}}}, END),
        (
            {"tokenizer_config": {"eos_token": None}, "generation_config": {"eos_token_id": END}},
            END,
        ),
        ({"generation_config": {"eos_token_id": [END, TURN]}, "config": {"eos_token_id": 3}}, END),
        ({"config": {"eos_token_id": END}}, END),
        ({"tokenizer_config": {}, "config": {"hidden_size": 8}}, OTHER_END),
        ({}, OTHER_END),
    ],
    ids=["text", "object", "map", "map alone", "number", "numbers", "config", "by name", "alone"],
)
def test_the_end_token_is_found_where_it_is_told(
    tmp_path: Path, files: dict[str, Any], expected: int
) -> None:
    folder = write(tmp_path / "model", tokenizer=tokenizer_json(None), **files)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.end_token == expected
    # What a prepared folder or a run takes along says the same.
    for name, content in tokenizer.files.items():
        (tmp_path / name).write_bytes(content)
    assert load_tokenizer(tmp_path).end_token == expected


def test_files_survive_byte_for_byte(tmp_path: Path) -> None:
    config = f"{json.dumps(CONFIG, indent=8)}\n\n".encode()
    folder = write(tmp_path, tokenizer=tokenizer_json(None), tokenizer_config=config)
    assert load_tokenizer(folder).files["tokenizer_config.json"] == config
    changed = load_tokenizer(folder, "<turn>")
    assert changed.end_token == TURN
    assert json.loads(changed.files["tokenizer_config.json"]) == CONFIG | {"eos_token": "<turn>"}


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({"tokenizer_config": {"eos_token": "<no>"}}, ConfigError, "eos_token = '<no>'"),
        ({"tokenizer_config": b"[]"}, DataError, "tokenizer_config.json: damaged"),
        ({"special_tokens_map": b"{"}, DataError, "special_tokens_map.json: damaged"),
        ({"generation_config": b"1"}, DataError, "generation_config.json: damaged"),
    ],
    ids=["unknown", "config", "map", "generation"],
)
def test_what_is_damaged_is_named(
    tmp_path: Path, files: dict[str, Any], error: type[Exception], message: str
) -> None:
    folder = write(tmp_path, tokenizer=tokenizer_json(None), **files)
    with pytest.raises(error, match=message):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("template", "config", "begin"),
    [
        (None, {}, ()),
        ("<begin> $A", {}, (BEGIN,)),
        ("<begin> $A <end>", {}, (BEGIN,)),
        ("$A <end>", {}, ()),
        ("<begin> <turn> $A", {}, (BEGIN, TURN)),
        (None, {"add_bos_token": True}, (BEGIN,)),
        ("<begin> $A", {"add_bos_token": True}, (BEGIN,)),
    ],
    ids=["none", "begin", "both", "end", "two", "asked for", "asked for twice"],
)
def test_prompts_and_documents_begin_as_the_tokenizer_says(
    tmp_path: Path, template: str | None, config: dict[str, Any], begin: tuple[int, ...]
) -> None:
    content = tokenizer_json(template)
    folder = write(tmp_path / "model", tokenizer=content, tokenizer_config=CONFIG | config)
    tokenizer = load_tokenizer(folder)
    plain = tokenizer.encode("a <begin>b")
    assert not np.isin(plain, [BEGIN, END]).any()
    assert tokenizer.encode_prompt("a <begin>b").tolist() == [*begin, *plain]
    assert tokenizer.encode_prompt("<begin>a", chat=True).tolist() == [BEGIN, plain[0]]
    assert (tokenizer.encode("a <begin>b") == plain).all()  # whatever was encoded before

    (tmp_path / "a.jsonl").write_bytes(json_lines(["a <begin>b"] * 3))
    arguments = [tmp_path / "a.jsonl", f"--tokenizer={folder}", "--workers=1"]
    assert prepare(tmp_path / "out", *arguments, "--held-out-fraction=0") == 0
    prepared = PreparedFolder.open(tmp_path / "out")
    assert prepared.training.read(0, len(prepared.training)).tolist() == [*begin, *plain, END] * 3
    assert prepared.training.text(1000) == b"a <begin>b" * 3
    assert prepared.manifest.settings.get("begin_tokens", []) == list(begin)
    assert prepared.tokenizer.files == tokenizer.files


def test_a_folder_without_a_tokenizer_cannot_be_prepared_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(tmp_path / "out", __file__, f"--tokenizer={tmp_path}") == 2
    assert "holds no tokenizer.json" in capsys.readouterr().err


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with all that a chat model brings."""
    folder = tmp_path_factory.mktemp("chat")
    config = nha_jax.ModelConfig.preset(
        "nha-tiny", vocab_size=260, num_layers=1, hidden_size=16, num_slots=2, dtype="float32"
    )
    files = {
        "tokenizer.json": tokenizer_json("<begin> $A"),
        "tokenizer_config.json": json.dumps(CONFIG).encode(),
        "chat_template.jinja": TEMPLATE.encode(),
    }
    nha_jax.save(folder / "model", nha_jax.Model(config, rngs=nnx.Rngs(0)), files=files)
    return folder / "model"


@pytest.fixture
def generate(model: Path, capsys: pytest.CaptureFixture[str]):
    """Runs `nha generate` with a generation_config.json; returns the exit code, output, errors."""

    def run(defaults: object, *arguments: str) -> tuple[int, str, str]:
        (model / "generation_config.json").write_text(json.dumps(defaults))
        code = main(["generate", str(model), "--max-new-tokens=6", *arguments])
        return code, *capsys.readouterr()

    return run


def test_generation_defaults_count_where_no_option_does(generate) -> None:
    greedy = generate({}, "--prompt=a", "--temperature=0", "--json")
    assert "generation_config" not in greedy[2]
    defaults = {"do_sample": False, "temperature": 5.0, "top_k": 3, "max_new_tokens": 1}
    code, output, errors = generate(defaults, "--prompt=a", "--json")
    assert (code, output) == (0, greedy[1])
    assert errors.splitlines()[0] == "from generation_config.json: temperature=0"
    assert len(json.loads(output)["tokens"]) == 6

    first = json.loads(output)["tokens"][0]
    defaults = {"temperature": 5.0, "top_k": 1, "top_p": 1.0, "eos_token_id": [first, END]}
    code, output, errors = generate(defaults, "--prompt=a", "--temperature=1", "--json")
    assert code == 0
    assert (
        errors.splitlines()[0]
        == f"from generation_config.json: top_k=1, stop tokens {first}, {END}"
    )
    record = json.loads(output)
    assert (record["tokens"], record["text"], record["finished"]) == ([first], "", "stop")


@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        ({"top_p": -1}, "generation_config.json: top_p = -1: expected"),
        ({"temperature": "hot"}, "temperature = 'hot': expected"),
        (
            {"temperature": [], "top_k": 2.5, "min_p": 7, "eos_token_id": "x", "do_sample": 1},
            "do_sample = 1: expected true or false; temperature = []: expected a number of at "
            "least 0; top_k = 2.5: expected a whole number of at least 0, or null; min_p = 7: "
            "expected a number from 0 to 1; eos_token_id = 'x': expected a token's number",
        ),
        ({"do_sample": False, "repetition_penalty": {}}, "repetition_penalty = {}: expected"),
        ({"eos_token_id": [True]}, "eos_token_id = [True]: expected a token's number"),
    ],
)
def test_defaults_that_cannot_be_are_named(generate, defaults: object, message: str) -> None:
    code, _, errors = generate(defaults, "--prompt=a")
    assert code > 0
    assert message in errors


def test_end_tokens_that_the_model_has_not_do_not_stop_it(generate) -> None:
    ids = [-1, 10**6, 2**40, *range(100, 112)]
    code, output, errors = generate({"eos_token_id": ids, "top_k": 10**6}, "--prompt=a", "--json")
    assert code == 0, errors
    assert json.loads(output)["tokens"]


def test_chat_takes_no_tokens(generate) -> None:
    code, _, errors = generate({}, "--chat", "--prompt-tokens=1 2")
    assert code == 2
    assert "--prompt-tokens: expected text with --chat" in errors


def test_a_prompt_is_read_from_its_first_token_on(model: Path, generate) -> None:
    text = json.loads(generate({}, "--prompt=ab", "--temperature=0", "--json")[1])["tokens"]
    tokens = f"--prompt-tokens={BEGIN} " + " ".join(map(str, load_tokenizer(model).encode("ab")))
    assert json.loads(generate({}, tokens, "--temperature=0", "--json")[1])["tokens"] == text


@pytest.mark.parametrize("where", ["file", "text", "list"])
def test_chat_puts_the_prompt_into_the_template(
    model: Path, generate, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where != "file":
        named = [{"name": "tools", "template": "no"}, {"name": "default", "template": TEMPLATE}]
        config = CONFIG | {"chat_template": TEMPLATE if where == "text" else named}
        folder = write(tmp_path, tokenizer_config=config)
    else:
        folder = model
    rendered = ChatTemplate.of(folder).render(" <turn> hi ")
    assert rendered == "<begin>    <turn>user: <turn> hi<end>\n<turn>assistant:"
    if where == "file":
        plain = load_tokenizer(model).encode
        tokens = [BEGIN, *plain("    "), TURN, *plain("user: "), TURN, *plain(" hi"), END]
        tokens += [*plain("\n"), TURN, *plain("assistant:")]
        greedy = ("--temperature=0", "--json")
        expected = generate({}, f"--prompt-tokens={' '.join(map(str, tokens))}", *greedy)[1]
        record = json.loads(generate({}, "--chat", "--prompt= <turn> hi ", *greedy)[1])
        assert record["tokens"] == json.loads(expected)["tokens"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('one user only') }}", "one user only"),
        ("{% if %}", "cannot use the chat template"),
        ("{{ messages.append(1) }}", "cannot use the chat template"),
        ("{{ ''.__class__.__mro__ }}", "cannot use the chat template"),
        (None, "no chat template"),
    ],
    ids=["refuses", "damaged", "changes", "reaches out", "none"],
)
def test_a_template_that_cannot_be_used_is_one_line(
    tmp_path: Path, template: str | None, message: str
) -> None:
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(ConfigError, match=message):
        ChatTemplate.of(tmp_path).render("hi")


def test_a_missing_package_is_one_line(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2.sandbox", None)
    with pytest.raises(
        ConfigError, match=r'jinja2 is not installed; `pip install "nha_jax\[chat\]"`'
    ):
        ChatTemplate.of(model)


def test_names_and_json_reach_a_template_as_they_are(tmp_path: Path) -> None:
    template = "{{ {'é': '<b>'} | tojson }} {{ strftime_now('%Y') | length }} {{ tools is none }}"
    (tmp_path / "chat_template.jinja").write_text(template)
    assert ChatTemplate.of(tmp_path).render("hi") == '{"é": "<b>"} 4 True'


def test_tokens_of_chat_are_a_matter_of_the_call(tmp_path: Path) -> None:
    tokenizer = FileTokenizer({"tokenizer.json": tokenizer_json(None)}, None, "here")
    assert tokenizer.encode_prompt("<end>", chat=True).tolist() == [END]
    assert len(tokenizer.encode_prompt("<end>")) == len("<end>")
