"""`nha_jax.load_tokenizer`: what a folder's model reads and writes, for programs.

What the files of a tokenizer may say is tested where `nha` reads them, in
tests/train/storage/test_extra_files.py.
"""

import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nha_jax
from tests.support.train.pretrained_tokenizer import BEGIN, CONFIG, END, tokenizer_json


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json("<begin> $A"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def tiny_model(vocab_size: int) -> nha_jax.Model:
    config = nha_jax.ModelConfig(
        vocab_size=vocab_size, num_layers=1, hidden_size=4, num_query_heads=1, num_slots=2,
        window_size=2, mlp_size=4,
    )  # fmt: skip
    return nha_jax.Model(config, rngs=nnx.Rngs(0))


def test_a_folder_with_a_tokenizer_json_has_that(folder: Path) -> None:
    tokenizer = nha_jax.load_tokenizer(str(folder))
    prompt = tokenizer.encode_prompt("naïve b")
    assert prompt.dtype == np.int32
    assert prompt[0] == BEGIN
    assert tokenizer.end_token == END
    assert (prompt < tokenizer.vocabulary_size).all()
    for tokens in (prompt, prompt.tolist(), jnp.asarray(prompt)):
        assert tokenizer.decode(tokens) == "naïve b"


def test_a_saved_model_without_one_reads_bytes(tmp_path: Path) -> None:
    nha_jax.save(tmp_path / "model", tiny_model(257))
    tokenizer = nha_jax.load_tokenizer(tmp_path / "model")
    assert tokenizer.encode_prompt("é").tolist() == [195, 169]
    for tokens in ([195, 169, 256], jnp.asarray([195, 169, 256])):
        assert tokenizer.decode(tokens) == "é"
    assert tokenizer.end_token == 256


def test_a_model_imported_without_its_tokenizer_has_none(tmp_path: Path) -> None:
    nha_jax.save(tmp_path / "model", tiny_model(300), files={"original_config.json": b"{}"})
    with pytest.raises(ValueError, match=r"its 300 tokens are no bytes; put .*tokenizer\.json"):
        nha_jax.load_tokenizer(tmp_path / "model")


def test_what_cannot_be_loaded_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        nha_jax.load_tokenizer(folder / "nowhere")
    with pytest.raises(ValueError, match=r"^end_token = '<no>': .* has no such token"):
        nha_jax.load_tokenizer(folder, end_token="<no>")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tokenizers", None)
        with pytest.raises(ImportError, match=r"`pip install \"nha_jax\[data\]\"` brings it"):
            nha_jax.load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: damaged"):
        nha_jax.load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=r"not a tokenizer\.json"):
        nha_jax.load_tokenizer(folder)
