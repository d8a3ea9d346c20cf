"""A model whose layers are modules of their own, for tools that change modules as they run."""

import jax
import jax.numpy as jnp
from flax import nnx

from nha_jax.ends import Ends
from nha_jax.layers import Block
from nha_jax.layers.layer_stack import block_of_layer
from nha_jax.layers.projection import projections
from nha_jax.model import Model, abstract_model
from nha_jax.ops.mesh.explicit import with_auto_axes
from nha_jax.sharding import hidden_specs, logits_specs
from nha_jax.sizes import Shapes, by_name
from nha_jax.storage.weights import differences


class UnstackedModel(Ends):
    """A `Model` of `blocks[0]`, `blocks[1]` and so on, which `unstack` makes and `stack` undoes.

    Each layer is called as it is, on this module itself, outside of any compiled program but the
    caller's own: what a tool puts beside a projection's kernel while it runs, such as LoRA or
    quantized weights, stays there. So it has the forward pass and nothing else, takes as long to
    compile as it has layers, and rematerialises none.
    """

    def __init__(self, model: Model):
        """Takes a model's parameters apart; embedding, norm and head are the model's own."""
        self.config, self.embed, self.norm = model.config, model.embed, model.norm
        if not model.config.tie_embeddings:
            self.head = model.head
        self.blocks = nnx.List([_block(model, index) for index in range(model.config.num_layers)])

    @with_auto_axes(logits_specs)
    def __call__(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Computes the logits, [B, T, vocab_size] float32, as `Model` does, of its arguments."""
        return self.logits(self.hidden_states(tokens, segment_ids, positions))

    @with_auto_axes(hidden_specs)
    def hidden_states(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Computes the head's input, [B, T, hidden_size] float32, as `Model.hidden_states` does."""
        tokens, known, segment_ids, positions = self._read(tokens, segment_ids, positions)
        hidden, rope = self._embed(tokens), self._rope(positions)
        for block, window_size in zip(self.blocks, self.config.windows, strict=True):
            hidden, _ = block.forward(
                hidden, window_size=window_size, rope=rope, segment_ids=segment_ids, diagnose=None
            )
        return self._end(hidden, known, segment_ids)


def unstack(model: Model) -> UnstackedModel:
    """Makes each layer of a model a module of its own; the layers' parameters are copied.

    Tools that change modules then see each of them, such as qwix's LoRA (that of the library,
    `nha_jax.add_adapter`, needs no unstacking); `nnx.jit` compiles the call:

        provider = qwix.LoraProvider(module_path=".*_proj", rank=8, alpha=16.0)
        unstacked = nha_jax.unstack(model)
        lora = qwix.apply_lora_to_model(unstacked, provider, tokens, rngs=nnx.Rngs(0))

    What they put beside a kernel is merged before layers are stacked, to generate with or to save:

        for _, module in nnx.iter_modules(lora):
            if hasattr(module, "kernel_lora_a"):
                update = module.kernel_lora_a[...] @ module.kernel_lora_b[...]
                module.kernel[...] += 16.0 / 8 * update
                del module.kernel_lora_a, module.kernel_lora_b
        model = nha_jax.stack(lora)

    Weights of 8 bits:

        rule = qwix.QuantizationRule(module_path=".*_proj", weight_qtype="int8")
        quantized = qwix.quantize_model(unstacked, qwix.PtqProvider([rule]), tokens)

    Raises:
        ValueError: the model has an adapter, or kernels of 8 bits.
    """
    if not all(projection.is_plain for projection in projections(model).values()):
        raise ValueError(
            "model has more than kernels in its projections: merge it first, with "
            "nha_jax.merge_adapter(model)"
        )
    return UnstackedModel(model)


def stack(unstacked: UnstackedModel) -> Model:
    """Makes a `Model` of an unstacked one, to generate with, to train or to save.

    Args:
        unstacked: what `unstack` made; other parameters than those of a `Model`, such as LoRA's,
            were merged into its own and deleted.

    Raises:
        ValueError: a layer has a parameter that a `Model` has not, or lacks one; all are named.
    """
    config = unstacked.config
    abstract = jax.eval_shape(lambda: nnx.state(unstack(Model(config, rngs=nnx.Rngs(0)))))
    problems = differences(_shapes(abstract), _shapes(nnx.state(unstacked)))
    if problems:
        raise ValueError(
            f"unstacked does not fit its config: {'; '.join(problems)}; merge what a tool has put "
            "beside a kernel into it, and delete that"
        )
    layers = [jax.tree.leaves(nnx.state(block)) for block in unstacked.blocks]
    graph, state = abstract_model(config)
    for name, part in state.items():
        leaves = jax.tree.leaves(nnx.state(getattr(unstacked, name)))
        if name == "blocks":
            leaves = [jnp.stack(parameters) for parameters in zip(*layers, strict=True)]
        state[name] = jax.tree.unflatten(jax.tree.structure(part), leaves)
    return nnx.merge(graph, state)


def _shapes(state: nnx.State) -> Shapes:
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in by_name(state).items()}


def _block(model: Model, index: int) -> Block:
    """Copies a layer; its parameters name their own axes, without that of the stack."""
    graph, state = jax.eval_shape(lambda: nnx.split(Block(model.config, rngs=nnx.Rngs(0))))
    leaves = jax.tree.leaves(nnx.state(block_of_layer(model.blocks, index)))
    return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), leaves))
