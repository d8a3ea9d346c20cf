"""What a training run is made of: the whole of its YAML file, checked."""

from dataclasses import dataclass, field

from nha_jax import ModelConfig
from nha_jax.config import DType
from train.sections import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    SampleConfig,
    require,
    require_at_least,
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run.

    Attributes:
        run: folder of this run: checkpoints, metrics and the model; made if missing
        steps: optimizer updates in all; raising it continues a finished run (the
            learning rate then follows the longer schedule)
        batch_size: windows per step over all devices
        micro_batches: parts of the batch that go through the model in turn, their gradients added
            up: as many times less memory for activations, for the same update
        head_parts: parts of every sequence that go through the head and the loss in turn, the
            logits computed again for the gradient: as many times less memory for logits
        seed: of the initial parameters and of the order of the data
        initial_model: folder of the model to start from: one that `nha import` or `nha_jax.save`
            wrote, or a finished run; the keys of `model` are then changes to its configuration
        trainable: patterns of the names of the parameters to train, e.g. blocks.attention.*; the
            others stay as they are, and have no gradient and no optimizer state
        frozen_dtype: of the parameters that are not trained, while training; null for
            model.param_dtype. A model of dtype bfloat16 loses nothing by holding them so, but for
            the scales of norms and what chooses experts
        model: the network, see nha_jax.ModelConfig; `preset` names a published size
        data: see below
        optimizer: see below
        loss: see below
        evaluation: see below
        checkpoint: see below
        logging: see below
        mesh: see below
        sample: see below
        distributed: whether this is one of several processes, as `jax.distributed.initialize`
            finds them (a TPU pod or a Slurm job by themselves, others by JAX_COORDINATOR_ADDRESS,
            JAX_NUM_PROCESSES and JAX_PROCESS_ID); run, data and this file are then on shared disks
        compilation_cache: folder of compiled programs, for a fast start of later runs; null for
            none; the variable JAX_COMPILATION_CACHE_DIR goes first
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
    trainable: tuple[str, ...] = ("*",)
    frozen_dtype: DType | None = None
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
        require(bool(self.trainable), "trainable", list(self.trainable), "a pattern at least")
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
