"""Numbers as users give them: numpy's made Python's, whether they fit, and how errors show them."""

import reprlib
import sys
from typing import Any, TypeGuard

import jax
import numpy as np

LARGEST_INT32 = 2**31 - 1
"""Sizes and counts above it do not fit the indices that a device computes with."""

_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


def plain(value: Any) -> Any:
    """Returns a scalar of numpy or jax as Python's number, and anything else as it is."""
    if isinstance(value, np.ndarray | jax.Array):
        known = value.ndim == 0 and not isinstance(value, jax.core.Tracer)
        return value.item() if known else value
    return value.item() if isinstance(value, np.generic) else value


def is_integer(value: object) -> TypeGuard[int]:
    """Whether it is a Python integer; a truth value is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_count(value: object, least: int = 1) -> TypeGuard[int]:
    """Whether it is an integer of at least `least` that fits 32 bits."""
    return is_integer(value) and least <= value <= LARGEST_INT32


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite number."""
    return (is_integer(value) or isinstance(value, float)) and abs(value) <= sys.float_info.max


def is_positive(value: object) -> TypeGuard[float]:
    """Whether it is a number that in float32, too, is finite and above 0."""
    return is_number(value) and value <= _LARGEST_FLOAT32 and bool(np.float32(value) > 0)


class _Short(reprlib.Repr):
    """Python's notation, cut where a value is long or deep."""

    def __init__(self) -> None:
        super().__init__(
            maxlevel=4, maxdict=16, maxlist=40, maxtuple=40, maxset=40, maxstring=160, maxother=160
        )

    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() > 1024:  # Python refuses to write thousands of digits
            return f"<an integer of {x.bit_length()} bits>"
        return super().repr_int(x, level)


_SHORT = _Short()


def shown(value: object) -> str:
    """Writes a value of any type and size in one line that an error can hold."""
    return " ".join(_SHORT.repr(value).split())
