"""`LayerConfig`: what one attention layer is made of, and the checks that `ModelConfig` shares."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, get_args

import jax
import numpy as np
from flax.core import FrozenDict

from nha_jax.config_parts import RopeScaling
from nha_jax.ops import backends
from nha_jax.ops.types import EmptySlots, KernelOptions, SlotFeatureMap
from nha_jax.scalars import LARGEST_INT32, is_count, is_positive, plain, shown

if TYPE_CHECKING:
    DerivedInt = Any
else:
    # None asks for the default that follows from the other fields; once a config is built the
    # field holds an int, so type checkers need not see the None.
    DerivedInt = int | None

DType = Literal["bfloat16", "float32"]
AttentionBias = Literal["none", "qkv", "all"]
ValueActivation = Literal["silu", "identity"]


class LayerFields:
    """What `LayerConfig` and `ModelConfig` have in common: fields of one meaning, and their checks.

    The fields are declared where their defaults are. Here are those that are read of either.
    """

    _owner: ClassVar[str]  # whom errors name
    _query_heads: ClassVar[str]  # the field that counts query heads

    hidden_size: int
    num_kv_heads: DerivedInt
    key_dim: DerivedInt
    value_dim: DerivedInt
    conv_width: int
    rope_theta: float | None
    norm_eps: float
    output_norm_eps: float | None
    attention_scale: float | None
    slot_delay: int | None
    initializer_range: float
    dtype: jax.typing.DTypeLike
    param_dtype: jax.typing.DTypeLike
    implementation: str | None
    kernel_options: KernelOptions | None

    def initializer_range_of(self, *axes: str) -> float:
        """Returns the standard deviation that a matrix with these logical axes starts with."""
        return self.initializer_range

    def _check_layer(self) -> None:
        """Fills in what follows from other fields; raises ValueError for the first wrong one."""
        for field in ("hidden_size", self._query_heads):
            self._check_integer(field, minimum=1)
        self._check_integer("num_slots", minimum=0)
        self._check_heads()
        self._check_integer("conv_width", minimum=0)
        if self.conv_width == 1:
            self._reject("conv_width", "has no past tap; use 0 for no convolution, or 2 and more")
        self._check_positive("gate_logit_normalizer", "norm_eps", "initializer_range")
        for field in ("rope_theta", "output_norm_eps", "attention_scale"):
            if getattr(self, field) is not None:
                self._check_positive(field)
        self._check_truth("output_norm", "qk_norm")
        self._check_choice("implementation", (*backends.names(), None))
        for field, choices in _CHOICES.items():
            self._check_choice(field, choices)
        self._freeze_kernel_options()
        self._build("rope_scaling", RopeScaling)

    def _check_heads(self) -> None:
        num_heads = getattr(self, self._query_heads)
        self._derive("num_kv_heads", num_heads)
        if self.key_dim is None and self.hidden_size % num_heads:
            self._reject(
                "hidden_size",
                f"is not a multiple of {self._query_heads}={num_heads}; "
                "change one of them or give key_dim",
            )
        self._derive("key_dim", self.hidden_size // num_heads)
        self._derive("value_dim", self.key_dim)
        if num_heads % self.num_kv_heads:
            self._reject(
                "num_kv_heads",
                f"must divide {self._query_heads}={num_heads}: "
                "every key/value head serves the same number of query heads",
            )
        if self.rope_theta is not None and self.key_dim % 2:
            self._reject("key_dim", "must be even: the rotary embedding turns pairs of entries")

    def _check_slot_delay(self, windows: Sequence[int | None]) -> None:
        if self.slot_delay is None:
            return
        shortest = min(-1 if window is None else window for window in windows)
        if not is_count(self.slot_delay, 0) or self.slot_delay > shortest:
            self._reject(
                "slot_delay",
                "must be None, or an integer from 0 to the shortest window, none of which may be "
                f"None; the windows are {', '.join(map(str, windows))}",
            )

    def _derive(self, field: str, default: int) -> None:
        if getattr(self, field) is None:
            object.__setattr__(self, field, default)
        self._check_integer(field, minimum=1)

    def _reject(self, field: str, reason: str) -> NoReturn:
        raise ValueError(f"{self._owner}: {field}={shown(getattr(self, field))} {reason}")

    def _check_integer(self, field: str, *, minimum: int) -> None:
        value = getattr(self, field)
        if not is_count(value, minimum):
            expected = f"must be an integer of at least {minimum}"
            self._reject(field, f"{expected} and at most {LARGEST_INT32}")

    def _check_positive(self, *fields: str) -> None:
        for field in fields:
            if not is_positive(getattr(self, field)):
                self._reject(field, "must be a finite number above 0, in float32 too")

    def _check_truth(self, *fields: str) -> None:
        for field in fields:
            if not isinstance(getattr(self, field), bool):
                self._reject(field, "must be true or false")

    def _check_choice(self, field: str, choices: tuple[str | None, ...]) -> None:
        value = getattr(self, field)
        if not isinstance(value, str | None) or value not in choices:
            self._reject(field, f"must be one of {', '.join(map(repr, choices))}")

    def _freeze_kernel_options(self) -> None:
        given: Any = self.kernel_options
        if isinstance(given, Mapping):
            given = {
                name: {key: plain(x) for key, x in one.items()} if isinstance(one, Mapping) else one
                for name, one in given.items()
            }
        try:
            backends.check_kernel_options(given)
        except ValueError as error:
            raise ValueError(f"{self._owner}: {error}") from None
        if given is not None:  # hashable, as a static argument of jax.jit must be
            object.__setattr__(self, "kernel_options", FrozenDict(given))

    def _build(self, field: str, part: type) -> None:
        value = getattr(self, field)
        if isinstance(value, Mapping):
            try:
                object.__setattr__(self, field, part(**value))
            except (TypeError, ValueError) as error:
                self._reject(field, f"does not fit: {error}")
        elif not isinstance(value, part | None):
            kind = part.__name__
            self._reject(
                field, f"must be {_article(kind)} {kind}, a mapping of its fields, or None"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerConfig(LayerFields):
    """What one attention layer is made of: the arguments of `nha_jax.NHAttention`, checked.

    Its fields are these arguments, by their names; None stands in none whose value follows from
    others, and scalars of numpy and jax are Python's. It is hashable.

    Raises:
        ValueError: a field is out of its range or does not fit another; one line names the field,
            its value and the fix.
    """

    _owner: ClassVar[str] = "NHAttention"
    _query_heads: ClassVar[str] = "num_heads"

    hidden_size: int
    num_heads: int
    num_kv_heads: DerivedInt
    key_dim: DerivedInt
    value_dim: DerivedInt
    num_slots: int
    window_size: int | None
    conv_width: int
    gate_logit_normalizer: float
    value_activation: ValueActivation
    output_norm: bool
    output_norm_eps: float | None
    qk_norm: bool
    attention_scale: float | None
    attention_bias: AttentionBias
    rope_theta: float | None
    rope_scaling: RopeScaling | None
    norm_eps: float
    slot_feature_map: SlotFeatureMap
    slot_delay: int | None
    empty_slots: EmptySlots
    initializer_range: float
    dtype: jax.typing.DTypeLike
    param_dtype: jax.typing.DTypeLike
    implementation: str | None
    kernel_options: KernelOptions | None

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            object.__setattr__(self, each.name, plain(getattr(self, each.name)))
        for field in ("dtype", "param_dtype"):
            object.__setattr__(self, field, _name_of_dtype(getattr(self, field)))
        self._check_layer()
        if self.window_size is not None and not is_count(self.window_size, 0):
            self._reject(
                "window_size",
                "must be an integer of at least 0, or None (full attention); "
                f"it is at most {LARGEST_INT32}",
            )
        self._check_slot_delay((self.window_size,))
        if not self.num_slots and self.window_size == 0:
            self._reject("window_size", "leaves nothing to read: num_slots=0, so there is no slot")
        if self.rope_theta is None and self.rope_scaling is not None:
            self._reject("rope_scaling", "stretches no rotation, as rope_theta=None: leave one out")


def _name_of_dtype(dtype: Any) -> Any:
    """Names a dtype that is given as jax takes it; what is none, or missing, stays as it is."""
    try:
        return dtype if dtype is None else np.dtype(dtype).name
    except (TypeError, ValueError):
        return dtype


def _article(word: str) -> str:
    return "an" if word[0] in "AEIOU" else "a"


_CHOICES: dict[str, tuple[str | None, ...]] = {
    "slot_feature_map": get_args(SlotFeatureMap),
    "empty_slots": get_args(EmptySlots),
    "dtype": get_args(DType),
    "param_dtype": get_args(DType),
    "attention_bias": get_args(AttentionBias),
    "value_activation": get_args(ValueActivation),
}
