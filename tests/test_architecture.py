"""Imports go down only, as docs/architecture.md draws the house.

What counts is what a module imports when it is loaded; an import inside a function, which puts off
the cost of one, is no arrow.
"""

import ast
import graphlib
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

FLOORS = ("pallas", "nha_jax", "train")  # from below
FOLDERS = sorted(
    str(path.parent.relative_to(ROOT))
    for floor in FLOORS
    for path in (ROOT / floor).rglob("__init__.py")
)


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {_module(path): path for floor in FLOORS for path in (ROOT / floor).rglob("*.py")}


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """What runs when a module is loaded, without what stands under `if TYPE_CHECKING`."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If) and "TYPE_CHECKING" not in ast.dump(statement.test):
            yield from _statements([*statement.body, *statement.orelse])
        elif isinstance(statement, ast.Try):
            yield from _statements(statement.body)


def _imports(module: str) -> set[str]:
    """The modules of this repository that a module imports when it is loaded."""
    found: set[str] = set()
    for statement in _statements(ast.parse(MODULES[module].read_text()).body):
        if isinstance(statement, ast.Import):
            found.update(alias.name for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom) and statement.module:
            inside = {f"{statement.module}.{alias.name}" for alias in statement.names}
            found |= inside & MODULES.keys() or {statement.module}
    return (found & MODULES.keys()) - {module}


IMPORTS = {module: _imports(module) for module in MODULES}


def test_no_floor_imports_from_above() -> None:
    height = {floor: number for number, floor in enumerate(FLOORS)}
    upward = [
        f"{module} imports {other}"
        for module, imported in IMPORTS.items()
        for other in imported
        if height[other.split(".")[0]] > height[module.split(".")[0]]
    ]
    assert not upward


@pytest.mark.parametrize("folder", FOLDERS)
def test_rooms_of_a_folder_form_no_circle(folder: str) -> None:
    """A room is a module of the folder, or a folder in it with all that it holds."""
    prefix = folder.replace("/", ".") + "."
    rooms: dict[str, set[str]] = {}
    for module, imported in IMPORTS.items():
        for other in imported if module.startswith(prefix) else ():
            if other.startswith(prefix):
                room, above = (name.removeprefix(prefix).split(".")[0] for name in (other, module))
                if room != above:
                    rooms.setdefault(above, set()).add(room)
    try:
        graphlib.TopologicalSorter(rooms).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_scripts_import_what_exists() -> None:
    """Benchmarks and examples are not type-checked, and few of them run in the tests."""
    missing = []
    for path in [*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]:
        for statement in ast.walk(ast.parse(path.read_text())):
            if not isinstance(statement, ast.ImportFrom) or not statement.module:
                continue
            if statement.module.split(".")[0] in FLOORS:
                module = importlib.import_module(statement.module)
                names = (alias.name for alias in statement.names)
                missing += [
                    f"{path.relative_to(ROOT)}: {statement.module}.{name}"
                    for name in names
                    if not hasattr(module, name) and f"{statement.module}.{name}" not in MODULES
                ]
    assert not missing
