"""Stretched rotations and experts, the parts of a `ModelConfig`, and what an adapter is."""

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

from nha_jax.scalars import is_count, is_positive, plain, shown

RopeScalingKind = Literal["linear", "llama3", "yarn"]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How the rotary embedding's frequencies were changed for contexts longer than at first.

    Fields:
        kind: "linear" divides every frequency by `factor`. "llama3" (Llama 3.1) divides those that
            make fewer than low_frequency_factor turns over original_length, keeps those that make
            more than high_frequency_factor, and blends in between. "yarn" (arXiv 2309.00071) blends
            likewise, between the dimensions that make beta_slow and beta_fast turns, and multiplies
            the rotated vectors by attention_factor.
        factor: how many times longer the context became, at least 1.
        original_length: tokens of the context before; "llama3" and "yarn" need it.
        low_frequency_factor: for "llama3", the turns where the blend begins.
        high_frequency_factor: for "llama3", the turns where the blend ends.
        beta_fast: for "yarn", the turns above which a frequency stays as it is.
        beta_slow: for "yarn", the turns below which a frequency is divided by `factor`.
        attention_factor: for "yarn", what multiplies the rotated vectors; None for
            0.1 ln(factor) + 1.
        truncate: for "yarn", whether the blend begins and ends at whole dimensions.

    Raises:
        ValueError: a field is out of its range; one line names it, its value and what is expected.
    """

    kind: RopeScalingKind
    factor: float
    original_length: int | None = None
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _make_plain(self)
        kinds, kind = get_args(RopeScalingKind), self.kind
        fits = isinstance(kind, str) and kind in kinds
        _require(self, "kind", fits, f"one of {', '.join(map(repr, kinds))}")
        fits = is_positive(self.factor) and self.factor >= 1
        _require(self, "factor", fits, "a finite number of at least 1")
        fits = is_count(self.original_length) or (kind == "linear" and self.original_length is None)
        needed = "at least 1" if kind == "linear" else f"at least 1: kind={kind!r} needs it"
        _require(self, "original_length", fits, needed)
        for low, high in (("low_frequency_factor", "high_frequency_factor"),
                          ("beta_slow", "beta_fast")):  # fmt: skip
            least = getattr(self, low)
            _require(self, low, is_positive(least), "a finite number above 0")
            fits = is_positive(getattr(self, high)) and getattr(self, high) > least
            _require(self, high, fits, f"a finite number above {low}={least}")
        scale = self.attention_factor
        fits = scale is None or is_positive(scale)
        _require(self, "attention_factor", fits, "a finite number above 0, or None")
        _require(self, "truncate", isinstance(self.truncate, bool), "true or false")


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A mixture of SwiGLUs in place of one: a router sends every token to a few of them.

    Meant for pretrained models. Nothing balances how many tokens each expert gets: trained from
    scratch, a few experts would take all tokens, and the others would learn nothing.

    Fields:
        count: how many experts a layer has.
        per_token: how many of them every token goes to.
        size: width of each expert.
        normalize: whether the weights of a token's experts are scaled to add up to 1; if not, they
            are those of the router's softmax over all experts.

    Raises:
        ValueError: a field is out of its range; one line names it, its value and what is expected.
    """

    count: int
    per_token: int
    size: int
    normalize: bool = True

    def __post_init__(self) -> None:
        _make_plain(self)
        for name in ("count", "per_token", "size"):
            fits = is_count(getattr(self, name))
            _require(self, name, fits, "an integer of at least 1 and below 2**31")
        few = self.per_token <= self.count
        _require(self, "per_token", few, f"at most count={self.count}")
        _require(self, "normalize", isinstance(self.normalize, bool), "true or false")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Low-rank updates beside frozen projections (LoRA, Hu et al., arXiv 2106.09685).

    A projection becomes x kernel + (alpha / rank) (x lora_a) lora_b. The first factor is
    [in, rank] and drawn at random, the second is [rank, out] and begins as 0, so that at first
    nothing is changed. Only the factors are trained.

    Fields:
        rank: how many directions an update has, at most the smaller size of each kernel.
        alpha: the updates are multiplied by alpha / rank, so that one learning rate serves ranks
            that differ.
        targets: patterns of names of the projections that get an update, as a shell matches file
            names, e.g. blocks.mlp.*; by default those of query, key, value and output.

    Raises:
        ValueError: a field is out of its range; one line names it, its value and what is expected.
    """

    rank: int
    alpha: float = 16.0
    targets: tuple[str, ...] = ("blocks.attention.[qkvo]_proj",)

    def __post_init__(self) -> None:
        _make_plain(self)
        _require(self, "rank", is_count(self.rank), "an integer of at least 1 and below 2**31")
        _require(self, "alpha", is_positive(self.alpha), "a finite number above 0")
        listed = isinstance(self.targets, list | tuple)
        fits = listed and bool(self.targets) and all(isinstance(x, str) for x in self.targets)
        _require(self, "targets", fits, "a pattern at least, such as ('blocks.attention.*',)")
        object.__setattr__(self, "targets", tuple(self.targets))


_Part = RopeScaling | Experts | Adapter


def _make_plain(part: _Part) -> None:
    for field in dataclasses.fields(part):
        object.__setattr__(part, field.name, plain(getattr(part, field.name)))


def _require(part: _Part, name: str, condition: bool, expected: str) -> None:
    assert name in {field.name for field in dataclasses.fields(part)}
    if not condition:
        raise ValueError(f"{name}={shown(getattr(part, name))} must be {expected}")
