"""The choice of the parameters that are trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Self

from nha_jax import ModelConfig
from nha_jax.sizes import abstract_parameters
from train.errors import ConfigError

_SHOWN = 6


@dataclass(frozen=True)
class Trainable:
    """A filter for flax.nnx that admits the parameters that are trained.

    Attributes:
        names: their dotted names, as `nha_jax.save` writes them.
    """

    names: frozenset[str]

    @classmethod
    def match(cls, patterns: Sequence[str], model: ModelConfig) -> Self:
        """Chooses the parameters of a model whose names match one of the patterns.

        Args:
            patterns: patterns as a shell matches file names, e.g. `blocks.attention.*`.
            model: the model's configuration.

        Raises:
            ConfigError: a pattern matches no parameter.
        """
        known = sorted(abstract_parameters(model))
        names: set[str] = set()
        for pattern in patterns:
            found = {name for name in known if fnmatchcase(name, pattern)}
            if not found:
                shown = ", ".join(known[:_SHOWN])
                raise ConfigError(
                    f"trainable: {pattern!r} matches no parameter; there are {shown}"
                    f"{' and others' if len(known) > _SHOWN else ''}"
                )
            names |= found
        return cls(frozenset(names))

    def __call__(self, path: tuple[Any, ...], value: Any) -> bool:
        """Whether the parameter at `path` is trained; flax.nnx calls this."""
        return ".".join(map(str, path)) in self.names
