"""The search for windows of the layers: its losses, its choices, what it compiles, and resuming."""

import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import nha_jax
from tests.support.train.tiny_run import Nha
from train.cli import main
from train.data.batches import Batch
from train.errors import ConfigError
from train.load_config import load_config
from train.search import run
from train.search.budgets import CacheBytes, FullLayers
from train.search.layerwise import LayerwiseLoss
from train.search.strategies import SearchSpace, best, search
from train.step.evaluation import bits_per_target
from train.step.losses import loss_sum
from train.windows import Windows, format_windows, read_windows

CONFIG = nha_jax.ModelConfig(
    vocab_size=257,
    num_layers=3,
    hidden_size=16,
    num_query_heads=2,
    num_slots=4,
    window_size=4,
    mlp_size=24,
    dtype="float32",
    initializer_range=0.3,
)


@pytest.fixture(scope="module")
def model() -> nha_jax.Model:
    return nha_jax.Model(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    """Two batches of two rows of packed documents; the last row ends in padding."""
    tokens = np.random.default_rng(0).integers(0, 256, (2, 2, 25), np.int32)
    segment_ids = np.ones((2, 2, 24), np.int32)
    segment_ids[0, 0, 7:], segment_ids[1, 0, 15:], segment_ids[1, 1, 20:] = 2, 2, 0
    return [
        {
            "tokens": rows[:, :-1],
            "targets": rows[:, 1:],
            "segment_ids": ids,
            "loss_mask": (ids == np.roll(ids, -1, axis=1)) & (ids > 0),
        }
        for rows, ids in zip(tokens, segment_ids, strict=True)
    ]


@pytest.fixture
def saved_model(model: nha_jax.Model, tmp_path: Path) -> Path:
    nha_jax.save(tmp_path / "model", model)
    return tmp_path / "model"


@pytest.fixture
def arguments(saved_model: Path, corpus: Path) -> list[str]:
    """`nha search` but for the budget."""
    data = [f"--corpus={corpus}", "--sequence-length=24", "--sequences=4"]
    return ["search", str(saved_model), *data]


@pytest.mark.parametrize(
    ("text", "windows"),
    [
        ("32", 32),
        ("None", None),
        ("null", None),
        ("32, 0,NONE", (32, 0, None)),
        ("[32, null]", (32, None)),
        ("[none]", (None,)),
    ],
)
def test_windows_as_text(text: str, windows: Any) -> None:
    assert read_windows(text) == windows
    if isinstance(windows, tuple) and len(windows) > 1:
        assert read_windows(format_windows(windows)) == windows


@pytest.mark.parametrize("text", ["", "wide", "-1", "32,", "[32", "1.5", "[]", "[[32]]"])
def test_what_is_no_window_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--base = '{re.escape(text)}': expected a window"):
        read_windows(text, "--base")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the file: No such file"),
        ("{", "not JSON"),
        ("{}", "expected a file that `nha search` wrote"),
        ('{"window_size": [32, -1]}', "expected a file that `nha search` wrote"),
        ('{"window_size": [true]}', "expected a file that `nha search` wrote"),
    ],
    ids=["missing", "syntax", "other", "negative", "bool"],
)
def test_a_windows_file_that_cannot_be_used(
    nha: Nha, tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "windows.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message) as raised:
        load_config(str(nha.config_file), [("model.window_size", str(path))])
    assert str(raised.value).startswith(f"model.window_size = '{path}'")


def test_layerwise_losses_are_the_models_own(model: nha_jax.Model, batches: list[Batch]) -> None:
    proposals: list[Windows] = [(None, 4, 0), (0, 4, None), (None, 4, 0)]

    def loss(windows: Windows) -> float:
        forward = jax.jit(model.with_windows(windows).__call__)
        return bits_per_target([loss_sum(forward, batch) for batch in batches])

    found = list(LayerwiseLoss(model, batches).bits_per_byte(proposals))
    wanted = {windows: loss(windows) for windows in set(proposals)}
    np.testing.assert_allclose(found, [wanted[windows] for windows in proposals], rtol=1e-6)
    assert len({round(loss, 5) for loss in found}) == 2


def test_a_layer_is_compiled_once_for_each_window(
    model: nha_jax.Model, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = []
    original = nha_jax.Model.apply_layer

    def apply_layer(self: nha_jax.Model, index: Any, hidden: Any, window_size: Any, **more: Any):
        traced.append(window_size)
        return original(self, index, hidden, window_size, **more)

    monkeypatch.setattr(nha_jax.Model, "apply_layer", apply_layer)
    evaluation = LayerwiseLoss(model, batches)
    proposals = list(itertools.product([0, 4, None], repeat=3))
    assert len(list(evaluation.bits_per_byte(proposals))) == 27
    assert sorted(traced, key=str) == [0, 4, None]


def test_shared_layers_are_not_run_again(model: nha_jax.Model, batches: list[Batch]) -> None:
    evaluation = LayerwiseLoss(model, batches[:1])
    runs = []
    compiled = evaluation._apply_layer
    evaluation._apply_layer = lambda *arguments, **windows: (  # type: ignore[assignment]
        runs.append(int(arguments[3])) or compiled(*arguments, **windows)
    )
    list(evaluation.bits_per_byte([(0, 4, 4), (4, 0, 4), (4, 4, 0), (4, 4, 7), (0, 4, 4)]))
    assert runs == [0, 1, 2, 0, 1, 2, 1, 2, 2, 0, 1, 2]


def additive(gains: Sequence[Mapping[int | None, float]]) -> Callable[[Windows], float]:
    return lambda windows: (
        5 - sum(gain.get(window, 0) for gain, window in zip(gains, windows, strict=True))
    )


def tabulated(loss: Callable[[Windows], float], tried: list[Windows] | None = None):
    """Losses as `search` wants them; notes in `tried` what it asked for."""

    def losses(proposals: Sequence[Windows]) -> dict[Windows, float]:
        if tried is not None:
            tried.extend(proposals)
        return {windows: loss(windows) for windows in proposals}

    return losses


def cheapest(space: SearchSpace, loss: Callable[[Windows], float]) -> Windows:
    """The best of all windows within the budget."""
    choices = [
        {window, *(x for x in space.candidates if x is None or (window is not None and x > window))}
        for window in space.base
    ]
    within = [x for x in itertools.product(*choices) if space.budget.cost(x) <= space.budget.limit]
    return min(within, key=loss)


@pytest.mark.parametrize("full_layers", [1, 2, 4])
def test_greedy_finds_the_best_where_gains_add_up(full_layers: int) -> None:
    base = (8,) * 4
    loss = additive([{None: 0.3}, {None: 0.7}, {None: 0.1}, {None: 0.5}])
    space = SearchSpace(base=base, candidates=(None,), budget=FullLayers(full_layers, base))
    tried: list[Windows] = []
    trials = search(space, tabulated(loss, tried))
    assert best(trials).windows == cheapest(space, loss)
    assert len(tried) == len(set(tried)) == len(trials)
    assert len(tried) == 1 + sum(range(5 - full_layers, 5))
    assert [trial.round for trial in trials] == sorted(trial.round for trial in trials)


def test_a_beam_finds_what_greedy_misses() -> None:
    base = (8,) * 4
    # Layer 1 alone is the best single one, but 2 and 3 together beat every pair with it.
    table = {(1,): 4.0, (2,): 4.5, (3,): 4.4, (0,): 4.9, (0, 1): 3.5, (2, 3): 3.0}

    def loss(windows: Windows) -> float:
        full = tuple(layer for layer, window in enumerate(windows) if window is None)
        return table.get(full, 5.0 - 0.6 * len(full))

    found = {}
    for beam in (1, 3):
        space = SearchSpace(base=base, candidates=(None,), budget=FullLayers(2, base), beam=beam)
        found[beam] = best(search(space, tabulated(loss))).windows
    assert found[1] == (None, None, 8, 8)
    assert found[3] == cheapest(space, loss) == (8, 8, None, None)


@pytest.mark.parametrize("seed", range(5))
def test_a_beam_of_everything_is_exhaustive(seed: int) -> None:
    losses = np.random.default_rng(seed).random(4**3)
    proposals = list(itertools.product([2, 4, 8, None], repeat=3))
    loss = dict(zip(proposals, losses.tolist(), strict=True)).__getitem__
    budget = CacheBytes(260.0, 64, CONFIG)
    space = SearchSpace(base=(2, 2, 2), candidates=(4, 8, None), budget=budget, beam=64)
    trials = search(space, tabulated(loss))
    assert best(trials).windows == cheapest(space, loss)
    within = [windows for windows in proposals if budget.cost(windows) <= budget.limit]
    assert {trial.windows for trial in trials} == set(within)
    assert 1 < len(within) < 64


def test_the_search_stops_where_nothing_lowers_the_loss() -> None:
    base = (8,) * 3
    loss = additive([{None: 0.2}, {None: -0.1}, {None: -0.3}])
    space = SearchSpace(base=base, candidates=(None,), budget=FullLayers(3, base))
    trials = search(space, tabulated(loss))
    assert best(trials).windows == (None, 8, 8)
    assert [trial.round for trial in trials] == [0, 1, 1, 1, 2, 2]


def test_cost_of_cached_bytes() -> None:
    config = nha_jax.ModelConfig(
        vocab_size=257, num_layers=3, hidden_size=16, num_query_heads=2, num_kv_heads=1,
        key_dim=6, value_dim=10, num_slots=3, dtype="bfloat16",
    )  # fmt: skip
    budget = CacheBytes(1e3, 100, config)
    full, windowed = (6 + 10) * 2, (6 + 6 + 10) * 2 + 3 * 4
    assert budget.cost((None, 0, 0)) == full
    assert budget.cost((0, 25, 0)) == windowed / 4
    assert budget.cost((None, 25, 400)) == full + windowed / 4 + windowed


@pytest.mark.parametrize(
    ("num_layers", "count", "full"),
    [(24, 6, {3, 7, 11, 15, 19, 23}), (3, 1, {2}), (5, 2, {1, 4}), (3, 3, {0, 1, 2})],
)
def test_evenly_spaced_layers(num_layers: int, count: int, full: set[int]) -> None:
    base = (8,) * num_layers
    space = SearchSpace(base=base, candidates=(None,), budget=FullLayers(count, base))
    windows = space.evenly_spaced()
    assert windows is not None
    assert {layer for layer, window in enumerate(windows) if window is None} == full


@pytest.mark.slow
def test_a_stopped_search_goes_on_and_ends_the_same(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Windows] = []
    original = LayerwiseLoss.bits_per_byte
    limit: int | None = None

    def bits_per_byte(self: LayerwiseLoss, proposals: Sequence[Windows]):
        for windows, loss in zip(proposals, original(self, proposals), strict=True):
            if limit is not None and len(measured) >= limit:
                raise KeyboardInterrupt
            measured.append(windows)
            yield loss

    monkeypatch.setattr(LayerwiseLoss, "bits_per_byte", bits_per_byte)
    command = [*arguments, "--cache-bytes=500", "--candidates=8,none", "--beam=2"]
    whole, stopped = tmp_path / "whole.json", tmp_path / "stopped.json"
    assert main([*command, f"--output={whole}"]) == 0
    in_all = len(measured)
    assert len(set(measured)) == in_all > 8

    measured.clear()
    limit = 5
    assert main([*command, f"--output={stopped}"]) == 130
    assert not stopped.exists()
    with stopped.with_suffix(".jsonl").open("a") as losses:
        losses.write('{"window_size": [4, 4')  # as a kill may leave it
    limit = None
    assert main([*command, f"--output={stopped}"]) == 0
    assert len(set(measured)) == len(measured) == in_all
    assert stopped.read_text() == whole.read_text()
    assert stopped.with_suffix(".png").stat().st_size > 1000

    assert main([*command, f"--output={stopped}"]) == 0
    assert len(measured) == in_all


def test_losses_of_something_else_are_refused(
    arguments: list[str], model: nha_jax.Model, saved_model: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main([*arguments, "--full-layers=1"]) == 0
    losses = saved_model.parent / "search.jsonl"
    before = losses.read_text()
    assert main([*arguments, "--full-layers=1", "--sequences=3"]) == 2
    assert "search.jsonl: its losses were measured with another sequences" in (
        capsys.readouterr().err
    )
    nha_jax.save(saved_model, nha_jax.Model(CONFIG, rngs=nnx.Rngs(1)), overwrite=True)
    assert main([*arguments, "--full-layers=1"]) == 2
    assert "another parameters; remove it" in capsys.readouterr().err
    assert losses.read_text() == before


def test_the_result_is_windows_to_train_with(
    arguments: list[str], saved_model: Path, nha: Nha, capsys: pytest.CaptureFixture
) -> None:
    assert main([*arguments, "--full-layers=2", "--base=4"]) == 0
    path = saved_model.parent / "search.json"
    result = json.loads(path.read_text())
    assert result["bits_per_byte"] == min(row["bits_per_byte"] for row in result["history"])
    assert result["history"][0]["window_size"] == [4, 4, 4]
    assert result["comparison"]["evenly spaced full layers"]["cost"] == 2
    output = capsys.readouterr().out
    assert f"{result['bits_per_byte']:.4f}" in output
    assert "venly spaced" in output.splitlines()[-3]
    overrides = [("model.num_layers", "3"), ("model.window_size", str(path))]
    config = load_config(str(nha.config_file), overrides)
    assert config.model.windows == tuple(result["window_size"]) == read_windows(str(path))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--full-layers=0"], "--full-layers = 0: expected 1 to 3"),
        (["--full-layers=4"], "--full-layers = 4: expected 1 to 3"),
        (["--full-layers=1", "--beam=0"], "--beam = 0: expected at least 1"),
        (["--full-layers=1", "--base=4,4"], "--base = '4,4': window_size=(4, 4) is a pattern of 2"),
        (["--full-layers=1", "--base=x"], "--base = 'x': expected a window"),
        (["--full-layers=1", "--base=none"], "--full-layers = 1: expected 1 to 0"),
        (["--full-layers=1", "--candidates=8"], "--candidates = '8': --full-layers counts"),
        (["--full-layers=1", "--context=64"], "--context = 64: only --cache-bytes"),
        (["--cache-bytes=500", "--candidates=24"], "--candidates = '24': a window of 24 sees"),
        (
            ["--cache-bytes=500", "--candidates=2,4"],
            "--candidates = '2,4': expected a window wider",
        ),
        (["--cache-bytes=9", "--context=48"], "--base = '4,4,4': expected windows within 9 bytes"),
        (["--cache-bytes=nan"], "--cache-bytes = nan: expected a number above 0"),
        (["--cache-bytes=500", "--context=0"], "--context = 0: expected at least 1"),
        (["--full-layers=1", "--sequences=0"], "--sequences = 0: expected at least 1"),
        (["--full-layers=1", "--sequence-length=1"], "--sequence-length = 1: expected at least 2"),
        (["--full-layers=1", "--corpus=/nowhere"], "'/nowhere': no such folder"),
        (["--full-layers=1", "--output=found.yaml"], "--output = 'found.yaml': expected a name"),
        (["--full-layers=1", "--output=/no/where.json"], "there is no such folder"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    arguments: list[str],
    saved_model: Path,
    options: list[str],
    line: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*arguments, *options]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("nha: ")
    assert output.err.count("\n") == 1
    assert line in output.err
    assert list(saved_model.parent.iterdir()) == [saved_model]


def test_a_mixture_is_measured_by_its_weights_whatever_its_schedule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {"a": 1.0, "b": 3.0}
    # As a run's record has it: JSON's keys are texts.
    data = {"corpus": weights, "sequence_length": 8, "mixture_schedule": {"100": {"a": 1.0}}}
    monkeypatch.setattr(run.RunFolder, "config", lambda folder: {"data": data})
    found, _ = run._data(run.SearchOptions(run=str(tmp_path)))
    assert found.corpus == weights
    assert found.mixture_schedule is None


def test_a_saved_model_alone_does_not_say_the_data(
    saved_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", str(saved_model), "--full-layers=1"]) == 2
    assert "--corpus: missing" in capsys.readouterr().err


def test_a_foreign_file_is_not_overwritten(
    arguments: list[str], saved_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved_model / "config.json"
    before = path.read_text()
    assert main([*arguments, "--full-layers=1", f"--output={path}"]) == 2
    assert "config.json" in capsys.readouterr().err
    assert path.read_text() == before


@pytest.mark.parametrize("budget", [[], ["--full-layers=1", "--cache-bytes=9"]])
def test_exactly_one_budget(arguments: list[str], budget: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, *budget])
    assert stopped.value.code == 2


def test_the_old_name_of_sequences_still_works_and_warns(
    arguments: list[str], saved_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    renamed = [x.replace("--sequences", "--windows-count") for x in arguments]
    assert renamed != arguments
    assert main([*renamed, "--full-layers=1"]) == 0
    output = capsys.readouterr()
    assert "nha: --windows-count is now called --sequences; the old name still works" in output.err
    assert "4 sequences of 24 tokens" in output.out
    with pytest.raises(SystemExit):
        main(["search", "--help"])
    assert "--windows-count" not in capsys.readouterr().out


def test_a_sequence_is_no_longer_than_the_text(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []

    def stop(model: nha_jax.Model, batches: Iterable[Batch], bytes_per_target: float) -> None:
        shapes.extend(batch["tokens"].shape for batch in batches)
        raise ValueError("enough seen")

    monkeypatch.setattr(run, "LayerwiseLoss", stop)
    longer = [x.replace("=24", "=1000000000").replace("=4", "=1000000000") for x in arguments]
    assert main([*longer, "--full-layers=1"]) == 2
    ((sequences, length),) = shapes
    assert sequences == 1
    assert 24 < length < 10_000  # of forty files of a few hundred bytes
