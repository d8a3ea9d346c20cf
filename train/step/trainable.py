"""The choice of the parameters that are trained."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Self

from nha_jax.adapters import factor_shapes, is_factor, targets_of
from nha_jax.sizes import abstract_parameters
from train.config import TrainConfig
from train.errors import ConfigError

_SHOWN = 6


@dataclass(frozen=True)
class Trainable:
    """A filter for flax.nnx that admits the parameters that are trained.

    Attributes:
        names: their dotted names, as `nha_jax.save` or `nha_jax.save_adapter` writes them.
    """

    names: frozenset[str]

    @classmethod
    def of(cls, config: TrainConfig) -> Self:
        """Chooses the parameters of a run's model that are trained.

        They are an adapter's factors, and what matches a pattern of `trainable` but the kernels
        that an adapter is beside.

        Raises:
            ConfigError: a pattern matches no parameter, or the adapter does not fit the model.
        """
        known = sorted(abstract_parameters(config.model))
        names: set[str] = set()
        for pattern in config.trainable or ():
            found = {name for name in known if fnmatchcase(name, pattern)}
            if not found:
                shown = ", ".join(known[:_SHOWN])
                raise ConfigError(
                    f"trainable: {pattern!r} matches no parameter; there are {shown}"
                    f"{' and others' if len(known) > _SHOWN else ''}"
                )
            names |= found
        if config.adapter is None:
            return cls(frozenset(names))
        try:
            beside = {f"{name}.kernel" for name in targets_of(config.model, config.adapter)}
        except ValueError as error:
            raise ConfigError(f"adapter.{error}") from None
        factors = factor_shapes(config.model, config.adapter)
        return cls(frozenset((names - beside) | set(factors)))

    @property
    def whole(self) -> frozenset[str]:
        """The names of the model's own parameters that are trained, without an adapter's."""
        return frozenset(name for name in self.names if not is_factor(name.split("."), None))

    def __call__(self, path: tuple[Any, ...], value: Any) -> bool:
        """Whether the parameter at `path` is trained; flax.nnx calls this."""
        return ".".join(map(str, path)) in self.names
