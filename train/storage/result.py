"""What a finished run reached."""

import dataclasses
import json
from pathlib import Path
from typing import Self

from train.storage.atomic import write_atomically
from train.storage.small_json import read_whole


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished run reached; `str` of it is what the user reads at the end.

    Attributes:
        step: updates done.
        held_out_bits_per_byte: bits per byte over evaluation.final_sequences sequences.
        held_out_perplexity: the perplexity of a token, over the same.
        references: bits per byte of other compressors, by name; empty if they were not measured.
        prompt: the text that the sample continues.
        sample: what the model wrote; None if it could not write.
        held_out_ema_bits_per_byte: likewise of the moving average of the model; None if there is
            none.
    """

    step: int
    held_out_bits_per_byte: float
    held_out_perplexity: float
    references: dict[str, float]
    prompt: str
    sample: str | None
    held_out_ema_bits_per_byte: float | None = None

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Reads the result written to `path`; None if there is none, or it is damaged."""
        return read_whole(path, cls)

    def write(self, path: Path) -> None:
        """Writes the result as JSON."""
        write_atomically(path, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    def __str__(self) -> str:
        compared = {"this model": self.held_out_bits_per_byte}
        if self.held_out_ema_bits_per_byte is not None:
            compared["its moving average"] = self.held_out_ema_bits_per_byte
        compared |= self.references
        width = max(map(len, compared))
        lines = [
            f"\nHeld-out bits per byte after {self.step} steps (lower is better)",
            *(f"  {name:<{width}}  {value:.3f}" for name, value in compared.items()),
            f"Perplexity of a token: {self.held_out_perplexity:.2f}",
        ]
        if self.sample is not None:
            lines += [f"\nThe model continues {self.prompt!r}:\n", self.prompt + self.sample]
        return "\n".join(lines)
