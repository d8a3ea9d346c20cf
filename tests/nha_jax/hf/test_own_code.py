"""Exports with code for transformers: what config.json says, what lies beside it, what comes back.

What that code computes is in test_in_transformers.py, which needs torch.
"""

import ast
import dataclasses
import json
from pathlib import Path
from typing import Any

import chex
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nha_jax
from nha_jax.hf.export import plan_export, write_export
from nha_jax.hf.files_beside import TORCH_FILES, files_beside
from nha_jax.hf.own_code import read_own_code_config, write_own_code_config
from nha_jax.hf.pretrained import open_pretrained
from nha_jax.sizes import abstract_parameters
from nha_jax.storage.weights import Index, WeightSource
from nha_jax.tokenizer.as_bytes import ByteTokenizer
from nha_jax.tokenizer.from_file import FileTokenizer
from tests.support.hf import layouts
from tests.support.hf.originals import FIXTURES


def written(config: nha_jax.ModelConfig) -> dict[str, Any]:
    """What config.json holds after it has been a file."""
    return json.loads(json.dumps(write_own_code_config(config)))


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", layouts.LAYOUTS)
def test_a_config_comes_back(name: str, param_dtype: str) -> None:
    config = layouts.layout(name, param_dtype=param_dtype)
    imported = read_own_code_config(
        written(config), param_dtype=param_dtype, dtype="float32", remat="none"
    )
    assert imported.config == config
    assert imported.notices == ()


def test_windows_and_what_is_of_the_call_may_be_chosen() -> None:
    fields = written(layouts.layout("a window"))
    chosen = {"window_size": (3, None), "implementation": "reference", "num_slots": 4}
    config = read_own_code_config(fields, **chosen).config
    assert (config.windows, config.implementation) == ((3, None), "reference")
    with pytest.raises(ValueError, match="num_slots = 5 was chosen, and the gates are of 4"):
        read_own_code_config(fields, num_slots=5)
    with pytest.raises(ValueError, match="hidden_size cannot be chosen"):
        read_own_code_config(fields, hidden_size=5)


def test_what_transformers_adds_is_no_news_and_the_rest_is_told() -> None:
    fields = written(layouts.layout("a window"))
    added = {"transformers_version": "5.24.0", "use_cache": True, "bos_token_id": 3, "new": 1}
    (notice,) = read_own_code_config(fields | added).notices
    assert notice == "config.json has keys that were ignored: new"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window_sizes": [5]}, "window_sizes: expected a list with a window for every layer"),
        ({"window_sizes": [5, -1]}, "window_size="),
        ({"output_norm": 1}, "output_norm=1 must be true or false"),
        ({"rotary_scaling": {"kind": "wide", "factor": 2}}, "kind='wide' must be one of"),
        ({"num_experts": 4}, "per_token=0 must be"),
        ({"num_slots": -1}, "num_slots = -1: expected a whole number of at least 0"),
        ({"architectures": ["LlamaForCausalLM"]}, "expected 'NHAForCausalLM'"),
    ],
)
def test_a_wrong_key_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="cannot be imported") as error:
        read_own_code_config(written(layouts.layout("a window")) | changes)
    assert message in str(error.value)


def test_missing_keys_are_named() -> None:
    fields = written(layouts.layout("a window"))
    for key in ("conv_width", "empty_slots"):
        del fields[key]
    with pytest.raises(ValueError, match="conv_width is missing; empty_slots is missing"):
        read_own_code_config(fields)


def test_files_without_the_keys_that_came_later_are_read() -> None:
    config = layouts.layout("a window")
    fields = written(config)
    for key in ("output_norm_eps", "attention_scale", "slot_delay"):
        assert fields.pop(key) is None
    assert read_own_code_config(fields, dtype="float32", remat="none").config == config


def test_a_field_that_the_code_does_not_compute_is_refused_by_name() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Later(nha_jax.ModelConfig):
        dropout: float = 0.0

    fields = vars(layouts.layout("a window"))
    assert plan_export(Later(**fields), {}, "transformers").fields["conv_width"] == 0
    with pytest.raises(ValueError, match=r"cannot express this: dropout = 0\.1: expected 0\.0"):
        plan_export(Later(**fields, dropout=0.1), {}, "transformers")


def assert_same_weights(first: WeightSource, second: WeightSource) -> None:
    assert first.shapes == second.shapes
    for name, shape in first.shapes.items():
        index = tuple(slice(0, length) for length in shape.shape)
        chex.assert_trees_all_equal(first.read(name, index), second.read(name, index))


def test_a_hybrid_comes_back_bit_for_bit(tmp_path: Path) -> None:
    original = open_pretrained(FIXTURES / "qwen3-moe", num_slots=4, window_size=(4, None))
    files = original.files | {"chat_template.jinja": b"{{ messages }}"}
    plan = plan_export(original.config, files, "transformers")
    for overwrite in (False, True):
        write_export(
            tmp_path / "out", plan, original.source, files, shard_bytes=20_000, overwrite=overwrite
        )
    again = open_pretrained(tmp_path / "out")
    assert again.config == original.config
    assert_same_weights(again.source, original.source)
    for name in ("generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == files[name]
    for file in TORCH_FILES.glob("*.py"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


class RandomSource:
    """Parameters that no model was made for."""

    name = "random"

    def __init__(self, config: nha_jax.ModelConfig):
        self.shapes = abstract_parameters(config)
        random = np.random.default_rng(0)
        self._values = {
            name: random.standard_normal(x.shape).astype(x.dtype) for name, x in self.shapes.items()
        }

    def read(self, name: str, index: Index) -> np.ndarray:
        return self._values[name][index]


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["mixed, grouped heads", "feature map"])
def test_a_model_trained_here_comes_back_bit_for_bit(
    name: str, param_dtype: str, tmp_path: Path
) -> None:
    config = layouts.layout(name, param_dtype=param_dtype)
    source = RandomSource(config)
    plan = plan_export(config, {}, "transformers")
    assert plan.notices == ()
    write_export(tmp_path / "out", plan, source, {}, shard_bytes=10**9)
    again = open_pretrained(tmp_path / "out", dtype="float32", remat="none")
    assert again.config == config
    assert_same_weights(again.source, source)


def test_the_code_imports_torch_and_transformers_alone() -> None:
    for file in TORCH_FILES.glob("*.py"):
        for statement in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(statement, ast.Import):
                names = [alias.name for alias in statement.names]
            elif isinstance(statement, ast.ImportFrom) and not statement.level:
                names = [statement.module or ""]
            tops = {name.split(".")[0] for name in names}
            assert tops <= {"torch", "transformers", "math", "typing"}, file.name


def test_the_card_has_the_numbers() -> None:
    config = layouts.layout("mixed, grouped heads")
    measured = {"held-out bits per byte": 2.16234, "training steps": "1500"}
    card = files_beside(config, {}, measured)["README.md"].decode()
    assert "| held-out bits per byte | 2.162 |\n| training steps | 1500 |" in card
    assert "| windows of the layers, in tokens | 20, full |" in card
    assert "Measured" not in files_beside(config, {}, {})["README.md"].decode()


def byte_files() -> dict[str, bytes]:
    return files_beside(layouts.layout("a window", vocab_size=257), {}, {})


def test_a_model_of_bytes_has_a_tokenizer_that_says_where_texts_end() -> None:
    files = byte_files()
    tokenizer = FileTokenizer({"tokenizer.json": files["tokenizer.json"]}, None, "tokenizer.json")
    assert (tokenizer.end_token, tokenizer.vocabulary_size) == (256, 257)
    assert json.loads(files["generation_config.json"]) == {"eos_token_id": 256, "pad_token_id": 256}
    config = layouts.layout("a window", vocab_size=257)
    assert plan_export(config, {}, "transformers").fields["eos_token_id"] == 256
    own = {"generation_config.json": b'{"eos_token_id": 7}'}
    assert "generation_config.json" not in files_beside(config, own, {})
    assert plan_export(config, own, "transformers").fields["eos_token_id"] == 7


@pytest.fixture(scope="module")
def theirs() -> FileTokenizer:
    return FileTokenizer({"tokenizer.json": byte_files()["tokenizer.json"]}, None, "tokenizer.json")


@settings(max_examples=50, deadline=None, derandomize=True)
@given(text=st.text() | st.text(alphabet=" \n\t'sé€\U0001f600", max_size=9))
def test_its_tokens_are_bytes(theirs: FileTokenizer, text: str) -> None:
    tokens = theirs.encode(text)
    assert tokens.tolist() == ByteTokenizer().encode(text).tolist()
    assert theirs.decode(tokens) == text
