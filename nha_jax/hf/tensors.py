"""The table of tensors: where each parameter of ours lies in a checkpoint of transformers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from nha_jax.config import ModelConfig
from nha_jax.storage.weights import Index

TIED_HEAD = "lm_head.weight"
"""Written by some programs although the embeddings are tied; not used then."""

IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)
"""Ends of names of tensors that hold nothing learned."""

Gates = Callable[[ModelConfig, str], "Entry"]
"""From the config and the start of its layer's names to where f_proj lies."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """How one parameter of ours, its axes (layer, expert, ...), lies in a checkpoint.

    Fields:
        name: ours, dotted: `blocks.mlp.gate_proj.kernel`.
        template: theirs, of one layer and expert: `{layer}` and `{expert}` stand for their number,
            in the order of our leading axes.
        transposed: a matrix, ours [in, out], theirs [out, in].
        filters: of a convolution over time, ours [width, channels], theirs [channels, 1, width].
        averaged: so many neighbouring rows of theirs make one column of ours, their mean; 1: the
            numbers are the same, and the entry can be read in the other direction too.
    """

    name: str
    template: str
    transposed: bool = False
    filters: bool = False
    averaged: int = 1

    @property
    def stacked_axes(self) -> int:
        """Our leading axes, of layers and experts, that are single tensors of theirs."""
        return ("{layer}" in self.template) + ("{expert}" in self.template)

    def their_name(self, place: tuple[int, ...]) -> str:
        """Of the tensor at this place of our leading axes: (layer, expert), (layer,) or ()."""
        return self.template.format(**dict(zip(("layer", "expert"), place, strict=False)))

    def their_names(self, shape: tuple[int, ...]) -> Iterator[str]:
        """All tensors that make up our parameter, whose shape this is, in the order of ours."""
        places: list[tuple[int, ...]] = [()]
        for length in shape[: self.stacked_axes]:
            places = [(*place, i) for place in places for i in range(length)]
        return map(self.their_name, places)

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of each tensor, from our parameter's shape."""
        own = shape[self.stacked_axes :]
        if self.filters:
            return own[1], 1, own[0]
        if not self.transposed:
            return own
        inputs, outputs = own
        return outputs * self.averaged, inputs

    def their_index(self, index: Index) -> Index:
        """What to read of a tensor for this part (with bounds) of ours, leading axes left out."""
        if self.filters:
            return index[1], slice(0, 1), index[0]
        if not self.transposed:
            return index
        inputs, outputs = index
        rows = slice(outputs.start * self.averaged, outputs.stop * self.averaged)
        return rows, inputs

    def our_index(self, index: Index) -> Index:
        """The other direction, of an entry that is not averaged."""
        assert self.averaged == 1
        if self.filters:
            return index[2], index[0]
        return index[::-1] if self.transposed else index

    def ours(self, tensor: np.ndarray) -> np.ndarray:
        """A part of a tensor of theirs -> the same part of our parameter, leading axes left out."""
        if self.averaged > 1:
            groups = tensor.astype(np.float32).reshape(-1, self.averaged, tensor.shape[-1])
            tensor = groups.mean(axis=1)
        if self.filters:
            return tensor[:, 0].T
        return tensor.T if self.transposed else tensor

    def theirs(self, parameter: np.ndarray) -> np.ndarray:
        """The other direction, of an entry that is not averaged."""
        assert self.averaged == 1
        if self.filters:
            return parameter.T[:, None]
        return parameter.T if self.transposed else parameter


def gate_group(config: ModelConfig) -> int:
    """Rows of a head's key projection whose mean starts one of its slots' gates.

    Raises:
        ValueError: num_slots does not divide the key's size.
    """
    if config.key_dim % config.num_slots:
        divisors = [m for m in range(1, config.key_dim + 1) if config.key_dim % m == 0]
        raise ValueError(
            f"num_slots={config.num_slots} must divide the key size {config.key_dim}: a slot's "
            f"gate starts from the mean of so many rows of the key projection; choose one of "
            f"{', '.join(map(str, divisors))}"
        )
    return config.key_dim // config.num_slots


def table(config: ModelConfig) -> tuple[Entry, ...]:
    """Of every parameter of a converted model of this config (no convolution, no output norm).

    f_proj starts as the mean of rows of k_proj (see `gate_group`): the only entry that cannot be
    read in the other direction.

    Raises:
        ValueError: num_slots does not divide the key's size.
    """
    return tuple(_converted(config, _gates_from_keys))


def plain_table(config: ModelConfig) -> tuple[Entry, ...]:
    """Likewise, without the gates: of what the original has."""
    return tuple(_converted(config, None))


def hybrid_table(config: ModelConfig) -> tuple[Entry, ...]:
    """Likewise, of a checkpoint with gates of its own, as the authors of the paper name them."""
    return tuple(_converted(config, _stored_gates))


def _converted(config: ModelConfig, gates: Gates | None) -> Iterator[Entry]:
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


def native_table(config: ModelConfig) -> tuple[Entry, ...]:
    """Of every parameter of a model of the published architecture, as its authors name them."""
    layer = "model.layers.{layer}."
    attention, ours = layer + "attn.", "blocks.attention."
    entries = [
        Entry(name="embed.embedding", template="model.embeddings.weight"),
        Entry(name="norm.scale", template="model.norm.weight"),
        Entry(name="blocks.attention_norm.scale", template=layer + "attn_norm.weight"),
        Entry(name="blocks.mlp_norm.scale", template=layer + "mlp_norm.weight"),
        *(_matrix(f"{ours}{part}_proj", f"{attention}{part}_proj") for part in "qkvfo"),
        Entry(name=f"{ours}o_norm.scale", template=f"{attention}g_norm.weight"),
        *_mlp(config, layer + "mlp."),
    ]
    for part in "qkv" if config.conv_width else "":
        template = f"{attention}{part}_conv1d.weight"
        entries.append(Entry(name=f"{ours}{part}_conv.kernel", template=template, filters=True))
    if not config.tie_embeddings:
        entries.append(Entry(name="head.kernel", template=TIED_HEAD, transposed=True))
    return tuple(entries)


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
    own = prefix
    if config.experts:
        yield _matrix("blocks.mlp.router", f"{prefix}gate")
        own = prefix + "experts.{expert}."
    for part in ("gate_proj", "up_proj", "down_proj"):
        yield _matrix(f"blocks.mlp.{part}", own + part)


def _matrix(ours: str, theirs: str) -> Entry:
    return Entry(name=f"{ours}.kernel", template=f"{theirs}.weight", transposed=True)
