"""README and docs: every command and block of code works, every link and name leads somewhere.

A command runs (`RUN` of tests/support/commands.py), or stands in `NOT_RUN` there under the reason
why it does not. In either case it is parsed by the program that it calls.
"""

import ast
import itertools
import re
import runpy
import shutil
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flax import nnx

import nha_jax
from nha_jax.ops import backends
from tests.support import documents
from tests.support.commands import NOT_RUN, RUN, check
from tests.support.paths import ROOT
from train.cli import main

SLOW = {
    "docs/generation.md",
    "docs/layer.md",
    "docs/numerics.md",
    'uv run nha generate runs/quickstart --prompt "class Parser" --top-p 0.95 --stop "class"',
    'uv run nha generate runs/quickstart --windows 16,16,none --prompt "def "',
    "uv run nha inspect runs/quickstart --text README.md",
}


def _slow_or_not(names: Iterable[str]) -> list[Any]:
    """Parameters of which those in SLOW are marked so."""
    return [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in names]


def test_every_command_is_run_or_listed() -> None:
    where = "tests/support/commands.py"
    listed = {*RUN, *itertools.chain.from_iterable(NOT_RUN.values())}
    found = {command.text for command in documents.commands()}
    unlisted = sorted(f"{x.where}: {x.text}" for x in documents.commands() if x.text not in listed)
    assert not unlisted, f"run these, or say in {where} why not:\n" + "\n".join(unlisted)
    assert not listed - found, f"listed in {where}, but in no document"


@pytest.mark.parametrize("command", documents.commands(), ids=lambda command: command.where)
def test_commands_parse(
    command: documents.Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    for part in command.parts():
        check(part, monkeypatch)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with README.md, a Python file, and a small model at runs/quickstart."""
    folder = tmp_path_factory.mktemp("documents")
    shutil.copy(ROOT / "README.md", folder)
    shutil.copy(ROOT / "examples" / "plain_jax.py", folder)
    config = nha_jax.ModelConfig(
        vocab_size=257, num_layers=1, hidden_size=16, num_query_heads=1, num_slots=4,
        window_size=8, mlp_size=16, dtype="float32",
    )  # fmt: skip
    (folder / "runs").mkdir()
    nha_jax.save(str(folder / "runs" / "quickstart"), nha_jax.Model(config, rngs=nnx.Rngs(0)))
    return folder


@pytest.mark.parametrize("text", _slow_or_not(RUN))
def test_commands_run(
    text: str, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(runs)
    (part,) = documents.Command("", f"{text} {RUN[text]}").parts()
    arguments = part[part.index("nha") + 1 :]
    if "--help" in arguments:
        with pytest.raises(SystemExit, match="0"):
            main(arguments)
    else:
        assert main(arguments) == 0
    assert capsys.readouterr().out


def _python_documents() -> list[str]:
    return sorted({block.document for block in documents.code_blocks("python")})


@pytest.mark.parametrize("document", _slow_or_not(_python_documents()))
def test_python_blocks_run(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as one goes through a notebook."""
    monkeypatch.chdir(tmp_path)
    known = backends.names()
    names: dict = {}
    for block in documents.code_blocks("python", [document]):
        code = compile(ast.parse(block.text), str(block), "exec")
        exec(code, names)
    for name in set(backends.names()) - set(known):
        backends.unregister(name)


def test_the_commands_that_a_newcomer_runs_first_are_as_ci_expects() -> None:
    blocks = {
        title: re.search(r"```bash\n(.*?)```", section, re.DOTALL)
        for title, section in re.findall(
            r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", documents.read("README.md"), re.DOTALL | re.MULTILINE
        )
    }
    install = "pip install -q uv && uv run "
    assert blocks["Quick start"][1] == f"{install}nha train configs/quickstart.yaml\n"
    assert blocks["Tests"][1] == f"{install}pytest -n 2\n"


@pytest.mark.slow
@pytest.mark.parametrize("example", sorted(ROOT.glob("examples/*.py")), ids=lambda path: path.name)
def test_examples_run_and_learn(
    example: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(example), run_name="__main__")
    losses = [float(x) for x in re.findall(r"loss (\S+)", capsys.readouterr().out)]
    assert losses[-1] < losses[0] / 5


def test_the_figure_is_what_its_script_draws() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "figures" / "draw_operator.py"))
    assert script["draw"]() == documents.read("docs/figures/operator.svg")


def _links() -> Iterator[tuple[str, str]]:
    for document in documents.DOCUMENTS:
        for target in documents.links(document):
            yield document, target


def test_links_lead_somewhere() -> None:
    broken = []
    for document, target in _links():
        path, _, anchor = target.partition("#")
        linked = (ROOT / document).parent / path if path else ROOT / document
        if not linked.exists():
            broken.append(f"{document}: {target}")
        elif anchor and not path.endswith(".py") and "::: " not in linked.read_text():
            name = str(linked.resolve().relative_to(ROOT))
            name = documents.BENCHMARKS if name == "docs/benchmarks.md" else name
            if anchor not in documents.anchors(name):
                broken.append(f"{document}: {target}")
    assert not broken, broken


def test_links_of_the_benchmarks_work_on_the_site_too() -> None:
    """There they stand on another page, so that only links within the page lead somewhere."""
    assert all(target.startswith("#") for target in documents.links(documents.BENCHMARKS))


@pytest.mark.parametrize("document", documents.DOCUMENTS)
def test_files_that_are_named_exist(document: str) -> None:
    missing = {path for path in documents.named_files(document) if not (ROOT / path).exists()}
    assert not missing


def test_every_page_is_in_the_navigation() -> None:
    site = tomllib.loads((ROOT / "zensical.toml").read_text())
    listed = set(re.findall(r"[\w/-]+\.md", str(site["project"]["nav"])))
    pages = {str(path.relative_to(ROOT / "docs")) for path in ROOT.glob("docs/**/*.md")}
    assert listed == pages


@pytest.mark.parametrize("folder", ["nha_jax", "nha_jax/ops", "pallas", "train"])
def test_the_map_shows_every_room(folder: str) -> None:
    """docs/architecture.md has a table for the folder, with each of its modules and folders."""
    text = documents.read("docs/architecture.md")
    (table,) = re.findall(rf"^### {folder}\n\n((?:\|.*\n)+)", text, re.MULTILINE)
    shown = {
        name for row in table.splitlines() for name in re.findall(r"`(\w+)/?`", row.split("|")[1])
    }
    rooms = {path.stem for path in (ROOT / folder).iterdir() if path.suffix == ".py"}
    rooms |= {path.parent.name for path in (ROOT / folder).glob("*/__init__.py")}
    assert shown == rooms - {"__init__"}


def test_the_notation_names_what_exists() -> None:
    """Every `file.py:name` is defined there, and a row's names in code occur in its files."""
    missing, rows = [], 0
    for row in re.findall(r"^\|.*\|$", documents.read("docs/notation.md"), re.MULTILINE):
        cited = re.findall(r"`([\w/]+\.py):([\w.]+)`", row)
        rows += bool(cited)
        missing += [
            f"{path}:{name}"
            for path, name in cited
            if not (ROOT / path).is_file() or name not in documents.defined_names(ROOT / path)
        ]
        sources = " ".join((ROOT / path).read_text() for path, _ in cited)
        for name in re.findall(r"`(\w+)`", row.split("|")[2] if cited else ""):
            if not re.search(rf"\b{name}\b", sources):
                missing.append(f"{name} in {', '.join(path for path, _ in cited)}")
    assert rows > 20
    assert not missing
