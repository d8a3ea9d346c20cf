"""The maximal-update parametrisation: what depends on a model's width, and how (muP).

Yang et al., "Tensor Programs V", arXiv 2203.03466, table 8. Every width of the model is taken to
grow with hidden_size: the numbers of heads, mlp_size and the experts' size. Learning rate and
initializer_range that were chosen at mup_base_width then serve at any, divided by what depends on
width_ratio = hidden_size / mup_base_width:

| parameter | initial deviation | step of Adam | step of Muon |
| --- | --- | --- | --- |
| hidden: projections, gates, SwiGLUs, experts | sqrt(width_ratio) | width_ratio | its root |
| router of experts: its outputs do not grow | width_ratio | width_ratio | width_ratio |
| embedding, head, norms, biases, convolutions | 1 | 1 | |
| adapter: lora_a, which reads the width | (its own) | width_ratio | its root |
| adapter: lora_b, which reads its rank | (0) | 1 | 1 |

and the head's logits by width_ratio. An entry of Adam's step is as large at any width, and the
steps of a matrix line up with its input, so that their sum over the input's width has to be divided
by it. Muon's step, scaled to the size of AdamW's, has singular values that grow as the width's
root; they may not grow, and the router's must fall as that root (Yang, Simon and Bernstein, arXiv
2310.17813). The weights' decay has no part in it: what a step decays depends on no width.

Heads keep their size, so that the scale of the attention's logits, 1/sqrt(key_dim), stays. If
key_dim grows instead, queries and keys line up as they learn, and these logits grow as its root.
"""

from collections.abc import Sequence


def initial_factor(width_ratio: float, axes: Sequence[str | None]) -> float:
    """Says what multiplies the standard deviation of a parameter at the start.

    Args:
        width_ratio: as `ModelConfig.width_ratio`.
        axes: the logical names of the parameter's axes (`nha_jax.layers.LOGICAL_AXES`).
    """
    if not _is_of_layers(axes):
        return 1.0
    return 1 / width_ratio if axes[-1] == "experts" else width_ratio**-0.5


def step_factor(
    width_ratio: float, axes: Sequence[str | None], *, orthogonal: bool = False
) -> float:
    """Says what multiplies the learning rate of a parameter.

    Args:
        width_ratio: as `ModelConfig.width_ratio`.
        axes: the logical names of the parameter's axes.
        orthogonal: whether matrices of the layers have Muon's steps, not ones like Adam's.
    """
    if not _is_of_layers(axes):
        return 1.0
    return width_ratio**-0.5 if orthogonal and axes[-1] != "experts" else 1 / width_ratio


def _is_of_layers(axes: Sequence[str | None]) -> bool:
    """Whether a parameter is a matrix, or a stack of them, that reads a layer's width."""
    own = [name for name in axes if name != "layers"]
    return len(own) >= 2 and own[-2] != "rank" and not {"vocab", "conv"} & {*own}
