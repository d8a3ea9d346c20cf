"""The notebooks of examples/: they lie there with their outputs, and run."""

import ast
import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest

import nha_jax
from tests.support.paths import ROOT

NOTEBOOKS = sorted(ROOT.glob("examples/*.ipynb"))
LARGEST_PICTURE, LARGEST_NOTEBOOK = 150_000, 600_000  # bytes: every clone has them
TIME_LIMIT = 600  # seconds a cell; on a quiet machine a whole notebook takes less than 180

# What a run must print again, whatever the machine: a number, and the bounds that it is within.
SHOWN = {
    "first_steps": [
        (r"([\d.]+) bits per byte on held-out", 0.2, 0.35),
        (r"full attention: ([\d.]+) bits", 0.2, 0.4),
    ],
    "hybridize": [
        (r"difference of logits: (\S+)", 0, 1e-4),
        (r"the original, full attention: (\S+)", 1.39, 1.8),
        (r"window alone, attention trained: (\S+)", 1.85, 2.77),
        (r"hybrid, attention trained: (\S+)", 1.39, 1.8),
    ],
    "operator": [(r"largest difference: (\S+)", 0, 1e-5)],
    "own_transformer": [
        (r"largest difference: (\S+)", 0, 1e-5),
        (r"window of 8 alone: (\d+)%", 0, 60),
        (r"NHA: window of 8, 8 slots: (\d+)%", 95, 100),
    ],
}

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def _code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def _outputs(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [output for cell in _code_cells(notebook) for output in cell["outputs"]]


def _noise(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """Outputs that no reader wants: errors, and what was written to stderr, such as warnings."""
    return [x for x in _outputs(notebook) if x["output_type"] == "error" or _on_stderr(x)]


def _on_stderr(output: dict[str, Any]) -> bool:
    return output["output_type"] == "stream" and output["name"] == "stderr"


def _check_what_it_shows(name: str, notebook: dict[str, Any]) -> None:
    printed = "".join("".join(x["text"]) for x in _outputs(notebook) if "text" in x)
    for pattern, low, high in SHOWN[name]:
        numbers = [float(x) for x in re.findall(pattern, printed)]
        assert numbers, pattern
        assert all(low <= x <= high for x in numbers), (pattern, numbers)


def test_there_are_notebooks() -> None:
    assert {path.stem for path in NOTEBOOKS} == SHOWN.keys()


@each_notebook
def test_it_was_run_from_top_to_bottom(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    counts = [cell["execution_count"] for cell in _code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    assert not _noise(notebook)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    _check_what_it_shows(path.stem, notebook)


@each_notebook
def test_its_pictures_are_there_and_small(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    pictures = [
        base64.b64decode(output["data"]["image/png"])
        for output in _outputs(notebook)
        if "image/png" in output.get("data", {})
    ]
    assert pictures
    assert max(map(len, pictures)) < LARGEST_PICTURE
    assert path.stat().st_size < LARGEST_NOTEBOOK


@each_notebook
def test_it_names_what_exists(path: Path) -> None:
    """Every cell parses, and every `nha_jax.NAME` of the code and the text is there."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in _code_cells(notebook):
        ast.parse("".join(cell["source"]))
    text = "\n".join("".join(cell["source"]) for cell in notebook["cells"])
    names = set(re.findall(r"\bnha_jax\.([A-Za-z]\w*)", text))
    assert names
    assert not {name for name in names if not hasattr(nha_jax, name)}
    assert not {x for x in re.findall(r"`(docs/[\w./-]+)`", text) if not (ROOT / x).exists()}


@pytest.mark.slow
@each_notebook
def test_it_runs(path: Path) -> None:
    """In a kernel of its own, without an error or a word on stderr, and shows what it did."""
    wanted = "uv run --isolated --group notebooks pytest -m slow tests/test_notebooks.py"
    nbclient = pytest.importorskip("nbclient", reason=wanted)
    nbformat = pytest.importorskip("nbformat", reason=wanted)
    pytest.importorskip("ipykernel", reason=wanted)
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    nbclient.NotebookClient(notebook, timeout=TIME_LIMIT, resources=resources).execute()
    assert not _noise(notebook)
    _check_what_it_shows(path.stem, notebook)
