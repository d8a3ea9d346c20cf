"""Steps whose loss jumps out of those before them."""

import math
import statistics
from collections.abc import Iterable
from typing import NamedTuple

from train.config import SpikeConfig

_LEAST = 32  # losses, before which nothing stands out
_LEAST_RISE = 0.1  # of the median: what a loss that hardly varies may still do
_DEVIATION = 1.4826  # a normal distribution's standard deviation over its median deviation


class Spike(NamedTuple):
    """A loss that stood out.

    Attributes:
        step: the step that had it.
        loss: the loss.
        median: of the losses before it.
        deviations: by how many deviations it was above that.
    """

    step: int
    loss: float
    median: float
    deviations: float

    def __str__(self) -> str:
        return (
            f"step {self.step}: the loss {self.loss:.4g} is {self.deviations:.3g} deviations above "
            f"{self.median:.4g}, the median of the steps before it"
        )


class SpikeFinder:
    """Finds losses far above the median of the last steps.

    A loss is a spike if it is more than `spike.deviations` deviations above the median of the last
    `spike.window`, and by a tenth of that median at least. The deviation is the median distance
    from the median, times 1.4826, which a spike itself hardly moves. A spike does not count among
    the losses that later ones are compared with.

    Attributes:
        losses: those that the next is compared with, the oldest first.
    """

    def __init__(self, config: SpikeConfig, losses: Iterable[float] = ()):
        """Goes on from `losses`, those of a checkpoint."""
        self._config = config
        self.losses = [*losses]

    def look(self, step: int, loss: float) -> Spike | None:
        """Looks at the loss of the next step; a loss that is not finite is none of its business."""
        deviations = self._config.deviations
        if deviations is None or not math.isfinite(loss):
            return None
        if len(self.losses) >= _LEAST:
            median = statistics.median(self.losses)
            distance = statistics.median(abs(x - median) for x in self.losses)
            deviation = max(_DEVIATION * distance, 1e-12)
            above = (loss - median) / deviation
            if above > deviations and loss - median > _LEAST_RISE * abs(median):
                return Spike(step, loss, median, above)
        self.losses = [*self.losses, loss][-self._config.window :]
        return None
