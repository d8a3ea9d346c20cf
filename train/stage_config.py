"""What a stage of a run may have of its own: its loss, its optimizer, what it trains."""

import math
from dataclasses import dataclass
from typing import Literal

from nha_jax.config import DType
from train.errors import require, require_at_least
from train.optimizers import find_optimizer


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
    """The weights of what is minimised, per target; a weight of 0 adds nothing.

    Attributes:
        cross_entropy: weight of the cross-entropy of the text
        z_loss: weight of the squared log of the softmax's denominator, which keeps logits small
        slot_loss: weight of the published auxiliary loss, the binary cross-entropy of each head's
            slot weight (the slots' share of its softmax) towards slot_target; its gradient reaches
            the slots' logits only
        slot_target: the slot weight to aim at, between 0 and 1
        distillation: weight of the KL divergence from the distribution of the teacher, which is
            initial_model as it was, under its own windows
        temperature: divides the logits of model and teacher in the divergence, which is then
            multiplied by its square
        attention_transfer: weight of what each layer's attention, at the hidden state that the
            teacher has before that layer, is off the teacher's there: the squared error relative
            to the square of the teacher's output, in each sequence, averaged over sequences and
            over the layers whose window is not the teacher's. No gradient flows between layers
    """

    cross_entropy: float = 1.0
    z_loss: float = 0.0
    slot_loss: float = 0.0
    slot_target: float = 0.5
    distillation: float = 0.0
    temperature: float = 1.0
    attention_transfer: float = 0.0

    def __post_init__(self) -> None:
        weights = ("z_loss", "slot_loss", "distillation", "attention_transfer", "cross_entropy")
        for key in weights:
            value = getattr(self, key)
            require(0 <= value < math.inf, key, value, "a finite number, 0 or more")
        weighted = any(getattr(self, key) for key in weights)
        require(weighted, "cross_entropy", 0, "more than 0, as no other term has a weight")
        warmth = self.temperature
        require(0 < warmth < math.inf, "temperature", warmth, "a finite number above 0")
        target = self.slot_target
        require(0 < target < 1, "slot_target", target, "a share between 0 and 1")

    @property
    def has_teacher(self) -> bool:
        """Whether a term compares the model with the one that it starts from."""
        return bool(self.distillation or self.attention_transfer)

    @property
    def reads_outputs(self) -> bool:
        """Whether a term is of what the whole model gives, rather than of its layers one by one."""
        return bool(self.cross_entropy or self.z_loss or self.slot_loss or self.distillation)


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of a run; a key that is left out is as in the run's own section.

    Attributes:
        name: what the metrics call it
        steps: its updates
        trainable: what it trains, as the run's key
        optimizer: what differs from the run's optimizer; its learning rate warms up and decays
            within the stage, and its moments begin anew
        loss: what differs from the run's loss
    """

    name: str
    steps: int
    trainable: tuple[str, ...] | None = None
    optimizer: OptimizerConfig | None = None
    loss: LossConfig | None = None

    def __post_init__(self) -> None:
        require(bool(self.name), "name", self.name, "at least one character")
        require_at_least(self, 1, "steps")
