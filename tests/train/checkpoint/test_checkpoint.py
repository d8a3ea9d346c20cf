"""Which checkpoints are kept, and what is done about damaged ones and a full disk."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from train.checkpoint.checkpoints import Checkpoints, Progress, _reason, load_model_state
from train.config import CheckpointConfig
from train.errors import CheckpointError
from train.step.update import TrainState
from train.storage.checksums import CHECKSUMS_FILE

NOISE = 1 << 17
"""Numbers that no compression makes smaller: half a megabyte a part."""


def make_state(seed: int, size: int = 64) -> TrainState:
    """A state of random numbers."""

    def part(key: int) -> Any:
        return nnx.State({"w": nnx.Param(jax.random.normal(jax.random.key(key), (size,)))})

    return TrainState(part(seed), part(seed + 1000))


def restored_step(checkpoints: Checkpoints, size: int = 64) -> int | None:
    """The step that is restored, whose numbers are compared with what was saved."""
    abstract = jax.eval_shape(lambda: make_state(0, size))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found = checkpoints.restore(abstract, jax.tree.map(lambda _: device, abstract))
    if found is None:
        return None
    state, progress = found
    jax.tree.map(np.testing.assert_array_equal, state, make_state(progress.step, size))
    return progress.step


def save_all(folder: Path, *steps: int, config: CheckpointConfig | None = None) -> None:
    with Checkpoints(folder, config or CheckpointConfig()) as checkpoints:
        for step in steps:
            checkpoints.save(make_state(step), Progress(step, step, 0))


def kept(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def largest(folder: Path, pattern: str) -> Path:
    return max(folder.glob(pattern), key=lambda path: path.stat().st_size)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped": (flip, "has changed"),
    "truncated": (truncate, "bytes instead of"),
    "missing": (Path.unlink, "is missing"),
}
FILES = {
    "arrays": "model/ocdbt.process_0/d/*",
    "index": "optimizer/manifest.ocdbt",
    "shapes": "model/_METADATA",
    "top": "_CHECKPOINT_METADATA",
    "position": "data/manifest.ocdbt",
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, file: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_all(tmp_path, 1, 2)
    harm, expected = DAMAGES[damage]
    path = largest(tmp_path / "2", FILES[file])
    harm(path)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        assert restored_step(checkpoints) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert str(path.relative_to(tmp_path / "2")) in error
        assert expected in error
        assert "damaged-2" in error
        checkpoints.save(make_state(2), Progress(2, 2, 0))
        checkpoints.wait()
        assert restored_step(checkpoints) == 2
    assert (tmp_path / "damaged-2").is_dir()


def test_if_all_are_damaged_nothing_is_touched(tmp_path: Path) -> None:
    save_all(tmp_path, 1, 2)
    flip(tmp_path / "1" / "model" / "_METADATA")
    truncate(tmp_path / "2" / "optimizer" / "_METADATA")
    with (
        Checkpoints(tmp_path, CheckpointConfig()) as checkpoints,
        pytest.raises(CheckpointError) as error,
    ):
        restored_step(checkpoints)
    message = str(error.value)
    assert "\n" not in message
    assert "optimizer/_METADATA has" in message
    assert "model/_METADATA has changed" in message
    assert kept(tmp_path) == [1, 2]


def test_a_list_of_checksums_that_is_damaged_counts_as_damage(tmp_path: Path) -> None:
    save_all(tmp_path, 1, 2)
    (tmp_path / "2" / CHECKSUMS_FILE).write_bytes(b"[")
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        assert restored_step(checkpoints) == 1


def test_without_checksums_what_can_be_loaded_counts(tmp_path: Path) -> None:
    save_all(tmp_path, 1, 2)
    (tmp_path / "2" / CHECKSUMS_FILE).unlink()
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        assert restored_step(checkpoints) == 2
    for path in (tmp_path / "2" / "model").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:10])
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        assert restored_step(checkpoints) == 1


def test_reading_the_model_skips_a_damaged_checkpoint_and_leaves_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_all(tmp_path, 1, 2)
    flip(tmp_path / "2" / "model" / "_METADATA")
    abstract = jax.eval_shape(lambda: make_state(0).model)
    loaded = load_model_state(tmp_path, abstract)
    jax.tree.map(np.testing.assert_array_equal, loaded, make_state(1).model)
    assert "model/_METADATA has changed" in capsys.readouterr().err
    assert kept(tmp_path) == [1, 2]


def test_latest_regular_and_best_checkpoints_are_kept(tmp_path: Path) -> None:
    config = CheckpointConfig(every=1, keep=1, keep_every=4, keep_best=2)
    losses = {2: 3.0, 3: 1.0, 5: 2.0, 6: 1.5, 7: float("nan"), 9: 4.0}
    # A restart in between must not forget what was measured.
    for part in ((1, 2, 3), (4, 5, 6, 7, 8, 9, 10)):
        with Checkpoints(tmp_path, config) as checkpoints:
            for step in part:
                held_out = losses.get(step)
                checkpoints.save(make_state(step), Progress(step, step, 0), held_out)
    assert kept(tmp_path) == [3, 4, 6, 8, 10]


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(
    small_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, size = small_disk / "checkpoints", NOISE

    def save_until_full() -> None:
        with Checkpoints(folder, CheckpointConfig()) as checkpoints:
            for step in (1, 2, 3):
                checkpoints.save(make_state(step, size), Progress(step, step, 0))

    with pytest.raises(CheckpointError) as error:
        save_until_full()
    message = str(error.value)
    assert "\n" not in message
    assert str(folder) in message
    assert "No space left on device" in message
    assert "Traceback" not in capfd.readouterr().err

    subprocess.run(["mount", "-o", "remount,size=9m", str(small_disk)], check=True)
    with Checkpoints(folder, CheckpointConfig()) as checkpoints:
        newest = restored_step(checkpoints, size)
        assert newest in (1, 2)
        checkpoints.save(make_state(3, size), Progress(3, 3, 0))
        checkpoints.wait()
        assert restored_step(checkpoints, size) == 3


def step_until_raised(checkpoints: Checkpoints) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        checkpoints.is_due(1)


def test_a_failed_save_comes_out_at_the_next_step(small_disk: Path) -> None:
    with Checkpoints(small_disk / "checkpoints", CheckpointConfig(every=1)) as checkpoints:
        (small_disk / "other").write_bytes(b"x" * (2 << 20))
        checkpoints.save(make_state(1, NOISE), Progress(1, 1, 0))
        with pytest.raises(CheckpointError, match="No space left on device"):
            step_until_raised(checkpoints)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("writing a: No space [os_error_code='28'] [spec='{a: {}}']"), "No space left"),
        (ValueError("writing a: No space [spec='{a: {}}'] [os_error_code='28']"), "No space left"),
        (OSError(13, "Permission denied", "a"), "a: Permission denied"),
        (ValueError("a\nb"), "a"),
        (ValueError(), "ValueError"),
    ],
)
def test_the_reason_is_the_operating_systems(error: Exception, reason: str) -> None:
    assert _reason(error).removesuffix(" on device") == reason
