"""The compiled functions of training: initial state, one update, one evaluation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import nha_jax
from nha_jax.sharding import named_shardings
from nha_jax.storage.weights import WeightSource, read_state
from train.config import TrainConfig
from train.data.batches import Batch
from train.data.recall import most_targets
from train.devices.mesh import (
    DATA_AXIS,
    batch_sharding,
    constrain,
    cut_rows,
    num_slices,
    to_devices,
)
from train.optimizers import find_optimizer
from train.step.average import average_of
from train.step.losses import Answers, Counts, LossSum, Teacher, counts, losses, measure_hidden
from train.step.model_parts import ModelParts
from train.step.optimizer import NamedOptimizer, learning_rate_schedule, make_optimizer
from train.step.trainable import Trainable

DeviceBatch = dict[str, jax.Array]
"""A batch as arrays [B, T] that are divided over the mesh."""


class TrainState(NamedTuple):
    """All arrays that an update changes.

    Attributes:
        model: nnx state of the model, trained parameters and frozen ones.
        optimizer: nnx state of the optimizer, for the trained parameters alone; the average of
            these, if one is kept, is in it.
    """

    model: Any
    optimizer: Any


class EvaluationSums(NamedTuple):
    """What an evaluation finds in one batch, before division, so that batches can be added up.

    Attributes:
        loss: the cross-entropy.
        answers: how many targets were the likeliest token.
        slot_weight: [layers] float32, the slot weights summed over real tokens and query heads.
        slot_weights: int32 scalar, how many slot weights a layer's sum is of.
    """

    loss: LossSum
    answers: Answers
    slot_weight: jax.Array
    slot_weights: jax.Array


class TrainingFunctions:
    """A model and its optimizer as functions over sharded state; compiled at the first call.

    The batch of every call is a `train.data.batches.Batch` with those of its rows that this
    process holds (`train.devices.mesh.rows_of_process`).

    Attributes:
        learning_rate: the schedule, step -> learning rate.
        abstract_state: shapes and dtypes of the state, as a `TrainState`.
        shardings: where each array of the state lies, in the same structure.
        trained_shardings: likewise of the trained parameters and their gradients.
        abstract_teacher: shapes and dtypes of what `read_teacher` gives; None without a teacher.
        teacher_shardings: where it lies, in the same structure.
    """

    def __init__(
        self,
        config: TrainConfig,
        mesh: Mesh,
        teacher: nha_jax.ModelConfig | None = None,
        ever_trained: Trainable | None = None,
    ):
        """Traces shapes only; nothing is allocated or compiled.

        Args:
            config: the run's configuration, or that of a phase of it (`train.phases`).
            mesh: its devices.
            teacher: the configuration of the model that is learned from.
            ever_trained: the parameters that some phase of the run trains: all phases hold them in
                model.param_dtype, and a teacher has its own. None: those that this one trains.

        Raises:
            ConfigError: a pattern of `trainable` matches no parameter, or the adapter does not fit
                the model.
        """
        self.learning_rate = learning_rate_schedule(config.optimizer, config.steps)
        self._config = config
        self._most_targets = most_targets(config.data.corpus)
        self._mesh = mesh
        self._parts = ModelParts(config, ever_trained)
        self._trainable, self._split = self._parts.trainable, self._parts.split
        # jax's, not nnx's, eval_shape: that one would look for the logical axes in the mesh.
        abstract = jax.eval_shape(lambda: tuple(nnx.split(node) for node in self._create()))
        (self._model_graph, model_state), (self._optimizer_graph, optimizer_state) = abstract
        self._abstract_base = jax.eval_shape(lambda: nnx.state(self._parts.base()))
        self.abstract_state = TrainState(model_state, optimizer_state)
        self.shardings = TrainState(
            named_shardings(model_state, mesh), named_shardings(optimizer_state, mesh)
        )
        self.trained_shardings, _ = self._split(self.shardings.model)
        self.teacher_shardings = self._parts.of_teacher(self.shardings.model)
        self.abstract_teacher = None
        if teacher is not None:
            self._teacher_graph = self._parts.teacher_graph(teacher)
            self.abstract_teacher = self._parts.abstract_teacher(self.abstract_state.model)
        replicated = NamedSharding(mesh, PartitionSpec())
        self._update = jax.jit(
            self._update_function,
            donate_argnums=0,
            out_shardings=(self.shardings, replicated),
            keep_unused=True,  # the teacher's gates are not read, but held: a plan counts them
        )
        self._evaluate = jax.jit(self._evaluate_function, out_shardings=replicated)
        self._choose = jax.jit(
            self._choose_function, static_argnums=1, out_shardings=self.shardings.model
        )

    @property
    def num_trained(self) -> int:
        """How many entries the trained parameters have."""
        return sum(leaf.size for leaf in jax.tree.leaves(self._split(self.abstract_state.model)[0]))

    def initial_state(self, source: WeightSource | None = None) -> TrainState:
        """Makes parameters and an empty optimizer, each array on its own devices.

        Args:
            source: where the parameters are read from, an adapter's factors excepted; None: they
                are drawn by the seed.
        """

        def create(base: nnx.State | None = None) -> TrainState:
            model, optimizer = self._create(base)
            return TrainState(nnx.state(model), nnx.state(optimizer))

        if source is None:
            return jax.jit(create, out_shardings=self.shardings)()
        base = read_state(
            source, self._abstract_base, named_shardings(self._abstract_base, self._mesh)
        )
        # Kernels that become integers cannot lie where they were.
        donated = () if self._parts.quantizes else 0
        return jax.jit(create, out_shardings=self.shardings, donate_argnums=donated)(base)

    def begin(self, model_state: Any) -> TrainState:
        """Makes the state of a stage that begins with these parameters.

        Args:
            model_state: nnx state of the model, on the devices.
        """

        def create(model_state: Any) -> Any:
            model = nnx.merge(self._model_graph, model_state)
            return nnx.state(self._make_optimizer(model))

        optimizer = jax.jit(create, out_shardings=self.shardings.optimizer)(model_state)
        return TrainState(model_state, optimizer)

    def read_teacher(self, source: WeightSource) -> nnx.State:
        """Reads the teacher's own version of what is ever trained; it shares all other parameters.

        Args:
            source: the teacher's weights.

        Returns:
            A state like `abstract_teacher`, in frozen_dtype; with an adapter alone an empty one.

        Raises:
            ValueError: no teacher was given to the constructor.
        """
        if self.abstract_teacher is None:
            raise ValueError("teacher was not given: there is no model to learn from")
        return read_state(source, self.abstract_teacher, self.teacher_shardings)

    def update(
        self, state: TrainState, batch: Batch, teacher: nnx.State | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Makes one optimizer step; `state` is consumed.

        Args:
            state: the run's state.
            batch: what to learn from.
            teacher: what `read_teacher` gave, if there is a teacher.

        Returns:
            The new state, and float32 scalars: the terms that `train.step.losses.losses` names,
            among them `loss` (nats a target), each before it is weighted, `learning_rate`,
            `gradient_norm` of the trained parameters before clipping, and `skipped`: 1 if loss,
            gradient or new state were not finite, in which case the state returned is the old one.
        """
        return self.update_placed(state, self.place(batch), teacher)

    def trace_update(self) -> jax.stages.Traced:
        """Traces `update` on abstract arrays, to be compiled for devices that may not be there."""
        return self._update.trace(*self._abstract_arguments())

    def trace_evaluate(self) -> jax.stages.Traced:
        """Traces `evaluate` on abstract arrays."""
        state, _, batch = self._abstract_arguments()
        return self._evaluate.trace(state.model, batch)

    def _abstract_arguments(self) -> tuple[TrainState, Any, Any]:
        """The state, the teacher's and a batch, with shapes, dtypes and shardings only."""

        def place(tree: Any, sharding: NamedSharding) -> Any:
            return jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
            )

        is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
        state = jax.tree.map(place, self.abstract_state, self.shardings, is_leaf=is_variable)
        teacher = self.abstract_teacher
        if teacher is not None:
            teacher = jax.tree.map(place, teacher, self.teacher_shardings, is_leaf=is_variable)
        shape = self._config.batch_size, self._config.data.sequence_length
        integers, booleans = (jax.ShapeDtypeStruct(shape, x) for x in (jnp.int32, jnp.bool_))
        batch = dict.fromkeys(("tokens", "targets", "segment_ids"), integers)
        placed = place(batch | {"loss_mask": booleans}, batch_sharding(self._mesh))
        return state, teacher, placed

    def update_placed(
        self, state: TrainState, batch: DeviceBatch, teacher: nnx.State | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Makes the step of `update` on a batch that is on the devices, as `place` returns it."""
        return self._update(state, teacher, batch)

    def evaluate(self, model_state: Any, batch: Batch) -> EvaluationSums:
        """Measures loss and slot weights on a batch, with no update."""
        return self._evaluate(model_state, self.place(batch))

    @property
    def evaluates_optimizer(self) -> bool:
        """Whether `evaluated` reads the optimizer's state."""
        return find_optimizer(self._config.optimizer.name).evaluated is not None

    def evaluated(self, state: TrainState) -> Any:
        """Gives the model's state that is to be measured, and saved when the run is finished.

        It is the one in `state`, unless the optimizer averages it.
        """
        choose = find_optimizer(self._config.optimizer.name).evaluated
        return state.model if choose is None else self._choose(state, choose)

    def averaged(self, state: TrainState) -> Any:
        """Gives the model's state with the moving average of its parameters; None without one."""
        if self._config.optimizer.ema_decay is None:
            return None
        return self._choose(state, average_of)

    def place(self, batch: Batch) -> DeviceBatch:
        """Puts the batch on the devices, its rows and tokens divided over them."""
        return to_devices(self._mesh, batch, self._config.batch_size)

    def model(self, model_state: Any) -> nha_jax.Model:
        """Makes the model that has these parameters."""
        return nnx.merge(self._model_graph, model_state)

    def _create(self, base: nnx.State | None = None) -> tuple[nha_jax.Model, nnx.Optimizer]:
        model = self._parts.model(base)
        return model, self._make_optimizer(model)

    def _make_optimizer(self, model: nha_jax.Model) -> nnx.Optimizer:
        trained, _ = self._split(nnx.state(model))
        config = self._config
        transform = make_optimizer(
            config.optimizer, self.learning_rate, trained, config.model.width_ratio
        )
        return NamedOptimizer(model, transform, wrt=self._trainable)

    def _choose_function(self, state: TrainState, choose: Callable[[Any, Any], Any]) -> Any:
        """Puts what `choose` makes of optimizer and trained parameters in place of these."""
        model = nnx.merge(self._model_graph, state.model)
        optimizer = nnx.merge(self._optimizer_graph, state.optimizer)
        parameters = nnx.as_pure(nnx.state(model, self._trainable))
        nnx.update(model, choose(nnx.as_pure(optimizer.opt_state), parameters))
        return nnx.state(model)

    def _update_function(
        self, state: TrainState, teacher: nnx.State | None, batch: DeviceBatch
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        trained, frozen = self._split(state.model)
        loss, terms, gradients = self._gradients(trained, frozen, teacher, batch)
        gradient_norm = optax.tree.norm(gradients)

        # nnx.merge takes over the state's variables, and the update writes into them.
        old = jax.tree.map(lambda leaf: leaf, (trained, state.optimizer))
        model = nnx.merge(self._model_graph, state.model)
        optimizer = nnx.merge(self._optimizer_graph, state.optimizer)
        count = optimizer.step[...]  # skipped updates are not in it
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
        self, trained: Any, frozen: Any, teacher_state: Any, batch: DeviceBatch
    ) -> tuple[jax.Array, dict[str, jax.Array], Any]:
        """Computes the loss to minimise, its terms, and the gradient in the parameters' dtype.

        The parts of the batch go through the model in turn. Each is divided by the counts of the
        whole batch, so that the sums are the whole batch's; they are kept in float32.
        """
        arrays = trained, frozen, teacher_state, batch, counts(self._config.model, batch)
        add_up = self._gradient_sums
        slices, divided_heads = num_slices(self._config, self._mesh), self._mesh.shape["tensor"] > 1
        if self._config.micro_batches > 1 and slices > 1 and not divided_heads:
            # Within each slice on its own, micro-batch by micro-batch, and once between them: XLA
            # would send every micro-batch's gradients over the data center's network. Of a batch
            # in one part it sends each layer's once. With divided heads it crashes (XLA of jax
            # 0.12.0, on CPUs), so these are left to it.
            whole = PartitionSpec()
            add_up = jax.shard_map(
                lambda *arrays: jax.lax.psum(self._gradient_sums(*arrays), DATA_AXIS),
                in_specs=(whole, whole, whole, PartitionSpec(DATA_AXIS), whole),
                out_specs=whole,
                axis_names={DATA_AXIS},
                check_vma=False,
            )
        (loss, terms), gradients = add_up(*arrays)
        gradients = jax.tree.map(lambda x, like: x.astype(like.dtype), gradients, trained)
        return loss, terms, gradients

    def _gradient_sums(
        self, trained: Any, frozen: Any, teacher_state: Any, batch: DeviceBatch, total: Counts
    ) -> Any:
        """Adds up what the rows of `batch` have to say: ((loss, terms), gradients in float32)."""
        config = self._config

        def of_part(part: DeviceBatch) -> Any:
            teacher = None
            if teacher_state is not None:
                shared = self._parts.shared_with_teacher(frozen)
                teacher = Teacher(nnx.merge(self._teacher_graph, teacher_state, shared))
                if not config.loss.attention_transfer:
                    hidden = teacher.model.hidden_states(part["tokens"], part["segment_ids"])
                    teacher = teacher._replace(hidden=hidden)

            def loss(trained: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
                model = nnx.merge(self._model_graph, trained, frozen)
                parts = config.head_parts, self._most_targets
                return losses(model, part, config.loss, total, teacher, *parts)

            return jax.value_and_grad(loss, has_aux=True)(trained)

        def place(sums: Any) -> Any:
            values, gradients = sums
            specs = jax.tree.map(lambda sharding: sharding.spec, self.trained_shardings)
            return values, constrain(gradients, self._mesh, specs)

        return self._sum_of_parts(of_part, batch, place)

    def _evaluate_function(self, model_state: Any, batch: DeviceBatch) -> EvaluationSums:
        """Evaluates a batch in the parts of training: there may be no room for more at once."""
        config, model = self._config, nnx.merge(self._model_graph, model_state)

        def of_part(part: DeviceBatch) -> EvaluationSums:
            seen = model.diagnose(part["tokens"], part["segment_ids"])
            # Padding has a slot weight of 0.
            real = (part["segment_ids"] > 0).sum(dtype=jnp.int32)
            parts = config.head_parts, self._most_targets
            return EvaluationSums(
                *measure_hidden(model, seen.hidden, part, *parts),
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
        """Adds up what `of_part` gives for each micro-batch in turn, in float32 if not integers.

        `place` constrains the devices that the sums lie on.
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
    """Whether every floating-point entry of a tree is finite: a bool scalar."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()
