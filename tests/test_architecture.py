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


NO_PLACE_OF_A_USER = {
    "train.paths": "the door itself",
    "train.cli": "the null device, and where the code is",
    "train.shipped_configs": "where the code is",
    "train.doctor": "the folder of temporary files",
    "train.data.corpus": "Python's own modules",
    "train.data.input_files": "what stands in a folder that came through the door",
    "train.data.prepare.file_groups": "a name in a dataset's own list",
    "train.data.store_files": "the cache",
    "train.storage.lease": "/proc",
    "train.storage.mirror": "a temporary folder",
    "train.storage.run_in_store": "a `Store` as Orbax wants it",
}
"""The modules of train/ that make a path of a text, and what the text is."""


def _makes_a_path(call: ast.Call) -> bool:
    """Whether a call makes a path of a text that does not stand there, or opens what it names."""
    name = ast.unparse(call.func)
    if name.endswith(".expanduser") or name == "open":
        return True
    is_constant = all(isinstance(argument, ast.Constant) for argument in call.args)
    return name in ("Path", "pathlib.Path", "epath.Path") and not is_constant


def test_places_that_users_name_come_through_one_door() -> None:
    """There URLs, `~` and names that no file can have are taken care of, or refused in a line.

    What is given to `os` or another library as a text is not seen here.
    """
    found = {
        module
        for module, path in MODULES.items()
        if module.startswith("train.")
        and any(
            isinstance(node, ast.Call) and _makes_a_path(node)
            for node in ast.walk(ast.parse(path.read_text()))
        )
    }
    assert found == NO_PLACE_OF_A_USER.keys()


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
