"""A mixture of SwiGLUs in place of one: every token goes to a few of them."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from nha_jax.config import ModelConfig
from nha_jax.layers.grouped_matmul import grouped_dot
from nha_jax.layers.parameters import normal
from nha_jax.ops.mesh.division import divide_over_mesh


class MixtureOfExperts(nnx.Module):
    """sum_i weight_i * SwiGLU_i(x) over a token's experts i (Qwen3-MoE, arXiv 2505.09388).

    A router's softmax over all experts, computed in float32, says which `per_token` of them a token
    goes to, and with which weights. Experts have no capacity: no token is ever dropped. There is no
    loss that balances their loads; see `nha_jax.config_parts.Experts`.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """Makes router and experts at random, in config.param_dtype.

        Args:
            config: of the model; its experts are not None.
            rngs: the random numbers, as for `NHAttention`.
        """
        experts = config.experts
        assert experts is not None
        self.config = config
        self.router = nnx.Linear(
            config.hidden_size,
            experts.count,
            use_bias=False,
            dtype=jnp.float32,
            param_dtype=jnp.dtype(config.param_dtype),
            precision=jax.lax.Precision.HIGHEST,  # rounding would send tokens to other experts
            kernel_init=normal(config, "embed", "experts"),
            rngs=rngs,
        )
        hidden, inner = ("embed", config.hidden_size), ("mlp", experts.size)
        self.gate_proj = ExpertKernels(config, hidden, inner, rngs=rngs)
        self.up_proj = ExpertKernels(config, hidden, inner, rngs=rngs)
        self.down_proj = ExpertKernels(config, inner, hidden, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Runs the mixture: [B, T, hidden_size] -> [B, T, hidden_size] in config.dtype."""
        experts, dtype = self.config.experts, jnp.dtype(self.config.dtype)
        assert experts is not None
        weights, chosen = self.route(inputs)
        gate, up, down = (
            projection.kernel[...].astype(dtype)
            for projection in (self.gate_proj, self.up_proj, self.down_proj)
        )
        # Every device sorts its own tokens, and holds a part of the width of every expert.
        division = divide_over_mesh(inputs.shape[0], experts.size, inputs.shape[1])
        width_axes = tuple(name for name in division.heads if division.sizes[name] > 1)
        mix = division.map(
            functools.partial(_mix, num_experts=experts.count, width_axes=width_axes),
            in_specs=(
                *(division.positions,) * 3,
                *(P(None, None, division.heads),) * 2,
                P(None, division.heads),
            ),
            out_specs=division.positions,
        )
        return mix(inputs.astype(dtype), weights, chosen, gate, up, down)

    def route(self, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Chooses the experts of each token.

        Args:
            inputs: [B, T, hidden_size].

        Returns:
            The weights, [B, T, per_token] float32, and the experts' numbers, [B, T, per_token]
            int32.
        """
        experts = self.config.experts
        assert experts is not None
        probabilities = jax.nn.softmax(self.router(inputs))
        weights, chosen = jax.lax.top_k(probabilities, experts.per_token)
        if experts.normalize:
            weights /= weights.sum(-1, keepdims=True)
        return weights, chosen


class ExpertKernels(nnx.Module):
    """One matrix for each expert: `kernel` [count, in, out]; axes are given by name and size."""

    def __init__(
        self,
        config: ModelConfig,
        inputs: tuple[str, int],
        outputs: tuple[str, int],
        *,
        rngs: nnx.Rngs,
    ):
        assert config.experts is not None
        kernel = normal(config, "experts", inputs[0], outputs[0])(
            rngs.params(),
            (config.experts.count, inputs[1], outputs[1]),
            jnp.dtype(config.param_dtype),
        )
        self.kernel = nnx.Param(kernel)


def _mix(
    inputs: jax.Array,
    weights: jax.Array,
    chosen: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    *,
    num_experts: int,
    width_axes: tuple[str, ...],
) -> jax.Array:
    """Runs the mixture on one device's tokens, with its part of the experts' width.

    The pairs of a token and one of its experts are sorted by expert, so that each of the three
    products is one of groups of rows with a matrix for each group.

    Args:
        inputs: [B, T, hidden_size].
        weights, chosen: [B, T, per_token].
        gate, up: [count, hidden_size, width], this device's part of the width.
        down: [count, width, hidden_size], likewise.
        num_experts: count.
        width_axes: the mesh axes that divide the width; the result is summed over them.

    Returns:
        [B, T, hidden_size] in the inputs' dtype.
    """
    expert = chosen.reshape(-1)  # [B * T * per_token], of each pair
    order = jnp.argsort(expert)
    rank = jnp.argsort(order)  # of each pair among the sorted ones
    numbers = jnp.arange(num_experts, dtype=jnp.int32)
    sizes = jnp.sum(expert[:, None] == numbers[None], axis=0, dtype=jnp.int32)
    rows = _send(inputs.reshape(-1, inputs.shape[-1]), order, rank)
    inner = jax.nn.silu(grouped_dot(rows, gate, sizes)) * grouped_dot(rows, up, sizes)
    parts = _send(grouped_dot(inner, down, sizes), rank, order)
    parts = parts.reshape(*chosen.shape, -1).astype(jnp.float32)
    outputs = jnp.sum(weights[..., None] * parts, axis=2).astype(inputs.dtype)
    return jax.lax.psum(outputs, width_axes) if width_axes else outputs


@jax.custom_vjp
def _send(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """Copies each row of x the same number of times, and puts the copies into another order.

    Its own gradient is a gather and a sum; that of indexing would be a scattered sum, which TPUs
    do a row at a time.

    Args:
        x: [rows, size].
        order: [rows * copies] integers, a permutation; entry i is the copy that goes to row i, and
            copy j is of row j // copies.
        inverse: the inverse permutation.

    Returns:
        [rows * copies, size].
    """
    return x[order // (len(order) // len(x))]


def _send_forward(x, order, inverse):
    return _send(x, order, inverse), (inverse, len(x))


def _send_backward(residuals, d_out):
    inverse, length = residuals
    copies = d_out[inverse].reshape(length, -1, d_out.shape[-1])
    return copies.sum(axis=1), None, None


_send.defvjp(_send_forward, _send_backward)
