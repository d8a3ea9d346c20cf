"""The order in which the work of a grid step's chunks is written down for the compiler.

The compiler keeps close to program order, and one chunk's work alone leaves units idle: a product
has to wait for the exponentials before it, and so on. So the chunks' stages are emitted side by
side.
"""

from collections.abc import Iterator


def emit(chunks: list[Iterator[None]], lockstep: int, skew: int) -> None:
    """Runs generators that emit a chunk's work and `yield` at the end of each stage.

    `lockstep` chunks go through their stages together, and each such set is `skew` stages (at least
    one) behind the set before. In every stage, therefore, the chunks come in the order of the list:
    a stage may leave a value to the same stage of the next chunk.
    """
    sets = [chunks[i : i + lockstep] for i in range(0, len(chunks), lockstep)]
    tick, running = 0, True
    while running:
        running = False
        for i in reversed(range(len(sets))):
            if tick < skew * i:
                running = True
                continue
            for chunk in sets[i]:
                running |= next(chunk, _DONE) is not _DONE
        tick += 1


_DONE = object()
