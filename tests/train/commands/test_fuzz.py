"""Random command lines on damaged files: one line, a documented exit code, nothing of theirs lost.

What computes is left out: these are tests of everything before it.
"""

import argparse
import contextlib
import hashlib
import io
import json
import random
import re
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flax import nnx

import nha_jax
from tests.support.hf.originals import FIXTURES
from train import failures
from train.cli import main
from train.commands import COMMANDS, generate
from train.commands.parser import Parser
from train.config_keys import keys

COUNT = 2000
EXIT_CODES = {0, 1, 2}
SECONDS = 60
LONG = "n" * 300
NUMBERS = ["-1", "0", "1", "2", "1_0", "0100", str(2**31), str(2**63 - 1), "-0.0", "1e400", "nan",
           "inf", "-inf", "0x10", str(2**64), "9" * 50, "", " ", "\N{FULLWIDTH DIGIT ONE}", "true",
           "x"]  # fmt: skip
TEXTS = ["", " ", "a", "é\N{GRINNING FACE}", "\udcff", "-", "--", "-x", "a\nb\x1b[2J", LONG,
         "%s{}\\", "[1",
         "{a: 1}", "*", "&a [*a]", "<<: 3", "null", "no", "2024-05-01", "text", "none", "8,none",
         "[4, null]", "1GB", "nha", "family", "float32", "xla", "v5e:4x4", "1 2 300"]  # fmt: skip
PATHS = ["model", "hybrid", "hf", "corpus", "prepared", "corpus/a.txt", "corpus/b.jsonl",
         "corpus/*.txt", "config.yaml", "search.json", "model/config.json", "model/config.png",
         "empty", "none", "none/deep", "out/new", "out/new.json", "out/new.png", "~", "~nobody",
         "/dev/null", "/dev/full", "/dev/zero", ".", "**", "[", LONG,
         "corpus/" + "d/" * 2100]  # fmt: skip
LEAVES = [key.name for key in keys()]


def options_of(command: str) -> tuple[list[str], list[argparse.Action]]:
    """The words of a command, and its options."""
    parser = Parser(prog="nha")
    commands = parser.add_subparsers(dest="command")
    COMMANDS[command].add_parser(commands)
    child, words = commands.choices[command], [command]
    for action in child._actions:
        if isinstance(action, argparse._SubParsersAction):
            (name, child), *_ = action.choices.items()
            words.append(name)
    return words, child._actions


GRAMMAR = {command: options_of(command) for command in COMMANDS}
USUAL = {"train": ["config.yaml"], "plan": ["config.yaml"], "generate": ["model"],
         "search": ["model"], "eval": ["model"], "inspect": ["model"],
         "data": ["out/new", "corpus"],
         "import": ["hf", "out/new", "--num-slots=8"], "export": ["hybrid", "out/new"]}  # fmt: skip
NEEDED = {"plan": ["--topology=v5e:4x4"], "inspect": ["--text=corpus/a.txt"],
          "eval": ["--tasks=lambada_openai"],
          "search": ["--full-layers=1", "--corpus=prepared", "--sequence-length=16"],
          "generate": ["--prompt=a"]}  # fmt: skip


def draw_value(rng: random.Random, action: argparse.Action) -> str:
    """A value for an option: two of three are of its kind."""
    if rng.random() < 0.33:
        return rng.choice([*NUMBERS, *TEXTS, *PATHS])
    if action.choices:
        return str(rng.choice(list(action.choices)))
    if action.type is not None:
        return rng.choice(["1", "2", "3", "8", "16", "0.5", *NUMBERS[:13]])
    name = action.option_strings[0]
    files = "FILE" in str(action.metavar) or name in ("--corpus", "--text")
    return rng.choice(PATHS if files else TEXTS)


def draw_line(rng: random.Random) -> list[str]:
    """A command line: mostly as people write it, with up to three things that they would not."""
    command = rng.choice(sorted(GRAMMAR))
    words, actions = GRAMMAR[command]
    named = [action for action in actions if action.option_strings and action.dest != "help"]
    line = [x if rng.random() < 0.9 else rng.choice(PATHS) for x in USUAL[command]]
    line += [x for x in NEEDED.get(command, []) if rng.random() < 0.95]
    for _ in range(rng.choice([0, 0, 1, 1, 2, 3])):
        option, value = "", ""
        if command in ("train", "plan") and rng.random() < 0.9:
            option, value = "--" + rng.choice(LEAVES), rng.choice([*NUMBERS, *TEXTS, *PATHS])
        elif named:
            action = rng.choice(named)
            option, value = action.option_strings[0], draw_value(rng, action)
            if action.nargs == 0:
                line.insert(rng.randint(0, len(line)), option)
                continue
        position = rng.randint(0, len(line))
        line[position:position] = [f"{option}={value}"] if rng.random() < 0.5 else [option, value]
    if rng.random() < 0.05:
        line.insert(rng.randint(0, len(line)), rng.choice(TEXTS))
    if command == "data" and "--workers" not in " ".join(line):
        line.append("--workers=1")
    return [*words, *line]


def damage(rng: random.Random, folder: Path, line: list[str]) -> str:
    """Damages a file, mostly one of those that the line names; returns what was done."""
    files = sorted(x for x in folder.rglob("*") if x.is_file())
    roots = {re.split("[=/]", word)[-1 if "=" in word else 0] for word in line}
    meant = [x for x in files if x.relative_to(folder).parts[0] in roots]
    files = meant if meant and rng.random() < 0.9 else files
    path = rng.choice(files)
    content = bytearray(path.read_bytes())
    kind = rng.choice(["cut", "flip", "empty", "zeros", "gone", "folder", "garbage", "value"])
    if kind == "cut":
        path.write_bytes(content[: rng.randint(0, len(content))])
    elif kind == "flip" and content:
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "zeros":
        path.write_bytes(bytes(len(content)))
    elif kind in ("gone", "folder"):
        path.unlink()
        if kind == "folder":
            path.mkdir()
    elif kind == "garbage":
        path.write_bytes(rng.randbytes(rng.randint(1, 200)))
    elif kind == "value" and path.suffix in (".json", ".yaml"):
        places = list(re.finditer(rb"[:\[,] ?([^\s,:\[\]{}]+)", content))
        if places:
            start, end = rng.choice(places).span(1)
            value = rng.choice([*NUMBERS, *TEXTS, "[]", "{}", '"x"', "[" * 3000])
            content[start:end] = value.encode("utf-8", "surrogateescape")
            path.write_bytes(content)
    return f"{kind} {path.relative_to(folder)}"


def contents(folder: Path) -> dict[str, str]:
    """A hash of every file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "out" not in path.relative_to(folder).parts
    }


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "tree"
    for name in ("corpus", "empty", "out"):
        (folder / name).mkdir(parents=True)
    for name in "ac":
        (folder / "corpus" / f"{name}.txt").write_text(f"text {name}, " * 60)
    lines = [json.dumps({"text": f"document {number} " * 9}) for number in range(40)]
    (folder / "corpus" / "b.jsonl").write_text("\n".join(lines))
    shutil.copytree(FIXTURES / "llama-2", folder / "hf")
    (folder / "search.json").write_text(json.dumps({"window_size": [4, None]}))
    (folder / "config.yaml").write_text(
        "run: out/run\nsteps: 2\nbatch_size: 2\ndata: {corpus: corpus, sequence_length: 32}\n"
        "model:\n  vocab_size: 300\n  num_layers: 2\n  hidden_size: 16\n  num_query_heads: 2\n"
        "checkpoint: &c {every: 2}\nlogging: {<<: *c}\ncompilation_cache: null\n"
    )
    config = nha_jax.ModelConfig(
        vocab_size=257, num_layers=2, hidden_size=16, num_query_heads=2, num_slots=4,
        window_size=8, dtype="float32", remat="none",
    )  # fmt: skip
    nha_jax.save(folder / "model", nha_jax.Model(config, rngs=nnx.Rngs(0)))
    arguments = ["import", f"{folder}/hf", f"{folder}/hybrid", "--num-slots=8", "--windows=4,none"]
    assert main(arguments) == 0
    shares = ["--held-out-fraction=0.3", "--workers=1"]
    assert main(["data", "prepare", f"{folder}/prepared", f"{folder}/corpus", *shares]) == 0
    return folder


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    def give_up(*unused: object) -> None:
        raise TimeoutError(f"still running after {seconds} s")

    previous = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


@pytest.fixture
def little_memory() -> Iterator[None]:
    """What would take all of the machine's memory ends here, with a line that the test finds."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def nothing_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    import train.inspect.measure
    import train.loop.train
    import train.plan.command
    import train.search.run

    def stop(*arguments: Any, **options: Any) -> Any:
        raise failures.UserError("it would compute now")

    monkeypatch.setattr(nha_jax, "Engine", lambda *arguments, **options: SimpleNamespace())
    monkeypatch.setattr(generate, "_write", lambda *arguments: None)
    monkeypatch.setattr(train.inspect.measure, "inspect", stop)
    monkeypatch.setattr(train.search.run, "LayerwiseLoss", stop)
    monkeypatch.setattr(train.loop.train, "train", lambda config: 0)
    monkeypatch.setattr(train.plan.command, "find_topology", stop)


def run(line: list[str]) -> tuple[int, str]:
    """The exit code and standard error of a command, in this process."""
    out, err = io.StringIO(), io.StringIO()
    stdin = io.TextIOWrapper(io.BytesIO(b"from standard input"))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), within(SECONDS):
        previous, sys.stdin = sys.stdin, stdin
        try:
            return main(line), err.getvalue()
        except SystemExit as stopped:
            return int(stopped.code or 0), err.getvalue()
        except BaseException:
            return -1, traceback.format_exc()
        finally:
            sys.stdin = previous


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("nothing_computes", "little_memory")
def test_random_lines_and_damaged_files(
    pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(failures.TRACEBACK, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    work, wrong = tmp_path / "tree", []
    for number in range(COUNT):
        rng = random.Random(number)
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(pristine, work)
        monkeypatch.chdir(work)
        line = draw_line(rng)
        done = damage(rng, work, line) if rng.random() < 0.6 else "whole"
        before = contents(work)
        code, errors = run(line)
        changed = [name for name, digest in before.items() if contents(work).get(name) != digest]
        if "--overwrite" in line:  # a model or an export may be replaced, and nothing else
            changed = [x for x in changed if x.split("/")[0] not in ("model", "hybrid")]
        lines = errors.splitlines()
        said = [x for x in lines if x.startswith("nha: ")]
        if (
            code not in EXIT_CODES
            or changed
            or "nha: unexpected" in errors
            or "out of memory" in errors
            or (code and len(said) - sum("still works" in x for x in said) != 1)
        ):
            wrong.append(f"{number}: {done}: {line}: {code}, {changed}: {errors[-400:]}")
    assert not wrong, f"{len(wrong)} of {COUNT}:\n" + "\n".join(wrong[:60])
