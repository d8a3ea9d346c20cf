"""What a training run is made of: one frozen dataclass per section of the YAML file.

The `Attributes` part of each docstring is what `nha train --help` prints.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from nha_jax import ModelConfig

BYTE_VOCABULARY = 257
"""256 byte values and the end-of-document token."""


def require(condition: bool, key: str, value: Any, expected: str) -> None:
    """Raises ValueError `key = value: expected ...` unless `condition` holds."""
    if not condition:
        raise ValueError(f"{key} = {value!r}: expected {expected}")


def _require_at_least(section: Any, minimum: int, *keys: str) -> None:
    for key in keys:
        value = getattr(section, key)
        require(value >= minimum, key, value, f"at least {minimum}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text to learn and how it is cut.

    Attributes:
        corpus: a folder or glob of text files, or `stdlib`: Python's own source
        sequence_length: tokens (bytes) the model sees at once
        held_out_fraction: share of the files kept for evaluation, never trained on
    """

    corpus: str
    sequence_length: int
    held_out_fraction: float = 0.05

    def __post_init__(self) -> None:
        require(bool(self.corpus), "corpus", self.corpus, "a folder, a glob or stdlib")
        _require_at_least(self, 2, "sequence_length")
        fraction = self.held_out_fraction
        require(0 < fraction < 1, "held_out_fraction", fraction, "a share between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with clipping, a linear warm-up and a decay.

    Attributes:
        learning_rate: peak learning rate
        warmup_steps: steps of linear warm-up from 0
        schedule: shape of the decay from the peak to the last step
        final_fraction: learning rate at the last step as a share of the peak
        beta1: decay of the gradient's running mean
        beta2: decay of the squared gradient's running mean
        epsilon: added to the root of the squared gradient's mean
        weight_decay: decoupled decay, of matrices only (not of biases and norms)
        clip_norm: largest global norm of the gradient; null for no clipping
        max_skipped_updates: stop after this many non-finite updates in a row
    """

    learning_rate: float = 3e-4
    warmup_steps: int = 0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    max_skipped_updates: int = 10

    def __post_init__(self) -> None:
        rate, clip = self.learning_rate, self.clip_norm
        require(0 < rate < math.inf, "learning_rate", rate, "a finite number above 0")
        _require_at_least(self, 0, "warmup_steps")
        _require_at_least(self, 1, "max_skipped_updates")
        for key in ("beta1", "beta2"):
            require(0 <= getattr(self, key) < 1, key, getattr(self, key), "0 or more, below 1")
        for key in ("weight_decay", "epsilon"):
            value = getattr(self, key)
            require(0 <= value < math.inf, key, value, "a finite number, 0 or more")
        fraction = self.final_fraction
        require(0 <= fraction <= 1, "final_fraction", fraction, "a share from 0 to 1")
        require(clip is None or 0 < clip < math.inf, "clip_norm", clip, "a number above 0 or null")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out bits per byte.

    Attributes:
        every: steps between evaluations
        windows: held-out windows in each of them
        final_windows: held-out windows in the one after the last step
    """

    every: int = 250
    windows: int = 64
    final_windows: int = 512

    def __post_init__(self) -> None:
        _require_at_least(self, 1, "every", "windows", "final_windows")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the whole state is saved, and how much of it is kept.

    Attributes:
        every: steps between checkpoints; the last step is always saved
        keep: how many of the newest checkpoints are kept
    """

    every: int = 250
    keep: int = 2

    def __post_init__(self) -> None:
        _require_at_least(self, 1, "every", "keep")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Metrics rows.

    Attributes:
        every: steps between rows of metrics.jsonl and points in TensorBoard
    """

    every: int = 10

    def __post_init__(self) -> None:
        _require_at_least(self, 1, "every")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis; -1 means all that remain.

    Attributes:
        data: copies of the model, each on its own part of the batch
        fsdp: devices that one copy's parameters are divided over
    """

    data: int = -1
    fsdp: int = 1

    def __post_init__(self) -> None:
        for key in ("data", "fsdp"):
            value = getattr(self, key)
            require(value == -1 or value >= 1, key, value, "at least 1, or -1 for the rest")
        require(self.data != -1 or self.fsdp != -1, "fsdp", self.fsdp, "-1 on one axis only")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """The text that the finished model writes.

    Attributes:
        prompt: text to continue
        max_new_tokens: tokens (bytes) to add
        temperature: 0 takes the likeliest byte; 1 samples the model's own distribution
    """

    prompt: str = "def "
    max_new_tokens: int = 256
    temperature: float = 0.8

    def __post_init__(self) -> None:
        require(bool(self.prompt), "prompt", self.prompt, "at least one character")
        _require_at_least(self, 1, "max_new_tokens")
        warmth = self.temperature
        require(0 <= warmth < math.inf, "temperature", warmth, "a finite number, 0 or more")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run.

    Attributes:
        run: folder of this run: checkpoints, metrics and the model; made if missing
        steps: optimizer updates in all; raising it continues a finished run (the
            learning rate then follows the longer schedule)
        batch_size: windows per step over all devices
        seed: of the initial parameters and of the order of the data
        model: the network, see nha_jax.ModelConfig; `preset` names a published size
        data: see below
        optimizer: see below
        evaluation: see below
        checkpoint: see below
        logging: see below
        mesh: see below
        sample: see below
    """

    run: str
    steps: int
    batch_size: int
    model: ModelConfig
    data: DataConfig
    seed: int = 0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        require(bool(self.run), "run", self.run, "a folder")
        _require_at_least(self, 1, "steps", "batch_size")
        require(0 <= self.seed < 2**32, "seed", self.seed, "0 or more, below 2**32")
        warmup = self.optimizer.warmup_steps
        require(
            warmup <= self.steps,
            "optimizer.warmup_steps",
            warmup,
            f"at most steps, which is {self.steps}",
        )
        vocabulary = self.model.vocab_size
        require(
            vocabulary >= BYTE_VOCABULARY,
            "model.vocab_size",
            vocabulary,
            f"at least {BYTE_VOCABULARY}: 256 bytes and the end of a document",
        )
