"""The compiled parts of training: initial state, one update, one evaluation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import nha_jax
from train.config import TrainConfig
from train.data import Batch
from train.mesh import batch_sharding, logical_axes, state_shardings, to_devices
from train.sections import OptimizerConfig


class TrainState(NamedTuple):
    """All arrays that an update changes.

    Attributes:
        model: nnx state of the model.
        optimizer: nnx state of the optimizer.
    """

    model: Any
    optimizer: Any


class LossSum(NamedTuple):
    """A cross-entropy before division, so that batches can be added up.

    Attributes:
        nats: float32 scalar, summed over the targets that count.
        targets: int32 scalar, how many those are.
    """

    nats: jax.Array
    targets: jax.Array


class Steps:
    """A model and its optimizer as functions over sharded state; compiled at the first call.

    The batch of every call is a `train.data.Batch`: of all its rows, those that are this process's
    (`train.mesh.rows_of_process`).
    """

    def __init__(self, config: TrainConfig, mesh: Mesh):
        """Traces shapes only; nothing is allocated or compiled."""
        self.learning_rate = learning_rate_schedule(config.optimizer, config.steps)
        self._config = config
        self._mesh = mesh
        # jax's, not nnx's, eval_shape: that one would look for the logical axes in the mesh.
        abstract = jax.eval_shape(lambda: tuple(nnx.split(node) for node in self._create()))
        (self._model_graph, model_state), (self._optimizer_graph, optimizer_state) = abstract
        self.abstract_state = TrainState(model_state, optimizer_state)
        self.shardings = TrainState(
            state_shardings(mesh, model_state), state_shardings(mesh, optimizer_state)
        )
        replicated = NamedSharding(mesh, PartitionSpec())
        self._update = jax.jit(
            self._update_function,
            donate_argnums=0,
            out_shardings=(self.shardings, replicated),
        )
        self._evaluate = jax.jit(self._evaluate_function, out_shardings=replicated)

    def initial_state(self) -> TrainState:
        """Parameters from the seed and an empty optimizer, created on their own devices."""

        def create() -> TrainState:
            model, optimizer = self._create()
            return TrainState(nnx.state(model), nnx.state(optimizer))

        return jax.jit(create, out_shardings=self.shardings)()

    def update(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        """One optimizer step; `state` is consumed.

        Returns:
            The new state, and float32 scalars: `loss` (nats a target), `gradient_norm` before
            clipping, and `skipped`: 1 if loss, gradient or new state were not finite, in which
            case the state returned is the old one.
        """
        return self._update(state, self.place(batch))

    def trace_update(self) -> jax.stages.Traced:
        """`update` of abstract arrays, to be compiled for devices that may not be there."""

        def place(tree: Any, sharding: NamedSharding) -> Any:
            return jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
            )

        is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
        state = jax.tree.map(place, self.abstract_state, self.shardings, is_leaf=is_variable)
        shape = self._config.batch_size, self._config.data.sequence_length
        integers, booleans = (jax.ShapeDtypeStruct(shape, x) for x in (jnp.int32, jnp.bool_))
        batch = dict.fromkeys(("tokens", "targets", "segment_ids"), integers)
        placed = place(batch | {"loss_mask": booleans}, batch_sharding(self._mesh))
        return self._update.trace(state, placed)

    def evaluate(self, model_state: Any, batch: Batch) -> LossSum:
        """The loss on a batch, with no update."""
        return self._evaluate(model_state, self.place(batch))

    def place(self, batch: Batch) -> dict[str, jax.Array]:
        """The batch on the devices, its rows and tokens divided over them."""
        return to_devices(self._mesh, batch, self._config.batch_size)

    def model(self, model_state: Any) -> nha_jax.Model:
        """The model with these parameters."""
        return nnx.merge(self._model_graph, model_state)

    def _create(self) -> tuple[nha_jax.Model, nnx.Optimizer]:
        model = nha_jax.Model(self._config.model, rngs=nnx.Rngs(self._config.seed))
        parameters = nnx.state(model, nnx.Param)
        transform = make_optimizer(self._config.optimizer, self.learning_rate, parameters)
        return model, nnx.Optimizer(model, transform, wrt=nnx.Param)

    def _update_function(
        self, state: TrainState, batch: dict[str, jax.Array]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        # nnx.merge takes over the state's variables, and the update writes into them.
        old_state = jax.tree.map(lambda leaf: leaf, state)
        model = nnx.merge(self._model_graph, state.model)
        optimizer = nnx.merge(self._optimizer_graph, state.optimizer)

        def mean_loss(model: nha_jax.Model) -> jax.Array:
            total = loss_sum(model, batch)
            return total.nats / jnp.maximum(total.targets, 1)

        loss, gradients = nnx.value_and_grad(mean_loss)(model)
        gradient_norm = optax.tree.norm(gradients)
        optimizer.update(model, gradients)
        new_state = TrainState(nnx.state(model), nnx.state(optimizer))
        finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm) & all_finite(new_state)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new_state, old_state)
        metrics = {
            "loss": loss,
            "gradient_norm": gradient_norm,
            "skipped": 1.0 - finite.astype(jnp.float32),
        }
        return kept, metrics

    def _evaluate_function(self, model_state: Any, batch: dict[str, jax.Array]) -> LossSum:
        return loss_sum(nnx.merge(self._model_graph, model_state), batch)


def loss_sum(model: Callable[..., jax.Array], batch: dict[str, jax.Array]) -> LossSum:
    """Cross-entropy in float32 over the targets that `loss_mask` admits.

    Args:
        model: (tokens, segment_ids=) -> logits [B, T, vocabulary].
        batch: see `train.data.Batch`.
    """
    logits = model(batch["tokens"], segment_ids=batch["segment_ids"]).astype(jnp.float32)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    mask = batch["loss_mask"]
    # where, not a product: a padding row may hold anything, and 0 * inf is not 0.
    return LossSum(jnp.where(mask, nats, 0.0).sum(), mask.sum(dtype=jnp.int32))


def all_finite(tree: Any) -> jax.Array:
    """Whether every floating-point entry is finite: a bool scalar."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0 to the peak, then the decay; step -> learning rate."""
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    decay_steps = max(steps - config.warmup_steps, 1)
    decays = {
        "cosine": optax.cosine_decay_schedule(peak, decay_steps, config.final_fraction),
        "linear": optax.linear_schedule(peak, final, decay_steps),
        "constant": optax.constant_schedule(peak),
    }
    # The first update is step 0: starting at 1/warmup rather than 0 makes it count.
    warmup_steps = max(config.warmup_steps, 1)
    warmup = optax.linear_schedule(peak / warmup_steps, peak, max(warmup_steps - 1, 1))
    return optax.join_schedules([warmup, decays[config.schedule]], [config.warmup_steps])


def make_optimizer(
    config: OptimizerConfig, learning_rate: optax.Schedule, parameters: Any
) -> optax.GradientTransformation:
    """AdamW behind clipping by the global norm.

    Args:
        config: its numbers.
        learning_rate: step -> learning rate.
        parameters: nnx state whose variables name their axes; which of them decay is decided
            here, as the optimizer itself sees bare arrays.
    """
    variables = jax.tree.leaves(parameters, is_leaf=lambda node: isinstance(node, nnx.Variable))
    decayed = [_is_matrix(variable) for variable in variables]
    adamw = optax.adamw(
        learning_rate,
        config.beta1,
        config.beta2,
        config.epsilon,
        weight_decay=config.weight_decay,
        mask=lambda tree: jax.tree.unflatten(jax.tree.structure(tree), decayed),
    )
    if config.clip_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def _is_matrix(variable: nnx.Variable) -> bool:
    """Whether one layer's parameter has two axes or more, the stack of layers not counted."""
    return variable.ndim - logical_axes(variable).count("layers") >= 2
