"""What a run's model is made of: trained parameters, frozen ones, and an adapter beside these."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import nha_jax
from nha_jax.adapters import add_adapter, is_factor, quantize_projections
from nha_jax.layers.projection import projections
from train.config import TrainConfig
from train.step.trainable import Trainable


class ModelParts:
    """The parameters of a run's model, and of the teacher that shares the frozen ones.

    Attributes:
        trainable: says which parameters are trained.
        quantizes: whether the frozen projections of the layers are of 8 bits.
    """

    def __init__(self, config: TrainConfig, ever_trained: Trainable | None = None):
        """Reads from the configuration of a run, or of a phase of it, what is trained.

        Args:
            config: the configuration.
            ever_trained: what some phase of the run trains, which is never held in another dtype,
                nor shared with a teacher; None: what this one trains.

        Raises:
            ConfigError: as `Trainable.of`.
        """
        self.trainable = Trainable.of(config)
        self._ever_trained = ever_trained or self.trainable
        self.quantizes = config.frozen_dtype == "int8"
        self._config = config
        frozen = "bfloat16" if self.quantizes else config.frozen_dtype
        self._frozen_dtype = jnp.dtype(frozen or config.model.param_dtype)

    def split(self, state: Any) -> tuple[nnx.State, nnx.State]:
        """Splits a model's state, or a tree like it, into what is trained and what is frozen."""
        trained, frozen = nnx.split_state(state, self.trainable, ...)
        return trained, frozen

    def base(self, rngs: nnx.Rngs | None = None) -> nha_jax.Model:
        """Draws the model without adapter or integers; frozen parameters have their dtype."""
        config = self._config
        model = nha_jax.Model(config.model, rngs=rngs or nnx.Rngs(config.seed))
        _, frozen = nnx.split_state(nnx.state(model), self._ever_trained, ...)
        nnx.update(model, jax.tree.map(lambda x: x.astype(self._frozen_dtype), frozen))
        return model

    def model(self, base: nnx.State | None = None) -> nha_jax.Model:
        """Makes the model that is trained.

        Args:
            base: the state of what `base` makes, with other parameters; None: they are drawn by
                the seed, as an adapter's are.
        """
        rngs = nnx.Rngs(self._config.seed)
        model = self.base(rngs)
        if base is not None:
            nnx.update(model, base)
        model = self._quantize(model)
        if self._config.adapter is not None:
            model = add_adapter(model, self._config.adapter, rngs=rngs)
        return model

    def teacher_graph(self, teacher: nha_jax.ModelConfig) -> nnx.GraphDef[nha_jax.Model]:
        """Describes a model without an adapter, whose frozen parameters are the run's."""

        def split() -> Any:
            return nnx.split(self._quantize(nha_jax.Model(teacher, rngs=nnx.Rngs(0))))

        graph, _ = jax.eval_shape(split)
        return graph

    def abstract_teacher(self, model: nnx.State) -> nnx.State:
        """Describes what the teacher has of its own, from the run's abstract model."""
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, self._frozen_dtype),
            self.of_teacher(model),
        )

    def of_teacher(self, state: nnx.State) -> nnx.State:
        """Picks what the teacher has of its own out of a model's state, or a tree like it."""
        own, _ = nnx.split_state(state, self._ever_trained, ...)
        return nnx.filter_state(own, nnx.Not(is_factor))

    def shared_with_teacher(self, frozen: nnx.State) -> nnx.State:
        """Picks what the teacher shares out of what is frozen."""
        return nnx.filter_state(frozen, nnx.Not(self._ever_trained))

    def _quantize(self, model: nha_jax.Model) -> nha_jax.Model:
        if not self.quantizes:
            return model
        frozen = {
            name
            for name in projections(model)
            if name.startswith("blocks.") and f"{name}.kernel" not in self._ever_trained.names
        }
        return quantize_projections(model, frozen)
