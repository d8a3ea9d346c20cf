"""The compiled parts of training: initial state, one update, one evaluation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import nha_jax
from nha_jax.model import abstract_model
from nha_jax.storage.weights import WeightSource, read_state
from train.config import TrainConfig
from train.data.batches import Batch
from train.devices.mesh import batch_sharding, cut_rows, state_shardings, to_devices
from train.step.losses import LossSum, Original, counts, cross_entropy_of_hidden, losses
from train.step.optimizer import learning_rate_schedule, make_optimizer
from train.step.trainable import Trainable

DeviceBatch = dict[str, jax.Array]
"""A batch, [B, T] each, divided over the mesh."""


class TrainState(NamedTuple):
    """All arrays that an update changes.

    Attributes:
        model: nnx state of the model, of which some parameters may not be trained.
        optimizer: nnx state of the optimizer, of those that are.
    """

    model: Any
    optimizer: Any


class Evaluation(NamedTuple):
    """Of one batch, before division, so that batches can be added up.

    Attributes:
        loss: the cross-entropy.
        slot_share: [layers] float32, the slots' share of the softmax, summed over real tokens and
            query heads.
        shares: int32 scalar, how many those are of a layer.
    """

    loss: LossSum
    slot_share: jax.Array
    shares: jax.Array


class Steps:
    """A model and its optimizer as functions over sharded state; compiled at the first call.

    `read_original` gives a tree like `abstract_original`, which is None if there is no model to
    learn from, on the devices that `original_shardings` says.

    The batch of every call is a `train.data.batches.Batch` of those of its rows that are this
    process's (`train.devices.mesh.rows_of_process`).
    """

    def __init__(
        self, config: TrainConfig, mesh: Mesh, original: nha_jax.ModelConfig | None = None
    ):
        """Traces shapes only; nothing is allocated or compiled.

        Args:
            config: of the run.
            mesh: its devices.
            original: of the model to learn from, which the distillation needs.

        Raises:
            ConfigError: a pattern of `trainable` matches no parameter.
        """
        self.learning_rate = learning_rate_schedule(config.optimizer, config.steps)
        self._config = config
        self._mesh = mesh
        self._trainable = Trainable.match(config.trainable, config.model)
        self._frozen_dtype = jnp.dtype(config.frozen_dtype or config.model.param_dtype)
        # jax's, not nnx's, eval_shape: that one would look for the logical axes in the mesh.
        abstract = jax.eval_shape(lambda: tuple(nnx.split(node) for node in self._create()))
        (self._model_graph, model_state), (self._optimizer_graph, optimizer_state) = abstract
        self.abstract_state = TrainState(model_state, optimizer_state)
        self.shardings = TrainState(
            state_shardings(mesh, model_state), state_shardings(mesh, optimizer_state)
        )
        self.original_shardings, _ = self._split(self.shardings.model)  # and of gradients
        self.abstract_original = None
        if original is not None:
            self._original_graph, _ = abstract_model(original)
            self.abstract_original = self._abstract_original()
        replicated = NamedSharding(mesh, PartitionSpec())
        self._update = jax.jit(
            self._update_function,
            donate_argnums=0,
            out_shardings=(self.shardings, replicated),
            keep_unused=True,  # an original's gates are not read, but held: a plan counts them
        )
        self._evaluate = jax.jit(self._evaluate_function, out_shardings=replicated)

    @property
    def num_trained(self) -> int:
        """How many numbers are trained."""
        return sum(leaf.size for leaf in jax.tree.leaves(self._split(self.abstract_state.model)[0]))

    def initial_state(self, source: WeightSource | None = None) -> TrainState:
        """Parameters and an empty optimizer, created on their own devices.

        Args:
            source: of the parameters; None: they come from the seed.
        """

        def create() -> TrainState:
            model, optimizer = self._create()
            return TrainState(nnx.state(model), nnx.state(optimizer))

        if source is None:
            return jax.jit(create, out_shardings=self.shardings)()
        parameters = read_state(source, self.abstract_state.model, self.shardings.model)
        optimizer = jax.jit(lambda: create().optimizer, out_shardings=self.shardings.optimizer)()
        return TrainState(parameters, optimizer)

    def read_original(self, source: WeightSource) -> nnx.State:
        """Those parameters of the model to learn from that are trained: the rest are the state's.

        They are kept in frozen_dtype.
        """
        if self.abstract_original is None:
            raise ValueError("original was not given: there is no model to learn from")
        return read_state(source, self.abstract_original, self.original_shardings)

    def update(
        self, state: TrainState, batch: Batch, original: nnx.State | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One optimizer step; `state` is consumed.

        Args:
            state: of the run.
            batch: to learn from.
            original: what `read_original` gave, if there is distillation.

        Returns:
            The new state, and float32 scalars: `loss` (nats a target), `z_loss`, `slot_loss` and
            `distillation` if they have a weight (all without it), `learning_rate`,
            `gradient_norm` before clipping, of what is trained, and `skipped`: 1 if loss, gradient
            or new state were not finite, in which case the state returned is the old one.
        """
        return self.update_placed(state, self.place(batch), original)

    def trace_update(self) -> jax.stages.Traced:
        """`update` of abstract arrays, to be compiled for devices that may not be there."""

        def place(tree: Any, sharding: NamedSharding) -> Any:
            return jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
            )

        is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
        state = jax.tree.map(place, self.abstract_state, self.shardings, is_leaf=is_variable)
        original = self.abstract_original
        if original is not None:
            original = jax.tree.map(place, original, self.original_shardings, is_leaf=is_variable)
        shape = self._config.batch_size, self._config.data.sequence_length
        integers, booleans = (jax.ShapeDtypeStruct(shape, x) for x in (jnp.int32, jnp.bool_))
        batch = dict.fromkeys(("tokens", "targets", "segment_ids"), integers)
        placed = place(batch | {"loss_mask": booleans}, batch_sharding(self._mesh))
        return self._update.trace(state, original, placed)

    def update_placed(
        self, state: TrainState, batch: DeviceBatch, original: nnx.State | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """`update` on a batch that is on the devices already, as `place` returns it."""
        return self._update(state, original, batch)

    def evaluate(self, model_state: Any, batch: Batch) -> Evaluation:
        """The loss and the slots' share on a batch, with no update."""
        return self._evaluate(model_state, self.place(batch))

    def place(self, batch: Batch) -> DeviceBatch:
        """The batch on the devices, its rows and tokens divided over them."""
        return to_devices(self._mesh, batch, self._config.batch_size)

    def model(self, model_state: Any) -> nha_jax.Model:
        """The model with these parameters."""
        return nnx.merge(self._model_graph, model_state)

    def _create(self) -> tuple[nha_jax.Model, nnx.Optimizer]:
        model = nha_jax.Model(self._config.model, rngs=nnx.Rngs(self._config.seed))
        trained, frozen = self._split(nnx.state(model))
        nnx.update(model, jax.tree.map(lambda x: x.astype(self._frozen_dtype), frozen))
        transform = make_optimizer(self._config.optimizer, self.learning_rate, trained)
        return model, nnx.Optimizer(model, transform, wrt=self._trainable)

    def _split(self, state: Any) -> tuple[nnx.State, nnx.State]:
        """What is trained of a model's state, or of a tree like it, and what is not."""
        trained, frozen = nnx.split_state(state, self._trainable, ...)
        return trained, frozen

    def _abstract_original(self) -> nnx.State:
        trained, _ = self._split(self.abstract_state.model)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, self._frozen_dtype), trained
        )

    def _update_function(
        self, state: TrainState, original: nnx.State | None, batch: DeviceBatch
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        trained, frozen = self._split(state.model)
        loss, terms, gradients = self._gradients(trained, frozen, original, batch)
        gradient_norm = optax.tree.norm(gradients)

        # nnx.merge takes over the state's variables, and the update writes into them.
        old = jax.tree.map(lambda leaf: leaf, (trained, state.optimizer))
        model = nnx.merge(self._model_graph, state.model)
        optimizer = nnx.merge(self._optimizer_graph, state.optimizer)
        count = optimizer.step[...]  # which skipped updates do not raise
        optimizer.update(model, gradients)
        new = nnx.state(model, self._trainable), nnx.state(optimizer)
        finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm) & all_finite(new)
        kept, kept_optimizer = jax.tree.map(lambda x, y: jnp.where(finite, x, y), new, old)
        metrics = {
            **terms,
            "learning_rate": jnp.asarray(self.learning_rate(count), jnp.float32),
            "gradient_norm": gradient_norm,
            "skipped": 1.0 - finite.astype(jnp.float32),
        }
        return TrainState(nnx.merge_state(kept, frozen), kept_optimizer), metrics

    def _gradients(
        self, trained: Any, frozen: Any, original: Any, batch: DeviceBatch
    ) -> tuple[jax.Array, dict[str, jax.Array], Any]:
        """The loss to minimise, its terms, and the gradient, in the trained parameters' dtype.

        The parts of the batch go through the model in turn. Each is divided by what the whole
        batch has, so that the sums are the whole batch's; they are kept in float32.
        """
        config = self._config
        total = counts(config.model, batch)

        def of_part(part: DeviceBatch) -> Any:
            wanted = None
            if original is not None:
                teacher = nnx.merge(self._original_graph, original, frozen)
                hidden = teacher.hidden_states(part["tokens"], part["segment_ids"])
                wanted = Original(teacher, hidden)

            def loss(trained: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
                model = nnx.merge(self._model_graph, trained, frozen)
                return losses(model, part, config.loss, total, wanted, config.head_parts)

            return jax.value_and_grad(loss, has_aux=True)(trained)

        def place(sums: Any) -> Any:
            values, gradients = sums
            return values, jax.lax.with_sharding_constraint(gradients, self.original_shardings)

        (loss, terms), gradients = self._sum_of_parts(of_part, batch, place)
        gradients = jax.tree.map(lambda x, like: x.astype(like.dtype), gradients, trained)
        return loss, terms, gradients

    def _evaluate_function(self, model_state: Any, batch: DeviceBatch) -> Evaluation:
        """In the parts of training, which need not have room for more."""
        config, model = self._config, nnx.merge(self._model_graph, model_state)

        def of_part(part: DeviceBatch) -> Evaluation:
            seen = model.diagnose(part["tokens"], part["segment_ids"])
            # Padding has a share of 0.
            real = (part["segment_ids"] > 0).sum(dtype=jnp.int32)
            return Evaluation(
                cross_entropy_of_hidden(model, seen.hidden, part, config.head_parts),
                seen.slot_weight.sum((1, 2, 3)),
                real * config.model.num_query_heads,
            )

        return self._sum_of_parts(of_part, batch)

    def _sum_of_parts(
        self,
        of_part: Callable[[DeviceBatch], Any],
        batch: DeviceBatch,
        place: Callable[[Any], Any] = lambda sums: sums,
    ) -> Any:
        """What the micro-batches give one after the other, added up, in float32 if not integers.

        `place` says where the sums lie.
        """
        if self._config.micro_batches == 1:
            return of_part(batch)

        def zeros(x: jax.ShapeDtypeStruct) -> jax.Array:
            return jnp.zeros(
                x.shape, x.dtype if jnp.issubdtype(x.dtype, jnp.integer) else "float32"
            )

        def add(sums: Any, part: DeviceBatch) -> tuple[Any, None]:
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, of_part(part)), None

        parts = cut_rows(self._mesh, batch, self._config.micro_batches)
        one = jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], parts))
        return jax.lax.scan(add, place(jax.tree.map(zeros, one)), parts)[0]


def all_finite(tree: Any) -> jax.Array:
    """Whether every floating-point entry is finite: a bool scalar."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()
