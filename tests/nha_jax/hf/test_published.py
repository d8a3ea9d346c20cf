"""The checkpoints published with the paper compute here what they compute there."""

import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import nha_jax
from nha_jax.hf.pretrained import from_pretrained, open_pretrained
from nha_jax.hf.published import read_published
from nha_jax.hf.published_windows import read_windows, write_windows
from tests.support.hf import published
from tests.support.hf.originals import EXACT
from tests.support.paths import ROOT

TOKENS = np.random.default_rng(1).integers(0, 48, 14)

PUBLISHED_CASES: dict[str, dict[str, Any]] = {
    "convolution": {},
    "plain": {
        "num_hidden_layers": 2,
        "use_short_conv": False,
        "block_size": None,
        "num_kv_heads": 2,
        "expand_k": 1,
        "gate_logit_normalizer": 8,
    },
    "later": {"base": published.LATER_FIELDS},
    "later, plain": {
        "base": published.LATER_FIELDS,
        "num_hidden_layers": 2,
        "use_short_conv": False,
        "num_kv_heads": 2,
        "feature_map": "relu",
        "gsa_kv_shift": 2,
        "elementwise_affine": False,
        "use_output_gate": True,
    },
}


@pytest.mark.parametrize("name", PUBLISHED_CASES)
def test_a_model_trained_from_scratch(tmp_path: Path, name: str) -> None:
    fields, tensors = published.write_published(tmp_path, **PUBLISHED_CASES[name])
    model = from_pretrained(tmp_path, **EXACT)
    expected = published.published_logits(fields, tensors, TOKENS)
    logits = np.asarray(model(jnp.asarray(TOKENS)[None]))[0]
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits, expected, atol=2e-5)


def test_a_model_of_the_later_code_generates_by_its_forward_pass(tmp_path: Path) -> None:
    fields, tensors = published.write_published(tmp_path, **PUBLISHED_CASES["later, plain"])
    model = from_pretrained(tmp_path, **EXACT)
    expected = published.published_logits(fields, tensors, TOKENS)
    tokens = jnp.asarray(TOKENS)[None]
    logits, cache = model.prefill(tokens[:, :9])
    found = [logits[0]]
    for t in range(9, len(TOKENS)):
        logits, cache = model.decode_step(tokens[:, t], cache)
        found.append(logits[0])
    np.testing.assert_allclose(np.stack(found), expected[8:], atol=2e-5)
    assert "generates other texts" in open_pretrained(tmp_path).original.notices[0]


def test_the_generations_compute_different_things(tmp_path: Path) -> None:
    """The same weights, under the key of one and of the other, and a file that names neither."""
    plain = {key: value for key, value in published.LATER_FIELDS.items() if key != "gsa_kv_shift"}
    fields, tensors = published.write_published(tmp_path, base=plain, gsa_kv_shift=0)
    later = published.published_logits(fields, tensors, TOKENS)
    paper = published.published_logits(plain | {"block_size": None, "transformer_idx": None},
                                       tensors, TOKENS)  # fmt: skip
    assert np.abs(later - paper).max() > 0.5
    published.write(tmp_path, plain, tensors)
    with pytest.raises(ValueError, match="gsa_kv_shift is missing, and so is block_size"):
        open_pretrained(tmp_path)


@pytest.mark.parametrize("full", [None, 1], ids=["hybrid everywhere", "a full layer"])
def test_a_hybridised_llama(tmp_path: Path, full: int | None) -> None:
    windows = {"block_size": None if full is None else 2, "transformer_idx": full}
    fields, tensors = published.write_hybrid(tmp_path, "llama-2", **windows)
    model = from_pretrained(tmp_path, **EXACT)
    assert model.config.windows == (4, 4 if full is None else None)
    expected = published.llama_logits(fields, tensors, TOKENS)
    logits = np.asarray(model(jnp.asarray(TOKENS)[None]))[0]
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize("fixture", ["qwen2", "qwen3", "qwen3-moe"])
def test_the_gates_of_every_family_are_read(tmp_path: Path, fixture: str) -> None:
    _, tensors = published.write_hybrid(tmp_path, fixture)
    source = open_pretrained(tmp_path).source
    shape = source.shapes["blocks.attention.f_proj.kernel"].shape
    kernel = source.read("blocks.attention.f_proj.kernel", tuple(slice(0, n) for n in shape))
    expected = tensors["model.layers.1.self_attn.g_proj.weight"].T
    np.testing.assert_array_equal(kernel[1], expected.astype(kernel.dtype))


def test_other_windows_can_be_chosen_and_other_slots_cannot(tmp_path: Path) -> None:
    published.write_hybrid(tmp_path, "llama-2")
    assert open_pretrained(tmp_path).config.window_size == 4
    assert open_pretrained(tmp_path, window_size=None).config.window_size is None
    with pytest.raises(ValueError, match="num_slots = 8 was chosen, and the gates are of 3"):
        open_pretrained(tmp_path, num_slots=8)


def test_slots_as_many_as_a_key_is_wide(tmp_path: Path) -> None:
    fields, tensors = published.write_published(tmp_path, num_slots=4)
    published.write(tmp_path, fields | {"num_slots": None}, tensors)
    assert open_pretrained(tmp_path).config.num_slots == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature_map": "t2r"}, "feature_map = 't2r': expected 'swish'"),
        ({"conv_bias": True}, "conv_bias = True: expected false"),
        ({"attn": {"layers": [1], "num_heads": 2}}, "full attention with heads of their own"),
        ({"gsa_kv_shift": 0}, "block_size = 2: expected null"),
        ({"gsa_kv_shift": 6, "block_size": None}, "gsa_kv_shift = 6: expected at most .* = 5"),
        ({"gsa_kv_shift": None}, "gsa_kv_shift = None: expected a whole number"),
        ({"elementwise_affine": "no"}, "elementwise_affine = 'no': expected true or false"),
        ({"window_size": 128}, "window_size = 128: expected 1 to 64"),
        ({"block_size": 0}, "block_size = 0: expected at least 1"),
        ({"expand_v": 0.5}, "expand_v = 0.5: expected 1"),
        ({"architectures": ["GSAForCausalLM"]}, "expected 'NHAForCausalLM'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_computed_is_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    fields, tensors = published.write_published(tmp_path)
    published.write(tmp_path, fields | changes | {"rope_scaling": {"factor": 2}}, tensors)
    with pytest.raises(ValueError, match=message) as error:
        open_pretrained(tmp_path)
    assert "rope_scaling = {'factor': 2}: expected null" in str(error.value)


def test_a_file_that_an_earlier_version_wrote_means_its_own_norm(tmp_path: Path) -> None:
    """Those have empty_slots, which the authors' lack, and no output_norm_eps yet."""
    theirs = {**published.PUBLISHED_FIELDS}
    assert read_published(theirs).config.output_norm_eps == 1e-5
    assert read_published(theirs | {"norm_eps": 1e-5}).config.output_norm_eps is None
    assert read_published(theirs | {"empty_slots": "attend"}).config.output_norm_eps is None
    chosen = theirs | {"empty_slots": "attend", "output_norm_eps": 1e-5}
    assert read_published(chosen).config.output_norm_eps == 1e-5


OTHER_VALUES: dict[str, Any] = {
    "vocab_size": 49, "hidden_size": 64, "num_hidden_layers": 4, "num_heads": 8, "num_kv_heads": 2,
    "expand_k": 1, "exapnd_k": 2, "expand_v": 0.5, "exapnd_v": 0.5, "num_slots": 5,
    "gate_logit_normalizer": 16, "use_short_conv": False, "conv_size": 3, "intermediate_size": 64,
    "hidden_ratio": 24, "norm_eps": 1e-2, "elementwise_affine": False, "rope_theta": 1e4,
    "initializer_range": 0.1, "tie_word_embeddings": True, "window_size": 8, "block_size": 1,
    "transformer_idx": 0, "gsa_kv_shift": 3, "feature_map": "relu", "attn": {"layers": [0]},
    "conv_bias": True, "rope_scaling": {"factor": 2}, "hidden_act": "gelu", "use_output_gate": True,
    "use_norm": False, "norm_first": False, "max_position_embeddings": 9, "rand_window": True,
    "fuse_norm": False, "fuse_swiglu": False, "fuse_cross_entropy": False,
    "gsa_aux_loss_enable": False, "gsa_aux_loss_coeff": 0.5, "gsa_aux_loss_target_ratio": 0.5,
    "use_cache": False, "pad_token_id": 7, "bos_token_id": 7, "eos_token_id": 7,
}  # fmt: skip


def documented_keys() -> dict[str, tuple[str, str]]:
    """The table of docs/hybridize.md: what becomes of each key, by generation."""
    found = {}
    for line in (ROOT / "docs" / "hybridize.md").read_text().splitlines():
        keys, *cells = line.strip("|").split("|")
        if line.startswith("| `") and cells[0].split()[0].strip(",:;") in VERDICTS:
            words = (cell.split()[0].strip(",:;") for cell in cells[:2])
            found |= dict.fromkeys(re.findall("`([^`]*)`", keys), tuple(words))
    return found


VERDICTS = ("computed", "ignored", "refused", "names")


def test_every_key_is_documented() -> None:
    assert documented_keys().keys() == OTHER_VALUES.keys()


@pytest.mark.parametrize(("key", "value"), OTHER_VALUES.items(), ids=OTHER_VALUES)
def test_every_key_is_computed_or_refused_as_documented(key: str, value: Any) -> None:
    generations = {"paper": published.PUBLISHED_FIELDS, "later": published.LATER_FIELDS}
    for (generation, fields), verdict in zip(
        generations.items(), documented_keys()[key], strict=True
    ):
        without = {name: x for name, x in fields.items() if name != key}
        if key.startswith("exapnd"):  # read where the key that it misspells is missing
            without = {name: x for name, x in without.items() if name != f"expand_{key[-1]}"}
        changed = without | {key: value}
        if key == "hidden_ratio":
            assert without["intermediate_size"] is None
        if verdict == "refused":
            with pytest.raises(ValueError, match=f"{key.replace('exapnd', 'expand')} = "):
                read_published(changed)
            continue
        if verdict == "names":
            assert (key, generation) == ("gsa_kv_shift", "paper")
            with pytest.raises(ValueError, match="block_size = 2: expected null"):
                read_published(changed)
            continue
        before, after = (read_published(x) for x in (without | {key: fields.get(key)}
                         if key in fields else without, changed))  # fmt: skip
        differs = (before.config, before.table(before.config)) != (
            after.config, after.table(after.config)
        )  # fmt: skip
        assert differs == (verdict == "computed"), (key, generation)
        assert not after.notices or "ignored" not in after.notices[0]


def test_every_missing_tensor_is_named(tmp_path: Path) -> None:
    fields, tensors = published.write_published(tmp_path)
    del (names := dict(tensors))["model.layers.2.attn.f_proj.weight"]
    names["model.layers.0.attn.g_norm.bias"] = np.zeros(32, np.float32)
    published.write(tmp_path, fields, names)
    with pytest.raises(ValueError, match="does not fit") as error:
        open_pretrained(tmp_path)
    assert "model.layers.2.attn.f_proj.weight is missing" in str(error.value)
    assert "model.layers.0.attn.g_norm.bias is unknown" in str(error.value)


@pytest.mark.parametrize(
    "windows",
    [
        (8,),
        (8, 8, 8),
        (None, 8),
        (8, None, 8, None, 8),
        (8, 8, 8, None),
        (8, None, 8),
        (None, None),
    ],
    ids=str,
)
def test_windows_come_back(windows: tuple[int | None, ...]) -> None:
    assert read_windows(write_windows(windows), len(windows)) == (windows, [])


@pytest.mark.parametrize(
    "windows",
    [(8, 16), (None, None, 8), (8, None, None, 8), (128, None), (0, None)],
    ids=str,
)
def test_windows_that_cannot_be_written_are_shown(windows: tuple[int | None, ...]) -> None:
    with pytest.raises(ValueError, match="--windows"):
        write_windows(windows)


def test_later_keys_are_named_and_the_model_is_an_ordinary_one(tmp_path: Path) -> None:
    published.write_published(tmp_path, **PUBLISHED_CASES["plain"], surprise=1)
    pretrained = open_pretrained(tmp_path, **EXACT)
    assert pretrained.original.notices == ("config.json has keys that were ignored: surprise",)
    assert isinstance(pretrained.config, nha_jax.ModelConfig)
    assert pretrained.config.empty_slots == "attend"
