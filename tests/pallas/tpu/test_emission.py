"""The order in which the stages of chunks are emitted."""

import itertools
from collections.abc import Iterator

import pytest

from pallas.tpu.emission import emit

STAGES = 3


def emitted(chunks: int, lockstep: int, skew: int) -> list[tuple[int, int]]:
    """(chunk, stage) in the order of emission."""
    order = []

    def stages(chunk: int) -> Iterator[None]:
        for stage in range(STAGES):
            order.append((chunk, stage))
            yield

    emit([stages(chunk) for chunk in range(chunks)], lockstep, skew)
    return order


def test_chunks_in_lockstep() -> None:
    assert emitted(2, lockstep=2, skew=1) == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]


def test_a_later_chunk_is_emitted_ahead_of_a_later_stage() -> None:
    assert emitted(2, lockstep=1, skew=1) == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]
    assert emitted(2, lockstep=1, skew=2) == [(0, 0), (0, 1), (1, 0), (0, 2), (1, 1), (1, 2)]


@pytest.mark.parametrize("lockstep", [1, 2, 3, 8])
@pytest.mark.parametrize("skew", [1, 2, 4])
def test_chunks_reach_each_stage_in_their_order(lockstep: int, skew: int) -> None:
    """What the kernels rely on: a stage leaves the slots to the same stage of the next chunk."""
    order = emitted(8, lockstep, skew)
    assert sorted(order) == sorted(itertools.product(range(8), range(STAGES)))
    for stage in range(STAGES):
        assert [chunk for chunk, s in order if s == stage] == list(range(8))
