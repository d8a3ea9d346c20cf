"""The wheel: what it carries, and that it works beside projects that use its packages' names."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from nha_jax.hf.files_beside import TORCH_FILES
from tests.support.paths import ROOT
from train.errors import ConfigError
from train.load_config import load_config
from train.shipped_configs import find_config, shipped_configs

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

IMPORTED_BY = {
    "tpu": "libtpu",
    "cuda": "jax_plugins.xla_cuda13",
    "data": "pyarrow.parquet, tokenizers, zstandard",
    "chat": "jinja2",
    "eval": "lm_eval, jinja2",
    "notebook": "ipykernel, chex",
}


def run_uv(*arguments: str | Path) -> None:
    finished = subprocess.run(["uv", *map(str, arguments)], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run_uv("build", "--wheel", "-q", "-o", folder, ROOT)
    return next(folder.glob("*.whl"))


def run_elsewhere(python: Path | str, *arguments: str, folder: Path) -> subprocess.CompletedProcess:
    """Runs Python in a folder whose own modules come first."""
    environment = os.environ | {"PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [python, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_wheel_carries_configurations_and_types_and_no_tests(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"train/configs/{path.name}" for path in shipped_configs().values()} <= names
    assert {f"{package}/py.typed" for package in ("nha_jax", "pallas", "train")} <= names
    assert {f"nha_jax/hf/torch_files/{path.name}" for path in TORCH_FILES.glob("*.py")} <= names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"nha_jax", "pallas", "train"}


@pytest.mark.parametrize("name", shipped_configs())
def test_configurations_are_found_by_name(name: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config(name) == ROOT / "configs" / f"{name}.yaml"


def test_a_file_comes_before_a_configuration_of_its_name(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("quickstart").write_text("steps: 7\n")
    assert find_config("quickstart") == Path("quickstart")


@pytest.mark.parametrize(
    ("name", "hint"), [("quickstrat", "did you mean quickstart?"), ("x", "expected one of hybr")]
)
def test_a_name_that_is_none_gets_a_hint(name: str, hint: str) -> None:
    message = f"'{name}': no such file, nor a configuration by name; {hint}"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        load_config(name)


@pytest.mark.parametrize("name", ["pallas", "train"])
def test_modules_that_hide_ours_are_named_in_one_line(name: str, tmp_path: Path) -> None:
    hiding = tmp_path / f"{name}.py"
    hiding.touch()
    finished = run_elsewhere(sys.executable, "-m", "nha_jax", "--version", folder=tmp_path)
    assert finished.returncode == 1
    assert finished.stderr.startswith(
        f"nha: nha_jax needs its own package '{name}', but Python finds {hiding} in its place"
    )
    assert finished.stderr.count("\n") == 1


def test_a_folder_that_hides_the_kernels_is_named_on_import(tmp_path: Path) -> None:
    (tmp_path / "pallas").mkdir()
    (tmp_path / "pallas" / "__init__.py").touch()
    finished = run_elsewhere(sys.executable, "-c", "import nha_jax.ops", folder=tmp_path)
    assert finished.stderr.splitlines()[-1].startswith("ImportError: nha_jax needs its own package")


def test_version_names_the_commit() -> None:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    if not commit:
        pytest.skip("no clone of the repository, or git refuses its owner")
    finished = run_elsewhere(sys.executable, "-m", "nha_jax", "--version", folder=ROOT)
    assert re.fullmatch(rf"nha \S+\+g{commit}\n", finished.stdout)


@pytest.mark.slow
def test_wheel_trains_and_generates_in_a_project_of_the_same_names(wheel, tmp_path: Path) -> None:
    """The project has train.py and pallas/, as the directory and not on Python's path."""
    run_uv("venv", "-q", tmp_path / "environment")
    python = tmp_path / "environment" / "bin" / "python"
    run_uv("pip", "install", "-q", "--python", python, wheel)
    project = tmp_path / "project"
    (project / "pallas").mkdir(parents=True)
    (project / "pallas" / "__init__.py").touch()
    (project / "train.py").touch()
    nha = python.with_name("nha")
    sizes = ["--steps=4", "--optimizer.warmup_steps=1", "--evaluation.final_sequences=2"]
    for command in (
        ["--version"],
        ["train", "quickstart", *sizes],
        ["generate", "runs/quickstart", "--prompt", "def ", "--max-new-tokens", "4"],
    ):
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        finished = subprocess.run(
            [nha, *command], cwd=project, env=environment, capture_output=True, text=True
        )
        assert finished.returncode == 0, finished.stderr[-3000:]


@pytest.mark.full
@pytest.mark.parametrize("extra", EXTRAS)
def test_extra_installs_in_a_fresh_environment(wheel: Path, extra: str, tmp_path: Path) -> None:
    run_uv("venv", "-q", tmp_path)
    python = tmp_path / "bin" / "python"
    run_uv("pip", "install", "-q", "--python", python, f"{wheel}[{extra}]")
    finished = run_elsewhere(python, "-c", f"import nha_jax, {IMPORTED_BY[extra]}", folder=tmp_path)
    assert finished.returncode == 0, finished.stderr
