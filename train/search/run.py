"""Runs a whole search: from a trained model and a budget to the windows found, on disk."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import nha_jax
from train.config import DataConfig, EvaluationConfig
from train.data.batches import Sequences, evaluation_batches
from train.data.corpus import Corpus, load_corpus
from train.errors import ConfigError, require
from train.paths import user_path
from train.report.metrics import ProgressBar
from train.search.budgets import Budget, CacheBytes, FullLayers
from train.search.layerwise import LayerwiseLoss
from train.search.loss_log import LossLog
from train.search.result import EVENLY_SPACED, SearchResult
from train.search.strategies import SearchSpace, Trial, best, search
from train.storage.run_folder import RunFolder
from train.text.loading import load_model
from train.windows import Window, Windows, format_windows, read_windows

_TOKENS_PER_BATCH = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """The options of `nha search`, which its help describes; None stands for a default.

    Exactly one of `full_layers` and `cache_bytes` is given.
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
        ConfigError, ValueError: an option cannot be used, and nothing was written; or a loss is
            not finite.
        DataError: a file of the corpus or of the tokenizer is damaged.
    """
    model = load_model(options.run)
    output = _output(options)
    data, count = _data(options)
    space = _space(options, model.config, data.sequence_length)
    corpus = load_corpus(data)
    corpus.check_vocabulary(model.config.vocab_size)
    # A sequence longer than the text would be padding.
    length = min(data.sequence_length, max(map(len, corpus.held_out.sources)) - 1)
    sequences = Sequences(corpus.held_out, length)
    count = min(count, len(sequences))
    measured_on = _measured_on(model, corpus, data, count)
    print(f"base      {format_windows(space.base)}")
    print(f"budget    {space.budget.limit:g} {space.budget.unit}")
    print(f"held out  {count} sequences of {length} tokens of {data.corpus}\n", flush=True)
    batch_size = min(count, max(1, _TOKENS_PER_BATCH // length))
    batches = evaluation_batches(sequences, batch_size, count)
    evaluation = LayerwiseLoss(model, batches, sequences.bytes_per_target)
    with (
        LossLog(output.with_suffix(".jsonl"), measured_on) as log,
        ProgressBar(0, 0, "trial") as bar,
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
    print(f"\n{result}\n")
    try:
        result.write(output)
    except OSError as error:
        raise ConfigError(
            f"{output}: cannot write there: {error.strerror}; every loss is in "
            f"{output.with_suffix('.jsonl')}, and the same command goes on"
        ) from None
    print(f"In {output} (window_size), {output.with_suffix('.png')}")
    return 0


class RecordedLosses:
    """Gives the losses of proposals, measuring and recording those that are not on record."""

    def __init__(self, evaluation: LayerwiseLoss, log: LossLog, bar: ProgressBar):
        self._evaluation = evaluation
        self._log = log
        self._bar = bar

    def __call__(self, proposals: Sequence[Windows]) -> Mapping[Windows, float]:
        """Returns the bits per byte of these proposals, and of all others on record.

        Raises:
            ConfigError: a loss is not finite.
        """
        unknown = [x for x in dict.fromkeys(proposals) if x not in self._log.losses]
        self._bar.expect(len(unknown))
        losses = self._evaluation.bits_per_byte(unknown)
        for windows, loss in zip(unknown, losses, strict=True):
            self._log.write(windows, loss)
            lowest = min(self._log.losses.values())
            self._bar.advance(**{"bits/byte": f"{loss:.4f}", "lowest": f"{lowest:.4f}"})
        return self._log.losses


def _output(options: SearchOptions) -> Path:
    """Returns the path of the result; raises ConfigError if it cannot be written there."""
    if options.output is None:
        folder = RunFolder(options.run)
        return (folder.path if folder.config() else folder.path.parent) / "search.json"
    path = user_path(options.output, "--output")
    if path.suffix != ".json":
        raise ConfigError(f"--output = {options.output!r}: expected a name that ends in .json")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--output = {options.output!r}: there is no such folder")
    user_path(str(path.with_suffix(".jsonl")), "--output")  # the longest name beside it
    emptied = path.is_file() and not path.read_bytes().strip(b"\0")  # by a crash
    if path.exists() and not emptied:
        read_windows(str(path), "--output")  # nothing but a search's result is overwritten
    return path


def _data(options: SearchOptions) -> tuple[DataConfig, int]:
    """Returns which text to measure on, and how many sequences of it.

    What the options leave out is as the run has it.

    Raises:
        ConfigError, ValueError: something is missing, as the model is no run's, or out of range.
    """
    stored = RunFolder(options.run).config() or {}
    fields = dict(stored.get("data", {}))
    fields.pop("mixture_schedule", None)  # of training alone; evaluations keep the weights
    for name in ("corpus", "sequence_length"):
        given = getattr(options, name)
        if given is not None:
            fields[name] = given
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
    """Puts together the base, the candidates and the budget; raises ConfigError or ValueError."""
    base = _base(options, config)
    candidates = _as_tuple(read_windows(options.candidates, "--candidates"))
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
    """Returns the windows to start from, one for each layer."""
    if options.base is not None:
        window_size = read_windows(options.base, "--base")
        try:
            return dataclasses.replace(config, window_size=window_size).windows
        except ValueError as error:
            message = str(error).removeprefix("ModelConfig: ")
            raise ConfigError(f"--base = {options.base!r}: {message}") from None
    finite = [window for window in config.windows if window is not None]
    if not finite:
        raise ConfigError("--base: missing; all layers of the model have full attention")
    return tuple(min(finite) if window is None else window for window in config.windows)


def _as_tuple(windows: Window | Windows) -> Windows:
    return windows if isinstance(windows, tuple) else (windows,)


def _compare(
    space: SearchSpace, config: nha_jax.ModelConfig, losses: RecordedLosses
) -> dict[str, Trial]:
    """Measures what the result is compared with, by name."""
    proposals: dict[str, Windows | None] = {
        "base": space.base,
        EVENLY_SPACED: space.evenly_spaced(),
        "all layers full": (None,) * config.num_layers,
    }
    if config.windows not in proposals.values():
        proposals["the model's own"] = config.windows
    present = {name: windows for name, windows in proposals.items() if windows is not None}
    measured = losses(list(present.values()))
    return {
        name: Trial(0, windows, measured[windows], space.budget.cost(windows))
        for name, windows in present.items()
    }


def _measured_on(
    model: nha_jax.Model, corpus: Corpus, data: DataConfig, count: int
) -> dict[str, Any]:
    """Returns all that a loss depends on besides the windows, as JSON can hold it."""
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
    """Returns a hash of all parameters."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(nnx.to_pure_dict(nnx.state(model))):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]
