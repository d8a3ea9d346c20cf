"""A mixture of SwiGLUs in place of one: every token goes through a few of them."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from nha_jax.config import ModelConfig
from nha_jax.layers.grouped_matmul import grouped_dot
from nha_jax.layers.parameters import partitioned
from nha_jax.ops.mesh.division import divide_over_mesh


class MixtureOfExperts(nnx.Module):
    """sum_i weight_i * SwiGLU_i(x) over a token's experts i (Qwen3-MoE, arXiv 2505.09388).

    A softmax over all experts, computed in float32, says which `per_token` of them a token goes
    through, and how much each counts. None has a capacity: no token is dropped, whatever the
    others chose. There is no loss that balances their loads; see `nha_jax.config_parts.Experts`.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        experts = config.experts
        assert experts is not None
        self.config = config
        self.router = nnx.Linear(
            config.hidden_size,
            experts.count,
            use_bias=False,
            dtype=jnp.float32,
            param_dtype=jnp.dtype(config.param_dtype),
            precision=jax.lax.Precision.HIGHEST,  # rounding would send tokens elsewhere
            kernel_init=partitioned(
                jax.nn.initializers.normal(config.initializer_range), "embed", "experts"
            ),
            rngs=rngs,
        )
        hidden, inner = ("embed", config.hidden_size), ("mlp", experts.size)
        self.gate_proj = ExpertKernels(config, hidden, inner, rngs=rngs)
        self.up_proj = ExpertKernels(config, hidden, inner, rngs=rngs)
        self.down_proj = ExpertKernels(config, inner, hidden, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """[B, T, hidden_size] -> [B, T, hidden_size] in config.dtype."""
        experts, dtype = self.config.experts, jnp.dtype(self.config.dtype)
        assert experts is not None
        weights, chosen = self.route(inputs)
        gate, up, down = (
            projection.kernel[...].astype(dtype)
            for projection in (self.gate_proj, self.up_proj, self.down_proj)
        )
        # Every device sorts its own tokens, and has its part of every expert.
        division = divide_over_mesh(inputs.shape[0], experts.size, inputs.shape[1])
        shared = tuple(name for name in division.heads if division.sizes[name] > 1)
        mix = division.map(
            functools.partial(_mix, num_experts=experts.count, shared=shared),
            in_specs=(
                *(division.places,) * 3,
                *(P(None, None, division.heads),) * 2,
                P(None, division.heads),
            ),
            out_specs=division.places,
        )
        return mix(inputs.astype(dtype), weights, chosen, gate, up, down)

    def route(self, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of [B, T, hidden_size]: weights [B, T, per_token] float32, and whose they are, int32."""
        experts = self.config.experts
        assert experts is not None
        shares = jax.nn.softmax(self.router(inputs))
        weights, chosen = jax.lax.top_k(shares, experts.per_token)
        if experts.normalize:
            weights /= weights.sum(-1, keepdims=True)
        return weights, chosen


class ExpertKernels(nnx.Module):
    """One matrix an expert: `kernel` [count, in, out], whose axes are given by name and size."""

    def __init__(
        self,
        config: ModelConfig,
        inputs: tuple[str, int],
        outputs: tuple[str, int],
        *,
        rngs: nnx.Rngs,
    ):
        assert config.experts is not None
        initializer = jax.nn.initializers.normal(config.initializer_range)
        kernel = partitioned(initializer, "experts", inputs[0], outputs[0])(
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
    shared: tuple[str, ...],
) -> jax.Array:
    """What the layer gives, of one device's tokens and its part of the experts' width.

    The pairs of a token and its expert are sorted by expert, so that each of the three products is
    one of groups of rows with a matrix each.

    Args:
      inputs: [B, T, D].
      weights, chosen: [B, T, k].
      gate, up, down: [E, D, I], [E, D, I], [E, I, D].
      shared: the mesh axes that divide I.
    """
    expert = chosen.reshape(-1)  # [B * T * k]
    order = jnp.argsort(expert)
    place = jnp.argsort(order)  # of each pair among the sorted ones
    sizes = jnp.sum(expert[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    rows = _send(inputs.reshape(-1, inputs.shape[-1]), order, place)
    inner = jax.nn.silu(grouped_dot(rows, gate, sizes)) * grouped_dot(rows, up, sizes)
    parts = _send(grouped_dot(inner, down, sizes), place, order)
    parts = parts.reshape(*chosen.shape, -1).astype(jnp.float32)
    outputs = jnp.sum(weights[..., None] * parts, axis=2).astype(inputs.dtype)
    return jax.lax.psum(outputs, shared) if shared else outputs


@jax.custom_vjp
def _send(x: jax.Array, source: jax.Array, place: jax.Array) -> jax.Array:
    """x [N, D], each row k times, in the order `source` [N * k]; `place` is its inverse.

    The gradient of indexing would be a scattered sum, which TPUs do a row at a time.
    """
    return x[source // (len(source) // len(x))]


def _send_forward(x, source, place):
    return _send(x, source, place), (place, len(x))


def _send_backward(residuals, gradient):
    place, length = residuals
    copies = gradient[place].reshape(length, -1, gradient.shape[-1])
    return copies.sum(axis=1), None, None


_send.defvjp(_send_forward, _send_backward)
