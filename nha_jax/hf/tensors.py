"""Tables of tensors: where each parameter of a model lies in a checkpoint of another format.

"Ours" is a parameter of `nha_jax.Model`, "theirs" a tensor of the checkpoint. One parameter of ours
holds all layers (and experts); theirs are one tensor a layer (and expert).
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from nha_jax.config import ModelConfig
from nha_jax.storage.weights import Index

TIED_HEAD = "lm_head.weight"
"""The head. Some programs write it although the embeddings are tied; it is not used then."""

IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)
"""How the names of tensors end that hold nothing learned."""

GateEntry = Callable[[ModelConfig, str], "Entry"]
"""Makes the entry of f_proj, from the config and the prefix of the attention's tensor names."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where one parameter of ours lies in a checkpoint, and how its axes are arranged there.

    Fields:
        name: our dotted name: `blocks.mlp.gate_proj.kernel`.
        template: their name, in which `{layer}` and `{expert}` stand for the indices of our leading
            axes, in this order.
        transposed: the matrix is [in, out] in ours and [out, in] in theirs.
        filters: the convolution's kernel is [width, channels] in ours and [channels, 1, width] in
            theirs.
        factor: what multiplies ours where theirs is written; an entry that is read has 1.
        constant: their checkpoint has no such tensor, and all of ours is this number; None: it has.
        averaged: how many neighbouring rows of theirs are averaged into one column of ours; 1: the
            numbers are the same, and the entry can be written too.
    """

    name: str
    template: str
    transposed: bool = False
    filters: bool = False
    factor: float = 1.0
    averaged: int = 1
    constant: float | None = None

    @property
    def stacked_axes(self) -> int:
        """How many leading axes of ours (layers, experts) are spread over tensors of theirs."""
        return ("{layer}" in self.template) + ("{expert}" in self.template)

    def their_name(self, indices: tuple[int, ...]) -> str:
        """Names the tensor at these indices of our leading axes: (layer, expert), (layer,), ()."""
        return self.template.format(**dict(zip(("layer", "expert"), indices, strict=False)))

    def their_names(self, shape: tuple[int, ...]) -> Iterator[str]:
        """Names all tensors of a parameter of ours, given its shape, in the order of its axes."""
        if self.constant is not None:
            return iter(())
        lengths = shape[: self.stacked_axes]
        return map(self.their_name, itertools.product(*map(range, lengths)))

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of each tensor of theirs, from the shape of our whole parameter."""
        own = shape[self.stacked_axes :]
        if self.filters:
            return own[1], 1, own[0]
        if not self.transposed:
            return own
        inputs, outputs = own
        return outputs * self.averaged, inputs

    def their_index(self, index: Index) -> Index:
        """Says what to read of a tensor for a part of ours.

        Args:
            index: slices with bounds, one for each axis of ours but the leading ones.
        """
        if self.filters:
            return index[1], slice(0, 1), index[0]
        if not self.transposed:
            return index
        inputs, outputs = index
        rows = slice(outputs.start * self.averaged, outputs.stop * self.averaged)
        return rows, inputs

    def our_index(self, index: Index) -> Index:
        """Says what to read of ours for a part of a tensor: the inverse of `their_index`.

        The entry must not be averaged.
        """
        assert self.averaged == 1
        if self.filters:
            return index[2], index[0]
        return index[::-1] if self.transposed else index

    def ours(self, tensor: np.ndarray) -> np.ndarray:
        """Rearranges a part of a tensor into that part of our parameter, without leading axes."""
        if self.averaged > 1:
            groups = tensor.astype(np.float32).reshape(-1, self.averaged, tensor.shape[-1])
            tensor = groups.mean(axis=1)
        if self.filters:
            return tensor[:, 0].T
        return tensor.T if self.transposed else tensor

    def theirs(self, parameter: np.ndarray) -> np.ndarray:
        """Rearranges a part of our parameter into a part of a tensor: the inverse of `ours`.

        The entry must not be averaged.
        """
        assert self.averaged == 1
        if self.factor != 1:
            parameter = (parameter.astype(np.float32) * self.factor).astype(parameter.dtype)
        if self.filters:
            return parameter.T[:, None]
        return parameter.T if self.transposed else parameter


def gate_group(config: ModelConfig) -> int:
    """Counts the rows of a head's key projection whose mean becomes the gate of one slot.

    Raises:
        ValueError: num_slots does not divide key_dim.
    """
    if config.key_dim % config.num_slots:
        divisors = [m for m in range(1, config.key_dim + 1) if config.key_dim % m == 0]
        raise ValueError(
            f"num_slots={config.num_slots} must divide the key size {config.key_dim}: a slot's "
            f"gate starts from the mean of so many rows of the key projection; choose one of "
            f"{', '.join(map(str, divisors))}"
        )
    return config.key_dim // config.num_slots


def converted_table(config: ModelConfig) -> tuple[Entry, ...]:
    """Lists every parameter of a model converted from transformers (`PLAIN_ATTENTION`).

    f_proj, which the original does not have, starts as means of rows of k_proj (see `gate_group`):
    the only entry that can be read and not written.

    Raises:
        ValueError: num_slots does not divide key_dim.
    """
    return tuple(_converted(config, _gates_from_keys))


def plain_table(config: ModelConfig) -> tuple[Entry, ...]:
    """Lists the parameters that the original has too: those of `converted_table` but the gates."""
    return tuple(_converted(config, None))


def hybrid_table(config: ModelConfig) -> tuple[Entry, ...]:
    """Lists every parameter of a hybridised checkpoint, which has gates, by its authors' names."""
    return tuple(_converted(config, _stored_gates))


def _converted(config: ModelConfig, gates: GateEntry | None) -> Iterator[Entry]:
    layer = "model.layers.{layer}."
    yield Entry(name="embed.embedding", template="model.embed_tokens.weight")
    yield Entry(name="norm.scale", template="model.norm.weight")
    yield Entry(name="blocks.attention_norm.scale", template=layer + "input_layernorm.weight")
    yield Entry(name="blocks.mlp_norm.scale", template=layer + "post_attention_layernorm.weight")
    yield from _attention(config, layer + "self_attn.")
    if gates and config.num_slots:
        yield gates(config, layer + "self_attn.")
    yield from _mlp(config, layer + "mlp.")
    if not config.tie_embeddings:
        yield Entry(name="head.kernel", template=TIED_HEAD, transposed=True)


def _gates_from_keys(config: ModelConfig, prefix: str) -> Entry:
    kernel, template = "blocks.attention.f_proj.kernel", f"{prefix}k_proj.weight"
    return Entry(name=kernel, template=template, transposed=True, averaged=gate_group(config))


def _stored_gates(config: ModelConfig, prefix: str) -> Entry:
    return _matrix("blocks.attention.f_proj", f"{prefix}g_proj")


def published_table(config: ModelConfig, *, output_norm_scale: bool = True) -> tuple[Entry, ...]:
    """Lists every parameter of a model of the published architecture, as its authors name them.

    Args:
        config: of the model.
        output_norm_scale: whether the checkpoint has the scale of the norm after the attention;
            without (elementwise_affine false) it is 1.
    """
    layer = "model.layers.{layer}."
    attention, ours = layer + "attn.", "blocks.attention."
    entries = [
        Entry(name="embed.embedding", template="model.embeddings.weight"),
        Entry(name="norm.scale", template="model.norm.weight"),
        Entry(name="blocks.attention_norm.scale", template=layer + "attn_norm.weight"),
        Entry(name="blocks.mlp_norm.scale", template=layer + "mlp_norm.weight"),
        *(_matrix(f"{ours}{part}_proj", f"{attention}{part}_proj") for part in "qkvfo"),
        Entry(
            name=f"{ours}o_norm.scale",
            template=f"{attention}g_norm.weight",
            constant=None if output_norm_scale else 1.0,
        ),
        *_mlp(config, layer + "mlp."),
        *_convolutions(config, attention + "{part}_conv1d.weight"),
    ]
    if not config.tie_embeddings:
        entries.append(Entry(name="head.kernel", template=TIED_HEAD, transposed=True))
    return tuple(entries)


def own_code_table(config: ModelConfig) -> tuple[Entry, ...]:
    """Lists every parameter of any model, by the names of `nha_jax/hf/torch_files/`."""
    ours, theirs = "blocks.attention.", "model.layers.{layer}.self_attn."
    entries = [*_converted(config, _own_code_gates)]
    if config.output_norm:
        entries.append(Entry(name=f"{ours}o_norm.scale", template=f"{theirs}o_norm.weight"))
    return (*entries, *_convolutions(config, f"{theirs}{{part}}_conv.weight"))


def _own_code_gates(config: ModelConfig, prefix: str) -> Entry:
    return _matrix("blocks.attention.f_proj", f"{prefix}f_proj")


def _convolutions(config: ModelConfig, template: str) -> Iterator[Entry]:
    for part in "qkv" if config.conv_width else "":
        their_name = template.replace("{part}", part)
        name = f"blocks.attention.{part}_conv.kernel"
        yield Entry(name=name, template=their_name, filters=True)


def _attention(config: ModelConfig, prefix: str) -> Iterator[Entry]:
    ours = "blocks.attention."
    for part in "qkvo":
        yield _matrix(f"{ours}{part}_proj", f"{prefix}{part}_proj")
    biased = {"none": "", "qkv": "qkv", "all": "qkvo"}[config.attention_bias]
    for part in biased:
        yield Entry(name=f"{ours}{part}_proj.bias", template=f"{prefix}{part}_proj.bias")
    for part in "qk" if config.qk_norm else "":
        yield Entry(name=f"{ours}{part}_norm.scale", template=f"{prefix}{part}_norm.weight")


def _mlp(config: ModelConfig, prefix: str) -> Iterator[Entry]:
    if config.experts:
        yield _matrix("blocks.mlp.router", f"{prefix}gate")
        prefix += "experts.{expert}."
    for part in ("gate_proj", "up_proj", "down_proj"):
        yield _matrix(f"blocks.mlp.{part}", prefix + part)


def _matrix(ours: str, theirs: str) -> Entry:
    return Entry(name=f"{ours}.kernel", template=f"{theirs}.weight", transposed=True)
