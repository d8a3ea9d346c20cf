"""Whatever happens, the user gets one line and a documented exit code."""

import errno
import importlib.util
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

import train.commands
from tests.support.paths import ROOT
from train import cli, errors, failures
from train.cli import main

NO_SPACE = "No space left on device: a disk is full, or what standard output goes to\n"

# (what a command raises, exit code, what the line has)
FAILURES: list[tuple[BaseException, int, list[str]]] = [
    (errors.ConfigError("a = 1: expected 2"), 2, ["nha: a = 1: expected 2"]),
    (errors.TrainingError("a\nb\x1b[2J"), 1, [r"a\nb\x1b[2J"]),
    (MemoryError(), 1, ["out of memory", "--batch-size"]),
    (MemoryError("Unable to allocate 7.28 TiB for an array"), 1, ["7.28 TiB", "--batch-size"]),
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory trying to allocate 3.5GiB."),
     1, ["out of memory (3.5GiB more", "--batch-size"]),
    (jax.errors.JaxRuntimeError("INTERNAL: the device was lost\nstack\n" * 40), 1,
     ["the device or its compiler failed: INTERNAL: the device was lost", "NHA_TRACEBACK=1"]),
    (ImportError("No module", name="pyarrow.parquet"), 1, ["pyarrow", '"nha_jax[data]"']),
    (ModuleNotFoundError("No module", name="jinja2"), 1, ["jinja2", '"nha_jax[chat]"']),
    (ModuleNotFoundError("No module", name="flax"), 1, ["flax", 'pip install "nha_jax"']),
    (ModuleNotFoundError("No module", name="train.x"), 1, ["unexpected ModuleNotFound"]),
    (RecursionError("maximum recursion depth"), 1, ["nested too deeply", "NHA_TRACEBACK=1"]),
    (PermissionError(errno.EACCES, "Permission denied", "a"), 1, ["nha: a: Permission denied\n"]),
    (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 999), 1, ["xxx...: File name too"]),
    (OSError(errno.EXDEV, "Cross-device link", b"a", None, "b"), 1, ["a -> b: Cross-device"]),
    (OSError(errno.ENOSPC, "No space left on device"), 1, [NO_SPACE]),
    (OSError("a library's own words"), 1, ["a library's own words", "NHA_TRACEBACK=1"]),
    (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, ["Broken pipe", "NHA_TRACEBACK=1"]),
    (ZeroDivisionError("division\nby zero"), 1,
     ["unexpected ZeroDivisionError: division by zero; NHA_TRACEBACK=1"]),
    (KeyError("x"), 1, ["unexpected KeyError: 'x'"]),
    (AssertionError(), 1, ["unexpected AssertionError"]),
]  # fmt: skip


def command_that(monkeypatch: pytest.MonkeyPatch, does: Callable[[], Any], name: str) -> None:
    monkeypatch.setattr(train.commands.COMMANDS[name], "run", lambda *options: does())


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException, name: str = "generate") -> None:
    def fail() -> None:
        raise error

    command_that(monkeypatch, fail, name)


@pytest.mark.parametrize(
    ("error", "code", "parts"), FAILURES, ids=[repr(error)[:40] for error, _, _ in FAILURES]
)
def test_every_exception_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    parts: list[str],
) -> None:
    failing(monkeypatch, error)
    assert main(["generate", "run"]) == code
    output = capsys.readouterr().err
    assert output.startswith("nha: ")
    assert output.count("\n") == 1
    assert len(output) < 500
    for part in parts:
        assert part in output


def test_a_traceback_is_for_who_asks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, ZeroDivisionError("x"))
    monkeypatch.setenv(failures.TRACEBACK, "1")
    assert main(["generate", "run"]) == 1
    output = capsys.readouterr().err
    assert "Traceback" in output
    assert "in fail" in output
    assert output.splitlines()[-1].startswith("nha: unexpected ZeroDivisionError: x")


def test_what_a_thread_raises_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(error: Exception) -> None:
        raise error

    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    failures.word_background_errors()
    for error in (ZeroDivisionError("by\nzero"), RuntimeError("Event loop is closed")):
        thread = threading.Thread(target=fail, args=(error,))
        thread.start()
        thread.join()
    assert capsys.readouterr().err == (
        "nha: in the background: ZeroDivisionError: by zero; NHA_TRACEBACK=1 shows where\n"
    )


@pytest.mark.parametrize(
    ("arguments", "resumes"),
    [(["train", "c"], True), (["search", "r", "--full-layers=1"], True), (["generate", "r"], False),
     (["export", "r", "h"], False)],
)  # fmt: skip
def test_ctrl_c_says_whether_the_command_goes_on(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    resumes: bool,
) -> None:
    failing(monkeypatch, KeyboardInterrupt(), arguments[0])
    assert main(arguments) == 130
    line = capsys.readouterr().err
    assert line.startswith("nha: interrupted")
    assert line.count("\n") == 1
    assert ("the same command goes on" in line) == resumes


@pytest.mark.parametrize("code", [0, 1, 2, 130, 141, 143])
def test_exit_codes_are_documented(capsys: pytest.CaptureFixture[str], code: int) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert re.search(rf"^  {code} +\w", capsys.readouterr().out, re.MULTILINE)
    assert f"\n| {code} | " in (ROOT / "docs" / "pretraining.md").read_text()


def launch(does: str, shell: str = "{nha}", **environment: str) -> subprocess.CompletedProcess[str]:
    """`nha generate run` in a process whose command does something, in a line of a shell."""
    script = (
        "import sys; from train import cli; from train.commands import generate\n"
        f"def run(*options):\n    {does}\n    return 0\n"
        "generate.run = run\nsys.exit(cli.main(['generate', 'run']))"
    )
    line = shell.replace("{nha}", '"$PYTHON" -c "$SCRIPT"')
    environment |= {"PYTHON": sys.executable, "PYTHONUNBUFFERED": "", "SCRIPT": script}
    return subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, env=os.environ | environment,
        cwd=ROOT, timeout=120,
    )  # fmt: skip


PRINTING = "print('x' * 10, flush={}); [print('y' * 9999) for _ in range(99)]"


@pytest.mark.parametrize(
    ("does", "shell", "code", "error"),
    [
        (PRINTING.format(True), "{nha} | head -c 1 >/dev/null; exit ${PIPESTATUS[0]}", 141, ""),
        (PRINTING.format(True), "{nha} 2>&1 | true; exit ${PIPESTATUS[0]}", 141, ""),
        ("print('x')", "{nha} >/dev/full", 1, f"nha: {NO_SPACE}"),
        ("print('x')", "PYTHONUNBUFFERED=1 {nha} >/dev/full", 1, f"nha: {NO_SPACE}"),
        ("print('x', flush=True); sys.stdout.write('y')", "{nha} >&-", 0, ""),
        ("open('/dev/null'); raise ValueError", "{nha} 2>&-", 1, ""),
        ("open('/dev/null'); raise ValueError", "{nha} 2>/dev/full", 1, ""),
        ("print(sys.stdin.buffer.read()[:1])", "{nha} <&-", 0, ""),
        ("raise OSError(28, 'x', 'café')", "PYTHONIOENCODING=ascii {nha}", 1, "nha: caf\\xe9: x\n"),
    ],
    ids=["head", "both", "full", "unbuffered", "closed", "no stderr", "full stderr", "no stdin",
         "ascii"],
)  # fmt: skip
def test_streams_that_take_nothing(does: str, shell: str, code: int, error: str) -> None:
    done = launch(does, shell)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(error)
    assert done.stderr.count("\n") == bool(error)


def test_characters_that_a_stream_has_not_are_written_as_escapes() -> None:
    done = launch("print('café \\N{GRINNING FACE} ' + chr(0xd800))", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, "caf\\xe9 \\U0001f600 \\ud800\n")
    done = launch("print('café', chr(0xdcff))", PYTHONIOENCODING="utf-8")
    assert (done.returncode, done.stdout) == (0, "café \\udcff\n")


def test_ctrl_c_while_modules_are_loaded_is_one_line() -> None:
    script = (
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'train.commands': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from train import cli\n"
        "sys.exit(cli.main(['train', 'c']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 130
    assert done.stderr.startswith("nha: interrupted")
    assert done.stderr.count("\n") == 1


def test_a_platform_that_is_not_there_is_wrong_input() -> None:
    """Whose plugin is missing, as of CUDA, jax trips over an assertion instead of saying so."""
    absent = ["xyz"] + ["cuda"] * (importlib.util.find_spec("jax_cuda13_plugin") is None)
    for platform in absent:
        done = launch("import jax; jax.devices()", JAX_PLATFORMS=platform)
        assert done.returncode == 2
        assert done.stderr.startswith(f"nha: JAX_PLATFORMS = {platform}: jax finds no such device")
        assert done.stderr.count("\n") == 1


def test_the_command_line_imports_nothing_heavy() -> None:
    """Ctrl-C can be caught only after what `train.cli` itself imports."""
    source = Path(cli.__file__).read_text()
    assert re.findall(r"^(?:import|from) (\S+)", source, re.MULTILINE) == ["sys", "collections.abc"]
