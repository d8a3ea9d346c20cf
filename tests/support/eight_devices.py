"""Programs on eight devices of the CPU, which share one process.

A program is a module of tests/support with a function `main` of strings, which prints what it finds
and raises what is wrong. A process takes seconds to import jax and what else a program needs: the
first program of a test session starts one, and it serves those that follow.
"""

import atexit
import contextlib
import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from typing import IO


def run_on_eight_devices(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Calls a module's `main`; returns what it printed, with 0, or 1 if it raised, as exit code."""
    process = _process()
    assert process.stdin
    assert process.stdout
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps([module, *arguments]) + "\n")
        process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        _process.cache_clear()  # the next program gets a new one
        raise RuntimeError(f"{module}: its process ended with exit code {process.wait()}")
    return subprocess.CompletedProcess([module, *arguments], **json.loads(answer))


@functools.cache
def _process() -> subprocess.Popen[str]:
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.eight_devices"],
        env=os.environ | flags,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(process.kill)
    return process


def serve(requests: IO[str], answers: IO[str]) -> None:
    """Calls the program of each line of `requests`, and writes a line for it to `answers`."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)  # as tests/conftest.py has it
    assert len(jax.devices()) == 8
    for request in requests:
        module, *arguments = json.loads(request)
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
            with _printing_to(1, output), _printing_to(2, errors):
                try:
                    importlib.import_module(module).main(*arguments)
                    code = 0
                except Exception:
                    traceback.print_exc()
                    code = 1
            answer = {"returncode": code, "stdout": _content(output), "stderr": _content(errors)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


@contextlib.contextmanager
def _printing_to(descriptor: int, file: IO[str]) -> Iterator[None]:
    """What is written to standard output or error goes to a file, XLA's own lines too."""
    before = os.dup(descriptor)
    os.dup2(file.fileno(), descriptor)
    try:
        yield
    finally:
        {1: sys.stdout, 2: sys.stderr}[descriptor].flush()
        os.dup2(before, descriptor)
        os.close(before)


def _content(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # nothing but answers reaches the pipe
        serve(sys.stdin, answers)
