"""README and docs: every command and block of code works, every link and name leads somewhere.

A command runs here (RUN), or stands in NOT_RUN under the reason why it does not. In either case it
is parsed by the program that it calls.
"""

import ast
import itertools
import re
import runpy
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from flax import nnx

import nha_jax
from nha_jax.ops import backends
from tests.support import documents
from tests.support.paths import ROOT
from train.cli import main
from train.commands import COMMANDS
from train.commands.train import parse_overrides
from train.load_config import load_config

# Commands that run here on a small untrained model, with what is added to make them cheap.
RUN = {
    'uv run nha generate runs/quickstart --prompt "class Parser"': "--max-new-tokens 4",
    "uv run nha inspect runs/quickstart --text README.md": "--max-tokens 64",
    "uv run nha train --help": "",
}

NOT_RUN = {
    "needs what it downloads": (),
    "takes minutes to hours, and is a test or a compiler of its own": (
        "uv run pytest tests/pallas/gpu",
        "uv run pytest -m full tests/pallas/gpu",
        "NPROC=16 JAX_PLATFORMS=cpu uv run python -m tests.support.gpu.interpreted 0",
        "NPROC=16 JAX_PLATFORMS=cpu uv run python -m tests.support.gpu.slot_tokens 0 1",
        "JAX_PLATFORMS=cpu uv run --isolated --extra cuda pytest -m gpu_aot tests/pallas/gpu",
        "uv run --extra cuda python benchmarks/gpu_static.py --groups 1",
    ),
    "needs a GPU": ("benchmarks/gpu_check.sh",),
}

# What the Python blocks of a document take for granted.
BEFORE: dict[str, str] = {}


def test_every_command_is_run_or_listed() -> None:
    listed = {*RUN, *itertools.chain.from_iterable(NOT_RUN.values())}
    found = {command.text for command in documents.commands()}
    unlisted = [f"{c.where}: {c.text}" for c in documents.commands() if c.text not in listed]
    assert not unlisted, "run these in tests/test_docs.py, or list why not:\n" + "\n".join(unlisted)
    assert not listed - found, "listed in tests/test_docs.py, but in no document"


@pytest.mark.parametrize("command", documents.commands(), ids=lambda command: command.where)
def test_commands_parse(
    command: documents.Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    for part in command.parts():
        _check(part, monkeypatch)


def _check(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a program would not know its arguments, or does not exist."""
    program, *rest = arguments
    if program == "uv" and rest[0] in ("run", "sync"):
        _check_uv(rest, monkeypatch)
    elif program == "nha":
        _check_nha(rest, monkeypatch)
    elif program == "pytest":
        _check_pytest(rest)
    elif program == "python":
        _check_python(rest)
    else:
        known = program in ("pip", "source", "cat", "export", "git")
        assert known or (ROOT / program).is_file(), program


def _check_uv(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    remaining = arguments[1:]
    while remaining and remaining[0].startswith("-"):
        option = remaining.pop(0)
        if option in ("--extra", "--group", "--only-group"):
            assert remaining.pop(0) in documents.groups_and_extras(), arguments
        else:
            assert option in ("-q", "--isolated", "--no-default-groups"), option
    if remaining:
        _check(remaining, monkeypatch)


def _check_nha(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list = []
    for command in COMMANDS.values():
        monkeypatch.setattr(command, "run", lambda *given: parsed.extend(given) or 0)
    if "--help" in arguments:
        with pytest.raises(SystemExit, match="0"):
            main(arguments)
        return
    assert main(arguments) == 0
    options, rest = parsed
    if options.command in ("train", "plan"):
        path = "configs/quickstart.yaml" if options.config == "CONFIG" else options.config
        overrides = [(k, "64" if v.endswith(".json") else v) for k, v in parse_overrides(rest)]
        if path == "configs/hybridize.yaml":  # its model is not there
            overrides.append(("model.preset", "llama-3-8b"))
        load_config(path, overrides)


def _check_pytest(arguments: list[str]) -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    markers = {marker.split(":")[0] for marker in options["markers"]}
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if argument == "-m":
            names = set(re.findall(r"\w+", remaining.pop(0))) - {"or", "and", "not"}
            assert names <= markers, names - markers
        elif argument in ("-n", "-k"):
            remaining.pop(0)
        elif not argument.startswith("-"):
            assert (ROOT / argument.split("::")[0]).exists(), argument


def _check_python(arguments: list[str]) -> None:
    if arguments[0] in ("-m", "-c"):
        return
    script = (ROOT / arguments[0]).read_text()
    for argument in arguments[1:]:
        if argument.startswith("--"):
            option = argument.partition("=")[0]
            assert f'"{option}"' in script, f"{arguments[0]} has no {option}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with README.md and a small model at runs/quickstart."""
    folder = tmp_path_factory.mktemp("documents")
    shutil.copy(ROOT / "README.md", folder)
    config = nha_jax.ModelConfig(
        vocab_size=257, num_layers=1, hidden_size=16, num_query_heads=1, num_slots=4,
        window_size=8, mlp_size=16, dtype="float32",
    )  # fmt: skip
    (folder / "runs").mkdir()
    nha_jax.save(str(folder / "runs" / "quickstart"), nha_jax.Model(config, rngs=nnx.Rngs(0)))
    return folder


@pytest.mark.parametrize("text", RUN)
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


@pytest.mark.parametrize("document", _python_documents())
def test_python_blocks_run(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as one goes through a notebook."""
    monkeypatch.chdir(tmp_path)
    known = backends.names()
    names: dict = {}
    exec(BEFORE.get(document, ""), names)
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
def test_examples_run(example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(example), run_name="__main__")


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
        elif anchor:
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


def test_the_notation_names_what_exists() -> None:
    """Every `file.py:name` of docs/notation.md is defined in that file."""
    named = re.findall(r"([\w/]+\.py):([\w.]+)", documents.read("docs/notation.md"))
    assert named
    missing = [
        f"{path}:{name}"
        for path, name in named
        if not (ROOT / path).is_file() or name not in documents.defined_names(ROOT / path)
    ]
    assert not missing
