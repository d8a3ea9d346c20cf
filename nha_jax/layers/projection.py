"""`Projection`: a matrix that tokens are multiplied with, and what may lie beside its kernel."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nha_jax.layer_config import LayerFields
from nha_jax.layers.parameters import logical_axes, normal, partitioned

BESIDE_KERNEL = ("lora_a", "lora_b", "kernel_scale")
"""What a projection of a plain model lacks, and merging makes a part of the kernel."""

_LARGEST_CODE = 127


class Projection(nnx.Linear):
    """y = x kernel + bias, and with an adapter + (alpha / rank) (x lora_a) lora_b.

    The kernel is [in, out], the factors beside it are `lora_a` [in, rank] and `lora_b` [rank, out]
    (Hu et al., arXiv 2106.09685). A kernel of 8 bits holds integers, and `kernel_scale` [out] what
    multiplies each of its columns. In a stack of layers all have a leading axis for these. A
    projection is made with its kernel alone.
    """

    lora_a: nnx.LoRAParam | None
    lora_b: nnx.LoRAParam | None
    kernel_scale: nnx.Param | None

    def __init__(self, *args: Any, **kwargs: Any):
        """Takes the arguments of `flax.nnx.Linear`."""
        super().__init__(*args, **kwargs)
        self.lora_a, self.lora_b, self.kernel_scale = (nnx.data(None) for _ in BESIDE_KERNEL)
        self.alpha = 0.0

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """[..., in] -> [..., out], in `preferred_element_type` or else in `dtype`."""
        if self.kernel_scale is None:
            outputs = super().__call__(inputs, out_sharding)
        else:
            outputs = self._scaled(inputs, self.kernel_scale, out_sharding)
        if self.lora_a is None or self.lora_b is None:
            return outputs
        x, a, b = self.promote_dtype((inputs, self.lora_a[...], self.lora_b[...]), dtype=self.dtype)
        few = jnp.matmul(x, a, precision=self.precision) * (self.alpha / a.shape[-1])
        update = jnp.matmul(
            few, b, precision=self.precision, preferred_element_type=self.preferred_element_type
        )
        return outputs + update

    def add_factors(self, rank: int, alpha: float, key: jax.Array) -> None:
        """Puts factors beside the kernel: lora_a uniform within +-1/sqrt(in), and lora_b = 0.

        They are in param_dtype.
        """
        *stack, inputs, outputs = self.kernel.shape
        names, reach = logical_axes(self.kernel), inputs**-0.5
        shape = (*stack, inputs, rank)
        a = jax.random.uniform(key, shape, self.param_dtype, -reach, reach)
        b = jnp.zeros((*stack, rank, outputs), self.param_dtype)
        self.lora_a = nnx.LoRAParam(a, **self._metadata(*names[:-1], "rank"))
        self.lora_b = nnx.LoRAParam(b, **self._metadata(*names[:-2], "rank", names[-1]))
        self.alpha = alpha

    def quantize(self) -> None:
        """Rounds the kernel to 8 bits, each output by a scale of its own."""
        names = logical_axes(self.kernel)
        codes, scale = _quantized(self.kernel[...])
        self.kernel = nnx.Param(codes, **self._metadata(*names))
        self.kernel_scale = nnx.Param(scale, **self._metadata(*names[:-2], names[-1]))

    def merge(self, dtype: jax.typing.DTypeLike) -> None:
        """Makes all that lies beside the kernel a part of it, in `dtype`."""
        beside = (getattr(self, name) for name in BESIDE_KERNEL)
        arrays = (None if parameter is None else parameter[...] for parameter in beside)
        whole = merged_kernel(self.kernel[...], *arrays, alpha=self.alpha)
        self.kernel = nnx.Param(whole.astype(dtype), **self._metadata(*logical_axes(self.kernel)))
        self.lora_a, self.lora_b, self.kernel_scale = (nnx.data(None) for _ in BESIDE_KERNEL)
        self.alpha = 0.0

    @property
    def is_plain(self) -> bool:
        """Whether nothing lies beside the kernel."""
        return all(getattr(self, name) is None for name in BESIDE_KERNEL)

    def _metadata(self, *names: str | None) -> dict[str, Any]:
        """The metadata of a parameter beside the kernel, whose axes have these names."""
        return self.kernel.get_metadata() | {"out_sharding": names}

    def _scaled(self, inputs: jax.Array, scale: nnx.Param, out_sharding: Any) -> jax.Array:
        """Computes x kernel + bias of 8 bits, whose integers every dtype holds exactly."""
        bias = None if self.bias is None else self.bias[...]
        x, codes, bias = self.promote_dtype((inputs, self.kernel[...], bias), dtype=self.dtype)
        product = jnp.matmul(
            x,
            codes,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
            out_sharding=out_sharding,
        )
        over_inputs = (1,) * (product.ndim - 1)
        outputs = product * scale[...].astype(product.dtype).reshape(*over_inputs, -1)
        return outputs if bias is None else outputs + bias.reshape(*over_inputs, -1)


def linear(
    config: LayerFields,
    in_features: int,
    out_features: int,
    names: tuple[str, str],
    *,
    rngs: nnx.Rngs,
    use_bias: bool = False,
    preferred_element_type: jax.typing.DTypeLike | None = None,
) -> Projection:
    """Makes a projection: [..., in_features] -> [..., out_features], computed in config.dtype.

    Args:
        config: dtypes, and the standard deviation of the kernel at the start.
        in_features, out_features: sizes.
        names: the logical axes of the kernel [in_features, out_features].
        rngs: random numbers for the kernel.
        use_bias: whether it has a bias, which starts at 0.
        preferred_element_type: dtype of the result; None: config.dtype.
    """
    return Projection(
        in_features,
        out_features,
        use_bias=use_bias,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        preferred_element_type=preferred_element_type,
        kernel_init=normal(config, *names),
        bias_init=partitioned(jax.nn.initializers.zeros, names[1]),
        rngs=rngs,
    )


def projections(module: nnx.Module) -> dict[str, Projection]:
    """Lists all projections in a module by dotted name: `blocks.attention.q_proj`."""
    return {
        ".".join(map(str, path)): part
        for path, part in nnx.iter_modules(module)
        if isinstance(part, Projection)
    }


def merged_kernel(
    kernel: jax.Array,
    lora_a: jax.Array | None,
    lora_b: jax.Array | None,
    kernel_scale: jax.Array | None,
    *,
    alpha: float,
) -> jax.Array:
    """Computes kernel + (alpha / rank) lora_a lora_b in float32, of a kernel or a part of one.

    Args:
        kernel: [..., in, out], floating or of 8 bits.
        lora_a: [..., in, rank], and
        lora_b: [..., rank, out]; None without an adapter.
        kernel_scale: [..., out]; None for a kernel that is not of 8 bits.
        alpha: of the adapter.
    """
    whole = kernel.astype(jnp.float32)
    if kernel_scale is not None:
        whole = whole * kernel_scale.astype(jnp.float32)[..., None, :]
    if lora_a is not None and lora_b is not None:
        a, b = lora_a.astype(jnp.float32), lora_b.astype(jnp.float32)
        product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        whole = whole + alpha / a.shape[-1] * product
    return whole


def _quantized(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[..., in, out] -> integers within +-127, and their scales [..., out] in bfloat16.

    A scale of 8 bits of mantissa is the same number in every dtype of the computation.
    """
    largest = jnp.abs(kernel.astype(jnp.float32)).max(axis=-2)
    scale = jnp.where(largest > 0, largest / _LARGEST_CODE, 1).astype(jnp.bfloat16)
    codes = jnp.round(kernel.astype(jnp.float32) / scale.astype(jnp.float32)[..., None, :])
    return jnp.clip(codes, -_LARGEST_CODE, _LARGEST_CODE).astype(jnp.int8), scale
