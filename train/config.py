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
from train.stage_config import LossConfig, OptimizerConfig, StageConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text to learn and how it is cut.

    Attributes:
        corpus: a folder that `nha data prepare` wrote; a folder or glob of text files; `stdlib`,
            which is Python's own source; several prepared folders with their weights, e.g.
            {web: 0.8, code: 0.2}; or mqar, e.g. mqar:pairs=16, which is a task to draw
        mixture_schedule: other weights of the folders of corpus, by the number of steps after which
            training has them, e.g. {0: {web: 1}, 1000: {web: 0.5, code: 0.5}}; what is left out has
            none. Evaluations keep the weights of corpus
        sequence_length: tokens of a sequence, which is what the model sees at once
        held_out_fraction: share of the text files that are kept for evaluation and never trained
            on; of no effect on a prepared folder, whose documents were divided when it was made
        cache_gib: how much of prepared folders in object stores may stay on the disk, in GiB
    """

    corpus: str | dict[str, float]
    sequence_length: int
    held_out_fraction: float = 0.05
    mixture_schedule: dict[int, dict[str, float]] | None = None
    cache_gib: float = 16.0

    def __post_init__(self) -> None:
        require(0 < self.cache_gib < math.inf, "cache_gib", self.cache_gib, "a number above 0")
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
class EvaluationConfig:
    """Measuring the model on held-out text.

    Attributes:
        every: steps between evaluations
        sequences: how many held-out sequences each evaluation measures
        final_sequences: how many the evaluation after the last step measures
        tasks: questions that the model is asked as well, of data.sequence_length tokens, by the
            names and loads of `nha eval`, e.g. [needle, keys:8]; without a load, of a middle one
        task_examples: how many of each
    """

    every: int = 250
    sequences: int = 64
    final_sequences: int = 512
    tasks: tuple[str, ...] = ()
    task_examples: int = 64

    def __post_init__(self) -> None:
        require_at_least(self, 1, "every", "sequences", "final_sequences", "task_examples")


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
class WatchdogConfig:
    """When a run that does not move is ended, with exit code 75, so that it is started again.

    Attributes:
        factor: how many times the median of the last hundred steps one may take; null for no
            watchdog
        least_seconds: what a step may take in any case
        other_seconds: what all else may take: compiling, an evaluation, a save
    """

    factor: float | None = 50.0
    least_seconds: float = 300.0
    other_seconds: float = 3600.0

    def __post_init__(self) -> None:
        if self.factor is not None:
            require(1 < self.factor < math.inf, "factor", self.factor, "above 1, or null")
        for key in ("least_seconds", "other_seconds"):
            value = getattr(self, key)
            require(0 < value < math.inf, key, value, "a number of seconds above 0")


@dataclass(frozen=True, kw_only=True)
class SpikeConfig:
    """What is done about a loss that jumps.

    Attributes:
        deviations: by how many deviations a loss must be above the median of the steps before it
            to count as a spike, which is reported; null to look for none
        window: of how many steps the median and the deviation are
        undo: how many spikes of a run are undone: it goes back to the newest checkpoint before the
            spike, and leaves out the batches from there up to the spike
    """

    deviations: float | None = 10.0
    window: int = 128
    undo: int = 0

    def __post_init__(self) -> None:
        if self.deviations is not None:
            good = 0 < self.deviations < math.inf
            require(good, "deviations", self.deviations, "a number above 0, or null")
        require_at_least(self, 32, "window")
        require_at_least(self, 0, "undo")
        looks = self.deviations is not None or not self.undo
        require(looks, "undo", self.undo, "0, as deviations = null looks for no spike")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis of the mesh; -1, on one axis, means all that remain.

    Attributes:
        data: devices, or groups of them, that have a copy of the model each and divide the batch
        fsdp: devices that divide the parameters of one copy, and its part of the batch
        tensor: devices that divide the heads, the SwiGLU and the vocabulary
        context: devices that divide the tokens of every sequence, and the parameters
        slices: slices of TPUs, whose devices reach those of other slices over the data center's
            network only: data must be a multiple of them, and all other axes lie within one. Null
            for as many as the devices say; CPUs, which say nothing, are divided in order
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1
    slices: int | None = None

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        slices = sizes.pop("slices")
        require(slices is None or slices >= 1, "slices", slices, "at least 1, or null")
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
        loss: what is minimised
        stages: parts of the run that follow each other, a list of sections with a name, steps, and
            what differs in them of `optimizer`, `loss` and `trainable`; `steps` is then their sum,
            and may be left out
        window_schedule: the least window of the layers that have one, by the number of steps after
            which they have it, e.g. {0: null, 100: 64, 200: 16}, null being full attention; the
            last one must be no wider than any window of the model, whose own it then has
        evaluation: how often and on how much held-out text the model is measured
        checkpoint: when the whole state is saved, and what is kept
        logging: metrics and traces
        watchdog: when a run that does not move is ended
        spike: what is done about a loss that jumps
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
    stages: tuple[StageConfig, ...] = ()
    window_schedule: dict[int, int | None] | None = field(
        default=None, metadata={"key": "model.window_schedule"}
    )
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    spike: SpikeConfig = field(default_factory=SpikeConfig)
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
        for term in ("distillation", "attention_transfer"):
            weight, expected = getattr(self.loss, term), "0 without an initial_model to learn from"
            require(not weight or self.initial_model is not None, f"loss.{term}", weight, expected)
        narrow = any(window is not None for window in self.model.windows)
        weight, expected = self.loss.attention_transfer, "0, as all layers have full attention"
        require(not weight or narrow, "loss.attention_transfer", weight, expected)
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
        self._check_stages()
        self._check_window_schedule()

    def _check_stages(self) -> None:
        names = [stage.name for stage in self.stages]
        for name in names:
            require(names.count(name) == 1, "stages", names, "a name of its own for each")
        total = sum(stage.steps for stage in self.stages)
        expected = f"the sum of the stages' steps, which is {total}; or leave it out"
        require(not names or total == self.steps, "steps", self.steps, expected)

    def _check_window_schedule(self) -> None:
        if self.window_schedule is None:
            return
        key, schedule = "model.window_schedule", dict(sorted(self.window_schedule.items()))
        finite = [window for window in self.model.windows if window is not None]
        require(bool(finite), key, schedule, "null, as all layers have full attention")
        delay = self.model.slot_delay
        require(delay is None, key, schedule, f"null with model.slot_delay = {delay}")
        require(0 in schedule, key, schedule, "the window from step 0 on among them")
        for step, window in schedule.items():
            good = 0 <= step < self.steps
            expected = f"a number of steps below steps, which is {self.steps}, before it"
            require(good, f"{key}.{step}", window, expected)
            expected = "an integer of at least 0, or null for full attention"
            require(window is None or window >= 0, f"{key}.{step}", window, expected)
        widths = [math.inf if window is None else window for window in schedule.values()]
        shrinking = widths == sorted(widths, reverse=True)
        require(shrinking, key, schedule, "windows that get no wider from step to step")
        narrowest = min(finite)
        expected = f"{narrowest} or less at last, the narrowest window of model.window_size"
        require(widths[-1] <= narrowest, key, schedule, expected)
        self._check_transfer_has_windows(dict(sorted(self.window_schedule.items())))

    def _check_transfer_has_windows(self, schedule: dict[int, int | None]) -> None:
        """Refuses steps that learn attention alone while all of it is the original's."""
        windows_from = next(step for step, window in schedule.items() if window is not None)
        parts = [(stage.steps, stage.loss or self.loss) for stage in self.stages]
        after = 0
        for steps, loss in parts or [(self.steps, self.loss)]:
            require(
                loss.reads_outputs or after >= windows_from,
                "model.window_schedule",
                schedule,
                f"a window from step {after} on, as loss.attention_transfer has nothing to learn "
                "under full attention",
            )
            after += steps
