"""Numerics testing: cases of the operator, its definition in float64, and tolerances.

`assert_matches_reference` holds an implementation against the definition on a case: every output,
the state and all gradients. `CASES` are few, and any two kinds of options meet in one of them;
`random_case` draws others. Nothing else of the library imports this package, and its comparisons
need the package chex (`pip install "nha_jax[notebook]"`).
"""

from nha_jax.testing.cases import (
    CASES,
    GATES,
    OPTIONS,
    ROPES,
    SMALL_BLOCKS,
    Case,
    Inputs,
    log_decays,
    make_inputs,
    random_case,
)
from nha_jax.testing.comparison import (
    TOLERANCES,
    Tolerance,
    assert_close,
    assert_matches_reference,
    attend,
    attend_with_gradients,
    relative_error,
    run,
)

__all__ = [
    "CASES",
    "GATES",
    "OPTIONS",
    "ROPES",
    "SMALL_BLOCKS",
    "TOLERANCES",
    "Case",
    "Inputs",
    "Tolerance",
    "assert_close",
    "assert_matches_reference",
    "attend",
    "attend_with_gradients",
    "log_decays",
    "make_inputs",
    "random_case",
    "relative_error",
    "run",
]
