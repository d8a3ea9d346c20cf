"""The files of examples/launch/: their syntax, their commands of `nha`, their exit codes."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support.commands import check
from tests.support.documents import groups_and_extras
from tests.support.paths import ROOT
from train.failures import INTERRUPTED, STUCK, WRONG_INPUT

LAUNCH = ROOT / "examples" / "launch"


def jobset() -> dict:
    return yaml.safe_load((LAUNCH / "gke-jobset.yaml").read_text())


def job() -> dict:
    (replicated,) = jobset()["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def commands_of(script: Path) -> list[list[str]]:
    """The commands that begin with `nha` in a script or its comments."""
    text = script.read_text().replace("\\\n", " ")
    lines = [re.sub(r"^#\s*", "", line) for line in text.splitlines()]
    found = [re.search(r"(?:^|\s)(nha (?:train|doctor)\b.*)$", line) for line in lines]
    return [shlex.split(match[1]) for match in found if match]


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_bash_and_their_commands_are_known(
    script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    subprocess.run(["bash", "-n", str(script)], check=True)
    commands = commands_of(script)
    assert commands
    for command in commands:
        check(command, monkeypatch)


def test_the_command_of_the_jobset_is_known_and_its_mesh_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    (container,) = job()["template"]["spec"]["containers"]
    command = [*container["command"], *container["args"]]
    assert command[:3] == ["nha", "train", "nha-340m"]
    check(command, monkeypatch)
    chips = jobset()["spec"]["replicatedJobs"][0]["replicas"] * job()["completions"]
    chips *= container["resources"]["limits"]["google.com/tpu"]
    sizes = [int(size) for size in re.findall(r"--mesh\.\w+=(\d+)", " ".join(command))]
    assert sizes[0] * sizes[1] == chips == 32


def test_wrong_input_alone_is_not_started_again() -> None:
    (rule,) = job()["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [WRONG_INPUT, INTERRUPTED]
    assert rule["onExitCodes"]["containerName"] == "train"
    assert jobset()["spec"]["failurePolicy"]["rules"][0]["action"] == "FailJobSet"
    assert job()["template"]["spec"]["restartPolicy"] == "Never"


@pytest.mark.parametrize(
    ("codes", "attempts"),
    [([0], 1), ([WRONG_INPUT], 1), ([130], 1), ([STUCK, 143, 1, 0], 4), ([STUCK, WRONG_INPUT], 2)],
    ids=str,
)
def test_until_done_starts_again_what_may_go_on(
    codes: list[int], attempts: int, tmp_path: Path
) -> None:
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    command = "head -n 1 codes > code; sed -i 1d codes; echo >> ran; exit $(cat code)"
    done = subprocess.run(
        [LAUNCH / "until-done.sh", "bash", "-c", command],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PAUSE": "0"},
        capture_output=True,
    )
    assert done.returncode == codes[-1]
    assert (tmp_path / "ran").read_text().count("\n") == attempts


def test_the_image_has_a_target_for_each_accelerator() -> None:
    text = (LAUNCH / "Dockerfile").read_text()
    assert re.findall(r"^FROM (\S+) AS (\w+)$", text, re.MULTILINE) == [
        ("python:3.12-slim", "base"),
        ("base", "tpu"),
        ("base", "cuda"),
    ]
    extras = re.findall(r'"/source\[([\w,]+)\]"', text)
    assert [set(names.split(",")) <= set(groups_and_extras()) for names in extras] == [True, True]
    version = (ROOT / ".python-version").read_text().strip()
    assert version.startswith("3.12")
