"""YAML as people write it: what every text becomes, or the line that it gets."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from train.config import TrainConfig
from train.config_keys import keys
from train.errors import ConfigError
from train.load_config import load_config
from train.yaml_text import read_yaml

WIDE_1 = "\N{FULLWIDTH DIGIT ONE}"  # int() takes it for 1

FILE = """\
run: {folder}/run
steps: 2
batch_size: 2
model:
  vocab_size: 300
  num_layers: 2
  hidden_size: 64
  num_query_heads: 2
  num_slots: 4
  window_size: 8
  experts: {{count: 2, per_token: 1, size: 8}}
  rope_scaling: {{kind: llama3, factor: 2, original_length: 32}}
data: {{corpus: {folder}, sequence_length: 32}}
"""


@dataclass
class Section:
    count: int = 0
    share: float = 0.0
    on: bool = False
    name: str = ""
    maybe: str | None = None
    names: tuple[str, ...] = ()
    weights: str | dict[str, float] = ""
    steps: tuple[int, int] | None = None


@dataclass
class Whole:
    section: Section = field(default_factory=Section)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(FILE.format(folder=tmp_path))
    return path


def read(text: str) -> Any:
    return read_yaml(text, "FILE", Whole)["section"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("count: 0100", 100),
        ("count: 0o17", 15),
        ("count: 0x10", 16),
        ("count: -0x10", -16),
        ("count: 0b101", 5),
        ("count: 1_000", 1000),
        ("count: 1:30", "1:30"),
        (f"count: {WIDE_1}", WIDE_1),
        ("count: 1__0", "1__0"),
        ("share: .5e3", 500.0),
        ("share: 1_0e-3", 0.01),
        ("share: 3e-4", 3e-4),
        ("share: 1.", 1.0),
        ("share: 1:30.5", "1:30.5"),
        ("share: 1e400", float("inf")),
        ("share: -.INF", -float("inf")),
        ("share: '5'", "5"),
        ("on: true", True),
        ("on: FALSE", False),
        ("on: yes", "yes"),
        ("on: off", "off"),
        ("name: no", "no"),
        ("name: true", "true"),
        ("name: 2024-05-01", "2024-05-01"),
        ("name: 0100", "0100"),
        ("name: 1e3", "1e3"),
        ("name: 12:30:00", "12:30:00"),
        ("name: =", "="),
        ("name: null", None),
        ('name: "null"', "null"),
        ("name: !!str null", "null"),
        ('name: "\\ud83d\\ude00"', "😀"),
        ("name: <<", "<<"),
        ("maybe: 2024", "2024"),
        ("maybe: ~", None),
        ('maybe: "no"', "no"),
        ("names: [1, no, 2024-05-01]", ["1", "no", "2024-05-01"]),
        ("weights: 5", "5"),
        ("weights: {2024-05-01: 1.0, no: 1, 0100: .5}", {"2024-05-01": 1.0, "no": 1, "0100": 0.5}),
        ("weights: {~: 1}", {"~": 1}),
        ("steps: [0100, 200]", [100, 200]),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2_and_text_where_text_is_wanted(text: str, value: Any) -> None:
    found = read(f"section: {{{text}}}")[text.split(":")[0]]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: &c {count: 2}\nsection: {<<: *c}", {"count": 2}),
        ("a: &c {count: 2, on: true}\nsection: {count: 3, <<: *c}", {"on": True, "count": 3}),
        ("a: &c {count: 2}\nb: &d {count: 4, share: 1}\nsection: {<<: [*c, *d]}",
         {"count": 2, "share": 1}),
        ("a: &c {count: 2}\nb: &d {<<: *c, name: 7}\nsection: {<<: *d}", {"count": 2, "name": "7"}),
        ("section: {'<<': 3}", {"<<": 3}),
    ],
)  # fmt: skip
def test_merge_keys(text: str, value: dict[str, Any]) -> None:
    assert read(text) == value


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("section: &a {name: *a}", ["line 1", "section.name", "alias stands for what it is part"]),
        ("section: {names: &a [*a]}", ["section.names", "alias"]),
        ("section: &a {<<: *a}", ["section", "<<"]),
        ("section: {<<: &a [{<<: *a}]}", ["nested too deeply"]),
        ("section: {<<: 3}", ["<< takes mappings"]),
        ("section: {name: *}", ["line 1", "not valid YAML"]),
        ("section:\n  name: 1\n  name: 2", ["line 3", "name appears twice"]),
        ("section: {1: 1, '1': 2}", ["1 appears twice"]),
        ('section: {name: "\\ud83d"}', ['section.name = "\\ud83d"', "half a character"]),
        ('section: {"\\ud83d": 1}', ["section", "half a character"]),
        ("section: {maybe: no}", ["section.maybe = no", 'write null, or "no"']),
        ("section: {maybe: False}", ["section.maybe = False", "null"]),
        ("section: {name: !!binary aGk=}", ["section.name", "binary", "no meaning"]),
        ("section: !!set {a}", ["section", "set", "no meaning"]),
        ("section: !!python/object:os.system {}", ["no meaning"]),
        ("section: {[1]: 2}", ["section", "a key is a mapping or a list"]),
        (f"section: {{count: {'9' * 5000}}}", ["section.count = 999", "not a number"]),
        ("section: " + "[" * 500, ["nested too deeply"]),
        ("a: &a [1,1,1,1,1,1,1,1,1,1]\n"
         + "".join(f"{y}: &{y} [{', '.join([f'*{x}'] * 10)}]\n"
                   for x, y in zip("abcdefgh", "bcdefghi", strict=True))
         + "section: *i", ["too many values"]),
        ("a: 1\n---\nb: 2", ["line 2", "not valid YAML"]),
        ("section: \x00", ["not valid YAML"]),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_what_cannot_be_meant_is_one_line(text: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        read(text)
    line = str(raised.value)
    assert line.startswith("FILE")
    assert "\n" not in line
    assert len(line) < 200
    for part in parts:
        assert part in line


MAPPINGS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
    max_leaves=8,
)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.dictionaries(st.text(max_size=5), MAPPINGS, max_size=4))
def test_what_was_dumped_is_read_back(values: dict[str, Any]) -> None:
    """Whatever PyYAML quotes for YAML 1.1 and writes without aliases means the same."""
    assert read_yaml(yaml.safe_dump(values), "FILE", Any) == values


def test_a_configuration_takes_merge_keys_dates_and_a_folder_called_no(file: Path) -> None:
    text = file.read_text().replace(f"corpus: {file.parent}", "corpus: {no: 1, 2024-05-01: 2}")
    file.write_text(text + "checkpoint: &c {every: 3}\nlogging: {<<: *c}\ntrainable: [1]\n")
    config = load_config(str(file), [("run", "2024-05-01"), ("seed", "0100")])
    assert config.data.corpus == {"no": 1, "2024-05-01": 2}
    assert (config.logging.every, config.trainable) == (3, ("1",))
    assert (config.run, config.seed) == ("2024-05-01", 100)


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("distributed", "yes", ['distributed = "yes"', "true or false"]),
        ("model.qk_norm", "On", ['model.qk_norm = "On"', "true or false"]),
        ("compilation_cache", "off", ["compilation_cache = off", "null"]),
        ("trainable", "*", ["--trainable=*", "not valid YAML"]),
        ("sample.prompt", "def f(x): y", ["sample.prompt = ", "text goes in quotes"]),
        ("steps", WIDE_1, [f'steps = "{WIDE_1}"', "an integer"]),
        ("steps", str(2**31), [f"steps = {2**31}", "below 2**31"]),
        ("model.num_layers", str(2**20), ["model.num_layers", "below 2**16"]),
        ("seed", str(2**32), [f"seed = {2**32}", "below 2**32"]),
        ("logging.profile", f"[1, {2**64}]", ["logging.profile", "below 2**31"]),
        ("model.window_size", f"[8, {2**40}]", ["model.window_size", "below 2**31"]),
        ("model.kernel_options", f"{{xla: {{chunk: {2**70}}}}}", ["kernel_options.xla.chunk"]),
        ("checkpoint.every", str(2**63), ["checkpoint.every", "below 2**63"]),
    ],
)
def test_a_wrong_value_is_one_line(file: Path, name: str, text: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(str(file), [(name, text)])
    for part in parts:
        assert part in str(raised.value)


def test_never_may_be_a_large_number(file: Path) -> None:
    assert load_config(str(file), [("evaluation.every", "10_000_000_000")]).evaluation.every == 1e10


def test_a_file_that_is_no_configuration_is_not_read_to_its_end(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="/dev/zero: larger than"):
        load_config("/dev/zero")
    with pytest.raises(ConfigError, match="no path holds the character NUL"):
        load_config("a\0b")
    with pytest.raises(ConfigError, match="cannot read the configuration: Is a directory"):
        load_config(str(tmp_path))


EDGES = ["-1", "0", str(2**31), str(2**63), str(2**64), "9" * 400, "1e400", "nan", ".nan", "inf"]
EDGES += ["-.inf", "-0.0", "", " ", WIDE_1, "0x10", "1_000", "true", "[1]", "{a: 1}"]
LEAVES = [key.name for key in keys() if not key.is_section]
PAIRS = [(name, text) for name in LEAVES for text in EDGES]


@pytest.mark.parametrize(
    "pairs", [PAIRS[::29], pytest.param(PAIRS, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_every_key_takes_an_edge_or_names_it(file: Path, pairs: list[tuple[str, str]]) -> None:
    for name, text in pairs:
        # A section that is null by default has a key that it needs.
        needed = [("adapter.rank", "1")] if name.startswith("adapter.") else []
        try:
            config: Any = load_config(str(file), [*needed, (name, text)])
        except ConfigError as error:
            line = str(error)
            # Whether the corpus, the windows file and the initial model exist is asked for later.
            key = name.split(".")[-1]
            assert re.search(rf"\b{key}\b|implementation", line), (name, text[:20], line)
            assert "\n" not in line, (name, text[:20], line)
        else:
            assert isinstance(config, TrainConfig)
            for part in name.split("."):
                config = getattr(config, part)
            assert config == config, (name, text)  # no NaN
            assert config not in (float("inf"), -float("inf")), (name, text)
