"""Command lines: options stand anywhere, and each mistake is one line that names the option."""

import argparse
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.cli import main
from train.commands import COMMANDS
from train.commands.parser import Parser
from train.commands.train import parse_overrides


def parse(*arguments: str) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(prog="nha")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS.values():
        command.add_parser(commands)
    return parser.parse_known_args(arguments)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The line that a command line gets."""
    with pytest.raises(SystemExit) as stopped:
        parse(*arguments)
    output = capsys.readouterr()
    assert (stopped.value.code, output.out) == (2, "")
    assert output.err.startswith("nha: ")
    assert output.err.count("\n") == 1
    return output.err


# command, what has no name, options with their values (None: a flag), what must be read
LINES: list[tuple[list[str], list[str], list[tuple[str, str | None]], dict[str, Any]]] = [
    (["data", "prepare"], ["out", "a", "-", "b"],
     [("--workers", "2"), ("--skip-bad", None), ("--text-key", "-x"), ("--shard-bytes", "1_000")],
     {"out": "out", "inputs": ["a", "-", "b"], "workers": 2, "skip_bad": True, "text_key": "-x",
      "shard_bytes": 1000}),
    (["generate"], ["run"],
     [("--prompt", "-1 -x"), ("--json", None), ("--temperature", "0.5"), ("--stop", "")],
     {"folder": "run", "prompts": [("--prompt", "-1 -x")], "json": True, "temperature": 0.5,
      "stop": [""]}),
    (["import"], ["hf", "run"], [("--windows", "64,none"), ("--overwrite", None)],
     {"source": "hf", "run": "run", "windows": "64,none", "overwrite": True}),
    (["export"], ["run", "hf"], [("--format", "nha"), ("--shard-size", "5GB")],
     {"run": "run", "out": "hf", "format": "nha", "shard_size": "5GB"}),
    (["search"], ["run"], [("--full-layers", "1"), ("--base", "-1"), ("--beam", "2")],
     {"run": "run", "full_layers": 1, "base": "-1", "beam": 2}),
    (["inspect"], ["run"], [("--text", "-"), ("--context", "7")],
     {"run": "run", "text": "-", "context": 7}),
    (["plan"], ["c.yaml"], [("--topology", "v5e:1"), ("--json", None), ("--mfu", ".5")],
     {"config": "c.yaml", "topology": "v5e:1", "json": True, "mfu": 0.5}),
    (["train"], ["c.yaml"], [], {"config": "c.yaml"}),
]  # fmt: skip
KEYS = [("--steps", "-1"), ("--model.window_size", "[1, null]"), ("--seed", "- 2"), ("--run", "")]


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.data())
def test_options_stand_anywhere(data: st.DataObject) -> None:
    command, positionals, options, wanted = data.draw(st.sampled_from(LINES))
    keys = KEYS if command[0] in ("train", "plan") else []
    slots = len(positionals) + 1
    groups: list[list[str]] = [[] for _ in range(slots)]
    order = {name: number for number, (name, _) in enumerate(keys)}
    for name, value in data.draw(st.permutations([*options, *keys])):
        glued = value is None or data.draw(st.booleans())
        words = [name if value is None else f"{name}={value}"] if glued else [name, str(value)]
        groups[data.draw(st.integers(0, slots - 1))] += words
    line = groups[0] + list(
        itertools.chain.from_iterable([x, *g] for x, g in zip(positionals, groups[1:], strict=True))
    )
    found, rest = parse(*command, *line)
    assert vars(found) | wanted == vars(found)
    assert sorted(parse_overrides(rest), key=lambda pair: order[f"--{pair[0]}"]) == [
        (name[2:], value) for name, value in keys
    ]


def test_two_dashes_end_the_options() -> None:
    found, _ = parse("data", "prepare", "--workers", "3", "--", "--out", "-x", "--skip-bad")
    assert (found.out, found.inputs, found.workers) == ("--out", ["-x", "--skip-bad"], 3)
    assert not found.skip_bad


def test_two_dashes_may_be_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse("generate", "r", "--stop=--", "--prompt=--")[0].stop == ["--"]
    assert parse("search", "r", "--full-layers=1", "--base=--")[0].base == "--"
    assert parse_overrides(parse("train", "c", "--run=--")[1]) == [("run", "--")]
    assert "--beam: expected an integer, got '--'" in refused(
        capsys, "search", "r", "--full-layers=1", "--beam=--"
    )


def test_of_an_option_that_is_repeated_the_last_counts() -> None:
    assert parse("search", "r", "--full-layers", "1", "--beam", "2", "--beam=3")[0].beam == 3
    _, rest = parse("train", "--steps", "1", "c", "--steps=2")
    assert parse_overrides(rest) == [("steps", "1"), ("steps", "2")]


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("", ["COMMAND"]),
        ("trian c", ["trian", "train"]),
        ("--steps=3 train c", ["--steps=3", "follow the command"]),
        ("data --workers 2 prepare a b", ["--workers", "follow the command"]),
        ("train", ["CONFIG"]),
        ("train --distributed c.yaml", ["CONFIG is missing", "--distributed took 'c.yaml'"]),
        ("train c -x", ["-x: there is no such option"]),
        ("generate r --top_k 3", ["--top_k", "did you mean --top-k?"]),
        ("generate r --json=true", ["--json=true", "takes no value"]),
        ("generate r --prompt", ["--prompt: the value is missing"]),
        ("generate r --prompt --json", ["--prompt: the value is missing", "--prompt=VALUE"]),
        ("generate r --top-k --json", ["--top-k: the value is missing"]),
        ("generate r -5", ["-5: there is no such option"]),
        ("export a b --format x", ["--format", "'x'", "family"]),
        ("search r", ["--full-layers", "--cache-bytes"]),
        ("search r --full-layers 1 --cache-bytes 2", ["--cache-bytes", "--full-layers"]),
        ("inspect r", ["--text"]),
    ],
)
def test_a_mistake_is_one_line(
    capsys: pytest.CaptureFixture[str], line: str, parts: list[str]
) -> None:
    error = refused(capsys, *line.split())
    for part in parts:
        assert part in error


def test_too_many_names_and_unseen_characters_are_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "a", "b\nc\x1b[2J"])
    line = r"nha: b\nc\x1b[2J: more than it takes (see nha generate --help)" + "\n"
    assert capsys.readouterr().err == line


def numeric_options() -> list[tuple[str, str, type]]:
    """(command, option, int or float) of every option of every command that takes a number."""
    found = []
    parser = Parser(prog="nha")
    commands = parser.add_subparsers(dest="command")
    for command in COMMANDS.values():
        command.add_parser(commands)
    waiting = [(name, child) for name, child in commands.choices.items()]
    while waiting:
        name, child = waiting.pop()
        for action in child._actions:
            if isinstance(action, argparse._SubParsersAction):
                waiting += [(f"{name} {x}", y) for x, y in action.choices.items()]
            elif action.type is not None and action.option_strings:
                kind = float if action.type is float else int
                found.append((name, action.option_strings[0], kind))
    return found


NUMERIC = numeric_options()
NO_INTEGERS = ["", " ", "1 ", "0x10", "1.0", "1e3", "nan", "inf", "-inf", "1__0", "9" * 5000, "1\n",
               "\N{FULLWIDTH DIGIT ONE}", "\N{ARABIC-INDIC DIGIT ONE}", "true", "--5",
               str(2**63), str(-(2**64))]  # fmt: skip
NO_NUMBERS = ["", " ", "1 ", "0x10", "1:30", "1,5", "\N{FULLWIDTH DIGIT ONE}", "one", "1\n"]


@pytest.mark.parametrize(("command", "option", "kind"), NUMERIC, ids=lambda x: str(x))
def test_what_is_no_number_is_named(
    capsys: pytest.CaptureFixture[str], command: str, option: str, kind: type
) -> None:
    others = {"import": ["a", "b"], "data prepare": ["a", "b"]}.get(command, ["a"])
    for text in NO_INTEGERS if kind is int else NO_NUMBERS:
        line = refused(capsys, *command.split(), *others, f"{option}={text}")
        assert f"{option}: expected a" in line
        assert re.sub(r"\W", "", ascii(text))[:40] in re.sub(r"\W", "", ascii(line))


def test_every_command_has_its_numeric_options_found() -> None:
    assert len(NUMERIC) > 20
    assert {command for command, _, _ in NUMERIC} == {
        "data prepare", "data questions", "import", "plan", "status", "generate", "search",
        "inspect", "eval",
    }  # fmt: skip


def test_an_error_names_the_folder_that_does_not_exist(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--steps", "5", str(tmp_path / "none.yaml"), "--steps=x"]) == 2
    assert capsys.readouterr().err.startswith(f"nha: {tmp_path}/none.yaml: cannot read")
