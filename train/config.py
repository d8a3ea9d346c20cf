"""The configuration of a training run: its whole YAML file, a frozen dataclass for each section.

The `Attributes` part of each docstring is what `nha train --help` prints.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from nha_jax import ModelConfig
from nha_jax.config import DType
from nha_jax.config_parts import Adapter
from train.errors import require, require_at_least
from train.optimizers import find_optimizer


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text to learn and how it is cut.

    Attributes:
        corpus: a folder that `nha data prepare` wrote; a folder or glob of text files; `stdlib`,
            which is Python's own source; or several prepared folders with their weights, e.g.
            {web: 0.8, code: 0.2}
        mixture_schedule: other weights of the folders of corpus, by the number of steps after which
            training has them, e.g. {0: {web: 1}, 1000: {web: 0.5, code: 0.5}}; what is left out has
            none. Evaluations keep the weights of corpus
        sequence_length: tokens of a sequence, which is what the model sees at once
        held_out_fraction: share of the text files that are kept for evaluation and never trained
            on; of no effect on a prepared folder, whose documents were divided when it was made
    """

    corpus: str | dict[str, float]
    sequence_length: int
    held_out_fraction: float = 0.05
    mixture_schedule: dict[int, dict[str, float]] | None = None

    def __post_init__(self) -> None:
        require(bool(self.corpus), "corpus", self.corpus, "a folder, a glob or stdlib")
        if isinstance(self.corpus, dict):
            good = all(weight > 0 for weight in self.corpus.values())
            good = good and sum(self.corpus.values()) < math.inf
            require(good, "corpus", self.corpus, "a finite weight above 0 for each folder")
        for step, weights in (self.mixture_schedule or {}).items():
            folders = self.corpus if isinstance(self.corpus, dict) else {}
            key = f"mixture_schedule.{step}"
            require(0 <= step < 2**31, key, weights, "a number of steps, 0 or more, before it")
            named = weights.keys() <= set(folders)
            require(named, key, weights, "weights of folders that corpus has weights of")
            good = all(weight >= 0 for weight in weights.values())
            good = good and 0 < sum(weights.values()) < math.inf
            require(good, key, weights, "finite weights of 0 or more, not all of them 0")
        require_at_least(self, 2, "sequence_length")
        fraction = self.held_out_fraction
        require(0 < fraction < 1, "held_out_fraction", fraction, "a share between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """An optimizer with clipping, a linear warm-up and a decay.

    A key that is null by default has a default for each optimizer that takes it; one that does not
    take it refuses it.

    Attributes:
        name: adamw, muon, adafactor, lion, schedule_free_adamw, or one that an installed package
            adds
        learning_rate: peak learning rate
        warmup_steps: steps of linear warm-up from 0
        schedule: shape of the decay from the peak to the last step, cosine by default;
            warmup_stable_decay stays at the peak and decays linearly at the end, so a run that has
            not begun to decay can be given more steps, and goes on as if it had had them from the
            start; schedule_free_adamw takes none, and stays at the peak
        decay_fraction: share of all steps that the decay of warmup_stable_decay takes
        final_fraction: learning rate at the last step as a share of the peak
        beta1: decay of the gradient's running mean, 0.9 by default; of schedule_free_adamw, the
            share of the averaged parameters in those whose gradient is taken; of lion, the share of
            the running mean in the step
        beta2: decay of the squared gradient's running mean, 0.95 by default; of lion, decay of the
            gradient's running mean, 0.99
        epsilon: added to the root of the squared gradient's mean, 1e-8 by default
        momentum: of muon, decay of the running mean of the matrices' gradients, 0.95 by default
        moment_dtype: dtype of the gradient's running mean; null for that of the parameters
        weight_decay: decoupled weight decay, of matrices only (not of biases and norms)
        clip_norm: largest global norm of the gradient; null for no clipping
        ema_decay: decay of a moving average of the parameters, e.g. 0.999, which is measured
            beside them, and saved as `model_ema` in the run's folder; null for none
        max_skipped_updates: stop after this many non-finite updates in a row
    """

    name: str = "adamw"
    learning_rate: float = 3e-4
    warmup_steps: int = 0
    schedule: Literal["cosine", "linear", "constant", "warmup_stable_decay"] | None = None
    decay_fraction: float = 0.1
    final_fraction: float = 0.1
    beta1: float | None = None
    beta2: float | None = None
    epsilon: float | None = None
    momentum: float | None = None
    moment_dtype: DType | None = None
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    ema_decay: float | None = None
    max_skipped_updates: int = 10

    def __post_init__(self) -> None:
        self._fill_in_defaults()
        rate, clip = self.learning_rate, self.clip_norm
        require(0 < rate < math.inf, "learning_rate", rate, "a finite number above 0")
        require_at_least(self, 0, "warmup_steps")
        require_at_least(self, 1, "max_skipped_updates")
        for key in ("beta1", "beta2", "momentum", "ema_decay"):
            decay = getattr(self, key)
            require(decay is None or 0 <= decay < 1, key, decay, "0 or more, below 1")
        for key in ("weight_decay", "epsilon"):
            value = getattr(self, key)
            require(
                value is None or 0 <= value < math.inf, key, value, "a finite number, 0 or more"
            )
        for key in ("final_fraction", "decay_fraction"):
            fraction = getattr(self, key)
            require(0 <= fraction <= 1, key, fraction, "a share from 0 to 1")
        require(clip is None or 0 < clip < math.inf, "clip_norm", clip, "a number above 0 or null")

    def _fill_in_defaults(self) -> None:
        """Gives keys that are null the optimizer's defaults, and refuses those it does not take."""
        optimizer = find_optimizer(self.name)
        defaults = optimizer.defaults
        require(
            self.ema_decay is None or optimizer.evaluated is None,
            "ema_decay",
            self.ema_decay,
            f"null, as the optimizer {self.name} averages the parameters itself",
        )
        for key in ("schedule", "beta1", "beta2", "epsilon", "momentum", "moment_dtype"):
            value = getattr(self, key)
            if key not in defaults:
                expected = f"null, as the optimizer {self.name} takes no such key"
                require(value is None, key, value, expected)
            elif value is None:
                object.__setattr__(self, key, defaults[key])
            elif key in optimizer.positive:
                require(value > 0, key, value, f"above 0 for the optimizer {self.name}")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What is added to the cross-entropy, per target; a weight of 0 adds nothing.

    Attributes:
        z_loss: weight of the squared log of the softmax's denominator, which keeps logits small
        slot_loss: weight of the published auxiliary loss, the binary cross-entropy of each head's
            slot weight (the slots' share of its softmax) towards slot_target; its gradient reaches
            the slots' logits only
        slot_target: the slot weight to aim at, between 0 and 1
        distillation: weight of the KL divergence from the distribution of the teacher, which is
            initial_model as it was, under its own windows
        temperature: divides the logits of model and teacher in the divergence, which is then
            multiplied by its square
    """

    z_loss: float = 0.0
    slot_loss: float = 0.0
    slot_target: float = 0.5
    distillation: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for key in ("z_loss", "slot_loss", "distillation"):
            value = getattr(self, key)
            require(0 <= value < math.inf, key, value, "a finite number, 0 or more")
        warmth = self.temperature
        require(0 < warmth < math.inf, "temperature", warmth, "a finite number above 0")
        target = self.slot_target
        require(0 < target < 1, "slot_target", target, "a share between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Measuring the model on held-out text.

    Attributes:
        every: steps between evaluations
        sequences: how many held-out sequences each evaluation measures
        final_sequences: how many the evaluation after the last step measures
    """

    every: int = 250
    sequences: int = 64
    final_sequences: int = 512

    def __post_init__(self) -> None:
        require_at_least(self, 1, "every", "sequences", "final_sequences")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the whole state is saved, and which checkpoints are kept.

    Attributes:
        every: steps between checkpoints; the last step is always saved
        keep: how many of the newest checkpoints are kept
        keep_every: steps between checkpoints that are kept for good; null for none
        keep_best: how many checkpoints with the lowest held-out loss are kept as well; only
            those at a multiple of evaluation.every have such a loss
    """

    every: int = 250
    keep: int = 2
    keep_every: int | None = None
    keep_best: int = 0

    def __post_init__(self) -> None:
        require_at_least(self, 1, "every", "keep")
        require_at_least(self, 0, "keep_best")
        steps = self.keep_every
        fits = steps is None or (steps >= 1 and steps % self.every == 0)
        require(fits, "keep_every", steps, f"a multiple of every, which is {self.every}, or null")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Metrics and traces.

    Attributes:
        every: steps between rows of metrics.jsonl, which are also points in TensorBoard
        profile: first and last step of a profiler trace, for TensorBoard or Perfetto; null for none
        wandb: name of a Weights & Biases project to report to as well; needs the package wandb
    """

    every: int = 10
    profile: tuple[int, int] | None = None
    wandb: str | None = None

    def __post_init__(self) -> None:
        require_at_least(self, 1, "every")
        steps = self.profile
        fits = steps is None or 1 <= steps[0] <= steps[1]
        require(fits, "profile", steps, "a first step of at least 1 and a last one, or null")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis of the mesh; -1, on one axis, means all that remain.

    Attributes:
        data: devices, or groups of them, that have a copy of the model each and divide the batch
        fsdp: devices that divide the parameters of one copy, and its part of the batch
        tensor: devices that divide the heads, the SwiGLU and the vocabulary
        context: devices that divide the tokens of every sequence, and the parameters
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        for key, value in sizes.items():
            require(value == -1 or value >= 1, key, value, "at least 1, or -1 for the rest")
        rest = [key for key, value in sizes.items() if value == -1]
        require(len(rest) <= 1, rest[-1] if rest else "data", -1, "-1 on one axis only")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """The text that the finished model writes.

    Attributes:
        prompt: text to continue
        max_new_tokens: how many tokens to add at most
        temperature: 0 takes the likeliest token; 1 samples the model's own distribution
    """

    prompt: str = "def "
    max_new_tokens: int = 256
    temperature: float = 0.8

    def __post_init__(self) -> None:
        require(bool(self.prompt), "prompt", self.prompt, "at least one character")
        require_at_least(self, 1, "max_new_tokens")
        warmth = self.temperature
        require(0 <= warmth < math.inf, "temperature", warmth, "a finite number, 0 or more")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run.

    Attributes:
        run: folder of this run: checkpoints, metrics and the model; made if missing
        steps: optimizer updates in all; raising it continues a finished run (the learning rate
            then follows the longer schedule)
        batch_size: sequences per step, over all devices
        micro_batches: into how many parts a batch is divided that go through the model in turn,
            their gradients added up; the update is the same, and activations take that many times
            less memory
        head_parts: into how many parts every sequence is divided that go through the head and the
            loss in turn, the logits computed again for the gradient; logits take that many times
            less memory
        seed: seed of the initial parameters and of the order of the data
        initial_model: folder of the model to start from, which `nha import` or `nha_jax.save`
            wrote, or of a finished run; the keys of `model` are then changes to its configuration.
            Its parameters are trained, and saved at the end, in float32 whatever the file holds,
            unless model.param_dtype is given
        trainable: patterns of names of the parameters to train, e.g. blocks.attention.*; the
            others stay as they are, and have no gradient and no optimizer state; null for all or,
            with an adapter, for none but its factors. Kernels that the adapter is beside stay
            frozen whatever is given here
        frozen_dtype: dtype of the parameters that are not trained, while training; null for
            model.param_dtype or, if that is not given, for the dtype that initial_model has. If
            model.dtype is bfloat16, then bfloat16 here changes nothing but the scales of norms and
            the choice of experts, which are computed in float32. With int8 the frozen projections
            of the layers are integers of 8 bits with a scale for each output, and what else is
            frozen is bfloat16
        model: the network, see nha_jax.ModelConfig; `preset` names a published size
        adapter: low-rank updates beside frozen projections, which are trained in their place; null
            for none
        data: the text to learn, and how it is cut
        optimizer: an optimizer with clipping, a warm-up and a decay
        loss: what is added to the cross-entropy
        evaluation: how often and on how much held-out text the model is measured
        checkpoint: when the whole state is saved, and what is kept
        logging: metrics and traces
        mesh: how the devices divide the work
        sample: the text that the finished model writes
        distributed: whether this is one of several processes, as `jax.distributed.initialize`
            finds them: in a TPU pod or a Slurm job by itself, elsewhere by the variables
            JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; the run's folder, the
            data and this file must then lie on shared disks
        compilation_cache: folder of compiled programs, which lets later runs start sooner; null
            for none; the variable JAX_COMPILATION_CACHE_DIR goes first
    """

    run: str
    steps: int
    batch_size: int
    model: ModelConfig
    data: DataConfig
    micro_batches: int = 1
    head_parts: int = 1
    seed: int = 0
    initial_model: str | None = None
    trainable: tuple[str, ...] | None = None
    frozen_dtype: DType | Literal["int8"] | None = None
    adapter: Adapter | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    distributed: bool = False
    compilation_cache: str | None = "~/.cache/nha_jax"

    def __post_init__(self) -> None:
        require(bool(self.run), "run", self.run, "a folder")
        require_at_least(self, 1, "steps", "batch_size", "micro_batches", "head_parts")
        parts, expected = self.micro_batches, f"a divisor of batch_size, which is {self.batch_size}"
        require(self.batch_size % parts == 0, "micro_batches", parts, expected)
        require(0 <= self.seed < 2**32, "seed", self.seed, "0 or more, below 2**32")
        warmup = self.optimizer.warmup_steps
        require(
            warmup <= self.steps,
            "optimizer.warmup_steps",
            warmup,
            f"at most steps, which is {self.steps}",
        )
        if self.trainable is None:
            object.__setattr__(self, "trainable", ("*",) if self.adapter is None else ())
        elif self.adapter is None:
            require(bool(self.trainable), "trainable", [], "a pattern at least without an adapter")
        require(
            not self.loss.distillation or self.initial_model is not None,
            "loss.distillation",
            self.loss.distillation,
            "0 without an initial_model, which is the one to learn from",
        )
        parts, length = self.head_parts, self.data.sequence_length
        expected = f"a divisor of data.sequence_length, which is {length}"
        require(length % parts == 0, "head_parts", parts, expected)
        mixed = self.model.num_slots > 0 and any(self.model.windows)
        require(
            not self.loss.slot_loss or mixed,
            "loss.slot_loss",
            self.loss.slot_loss,
            "0, as no layer of the model has both slots and a window",
        )
