"""Adapters: low-rank updates put beside a model's projections, and made a part of them again."""

import functools
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from flax import nnx

from nha_jax.config import ModelConfig
from nha_jax.config_parts import Adapter
from nha_jax.layers.experts import ExpertKernels
from nha_jax.layers.projection import projections
from nha_jax.model import Model, abstract_model
from nha_jax.sizes import Shapes

FACTORS = ("lora_a", "lora_b")
"""The names of an update's factors: the last part of their dotted names."""


def add_adapter(model: Model, adapter: Adapter, *, rngs: nnx.Rngs) -> Model:
    """Puts low-rank updates beside projections; at first they change nothing.

        adapter = nha_jax.Adapter(rank=16, targets=("blocks.attention.*", "blocks.mlp.*"))
        adapted = nha_jax.add_adapter(model, adapter, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(adapted, optax.adamw(1e-4), wrt=nnx.LoRAParam)

    The factors are [layers, in, rank] and [layers, rank, out] `nnx.LoRAParam`s in the model's
    param_dtype, named `blocks.attention.q_proj.lora_a` and `lora_b`. The adapted model generates,
    scores and is divided over a mesh as any; `save` and `save_pretrained` write it merged, and
    `save_adapter` the updates alone.

    Args:
        model: the model; the parameters are shared, not copied.
        adapter: rank, alpha and targets.
        rngs: the random numbers of the first factors, of the stream "params" or the default one.

    Raises:
        ValueError: the model has an adapter; a target matches no projection, or experts; or the
            rank is above a size of a kernel.
    """
    if adapter_of(model) is not None:
        raise ValueError("model has an adapter already: merge it first, with merge_adapter(model)")
    names = targets_of(model.config, adapter)
    adapted = nnx.merge(*nnx.split(model))
    for name, projection in projections(adapted).items():
        if name in names:
            projection.add_factors(adapter.rank, adapter.alpha, rngs.params())
    return adapted


def merge_adapter(model: Model) -> Model:
    """Makes a plain model of an adapted one, which computes the same, by the same kernels.

    Kernels that had something beside them are in the config's param_dtype; all other parameters are
    shared, not copied. A model without an adapter comes back as it is.
    """
    merged = nnx.merge(*nnx.split(model))
    for projection in projections(merged).values():
        if not projection.is_plain:
            projection.merge(model.config.param_dtype)
    return merged


def adapter_of(model: Model) -> Adapter | None:
    """Describes a model's adapter, its targets by their whole names; None if it has none."""
    found = {name: x for name, x in projections(model).items() if x.lora_a is not None}
    for projection in found.values():
        assert projection.lora_a is not None
        rank = projection.lora_a.shape[-1]
        return Adapter(rank=rank, alpha=projection.alpha, targets=tuple(found))
    return None


def targets_of(config: ModelConfig, adapter: Adapter) -> tuple[str, ...]:
    """Names the projections of a config's model that an adapter is beside.

    Raises:
        ValueError: as for `add_adapter`.
    """
    known = _kernels(config)
    names: set[str] = set()
    for pattern in adapter.targets:
        experts = [name for name in known.experts if fnmatchcase(name, pattern)]
        if experts:
            raise ValueError(
                f"targets={pattern!r} matches {experts[0]}, the kernels of experts, which take no "
                f"adapter; choose among {', '.join(known.projections)}"
            )
        found = {name for name in known.projections if fnmatchcase(name, pattern)}
        if not found:
            raise ValueError(
                f"targets={pattern!r} matches no projection; there are "
                f"{', '.join(known.projections)}"
            )
        names |= found
    for name, shape in known.projections.items():
        if name in names and adapter.rank > min(shape[-2:]):
            raise ValueError(
                f"rank={adapter.rank} is above the smaller size of {name}'s kernel, "
                f"{shape[-2]} x {shape[-1]}; choose a smaller rank or other targets"
            )
    return tuple(name for name in known.projections if name in names)


def factor_shapes(config: ModelConfig, adapter: Adapter) -> Shapes:
    """Gives shape and dtype of each factor, by dotted name; errors as for `add_adapter`."""
    shapes: dict[str, jax.ShapeDtypeStruct] = {}
    for name in targets_of(config, adapter):
        *stack, inputs, outputs = _kernels(config).projections[name]
        for factor, sizes in zip(
            FACTORS, ((inputs, adapter.rank), (adapter.rank, outputs)), strict=True
        ):
            shape = (*stack, *sizes)
            shapes[f"{name}.{factor}"] = jax.ShapeDtypeStruct(shape, config.param_dtype)
    return shapes


def is_factor(path: Sequence[Any], _: Any) -> bool:
    """Filters the factors out of an nnx state, or a tree like it."""
    return path[-1] in FACTORS


def quantize_projections(model: Model, names: Collection[str]) -> Model:
    """Rounds the kernels of the projections of these names to 8 bits; all else is shared."""
    quantized = nnx.merge(*nnx.split(model))
    for name, projection in projections(quantized).items():
        if name in names:
            projection.quantize()
    return quantized


class _Kernels(NamedTuple):
    """The kernels of a model, by dotted name, that an adapter can be beside, and those it cannot.

    Fields:
        projections: the shape of each projection's kernel.
        experts: the names of the stacks of experts.
    """

    projections: Mapping[str, tuple[int, ...]]
    experts: tuple[str, ...]


@functools.lru_cache
def _kernels(config: ModelConfig) -> _Kernels:
    model = nnx.merge(*abstract_model(config))
    experts = tuple(
        ".".join(map(str, path))
        for path, module in nnx.iter_modules(model)
        if isinstance(module, ExpertKernels)
    )
    shapes = {name: x.kernel.shape for name, x in sorted(projections(model).items())}
    return _Kernels(MappingProxyType(shapes), experts)
