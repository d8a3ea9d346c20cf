"""What this machine has for training, and why what it lacks is missing: one screen."""

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement

from nha_jax.extras import EXTRAS
from nha_jax.storage.stores import Store
from train.paths import user_location, user_path

State = Literal["ok", "note", "wrong"]

_CLOCK_SECONDS = 60.0  # that the clock may be off: tokens of stores are refused a few minutes off
_LITTLE_DISK = 10e9  # bytes


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        name: what was looked at.
        state: "wrong" if training cannot run, "note" if something is worth knowing, else "ok".
        text: what there is, in a line.
    """

    name: str
    state: State
    text: str

    def __str__(self) -> str:
        mark = {"ok": "  ", "note": "* ", "wrong": "! "}[self.state]
        return f"{mark}{self.name:<12}{self.text}"


def examine(places: Sequence[str] = ()) -> Iterator[Finding]:
    """Makes the checks one by one; one that fails says so in its line, and the others go on.

    Args:
        places: folders on a disk or in stores whose access is to be tried.
    """
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("python", _python),
        ("packages", _packages),
        ("devices", _devices),
        ("kernels", _kernels),
        ("extras", _extras),
        ("machine", _machine),
        ("disk", _disk),
    ]
    checks += [("place", lambda place=place: _place(place)) for place in places]  # type: ignore[misc]
    for name, check in checks:
        try:
            yield from check()
        except Exception as error:
            yield Finding(name, "wrong", " ".join(str(error).split()) or type(error).__name__)


def _python() -> Iterator[Finding]:
    version = importlib.metadata.version("nha_jax")
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    yield Finding("python", "ok", f"{platform.python_version()}, nha_jax {version}, {system}")


def _packages() -> Iterator[Finding]:
    """The versions of the packages that nha_jax needs, and which are outside of its bounds."""
    needed = [Requirement(text) for text in importlib.metadata.requires("nha_jax") or ()]
    shown, wrong = [], []
    for requirement in needed:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is not installed")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version}, but {requirement.specifier} is needed")
        if requirement.name in ("jax", "flax", "optax", "orbax-checkpoint"):
            shown.append(f"{requirement.name} {version}")
    shown.append(f"jaxlib {importlib.metadata.version('jaxlib')}")
    yield Finding("packages", "ok", ", ".join(shown))
    if wrong:
        yield Finding("packages", "wrong", "; ".join(wrong))


def _devices() -> Iterator[Finding]:
    import jax

    devices = jax.devices()
    kind, count = devices[0].device_kind, len(devices)
    memory = (devices[0].memory_stats() or {}).get("bytes_limit")
    room = f", {memory / 2**30:.1f} GiB each" if memory else ""
    text = f"{count} x {kind} ({devices[0].platform}){room}"
    if devices[0].platform == "cpu":
        yield Finding("devices", "note", f"{text}; {'; '.join(_why_no_accelerator())}")
        return
    versions = [
        f"{name} {version}"
        for name in ("libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cudnn-cu13")
        if (version := _version(name))
    ]
    yield Finding("devices", "ok", ", ".join([text, *versions]))


def _why_no_accelerator() -> Iterator[str]:
    """Says of each kind of accelerator what is missing."""
    if os.environ.get("JAX_PLATFORMS"):
        yield f"JAX_PLATFORMS={os.environ['JAX_PLATFORMS']} is set"
    tpu = any(Path("/dev").glob("accel*")) or Path("/dev/vfio/0").exists()
    libtpu = _version("libtpu")
    if tpu and not libtpu:
        yield 'a TPU is there, but not libtpu: `pip install "nha_jax[tpu]"`'
    elif not tpu:
        yield "no TPU in /dev" + (f" (libtpu {libtpu})" if libtpu else "")
    gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    plugin = _version("jax-cuda13-plugin") or _version("jax-cuda12-plugin")
    if gpu and not plugin:
        yield 'a GPU is there, but not jax\'s plugin for CUDA: `pip install "nha_jax[cuda]"`'
    elif not gpu:
        yield "no NVIDIA GPU in /dev" + (f" (CUDA plugin {plugin})" if plugin else "")
    elif shutil.which("nvidia-smi") is None:
        yield "a GPU and jax's plugin are there, but no driver (nvidia-smi)"


def _kernels() -> Iterator[Finding]:
    """Which implementations of the operator serve a usual call here, and which is taken."""
    import jax
    import jax.numpy as jnp

    import nha_jax
    from nha_jax.ops import backends

    shapes = [(1, 256, 2, 128), (1, 256, 2, 128), (1, 256, 2, 128), (1, 256, 2, 64)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    serving, refusing = [], []
    here = jax.devices()[0].platform
    for name in backends.names():
        platform_of = backends.get(name).platform
        if platform_of not in (None, here):
            refusing.append(f"{name} is for {platform_of.upper()}s")
            continue
        try:
            jax.eval_shape(
                lambda *x, name=name: nha_jax.nha_attention(
                    *x, window_size=64, implementation=name
                ),
                *arrays,
            )
            serving.append(name)
        except (NotImplementedError, ValueError, ImportError) as error:
            refusing.append(f"{name}: {' '.join(str(error).split())}")
    text = ", ".join(serving)
    yield Finding("kernels", "ok", f"{text}; not here: {'; '.join(refusing)}" if refusing else text)


def _extras() -> Iterator[Finding]:
    there = {package: importlib.util.find_spec(package) is not None for package in EXTRAS}
    whole = sorted(
        extra
        for extra in set(EXTRAS.values())
        if all(there[package] for package in EXTRAS if EXTRAS[package] == extra)
    )
    missing = sorted(set(EXTRAS.values()) - set(whole))
    text = f"{', '.join(whole) or 'none'}; not installed: {', '.join(missing) or 'none'}"
    yield Finding("extras", "ok", text)


def _machine() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = ""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        total, free = (int(fields[x].split()[0]) / 2**20 for x in ("MemTotal", "MemAvailable"))
        memory = f", {free:.1f} of {total:.1f} GiB of memory free"
    now = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    yield Finding("machine", "ok", f"{cores} cores{memory}, clock {now}")


def _disk() -> Iterator[Finding]:
    from train.config import TrainConfig

    fields = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    folders = {
        "this folder": Path.cwd(),
        "temporary files": Path(tempfile.gettempdir()),
        "compiled programs": user_path(str(fields["compilation_cache"]), "compilation_cache"),
    }
    for name, folder in folders.items():
        yield from _folder(f"disk: {folder} ({name})", folder)


def _folder(name: str, folder: Path) -> Iterator[Finding]:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    writable = os.access(there, os.W_OK | os.X_OK)
    text = f"{free / 1e9:,.1f} GB free" + ("" if writable else ", cannot be written to")
    state: State = "wrong" if not writable else "note" if free < _LITTLE_DISK else "ok"
    label, rest = name.split(": ", 1)
    yield Finding(label, state, f"{rest}: {text}")


def _place(place: str) -> Iterator[Finding]:
    location = user_location(place, "PLACE")
    if isinstance(location, Path):
        yield from _folder(f"place: {location}", location.absolute())
        return
    name = f".nha-doctor-{uuid.uuid4().hex[:8]}"
    began = time.perf_counter()
    yield from _store(location, name)
    seconds = (time.perf_counter() - began) / 4
    yield Finding("place", "ok", f"{place}: written, read and removed, {seconds:.2f} s a request")


def _store(store: Store, name: str) -> Iterator[Finding]:
    content = os.urandom(64)
    store.write(name, content)
    try:
        if store.read(name) != content:
            yield Finding("place", "wrong", f"{store}: gives back something else than was written")
        off = time.time() - store.modified(name)
    finally:
        store.remove([name])
    if abs(off) > _CLOCK_SECONDS:
        yield Finding("clock", "wrong", f"{off:+.0f} s off that of {store}; stores refuse that")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def as_values(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """The findings as JSON can hold them."""
    return [dataclasses.asdict(finding) for finding in findings]
