"""A whole search: from a trained run and a budget to a layout on disk."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import nha_jax
from train.config import DataConfig, EvaluationConfig, require
from train.data.batches import Sequences, evaluation_batches
from train.data.corpus import Corpus, load_corpus
from train.errors import ConfigError
from train.report.metrics import ProgressBar
from train.search.files import EVENLY_SPACED, LossLog, SearchResult
from train.search.layerwise import LayerwiseLoss
from train.search.strategies import Budget, CacheBytes, FullLayers, SearchSpace, Trial, best, search
from train.storage.run_folder import RunFolder
from train.text.loading import load_model
from train.windows import Window, Windows, format_windows, read_windows

_TOKENS_PER_BATCH = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """What `nha search` was asked for; None stands for a default, see its help.

    Exactly one of full_layers and cache_bytes is given.
    """

    run: str
    full_layers: int | None = None
    cache_bytes: float | None = None
    context: int | None = None
    base: str | None = None
    candidates: str = "none"
    beam: int = 1
    corpus: str | None = None
    sequence_length: int | None = None
    sequences: int | None = None
    output: str | None = None


def run_search(options: SearchOptions) -> int:
    """Searches, or goes on with a search that was stopped; prints and writes the result.

    Returns:
        The exit code, 0.

    Raises:
        ConfigError, ValueError: a value cannot be used; nothing was written.
    """
    model = load_model(options.run)
    output = _output(options)
    data, count = _data(options)
    space = _space(options, model.config, data.sequence_length)
    corpus = load_corpus(data)
    corpus.check_vocabulary(model.config.vocab_size)
    sequences = Sequences(corpus.held_out, data.sequence_length)
    count = min(count, len(sequences))
    measured_on = _measured_on(model, corpus, data, count)
    print(f"base      {format_windows(space.base)}")
    print(f"budget    {space.budget.limit:g} {space.budget.unit}")
    length = data.sequence_length
    print(f"held out  {count} sequences of {length} tokens of {data.corpus}\n", flush=True)
    batch_size = min(count, max(1, _TOKENS_PER_BATCH // length))
    batches = evaluation_batches(sequences, batch_size, count)
    evaluation = LayerwiseLoss(model, batches, sequences.bytes_per_target)
    with (
        LossLog(output.with_suffix(".jsonl"), measured_on) as log,
        ProgressBar(0, 0, "layout") as bar,
    ):
        losses = RecordedLosses(evaluation, log, bar)
        history = search(space, losses)
        comparison = _compare(space, model.config, losses)
    result = SearchResult(
        found=best(history),
        history=history,
        comparison=comparison,
        budget=space.budget,
        settings={"base": space.base, "candidates": space.candidates, "beam": space.beam},
        measured_on={"run": options.run, "data": data.corpus, **measured_on},
    )
    result.write(output)
    print(f"\n{result}\n\nIn {output} (window_size), {output.with_suffix('.png')}")
    return 0


class RecordedLosses:
    """The losses of layouts: those on record, and the others measured and recorded one by one."""

    def __init__(self, evaluation: LayerwiseLoss, log: LossLog, bar: ProgressBar):
        self._evaluation = evaluation
        self._log = log
        self._bar = bar

    def __call__(self, layouts: Sequence[Windows]) -> Mapping[Windows, float]:
        """Bits per byte by layout, of these layouts and any others.

        Raises:
            ConfigError: a loss is not finite.
        """
        unknown = [x for x in dict.fromkeys(layouts) if x not in self._log.losses]
        self._bar.expect(len(unknown))
        losses = self._evaluation.bits_per_byte(unknown)
        for layout, loss in zip(unknown, losses, strict=True):
            self._log.write(layout, loss)
            lowest = min(self._log.losses.values())
            self._bar.advance(**{"bits/byte": f"{loss:.4f}", "lowest": f"{lowest:.4f}"})
        return self._log.losses


def _output(options: SearchOptions) -> Path:
    if options.output is None:
        folder = RunFolder(options.run)
        return (folder.path if folder.config() else folder.path.parent) / "search.json"
    path = Path(options.output).expanduser()
    if path.suffix != ".json":
        raise ConfigError(f"--output = {options.output!r}: expected a name that ends in .json")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--output = {options.output!r}: there is no such folder")
    if path.exists():
        read_windows(str(path), "--output")  # nothing but a search's result is overwritten
    return path


def _data(options: SearchOptions) -> tuple[DataConfig, int]:
    """The held-out text, and how many sequences of it: as told, or else as the run has it."""
    stored = RunFolder(options.run).config() or {}
    fields = dict(stored.get("data", {}))
    for name in ("corpus", "sequence_length"):
        told = getattr(options, name)
        if told is not None:
            fields[name] = told
        if name not in fields:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option}: missing; {options.run} is no run that would say it")
    count = options.sequences
    if count is None:
        count = EvaluationConfig(**stored.get("evaluation", {})).final_sequences
    require(count >= 1, "sequences", count, "at least 1")
    return DataConfig(**fields), count


def _space(
    options: SearchOptions, config: nha_jax.ModelConfig, sequence_length: int
) -> SearchSpace:
    base = _base(options, config)
    candidates = _windows(read_windows(options.candidates, "--candidates"))
    finite = [window for window in candidates if window is not None]
    if finite and max(finite) >= sequence_length:
        raise ConfigError(
            f"--candidates = {options.candidates!r}: a window of {max(finite)} sees as much as "
            f"full attention of the {sequence_length} tokens that are measured; expected less, or "
            "a longer --sequence-length"
        )
    budget: Budget
    if options.full_layers is not None:
        if finite:
            raise ConfigError(
                f"--candidates = {options.candidates!r}: --full-layers counts full layers only; "
                "expected none, or --cache-bytes as the budget"
            )
        if options.context is not None:
            raise ConfigError(f"--context = {options.context}: only --cache-bytes depends on it")
        budget = FullLayers(options.full_layers, base)
    else:
        assert options.cache_bytes is not None
        context = sequence_length if options.context is None else options.context
        budget = CacheBytes(options.cache_bytes, context, config)
    return SearchSpace(base=base, candidates=candidates, budget=budget, beam=options.beam)


def _base(options: SearchOptions, config: nha_jax.ModelConfig) -> Windows:
    if options.base is not None:
        layout = read_windows(options.base, "--base")
        try:
            return dataclasses.replace(config, window_size=layout).windows
        except ValueError as error:
            message = str(error).removeprefix("ModelConfig: ")
            raise ConfigError(f"--base = {options.base!r}: {message}") from None
    finite = [window for window in config.windows if window is not None]
    if not finite:
        raise ConfigError("--base: missing; all layers of the model have full attention")
    return tuple(min(finite) if window is None else window for window in config.windows)


def _windows(layout: Window | Windows) -> Windows:
    return layout if isinstance(layout, tuple) else (layout,)


def _compare(
    space: SearchSpace, config: nha_jax.ModelConfig, losses: RecordedLosses
) -> dict[str, Trial]:
    layouts: dict[str, Windows | None] = {
        "base": space.base,
        EVENLY_SPACED: space.evenly_spaced(),
        "all layers full": (None,) * config.num_layers,
    }
    if config.windows not in layouts.values():
        layouts["the model's own"] = config.windows
    present = {name: layout for name, layout in layouts.items() if layout is not None}
    measured = losses(list(present.values()))
    return {
        name: Trial(0, layout, measured[layout], space.budget.cost(layout))
        for name, layout in present.items()
    }


def _measured_on(
    model: nha_jax.Model, corpus: Corpus, data: DataConfig, count: int
) -> dict[str, Any]:
    """All that a layout's loss depends on."""
    sizes = model.config.to_dict()
    del sizes["window_size"]
    return {
        "parameters": _fingerprint(model),
        "model": sizes,
        "corpus": corpus.fingerprint,
        "held_out_fraction": data.held_out_fraction,
        "sequence_length": data.sequence_length,
        "sequences": count,
        "platform": jax.default_backend(),
    }


def _fingerprint(model: nha_jax.Model) -> str:
    """A hash of every parameter."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(nnx.to_pure_dict(nnx.state(model))):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]
