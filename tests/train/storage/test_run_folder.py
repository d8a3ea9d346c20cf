"""What a run folder refuses, what its log repairs, and what its checkpoints hold."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nha_jax
from tests.support.train.tiny_run import Nha
from train.checkpoint.checkpoints import Checkpoints, Progress
from train.cli import main
from train.config import CheckpointConfig
from train.devices.mesh import make_mesh
from train.errors import ConfigError
from train.report.metrics import MetricsLog, read_rows
from train.report.plots import plot_loss_curve
from train.step.evaluation import gzip_bits_per_byte
from train.step.update import TrainingFunctions
from train.storage.run_folder import RunFolder
from train.text.loading import load_model


def test_another_configuration_is_refused_and_every_difference_named(
    nha: Nha, undisturbed: Nha, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(undisturbed.run, nha.run)
    before = (nha.run / "run.json").read_bytes()
    arguments = ["--optimizer.learning_rate=0.5", "--model.window_size=[4]", "--batch_size=16"]
    assert main(["train", str(nha.config_file), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"run = '{nha.run}'" in error
    assert "batch_size: 8 -> 16" in error
    assert "model.window_size: 8 -> [4]" in error
    assert "optimizer.learning_rate: 0.003 -> 0.5" in error
    assert error.count("->") == 3
    assert (nha.run / "run.json").read_bytes() == before


def test_what_does_not_change_the_updates_may_change(nha: Nha) -> None:
    with RunFolder(str(nha.run)).open(nha.config(), "corpus"):
        pass
    changed = nha.config(steps=500, logging__every=7, checkpoint__keep=9, sample__prompt="x")
    RunFolder(str(nha.run)).check(changed, "corpus")
    options = {"pallas_tpu": {"chunk": 64}}
    other = nha.config(model__implementation="xla", model__kernel_options=options)
    RunFolder(str(nha.run)).check(other, "corpus")


def test_another_corpus_is_refused(nha: Nha) -> None:
    with RunFolder(str(nha.run)).open(nha.config(), "one"):
        pass
    with pytest.raises(ConfigError, match=r'contents of data\.corpus: "one" -> "two"'):
        RunFolder(str(nha.run)).check(nha.config(), "two")


def test_another_loss_and_another_mixture_are_refused_by_name(nha: Nha) -> None:
    with RunFolder(str(nha.run)).open(nha.config(data__corpus={"web": 0.8, "code": 0.2}), "one"):
        pass
    other = nha.config(data__corpus={"web": 0.5, "code": 0.2}, loss__z_loss=1e-4)
    with pytest.raises(ConfigError) as error:
        RunFolder(str(nha.run)).check(other, "one")
    assert "data.corpus.web: 0.8 -> 0.5" in str(error.value)
    assert "loss.z_loss: 0.0 -> 0.0001" in str(error.value)
    assert str(error.value).count("->") == 2


def test_a_folder_of_something_else_is_left_alone(
    nha: Nha, capsys: pytest.CaptureFixture[str]
) -> None:
    nha.run.mkdir()
    (nha.run / "thesis.tex").write_text("precious")
    assert main(["train", str(nha.config_file)]) == 2
    assert "thesis.tex" in capsys.readouterr().err
    assert [path.name for path in nha.run.iterdir()] == ["thesis.tex"]


def test_two_processes_cannot_train_in_one_folder(
    nha: Nha, capsys: pytest.CaptureFixture[str]
) -> None:
    config = nha.config()
    with RunFolder(str(nha.run)).open(config, "corpus"), pytest.raises(ConfigError) as error:
        RunFolder(str(nha.run)).open(config, "corpus")
    assert "another process is training" in str(error.value)


def test_checkpoint_of_other_shapes_is_refused_by_name(nha: Nha, tmp_path: Path) -> None:
    config = nha.config()
    other = nha.config(model__mlp_size=64)
    folder = tmp_path / "checkpoints"
    narrow, wide = (TrainingFunctions(each, make_mesh(each)) for each in (config, other))
    with Checkpoints(folder, CheckpointConfig()) as checkpoints:
        checkpoints.save(narrow.initial_state(), Progress(3, 3, 0))
        checkpoints.wait()
        same = checkpoints.restore(narrow.abstract_state, narrow.shardings)
        assert same is not None
        assert same[1] == Progress(3, 3, 0)
        with pytest.raises(ConfigError, match=r"model does not fit.*mlp.*128.* -> .*64"):
            checkpoints.restore(wide.abstract_state, wide.shardings)


@pytest.mark.slow
def test_a_save_holds_the_state_of_its_step_though_training_goes_on(
    nha: Nha, tmp_path: Path
) -> None:
    config = nha.config()
    functions = TrainingFunctions(config, make_mesh(config))
    state = functions.initial_state()
    batch = {
        "tokens": np.ones((8, 32), np.int32),
        "targets": np.ones((8, 32), np.int32),
        "segment_ids": np.ones((8, 32), np.int32),
        "loss_mask": np.ones((8, 32), bool),
    }
    with Checkpoints(tmp_path / "checkpoints", CheckpointConfig()) as checkpoints:
        state, _ = functions.update(state, batch)
        expected = jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)
        checkpoints.save(state, Progress(1, 1, 0))
        for _ in range(5):
            state, _ = functions.update(state, batch)
        checkpoints.wait()
        restored = checkpoints.restore(functions.abstract_state, functions.shardings)
        assert restored is not None
        jax.tree.map(np.testing.assert_array_equal, restored[0], expected)


def test_model_of_a_run_can_be_loaded_in_both_ways(undisturbed: Nha) -> None:
    exported = nha_jax.load(undisturbed.run / "model")
    newest = load_model(str(undisturbed.run))
    tokens = jnp.arange(12)[None]
    np.testing.assert_array_equal(exported(tokens), newest(tokens))


def test_log_drops_rows_after_the_restored_step_and_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0 / step}) for step in (1, 2, 3, 4)]
    path.write_text("\n".join([*lines, '{"step": 5, "lo']))
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3, 4]
    with MetricsLog(path, tmp_path / "events", after_step=2) as log:
        log.write({"step": 3, "loss": float("nan")})
    assert path.read_text().splitlines() == [*lines[:2], '{"step": 3, "loss": null}']


def test_rows_of_before_are_read_by_their_present_names(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0, "slot_share": [0.5]}\n')
    assert read_rows(path) == [{"step": 1, "loss": 2.0, "slot_weight": [0.5]}]
    with MetricsLog(path, tmp_path / "events", after_step=1):
        pass
    assert json.loads(path.read_text()) == {"step": 1, "loss": 2.0, "slot_weight": [0.5]}


def test_a_log_on_a_full_disk_raises_and_does_not_wait(small_disk: Path) -> None:
    def write_until_full() -> None:
        with MetricsLog(small_disk / "metrics.jsonl", small_disk / "events", 0) as log:
            for step in range(1, 1_000_000):
                log.write({"step": step, "loss": 1.0})

    with pytest.raises(OSError, match="No space left on device"):
        write_until_full()


def test_curve_of_a_run_with_a_skipped_step(tmp_path: Path) -> None:
    rows = [
        {"step": 1, "loss": 5.0, "bits_per_byte": 7.0},
        {"step": 2, "loss": None, "bits_per_byte": None},
        {"step": 3, "loss": 4.0, "bits_per_byte": 6.0, "held_out_bits_per_byte": 6.5},
    ]
    plot_loss_curve(rows, {"gzip": 3.0}, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_gzip_needs_more_for_short_pieces() -> None:
    text = b"the same sentence again and again. " * 400
    assert gzip_bits_per_byte(text) < 0.2
    assert gzip_bits_per_byte(text, 35) > 4
